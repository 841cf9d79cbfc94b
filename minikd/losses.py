"""Token-level divergences between a student q and its teacher p, and the policy's loss per token.

Every divergence takes logits and returns one value per token, in nats. It computes in float32, or in float64 where logits
are: with 151,936 rows a bfloat16 softmax is off by more than the KL itself where the models are close. They are true
divergences: 0 when q equals p. In float32 their relative error is about 3e-6, that of the skew divergences up to 1e-5; where the
models are close, the error is about 4e-7 nats, so a smaller divergence may come out negative.

References
    Knowledge Distillation for Large Language Models, eq. (4) token-level KL
    GKD, generalized JSD                            arXiv:2306.13649, eq. (1)
    DistiLLM, skew divergences                      arXiv:2402.03898, section 3.1
    PPO, the clipped objective                      arXiv:1707.06347, eq. (7)
"""
import functools
import inspect
import math

import torch
from torch import Tensor

LEAST = -1e30                                       # replaces a logit of -inf; its probability is 0 just the same


def log_probs(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log q and log p at a temperature.  [..., V], [..., V'] -> two of [..., min(V, V')]

    Qwen2.5's heads have 151,936 rows up to 3B and 152,064 above; the rows past the tokenizer are never trained. The
    logits are cut to the shared rows before the softmax: cut after it, the larger would no longer sum to 1.
    Raises ValueError unless the temperature is above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: it divides the logits; give a number above 0")
    V = min(student_logits.shape[-1], teacher_logits.shape[-1])
    return log_softmax(student_logits[..., :V], temperature), log_softmax(teacher_logits[..., :V], temperature)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in its own dtype if that is wider: half precision loses the small differences between two models."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax in float32 or float64.  [..., V] -> [..., V].  A logit of -inf, which excludes a token, becomes LEAST, a finite
    number: then 0 log 0 is 0, in the gradient too, where inf - inf would be NaN."""
    logits = at_least_float32(logits).clamp(min=LEAST)
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)           # [..., V]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a_v (log a_v - log b_v), of two log_softmax results.  [..., V], [..., V] -> [...] nats

    Infinite where a gives more than 1e-20 x temperature to a token that b excludes by a logit of -inf; its gradient stays finite
    (for temperatures of 1e-8 and more). For a smaller probability, but above 1e-38, it should be infinite too: there it is about
    1e30 x that probability, which means nothing, as does the gradient. So exclude a token in both models, or in neither.
    """
    a = log_a.exp()
    total = (a * (log_a - log_b)).sum(-1)                                       # the formula; the rest is its rounding
    # log b = LEAST makes a term of about 1e30: report inf. It is added, as assigning it would lose the gradient.
    total = total + torch.where(total > 1e10, torch.inf, 0.0).to(total.dtype)
    # Rounded, a and b sum to A and B, up to 1 + 1e-5 over 151,936 rows: as large as the KL of two close models.
    with torch.no_grad():
        A, B = a.sum(-1), log_b.exp().sum(-1)
    return total / A + (B / A).log()                                            # KL(a / A || b / B)


