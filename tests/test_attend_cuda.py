"""attend.cu, run on a CPU by ptx.py, against slow loops and against the plain path."""
import math
import re
from types import SimpleNamespace

import pytest
import torch

from conftest import small
from fake_gpu import OnGPU, gpu as played
from minikd import attend_cuda
from minikd.attend_cuda import HEADS, LEAST, attend, make_parts
from minikd.cuda import SOURCES, launch
from minikd.generate import generate_with_log_probs
from minikd.model import Attention, Qwen2Config, Slots, rope_tables, rotate
from ptx import Fault, kernels_of, places


@pytest.fixture
def on_cpu(gpu, monkeypatch):
    """Makes the operator run on the CPU. Its blocks run at the same time, so that races between them are found."""
    def launched(name, device, grid, threads, *values):
        tensors = values[:9]
        gpu.readable, gpu.writable = places(*tensors[:5]), places(*tensors[5:])
        launch(name, device, grid, threads, *values, together=True)

    monkeypatch.setattr(attend_cuda, "launch", launched)
    monkeypatch.setattr(gpu, "cuLaunchCooperativeKernel",
                        lambda *given: gpu.cuLaunchKernel(*given, None, together=grid_of(given) > 1))
    attend.register_kernel("cpu")(attend._init_fn)
    return gpu


def grid_of(given) -> int:
    return given[2]                                                             # blocks that split a row's slots


def case(B, H, K, E, S, slot, splits=1, seed=0, gaps=True):
    """-> random arguments of the operator; some slots are left out, with huge values in them, and those not yet written are nan"""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()
    qkv, keys, values = random(B, 1, (H + 2 * K) * E), random(B, K, S, E), random(B, K, S, E)
    written = torch.arange(S).expand(B, S) <= slot
    seen = written & (torch.rand(B, S, generator=generator) < 0.7) if gaps else written
    seen[:, slot] = True
    for cache in keys, values:
        cache.masked_fill_((written & ~seen)[:, None, :, None], 3e4)
        cache[:, :, slot:] = torch.nan
    cos, sin = rope_tables(torch.randint(0, 600, (B, 1), generator=generator), 1e4, E, torch.bfloat16)
    bias = torch.zeros(B, 1, 1, S).bfloat16().masked_fill(~seen[:, None, None], -torch.inf)
    parts = torch.zeros(B * K, splits, HEADS * (E + 2) + 1)
    return qkv, cos, sin, keys, values, torch.tensor([slot]), bias, parts


def by_loops(qkv, cos, sin, keys, values, slot, bias, parts):
    """The definition, head by head and slot by slot, in float64."""
    (B, K, S, E), slot = keys.shape, int(slot)
    H = qkv.shape[-1] // E - 2 * K
    heads = qkv.view(B, H + 2 * K, 1, E)
    rotated = rotate(heads[:, :H + K], cos, sin)[:, :, 0].double()              # [B, H + K, E]
    out = torch.empty(B, H, E, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            kv = h // (H // K)
            scores, seen = [], [s for s in range(slot + 1) if bias[b, 0, 0, s] == 0]
            for s in seen:
                key = rotated[b, H + kv] if s == slot else keys[b, kv, s].double()
                scores.append(math.exp(float(rotated[b, h] @ key) / math.sqrt(E)))
            new = heads[b, H + K + kv, 0].double()
            out[b, h] = sum(p * (new if s == slot else values[b, kv, s].double()) for p, s in zip(scores, seen)) / sum(scores)
    return out.view(B, 1, H * E), rotated[:, H:].bfloat16(), heads[:, H + K:, 0]


def check(on_cpu, given):
    right, k, v = by_loops(*given)
    qkv, _, _, keys, values, slot, _, parts = given
    before = keys.clone(), values.clone()
    y = attend(*given)
    assert y.shape == right.shape and y.dtype == torch.bfloat16
    assert (y.double() - right).norm() < 5e-3 * right.norm()                    # p and y are rounded to bfloat16
    for cache, old, new in zip((keys, values), before, (k, v)):                 # one slot is written, bit for bit as by rotate
        assert torch.equal(cache[:, :, slot], new[:, :, None])
        old[:, :, slot] = cache[:, :, slot]
        assert torch.equal(cache.nan_to_num(7.0), old.nan_to_num(7.0))
    assert not parts[:, 0, -1].any()                                            # the counters are ready for the next launch


@pytest.mark.parametrize("H, K, E", [(1, 1, 64), (4, 2, 64), (7, 1, 64), (14, 2, 128), (8, 1, 128), (3, 3, 64)])
@pytest.mark.parametrize("slot", [0, 37])
def test_a_step_is_the_definition(on_cpu, H, K, E, slot):
    check(on_cpu, case(2, H, K, E, 40, slot, seed=slot))


@pytest.mark.parametrize("slot, order", [(15, "first"), (16, "last"), (255, "turns"), (256, "first"), (301, "last")])
def test_every_length_is_attended_to(on_cpu, slot, order):
    on_cpu.order = order
    check(on_cpu, case(1, 7, 1, 64, 302, slot, seed=slot, gaps=slot != 255))


@pytest.mark.parametrize("slot, splits, E, order", [(511, 2, 64, "turns"), (512, 2, 64, "first"), (1039, 3, 64, "last"),
                                                    (700, 2, 128, "turns"), (1025, 2, 64, "turns")])
def test_several_blocks_split_the_slots(on_cpu, slot, splits, E, order):
    on_cpu.order = order
    given = case(1, 4, 2, E, 1040, slot, splits, seed=slot)
    check(on_cpu, given)
    given[5].sub_(1)                                                            # again, with the same parts
    check(on_cpu, given)
