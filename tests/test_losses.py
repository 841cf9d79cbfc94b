"""Token-level losses against their formulas in slow Python loops, and against trl where it is installed."""
import math

import pytest
import torch

from conftest import random_logits
from minikd.losses import (DIVERGENCES, clipped_surrogate, entropy, forward_kl, jensen_shannon, pick_divergence, ratios,
                           reverse_kl, skew_forward_kl, skew_reverse_kl)

NAMES = sorted(DIVERGENCES)


# ---- the formulas, as slow as they can be written: Python floats are float64 ----

def probabilities(logits: list[float], temperature: float = 1.0) -> list[float]:
    highest = max(logits)
    powers = [math.exp((x - highest) / temperature) for x in logits]
    total = sum(powers)
    return [power / total for power in powers]


def slow_kl(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)


def mix(a: list[float], b: list[float], share: float) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b)]


SLOW = {                                            # q the student, p the teacher, s the share (beta or alpha)
    "forward_kl": lambda q, p, s: slow_kl(p, q),                                                        # paper eq. (4)
    "reverse_kl": lambda q, p, s: slow_kl(q, p),                                                        # MiniLLM, one step
    "jsd": lambda q, p, s: s * slow_kl(p, mix(p, q, s)) + (1 - s) * slow_kl(q, mix(p, q, s)),           # GKD eq. (1)
    "skew_forward_kl": lambda q, p, s: slow_kl(p, mix(p, q, s)),                                        # DistiLLM, section 3.1
    "skew_reverse_kl": lambda q, p, s: slow_kl(q, mix(q, p, s)),
}
SHARES = {"forward_kl": [None], "reverse_kl": [None], "jsd": [0.5, 0.1, 0.9], "skew_forward_kl": [0.1, 0.7],
          "skew_reverse_kl": [0.1, 0.7]}                                        # the first is the default
CASES = [(name, share) for name in NAMES for share in SHARES[name]]
SHARE_NAME = {"jsd": "beta", "skew_forward_kl": "alpha", "skew_reverse_kl": "alpha"}


def call(name, share, student, teacher, **more):
    named = {} if share is None else {SHARE_NAME[name]: share}
    return DIVERGENCES[name](student, teacher, **named, **more)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("name,share", CASES)
