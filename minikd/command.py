"""The command line of the scripts: flags, device and dtype, progress."""
import argparse
import inspect
import os
import re
import sys
import time
from contextlib import suppress

import torch
from tqdm import tqdm

from minikd.config import Qwen2Config
from minikd.errors import InputError
from minikd.records import HALF


class Parser(argparse.ArgumentParser):
    """Its --help is the script's docstring, then every flag; no flag may be abbreviated. A wrong flag is an InputError,
    like every other error that the user can fix."""

    def __init__(self, doc: str):
        super().__init__(description=doc, usage="%(prog)s [flags]", allow_abbrev=False, formatter_class=(
            lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=125)))
        self.defaults = {}                                      # flag -> its default, and that in the toy world

    def parse_args(self, given: list[str] | None = None):
        """argparse's.  Raises InputError for an empty value, and for one that is not UTF-8."""
        for word in sys.argv[1:] if given is None else given:
            if not word or re.fullmatch(r"--[\w-]+=", word):    # an unset variable; as a path it would be the current folder
                raise InputError(f"{word!r}: is empty, perhaps an unset variable; give a value, or leave its flag out")
            if HALF.search(word):                               # undecodable bytes of a file's name: it cannot be written out
                raise InputError(f"{word!r}: is not UTF-8; rename it, or set PYTHONUTF8=1 if only the locale is not")
        return super().parse_args(given)

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def shortest(value) -> str:
    """A default as a user would type it: 1e-5, not 1e-05."""
    if isinstance(value, list):
        return " ".join(map(shortest, value))
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


DTYPES = "--dtype auto is bfloat16 on GPUs from compute capability 8.0 on and on CPUs with instructions for it, else float32"
FOUR_BITS = ";\na 4-bit model is then in bfloat16 on any CPU"
BY_FIELDS = "without --format, records are recognised by their fields"


def flag_group(parser: Parser, title: str, note: str | None = None):
    """The add_argument of a new group of flags. It adds choices and default to the help text, which should fit on a line;
    fill_defaults sets the default later, so that until then a flag that was not given is None (a switch: False). `toy` is the
    default in the toy world, if it differs.  note: what --help says of the group
    """
    group = parser.add_argument_group(title, note)

    def add(*names, help="", default=None, toy=None, **options):
        if "action" not in options:
            options.setdefault("metavar", {int: "N", float: "X"}.get(options.get("type"), names[0].strip("-").upper()))
        if "choices" in options:
            help += f": {', '.join(options['choices'])}"
        defaults = [what + shortest(value) for what, value in (("", default), ("toy ", toy)) if value is not None]
        if defaults:
            help += f" ({'; '.join(defaults)})"
        flag = group.add_argument(*names, help=help, **options)
        parser.defaults[flag.dest] = default, default if toy is None else toy

    return add


def check_positive(args, *names: str, or_zero: bool = False):
    """Raises InputError for the first of these flags with a number outside 0 < number <= 10^12 (or_zero: 0 <= number); None is
    allowed."""
    good = lambda number: number is None or 0 < number <= 1e12 or or_zero and number == 0
    for name in names:
        value = getattr(args, name)
        if not all(map(good, value if isinstance(value, list) else [value])):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {'0 or more' if or_zero else 'above 0'} and at most "
                             "10^12; give another number")


def note_unused(args, reason: str, *names: str):
    """Says which of these flags were given although they have no effect. (No error: a loop over all losses may pass the same
    flags to each. A wrong value still is one.) To be called before fill_defaults."""
    given = [f"--{name.replace('_', '-')}" for name in names
             if getattr(args, name) is not None and getattr(args, name) is not False]       # 0 counts as given
    if given:
        print(f"note: ignored {reason}: {' '.join(given)}", file=sys.stderr)


def fill_defaults(args, parser: Parser, toy: bool):
    """Gives every flag that was left out its default, in the toy world or outside it."""
    for name, values in parser.defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[toy])


def flags_of(function, args, but: tuple[str, ...] = ()) -> dict:
    """The flags that `function` takes as keyword-only arguments of the same names, except those in `but`."""
    taken = {name for name, one in inspect.signature(function).parameters.items() if one.kind is one.KEYWORD_ONLY}
    return {name: value for name, value in vars(args).items() if name in taken and name not in but}


def pick_dtype(name: str, device: str, four_bits: bool = False) -> torch.dtype:
    """--dtype auto: bfloat16 on GPUs from compute capability 8.0 on, on CPUs with instructions for it (AVX512-BF16, AMX), and on
    a CPU for a 4-bit model, whose fast products take nothing else (w4.choose); else float32.

    It is the dtype of the matrix products and of the teacher; the student's weights stay in float32. Older GPUs, such as a T4,
    compute bfloat16 too, but without tensor cores, fused attention and minikd's kernels: more slowly than float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = four_bits or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def pick_device(name: str) -> str:
    """--device auto: a GPU if there is one, else the CPU. A GPU given by its number becomes torch's current one: CUDA graphs
    record only there.  Raises InputError for a device that does not work, also with auto for a GPU that torch sees but has no
    kernels for, such as Kaggle's P100."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU; use --device cpu")
    try:
        if torch.zeros(1, device=name, dtype=torch.float64).is_meta:            # sampling needs float64, which mps lacks
            raise InputError(f"--device {name}: holds no data; use --device cpu or cuda")
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:  # no such device, or torch built without it
        reason = str(error).splitlines()[0].partition(". ")[0]  # without mps's advice to use float32
        others = "cpu" if name == "cuda" else "cpu or cuda"
        raise InputError(f"--device {name}: {reason}; use --device {others}") from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return name


def spare_threads(config: Qwen2Config):
    """Uses one thread if a model's matrices are too small to split, like the toy's: threads wait for each other at each matrix,
    and while other programs use the cores, two threads take 13 times as long as one (eval_rouge.py on the toy: 35 s, not 2.7)."""
    if config.hidden_size <= 256:
        torch.set_num_threads(1)


class Progress:
    """A bar on a terminal; in a log, one plain line now and then.  Use as `with`, and call update().

    total  of steps; None if it is not known.  start: those already done.  every: seconds between two lines
    """

    def __init__(self, title: str, total: int | None, start: int = 0, every: float = 15.0):
        self.title, self.total, self.done, self.every, self.shown = title, total, start, every, time.monotonic()
        self.bar = None
        if sys.stderr and sys.stderr.isatty():
            size = {}                                           # tqdm asks the terminal
            with suppress(OSError, ValueError):
                if not all(os.get_terminal_size(sys.stderr.fileno())):
                    size = {"ncols": 80, "nrows": 24}           # unknown, as in `script`: else it would show nothing
            self.bar = tqdm(total=total, initial=start, desc=title, leave=False, **size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()

    def update(self, by: int = 1, note: str = ""):
        """`by` more steps are done; `note` is shown beside the bar."""
        self.done += by
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(by)
        elif sys.stderr and time.monotonic() - self.shown > self.every:
            self.shown = time.monotonic()
            of = "" if self.total is None else f"/{self.total}"
            print(f"{self.title} {self.done}{of} {note}", file=sys.stderr, flush=True)

    def say(self, text: str):
        """A line above the bar."""
        tqdm.write(text) if self.bar is not None else print(text, flush=True)
