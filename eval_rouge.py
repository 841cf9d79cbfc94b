"""ROUGE-L and exact match of a model's answers, or of answers in a file.

    python eval_rouge.py                                    the toy student that train_kd.py left, on its test set
    python eval_rouge.py --model runs/kd/kd/best --data test.jsonl
    python eval_rouge.py --model runs/kd/kd/best --data test.jsonl --temperature 1 --no-repeat-ngram-size 6      as MiniLLM
    python eval_rouge.py --predictions answers.txt --references test.jsonl

Prints the means by category, x 100, and writes every answer with its scores to a jsonl file. At a temperature above 0 it
samples once for each seed (by default MiniLLM's 10, 20, 30, 40, 50), and prints mean and standard deviation over the seeds.
"""
from minikd.errors import end_at_interrupts

if __name__ == "__main__":
    end_at_interrupts()                                         # while torch is imported

import argparse
import os
import statistics
from pathlib import Path

from minikd.checkpoint import check_vocabulary, has_four_bits, load_model
from minikd.command import (BY_FIELDS, DTYPES, FOUR_BITS, Parser, Progress, check_positive, fill_defaults, flag_group,
                            flags_of, note_unused, pick_device, pick_dtype, spare_threads)
from minikd.data import describe_dropped, encode_examples
from minikd.errors import InputError, script_errors
from minikd.evaluate import answer, read_predictions, read_references, score_answers
from minikd.examples import load_examples
from minikd.formats import FORMATS
from minikd.files import check_writable, write_jsonl
from minikd.layout import INT8_ROWS, use_int8_head
from minikd.records import local_files
from minikd.rouge import mean_by_category
from minikd.tokenizer import Tokenizer
from minikd.w4 import show_ways

SEEDS = [10, 20, 30, 40, 50]                                    # MiniLLM's


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = flag_group(parser, "a model's answers", DTYPES + FOUR_BITS)
    add("--model", toy="runs/toy/kd/best", help="folder or hub name")
    add("--data", nargs="+", metavar="FILE", toy=["runs/toy/data/test.jsonl"],
        help="records to ask: a file, a folder or a hub dataset")
    add("--limit", type=int, help="ask only the first N usable records")
    add("--template", choices=("chatml", "alpaca"), default="chatml", help="format of the prompt")
    add("--max-length", type=int, default=512, help="tokens; a prompt that leaves no room for a response is dropped")
    add("--max-prompt-length", type=int, default=256, help="tokens; longer prompts are dropped and counted")
    add("--max-new-tokens", type=int, default=256, toy=48, help="longest answer")
    add("--batch-size", type=int, default=16, help="prompts answered at once")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this total probability")
    add("--top-k", type=int, default=0, help="sample from this many of the likeliest tokens; 0 is all")
    add("--no-repeat-ngram-size", type=int, default=0,
        help="let no run of this many tokens occur twice, prompt included; 6 in MiniLLM's tables")
    add("--seeds", type=int, nargs="+", help="one round of answers each (10 20 30 40 50; greedy needs none)")
    parser.add_argument("--seed", dest="seeds", type=int, nargs="+", help=argparse.SUPPRESS)           # the same
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", toy="float32", help="of the model")
    add("--int8-head", action="store_true",
        help=f"multiply by the head rounded to 8 bits; on a CPU, for fewer than {INT8_ROWS} prompts at once")
    add("--show-ways", action="store_true", help="print how each 4-bit layer multiplies, by number of rows")
    add = flag_group(parser, "answers in a file, one per line or record")
    add("--predictions", help=".txt, or records with prediction, text, response or output")
    add("--references", help="the same; also train_kd.py's records, or a list `references`")
    add = flag_group(parser, "both", BY_FIELDS)
    add("--format", choices=FORMATS, help="record schema")
    add("--rouge", choices=("plain", "stemmer", "unicode"), default="stemmer", toy="unicode", help="how ROUGE-L forms its words")
    add("--out", help="jsonl of every example's scores (answers.jsonl in the model's folder, else in runs/eval)")
    return parser


def parse_args():
    """The flags, checked, with the defaults filled in."""
    parser = make_parser()
    args = parser.parse_args()
    check_given(args)
    toy = not (args.model or args.predictions)
    fill_defaults(args, parser, toy)
    check_positive(args, "temperature", "top_k", "no_repeat_ngram_size", or_zero=True)
    check_positive(args, "limit", "max_length", "max_prompt_length", "max_new_tokens", "batch_size", "top_p")
    if args.top_p > 1:
        raise InputError(f"--top-p {args.top_p}: is a probability; give one above 0 and at most 1")
    if len(set(args.seeds or ())) < len(args.seeds or ()):
        raise InputError(f"--seeds {args.seeds}: two are the same, so their answers would be too; give each once")
    if toy and not all(Path(path).exists() for path in (args.model, *args.data)):
        raise InputError(f"{args.model}: no toy student yet; run train_kd.py first, or give --model and --data")
    folder = Path(args.model or "").expanduser()
    # A link answers.jsonl, in a folder from elsewhere, may lead to any file of the user's.
    usable = args.model and folder.is_dir() and os.access(folder, os.W_OK) and not (folder / "answers.jsonl").is_symlink()
    args.out = Path(args.out or (folder if usable else Path("runs/eval")) / "answers.jsonl").expanduser()
    read = local_files(filter(None, [args.predictions, args.references, *(args.data or [])]))
    if args.out.resolve() in [file.resolve() for file in read]:
        raise InputError(f"--out {args.out}: is one of the files to read; choose another")
    if args.out.exists() and (args.out.suffix != ".jsonl" or args.out.is_dir()):        # a model's weights, say
        raise InputError(f"--out {args.out}: exists and is not a .jsonl file, so it is not replaced; choose another")
    return args


