"""GRPO: several answers to each prompt, a group; an answer's advantage is how much better it is than its group.

The objective, to be maximised, paper eq. (6); o_i the answers of a group, A_i their advantages, the same for all tokens of an
answer, and ρ = π / π_old the ratio of the policies:

    1/G Σ_i 1/|o_i| Σ_t [ min(ρ_it A_i, clip(ρ_it, 1 - ε, 1 + ε) A_i) - β k3_it ]

In the first update after sampling, ρ is 1 up to a bfloat16 sampler's rounding, some percent, and the gradient is that of
REINFORCE; a clip of usual size acts from the second update on.

References
    Knowledge Distillation for Large Language Models, eq. (5) advantages, (6) objective, (7) KL estimate
    GRPO, DeepSeekMath          arXiv:2402.03300, eq. (3), (4)
    k3                          Schulman, "Approximating KL divergence" (2020)
    Dr. GRPO                    arXiv:2503.20783: no division by the deviation, nor by an answer's length; β = 0
    DAPO                        arXiv:2503.14476: mean over all tokens, clip-higher, groups without signal dropped; β = 0
    GSPO                        arXiv:2507.18071: one ratio a sequence
"""
import torch
from torch import Tensor

from minikd.data import Encoded, by_length, collate
from minikd.generate import generate_with_log_probs
from minikd.head import scored_positions, target_log_probs
from minikd.losses import at_least_float32, clipped_surrogate, ratios
from minikd.model import Qwen2, mixed_precision

