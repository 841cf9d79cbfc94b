"""Claim: a GRPO step at a vocabulary of 151,936 is at least 1.7 x (float32) and 4 x (bfloat16) as fast as trl's GRPOTrainer, in
no more memory.

    python -m benchmarks.grpo_step              # 8 minutes on two cores, 5 GB of memory

896 x 4 layers (196M parameters), tied head, random weights; one prompt of 28 tokens, a group of 8, 64 new tokens each
(no stop token ends them earlier), temperature 1, no KL, AdamW, clipping at 1. minikd's step calls train_grpo.py's own
functions. Children take turns; seconds are the median of the steps after the first, peak is the highest resident memory.
    float32     model, products and sampling in float32 (trl: bf16 off, no gradient checkpointing)
    bf16        autocast; minikd samples with a bfloat16 copy, trl with its float32 weights under autocast
    default     trl with its defaults: gradient checkpointing and, on this CPU, bfloat16 autocast
"""
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import compare_steps, make_parser, peak_resident, report, trainer_clock, trl_options, word_tokenizer
from benchmarks.shapes import SHAPES
from minikd import grpo
from minikd.checkpoint import load_model, save_model
from minikd.data import Encoded
from minikd.model import Qwen2, cast_copy
from minikd.training import apply_gradient, keep_freed_memory, make_optimizer
from train_grpo import forward_backward

SHAPE = replace(SHAPES["0.5B"], num_hidden_layers=4)
GROUP, PROMPT, NEW, WORDS = 8, 28, 64, 151_643


def prompts(steps: int) -> list[list[int]]:
    return torch.randint(2, WORDS, (steps, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def reward(ids: list[int]) -> float:
    """The share of small ids: any reward that differs between answers would do."""
    return sum(token < WORDS // 2 for token in ids) / len(ids)


class NoStops:
    pad_id, eos_ids = 0, frozenset()

    def __len__(self):
        return SHAPE.vocab_size


@keep_freed_memory()                                            # as the scripts' loops
def minikd(folder: Path, mode: str, steps: int):
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    model, copy = load_model(folder / "model").train(), None
    optimizer = make_optimizer(model, 1e-6, weight_decay=0.0, in_place=True)
    seconds, parts = [], []
    for step, prompt in enumerate(prompts(steps)):
        clock = [time.perf_counter()]
        copy = cast_copy(model, dtype, copy)
        answers, old = grpo.sample_groups(copy, [Encoded(prompt, [], False, 0)], GROUP, NEW, NoStops(), seed=step)
        clock.append(time.perf_counter())
        advantages = grpo.group_advantages(torch.tensor([[reward(answer.response) for answer in answers]]))[0]
        share = grpo.token_weights([len(answer.response) for answer in answers])
        forward_backward(answers, old, old, advantages, share, model=model, pad_id=0, dtype=dtype, temperature=1.0,
                         vocab=None, clip=0.2, clip_high=None, beta=0.0, checkpointing=False)
        apply_gradient(model, optimizer, 1e-6, max_grad_norm=1.0)
        clock.append(time.perf_counter())
        seconds.append(clock[-1] - clock[0])
        parts.append(clock[1] - clock[0])
    assert all(len(answer.response) == NEW for answer in answers)
    return seconds, median(parts[1:])


def trl(folder: Path, mode: str, steps: int):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(output_dir=str(folder / "trl"), learning_rate=1e-6, beta=0.0, gradient_accumulation_steps=1,
                        num_generations=GROUP, max_completion_length=NEW, generation_kwargs={"min_new_tokens": NEW},
                        shuffle_dataset=False, **trl_options(mode, steps, GROUP))
    text = [{"prompt": " ".join(f"w{i}" for i in prompt)} for prompt in prompts(steps)]
    clock = trainer_clock()
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = GRPOTrainer(model=model, args=config, train_dataset=Dataset.from_list(text), processing_class=word_tokenizer(WORDS),
                          reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids], callbacks=[clock])
    # trl samples while it prepares a step's inputs, after on_step_begin: so the clock includes sampling.
    trainer.train()
    return clock.seconds, 0.0


def measure(method: str, mode: str, steps: int, folder: str):
    torch.set_num_threads(2)
    seconds, sampling = {"minikd": minikd, "trl": trl}[method](Path(folder), mode, steps)
    assert len(seconds) == steps
    report(seconds=median(seconds[1:]), sampling=sampling, peak=peak_resident() / 1e9)


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    args = make_parser(__doc__, steps=4, repeats=1).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Qwen2(SHAPE).init_weights(0), Path(folder) / "model")
        compare_steps("benchmarks.grpo_step", args.steps, args.repeats, folder)


if __name__ == "__main__":
    main()
