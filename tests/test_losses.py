"""Token-level losses against their formulas in slow Python loops, and against trl where it is installed."""
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minikd import losses
from minikd.losses import (DIVERGENCES, _backward_head, clipped_surrogate, compare_heads, entropy, forward_kl, head_loss,
                           jensen_shannon, pick_divergence, reverse_kl, scored_positions, skew_forward_kl, skew_reverse_kl)
from minikd.model import Qwen2, Qwen2Config

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
    "forward_kl": lambda q, p, s: slow_kl(p, q),
    "reverse_kl": lambda q, p, s: slow_kl(q, p),
    "jsd": lambda q, p, s: s * slow_kl(p, mix(p, q, s)) + (1 - s) * slow_kl(q, mix(p, q, s)),
    "skew_forward_kl": lambda q, p, s: slow_kl(p, mix(p, q, s)),
    "skew_reverse_kl": lambda q, p, s: slow_kl(q, mix(q, p, s)),
}
SHARES = {"forward_kl": [None], "reverse_kl": [None], "jsd": [0.5, 0.1, 0.9], "skew_forward_kl": [0.1, 0.7],
          "skew_reverse_kl": [0.1, 0.7]}                                        # the first is the default
CASES = [(name, share) for name in NAMES for share in SHARES[name]]
LONG = {"jsd": "beta", "skew_forward_kl": "alpha", "skew_reverse_kl": "alpha"}


def call(name, share, student, teacher, **more):
    named = {} if share is None else {LONG[name]: share}
    return DIVERGENCES[name](student, teacher, **named, **more)


def random_logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name,share", CASES)
def test_in_float64_a_divergence_has_the_gradient_that_differences_give(name, share):
    student, teacher = (random_logits(3, 7, seed=seed).double().requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda q, p: call(name, share, q, p, temperature=1.5), (student, teacher))


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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name,share", CASES)
def test_the_gradient_is_the_slope_of_the_slow_formula(name, share, temperature):
    student, teacher = random_logits(7, seed=3).requires_grad_(), random_logits(7, seed=4)
    call(name, share, student, teacher, temperature=temperature).backward()
    p = probabilities(teacher.tolist(), temperature)

    def slow(v, step):
        moved = student.tolist()
        moved[v] += step
        return SLOW[name](probabilities(moved, temperature), p, share)

    for v in range(7):
        slope = (slow(v, 1e-5) - slow(v, -1e-5)) / 2e-5
        assert student.grad[v].item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name,share", CASES)
def test_a_divergence_is_zero_when_the_two_agree_and_never_negative(name, share):
    logits = random_logits(50, 300, seed=5)
    agreed = call(name, share, logits, logits + 3.0)                            # a constant changes no probability
    assert agreed.abs().max() < 1e-5
    for scale in 0.01, 1.0, 20.0:
        assert call(name, share, logits, scale * random_logits(50, 300, seed=6)).min() > -1e-6


def test_the_default_shares_are_a_half_for_jsd_and_a_tenth_for_the_skews():
    student, teacher = random_logits(4, 9, seed=7), random_logits(4, 9, seed=8)
    for name in LONG:
        torch.testing.assert_close(DIVERGENCES[name](student, teacher), call(name, SHARES[name][0], student, teacher))


def test_a_divergence_is_picked_with_those_options_that_it_takes():
    student, teacher = random_logits(4, 9, seed=7), random_logits(4, 9, seed=8)
    for name in NAMES:
        picked = pick_divergence(name, temperature=2.0, beta=0.3, alpha=0.3)
        expected = call(name, 0.3 if name in LONG else None, student, teacher, temperature=2.0)
        torch.testing.assert_close(picked(student, teacher), expected)


def test_jsd_weighs_the_teacher_by_beta_and_is_symmetric_at_a_half():
    student, teacher = random_logits(4, 9, seed=9), random_logits(4, 9, seed=10)
    torch.testing.assert_close(jensen_shannon(student, teacher, beta=0.3), jensen_shannon(teacher, student, beta=0.7))
    assert not torch.allclose(jensen_shannon(student, teacher, beta=0.3), jensen_shannon(teacher, student, beta=0.3))
    torch.testing.assert_close(jensen_shannon(student, teacher), jensen_shannon(teacher, student))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5])
