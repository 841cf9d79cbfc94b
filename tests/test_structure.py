"""The rules of the code: a module imports only earlier ones, so that any file can be read without the later ones; what other
programs call keeps its arguments."""
import ast
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

from conftest import random_model
from minikd import losses
from minikd.generate import generate
from minikd.gptq import Hessian, quantize_matrix
from minikd.grpo import group_advantages, policy_loss
from minikd.head import compare_heads, head_loss

ROOT = Path(__file__).parents[1]
ORDER = ("plain errors files hub config cuda attend_cuda cache fused_cuda layers model w4_cuda products quant w4 checkpoint tokenizer "
         "records formats examples data toy losses loss_cuda head layout decode_cuda graphs generate teacher minillm grpo answers "
         "problems confine sandbox rewards gptq stem rouge evaluate command run adamw_cuda training plots").split()
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "minikd").glob("*.py")]
HEAVY = {"transformers", "trl", "datasets", "accelerate", "triton"}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, inside its functions too: 'minikd.model', 'torch.nn', 'train_kd'."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "minikd" if node.level else node.module      # minikd is flat: a relative import starts there
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def test_a_module_imports_only_modules_before_it():
    modules = sorted((ROOT / "minikd").glob("*.py"))
    assert {"files", "model", "checkpoint", "tokenizer"} <= {path.stem for path in modules}
    for path in modules:
        if path.stem != "__init__":
            assert path.stem in ORDER, f"{path.name} has no place in the order: add it to ORDER"
            ours = {name.split(".")[1] for name in imported(path) if name.startswith("minikd.")} & set(ORDER)
            later = ours & set(ORDER[ORDER.index(path.stem):])
            assert not later, f"{path.name} imports {later}, which come after it"


def test_no_script_imports_a_script_and_no_module_does():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imported(path)} & scripts, path.name


def test_minikd_runs_without_the_libraries_it_replaces():
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY, path.name


def test_only_what_checks_the_flags_takes_all_of_them():
    """Any other function names what it uses: what it depends on is seen in its first line."""
    for path in SOURCES:
        if path.stem != "command":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                takes = isinstance(node, ast.FunctionDef) and "args" in {one.arg for one in node.args.args + node.args.kwonlyargs}
                assert not takes or node.name.startswith(("check_", "note_")), f"{path.name}: {node.name}"


# ---- what programs outside this repository call: a change here breaks them

CALLED = {
    "checkpoint.load_model": "name, device='cpu', dtype=torch.float32", "checkpoint.save_model": "model, folder",
    "tokenizer.Tokenizer.load": "name", "tokenizer.Tokenizer.encode": "self, text", "tokenizer.Tokenizer.decode": "self, ids",
    "tokenizer.Tokenizer.chat": "self, messages, add_generation_prompt=False",
    "generate.generate": "model, prompts, max_new_tokens=64, temperature=0.0, top_p=1.0, top_k=0, eos_ids=(), seed=None",
    "losses.forward_kl": "student_logits, teacher_logits, temperature=1.0",
    "losses.reverse_kl": "student_logits, teacher_logits, temperature=1.0",
    "losses.jensen_shannon": "student_logits, teacher_logits, beta=0.5",
    "losses.skew_forward_kl": "student_logits, teacher_logits, alpha=0.1",
    "losses.skew_reverse_kl": "student_logits, teacher_logits, alpha=0.1",
    "grpo.group_advantages": "rewards, scale='std'",
    "grpo.policy_loss": "logp, old_logp, ref_logp, advantages, clip=0.2, beta=0.04",
    "gptq.quantize_matrix": "weight, hessian, bits=4, group_size=128, sym=True, act_order=True, damp=0.01",
    "rouge.rouge_l": "prediction, reference, stemmer=False, unicode=False",
    "sandbox.run_program": "source, stdin='', timeout=5.0, memory_mb=512"}
FLAGS = {
    "train_kd": "student teacher data loss kd-ratio temperature on-policy epochs steps batch-size grad-accum lr max-length "
                "max-prompt-length cache-teacher out resume seed device dtype",
    "train_grpo": "model data group-size rewards clip beta max-new-tokens out",
    "quantize": "model out bits group-size method calibration", "eval_rouge": "model data predictions references"}


@pytest.mark.parametrize("name", CALLED)
def test_a_called_function_keeps_its_arguments_and_their_defaults(name):
    module, *path = name.split(".")
    function = functools.reduce(getattr, path, importlib.import_module(f"minikd.{module}"))
    arguments = inspect.signature(function).parameters.values()
    told = ", ".join(one.name + ("" if one.default is one.empty else f"={one.default!r}") for one in arguments)
    assert f"{told}, ".startswith(f"{CALLED[name]}, ")


@pytest.mark.parametrize("script", FLAGS)
def test_a_script_keeps_its_flags(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args()
    assert set(FLAGS[script].split()) <= set(re.findall(r"^ +--([\w-]+)", capsys.readouterr().out, re.MULTILINE))


# ---- what a program around minikd may have set

def computed(model) -> list[torch.Tensor]:
    """A bit of everything, of float32 inputs."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher, head, x = (torch.randn(size, generator=generator, dtype=torch.float32)
                                for size in ((7, 16), (7, 16), (50, 16), (90, 16)))
    p, q, targets = hidden @ head.T, teacher @ head.T, torch.arange(7)
    hessian, leaf = Hessian(16), hidden.clone().requires_grad_()
    hessian.add(x, torch.ones(90, dtype=torch.bool))
    loss, *parts = head_loss(leaf, head, targets, teacher, head, losses.forward_kl, kd_ratio=0.5, weight=1 / 7)
    loss.backward()
    return [*(divergence(p, q) for divergence in losses.DIVERGENCES.values()), losses.entropy(p), loss.detach(), *parts, leaf.grad,
            *compare_heads(hidden, head, targets, teacher, head).values(), policy_loss(p, p + 0.1, q, hidden[:, 0]),
            group_advantages(hidden), *quantize_matrix(head, hessian.finish(), group_size=8, clip_search=True),
            torch.tensor(generate(model, [[1, 2], [3]], 8, temperature=1.0, seed=0), dtype=torch.int64)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_changes_nothing(dtype):
    model = random_model()
    wanted = computed(model)
    torch.set_default_dtype(dtype)
    try:
        found = computed(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_kernels_write_to_has_a_dtype_of_its_own():
    """Memory of another default dtype would be too small."""
    for path in (ROOT / "minikd").glob("*_cuda.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.empty", "torch.zeros", "torch.ones", "torch.full"):
                assert "dtype" in {keyword.arg for keyword in node.keywords}, f"{path.name}:{node.lineno}"
