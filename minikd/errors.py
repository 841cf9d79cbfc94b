"""Errors that the user can fix, as one line on standard error; Ctrl-C as another."""
import errno
import math
import os
import re
import signal
import sys
import time
import unicodedata
from contextlib import contextmanager, suppress

ADVICE = {errno.ENOSPC: "free some space, or write elsewhere", errno.ENOENT: "check the path",
          errno.EFBIG: "raise the file size limit (ulimit -f)", errno.EACCES: "check the permissions",
          errno.EPIPE: "the program that read it has ended; send the output to a file"}


class InputError(ValueError):
    """The user's input is wrong. The message says in one line where, what, and how to fix it."""


def end_at_interrupts():
    """Lets Ctrl-C simply end the process until script_errors takes over: during an import it would print a traceback, or be lost
    in a callback that may not raise. If it is ignored, as in a shell's background job, it stays ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def script_errors():
    """Around a script's main(): prints `error: ...` with the message on stderr and exits with status 2, no traceback.

    A bug in minikd is neither an InputError nor an OSError, and keeps its traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")       # an answer may hold what the terminal's encoding lacks
    try:
        with _interrupts():
            yield
            _flush(sys.stdout)                                  # now: at its end Python would complain in words of its own
    except SystemExit as end:                                   # --help
        _end(end.code)
    except InputError as error:
        _exit_with(str(error))
    except (MemoryError, RuntimeError) as error:                # torch, on GPU and CPU, raises a RuntimeError
        text = str(error)
        if re.match("Symlink loop|Could not determine home", text):             # pathlib's, of a path that the user gave
            _exit_with(f"{text}; give another path")
        if re.search(r"No working C\+\+ compiler|Failed to find C compiler", text):         # inductor's on a CPU, triton's
            _exit_with("--compile: torch finds no C++ compiler; install one (g++), or leave the flag out")
        if isinstance(error, MemoryError) or re.search("(out of|allocate|enough) memory|ALLOC_FAILED", text):
            _exit_with("out of memory; lower --batch-size or the lengths, in train_grpo.py also --prompts or --group-size, or "
                       "use --gradient-checkpointing or --cache-teacher if the script has them")
        raise
    except KeyboardInterrupt:
        with suppress(OSError):
            print("\ninterrupted; what was saved is complete", file=sys.stderr)
        _end(130)                                               # 128 + SIGINT, as shells report it
    except OSError as error:
        nameless = "standard output" if isinstance(error, BrokenPipeError) else "standard output or a file"
        advice = ADVICE.get(error.errno, "check the path and the disk")
        _exit_with(f"{error.filename or nameless}: {error.strerror or error}; {advice}")
    except BaseException as error:
        if type(error).__name__ != "PanicException":            # the tokenizers library's, from Rust: no Exception
            raise
        _exit_with(f"tokenizer.json: the tokenizers library failed ({error}); fetch the model again, or take another")


@contextmanager
def _interrupts():
    """Ctrl-C raises KeyboardInterrupt, even where a library turns it into another error, as torch does while safetensors
    reads. If Ctrl-C is ignored, it stays ignored."""
    pressed, before = -math.inf, signal.getsignal(signal.SIGINT)

    def interrupt(*_):
        nonlocal pressed
        pressed = time.monotonic()
        raise KeyboardInterrupt

    if before in (signal.SIG_DFL, signal.default_int_handler):                  # the first is end_at_interrupts'
        with suppress(ValueError):                              # only the main thread may set a handler
            signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if time.monotonic() - pressed < 5:                      # else Ctrl-C is not the cause
            raise KeyboardInterrupt from error
        raise
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)


def visible(text: str) -> str:
    """The text with escapes in place of control characters, which in downloaded names could command the terminal."""
    keep = lambda letter: letter.isprintable() or letter in "\u200c\u200d" or unicodedata.category(letter) == "Zs"
    return "".join(letter if keep(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _exit_with(text: str):
    line = " ".join(text.split())
    if len(line) > 2000:                                        # a value of the user's in it; the mend is at the end
        line = f"{line[:1000]} ... {line[-400:]}"
    with suppress(OSError):
        print("error: " + visible(line), file=sys.stderr)
    _end(2)


def _flush(stream):
    if not getattr(stream, "closed", True):                     # closed, or None if the shell closed it
        stream.flush()


def _end(status):
    """Exits. Output that can no longer be written is dropped: Python would try again, complain, and exit with status 120."""
    for stream in sys.stdout, sys.stderr:
        try:
            _flush(stream)
        except OSError:
            with suppress(OSError):                             # a stream without a file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)