def test_jsd_refuses_the_ends_where_its_formula_is_zero_everywhere(beta):
    with pytest.raises(ValueError, match="0 < beta < 1.*forward_kl or reverse_kl"):
        jensen_shannon(torch.zeros(3), torch.zeros(3), beta=beta)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
@pytest.mark.parametrize("name", NAMES)
def test_a_temperature_that_is_not_above_0_is_refused(name, temperature):
    with pytest.raises(ValueError, match="a number above 0"):
        DIVERGENCES[name](torch.zeros(3), torch.zeros(3), temperature=temperature)


def test_jsd_and_the_skews_stay_under_their_bounds_where_kl_has_none():
    student, teacher = torch.full((8,), -200.0), torch.full((8,), -200.0)       # all mass on different tokens
    student[0], teacher[1] = 200.0, 200.0
    assert forward_kl(student, teacher) > 300 and reverse_kl(student, teacher) > 300
    for share in 0.1, 0.5, 0.9:
        entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
        assert jensen_shannon(student, teacher, beta=share).item() == pytest.approx(entropy, rel=1e-6)
        assert skew_forward_kl(student, teacher, alpha=share).item() == pytest.approx(-math.log(share), rel=1e-6)
        assert skew_reverse_kl(student, teacher, alpha=share).item() == pytest.approx(-math.log(share), rel=1e-6)


@pytest.mark.parametrize("name,share", CASES)
def test_gradients_are_finite_where_probabilities_underflow(name, share):
    student = torch.tensor([300.0, -300.0, 0.0], requires_grad=True)
    call(name, share, student, torch.tensor([-300.0, 300.0, 0.0])).backward()
    assert student.grad.isfinite().all()


def test_bfloat16_logits_are_widened_before_the_softmax():
    student = random_logits(151_936, seed=11, scale=3.0)
    teacher = (student + random_logits(151_936, seed=12, scale=0.3)).bfloat16()
    student = student.bfloat16()
    q, p = probabilities(student.tolist()), probabilities(teacher.tolist())     # the same logits, in float64
    for name in NAMES:
        exact = SLOW[name](q, p, SHARES[name][0])
        assert DIVERGENCES[name](student, teacher).item() == pytest.approx(exact, abs=1e-5)        # float32 sums of 151,936
    narrow_q, narrow_p = student.log_softmax(-1), teacher.log_softmax(-1)       # softmax in bfloat16, sum in float32
    narrow = (narrow_p.float().exp() * (narrow_p.float() - narrow_q.float())).sum().item()
    assert narrow != pytest.approx(slow_kl(p, q), rel=1e-2)                     # KL is 0.045


@pytest.mark.parametrize("name,share", CASES)
def test_heads_of_different_height_are_cut_before_the_softmax(name, share):
    student, teacher = random_logits(5, 13, seed=13).requires_grad_(), random_logits(5, 13, seed=14)
    cut = call(name, share, student, teacher[:, :9])
    torch.testing.assert_close(cut, call(name, share, student[:, :9], teacher[:, :9]))
    torch.testing.assert_close(call(name, share, student[:, :9], teacher), cut)
    cut.sum().backward()
    assert student.grad[:, 9:].eq(0).all() and student.grad[:, :9].ne(0).all()


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


# ---- the shift by one ----

def test_the_state_before_a_token_scores_it():
    rng = random.Random(0)
    hidden, ids = torch.randn(4, 9, 5), torch.randint(50, (4, 9))
    mask = torch.tensor([[rng.random() < 0.5 for _ in range(9)] for _ in range(4)])
    states, targets = scored_positions(hidden, ids, mask)
    expected = [(hidden[b, t - 1], ids[b, t]) for b in range(4) for t in range(1, 9) if mask[b, t]]
    assert len(states) == len(targets) == len(expected) > 0
    for state, target, (slow_state, slow_target) in zip(states, targets, expected):
        assert torch.equal(state, slow_state) and target == slow_target