def test_a_divergence_is_the_sum_in_the_paper(name, share, temperature):
    student, teacher = random_logits(2, 3, 11, seed=1), random_logits(2, 3, 11, seed=2)
    values = call(name, share, student, teacher, temperature=temperature)
    assert values.shape == (2, 3) and values.dtype == torch.float32
    for b in range(2):
        for t in range(3):
            q = probabilities(student[b, t].tolist(), temperature)
            p = probabilities(teacher[b, t].tolist(), temperature)
            assert values[b, t].item() == pytest.approx(SLOW[name](q, p, share), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("name,share", CASES)
def test_its_gradient_is_the_slope_that_differences_give_in_float64(name, share, temperature):
    student, teacher = (random_logits(3, 7, seed=seed).double().requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda q, p: call(name, share, q, p, temperature=temperature), (student, teacher))


@pytest.mark.parametrize("name,share", CASES)
def test_a_divergence_is_zero_when_the_two_agree_and_never_negative(name, share):
    logits = random_logits(50, 300, seed=5)
    agreed = call(name, share, logits, logits + 3.0)                            # a constant changes no probability
    assert agreed.abs().max() < 1e-5
    for scale in 0.01, 1.0, 20.0:
        assert call(name, share, logits, scale * random_logits(50, 300, seed=6)).min() > -1e-6


def test_the_default_shares_are_a_half_for_jsd_and_a_tenth_for_the_skews():
    student, teacher = random_logits(4, 9, seed=7), random_logits(4, 9, seed=8)
    for name in SHARE_NAME:
        torch.testing.assert_close(DIVERGENCES[name](student, teacher), call(name, SHARES[name][0], student, teacher))


def test_a_divergence_is_picked_with_those_options_that_it_takes():
    student, teacher = random_logits(4, 9, seed=7), random_logits(4, 9, seed=8)
    for name in NAMES:
        picked = pick_divergence(name, temperature=2.0, beta=0.3, alpha=0.3)
        expected = call(name, 0.3 if name in SHARE_NAME else None, student, teacher, temperature=2.0)
        torch.testing.assert_close(picked(student, teacher), expected)


def test_jsd_refuses_the_ends_where_its_formula_is_zero_everywhere():
    for beta in 0.0, 1.0, -0.1, 1.5, math.nan:
        with pytest.raises(ValueError, match="0 < beta < 1.*forward_kl or reverse_kl"):
            jensen_shannon(torch.zeros(3), torch.zeros(3), beta=beta)


@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_that_is_not_above_0_is_refused(name):
    for temperature in 0.0, -1.0, math.nan:
        with pytest.raises(ValueError, match="a number above 0"):
            DIVERGENCES[name](torch.zeros(3), torch.zeros(3), temperature=temperature)


def test_jsd_and_the_skews_stay_under_their_bounds_where_kl_has_none():
    student, teacher = torch.full((8,), -200.0), torch.full((8,), -200.0)       # all mass on different tokens
    student[0], teacher[1] = 200.0, 200.0
    assert forward_kl(student, teacher) > 300 and reverse_kl(student, teacher) > 300
    for share in 0.1, 0.5, 0.9:
        bound = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert jensen_shannon(student, teacher, beta=share).item() == pytest.approx(bound, rel=1e-6)
        assert skew_forward_kl(student, teacher, alpha=share).item() == pytest.approx(-math.log(share), rel=1e-6)
        assert skew_reverse_kl(student, teacher, alpha=share).item() == pytest.approx(-math.log(share), rel=1e-6)


@pytest.mark.parametrize("name,share", CASES)
def test_gradients_are_finite_where_probabilities_underflow(name, share):
    student = torch.tensor([300.0, -300.0, 0.0], requires_grad=True)
    call(name, share, student, torch.tensor([-300.0, 300.0, 0.0])).backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("noise, error", [(2, 4e-6), (0.3, 2e-6), (0.003, 4e-7)])
def test_over_qwens_whole_vocabulary_float32_is_enough(name, noise, error):
    """Of two models 4.5e-6 nats apart, too: a float32 log_softmax over so many rows is itself off by 1e-5."""
    q = random_logits(4, 151_936, scale=1).bfloat16().float()
    p = q + random_logits(4, 151_936, seed=1, scale=noise)
    found, exact = (DIVERGENCES[name](*logits) for logits in ((q, p), (q.double(), p.double())))
    assert exact.min() > 3e-7 and (found - exact).abs().max() < error


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_over_qwens_whole_vocabulary_the_normalisers_leave_no_trace_in_the_jsd(beta):
    q, p = (random_logits(4, 151_936, seed=seed, scale=3) for seed in (0, 1))
    for other, error in (p, 5e-7), (q, 2e-7):
        found, exact = (jensen_shannon(*logits, beta) for logits in ((q, other), (q.double(), other.double())))
        assert (found - exact).abs().max() < error


def test_half_precision_logits_are_widened_before_the_softmax():
    """In bfloat16 the softmax of Qwen's vocabulary would be off by more than the KL itself, where two models are close."""
    student = random_logits(151_936, seed=11, scale=3.0)
    student, teacher = student.bfloat16(), (student + random_logits(151_936, seed=12, scale=0.1)).bfloat16()
    for name in NAMES:
        assert torch.equal(DIVERGENCES[name](student, teacher), DIVERGENCES[name](student.float(), teacher.float()))
    logq, logp = student.log_softmax(-1).float(), teacher.log_softmax(-1).float()       # softmax in bfloat16, sum in float32
    exact = forward_kl(student, teacher)
    assert ((logp.exp() * (logp - logq)).sum() - exact).abs() > exact > 0


@pytest.mark.parametrize("name,share", CASES)
def test_heads_of_different_height_are_cut_before_the_softmax(name, share):
    student, teacher = random_logits(5, 13, seed=13).requires_grad_(), random_logits(5, 13, seed=14)
    cut = call(name, share, student, teacher[:, :9])
    torch.testing.assert_close(cut, call(name, share, student[:, :9], teacher[:, :9]))
    torch.testing.assert_close(call(name, share, student[:, :9], teacher), cut)
    cut.sum().backward()
    assert student.grad[:, 9:].eq(0).all() and student.grad[:, :9].ne(0).all()


@pytest.mark.parametrize("student, teacher, infinite", [
    ((1.0, 2.0, -math.inf), (0.0, 1.0, -math.inf), ()),
    ((1.0, 2.0, 0.5), (0.0, 1.0, -math.inf), ("reverse_kl",)),
    ((1.0, 2.0, -11.0), (0.0, 1.0, -math.inf), ("reverse_kl",)),
    ((1.0, 2.0, -math.inf), (0.0, 1.0, 0.5), ("forward_kl",))])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_token_that_is_ruled_out_counts_as_0_log_0(student, teacher, infinite, temperature):
    """Logits of -inf, as in a masked vocabulary, against -500, whose probability is 0 in float32 too, but whose log is finite."""
    for name, divergence in DIVERGENCES.items():
        found = []
        for least in -math.inf, -500.0:
            logits = torch.tensor([[max(value, least) for value in student]], requires_grad=True)
            value = divergence(logits, torch.tensor([[max(value, least) for value in teacher]]), temperature=temperature)
            found.append((value, torch.autograd.grad(value.sum(), logits)[0]))
        if name in infinite:
            assert found[0][0].item() == math.inf and not found[0][1].isnan().any()
        else:
            torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)
    logits = torch.tensor([student])
    torch.testing.assert_close(entropy(logits), entropy(logits.clamp(min=-500)))


