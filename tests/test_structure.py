"""The house's one rule: imports go downward, so that any file is read without the ones after it."""
import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = ("files hub cuda attend_cuda fused_cuda model w4_cuda quant checkpoint tokenizer records examples data toy losses loss_cuda head "
         "layout decode_cuda generate teacher minillm grpo problems sandbox rewards gptq rouge evaluate command training plots").split()
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
    for path in [*ROOT.glob("*.py"), *(ROOT / "minikd").glob("*.py")]:
        assert not {name.split(".")[0] for name in imported(path)} & scripts, path.name


def test_minikd_runs_without_the_libraries_it_replaces():
    for path in [*ROOT.glob("*.py"), *(ROOT / "minikd").glob("*.py")]:
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY, path.name
