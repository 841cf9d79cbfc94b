"""MiniLLM: the student learns from its own answers, by policy gradient on the reverse KL to its teacher.

The objective, eq. (1), is L = KL(q || p) over whole answers y_1 .. y_n, q the student and p the teacher. With the reward of a
token, r_t = log p(y_t) - log q(y_t), it is L = -E Σ_t r_t over answers of q. As a token has no effect on rewards before it,

    ∇L = -E Σ_t (r_t + R_{t+1}) ∇ log q(y_t),   R_{t+1} = Σ_{i>t} r_i                              eq. (2)

(The paper writes R_t - 1 for the bracket, R_t = r_t + R_{t+1}; as E ∇ log q(y_t) = 0, the 1 changes nothing.)
The part with r_t needs no sample of y_t. As Σ_v q_t(v) ∇ log q_t(v) = 0, its mean over y_t for given y_1 .. y_{t-1} is

    -Σ_v q_t(v) r_t(v) ∇ log q_t(v) = ∇ KL(q_t || p_t)

which is exact over the whole vocabulary. What is sampled is only the effect of y_t on the steps after it, eq. (3):

    ∇L = E Σ_t [ ∇ KL(q_t || p_t) - R_{t+1} ∇ log q(y_t) ]

collect() samples answers and keeps the constants of that gradient; the loss of an update is reverse KL plus clipped_surrogate,
both by head_loss: see forward_backward in train_kd.py.

References
    MiniLLM                             arXiv:2306.08543, eq. (1) to (7)

Where the authors' code (LMOps/minillm, losses.py, sampler.py) departs from their paper or errs, and this file does not:
    theirs                                                          here
    R_t, which includes r_t, already in the exact first term        R_{t+1}, as in the paper; `current=True` gives R_t
    γ = 0.95, and the discounted sum divided by the plain length    no γ, as in the paper
    whitens each micro-batch, padding included                      all rollouts of a sampling at once, only valid tokens
    w_t is clipped together with the ratio                          w_t multiplies the clipped objective
    mixes probabilities, then takes the logarithm                   mixes in log space
Both their code and this file do three things that the paper does not mention: they whiten advantages, clip rewards, and leave
the weight w_t out of the exact first term (its mean over y_t is 1, so it would only add noise). Whitening has a price: close to
the teacher R goes to 0 and is scaled up to a deviation of 1 all the same, so the sampled part outweighs the exact one, and the
sum need no longer point along ∇L (tests/test_minillm.py enumerates it: far from the teacher the cosine is 0.99, close to it 0.74,
and negative for 9 of 40 pairs). The loss on plain text
(--lm-data) is only its cross-entropy here; there half of it is the cross-entropy with the teacher. Every distribution covers
the rows that both heads share, including those past the tokenizer's ids (271 of Qwen2.5's 151,936), so these can be sampled too.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minikd.data import Encoded, by_length, collate, next_rows, optimizer_steps, steps_per_epoch
from minikd.generate import respond
from minikd.head import scored_positions, target_log_probs
from minikd.losses import log_mix
from minikd.model import Qwen2, cast_copy, mixed_precision


@dataclass(frozen=True)
class Rollout(Encoded):
    """A sampled answer of n tokens, with the constants of its gradient."""
    old_logq: Tensor                    # [n] log q of its tokens when they were sampled
    advantage: Tensor                   # [n] whitened, length-normalised R_{t+1}, times the importance weight w_t
    teacher: Tensor                     # [n, D'] the teacher's states that score its tokens


FROZEN = ["old_logq", "advantage", "teacher"]        # the fields that Rollout adds to Encoded: tensors, constant in the loss


def rewards_to_go(logq: Tensor, logp: Tensor, length_norm: bool = True, current: bool = False,
                  reward_clip: float = 50.0) -> Tensor:
    """R_{t+1} of one answer: the sum of the rewards after each token.  [n], [n] -> [n]

    logq, logp   log-probabilities of its tokens
    length_norm  the mean of the rewards after t instead of their sum, eq. (6): long answers gain nothing from length. (The
                 paper divides by T-t-1, one less than the tokens after t, and 0 at t = T-1.)
    current      R_t instead, as the published code has it
    reward_clip  largest |log p - log q|, in nats: the published code's 100 / 2
    """
    reward = (logp - logq).clamp(-reward_clip, reward_clip)                     # r_t
    to_go = reward.flip(0).cumsum(0).flip(0)                                    # Σ_{i>=t}: a cumsum from the right
    count = torch.arange(len(reward), 0, -1, device=reward.device)              # of the terms of each sum
    if not current:
        to_go, count = to_go - reward, count - 1                                # Σ_{i>t}
    return to_go / count.clamp(min=1) if length_norm else to_go                 # eq. (6), by T-t


def importance_weights(logq: Tensor, logp: Tensor, mix: float, product: bool = False) -> Tensor:
    """w_t = q(y_t) / ((1 - mix) q(y_t) + mix p(y_t)) of one answer, sampled from the mixture.  [n], [n] -> [n]

    One weight per token, as in eq. (7): at most 1 / (1 - mix), and biased, as the tokens before t came from the mixture
    too. `product` gives every token the product of the whole answer's weights: exact, but of high variance. (Eq. (5)'s
    product ends at t: it leaves out the tokens whose rewards R_{t+1} sums.)
    """
    logw = logq - log_mix(logp, logq, mix)                                      # w_t of eq. (7); 1 without a mix
    return (logw.sum().expand_as(logw) if product else logw).exp()              # eq. (5), to the answer's end


def whiten(values: Tensor) -> Tensor:
    """[N] -> [N]: the valid tokens' values, shifted and scaled to mean 0 and deviation 1 (less where it was below 0.001)"""
    wide = values.double()                              # or equal values would differ from their rounded mean
    return ((wide - wide.mean()) * torch.rsqrt(wide.var(correction=0) + 1e-8)).to(values.dtype)


