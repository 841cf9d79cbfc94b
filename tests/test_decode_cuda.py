"""decode.cu, run on a CPU by ptx.py, against the plain decoder."""
from contextlib import contextmanager

import pytest
import torch

from benchmarks import shapes
from minikd import decode_cuda, generate as generating, layout
from minikd.cache import StaticCache
from minikd.config import Qwen2Config
from minikd.cuda import SOURCES, launch
from minikd.decode_cuda import OneKernel, block_matrices, fits
from minikd.generate import generate, prefill
from minikd.gptq import quantize_model
from minikd.model import Qwen2
from minikd.quant import to_words
from minikd.w4 import W4Linear, to_w4
from ptx import Driver, places


def make(bits: int, seed: int = 0, group: int = 128, sym: bool = True, **shape) -> Qwen2:
    """A small model in bfloat16, all weights random, its layers joined as on a GPU."""
    sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, initializer_range=0.15)
    model, generator = Qwen2(Qwen2Config(**sizes | shape)).init_weights(seed).eval(), torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data.normal_(0.0 if name.endswith("bias") else 1.0, 0.2, generator=generator)
    model = model.bfloat16().requires_grad_(False)
    if bits == 4:
        version = 1 if sym else 2
        layers = quantize_model(model, [], 0, method="rtn", group_size=group, sym=sym,
                                store=lambda *parts: to_words(*parts, version))
        model = to_w4(model, layers, group, sym)
    return joined(model)


def joined(model: Qwen2) -> Qwen2:
    layout.join_layers(model, rows=1, pack=False)
    return model


@pytest.fixture
def on_cpu(gpu, monkeypatch) -> Driver:
    """Makes decode_cuda launch on the CPU; the kernel may read weights and tables, and write the cache and its own tensors."""
    original, gpu.blocks = OneKernel.__init__, 2

    def init(one, *given):
        original(one, *given)
        one.blocks = min(gpu.blocks, one.step.I // 8)
        tables = {name: one.held[name] for name in ("layers", "cos", "sin")}
        gpu.weights = places(*tables.values(), one.body.embed_tokens.weight,
                             *(tensor for *weights, _, _ in one.weights for tensor in weights))
        gpu.writable = places(*(tensor for name, tensor in one.held.items() if name not in tables),
                              *(tensor for *_, keys, values in one.weights for tensor in (keys, values)))

    def launched(name, device, grid, threads, step, **options):
        gpu.readable = gpu.weights + [(step.token, 8)]
        launch(name, device, grid, threads, step, **options)

    monkeypatch.setattr(OneKernel, "__init__", init)
    monkeypatch.setattr(decode_cuda, "launch", launched)
    monkeypatch.setattr(decode_cuda, "can_run", lambda device: True)
    return gpu


def error_of(found, exact) -> float:
    return float((found.double() - exact).norm() / exact.norm())


ONE = dict(num_hidden_layers=1)
SHAPES = {"one head": ONE | dict(head_dim=128, num_attention_heads=1, num_key_value_heads=1),
          "wide heads": dict(head_dim=128, num_attention_heads=2, num_key_value_heads=1),
          "odd sizes": ONE | dict(hidden_size=72, intermediate_size=616, num_attention_heads=3, num_key_value_heads=1)}
SHAPES_W4 = {"small": ONE | dict(hidden_size=128, intermediate_size=256),
             "teams": ONE | dict(hidden_size=128, intermediate_size=1152, num_attention_heads=8, num_key_value_heads=1,
                                 head_dim=64),
             "zeros, groups of 256": ONE | dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, group=256,
                                                sym=False)}


@pytest.mark.parametrize("bits, shape, prompt, order, blocks", [
    pytest.param(16, "one head", 460, "turns", 8, marks=pytest.mark.slow),
    pytest.param(16, "wide heads", 127, "last", 2, marks=pytest.mark.slow),
    (16, "odd sizes", 1, "last", 2), pytest.param(16, "odd sizes", 100, "first", 3, marks=pytest.mark.slow),
    pytest.param(4, "teams", 40, "turns", 2, marks=pytest.mark.slow),
    pytest.param(4, "zeros, groups of 256", 7, "last", 2, marks=pytest.mark.slow)])
