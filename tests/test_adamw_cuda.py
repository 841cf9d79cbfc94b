"""adamw.cu, run on a CPU by ptx.py, against Algorithm 2 in slow Python loops and against torch's own AdamW."""
import copy
import math

import pytest
import torch

from minikd import adamw_cuda
from minikd.adamw_cuda import AdamW, can_run
from minikd.cuda import launch
from ptx import places


@pytest.fixture
def on_cpu(gpu, monkeypatch):
    """Makes clip_and_step launch on the CPU, where the kernels may touch the table's tensors and no others."""
    def launched(name, device, grid, threads, table, chunks, values, *numbers):
        held = [(int(address), int(row[5]) * size) for row in table
                for address, size in zip(row[:5], (4, 4, 4, 2 if row[6] & 1 else 4, 2)) if address]
        gpu.readable = places(table, chunks) + (held if name == "adamw_norm" else places(values))
        gpu.writable = places(values) if name == "adamw_norm" else held
        launch(name, device, grid, threads, table, chunks, values, *numbers)

    monkeypatch.setattr(adamw_cuda, "launch", launched)
    monkeypatch.setattr(adamw_cuda, "can_run", lambda *_: True)
    return gpu


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow(weight, gradients, lr, decay, beta1, beta2, eps, max_norm):
    """Algorithm 2, each gradient clipped by its own norm: lists of numbers, one weight."""
    weight, first, second = list(weight), [0.0] * len(weight), [0.0] * len(weight)
    for t, gradient in enumerate(gradients, start=1):
        norm = math.sqrt(sum(g * g for g in gradient))
        for i, g in enumerate(gradient):
            g *= min(1.0, max_norm / (norm + 1e-6))
            first[i] = beta1 * first[i] + (1 - beta1) * g
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            step = (first[i] / (1 - beta1 ** t)) / (math.sqrt(second[i] / (1 - beta2 ** t)) + eps)
            weight[i] = weight[i] - lr * decay * weight[i] - lr * step
    return weight


def test_three_steps_of_the_algorithm(on_cpu):
    weight = torch.nn.Parameter(normal(3, 4))
    begun, gradients = weight.tolist(), [normal(3, 4, seed=seed) * scale for seed, scale in ((1, 5.0), (2, 0.01), (3, 1e-9))]
    optimizer = AdamW([weight], lr=0.1, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3)
    for gradient in gradients:
        norm = optimizer.clip_and_step(2.0, {weight: gradient})
        assert float(norm) == pytest.approx(math.sqrt(sum(g * g for g in gradient.flatten().tolist())), rel=1e-6)
    right = slow(sum(begun, []), [g.flatten().tolist() for g in gradients], 0.1, 0.3, 0.8, 0.9, 1e-4, 2.0)
    assert weight.flatten().tolist() == pytest.approx(right, rel=1e-5, abs=1e-7)


def test_weights_moments_and_copies_are_those_of_torchs_adamw(on_cpu):
    # In two chunks with a rest; in fewer values than a warp reads; a bias. The first and the last have copies.
    shapes = [(4100, 4), (4, 1), (64,)]
    weights = [torch.nn.Parameter(normal(*shape, seed=9)) for shape in shapes]
    exact = [torch.nn.Parameter(weight.detach().double()) for weight in weights]
    copies = {weight: weight.detach().bfloat16() for weight in (weights[0], weights[2])}
    groups = lambda held: [{"params": held[:2], "weight_decay": 0.1}, {"params": held[2:], "weight_decay": 0.0}]
    ours, theirs = AdamW(groups(weights), lr=0.5), torch.optim.AdamW(groups(exact), lr=0.5)
    for turn in range(3):
        gradients = {weight: normal(*weight.shape, seed=turn) * 3 for weight in weights}
        gradients[weights[0]] = gradients[weights[0]].bfloat16()
        weights[1].grad = gradients.pop(weights[1])                             # one of them as autograd leaves it
        for weight, right in zip(weights, exact):
            right.grad = gradients.get(weight, weight.grad).double()
        for group in ours.param_groups + theirs.param_groups:
            group["lr"] = 0.5 / (turn + 1)
        if turn == 1:                                                           # as layout.join moves them
            weights[0].data = weights[0].data.clone()
        if turn == 2:                                                           # as after a run that is continued
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        norm = ours.clip_and_step(7.0, gradients, copies)
        assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(exact, 7.0)), rel=1e-6)
        theirs.step()
        for weight, right in zip(weights, exact):
            for mine, its in ((weight.detach(), right.detach()), *((ours.state[weight][name], theirs.state[right][name])
                                                                   for name in ("exp_avg", "exp_avg_sq", "step"))):
                assert torch.allclose(mine.double(), its.double(), rtol=1e-5, atol=1e-6)
            assert weight not in copies or torch.equal(copies[weight], weight.detach().bfloat16())
    assert on_cpu.launched == ["adamw_norm", "adamw_step"] * 3


