"""attend.cu, run on a CPU by ptx.py, against slow loops and against the plain path."""
import math
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import SHAPES, attention_errors
from conftest import small
from fake_gpu import gpu as played
from minikd import attend_cuda, fused_cuda, generate as generating
from minikd.attend_cuda import HEADS, FEWEST, SHARED, attend, make_parts
from minikd.cuda import SOURCES, launch
from minikd.generate import generate, generate_with_log_probs
from minikd.model import rope_tables, rotate
from ptx import Fault, kernels_of, places


@pytest.fixture
def on_cpu(gpu, monkeypatch):
    """Makes the operator run on the CPU. Its blocks run at the same time, so that races between them are found."""
    def launched(name, device, grid, threads, *values, shared):
        gpu.readable, gpu.writable = places(*values[:5]), places(*values[5:9])
        launch(name, device, grid, threads, *values, together=grid[1] > 1, shared=shared)   # blocks that split a row's slots

    monkeypatch.setattr(attend_cuda, "launch", launched)
    attend.register_kernel("cpu")(attend_cuda.step)
    return gpu


def case(B, H, K, E, S, slot, splits=1, seed=0, gaps=True):
    """-> random arguments of the operator; slots that are left out hold huge values, those not yet written nan"""
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
    (B, K, _, E), slot = keys.shape, int(slot)
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
@pytest.mark.parametrize("slot", [0, 21])
def test_a_step_is_the_definition(on_cpu, H, K, E, slot):
    check(on_cpu, case(2 if slot else 1, H, K, E, 40, slot, seed=slot))


@pytest.mark.parametrize("slot, order", [(15, "first"), (16, "last"), (255, "turns"), (256, "first"), (301, "last")])
def test_every_length_is_attended_to(on_cpu, slot, order):
    on_cpu.order = order
    check(on_cpu, case(1, 7, 1, 64, 304, slot, seed=slot, gaps=slot != 255))


@pytest.mark.parametrize("slot, splits, E, order", [
    pytest.param(511, 2, 64, "turns", marks=pytest.mark.slow), pytest.param(1039, 3, 64, "last", marks=pytest.mark.slow),
    (530, 2, 128, "first")])
def test_several_blocks_split_the_slots(on_cpu, slot, splits, E, order):
    on_cpu.order = order
    given = case(1, 2, 1, E, 1040, slot, splits, seed=slot)
    check(on_cpu, given)
    given[5].sub_(1)                                                            # again, with the same parts
    check(on_cpu, given)


@pytest.mark.parametrize("shape, length, splits", [pytest.param("0.5B", 120, 1, marks=pytest.mark.slow), ("3B", 9, 1)])
def test_a_step_is_as_exact_as_the_plain_path(on_cpu, shape, length, splits):
    ours, plain, same = attention_errors(SHAPES[shape], length, splits, "cpu")
    assert same and ours < 1.5 * plain + 1e-3 and plain < 5e-3, (ours, plain)


@pytest.mark.parametrize("old, new, fault", [
    (r"bar\.sync\s+0;", "", "reads what no thread wrote|race"), (r"bar\.warp\.sync\s+-1;", "", "race"),
    (r"wait_group\s+1;", "wait_group 2;", "while an asynchronous copy is in flight"),
    (r"atom\.acq_rel\S+inc\.u32\s+(\S+), .*;", r"mov.u32 \1 1;", "race")])
def test_the_check_detects_a_missing_barrier_wait_or_counter(compiled, on_cpu, old, new, fault):
    body = re.search(r"\.visible \.entry attend_64\(.*?\n}\n", compiled.ptx, re.S)[0]
    changed, count = re.subn(old, new, body)
    assert count
    on_cpu.kernels = kernels_of(changed)
    with pytest.raises(Fault, match=fault):
        check(on_cpu, case(1, 2, 1, 64, 1040, 1000, splits=2))


# ---- in the model

