"""What the benchmarks share: children that measure themselves, repeats that take turns, memory, the machine's line.

A benchmark's own work runs in a child process (`python -m benchmarks.NAME --child ARGUMENT...`), so that one peer's
memory and threads are not the other's. A child prints one JSON line, last, with report(). Peers take turns
(in_turns), so that a slow spell of the machine falls on all of them; medians are compared. Two threads on two cores
lose far more than its share to a third: what other processes took of the cores meanwhile is measured, a child they
disturbed runs again, and the tables show it where it stayed.
"""
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1",
         "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
         "DATASETS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def version(package: str) -> str:
    from importlib.metadata import version
    return f"{package} {version(package)}"


def machine(*packages: str) -> str:
    """'AMD EPYC, 2 cores, load 0.3, Python 3.11.2, torch 2.13.0, 2025-11-24': under every table."""
    return ", ".join([cpu_model(), f"{os.cpu_count()} cores", f"load {os.getloadavg()[0]:.1f}",
                      f"Python {platform.python_version()}", *map(version, packages), str(date.today())])


# ---- memory of this process, in bytes: Linux keeps both figures

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
    """CPU time all processes of this machine have used, all cores together."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def settle(patience: float = 60):
    """Waits until the machine has been idle for a second, but not for ever."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = busy_seconds()
        time.sleep(1)
        if busy_seconds() - before < 0.1:
            return


def child(module: str, *arguments, python: str = sys.executable) -> dict:
    """Runs `python -m module --child arguments...`, by another interpreter where a peer needs one; returns what its report() printed, and 'others': the share of the
    cores that other processes took meanwhile."""
    command = [python, "-m", module, "--child", *map(str, arguments)]
    settle()
    before, start = busy_seconds() - own_seconds(), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | QUIET, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    others = (busy_seconds() - own_seconds() - before) / (time.monotonic() - start) / os.cpu_count()
    return json.loads(done.stdout.splitlines()[-1]) | {"others": max(0.0, others)}


def own_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def report(**figures):
    print("\n" + json.dumps(figures), flush=True)


def in_turns(jobs: dict, repeats: int, tries: int = 4) -> dict:
    """jobs: name -> function returning figures.  name -> the median of each figure over `repeats` turns.

    Of a turn that others disturbed by more than a twentieth of the cores, the quietest of `tries` counts.
    """
    results = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            runs = [job()]
            while runs[-1]["others"] > 0.05 and len(runs) < tries:
                runs.append(job())
            results[name].append(min(runs, key=lambda figures: figures["others"]))
    return {name: {key: statistics.median(figures[key] for figures in turns) for key in turns[0]}
            for name, turns in results.items()}


# ---- tables

def table(header: list[str], rows: list[list]):
    """First column to the left, the others to the right; floats as they come formatted."""
    cells = [header, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]),
              flush=True)
