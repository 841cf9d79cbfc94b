"""Claim: GRPO raises the sampled accuracy of a student trained by SFT by 40 points on held-out sums, and lowers neither its
greedy accuracy nor its format reward. The table also has a student trained by KD. Mean and sd over seeds.

    python -m benchmarks.grpo_table             # 25 minutes on one CPU core

Each seed: train_kd.py trains a teacher (5 x as large as the student) on right answers and, from the same initial weights, a
student by SFT and one by KD on answers of mixed quality (30% without their thoughts, a quarter of the others with a wrong step);
train_grpo.py continues from both with its toy defaults. 200 held-out sums; sampled is at temperature 1.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from benchmarks.measure import machine
from minikd import problems, toy
from minikd.checkpoint import save_model
from minikd.files import write_jsonl
from minikd.model import Qwen2

ROOT = Path(__file__).parents[1]
COLUMNS = {"sampled": "sampled", "greedy": "greedy", "reward/format": "format", "reward/steps": "steps", "length": "tokens"}


def run(script: str, *flags):
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")


def start(folder: Path, seed: int):
    """Writes the tokenizer, the untrained teacher and student, and both sets of records."""
    mixed = problems.toy_records("sums", 8000, seed=1000 + seed)
    write_jsonl(mixed, folder / "mixed.jsonl")
    write_jsonl(problems.toy_records("sums", 8000, seed=5000 + seed, clean=True), folder / "clean.jsonl")
    tokenizer = toy.make_tokenizer(folder / "tokenizer", [f"{r['instruction']}\n{r['response']}" for r in mixed[:2000]])
    for name, config in ("teacher", toy.teacher_config), ("student", toy.student_config):
        tokenizer.save(folder / f"start-{name}")
        save_model(Qwen2(config(len(tokenizer))).init_weights(seed), folder / f"start-{name}")


def one_seed(folder: Path, seed: int) -> dict[str, dict]:
    start(folder, seed)
    common = ["--batch-size", 64, "--warmup", 50, "--validation", 100, "--eval-examples", 20, "--max-new-tokens", 72,
              "--rouge", "unicode", "--dtype", "float32", "--seed", seed]
    run("train_kd.py", "--student", folder / "start-teacher", "--data", folder / "clean.jsonl", "--loss", "sft", "--steps",
        500, "--eval-every", 500, "--lr", 2e-3, "--out", folder / "teacher", *common)
    run("train_kd.py", "--student", folder / "start-student", "--teacher", folder / "teacher/last", "--data",
        folder / "mixed.jsonl", "--steps", 400, "--eval-every", 400, "--lr", 4e-3, "--out", folder, *common)
    rows = {}
    for name in "sft", "kd":
        begun = time.perf_counter()
        run("train_grpo.py", "--model", folder / name / "last", "--seed", seed, "--out", folder / f"grpo-{name}")
        lines = [json.loads(line) for line in (folder / f"grpo-{name}/log.jsonl").read_text().splitlines()]
        seconds = time.perf_counter() - begun
        judged = [line for line in lines if "valid_sampled" in line]
        rows[name.upper()] = {key: judged[0][f"valid_{key}"] for key in COLUMNS}
        rows[f"{name.upper()}, then GRPO"] = {key: judged[-1][f"valid_{key}"] for key in COLUMNS} | {"seconds": seconds}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [one_seed(Path(folder) / str(seed), seed) for seed in args.seeds]
    print(f"{len(seeds)} seeds; {machine('torch')}")
    print("| | " + " | ".join(COLUMNS.values()) + " | seconds |\n|---|" + "---|" * (len(COLUMNS) + 1))
    for name in seeds[0]:
        cells = []
        for key in (*COLUMNS, "seconds"):
            values = [seed[name][key] for seed in seeds if key in seed[name]]
            digits = 1 if key == "length" else 0 if key == "seconds" else 3
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and key != "seconds" else ""
            cells.append(f"{mean(values):.{digits}f}{spread}" if values else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    for name in "SFT", "KD":
        gains = [100 * (seed[f"{name}, then GRPO"]["sampled"] - seed[name]["sampled"]) for seed in seeds]
        greedy = [seed[f"{name}, then GRPO"]["greedy"] - seed[name]["greedy"] for seed in seeds]
        print(f"{name}: sampled accuracy {', '.join(f'{gain:+.1f}' for gain in gains)} points; greedy "
              f"{', '.join(f'{100 * gain:+.1f}' for gain in greedy)}")


if __name__ == "__main__":
    main()
