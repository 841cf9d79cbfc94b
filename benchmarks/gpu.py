"""Everything that needs a GPU, in one run: compiles the kernels, checks and times them, and times what uses them.

    python -m benchmarks.gpu --without compiled         # on an H200 7 to 9 minutes, most of them decoding and GPTQ of 3B
    python -m benchmarks.gpu --only check kernel matmul # some sections: these take a minute
    python -m benchmarks.gpu --device cpu --tiny        # small shapes: only shows that the script runs

Targets (one H200, random weights in Qwen2.5's shapes, peers in the same run; what was reached: results/gpu.txt):
    check     sampling from graphs (with attend.cu, fused.cu) and by one kernel, GPTQ's columns, a step's loss and gradients,
              also by loss.cu, from graphs and compiled, agree with the plain path; adamw.cu's step with torch's in float64
    kernel    relative error under 1e-2 on every shape and batch; outputs are filled with nan beforehand
    loss      the losses' kernels (loss.cu): at least as exact as torch's float32; 80% of the copy bandwidth
    step      a token by one kernel (decode.cu): as exact as the plain step; how long it takes without weights to read
    matmul    layers of 20 MB and more: 70% of the copy bandwidth at batch 1, 3 x bfloat16 cuBLAS, not slower than torch's
              int4 at batches 1 to 16; weights take turns, more of them than the L2 cache holds
    decoding  batch 1: 60 / 70 / 75% of the copy bandwidth at 0.5B / 1.5B / 3B in bfloat16, 5 x transformers; 4 bits 1.6 x
              / 2.3 x ours in bfloat16 at 0.5B / 3B
    sampling  64 rows x 512 tokens, 0.5B: 8 x transformers
    kd        3B teacher, 0.5B student, 8 x 512, forward KL: 2 x transformers with full logits at half its memory, 45% of
              the matrix units' rate; from the cached teacher's states 2 x the live one. (In a row: without waiting for each
              step. If that takes longer than the kernels, the host cannot launch them fast enough)
    gptq      128 x 2,048 tokens: 60 s (0.5B), 4 minutes (3B), within 1.3 x the bfloat16 model
Every time is a median; spread is (90th - 10th percentile) / median. Each row is printed when it is measured; if one fails, it
says so, and the next one runs.
"""
import gc
import subprocess
import time
import traceback
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, median
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.head_loss import trl
from benchmarks.measure import machine, make_parser
from benchmarks.shapes import SHAPES
from minikd import cuda, loss_cuda, losses, w4_cuda
from minikd.adamw_cuda import AdamW
from minikd.attend_cuda import HEADS, attend
from minikd.cache import StaticCache
from minikd.config import Qwen2Config
from minikd.data import Encoded, send
from minikd.decode_cuda import OneKernel
from minikd.fused_cuda import draw_on_gpu
from minikd.generate import generate, generate_with_log_probs, prefill, sample
from minikd.gptq import quantize_columns, quantize_model, replayed_columns
from minikd.head import compile_losses, head_loss, scored_positions
from minikd.layout import laid_out
from minikd.losses import clipped_surrogate, forward_kl, pick_divergence, reverse_kl
from minikd.model import Qwen2, mixed_precision, rope_tables, rotate
from minikd.quant import dequantize_groups, round_to_nearest, to_words
from minikd.teacher import Teacher
from minikd.training import apply_gradient, compile_blocks, make_optimizer, use_graphs
from minikd.w4 import W4Linear, to_w4

LAYERS = [(1152, 896), (896, 896), (9728, 896), (896, 4864), (128, 896), (17920, 1536), (1536, 8960), (2560, 2048),
          (22016, 2048), (2048, 11008), (37888, 3584), (3584, 18944)]         # outputs x inputs; the last of the 7B
BATCHES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33, 64, 257]
FAST = {"w4_int8_2": 2, "w4_int8_2 alone": 2, "w4_mma_8": 8, "w4_mma_8_few": 8, "w4_mma_8_few alone": 8, "w4_mma_16": 16,
        "w4_mma_16_few": 16, "w4_mma_32": 32, "w4_mma_64": 64}                                  # the most rows of x
TEACHER, TOKENS = "3B", 512
WITHOUT = []                                        # --without
L2 = 64 << 20                                       # above the caches of an H200, 60 MB, and of an H100, 50 MB


class Table:
    """Prints each row at once, so that a run that is stopped has printed all that it measured."""

    def __init__(self, *header: str):
        self.widths = [max(34, len(header[0])), *(max(9, len(name)) for name in header[1:])]
        self.row(*header)

    def row(self, *cells):
        first, *others = map(str, cells)
        print("  ".join([first.ljust(self.widths[0]), *(cell.rjust(width) for cell, width in zip(others, self.widths[1:]))]),
              flush=True)


@contextmanager
def attempt(what: str):
    """Prints an exception and continues: a row that cannot be measured must not stop the others."""
    try:
        yield
    except Exception:
        print(f"{what}: FAILED", flush=True)
        traceback.print_exc(limit=-3)


def spread(values) -> str:
    ranked = sorted(values)
    return f"{(ranked[int(0.9 * (len(ranked) - 1))] - ranked[int(0.1 * (len(ranked) - 1))]) / median(values):.0%}"


def seconds_of(run, repeats: int, device: str, warm: int = 2) -> list[float]:
    """Times each call by itself, on a GPU by events."""
    found = []
    for i in range(warm + repeats):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return found[warm:]


