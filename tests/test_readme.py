"""The README says what is there: its symbols import, its flags exist, its files are the files."""
import importlib
import re
from pathlib import Path

import pytest
import torch

from conftest import tiny
from minikd import toy
from minikd.checkpoint import load_model, save_model
from minikd.data import collate, encode_examples
from minikd.examples import load_examples
from minikd.files import write_jsonl
from minikd.model import Qwen2
from test_structure import ORDER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DEPARTURES = (ROOT / "docs" / "departures.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
SYMBOLS = sorted(set(re.findall(r"`(minikd\.\w+)\.(\w+)`", README + DEPARTURES)))
COMMANDS = re.findall(r"python (\w+\.py)([^\n#`&]*)", README)


def test_every_symbol_of_the_equation_map_is_there():
    assert len(SYMBOLS) > 20
    for module, name in SYMBOLS:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_the_equation_map_names_tests_that_are_there():
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) >= 4
    assert named <= {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def test_every_flag_of_a_command_exists():
    assert len(COMMANDS) > 8
    for script, flags in COMMANDS:
        parser = importlib.import_module(script.removesuffix(".py")).make_parser()
        for flag in re.findall(r"--[\w-]+", flags):
            assert flag in parser._option_string_actions, f"{script} has no {flag}"


@pytest.mark.parametrize("script", ["train_kd", "train_grpo", "quantize", "eval_rouge"])
def test_a_flag_takes_one_line_of_help(script):
    _, options, flags = importlib.import_module(script).make_parser().format_help().partition("\noptions:")
    assert options and not re.findall(r"^ {12,}\S.*", flags, flags=re.MULTILINE)             # the indented rest of a flag's help


def test_the_file_list_is_the_package():
    """In the order of imports; where the .cu files stand is free."""
    listed = re.findall(r"^  (\w+\.(?:py|cu)) ", README, flags=re.MULTILINE)
    assert [name for name in listed if name.endswith(".py")] == [f"{name}.py" for name in ORDER]
    assert sorted(set(listed) | {"__init__.py"}) == sorted(path.name for path in (ROOT / "minikd").glob("*.[pc][yu]"))


def test_every_file_the_readme_links_to_is_there():
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", README):
        assert (ROOT / link).exists(), link


def test_every_benchmark_it_names_is_there():
    rows = re.findall(r"^\| `(\w+)\.py` \|", MEASURED, flags=re.MULTILINE)      # of the table of measurements
    names = set(re.findall(r"benchmarks\.(\w+)", README + MEASURED)) | set(rows)
    assert rows
    for name in names:
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


ASK, DISTIL, LEAN = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_its_python_asks_a_model(tokenizer, tmp_path, capsys):
    folder = tiny(0, tokenizer, tmp_path / "tiny")
    exec(ASK.replace("Qwen/Qwen2.5-0.5B-Instruct", str(folder)), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("lean", [False, True])
def test_its_python_distils(lean, tmp_path, monkeypatch, capsys):
    """From random weights; the first line it prints is what the formulas give of whole logits."""
    imports, lines = LEAN.split("\n\n")
    program = imports + "\n" + re.sub(r"    scored = .*(?=    loss\.backward)", lines, DISTIL, flags=re.DOTALL) if lean else DISTIL
    world = tmp_path / "runs" / "toy"
    tokenizer = toy.make_tokenizer(world / "base" / "best")
    for name, config in ("base", toy.student_config), ("teacher", toy.teacher_config):
        save_model(Qwen2(config(len(tokenizer))).init_weights(0), world / name / "best")
    write_jsonl(toy.records(100, seed=1), world / "data" / "train.jsonl")

    rows = encode_examples(load_examples(world / "data" / "train.jsonl")[0], tokenizer)[0][:32]
    ids, mask = collate(rows, tokenizer.pad_id)                                 # [B, T]
    logq, logp = (load_model(world / name / "best")(ids).detach().log_softmax(-1)[:, :-1] for name in ("base", "teacher"))
    scored = mask[:, 1:]
    ce = -logq.gather(-1, ids[:, 1:, None])[..., 0][scored].mean()
    kl = (logp.exp() * (logp - logq)).sum(-1)[scored].mean()

    monkeypatch.chdir(tmp_path)
    exec(program, {})
    found = [float(number) for line in capsys.readouterr().out.splitlines() for number in re.findall(r"\d+\.\d+", line)]
    assert len(found) == 8                                      # 100 rows, 32 a step
    assert found[:2] == pytest.approx([float(ce), float(kl)], abs=6e-4)
    assert found[-2] < 0.8 * found[0]
    assert torch.isfinite(load_model("runs/student")(ids)).all()


def rows_of(text: str) -> list[tuple[str, set[str]]]:
    """(first cell, the cells that hold a mean and its deviation) of every line of the text's tables."""
    lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|"))
    return [(name, {cell for cell in cells if "±" in cell}) for name, *cells in lines]


@pytest.mark.parametrize("name", ["toy_table", "distill_table", "grpo_table"])
def test_its_tables_hold_the_results(name):
    results = (ROOT / "benchmarks" / "results" / f"{name}.txt").read_text(encoding="utf-8")
    for row, cells in rows_of(results.split("\n\n")[0]):
        if cells:
            assert any(there == row and shown and shown <= cells for there, shown in rows_of(README)), row
