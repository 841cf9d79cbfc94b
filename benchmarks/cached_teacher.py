"""Claims: a KD step with the teacher's states read from disk has the loss and gradient of one with the live teacher to 1e-3 (if
they were computed in the same batches: in others a bfloat16 teacher rounds differently, up to 1e-2 of the gradient), and from
the second epoch on is 2 x as fast, for a teacher 6 x as large as the student (on an Intel CPU with AMX 1.4 x).

    python -m benchmarks.cached_teacher         # 15 minutes on two cores, 17 GB of memory, 8 GB of disk

The shapes of Qwen2.5-3B and 0.5B with random weights; a step has 4 x 256 tokens, about 800 of them scored; forward KL, AdamW,
the gradients by train_kd.py's own forward_backward. Child processes take turns. `exact`: one child computes the gradient of the
same step both ways, from the same student.
    float32     everything in float32, in smaller shapes (the 3B's would need 22 GB): only `exact`
"""
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import child, in_turns, machine, make_parser, peak_resident, report, table
from benchmarks.shapes import COMMON, SHAPES
from minikd.checkpoint import load_head, load_model, save_model
from minikd.config import Qwen2Config
from minikd.data import Encoded
from minikd.losses import forward_kl
from minikd.model import Qwen2
from minikd.teacher import CachedTeacher, Teacher, fill_cache
from minikd.training import apply_gradient, keep_freed_memory, make_optimizer
from train_kd import forward_backward

LARGE = {"student": SHAPES["0.5B"], "teacher": SHAPES["3B"]}
SMALL = {"student": Qwen2Config(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_hidden_layers=4, **COMMON),
         "teacher": Qwen2Config(hidden_size=1024, intermediate_size=2752, num_attention_heads=16, num_hidden_layers=8, **COMMON)}
ROWS, LENGTH = 4, 256


def rows_of(steps: int) -> list[list[Encoded]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(151_643, (steps * ROWS, LENGTH), generator=generator).tolist()
    cuts = torch.randint(48, 65, (steps * ROWS,), generator=generator).tolist()
    rows = [Encoded(row[:cut], row[cut:], True, i) for i, (row, cut) in enumerate(zip(ids, cuts))]
    return [rows[at:at + ROWS] for at in range(0, len(rows), ROWS)]


def teacher_of(method: str, folder: Path, dtype: torch.dtype):
    if method == "live":
        return Teacher(load_model(folder / "teacher", dtype=dtype).requires_grad_(False))
    return CachedTeacher(folder / "cache", load_head(folder / "teacher", dtype=dtype))


def fill(folder: Path, dtype: torch.dtype, steps: int):
    start = time.perf_counter()
    load = lambda: load_model(folder / "teacher", dtype=dtype).requires_grad_(False)
    width = load_head(folder / "teacher", dtype=dtype).shape[1]
    tokens = fill_cache(folder / "cache", sum(rows_of(steps), []), {}, load, width, 0, ROWS, dtype)
    size = sum(path.stat().st_size for path in (folder / "cache").iterdir())
    report(seconds=time.perf_counter() - start, tokens=tokens, bytes_a_token=size / tokens)


@keep_freed_memory()                                            # as the scripts' loops
def train(method: str, folder: Path, dtype: torch.dtype, steps: int):
    student = load_model(folder / "student").train()
    teacher, optimizer, seconds = teacher_of(method, folder, dtype), make_optimizer(student, 1e-5, in_place=True), []
    for batch in rows_of(steps):
        start = time.perf_counter()
        step(student, teacher, batch, dtype)
        apply_gradient(student, optimizer, 1e-5, max_grad_norm=1.0)
        seconds.append(time.perf_counter() - start)
    report(seconds=median(seconds[1:]), peak=peak_resident() / 1e9)


def step(student, teacher, batch, dtype) -> float:
    scored = sum(len(row.response) for row in batch)
    _, kd = forward_backward(batch, student=student, weight=1 / scored, pad_id=0, dtype=dtype, checkpointing=False,
                             teacher=teacher, divergence=forward_kl, kd_ratio=1.0)
    return float(kd) / scored


def exact(folder: Path, dtype: torch.dtype, steps: int):
    student, batch, found = load_model(folder / "student").train(), rows_of(steps)[0], []
    for method in "live", "cached":
        loss = step(student, teacher_of(method, folder, dtype), batch, dtype)
        found.append((loss, [p.grad.clone() for p in student.parameters()]))
        student.zero_grad(set_to_none=True)
    (loss, grads), (other, others) = found
    norm = lambda tensors: sum(float(x.double().square().sum()) for x in tensors) ** 0.5
    report(loss=loss, loss_error=abs(other - loss) / loss,
           gradient_error=norm([a - b for a, b in zip(grads, others)]) / norm(grads))


def main():
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(2)
        what, folder, dtype, steps = sys.argv[2], Path(sys.argv[3]), getattr(torch, sys.argv[4]), int(sys.argv[5])
        job = {"fill": fill, "exact": exact, "live": partial(train, "live"), "cached": partial(train, "cached")}[what]
        return job(folder, dtype, steps)
    args = make_parser(__doc__, steps=4, repeats=1).parse_args()
    for shapes, dtype, title in (SMALL, "float32", "smaller"), (LARGE, "bfloat16", "3B -> 0.5B"):
        with tempfile.TemporaryDirectory() as folder:
            for name, config in shapes.items():
                save_model(Qwen2(config).to(getattr(torch, dtype)).init_weights(len(name)), Path(folder) / name)
            run = lambda what: child("benchmarks.cached_teacher", what, folder, dtype, args.steps)
            made, errors = run("fill"), run("exact")
            print(f"{title}, {dtype}: {made['tokens']:,.0f} tokens cached in {made['seconds']:.0f} s, "
                  f"{made['bytes_a_token']:,.0f} bytes a token; loss {errors['loss']:.4f}, relative error "
                  f"{errors['loss_error']:.1e}, gradient's {errors['gradient_error']:.1e}", flush=True)
            if shapes is LARGE:
                figures = in_turns(("live", "cached"), run, args.repeats)
    rows = [[what, f"{row['seconds']:.1f}", f"{row['peak']:.1f}", f"{figures['live']['seconds'] / row['seconds']:.2f}x",
             f"{row['peak'] / figures['live']['peak']:.2f}", f"{row['others']:.0%}"] for what, row in figures.items()]
    table(["teacher", "s a step", "peak GB", "faster", "its peak", "others"], rows)
    print(f"{args.steps} steps, {args.repeats} turns; " + machine("torch"))


if __name__ == "__main__":
    main()
