"""4-bit weights by GPTQ, in the `gptq` format. minikd opens it, and so does transformers with GPTQModel; vLLM should (untested).

    python quantize.py                          the toy student of train_kd.py: GPTQ and round-to-nearest, measured
    python quantize.py --model runs/kd/kd/best --calibration databricks/databricks-dolly-15k --out runs/kd/w4
    python quantize.py ... --method rtn         the baseline: every weight to the nearest point of its grid
    python quantize.py ... --asym               a zero point per group (format gptq_v2, which fewer tools read)

Only the blocks' linear layers are packed; embeddings, norms and the head stay as they are. Paper eq. (8), (9);
GPTQ arXiv:2210.17323. See minikd/gptq.py and, for the layout, minikd/quant.py.
"""
from minikd.errors import end_at_interrupts

if __name__ == "__main__":
    end_at_interrupts()                                         # while torch is imported

import functools
import math
import random
import statistics
import time
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from minikd.checkpoint import (check_vocabulary, load_config, load_model, model_folder, read_quantization, save_model,
                               stored_dtype)
from minikd.command import (BY_FIELDS, Parser, Progress, check_positive, fill_defaults, flag_group, flags_of, note_unused,
                            pick_device, pick_dtype, spare_threads)
from minikd.data import NothingLeft, describe_dropped, encode_examples, encode_text
from minikd.errors import InputError, script_errors
from minikd.evaluate import answer_and_score, compare
from minikd.examples import load_examples, load_texts
from minikd.formats import FORMATS, recognise
from minikd.files import check_writable, holds_cwd
from minikd.gptq import quantize_model
from minikd.model import Qwen2
from minikd.quant import POWER, check_groups, to_words
from minikd.records import data_files, read_records
from minikd.rouge import mean_by_category
from minikd.run import LOG, lock
from minikd.teacher import Teacher
from minikd.tokenizer import COPIED, Tokenizer
from minikd.w4 import to_w4


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = flag_group(parser, "model and data", BY_FIELDS)
    add("--model", toy="runs/toy/kd/best", help="folder or hub name")
    add("--calibration", nargs="+", metavar="FILE", toy=["runs/toy/data/train.jsonl"],
        help="records as train_kd.py reads them, or plain text")
    add("--format", choices=FORMATS, help="record schema")
    add("--samples", type=int, default=128, help="calibration rows, drawn at random")
    add("--length", type=int, default=2048, help="longest calibration row, in tokens")
    add("--eval-data", nargs="+", metavar="FILE", toy=["runs/toy/data/test.jsonl"],
        help="records to measure on, prompts of up to 256 tokens")
    add("--eval-examples", type=int, default=200, help="usable records to read from --eval-data")
    add("--template", choices=("chatml", "alpaca"), default="chatml", help="format of the prompt")
    add = flag_group(parser, "quantisation")
    add("--method", choices=("gptq", "rtn"), help="by default gptq, in the toy world both; or one of")
    add("--bits", type=int, default=4, help="bits per weight; a folder can only hold 4")
    add("--group-size", type=int, default=128, toy=32, help="inputs that share a scale, -1 for a whole row")
    add("--asym", action="store_true", help="a zero point per group; without it the range is symmetric")
    add("--no-act-order", action="store_true",
        help="quantise columns in stored order; by default those of large inputs come first")
    add("--damp", type=float, default=0.01, help="share of the mean of the Hessian's diagonal that is added to the diagonal")
    add("--clip-search", action="store_true", help="shrink each group's range where that lowers its error")
    add = flag_group(parser, "run", "all weights are rounded to --dtype first, with auto to the dtype of the model's embeddings, "
                     "in which those that are not\npacked are written; on a CPU 4-bit models answer in bfloat16 with auto")
    add("--out", toy="runs/toy/w4", help="folder to write; toy without --method: OUT-rtn and OUT-gptq")
    add("--batch-size", type=int, default=4, help="calibration rows at a time")
    add("--max-new-tokens", type=int, default=256, toy=48, help="longest answer")
    add("--rouge", choices=("plain", "stemmer", "unicode"), default="stemmer", toy="unicode", help="how ROUGE-L forms its words")
    add("--seed", type=int, default=0, help="of the calibration rows")
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", toy="float32",
        help="of calibration and unpacked weights")
    return parser


