"""What users add to a model, its optimizer and its losses takes part, or is refused: it is not lost in silence."""
import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import train_kd
from conftest import random_ids, random_logits, random_model, refusal, small
from minikd import layers
from minikd.checkpoint import save_model
from minikd.generate import generate
from minikd.gptq import Hessian, quantize_model
from minikd.head import head_loss, scored_positions
from minikd.layers import Linear
from minikd.losses import DIVERGENCES, forward_kl
from minikd.model import Body, RMSNorm, cast_copy
from minikd.quant import to_words
from minikd.training import apply_gradient, make_optimizer, use_graphs
from minikd.w4 import W4Linear, to_w4

PROMPTS, STEPS = [[5, 9, 2, 7], [11, 3], [8, 8, 1]], 20


class LowRank(nn.Module):
    """A parametrisation, as of LoRA: the weight and a product of two thin matrices."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        generator = torch.Generator().manual_seed(len(weight))
        self.a, self.b = (nn.Parameter(0.3 * torch.randn(size, 2, generator=generator)) for size in weight.shape)

    def forward(self, weight):
        return weight + self.a @ self.b.T


class Adapted(Linear):
    """A layer made from Linear: its product, and that of LowRank."""

    def forward(self, x):
        return super().forward(x) + F.linear(x, self.low_rank(torch.zeros_like(self.weight)))


class Wrapper(nn.Module):
    """A layer in another module."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return 2 * self.layer(x)


def adapt(model, how: str):
    """Adds something to one layer of each kind."""
    block = model.model.layers[0]
    for branch, name in (block.self_attn, "v_proj"), (block.self_attn, "o_proj"), (block.mlp, "up_proj"), (block.mlp, "down_proj"):
        layer = getattr(branch, name)
        if how == "class":
            layer.__class__, layer.low_rank = Adapted, LowRank(layer.weight)
        elif how == "hook":
            layer.register_forward_hook(lambda layer, x, y: y + x[0].mean(-1, keepdim=True))
        elif how == "parametrisation":
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight), unsafe=True)
        elif how == "mask":
            prune.l1_unstructured(layer, "weight", 0.5)
        else:
            setattr(branch, name, Wrapper(layer))
    return model


def wide():
    """A model whose layers can be cut into groups of 32."""
    return random_model(hidden_size=64, intermediate_size=64, num_attention_heads=4)


def rounded(model, store=to_words, **options):
    """The 4-bit words of a copy of the model."""
    return quantize_model(copy.deepcopy(model), [], 0, method="rtn", group_size=32, store=store, **options)


def greedy(model, prompts):
    """generate, token by token, without a cache."""
    answers = [[] for _ in prompts]
    with torch.no_grad():
        for _ in range(STEPS):
            for prompt, answer in zip(prompts, answers):
                answer.append(int(model(torch.tensor([prompt + answer]))[0, -1].argmax()))
    return answers


