"""Claim: quantising a 0.5B shape with 16 x 512 calibration tokens takes a few minutes on two cores and at most 1.5 x the memory
of the model in bfloat16.

    python -m benchmarks.gptq_time              # 5 minutes on two cores, 2 GB of memory and of disk
    python -m benchmarks.gptq_time --peer PYTHON        # also GPTQModel, by an interpreter PYTHON that has it

Qwen2.5-0.5B's shape, random weights, random tokens; symmetric, group 128, act-order with static groups, and inputs in float32
on a CPU that is slow in bfloat16, as in quantize.py.
GPTQModel gets the same folder, ids, group size, damping and batches of 4 rows; its other settings are its defaults: act-order
inside groups and of groups, finished layers offloaded to disk. Without GPTQMODEL_CPU_WORKERS=4 it fails on two cores.
"load to end" is the time from loading until the folder is written. Peak is the child's highest resident memory in that time,
minus what it held before. GPTQModel compiles on its first run: run this twice, and count the second.
"""
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.measure import child, machine, make_parser, peak_resident, report, resident, table
from benchmarks.shapes import SHAPES
from minikd.checkpoint import load_model, save_model
from minikd.command import pick_dtype
from minikd.data import Encoded
from minikd.gptq import quantize_model
from minikd.model import Qwen2
from minikd.quant import to_words
from minikd.toy import make_tokenizer
from minikd.w4 import to_w4

ROWS, LENGTH = 16, 512


def minikd(folder: Path, ids: list, clock) -> dict:
    errors = []
    model = load_model(folder, dtype=torch.bfloat16)
    clock()
    words = quantize_model(model, [Encoded(row[:1], row[1:], True, i) for i, row in enumerate(ids)], 0,
                           dtype=pick_dtype("auto", "cpu"), store=to_words,
                           on_layer=lambda name, error, rtn: errors.append(error / rtn))
    clock()
    save_model(to_w4(model, words, 128, True), folder / "w4")
    return dict(error=sum(errors) / len(errors), worse=sum(error >= 1 for error in errors), layers=len(errors))


def gptqmodel(folder: Path, ids: list, clock) -> dict:
    from gptqmodel import GPTQModel, QuantizeConfig
    config = QuantizeConfig(bits=4, group_size=128, sym=True, damp_percent=0.01)
    model = GPTQModel.load(str(folder), config, device="cpu")
    clock()
    done = model.quantize([dict(input_ids=row, attention_mask=[1] * len(row)) for row in ids], batch_size=4)
    clock()
    model.save(str(folder / "gptqmodel"))
    return dict(layers=sum(map(len, done.values())))


def measure(method: str, folder: Path):
    torch.set_num_threads(2)
    ids = torch.randint(151_643, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    if method == "gptqmodel":
        import gptqmodel as _                                   # before `before`: the memory of imports is not counted
    size = (folder / "model.safetensors").stat().st_size
    before, times = resident(), [time.perf_counter()]
    run = {"minikd": minikd, "gptqmodel": gptqmodel}[method]
    figures = run(folder, ids, lambda: times.append(time.perf_counter()))
    report(**figures, quantise=times[2] - times[1], whole=time.perf_counter() - times[0],
           peak=(peak_resident() - before) / size, gigabytes=(peak_resident() - before) / 1e9)


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure(sys.argv[2], Path(sys.argv[3]))
    parser = make_parser(__doc__)
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter that has gptqmodel")
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(folder)                                  # GPTQModel needs one, but no text is encoded
        save_model(Qwen2(replace(SHAPES["0.5B"], num_hidden_layers=args.layers)).bfloat16().init_weights(0), folder)
        ours = child("benchmarks.gptq_time", "minikd", folder)
        found = {"minikd": ours}
        if args.peer:
            os.environ["GPTQMODEL_CPU_WORKERS"] = "4"
            found["gptqmodel"] = child("benchmarks.gptq_time", "gptqmodel", folder, python=args.peer)
    for name, row in found.items():
        cells = []
        for key, digits in ("quantise", 0), ("whole", 0), ("gigabytes", 2):
            cells += [f"{row[key]:.{digits}f}", f"{row[key] / ours[key]:.2f}x"]
        rows.append([name, f"{row['layers']:.0f}", *cells, f"{row['peak']:.2f}", f"{row['others']:.0%}"])
    table(["", "layers", "quantise s", "", "load to end s", "", "peak GB", "", "of bfloat16", "others"], rows)
    print(f"minikd's output error {ours['error']:.2f} of round-to-nearest's in the mean, not below it in "
          f"{ours['worse']:.0f}; {machine('torch')}")


if __name__ == "__main__":
    main()
