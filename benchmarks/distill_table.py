"""Claims: MiniLLM ends nearer to its teacher than SFT and forward-KL distillation, by the reverse KL on held-out prompts; and
distillation on the student's own answers ends nearer than on the data's noisy ones. The rows with --seq-kd say how much of that
the noise explains. Toy world, mean and sd over seeds.

    python -m benchmarks.distill_table          # 40 minutes on one CPU core

Each seed: `python train_kd.py --seed S` makes teacher and data and trains a student by SFT; every method starts from that
student and makes the same number of updates at the same learning rate on the same prompts (kd_ratio 1: only the divergence).
300 held-out prompts. `sequence KL` is KL(q || p) over whole answers, MiniLLM's objective, in nats per answer; `reverse KL`
and `forward KL` are in nats per token, on the reference answers. All methods of a seed share its teacher, records and start, so
compare them seed by seed.
"""
import re
import tempfile
from pathlib import Path

from benchmarks.measure import each_seed, machine, make_parser, run_script, seeds_table, toy_run

METHODS = {"SFT": "--loss sft", "forward KL": "--loss forward_kl", "reverse KL": "--loss reverse_kl",
           "JSD": "--loss jsd", "skew forward KL": "--loss skew_forward_kl", "skew reverse KL": "--loss skew_reverse_kl",
           "SFT, teacher's answers": "--loss sft --seq-kd", "reverse KL, teacher's answers": "--loss reverse_kl --seq-kd",
           "JSD, on-policy": "--loss jsd --on-policy 1", "reverse KL, on-policy": "--loss reverse_kl --on-policy 1",
           "MiniLLM": "--loss minillm"}
COLUMNS = {"ROUGE-L": ".1f", "exact match": ".1f", "sequence KL": ".2f", "reverse_kl": ".3f", "forward_kl": ".3f",
           "agreement": ".3f", "mean length": ".1f", "distinct-4": ".3f", "seconds": ".0f"}


def one_seed(seed: int, folder: Path, steps: int, lr: float) -> dict[str, dict]:
    run_script("train_kd.py", "--seed", seed, "--out", folder)
    rows = {}
    for name, flags in METHODS.items():
        out = folder / "losses" / re.sub("[^a-z]+", "-", name.lower())
        seconds, table = toy_run(folder, "sft", out, "--kd-ratio", 1, "--steps", steps, "--lr", lr, "--eval-every", steps,
                                 "--seed", seed, *flags.split())
        start, trained, teacher = ({"ROUGE-L": row["all"], **row["metrics"]} for row in table)
        rows[name] = trained | {"seconds": seconds}
    return {"start (SFT)": start, **rows, "teacher": teacher}


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [one_seed(seed, Path(folder) / str(seed), args.steps, args.lr) for seed in args.seeds]
    print(f"{len(seeds)} seeds, {args.steps} updates each, lr {args.lr:g}; {machine('torch')}")
    seeds_table(seeds, COLUMNS)
    each_seed(seeds, "ROUGE-L", ".1f", args.seeds)
    each_seed(seeds, "sequence KL", ".2f", args.seeds)
    print()
    for better, worse in (("MiniLLM", "forward KL"), ("MiniLLM", "SFT"), ("reverse KL", "forward KL"),
                          ("reverse KL, on-policy", "reverse KL"), ("reverse KL, on-policy", "reverse KL, teacher's answers")):
        for key in "sequence KL", "reverse_kl":
            pairs = [(seed[better][key], seed[worse][key]) for seed in seeds]
            print(f"{key}: {better} below {worse} in {sum(a < b for a, b in pairs)} of {len(pairs)} seeds")


if __name__ == "__main__":
    main()