def test_a_step_by_one_kernel_is_as_exact_as_the_plain_one(on_cpu, bits, shape, prompt, order, blocks):
    """With 8 blocks the head's keys form 8 parts; with 2, each head's form one, too long to read at once. At 127 tags wrap."""
    model, on_cpu.order, on_cpu.blocks = make(bits, **(SHAPES if bits == 16 else SHAPES_W4)[shape]), order, blocks
    exact = Qwen2(model.config).double().eval()
    exact.load_state_dict(weights_of(model))
    ids = torch.randint(300, (1, prompt), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        caches = [StaticCache(prefill(each, ids.tolist(), 8, 1)[0]) for each in (model, model, exact)]
        for ours, theirs in zip(caches[0].keys + caches[0].values, caches[2].keys + caches[2].values):
            theirs.copy_(ours)                                                  # the same keys and values for all three
        assert fits(model, 1)
        models = model, OneKernel(model, caches[1]), exact
        plain, one, right = (each.hidden(torch.tensor([[7]]), cache) for each, cache in zip(models, caches))
        assert one.shape == plain.shape == (1, 1, model.config.hidden_size)
        assert error_of(one, right) < 1.3 * error_of(plain, right) < 0.03
        for ours, theirs in zip(caches[1].keys + caches[1].values, caches[2].keys + caches[2].values):
            assert error_of(ours[:, :, prompt], theirs[:, :, prompt]) < 0.02
            assert torch.equal(ours[:, :, :prompt].double(), theirs[:, :, :prompt]) and (ours[:, :, prompt + 1:] == 0).all()
    assert on_cpu.launched == ["decode_w4" if bits == 4 else "decode_bf16"]
    assert int(caches[1].slot) == int(caches[0].slot) == prompt + 1


@pytest.mark.slow
def test_a_block_may_be_held_up_before_it_reads_what_all_have_sent(on_cpu):
    """Of 8 blocks, the last but one has a task only in gate/up (the last has attention): it sends its words of `wide`, and nobody
    waits for it again until the next layer's `wide`. Meanwhile the other blocks go on as far as they can."""
    model = make(16, hidden_size=16, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1)
    on_cpu.blocks, prompt, woken = 8, [[3, 1, 4, 1, 5]], []
    caches = [StaticCache(prefill(model, prompt, 8, 1)[0]) for _ in range(2)]
    one = OneKernel(model, caches[1])
    words, tag = one.held["wide"][48:56].numpy(), len(prompt[0]) * 2 + 1        # of that block, in layer 0

    def asleep(warp, polls) -> bool:
        woken.extend([True] * (polls == 500))                                   # nobody else can go on
        return not woken and warp.block.at == (6, 0) and bool((words & 0xffff == tag).all())

    on_cpu.asleep = asleep
    with torch.inference_mode():
        plain, found = (each.hidden(torch.tensor([[7]]), cache) for each, cache in zip((model, one), caches))
    assert woken and error_of(found, plain.double()) < 0.03


def weights_of(model: Qwen2) -> dict:
    """Every weight by its name, the 4-bit ones dequantised."""
    weights = {name: weight for name, weight in model.state_dict().items()
               if not name.endswith(("qweight", "qzeros", "scales", "g_idx"))}
    return weights | {f"{name}.weight": layer.weight() for name, layer in model.named_modules() if isinstance(layer, W4Linear)}


@pytest.mark.parametrize("bits", [pytest.param(16, marks=pytest.mark.slow), 4])
def test_generate_by_one_kernel_gives_the_plain_path_s_tokens(on_cpu, monkeypatch, bits):
    model = make(bits, seed=16, initializer_range=0.4, **SHAPES_W4["small"])

    @contextmanager
    def laid_out(model, rows, steps):
        yield joined(model)

    on_cpu.order, prompt, steps = "first", [[3, 1, 4, 1, 5, 9, 2, 6]], 3 if bits == 16 else 2
    plain = generate(model, prompt, steps, graphs=True, one_kernel=False)
    with torch.inference_mode():
        best = model(torch.tensor([prompt[0] + plain[0]]))[0, len(prompt[0]) - 1:-1].float().topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 0.2                                # no near-tie that rounding could change
    assert not on_cpu.launched
    monkeypatch.setattr(generating, "laid_out", laid_out)
    assert generate(model, prompt, steps, graphs=True) == plain
    assert len(on_cpu.launched) == steps - 1
    two = generate(model, prompt * 2, steps, graphs=True)      # more than one row: the plain path
    assert two == plain * 2 and len(on_cpu.launched) == steps - 1


def test_fits_refuses_what_the_kernel_does_not_support(on_cpu):
    model = make(16)
    assert fits(model, 1) and not fits(model, 2)
    assert not fits(make(16, head_dim=24), 1) and not fits(make(16, hidden_size=8192, num_hidden_layers=1), 1)
    assert not fits(make(16, intermediate_size=20_488, num_hidden_layers=1), 1) and not fits(make(16, hidden_size=60), 1)
    model.model.layers[1].mlp.joined = None
    assert not fits(model, 1)
    assert not fits(joined(model).float(), 1)
    four = make(4, hidden_size=256, intermediate_size=256)
    assert fits(four, 1)
    watched = four.model.layers[0].mlp.register_forward_hook(lambda *_: None)          # which the kernel would not call
    assert not fits(four, 1)
    watched.remove()
    layer = block_matrices(four.model.layers[1])[3]
    layer.group_size = 256                                                            # another group size than the others'
    assert not fits(four, 1)


def test_the_kernel_does_not_fit_a_cpu():
    assert not fits(make(4, **SHAPES_W4["small"]), 1)


def test_the_sizes_are_those_of_decode_cu():
    source = SOURCES[0].with_name("decode.cu").read_text()
    assert f"WIDEST = {decode_cuda.WIDEST}, SPLITS = {decode_cuda.SPLITS}, BIASES = {decode_cuda.BIASES};" in source
    assert f"WARPS = {decode_cuda.THREADS // 32}, THREADS = 32 * WARPS" in source
    assert f"sizeof(Shared) == {decode_cuda.SHARED}," in source


@pytest.mark.parametrize("name, bits, expected", [
    ("0.5B", 16, (4, 3, 1, 4)), ("1.5B", 16, (4, 3, 3, 3)), ("3B", 16, (3, 3, 4, 3)),
    ("0.5B", 4, (3, 2, 1, 4)), ("1.5B", 4, (4, 3, 2, 3)), ("3B", 4, (3, 3, 2, 3))])
def test_the_teams_are_those_that_were_fastest(name, bits, expected):
    assert decode_cuda.team_bits(shapes.SHAPES[name], bits == 4, 132) == expected
