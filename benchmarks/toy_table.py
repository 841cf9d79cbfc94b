"""Claim: on the toy world KD keeps 88% of its teacher's ROUGE-L, SFT 77%: the paper's Table 1, mean and sd over seeds.

    python -m benchmarks.toy_table              # about 8 minutes on a CPU

Each seed is a whole run of `python train_kd.py --seed S`: another teacher, other training records, another base; the world's
facts and the test prompts are the same for all. One thread, which the toy world takes by itself too.
"""
import json
import tempfile
from pathlib import Path
from statistics import mean

from benchmarks.measure import machine, make_parser, run_script, seeds_table


def one_seed(seed: int, folder: Path) -> tuple[dict, float]:
    """-> {category: {model: ROUGE-L}}, and the seconds it took."""
    seconds = run_script("train_kd.py", "--seed", seed, "--out", folder)
    models = [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]
    found = {category: {row["model"]: row[category] for row in models}
             for category in models[0] if category not in ("model", "metrics")}
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
    print(f"{len(args.seeds)} seeds, {mean(seconds):.0f} s each")
    seeds_table(seeds, dict.fromkeys(seeds[0]["all"], ".1f") | {"KD / Teacher": ".0%"})


if __name__ == "__main__":
    main()
