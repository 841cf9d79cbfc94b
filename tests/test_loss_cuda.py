"""loss.cu, run on a CPU by ptx.py, against the formulas in slow Python loops and against head.py's own path."""
import functools
import math
import re

import pytest
import torch

import fake_gpu
from benchmarks import gpu as script
from minikd import loss_cuda
from minikd.cuda import SOURCES, launch
from minikd.head import _costs, head_loss, tokens_at_once
from minikd.loss_cuda import pick_kernel
from minikd.losses import (clipped_surrogate, entropy, forward_kl, jensen_shannon, no_divergence, pick_divergence,
                           reverse_kl)
from ptx import Fault, kernels_of

DIVERGENCES = {"ce": no_divergence, "entropy": entropy, "forward": forward_kl, "reverse": reverse_kl}


def extent(x) -> tuple[int, int]:
    """(address, bytes) of a tensor whose rows may be further apart than they are long"""
    return x.data_ptr(), (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))) * x.element_size()


@pytest.fixture
def on_cpu(gpu, monkeypatch):
    """Makes loss_cuda launch on the CPU, by blocks of two warps, which is faster here."""
    def launched(name, device, grid, threads, logits, teacher, targets, *values):
        tensors, sizes = values[:3], values[3:]
        read, written = ([*tensors, targets], [logits]) if "grad" in name else ([logits, targets], [*tensors])
        gpu.readable = [extent(x) for x in read + [teacher] * (teacher is not None)]
        gpu.writable = [extent(x) for x in written]
        launch(name, device, grid, threads, logits, teacher, targets, *tensors, *sizes)

    monkeypatch.setattr(loss_cuda, "launch", launched)
    monkeypatch.setattr(loss_cuda, "THREADS", 64)
    return gpu


