"""MiniLLM: the student's own sequences, drawn nearer to its teacher by policy gradient on KL(q || p).

The objective is L = KL(q || p) over whole answers y = y_1 .. y_T, q the student and p the teacher; eq. (2), (3):

    ∇L = E_q Σ_t [ ∇ KL(q_t || p_t)  -  R_{t+1} ∇ log q(y_t) ],  R_{t+1} = Σ_{i>t} r_i,  r_i = log p(y_i) - log q(y_i)

The first part is the step itself, exact over the whole vocabulary; the second is what y_t does to the steps after it.
collect() samples answers and freezes what that gradient needs; the loss of an update is head_loss with the reverse KL
and clipped_surrogate, each once: see train_kd.py.

References
    MiniLLM                             arXiv:2306.08543, eq. (1) to (7)

Where the authors' code (LMOps/minillm, losses.py, sampler.py) departs from their paper and this file does not: theirs, ours
    R_t holds r_t, though the exact step covers it already      R_{t+1}, as in the paper; `current=True` has theirs
    γ = 0.95, and the discounted sum divided by the plain length    no γ, as in the paper
    whitening counts padding                                    valid tokens alone
    w_t is clipped together with the ratio                      w_t multiplies the clipped objective
    mixed probabilities, then their logarithm                   in log space
What its code does and the paper does not say, done here too: advantages are whitened, rewards clipped, and the exact
step has no weight w_t: the mean of w_t over y_t is 1, so that the weight would only add noise.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minikd.data import Encoded, by_length, collate, next_rows, optimizer_steps, steps_per_epoch
from minikd.generate import respond
from minikd.losses import head_loss, log_mix, scored_positions
from minikd.model import Qwen2, cast_copy


@dataclass(frozen=True)
class Rollout(Encoded):
    """A sampled answer of n tokens, with what was frozen when it was sampled."""
    old_logq: Tensor                    # [n] log q of its tokens then
    advantage: Tensor                   # [n] whitened, length-normalised R_{t+1}, times the importance weight
    teacher: Tensor                     # [n, D'] the teacher's states that score its tokens


def rewards_to_go(logq: Tensor, logp: Tensor, mask: Tensor, length_norm: bool = True, current: bool = False,
                  reward_clip: float = 50.0) -> Tensor:
    """R_{t+1}: what follows each token.  [B, R] three times -> [B, R], 0 outside the mask.

    logq, logp   log-probabilities of the sampled tokens; finite where the mask is True
    length_norm  the mean over the tokens after t instead of their sum, eq. (6): long answers gain nothing by length
    current      R_t instead, as the published code has it
    reward_clip  largest |log p - log q|, in nats: the published code's 100 / 2
    """
    reward = torch.where(mask, logp - logq, 0.0).clamp(-reward_clip, reward_clip)          # r_t
    held = mask.to(reward.dtype)
    after, count = (x.flip(1).cumsum(1).flip(1) - (0 if current else x) for x in (reward, held))   # over i > t
    return torch.where(mask, after / count.clamp(min=1) if length_norm else after, 0.0)


def importance_weights(logq: Tensor, logp: Tensor, mask: Tensor, mix: float, product: bool = False) -> Tensor:
    """w_t = q(y_t) / ((1 - mix) q(y_t) + mix p(y_t)) of tokens that were sampled from the mixture.  [B, R] -> [B, R]

    A weight of one token, as in eq. (7): at most 1 / (1 - mix), and biased, as the tokens before t came from the
    mixture too. `product` multiplies the weights of the whole answer, for every token of it: exact, and wild.
    """
    if not mix:
        return torch.ones_like(logq)
    logw = torch.where(mask, logq - log_mix(logp, logq, mix), 0.0)
    return (logw.sum(1, keepdim=True).expand_as(logw) if product else logw).exp()


def whiten(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1.  [N] -> [N], of valid tokens only."""
    return (values - values.mean()) * torch.rsqrt(values.var(correction=0) + 1e-8)