@pytest.mark.parametrize("how", ["class", "hook", "parametrisation", "mask", "wrapper"])
@pytest.mark.parametrize("rows", [1, 3])
def test_answers_are_those_of_the_adapted_model(how, rows):
    """Of a model that is large enough to be laid out: packed for three rows, read by all threads for one."""
    model = random_model(vocab_size=9000, hidden_size=120)
    plain = generate(model, PROMPTS[:rows], STEPS)
    adapt(model, how)
    wanted = greedy(model, PROMPTS[:rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert generate(model, PROMPTS[:rows], STEPS) == wanted != plain
    finally:
        torch.set_num_threads(threads)
    assert greedy(model, PROMPTS[:rows]) == wanted              # and it is as before


@pytest.mark.parametrize("how", ["hook", "wrapper"])
def test_a_4_bit_model_keeps_what_is_added_to_it(how):
    model = wide()
    to_w4(model, rounded(model), 32, True)
    plain = greedy(model, PROMPTS)
    adapt(model, how)
    wanted = greedy(model, PROMPTS)
    assert generate(model, PROMPTS, STEPS) == wanted == greedy(model, PROMPTS) != plain


@pytest.mark.parametrize("how", ["class", "hook"])
def test_training_on_a_gpu_does_not_pass_it_by(how, monkeypatch):
    model, ids = random_model(), random_ids(2, 5)
    adapt(model, how)
    wanted = model(ids)
    monkeypatch.setattr(layers, "trains_on_gpu", lambda x: True)             # where plain layers are joined
    torch.testing.assert_close(model(ids), wanted)


def test_a_gpus_graphs_and_its_one_kernel_are_for_models_as_built(monkeypatch):
    """They read the weights, and would call no hook and no other class's forward."""
    monkeypatch.setattr("minikd.training.can_record", lambda device: True)
    monkeypatch.setattr("minikd.training.GraphedBlocks", lambda body: "graphs")
    changes = [lambda body: None, lambda body: body.layers[1].register_forward_hook(lambda *_: None),
               lambda body: body.norm.register_full_backward_hook(lambda *_: None),
               lambda body: body.norm.register_full_backward_pre_hook(lambda *_: None),
               lambda body: body.layers[0].mlp.register_forward_pre_hook(lambda *_: None),
               lambda body: setattr(body.norm, "forward", lambda x: x),
               lambda body: setattr(body.layers[0].mlp.up_proj, "__class__", Adapted),
               lambda body: setattr(body.layers[0].input_layernorm, "__class__", type("Other", (RMSNorm,), {}))]
    for i, change in enumerate(changes):
        model = random_model()
        change(model.model)
        use_graphs(model, torch.bfloat16)
        assert model.model.graphs == ("graphs" if i == 0 else None) and model.model.as_built() == (i == 0)
    for hook in "register_hook", "register_post_accumulate_grad_hook":          # of a weight: only graphs would pass it by
        model = random_model()
        getattr(model.model.layers[0].mlp.up_proj.weight, hook)(lambda *_: None)
        use_graphs(model, torch.bfloat16)
        assert model.model.graphs is None
    four = wide()
    to_w4(four, rounded(four), 32, True)
    assert four.model.as_built(W4Linear) and not four.model.as_built() and isinstance(four.model, Body)


def test_what_watches_a_tied_embedding_sees_its_whole_gradient():
    """The table's gradient is otherwise written into .grad by TiedLookup."""
    ids, mask = random_ids(2, 6), torch.ones(2, 6, dtype=torch.bool)
    model = random_model(tie_word_embeddings=True).train()

    def backward(model):
        model.model.embed_tokens.in_place = True                # as make_optimizer sets it
        states, targets = scored_positions(model.hidden(ids), ids, mask)
        model.zero_grad()
        F.cross_entropy(F.linear(states, model.head), targets).backward()
        return next(model.model.embed_tokens.parameters()).grad

    plain = backward(model)
    seen, noisy = [], copy.deepcopy(model)
    noisy.model.embed_tokens.register_forward_hook(lambda layer, x, y: seen.append(len(y)))
    torch.testing.assert_close(backward(noisy), plain)
    assert seen == [2]
    masked, after = copy.deepcopy(model), copy.deepcopy(model)
    masked.model.embed_tokens.weight.register_hook(lambda g: g * 0)
    assert backward(masked).eq(0).all()
    after.model.embed_tokens.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    backward(after)
    torch.testing.assert_close(seen[-1], plain)
    parametrize.register_parametrization(model.model.embed_tokens, "weight", LowRank(model.head), unsafe=True)
    trained = model.model.embed_tokens.parametrizations.weight[0]
    found = []
    for mode in True, False:
        backward(model.train(mode))
        found.append([part.grad.clone() for part in (trained.a, trained.b)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("how", ["class", "parametrisation", "mask"])
def test_a_layer_with_more_than_its_weight_is_not_quantised(how):
    model = wide()
    words = rounded(model)
    adapt(model, how)
    for said in refusal(quantize_model, model, [], 0, method="rtn", group_size=32), refusal(to_w4, model, words, 32, True):
        assert "layers.0.self_attn.v_proj: has an adapter" in said


def test_a_model_of_which_some_layers_are_quantised_is_not_made_a_4_bit_one():
    model = wide()
    words = rounded(model)
    del words["model.layers.1.mlp.up_proj"]
    plain = model(random_ids(1, 4))
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj is left out"):
        to_w4(model, words, 32, True)
    assert torch.equal(model(random_ids(1, 4)), plain) and model.quantization is None


def test_words_of_another_kind_are_not_taken_for_symmetric_ones():
    model = wide()
    for options, version in (dict(sym=True), 2), (dict(sym=False), 1), (dict(bits=3), 1):
        words = rounded(model, lambda codes, scales, zeros: to_words(codes, scales, zeros.clamp(min=1), version), **options)
        with pytest.raises(ValueError, match="zeros are 8"):
            to_w4(copy.deepcopy(model), words, 32, True)


def test_a_mask_of_ones_and_zeros_is_a_mask():
    x, mask = torch.randn(5, 7, 8), torch.randint(2, (5, 7))
    found, wanted = Hessian(8), Hessian(8)
    found.add(x, mask)
    wanted.add(x, mask.bool())
    assert torch.equal(found.finish(), wanted.finish()) and found.tokens == int(mask.sum())


@pytest.mark.parametrize("how", ["parametrisation", "mask", "wrapper", "taller"])
def test_a_folder_that_could_not_be_loaded_is_not_written(how, tmp_path):
    model = random_model()
    if how == "taller":
        model.model.embed_tokens.weight = nn.Parameter(torch.zeros(70, 24))
    else:
        adapt(model, how)
    with pytest.raises(ValueError, match="is not as model.config describes it"):
        save_model(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("how", ["parametrisation", "mask"])
def test_a_copy_in_another_dtype_is_refused_if_it_would_lack_something(how):
    with pytest.raises(RuntimeError, match="parametrizations|weight_mask"):
        cast_copy(adapt(random_model(), how), torch.bfloat16)


def test_a_projection_beside_the_student_is_clipped_and_its_gradient_freed():
    """As for a loss between hidden states: the optimizer holds it in a group of its own."""
    student, projection = small(1), nn.Linear(16, 3)
    optimizer = make_optimizer(student, 0.1)
    optimizer.add_param_group({"params": [*projection.parameters()]})
    for _ in range(2):
        projection(student.hidden(random_ids(2, 5))).square().sum().backward()
        squares = sum(float(p.grad.square().sum()) for module in (student, projection) for p in module.parameters()
                      if p.grad is not None)
        assert float(apply_gradient(student, optimizer, 0.1, 1e-3)) == pytest.approx(squares ** 0.5, rel=1e-5)
        assert all(p.grad is None for module in (student, projection) for p in module.parameters())


def loss_of(divergence=None, policy_loss=None, kd_ratio=1.0):
    student, teacher, head = random_logits(9, 4), random_logits(9, 4, seed=1), random_logits(12, 4, seed=2)
    leaf = student.requires_grad_()
    loss, *_ = head_loss(leaf, head, torch.arange(9), teacher, head, divergence, kd_ratio, policy_loss=policy_loss)
    return loss, leaf, teacher, head


@pytest.mark.parametrize("wrong", ["sum", "mean", "column"])
def test_a_loss_that_is_not_one_value_per_token_is_refused(wrong):
    reduce = {"sum": lambda x: x.sum(), "mean": lambda x: x.mean(), "column": lambda x: x[:, None]}[wrong]
    for options in (dict(divergence=lambda q, p: reduce(forward_kl(q, p))),
                    dict(policy_loss=lambda logq, at: reduce(logq), kd_ratio=0.0)):
        with pytest.raises(ValueError, match="give one value for each token"):
            loss_of(**options)


def test_a_gradient_that_is_not_stepped_is_not_clipped_by():
    model = small(1)
    optimizer = torch.optim.SGD(model.model.layers.parameters(), 0.1)
    model(random_ids(2, 5)).square().sum().backward()
    own = sum(float(p.grad.square().sum()) for p in model.model.layers.parameters())
    assert float(apply_gradient(model, optimizer, 0.1, 1.0)) == pytest.approx(own ** 0.5, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_a_share_above_1_has_the_gradient_of_its_formula():
    loss, leaf, teacher, head = loss_of(forward_kl, kd_ratio=1.2)
    loss.backward()
    x = leaf.detach().requires_grad_()
    ce = F.cross_entropy(x @ head.T, torch.arange(9), reduction="sum")
    plain = -0.2 * ce + 1.2 * forward_kl(x @ head.T, teacher @ head.T).sum()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(plain, x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", ["hidden", "mask", "ids"])
def test_a_shift_by_one_that_was_made_already_is_noticed(shifted):
    given = dict(hidden=torch.zeros(2, 5, 3), ids=random_ids(2, 5), mask=torch.ones(2, 5, dtype=torch.bool))
    given[shifted] = given[shifted][:, 1:]
    with pytest.raises(ValueError, match="the shift by one is made here"):
        scored_positions(**given)


def test_the_flags_of_a_new_divergence_are_those_that_it_takes(monkeypatch, capsys):
    def mine(student_logits, teacher_logits, alpha=0.5):
        return student_logits.sum(-1)

    monkeypatch.setitem(DIVERGENCES, "mine", mine)
    given = ["train_kd.py", "--loss", "mine", "--temperature", "2"]
    for flags, alpha in (["--alpha", "0.2"], 0.2), ([], 0.5):                   # its own default, not the skew divergences'
        monkeypatch.setattr("sys.argv", [*given, *flags])
        assert train_kd.parse_args().alpha == alpha
        assert capsys.readouterr().err == "note: ignored with --loss mine: --temperature\n"
    monkeypatch.setitem(DIVERGENCES, "mine", lambda student_logits, teacher_logits, alpha=2.0: student_logits.sum(-1))
    monkeypatch.setattr("sys.argv", given)
    assert train_kd.parse_args().alpha == 2                                     # outside of --alpha's range
    monkeypatch.setattr("sys.argv", ["train_kd.py", "--loss", "jsd"])
    assert (train_kd.parse_args().alpha, train_kd.parse_args().beta) == (0.1, 0.5)
