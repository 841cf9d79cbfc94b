"""fused.cu, run on a CPU by ptx.py, against torch's operators in float64 and against generate.sample."""
import pytest
import torch
import torch.nn.functional as F

from conftest import small
from fake_gpu import gpu as played
from minikd import attend_cuda, fused_cuda, generate as generating, layout
from minikd.cuda import launch
from minikd.fused_cuda import add_and_normalise, can_draw, can_fuse, draw_tokens, multiply_by_silu
from minikd.generate import generate_with_log_probs, sample
from ptx import places

WRITES = {"silu_up": [1], "add_norm": [3, 4], "draw": [2, 3, 4, 5], "draw_largest": [1, 2, 3, 4],
          "attend_64": [5, 6, 7, 8]}           # which tensors a kernel writes


@pytest.fixture
def on_cpu(gpu, monkeypatch) -> list:
    """Makes the operators run on the CPU -> the names of the kernels launched."""
    def launched(name, device, grid, threads, *values, **options):
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        gpu.readable = places(*(tensor for i, tensor in enumerate(tensors) if i not in WRITES[name] and tensor.is_contiguous()))
        gpu.readable += [(tensor.data_ptr(), 2 * len(tensor) * tensor.stride(0)) for tensor in tensors
                         if not tensor.is_contiguous()]                         # a vocabulary's rows, and what lies between them
        gpu.writable = places(*(tensors[i] for i in WRITES[name]))
        launch(name, device, grid, threads, *values, **options)

    for module in attend_cuda, fused_cuda:
        monkeypatch.setattr(module, "launch", launched)
    for op, function in ((attend_cuda.attend, attend_cuda.step), (fused_cuda.silu_up, multiply_by_silu),
                         (fused_cuda.add_norm, add_and_normalise), (fused_cuda.draw_on_gpu, draw_tokens)):
        op.register_kernel("cpu")(function)
    return gpu.launched


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("shape", [(3, 1, 64), (2, 4, 4880), (1, 9728)])
def test_silu_times_up(on_cpu, shape):
    gate_up = random(*shape) * 4
    gate, up = gate_up.chunk(2, -1)
    found, exact, plain = multiply_by_silu(gate_up), F.silu(gate.double()) * up.double(), F.silu(gate) * up
    assert found.shape == plain.shape and (found != plain).float().mean() < 0.01 and on_cpu == ["silu_up"]
    assert (found - exact).norm() < 1.01 * (plain - exact).norm()


@pytest.mark.parametrize("shape", [(3, 1, 8), (2, 1, 896), (2, 3, 264), (1, 8192)])
def test_sum_and_norm(on_cpu, shape):
    x, y, weight = random(*shape), random(*shape, seed=1) * 3, random(shape[-1], seed=2)
    total, normed = add_and_normalise(x, y, weight, 1e-6)
    assert torch.equal(total, x + y)
    exact = F.rms_norm(total.double(), shape[-1:], weight.double(), 1e-6)
    assert normed.shape == x.shape and (normed - exact).norm() < 3e-3 * exact.norm()


