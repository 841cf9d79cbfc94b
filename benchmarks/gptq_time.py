"""Claim: quantising a 0.5B shape on 16 x 512 calibration tokens is a matter of minutes on two cores, within 1.5 x the
memory of the model in bfloat16.

    python -m benchmarks.gptq_time              # 5 minutes on two cores, 2 GB of memory and of disk

Qwen2.5-0.5B's shape, random weights, random tokens; sym, group 128, act-order with static groups: quantize.py's defaults.
Peak is the child's highest resident memory from loading to the end, less what the process held before it loaded.
"""
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import decoding
from benchmarks.measure import child, machine, peak_resident, report, resident
from minikd.checkpoint import load_model, save_model
from minikd.data import Encoded
from minikd.gptq import quantize_model
from minikd.quant import to_w4, to_words

ROWS, LENGTH = 16, 512


def measure(folder: Path):
    torch.set_num_threads(2)
    ids = torch.randint(151_643, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    before, errors, start = resident(), [], time.perf_counter()
    model = load_model(folder, dtype=torch.bfloat16)
    size = sum(weight.nbytes for weight in model.parameters())
    words = quantize_model(model, [Encoded(row[:1], row[1:], True, i) for i, row in enumerate(ids)], 0,
                           store=to_words, on_layer=lambda name, error, rtn, bad: errors.append((error / rtn, bad)))
    seconds = time.perf_counter() - start
    save_model(to_w4(model, words, 128, True), folder / "w4")
    report(seconds=seconds, peak=(peak_resident() - before) / size, gigabytes=(peak_resident() - before) / 1e9,
           error=sum(error for error, _ in errors) / len(errors), worse=sum(bad for _, bad in errors), layers=len(errors))


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure(Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as folder:
        decoding.make_half(Path(folder))
        row = child("benchmarks.gptq_time", folder)
    print(f"{row['layers']:.0f} layers in {row['seconds']:.0f} s; peak {row['gigabytes']:.2f} GB, {row['peak']:.2f} of the "
          f"bfloat16 model; output error {row['error']:.2f} of round-to-nearest's in the mean, not below it in "
          f"{row['worse']:.0f}; others {row['others']:.0%}; {machine('torch')}")


if __name__ == "__main__":
    main()