def log_mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), [..., V] each, computed in log space: probabilities underflow, their logs do not.

    Raises ValueError unless 0 <= share <= 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of a mixture (alpha) is {share}; it must be from 0 to 1")
    log_share, log_rest = (math.log(x) if x else -math.inf for x in (share, 1 - share))
    return torch.logaddexp(log_a + log_share, log_b + log_rest)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q): the student must give probability to all that the teacher might say.  Paper eq. (4).

    [..., V], [..., V] -> [...] nats. No factor of temperature squared: this is the divergence itself.
    """
    logq, logp = log_probs(student_logits, teacher_logits, temperature)
    return kl(logp, logq)                                                       # Σ p (log p - log q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p): the student must say nothing the teacher would not.  MiniLLM's objective at one step.

    [..., V], [..., V] -> [...] nats
    """
    logq, logp = log_probs(student_logits, teacher_logits, temperature)
    return kl(logq, logp)                                                       # Σ q (log q - log p)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5,
                   temperature: float = 1.0) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.  GKD eq. (1).

    [..., V], [..., V] -> [...] nats. Raises ValueError unless 0 < beta < 1: at both ends the formula is 0
    everywhere. (trl returns the two KLs there, which are not the formula's limits.)
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta = {beta}: the generalized JSD needs 0 < beta < 1; use forward_kl or reverse_kl")
    logq, logp = log_probs(student_logits, teacher_logits, temperature)
    logm = log_mix(logp, logq, beta)                                            # m = βp + (1-β)q
    return beta * kl(logp, logm) + (1 - beta) * kl(logq, logm)                  # GKD eq. (1)


def skew_forward_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1,
                    temperature: float = 1.0) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q).  DistiLLM, whose code leaves out the constant -H(p).

    [..., V], [..., V] -> [...] nats, at most -log(alpha).  Raises ValueError unless 0 <= alpha <= 1.
    """
    logq, logp = log_probs(student_logits, teacher_logits, temperature)
    return kl(logp, log_mix(logp, logq, alpha))                                 # DistiLLM, section 3.1


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1,
                    temperature: float = 1.0) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q).  DistiLLM.

    [..., V], [..., V] -> [...] nats, at most -log(alpha).  Raises ValueError unless 0 <= alpha <= 1.
    """
    logq, logp = log_probs(student_logits, teacher_logits, temperature)
    return kl(logq, log_mix(logq, logp, alpha))                                 # DistiLLM, section 3.1


def no_divergence(logits: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
    """0 for each token: [n, V] -> [n]"""
    return logits.new_zeros(len(logits), dtype=torch.float32)


def entropy(logits: Tensor, teacher_logits: Tensor | None = None) -> Tensor:
    """H(q).  [..., V] -> [...] nats.  teacher_logits is not used: head.head_loss passes it to every divergence."""
    logq = log_softmax(logits)
    return -(logq.exp() * logq).sum(-1)


DIVERGENCES = {f.__name__: f for f in (forward_kl, reverse_kl, skew_forward_kl, skew_reverse_kl)} | {
    "jsd": jensen_shannon}                          # the names that --loss takes, beside sft and minillm


def pick_divergence(name: str, **options):
    """The divergence called `name`, given those of the options (temperature, beta, alpha) that it takes."""
    takes = inspect.signature(DIVERGENCES[name]).parameters
    return functools.partial(DIVERGENCES[name], **{key: value for key, value in options.items() if key in takes})


def ratios(logq: Tensor, old_logq: Tensor, clip: float, clip_high: float | None) -> tuple[Tensor, Tensor]:
    """ρ = q / q_old, and ρ clipped. ρ is at most e^60: float32 overflows beyond e^88, and infinity times an advantage of 0 is
    NaN."""
    ratio = (logq - old_logq).clamp(max=60).exp()                               # ρ
    return ratio, ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))


def clipped_surrogate(logq: Tensor, old_logq: Tensor, advantage: Tensor, clip: float = 0.2,
                      clip_high: float | None = None) -> Tensor:
    """-min(ρ A, clip(ρ, 1 - clip, 1 + clip) A), ρ = q / q_old of the sampled token.  PPO (arXiv:1707.06347) eq. (7).

    [N] each -> [N], to be minimised. As ∇ρ = ρ ∇ log q, the gradient is REINFORCE's -A ∇ log q while q = q_old; it becomes 0
    once updates have moved ρ past the clip in the direction that A asks for (and beyond e^60: see ratios).

    clip_high  the clip for ratios above 1, if it differs from `clip` (DAPO's clip-higher: 0.28)
    """
    ratio, bounded = ratios(logq, old_logq, clip, clip_high)
    return -torch.minimum(ratio * advantage, bounded * advantage)               # PPO eq. (7), negated
