"""Claim: decoding in bfloat16 on a CPU with AVX512-BF16 is 1.7 x (batch 1, in less memory) and 1.6 x (batch 8) as fast as
transformers' generate, and sampling 8 answers to one prompt, as GRPO does, 2.1 x. With AVX2 only: 1.2, 1.6 and 1.5 x. On an Intel
CPU with AMX: 1.35, 1.3 and 1.65 x.

    python -m benchmarks.decoding               # 4 minutes on two cores, 2 GB of memory and 1 of disk (float32: 4 and 2)
    python -m benchmarks.decoding --dtype float32       # for a CPU without instructions for bfloat16

Qwen2.5-0.5B's shape (24 layers, 896, 151,936 tied) with random weights; prompts of 28 tokens, always all 64 new tokens
(transformers by min_new_tokens). Each figure comes from a child process of its own, after a warm-up call; the two take
turns, medians are printed. tokens/s is new tokens per second of the whole call: minikd's includes packing the weights, both
include the prefill.
"""
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import child, in_turns, machine, make_parser, peak_resident, report, table
from benchmarks.shapes import SHAPES
from minikd.checkpoint import load_model, save_model
from minikd.generate import generate
from minikd.layout import use_int8_head
from minikd.model import Qwen2, allocate

PROMPT, NEW = 28, 64


def make_model(folder, dtype=torch.bfloat16, shape="0.5B"):
    """Writes a model folder: one of Qwen2.5's shapes with random weights."""
    with torch.device("meta"):
        model = Qwen2(SHAPES[shape]).to(dtype)
    save_model(allocate(model, "cpu").init_weights(0), folder)


def minikd(folder, group: int, dtype: torch.dtype, int8_head: bool = False):
    model = load_model(folder, dtype=dtype)
    if int8_head:
        use_int8_head(model)
    temperature = 1.0 if group > 1 else 0.0
    return lambda prompts, new: generate(model, prompts, new, temperature=temperature, samples=group, seed=0)


def transformers(folder, group: int, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=None, bos_token_id=None)

    def answer(prompts, new):
        ids = torch.tensor(prompts)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=group > 1, top_k=0,
                             num_return_sequences=group, max_new_tokens=new, min_new_tokens=new)
        return out[:, ids.shape[1]:].tolist()

    return answer


def measure(method: str, batch: int, group: int, folder: str, dtype: str = "bfloat16"):
    """In the child: a short warm-up, then one timed call."""
    torch.set_num_threads(2)
    answer = {"minikd": minikd, "minikd int8 head": partial(minikd, int8_head=True),
              "transformers": transformers}[method](folder, group, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(SHAPES["0.5B"].vocab_size, (batch, PROMPT), generator=generator).tolist()
    answer(prompts, 16)
    start = time.perf_counter()
    tokens = answer(prompts, NEW)
    seconds = time.perf_counter() - start
    assert [len(row) for row in tokens] == [NEW] * batch * group
    report(speed=batch * group * NEW / seconds, peak=peak_resident() / 1e6)


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), getattr(torch, args.dtype))            # read as it is: converting takes memory
        for name, batch, group in ("batch 1", 1, 1), ("batch 8", 8, 1), ("1 prompt, 8 samples", 1, 8):
            figures = in_turns(("transformers", "minikd"), lambda method: child(
                "benchmarks.decoding", method, batch, group, folder, args.dtype), args.repeats)
            theirs, ours = figures["transformers"], figures["minikd"]
            rows.append([name, f"{theirs['speed']:.1f}", f"{ours['speed']:.1f}",
                         f"{ours['speed'] / theirs['speed']:.2f}x", f"{theirs['peak']:,.0f}", f"{ours['peak']:,.0f}",
                         f"{max(theirs['others'], ours['others']):.0%}"])
    table(["", "transformers tokens/s", "minikd tokens/s", "ratio", "transformers peak MB", "minikd peak MB",
           "others"], rows)
    print(f"{args.dtype}, {args.repeats} turns; " + machine("torch", "transformers"))


if __name__ == "__main__":
    main()