def parse_args():
    """The flags, checked, with the defaults filled in; and `methods`: --method, or the toy world's two."""
    parser = make_parser()
    args = parser.parse_args()
    toy = args.model is None
    if args.method == "rtn":
        note_unused(args, "with --method rtn", "calibration", "samples", "length", "no_act_order", "damp")
    if not (args.eval_data or toy):
        note_unused(args, "without --eval-data", "eval_examples", "max_new_tokens", "rouge")
    fill_defaults(args, parser, toy)
    if toy and not Path(args.model).exists():
        raise InputError(f"{args.model}: no toy student yet; run train_kd.py first, or give --model, --calibration and --out")
    if args.out is None:
        raise InputError("--model without --out; add --out FOLDER")
    args.methods = [args.method] if args.method else ["rtn", "gptq"] if toy else ["gptq"]
    if "gptq" in args.methods and not args.calibration:
        raise InputError("--method gptq without --calibration; add --calibration FILE, or choose --method rtn")
    if args.bits != 4:
        raise InputError(f"--bits {args.bits}: a folder can only hold 4-bit weights; leave out --bits, or call "
                         "gptq.quantize_model in Python")
    check_positive(args, "samples", "length", "eval_examples", "batch_size", "max_new_tokens")
    if args.length < 2:
        raise InputError(f"--length {args.length}: a row needs at least two tokens; give 2 or more (2048 is usual)")
    check_positive(args, "damp", or_zero=True)
    return args


def calibration_rows(paths, tokenizer, samples: int, length: int, template: str, seed: int, format: str | None = None) -> list:
    """At most `samples` random rows of at most `length` tokens: pieces of text, or prompts with their responses. Records are
    encoded in random order until there are enough."""
    first = next(read_records(data_files(paths[0])[0]))[1]
    if format is None and recognise(first) is None and "text" in first:
        source = load_texts(paths)[0]
        encode = lambda part: encode_text(part, tokenizer, length)
    else:
        source = load_examples(paths, format)[0]
        encode = lambda part: encode_examples(part, tokenizer, template, length, length)[0]
    rng, rows = random.Random(seed), []
    rng.shuffle(source)
    for start in range(0, len(source), samples):
        with suppress(NothingLeft):
            rows += encode(source[start:start + samples])
        if len(rows) >= samples:
            break
    if not rows:
        raise InputError(f"{paths[0]}: no record fits --length {length}; raise it, or take other records if their "
                         "responses contain stop tokens")
    return rng.sample(rows, min(samples, len(rows)))


def describe_calibration(rows: list, samples: int, config) -> str:
    """One line on how much there is to calibrate on, and whether it is little."""
    tokens, widest = sum(map(len, rows)), config.intermediate_size
    note = f" (note: fewer than --samples {samples})" if len(rows) < samples else ""
    if tokens < widest:                                         # then a Hessian of that size has no full rank
        note = f" (note: fewer tokens than the {widest:,} inputs of a layer, so GPTQ can be worse than rounding; give more)"
    return f"calibration: {len(rows):,} rows, {tokens:,} tokens{note}"


def quantize(folder: Path, tokenizer: Tokenizer, rows: list, method: str, out: Path, device: str, dtype, stored, *,
             bits, group_size, asym, no_act_order, damp, clip_search, batch_size):
    """Quantises the model in `folder` by `method`, one block at a time on `device` in `dtype`, and writes the 4-bit folder `out`.
    The model is loaded, and what is not packed is written, in the dtype `stored`."""
    model, started = load_model(folder, "cpu", stored), time.perf_counter()
    shares = {}                                                                 # layer -> its error / round-to-nearest's
    with Progress(f"{method}, layers", 7 * model.config.num_hidden_layers) as progress:
        def on_layer(name, error, rtn):
            progress.update(note="" if error is None else f"{name}: error {error:.2e}, rounding {rtn:.2e}")
            if rtn:
                shares[name] = error / rtn

        words = quantize_model(
            model, rows, tokenizer.pad_id, bits=bits, group_size=group_size, sym=not asym, act_order=not no_act_order, damp=damp,
            clip_search=clip_search, method=method, batch_size=batch_size, device=device, dtype=dtype, on_layer=on_layer,
            store=functools.partial(to_words, version=2 if asym else 1))
    how = {"static_groups": not no_act_order, "true_sequential": True} if method == "gptq" else {}
    if how and 0 < damp < 1:                                                    # GPTQModel opens no folder that names another
        how["damp_percent"] = damp
    mse = POWER if clip_search else 0.0                                         # GPTQModel's name for the search: its exponent
    to_w4(model, words, group_size, not asym, method=method, clip_search=clip_search, mse=mse, **how)
    tokenizer.save(out)
    save_model(model, out)
    worst = max(shares, key=shares.get, default=None)
    print(f"{out}: {method}, {weight_bytes(out) / 1e6:,.1f} MB, {time.perf_counter() - started:.0f} s"
          + (f"; output error {statistics.fmean(shares.values()):.2f} x that of rounding, averaged over the layers, at most "
             f"{shares[worst]:.2f} x ({worst})" if worst else ""))