def check_given(args):
    """Raises InputError for flags that do not go together, and says which have no effect. To be called before fill_defaults."""
    given = [name for name in ("model", "data", "predictions", "references") if getattr(args, name) is not None]
    if given not in ([], ["model", "data"], ["predictions", "references"]):
        raise InputError(f"--{' --'.join(given)}: give --model and --data, for a model's answers, or --predictions and "
                         "--references, for answers in a file")
    if args.predictions:
        note_unused(args, "with answers in a file", "limit", "template", "max_length", "max_prompt_length", "max_new_tokens",
                    "batch_size", "temperature", "top_p", "top_k", "no_repeat_ngram_size", "seeds", "device", "dtype",
                    "int8_head", "show_ways")
    elif not args.temperature:
        note_unused(args, "with greedy answers (--temperature 0)", "top_p", "top_k")
    if args.seeds and not args.temperature and not args.predictions:
        raise InputError("--seeds with --temperature 0: greedy answers are the same for all seeds; add --temperature 1")


def model_scores(model, tokenizer, rows, examples, *, seeds, temperature, top_p, top_k, no_repeat_ngram_size, max_new_tokens,
                 batch_size, rouge) -> list[list[dict]]:
    """score_answers of the model's own answers to the rows' prompts, one list per seed; a single list if greedy."""
    rounds = []
    seeds = (seeds or SEEDS) if temperature > 0 else [None]
    with Progress("answers", len(seeds) * len(rows)) as progress:
        for seed in seeds:
            texts = answer(model, tokenizer, rows, max_new_tokens, batch_size, temperature, seed=seed or 0, top_p=top_p,
                           top_k=top_k, no_repeat_ngram_size=no_repeat_ngram_size, progress=progress.update)
            scores = score_answers(texts, [examples[row.index] for row in rows], rouge)
            rounds.append([score if seed is None else {"seed": seed, **score} for score in scores])
    return rounds


def show_table(rounds: list[list[dict]], rouge: str):
    """Prints the means by category, x 100; over several seeds, their mean and standard deviation."""
    tables = [mean_by_category(scores) for scores in rounds]
    width = max(len("category"), *map(len, tables[0]))
    over = f", mean and standard deviation of {len(rounds)} seeds" if len(rounds) > 1 else ""
    print(f"\nROUGE-L ({rouge}) and exact match, x 100{over}")
    print(f"{'category':<{width}} {'examples':>9} {'ROUGE-L':>14} {'exact match':>14}")
    for category, first in tables[0].items():
        cells = ""
        for score in "rouge_l", "exact_match":
            values = [table[category][score] for table in tables]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells += f" {f'{statistics.fmean(values):.1f}{spread}':>14}"
        print(f"{category:<{width}} {first['examples']:>9,}{cells}")


def main():
    args = parse_args()
    if args.predictions:
        check_writable(args.out.parent)
        texts, examples = read_predictions(args.predictions), read_references(args.references, args.format)
        if len(texts) != len(examples):
            raise InputError(f"{args.predictions}: has {len(texts):,} predictions, but {args.references} has "
                             f"{len(examples):,} references; give one prediction for each reference")
        rounds = [score_answers(texts, examples, args.rouge)]
    else:
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device, has_four_bits(args.model))       # first: it says what is no model
        tokenizer = Tokenizer.load(args.model)
        examples, report = load_examples(args.data, args.format, args.limit)
        rows, counts = encode_examples(examples, tokenizer, args.template, args.max_length, args.max_prompt_length)
        print("; ".join(filter(None, (str(report), describe_dropped(counts)))))
        model = load_model(args.model, device, dtype)
        check_vocabulary(args.model, model.config, tokenizer)
        spare_threads(model.config)
        if args.show_ways:
            show_ways(model)
        if args.int8_head:
            use_int8_head(model)
            if min(args.batch_size, len(rows)) >= INT8_ROWS:
                print(f"note: --int8-head is used for fewer than {INT8_ROWS} prompts at once; with --batch-size "
                      f"{args.batch_size}, only after the other prompts of a batch have finished")
        check_writable(args.out.parent)
        rounds = model_scores(model, tokenizer, rows, examples, **flags_of(model_scores, args))
    try:
        show_table(rounds, args.rouge)                          # first, as the disk may be full; it took hours
    finally:                                                    # also if the table could not be printed
        write_jsonl([score for scores in rounds for score in scores], args.out)
    print(f"\nscores of every example in {args.out}")


if __name__ == "__main__":
    with script_errors():
        main()
