"""What two training loops share: memory, the schedule as a slow formula, weight decay, compilation."""
import ctypes
import math
import os
import platform
import subprocess
import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch._functorch.config

from conftest import refusal, small
from minikd.checkpoint import save_model
from minikd.gptq import quantize_model
from minikd.layout import join_layers
from minikd.model import run_blocks
from minikd.quant import to_words
from minikd.training import (apply_gradient, check_student, compile_blocks, keep_freed_memory, learning_rate,
                             make_optimizer)
from minikd.w4 import W4Linear, to_w4


# ---- memory, the schedule and the optimizer

KEPT = """
import os
from pathlib import Path

import torch
from minikd.training import keep_freed_memory

def resident():                                                                 # MB
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def freed(megabytes, tensors):
    resident()                                      # before the tensors, too: what it leaves must not lie above them in the heap
    held = [torch.ones(megabytes << 18) for _ in range(tensors)]
    before = resident()
    del held
    return before - resident()

try:
    with keep_freed_memory():
        print(freed(64, 1), freed(8, 40))            # later 64 MB would fit into what is kept
        before = resident()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_while_training_and_returned_in_the_end():
    """In a process of its own: in an old one a large tensor may fit into the heap, too."""
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    large, small, end = map(float, done.stdout.split())
    assert large > 60 and small < 20 and end > 280                              # of 64, 320, 320 MB


def test_without_glibc_nothing_is_asked_of_the_c_library(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with keep_freed_memory():
        pass
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)
    with keep_freed_memory():
        pass


@pytest.mark.parametrize("steps, warmup", [(10, 0), (10, 3), (7, 6), (1, 0)])
def test_the_rate_climbs_in_a_line_and_falls_as_a_cosine_to_a_tenth(steps, warmup):
    for step in range(steps):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            expected = 0.1 + 0.9 * (math.cos(angle) + 1) / 2
        assert learning_rate(step, steps, 2.0, warmup, "cosine") == pytest.approx(2.0 * expected, rel=1e-12)


def test_the_rate_starts_above_nothing_reaches_its_peak_and_never_falls_under_a_tenth():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0 == learning_rate(0, 100, 1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 < rates[-1] < 0.101


def test_a_constant_rate_stays_after_its_warm_up():
    assert [learning_rate(step, 6, 4.0, 2, "constant") for step in range(6)] == [2.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="schedule = 'linear'"):
        learning_rate(3, 6, 4.0, 2, "linear")


def test_matrices_are_decayed_and_biases_and_norms_are_not():
    model = small(1, vocab_size=32)
    groups = make_optimizer(model, 0.5, weight_decay=0.3).param_groups
    sets = {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or "norm" in name
        assert id(parameter) in sets[0.0 if plain else 0.3], name
    assert len(sets[0.0] | sets[0.3]) == len(list(model.parameters()))          # the tied head once
    assert all(group["lr"] == 0.5 and group["betas"] == (0.9, 0.95) for group in groups)
    assert make_optimizer(model, 0.5).param_groups[0]["weight_decay"] == 0.01


def test_decay_alone_moves_a_matrix_and_leaves_a_norm():
    model = small(1, vocab_size=32)
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = 1 - 0.1 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrunk, msg=name)


def test_two_steps_are_adamws_with_the_gradient_cut_to_its_largest_norm():
    """Algorithm 2 of AdamW's paper, number by number: the first gradient is longer than max_grad_norm, the second is not."""
    model = small(1, vocab_size=32)
    optimizer = make_optimizer(model, lr=9.0, weight_decay=0.5)                 # this rate is never used
    names = dict(model.named_parameters())
    weights = {name: p.detach().double() for name, p in names.items()}
    first, second = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    for t, (rate, size) in enumerate(((0.1, 3.0), (0.02, 1e-3)), 1):
        gradients = {name: size * torch.sin(torch.arange(p.numel()) + t).view_as(p) for name, p in names.items()}
        for name, parameter in names.items():
            parameter.grad = gradients[name].clone()
        norm = math.sqrt(sum(float(g) ** 2 for gradient in gradients.values() for g in gradient.flatten()))
        assert float(apply_gradient(model, optimizer, rate, 2.0)) == pytest.approx(norm, rel=1e-5)
        assert (norm > 2) == (t == 1) and all(parameter.grad is None for parameter in names.values())
        for name, parameter in names.items():
            g = gradients[name].double() * min(1, 2 / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            update = first[name] / (1 - 0.9 ** t) / ((second[name] / (1 - 0.95 ** t)).sqrt() + 1e-8)
            decay = 0.5 if parameter.dim() == 2 else 0.0
            weights[name] = weights[name] * (1 - rate * decay) - rate * update
            torch.testing.assert_close(parameter.detach().double(), weights[name], atol=2e-5, rtol=2e-4, msg=name)


# ---- the student

def test_a_student_is_whole_has_no_4_bit_weights_and_a_row_for_every_token(tmp_path, monkeypatch):
    model = small(1, vocab_size=32)
    save_model(model, tmp_path / "s")
    check_student(tmp_path / "s", range(32))
    assert "the tokenizer has 33 ids, but the model only 32 rows" in refusal(check_student, tmp_path / "s", range(33))
    os.truncate(tmp_path / "s/model.safetensors", 1000)
    assert "is damaged or truncated" in refusal(check_student, tmp_path / "s", range(32))
    model.quantization = {"bits": 4}
    monkeypatch.setattr("minikd.training.outline", lambda folder: (model, {}))
    assert "holds 4-bit weights" in refusal(check_student, tmp_path / "s", range(32))


# ---- compilation

@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")                       # torch's own, in what it imports to compile
def test_compiled_blocks_keep_less_for_the_backward_pass(monkeypatch):
    """silu(gate) up, [tokens, W], is computed again there: the 0.5B would keep 1 GB of it for 8 x 512 tokens."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))     # no C++ compiler
    monkeypatch.setattr(torch._functorch.config, "ban_recompute_materialized_backward", True)
    model, kept = small(1, intermediate_size=40).train(), []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    def count() -> int:
        torch._dynamo.reset()
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.hidden(torch.arange(12).view(2, 6))
        return kept.count((12, 40))

    model.model.compiled = torch.compile(run_blocks)
    before, other = count(), small(2)
    compile_blocks(other, model)
    assert count() == before - 1 and other.model.compiled is not None


@pytest.mark.slow
@pytest.mark.parametrize("dtype, joined", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_the_first_call_of_a_4_bit_model_may_be_compiled(monkeypatch, dtype, joined):
    """Into one graph: what its layers find out at their first call, compile_blocks lets them find out before. Joined ones, as a
    teacher's on a GPU, are prepared and not their parts, which would hold the codes twice."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    model = small(1, hidden_size=64, intermediate_size=64)
    words = quantize_model(model, [], 0, method="rtn", group_size=32, store=to_words)
    model, ids = to_w4(model, words, 32, True).to(dtype).eval(), torch.arange(12).view(2, 6)
    with torch.inference_mode():
        plain = deepcopy(model).hidden(ids)
    if joined:
        join_layers(model, rows=0, pack=False)
    compile_blocks(model)
    with torch.inference_mode():
        assert torch.equal(model.hidden(ids), plain)
    parts = [layer for layer in model.modules() if isinstance(layer, W4Linear) and layer.whole is not None]
    assert len(parts) == 5 * joined * model.config.num_hidden_layers and all(part.prepared is None for part in parts)
