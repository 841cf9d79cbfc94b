"""w4_matmul.cu's kernels, run on a CPU by ptx.py, and their layout bit by bit."""
import math
import re

import pytest
import torch

from minikd import w4, w4_cuda
from minikd.cuda import launch
from minikd.quant import dequantize_groups, round_to_nearest, to_words
from minikd.w4 import W4Linear, choose
from minikd.w4_cuda import GPU, KERNELS, codes_of, plan, repack, supports_groups
from ptx import Fault, kernels_of, places


def layer(N: int, K: int, group: int, sym: bool, seed=0):
    """Random codes over the full range, scales and zeros; and the weight they stand for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=generator).to(torch.uint8)
    scales = ((torch.rand(N, K // group, generator=generator) + 0.5) * 0.02).half().float()     # as they are stored
    zeros = torch.full_like(scales, 8) if sym else torch.randint(0, 16, scales.shape, generator=generator).float()
    return codes, scales, zeros, dequantize_groups(codes, scales, zeros).double()


def test_the_layout_is_the_one_that_is_drawn():
    codes, scales, zeros, _ = layer(40, 192, 64, sym=False)
    words, packed_scales, packed_zeros = repack(codes, scales, zeros)
    assert words.shape == (3, 2, 2, 32, 4) and words.dtype == torch.int32
    order = {0: 0, 4: 1, 8: 2, 12: 3, 16: 0, 20: 1, 24: 2, 28: 3}               # bits -> pair, from the drawing
    for tile in range(3):
        for block in range(2):
            for half in range(2):
                for lane in range(32):
                    for j in range(4):
                        word = int(words[tile, block, half, lane, j]) & 0xffffffff
                        for shift, pair in order.items():
                            n = tile * 16 + half * 8 + lane // 4
                            k = block * 128 + 32 * j + 8 * (lane % 4) + 2 * pair + shift // 16
                            code = word >> shift & 15
                            assert code == (int(codes[n, k]) if n < 40 and k < 192 else 8)
    assert torch.equal(codes_of(words, 40, 192), codes)
    assert torch.equal(packed_scales[:, :40].float(), scales.T) and (packed_scales[:, 40:] == 0).all()
    assert torch.equal(packed_zeros[:, :40].float(), zeros.T) and packed_zeros.shape == (3, 48)
    eights = torch.full_like(zeros, 8)
    assert repack(codes, scales, eights)[2] is None
    eights[-1, -1] = 7                                                          # one group of all
    assert repack(codes, scales, eights)[2].eq(8).sum() == 3 * 48 - 1


# ---- the kernels themselves, on the CPU

def guarded(gpu):
    """cuda.launch; an access outside a kernel's own tensors is a Fault."""
    def launched(name, device, grid, threads, *values, **options):
        gpu.readable, gpu.writable = places(*values[:5]), places(values[5])
        launch(name, device, grid, threads, *values, **options)
    return launched


def run(gpu, name, words, scales, zeros, x, bias, y, group, processors=2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w4_cuda, "gpu_of", lambda device: GPU(processors))
        patch.setattr(w4_cuda, "launch", guarded(gpu))
        w4_cuda.run(name, words, scales, zeros, x, bias, y, group)


def check(gpu, name, M, N, K, group, sym=True, biased=True, processors=2) -> torch.Tensor:
    codes, scales, zeros, weight = layer(N, K, group, sym, seed=M)
    generator = torch.Generator().manual_seed(M + N)
    x = torch.randn(M, K, generator=generator).bfloat16()
    bias = torch.randn(N, generator=generator).bfloat16() if biased else None
    y = torch.full((M, N), torch.nan).bfloat16()                                # nan: an output that is not written shows
    run(gpu, name, *repack(codes, scales, zeros), x, bias, y, group, processors)
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    error = (y.double() - expected).norm() / expected.norm()
    assert error < 3e-3, (name, M, N, K, group, error)                          # no more than y's rounding to bfloat16
    return y