@torch.no_grad()                                    # not inference_mode: the loss saves these for its backward pass
def collect(student: Qwen2, teacher: Qwen2, rows: list[Encoded], pad_id: int, eos_ids, batch_size: int,
            max_new_tokens: int, mix: float = 0.2, seed: int = 0, dtype: torch.dtype = torch.float32,
            **options) -> list[Rollout]:
    """The student's own answers to the rows' prompts, from the teacher-mixed distribution, with all that is frozen.

    dtype    of the products, as in training: autocast's. A copy of the student in it samples; log q, which the
             ratio of an update divides by, is the student's own as training computes it
    options  of rewards_to_go
    """
    own = respond(cast_copy(student, dtype), rows, batch_size, max_new_tokens, eos_ids, seed=seed, teacher=teacher,
                  mix=mix, vocab=min(len(student.head), len(teacher.head)))     # what both have a row for
    frozen, device = {}, student.head.device
    for at in by_length(own, batch_size):
        ids, mask = collate([own[i] for i in at], pad_id, device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            states, targets = scored_positions(student.hidden(ids), ids, mask)              # [N, D], [N]
            soft, _ = scored_positions(teacher.hidden(ids), ids, mask)                      # [N, D']
            logq = -head_loss(states, student.head, targets, teacher_head=teacher.head)[1]  # [N], over the shared rows
            logp = -head_loss(soft, teacher.head, targets, teacher_head=student.head)[1]
        valid = mask[:, 1:]                                                                 # [B, T-1], N of them True
        logq, logp = (torch.zeros(valid.shape, device=device).masked_scatter(valid, x) for x in (logq, logp))
        to_go = rewards_to_go(logq, logp, valid, **options)
        weight = importance_weights(logq, logp, valid, mix)
        lengths = valid.sum(1).tolist()
        parts = (x[valid].split(lengths) for x in (logq, to_go, weight))
        frozen |= dict(zip(at, zip(*parts, soft.split(lengths))))
    white = whiten(torch.cat([to_go for _, to_go, *_ in frozen.values()]))
    white = dict(zip(frozen, white.split([len(own[i].response) for i in frozen])))
    return [Rollout(**vars(row), old_logq=frozen[i][0], advantage=white[i] * frozen[i][2],
                    teacher=frozen[i][3]) for i, row in enumerate(own)]


def rollout_steps(sampled: list[Rollout], rows: list[Encoded], start: int, steps: int, batch_size: int,
                  grad_accum: int, seed: int, rollouts: int, inner_epochs: int,
                  collecting: dict) -> Iterator[tuple[int, list[list[Rollout]]]]:
    """(step, its micro-batches) for steps start .. steps-1, as data.optimizer_steps gives them for records.

    Whenever those at hand have been used `inner_epochs` times, the student as it is then answers the next `rollouts`
    prompts of the rows.
    sampled     holds the rollouts at hand, for a checkpoint to keep; to start within an inner epoch it must hold them
    collecting  what collect takes, beside rows and seed
    """
    length = inner_epochs * steps_per_epoch(rollouts, batch_size, grad_accum)   # steps from one sampling to the next
    step = start
    while step < steps:
        phase, at = divmod(step, length)
        if at == 0:
            sampled[:] = collect(rows=next_rows(rows, phase, rollouts, seed), seed=seed + 7919 * phase, **collecting)
        for inner, batches in optimizer_steps(sampled, at, min(length, steps - phase * length), batch_size, grad_accum,
                                              seed + 7919 * phase):
            yield phase * length + inner, batches
        step = (phase + 1) * length


FROZEN = ["old_logq", "advantage", "teacher"]        # fields of a Rollout that are tensors


def pack_rollouts(rollouts: list[Rollout]) -> dict[str, Tensor]:
    """Rollouts as a few tensors, for a checkpoint; unpack_rollouts gives them back."""
    if not rollouts:
        return {}
    numbers = torch.tensor([[len(row.prompt), len(row.response), row.cut, row.index] for row in rollouts])  # [rows, 4]
    ids = torch.tensor([token for row in rollouts for token in row.prompt + row.response])
    return {"numbers": numbers, "ids": ids} | {name: torch.cat([getattr(row, name) for row in rollouts])
                                               for name in FROZEN}


def unpack_rollouts(tensors: dict[str, Tensor]) -> list[Rollout]:
    """pack_rollouts' inverse, bit for bit; no tensors are no rollouts."""
    if not tensors:
        return []
    numbers = tensors["numbers"].tolist()
    ids = tensors["ids"].split([part for prompt, response, *_ in numbers for part in (prompt, response)])
    frozen = zip(*(tensors[name].split([response for _, response, *_ in numbers]) for name in FROZEN))
    return [Rollout(prompt.tolist(), response.tolist(), bool(cut), index, *values) for (_, _, cut, index), prompt,
            response, values in zip(numbers, ids[::2], ids[1::2], frozen)]