def rotating(calls: list, device: str) -> list[float]:
    """Seconds per call. The calls take turns, so that none finds its weights in the L2; on a GPU one graph replays them all."""
    for call in calls:
        call()
    if device != "cuda":
        return [value / len(calls) for value in seconds_of(lambda: [call() for call in calls], 2, device, warm=0)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return [value / len(calls) for value in seconds_of(graph.replay, 30, device)]


def wanted(*kinds: str) -> list[str]:
    """The rows that --without leaves."""
    return [kind for kind in kinds if not any(word in kind for word in WITHOUT)]


def make(config: Qwen2Config, device: str, dtype=torch.bfloat16, seed=0) -> Qwen2:
    with torch.device(device):
        return Qwen2(config).to(dtype).init_weights(seed).eval()


def four_bits(model: Qwen2) -> Qwen2:
    return to_w4(model, quantize_model(model, [], 0, method="rtn", store=to_words), 128, True)


def theirs(config: Qwen2Config, device: str, dtype=torch.bfloat16):
    """A model of the same shape in transformers."""
    import transformers
    transformers.logging.set_verbosity_error()
    raw = config.to_dict(dtype)
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**raw)).to(dtype).eval()
    model.generation_config.update(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return model


def fresh(device: str):
    """Frees what was measured before, and restarts the peak."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def begin(kind: str, device: str):
    """Starts a section or a row afresh; for transformers, with cuDNN's attention, which minikd turns off for the process."""
    torch.backends.cuda.enable_cudnn_sdp(kind.startswith("transformers"))
    if kind.endswith(("compile", "compiled")):
        torch.compiler.reset()                      # another row's compiled graphs must not fill the limit
    fresh(device)


def peak_gb(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")


def graphs_gb(device: str) -> float:
    """What training's graphs hold beside the tensors that are alive: their pool of memory."""
    pools = torch.cuda.memory_snapshot() if device == "cuda" else []
    return sum(segment["total_size"] for segment in pools if tuple(segment["segment_pool_id"]) != (0, 0)) / 1e9


# ---- sections; each takes the device, whether shapes are tiny, and `limits`, the bandwidth and FLOP/s that the machine reaches

def driver() -> str:
    """The driver's version, which torch does not know."""
    try:
        return "driver " + subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                          capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "driver unknown: no nvidia-smi"


def measure_machine(device, tiny, limits):
    if device == "cuda":
        print(f"{torch.cuda.get_device_name()}, {driver()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    size, n = (1 << 20, 64) if tiny else (4 << 30, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = seconds_of(lambda: target.copy_(source), 10, device)
    limits["bandwidth"] = 2 * size / median(times)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = seconds_of(lambda: a @ b, 10, device)
    limits["flops"] = 2 * n**3 / median(flops)
    print(f"copy {limits['bandwidth'] / 1e12:.2f} TB/s (read and written, spread {spread(times)}); bfloat16 product "
          f"{limits['flops'] / 1e12:.0f} TFLOP/s (spread {spread(flops)})")


def packed_layer(N: int, K: int, device: str, sym=True, group=128, seed=0):
    """A layer rounded to nearest, as `repack` gives it, and the weight that its codes stand for."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(N, K, device=device, generator=generator) * 0.02
    parts = round_to_nearest(weight, group_size=group, sym=sym)
    return w4_cuda.repack(*parts), dequantize_groups(*parts)


def launch(name: str, x, packed, bias, y, group=128) -> bool:
    """Launches one kernel, "NAME alone" without overlap; False if it needs more shared memory than there is."""
    (M, K), N, (name, *alone), gpu = x.shape, y.shape[1], name.split(), w4_cuda.gpu_of(x.device)
    fits = w4_cuda.launch_shape(name, M, N, K, group, packed[2] is not None, gpu)[2] <= gpu.shared
    if fits:
        w4_cuda.run(name, *packed, x, bias, y, group, overlap=not alone)
    return fits


def check_kernel(device, tiny, limits):
    if device != "cuda":
        return print("the kernel needs a GPU; tests/test_w4_cuda.py runs it on a CPU")
    for compiler in cuda.nvrtc, cuda.nvcc:
        start = time.perf_counter()
        try:
            size = len(compiler(cuda.program(), "sm_%d%d" % torch.cuda.get_device_capability()))
            print(f"{compiler.__name__}: {size:,} bytes in {time.perf_counter() - start:.1f} s")
        except cuda.Unavailable as reason:
            print(f"{compiler.__name__}: {reason}")
    worst, count = {}, 0
    for N, K in LAYERS:
        for sym, group in ((True, 128), (False, 128), (True, 64), (True, 32), (True, K)):
            packed, weight = packed_layer(N, K, device, sym, group, seed=N + group)
            exact = weight.double()
            for M in BATCHES if group == 128 else (1, 5, 64):
                x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
                bias = torch.randn(N, device=device, dtype=torch.bfloat16)
                expected = x.double() @ exact.T + bias.double()
                found = {"operator": torch.ops.minikd.w4_matmul(x, *packed, bias, N, group)}
                for name, most in {"w4_naive": 4, **FAST}.items():
                    y = torch.full((M, N), torch.nan, device=device, dtype=torch.bfloat16)
                    if M <= most and launch(name, x, packed, bias, y, group):
                        found[name] = y
                for name, y in found.items():
                    error = float((y.double() - expected).norm() / expected.norm())
                    count += 1
                    if not error <= worst.get(name, (0.0,))[0]:
                        worst[name] = error, f"{N} x {K}, g {group}, batch {M}"
            del exact
    table = Table("kernel", "worst relative error", "where")
    for name, (error, where) in worst.items():
        table.row(name, f"{error:.2e}" + ("" if error < 1e-2 else " TOO LARGE"), where)
    print(f"{count} products against float64")


def check_loss(device, tiny, limits):
    if device != "cuda":
        return print("loss.cu needs a GPU; tests/test_loss_cuda.py runs it on a CPU")
    (n, few), V = (4, 2) if tiny else (768, 32), SHAPES["0.5B"].vocab_size
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda scale: scale * torch.randn(n, V, device=device, generator=generator)
    kept = draw(3.0)
    soft, targets = (kept + draw(0.3)).bfloat16(), torch.randint(V, (n,), device=device, generator=generator)
    kept = kept.bfloat16()
    slopes = [torch.full((n,), 0.5, device=device) for _ in range(2)]
    table = Table(f"{n} tokens, {V:,} logits each", "error", "torch's", "gradient's", "us, costs", "of the copy's",
                  "us, gradient", "of the copy's")

    def timed(run, passes):                         # over bfloat16 logits [n, V]
        seconds = median(seconds_of(run, 20, device))
        return f"{seconds * 1e6:.0f}", f"{2 * passes * n * V / seconds / limits['bandwidth']:.0%}"

    def measure(name, divergence, T, passes):
        options = dict(temperature=T) if name in ("forward", "reverse") else {}
        run = lambda: loss_cuda.costs(name, T, kept, targets, soft)
        ce, kd, rows = run()
        exact = kept[:few].double().requires_grad_()
        right = divergence(exact, soft[:few].double(), **options)
        plain = divergence(kept[:few], soft[:few], **options)
        error, torchs = (float((x[:few].double() - right.detach()).abs().max()) for x in (kd, plain))
        right_ce = F.cross_entropy(exact, targets[:few], reduction="none")
        good = error < 2 * torchs + 1e-6 and (ce[:few] - right_ce).abs().max() < 1e-5
        cells = ["", *timed(run, passes)]
        if name != "entropy":
            work = kept.clone()
            backward = lambda: loss_cuda.gradient_(name, T, work, targets, soft, rows, *slopes)
            backward()
            slope = torch.autograd.grad(0.5 * (right_ce + right).sum(), exact)[0]
            off = float((work[:few] - slope).norm() / slope.norm())
            cells, good = [f"{off:.1e}", *cells[1:], *timed(backward, passes + 1)], good and off < 4e-3
        table.row(f"{name}, temperature {T:g}", f"{error:.1e}", f"{torchs:.1e}", *cells, *[] if good else ["TOO LARGE"])

    for name, divergence, T, passes in (
            ("forward", forward_kl, 1.0, 2), ("reverse", reverse_kl, 1.0, 2), ("forward", forward_kl, 2.0, 2),
            ("reverse", reverse_kl, 0.5, 2), ("ce", losses.no_divergence, 1.0, 1), ("entropy", losses.entropy, 1.0, 1)):
        with attempt(name):
            measure(name, divergence, T, passes)


def check_step(device, tiny, limits):
    if device != "cuda":
        return print("decode.cu needs a GPU; tests/test_decode_cuda.py runs it on a CPU")
    narrow = replace(SHAPES["0.5B"], hidden_size=256, intermediate_size=256, num_attention_heads=4, vocab_size=1000)
    table = Table("one token, 128 before it", "error", "plain's", "us a step", "of the copy's", "spread")

    def measure(name, config, bits):
        model = make(config, device)
        if bits == 4:
            model = four_bits(model)
        dense = {name: weight for name, weight in model.state_dict().items()
                 if weight.is_floating_point() and "scales" not in name}
        dense |= {f"{name}.weight": layer.weight() for name, layer in model.named_modules() if isinstance(layer, W4Linear)}
        exact = make(config, device, torch.float32)
        exact.load_state_dict(dense)
        with torch.inference_mode(), laid_out(model, rows=1, steps=256):
            caches = [StaticCache(prefill(reader, [list(range(128))], 256, 1)[0]) for reader in (exact, model, model)]
            kernel, token = OneKernel(model, caches[2]), torch.tensor([[7]], device=device)
            right, plain, one = (reader.hidden(token, cache).double() for reader, cache in zip((exact, model, kernel), caches))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kernel.hidden(token, caches[2])
            times = seconds_of(graph.replay, 100, device)               # the cache has room for 255
        moved = bytes_of_a_step(model) - model.head.nbytes
        table.row(name, *(f"{float((found - right).norm() / right.norm()):.2e}" for found in (one, plain)),
                  f"{median(times) * 1e6:.1f}", f"{moved / median(times) / limits['bandwidth']:.0%}", spread(times))

    for bits in 16, 4:
        for name, config in {f"{narrow.num_hidden_layers} narrow layers": narrow, **SHAPES}.items():
            with attempt(f"{name}, {bits} bits"):
                measure(f"{name}, {bits} bits", config, bits)
            fresh(device)
    print(f"narrow layers have almost no weights: what remains are {5 * narrow.num_hidden_layers} waits for other blocks' words")


# ---- parts of the section `check`, each for a row of its table or several

def check_sampling(table, kind, model, asked, new, most, **options):
    """Compares the log-probabilities that tokens were drawn with to those that the whole texts, read at once, give them."""
    stops = {row[new // 3] for row in generate(model, asked, new, temperature=1.0, seed=3, **options)}      # some end early
    answers, logps = generate_with_log_probs(model, asked, new, 1.0, eos_ids=stops, seed=3, graphs=True,
                                             one_kernel="one kernel" in kind, **options)
    worst = 0.0
    for i, (answer, drawn) in enumerate(zip(answers, logps)):
        prompt = asked[i * len(asked) // len(answers)]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer], device=model.head.device))[0, len(prompt) - 1:-1]
        read = logits.float().log_softmax(-1).gather(1, torch.tensor(answer, device=model.head.device)[:, None])[:, 0]
        worst = max(worst, float((read - torch.tensor(drawn, device=model.head.device)).abs().max()))
    table.row(kind, f"{worst:.1e} nats off", "" if worst < most else "TOO LARGE")


def check_columns(table, n, device):
    """GPTQ's inner loop over n columns, from a graph and without."""
    W = torch.randn(n, 896, device=device)
    scale, zero = torch.full_like(W, 0.2), torch.full_like(W, 8.0)
    U = torch.randn(n, n, device=device).triu() * 0.1 + torch.eye(n, device=device)
    solve = replayed_columns(*W.shape, 4, torch.device(device))
    pairs = [(solve(W * k, U, scale, zero), quantize_columns(W * k, U, scale, zero, 4)) for k in (1.0, 0.5, 2.0)]
    same = all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair))
    table.row("GPTQ's columns, recorded and replayed", "equal" if same else "NOT EQUAL", "")


def check_gradients(table, config, generator, device):
    """A step's on the device, against the CPU's."""
    ids, mask = torch.randint(1000, (2, 24), generator=generator), torch.arange(24).expand(2, -1) >= 8

    def step(place):
        student, teacher = (make(config, "cpu", torch.float32, seed).to(place) for seed in (0, 1))
        batch = ids.to(place), mask
        hidden, targets = scored_positions(student.train().hidden(batch[0]), *batch)
        soft = scored_positions(teacher.hidden(batch[0]), *batch)[0].detach()
        loss = head_loss(hidden, student.head, targets, soft, teacher.head.detach(), forward_kl, 0.5, 0.1)[0]
        loss.backward()
        return float(loss.detach()), [parameter.grad.cpu().double() for parameter in student.parameters()]

    (loss, grads), (right, exact) = step(device), step("cpu")
    off, whole = (sum(float(x.square().sum()) for x in part) ** 0.5
                  for part in ([a - b for a, b in zip(grads, exact)], exact))
    table.row("a KD step's loss and gradients", f"{abs(loss / right - 1):.1e}, {off / whole:.1e}",
              "" if off < 1e-3 * whole else "TOO LARGE")


def check_passes(table, config, device, dtype, most, *ways):
    """Gradients of batches of several shapes, added up, through torch.compile (compile_blocks) or graphs (use_graphs), or both,
    against the plain path."""
    def gradients(*ways):
        model = make(config, device, torch.float32).train()
        if use_graphs in ways:
            use_graphs(model, dtype)
        if compile_blocks in ways:
            compile_blocks(model)
        for B, T in (3, 40), (2, 64), (2, 72), (3, 40):
            weight = torch.randn(B, T, config.hidden_size, generator=torch.Generator().manual_seed(T)).to(device)
            with mixed_precision(model.head.device, dtype): # weighted: the mean square after the last norm is always 1
                (weight * model.hidden(torch.arange(B * T, device=device).view(B, T))).sum().backward()
        if model.model.graphs:
            model.model.graphs.settle()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()            # reset() leaves them: graph breaks of other rows are not this one's
    ours, right = gradients(*ways), gradients()
    off, breaks = float((ours - right).norm() / right.norm()), dict(torch._dynamo.utils.counters["graph_break"])
    names = " and ".join({use_graphs: "graphs", compile_blocks: "compiled blocks"}[way] for way in ways)
    table.row(f"{names}, {dtype}", f"{off:.1e}",
              "TOO LARGE" if not off < most else f"NOT COMPILED WHOLE: {breaks}" if breaks else "")


def check_optimizer(table, device):
    """Five steps of AdamW.clip_and_step, gradients in both dtypes, one weight with a copy as graphs have it, against torch's in
    float64."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)
    weights = [torch.nn.Parameter(draw(*shape)) for shape in ((300, 896), (5, 4), (4868, 64))]
    exact = [torch.nn.Parameter(weight.detach().double()) for weight in weights]
    groups = lambda held: [{"params": held[:2], "weight_decay": 0.1}, {"params": held[2:], "weight_decay": 0.0}]
    ours, theirs = (kind(groups(held), lr=0.1, betas=(0.9, 0.95))
                    for kind, held in ((AdamW, weights), (torch.optim.AdamW, exact)))
    copies, worst = {weights[0]: weights[0].detach().bfloat16()}, 0.0
    start = [weight.detach().clone() for weight in exact]
    for _ in range(5):
        gradients = {weights[0]: draw(300, 896).bfloat16(), weights[1]: draw(5, 4), weights[2]: draw(4868, 64)}
        for weight, right in zip(weights, exact):
            right.grad = gradients[weight].double()
        norm = ours.clip_and_step(2.0, gradients, copies)
        worst = max(worst, abs(float(norm / torch.nn.utils.clip_grad_norm_(exact, 2.0)) - 1))
        theirs.step()
    off = max(float((weight - right).detach().norm() / (right - begun).detach().norm())
              for weight, right, begun in zip(weights, exact, start))
    same = torch.equal(copies[weights[0]], weights[0].detach().bfloat16())
    table.row("adamw.cu: the norm; five steps", f"{worst:.1e}, {off:.1e}", "" if same and max(worst, off) < 1e-5 else "WRONG")


def check_loss_kernels(table, generator, device):
    """A step's loss and gradients in bfloat16 by loss.cu against those by torch's operators, on the same device."""
    N, student, teacher = 300, SHAPES["0.5B"], SHAPES[TEACHER]
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(device)
    states, soft, old, advantage = normal(N, student.hidden_size), normal(N, teacher.hidden_size), normal(N) - 15, normal(N)
    heads = [normal(shape.vocab_size, shape.hidden_size) * 2 / shape.hidden_size ** 0.5 for shape in (student, teacher)]
    targets = torch.randint(student.vocab_size, (N,), generator=generator).to(device)
    surrogate = lambda logq, at: clipped_surrogate(logq, old[at], advantage[at], clip=10.0)

    def step(divergence, ratio, policy):
        leaves = [x.clone().requires_grad_() for x in (states, heads[0])]
        with torch.autocast(device, torch.bfloat16):
            loss, ce, kd = head_loss(*leaves, targets, soft, heads[1].bfloat16(), divergence, ratio, 1 / N, policy,
                                     chunk_bytes=2 * 128 * student.vocab_size)      # two chunks of 128 and a part
        loss.backward()
        return [x.detach().double() for x in (ce, kd, leaves[0].grad, leaves[1].grad)]

    for kind, *options in (("forward KL, CE", forward_kl, 0.5, None), ("reverse KL, policy", reverse_kl, 1.0, surrogate),
                           ("temperature 2", pick_divergence("reverse_kl", temperature=2.0), 1.0, None),
                           ("SFT", None, 0.0, None), ("entropy, policy", losses.entropy, 0.0, surrogate)):
        with mock.patch.object(loss_cuda, "launch", wraps=loss_cuda.launch) as launched:
            ours = step(*options)
        with mock.patch.object(loss_cuda, "can_run", return_value=False):
            plain = step(*options)
        ce, kd, states_off, head_off = (float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(ours, plain))
        used = "" if launched.called or device != "cuda" else "loss.cu NOT USED"
        table.row(f"loss.cu, {kind}", f"{max(ce, kd):.1e}, {states_off:.1e}, {head_off:.1e}",
                  used or ("" if max(ce, kd) < 1e-4 and max(states_off, head_off) < 1e-2 else "TOO LARGE"))


def check_drawing(table, device):
    """Tokens by the kernels against generate.sample's: rows of equal logits, with -inf, with NaN."""
    u = torch.rand(2, 7, dtype=torch.float64, device=device)
    at, tokens = (torch.zeros_like(u[0]).long() for _ in range(2))
    logits = (torch.randn(7, 40_008, device=device) * 3).bfloat16()[:, :40_003]
    logits[2] = logits[2].max() - logits[2].clamp(min=0)
    logits[3], logits[3, -1], logits[6, 5] = -torch.inf, -3.0, torch.nan
    for temperature in 0.0, 1.0:
        drawn, logps = torch.zeros_like(u).long(), torch.zeros_like(u)
        draw_on_gpu(logits, u, at.zero_(), tokens, drawn, logps, temperature)
        right, its = sample(logits, temperature, 1.0, 0, u[1])
        same = torch.equal(tokens[:6], right[:6]) and torch.equal(drawn[1], tokens) and bool(at.eq(1).all())
        off = float((logps[1] - its)[:6].abs().max())
        good = same and off < 1e-4 and bool(logps[1, 6].isnan() & drawn[0].eq(0).all())
        table.row(f"draws at temperature {temperature:.0f}", f"{off:.1e} nats off", "" if good else "WRONG")


def attention_errors(config: Qwen2Config, length: int, splits: int, device: str) -> tuple[float, float, bool]:
    """attend.cu's relative error and the plain path's, against float64, and whether the cache's new slot is right bit for bit."""
    B, H, K, E, S = 3, config.num_attention_heads, config.num_key_value_heads, config.head_dim, length + 15 & ~7
    qkv, keys, values = (torch.randn(*shape, device=device).bfloat16()
                         for shape in ((B, 1, (H + 2 * K) * E), (B, K, S, E), (B, K, S, E)))
    cos, sin = rope_tables(torch.randint(4000, (B, 1), device=device), 1e6, E, torch.bfloat16)
    seen = (torch.rand(B, S, device=device) < 0.8) & (torch.arange(S, device=device) < length)
    seen[:, length - 1] = True                      # the new one
    bias = torch.zeros(B, S, device=device).masked_fill(~seen, -torch.inf)[:, None, None].bfloat16()
    parts, slot = torch.zeros(B * K, splits, HEADS * (E + 2) + 1, device=device), torch.tensor([length - 1], device=device)
    for _ in range(2):                              # the second one finds the counters as the first one left them
        y = attend(qkv, cos, sin, keys, values, slot, bias, parts)
    heads = qkv.view(B, -1, 1, E)
    q, k, v = rotate(heads[:, :H], cos, sin), rotate(heads[:, H:-K], cos, sin), heads[:, -K:]
    same = torch.equal(keys[:, :, length - 1:length], k) and torch.equal(values[:, :, length - 1:length], v)
    exact, plain = (F.scaled_dot_product_attention(q.to(dtype).reshape(B, K, -1, E), keys.to(dtype), values.to(dtype),
                                                   attn_mask=bias.to(dtype)).reshape(B, 1, -1)
                    for dtype in (torch.float64, torch.bfloat16))
    return *(float((found - exact).norm() / exact.norm()) for found in (y, plain)), same


def check_results(device, tiny, limits):
    """What is timed below, against the plain path: sampling and GPTQ's columns from graphs, one kernel, a step's gradients."""
    # Weights larger than usual: with 0.02 every next token is as likely, or the last one again, whatever the cache holds.
    config, new = replace(SHAPES["0.5B"], num_hidden_layers=2 if tiny else 4, initializer_range=0.1), 20 if tiny else 40
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, (length,), generator=generator).tolist() for length in ((5, 9) if tiny else (5, 28, 17, 1))]
    table = Table("check", "result", "")
    with attempt("sampling"):
        check_sampling(table, "samples, float32", make(config, device, torch.float32), prompts, new, 1e-3, samples=2)
        check_sampling(table, "samples, bfloat16 (attend.cu)", make(config, device), prompts, new, 1.0, samples=2)
    if device == "cuda" and cuda.available(torch.cuda.current_device()):
        with attempt("draws"), torch.inference_mode():
            check_drawing(table, device)
        for shape, length, splits in (("0.5B", 1, 1), ("0.5B", 576, 1), ("1.5B", 77, 1), ("3B", 300, 1), ("3B", 2000, 3)):
            with attempt(f"attention, {shape}"):
                ours, plain, same = attention_errors(SHAPES[shape], length, splits, device)
                table.row(f"attend.cu, {shape}, {length:,} slots, {splits} blocks", f"{ours:.1e}, {plain:.1e}",
                          "" if same and ours < 1.5 * plain + 1e-3 else "TOO LARGE")
    for bits in 16, 4:
        with attempt(f"one kernel, {bits} bits"):
            model = make(config, device)
            model = model if bits == 16 else four_bits(model)
            check_sampling(table, f"a sample by one kernel, {bits} bits", model, prompts[1:2], new, 1.0)
    if device == "cuda":
        with attempt("columns"):
            check_columns(table, 32 if tiny else 128, device)
    with attempt("gradients"):
        check_gradients(table, config, generator, device)
    ways = [(torch.bfloat16, use_graphs)] if device == "cuda" else []
    if wanted("compiled") and not tiny:
        ways += [(torch.float32, compile_blocks), (torch.bfloat16, compile_blocks), (torch.bfloat16, use_graphs, compile_blocks)]
    for dtype, *names in ways:
        with attempt("passes"):
            check_passes(table, config, device, dtype, 1e-4 if dtype == torch.float32 else 0.1, *names)
    if device == "cuda" and cuda.available(torch.cuda.current_device()):
        with attempt("adamw.cu"):
            check_optimizer(table, device)
    with attempt("loss.cu"):
        check_loss_kernels(table, generator, device)
    if device == "cuda":
        try:                                        # as head._add_product does, which multiplies and then adds if this fails
            total, ones = torch.ones(64, 64, device=device), torch.ones(64, 64, device=device, dtype=torch.bfloat16)
            torch.addmm(total, ones.T, ones, out_dtype=total.dtype, out=total)
            table.row("a product added in float32", "one kernel", "" if total.eq(65).all() else "WRONG")
        except RuntimeError as reason:
            table.row("a product added in float32", "NOT AVAILABLE", str(reason).split("\n")[0][:90])


