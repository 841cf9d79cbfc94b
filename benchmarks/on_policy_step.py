"""Claim: a step of on-policy distillation at a vocabulary of 151,936 is 1.9 x (float32) and 3 x (bfloat16) as fast as trl's
DistillationTrainer, in no more memory.

    python -m benchmarks.on_policy_step         # 20 minutes on two cores, 7 GB of memory, 2 GB of disk

Student and teacher of benchmarks/kd_step.py; 8 prompts of 28 tokens, 64 new tokens each (no stop token ends them earlier),
then the reverse KL of the student's own answers at temperature 1, AdamW, clipping at 1. trl applies both heads in chunks, too,
and computes the student's entropy for its log. minikd's step calls train_kd.py's own functions. The answers, and so the
losses, differ: each draws its own. Seconds are the median of the steps after the first.
    float32     models, products and sampling in float32
    bf16        autocast and a bfloat16 teacher; minikd samples with a bfloat16 copy, trl with its float32 weights under autocast
    default     trl with its defaults: bf16 as above, and gradient checkpointing (its two rows above have it off)
"""
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.grpo_step import NEW, WORDS, prompts
from benchmarks.kd_step import LR, SHALLOW, measure, trl_models
from benchmarks.measure import compare_steps, make_parser, trainer_clock, trl_options, word_tokenizer
from minikd.checkpoint import load_model, save_model
from minikd.data import Encoded
from minikd.generate import respond
from minikd.losses import reverse_kl
from minikd.model import Qwen2, cast_copy
from minikd.teacher import Teacher
from minikd.training import apply_gradient, keep_freed_memory, make_optimizer
from train_kd import forward_backward, response_tokens

ROWS = 8


@keep_freed_memory()                                            # as the scripts' loops
def minikd(folder: Path, mode: str, steps: int):
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    student, sampler = load_model(folder / "student").train(), None
    teacher = Teacher(load_model(folder / "teacher", dtype=dtype).requires_grad_(False))
    optimizer = make_optimizer(student, LR, weight_decay=0.0, in_place=True)
    asked, seconds, losses = prompts(ROWS * steps), [], []
    for step in range(steps):
        start = time.perf_counter()
        sampler = cast_copy(student, dtype, sampler)
        rows = [Encoded(prompt, [], False, i) for i, prompt in enumerate(asked[ROWS * step:ROWS * (step + 1)])]
        own = respond(sampler, rows, ROWS, NEW, (), seed=step, vocab=WORDS)
        scored = response_tokens([own])
        sums = forward_backward(own, student=student, weight=1 / scored, pad_id=0, dtype=dtype, checkpointing=False,
                                teacher=teacher, divergence=reverse_kl, kd_ratio=1.0)
        apply_gradient(student, optimizer, LR, max_grad_norm=1.0)
        seconds.append(time.perf_counter() - start)
        losses.append(float(sums[1]) / scored)
        assert scored == ROWS * NEW
    return seconds, losses


def trl(folder: Path, mode: str, steps: int):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer
    config = DistillationConfig(output_dir=str(folder / "out"), beta=1.0, learning_rate=LR, max_completion_length=NEW,
                                generation_kwargs={"min_new_tokens": NEW}, shuffle_dataset=False,
                                **trl_options(mode, steps, ROWS))
    clock = trainer_clock()
    text = [{"prompt": " ".join(f"w{i}" for i in prompt)} for prompt in prompts(ROWS * steps)]
    trainer = DistillationTrainer(args=config, train_dataset=Dataset.from_list(text), processing_class=word_tokenizer(WORDS),
                                  callbacks=[clock], **trl_models(folder, mode))
    trainer.train()                                             # it samples after on_step_begin: the clock includes that
    return clock.seconds, clock.losses


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure({"minikd": minikd, "trl": trl}[sys.argv[2]], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    args = make_parser(__doc__, steps=3, repeats=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, config in SHALLOW.items():
            save_model(Qwen2(config).to(torch.bfloat16).init_weights(len(name)), Path(folder) / name)
        compare_steps("benchmarks.on_policy_step", args.steps, args.repeats, folder)


if __name__ == "__main__":
    main()
