"""Products cut for a CPU's cache, against float64."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import random_logits
from fake_gpu import gpu
from minikd import products
from minikd.products import gemv, multiply

MOST = {torch.bfloat16: 2 ** -8, torch.float16: 2 ** -11, torch.float32: 1e-6, torch.float64: 1e-14}    # relative error


@pytest.mark.parametrize("n, dtype, amx", [(1, torch.float32, False), (1, torch.float32, True), (2, torch.float32, True),
                                           (1, torch.bfloat16, True)])
@pytest.mark.parametrize("O", [1, 7, 24, 4096])
def test_one_row_or_two_times_parts_of_the_weight_is_the_product(monkeypatch, O, n, dtype, amx):
    monkeypatch.setattr(products, "AMX", amx)
    shapes = (n, 40), (40, O), (O,)
    x, weight, bias = (random_logits(*shape, seed=seed).to(dtype) for seed, shape in enumerate(shapes))
    weight = weight.T                                                           # not contiguous
    for given in weight, weight.contiguous(), weight.repeat(2, 1)[O // 2:O // 2 + O]:
        for b in None, bias:
            exact = x.double() @ given.double().T + (0 if b is None else b.double())
            near = dict(rtol=1e-5, atol=1e-5)
            if dtype == torch.bfloat16:         # both are rounded; without AMX torch may round once more, before it adds the bias
                near = dict(rtol=0, atol=2 * MOST[dtype] * float(exact.abs().max()))
            torch.testing.assert_close(gemv(x, given, b), exact.to(dtype), **near)


@pytest.mark.parametrize("amx", [True, False])
def test_gemv_multiplies_a_row_in_bfloat16_and_two_in_float32_only_with_amx(monkeypatch, spy, amx):
    monkeypatch.setattr(products, "AMX", amx)
    taken = spy(products, "gemv", lambda x, *_: (len(x), x.dtype))
    for dtype in MOST:
        for n in 1, 2:
            multiply(random_logits(n, 40).to(dtype), random_logits(50, 40).to(dtype))
    assert taken == [(1, torch.bfloat16)] * amx + [(1, torch.float32)] + [(2, torch.float32)] * amx


@pytest.mark.parametrize("avx2", [True, False])
@pytest.mark.parametrize("dtype", MOST)
def test_a_cpu_without_bfloat16_multiplies_many_rows_in_float32_in_columns_of_16(monkeypatch, dtype, avx2):
    """It is a float32 product, rounded once, whatever torch's own in bfloat16 is."""
    monkeypatch.setattr(products, "AVX2_ONLY", avx2)
    made, pad = [], F.pad
    monkeypatch.setattr(F, "pad", lambda *given: (made.append(pad(*given)), made[-1])[1])
    weight, biases = random_logits(2100, 40).to(dtype), random_logits(2100, seed=1).to(dtype)
    for n in 1, 5, 6, 16, 31:
        x, out = random_logits(n, 40, seed=n).to(dtype), torch.full((40, 2100), torch.nan, dtype=dtype)
        for bias in None, biases:
            y = multiply(x, weight, bias, out)
            exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
            assert y.dtype == dtype and y.data_ptr() == out.data_ptr() and out[n:].isnan().all()
            assert (y - exact).abs().max() <= MOST[dtype] * exact.abs().max()
    wide = avx2 and dtype != torch.float64
    assert [tuple(x.shape) for x in made] == [(16, 40)] * 4 * wide + [(32, 40)] * 2 * wide
    assert all(x.dtype == torch.float32 and x[n:].eq(0).all() for x, n in zip(made, (6, 6, 16, 16, 31, 31)))


@pytest.mark.parametrize("avx2", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_is_added_before_the_product_is_rounded(monkeypatch, dtype, avx2):
    """1 + 3/8 of a step rounds to 1, and so does 1 + 1/4 of a step; the sum, 1 + 5/8 of a step, rounds to the next number."""
    monkeypatch.setattr(products, "AVX2_ONLY", avx2)
    eps = torch.finfo(dtype).eps
    x, quarter = torch.tensor([[1, 3 / 8 * eps]], dtype=dtype).expand(6, 2), torch.tensor([eps / 4], dtype=dtype)
    assert multiply(x, torch.ones(1, 2, dtype=dtype), quarter).eq(1 + eps).all()


def test_on_a_gpu_it_is_one_product():
    x, weight, bias = random_logits(3, 40), random_logits(50, 40, seed=1), random_logits(50, seed=2)
    with gpu():
        y = multiply(x.to("cuda"), weight.to("cuda"), out=torch.empty(5, 50, device="cuda"))
        biased = multiply(x.to("cuda"), weight.to("cuda"), bias.to("cuda"))
        assert y.is_cuda and biased.is_cuda
        y, biased = y.cpu(), biased.cpu()
    torch.testing.assert_close(y, x @ weight.T)
    torch.testing.assert_close(biased, x @ weight.T + bias)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="of x86")
@pytest.mark.parametrize("capability", ["avx2", pytest.param("default", marks=pytest.mark.slow)])
def test_a_cpu_with_avx2_only_is_known(capability):
    code, env = "from minikd.products import AVX2_ONLY; print(AVX2_ONLY)", os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=Path(__file__).parents[1], env=env)
    assert done.stdout == f"{capability == 'avx2'}\n"


@pytest.mark.parametrize("avx2", [True, False])
@pytest.mark.parametrize("dtype, other", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_weight_in_another_dtype_is_rounded_to_that_of_the_rows(monkeypatch, dtype, other, avx2):
    """So one token's loss does not depend on how many are scored with it."""
    monkeypatch.setattr(products, "AVX2_ONLY", avx2)
    weight = random_logits(2100, 40).to(other)
    for n in 1, 16:
        x = random_logits(n, 40, seed=n).to(dtype)
        y, exact = multiply(x, weight), x.double() @ weight.to(dtype).double().T
        assert (y - exact).abs().max() <= MOST[dtype] * exact.abs().max()
        unrounded = x.double() @ weight.double().T
        if dtype == torch.bfloat16:
            assert (y - exact).norm() < 0.9 * (y - unrounded).norm()
