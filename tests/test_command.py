"""What the scripts' command lines share: flags and their errors, the device and dtype that `auto` picks, progress."""
import argparse
import importlib
import math
import os
from types import SimpleNamespace

import pytest
import torch

from conftest import refusal
from minikd.command import (Parser, Progress, check_positive, fill_defaults, flag_group, note_unused, pick_device, pick_dtype,
                            spare_threads)
from minikd.config import Qwen2Config
from minikd.errors import InputError

# ---- device and dtype

@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_a_cpu_takes_bfloat16_where_it_has_instructions_for_it(native_bfloat16, avx512, amx):
    native_bfloat16(avx512, amx)
    assert pick_dtype("auto", "cpu") == (torch.bfloat16 if avx512 or amx else torch.float32)
    assert pick_dtype("auto", "cpu", four_bits=True) == torch.bfloat16
    for named in "float32", "bfloat16":                                         # taken at its word
        assert pick_dtype(named, "cpu", four_bits=True) == pick_dtype(named, "cuda") == getattr(torch, named)


@pytest.mark.parametrize("capability", [(6, 0), (7, 5), (8, 0), (8, 6), (12, 0)])
def test_a_gpu_takes_bfloat16_from_compute_capability_8_on(monkeypatch, capability):
    """For a 4-bit model too: on older ones minikd's kernel cannot run."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (asked.append(device), capability)[1])
    found = {pick_dtype("auto", "cuda:1", four_bits) for four_bits in (False, True)}
    assert found == {torch.bfloat16 if capability >= (8, 0) else torch.float32} and asked == 2 * ["cuda:1"]


@pytest.mark.parametrize("there", [True, False])
def test_auto_and_cuda_are_a_gpu_only_if_torch_sees_one(monkeypatch, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: SimpleNamespace(is_meta=False))
    assert pick_device("auto") == ("cuda" if there else "cpu") and pick_device("cpu") == "cpu"
    if not there:
        assert "--device cuda:0: torch sees no GPU" in refusal(pick_device, "cuda:0")


def test_another_gpu_than_the_first_becomes_torchs_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: SimpleNamespace(is_meta=False))
    assert [pick_device(name) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"] and chosen == ["cuda:1"]


def test_a_gpu_that_torch_has_no_kernels_for_is_one_line(monkeypatch):
    def zeros(*_, device, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nSearch for `cudaError...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", zeros)
    for name in "auto", "cuda":
        with pytest.raises(InputError, match="^--device cuda: CUDA error: no kernel image .* on the device; use --device cpu"):
            pick_device(name)


def test_a_device_without_float64_is_refused(monkeypatch):
    def zeros(*_, dtype=torch.float32, **__):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                            "Please use float32 instead.")                      # --dtype float32 would not help

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(InputError, match="--device mps: .*float64; use --device cpu"):
        pick_device("mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", "meta"])
def test_a_device_that_is_not_there_is_one_line(name):
    said = refusal(pick_device, name)
    assert said.startswith(f"--device {name}: ") and "; use --device cpu" in said


def test_small_matrices_are_not_shared_between_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    spare_threads(Qwen2Config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2))
    assert asked == []
    spare_threads(Qwen2Config(hidden_size=256, num_attention_heads=4, num_key_value_heads=2))
    assert asked == [1]


# ---- flags

@pytest.mark.parametrize("value", [0, -1, float("nan"), [1e-3, 0.0], 10**12 + 1])
def test_a_number_that_must_be_above_zero_is_named_by_its_flag(value):
    check_positive(argparse.Namespace(batch_size=10**12, grad_accum=None, lr=[1e-5]), "batch_size", "grad_accum", "lr")
    assert f"--batch-size {value}: must be above 0" in refusal(
        check_positive, argparse.Namespace(steps=1, batch_size=value), "steps", "batch_size")


@pytest.mark.parametrize("wrong", [dict(warmup=-1), dict(weight_decay=-0.1), dict(weight_decay=math.inf),
                                   dict(weight_decay=math.nan)])
def test_a_schedule_may_be_left_out_or_zero_but_not_negative_or_infinite(wrong):
    for right in dict(warmup=None, weight_decay=None), dict(warmup=0, weight_decay=0.0):
        check_positive(argparse.Namespace(**right), "warmup", "weight_decay", or_zero=True)
        (key, value), = wrong.items()
        assert f"--{key.replace('_', '-')} {value}: must be 0 or more" in refusal(
            check_positive, argparse.Namespace(**right | wrong), "warmup", "weight_decay", or_zero=True)


@pytest.mark.parametrize("script, given", [
    ("train_kd", []), ("train_grpo", ["--model", "m", "--data", "d"]), ("eval_rouge", ["--model", "m", "--data", "d"]),
    ("quantize", ["--model", "m", "--out", "o", "--calibration", "c"])])
def test_a_script_refuses_a_negative_number_for_every_flag_that_it_would_make_senseless(monkeypatch, tmp_path, script, given):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script)
    for flag in module.make_parser()._actions:
        if flag.type in (int, float) and flag.dest not in ("seed", "seeds") and (script, flag.dest) != ("quantize", "group_size"):
            monkeypatch.setattr("sys.argv", [script, *given, f"{flag.option_strings[0]}=-1"])
            assert flag.option_strings[0] in refusal(module.parse_args)


def test_flags_show_what_they_take_and_may_not_be_abbreviated():
    parser = Parser("What the\n   script does.")
    add = flag_group(parser, "all")
    add("--steps", type=int)
    add("--lr", type=float)
    add("--out")
    add("--data", metavar="FILE")
    add("--resume", action="store_true")
    said = parser.format_help()
    assert "What the\n   script does.\n" in said and "\nall:\n" in said
    for line in "--steps N", "--lr X", "--out OUT", "--data FILE", "--resume":
        assert f"  {line}\n" in said
    assert parser.parse_args(["--steps", "3", "--resume"]).steps == 3
    assert "--step 3; see --help" in refusal(parser.parse_args, ["--step", "3"])


def test_the_help_shows_choices_and_defaults_as_typed_and_a_flag_left_out_gets_its_default():
    parser = Parser("")
    add = flag_group(parser, "all")
    add("--lr", type=float, nargs="+", default=[1e-5, 0.5], toy=[2e-3], help="peak")
    add("--norm", choices=("token", "none"), default="token", help="weight")
    add("--steps", type=int, toy=0, help="how many")
    said = " ".join(parser.format_help().split())
    assert "peak (1e-5 0.5; toy 0.002)" in said and "weight: token, none (token)" in said and "how many (toy 0)" in said
    for toy, lr, steps in (False, [1e-5, 0.5], None), (True, [2e-3], 0):
        args = parser.parse_args(["--norm", "none"])
        fill_defaults(args, parser, toy)
        assert vars(args) == dict(lr=lr, norm="none", steps=steps)


def test_flags_without_effect_are_noted_on_stderr_even_if_they_are_0(capsys):
    args = argparse.Namespace(top_k=0, limit=None, int8_head=False, resume=True)
    note_unused(args, "here", "limit", "int8_head")
    note_unused(args, "here", "top_k", "limit", "int8_head", "resume")
    assert capsys.readouterr() == ("", "note: ignored here: --top-k --resume\n")


# ---- progress

def test_progress_in_a_log_is_plain_lines_now_and_then(capsys):
    with Progress("KD", total=10, start=4, every=0.0) as progress:
        progress.update(note="ce 2.5")
        progress.update(3)
        progress.say("a sample answer")
    out, err = capsys.readouterr()
    assert err == "KD 5/10 ce 2.5\nKD 8/10 \n" and out == "a sample answer\n"
    with Progress("KD", total=10, every=60.0) as progress:
        for _ in range(10):
            progress.update()
    assert capsys.readouterr().err == "" and progress.done == 10                # not a line a step


def test_progress_in_a_log_waits_from_line_to_line(monkeypatch, capsys):
    clock = iter(range(0, 10**6, 10))                                           # every look at it takes ten seconds
    monkeypatch.setattr("minikd.command.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with Progress("KD", total=6) as progress:
        for _ in range(6):
            progress.update()
    assert capsys.readouterr().err == "KD 2/6 \nKD 4/6 \nKD 6/6 \n"


def test_progress_towards_an_unknown_end(monkeypatch, capsys):
    with Progress("reading", total=None, every=-1) as progress:
        progress.update(512)
    assert capsys.readouterr().err == "reading 512 \n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("reading", total=None) as progress:
        progress.update(512)
        assert "reading: 512it" in str(progress.bar)


def test_progress_without_a_stderr_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    with Progress("KD", total=1, every=-1) as progress:
        progress.update()
    assert capsys.readouterr().out == ""                                        # print(file=None) would write there


def test_progress_on_a_terminal_is_a_bar_that_counts_to_its_total(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("KD", total=10, start=4) as progress:
        progress.update(6, "ce 2.5")
        assert progress.bar.n == progress.bar.total == 10
        monkeypatch.setattr("minikd.command.tqdm.write", lambda text: print("above:", text))
        progress.say("a sample answer")
    out, err = capsys.readouterr()
    assert "KD" in err and out == "above: a sample answer\n" and progress.bar.disable          # closed


def test_progress_is_a_bar_on_a_terminal_that_does_not_know_its_size_too(monkeypatch):
    """As `script` and many harnesses open one: 0 x 0, where tqdm by itself shows nothing."""
    reader, writer = os.openpty()
    with open(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with Progress("KD", total=10) as progress:
            progress.update(4)
        monkeypatch.undo()
        assert b"KD" in os.read(reader, 4096)
    os.close(reader)
