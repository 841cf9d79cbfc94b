"""Claims: at batch 1 on a CPU, minikd decodes a 4-bit folder 1.4 x as fast as the bfloat16 one, in 0.59 x the memory, and 2.8 x
as fast as transformers does the bfloat16 one (3.2 x with the head in int8); the folder is 0.47 x as large. With AVX2 only: 1.2 x
and 1.4 x. On an Intel CPU with AMX: 1.8 x and 2.5 x.

    python -m benchmarks.w4_decoding            # 10 minutes on two cores, 3 GB of memory, 2 GB of disk
    python -m benchmarks.w4_decoding --shape 3B --repeats 1     # 20 minutes, 7 GB of memory, 9 GB of disk; 0.38 x the memory

Qwen2.5's shapes with random weights, rounded to nearest (--method rtn: the speed does not depend on the codes), group
size 128; greedy, a prompt of 28 tokens, always all 64 new tokens. Children take turns; tokens/s is new tokens per second of
the whole call, peak is the child's highest resident memory.
"""
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import decoding
from benchmarks.measure import child, in_turns, machine, make_parser, table
from minikd.checkpoint import load_model, save_model
from minikd.gptq import quantize_model
from minikd.quant import to_words
from minikd.w4 import to_w4


def make(folder: Path, shape: str):
    decoding.make_model(folder / "bf16", shape=shape)
    model = load_model(folder / "bf16", dtype=torch.bfloat16)
    save_model(to_w4(model, quantize_model(model, [], 0, method="rtn", store=to_words), 128, True), folder / "w4")


def main():
    if sys.argv[1:2] == ["--child"]:
        return decoding.measure(sys.argv[2], int(sys.argv[4]), 1, sys.argv[3])
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--shape", choices=["0.5B", "1.5B", "3B"], default="0.5B")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make(folder, args.shape)
        size = {name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) / 1e6
                for name in ("bf16", "w4")}
        for batch in 1, 8:
            runs = [("minikd", "bf16"), ("minikd", "w4"), ("minikd int8 head", "w4"), ("transformers", "bf16")]
            figures = in_turns(runs, lambda run: child("benchmarks.w4_decoding", run[0], folder / run[1], batch), args.repeats)
            ours = figures["minikd", "w4"]
            table([f"batch {batch}", "folder MB", "tokens/s", "w4 faster", "peak MB", "w4's peak", "others"],
                  [[f"{method} {name}", f"{size[name]:,.0f}", f"{row['speed']:.1f}", f"{ours['speed'] / row['speed']:.2f}x",
                    f"{row['peak']:,.0f}", f"{ours['peak'] / row['peak']:.2f}", f"{row['others']:.0%}"]
                   for (method, name), row in figures.items()])
    print(f"{args.shape}, folder {size['w4'] / size['bf16']:.3f} of bf16's; {args.repeats} turns; "
          + machine("torch", "transformers"))


if __name__ == "__main__":
    main()
