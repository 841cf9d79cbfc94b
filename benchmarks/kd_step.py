"""Claim: a KD step at a vocabulary of 151,936 is 1.5 x (float32) and 2 x (bfloat16) as fast as trl's GKDTrainer, in 0.55 and
0.5 of the memory (the target was 2.5 x and half), and faster and leaner than trl's chunked DistillationTrainer.

    python -m benchmarks.kd_step                # 10 minutes on two cores, 11 GB of memory, 2 GB of disk

Student 896 x 4 layers, teacher 1536 x 4 layers, tied heads, random weights; 4 x 256 tokens, about 800 of them scored
(prompts of 48 to 64 tokens, replies fill the rest), the same batch in both; forward KL, AdamW, clipping at 1, no sampling
(trl: lmbda 0, beta 0). minikd's step repeats train_kd.py's lines, but for AdamW, which is torch's, as the peer's. Each row
comes from child processes of its own that take turns. Seconds are the median of the steps after the first; peak is the child's
highest resident memory, `before` what it held when the first step began. Both load both models from the same bfloat16 folders.
    float32     student, teacher and products in float32
    bf16        autocast; the student's weights are float32, the teacher's bfloat16
    trl         GKDTrainer, which holds full logits
    chunked     trl's DistillationTrainer, which applies both heads in chunks; this batch in the place of the answers it samples
    naive       minikd's step with full logits: student(ids), teacher(ids), forward_kl, mean
    lean        minikd with --gradient-checkpointing, the teacher's states computed before and only its head in memory (as
                with --cache-teacher); peak is measured from the first step on
    default     trl with its defaults: bf16 as above, and gradient checkpointing (its two rows above have it off)
"""
import gc
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import (compare_steps, make_parser, peak_resident, report, reset_peak, resident, trainer_clock,
                                trl_options, word_tokenizer)
from benchmarks.shapes import SHAPES
from minikd.checkpoint import load_model, save_model
from minikd.head import head_loss, scored_positions
from minikd.losses import forward_kl
from minikd.model import Qwen2, mixed_precision
from minikd.training import apply_gradient, keep_freed_memory

SHALLOW = {"student": replace(SHAPES["0.5B"], num_hidden_layers=4), "teacher": replace(SHAPES["1.5B"], num_hidden_layers=4)}
ROWS, LENGTH, WORDS, LR = 4, 256, 151_643, 1e-5


def dataset(steps: int) -> list[dict]:
    """steps x ROWS rows: input_ids [256], and how many of them are the prompt."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(WORDS, (LENGTH,), generator=generator).tolist(),
             "prompt": int(torch.randint(48, 65, (), generator=generator))} for _ in range(steps * ROWS)]


def tensors(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T], and the mask [B, T] that is True on the reply."""
    prompts = torch.tensor([row["prompt"] for row in rows])
    return torch.tensor([row["input_ids"] for row in rows]), torch.arange(LENGTH) >= prompts[:, None]


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rows = dataset(steps)
    return [tensors(rows[at:at + ROWS]) for at in range(0, len(rows), ROWS)]


@keep_freed_memory()                                            # as the scripts' loops
def minikd(folder: Path, mode: str, steps: int, full_logits: bool = False, lean: bool = False):
    dtype = torch.float32 if mode == "float32" else torch.bfloat16
    student = load_model(folder / "student").train()
    teacher = load_model(folder / "teacher", dtype=dtype).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=0.0, fused=True)
    student.model.embed_tokens.in_place = True                  # as train_kd.py asks of make_optimizer
    seconds, losses, head = [], [], teacher.head.detach()
    if lean:
        head, kept = head.clone(), [states_of(teacher, *batch) for batch in batches(steps)]
        del teacher
        gc.collect()
        reset_peak()
    before = resident()
    for step, (ids, mask) in enumerate(batches(steps)):
        start = time.perf_counter()
        with mixed_precision(ids.device, dtype):
            if full_logits:
                with torch.no_grad():
                    soft = scored_positions(teacher(ids), ids, mask)[0]         # [N, V]
                loss = forward_kl(scored_positions(student(ids), ids, mask)[0], soft).mean()
            else:
                hidden, targets = scored_positions(student.hidden(ids, checkpointing=lean), ids, mask)
                soft = kept[step] if lean else states_of(teacher, ids, mask)
                loss, _, _ = head_loss(hidden, student.head, targets, soft, head, forward_kl, kd_ratio=1.0,
                                       weight=1 / len(targets))
        loss.backward()
        apply_gradient(student, optimizer, LR, max_grad_norm=1.0)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return seconds, losses, before


