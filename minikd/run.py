"""A run's folder: its log, its settings and its saved state; where a run may begin, and how it goes on exactly."""
import functools
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minikd.errors import InputError
from minikd.files import append_to, atomic_path, check_writable, hold, holds_cwd, parse_json, read_json, remove, save_tensors
from minikd.model import Qwen2

STATE, LOG, CONFIG, LOCK = "state.safetensors", "log.jsonl", "config.json", ".lock"
SAVE_EVERY = 600.0                              # seconds after which a step ends with saving the state, 6 GB for a 0.5B student
ANOTHER = "choose another --out"                                # what to do about a damaged CONFIG
LOCKS = {}                                                      # folder -> the file that holds its lock


# ---- the log

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
    if not path.exists():
        return
    with open(path, "rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):                        # cut short by a kill
                return
            try:
                value = parse_json(line[:-1])
                abs(value["step"])                              # a number
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path}: holds a line that is not a step of a run ({error}); choose another --out") from error
            yield line, value


# ---- the settings

@functools.cache                                                # this process runs the code it began with
def commit() -> str | None:
    """The commit of minikd's own checkout, if there is one."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():                            # installed: a repository around it is another project's
        return None
    with suppress(OSError):                                     # git may not be installed
        return subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True,
                              text=True).stdout.strip() or None


def write_config(folder, settings: dict):
    """Writes a run's config.json: its settings, and the versions and the commit that it runs with."""
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                **{name: version(name) for name in ("tokenizers", "safetensors", "numpy")},
                "commit": commit(), "threads": torch.get_num_threads()}
    with atomic_path(Path(folder) / CONFIG) as new:
        new.write_text(json.dumps({"settings": settings, "versions": versions}, indent=2, default=str) + "\n")


def settings_of(folder) -> dict:
    """The settings that the run in `folder` was started with.  Raises InputError if its config.json has none."""
    settings = read_json(Path(folder) / CONFIG, ANOTHER).get("settings")
    if not isinstance(settings, dict):
        raise InputError(f"{Path(folder) / CONFIG}: has no settings of a run, so it belongs to a model, not to a run; "
                         "choose another --out")
    return settings


def check_settings(folder, settings: dict):
    """Raises InputError, naming the first setting that differs from those the run in `folder` was started with. For a model
    or a data file only the hash is compared, for a cache only whether there is one: their names may have changed. A changed file
    of --rewards is only reported."""
    before = settings_of(folder)
    settings = json.loads(json.dumps(settings, default=str))
    for key in "rows", "steps", "eval_every", "reward_files":   # last: other flags and the data can change them
        if key in settings:
            settings[key] = settings.pop(key)
    for key in settings:
        flag, value, began = f"--{key.replace('_', '-')}", settings[key], before.get(key)
        name, now = _name_and_content(key, value)
        name_then, then = _name_and_content(key, began)
        if now == then or key == "rows" and None in (value, began):             # an older minikd recorded none
            continue
        if key == "reward_files":                                               # a bug in one may be fixed
            print(f"{folder}: a file of --rewards has changed since this run was last started", file=sys.stderr)
        elif key == "rows":
            raise InputError(f"{folder}: --resume, but the data's tokens differ from those that the run began with; "
                             "undo the change to the tokenizer, its chat template or minikd, or choose another --out")
        elif key not in before:
            raise InputError(f"{folder}: holds a run of another script, or of a minikd without {flag}; choose another --out")
        elif name and name == name_then:
            raise InputError(f"{folder}: --resume, but the content of {flag} {name} has changed since the run began; put it "
                             "back, or choose another --out")
        else:
            as_typed = [re.sub(r"\btorch\.(?=b?float)", "", str(each)) for each in (value, began)]
            raise InputError(f"{folder}: --resume with {flag} {as_typed[0]}, but the run began with {as_typed[1]}; "
                             "give the same flags, or another --out")


def _name_and_content(key: str, value) -> tuple:
    """The name of a model or of data files, None for other settings; and what must not change."""
    if isinstance(value, str) and (named := re.fullmatch(r"(.*) (\(sha256 \w+\))", value)):
        return named[1], named[2]
    if key in ("data", "lm_data", "valid_data", "eval_data") and value:
        return " ".join(file[0] for file in value), [file[-1] for file in value]
    return None, value is not None if key == "cache_teacher" else value


# ---- the saved state

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


