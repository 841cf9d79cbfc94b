"""The head applied chunk by chunk, against the loss of full logits, its gradients and its memory; the shift by one."""
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import random_ids, random_logits, small
from minikd import products
from minikd.data import Encoded, collate
from minikd.head import PIECE_BYTES, _backward_head, compare_heads, head_loss, scored_positions
from minikd.losses import DIVERGENCES, clipped_surrogate, forward_kl, jensen_shannon, reverse_kl

NAMES = sorted(DIVERGENCES)


# ---- the shift by one

def test_the_state_before_a_token_scores_it_so_the_last_of_the_prompt_scores_the_first_of_the_reply():
    ids = torch.tensor([[11, 12, 13, 21, 22, 0, 0], [11, 31, 32, 33, 34, 35, 36], [41, 42, 0, 43, 44, 45, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 0]]).bool()
    hidden = torch.randn(3, 7, 5)
    states, targets = scored_positions(hidden, ids, mask)
    expected = [(hidden[b, t - 1], ids[b, t]) for b in range(3) for t in range(1, 7) if mask[b, t]]
    for state, target, (slow_state, slow_target) in zip(states, targets, expected, strict=True):
        assert torch.equal(state, slow_state) and target == slow_target
    assert targets.tolist() == [21, 22, 31, 32, 33, 34, 35, 36, 42, 43, 45]     # nothing is before 41


# ---- the head, chunk by chunk

N, V, D, DT = 53, 41, 6, 10                         # scored tokens, vocabulary, student's and teacher's hidden size


@pytest.fixture(autouse=True)
def few_tokens_in_a_softmax(monkeypatch):
    """A softmax takes three tokens, so that a chunk has several softmaxes, as with a real vocabulary."""
    monkeypatch.setitem(PIECE_BYTES, "cpu", 3 * V * 4)


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
    return (weight * ((1 - kd_ratio) * ce + kd_ratio * kd)).sum(), ce, kd       # paper eq. (3)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def assert_same_with_gradients(loss, expected, inputs, rtol=1e-5, atol=1e-5):
    """In value, and in the gradients with respect to the student's states and head."""
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*(gradients(value, inputs["hidden"], inputs["head"]) for value in (loss, expected))):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("tokens", [1, 7, 52, 1000])                            # that a chunk has room for
@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_head_loss_is_the_loss_of_full_logits(name, kd_ratio, tokens):
    inputs = head_inputs()
    options = dict(divergence=DIVERGENCES[name], kd_ratio=kd_ratio)
    expected, ce, kd = naive(**inputs, **options)
    loss, our_ce, our_kd = head_loss(**inputs, **options, chunk_bytes=tokens * V * 4)
    torch.testing.assert_close(our_kd, kd.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_ce, ce.detach(), rtol=1e-5, atol=1e-6)
    assert not our_ce.requires_grad and not our_kd.requires_grad                # they are for logs
    assert_same_with_gradients(2.5 * loss, 2.5 * expected, inputs)              # the chain rule goes on


@pytest.mark.parametrize("tokens", [1, 9, 1000])
def test_without_a_teacher_head_loss_is_cross_entropy(tokens):
    inputs = head_inputs()
    of = inputs["hidden"], inputs["head"]
    expected = F.cross_entropy(of[0] @ of[1].T, inputs["targets"], reduction="none")
    loss, ce, kd = head_loss(*of, inputs["targets"], weight=1 / N, chunk_bytes=tokens * V * 4)
    torch.testing.assert_close(ce, expected.detach())
    assert kd.eq(0).all()
    assert_same_with_gradients(loss, expected.mean(), inputs, atol=1e-6)


@pytest.mark.parametrize("rows,teacher_rows", [(V, V - 4), (V - 4, V)])
def test_head_loss_cuts_heads_to_the_shared_vocabulary(rows, teacher_rows):
    inputs = head_inputs(rows, teacher_rows)
    expected, ce, _ = naive(**inputs, divergence=reverse_kl, kd_ratio=0.5)
    loss, our_ce, _ = head_loss(**inputs, divergence=reverse_kl, kd_ratio=0.5, chunk_bytes=5 * V * 4)
    torch.testing.assert_close(our_ce, ce.detach())                             # cross-entropy sees the shared rows too
    assert_same_with_gradients(loss, expected, inputs)                          # they are 0 in the rows that were cut


def test_a_vocab_does_not_reach_past_the_teachers_rows():
    options = dict(divergence=forward_kl, kd_ratio=0.5) | head_inputs(V, V - 4)
    for ours, right in zip(head_loss(**options, vocab=V - 2), head_loss(**options), strict=True):
        assert torch.equal(ours, right)


