"""The grid as slow loops, and the words bit by bit in plain integers."""
import math
from functools import partial

import numpy as np
import pytest
import torch

from minikd.errors import InputError
from minikd.quant import (check_groups, dequantize_groups, find_grid, from_words, is_finite, pack, quantize, round_to_nearest,
                          to_words, unpack)


def matrix(O=16, I=64, seed=0):
    return torch.randn(O, I, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 3, O)[:, None]


def slow_grid(row: list[float], bits: int, sym: bool) -> tuple[float, float]:
    """Scale and zero of one group, in float32 and stored in float16."""
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
    decoded, size = dequantize_groups(codes, scales, zeros), 64 if group == -1 else group
    assert codes.dtype == torch.uint8 and scales.shape == zeros.shape == (16, 64 // size)
    for o in range(16):
        for g in range(64 // size):
            row = weight[o, g * size:(g + 1) * size].tolist()
            scale, zero = slow_grid(row, bits, sym)
            assert (float(scales[o, g]), float(zeros[o, g])) == (pytest.approx(scale, rel=1e-6), zero)
            for i, w in enumerate(row, g * size):
                code = min(max(round(float(np.float32(w) / np.float32(scale))) + zero, 0), 2**bits - 1)     # paper eq. (8)
                assert int(codes[o, i]) == code and float(decoded[o, i]) == pytest.approx(scale * (code - zero))    # eq. (9)
    assert decoded[4].eq(0).all()


def test_a_weight_is_rounded_before_its_zero_is_added():
    """Paper eq. (8): halves go to the even number of steps."""
    assert quantize(torch.tensor([[0.5, 1.5, 2.5]]), torch.ones(1, 1), torch.ones(1, 1)).tolist() == [[1, 3, 3]]


def test_the_asymmetric_grid_holds_0_and_its_zero_is_a_code():
    scale, zero = find_grid(torch.tensor([[-15.0, -14.0]]), 4, sym=False)
    assert (scale.item(), zero.item()) == (1.0, 15.0)
    assert 0 <= float(find_grid(torch.tensor([[-1e7, 0.0]]), 4, sym=False)[1]) <= 15       # a scale that float16 cannot hold


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
    assert words.dtype == torch.int32 and words.shape == ((3, 32) if dim == 0 else (24, 4))
    lines = zip(codes.T, words.T) if dim == 0 else zip(codes, words)
    for given, packed in lines:
        for r, word in enumerate(packed.tolist()):
            assert word % 2**32 == sum(int(given[8 * r + j]) << 4 * j for j in range(8))
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


def test_a_group_size_that_does_not_divide_is_one_line():
    for size in 48, 0, 128:
        with pytest.raises(InputError, match="give a group size that divides 64"):
            check_groups(64, size)


def test_what_cannot_be_packed_or_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="version = 3"):
        to_words(*round_to_nearest(matrix(), group_size=64), version=3)
    with pytest.raises(InputError, match="multiples of 8"):
        to_words(*round_to_nearest(matrix(12, 64), group_size=64))
    weight = matrix()
    weight[2, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        round_to_nearest(weight, group_size=64)
    round_to_nearest(torch.ones(300, 256).half(), group_size=256)               # though their sum is past half's range


def test_16_is_the_first_code_that_is_refused():
    codes, grid = torch.zeros(8, 8, dtype=torch.uint8), (torch.ones(8, 1), torch.full((8, 1), 8.0))
    codes[0, 0] = 15
    to_words(codes, *grid)
    codes[0, 0] = 16
    with pytest.raises(ValueError, match="must be from 0 to 15"):
        to_words(codes, *grid)
    with pytest.raises(ValueError, match="must be from 0 to 15"):                     # of 5 bits, where all codes may fit into 4
        to_words(*round_to_nearest(-torch.ones(8, 16), bits=5, group_size=16, sym=False), version=2)
    for zero in 16.0, -1.0, torch.nan:
        with pytest.raises(ValueError, match="must be from 0 to 15"):
            to_words(torch.zeros_like(codes), torch.ones(8, 1), torch.full((8, 1), zero), version=2)


def test_float8_is_looked_at_too():
    assert is_finite(torch.ones(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn))