@pytest.mark.parametrize("M", [1, 3, 8, 9, 16, 33, 64])
def test_every_batch_size_gives_the_product(gpu, M):
    for name in KERNELS:
        if name.split("_")[1] in ("mma", "int8") and M <= int(name.split("_")[2]) < max(4 * M, 9):
            check(gpu, name, M, 24, 256, 128)


SHAPES = [(8, 64, 64), (8, 1152, 32), (40, 192, 64), (32, 896, 128),
          pytest.param(16, 512, 512, marks=pytest.mark.slow), pytest.param(16, 5120, 256, marks=pytest.mark.slow)]


@pytest.mark.parametrize("N, K, group", SHAPES)
@pytest.mark.parametrize("sym", [True, False])
def test_every_shape_gives_the_product(gpu, N, K, group, sym):
    gpu.order = "first" if sym else "last"                                      # one warp runs as far as barriers allow
    for name, rows in ("w4_naive", 3), ("w4_mma_8", 5), ("w4_mma_16", 13):
        if K < 600 or name != "w4_naive":                                       # slow here
            check(gpu, name, rows, N, K, group, sym, biased=sym)


@pytest.mark.parametrize("N, K, group", SHAPES + [(200, 128, 128), (72, 384, 128)])
@pytest.mark.parametrize("sym", [True, False])
def test_every_shape_gives_the_product_by_int8(gpu, N, K, group, sym):
    gpu.order = "first" if sym else "last"
    for rows in 1, 2:
        check(gpu, "w4_int8_2", rows, N, K, group, sym, biased=sym, processors=1 if sym else 3)


def test_the_order_of_warps_does_not_change_a_bit(gpu):
    found = []
    for gpu.order in "first", "last", "turns":
        found.append(check(gpu, "w4_int8_2", 2, 88, 640, 128, processors=1))    # warps' runs cut strips
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def digits(block: list[float]) -> tuple[float, list[tuple[int, int, int]]]:
    """A block of x as w4_matmul.cu describes it, one input at a time -> its unit, the digits of each input."""
    exponent = max(-102, max((math.frexp(value)[1] for value in block if value), default=-102))     # |x| < 2^exponent
    unit, found = 2.0 ** (exponent - 21), []
    for value in block:
        whole, each = round(value / unit), []                                   # to the nearest, to even in the middle
        for _ in range(3):
            each.append((whole + 128) % 256 - 128)
            whole = (whole - each[-1]) // 256
        assert whole == 0
        found.append(tuple(each))
    return unit, found


@pytest.mark.parametrize("sym", [True, False])
def test_digits_are_those_of_a_loop_over_inputs(gpu, sym):
    M, N, K = 2, 16, 256
    codes, scales, zeros, weight = layer(N, K, 128, sym)
    # Magnitudes differ by up to 2^20 from one input to the next, and more between blocks; each block's largest has weights of 0.
    x = (torch.randn(M, K) * 2.0 ** torch.randint(-20, 0, (M, K))).bfloat16()
    x[:, ::128] = torch.tensor([[3.0, -3.0], [-1.99, 3.98]])
    x[:, 128:] *= torch.tensor([[1e30], [1e-24]])
    codes[:, ::128] = zeros.to(torch.uint8)
    weight[:, ::128] = 0
    rounded = torch.zeros(M, K, dtype=torch.float64)
    for m in range(M):
        for b in range(0, K, 128):
            unit, found = digits(x[m, b:b + 128].tolist())
            for k, (d0, d1, d2) in enumerate(found):
                assert all(-128 <= d < 128 for d in (d0, d1, d2))
                rounded[m, b + k] = unit * (d0 + 256 * d1 + 65536 * d2)
            large = x[m, b:b + 128].abs() >= 2.0 ** -13 * x[m, b:b + 128].abs().max()
            off = (rounded[m, b:b + 128] - x[m, b:b + 128].double()).abs()
            assert (off[large] == 0).all() and 0 < off.max() <= 2.0 ** -21 * x[m, b:b + 128].abs().max()
    for b in 0, 128:                                                            # one block at a time, the other one is 0
        alone = torch.zeros_like(x)
        alone[:, b:b + 128] = x[:, b:b + 128]
        y = torch.full((M, N), torch.nan).bfloat16()
        run(gpu, "w4_int8_2", *repack(codes, scales, zeros), alone, None, y, 128)
        expected = rounded[:, b:b + 128] @ weight[:, b:b + 128].T
        assert ((y.double() - expected).abs() <= 2.0 ** -8 * expected.abs() + 1e-6 * expected.abs().max()).all()


