"""Claim: minikd's ROUGE-L equals rouge_score's, and is at least 49 x as fast on texts of 20 to 200 words, 6 x on 8.

    python -m benchmarks.rouge_speed            # 5,000 pairs, 3 repeats, under 2 minutes on one core

Needs rouge_score (pip install '.[reference]'). Both score the same pairs in one process; texts come from
../shared/data/instructions-1100.jsonl if it is there, else from a random vocabulary. Two sets of pairs, because the ratio
depends on the length: rouge_score's table grows with the product of the two lengths, minikd's time with their sum.
    20-200 words   windows of the concatenated texts; the reference is the prediction with 3 words in 10 replaced, or
                   (every other pair) an unrelated window
    records        pairs of whole answers, about 8 words each
Each repeat times minikd with an empty stem cache (cold), again with a full one (warm), then rouge_score (which has no
cache), so that a slow phase of the machine affects all three. Medians of the repeats are printed.
"""
import json
import random
import time
from functools import partial
from pathlib import Path
from statistics import median

from rouge_score.rouge_scorer import RougeScorer

from benchmarks.measure import machine, make_parser, table
from minikd import rouge

INSTRUCTIONS = Path(__file__).parents[1] / ".." / "shared" / "data" / "instructions-1100.jsonl"


def load_texts(rng) -> list[tuple[str, str]]:
    """[(question, answer)], real or random."""
    if INSTRUCTIONS.exists():
        records = map(json.loads, INSTRUCTIONS.read_text(encoding="utf-8").splitlines())
        return [(record["instruction"] + " " + record["input"], record["output"]) for record in records]
    endings = ["", "", "", "s", "ed", "ing", "ly", "ness", "ation"]
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 6))) + rng.choice(endings) for _ in range(4000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]                   # Zipf
    return [tuple(" ".join(rng.choices(words, weights, k=12)) for _ in "qa") for _ in range(1100)]


def make_pairs(count: int, rng) -> dict[str, list]:
    texts = load_texts(rng)
    words = " ".join(question + " " + answer for question, answer in texts).split()

    def window():
        size = rng.randint(20, 200)
        start = rng.randrange(len(words) - size)
        return words[start:start + size]

    long = []
    for index in range(count):
        prediction = window()
        reference = window() if index % 2 else [w if rng.random() < 0.7 else rng.choice(words) for w in prediction]
        long.append((" ".join(prediction), " ".join(reference)))
    answers = [answer for _, answer in texts]
    return {"20-200 words": long, "records": [tuple(rng.choices(answers, k=2)) for _ in range(count)]}


def timed(score, pairs):
    start = time.perf_counter()
    scores = [score(prediction, reference) for prediction, reference in pairs]
    return time.perf_counter() - start, scores


def compare(pairs, stemmer: bool, repeats: int):
    """-> median seconds (cold, warm, rouge_score) and whether every precision, recall and F1 was equal."""
    scorer, ours = RougeScorer(["rougeL"], use_stemmer=stemmer), partial(rouge.rouge_l, stemmer=stemmer)

    def theirs(prediction, reference):
        return tuple(scorer.score(reference, prediction)["rougeL"])

    seconds, equal = [], True
    for _ in range(repeats):
        rouge.porter_stem.cache_clear()
        (cold, first), (warm, second), (peer, expected) = [timed(f, pairs) for f in (ours, ours, theirs)]
        seconds.append((cold, warm, peer))
        equal &= first == second == expected
    return [median(column) for column in zip(*seconds)], equal


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=5000, help="pairs in each set")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for name, pairs in make_pairs(args.pairs, random.Random(0)).items():
        for stemmer in False, True:
            (cold, warm, peer), equal = compare(pairs, stemmer, args.repeats)
            rows.append([name, "on" if stemmer else "off", "yes" if equal else "NO",
                         *(f"{1e6 * seconds / len(pairs):.1f}" for seconds in (peer, cold, warm)),
                         f"{peer / cold:.1f}x", f"{peer / warm:.1f}x"])
    table(["microseconds a pair", "stemmer", "equal", "rouge_score", "minikd cold", "warm", "ratio cold", "warm"], rows)
    source = INSTRUCTIONS.name if INSTRUCTIONS.exists() else "made words"
    print(f"{args.pairs:,} pairs a set from {source}, median of {args.repeats}; {machine('rouge_score')}")


if __name__ == "__main__":
    main()
