"""CUDA graphs, most of them on a GPU that the CPU plays (fake_gpu.py)."""
import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

from conftest import small
from fake_gpu import Graph, Played, gpu
from minikd import graphs
from minikd.adamw_cuda import AdamW
from minikd.generate import generate
from minikd.model import mixed_precision
from minikd.training import apply_gradient, make_optimizer, use_graphs


@pytest.fixture
def played():
    with gpu():
        yield


def test_a_graph_is_recorded_at_the_second_step_and_then_replayed(monkeypatch):
    log, gpus = [], [0, 1, 0]

    class Graph:
        def replay(self):
            log.append("replay")

    @contextmanager
    def recording(graph, stream):
        log.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(graphs, "recording_stream", graphs.recording_stream.__wrapped__)            # not remembered
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of GPU {device}")
    for number in gpus:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: number)
        replay = graphs.Replay(lambda: log.append("step"), on=True)
        for _ in range(4):
            replay()
    assert log == [entry for number in gpus for entry in (
        "step", f"a stream of GPU {number}", "step", "replay", "replay", "replay")]


# ---- a training step's passes

def student(graphed=True, **changes):
    model = small(3, **changes).to("cuda").train()
    if graphed:
        use_graphs(model, torch.bfloat16)
    return model


def ids(*shape):
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(sum(shape))).to("cuda")


def learn(model, batch, dtype=torch.bfloat16, **options):
    """A backward pass for a batch of ids."""
    with mixed_precision(model.head.device, dtype):
        states = model.hidden(batch, **options)
        (states * torch.linspace(-1, 1, states.numel(), device="cuda").view_as(states)).sum().backward()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def gradients(model, batches):
    """Of all weights, added up over the batches."""
    for batch in batches:
        learn(model, batch)
    if model.model.graphs:
        model.model.graphs.settle()
    found = torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()
    model.zero_grad()
    return found


def off(ours, right) -> float:
    return float((ours - right).norm() / right.norm())


@pytest.mark.parametrize("tied", [True, False])
def test_replayed_passes_give_the_plain_paths_gradients(played, tied):
    plain, model = (student(graphed, tie_word_embeddings=tied) for graphed in (False, True))
    for batches in ([ids(2, 5)], [ids(2, 70)], [ids(2, 5), ids(2, 70), ids(2, 9)], [ids(2, 64)]):
        if not tied:
            for each in plain, model:
                each.lm_head.weight.grad = torch.zeros_like(each.head)
        assert off(gradients(model, batches), gradients(plain, batches)) < 1e-2
    assert len(model.model.graphs.pairs) == 2                                   # 64 tokens and 128


def test_all_graphs_share_a_pool_that_begins_anew_for_a_larger_shape(played):
    model, pools = student(), []
    for batch, count in (ids(2, 70), 1), (ids(2, 5), 2), (ids(1, 100), 3), (ids(3, 128), 1), (ids(2, 70), 2):
        learn(model, batch)
        pairs = model.model.graphs.pairs.values()
        pools.append({graph.pool() for pair in pairs for graph in (pair.forward, pair.backward)})
        assert len(pairs) == count and pools[-1] == {model.model.graphs.pool}
    assert pools[0] == pools[1] == pools[2] != pools[3] == pools[4]


def test_shapes_beyond_the_most_pairs_run_without_graphs(played, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    model, plain = student(), student(False)
    for batches in [ids(3, 70)], [ids(2, 5)], [ids(1, 5)], [ids(3, 70), ids(1, 5)], [ids(1, 5), ids(2, 5)]:
        assert off(gradients(model, batches), gradients(plain, batches)) < 1e-2
    assert [tuple(shape[:2]) for shape in model.model.graphs.pairs] == [(3, 128), (2, 64)]


def test_no_graph_is_dropped_while_others_of_its_stream_are_in_use(played):
    """generate's own, between two steps, and those of the pool before, whose states are still held: fake_gpu's Graph.__del__."""
    model, sampler = student(), small(4).to("cuda").bfloat16()
    learn(model, ids(2, 5))
    generate(sampler, [[5, 6, 7], [8]], 20)
    with mixed_precision(model.head.device, torch.bfloat16):
        held = model.hidden(ids(2, 5))
        held.sum().backward()
        held = model.hidden(ids(2, 130))
    held.sum().backward()
    learn(model, ids(2, 130))


def test_gradients_beside_the_replayed_ones_count(played):
    """A micro-batch that is not replayed, after one that is."""
    found = []
    for model in student(False), student():
        learn(model, ids(2, 5)), learn(model, ids(2, 9), checkpointing=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        begun = weights(model)
        norm = apply_gradient(model, optimizer, 1.0, 1e9)
        found.append(weights(model) - begun)
        assert float(norm) == pytest.approx(float(found[-1].norm()), rel=1e-3)
    assert off(*found) < 1e-2


def test_both_passes_are_recorded_once_for_a_shape_and_then_replayed(played, monkeypatch):
    replayed, replay = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: (replayed.append(graph), replay(graph)))
    model = student()
    for batch in ids(2, 5), ids(2, 7), ids(1, 7), ids(2, 5):
        learn(model, batch)
    first, _, second = replayed[:2], replayed[2:4], replayed[4:6]
    assert replayed == first + first + second + first and len({*first, *second}) == 4


@pytest.mark.parametrize("own", [True, False])
def test_steps_after_replayed_passes_are_the_plain_paths(played, monkeypatch, own):
    """own: as by adamw.cu, which here torch's steps play: the gradients it is given, and the copies that it writes."""
    def clip_and_step(self, most, lent={}, copies={}):
        if not (lent or copies) or not own:
            return None
        assert all((g.dtype == torch.bfloat16) == (weight in copies) for weight, g in lent.items())
        for weight, gradient in lent.items():
            assert weight.grad is None
            weight.grad = gradient.float()
        norm = torch.nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], most)
        with torch.no_grad():
            self.step()
            for weight, held in copies.items():
                held.copy_(weight)
        return norm

    monkeypatch.setattr(AdamW, "clip_and_step", clip_and_step)
    copied, copy_ = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *given: (copied.append(given), copy_(*given)))
    plain, model, norms = student(False), student(), []
    begun = weights(plain)
    for each in plain, model:
        optimizer = make_optimizer(each, 1e-2, in_place=True)
        for batches in ([ids(2, 5)], [ids(2, 5), ids(2, 70)], [ids(2, 70)]):
            for batch in batches:
                learn(each, batch)
            norms.append(float(apply_gradient(each, optimizer, 1e-2, 1.0)))
            assert all(p.grad is None for p in each.parameters()) and not (each.model.graphs and each.model.graphs.lent)
    assert norms[3:] == pytest.approx(norms[:3], rel=1e-2)
    assert len(copied) == (1 if own else 3)                                     # by the first pass alone, or after each step
    assert off(weights(model) - begun, weights(plain) - begun) < 0.1            # Adam's first steps depend on signs alone
    learn(model, ids(2, 5))                                                     # a pass begins by copying what changed
    assert all(torch.equal(held, weight.detach().bfloat16()) for weight, held in model.model.graphs.copies.of.items())