def load_state(folder, model: Qwen2, optimizer: torch.optim.Optimizer, begun: dict) -> tuple[dict, dict]:
    """Puts a saved state back, bit for bit; returns its facts, and the tensors saved as `more`.  begun: the facts before the
    first step, returned where no state was saved; those saved must have the same types"""
    path = Path(folder) / STATE
    if not path.exists():
        return begun, {}
    try:
        with safe_open(path, framework="pt") as file:
            held = {key: file.get_slice(key).get_shape() for key in file.keys() if key.startswith(("model.", "optimizer."))}
            wanted = {f"model.{key}": list(value.shape) for key, value in model.state_dict().items()}
            if any(key.startswith("optimizer.") for key in held):                   # there are none before the first step
                for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
                    shape = list(parameter.shape)
                    wanted |= {f"optimizer.{i}.step": [], f"optimizer.{i}.exp_avg": shape, f"optimizer.{i}.exp_avg_sq": shape}
            for key in sorted(wanted.keys() | held.keys()):     # all are checked before the first is changed
                if wanted.get(key) != held.get(key):
                    raise InputError(f"{path}: belongs to another model ({key.removeprefix('model.')} is {held.get(key)}, "
                                     f"here {wanted.get(key)}); start again without --resume, in another --out")
            try:
                facts = parse_json(file.metadata()["facts"])
                if any(type(facts[name]) is not type(value) for name, value in begun.items()):
                    raise TypeError
            except (ValueError, TypeError, KeyError) as error:
                raise SafetensorError(f"it does not hold {' and '.join(begun)}") from error
            for key, value in model.state_dict().items():
                value.copy_(file.get_tensor(f"model.{key}"))
            state = optimizer.state_dict()
            for _, i, name in (key.split(".") for key in wanted if key.startswith("optimizer.")):
                state["state"].setdefault(int(i), {})[name] = file.get_tensor(f"optimizer.{i}.{name}")
            optimizer.load_state_dict(state)
            more = [key for key in file.keys() if key.startswith("more.")]
            return facts, {key.removeprefix("more."): file.get_tensor(key) for key in more}
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged ({error}); start again without --resume, in another --out") from error


# ---- where a run may begin, and where it goes on

def check_free(out: Path, runs: list[Path], *, resume: bool, toy: bool, own=(), cache=None):
    """Raises InputError if this run would destroy something: a model in a folder to be written, another run, the table and
    picture of runs beside it, or a file that no run wrote.

    runs   the folders to be written. A run that is there already may only be resumed; the toy may also start its own runs anew
    own    globs of files that it writes in `out`, beside its log and its config
    cache  the folder of --cache-teacher, which may be anywhere else
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; choose a folder with --out")
    for folder in dict.fromkeys([out, *runs, out / "sft", out / "kd", *sorted(out.glob("lr-*"))]):
        before, lines = settings_of(folder) if (folder / CONFIG).exists() else {}, read_log(folder)
        same_kind = bool(before.get("toy")) == toy              # a toy never touches a real run
        ours = same_kind and folder in runs
        if lines and not (same_kind and toy or resume and ours):
            raise InputError(f"{folder}: already holds {'a' if ours else 'another'} run of {lines[-1]['step']} steps; "
                             f"{'continue it with --resume, or ' if ours else ''}choose another --out")
    for folder in runs:
        for part in "best", "last":
            place = folder / part
            if place.is_dir() and any(place.iterdir()) and not (folder / CONFIG).exists():
                what = "a model" if (place / CONFIG).exists() else "files"
                raise InputError(f"{place}: holds {what}, which would be replaced; choose another --out")
            if holds_cwd(place):
                raise InputError(f"{place}: is or contains the current folder, and would be replaced; choose another --out")
            if cache and Path(cache).resolve().is_relative_to(place.resolve()):
                raise InputError(f"--cache-teacher {cache}: lies in {place}, which this run replaces; choose another folder")
            if place.is_dir():
                check_writable(place)
    begun = any((folder / name).exists() for folder in (out, *runs) for name in (LOCK, CONFIG))
    replaced = sorted(file for name in own for file in out.glob(name))
    if replaced and not begun:
        raise InputError(f"{replaced[0]}: was not written by a run, and would be replaced; choose another --out")


def begin_run(folder, settings: dict, resume: bool) -> bool:
    """Prepares `folder` for a run with these settings, after check_free; False if that run is finished already. If STATE exists
    afterwards, it is this run's own, to continue from.  Raises InputError if a resumed run had other settings."""
    folder = Path(folder)
    lines, state = read_log(folder) if resume else [], folder / STATE
    if lines or resume and state.exists():                      # a log can be lost when the power fails
        check_settings(folder, settings)
        if lines and lines[-1].get("done"):
            print(f"{folder}: done already")
            remove(state)                                       # left if the run was killed just before
            return False
        began = read_json(folder / CONFIG, ANOTHER).get("versions")
        for what, now in ("torch", torch.__version__), ("threads", torch.get_num_threads()):
            if isinstance(began, dict) and began.get(what, now) != now:
                print(f"{folder}: began with {what} {began[what]}, continues with {now}; the weights may differ in the last "
                      "digits")
        if not state.exists():
            print(f"{folder}: no state was saved; the run starts again at step 1")
    elif resume:
        print(f"{folder}: no run to resume; a new one begins")
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
    try:
        LOCKS[folder.resolve()] = hold(folder / LOCK)
    except BlockingIOError:
        raise InputError(f"{folder}: another process is writing a run there; wait for it, or choose another --out") from None
