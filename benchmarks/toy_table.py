"""Claim: on the toy world the paper's order holds, Base < SFT < KD < Teacher; and fine-tuning on the teacher's answers, not on
the data's noisy ones, gains as much as KD or more. The paper's Table 1 with two controls, mean and sd over seeds.

    python -m benchmarks.toy_table              # about 12 minutes on a CPU

Each seed is a whole run of `python train_kd.py --seed S`: another teacher, other training records, another base; the world's
facts and the test prompts are the same for all. Then the two controls, from the same base, with the same flags and --seq-kd: the
teacher's answers to the same prompts, sampled once. One thread, which the toy world takes by itself too.
"""
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.measure import each_seed, machine, make_parser, rows_of_table, run_script, seeds_table, toy_run

CONTROLS = {"SFT, teacher's answers": "sft", "KD, teacher's answers": "forward_kl"}


def models_of(rows: list[dict]) -> dict[str, dict[str, float]]:
    """A run's table: {model: {category: ROUGE-L, ..., "exact match": per cent}}."""
    return {row.pop("model"): row | {"exact match": row.pop("metrics")["exact match"]} for row in rows}


def one_seed(seed: int, folder: Path) -> tuple[dict, float]:
    """-> {category: {model: ROUGE-L}}, and the seconds that train_kd.py took."""
    seconds = run_script("train_kd.py", "--seed", seed, "--out", folder)
    models = models_of(rows_of_table(folder))
    for name, loss in CONTROLS.items():
        _, rows = toy_run(folder, "base", folder / f"control-{loss}", "--loss", loss, "--seq-kd", "--seed", seed, "--steps", 400,
                          "--lr", 3e-3, "--eval-every", 50)
        models[name] = models_of(rows)[loss]
    found = {category: {name: row[category] for name, row in models.items()} for category in models["Base"]}
    for row in found.values():
        row["KD / Teacher"] = row["KD"] / row["Teacher"]
    return found, seconds


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds, seconds = zip(*(one_seed(seed, Path(folder) / str(seed)) for seed in args.seeds))
    print(machine())
    print(f"{len(args.seeds)} seeds, train_kd.py {mean(seconds):.0f} s each")
    seeds_table(seeds, dict.fromkeys(("Base", "SFT", "KD", "Teacher"), ".1f") | {"KD / Teacher": ".0%"}
                | dict.fromkeys(CONTROLS, ".1f"))
    by_model = [{name: {"ROUGE-L": value} for name, value in seed["all"].items() if name != "KD / Teacher"} for seed in seeds]
    each_seed(by_model, "ROUGE-L", ".1f", args.seeds)


if __name__ == "__main__":
    main()
