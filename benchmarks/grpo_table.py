"""Claim: GRPO raises the sampled accuracy of a student trained by SFT by 40 points on held-out sums, and lowers neither its
greedy accuracy nor its format reward; it does not raise the share of sums that are solved in 64 tries. The table also has a
student trained by KD. Mean and sd over seeds.

    python -m benchmarks.grpo_table             # 25 minutes on one CPU core

Each seed: train_kd.py trains a teacher (5 x as large as the student) on right answers and, from the same initial weights, a
student by SFT and one by KD on answers of mixed quality (30% without their thoughts, a quarter of the others with a wrong step);
train_grpo.py continues from both with its toy defaults. 200 held-out sums; sampled is at temperature 1. pass@k is the share of
sums for which one of k sampled answers is right.
"""
import tempfile
from math import comb
from pathlib import Path
from statistics import mean

from benchmarks.measure import machine, make_parser, run_script, seeds_table
from minikd import problems, toy
from minikd.checkpoint import load_model, save_model
from minikd.files import write_jsonl
from minikd.grpo import sample_groups
from minikd.model import Qwen2
from minikd.rewards import answer_reward
from minikd.run import read_log
from minikd.tokenizer import Tokenizer

SAMPLES = 64                            # answers to each sum, for pass@k
NEW = 72                                # tokens of the longest answer, train_grpo.py's toy default

LOGGED = {"sampled": "valid_sampled", "greedy": "valid_greedy", "format": "valid_reward/format", "steps": "valid_reward/steps",
          "tokens": "valid_length"}             # the table's columns -> their names in log.jsonl
COLUMNS = dict.fromkeys([*LOGGED, "pass@8", "pass@64"], ".3f") | {"tokens": ".1f", "seconds": ".0f"}


def start(folder: Path, seed: int):
    """Writes the tokenizer, the untrained teacher and student, and both sets of records."""
    mixed = problems.toy_records("sums", 8000, seed=1000 + seed)
    write_jsonl(mixed, folder / "mixed.jsonl")
    write_jsonl(problems.toy_records("sums", 8000, seed=5000 + seed, clean=True), folder / "clean.jsonl")
    tokenizer = toy.make_tokenizer(folder / "tokenizer", [f"{r['instruction']}\n{r['response']}" for r in mixed[:2000]])
    for name, config in ("teacher", toy.teacher_config), ("student", toy.student_config):
        tokenizer.save(folder / f"start-{name}")
        save_model(Qwen2(config(len(tokenizer))).init_weights(seed), folder / f"start-{name}")


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k answers is right, drawn from samples of which so many are: an unbiased estimate of pass@k.
    Chen et al., arXiv:2107.03374, eq. (1)."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def pass_rates(folder: Path, seed: int) -> dict[str, float]:
    """pass@8 and pass@64 of a model on the held-out sums."""
    model, tokenizer = load_model(folder), Tokenizer.load(folder)
    _, tests = problems.toy_split("sums", 200, seed)            # those that train_grpo.py judges by
    right = []                                                  # of each sum, how many of its answers
    for row in problems.encode_problems(tests, tokenizer):
        answers, _ = sample_groups(model, [row], SAMPLES, NEW, tokenizer, seed=1000 * seed + row.index)
        texts = [tokenizer.decode(answer.response) for answer in answers]
        right.append(int(sum(answer_reward(texts, SAMPLES * [tests[row.index].known]))))
    return {f"pass@{k}": mean(pass_at(k, SAMPLES, c) for c in right) for k in (8, 64)}


def one_seed(folder: Path, seed: int) -> dict[str, dict]:
    start(folder, seed)
    common = ["--batch-size", 64, "--warmup", 50, "--validation", 100, "--eval-examples", 20, "--max-new-tokens", NEW,
              "--rouge", "unicode", "--dtype", "float32", "--seed", seed]
    run_script("train_kd.py", "--student", folder / "start-teacher", "--data", folder / "clean.jsonl", "--loss", "sft", "--steps",
               500, "--eval-every", 500, "--lr", 2e-3, "--out", folder / "teacher", *common)
    run_script("train_kd.py", "--student", folder / "start-student", "--teacher", folder / "teacher/last", "--data",
               folder / "mixed.jsonl", "--steps", 400, "--eval-every", 400, "--lr", 4e-3, "--out", folder, *common)
    rows = {}
    for name in "sft", "kd":
        out = folder / f"grpo-{name}"
        seconds = run_script("train_grpo.py", "--model", folder / name / "last", "--seed", seed, "--out", out)
        judged = [line for line in read_log(out) if "valid_sampled" in line]
        before, after = ({column: line[key] for column, key in LOGGED.items()} for line in (judged[0], judged[-1]))
        before, after = before | pass_rates(folder / name / "last", seed), after | pass_rates(out / "last", seed)
        rows |= {name.upper(): before, f"{name.upper()}, then GRPO": after | {"seconds": seconds}}
    return rows


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [one_seed(Path(folder) / str(seed), seed) for seed in args.seeds]
    print(f"{len(seeds)} seeds; {machine('torch')}")
    seeds_table(seeds, COLUMNS)
    for name in "SFT", "KD":
        gains = [100 * (seed[f"{name}, then GRPO"]["sampled"] - seed[name]["sampled"]) for seed in seeds]
        greedy = [seed[f"{name}, then GRPO"]["greedy"] - seed[name]["greedy"] for seed in seeds]
        print(f"{name}: sampled accuracy {', '.join(f'{gain:+.1f}' for gain in gains)} points; greedy "
              f"{', '.join(f'{100 * gain:+.1f}' for gain in greedy)}")


if __name__ == "__main__":
    main()
