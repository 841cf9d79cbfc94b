"""What the scripts share: flags, devices, progress; for training, optimizer, schedule, log and exact resume. The loops are
in the scripts."""
import argparse
import fcntl
import functools
import inspect
import json
import math
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from minikd.checkpoint import check_vocabulary, model_folder, outline
from minikd.files import InputError, append_to, atomic_path, parse_json, read_json, remove, save_tensors
from minikd.model import Qwen2, Qwen2Config, run_blocks
from minikd.records import HALF, local_files

STATE, LOG, CONFIG = "state.safetensors", "log.jsonl", "config.json"
ANOTHER = "choose another --out"                                # what to do about a damaged CONFIG
# Names of the files that a run writes, and data may have.
WRITTEN = re.compile(r"(log|completions|held-out|table|teacher-answers|answers-.+)\.jsonl|config\.json")
LOCKS = {}                                                      # folder -> an open file: closing it would unlock the folder


def check_student(name, tokenizer):
    """Raises InputError for a model to train that lacks a tensor or is damaged, for a 4-bit one, whose weights cannot be
    trained, and for one with too few rows for the tokenizer. Reads no weights."""
    model, _, _ = outline(model_folder(name))
    if model.quantization:
        raise InputError(f"{name}: holds 4-bit weights, which cannot be trained; give the folder it was made from")
    check_vocabulary(name, model.config, tokenizer)


def make_optimizer(model: Qwen2, lr: float, weight_decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW; biases and norm weights have no weight decay. fused=True updates them in one pass and allocates nothing."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def compile_blocks(*models: Qwen2):
    """Lets torch.compile fuse the operations between a block's matrix products, for whole sequences and for decoding steps
    that a CUDA graph replays. One compiled graph serves all groups of blocks; the two models of a KD step took 20 s to compile.
    """
    torch._dynamo.config.recompile_limit = 64                   # run_blocks', for all models, modes, numbers of rows; not 8
    for model in models:
        model.model.compiled = torch.compile(run_blocks)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine") -> float:
    """The learning rate at step 0 .. steps-1: linear warm-up to peak, then constant, or a cosine down to peak / 10."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / (steps - warmup)                   # 0 .. 1
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))  # from 1.0 to 0.1


def pick_dtype(name: str, device: str) -> torch.dtype:
    """--dtype auto: bfloat16 on GPUs and on CPUs with instructions for it (AVX512-BF16, AMX), else float32.

    It is the dtype of the matrix products and of the teacher; the student's weights stay in float32.
    """
    if name != "auto":
        return getattr(torch, name)
    fast = device.startswith("cuda") or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def pick_device(name: str) -> str:
    """--device auto: a GPU if there is one, else the CPU. Another GPU than the first becomes torch's current one: a CUDA graph
    records there and nowhere else.  Raises InputError for a device that does not work."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU; use --device cpu")
    try:
        if torch.zeros(1, device=name, dtype=torch.float64).is_meta:            # sampling needs float64, which mps lacks
            raise InputError(f"--device {name}: holds no data; use --device cpu or cuda")
    except (RuntimeError, AssertionError, TypeError) as error:  # no such device, or torch built without it
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}; use --device cpu or cuda") from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return name


def spare_threads(config: Qwen2Config):
    """One thread if a model's matrices are too small to split, as the toy's: threads wait for each other at each of them,
    and while other programs use the cores two take 13 times as long as one (eval_rouge.py on the toy: 35 s, not 2.7)."""
    if config.hidden_size <= 256:
        torch.set_num_threads(1)


