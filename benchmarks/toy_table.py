"""The paper's Table 1 on the toy world: mean and spread (standard deviation) of ROUGE-L over seeds.

    python -m benchmarks.toy_table              # about 8 minutes on a CPU

Each seed is a whole run of `python train_kd.py --seed S`: another teacher, other training records, another base; the world's
facts and the test prompts are the same for all.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from benchmarks.measure import machine

ROOT = Path(__file__).parents[1]


def run(seed: int, folder: Path) -> tuple[dict, float]:
    """One seed -> {model: {category: ROUGE-L}}, and the seconds it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "train_kd.py"), "--seed", str(seed), "--out", str(folder)], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "table.jsonl").read_text().splitlines()]
    return {row.pop("model"): row for row in rows}, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tables, seconds = zip(*(run(seed, Path(folder) / str(seed)) for seed in args.seeds))
    models, categories = list(tables[0]), [key for key in tables[0]["Base"] if key != "metrics"]
    print(machine())
    print(f"{len(args.seeds)} seeds, {mean(seconds):.0f} s each")
    print("| | " + " | ".join(models) + " | KD / Teacher |\n|---" * 1 + "|" + "---|" * (len(models) + 1))
    for category in categories:
        cells = []
        for model in models:
            values = [table[model][category] for table in tables]
            cells.append(f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}")
        ratio = mean(table["KD"][category] / table["Teacher"][category] for table in tables)
        print(f"| {category} | " + " | ".join(cells) + f" | {100 * ratio:.0f}% |")


if __name__ == "__main__":
    main()
