"""GRPO's formulas as slow loops, trl's own code on the same numbers where it is installed, and gradients by the chain rule."""
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from conftest import small
from minikd import grpo
from minikd.data import Encoded, collate
from minikd.grpo import (NORMS, group_advantages, k3, policy_loss, sample_groups, sequence_log_ratio, token_log_probs, token_loss,
                         token_weights, was_clipped)
from minikd.head import head_loss, scored_positions
from minikd.losses import entropy
from minikd.model import Qwen2

N, R = 6, 7                                         # answers, tokens


def numbers(seed=0):
    """logp (differentiated), old, ref [N, R], advantages [N], mask [N, R] of answers of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    logp, old, ref = (-0.1 - 2 * torch.rand(N, R, generator=generator) for _ in range(3))
    old, ref = logp + 0.8 * (old - old.mean()), logp + 0.4 * (ref - ref.mean())             # ratios on both sides of 1
    advantages = torch.randn(N, generator=generator)
    mask = torch.arange(R) < torch.tensor([7, 1, 3, 5, 6, 2])[:, None]
    return logp.requires_grad_(), old, ref, advantages, mask


# ---- the formulas

@pytest.mark.parametrize("scale", ["std", "none"])
def test_advantages_are_the_definition_and_what_was_not_judged_is_left_out(scale):
    rewards = torch.tensor([[1.0, 0.0, 0.5, 2.0], [3.0, 3.0, 3.0, 3.0], [1.0, math.nan, 0.0, math.nan],
                            [math.nan, 4.0, math.nan, math.nan], [math.nan] * 4, [1000.0, 1000.001, 1000.002, 1000.0]])
    ours = group_advantages(rewards, scale)
    for row, found in zip(rewards.tolist(), ours.tolist()):
        judged = [r for r in row if not math.isnan(r)]
        mean = sum(judged) / max(1, len(judged))
        std = math.sqrt(sum((r - mean) ** 2 for r in judged) / max(1, len(judged) - 1))
        for r, advantage in zip(row, found):
            signal = not math.isnan(r) and len(judged) > 1
            right = (r - mean) / (std + 1e-4 if scale == "std" else 1) if signal else 0.0          # paper eq. (5)
            assert advantage == pytest.approx(right, abs=1e-6)
    assert torch.equal(group_advantages(rewards.tolist(), scale), ours)
    with pytest.raises(ValueError, match="'std' or 'none'"):
        group_advantages(rewards, "batch")
    with pytest.raises(ValueError, match=r"rewards \[3\]; give a row for each prompt"):
        group_advantages([1.0, 0.0, 1.0], scale)


def slow_loss(logp, old, ref, advantages, clip=0.2, beta=0.04, clip_high=None):
    """What is to be minimised, for each token."""
    high = clip if clip_high is None else clip_high
    found = []
    for i in range(N):
        row = []
        for t in range(R):
            ratio, A = math.exp(logp[i, t] - old[i, t]), float(advantages[i])
            d = float(ref[i, t] - logp[i, t])
            kl = math.exp(d) - d - 1                                                                # eq. (7)
            row.append(-min(ratio * A, min(max(ratio, 1 - clip), 1 + high) * A) + beta * kl)        # eq. (6)
        found.append(row)
    return torch.tensor(found)


@pytest.mark.parametrize("options", [dict(), dict(clip=0.1, beta=0.0), dict(clip_high=0.28), dict(beta=1.0, clip=0.5)])
def test_the_loss_of_a_token_is_the_papers(options):
    logp, old, ref, advantages, _ = numbers()
    torch.testing.assert_close(policy_loss(logp, old, ref, advantages, **options).detach(),
                               slow_loss(logp.detach(), old, ref, advantages, **options), rtol=1e-5, atol=1e-6)
    clipped = was_clipped(logp.detach(), old, advantages[:, None], **{key: x for key, x in options.items() if key != "beta"})
    assert 0 < clipped.sum() < N * R
    grad = torch.autograd.grad(policy_loss(logp, old, ref, advantages, **options | dict(beta=0.0)).sum(), logp)[0]
    assert torch.equal(grad == 0, clipped)                                      # what is counted is what gets no gradient


def test_the_gradient_of_k3_is_that_of_the_papers_formula():
    logp, _, ref, *_ = numbers()
    grad = torch.autograd.grad(k3(logp, ref).sum(), logp)[0]
    torch.testing.assert_close(grad, 1 - (ref - logp.detach()).exp(), rtol=1e-5, atol=1e-6)
    assert (k3(logp, ref) >= 0).all() and k3(ref, ref).eq(0).all()


def test_the_mean_gradient_of_k3_is_that_of_kl_in_the_other_direction():
    """By summing over all seven tokens; trl's factor, the ratio, turns it around."""
    logits, ref = (torch.randn(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    fixed = logp.exp().detach()                                                 # how often each token is sampled
    slope = lambda value: torch.autograd.grad(value, logits, retain_graph=True)[0]
    forward, backward = (ref.exp() * (ref - logp)).sum(), (logp.exp() * (logp - ref)).sum()     # KL(ref || π), KL(π || ref)
    torch.testing.assert_close(slope((fixed * k3(logp, ref)).sum()), slope(forward))
    torch.testing.assert_close(slope((fixed * (logp - logp.detach()).exp() * k3(logp, ref)).sum()), slope(backward))


def test_on_policy_the_first_update_is_reinforce():
    """ρ = 1: the gradient is -A ∇ log π, however wide the clip."""
    logp, _, ref, advantages, _ = numbers()
    grads = [torch.autograd.grad(policy_loss(logp, old, ref, advantages, clip=clip, beta=0).sum(), logp)[0]
             for clip, ref in ((0.01, ref), (0.5, None)) for old in (logp.detach(), logp)]  # old is a constant, said or not
    for grad in grads:
        torch.testing.assert_close(grad, -advantages[:, None].expand(N, R))


@pytest.mark.parametrize("norm", NORMS)
def test_weights_are_one_over_what_the_variant_divides_by(norm):
    lengths, counted = [4, 1, 10, 3], [True, True, False, True]
    for keep in None, counted:
        ours = token_weights(lengths, norm, 12, keep)
        kept = [i for i in range(4) if keep is None or keep[i]]
        for i in range(4):
            divisor = {"sequence": len(kept) * lengths[i],                      # paper eq. (6)
                       "token": sum(lengths[j] for j in kept),                  # DAPO
                       "constant": len(kept) * 12}[norm]                        # Dr. GRPO
            assert ours[i] == pytest.approx(1 / divisor if i in kept else 0)
        if norm != "constant":                                                  # a mean: the tokens' weights add up to 1
            assert sum(weight * length for weight, length in zip(ours, lengths)) == pytest.approx(1)
    assert token_weights([1, 9], norm, 1, [True, False]) == [1.0, 0.0]          # one token alone has all the weight
    assert all(map(math.isfinite, token_weights([0, 0], norm, 12)))             # empty answers have no token to weigh
    with pytest.raises(ValueError, match="norm"):
        token_weights(lengths, "batch")
    with pytest.raises(ValueError, match="shorter"):            # zip's: an answer would be lost
        token_weights(lengths, norm, 12, counted[:3])
    with pytest.raises(ValueError, match="'constant' divides by max_new_tokens"):
        token_weights(lengths, "constant")


def with_one_ratio(logp, old, mask):
    """What takes the place of `old` for GSPO: every token of an answer then has the answer's ratio."""
    return torch.stack([row.detach() - sequence_log_ratio(row[:n], before[:n])
                        for row, before, n in zip(logp, old, mask.sum(1).tolist())])


def same_with_gradient(ours, theirs, logp):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logp, retain_graph=True)[0] for x in (ours, theirs)), rtol=1e-5,
                               atol=1e-6)