class Parser(argparse.ArgumentParser):
    """Its --help is the script's docstring, then one line per flag; no flag may be abbreviated. A wrong flag is an InputError,
    like every other error that the user can fix."""

    def __init__(self, doc: str):
        super().__init__(description=doc, usage="%(prog)s [flags]", allow_abbrev=False, formatter_class=(
            lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=125)))
        self.defaults = {}                                      # flag -> its default, and that in the toy world

    def parse_args(self, given: list[str] | None = None):
        for word in sys.argv[1:] if given is None else given:
            if not word or re.fullmatch(r"--[\w-]+=", word):    # an unset variable; as a path it would be the current folder
                raise InputError(f"{word!r}: is empty; give a value, or leave its flag out")
            if HALF.search(word):                               # bytes of a file's name; nothing could write it down
                raise InputError(f"{word!r}: is not UTF-8; rename the file or folder")
        return super().parse_args(given)

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def shortest(value) -> str:
    """A default as a user would type it: 1e-5, not 1e-05."""
    if isinstance(value, list):
        return " ".join(map(shortest, value))
    return f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def flag_group(parser: Parser, title: str):
    """The add_argument of a new group of flags. It adds choices and default to the help text, and leaves the default to
    fill_defaults, so that until then what was not given is None.

    toy  the default in the toy world, if it is another one
    """
    group = parser.add_argument_group(title)

    def add(*names, help="", default=None, toy=None, **options):
        if "action" not in options:
            options.setdefault("metavar", {int: "N", float: "X"}.get(options.get("type"), names[0].strip("-").upper()))
        help += f": {', '.join(options['choices'])}" if "choices" in options else ""
        shown = [what + shortest(x) for what, x in (("", default), ("toy ", toy)) if x is not None]
        flag = group.add_argument(*names, help=help + (f" ({'; '.join(shown)})" if shown else ""), **options)
        parser.defaults[flag.dest] = default, default if toy is None else toy

    return add


def check_positive(args, *names: str, or_zero: bool = False):
    """Raises InputError for the first of these flags with a number outside 0 < number <= 10^12 (or_zero: 0 <= number); None is
    allowed."""
    for name in names:
        value = getattr(args, name)
        numbers = value if isinstance(value, list) else [value]
        if any(not (0 < number <= 1e12 or or_zero and number == 0) for number in numbers if number is not None):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {'0 or more' if or_zero else 'above 0'} and at most "
                             "10^12; give another number")


def note_unused(args, reason: str, *names: str):
    """Says which of these flags were given, though they do nothing. (No error: one loop over all losses may give each the same
    flags.) Before fill_defaults."""
    given = [f"--{name.replace('_', '-')}" for name in names
             if getattr(args, name) is not None and getattr(args, name) is not False]       # 0 is given
    if given:
        print(f"note: without effect {reason}: {' '.join(given)}", file=sys.stderr)


def fill_defaults(args, parser: Parser, toy: bool):
    """Gives every flag that was left out its default, in the toy world or outside it."""
    for name, values in parser.defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[toy])


def flags_of(function, args, but: tuple[str, ...]) -> dict:
    """The flags that `function` takes as arguments of the same names, except those in `but`."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in vars(args).items() if name in names and name not in but}


# ---- what a run leaves behind

class Log:
    """log.jsonl, or another name: one JSON object per line, written immediately."""

    def __init__(self, folder, upto: int = 0, name: str = LOG):
        """Keeps the lines of the first `upto` steps: later ones, of a killed run, will be logged again."""
        self.path = Path(folder) / name
        kept = (line for line, value in _log_lines(self.path) if value["step"] <= upto) if upto else ()
        with atomic_path(self.path) as new, open(new, "wb") as file:
            file.writelines(kept)

    def write(self, *lines: dict, **values):
        """Appends one line with the keyword values, or all of `lines`."""
        with append_to(self.path) as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines or [values]))


def read_log(folder, name: str = LOG) -> list[dict]:
    """The complete lines of log.jsonl; a last one that a kill cut short is left out.  InputError for a damaged one."""
    return [value for _, value in _log_lines(Path(folder) / name)]


def _log_lines(path: Path) -> Iterator[tuple[bytes, dict]]:
    """Line by line, as GRPO's completions take hundreds of megabytes: (the line, its value)."""
    with open(path, "rb") if path.exists() else nullcontext([]) as lines:
        for line in lines:
            if not line.endswith(b"\n"):                        # cut short by a kill
                return
            try:
                value = parse_json(line[:-1])
                abs(value["step"])                              # a number
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}: holds a line that is not a step of a run ({error}); choose another --out") from error
            yield line, value