def test_the_last_prompt_position_scores_the_first_reply_token_and_padding_scores_nothing():
    ids = torch.tensor([[11, 12, 13, 21, 22, 0, 0], [11, 31, 32, 33, 34, 35, 36]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]]).bool()  # prompts of 3 and 1, replies of 2 and 6
    hidden = torch.arange(14).view(2, 7, 1)                                     # each state is its own index
    states, targets = scored_positions(hidden, ids, mask)
    assert len(targets) == mask.sum()
    assert targets.tolist() == [21, 22, 31, 32, 33, 34, 35, 36]
    assert states[:, 0].tolist() == [2, 3, 7, 8, 9, 10, 11, 12]


# ---- the head, chunk by chunk ----

N, V, D, DT = 53, 41, 6, 10                         # scored tokens, vocabulary, student's and teacher's hidden size


def head_inputs(student_rows=V, teacher_rows=V):
    generator = torch.Generator().manual_seed(17)
    shapes = dict(hidden=(N, D), head=(student_rows, D), teacher_hidden=(N, DT), teacher_head=(teacher_rows, DT))
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in "hidden", "head":
        inputs[name].requires_grad_()
    return inputs | {"targets": torch.randint(min(student_rows, teacher_rows), (N,), generator=generator)}


def naive(hidden, head, targets, teacher_hidden, teacher_head, divergence, kd_ratio, weight=1.0):
    """What head_loss computes, with every logit of every token held at once."""
    shared = min(len(head), len(teacher_head))
    student, teacher = hidden @ head[:shared].T, teacher_hidden @ teacher_head[:shared].T
    ce, kd = F.cross_entropy(student, targets, reduction="none"), divergence(student, teacher)
    return (weight * ((1 - kd_ratio) * ce + kd_ratio * kd)).sum(), ce, kd


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 35, 52, 53, 1000])             # in a chunk; its 16th in a softmax
@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_head_loss_is_the_loss_of_full_logits(name, kd_ratio, tokens):
    inputs = head_inputs()
    options = dict(divergence=DIVERGENCES[name], kd_ratio=kd_ratio)
    expected, ce, kd = naive(**inputs, **options)
    loss, our_ce, our_kd = head_loss(**inputs, **options, chunk_bytes=tokens * V * 4)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_kd, kd, rtol=1e-5, atol=1e-6)
    if kd_ratio < 1:
        torch.testing.assert_close(our_ce, ce, rtol=1e-5, atol=1e-6)
    of = inputs["hidden"], inputs["head"]
    for ours, theirs in zip(gradients(2.5 * loss, *of), gradients(2.5 * expected, *of)):    # the chain rule goes on
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 9, 1000])
def test_without_a_teacher_head_loss_is_cross_entropy(tokens):
    inputs = head_inputs()
    of = inputs["hidden"], inputs["head"]
    expected = F.cross_entropy(of[0] @ of[1].T, inputs["targets"], reduction="none")
    loss, ce, kd = head_loss(*of, inputs["targets"], weight=1 / N, chunk_bytes=tokens * V * 4)
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(ce, expected.detach())
    assert kd.eq(0).all()
    for ours, theirs in zip(gradients(loss, *of), gradients(expected.mean(), *of)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows,teacher_rows", [(V, V - 4), (V - 4, V)])
def test_head_loss_cuts_heads_to_the_shared_vocabulary(rows, teacher_rows):
    inputs = head_inputs(rows, teacher_rows)
    expected, ce, _ = naive(**inputs, divergence=reverse_kl, kd_ratio=0.5)
    loss, our_ce, _ = head_loss(**inputs, divergence=reverse_kl, kd_ratio=0.5, chunk_bytes=5 * V * 4)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(our_ce, ce)                                      # cross-entropy sees the shared rows too
    of = inputs["hidden"], inputs["head"]
    for ours, theirs in zip(gradients(loss, *of), gradients(expected, *of)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)          # 0 in the rows that were cut


def test_a_tall_head_is_multiplied_block_by_block_and_the_blocks_are_summed_in_float32(monkeypatch):
    inputs = head_inputs()
    of, options = (inputs["hidden"], inputs["head"]), dict(divergence=forward_kl, kd_ratio=0.5, chunk_bytes=5 * V * 4)
    expected = naive(**inputs, divergence=forward_kl, kd_ratio=0.5)[0]
    monkeypatch.setattr("minikd.losses.BLOCK", 16)                              # two blocks and a part
    loss, *_ = head_loss(**inputs, **options)
    torch.testing.assert_close(loss, expected)
    exact = gradients(expected, *of)
    for ours, theirs in zip(gradients(loss, *of), exact):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("minikd.losses.BLOCK", 1)
    ones, grad = torch.ones(300, 1).bfloat16(), torch.empty(1, 1).bfloat16()
    _backward_head(ones.T, ones[:1], ones, grad, None)
    assert grad.item() == 300                                                   # bfloat16 itself counts to 256


@pytest.mark.parametrize("dtype, chunks", [(torch.float32, [48, 48, 34]), (torch.bfloat16, [44, 44, 42])])
def test_float32_chunks_are_whole_tiles(monkeypatch, dtype, chunks):
    hidden, head = random_logits(130, 8).to(dtype).requires_grad_(), random_logits(40, 8, seed=1).to(dtype)
    targets = torch.arange(130) % 40
    seen, apply_head = [], losses.apply_head
    monkeypatch.setattr(losses, "apply_head", lambda states, *rest, **out: (seen.append(len(states)), apply_head(states, *rest, **out))[1])
    grads = []
    for size in 1 << 20, 55 * 40 * dtype.itemsize:                              # all at once, and room for 55 tokens
        head_loss(hidden, head, targets, chunk_bytes=size)[0].backward()
        grads.append(hidden.grad)
        hidden.grad = None
    assert seen == [130, *chunks]
    torch.testing.assert_close(*grads)


def test_each_token_counts_by_its_own_weight():
    inputs, weight = head_inputs(), torch.rand(N, generator=torch.Generator().manual_seed(18))
    weight[3] = 0.0
    expected, *_ = naive(**inputs, divergence=forward_kl, kd_ratio=0.5, weight=weight)
    loss, *_ = head_loss(**inputs, divergence=forward_kl, kd_ratio=0.5, weight=weight, chunk_bytes=5 * V * 4)
    torch.testing.assert_close(loss, expected)
    of = inputs["hidden"], inputs["head"]
    ours = gradients(loss, *of)
    for grad, theirs in zip(ours, gradients(expected, *of)):
        torch.testing.assert_close(grad, theirs, rtol=1e-5, atol=1e-5)
    assert ours[0][3].eq(0).all()


def test_head_loss_without_gradients_and_with_one_side_frozen():
    inputs = head_inputs()
    options = dict(divergence=forward_kl, kd_ratio=0.5, chunk_bytes=5 * V * 4)
    loss, *_ = head_loss(**inputs, **options)
    grad_hidden, grad_head = gradients(loss, inputs["hidden"], inputs["head"])
    for mode in torch.no_grad(), torch.inference_mode():
        with mode:
            value, *_ = head_loss(**inputs, **options)
        assert value == loss and not value.requires_grad
    for frozen, free, expected in ("head", "hidden", grad_hidden), ("hidden", "head", grad_head):
        some = inputs | {frozen: inputs[frozen].detach()}
        value, *_ = head_loss(**some, **options)
        assert value == loss
        torch.testing.assert_close(gradients(value, some[free])[0], expected)


def test_the_per_token_values_are_for_logs_and_carry_no_gradient():
    _, ce, kd = head_loss(**head_inputs(), divergence=forward_kl, kd_ratio=0.5)
    assert not ce.requires_grad and not kd.requires_grad


def test_a_divergence_that_is_only_measured_may_be_infinite():
    inputs = head_inputs()
    infinite = lambda logits, teacher_logits: torch.full((len(logits),), torch.inf)
    loss, ce, kd = head_loss(**inputs, divergence=infinite)
    assert kd.isinf().all() and float(loss.detach()) == pytest.approx(float(ce.sum()))
    assert gradients(loss, inputs["hidden"])[0].isfinite().all()


def test_a_batch_without_a_scored_token_has_loss_0_and_gradient_0():
    inputs = head_inputs()
    none = {key: inputs[key][:0] for key in ("targets", "teacher_hidden")}
    hidden = inputs["hidden"].detach()[:0].requires_grad_()
    loss, ce, kd = head_loss(hidden, inputs["head"], none["targets"], none["teacher_hidden"], inputs["teacher_head"],
                             forward_kl, 0.5)
    assert loss == 0 and ce.shape == kd.shape == (0,)
    assert gradients(loss, inputs["head"])[0].eq(0).all()


def test_head_loss_is_differentiated_once_and_says_so():
    for keep in False, True:
        loss, *_ = head_loss(**head_inputs(), divergence=forward_kl, kd_ratio=0.5)
        loss.backward(retain_graph=keep)
        with pytest.raises(RuntimeError, match="once"):
            loss.backward()
    inputs = head_inputs()
    loss, *_ = head_loss(**inputs, divergence=forward_kl, kd_ratio=0.5)
    scale = torch.ones((), requires_grad=True)
    first, = torch.autograd.grad(scale * loss, inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):                            # nor a second derivative
        first.sum().backward()


@pytest.mark.parametrize("lacks", ["divergence", "teacher_hidden", "teacher_head"])
def test_a_kd_ratio_without_a_teacher_or_a_divergence_is_refused(lacks):
    inputs = head_inputs() | {"divergence": forward_kl}
    with pytest.raises(ValueError, match="kd_ratio = 0.5 needs"):
        head_loss(**inputs | {lacks: None}, kd_ratio=0.5)


def test_gradients_in_float16_are_refused_as_they_would_underflow():
    inputs = {key: value.detach().half() if value.is_floating_point() else value for key, value in head_inputs().items()}
    assert head_loss(**inputs)[0].isfinite()
    with pytest.raises(ValueError, match="underflow in float16"):
        head_loss(**inputs | {"hidden": inputs["hidden"].requires_grad_()})


def test_autocast_and_bfloat16_stay_near_float32():
    inputs = head_inputs()
    of, options = (inputs["hidden"], inputs["head"]), dict(divergence=forward_kl, kd_ratio=0.5, chunk_bytes=6 * V * 4)
    exact, *_ = head_loss(**inputs, **options)
    expected = gradients(exact, *of)
    with torch.autocast("cpu", torch.bfloat16):
        loss, ce, kd = head_loss(**inputs, **options)
    narrow = {key: value.detach().bfloat16().requires_grad_() if value.is_floating_point() else value
              for key, value in inputs.items()}
    small, small_ce, small_kd = head_loss(**narrow, **options)
    assert loss.dtype == small.dtype == torch.float32
    for values in ce, kd, small_ce, small_kd:                                   # nothing after the logits is narrow
        assert (values != values.bfloat16()).sum() > N / 2
    for value, grads in (loss, gradients(loss, *of)), (small, gradients(small, narrow["hidden"], narrow["head"])):
        assert value.item() == pytest.approx(exact.item(), rel=1e-2) and value != exact
        for grad, wide in zip(grads, expected):
            assert (grad.float() - wide).norm() < 2e-2 * wide.norm()
    assert [grad.dtype for grad in gradients(head_loss(**inputs, **options)[0], *of)] == [torch.float32] * 2


def test_states_that_were_kept_in_bfloat16_meet_the_teachers_head_in_its_own_dtype():
    inputs = head_inputs() | dict(divergence=forward_kl, kd_ratio=0.5)
    kept = inputs["teacher_hidden"].bfloat16()
    *_, kd = head_loss(**inputs | dict(teacher_hidden=kept))
    torch.testing.assert_close(kd, naive(**inputs | dict(teacher_hidden=kept.float()))[2], rtol=1e-5, atol=1e-6)


def ragged_batch(lengths, prompts, vocab):
    """ids and mask, right-padded: replies run from each prompt's end to the row's."""
    ids = torch.randint(1, vocab, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(19))
    column = torch.arange(max(lengths))
    inside = column < torch.tensor(lengths)[:, None]
    return ids * inside, inside & (column >= torch.tensor(prompts)[:, None])


def test_one_batch_of_eight_equals_eight_of_one_accumulated():
    shape = dict(vocab_size=60, intermediate_size=24, num_hidden_layers=1, tie_word_embeddings=True,
                 initializer_range=0.3)
    student = Qwen2(Qwen2Config(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, **shape)).init_weights(1)
    teacher = Qwen2(Qwen2Config(hidden_size=24, num_attention_heads=2, num_key_value_heads=1, **shape)).init_weights(2)
    lengths, prompts = [5, 12, 7, 3, 9, 12, 4, 10], [2, 1, 6, 1, 5, 3, 2, 4]
    ids, mask = ragged_batch(lengths, prompts, 60)

    def accumulate(rows_at_once, per_micro_batch=False):
        student.zero_grad()
        total = 0.0
        for i in range(0, 8, rows_at_once):
            width = max(lengths[i:i + rows_at_once])                            # as the batches come: padded no further
            part, scored = ids[i:i + rows_at_once, :width], mask[i:i + rows_at_once, :width]
            states, targets = scored_positions(student.hidden(part), part, scored)
            with torch.no_grad():
                soft, _ = scored_positions(teacher.hidden(part), part, scored)
            weight = rows_at_once / 8 / scored.sum() if per_micro_batch else 1 / mask.sum()
            loss, *_ = head_loss(states, student.head, targets, soft, teacher.head.detach(), forward_kl, 0.5, weight)
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in student.parameters()])

    whole, expected = accumulate(8)
    for rows in 1, 3:
        loss, grads = accumulate(rows)
        assert loss == pytest.approx(whole, rel=1e-6)
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)
    assert (accumulate(1, per_micro_batch=True)[1] - expected).norm() > 1e-2 * expected.norm()     # the pitfall


