"""Claim: KL, reverse KL and generalized JSD in float32 are at least as near to float64 as trl's generalized_jsd_loss.

    python -m benchmarks.divergences            # a quarter of a minute; needs pip install -e '.[reference]'

48 tokens, 32 of them scored, a vocabulary of 151,936, in float32; averaged over the scored ones, as trl does. `far`: student
and teacher are independent (a KL of several nats); `near`: they almost agree (hundredths). The last columns are the
differences from float64.
"""
import os

import torch

from benchmarks.measure import QUIET, machine, make_parser, table
from minikd.losses import forward_kl, jensen_shannon, reverse_kl

os.environ |= QUIET
from trl.experimental.gkd import GKDTrainer                         # noqa: E402  (after it was told to be quiet)

V, B, T = 151_936, 2, 24


def value_and_gradient(loss, student):
    student = student.clone().requires_grad_()
    value = loss(student)
    return value.detach().double(), torch.autograd.grad(value, student)[0].double()


def compare(beta, student, teacher, labels) -> list:
    scored = labels != -100

    def trl(logits):
        return GKDTrainer.generalized_jsd_loss(logits, teacher.to(logits.dtype), labels=labels, beta=beta)

    def minikd(logits):
        divergence = {0.0: forward_kl, 1.0: reverse_kl}.get(beta)
        values = divergence(logits, teacher) if divergence else jensen_shannon(logits, teacher, beta)
        return values[scored].mean()

    ours, theirs = value_and_gradient(minikd, student), value_and_gradient(trl, student)
    exact = value_and_gradient(trl, student.double())
    gap = [(a - b).abs().max() for a, b in zip(ours, theirs)]
    return [f"{theirs[0]:.5f}", f"{gap[0]:.1e}", f"{theirs[1].abs().max():.1e}", f"{gap[1]:.1e}",
            f"{(theirs[0] - exact[0]).abs():.1e}", f"{(ours[0] - exact[0]).abs():.1e}"]


def main():
    make_parser(__doc__).parse_args()
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(B, T, V, generator=generator)
    teachers = {"far": 3 * torch.randn(B, T, V, generator=generator),
                "near": student + 0.3 * torch.randn(B, T, V, generator=generator)}
    labels = torch.zeros(B, T, dtype=torch.long)
    labels[:, :T // 3] = -100
    names = {0.0: "KL(p || q)", 1.0: "KL(q || p)", 0.1: "JSD 0.1", 0.5: "JSD 0.5", 0.9: "JSD 0.9"}
    table(["", "trl's value", "|difference|", "max |gradient|", "|difference|", "trl - float64", "minikd - float64"],
          [[f"{name} {distance}", *compare(beta, student, teacher, labels)]
           for distance, teacher in teachers.items() for beta, name in names.items()])
    print(machine("torch", "trl"))


if __name__ == "__main__":
    main()