@pytest.fixture
def on_played_gpu(on_cpu, monkeypatch):
    """-> the names of the kernels launched on a simulated GPU."""
    monkeypatch.setattr(attend_cuda, "available", lambda index: True)
    monkeypatch.setattr(fused_cuda, "available", lambda index: False)
    return on_cpu.launched


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16]]
SHAPE = dict(num_attention_heads=3, num_key_value_heads=1, head_dim=64, hidden_size=32, num_hidden_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("options", [dict(samples=2), dict(mix=0.4)])
def test_generate_by_the_kernel_tells_the_plain_path_s_log_probs(on_played_gpu, monkeypatch, options):
    """Rows of different lengths, finished rows dropped, graphs, two models."""
    shape = SHAPE | dict(num_hidden_layers=1)
    model, teacher = (small(seed, **shape).bfloat16().eval() for seed in (3, 4))
    monkeypatch.setattr(generating, "LOOK", 3)
    given = dict(max_new_tokens=7, temperature=1.0, seed=2, teacher=teacher, **options)
    free = generate_with_log_probs(model, PROMPTS, **given)[0]
    stops = {row[2] for row in free[:(len(free) + 1) // 2]}                     # half of the rows end early
    assert not on_played_gpu
    with played():
        model, given["teacher"] = small(3, **shape).bfloat16().eval().to("cuda"), teacher.to("cuda")
        answers, logps = generate_with_log_probs(model, PROMPTS, eos_ids=stops, **given)
    assert set(on_played_gpu) == {"attend_64"} and len(on_played_gpu) >= 6
    assert min(map(len, answers)) <= 3 and max(map(len, answers)) == 7
    model, teacher = (small(seed, **shape).bfloat16().eval() for seed in (3, 4))
    for i, (answer, drawn) in enumerate(zip(answers, logps)):
        prompt = PROMPTS[i * len(PROMPTS) // len(answers)]
        with torch.inference_mode():
            read = [each(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].double().softmax(-1)
                    for each in (model, teacher)]
        probs = 0.6 * read[0] + 0.4 * read[1] if "mix" in options else read[0]
        right = probs.gather(1, torch.tensor(answer)[:, None])[:, 0].log()
        assert (right - torch.tensor(drawn)).abs().max() < 0.1, i


def test_generate_by_the_kernel_gives_the_plain_path_s_tokens(on_played_gpu):
    shape = SHAPE | dict(initializer_range=0.5)
    model = small(39, **shape).bfloat16().eval()
    plain = generate(model, PROMPTS, 6, graphs=True)
    for prompt, answer in zip(PROMPTS, plain):
        with torch.inference_mode():
            best = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].float().topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 0.2                            # no near-tie that rounding could change
    with played():
        assert generate(small(39, **shape).bfloat16().eval().to("cuda"), PROMPTS, 6) == plain
    assert len(on_played_gpu) == 2 * 6                                          # once more: this GPU computes while it records


def test_make_parts_refuses_what_the_kernel_does_not_support(on_played_gpu, monkeypatch):
    def made(shape=(2, 1, 64, 64), heads=7, dtype=torch.bfloat16):
        parts = make_parts(torch.empty(shape, dtype=dtype, device="cuda"), heads)
        return None if parts is None else tuple(parts.shape)

    assert make_parts(torch.empty(2, 1, 64, 64).bfloat16(), 7) is None          # on a CPU
    with played():
        assert made() == (2, 1, HEADS * 66 + 1) and made((1, 2, 640, 128), 16) == (2, 1, HEADS * 130 + 1)
        assert made(dtype=torch.float32) is made((2, 1, 64, 32)) is made((2, 1, 60, 64)) is made(heads=9) is None
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(
            multi_processor_count=132, shared_memory_per_block_optin=227 << 10))
        assert [made((B, 2, 4096, 64))[1] for B in (1, 8, 16, 64, 200)] == [8, 8, 4, 1, 1] and made((1, 2, 1020, 64)) is None
        monkeypatch.setattr(attend_cuda, "available", lambda index: False)
        assert made() is None


@pytest.mark.slow
def test_the_operator_writes_what_it_declares_and_can_be_traced(on_cpu):
    given = case(1, 4, 2, 64, 40, 17)
    torch.library.opcheck(torch.ops.minikd.attend.default, tuple(x.nan_to_num(0.0) for x in given),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_the_sizes_are_those_of_attend_cu():
    source = SOURCES[0].with_name("attend.cu").read_text()
    assert f"HEADS = {HEADS}, CHUNK = 16, FEWEST = {FEWEST};" in source and "WARPS = 1024 / E, THREADS = 32 * WARPS;" in source
    assert f"sizeof(Shared<128>) == {SHARED}," in source