@functools.cache                                                # this process runs the code it began with
def commit() -> str | None:
    """The commit of minikd's own checkout, if there is one."""
    with suppress(OSError):                                     # git may not be installed
        here = Path(__file__).resolve().parents[1]
        return subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True,
                              text=True).stdout.strip() or None


def write_config(folder, settings: dict):
    """Writes a run's config.json: its settings, and the versions and the commit that it runs with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit(),
                "threads": torch.get_num_threads()}
    with atomic_path(Path(folder) / CONFIG) as new:
        new.write_text(json.dumps({"settings": settings, "versions": versions}, indent=2, default=str) + "\n")


def save_state(folder, model: Qwen2, optimizer: torch.optim.Optimizer, facts: dict, more: dict | None = None):
    """Writes all that the next step depends on to one file, completely or not at all: kill -9 loses only later steps.

    facts  small JSON values that load_state returns: the step, the best score so far
    more   tensors that load_state returns, by name (rollouts)
    """
    tensors = {f"more.{key}": value for key, value in (more or {}).items()}
    tensors |= {f"model.{key}": value for key, value in model.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():                  # i: the parameter's place in its groups
        tensors |= {f"optimizer.{i}.{key}": value for key, value in moments.items()}
    with atomic_path(Path(folder) / STATE) as new:
        save_tensors(tensors, new, {"facts": json.dumps(facts)})


def load_state(folder, model: Qwen2, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """Puts a saved state back, bit for bit; returns its facts, and the tensors saved as `more`."""
    path = Path(folder) / STATE
    try:
        with safe_open(path, framework="pt") as file:
            wanted = {f"model.{key}": list(value.shape) for key, value in model.state_dict().items()}
            held = {key: file.get_slice(key).get_shape() for key in file.keys() if key.startswith(("model.", "optimizer."))}
            if any(key.startswith("optimizer.") for key in held):                   # there are none before the first step
                for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                    shape = list(parameter.shape)
                    wanted |= {f"optimizer.{i}.{name}": size for name, size in
                               (("step", []), ("exp_avg", shape), ("exp_avg_sq", shape))}
            for key in sorted(wanted.keys() | held.keys()):     # all are checked before the first is changed
                if wanted.get(key) != held.get(key):
                    raise InputError(f"{path}: belongs to another model ({key.removeprefix('model.')} is {held.get(key)}, "
                                     f"here {wanted.get(key)}); start again without --resume, in another --out")
            for key, value in model.state_dict().items():
                value.copy_(file.get_tensor(f"model.{key}"))
            state = optimizer.state_dict()
            for _, i, name in (key.split(".") for key in wanted if key.startswith("optimizer.")):
                state["state"].setdefault(int(i), {})[name] = file.get_tensor(f"optimizer.{i}.{name}")
            optimizer.load_state_dict(state)
            more = {key.removeprefix("more."): file.get_tensor(key) for key in file.keys() if key.startswith("more.")}
            return json.loads(file.metadata()["facts"]), more
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged ({error}); start again without --resume, in another --out") from error


def settings_of(folder) -> dict:
    """The settings that the run in `folder` was started with.  Raises InputError if its config.json has none."""
    settings = read_json(Path(folder) / CONFIG, ANOTHER).get("settings")
    if not isinstance(settings, dict):
        raise InputError(f"{Path(folder) / CONFIG}: has no settings of a run; choose another --out")
    return settings


def check_free(out: Path, runs: list[Path], *, resume: bool, toy: bool, data=()):
    """Raises InputError if this run would destroy something: a model in a folder to be written, another run, the table and
    picture of runs beside it, or a file that it reads. Says if there is nothing to resume.

    runs  the folders that are going to be written. A real run may only be resumed, a toy's also be started again by the toy
    data  what the run reads, as data_files takes it
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; choose a folder with --out")
    if resume and not out.exists():
        print(f"{out}: nothing to resume there; the run begins")
    for folder in dict.fromkeys([out, *runs, out / "sft", out / "kd", *sorted(out.glob("lr-*"))]):
        if (folder / CONFIG).exists() and "settings" not in read_json(folder / CONFIG, ANOTHER):
            raise InputError(f"{folder / CONFIG}: belongs to a model, not to a run; choose another --out")
        lines = read_log(folder)
        may_go_on = toy or resume and folder in runs
        if lines and not (may_go_on and bool(settings_of(folder).get("toy")) == toy):       # a toy never touches a real run
            raise InputError(f"{folder}: holds {'another' if resume else 'a'} run already, {lines[-1]['step']} steps; "
                             f"{'' if resume else 'go on with --resume, or '}choose another --out")
    for folder in runs:
        for part in "best", "last":
            if (folder / part / CONFIG).exists() and not (folder / CONFIG).exists():
                raise InputError(f"{folder / part}: holds a model, which would be replaced; choose another --out")
    for file in local_files(data):
        if file.parent.resolve() in [folder.resolve() for folder in (out, *runs)] and WRITTEN.fullmatch(file.name):
            raise InputError(f"{file}: would be replaced by the run's own {file.name}; choose another --out")


