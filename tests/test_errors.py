"""One line for what the user can fix, and one for Ctrl-C."""
import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from minikd.errors import InputError, script_errors, visible


@pytest.fixture
def interruptible():
    """SIGINT is Python's, as in a script that a shell starts; in a shell's background job it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) in (signal.default_int_handler, signal.SIG_DFL)     # script_errors gave it back


def shown_by(error: BaseException):
    with script_errors():
        raise error


def shown(capsys, error: BaseException) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit:
        shown_by(error)
    return exit.value.code, capsys.readouterr().err


def test_what_the_user_can_fix_is_one_line_and_status_2(capsys):
    assert shown(capsys, InputError("a.jsonl:3: is\nnot JSON; fix it")) == (
        2, "error: a.jsonl:3: is not JSON; fix it\n")


@pytest.mark.parametrize("number, advice", [(errno.ENOSPC, "free some space"), (errno.ENOENT, "check the path"),
                                          (errno.EACCES, "check the permissions"), (errno.EIO, "the disk")])
def test_a_failing_disk_is_one_line_that_says_how_to_fix_it(capsys, number, advice):
    code, text = shown(capsys, OSError(number, os.strerror(number), "runs/log.jsonl"))
    assert code == 2 and text.startswith("error: runs/log.jsonl: ") and advice in text and text.count("\n") == 1


def test_an_answer_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    with script_errors():
        print("año")
    assert written.getvalue() == b"a\\xf1o\n"


def test_a_line_holds_no_control_characters(capsys):
    """A downloaded file's names could command the terminal, or reverse what is read."""
    code, text = shown(capsys, InputError("fi\x1b]0;x\x07ld \u202eé 你: fix it"))
    assert code == 2 and text == "error: fi\\x1b]0;x\\x07ld \\u202eé 你: fix it\n"
    assert visible("開放\u3000質問 \U0001f468\u200d\U0001f469") == "開放\u3000質問 \U0001f468\u200d\U0001f469"


def test_a_panic_of_the_tokenizers_library_is_one_line(capsys):
    code, text = shown(capsys, type("PanicException", (BaseException,), {})("no entry"))
    assert code == 2 and text.startswith("error: tokenizer.json: the tokenizers library failed (no entry)")
    with pytest.raises(GeneratorExit):
        shown(capsys, GeneratorExit())


def test_an_interrupt_ends_as_shells_expect(capsys):
    code, text = shown(capsys, KeyboardInterrupt())
    assert code == 130 and "interrupted" in text and "Traceback" not in text


@pytest.mark.parametrize("script", ["train_kd", "train_grpo", "eval_rouge", "quantize"])
def test_an_interrupt_while_torch_is_imported_ends_the_script_at_once(tmp_path, script):
    """In an import it would be a traceback; some of torch's callbacks even swallow it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept KeyboardInterrupt:\n    print('goes on')\n")
    done = subprocess.run([sys.executable, Path(__file__).parents[1] / f"{script}.py"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupt_after_the_imports_is_one_line(capsys, interruptible):
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # as end_at_interrupts leaves it
    with pytest.raises(SystemExit) as ended, script_errors():
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130 and capsys.readouterr().err == "\ninterrupted; what was saved is complete\n"


@pytest.mark.parametrize("error", [ValueError("could not determine the shape of object type"), InputError("a: is damaged")])
def test_an_interrupt_that_a_library_turns_into_another_error_stays_one(capsys, interruptible, error):
    """torch does so when safetensors calls it; and a reader may then report torch's error as a damaged file."""
    with pytest.raises(SystemExit) as ended, script_errors():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise error from None
    assert ended.value.code == 130 and capsys.readouterr().err == "\ninterrupted; what was saved is complete\n"


def test_an_interrupt_that_got_lost_hides_no_later_error(capsys, monkeypatch, interruptible):
    with pytest.raises(SystemExit) as ended, script_errors():
        with contextlib.suppress(KeyboardInterrupt):                # in a callback that may not raise
            signal.raise_signal(signal.SIGINT)
        later = time.monotonic() + 60
        monkeypatch.setattr("minikd.errors.time.monotonic", lambda: later)
        raise InputError("a: is damaged")
    assert ended.value.code == 2 and capsys.readouterr().err == "error: a: is damaged\n"


