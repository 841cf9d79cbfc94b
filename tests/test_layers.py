"""A tied table's lookup and joined products against plain autograd."""
import copy

import pytest
import torch
import torch.nn.functional as F

from conftest import random_ids, random_model
from minikd.model import run_blocks
from minikd.training import make_optimizer


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_in_place_a_tied_table_gets_the_same_gradient(micro_batches):
    grads = []
    for in_place in (False, True):
        model = random_model(tie_word_embeddings=True).train()
        model.model.embed_tokens.in_place = in_place
        for seed in range(micro_batches):                       # from the second on, .grad is there before the head's
            ids = random_ids(2, 7, seed=seed)
            F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append(model.head.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("tied, train, asked, in_place", [
    (True, True, True, True), (False, True, True, False), (True, False, True, False), (True, True, False, False)])
def test_only_a_tied_table_in_train_mode_is_looked_up_in_place_and_only_if_the_optimizer_asks(tied, train, asked, in_place):
    """Elsewhere torch.autograd.grad must find the lookup's gradient."""
    model, ids = random_model(tie_word_embeddings=tied).train(train), random_ids(2, 5)
    make_optimizer(model, 1e-3, in_place=asked)
    assert ("TiedLookup" in type(model.model.embed_tokens(ids).grad_fn).__name__) == in_place
    loss = lambda: model(ids).square().sum()
    loss().backward()
    found = model.head.grad if in_place else torch.autograd.grad(loss(), model.head)[0]
    model = copy.deepcopy(model)                                # which no optimizer steps
    torch.testing.assert_close(found, torch.autograd.grad(loss(), model.head)[0], atol=1e-4, rtol=1e-5)


def test_in_place_states_alone_give_a_tied_table_the_same_gradient():
    grads = []
    for in_place in (False, True):                              # there is no head's gradient to add to
        model = random_model(tie_word_embeddings=True).train()
        model.model.embed_tokens.in_place = in_place
        model.hidden(random_ids(2, 5)).square().sum().backward()
        grads.append(model.head.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_embedding_gets_no_gradient(tied):
    model = random_model(tie_word_embeddings=tied).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model(random_ids(2, 5)).sum().backward()
    assert model.model.embed_tokens.weight.grad is None and model.model.norm.weight.grad is not None
    assert not model.requires_grad_(False)(random_ids(2, 5)).requires_grad


@pytest.mark.parametrize("torch_compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_products_joined_as_in_training_on_a_gpu_give_the_same_gradients(monkeypatch, torch_compile):
    products, linear = [], F.linear
    if not torch_compile:
        monkeypatch.setattr(F, "linear", lambda *given, **named: (products.append(1), linear(*given, **named))[1])

    def gradients(joined):
        monkeypatch.setattr("minikd.layers.trains_on_gpu", lambda x: joined)
        model = random_model(num_hidden_layers=3).train()
        if torch_compile:
            model.model.compiled = torch.compile(run_blocks, backend="eager", fullgraph=True)
        weight = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        (weight * model.hidden(torch.arange(18).view(2, 9))).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.model.parameters()])

    found, right = gradients(True), gradients(False)
    assert (found - right).norm() < 1e-5 * right.norm() and right.norm() > 1
    assert torch_compile or len(products) == 3 * 4 + 3 * 7