def test_weights_that_took_different_numbers_of_steps_are_left_to_torch(on_cpu):
    weights = [torch.nn.Parameter(normal(4, 4)) for _ in range(2)]
    optimizer = AdamW(weights)
    weights[0].grad = normal(4, 4)
    optimizer.step()
    weights[1].grad, begun = normal(4, 4), weights[0].clone()
    assert optimizer.clip_and_step(1.0) is None and torch.equal(weights[0], begun)


def test_the_table_is_sent_when_something_moves(on_cpu, monkeypatch):
    sent, weight, gradient = [], torch.nn.Parameter(normal(4, 4)), normal(4, 4)
    monkeypatch.setattr(adamw_cuda, "send", lambda x, device: (sent.append(x.dtype), x)[1])
    optimizer = AdamW([weight])
    for held in gradient, gradient, gradient.clone():
        optimizer.clip_and_step(1.0, {weight: held})
    assert sent == [torch.int32, torch.int64, torch.int64]                      # the chunks once, the table twice


def test_the_table_follows_copies_and_decay(on_cpu):
    weights = [torch.nn.Parameter(normal(4, 4)) for _ in range(2)]
    optimizers, gradient = [AdamW([weight], weight_decay=0.0) for weight in weights], normal(4, 4, seed=1)
    for turn in range(3):
        copies = {weight: torch.zeros(4, 4).bfloat16() for weight in weights} if turn else {}
        for weight, optimizer in zip(weights, optimizers):
            optimizer.param_groups[0]["weight_decay"] = 0.5 * (turn == 2 and weight is weights[1])
            optimizer.clip_and_step(1.0, {weight: gradient}, copies)
            assert not turn or torch.equal(copies[weight], weight.detach().bfloat16())
        assert torch.equal(*weights) == (turn < 2)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_returned(on_cpu, bad):
    weight, gradient = torch.nn.Parameter(normal(4, 4)), normal(4, 4)
    gradient[2, 1] = bad
    assert not math.isfinite(AdamW([weight]).clip_and_step(1.0, {weight: gradient}))


def test_when_torchs_step_is_taken_instead(monkeypatch):
    weights = [torch.nn.Parameter(normal(4, 4)) for _ in range(2)]
    for weight in weights:
        weight.grad = normal(4, 4)
    assert AdamW(weights).clip_and_step(1.0) is None                            # on a CPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(adamw_cuda, "available", lambda index: True)
    groups = lambda **other: AdamW([{"params": weights[:1]}, {"params": weights[1:], **other}]).param_groups
    gradients = [weight.grad for weight in weights]
    assert can_run(groups(weight_decay=0.5), weights, gradients)
    for other in dict(lr=0.5), dict(betas=(0.5, 0.5)), dict(eps=0.1), dict(amsgrad=True), dict(maximize=True):
        assert not can_run(groups(**other), weights, gradients)
    low = normal(20).bfloat16()[4:]                                             # 8 bytes suffice for 4 values
    assert low.data_ptr() % 16 == 8 and can_run(groups(), [normal(16)], [low])
    odd = torch.nn.Parameter(normal(3, 3))
    for held, found in ((weights, [None, gradients[1]]), ([odd], [normal(3, 3)]), (weights, [g.half() for g in gradients]),
                        ([w.double() for w in weights], gradients), (weights, [g.T for g in gradients]),
                        ([w.detach().T for w in weights], gradients),
                        ([weights[0], torch.empty(4, 4, device="meta")], gradients), ([normal(17)[1:]], [normal(16)]),
                        ([normal(16)], [normal(17)[1:]]), ([normal(16)], [normal(18)[2:]])):
        assert not can_run(groups(), held, found)
    monkeypatch.setattr(adamw_cuda, "available", lambda index: False)
    assert not can_run(groups(), weights, gradients)