def test_a_tall_head_is_multiplied_block_by_block_and_the_blocks_are_summed_in_float32(monkeypatch):
    inputs, options = head_inputs(), dict(divergence=forward_kl, kd_ratio=0.5)
    monkeypatch.setattr("minikd.products.BLOCK", 16)                            # two blocks and a part
    loss, *_ = head_loss(**inputs, **options, chunk_bytes=5 * V * 4)
    assert_same_with_gradients(loss, naive(**inputs, **options)[0], inputs)
    monkeypatch.setattr("minikd.products.BLOCK", 1)
    ones, grad = torch.ones(300, 1).bfloat16(), torch.empty(1, 1).bfloat16()
    _backward_head(ones.T, ones[:1], ones, grad, None)
    assert grad.item() == 300                                                   # bfloat16 itself counts to 256


@pytest.mark.parametrize("dtype, chunks", [(torch.float32, [48, 48, 34]), (torch.bfloat16, [44, 44, 42])])
def test_float32_chunks_are_whole_tiles(monkeypatch, dtype, chunks):
    hidden, head = random_logits(130, 8).to(dtype).requires_grad_(), random_logits(40, 8, seed=1).to(dtype)
    targets = torch.arange(130) % 40
    seen, multiply = [], products.multiply

    def counted(states, *rest, **out):
        seen.append(len(states))
        return multiply(states, *rest, **out)

    monkeypatch.setattr("minikd.products.multiply", counted)
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
    options = dict(divergence=forward_kl, kd_ratio=0.5, weight=weight)
    assert_same_with_gradients(head_loss(**inputs, **options, chunk_bytes=5 * V * 4)[0], naive(**inputs, **options)[0], inputs)


def test_a_weight_is_not_rounded_to_the_dtype_of_the_states():
    inputs = {name: x.detach().bfloat16() if x.is_floating_point() else x for name, x in head_inputs().items()}
    loss, ce, _ = head_loss(**inputs, weight=1 / 3)
    assert float(loss) == pytest.approx(float(ce.sum()) / 3, rel=1e-6)


def test_head_loss_is_the_same_without_gradients_and_with_one_side_frozen():
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


@pytest.mark.parametrize("longer", ["targets", "teacher_hidden"])
def test_other_numbers_of_tokens_are_refused(longer):
    inputs = head_inputs() | {"divergence": forward_kl}
    with pytest.raises(ValueError, match=f"{len(inputs['hidden'])} states for "):
        head_loss(**inputs | {longer: inputs[longer].repeat_interleave(2, 0)}, kd_ratio=0.5)


def test_gradients_in_float16_are_refused_as_they_would_underflow():
    inputs = {key: value.detach().half() if value.is_floating_point() else value for key, value in head_inputs().items()}
    assert head_loss(**inputs)[0].isfinite()
    with pytest.raises(ValueError, match="underflow in float16"):
        head_loss(**inputs | {"hidden": inputs["hidden"].requires_grad_()})
    with pytest.raises(ValueError, match="underflow in float16"):
        head_loss(**inputs | {"hidden": inputs["hidden"].detach().float(), "head": inputs["head"].requires_grad_()})
    with pytest.raises(ValueError, match="underflow in float16"), torch.autocast("cpu", torch.bfloat16):
        head_loss(**inputs | {"hidden": inputs["hidden"].detach().requires_grad_(), "head": inputs["head"].detach().float()})


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


def test_under_autocast_the_teacher_s_logits_are_in_its_own_dtype():
    inputs, seen = head_inputs(), []
    with torch.autocast("cpu", torch.bfloat16):
        head_loss(**inputs, divergence=lambda s, t: (seen.append(t.clone()), t[:, 0])[1])
    torch.testing.assert_close(torch.cat(seen), inputs["teacher_hidden"] @ inputs["teacher_head"].T, rtol=1e-5, atol=1e-5)


def test_states_that_were_kept_in_bfloat16_meet_the_teachers_head_in_its_own_dtype():
    inputs = head_inputs() | dict(divergence=forward_kl, kd_ratio=0.5)
    kept = inputs["teacher_hidden"].bfloat16()
    *_, kd = head_loss(**inputs | dict(teacher_hidden=kept))
    torch.testing.assert_close(kd, naive(**inputs | dict(teacher_hidden=kept.float()))[2], rtol=1e-5, atol=1e-6)


