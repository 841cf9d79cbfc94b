"""The README's picture, drawn from the tables in benchmarks/results: it cannot show other numbers than these.

    python -m benchmarks.figures                # writes docs/results.png; needs pip install -e ".[plots]"
"""
from pathlib import Path

from benchmarks.measure import make_parser

RESULTS = Path(__file__).parent / "results"
COLOURS = {"Base": "#c7c7c7", "SFT": "#7f7f7f", "KD": "#1f77b4", "SFT, teacher's answers": "#ff9f40", "on-policy": "#d62728"}
MODELS = "Base", "SFT", "KD", "SFT, teacher's answers"          # of the first panel
ERROR = dict(capsize=3, error_kw=dict(elinewidth=1))


def table(name: str) -> dict[str, dict[str, tuple[float, float]]]:
    """The first table of a results file: row -> column -> (mean, standard deviation)."""
    lines = [line.strip("|").split("|") for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
    start = next(i for i, line in enumerate(lines) if len(line) > 2)
    columns, found = [cell.strip() for cell in lines[start]], {}
    for cells in lines[start + 2:]:
        if len(cells) != len(columns):                          # the table's end
            break
        found[cells[0].strip()] = {column: tuple(map(float, cell.split("±")))
                                   for column, cell in zip(columns, cells) if "±" in cell}
    return found


def draw_domains(axes):
    """The paper's Table 1."""
    rows = table("toy_table.txt")
    for k, model in enumerate(MODELS):
        means, spreads = zip(*(rows[domain][model] for domain in rows))
        axes.bar([i + 0.21 * (k - 1.5) for i in range(len(rows))], means, 0.2, yerr=spreads, color=COLOURS[model], label=model,
                 **ERROR)
    axes.axhline(rows["all"]["Teacher"][0], linestyle="--", color="black", label="teacher")
    axes.set_xticks(range(len(rows)), [name.replace(" ", "\n") for name in rows])
    axes.set(ylim=(0, 142), yticks=range(0, 101, 20), ylabel="ROUGE-L; % exact", title="distilled instead of fine-tuned")
    axes.legend(loc="upper center", ncols=3, frameon=False, columnspacing=1, handlelength=1.2)


def kind_of(method: str) -> str:
    """On whose answers a method of distill_table trains, or SFT."""
    if "teacher's" in method:
        return "SFT, teacher's answers"
    if "on-policy" in method or method == "MiniLLM":
        return "on-policy"
    return "SFT" if "SFT" in method else "KD"


def draw_losses(axes):
    """Every loss from the same start: how near the student's own answers are to the teacher's distribution, and how right."""
    rows = table("distill_table.txt")
    kinds = {name: kind_of(name) for name in rows}
    labels = {"SFT": ("fine-tuning: the start,\nand 400 updates more", (30, 79.5)),
              "KD": ("five divergences,\non the data's answers", (18, 93)),
              "SFT, teacher's answers": ("SFT and reverse KL,\non the teacher's answers", (9.5, 83.5)),
              "on-policy": ("MiniLLM and two more,\non the student's own", (11, 96))}
    for kind, (label, place) in labels.items():
        points = [row for name, row in rows.items() if kinds[name] == kind and "sequence KL" in row]
        (x, dx), (y, dy) = (zip(*(row[key] for row in points)) for key in ("sequence KL", "ROUGE-L"))
        axes.errorbar(x, y, yerr=dy, xerr=dx, fmt="o", color=COLOURS[kind], elinewidth=0.8)
        axes.text(*place, label, color=COLOURS[kind])
    axes.axhline(rows["teacher"]["ROUGE-L"][0], linestyle="--", color="black")
    axes.set_xscale("log")
    axes.set_xticks([4, 8, 16, 32], [4, 8, 16, 32])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set(xlabel="KL(student ‖ teacher) of whole answers, nats  →", ylabel="ROUGE-L",
             title="every loss, 400 updates from one start")


def draw_grpo(axes):
    """Right answers before and after GRPO."""
    rows = table("grpo_table.txt")
    for k, (after, colour) in enumerate((("", "#c7c7c7"), (", then GRPO", "#2ca02c"))):
        bars = [rows[start + after][how] for how in ("sampled", "greedy") for start in ("SFT", "KD")]
        means, spreads = zip(*bars)
        axes.bar([i + 0.36 * k - 0.18 for i in range(4)], means, 0.34, yerr=spreads, color=colour,
                 label="after GRPO" if after else "before", **ERROR)
    axes.set_xticks(range(4), ["SFT\nsampled", "KD\nsampled", "SFT\ngreedy", "KD\ngreedy"])
    axes.set(ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1], ylabel="share of right answers", title="GRPO, 250 steps on sums")
    axes.legend(loc="upper center", ncols=2, frameon=False)


def draw():
    """The picture, a matplotlib Figure of three panels."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, fill in zip(figure.subplots(1, 3), (draw_domains, draw_losses, draw_grpo)):
        fill(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    return figure


def main():
    make_parser(__doc__).parse_args()
    path = RESULTS.parents[1] / "docs" / "results.png"
    draw().savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
