"""GPTQ against the published algorithm in slow float64 loops, and a model against Hessians taken from scratch."""
import copy
import inspect
import math
import warnings
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_model, same, small
from minikd.checkpoint import save_model
from minikd.data import Encoded
from minikd.errors import InputError
from minikd.gptq import (Hessian, calibrate, full_precision, inverse_factor, output_errors, quantize_matrix, quantize_model)
from minikd.model import Qwen2
from minikd.quant import dequantize_groups, find_grid, round_to_nearest, to_words
from minikd.w4 import linear_layers, to_w4


def random_layer(O, I, seed, tokens=4096):
    """A weight [O, I], and the Hessian [I, I] of inputs that are correlated, as a language model's are."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(O, I, generator=generator)
    mix = torch.randn(I, I, generator=generator) * torch.logspace(0, -1.5, I)[:, None]      # few directions carry most
    x = torch.randn(tokens, I, generator=generator) @ mix
    return weight, x.T @ x * (2 / tokens)


def slow_gptq(weight, hessian, bits, group_size, sym, act_order, damp=0.01):
    """Algorithm 1 as it is printed, a column at a time, in float64: the inverse, its Cholesky factor, the update.

    -> codes [O, I], the dequantised weight [O, I]. Only the scale is rounded as it will be stored.
    """
    (O, I), top = weight.shape, 2**bits - 1
    size = I if group_size == -1 else group_size
    W, H = weight.double().clone(), hessian.double().clone()
    H += damp * H.diagonal().mean() * torch.eye(I, dtype=torch.double)
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(I)
    U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)

    def grid(columns):
        found = []
        for row in columns:
            low, high = min(0.0, float(row.min())), max(0.0, float(row.max()))
            if sym:
                high = max(high, -low)
                low = -high
            scale = float(torch.tensor((high - low) / top).half())
            found.append((scale, (top + 1) // 2 if sym else round(-low / scale)))
        return torch.tensor(found, dtype=torch.double).T                        # [2, O]

    grids = {g: grid(W[:, g * size:(g + 1) * size]) for g in range(I // size)} if act_order else {}
    codes, Q = torch.zeros(O, I, dtype=torch.double), torch.zeros(O, I, dtype=torch.double)
    for step, j in enumerate(order.tolist()):
        if j // size not in grids:
            grids[j // size] = grid(W[:, j:j + size])
        scale, zero = grids[j // size]
        codes[:, j] = ((W[:, j] / scale).round() + zero).clamp(0, top)
        Q[:, j] = scale * (codes[:, j] - zero)
        error = (W[:, j] - Q[:, j]) / U[step, step]                             # eq. (2), by the factor: error U_jk
        W[:, order[step:]] -= error[:, None] * U[step, step:]
    return codes, Q


def objective(weight, quantized, hessian):
    """tr((W - Q) H (W - Q)^T), eq. (1)."""
    D = weight.double() - quantized.double()
    return float(torch.einsum("oi,ij,oj->", D, hessian.double(), D))


@pytest.mark.parametrize("options", [
    dict(bits=4, group_size=-1, sym=False, act_order=False), dict(bits=4, group_size=32, sym=False, act_order=False),
    dict(bits=3, group_size=32, sym=True, act_order=True), dict(bits=4, group_size=-1, sym=False, act_order=True)])
def test_codes_are_those_of_the_published_algorithm_in_slow_loops(options):
    same = total = 0
    for seed, (O, I) in enumerate([(32, 64), (64, 192), (96, 256)]):
        weight, hessian = random_layer(O, I, seed)
        codes, slow = slow_gptq(weight, hessian, **options)
        ours = quantize_matrix(weight, hessian, damp=0.01, **options)
        groups = 1 if options["group_size"] == -1 else I // 32
        assert ours[0].dtype == torch.uint8 and ours[1].shape == ours[2].shape == (O, groups)
        right = objective(weight, slow, hessian)
        assert objective(weight, dequantize_groups(*ours), hessian) == pytest.approx(right, rel=1e-3)
        same, total = same + int((ours[0] == codes).sum()), total + codes.numel()
    assert same >= 0.999 * total


def test_the_output_error_is_at_most_half_of_roundings():
    for seed in range(2):
        weight, hessian = random_layer(128, 512, seed)
        found, rounded = (dequantize_groups(*quantized) for quantized in (quantize_matrix(weight, hessian),
                                                                      round_to_nearest(weight)))
        ours, rtn = output_errors(weight, [found, rounded], hessian)
        assert rtn > 4 * ours > 0                                               # squares: the error itself is halved


def test_an_output_error_is_that_share_of_the_outputs_over_several_blocks_too(monkeypatch):
    monkeypatch.setattr("minikd.gptq.PANEL", 24)
    weight, hessian = random_layer(6, 64, seed=1)
    others = [weight + scale * weight.flip(1) for scale in (0.1, 0.5)]
    for ours, Q in zip(output_errors(weight, others, hessian), others, strict=True):
        assert ours == pytest.approx(objective(weight, Q, hessian) / objective(weight, 0 * weight, hessian), rel=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [24, 96, -1])
def test_the_block_size_changes_nothing(group_size, act_order):
    """Also where blocks do not fit groups: 32 and 24, or 128 and 96. A stale group scale would show here."""
    weight, hessian = random_layer(16, 192, seed=4)
    options = dict(group_size=group_size, sym=False, act_order=act_order)
    first, *others = (quantize_matrix(weight, hessian, block=block, **options) for block in (1, 32, 128, 192))
    for other in others:
        for ours, theirs in zip(first, other):
            assert (ours.float() == theirs.float()).float().mean() > 0.998


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width_stays_on_its_grid_and_beats_rounding(bits):
    weight, hessian = random_layer(16, 64, seed=bits)
    for sym in True, False:
        for clip_search in False, True:
            options = dict(bits=bits, group_size=16, sym=sym, clip_search=clip_search)
            codes, scales, zeros = quantize_matrix(weight, hessian, **options)
            assert int(codes.max()) < 2**bits and torch.equal(scales.half().float(), scales)
            grid = round_to_nearest(weight, **options)
            assert torch.equal(scales, grid[1]) and torch.equal(zeros, grid[2])                 # static groups
            ours, rtn = output_errors(weight, [dequantize_groups(codes, scales, zeros), dequantize_groups(*grid)], hessian)
            assert ours < rtn


@pytest.mark.parametrize("act_order", [False, True])
def test_dead_inputs_get_weight_zero_and_change_nothing_else(act_order):
    weight, hessian = random_layer(16, 64, seed=0)
    dead = torch.arange(64) % 8 == 3
    alive = ~dead
    hessian[dead] = 0
    hessian[:, dead] = 0
    options = dict(group_size=-1, act_order=act_order)
    found = quantize_matrix(weight, hessian, **options)
    assert (dequantize_groups(*found)[:, dead] == 0).all()
    without = quantize_matrix(weight[:, alive], hessian[alive][:, alive], **options)
    assert torch.equal(found[0][:, alive], without[0]) and torch.equal(found[1], without[1])
    assert (dequantize_groups(*quantize_matrix(weight, 0 * hessian, group_size=16)) == 0).all()      # all of them dead


def test_the_factor_is_that_of_the_damped_inverse():
    for I in 7, 96, 1100:                                                       # odd, even, more than two blocks
        H = random_layer(1, I, seed=I, tokens=2 * I)[1]
        order = torch.randperm(I, generator=torch.Generator().manual_seed(I))
        U = inverse_factor(H, order, damp=0.05)
        damped = (H + 0.05 * H.diagonal().mean() * torch.eye(I))[order][:, order].double()
        right = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        assert torch.equal(U, U.triu()) and (U - right).norm() < 1e-5 * right.norm()


def test_one_factor_serves_the_columns_that_are_left_at_every_column():
    """Eq. (2) wants the inverse of what is left of H, which shrinks: its first row is in U."""
    H = random_layer(1, 12, seed=3, tokens=40)[1].double()
    U = inverse_factor(H, torch.arange(12), damp=0.0).double()
    for j in range(12):
        left = torch.linalg.inv(H[j:, j:])                                      # H_F^-1
        torch.testing.assert_close(U[j, j] ** 2, left[0, 0], rtol=1e-4, atol=0)
        torch.testing.assert_close(U[j, j:] / U[j, j], left[0] / left[0, 0], rtol=1e-3, atol=1e-5)


def test_a_singular_hessian_is_damped_more_and_said_so():
    weight, _ = random_layer(8, 64, seed=0)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))          # 3 tokens: rank 3 of 64
    with pytest.warns(UserWarning, match="layer 7: its Hessian is singular with a damping of 0; trying 0.001"):
        found = quantize_matrix(weight, x.T @ x, group_size=16, damp=0.0, where="layer 7")
    right = quantize_matrix(weight, x.T @ x, group_size=16, damp=0.001)
    assert torch.equal(found[0], right[0])


def test_damping_grows_to_ten_and_no_further():
    weight = torch.randn(8, 16)
    hessian = -0.4 * torch.ones(16, 16) + 1.4 * torch.eye(16)                   # the least eigenvalue is 1.4 - 6.4 = -5
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quantize_matrix(weight, hessian, group_size=16, damp=0.01)
    assert str(told[-1].message).endswith("trying 10")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="not positive definite, even with a damping of 1.1;"):
        quantize_matrix(weight, hessian, group_size=16, damp=0.011)


def test_what_cannot_be_quantised_is_one_line():
    weight, hessian = random_layer(8, 48, seed=0)
    with pytest.raises(InputError, match="48 inputs cannot be cut into groups of 32"):
        quantize_matrix(weight, hessian, group_size=32)
    for value in float("nan"), float("inf"):
        broken = weight.clone()
        broken[3, 5] = value
        with pytest.raises(InputError, match="weights that are not finite"):
            quantize_matrix(broken, hessian, group_size=16)
        broken = hessian.clone()
        broken[3, 5] = value
        with pytest.raises(InputError, match="Hessian has values that are not finite"):
            quantize_matrix(weight, broken, group_size=16)
    with pytest.raises(ValueError, match="a Hessian .* for .* inputs"):
        quantize_matrix(weight, hessian[:16, :16], group_size=16)


@pytest.mark.parametrize("options", [dict(bits=9), dict(bits=1), dict(bits=0), dict(damp=math.nan), dict(damp=-1.0),
                                     dict(damp=math.inf)])
def test_bits_and_damping_without_sense_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        quantize_matrix(torch.randn(4, 8), torch.eye(8), group_size=8, **options)


def test_the_hessian_is_a_sum_over_real_tokens_alone(monkeypatch):
    monkeypatch.setattr("minikd.gptq.PANEL", 250)                               # three panels
    generator = torch.Generator().manual_seed(0)
    hessian, tokens = Hessian(600), []
    for T in 5, 1, 4:
        x, mask = torch.randn(3, T, 600, generator=generator), torch.rand(3, T, generator=generator) < 0.6
        x[~mask] = float("nan")                                                 # padding must not even be multiplied
        hessian.add(x, mask)
        tokens += [x[b, t].double() for b in range(3) for t in range(T) if mask[b, t]]
    right = 2 / len(tokens) * sum(torch.outer(x, x) for x in tokens)
    assert hessian.tokens == len(tokens)
    torch.testing.assert_close(hessian.finish().double(), right, rtol=1e-4, atol=1e-5)
    hessian.add(x, torch.zeros(3, 4, dtype=torch.bool))                         # a batch of padding alone
    torch.testing.assert_close(hessian.finish().double(), right, rtol=1e-4, atol=1e-5)


def test_a_layer_that_no_token_reached_is_refused():
    hessian = Hessian(8)
    hessian.add(torch.ones(2, 3, 8), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(InputError, match="o_proj: no calibration token reached it"):
        hessian.finish("o_proj")
    with pytest.raises(InputError, match="layers.0.self_attn.q_proj: no calibration token"):
        quantize_model(tiny(), [], 0, group_size=16)


def test_every_product_is_in_full_precision():
    """Also where a program has allowed TF32, or a variable that only oneDNN knows has allowed bfloat16."""
    seen, x, weight, hessian = [], torch.randn(1, 64, 32), torch.randn(8, 32), Hessian(32)

    class Precision(TorchDispatchMode):
        def __torch_dispatch__(self, op, kinds, args=(), kwargs=None):
            if "mm" in str(op):
                seen.append((torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled))
            return op(*args, **kwargs or {})

    torch.set_float32_matmul_precision("medium")
    try:
        for call in (lambda: hessian.add(x, torch.ones(1, 64, dtype=torch.bool)),
                     lambda: quantize_matrix(weight, hessian.finish(), group_size=16, block=8),
                     lambda: output_errors(weight, [weight.round()], hessian.finish())):
            seen.clear()
            with Precision():
                call()
            assert set(seen) == {("highest", False)}
            assert torch.backends.mkldnn.enabled and torch.get_float32_matmul_precision() == "medium"      # as before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_products_are_exact_where_torchs_newer_names_allow_less():
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [place.fp32_precision for place in places]
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with full_precision():
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in places] == [before[0], "bf16"]
    finally:
        for place, value in zip(places, before):
            place.fp32_precision = value
    assert torch.get_float32_matmul_precision() == "highest"


# ---- a model

STAGES = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
          ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
OPTIONS = dict(bits=4, group_size=16, sym=True, act_order=True, damp=0.01, clip_search=False)


def tiny(dtype=torch.float32) -> Qwen2:
    return small(3, vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2).to(dtype).eval()


def calibration() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 60, (12, 20), generator=generator).tolist()
    return [Encoded(row[:3], row[3:8 + i], False, i) for i, row in enumerate(ids)]


def slowly_quantized(model, rows):
    """For each stage: runs the model, quantised so far, on each row alone, and takes Hessians of what the hooks saw."""
    found = {}
    for i in range(2):
        for stage in STAGES:
            names, seen = [f"model.layers.{i}.{name}" for name in stage], {}
            layers = {name: model.get_submodule(name) for name in names}
            hooks = [layer.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][0]))
                     for name, layer in layers.items()]
            with torch.no_grad():
                for row in rows:
                    model(torch.tensor([row.prompt + row.response]))
            for hook in hooks:
                hook.remove()
            for name, layer in layers.items():
                x = torch.cat(seen[name]).double()                              # [N, I]
                found[name] = quantize_matrix(layer.weight, (2 / len(x) * x.T @ x).float(), **OPTIONS)
                layer.weight.data.copy_(dequantize_groups(*found[name]))
    return found


@pytest.mark.filterwarnings("error")                                            # rounding is beaten: nothing to warn of
def test_a_model_is_quantised_as_by_full_forward_passes_through_what_is_quantised_already():
    slow, model, rows, reports = tiny(), tiny(), calibration(), []
    original = copy.deepcopy(model.state_dict())
    right = slowly_quantized(slow, rows)
    found = quantize_model(model, rows, 0, batch_size=5, on_layer=lambda *report: reports.append(report), **OPTIONS)
    assert list(found) == list(right) == [report[0] for report in reports]
    same = torch.cat([(found[name][0] == right[name][0]).flatten() for name in found]).float().mean()
    assert same > 0.995                                                         # other sums: a few ties fall elsewhere
    for name, error, rtn in reports:
        assert 0 < error < rtn, name
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        assert torch.equal(value, dequantize_groups(*found[layer]) if layer in found else original[name]), name


def test_errors_are_reported_on_the_inputs_of_the_quantised_model():
    """The first stage's inputs are the embeddings, whatever is quantised: its errors by hand."""
    model, rows, reports = tiny(), calibration(), {}
    block = copy.deepcopy(model.model.layers[0])
    ids = torch.tensor([token for row in rows for token in row.prompt + row.response])      # [N]
    found = quantize_model(model, rows, 0, on_layer=lambda name, *report: reports.update({name: report}), **OPTIONS)
    x = block.input_layernorm(model.model.embed_tokens(ids)).detach()           # [N, D]
    for letter in "qkv":
        name = f"model.layers.0.self_attn.{letter}_proj"
        weight = block.get_submodule(f"self_attn.{letter}_proj").weight.detach()
        y = x @ weight.T                                                        # [N, O]
        for Q, error in zip((found[name], round_to_nearest(weight, group_size=16)), reports[name]):
            right = (x @ dequantize_groups(*Q).T - y).square().sum() / y.square().sum()
            assert error == pytest.approx(float(right), rel=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_bfloat16_model_is_calibrated_in_its_dtype_or_in_float32_without_a_second_copy_of_it(dtype):
    model, rows, dtypes = tiny(torch.bfloat16), calibration(), set()
    wide, own = dtype or torch.bfloat16, torch.bfloat16
    right = quantize_model(copy.deepcopy(model).to(wide), rows, 0, **OPTIONS)
    found = quantize_model(model, rows, 0, dtype=dtype, **OPTIONS, on_layer=lambda name, *_: dtypes.add(
        tuple(block.mlp.down_proj.weight.dtype for block in model.model.layers)))
    assert dtypes == {(wide, own), (own, wide)}                                 # one block at a time
    assert all(torch.equal(*parts) for name in right for parts in zip(found[name], right[name]))
    for name, value in model.state_dict().items():
        layer = name.removesuffix(".weight")
        assert value.dtype == own and (layer not in found or torch.equal(value, dequantize_groups(*found[layer]).to(own))), name


def test_norms_and_biases_stay_although_blocks_are_calibrated_in_bfloat16():
    model = tiny()
    before = {name: vector.clone() for name, vector in model.named_parameters() if vector.dim() == 1}
    for vector in before.values():
        vector += 1e-4 * torch.randn_like(vector)               # no bfloat16 numbers, as trained ones
    model.load_state_dict(before, strict=False)
    quantize_model(model, calibration(), 0, dtype=torch.bfloat16, **OPTIONS)
    after = dict(model.named_parameters())
    assert len(before) == 2 * 5 + 1 and all(torch.equal(after[name], vector) for name, vector in before.items())
    assert {weight.dtype for weight in after.values()} == {torch.float32}


def test_q_k_and_v_share_their_hessian_and_so_do_gate_and_up(monkeypatch):
    made, seen = [], []
    monkeypatch.setattr("minikd.gptq.Hessian", lambda *a: made.append(Hessian(*a)) or made[-1])
    monkeypatch.setattr("minikd.gptq.quantize_matrix", lambda weight, hessian, **options: (
        seen.append(hessian.data_ptr()), quantize_matrix(weight, hessian, **options))[1])
    quantize_model(tiny(), calibration(), 0, **OPTIONS)
    assert len(made) == 8 and [len(list(filter(made[i].H.data_ptr().__eq__, seen))) for i in range(4)] == [3, 1, 2, 1]
    assert all(hessian.tokens == sum(8 + i for i in range(12)) for hessian in made)


def test_rounding_needs_no_rows():
    model, seen, grid = tiny(torch.bfloat16), [], dict(bits=3, group_size=16, sym=False, clip_search=True)
    original = copy.deepcopy(model.state_dict())
    found = quantize_model(model, [], 0, method="rtn", on_layer=lambda *report: seen.append(report), **grid)
    assert len(found) == len(seen) == 14 and seen[0][1:] == (None, None)
    for name, parts in found.items():
        assert all(map(torch.equal, parts, round_to_nearest(original[name + ".weight"], **grid)))
        assert torch.equal(model.state_dict()[name + ".weight"], dequantize_groups(*parts).bfloat16())


@pytest.mark.filterwarnings("ignore:model.layers")
def test_a_layer_that_gptq_does_not_improve_is_said_loudly(monkeypatch):
    errors = []
    monkeypatch.setattr("minikd.gptq.quantize_matrix", lambda weight, _, where, act_order, damp, **grid:
                        round_to_nearest(weight, **grid))
    with pytest.warns(UserWarning, match="q_proj: GPTQ's output error .* is not below round-to-nearest's"):
        quantize_model(tiny(), calibration(), 0, on_layer=lambda _, *both: errors.append(both), **OPTIONS)
    assert len(errors) == 14 and all(error == rtn > 0 for error, rtn in errors)


def test_blocks_that_are_done_can_be_let_go_on_the_way():
    model, held = tiny(), []

    def weigh(name, *_):
        held.append(sum(parameter.numel() for parameter in model.parameters() if parameter.dim() == 2))

    words = quantize_model(model, calibration(), 0, store=to_words, on_layer=weigh, **OPTIONS)
    block = sum(layer.weight.numel() for name, layer in linear_layers(tiny()).items() if ".layers.0." in name)
    assert held[:7] == held[:1] * 7 and held[7] == held[0] - block
    right = tiny()
    for name, found in quantize_model(right, calibration(), 0, **OPTIONS).items():
        assert all(torch.equal(words[name][key], value) for key, value in to_words(*found).items())
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(to_w4(model, words, 16, True)(ids), right(ids), rtol=1e-5, atol=1e-5)


def test_a_bad_layer_is_named_before_any_is_changed():
    model = tiny()
    original = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="model.layers.0.mlp.down_proj: 48 inputs cannot be cut into groups of 32"):
        quantize_model(model, calibration(), 0, group_size=32)
    with pytest.raises(InputError, match="method 'awq'"):
        quantize_model(model, calibration(), 0, method="awq")
    assert same(model.state_dict(), original)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="model.layers.1.mlp.up_proj: has weights that are not finite"):
        quantize_model(model, calibration(), 0, group_size=16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, original["model.layers.0.mlp.up_proj.weight"])