def check_settings(folder, settings: dict):
    """Raises InputError, naming the first setting that differs from those the run in `folder` was started with. Of a model only
    its files' hash counts: it may have another name by now. A changed file of --rewards is only said."""
    essence = lambda value: re.sub(r"^.* (?=\(sha256 \w+\)$)", "", value) if isinstance(value, str) else value
    before = settings_of(folder)
    for key, value in json.loads(json.dumps(settings, default=str)).items():
        if key == "reward_files" and before.get(key) != value:                  # a bug in it may be mended
            print(f"{folder}: a file of --rewards has changed since this run was last started", file=sys.stderr)
        elif essence(before.get(key)) != essence(value):
            raise InputError(f"{folder}: --resume with --{key.replace('_', '-')} {value}, but the run began with "
                             f"{before.get(key)}; give the same flags, or another --out")


def begin_run(folder, settings: dict, resume: bool) -> bool:
    """Prepares `folder` for a run with these settings, after check_free; False if that run is finished already.

    If STATE exists afterwards, it is this run's own, to continue from.
    Raises InputError if a resumed run had other settings.
    """
    folder = Path(folder)
    lines, state = read_log(folder) if resume else [], folder / STATE
    if lines or resume and state.exists():                      # a log can be lost when the power fails
        check_settings(folder, settings)
        if lines and lines[-1].get("done"):
            print(f"{folder}: done already")
            remove(state)                                       # if it was killed before it could
            return False
        began = read_json(folder / CONFIG, ANOTHER).get("versions") or {}
        for what, now in ("torch", torch.__version__), ("threads", torch.get_num_threads()):
            if began.get(what, now) != now:
                print(f"{folder}: began with {what} {began[what]}, goes on with {now}; the weights may differ in the last digits")
    lock(folder)
    if not resume:
        for name in STATE, LOG:                                 # of another run: it must not be continued
            remove(folder / name)
    write_config(folder, settings)
    return True


def lock(folder: Path):
    """Keeps other processes' runs out of `folder` until this process ends, however it ends.  Raises InputError if one is in."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in LOCKS:
        return
    file = LOCKS[folder.resolve()] = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        del LOCKS[folder.resolve()]
        raise InputError(f"{folder}: another process is writing a run there; wait for it, or choose another --out") from None
    except OSError:                                             # a file system without locks
        pass


class Progress:
    """A bar on a terminal; in a log, one plain line every few seconds.  Use as `with`, and call update()."""

    def __init__(self, title: str, total: int, start: int = 0, every: float = 15.0):
        self.title, self.total, self.done, self.every, self.shown = title, total, start, every, time.monotonic()
        self.bar = tqdm(total=total, initial=start, desc=title, leave=False) if sys.stderr and sys.stderr.isatty() else None

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
            print(f"{self.title} {self.done}/{self.total} {note}", file=sys.stderr, flush=True)

    def say(self, text: str):
        """A line above the bar."""
        tqdm.write(text) if self.bar is not None else print(text, flush=True)