def time_matmul(device, tiny, limits):
    shapes = [(256, 256)] if tiny else [(N, K) for N, K in LAYERS if N * K >= 1_000_000]
    table = Table("layer", "operator us", "of copy", "cuBLAS", "torch int4", "spread", "each kernel us")
    for N, K in shapes:
        copies = 1 if tiny else max(2, 3 * L2 // (N * K // 2) + 1)
        packed = [packed_layer(N, K, device, seed=i)[0] for i in range(copies)]
        dense = [torch.randn(N, K, device=device, dtype=torch.bfloat16) for _ in range(copies)]
        peer = torch_int4(N, K, device, copies)
        for M in [1, 4] if tiny else [1, 2, 3, 4, 8, 16, 32, 64, 128, 257]:
            x = torch.randn(M, K, device=device, dtype=torch.bfloat16)
            calls = {"cuBLAS": [lambda w=w: F.linear(x, w) for w in dense]}
            if peer:
                calls["torch int4"] = [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w[0], 128, w[1]) for w in peer]
            if device == "cuda":
                calls["operator"] = [lambda p=p: torch.ops.minikd.w4_matmul(x, *p, None, N, 128) for p in packed]
                y = torch.empty(M, N, device=device, dtype=torch.bfloat16)
                for name, most in FAST.items():
                    if (most / 4 < M or most <= 8) and M <= most and launch(name, x, packed[0], None, y):
                        calls[name] = [lambda p=p, name=name: launch(name, x, p, None, y) for p in packed]
            times = {}
            for name, call in calls.items():
                with attempt(f"{name}, {N} x {K}, batch {M}"):
                    times[name] = rotating(call, device)
            ours = median(times.get("operator", times["cuBLAS"]))
            moved = packed[0][0].nbytes + packed[0][1].nbytes + 2 * M * (N + K)
            table.row(f"{N} x {K}, batch {M}", f"{ours * 1e6:.1f}", f"{moved / ours / limits['bandwidth']:.0%}",
                      *(f"{median(times[name]) / ours:.2f}x" if name in times else "-" for name in ("cuBLAS", "torch int4")),
                      spread(times.get("operator", times["cuBLAS"])),
                      ", ".join(f"{name.removeprefix('w4_')} {median(value) * 1e6:.1f}" for name, value in times.items()
                                if name.startswith("w4_")))
        del packed, dense, peer
        fresh(device)