@pytest.mark.parametrize("sym", [True, False])
def test_what_is_not_finite_stays_in_its_row(gpu, sym):
    codes, scales, zeros, weight = layer(24, 256, 128, sym)
    x, y = torch.randn(2, 256).bfloat16(), torch.zeros(2, 24).bfloat16()
    x[0] = 0
    for value in float("inf"), -float("inf"), float("nan"):
        x[1, 200] = value
        run(gpu, "w4_int8_2", *repack(codes, scales, zeros), x, None, y, 128)
        assert not y[1].isfinite().any() and (y[0] == 0).all()
    x[1, 200] = 3e38                                                            # the largest are not infinite
    run(gpu, "w4_int8_2", *repack(codes, scales, zeros), x, None, y, 128)
    right = x[1].double() @ weight.T
    assert (y[1].double() - right).norm() <= 3e-3 * right.norm()


@pytest.mark.parametrize("name, M", [("w4_mma_8_few", 8), pytest.param("w4_mma_16_few", 11, marks=pytest.mark.slow)])
def test_more_warps_along_the_inputs_give_the_product(gpu, name, M):
    for K, group in (128, 64), (4864, 128), (2560, 512):                        # fewer tiles than warps; more than rings hold
        check(gpu, name, M, 24, K, group, sym=group == 128)