def test_copies_follow_weights_that_changed_or_that_generate_has_moved(played):
    """layout.join makes them views of other memory."""
    found = []
    for model in student(False), student():
        for _ in range(3):
            found.append(gradients(model, [ids(2, 5)]))
            with torch.no_grad():
                for p in model.parameters():
                    p *= 0.9
            generate(model, [[5, 6, 7]], 20)
    assert all(off(ours, right) < 0.05 for right, ours in zip(found[:3], found[3:]))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_after_a_recording_that_failed_training_goes_on(played, monkeypatch, error):
    """The graph of its forward pass is dropped, and on later versions of torch takes the workspace of those before it along."""
    model, plain, grad, streams = student(), student(False), torch.autograd.grad, []

    def failing(*given, **options):
        if Played.recording is not None:
            raise error
        return grad(*given, **options)

    for batch, breaks in (ids(2, 70), False), (ids(2, 5), True), (ids(2, 70), False), (ids(2, 5), False):
        streams.append(model.model.graphs.stream)
        if breaks:
            with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
                patch.setattr(torch.autograd, "grad", failing)
                learn(model, batch)
            model.zero_grad()
            continue
        assert off(gradients(model, [batch]), gradients(plain, [batch])) < 1e-2
    del caught                                                                  # its frames hold the graph
    assert off(gradients(model, [ids(2, 70)]), gradients(plain, [ids(2, 70)])) < 1e-2
    assert streams[0] is streams[1] is not streams[2] is streams[3] and len(model.model.graphs.pairs) == 2


def test_a_backward_pass_needs_the_latest_forward_pass(played):
    model = student()
    with mixed_precision(model.head.device, torch.bfloat16):
        first, second = (model.hidden(ids(2, 5)).sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="another pass came between"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="another pass"):
        second.backward()


def test_what_is_not_replayed(played):
    model = student()
    with torch.no_grad():
        model.hidden(ids(2, 5))
    learn(model, ids(2, 5), checkpointing=True)
    learn(model, ids(2, 5), torch.float32)
    learn(model.eval(), ids(2, 5))
    assert not model.model.graphs.pairs
    learn(model.train(), ids(2, 5))
    assert model.model.graphs.pairs
    assert model.to("cpu").model.graphs is None                                 # its weights are elsewhere now
    model.requires_grad_()
    for dtype, device, frozen in (torch.bfloat16, "cpu", 0), (torch.float32, "cuda", 0), (torch.bfloat16, "cuda", 1):
        model.to(device).model.norm.requires_grad_(not frozen)
        use_graphs(model, dtype)
        assert model.model.graphs is None


def test_a_model_is_freed_with_its_graphs_and_copied_without(played):
    model = student()
    learn(model, ids(2, 5))
    other, held = copy.deepcopy(model), weakref.ref(model.model.norm.weight)
    assert other.model.graphs is None and model.model.graphs.pairs
    gc.disable()
    try:
        del model
        assert held() is None                           # no cycle, which would hold it until the next collection
    finally:
        gc.enable()


def test_the_layers_are_as_they_were_after_recording(played):
    model = student()
    own, copies = dict(model.named_parameters()), model.model.graphs.copies
    plain = lambda: (all(own[name] is weight for name, weight in model.named_parameters()) and len(own) == len(model.state_dict())
                     and all(branch.joined is None for block in model.model.layers for branch in (block.self_attn, block.mlp)))
    learn(model, ids(2, 5))
    assert plain()
    assert not {id(leaf) for leaf, _ in copies.leaves} & {id(weight) for weight in own.values()}
    with pytest.raises(KeyboardInterrupt), copies.installed():
        assert copies.branches[0][0].joined is not None and copies.singles[0][0].weight.dtype == torch.bfloat16
        raise KeyboardInterrupt
    assert plain()
