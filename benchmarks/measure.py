"""What the benchmarks share: flags, child processes that measure themselves, repeats in turns, memory, trl's trainers, tables.

What is measured runs in a child process (`python -m benchmarks.NAME --child ARGUMENT...`), so that each peer has its own
memory and threads. A child prints one JSON line, its last, by report(). Peers take turns (in_turns), so that a slow phase of
the machine affects all of them; medians are compared. A third busy thread slows two threads on two cores by far more than its
share. So the share of the cores that other processes took is measured, a disturbed child runs again, and the tables show the
share in the column `others`.
"""
import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).parents[1]
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1",
         "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
         "DATASETS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


def make_parser(doc: str, **defaults: int) -> argparse.ArgumentParser:
    """A script's parser: --help shows its docstring's first paragraph.  defaults: of --steps and --repeats, if it has them"""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0], allow_abbrev=False)
    helps = {"steps": "of each child; the first is not timed", "repeats": "children per row"}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=helps[name])
    return parser


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine(*packages: str) -> str:
    """The line under every table, such as 'AMD EPYC, 2 cores, load 0.3, Python 3.11.2, torch 2.13.0, 2025-11-24'."""
    return ", ".join([cpu_model(), f"{os.cpu_count()} cores", f"load {os.getloadavg()[0]:.1f}",
                      f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages),
                      str(date.today())])


# ---- this process's memory in bytes, as Linux counts it

