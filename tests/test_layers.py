"""A tied table's lookup and joined products against plain autograd."""
import pytest
import torch
import torch.nn.functional as F

from conftest import random_ids, random_model
from minikd.config import Qwen2Config
from minikd.model import Qwen2, run_blocks


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_train_mode_gives_a_tied_table_the_same_gradient_in_place(micro_batches):
    grads = []
    for train in (False, True):
        config = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
        model = Qwen2(config).init_weights(3).train(train)
        for i in range(micro_batches):                          # from the second on, .grad is there before the head's
            ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(i))
            torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append(model.head.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-7)
    assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_only_a_tied_table_in_train_mode_is_looked_up_in_place(tied, train):
    """Elsewhere torch.autograd.grad must find the lookup's gradient."""
    model = random_model(tie_word_embeddings=tied).train(train)
    grad_fn = model.model.embed_tokens(random_ids(2, 5)).grad_fn
    assert ("TiedLookup" in type(grad_fn).__name__) == (tied and train)


def test_states_alone_give_a_tied_table_the_same_gradient_in_train_mode():
    grads = []
    for train in (False, True):                                 # there is no head's gradient to add to
        model = random_model(tie_word_embeddings=True).train(train)
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


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_products_joined_as_in_training_on_a_gpu_give_the_same_gradients(monkeypatch, compiled):
    products, linear = [], F.linear
    if not compiled:
        monkeypatch.setattr(F, "linear", lambda *given, **named: (products.append(1), linear(*given, **named))[1])

    def gradients(joined):
        monkeypatch.setattr("minikd.layers.trains_on_gpu", lambda x: joined)
        model = random_model(num_hidden_layers=3).train()
        if compiled:
            model.model.compiled = torch.compile(run_blocks, backend="eager", fullgraph=True)
        weight = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        (weight * model.hidden(torch.arange(18).view(2, 9))).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.model.parameters()])

    found, right = gradients(True), gradients(False)
    assert (found - right).norm() < 1e-5 * right.norm() and right.norm() > 1
    assert compiled or len(products) == 3 * 4 + 3 * 7