def check_out(out: Path, tokenizer: Tokenizer):
    """Raises InputError if `out` cannot be written or replaced, is or contains the current folder, or holds anything that would
    be lost: another tokenizer, a run, or a model that is not a 4-bit one."""
    if holds_cwd(out):
        raise InputError(f"--out {out}: is or contains the current folder; choose another, or one inside it")
    if out.resolve().is_mount():                                # a container's volume
        raise InputError(f"--out {out}: is a mount point, which cannot be replaced; choose a folder inside it")
    lost = any(any(out.glob(name)) for name in ("config.json", "**/*.safetensors", f"**/{LOG}"))    # a run's sft/best/
    other_tokenizer = any((out / name).is_file() and (out / name).read_bytes() != tokenizer.files.get(name) for name in COPIED)
    four_bits = None
    with suppress(InputError, NotADirectoryError):              # no config.json; another method, other bits; a file
        four_bits = read_quantization(out)
    if (lost or other_tokenizer or out.exists() and not out.is_dir()) and not four_bits:
        raise InputError(f"--out {out}: holds something other than a 4-bit model, which would be replaced; choose a new or empty "
                         "folder")
    if other_tokenizer:                                         # a killed run would leave the new one beside old weights
        raise InputError(f"--out {out}: holds a 4-bit model with another tokenizer; choose a new or empty folder")
    check_writable(out.parent)
    if out.exists():                                            # then the files are renamed into it one by one
        check_writable(out)


def weight_bytes(folder: Path) -> int:
    """Size of a folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(model: Qwen2, whole: Teacher, tokenizer: Tokenizer, examples: list, rows: list, answering: torch.dtype, *,
            batch_size, max_new_tokens, rouge) -> tuple[float, float, float]:
    """Perplexity (e to the mean CE) and KL(whole || model) in nats, both over the references' tokens, end tokens included; and
    ROUGE-L of its own answers, in the dtype `answering`.

    whole  the unquantised model. The perplexity over a few hundred references may rise or fall by chance, as errors make some
           likelier; the KL counts every error
    """
    found = compare(model, rows, tokenizer.pad_id, batch_size, whole)
    if answering != model.head.dtype:                                           # else its codes would be repacked for nothing
        model.to(answering)
    scores = answer_and_score(model, tokenizer, rows, examples, max_new_tokens, 16, rouge)
    perplexity = math.exp(found["ce"]) if found["ce"] < 700 else math.inf
    return perplexity, found["forward_kl"], mean_by_category(scores)["all"]["rouge_l"]


def main():
    args = parse_args()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"                     # one line, without its place
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    folder = model_folder(args.model)
    if read_quantization(folder):
        raise InputError(f"{folder}: is quantised already; give the folder it was made from")
    config = load_config(folder)
    for inputs in config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size:
        check_groups(inputs, args.group_size, f"{folder}: --group-size")        # now, not after the calibration's first block
    spare_threads(config)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(args.model, config, tokenizer)
    rows = []
    if "gptq" in args.methods:
        rows = calibration_rows(args.calibration, tokenizer, args.samples, args.length, args.template, args.seed, args.format)
        print(describe_calibration(rows, args.samples, config))
    examples, eval_rows = [], []
    if args.eval_data:
        examples, _ = load_examples(args.eval_data, args.format, args.eval_examples)
        try:
            eval_rows, counts = encode_examples(examples, tokenizer, args.template)
        except NothingLeft as error:                            # its message names flags of train_kd.py
            raise InputError(f"{args.eval_data[0]}: each of the {len(examples):,} records read has a prompt that is too long, or "
                             "a stop token in its response; give other records") from error
        if lost := describe_dropped(counts):
            print(f"{len(eval_rows):,} of {len(examples):,} records of --eval-data; {lost}")
    outs = {method: Path(args.out if len(args.methods) == 1 else f"{args.out}-{method}").expanduser()
            for method in args.methods}
    for out in outs.values():                                   # all, before the first run of maybe hours
        check_out(out, tokenizer)
    for out in outs.values():
        lock(out)
    stored = dtype if args.dtype != "auto" else stored_dtype(folder)
    stored = stored if stored in (torch.bfloat16, torch.float16) else torch.float32     # float8 cannot be computed in
    for method, out in outs.items():
        quantize(folder, tokenizer, rows, method, out, device, dtype, stored, **flags_of(quantize, args))
    if eval_rows:
        print(f"\n{len(eval_rows)} examples {'MB':>15}{'perplexity':>12}{'KL':>9}{'ROUGE-L':>9}   KL from the unquantised, "
              "nats per token")
        whole = Teacher(load_model(folder, device, dtype).requires_grad_(False))
        for name, path in {"unquantised": folder, **outs}.items():
            model = whole.model if path == folder else load_model(path, device, dtype)
            answering = pick_dtype(args.dtype, device, model.quantization is not None)      # on a CPU bfloat16 is 20 x as fast
            perplexity, kl, rouge = measure(model, whole, tokenizer, examples, eval_rows, answering,
                                            **flags_of(measure, args))
            print(f"{name:<20}{weight_bytes(path) / 1e6:>10.2f}{perplexity:>12.4f}{kl:>9.4f}{rouge:>9.1f}")
            del model                                           # before the next one is loaded


if __name__ == "__main__":
    with script_errors():
        main()