@pytest.mark.parametrize("N, K, group, sym", [(40, 1216, 64, False), (16, 896, 128, True)])
def test_the_dequantised_weight_is_the_weight(gpu, N, K, group, sym):
    codes, scales, zeros, weight = layer(N, K, group, sym)
    y = torch.full((N, K), torch.nan).bfloat16()
    words, *grid = repack(codes, scales, zeros)
    gpu.readable, gpu.writable = places(words, *grid), places(y)
    launch("w4_dequantise", y.device, (words.shape[0], -(-words.shape[1] // 8)), 256, words, *grid, None, None, y, 0, N, K, group)
    assert torch.equal(y, weight.bfloat16())


@pytest.mark.parametrize("name", ["w4_int8_2", "w4_mma_8"])
def test_the_check_detects_a_wrong_nibble(gpu, name):
    codes, scales, zeros, weight = layer(16, 128, 128, True)
    words, *grid = repack(codes, scales, zeros)
    words[0, 0, 1, 17, 2] ^= 8 << 20
    y, x = torch.zeros(1, 16).bfloat16(), torch.ones(1, 128).bfloat16()
    run(gpu, name, words, *grid, x, None, y, 128)
    off = (y.double() - x.double() @ weight.T).abs()[0]
    assert off[8 + 17 // 4] > 4 * scales[12] and off.sort().values[-2] < 0.1 * off.max()


@pytest.mark.parametrize("name, K", [("w4_mma_8", 2560), ("w4_int8_2", 4096)])
@pytest.mark.parametrize("old, new, fault", [
    (r"bar\.warp\.sync\s+-1;", "", "race: accesses what another thread wrote"),
    (r"bar\.sync\s+0;", "", "another thread wrote|no thread wrote"),
    (r"wait_group\s+[23];", "wait_group 4;", "while an asynchronous copy is in flight"),
    (r"griddepcontrol\.wait;", "", "reads before the kernel ahead has ended")])
def test_the_check_detects_a_missing_barrier_or_wait(compiled, gpu, name, K, old, new, fault):
    body = re.search(r"\.visible \.entry %s\(.*?\n}\n" % name, compiled.ptx, re.S)[0]
    gpu.kernels = kernels_of(body)
    check(gpu, name, 2, 16, K, 128)
    changed, count = re.subn(old, new, body)
    assert count
    gpu.kernels = kernels_of(changed)
    with pytest.raises(Fault, match=fault):
        check(gpu, name, 2, 16, K, 128)


@pytest.mark.parametrize("name", ["w4_int8_2", "w4_mma_8"])
def test_the_check_detects_a_read_past_the_end(gpu, name):
    for what in 0, 1, 3:                                                        # words, scales, x
        parts = [*repack(*layer(16, 256, 128, True)[:3]), torch.ones(1, 256).bfloat16(), None, torch.zeros(1, 16).bfloat16()]
        parts[what] = parts[what][..., :-1].clone()
        if what == 3:
            parts[3] = torch.nn.functional.pad(parts[3], (0, 1))[:, :256]       # K is still 256, of which 255 are readable
        gpu.readable, gpu.writable = places(*parts[:5]), places(parts[5])
        if what == 3:
            gpu.readable[-1] = gpu.readable[-1][0], 510
        shape = w4_cuda.launch_shape(name, 1, 16, 256, 128, False, GPU(1))
        with pytest.raises(Fault, match="is in no tensor"):
            launch(name, parts[5].device, *shape[:2], *parts, 1, 16, 256, 128, shared=shape[2])


# ---- the operator

@pytest.fixture
def on_cpu(gpu, monkeypatch) -> list:
    """Makes the operator run on the CPU -> the names of the kernels that it launched."""
    monkeypatch.setattr(w4_cuda, "launch", guarded(gpu))
    return gpu.launched


@pytest.mark.parametrize("M, expected", [(0, []), (1, ["w4_mma_8_few"]), (20, ["w4_mma_32"]), (65, ["w4_dequantise"])])
def test_the_operator_takes_the_planned_kernel_and_any_x(on_cpu, M, expected):
    codes, scales, zeros, weight = layer(48, 256, 64, sym=False)
    bias = torch.randn(48).bfloat16()
    wide = torch.randn(M + 1, 300).bfloat16()
    views = wide[:M, 3:259], wide[:M, 8:264], wide.flatten()[1:1 + M * 256].view(M, 256)
    for x in views:                                         # rows with gaps, unaligned or not; contiguous but unaligned
        on_cpu.clear()
        y = w4_cuda.multiply(x, *repack(codes, scales, zeros), bias, 48, 64)
        assert on_cpu == expected and y.shape == (M, 48)
        product = x.double() @ weight.T + bias.double()
        assert (y - product).norm() <= 1e-2 * product.norm()


def test_a_4_bit_layer_multiplies_by_the_kernel(on_cpu, monkeypatch):
    w4_cuda.w4_matmul.register_kernel("cpu")(w4_cuda.multiply)
    codes, scales, zeros = round_to_nearest(torch.randn(40, 128), group_size=64, sym=False)
    made = W4Linear(128, 40, 64, True, version=2)
    words = to_words(codes, scales, zeros, 2)
    made.load_state_dict(words | {"bias": torch.randn(40)})
    x = torch.randn(2, 3, 128).bfloat16()
    y = made.multiply(x, "kernel")
    assert made.qweight.numel() == 0 and torch.equal(made.state_dict()["qweight"], words["qweight"])
    assert on_cpu == ["w4_mma_8_few"] and y.shape == (2, 3, 40)
    expected = x.double() @ made.weight().double().T + made.bias.double()
    assert (y - expected).norm() < 1e-2 * expected.norm()
    made.multiply(x, "kernel")
    assert made.prepared[0] == "kernel"
    torch.library.opcheck(torch.ops.minikd.w4_matmul.default,
                          (x[0], *made.prepared[1], made.bias.bfloat16(), 40, 64),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_on_a_gpu_the_kernel_is_chosen_where_it_can_be(monkeypatch):
    class OnGPU:                                                                # the attributes of x that `choose` reads
        def __init__(self, dtype=torch.bfloat16, requires_grad=False):
            self.dtype, self.requires_grad, self.is_cuda, self.device = dtype, requires_grad, True, torch.device("cuda:0")

        def numel(self):
            return 256

    monkeypatch.setattr(w4, "available", lambda index: True)
    made = W4Linear(128, 40, 64, True)
    assert choose(made, OnGPU()) == "kernel"
    assert choose(made, OnGPU(torch.float32)) == choose(made, OnGPU(requires_grad=True)) == "dequantise"
    assert choose(W4Linear(128, 40, 16, True), OnGPU()) == "dequantise"
    made.g_idx, _ = made.g_idx.flip(0), made.__dict__.pop("in_order", None)
    assert choose(made, OnGPU()) == "dequantise"
    monkeypatch.setattr(w4, "available", lambda index: False)
    assert choose(W4Linear(128, 40, 64, True), OnGPU()) == "dequantise"


# ---- choosing

SMALL = GPU(108, 99 << 10, False)


def test_a_plan_fits_the_gpu_and_covers_all_outputs_and_rows():
    for gpu in GPU(), SMALL:
        for M in range(1, w4_cuda.MMA_ROWS + 1):
            for N, K in (8, 128), (128, 896), (896, 4864), (22_016, 2048), (37_888, 3584), (3584, 18_944), (151_936, 8192):
                name = plan(M, N, K, 32, True, gpu)
                (blocks, one), threads, shared = w4_cuda.launch_shape(name, M, N, K, 32, True, gpu)
                assert name in KERNELS and M <= int(name.split("_")[2]) and shared <= gpu.shared
                assert one == 1 and blocks == (gpu.processors if "int8" in name else -(-N // 16))
    for N, K in (9728, 896), (22_016, 2048), (37_888, 3584):
        for M in 1, 2:
            assert w4_cuda.launch_shape("w4_int8_2", M, N, K, 128, False, GPU())[2] + 1024 <= 114 << 10        # two fit a multiprocessor
    assert all(map(supports_groups, (32, 64, 128, 256, 896, 4864))) and not any(map(supports_groups, (16, 96, 192)))


@pytest.mark.parametrize("M, N, K, gpu, name", [
    *((M, N, K, GPU(), name) for N, K in ((9728, 896), (22_016, 2048), (37_888, 3584)) for M, name in (
        (1, "int8_2"), (2, "int8_2"), (3, "mma_8"), (8, "mma_8"), (9, "mma_16"), (16, "mma_16"), (17, "mma_32"), (64, "mma_64"))),
    *((M, N, K, GPU(), name) for N, K in ((1152, 896), (2560, 2048), (896, 4864)) for M, name in (
        (1, "mma_8_few"), (8, "mma_8_few"), (16, "mma_16_few"), (17, "mma_32"))),
    *((M, N, K, GPU(), name) for N, K in ((1536, 8960), (2048, 11_008), (3584, 18_944)) for M, name in (
        (1, "int8_2"), (2, "mma_8_few"), (16, "mma_16_few"), (17, "mma_32"))), (1, 66 * 16, 8192, GPU(), "mma_8_few"),
    (1, 67 * 16, 8192, GPU(), "int8_2"), (1, 67 * 16, 8192, GPU(140), "mma_8_few"), (1, 2048, 8064, GPU(), "mma_8_few"),
    (1, 263 * 16, 2048, GPU(), "mma_8_few"), (1, 264 * 16, 2048, GPU(), "int8_2"), (1, 264 * 16, 2048, GPU(133), "mma_8_few"),
    (1, 22_016, 8192, SMALL, "mma_8"), (1, 22_016, 32_768, GPU(), "int8_2"), (2, 22_016, 32_768, GPU(), "mma_8")])
def test_the_plan_is_the_kernel_that_was_fastest_and_fits(M, N, K, gpu, name):
    assert plan(M, N, K, 128, False, gpu) == "w4_" + name


def test_the_operator_knows_its_output_s_shape_without_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        x = torch.empty(5, 896, device="cuda", dtype=torch.bfloat16)
        words = torch.empty(8, 7, 2, 32, 4, device="cuda", dtype=torch.int32)
        y = torch.ops.minikd.w4_matmul(x, words, torch.empty(7, 128, device="cuda", dtype=torch.float16), None, None, 128, 128)
    assert y.shape == (5, 128) and y.dtype == torch.bfloat16 and y.device.type == "cuda"