@torch.no_grad()                                    # not inference_mode: the loss saves these for its backward pass
def collect(student: Qwen2, teacher: Qwen2, rows: list[Encoded], pad_id: int, eos_ids, batch_size: int, max_new_tokens: int,
            mix: float = 0.2, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> list[Rollout]:
    """Answers to the rows' prompts, sampled from the mixture of student and teacher, with the constants of the gradient.

    dtype    of the matrix products, as in training (autocast). A copy of the student in this dtype samples; old_logq, the
             ratio's denominator, is computed by the student itself, as in training
    options  of rewards_to_go
    """
    shared = min(len(student.head), len(teacher.head))          # rows of both heads: every distribution here is over them
    own = respond(cast_copy(student, dtype), rows, batch_size, max_new_tokens, eos_ids, seed=seed, teacher=teacher,
                  mix=mix, vocab=shared)
    device = student.head.device
    found = [None] * len(own)                                   # per row: log q, R_{t+1} and w_t [n], the teacher's [n, D']
    for at in by_length(own, batch_size):
        ids, mask = collate([own[i] for i in at], pad_id, device)                           # [B, T]
        with mixed_precision(device, dtype):
            states, targets = scored_positions(student.hidden(ids), ids, mask)              # [N, D], [N]
            teacher_states, _ = scored_positions(teacher.hidden(ids), ids, mask)            # [N, D']
            logq = target_log_probs(states, student.head, targets, shared)                  # [N]
            logp = target_log_probs(teacher_states, teacher.head, targets, shared)          # [N]
        lengths = [len(own[i].response) for i in at]
        for i, q, p, scoring in zip(at, logq.split(lengths), logp.split(lengths), teacher_states.split(lengths)):
            found[i] = q, rewards_to_go(q, p, **options), importance_weights(q, p, mix), scoring
    # Whitening subtracts the mean, as a baseline: so even a last token, whose R_{t+1} is 0, has an advantage. And as w > 0,
    # w times the clipped objective min(ρ A, clip(ρ) A) is the clipped objective with the advantage w A.
    logqs, to_gos, weights, held = zip(*found)
    advantages = whiten(torch.cat(to_gos)).split([len(row.response) for row in own])
    return [Rollout(**vars(row), old_logq=logq, advantage=A * w, teacher=states)
            for row, logq, A, w, states in zip(own, logqs, advantages, weights, held)]


def rollout_steps(sampled: list[Rollout], rows: list[Encoded], start: int, steps: int, batch_size: int, grad_accum: int,
                  seed: int, rollouts: int, inner_epochs: int, collecting: dict) -> Iterator[tuple[int, list[list[Rollout]]]]:
    """(step, its micro-batches) for steps start .. steps-1, as data.optimizer_steps gives them for the data's rows.

    When the current rollouts have been used `inner_epochs` times, the student as it is then answers the next `rollouts`
    prompts of the rows: step k belongs to phase k // phase_steps.
    sampled     the current rollouts, changed in place so that the caller can save them; a run that is resumed between two
                samplings must pass them in (there are no others to learn from)
    collecting  the arguments of collect, except rows and seed
    """
    phase_steps = inner_epochs * steps_per_epoch(rollouts, batch_size, grad_accum)      # steps between two samplings
    for step in range(start, steps):
        phase, inner = divmod(step, phase_steps)
        phase_seed = seed + 7919 * phase                        # a prime: phases of small seeds do not collide
        if inner == 0:
            sampled[:] = collect(rows=next_rows(rows, phase, rollouts, seed), seed=phase_seed, **collecting)
        _, batches = next(optimizer_steps(sampled, inner, inner + 1, batch_size, grad_accum, phase_seed))   # only step `inner`
        yield step, batches


def pack_rollouts(rollouts: list[Rollout]) -> dict[str, Tensor]:
    """Every field of every rollout as a tensor of its own, for a checkpoint; unpack_rollouts gives them back."""
    return {f"{i}.{name}": torch.as_tensor(value) for i, row in enumerate(rollouts) for name, value in vars(row).items()}


def unpack_rollouts(tensors: dict[str, Tensor]) -> list[Rollout]:
    """pack_rollouts' inverse, bit for bit."""
    fields = {}                                                 # number of a rollout -> its fields
    for key, value in tensors.items():
        i, name = key.split(".")
        fields.setdefault(int(i), {})[name] = value if name in FROZEN else value.tolist()
    return [Rollout(**fields[i]) for i in sorted(fields)]