NORMS = ("sequence", "token", "constant")


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """A_i = (r_i - mean r) / (std r + 1e-4), within each group.  Paper eq. (5).  [P, G] -> [P, G]

    scale  "std" divides by the unbiased standard deviation, as trl does; "none" does not (Dr. GRPO: dividing gives very
           easy and very hard prompts more weight)
    All tokens of an answer have its advantage, a constant: no gradient flows to the rewards. With G = 2 and "std" it is 0.71 and
    -0.71 for any two rewards that differ by much more than 1e-4.
    A reward of NaN means that the answer could not be judged: mean and deviation leave it out, and its advantage is 0. In a group
    with fewer than two judged rewards, or with equal ones, all advantages are 0: exactly, although the mean is rounded.
    Raises ValueError for another scale, for rewards that are not [P, G], and for infinite ones.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale = {scale!r}; it must be 'std' or 'none'")
    rewards = torch.as_tensor(rewards).detach()
    dtype = at_least_float32(rewards).dtype                                     # of the result
    rewards = rewards.double()                                                  # differences may be tiny beside the sums
    if rewards.dim() != 2:
        raise ValueError(f"rewards {list(rewards.shape)}; give a row for each prompt, [P, G]")
    if rewards.isinf().any():
        raise ValueError("a reward is infinite; give finite ones, and NaN for an answer that cannot be judged")
    advantages = torch.zeros_like(rewards)
    for group, A in zip(rewards, advantages):                                   # [G] each
        judged = ~group.isnan()
        r = group[judged]
        if (r != r[:1]).any():                                                  # else there is nothing to compare
            A[judged] = r - r.mean()
            if scale == "std":
                A[judged] /= r.std() + 1e-4                                     # paper eq. (5)
    return advantages.to(dtype)


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """e^d - d - 1, d = log π_ref - log π: an unbiased estimate of KL(π || π_ref), never negative.  Paper eq. (7).  A d beyond 60
    counts as 60, as the logarithm of a ratio does (losses.ratios): there the gradient is 0.

    Log-probabilities of the sampled tokens, [...] each -> [...] nats. The mean of π_ref / π over samples of π is 1, so that
    -d + (π_ref / π - 1) has the mean of -d, and it is at least 0 as e^d >= 1 + d. Its gradient for a given sample is another
    matter: (1 - π_ref / π) ∇ log π has the mean ∇KL(π_ref || π), in the other direction. (trl multiplies k3 by the ratio; the
    mean of the gradient is then ∇KL(π || π_ref).)
    """
    d = (at_least_float32(ref_logp) - at_least_float32(logp)).clamp(max=60)
    return torch.expm1(d) - d                                                   # expm1: exact for small d


def policy_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantages: Tensor, clip: float = 0.2,
                beta: float = 0.04, clip_high: float | None = None) -> Tensor:
    """The negated objective of each token of B answers.  Paper eq. (6).  [B, R] three times, [B] -> [B, R], to be minimised

    logp       log-probabilities of the sampled tokens under the current policy, differentiated
    old_logp   the same under the policy that sampled them: constants, like the reference's, even if they are logp itself
    ref_logp   the same under the frozen reference; all three at the temperature of sampling
    Padding is not masked here: the caller masks and averages (token_weights). train_grpo.py calls token_loss, which does
    the same for the tokens of all answers in one row, as head_loss has them.
    Raises ValueError for log-probabilities that are not [B, R], advantages not [B], and for a beta without a reference.
    """
    shapes = [list(x.shape) for x in (logp, old_logp, ref_logp) if x is not None]
    if logp.dim() != 2 or any(shape != shapes[0] for shape in shapes):          # others would be broadcast
        raise ValueError(f"log-probabilities {', '.join(map(str, shapes))}; give each as [B, R], a row for each answer")
    if advantages.shape != logp.shape[:1]:
        raise ValueError(f"advantages {list(advantages.shape)} for answers {list(logp.shape)}; give one for each answer")
    return token_loss(logp, old_logp, ref_logp, advantages[:, None], clip, beta, clip_high)


def token_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, A: Tensor, clip: float = 0.2, beta: float = 0.04,
               clip_high: float | None = None) -> Tensor:
    """policy_loss, token by token: A is the advantage of each token's answer.  [N] four times -> [N].  Raises ValueError for a
    beta without a reference."""
    if beta and ref_logp is None:
        raise ValueError(f"beta = {beta} needs ref_logp, the reference's log-probabilities; give them, or beta=0")
    logp, old_logp, A = map(at_least_float32, (logp, old_logp, A))
    loss = clipped_surrogate(logp, old_logp.detach(), A, clip, clip_high)
    return loss + beta * k3(logp, ref_logp.detach()) if beta else loss          # paper eq. (6), negated


def was_clipped(logp: Tensor, old_logp: Tensor, A: Tensor, clip: float = 0.2, clip_high: float | None = None) -> Tensor:
    """True where the clip makes the gradient of a token's surrogate 0: its ratio is past the bound on the side that its advantage
    asks for.  [N] three times -> [N] bool"""
    ratio, bounded = ratios(logp, old_logp, clip, clip_high)
    return A * (ratio - bounded) > 0                                            # the loss then uses the bound, a constant


def token_weights(lengths: list[int], norm: str = "sequence", max_new_tokens: int | None = None,
                  counted: list[bool] | None = None) -> list[float]:
    """For each answer, the weight of each of its tokens in the loss of an optimizer step.

    norm     "sequence"  1 / (answers x its answer's length): paper eq. (6)
             "token"     1 / all tokens: long answers count more (DAPO)
             "constant"  1 / (answers x max_new_tokens): no bias for or against length (Dr. GRPO)
    counted  False leaves an answer out, also from the divisor: a truncated one, or one of a group with equal rewards
    Raises ValueError for another norm, and for "constant" without max_new_tokens.
    """
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}; it must be one of {', '.join(NORMS)}")
    if norm == "constant" and not max_new_tokens:
        raise ValueError("norm = 'constant' divides by max_new_tokens; give it")
    counted = counted or [True] * len(lengths)
    answers, tokens = sum(counted), sum(length for length, keep in zip(lengths, counted, strict=True) if keep)
    weights = []
    for length, keep in zip(lengths, counted):
        if norm == "sequence":
            divisor = answers * length                                          # paper eq. (6)
        elif norm == "token":
            divisor = tokens                                                    # DAPO
        else:
            divisor = answers * max_new_tokens                                  # Dr. GRPO
        weights.append(1 / max(1, divisor) if keep else 0.0)
    return weights


def sequence_log_ratio(logp: Tensor, old_logp: Tensor) -> float:
    """log s of one answer, s = exp(mean_t (log π - log π_old)) its ratio as a whole.  GSPO.  [n], [n] -> a number

    With log π - log s (π detached) in the place of log π_old, every token has the ratio s, whose gradient is s ∇ log π_t
    (GSPO-token). With norm "sequence" the mean of these over the tokens is s (mean_t ∇ log π_t), GSPO's gradient.
    """
    return float((logp - old_logp).detach().mean())                             # GSPO's log s, the mean over |o| tokens


@torch.no_grad()
def token_log_probs(model: Qwen2, rows: list[Encoded], pad_id: int, batch_size: int, temperature: float = 1.0,
                    vocab: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probability of every response token, at a temperature: [n] for each row, in order.  Never holds full logits."""
    found, device = {}, model.head.device
    for at in by_length(rows, batch_size):
        ids, mask = collate([rows[i] for i in at], pad_id, device)              # [B, T]
        with mixed_precision(device, dtype):
            states, targets = scored_positions(model.hidden(ids), ids, mask)    # [N, D], [N]
            logps = target_log_probs(states / temperature, model.head, targets, vocab)      # [N]; scales the logits: linear
        found |= dict(zip(at, logps.split([len(rows[i].response) for i in at])))
    return [found[i] for i in range(len(rows))]


def sample_groups(model: Qwen2, rows: list[Encoded], group_size: int, max_new_tokens: int, tokenizer,
                  temperature: float = 1.0, seed: int | None = None) -> tuple[list[Encoded], list[Tensor]]:
    """G answers to each row's prompt, next to each other, and the log-probabilities they were drawn with, [n] each."""
    answers, logps = generate_with_log_probs(
        model, [row.prompt for row in rows], max_new_tokens, temperature, eos_ids=tokenizer.eos_ids, seed=seed,
        samples=group_size, vocab=len(tokenizer))
    asked = [row for row in rows for _ in range(group_size)]
    return ([row.answered(ids, tokenizer.eos_ids) for row, ids in zip(asked, answers)],
            [torch.tensor(logp, dtype=torch.float32, device=model.head.device) for logp in logps])