def torch_int4(N: int, K: int, device: str, copies: int):
    """Weights for torch's own int4 product on a GPU; None if it does not support them."""
    try:
        made = []
        for _ in range(copies):
            codes = torch.randint(256, (N, K // 2), device=device, dtype=torch.uint8)
            scales_zeros = torch.rand(K // 128, N, 2, device=device).bfloat16()
            made.append((torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales_zeros))
        torch.ops.aten._weight_int4pack_mm(torch.zeros(1, K, device=device, dtype=torch.bfloat16), made[0][0], 128, made[0][1])
        return made
    except (RuntimeError, NotImplementedError):
        return None


def time_decoding(device, tiny, limits):
    new, speeds = 20 if tiny else 256, {}
    prompt = torch.randint(1000, (28,), generator=torch.Generator().manual_seed(0)).tolist()
    table = Table("batch 1", "tokens/s a step", "whole call", "of the copy's", "of its bf16", "spread", "peak GB")

    def measure(name, kind):
        peer = kind == "transformers"
        model, run = writer(kind, SHAPES[name], device, prompt)
        long = new // 2 if peer else new if tiny or "one" not in kind else 2 * new              # fast steps need more of them
        run(long), run(long // 2)
        # Prefill, capturing the graph and the first steps take the same time in both: the difference is the steps' time.
        whole, half = ([time_once(run, n, device) for _ in range(1 if tiny else 2 if peer else 4)] for n in (long, long // 2))
        speed = speeds[name, kind] = (long - long // 2) / (median(whole) - median(half))
        share = "-" if peer else f"{bytes_of_a_step(model) * speed / limits['bandwidth']:.0%}"
        base = speeds.get((name, kind.replace("w4", "bf16") if "w4" in kind else "bf16"), float("nan"))
        table.row(f"{name} {kind}", f"{speed:,.0f}", f"{long / median(whole):,.0f}", share, f"{speed / base:.2f}x", spread(whole),
                  f"{peak_gb(device):.2f}")

    # By kinds, so that a trap of the one kernel or a timeout while compiling costs only what comes after.
    for kind in wanted("bf16", "w4", "transformers", "bf16 one kernel", "w4 one kernel", "bf16 compiled", "w4 compiled"):
        for name in list(SHAPES)[:1] if tiny else SHAPES:
            if not (tiny and "compiled" in kind):   # compiling takes longer than all the rest
                begin(kind, device)
                with attempt(f"{name} {kind}"):
                    measure(name, kind)


def time_once(run, count: int, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run(count)
    wait()
    return time.perf_counter() - start


def writer(kind: str, config: Qwen2Config, device: str, prompt: list[int], rows: int = 1):
    """-> a model of the kind, and a function that continues the prompt by n tokens: greedily, or in several samples."""
    if kind == "transformers":
        model, ids = theirs(config, device), torch.tensor([prompt] * rows, device=device)
        run = torch.inference_mode()(lambda n: model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=rows > 1, top_k=0, max_new_tokens=n, min_new_tokens=n))
    else:
        model = make(config, device)
        if kind.startswith("w4"):
            model = four_bits(model)
        if kind.endswith("compiled"):
            compile_blocks(model)
        run = lambda n: generate(model, [prompt], n, float(rows > 1), seed=0, samples=rows,
                                 one_kernel=kind.endswith("one kernel"))
    fresh(device)                                   # made in float32: not the peak that is asked for
    return model, run


def bytes_of_a_step(model: Qwen2) -> int:
    """Bytes of the weights that one step reads: codes and scales, or plain weights; the head, but not the embedding's row."""
    return sum(value.nbytes for key, value in model.state_dict().items() if not key.endswith(("g_idx", "qzeros")))


def time_sampling(device, tiny, limits):
    config, rows, new = SHAPES["0.5B"], 4 if tiny else 64, 20 if tiny else 512
    prompt, table = list(range(100, 164)), Table(f"{rows} rows x {new}", "tokens/s", "spread", "peak GB")

    def measure(kind):
        _, run = writer(kind, config, device, prompt, rows)
        run(20)
        times = [time_once(run, new, device) for _ in range(1 if tiny or kind == "transformers" else 3)]
        table.row(kind, f"{rows * new / median(times):,.0f}", spread(times), f"{peak_gb(device):.2f}")

    for kind in wanted(*("minikd", "transformers", "minikd compiled")[:2 if tiny else 3]):
        begin(kind, device)
        with attempt(kind):
            measure(kind)


def time_kd(device, tiny, limits):
    batch, student_shape, teacher_shape = (2, SHAPES["0.5B"], SHAPES["0.5B"]) if tiny else (8, SHAPES["0.5B"], SHAPES[TEACHER])
    length, prompt, steps = (32, 8, 2) if tiny else (TOKENS, 128, 10)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(student_shape.vocab_size, (batch, length), generator=generator).to(device)
    mask = (torch.arange(length) >= prompt).expand(batch, -1)   # on the CPU, as collate leaves it
    kept_by_peer = mask[:, 1:].to(device)
    scored, first = int(mask.sum()), []
    table = Table(f"{batch} x {length}, {scored:,} scored", "ms a step", "in a row", "speed", "padded tokens/s", "MFU of 989T",
                  "of the product", "peak GB", "loss", "spread")

    def measure(kind):
        ours = kind.startswith("minikd")
        student = make(student_shape, device, torch.float32) if ours else theirs(student_shape, device, torch.float32)
        teacher = (Teacher(make(teacher_shape, device, seed=1).requires_grad_(False)) if ours
                   else theirs(teacher_shape, device))
        optimizer = (make_optimizer(student, 1e-5, in_place=True) if ours else
                     torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True))
        student.train()
        if ours:
            use_graphs(student, torch.bfloat16)
        if kind.endswith("--compile"):
            compile_blocks(student, teacher.model)
            compile_losses()
        if kind == "transformers compiled":
            student.forward, teacher.forward = torch.compile(student.forward), torch.compile(teacher.forward)
        head, kept = teacher.head.detach() if ours else None, None
        if "cached" in kind:
            kept = teacher.states(None, ids, mask).cpu()
            head, teacher = head.clone(), None
            fresh(device)

        def body_states(model):                                 # of transformers' model, where a token is scored: [N, D]
            return model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][kept_by_peer]

        def step():
            with torch.autocast(device, torch.bfloat16):
                if ours:
                    soft = teacher.states(None, ids, mask) if teacher else send(kept, device)
                    hidden, targets = scored_positions(student.hidden(ids), ids, mask)
                    loss = head_loss(hidden, student.head, targets, soft, head, forward_kl, 1.0, 1 / len(targets))[0]
                elif kind == "trl":
                    with torch.no_grad():
                        soft = body_states(teacher)
                    loss = trl(body_states(student), student.lm_head.weight, None, soft, teacher.lm_head.weight)
                else:
                    with torch.no_grad():
                        soft = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
                    logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
                    loss = (forward_kl(logits, soft) * kept_by_peer).sum() / scored
            loss.backward()
            if ours:
                apply_gradient(student, optimizer, 1e-5, max_grad_norm=1.0)
            else:
                torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        loss = float(step())
        first_peak = peak_gb(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = seconds_of(step, steps, device)
        in_a_row = time_once(lambda count: [step() for _ in range(count)], steps, device) / steps
        flops = model_flops(student_shape, batch * length, scored, 6)
        flops += model_flops(teacher_shape, batch * length, scored, 2) if "cached" not in kind else 0
        first.append(median(times))
        table.row(kind, f"{median(times) * 1e3:.1f}", f"{in_a_row * 1e3:.1f}", f"{first[0] / median(times):.2f}x",
                  f"{batch * length / median(times):,.0f}", f"{flops / median(times) / 989e12:.0%}",
                  f"{flops / median(times) / limits['flops']:.0%}", f"{max(first_peak, peak_gb(device) + graphs_gb(device)):.2f}",
                  f"{loss:.3f}", spread(times))

    kinds = ["minikd", "minikd cached", "transformers"]
    if not tiny:                                    # trl: transformers' models, the loss of trl's DistillationTrainer
        kinds += ["trl", "minikd --compile", "minikd cached --compile", "transformers compiled"]    # compiling takes the longest
    for kind in wanted(*kinds):
        begin(kind, device)
        with attempt(kind):
            measure(kind)


def model_flops(config: Qwen2Config, tokens: int, scored: int, per: int) -> float:
    """per (2 for forward, 6 with backward) x parameters x tokens; the head only for scored tokens; without attention."""
    D, E = config.hidden_size, config.head_dim
    block = D * E * 2 * (config.num_attention_heads + config.num_key_value_heads) + 3 * D * config.intermediate_size
    return per * (config.num_hidden_layers * block * tokens + config.vocab_size * D * scored)


def time_gptq(device, tiny, limits):
    table = Table("GPTQ", "seconds", "peak GB", "of the bfloat16 model", "error, of RTN's")
    count, length = (2, 64) if tiny else (128, 2048)

    def measure(name):
        ids = torch.randint(SHAPES[name].vocab_size, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
        model, errors = make(SHAPES[name], device).to("cpu"), []
        fresh(device)
        size, start = sum(weight.nbytes for weight in model.parameters()) / 1e9, time.perf_counter()
        quantize_model(model, [Encoded(row[:1], row[1:], True, i) for i, row in enumerate(ids)], 0, store=to_words,
                       batch_size=2, device=device, on_layer=lambda _, error, rtn: errors.append(error / rtn))
        table.row(f"{name}, {count} x {length:,}", f"{time.perf_counter() - start:.0f}", f"{peak_gb(device):.2f}",
                  f"{peak_gb(device) / size:.2f}", f"{fmean(errors):.2f}")

    for name in wanted("0.5B") if tiny else wanted("0.5B", "3B"):
        with attempt(name):
            measure(name)


SECTIONS = {"machine": measure_machine, "check": check_results, "kernel": check_kernel, "matmul": time_matmul,
            "loss": check_loss, "step": check_step, "decoding": time_decoding, "sampling": time_sampling, "kd": time_kd,
            "gptq": time_gptq}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, only to see that the script runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--without", nargs="+", default=[], metavar="WORD",
                        help="leave out rows whose name contains one of these: transformers, compile, 3B, ...")
    args = parser.parse_args()
    WITHOUT[:] = args.without
    if args.tiny:
        SHAPES.update({name: replace(SHAPES["0.5B"], vocab_size=2000, hidden_size=128, intermediate_size=256, head_dim=32,
                                     num_hidden_layers=2, num_attention_heads=4) for name in SHAPES})
    limits = {"bandwidth": float("nan"), "flops": float("nan")}
    for name in dict.fromkeys(["machine", *args.only]):
        print(f"\n== {name}", flush=True)
        begin(name, args.device)
        start = time.perf_counter()
        with attempt(name):
            SECTIONS[name](args.device, args.tiny, limits)
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    print(machine("torch"))


if __name__ == "__main__":
    main()