def test_at_its_ends_a_skew_divergence_is_the_plain_one_and_0():
    student, teacher = random_logits(4, 9, seed=1).requires_grad_(), random_logits(4, 9, seed=2)
    for skewed, plain in (skew_forward_kl, forward_kl), (skew_reverse_kl, reverse_kl):
        torch.testing.assert_close(skewed(student, teacher, alpha=0), plain(student, teacher))
        none = skewed(student, teacher, alpha=1)
        assert (none == 0).all() and (torch.autograd.grad(none.sum(), student)[0].abs() < 1e-6).all()
        for alpha in -0.1, 1.1, math.nan:
            with pytest.raises(ValueError, match="must be from 0 to 1"):
                skewed(student, teacher, alpha=alpha)


# ---- trl, where it is installed ----

@pytest.fixture(scope="module")
def trl_loss():
    pytest.importorskip("trl")
    return pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_values_and_gradients_are_those_of_trl(trl_loss, beta, temperature):
    student, teacher = random_logits(2, 6, 500, seed=15), random_logits(2, 6, 500, seed=16)
    labels = torch.tensor([[-100, -100, 1, 1, 1, -100], [-100, 1, 1, -100, -100, -100]])    # trl reads only the -100
    theirs, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = trl_loss(theirs, teacher, labels=labels, beta=beta, temperature=temperature)
    if beta == 0:                                                               # trl's two special cases
        values = forward_kl(ours, teacher, temperature)
    elif beta == 1:
        values = reverse_kl(ours, teacher, temperature)
    else:
        values = jensen_shannon(ours, teacher, beta, temperature)
    loss = values[labels != -100].mean()
    loss.backward(), expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (ours.grad - theirs.grad).abs().max() < 1e-5 * theirs.grad.abs().max()


# ---- the policy's loss ----

def slow_surrogate(logq, old, advantage, clip):
    return [-min(math.exp(q - o) * a, max(1 - clip, min(1 + clip, math.exp(q - o))) * a)
            for q, o, a in zip(logq.tolist(), old.tolist(), advantage.tolist())]


def test_the_clipped_surrogate_is_ppos_eq_7_and_stops_where_the_ratio_went_too_far():
    logq = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9])).requires_grad_()
    old, advantage = torch.log(torch.tensor([0.5, 0.3, 0.3, 0.9, 0.5])), torch.tensor([1.5, 2.0, -2.0, -1.0, -1.0])
    ours = clipped_surrogate(logq, old, advantage, 0.2)
    assert ours.tolist() == pytest.approx(slow_surrogate(logq, old, advantage, 0.2), rel=1e-6)
    grad = torch.autograd.grad(ours.sum(), logq)[0]
    assert grad[0] == pytest.approx(-1.5)                                       # -A where q is still q_old
    assert grad[1] == 0 and grad[3] == 0                                        # far enough, the way that A wants
    assert grad[2] == pytest.approx(2 * 5 / 3) and grad[4] == pytest.approx(1.8)    # too far the other way: pulled back


def test_a_ratio_is_bounded_and_clipped_at_ppos_0_2_unless_told_otherwise():
    one, zero = torch.tensor([1.0, -1.0]), torch.zeros(2)
    assert clipped_surrogate(one, zero, torch.tensor([1.0, -1.0])).tolist() == pytest.approx([-1.2, 0.8])
    assert ratios(one, zero, 0.2, 0.0)[1].tolist() == pytest.approx([1.0, 0.8])         # an upper clip of 0 is one
    assert float(ratios(torch.tensor(200.0), torch.tensor(0.0), 0.2, None)[0]) == pytest.approx(math.exp(60), rel=1e-5)