def status_bytes(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def resident() -> int:
    return status_bytes("VmRSS")


def peak_resident() -> int:
    return status_bytes("VmHWM")


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


# ---- children

def busy_seconds() -> float:
    """CPU time that all processes of this machine have used, summed over the cores, without idle time and waiting for disks."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def settle(patience: float = 60):
    """Waits until the machine has been idle for a second, at most `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < 0.1:
            return


def run(command: list[str], variables: dict[str, str]) -> str:
    """Runs a command in the repository's folder -> its standard output; if it fails, this process ends with its errors."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def run_script(script: str, *flags) -> float:
    """Runs one of the repository's scripts on one thread -> its seconds."""
    start = time.perf_counter()
    run([sys.executable, script, *map(str, flags)], {"OMP_NUM_THREADS": "1"})
    return time.perf_counter() - start


def toy_run(world: Path, start: str, out: Path, *flags) -> tuple[float, list[dict]]:
    """train_kd.py on the records of a toy world that it has made in `world`, from its student `start`, with the flags of the toy
    world that are not given -> its seconds, and the rows of its table"""
    data = world / "data"
    seconds = run_script(
        "train_kd.py", "--student", world / start / "best", "--teacher", world / "teacher/best", "--data", data / "train.jsonl",
        "--valid-data", data / "valid.jsonl", "--eval-data", data / "test.jsonl", "--rouge", "unicode", "--dtype", "float32",
        "--batch-size", 16, "--grad-accum", 2, "--warmup", 30, "--eval-examples", 100, "--max-new-tokens", 48, "--out", out,
        *flags)
    return seconds, rows_of_table(out)


def rows_of_table(out: Path) -> list[dict]:
    """What train_kd.py left in table.jsonl: a row for each model."""
    return [json.loads(line) for line in (out / "table.jsonl").read_text().splitlines()]


def child(module: str, *arguments, python: str = sys.executable) -> dict:
    """Runs `python -m module --child arguments...` -> what its report() printed, and 'others': the share of the cores that other
    processes took meanwhile.  python  the interpreter, for a peer that needs another one"""
    command = [python, "-m", module, "--child", *map(str, arguments)]
    settle()
    before, start = busy_seconds() - own_seconds(), time.monotonic()
    said = run(command, QUIET)
    others = (busy_seconds() - own_seconds() - before) / (time.monotonic() - start) / os.cpu_count()
    return json.loads(said.splitlines()[-1]) | {"others": max(0.0, others)}


def report(**figures):
    print("\n" + json.dumps(figures), flush=True)


def in_turns(names, job, repeats: int, tries: int = 4) -> dict:
    """Calls job(name), which returns figures, for each name in turn -> {name: the median of each figure over `repeats` turns}

    If others took more than a twentieth of the cores, a turn is tried again, up to `tries` times, and the quietest try counts.
    """
    results = {name: [] for name in names}
    for _ in range(repeats):
        for name in results:
            runs = [job(name)]
            while runs[-1]["others"] > 0.05 and len(runs) < tries:
                runs.append(job(name))
            results[name].append(min(runs, key=lambda figures: figures["others"]))
    return {name: {key: median(figures[key] for figures in turns) for key in turns[0]}
            for name, turns in results.items()}


# ---- the trainers of trl

def trl_options(mode: str, steps: int, rows: int) -> dict:
    """What each of them is given: `rows` rows a step, AdamW at a constant rate, gradients clipped at 1, nothing saved, and the
    precision of `mode`: float32, bf16 (autocast), or default, trl's own, which recomputes activations too."""
    precision = {} if mode == "default" else dict(bf16=mode == "bf16", gradient_checkpointing=False)
    return dict(use_cpu=True, max_steps=steps, per_device_train_batch_size=rows, optim="adamw_torch_fused",
                lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to="none",
                disable_tqdm=True, **precision)


def word_tokenizer(words: int):
    """One word per id, which each of them needs: <pad>, <eos>, w2, w3, ...; 2 words where no text is encoded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    model = models.WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, words)}, unk_token="<pad>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def trainer_clock():
    """A callback: `seconds` of each step, the `losses` that were logged, and the bytes resident `before` the first step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds, losses, before = [], [], None

        def on_step_begin(self, *_, **__):
            self.before = self.before or resident()
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.start)

        def on_log(self, args, state, control, logs, **_):
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Clock()


# ---- tables

def table(header: list[str], rows: list[list]):
    """Prints the rows: the first column aligned left, the others right."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]),
              flush=True)


def seeds_table(seeds: list[dict], columns: dict[str, str]):
    """Prints seeds [{row: {column: value}}] as a Markdown table: mean ± standard deviation over the seeds that have a value, and
    in a column without decimals the mean alone.  columns  name -> format"""
    print("| | " + " | ".join(name.replace("_", " ") for name in columns) + " |\n|---|" + "---|" * len(columns))
    for row in seeds[0]:
        cells = []
        for name, digits in columns.items():
            values = [seed[row][name] for seed in seeds if name in seed[row]]
            spread = f" ± {stdev(values):{digits}}" if len(values) > 1 and not digits.startswith(".0") else ""
            cells.append(f"{mean(values):{digits}}{spread}" if values else "")
        print(f"| {row} | " + " | ".join(cells) + " |")


def each_seed(seeds: list[dict], column: str, digits: str, names):
    """Prints a column of seeds_table with one value a seed, for comparisons in pairs: all rows of a seed share its start."""
    print(f"\n{column} of each seed\n| | " + " | ".join(map(str, names)) + " |\n|---|" + "---|" * len(seeds))
    for row in seeds[0]:
        if column in seeds[0][row]:
            print(f"| {row} | " + " | ".join(f"{seed[row][column]:{digits}}" for seed in seeds) + " |")


FIGURES = {"seconds": ("s a step", 2), "sampling": ("of it sampling", 2), "peak": ("peak GB", 2), "before": ("before", 2),
           "loss": ("first loss", 4), "last": ("last loss", 4)}                 # what children report -> heading, decimals
STEPS = [("trl", "float32"), ("minikd", "float32"), ("trl", "bf16"), ("minikd", "bf16"), ("trl", "default")]


def compare_steps(module: str, steps: int, repeats: int, folder, runs: list[tuple[str, str]] = STEPS):
    """Times a training step by each (method, mode) in children of `module`, in turns, and prints a row for each: the FIGURES that
    were reported (0 is left blank), and for the peers how much faster minikd is and which share of their peak it needs, in the
    same mode; trl's mode `default` is compared with bf16."""
    figures = in_turns(runs, lambda run: child(module, *run, steps, folder), repeats)
    rows = []
    columns = {name: shown for name, shown in FIGURES.items() if name in figures[runs[0]]}
    for method, mode in runs:
        row, ours = figures[method, mode], figures["minikd", "float32" if mode == "float32" else "bf16"]
        ratios = ([f"{row['seconds'] / ours['seconds']:.2f}x", f"{ours['peak'] / row['peak']:.2f}"]
                  if method not in ("minikd", "lean") else ["", ""])
        cells = [f"{row[name]:.{digits}f}" if row[name] else "" for name, (_, digits) in columns.items()]
        rows.append([f"{mode} {method}", *cells, f"{row['others']:.0%}", *ratios])
    table(["", *(heading for heading, _ in columns.values()), "others", "minikd faster", "its peak"], rows)
    print(f"{steps} steps, {repeats} turns; " + machine("torch", "transformers", "trl"))
