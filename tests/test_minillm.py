"""MiniLLM against what can be enumerated: a vocabulary of 3, sequences of 3, every one of them with its probability."""
import itertools
import math
from statistics import median

import pytest
import torch

from conftest import small
from minikd import minillm
from minikd.data import Encoded, collate
from minikd.generate import generate, respond
from minikd.head import head_loss, scored_positions, target_log_probs
from minikd.losses import clipped_surrogate, reverse_kl
from minikd.minillm import (FROZEN, collect, importance_weights, pack_rollouts, rewards_to_go, rollout_steps, unpack_rollouts,
                            whiten)
from minikd.model import Qwen2

V, T, END = 3, 3, 0


def sequences() -> list[tuple[int, ...]]:
    """Every answer: it ends with END, or at T tokens without."""
    return [y for n in range(1, T + 1) for y in itertools.product(range(V), repeat=n)
            if END not in y[:-1] and (y[-1] == END or n == T)]


PREFIXES = [y for n in range(T) for y in itertools.product(range(1, V), repeat=n)]      # () (1) (2) (1,1) ... 7 of them


def tables(seed=3) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits after each prefix, [7, V] each: a student that knows each prefix by itself."""
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(7, V, generator=generator), 1.5 * torch.randn(7, V, generator=generator)


def log_prob(logits, y):
    """log probability of one answer."""
    return sum(logits[PREFIXES.index(y[:t])].double().log_softmax(-1)[token] for t, token in enumerate(y))


def exact_gradient(student, teacher):
    """Of KL(q || p) = sum over all answers of q(y) (log q(y) - log p(y)), MiniLLM eq. (1), by autograd: [7, V]"""
    student = student.double().requires_grad_()
    log_q, log_p = (torch.stack([log_prob(logits, y) for y in sequences()]) for logits in (student, teacher))
    assert log_q.exp().sum().item() == pytest.approx(1) and log_p.exp().sum().item() == pytest.approx(1)
    return torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), student)[0]


def estimated_gradient(student, teacher, mix=0.0, product=False, whitened=False, **options):
    """The expectation of MiniLLM's estimator, by the functions that training calls, over every answer that may be sampled: [7, V]

    whitened  as in training: the advantages of all tokens, each as often as it is sampled, get mean 0 and deviation 1"""
    answers = []
    for y in sequences():
        states, ids = [PREFIXES.index(y[:t]) for t in range(len(y))], torch.tensor(y)
        logq, logp = (logits.log_softmax(-1)[states, ids] for logits in (student, teacher))
        share = float(((1 - mix) * logq.exp() + mix * logp.exp()).prod())       # of this answer among those sampled
        to_go, weight = rewards_to_go(logq, logp, **options), importance_weights(logq, logp, mix, product)
        answers.append((states, ids, logq, to_go, weight, share))
    mean, deviation = 0.0, 1.0
    if whitened:
        values = torch.cat([to_go for *_, to_go, _, _ in answers]).double()
        often = torch.cat([torch.full((len(ids),), share, dtype=torch.float64) for _, ids, *_, share in answers])
        mean = (often * values).sum() / often.sum()
        deviation = ((often * (values - mean) ** 2).sum() / often.sum()).sqrt()
    total = torch.zeros(7, V, dtype=torch.float64)
    for states, ids, logq, to_go, weight, share in answers:
        advantage = ((to_go - mean) / deviation).float()
        step = weight if product else torch.ones_like(weight)                   # of the exact step
        hidden = torch.eye(7)[states]                                           # the state is the prefix, one-hot
        head = student.T.clone().requires_grad_()                               # [V, 7]: the logits are hidden @ headᵀ
        value, *_ = head_loss(hidden, head, ids, hidden, teacher.T, reverse_kl, kd_ratio=1.0, weight=step,
                              policy_loss=lambda now, at: clipped_surrogate(now, logq[at], (advantage * weight / step)[at],
                                                                            clip=1e9))
        total += share * torch.autograd.grad(value, head)[0].T.double()
    return total


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_estimators_expectation_is_the_gradient_of_the_reverse_kl_over_sequences(seed):
    student, teacher = tables(seed)
    ours = estimated_gradient(student, teacher, length_norm=False)
    torch.testing.assert_close(ours, exact_gradient(student, teacher), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mix", [0.2, 0.7])
def test_so_it_is_for_answers_of_the_mixture_under_the_whole_product_of_weights(mix):
    student, teacher = tables()
    ours = estimated_gradient(student, teacher, mix, product=True, length_norm=False)
    torch.testing.assert_close(ours, exact_gradient(student, teacher), rtol=0, atol=1e-6)


def cosine(a, b) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def test_one_weight_per_token_is_off_by_a_quarter_of_the_gradient():
    """Eq. (7), what MiniLLM uses, at its mix of 0.2: the expectation is biased. Mostly it points almost the same way."""
    off, cosines = [], []
    for seed in range(40):
        student, teacher = tables(seed)
        exact, ours = exact_gradient(student, teacher), estimated_gradient(student, teacher, 0.2, length_norm=False)
        off.append(float((ours - exact).norm() / exact.norm()))
        cosines.append(cosine(ours, exact))
    assert 0.2 < median(off) < 0.3 and median(cosines) > 0.95 and min(cosines) > 0.4


def test_near_the_teacher_whitening_turns_the_gradient_away():
    """As in training: whitened and length-normalised. Whitening divides R by a deviation that goes to 0 there, so the sampled
    part outgrows the exact step."""
    whitened, plain = [], []
    for seed in range(40):
        far, teacher = tables(seed)
        near = teacher + 0.05 * (far - teacher)
        exact = exact_gradient(near, teacher)
        plain.append(cosine(estimated_gradient(near, teacher), exact))
        whitened.append(cosine(estimated_gradient(near, teacher, whitened=True), exact))
    assert median(plain) > 0.98 and median(whitened) < 0.9


def test_length_normalisation_or_R_t_in_place_of_the_next_is_another_estimator():
    """So the tests above can fail."""
    student, teacher = tables()
    exact = exact_gradient(student, teacher)
    for options in dict(length_norm=True), dict(length_norm=False, current=True):
        assert (estimated_gradient(student, teacher, **options) - exact).abs().max() > 1e-3


# ---- the parts, as slow loops

def answer(n: int, seed=1) -> torch.Tensor:
    """log q and log p of an answer of n tokens: [2, n]"""
    return -4 * torch.rand(2, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length_norm", [False, True])
@pytest.mark.parametrize("current", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_rewards_to_go_are_the_sums_of_what_follows(length_norm, current, n):
    logq, logp = answer(n)
    ours = rewards_to_go(logq, logp, length_norm, current)
    for t in range(n):
        after = [float(logp[i] - logq[i]) for i in range(n) if i > t or current and i == t]         # r_i
        assert float(ours[t]) == pytest.approx(sum(after) / (max(1, len(after)) if length_norm else 1), abs=1e-5)   # eq. (6)


def test_a_reward_is_clipped_before_it_is_summed():
    logq, logp = torch.zeros(3), torch.tensor([-1.0, -90.0, 3.0])
    assert rewards_to_go(logq, logp, False, reward_clip=10.0).tolist() == [-7.0, 3.0, 0.0]
    assert torch.equal(rewards_to_go(logq, logp), rewards_to_go(logq, logp, True, False, 50.0))         # as in training


@pytest.mark.parametrize("mix", [0.2, 0.5])
def test_importance_weights_are_the_ratio_of_two_probabilities(mix):
    logq, logp = answer(6)
    ours, product = (importance_weights(logq, logp, mix, whole) for whole in (False, True))
    weights = [math.exp(a) / ((1 - mix) * math.exp(a) + mix * math.exp(b)) for a, b in zip(logq, logp)]     # w_t of eq. (7)
    for t, weight in enumerate(weights):
        assert float(ours[t]) == pytest.approx(weight, rel=1e-5) and weight <= 1 / (1 - mix)
        assert float(product[t]) == pytest.approx(math.prod(weights), rel=1e-5)
    assert importance_weights(logq, logp, 0.0).eq(1).all()


def test_whitening_gives_mean_0_and_deviation_1():
    values = whiten(torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0]))
    assert float(values.mean()) == pytest.approx(0, abs=1e-6) and float(values.var(correction=0)) == pytest.approx(1)
    assert whiten(torch.full((4,), 2.5)).eq(0).all() and whiten(torch.full((7,), -12.7)).abs().max() < 1e-6


# ---- rollouts of a real model

def model(seed: int, **shape) -> Qwen2:
    return small(seed, **dict(vocab_size=20, num_hidden_layers=2, initializer_range=0.4) | shape).eval()


STUDENT, TEACHER = model(1), model(2, hidden_size=24, vocab_size=23, num_attention_heads=3)
ROWS = [Encoded([1 + i % 5] * (1 + i % 3), [9], False, i) for i in range(12)]
COLLECT = dict(student=STUDENT, teacher=TEACHER, pad_id=0, eos_ids={7, 8}, batch_size=5, max_new_tokens=6)


def slow_log_probs(model, row, shared=20) -> list[float]:
    """log probability of each response token, over the rows both heads share, from a forward pass of one row."""
    with torch.no_grad():
        logits = model(torch.tensor([row.prompt + row.response]))[0, :, :shared].double().log_softmax(-1)
    return [float(logits[len(row.prompt) - 1 + t, token]) for t, token in enumerate(row.response)]


@pytest.mark.parametrize("length_norm", [True, False])
def test_a_rollout_holds_what_was_true_when_it_was_sampled(length_norm):
    rollouts = collect(rows=ROWS, mix=0.3, seed=5, length_norm=length_norm, **COLLECT)
    drawn = respond(STUDENT, ROWS, 5, 6, {7, 8}, seed=5, teacher=TEACHER, mix=0.3)          # not from the student alone
    assert [(row.prompt, row.response) for row in rollouts] == [(row.prompt, row.response) for row in drawn]
    assert {len(row.response) for row in rollouts} > {6} and any(row.cut for row in rollouts)
    plain, weights = [], []
    for row in rollouts:
        q, p = slow_log_probs(STUDENT, row), slow_log_probs(TEACHER, row)
        assert row.old_logq.tolist() == pytest.approx(q, abs=1e-5)
        with torch.no_grad():
            states = TEACHER.hidden(torch.tensor([row.prompt + row.response]))[0, len(row.prompt) - 1:-1]
        torch.testing.assert_close(row.teacher, states, atol=1e-5, rtol=1e-5)
        rewards = [b - a for a, b in zip(q, p)]
        plain.append([sum(rewards[t + 1:]) / (max(1, len(rewards) - t - 1) if length_norm else 1) for t in range(len(rewards))])
        weights.append([math.exp(a) / (0.7 * math.exp(a) + 0.3 * math.exp(b)) for a, b in zip(q, p)])
    flat = torch.tensor(sum(plain, []), dtype=torch.float64)                    # of every valid token, and no other
    for row, to_go, weight in zip(rollouts, plain, weights):
        white = (torch.tensor(to_go) - flat.mean()) / flat.std(correction=0)
        torch.testing.assert_close(row.advantage, (white * torch.tensor(weight)).float(), atol=1e-4, rtol=1e-4)
        assert not any(getattr(row, name).requires_grad or getattr(row, name).is_inference() for name in FROZEN)


def test_a_student_with_more_rows_says_only_what_its_teacher_has_a_row_for():
    student = model(3, vocab_size=90)
    for row in collect(rows=ROWS, mix=0.0, **COLLECT | dict(student=student)):
        assert max(row.response) < 23
        assert row.old_logq.tolist() == pytest.approx(slow_log_probs(student, row, 23), abs=1e-5)


def test_every_token_is_drawn_from_the_mixture_given_all_before():
    """Two tokens after one prompt, 20,000 times: the first ones, and the second ones where the first was the likeliest, come as
    often as (1 - mix) q + mix p says, eq. (4), within four standard deviations."""
    mix = 0.4
    pairs = torch.tensor(generate(STUDENT, [[3, 4]] * 20_000, 2, temperature=1.0, seed=1, teacher=TEACHER, mix=mix))
    first = int(pairs[:, 0].mode().values)
    for before, tokens in ([3, 4], pairs[:, 0]), ([3, 4, first], pairs[pairs[:, 0] == first, 1]):
        with torch.no_grad():
            q, p = (m(torch.tensor([before]))[0, -1, :20].double().softmax(-1) for m in (STUDENT, TEACHER))
        expected, count = (1 - mix) * q + mix * p, len(tokens)
        seen = torch.bincount(tokens, minlength=20) / count
        assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()
        assert (seen - q).abs().max() > 0.05                                    # and not those of q alone


@pytest.mark.parametrize("options", [dict(mix=0.2), dict(mix=0.2, teacher=TEACHER, temperature=0.0),
                                     dict(mix=1.0, teacher=TEACHER, temperature=1.0)])
def test_mixing_needs_a_teacher_a_share_and_temperature_1(options):
    with pytest.raises(ValueError, match="mix"):
        generate(STUDENT, [[3]], 2, **options)


def test_rollouts_survive_a_checkpoint_bit_for_bit():
    rollouts = collect(rows=ROWS, seed=1, **COLLECT)
    again = unpack_rollouts(pack_rollouts(rollouts))
    for a, b in zip(rollouts, again, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert type(value) is type(other)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert pack_rollouts([]) == {} and unpack_rollouts({}) == []


def test_rollouts_are_used_inner_epochs_times_and_then_sampled_anew():
    sampled = []
    options = dict(batch_size=3, grad_accum=1, seed=4, rollouts=6, inner_epochs=2, collecting=COLLECT)
    seen, steps = [], []
    for step, batches in rollout_steps(sampled, ROWS, 0, 8, **options):
        steps.append(step)
        seen.append([(row.index, tuple(row.response)) for row in sum(batches, [])])
        assert {id(row) for row in sum(batches, [])} <= {id(row) for row in sampled}
    assert steps == list(range(8))
    phases = [sum(seen[at:at + 4], []) for at in (0, 4)]                        # 6 rollouts, 3 a step, twice: 4 steps
    for phase in phases:
        assert all(phase.count(row) == 2 for row in phase) and len(set(phase)) == 6
        assert set(sum(seen[0:2], [])) == set(sum(seen[2:4], []))
    assert sorted(index for phase in phases for index, _ in set(phase)) == list(range(12))  # every prompt before one again
    assert {(row.index, tuple(row.response)) for row in sampled} == set(phases[1])          # no more than the steps ask for


def test_a_prompt_that_comes_again_is_answered_anew():
    same = [Encoded([3], [9], False, i) for i in range(6)]
    first, second = (sorted(row.response for row in sum(batches, [])) for _, batches in rollout_steps(
        [], same, 0, 2, batch_size=6, grad_accum=1, seed=4, rollouts=6, inner_epochs=1, collecting=COLLECT))
    assert first != second


def test_the_steps_after_a_resume_are_the_steps_of_the_whole_run():
    def reads(start, sampled, steps=9, **others):
        return [(step, [(row.index, tuple(row.response)) for row in sum(batches, [])], pack_rollouts(sampled))
                for step, batches in rollout_steps(sampled, ROWS, start, steps, batch_size=3, grad_accum=1, seed=4,
                                                   rollouts=6, inner_epochs=2, collecting=COLLECT | others)]
    whole = reads(0, [])
    for start in range(9):
        held = unpack_rollouts(whole[start - 1][2]) if start else []
        for (step, rows, _), (other, others, _) in zip(whole[start:], reads(start, held), strict=True):
            assert (step, rows) == (other, others)
    (_, rows, _), = reads(5, unpack_rollouts(whole[4][2]), steps=6, student=model(3))       # what is at hand is used up
    assert rows == whole[5][1]


def test_every_phase_takes_its_rollouts_in_another_order(monkeypatch):
    rows = [Encoded([1], [2], False, i) for i in range(8)]
    monkeypatch.setattr(minillm, "collect", lambda rows, seed: sorted(rows, key=lambda row: row.index))
    steps = rollout_steps([], rows, 0, 2, 8, 1, 0, 8, 1, {})
    taken = [row.index for _, batches in steps for batch in batches for row in batch]
    assert sorted(taken[:8]) == sorted(taken[8:]) and taken[:8] != taken[8:]


def test_rollouts_are_sampled_and_scored_in_the_dtype_of_training(monkeypatch):
    student, teacher, dtypes = small(1).eval(), small(2).eval().bfloat16(), []
    monkeypatch.setattr(minillm, "respond", lambda model, *given, **named: (
        dtypes.append(model.head.dtype), respond(model, *given, **named))[1])
    row, = collect(student, teacher, [Encoded([5, 6], [7], False, 0)], 0, [3], 1, 6, mix=0.0, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ids, mask = collate([row], 0)
        states, targets = scored_positions(student.hidden(ids), ids, mask)
        assert torch.equal(row.old_logq, target_log_probs(states, student.head, targets))
    assert dtypes == [torch.bfloat16]