def draw(logits, u, temperature) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws the second of three tokens per row -> tokens [B], log-probabilities [B]; nothing else may be written."""
    B = len(logits)
    at, tokens, drawn = torch.zeros(B).long(), torch.full((B,), -7), torch.full((3, B), -7)
    logps = torch.full((3, B), 7.0, dtype=torch.float64)
    draw_tokens(logits, torch.stack([1 - u, u, 1 - u]), at, tokens, drawn, logps, temperature)
    assert (at == 1).all() and torch.equal(drawn[1], tokens) and (drawn[::2] == -7).all() and (logps[::2] == 7).all()
    return tokens, logps[1]


@pytest.mark.parametrize("V, wide, temperature", [
    pytest.param(151_936, 151_936, 1.0, marks=pytest.mark.slow), (4099, 4104, 0.7), (9, 16, 1.3), (4096, 4096, 1.0)])
def test_a_token_is_drawn_as_by_sample(on_cpu, V, wide, temperature):
    rows = 2 if V > 5000 else 12
    logits, u = (random(rows, wide) * 3)[:, :V], torch.linspace(0, 1 - 1e-9, rows).double()
    if rows > 2:
        logits[3], logits[4, : V // 2], logits[5, 1:] = -torch.inf, -torch.inf, -torch.inf
        logits[3, V - 1] = 2.0
    tokens, logps = draw(logits, u, temperature)
    right, its = sample(logits, temperature, 1.0, 0, u)
    assert torch.equal(tokens, right) and (logps - its).abs().max() < 1e-4, (tokens, right)
    if rows > 2:
        assert tokens[3] == V - 1 and tokens[4] >= V // 2 and tokens[5] == 0


def test_every_token_is_drawn_as_often_as_it_should(on_cpu):
    """Along u, from 0 to 1: the boundaries between tokens are the running sum of their probabilities."""
    logits = random(1, 24, seed=3).expand(64, -1).contiguous()
    u = (torch.arange(64) + 0.5).double() / 64
    tokens, _ = draw(logits, u, 1.0)
    upto = logits[0].double().softmax(-1).cumsum(0)
    assert torch.equal(tokens, torch.searchsorted(upto, u, right=True))


def test_nan_gives_some_token(on_cpu):
    for temperature in 0.0, 1.0:
        tokens, logps = draw(torch.full((2, 400), torch.nan).bfloat16(), torch.tensor([0.0, 0.9]).double(), temperature)
        assert (tokens >= 0).all() and (tokens < 400).all() and logps.isnan().all()


@pytest.mark.parametrize("V, wide", [pytest.param(151_936, 151_936, marks=pytest.mark.slow), (40_003, 40_008), (9, 16), (1, 8)])
def test_greedy_takes_the_first_of_the_largest(on_cpu, V, wide):
    """As torch's max: bfloat16 has many equal logits."""
    logits, zero = random(7, wide, seed=V) * 3, torch.zeros(7).double()
    logits[:, V:] = 100                                                         # another row's, or nothing
    logits = logits[:, :V]
    logits[2] = logits[2].max() - logits[2].clamp(min=0)                        # half of all are the largest
    logits[3], logits[3, -1], logits[4] = -torch.inf, -3.0, -torch.inf
    logits[5, V // 2] = torch.nan
    logits[6, V // 3:] = torch.inf
    tokens, logps = draw(logits, zero, 0.0)
    right, its = sample(logits, 0.0, 1.0, 0, zero)
    finite = torch.tensor([0, 1, 2, 3, 4, 6])
    assert torch.equal(tokens[finite], right[finite]) and torch.equal(logps.isnan(), its.isnan()) and 0 <= tokens[5] < V
    assert (logps[:4] == 0).all() and logps[4:].isnan().all()


def test_a_model_on_a_gpu_uses_them(on_cpu, monkeypatch):
    """Samples on a GPU that the CPU plays, with joined layers, against the log-probabilities of the whole texts."""
    for module in attend_cuda, fused_cuda:
        monkeypatch.setattr(module, "available", lambda index: True)
    monkeypatch.setattr(layout, "FEWEST_STEPS", 1)
    shape = dict(num_attention_heads=3, num_key_value_heads=1, head_dim=64, hidden_size=32)
    prompts = [[5, 6, 7], [8]]
    with played():
        model = small(3, **shape).bfloat16().eval().to("cuda")
        answers, logps = generate_with_log_probs(model, prompts, 5, 1.0, seed=2)
    assert on_cpu.count("draw") == 6 and on_cpu.count("silu_up") == on_cpu.count("add_norm") == on_cpu.count("attend_64") + 1 == 6
    model = small(3, **shape).bfloat16().eval()
    for prompt, answer, drawn in zip(prompts, answers, logps):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].float()
        assert (logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0] - torch.tensor(drawn)).abs().max() < 0.1


@pytest.mark.parametrize("temperature", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_rows_that_leave_do_not_disturb_those_that_stay(on_cpu, monkeypatch, temperature):
    monkeypatch.setattr(fused_cuda, "available", lambda index: True)
    with played():
        model = small(3).bfloat16().eval().to("cuda")
        prompts = [[5, 6], [8], [9, 3], [1]]
        answer = lambda **more: generate_with_log_probs(model, prompts, 12, temperature, seed=2, graphs=False, **more)
        with monkeypatch.context() as patch:
            patch.setattr(generating, "can_draw", lambda logits: False)
            whole, _ = answer()
            stops = {whole[0][2], whole[1][4], whole[2][8]}                     # three rows end, one after the other
            right, its = answer(eos_ids=stops)
        plain = set(on_cpu)
        answers, logps = answer(eos_ids=stops)
    assert {"draw" if temperature else "draw_largest"} == set(on_cpu) - plain and len(set(map(len, answers))) > 2
    assert answers == right and all(row == full[:len(row)] for row, full in zip(answers, whole))
    assert sum(logps, []) == pytest.approx(sum(its, []), abs=1e-4)


@pytest.mark.parametrize("options, drawing", [
    (dict(temperature=1.0, top_k=2), set()), (dict(temperature=1.0, top_p=0.5), set()),
    (dict(temperature=0.0, top_k=2, top_p=0.5), {"draw_largest"}), (dict(temperature=1e-7), {"draw_largest"}),
    (dict(temperature=1e-5), {"draw"})])
def test_top_k_and_top_p_are_torchs(on_cpu, monkeypatch, options, drawing):
    monkeypatch.setattr(fused_cuda, "available", lambda index: True)
    with played():
        generate_with_log_probs(small(3).bfloat16().eval().to("cuda"), [[5, 6]], 3, **options, seed=2, graphs=False)
    assert set(on_cpu) & {"draw", "draw_largest"} == drawing


def test_where_they_can_run(on_cpu, monkeypatch):
    x = torch.zeros(2, 64).bfloat16()
    assert not can_fuse(x) and not can_draw(x)
    monkeypatch.setattr(fused_cuda, "available", lambda index: True)
    with played():
        x = x.to("cuda")
        assert not can_fuse(x)                                                  # a gradient may be wanted
        with torch.no_grad():
            assert can_fuse(x) and not can_fuse(x.float()) and can_draw(x) and can_draw(x[:, :63])
            assert not can_draw(x[:, 1:]) and not can_draw(torch.zeros(2, 63, device="cuda").bfloat16()) and not can_draw(x[:0])
