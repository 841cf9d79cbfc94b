"""The GPU benchmark runs from end to end, on a CPU, in small shapes; so does minikd's side of the steps that are compared with
trl's."""
import importlib
import importlib.util
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import figures, gpu as script, grpo_step, grpo_table, kd_step, on_policy_step, sandbox, sft_step
from conftest import small
from fake_gpu import gpu
from minikd.checkpoint import save_model
from minikd.sandbox import run_program


@pytest.fixture
def run_script(monkeypatch):
    """-> a function that runs the GPU script with some flags in small shapes, which leave no memory to free."""
    monkeypatch.setattr(script, "SHAPES", dict(script.SHAPES))
    monkeypatch.setattr(script.gc, "collect", lambda: 0)                        # 0.2 s, dozens of times

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
        script.main()

    return run


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(script.__file__).parent.glob("*.py")))
def test_every_script_says_what_it_measures(name, monkeypatch, capsys):
    try:
        module = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as missing:                      # a peer
        pytest.skip(str(missing))
    if hasattr(module, "main"):
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0 and module.__doc__.split()[1] in capsys.readouterr().out


def test_the_readmes_picture_shows_the_results():
    pytest.importorskip("matplotlib")
    domains, losses, answers = figures.draw().axes
    heights = lambda axes: sorted(bar.get_height() for bar in axes.patches)
    toy, distilled, grpo = (figures.table(f"{name}_table.txt") for name in ("toy", "distill", "grpo"))
    assert heights(domains) == sorted(row[model][0] for row in toy.values() for model in figures.MODELS)
    assert heights(answers) == sorted(row[how][0] for row in grpo.values() for how in ("sampled", "greedy"))
    dots = sorted(tuple(map(float, dot)) for line in losses.lines for dot in line.get_xydata() if line.get_marker() == "o")
    assert dots == sorted((row["sequence KL"][0], row["ROUGE-L"][0]) for row in distilled.values() if "sequence KL" in row)


@pytest.mark.parametrize("right", [0, 1, 3, 6])
def test_pass_at_k_is_what_all_choices_of_k_answers_give(right):
    answers = [i < right for i in range(6)]
    for k in 1, 2, 5, 6:
        chosen = list(itertools.combinations(answers, k))
        assert grpo_table.pass_at(k, 6, right) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.slow
def test_every_section_of_the_gpu_script_runs(run_script, capsys):
    run_script("--device", "cpu", "--tiny")
    told = capsys.readouterr()
    assert all(f"== {name}" in told.out for name in script.SECTIONS) and told.out.count("minikd") >= 3
    failed = [line for line in told.out.splitlines() if line.endswith("FAILED")]
    if importlib.util.find_spec("transformers"):
        assert failed == [] and told.err == ""
    assert all(line.removesuffix(": FAILED").endswith("transformers") for line in failed)


@pytest.mark.slow
def test_what_needs_no_kernel_of_ours_runs_on_a_gpu(run_script, capsys):
    with gpu():
        run_script("--tiny", "--only", "check", "sampling", "kd")
    told = capsys.readouterr().out
    failed = [line for line in told.splitlines() if line.endswith("FAILED")]
    assert all(line.endswith("transformers: FAILED") for line in failed) and told.count("minikd") >= 3
    assert not (failed and importlib.util.find_spec("transformers"))


def test_minikds_side_of_the_grpo_step_runs(monkeypatch, tmp_path):
    for name, value in dict(SHAPE=SimpleNamespace(vocab_size=400), WORDS=400, GROUP=3, NEW=4).items():
        monkeypatch.setattr(grpo_step, name, value)
    save_model(small(1), tmp_path / "model")
    for mode in "float32", "bf16":
        seconds, sampling = grpo_step.minikd(tmp_path, mode, 2)
        assert len(seconds) == 2 and 0 < sampling < max(seconds)


@pytest.mark.skipif(sys.platform != "linux", reason="their memory is measured as Linux counts it")
@pytest.mark.parametrize("mode", ["float32", "bf16"])
def test_minikds_side_of_the_other_steps_runs(mode, monkeypatch, tmp_path):
    for module, name, value in ((kd_step, "WORDS", 400), (kd_step, "LENGTH", 70), (grpo_step, "WORDS", 400),
                                (on_policy_step, "WORDS", 400), (on_policy_step, "NEW", 4), (on_policy_step, "ROWS", 3)):
        monkeypatch.setattr(module, name, value)
    for seed, name in enumerate(("student", "teacher")):
        save_model(small(seed), tmp_path / name)
    _, losses, _ = kd_step.minikd(tmp_path, mode, 2)
    _, naive, _ = kd_step.minikd(tmp_path, mode, 2, full_logits=True)
    assert losses == pytest.approx(naive, rel=1e-5 if mode == "float32" else 1e-2) and min(losses) > 0.1
    for seconds, losses, *_ in sft_step.minikd(tmp_path / "student", mode, 2), on_policy_step.minikd(tmp_path, mode, 2):
        assert len(seconds) == len(losses) == 2 and min(seconds) > 0 and min(losses) > 0.1


def test_a_section_that_fails_does_not_cost_the_others(run_script, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(script, "SECTIONS", {"machine": broken, "kernel": script.check_kernel})
    run_script("--device", "cpu")
    told = capsys.readouterr()
    assert "out of memory" in told.err and "machine: FAILED" in told.out and "tests/test_w4_cuda.py" in told.out


def test_flops_are_two_a_parameter_and_token():
    config = script.SHAPES["0.5B"]
    with torch.device("meta"):
        parameters = sum(p.numel() for name, p in script.Qwen2(config).named_parameters() if p.dim() == 2)
    assert script.model_flops(config, 10, 10, 2) == 2 * 10 * parameters


@pytest.mark.skipif(sys.platform != "linux", reason="programs are confined on Linux only")
def test_a_process_of_the_sandbox_that_is_left_is_counted():
    with ThreadPoolExecutor(1) as pool:
        running, most = pool.submit(run_program, "import time\ntime.sleep(1)", timeout=60), 0
        while not running.done():
            most = max(most, sandbox.processes())
    assert most >= 2 and running.result().status == "ok"        # the supervisor and the program