def test_one_batch_of_eight_equals_eight_of_one_accumulated():
    student = small(1, vocab_size=60, num_attention_heads=4, num_key_value_heads=2)
    teacher = small(2, vocab_size=60, hidden_size=24)
    lengths = [(2, 3), (1, 11), (6, 1), (1, 2), (5, 4), (3, 9), (2, 2), (4, 6)]             # of prompts, and of replies
    rows = [Encoded(ids[:p], ids[p:p + r], False, 0) for ids, (p, r) in zip(random_ids(8, 12, V=60).tolist(), lengths)]

    def accumulate(rows_at_once, per_micro_batch=False):
        student.zero_grad()
        total = 0.0
        for i in range(0, 8, rows_at_once):
            ids, mask = collate(rows[i:i + rows_at_once], pad_id=0)
            states, targets = scored_positions(student.hidden(ids), ids, mask)
            with torch.no_grad():
                soft, _ = scored_positions(teacher.hidden(ids), ids, mask)
            weight = rows_at_once / 8 / len(targets) if per_micro_batch else 1 / sum(r for _, r in lengths)
            loss, *_ = head_loss(states, student.head, targets, soft, teacher.head.detach(), forward_kl, 0.5, weight)
            loss.backward()
            total += loss.item()
        return total, torch.cat([p.grad.flatten() for p in student.parameters()])

    whole, expected = accumulate(8)
    for rows_at_once in 1, 3:
        loss, grads = accumulate(rows_at_once)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_values_and_gradients_are_those_of_trl_which_works_in_tiles(beta):
    tiles = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    if len(inspect.signature(tiles.forward).parameters) != 13:
        pytest.skip("another version of trl; this is of 1.16")
    inputs, plain = head_inputs(), (1.0, None)                                  # no scale, no soft cap of the logits
    divergence = {0.0: forward_kl, 1.0: reverse_kl}.get(beta, functools.partial(jensen_shannon, beta=beta))
    loss, _, kd = head_loss(**inputs, divergence=divergence, kd_ratio=1.0, chunk_bytes=7 * V * 4)
    theirs, _ = tiles.apply(inputs["hidden"], inputs["head"], None, inputs["teacher_hidden"], inputs["teacher_head"], None, beta,
                            1.0, *plain, *plain)
    torch.testing.assert_close(kd, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert_same_with_gradients(loss, theirs.sum(), inputs, rtol=1e-4)


# ---- a policy gradient through the same head, and the metrics

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
                            policy_loss=lambda now, at: clipped_surrogate(now, old[at], advantage[at]))
    torch.testing.assert_close(ce, -logq.detach(), rtol=1e-5, atol=1e-5)        # still what is logged
    assert_same_with_gradients(loss, expected, inputs)


def test_the_metrics_are_those_of_full_logits():
    inputs = head_inputs(V, V - 3)
    inputs["hidden"] = inputs["hidden"].detach().index_fill(0, torch.tensor([4, 9]), 0.0)   # there both are uniform
    inputs["teacher_hidden"][4:10] = 0.0
    student = (inputs["hidden"] @ inputs["head"][:V - 3].T).detach()
    teacher = inputs["teacher_hidden"] @ inputs["teacher_head"].T
    ours = compare_heads(**inputs, divergence=jensen_shannon)
    for name, expected in dict(ce=F.cross_entropy(student, inputs["targets"], reduction="none"),
                               kd=jensen_shannon(student, teacher), forward_kl=forward_kl(student, teacher),
                               reverse_kl=reverse_kl(student, teacher)).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-6)
    assert ours["agreement"].tolist() == (student.argmax(-1) == teacher.argmax(-1)).float().tolist()
    assert 0 < ours["agreement"].sum() < N
    empty = {name: value if "head" in name else value[:0] for name, value in inputs.items()}
    none = compare_heads(**empty, divergence=jensen_shannon)
    assert none.keys() == ours.keys() and all(value.shape == (0,) for value in none.values())


@pytest.mark.parametrize("wrong", [-100, -1, 8])
def test_a_target_that_is_no_id_is_refused(wrong):
    """Cross-entropy would leave out a -100, which marks other tokens elsewhere, and still count it in the weight."""
    hidden, head = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(ValueError, match=f"ids from 0 to 7, these are from {min(wrong, 1)} to {max(wrong, 2)}; give only"):
        head_loss(hidden, head, torch.tensor([1, wrong, 2]), vocab=8)
    assert head_loss(hidden[:0], head, torch.tensor([], dtype=torch.int64))[0] == 0
