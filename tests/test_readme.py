"""The README says what is there: its symbols import, its flags exist, its files are the files."""
import importlib
import re
from pathlib import Path

import pytest

from test_structure import ORDER

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
SYMBOLS = sorted(set(re.findall(r"`(minikd\.\w+)\.(\w+)`", README)))
COMMANDS = re.findall(r"python (\w+\.py)([^\n#`&]*)", README)


@pytest.mark.parametrize("module, name", SYMBOLS)
def test_every_symbol_of_the_equation_map_is_there(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_the_equation_map_names_tests_that_are_there():
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) >= 4
    assert named <= {path.stem for path in (ROOT / "tests").glob("test_*.py")}


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_every_flag_of_a_command_exists(script, flags):
    text = (ROOT / script).read_text(encoding="utf-8")
    for flag in re.findall(r"--[\w-]+", flags):
        assert f'"{flag}"' in text, f"{script} has no {flag}"


def test_the_file_list_is_the_package():
    """In the order of imports; where the .cu files stand is free."""
    listed = re.findall(r"^  (\w+\.(?:py|cu)) ", README, flags=re.MULTILINE)
    assert [name for name in listed if name.endswith(".py")] == [f"{name}.py" for name in ORDER]
    assert sorted(set(listed) | {"__init__.py"}) == sorted(path.name for path in (ROOT / "minikd").glob("*.[pc][yu]"))


def test_every_file_the_readme_links_to_is_there():
    for link in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_benchmark_it_names_is_there():
    rows = re.findall(r"^\| `(\w+)\.py` \|", MEASURED, flags=re.MULTILINE)      # of the table of measurements
    names = set(re.findall(r"benchmarks\.(\w+)", README + MEASURED)) | set(rows)
    assert rows
    for name in names:
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name