def test_a_4_bit_model_is_refused_and_left_as_it_is():
    model = tiny()
    words = quantize_model(model, [], 0, method="rtn", group_size=16, store=to_words)
    four = to_w4(model, words, 16, True)
    before = copy.deepcopy(four.state_dict())
    for method in "rtn", "gptq":
        with pytest.raises(InputError, match="holds 4-bit weights already"):
            quantize_model(four, [], 0, method=method, group_size=16)
    assert same(four.state_dict(), before)


def test_a_model_is_quantised_by_default_as_a_matrix_is():
    given = lambda function: {name: each.default for name, each in inspect.signature(function).parameters.items()}
    matrix, model = given(quantize_matrix), given(quantize_model)
    assert all(model[name] == matrix[name] for name in ("bits", "group_size", "sym", "act_order", "damp", "clip_search"))
    assert given(find_grid)["clip_search"] is False


def test_a_model_that_an_interrupt_left_partly_quantised_is_refused_until_it_is_loaded_again(tmp_path):
    model = random_model(hidden_size=64, intermediate_size=64, num_attention_heads=4)
    plain, done = copy.deepcopy(model), []

    def interrupt(name, *_):
        done.append(name)
        if len(done) == 3:
            raise KeyboardInterrupt

    options = dict(method="rtn", group_size=32)
    with pytest.raises(ValueError, match="bits = 9"):
        quantize_model(model, [], 0, bits=9, **options)         # nothing has changed: it may be called again
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, [], 0, on_layer=interrupt, **options)
    for again in partial(quantize_model, model, [], 0, **options), partial(save_model, model, tmp_path / "folder"):
        with pytest.raises(ValueError, match="partly quantised"):
            again()
    model.load_state_dict(plain.state_dict())
    wanted, found = quantize_model(plain, [], 0, **options), quantize_model(model, [], 0, **options)
    assert all(torch.equal(a, b) for name in wanted for a, b in zip(wanted[name], found[name], strict=True))


def test_a_model_whose_weights_were_freed_is_refused_and_its_hessians_carry_no_graph():
    model = random_model(hidden_size=64, intermediate_size=64, num_attention_heads=4)
    rows = [Encoded([1, 2, 3], [4, 5], False, 0)]
    assert not any(H.requires_grad for _, H in calibrate(copy.deepcopy(model), rows, 0, 1, torch.device("cpu"), torch.float32))
    quantize_model(model, [], 0, method="rtn", group_size=32, store=to_words)
    with pytest.raises(InputError, match="weights were freed"):
        quantize_model(model, [], 0, method="rtn", group_size=32, store=to_words)
