"""Pictures of a run, where matplotlib is installed (pip install -e ".[plots]")."""
import math
from pathlib import Path

from minikd.files import atomic_path
from minikd.run import read_log


def plot_curves(runs: dict[str, Path], path, teacher: float | None = None) -> Path | None:
    """Held-out loss and ROUGE-L over the steps, one line per run, the teacher dashed (the paper's figures 2 and 3).

    runs     label -> a run's folder with its log.jsonl
    teacher  its ROUGE-L, 0 to 100
    Returns the picture's path, or None where matplotlib is not installed.
    """
    def draw(loss, rouge):
        for label, folder in runs.items():
            lines = [line for line in read_log(folder) if "rouge_l" in line]
            steps = [line["step"] for line in lines]
            loss.plot(steps, [line["valid_ce"] for line in lines], marker="o", label=label)
            rouge.plot(steps, [line["rouge_l"] for line in lines], marker="o", label=label)
        if teacher is not None:
            rouge.axhline(teacher, linestyle="--", color="black", label="teacher")
        rouge.legend()

    return _picture(path, draw, "held-out cross-entropy (nats per token)", "ROUGE-L")


def plot_rewards(folder, path) -> Path | None:
    """Rewards, KL and answer length over a GRPO run's steps, one at least, as in the paper's figure; None without matplotlib."""
    def draw(reward, kl, length):
        lines = [line for line in read_log(folder) if "reward" in line]
        steps = [line["step"] for line in lines]
        column = lambda key: [math.nan if line[key] is None else line[key] for line in lines]
        for key in [key for key in lines[0] if key == "reward" or key.count("/") == 1]:
            reward.plot(steps, column(key), label=key.removeprefix("reward/"), linewidth=2 if key == "reward" else 1)
        kl.plot(steps, column("kl"))
        length.plot(steps, column("length"))
        reward.legend()

    return _picture(path, draw, "reward", "KL (nats per token)", "tokens per answer")


def _picture(path, draw, *titles: str) -> Path | None:
    """Saves a picture of axes side by side, one per title, filled by draw(*axes); None without matplotlib."""
    try:
        from matplotlib.figure import Figure                    # no pyplot: no window, no global state
    except ImportError:
        return None
    except Exception as error:                                  # installed, but broken, or misled by MPLBACKEND
        print(f"{path}: no picture, as matplotlib does not load ({error}); reinstall it, or unset MPLBACKEND")
        return None
    figure = Figure(figsize=(1 + 4.5 * len(titles), 4), layout="constrained")
    panels = figure.subplots(1, len(titles))
    draw(*panels)
    for axes, title in zip(panels, titles):
        axes.set(xlabel="step", ylabel=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    with atomic_path(path) as new:
        figure.savefig(new, dpi=150, format=Path(path).suffix[1:])
    return Path(path)
