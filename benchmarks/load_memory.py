"""Claim: loading a checkpoint needs at its peak at most 1.15 x the model's bytes in the requested dtype.

    python -m benchmarks.load_memory            # a minute on two cores, 3 GB of disk; also measures transformers

Qwen2.5-0.5B's shape with random weights. Each figure is how much a child's highest resident memory grows while it loads and
then reads every weight once (transformers only maps a file of the right dtype, so that the first use reads it), pages of mapped
files included; ratio is that divided by the bytes of the parameters in the requested dtype.
"""
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.decoding import make_model
from benchmarks.measure import child, in_turns, machine, make_parser, peak_resident, report, reset_peak, resident, table
from benchmarks.shapes import SHAPES
from minikd.checkpoint import load_model
from minikd.model import Qwen2

CASES = [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float32")]


def measure(method: str, folder: str, dtype: str):
    dtype = getattr(torch, dtype)
    torch.zeros(64, 64) @ torch.zeros(64, 64)                                   # torch's own initialisation is not counted
    if method == "transformers":
        from transformers import AutoModelForCausalLM, Qwen2ForCausalLM         # noqa: F401  (imports the model's code)
    before = resident()
    reset_peak()
    start = time.perf_counter()
    if method == "minikd":
        model = load_model(folder, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.detach().view(-1)[::512].sum()                                # reads every page
    seconds, grown = time.perf_counter() - start, peak_resident() - before
    report(ratio=grown / sum(p.nbytes for p in model.parameters()), grown=grown / 1e6, seconds=seconds)


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure(*sys.argv[2:])
    args = make_parser(__doc__, repeats=3).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for stored in "bfloat16", "float32":
            make_model(Path(folder) / stored, getattr(torch, stored))
        for stored, asked in CASES:
            figures = in_turns(("transformers", "minikd"), lambda method: child(
                "benchmarks.load_memory", method, Path(folder) / stored, asked), args.repeats)
            theirs, ours = figures["transformers"], figures["minikd"]
            rows.append([f"{stored} folder -> {asked}", f"{theirs['grown']:,.0f}", f"{ours['grown']:,.0f}",
                         f"{theirs['ratio']:.2f}", f"{ours['ratio']:.2f}", f"{theirs['seconds']:.1f}",
                         f"{ours['seconds']:.1f}", f"{max(theirs['others'], ours['others']):.0%}"])
    with torch.device("meta"):
        count = sum(p.numel() for p in Qwen2(SHAPES["0.5B"]).parameters())
    print(f"{count:,} parameters")
    table(["", "transformers MB", "minikd MB", "transformers ratio", "minikd ratio", "transformers s", "minikd s",
           "others"], rows)
    print(f"{args.repeats} turns; " + machine("torch", "transformers"))


if __name__ == "__main__":
    main()
