"""Claim: the KD loss of 1,024 scored tokens needs 1/20 of the extra memory of full logits, and is not slower; trl's loss in tiles
of 4,096 tokens x 32,768 rows needs more memory, and is slower.

    python -m benchmarks.head_loss              # 10 minutes on two cores, 7 GB of memory

The student's states are [1024, 896] and its head [151936, 896]; the teacher's [1024, 1536] and [151936, 1536]. minikd's
head_loss against the same formula on full logits (naive: two matrix products, forward_kl and cross-entropy, mean, backward)
and against the loss of trl's DistillationTrainer, which has no cross-entropy, but the student's entropy for the log. Every
figure comes from a child process of its own; they take turns, medians are printed.
    time        of forward and backward, after a smaller warm-up
    extra MB    the highest resident memory during forward and backward, minus what was resident before and minus the
                two gradients that both must return (of the student's states and head)
    kd_ratio    1: only the divergence; 0.5: also cross-entropy, for which naive needs even more
    bf16        all weights in bfloat16
    autocast    the student's weights in float32, multiplied in bfloat16: naive makes a bfloat16 copy of the head (272 MB),
                minikd casts it block by block
"""
import sys
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from benchmarks.measure import child, in_turns, machine, make_parser, peak_resident, report, reset_peak, resident, table
from minikd.head import head_loss
from minikd.losses import forward_kl

V, N, STUDENT, TEACHER = 151_936, 1024, 896, 1536
MODES = {"float32": (torch.float32, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16),
         "autocast": (torch.float32, torch.bfloat16)}                           # dtype of the student, of the teacher


def naive(hidden, head, targets, soft, soft_head, kd_ratio):
    student, teacher = F.linear(hidden, head), F.linear(soft, soft_head)        # [N, V] twice
    loss = kd_ratio * forward_kl(student, teacher)
    if kd_ratio < 1:
        loss = loss + (1 - kd_ratio) * F.cross_entropy(student.float(), targets, reduction="none")
    return loss.mean()


def minikd(hidden, head, targets, soft, soft_head, kd_ratio):
    return head_loss(hidden, head, targets, soft, soft_head, forward_kl, kd_ratio, weight=1 / len(hidden))[0]


def trl(hidden, head, targets, soft, soft_head, kd_ratio=1.0):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    mask = torch.ones(1, len(hidden), device=hidden.device)
    return _chunked_divergence_loss(hidden[None], soft[None], head, soft_head, mask, beta=0.0)[0]      # 0: forward KL


def measure(method: str, mode: str, kd_ratio: float):
    """In the child: one forward and backward, its time and its memory."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    student_dtype, teacher_dtype = MODES[mode]

    def random(*shape, dtype, scale=1.0):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    hidden, head = random(N, STUDENT, dtype=student_dtype), random(V, STUDENT, dtype=student_dtype, scale=0.02)
    soft, soft_head = random(N, TEACHER, dtype=teacher_dtype), random(V, TEACHER, dtype=teacher_dtype, scale=0.02)
    targets = torch.randint(V, (N,), generator=generator)
    loss = {"naive": naive, "minikd": minikd, "trl": trl}[method]
    narrow = torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()

    def step(n, rows):
        with narrow:
            states, table = hidden[:n].detach().requires_grad_(), head[:rows].detach().requires_grad_()
            value = loss(states, table, targets[:n] % rows, soft[:n], soft_head[:rows], kd_ratio)
        value.backward()
        return value.item(), states.grad.nbytes + table.grad.nbytes

    step(64, 10_000)
    before = resident()
    reset_peak()
    start = time.perf_counter()
    value, gradients = step(N, V)
    seconds = time.perf_counter() - start
    report(loss=value, seconds=seconds, extra=(peak_resident() - before - gradients) / 1e6)


def main():
    if sys.argv[1:2] == ["--child"]:
        return measure(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    args = make_parser(__doc__, repeats=3).parse_args()
    rows = []
    for mode, kd_ratio in ("float32", 1.0), ("float32", 0.5), ("bf16", 1.0), ("autocast", 1.0):
        methods = ("naive", "trl", "minikd") if kd_ratio == 1 else ("naive", "minikd")
        figures = in_turns(methods, lambda method: child("benchmarks.head_loss", method, mode, kd_ratio), args.repeats)
        ours = figures["minikd"]
        for method, found in figures.items():
            ratios = [f"{ours['extra'] / found['extra']:.3f}", f"{found['seconds'] / ours['seconds']:.2f}x"]
            rows.append([f"{mode}, kd_ratio {kd_ratio:g}, {method}", f"{found['extra']:,.0f}", f"{found['seconds']:.2f}",
                         f"{found['loss']:.5f}", f"{found['others']:.0%}", *(["", ""] if method == "minikd" else ratios)])
    table(["", "extra MB", "s", "loss", "others", "minikd's MB", "minikd faster"], rows)
    print(f"{args.repeats} turns; " + machine("torch", "trl"))


if __name__ == "__main__":
    main()