def test_one_ratio_a_sequence_has_gspos_value_and_gradient():
    logp, old, ref, advantages, mask = numbers(3)
    lengths = mask.sum(1)
    s = (((logp - old) * mask).sum(1) / lengths).exp()                          # GSPO: s_i = exp(mean_t log ratio) [N]
    expected = -torch.minimum(s * advantages, s.clamp(0.8, 1.2) * advantages)   # clipped as a whole
    losses = policy_loss(logp, with_one_ratio(logp, old, mask), ref, advantages, beta=0.0)
    same_with_gradient((losses * mask).sum(1) / lengths, expected, logp)


# ---- rounding, overflow, and what is refused

@pytest.mark.parametrize("reward", [8 / 3, 1.0833, 0.1, 0.99, 0.0, -7.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_that_is_paid_the_same_has_no_signal_whatever_its_mean_rounds_to(reward, dtype):
    for G in range(2, 20):
        rewards = torch.full((3, G), reward, dtype=dtype)
        rewards[1, 0] = torch.nan                                               # not judged: the others are equal still
        rewards[2, -1] += 1
        for scale in "std", "none":
            advantages = group_advantages(rewards, scale)
            assert advantages[:2].eq(0).all() and advantages[2].ne(0).all()


def test_rewards_in_half_precision_do_not_overflow():
    assert group_advantages(torch.tensor([[60_000.0, 60_000.0, 0.0]]).half()).tolist() == group_advantages(
        torch.tensor([[60_000.0, 60_000.0, 0.0]]).half().double()).float().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_loss_is_that_of_the_same_numbers_in_float32(dtype):
    logp, old, ref, advantages = (x.detach().to(dtype) for x in numbers()[:4])
    right = policy_loss(*(x.float() for x in (logp, old, ref, advantages)))
    assert torch.equal(policy_loss(logp, old, ref, advantages), right)


def test_a_ratio_that_float32_cannot_hold_spoils_nothing():
    """Advantage 0, or clipped: 0 times infinity would be NaN, in the value or in the gradient."""
    logp = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    loss = policy_loss(logp, torch.full((2, 1), -200.0), torch.full((2, 1), -1.0), torch.tensor([0.0, 1.0]))
    grad, = torch.autograd.grad(loss.sum(), logp)
    assert loss[:, 0].tolist() == pytest.approx([0.0, -1.2]) and grad.eq(0).all()
    assert was_clipped(logp.detach()[:, 0], torch.full((2,), -200.0), torch.tensor([0.0, 1.0])).tolist() == [False, True]
    assert not was_clipped(torch.full((1, 1), -3.0), torch.full((1, 1), -1.0), torch.zeros(1)).any()


@pytest.mark.parametrize("far", [1e-5, 1e-3, 1.0])
def test_k3_of_close_policies_is_not_lost_in_rounding(far):
    generator = torch.Generator().manual_seed(0)
    d = far * torch.randn(10_000, generator=generator, dtype=torch.float64)
    found = k3(torch.zeros(10_000), d.float())
    assert (found >= 0).all() and float(found.double().mean()) == pytest.approx(float((d.exp() - d - 1).mean()), rel=1e-2)


def test_the_reference_is_a_constant_and_k3_is_bounded():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    ref = (2 * logp.detach()).requires_grad_()
    token_loss(logp, logp, ref, torch.ones(2), beta=0.5).sum().backward()
    assert logp.grad is not None and ref.grad is None
    far = torch.tensor(-200.0, requires_grad=True)
    value = k3(far, torch.tensor(0.0))
    value.backward()
    assert value.item() == pytest.approx(math.exp(60), rel=1e-5) and far.grad == 0          # not +1, which drives it further


def test_a_reference_is_needed_for_its_kl_alone():
    logp, old, ref, advantages, _ = numbers()
    torch.testing.assert_close(policy_loss(logp, old, None, advantages, beta=0), policy_loss(logp, old, ref, advantages, beta=0))
    for loss, given in (policy_loss, (logp, old, None, advantages)), (token_loss, (logp[0], old[0], None, advantages[:1])):
        with pytest.raises(ValueError, match="beta = 0.04 needs ref_logp"):
            loss(*given)


def test_shapes_that_would_be_broadcast_are_refused():
    logp, old, ref, advantages, _ = numbers()
    for given in (logp, old[:1], ref), (logp, old, ref[:, :1]), (logp[:, 0], old[:, 0], ref[:, 0]):
        with pytest.raises(ValueError, match="a row for each answer"):
            policy_loss(*given, advantages)
    with pytest.raises(ValueError, match="one for each answer"):
        policy_loss(logp, old, ref, advantages[:, None].expand(N, R))


def test_the_module_says_where_its_variants_come_from():
    for name in "2402.03300", "2503.20783", "2503.14476", "2507.18071":
        assert name in grpo.__doc__


# ---- trl

VARIANTS = {"grpo": ("sequence", 0.2), "dapo": ("token", 0.28), "dr_grpo": ("constant", 0.2), "bnpo": ("token", 0.2),
            "gspo": ("sequence", 0.2)}                                          # trl's loss type -> norm, upper clip


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradient_are_trls(variant, beta):
    """trl's own _compute_loss, given our log-probabilities as its model's."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    logp, old, ref, advantages, mask = numbers(5)
    (norm, high), whole = VARIANTS[variant], variant == "gspo"
    nothing = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1)
    fake = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp), None), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="sequence" if whole else "token",
        beta=beta, loss_type="grpo" if whole else variant, epsilon_low=0.2, epsilon_high=high, use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1), accelerator=nothing,
        current_gradient_accumulation_steps=1, max_completion_length=12, model=SimpleNamespace(training=True),
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)})
    ids = torch.ones(N, 1, dtype=torch.long)
    theirs = trainer._compute_loss(fake, None, dict(
        prompt_ids=ids, prompt_mask=ids, completion_ids=mask.long(), completion_mask=mask.long(), advantages=advantages,
        old_per_token_logps=old, ref_per_token_logps=ref, num_items_in_batch=mask.sum()))
    past = with_one_ratio(logp, old, mask) if whole else old
    weights = torch.tensor(token_weights(mask.sum(1).tolist(), norm, 12))
    ours = (policy_loss(logp, past, ref, advantages, beta=beta, clip_high=high) * mask * weights[:, None]).sum()
    same_with_gradient(ours, theirs, logp)


# ---- through a model

def model(seed=1) -> Qwen2:
    return small(seed, vocab_size=30, num_hidden_layers=2, initializer_range=0.4)


class Tokens:
    eos_ids, pad_id = {7, 8}, 0

    def __len__(self):
        return 29


ROWS = [Encoded([1 + i, 2, 5][:1 + i % 3], [], False, 10 + i) for i in range(4)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probabilities_are_those_that_training_computes(temperature):
    policy = model().eval()
    answers, old = sample_groups(policy, ROWS, 3, 9, Tokens(), temperature, seed=1)
    assert [answer.index for answer in answers] == [10, 10, 10, 11, 11, 11, 12, 12, 12, 13, 13, 13]
    assert all(answer.prompt == ROWS[answer.index - 10].prompt for answer in answers)
    assert all(answer.cut == {7, 8}.isdisjoint(answer.response) for answer in answers)
    assert all({7, 8}.isdisjoint(answer.response[:-1]) for answer in answers)
    assert sample_groups(policy, ROWS, 3, 9, Tokens(), temperature, seed=1)[0] == answers
    assert {token for answer in answers for token in answer.response} <= set(range(29))
    again = token_log_probs(policy, answers, 0, 5, temperature, vocab=29)
    narrow = torch.cat(token_log_probs(policy, answers, 0, 5, temperature, vocab=29, dtype=torch.bfloat16))
    assert 1e-3 < (narrow - torch.cat(again)).abs().max() < 0.1                 # products in bfloat16, no more
    for answer, ours, theirs in zip(answers, old, again, strict=True):
        with torch.no_grad():
            logits = policy(torch.tensor([answer.prompt + answer.response]))[0, len(answer.prompt) - 1:-1, :29] / temperature
        exact = logits.double().log_softmax(-1).gather(1, torch.tensor(answer.response)[:, None])[:, 0].float()
        torch.testing.assert_close(theirs, exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-5)


def test_the_step_is_the_formula_on_full_logits():
    """Loss and gradient through the chunked head, of a batch of answers, against plain autograd on every logit."""
    policy, generator = model().train(), torch.Generator().manual_seed(2)
    answers, old = sample_groups(policy, ROWS, 3, 9, Tokens(), 0.8, seed=1)
    old = [row + 0.3 * torch.randn(len(row), generator=generator) for row in old]
    ref = [row + 0.3 * torch.randn(len(row), generator=generator) for row in old]
    A = torch.randn(len(answers), generator=generator)
    weights = token_weights([len(answer.response) for answer in answers], "sequence")
    expected = 0.0
    policy.eval()
    for answer, o, r, a, w in zip(answers, old, ref, A, weights):
        logits = policy(torch.tensor([answer.prompt + answer.response]))[0, len(answer.prompt) - 1:-1] / 0.8
        logp = logits.log_softmax(-1).gather(1, torch.tensor(answer.response)[:, None])[:, 0]
        expected = expected + w * policy_loss(logp[None], o[None], r[None], a[None]).sum()
    theirs = torch.autograd.grad(expected, list(policy.parameters()))
    ids, mask = collate(answers, 0)
    states, targets = scored_positions(policy.hidden(ids), ids, mask)
    lengths = torch.tensor([len(answer.response) for answer in answers])
    flat = lambda x: torch.as_tensor(x).repeat_interleave(lengths)
    o, r, a = torch.cat(old), torch.cat(ref), flat(A)
    loss, ce, spread = head_loss(states / 0.8, policy.head, targets, weight=flat(weights), divergence=entropy, chunk_bytes=800,
                                 policy_loss=lambda now, at: token_loss(now, o[at], r[at], a[at]))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, grad in zip(torch.autograd.grad(loss, list(policy.parameters())), theirs):
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-6)
    logits = (states / 0.8 @ policy.head.T).detach()
    torch.testing.assert_close(spread, torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-5, atol=1e-6)


def test_an_infinite_reward_is_refused():
    """It would make its whole group's advantages NaN."""
    for value in math.inf, -math.inf:
        with pytest.raises(ValueError, match="a reward is infinite"):
            group_advantages(torch.tensor([[1.0, value], [0.0, 1.0]]))
