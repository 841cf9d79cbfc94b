"""Claim: a step of supervised fine-tuning at a vocabulary of 151,936 is at least 1.7 x (float32) and 2.2 x (bfloat16) as fast as
trl's SFTTrainer, in 0.8 of its memory.

    python -m benchmarks.sft_step               # 20 minutes on two cores, 6 GB of memory, 1 GB of disk

The student, the rows and the modes of benchmarks/kd_step.py, without a teacher: cross-entropy of about 800 replies' tokens in
4 x 256, AdamW, clipping at 1, the same batch in both. trl applies its head in chunks as well, and recomputes the logits in the
backward pass; on a CPU also to the prompts' positions, about 1,020 in all, and it computes every one's entropy and accuracy
for its log (with only the 796 that count, its step took 0.8 of the time, by a script that is not kept). minikd's step repeats
train_kd.py's lines, but for AdamW, which is torch's, as the peer's. Seconds are the median of the steps after the first.
    float32     all in float32
    bf16        autocast; the weights are float32
    default     trl with its defaults: bf16 as above, and gradient checkpointing (its two rows above have it off)
"""
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.kd_step import LENGTH, LR, ROWS, SHALLOW, batches, dataset, measure
from benchmarks.measure import compare_steps, make_parser, resident, trainer_clock, trl_options, word_tokenizer
from minikd.checkpoint import load_model, save_model
from minikd.head import head_loss, scored_positions
from minikd.model import Qwen2, mixed_precision
from minikd.training import apply_gradient, keep_freed_memory


@keep_freed_memory()                                            # as the scripts' loops
def minikd(folder: Path, mode: str, steps: int):
    student = load_model(folder).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0, fused=True)
    student.model.embed_tokens.in_place = True                  # as train_kd.py asks of make_optimizer
    seconds, losses, before = [], [], resident()
    for ids, mask in batches(steps):
        start = time.perf_counter()
        with mixed_precision(ids.device, torch.float32 if mode == "float32" else torch.bfloat16):
            hidden, targets = scored_positions(student.hidden(ids), ids, mask)
            loss, _, _ = head_loss(hidden, student.head, targets, weight=1 / len(targets))
        loss.backward()
        apply_gradient(student, optimizer, LR, max_grad_norm=1.0)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return seconds, losses, before


def trl(folder: Path, mode: str, steps: int):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": row["input_ids"], "completion_mask": [int(at >= row["prompt"]) for at in range(LENGTH)]}
            for row in dataset(steps)]
    config = SFTConfig(output_dir=str(folder / "out"), learning_rate=LR, max_length=LENGTH, completion_only_loss=True,
                       train_sampling_strategy="sequential", **trl_options(mode, steps, ROWS))
    clock = trainer_clock()
    trainer = SFTTrainer(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config,
                         train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(2), callbacks=[clock])
    trainer.train()
    return clock.seconds, clock.losses, clock.before


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure({"minikd": minikd, "trl": trl}[sys.argv[2]], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    args = make_parser(__doc__, steps=5, repeats=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Qwen2(SHALLOW["student"]).to(torch.bfloat16).init_weights(7), folder)
        compare_steps("benchmarks.sft_step", args.steps, args.repeats, folder)


if __name__ == "__main__":
    main()
