"""GRPO: a group of answers to each prompt, each as good as it is better than its group.

The objective, to be maximised; o_i the answers of a group, A_i their advantages, ρ the ratio of policy and old policy:

    1/G Σ_i 1/|o_i| Σ_t [ min(ρ_it A_i, clip(ρ_it, 1 - ε, 1 + ε) A_i) - β k3_it ]

References
    Knowledge Distillation for Large Language Models, eq. (5) advantages, (6) objective, (7) KL estimate
    GRPO, DeepSeekMath          arXiv:2402.03300, eq. (3), (4)
    k3                          Schulman, "Approximating KL divergence" (2020)
    Dr. GRPO                    arXiv:2503.20783: no division by the deviation, nor by an answer's length
    DAPO                        arXiv:2503.14476: mean over all tokens, clip-higher, groups without signal dropped
    GSPO                        arXiv:2507.18071: one ratio a sequence
"""
import torch
from torch import Tensor

from minikd.data import Encoded, by_length, collate
from minikd.generate import generate_with_log_probs
from minikd.losses import clipped_surrogate, head_loss, ratio_of, scored_positions
from minikd.model import Qwen2

NORMS = ("sequence", "token", "constant")


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """A_i = (r_i - mean r) / (std r + 1e-4), within each group.  Paper eq. (5).  [P, G] -> [P, G]

    scale  "std" divides by the unbiased deviation, as trl does; "none" does not (Dr. GRPO: easy and hard prompts
           would count more)
    A reward that is NaN could not be judged: it joins neither mean nor deviation, and its advantage is 0, as is that of
    a group with fewer than two, and of one whose rewards are all the same: exactly, though their mean is rounded.
    """
    if scale not in ("std", "none"):
        raise ValueError(f"scale = {scale!r}; it is 'std' or 'none'")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))     # half would overflow in the sums
    judged = ~rewards.isnan()
    count = judged.sum(1, keepdim=True)                                         # [P, 1]
    values = torch.where(judged, rewards, 0.0)
    least, most = (torch.where(judged, rewards, end) for end in (torch.inf, -torch.inf))
    differ = judged & (least.amin(1, keepdim=True) < most.amax(1, keepdim=True))            # [P, G]
    centred = torch.where(differ, values - values.sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    if scale == "std":
        std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()     # [P, 1]
        centred = centred / (std + 1e-4)
    return torch.where(count > 1, centred, 0.0)


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """e^d - d - 1, d = log π_ref - log π: an unbiased estimate of KL(π || π_ref), never negative.  Paper eq. (7)."""
    d = ref_logp - logp
    return ratio_of(ref_logp, logp) - d - 1


def policy_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, clip: float = 0.2,
                beta: float = 0.04, clip_high: float | None = None) -> Tensor:
    """The objective of each token, negated.  Paper eq. (6).  [N, R] three times, [N] -> [N, R], to be minimised

    logp       log-probabilities of the sampled tokens under the policy now, differentiated
    old_logp   the same when they were sampled
    ref_logp   the same under the frozen reference; all three at the temperature of sampling
    Padding gives numbers too: the caller masks and averages (token_weights).
    """
    loss = clipped_surrogate(logp, old_logp, advantages[:, None], clip, clip_high)
    return loss + beta * k3(logp, ref_logp) if beta else loss


def was_clipped(logp: Tensor, old_logp: Tensor, advantages: Tensor, clip: float = 0.2,
                clip_high: float | None = None) -> Tensor:
    """Whether the clip took a token's gradient away: its ratio left the bounds the way its advantage wants.  [N, R]"""
    ratio, A = ratio_of(logp, old_logp), advantages[:, None]
    return (A > 0) & (ratio > 1 + (clip if clip_high is None else clip_high)) | (A < 0) & (ratio < 1 - clip)


def token_weights(lengths: list[int], norm: str = "sequence", max_new_tokens: int | None = None,
                  counted: list[bool] | None = None) -> list[float]:
    """What a token of each answer counts in the loss of an optimizer step.

    norm     "sequence"  1 / (answers x its answer's length): paper eq. (6)
             "token"     1 / all tokens: long answers count more (DAPO)
             "constant"  1 / (answers x max_new_tokens): no bias for or against length (Dr. GRPO)
    counted  False leaves an answer out, in the divisor too: a truncated one, a group without signal
    """
    if norm not in NORMS:
        raise ValueError(f"norm = {norm!r}; it is one of {', '.join(NORMS)}")
    counted = counted or [True] * len(lengths)
    answers = max(1, sum(counted))
    tokens = max(1, sum(length for length, keep in zip(lengths, counted) if keep))
    divisors = {"sequence": lambda length: answers * length, "token": lambda _: tokens,
                "constant": lambda _: answers * max_new_tokens}
    return [1 / divisors[norm](length) if keep else 0.0 for length, keep in zip(lengths, counted)]


def sequence_old(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Old log-probabilities of one answer [n] with which every token's ratio is the sequence's.  GSPO-token.

    s = exp(mean_t (log π - log π_old)) in value, and s ∇ log π_t in gradient: with norm "sequence" the mean over tokens
    is s (mean_t ∇ log π_t), GSPO's gradient.  logp is today's, detached.
    """
    return logp - (logp - old_logp).mean()


@torch.no_grad()
def token_log_probs(model: Qwen2, rows: list[Encoded], pad_id: int, batch_size: int, temperature: float = 1.0,
                    vocab: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probability of every response token, at a temperature: [n] for each row, in order.  Chunked: head_loss's."""
    found, device = {}, model.head.device
    for at in by_length(rows, batch_size):
        ids, mask = collate([rows[i] for i in at], pad_id, device)              # [B, T]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            states, targets = scored_positions(model.hidden(ids), ids, mask)    # [N, D], [N]
            ce = head_loss(states / temperature, model.head, targets, vocab=vocab)[1]       # logits / T, by linearity
        found |= dict(zip(at, (-ce).split([len(rows[i].response) for i in at])))
    return [found[i] for i in range(len(rows))]


def sample_groups(model: Qwen2, rows: list[Encoded], group_size: int, max_new_tokens: int, tokenizer,
                  temperature: float = 1.0, seed: int | None = None) -> tuple[list[Encoded], list[Tensor]]:
    """G answers to each row's prompt, next to each other, and the log-probabilities they were drawn with, [n] each."""
    answers, chances = generate_with_log_probs(
        model, [row.prompt for row in rows], max_new_tokens, temperature, eos_ids=tokenizer.eos_ids, seed=seed,
        samples=group_size, vocab=len(tokenizer))
    asked = [row for row in rows for _ in range(group_size)]
    return ([Encoded(row.prompt, ids, ids[-1] not in tokenizer.eos_ids, row.index) for row, ids in zip(asked, answers)],
            [torch.tensor(chance, device=model.head.device) for chance in chances])
