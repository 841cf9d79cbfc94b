"""The script that a GPU is lent for runs from end to end: on a CPU, in small shapes."""
import importlib.util
import sys

import torch

from benchmarks import gpu


def test_every_section_of_the_gpu_script_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny"])
    monkeypatch.setattr(gpu, "SHAPES", dict(gpu.SHAPES))
    gpu.main()
    told = capsys.readouterr()
    assert all(f"== {name}" in told.out for name in gpu.SECTIONS) and told.out.count("minikd") >= 3
    failed = [line for line in told.out.splitlines() if line.endswith("FAILED")]
    if importlib.util.find_spec("transformers"):
        assert failed == [] and told.err == ""
    assert all(line.removesuffix(": FAILED").endswith("transformers") for line in failed)


def test_a_section_that_fails_does_not_cost_the_others(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "SECTIONS", {"machine": broken, "kernel": gpu.check_kernel})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    gpu.main()
    told = capsys.readouterr()
    assert "out of memory" in told.err and "machine: FAILED" in told.out and "tests/test_w4_cuda.py" in told.out


def test_flops_are_two_a_parameter_and_token():
    config = gpu.SHAPES["0.5B"]
    with torch.device("meta"):
        parameters = sum(p.numel() for name, p in gpu.Qwen2(config).named_parameters() if p.dim() == 2)
    assert gpu.model_flops(config, 10, 10, 2) == 2 * 10 * parameters