def rows_of(values: torch.Tensor) -> torch.Tensor:
    """The values laid out as head_loss does logits: bfloat16, rows aligned; between rows is NaN, which nothing may read."""
    held = torch.full((len(values), -(-values.shape[1] // 8) * 8), torch.nan).bfloat16()
    held[:, :values.shape[1]] = values
    return held[:, :values.shape[1]]


def some_logits(n: int, V: int, seed: int, scale: float = 2.0) -> torch.Tensor:
    return rows_of(scale * torch.randn(n, V, generator=torch.Generator().manual_seed(seed)))


def run(name, s, t, targets, T=1.0, a=1.0, b=1.0):
    """-> CE [n], D [n] and a dCE + b dD [n, V]"""
    t = t if name in ("forward", "reverse") else None
    ce, kd, rows = loss_cuda.costs(name, T, s, targets, t)
    if name == "entropy":
        return ce, kd, None
    out = rows_of(s)
    slopes = (torch.full((len(s),), float(x)) for x in (a, b))
    loss_cuda.gradient_(name, T, out, targets, t, rows, *slopes)
    return ce, kd, out


# ---- the formulas, in float64

def slow(name, s: list[float], t: list[float], target: int, T: float, a: float, b: float) -> tuple[float, float, list[float]]:
    def softmax(x, T):
        powers = [math.exp((v - max(x)) / T) for v in x]
        return [power / sum(powers) for power in powers]

    def log_softmax(x, T):
        least = math.log(sum(math.exp((v - max(x)) / T) for v in x))
        return [(v - max(x)) / T - least for v in x]

    kl = lambda p, log_p, log_q: sum(x * (y - z) for x, y, z in zip(p, log_p, log_q) if x > 0)
    q1, q, log_q = softmax(s, 1), softmax(s, T), log_softmax(s, T)
    p, log_p = softmax(t, T), log_softmax(t, T)
    ce, D, dD = -log_softmax(s, 1)[target], 0.0, [0.0] * len(s)
    if name == "entropy":
        D = -sum(x * y for x, y in zip(q, log_q) if x > 0)
    if name == "forward":
        D, dD = kl(p, log_p, log_q), [(x - y) / T for x, y in zip(q, p)]
    if name == "reverse":
        D = kl(q, log_q, log_p)
        dD = [x * (y - z - D) / T if x > 0 else 0.0 for x, y, z in zip(q, log_q, log_p)]
    return ce, D, [a * (x - (v == target)) + b * y for v, (x, y) in enumerate(zip(q1, dD))]


@pytest.mark.parametrize("name, T, a, b", [("ce", 1.0, 1.0, 0.0), ("entropy", 1.0, 1.0, 0.0), ("forward", 1.0, 0.5, 0.5),
                                           ("reverse", 1.0, 0.5, 0.5), ("forward", 0.5, 0.3, 2.0), ("reverse", 3.0, 0.0, -1.0),
                                           ("forward", 2.0, 0.0, 1.0), ("reverse", 0.5, -1.0, 0.1)])
@pytest.mark.parametrize("V, scale", [(7, 60.0), (577, 20.0), pytest.param(520, 0.5, marks=pytest.mark.slow)])    # read by 512
def test_the_kernels_compute_the_formulas(on_cpu, name, T, a, b, V, scale):
    s, t = some_logits(3, V, 1, scale), some_logits(3, V, 2, scale)
    s[1, V // 3:V // 2] = t[1, V // 3:V // 2] = -math.inf                       # excluded by both
    targets = torch.tensor([0, V - 1, V // 2])
    ce, kd, grad = run(name, s, t, targets, T, a, b)
    for n in range(3):
        expected_ce, D, slopes = slow(name, s[n].tolist(), t[n].tolist(), int(targets[n]), T, a, b)
        assert ce[n].item() == pytest.approx(expected_ce, rel=2e-6, abs=2e-6)
        assert kd[n].item() == pytest.approx(D, rel=2e-6, abs=2e-6)
        if grad is not None:                                                    # bfloat16 keeps 8 bits: half of the last is 2^-8
            assert grad[n].tolist() == pytest.approx(slopes, rel=1.01 * 2 ** -8, abs=1e-5)


@pytest.mark.parametrize("T", [1.0, 0.7])
@pytest.mark.parametrize("name", ["forward", "reverse", "entropy"])
def test_sums_are_as_exact_as_torchs_in_float32(on_cpu, name, T):
    """Models that are close, whose logits are far from 0: where a sum of the logits themselves would lose digits."""
    s = rows_of(some_logits(12, 6000, 3, 3.0).float() + 40 * torch.arange(-6, 6)[:, None])
    t = rows_of((s.float() + 0.3 * some_logits(12, 6000, 4, 1.0).float() - 25 * torch.arange(12)[:, None]).float())
    T = 1.0 if name == "entropy" else T
    divergence = entropy if name == "entropy" else functools.partial(DIVERGENCES[name], temperature=T)
    exact, torchs = divergence(s.double(), t.double()), divergence(s, t)
    ours = loss_cuda.costs(name, T, s, torch.zeros(12, dtype=torch.long), None if name == "entropy" else t)[1]
    error, theirs = ((x - exact).abs().max() for x in (ours, torchs))
    assert exact.min() > 1e-3 and error < max(1.5 * theirs, 1e-6 * exact.max()), (error, theirs)


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_of_equal_models_divergence_and_gradient_are_0(on_cpu, name, T):
    s = some_logits(4, 300, 5, 8.0).round().bfloat16()
    t = rows_of(s.float() + 16.0)                                               # a constant changes no probability
    _, kd, grad = run(name, rows_of(s), t, torch.arange(4), T, 0.0, 1.0)
    assert kd.abs().max() < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("name", ["forward", "reverse", "ce"])
def test_tokens_that_one_model_rules_out_are_as_in_the_plain_path(on_cpu, name, T):
    T = 1.0 if name == "ce" else T
    s, t = some_logits(6, 43, 6), some_logits(6, 43, 7)
    s[0, :20], t[1, 5:], t[2, 7], s[3, 42], s[4] = -math.inf, -math.inf, -math.inf, -math.inf, -math.inf
    s[4, 42] = 1.0                                                              # all but one, past the last 8
    targets = torch.tensor([30, 2, 7, 42, 42, 3])                               # the fourth is a token that is ruled out
    leaf = s.float().requires_grad_()
    divergence = DIVERGENCES[name] if name == "ce" else functools.partial(DIVERGENCES[name], temperature=T)
    expected_ce, expected, total = _costs(leaf, targets, t, divergence, 0.5, torch.ones(6), None)
    ce, kd, grad = run(name, s, t, targets, T, 0.5, 0.5)
    assert ce[3].isinf() and (name == "ce" or kd.isinf().any())
    torch.testing.assert_close((ce, kd), (expected_ce.detach(), expected.detach()), rtol=2e-6, atol=2e-6)
    right = torch.autograd.grad(total.sum(), leaf)[0]
    finite = kd.isfinite()                              # where D is not, the reverse gradient shows LEAST cut to bfloat16
    torch.testing.assert_close(grad[finite].float(), right[finite], rtol=2 ** -8, atol=1e-6)
    torch.testing.assert_close(grad.float(), right, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("name", ["ce", "entropy", "forward", "reverse"])
@pytest.mark.parametrize("where", [0, 17, 42])
def test_nan_stays_nan_and_in_its_row(on_cpu, name, where):
    s, t = some_logits(3, 43, 8), some_logits(3, 43, 9)
    s[1, where] = math.nan
    ce, kd, grad = run(name, s, t, torch.tensor([1, 2, 3]))
    assert ce.isnan().tolist() == [False, True, False]
    assert kd.isnan().tolist() == [False, name != "ce", False]
    assert grad is None or grad[1].isnan().all() and grad[[0, 2]].isfinite().all()
    if name in ("forward", "reverse"):
        _, kd, grad = run(name, t, s, torch.tensor([1, 2, 3]))
        assert kd.isnan().tolist() == [False, True, False] and grad[1].isnan().any()


def test_a_target_outside_the_vocabulary_gives_nan(on_cpu):
    assert run("ce", some_logits(3, 43, 8), None, torch.tensor([43, -100, 42]))[0].isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["forward", "reverse"])
def test_the_result_does_not_depend_on_the_order_of_warps_and_hardly_on_their_number(on_cpu, monkeypatch, name):
    s, t = some_logits(1, 1500, 10, 5.0), some_logits(1, 1500, 11, 5.0)
    found = []
    for threads, order in (64, "first"), (64, "last"), (64, "turns"), (512, "turns"):
        on_cpu.order = order
        monkeypatch.setattr(loss_cuda, "THREADS", threads)
        found.append(run(name, s, t, torch.tensor([700]), 2.0))
    for other in found[1:3]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other))
    torch.testing.assert_close(found[3], found[0], rtol=2 ** -7, atol=1e-6)
    assert found[3][1].item() == pytest.approx(found[0][1].item(), rel=1e-6)


def test_the_check_detects_a_missing_barrier(on_cpu, compiled):
    body = re.search(r"\.visible \.entry loss_forward\(.*?\n}\n", compiled.ptx, re.S)[0]
    changed, count = re.subn(r"bar\.sync\s+0;", "", body)
    assert count == 1
    on_cpu.kernels = kernels_of(changed)
    with pytest.raises(Fault, match="race|reads what no thread wrote"):
        loss_cuda.costs("forward", 1.0, some_logits(1, 99, 1), torch.tensor([1]), some_logits(1, 99, 2))


# ---- head_loss on a GPU that the CPU plays

N, V, D, DT = 21, 61, 16, 24


def inputs(rows: int, teacher_rows: int) -> dict:
    generator = torch.Generator().manual_seed(17)
    shapes = dict(hidden=(N, D), head=(rows, D), teacher_hidden=(N, DT), teacher_head=(teacher_rows, DT))
    made = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    return made | {"targets": torch.randint(min(rows, teacher_rows, 50), (N,), generator=generator)}


CASES = {
    "forward": dict(divergence=forward_kl, kd_ratio=0.5), "reverse": dict(divergence=reverse_kl, kd_ratio=1.0),
    "warm": dict(divergence=pick_divergence("forward_kl", temperature=2.0, beta=0.3), kd_ratio=0.5, vocab=50),
    "measured": dict(divergence=forward_kl, kd_ratio=0.0), "sft": dict(teacher_hidden=None, teacher_head=None),
    "entropy": dict(divergence=entropy, teacher_hidden=None, teacher_head=None), "policy": dict(divergence=entropy),
    "minillm": dict(divergence=reverse_kl, kd_ratio=1.0)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows, teacher_rows, narrow", [(V, V + 3, True), pytest.param(V, V - 5, False, marks=pytest.mark.slow)])
def test_head_loss_by_the_kernels_is_head_loss(on_cpu, monkeypatch, case, rows, teacher_rows, narrow):
    """narrow: all in bfloat16; else float32 weights under autocast, as a student in training has."""
    options, given = CASES[case], inputs(rows, teacher_rows)
    weight, advantage = (torch.rand(N, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def step(kernels: bool):
        monkeypatch.setattr(loss_cuda, "available", lambda index: kernels)
        with fake_gpu.gpu():
            there = {key: value.to("cuda") for key, value in given.items()}
            leaves = [there[key].to(torch.bfloat16 if narrow else torch.float32).requires_grad_() for key in ("hidden", "head")]
            A, old = (advantage - 0.5).to("cuda"), torch.full((N,), -3.5, device="cuda")
            policy = (lambda logq, at: clipped_surrogate(logq, old[at], A[at])) if case in ("policy", "minillm") else None
            with torch.autocast("cuda", torch.bfloat16, enabled=not narrow):
                loss, ce, kd = head_loss(**there | dict(zip(("hidden", "head"), leaves)) | options, policy_loss=policy,
                                         weight=weight.to("cuda"), chunk_bytes=8 * 64 * 2)
                (2 * loss).backward()
                with torch.inference_mode():
                    again = head_loss(**there | options, policy_loss=policy, weight=weight.to("cuda"))[0]
            return [x.detach().cpu().float() for x in (loss, again, ce, kd, leaves[0].grad, leaves[1].grad)]

    right = step(False)
    assert on_cpu.launched == []
    found = step(True)
    assert len(on_cpu.launched) == 2 * 3 + 1                                    # three chunks; without gradients all at once
    for x, y in zip(found[:4], right):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for x, y in zip(found[4:], right[4:]):
        assert (x - y).norm() < 4e-3 * y.norm()                                 # roundings to bfloat16 that fall differently


def test_which_losses_the_kernels_compute(monkeypatch):
    monkeypatch.setattr(loss_cuda, "available", lambda index: True)
    with fake_gpu.gpu():
        s = torch.zeros(3, 16, dtype=torch.bfloat16, device="cuda")
        pick = lambda divergence, kd_ratio=0.5, s=s, t=s: pick_kernel(divergence, kd_ratio, s, t)
        assert pick(forward_kl) == ("forward", 1.0) and pick(pick_divergence("reverse_kl", temperature=2.0)) == ("reverse", 2.0)
        assert pick(no_divergence, 0.0, t=None) == ("ce", 1.0) and pick(entropy, 0.0, t=s.float()) == ("entropy", 1.0)
        for other in (jensen_shannon, pick_divergence("jsd"), pick_divergence("forward_kl", temperature=0.0),
                      lambda s, t: s[:, 0], functools.partial(forward_kl, teacher_logits=s), functools.partial(forward_kl, s)):
            assert pick(other) is None
        assert pick(entropy) is pick(forward_kl, t=None) is pick(forward_kl, t=s.float()) is pick(forward_kl, s=s.float()) is None
        assert pick(forward_kl, s=s[:, 1:], t=s[:, 1:]) is None                 # rows that are not aligned
        assert pick(forward_kl, t=torch.zeros_like(s, dtype=s.dtype).repeat(1, 2)[:, :16]) is None      # nor equally far apart
    assert pick_kernel(forward_kl, 0.5, torch.zeros(3, 16).bfloat16(), torch.zeros(3, 16).bfloat16()) is None       # on a CPU


def test_chunks_are_whole_tiles_and_equally_large():
    assert [tokens_at_once(N, 883, 128) for N in (0, 5, 128, 700, 768, 769, 3072, 10_000)] == [1, 5, 128, 700, 768, 512, 768, 768]
    assert tokens_at_once(3072, 1766, 128) == 1536 and tokens_at_once(100, 7, 48) == 7 and tokens_at_once(9, 0, 128) == 1


def test_the_gpu_script_checks_and_times_the_kernels(on_cpu, monkeypatch, capsys):
    monkeypatch.setitem(script.SHAPES, "0.5B", script.replace(script.SHAPES["0.5B"], vocab_size=72))
    monkeypatch.setattr(script, "seconds_of", lambda call, *_: (call(), [1.0])[1])
    with fake_gpu.gpu():
        script.check_loss("cuda", True, {"bandwidth": 1e12})
    told = capsys.readouterr().out
    assert told.count("temperature") == 6 and "TOO LARGE" not in told and "FAILED" not in told


def test_the_sizes_are_those_of_loss_cu():
    source = SOURCES[0].with_name("loss.cu").read_text("utf-8")
    assert f"const int THREADS = {loss_cuda.THREADS};" in source
    fields = re.sub(r"//.*", "", re.search(r"struct Row \{(.*?)\n\}", source, re.S)[1])
    assert len(re.findall(r"\w+[,;]", fields)) == loss_cuda.ROW