@torch.inference_mode()
def states_of(teacher: Qwen2, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return scored_positions(teacher.hidden(ids), ids, mask)[0]                  # [N, D']


def trl_models(folder: Path, mode: str) -> dict:
    """Student and teacher as its trainers take them."""
    from transformers import AutoModelForCausalLM
    load = lambda name, dtype: AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)
    return dict(model=load("student", torch.float32),
                teacher_model=load("teacher", torch.float32 if mode == "float32" else torch.bfloat16))


def trl(folder: Path, mode: str, steps: int):
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows):
        ids, mask = tensors(rows)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(~mask, -100)}

    config = GKDConfig(output_dir=str(folder / "out"), lmbda=0.0, beta=0.0, learning_rate=LR, max_length=LENGTH,
                       train_sampling_strategy="sequential", **trl_options(mode, steps, ROWS))
    clock = trainer_clock()
    trainer = GKDTrainer(args=config, data_collator=collate, train_dataset=Dataset.from_list(dataset(steps)),
                         processing_class=word_tokenizer(2), callbacks=[clock], **trl_models(folder, mode))
    trainer.train()
    return clock.seconds, clock.losses, clock.before


def trl_chunked(folder: Path, mode: str, steps: int):
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class OffPolicy(DistillationTrainer):
        def _prepare_inputs(self, rows):                        # it would sample answers here
            ids, mask = given[self.state.global_step]
            seen = torch.ones_like(ids)
            return {"prompt_ids": ids[:, :48], "prompt_mask": seen[:, :48], "completion_ids": ids[:, 48:],
                    "completion_mask": seen[:, 48:], "tool_mask": mask[:, 48:].long(), "num_items_in_batch": mask.sum()}

    given = batches(steps)
    config = DistillationConfig(output_dir=str(folder / "out"), beta=0.0, learning_rate=LR, shuffle_dataset=False,
                                **trl_options(mode, steps, ROWS))
    clock = trainer_clock()
    trainer = OffPolicy(args=config, train_dataset=Dataset.from_list([{"prompt": "w2"}] * steps * ROWS),
                        processing_class=word_tokenizer(3), callbacks=[clock], **trl_models(folder, mode))
    trainer.train()
    return clock.seconds, clock.losses, clock.before


METHODS = {"minikd": minikd, "trl": trl, "chunked": trl_chunked, "naive": partial(minikd, full_logits=True),
           "lean": partial(minikd, lean=True)}


def measure(method, mode: str, steps: int, folder: str):
    """In the child: `steps` steps by a function such as those in METHODS, which may leave `before` out."""
    torch.set_num_threads(2)
    seconds, losses, *before = method(Path(folder), mode, steps)
    assert len(seconds) == len(losses) == steps
    report(seconds=median(seconds[1:]), peak=peak_resident() / 1e9, loss=losses[0], last=losses[-1],
           **{"before": held / 1e9 for held in before})


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure(METHODS[sys.argv[2]], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    parser = make_parser(__doc__, steps=4, repeats=1)
    parser.add_argument("--peers", nargs="+", default=["trl", "chunked", "naive"], choices=["trl", "chunked", "naive"])
    args = parser.parse_args()
    runs = [(method, mode) for mode in ("float32", "bf16") for method in (*args.peers, "lean", "minikd")]
    runs += [("trl", "default")] if "trl" in args.peers else []
    with tempfile.TemporaryDirectory() as folder:
        for name, config in SHALLOW.items():
            save_model(Qwen2(config).to(torch.bfloat16).init_weights(len(name)), Path(folder) / name)
        compare_steps("benchmarks.kd_step", args.steps, args.repeats, folder, runs)


if __name__ == "__main__":
    main()
