"""Pictures of a run, where matplotlib is installed (pip install -e ".[plots]")."""
import math
from pathlib import Path

from minikd.files import atomic_path
from minikd.training import read_log


def plot_curves(runs: dict[str, Path], path, teacher: float | None = None) -> Path | None:
    """Held-out loss and ROUGE-L over the steps, one line a run, the teacher dashed (the paper's figures 2 and 3).

    runs     label -> a run's folder with its log.jsonl
    teacher  its ROUGE-L, 0 to 100
    Returns the picture's path, or None where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure                    # no pyplot: no window, no global state
    except ImportError:
        return None
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, folder in runs.items():
        lines = [line for line in read_log(folder) if "rouge_l" in line]
        steps = [line["step"] for line in lines]
        left.plot(steps, [line["valid_ce"] for line in lines], marker="o", label=label)
        right.plot(steps, [line["rouge_l"] for line in lines], marker="o", label=label)
    if teacher is not None:
        right.axhline(teacher, linestyle="--", color="black", label="teacher")
    left.set(xlabel="optimizer step", ylabel="held-out cross-entropy (nats a token)")
    right.set(xlabel="optimizer step", ylabel="ROUGE-L")
    right.legend()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    with atomic_path(path) as new:
        figure.savefig(new, dpi=150, format=Path(path).suffix[1:])
    return Path(path)


def plot_rewards(folder, path) -> Path | None:
    """Rewards, KL and answer length over a GRPO run's steps, as in the paper's figure; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = [line for line in read_log(folder) if "reward" in line]
    figure = Figure(figsize=(13, 4), layout="constrained")
    reward, kl, length = figure.subplots(1, 3)
    steps = [line["step"] for line in lines]
    for key in [key for key in lines[0] if key == "reward" or key.count("/") == 1] if lines else []:
        reward.plot(steps, [math.nan if line[key] is None else line[key] for line in lines],
                    label=key.removeprefix("reward/"), linewidth=2 if key == "reward" else 1)
    kl.plot(steps, [line["kl"] for line in lines])
    length.plot(steps, [line["length"] for line in lines])
    for axes, name in (reward, "reward"), (kl, "KL to the start (nats a token)"), (length, "tokens of an answer"):
        axes.set(xlabel="step", ylabel=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    if lines:
        reward.legend()
    with atomic_path(path) as new:
        figure.savefig(new, dpi=150, format=Path(path).suffix[1:])
    return Path(path)