def test_a_script_may_run_in_another_thread():
    with ThreadPoolExecutor(1) as pool, pytest.raises(SystemExit, match="2"):
        pool.submit(shown_by, InputError("x")).result()


def test_a_bug_of_ours_keeps_its_traceback():
    for bug in (ValueError("shape"), AssertionError(), KeyError("k")):
        with pytest.raises(type(bug)), script_errors():
            raise bug


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("act, stdout, stderr, status, said", [
    ("print('x')", "/dev/full", None, 2, "error: standard output or a file: No space left on device; free some space"),
    ("print('x')", "pipe", None, 2, "error: standard output: Broken pipe; the program that read it has ended"),
    ("print('x'); raise InputError('a: is wrong; mend it')", "/dev/full", None, 2, "error: a: is wrong; mend it"),
    ("print('x'); raise KeyboardInterrupt", "/dev/full", None, 130, "\ninterrupted; what was saved is complete"),
    ("print('x'); sys.exit(0)", "pipe", None, 0, ""),
    ("raise InputError('a: is wrong; mend it')", None, "/dev/full", 2, ""),
    ("raise KeyboardInterrupt", None, "/dev/full", 130, ""), ("sys.exit(3)", "pipe", None, 3, ""),
    ("sys.stdout = None; print('x')", None, None, 0, ""), ("sys.stdout.close()", None, None, 0, ""),
    ("sys.stdout = None; raise InputError('a: is wrong; mend it')", None, None, 2, "error: a: is wrong; mend it")])
def test_what_cannot_be_written_at_the_end_is_one_line_too(act, stdout, stderr, status, said):
    """Python writes what it has buffered when it ends; if that fails, it prints a message of its own and ends with status 120."""
    read, write = os.pipe()
    os.close(read)                                                              # a pipe that nobody reads
    with open(stdout if stdout and stdout != "pipe" else os.devnull, "w") as out, open(stderr or os.devnull, "w") as err:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\nfrom minikd.errors import *\nwith script_errors():\n    {act}"],
            stdout=write if stdout == "pipe" else out, stderr=err if stderr else subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[1], env={key: x for key, x in os.environ.items() if key != "PYTHONUNBUFFERED"})
    os.close(write)
    assert done.returncode == status
    assert stderr or done.stderr.startswith(said) and done.stderr.strip().count("\n") == 0 and bool(done.stderr) == bool(said)


def test_compile_without_a_compiler_is_one_line(capsys):
    from torch._inductor.exc import InvalidCxxCompiler
    for error in InvalidCxxCompiler(), RuntimeError("Failed to find C compiler. Please specify via CC"):     # triton's words
        assert shown(capsys, error) == (
            2, "error: --compile: torch finds no C++ compiler; install one (g++), or leave the flag out\n")


def test_too_little_memory_is_one_line_and_other_errors_are_not(capsys):
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    for error in (real.value, MemoryError(),                    # Python's own says nothing
                  RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),  # cuSOLVER's too
                  RuntimeError("[enforce fail at alloc_cpu.cpp:113] data. DefaultCPUAllocator: not enough memory: you")):   # ARM
        code, text = shown(capsys, error)
        assert code == 2 and text.startswith("error: out of memory; lower --batch-size")
        assert all(flag in text for flag in ("--gradient-checkpointing", "--cache-teacher"))
    with pytest.raises(RuntimeError, match="a bug"), script_errors():
        raise RuntimeError("a bug")


def test_a_long_value_does_not_hide_how_to_fix_it(capsys):
    _, line = shown(capsys, InputError(f"file: {'x' * 100_000} is wrong; mend it"))
    assert len(line) < 2000 and line.startswith("error: file: xxx") and line.endswith("is wrong; mend it\n")
