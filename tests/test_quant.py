"""The grid as slow loops, the words bit by bit in plain integers, and a layer that multiplies as its weight does."""
import copy
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minikd import products
from minikd.files import InputError
from minikd.model import Qwen2, Qwen2Config
from minikd.quant import (W4Linear, can_read_int4, check_groups, choose, codes_of_int4, dequantize_groups, find_grid,
                          from_words, pack, pack_int4, round_to_nearest, show_ways, swap_linears, to_words, unpack)


def matrix(O=16, I=64, seed=0):
    return torch.randn(O, I, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, O)[:, None]


def slow_grid(row: list[float], bits: int, sym: bool) -> tuple[float, float]:
    low, high = min(0.0, *row), max(0.0, *row)
    if sym:
        high = max(high, -low)
        low = -high
    scale = float(np.float16((np.float32(high) - np.float32(low)) / np.float32(2**bits - 1))) or 1.0
    return scale, float(2**(bits - 1)) if sym else float(np.clip(np.round(-low / scale), 0, 2**bits - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [16, 64, -1])
def test_round_to_nearest_is_the_papers_grid_weight_by_weight(bits, sym, group):
    weight = matrix()
    weight[3], weight[4] = weight[4].abs(), 0.0                                 # one-sided, and nothing at all
    codes, scales, zeros = round_to_nearest(weight, bits, group, sym)
    size = 64 if group == -1 else group
    assert codes.dtype == torch.uint8 and scales.shape == zeros.shape == (16, 64 // size)
    off = 0
    for o in range(16):
        for g in range(64 // size):
            row = weight[o, g * size:(g + 1) * size].tolist()
            scale, zero = slow_grid(row, bits, sym)
            assert (float(scales[o, g]), float(zeros[o, g])) == (pytest.approx(scale, rel=1e-6), zero)
            for i, w in enumerate(row):
                code = min(max(round(float(np.float32(w) / np.float32(scale))) + zero, 0), 2**bits - 1)
                off += code != int(codes[o, g * size + i])
    assert off == 0
    error = (dequantize_groups(codes, scales, zeros) - weight).abs()
    if not sym:                                                                 # at most half a step off (and the ends)
        assert (error <= 0.5 * scales.repeat_interleave(size, 1) * 1.01 + 1e-6).float().mean() > 0.99
    assert error[4].eq(0).all()


def test_more_bits_are_nearer_and_a_searched_clip_is_no_worse():
    weight = matrix() ** 3                                                      # heavy tails
    errors = [float((dequantize_groups(*round_to_nearest(weight, bits, 64)) - weight).square().sum()) for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    loss = lambda clip: (dequantize_groups(*round_to_nearest(weight, 3, 64, clip_search=clip)) - weight).abs().pow(2.4).sum()
    assert loss(True) < 0.95 * loss(False)


@pytest.mark.parametrize("sym", [True, False])
def test_a_searched_clip_is_the_best_of_41_ranges_tried_one_by_one(sym):
    weight = matrix(8, 24) ** 3
    scale, zero = find_grid(weight, 3, sym, clip_search=True)
    shrunk = 0
    for row, ours in zip(weight.tolist(), zip(scale.tolist(), zero.tolist())):
        tried = []
        for step in range(41):                                                  # 1, 79/80, ... 1/2 of the whole range
            s, z = slow_grid([(1 - step / 80) * end for end in (min(row), max(row))], 3, sym)
            error = sum(abs(s * (min(max(round(w / s) + z, 0), 7) - z) - w) ** 2.4 for w in row)
            tried.append((error, step, s, z))
        _, step, *best = min(tried)
        assert ours == (pytest.approx(best[0], rel=1e-6), best[1])
        shrunk += step > 0
    assert shrunk > 2


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_have_the_grid_and_codes_of_their_float32_values(dtype, sym):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for clip_search in False, True:
        for make in partial(find_grid, sym=sym), partial(round_to_nearest, group_size=32, sym=sym):
            found, right = (make(values, clip_search=clip_search) for values in (weight, weight.float()))
            assert all(map(torch.equal, found, right))


def test_a_scale_is_one_that_float16_stores():
    scale, _ = find_grid(matrix(), 4)
    assert torch.equal(scale, scale.half().float())
    assert find_grid(1e7 * matrix(), 4)[0].isfinite().all()


@pytest.mark.parametrize("dim", [0, 1])
def test_eight_codes_make_a_word_the_first_lowest(dim):
    codes = torch.randint(0, 16, (24, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    words = pack(codes, dim)
    table = codes.numpy().astype(np.uint64) if dim == 0 else codes.numpy().T.astype(np.uint64)
    expected = np.array([[sum(int(table[8 * r + j, c]) << 4 * j for j in range(8)) for c in range(table.shape[1])]
                         for r in range(table.shape[0] // 8)], dtype=np.uint64).astype(np.uint32).view(np.int32)
    assert words.dtype == torch.int32 and np.array_equal(words.numpy(), expected if dim == 0 else expected.T)
    again = unpack(words, dim)
    assert again.dtype == torch.uint8 and torch.equal(again, codes)


@pytest.mark.parametrize("version, symmetric", [(1, 0x77777777), (2, -0x77777778)])
def test_a_layers_words_read_as_the_format_says_and_come_back(version, symmetric):
    weight = matrix(16, 64)
    codes, scales, zeros = round_to_nearest(weight, group_size=32)
    words = to_words(codes, scales, zeros, version)
    assert {name: (tuple(value.shape), value.dtype) for name, value in words.items()} == {
        "qweight": ((8, 16), torch.int32), "qzeros": ((2, 2), torch.int32), "scales": ((2, 16), torch.float16),
        "g_idx": ((64,), torch.int32)}
    assert words["qzeros"].eq(symmetric).all() and words["g_idx"].tolist() == [0] * 32 + [1] * 32
    q, z, s, g = (words[name].numpy() for name in ("qweight", "qzeros", "scales", "g_idx"))
    for o, i in (0, 0), (5, 9), (15, 63), (8, 31), (7, 32):                     # a reader that shares no line with ours
        code = (int(q[i // 8, o]) >> 4 * (i % 8)) & 15
        zero = ((int(z[g[i], o // 8]) >> 4 * (o % 8)) & 15) + (version == 1)
        value = float(s[g[i], o]) * (code - zero)
        assert value == pytest.approx(float(dequantize_groups(codes, scales, zeros)[o, i]), rel=1e-6)
    for ours, theirs in zip(from_words(words["qweight"], words["qzeros"], words["scales"], version), (codes, scales, zeros)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_an_asymmetric_zero_of_0_is_for_v2_alone():
    codes, scales, zeros = round_to_nearest(matrix().abs(), sym=False, group_size=64)
    assert (zeros == 0).all()
    with pytest.raises(InputError, match="use gptq_v2"):
        to_words(codes, scales, zeros)
    assert from_words(*list(to_words(codes, scales, zeros + 1).values())[:3])[2].eq(1).all()     # 1 is the least that it can
    again = from_words(*list(to_words(codes, scales, zeros, version=2).values())[:3], version=2)
    assert all(torch.equal(a, b) for a, b in zip(again, (codes, scales, zeros)))


def test_version_1_with_zeros_of_0_is_read_as_gptqmodel_writes_it():
    """It takes 0x11111111 off whole words, so that a zero of 0 borrows from the one above it."""
    codes, scales, _ = round_to_nearest(matrix(), group_size=64)
    zeros = torch.tensor([0, 8, 0, 0, 15, 1, 0, 7] * 2).float()[:, None]
    words = to_words(codes, scales, zeros, version=2)
    theirs = [(int(word) - 0x11111111) % 2**32 for word in words["qzeros"].flatten()]       # plain integers
    written = torch.tensor([word - 2**32 if word >= 2**31 else word for word in theirs], dtype=torch.int32)
    assert torch.equal(from_words(words["qweight"], written.view_as(words["qzeros"]), words["scales"])[2], zeros)


@pytest.mark.parametrize("size, inputs", [(48, 64), (0, 64), (128, 64)])
def test_a_group_size_that_does_not_divide_is_one_line(size, inputs):
    with pytest.raises(InputError, match="give a divisor"):
        check_groups(inputs, size)


def test_what_cannot_be_packed_or_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="codes above 15 do not fit into 4 bits"):
        to_words(*round_to_nearest(matrix(), bits=8, group_size=64))
    with pytest.raises(InputError, match="multiples of 8"):
        to_words(*round_to_nearest(matrix(12, 64), group_size=64))
    weight = matrix()
    weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        round_to_nearest(weight, group_size=64)
    round_to_nearest(torch.ones(300, 256).half(), group_size=256)               # though their sum is past half's range


# ---- the layer

def layer(O=32, I=128, group=64, sym=True, bias=True, version=1):
    codes, scales, zeros = round_to_nearest(matrix(O, I), group_size=group, sym=sym)
    made = W4Linear(I, O, group, bias, version)
    words = to_words(codes, scales, zeros.clamp(min=1), version)
    made.load_state_dict(words | ({"bias": torch.linspace(-1, 1, O)} if bias else {}))
    return made, dequantize_groups(codes, scales, zeros.clamp(min=1))


def test_on_a_cpu_without_bfloat16_dequantised_weights_are_not_rounded_to_it(monkeypatch):
    made, weight = layer()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for avx2 in True, False:
        monkeypatch.setattr(products, "AVX2_ONLY", avx2)
        dtype = torch.float32 if avx2 else torch.bfloat16
        expected = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), made.bias.to(torch.bfloat16).to(dtype))
        assert torch.equal(made.multiply(x, "dequantise"), expected.bfloat16())
        assert made.multiply(x.clone().requires_grad_(), "dequantise").requires_grad
        torch.testing.assert_close(made.multiply(x.double(), "dequantise"), x.double() @ weight.double().T + made.bias.double(),
                                   rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sym, version", [(True, 1), (False, 2), (False, 1)])
@pytest.mark.parametrize("rows", [1, 5, 500])
def test_the_layer_multiplies_as_its_weight_does(dtype, sym, version, rows):
    made, weight = layer(sym=sym, version=version)
    assert torch.equal(made.weight(), weight)
    x = torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = x.double() @ weight.double().T + made.bias.double()
    with torch.no_grad():
        y = made(x)
    assert y.dtype == dtype and y.shape == (2, rows, 32)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((y.double() - expected).norm() / expected.norm()) < tolerance


def test_each_way_is_taken_where_it_may_be():
    made, _ = layer()
    narrow, wide = torch.zeros(1, 128).bfloat16(), torch.zeros(1, 128)
    with torch.no_grad():
        assert choose(made, narrow) == "int4" and choose(made, wide) == "dequantise"
        assert choose(made, narrow.expand(1000, 128)) == "dequantise"           # many rows
        assert choose(layer(group=16)[0], narrow) == "dequantise"               # a group the operator does not know
    assert choose(made, narrow.clone().requires_grad_()) == "dequantise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_another_width_are_refused_and_none_give_none(dtype):
    made = layer()[0].to(dtype)                                         # 128 -> 32
    with torch.no_grad():
        assert made(torch.zeros(2, 0, 128, dtype=dtype)).shape == (2, 0, 32)
        for shape in (1, 256), (2, 4, 64):
            with pytest.raises(RuntimeError):
                made(torch.zeros(shape, dtype=dtype))


def test_a_layer_that_is_prepared_for_the_kernel_does_not_look_for_it_again(monkeypatch):
    """torch.compile follows what `available` does at its first call: reading files, loading libraries."""
    made, asked = layer(group=128)[0], []
    monkeypatch.setattr("minikd.quant.available", lambda index: (asked.append(index), True)[1])
    x = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, requires_grad=False, device=SimpleNamespace(index=3))
    assert choose(made, x) == "kernel" and asked == [3]
    made.prepared = "kernel", ()
    assert choose(made, x) == "kernel" and asked == [3]


def test_a_cast_leaves_the_scales_as_they_were_stored():
    made, weight = layer()
    for dtype in torch.bfloat16, torch.float32:
        made.to(dtype)
        assert made.bias.dtype == dtype and made.scales.dtype == torch.float16 and torch.equal(made.weight(), weight)


@pytest.mark.parametrize("O, I", [(64, 32), (192, 96), (1088, 64), (2112, 256)])
def test_what_torchs_int4_operator_reads_can_be_read_back(O, I):
    codes = torch.randint(0, 16, (O, I), generator=torch.Generator().manual_seed(O)).to(torch.uint8)
    packed = pack_int4(codes)
    assert torch.equal(packed, torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1))    # all at once
    assert torch.equal(codes_of_int4(packed, O, I), codes)
    assert can_read_int4(O, I) and not can_read_int4(O - 16, I)


@torch.no_grad()
@pytest.mark.parametrize("O", [192, 80])
def test_a_layer_holds_its_codes_once(O):
    made, weight = layer(O)
    stored = {name: value.clone() for name, value in made.state_dict().items()}
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = made(x)
    assert made.prepared[0] == "int4" and made.qweight.numel() == (0 if O == 192 else O * 128 // 8)
    for each in made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)):
        assert each is made or each.prepared is None and torch.equal(each.qweight, stored["qweight"])
        assert torch.equal(each.weight(), weight) and torch.equal(each(x), y)
        again = each.state_dict()
        assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)
    other = layer(O, sym=False)[0]
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), other(x)) and not torch.equal(made(x), y)
    assert torch.equal(made.float().qweight, other.state_dict()["qweight"])


def test_the_gradient_goes_through_to_the_input():
    made, weight = layer()
    x = torch.randn(3, 128, requires_grad=True)
    made(x).square().sum().backward()
    theirs = torch.autograd.grad((x @ weight.T + made.bias).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, theirs, rtol=1e-4, atol=1e-4)


def test_groups_in_another_order_are_read_by_g_idx():
    """As other tools' act-order writes them."""
    made, weight = layer()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(4))
    codes, scales, zeros = from_words(made.qweight, made.qzeros, made.scales)
    shuffled = W4Linear(128, 32, 64, True)
    shuffled.load_state_dict(to_words(codes[:, order], scales, zeros) | {"g_idx": made.g_idx[order], "bias": made.bias})
    assert not shuffled.in_order and torch.equal(shuffled.weight(), weight[:, order])
    x = torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        assert choose(shuffled, x) == "dequantise"
        torch.testing.assert_close(shuffled(x[:, order]), made(x), rtol=5e-2, atol=5e-1)
        made.load_state_dict(shuffled.state_dict())             # nothing of the old order is remembered
        assert torch.equal(made(x[:, order]), shuffled(x[:, order]))


def test_inputs_may_be_strided():
    made, _ = layer()
    wide = torch.randn(3, 256).bfloat16()
    with torch.no_grad():
        assert torch.equal(made(wide[:, ::2]), made(wide[:, ::2].contiguous()))


def test_layers_are_all_checked_before_the_first_is_swapped():
    model = Qwen2(Qwen2Config(vocab_size=50, hidden_size=64, intermediate_size=72, num_hidden_layers=1, num_attention_heads=4,
                              num_key_value_heads=2))
    with pytest.raises(InputError, match="mlp.down_proj.* 72 "):
        swap_linears(model, 16, 1)
    assert not any(isinstance(layer, W4Linear) for layer in model.modules())


def test_the_ways_are_shown_by_shape_and_rows(capsys, monkeypatch):
    config = Qwen2Config(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True)
    model = Qwen2(config).init_weights(0).bfloat16()
    show_ways(model)
    assert capsys.readouterr().out.startswith("0 4-bit layers")
    swap_linears(model, 32, 1)
    show_ways(model, rows=(1, 1000))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["14", "4-bit", "layers,", "rows:", "1", "1,000"]
    assert lines[1:] == [["4", "of", "64", "->", "64", "int4", "dequantise"], ["4", "of", "64", "->", "32", "int4", "dequantise"],
                         ["4", "of", "64", "->", "96", "int4", "dequantise"], ["2", "of", "96", "->", "64", "int4", "dequantise"]]
    monkeypatch.setattr("minikd.quant.choose", lambda *_: "kernel")
    show_ways(model, rows=(1, 20, 100))
    assert capsys.readouterr().out.splitlines()[1].split()[-3:] == ["w4_mma_8_few", "w4_mma_32", "kernel"]