class Largest(TorchDispatchMode):
    """The most elements that any tensor made within the block has."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_full_logits_are_never_made_forward_or_backward(name, autocast):
    n, v, d, chunk = 64, 1000, 8, 16
    hidden, head = random_logits(n, d).requires_grad_(), random_logits(v, d).requires_grad_()
    rest = dict(targets=torch.zeros(n, dtype=torch.long), teacher_hidden=random_logits(n, d, seed=1),
                teacher_head=random_logits(v, d, seed=2), divergence=DIVERGENCES[name], kd_ratio=0.5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with Largest() as ours:
            head_loss(hidden, head, **rest, chunk_bytes=chunk * v * (2 if autocast else 4))[0].backward()
        with Largest() as theirs:
            naive(hidden, head, **rest)[0].backward()
    assert ours.elements == chunk * v and theirs.elements >= n * v


# ---- a policy gradient through the same head, and the metrics

def slow_surrogate(logq, old, advantage, clip):
    return [-min(math.exp(q - o) * a, max(1 - clip, min(1 + clip, math.exp(q - o))) * a)
            for q, o, a in zip(logq.tolist(), old.tolist(), advantage.tolist())]


@pytest.mark.parametrize("student, teacher, infinite", [
    ((1.0, 2.0, -math.inf), (0.0, 1.0, -math.inf), ()),
    ((1.0, 2.0, 0.5), (0.0, 1.0, -math.inf), ("reverse_kl",)),
    ((1.0, 2.0, -11.0), (0.0, 1.0, -math.inf), ("reverse_kl",)),
    ((1.0, 2.0, -math.inf), (0.0, 1.0, 0.5), ("forward_kl",))])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_token_that_is_ruled_out_counts_as_0_log_0(student, teacher, infinite, temperature):
    """A logit of -inf, as a vocabulary is masked; -500 has a probability of 0 in float32 too, and a finite log."""
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


def test_the_clipped_surrogate_is_ppos_eq_7_and_stops_where_the_ratio_went_too_far():
    logq = torch.log(torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9])).requires_grad_()
    old, advantage = torch.log(torch.tensor([0.5, 0.3, 0.3, 0.9, 0.5])), torch.tensor([1.5, 2.0, -2.0, -1.0, -1.0])
    ours = clipped_surrogate(logq, old, advantage, 0.2)
    assert ours.tolist() == pytest.approx(slow_surrogate(logq, old, advantage, 0.2), rel=1e-6)
    grad = torch.autograd.grad(ours.sum(), logq)[0]
    assert grad[0] == pytest.approx(-1.5)                                       # -A where q is still q_old
    assert grad[1] == 0 and grad[3] == 0                                        # far enough, the way that A wants
    assert grad[2] == pytest.approx(2 * 5 / 3) and grad[4] == pytest.approx(1.8)    # too far the other way: pulled back


@pytest.mark.parametrize("tokens", [3, 17, 1000])
@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
def test_a_policy_takes_cross_entropys_place_chunk_by_chunk(tokens, kd_ratio):
    inputs, generator = head_inputs(V, V - 3), torch.Generator().manual_seed(5)
    old, advantage, weight = (torch.randn(N, generator=generator) for _ in range(3))
    student = inputs["hidden"] @ inputs["head"][:V - 3].T
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head"].T
    logq = student.log_softmax(-1).gather(1, inputs["targets"][:, None])[:, 0]
    old = (logq + 0.3 * old).detach()
    surrogate = clipped_surrogate(logq, old, advantage)
    expected = (weight * (surrogate + kd_ratio * reverse_kl(student, teacher))).sum()
    loss, ce, _ = head_loss(**inputs, divergence=reverse_kl, kd_ratio=kd_ratio, weight=weight, chunk_bytes=tokens * V * 4,
                            policy=lambda now, at: clipped_surrogate(now, old[at], advantage[at]))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ce, -logq.detach(), rtol=1e-5, atol=1e-5)        # still what is logged
    of = inputs["hidden"], inputs["head"]
    for ours, theirs in zip(gradients(loss, *of), gradients(expected, *of)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_metrics_are_those_of_full_logits():
    inputs = head_inputs(V, V - 3)
    inputs["hidden"] = inputs["hidden"].detach().index_fill(0, torch.tensor([4, 9]), 0.0)   # there both are uniform
    inputs["teacher_hidden"][4:10] = 0.0
    student = (inputs["hidden"] @ inputs["head"][:V - 3].T).detach()
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head"].T
    ours = compare_heads(**inputs, divergence=jensen_shannon)
    torch.testing.assert_close(ours["ce"], F.cross_entropy(student, inputs["targets"], reduction="none"))
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head"].T
    for name, expected in dict(kd=jensen_shannon(student, teacher), forward_kl=forward_kl(student, teacher),
                               reverse_kl=reverse_kl(student, teacher)).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)
    assert ours["agreement"].tolist() == (student.argmax(-1) == teacher.argmax(-1)).float().tolist()
    assert 0 < ours["agreement"].sum() < N
    none = compare_heads(divergence=jensen_shannon, **{name: value if "head" in name else value[:0] for name, value in inputs.items()})
    assert none.keys() == ours.keys() and all(value.shape == (0,) for value in none.values())


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, math.nan])
def test_a_mixture_of_one_model_alone_is_refused(alpha):
    for divergence in skew_forward_kl, skew_reverse_kl:
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            divergence(torch.zeros(3), torch.zeros(3), alpha=alpha)
