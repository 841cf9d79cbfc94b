"""Supervised fine-tuning and knowledge distillation of a Qwen2 student.

    python train_kd.py                          the toy world: 3 minutes on 2 CPU cores, ends in the paper's Table 1
    python train_kd.py --teacher Qwen/Qwen2.5-3B-Instruct --student Qwen/Qwen2.5-0.5B \\
                       --data databricks-dolly-15k.jsonl            the real thing, on one GPU
    python train_kd.py ... --loss reverse_kl --out runs/rkl         one run instead of the comparison
    python train_kd.py ... --loss sft --lr 5e-6 1e-5 5e-5           a sweep, drawn as the paper's figure 2

Without --loss, SFT and KD start from the same student and see the same examples for the same steps; a table
compares Base, SFT, KD and Teacher. Paper: Knowledge Distillation for Large Language Models, eq. (3) and (4).
"""
import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch

from minikd import toy
from minikd.checkpoint import load_model, save_model
from minikd.data import (FORMATS, Encoded, collate, encode_examples, encode_text, load_examples, optimizer_steps,
                         split_examples, steps_per_epoch)
from minikd.evaluate import answer_and_score, check_vocabulary, held_out_loss, show_table, write_jsonl
from minikd.files import InputError, script_errors
from minikd.losses import DIVERGENCES, head_loss, pick_divergence, scored_positions
from minikd.model import Qwen2
from minikd.plots import plot_curves
from minikd.rouge import mean_by_category
from minikd.tokenizer import Tokenizer
from minikd.training import (STATE, Log, Progress, check_positive, check_settings, learning_rate, load_state,
                             make_optimizer, pick_device, pick_dtype, read_log, save_state, write_config)

REAL = dict(steps=None, epochs=1, batch_size=8, lr=[1e-5], warmup=0, weight_decay=0.01, max_new_tokens=256,
            validation=500, eval_examples=200, rouge="stemmer", out="runs/kd", dtype="auto")
TOY = dict(steps=400, epochs=None, batch_size=32, lr=[3e-3], warmup=30, weight_decay=0.01, max_new_tokens=48,
           validation=100, eval_examples=100, rouge="unicode", out="runs/toy", dtype="float32", eval_every=50)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument_group("models and data (none of them: the toy world)").add_argument
    add("--student", help="folder or hub name to start from")
    add("--teacher", help="folder or hub name; for every loss but sft")
    add("--data", nargs="+", help="records to train on: .jsonl .json .csv .parquet, a folder or a hub dataset")
    add("--eval-data", nargs="+", help="records for the table; else the validation split")
    add("--format", choices=FORMATS, help="schema of the records; else recognised from their fields")
    add("--template", choices=("chatml", "alpaca"), default="chatml", help="prompt template (chatml)")
    add("--max-length", type=int, default=512, help="tokens of prompt and response; longer responses are cut (512)")
    add("--max-prompt-length", type=int, default=256, help="tokens; longer prompts are dropped (256)")
    add("--validation", type=int, help="examples held out of --data (500; toy 100)")
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["sft", *DIVERGENCES], help="one run with this loss (else SFT and forward_kl, compared)")
    add("--kd-ratio", type=float, default=0.5, help="share of the divergence; the rest is cross-entropy (0.5)")
    add("--temperature", type=float, default=1.0, help="divides both models' logits in the divergence (1)")
    add("--beta", type=float, default=0.5, help="jsd: weight of the teacher in the mixture (0.5)")
    add("--alpha", type=float, default=0.1, help="skew losses: share of the other model in the mixture (0.1)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=float, help="passes over the data (1)")
    add("--steps", type=int, help="optimizer steps, instead of --epochs (toy 400)")
    add("--batch-size", type=int, help="examples in a micro-batch (8; toy 32)")
    add("--grad-accum", type=int, default=1, help="micro-batches in an optimizer step (1)")
    add("--lr", type=float, nargs="+", help="peak learning rate; several are swept (1e-5; toy 3e-3)")
    add("--warmup", type=int, help="steps of linear warm-up (0; toy 30)")
    add("--schedule", choices=("cosine", "constant"), default="cosine", help="after the warm-up (cosine)")
    add("--weight-decay", type=float, help="of weight matrices (0.01)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (1)")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=int, help="steps between evaluations (each epoch; toy 50)")
    add("--eval-examples", type=int, help="validation examples answered for ROUGE-L each time (200; toy 100)")
    add("--max-new-tokens", type=int, help="longest answer (256; toy 48)")
    add("--rouge", choices=("plain", "stemmer", "unicode"), help="words of ROUGE-L (stemmer; toy unicode)")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="folder for checkpoints, log, table and picture (runs/kd; toy runs/toy)")
    add("--resume", action="store_true", help="go on where a stopped run of the same flags was")
    add("--seed", type=int, default=0, help="of the split, the order and the toy world (0)")
    add("--device", default="auto", help="cpu, cuda, ... (auto)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of products and teacher (auto)")
    args = parser.parse_args()
    if args.student is None and (args.teacher or args.data):
        raise InputError("--teacher or --data without --student; give all three, or none for the toy world")
    if args.student and not args.data:
        raise InputError("--student without --data; add --data FILE")
    if args.student and not args.teacher and args.loss != "sft":
        raise InputError("--student without --teacher; add --teacher NAME, or --loss sft")
    check_positive(args, "max_length", "max_prompt_length", "validation", "temperature", "epochs", "steps",
                   "batch_size", "grad_accum", "lr", "clip", "eval_every", "eval_examples", "max_new_tokens")
    if not (0 <= args.kd_ratio <= 1 and 0 < args.beta < 1 and 0 < args.alpha < 1):
        raise InputError("--kd-ratio lies in 0 to 1, --beta and --alpha between them; mend the one that does not")
    if len(args.lr or ()) > 1 and not args.loss:
        raise InputError("--lr with several rates sweeps one loss; add --loss, or give one rate for SFT and KD")
    args.toy = args.student is None
    for name, value in (TOY if args.toy else REAL).items():
        if getattr(args, name) is None or name == "dtype" and args.dtype == "auto":
            setattr(args, name, None if name == "epochs" and args.steps else value)
    return args


# ---- one run: the loop

def train(*, student: Qwen2, tokenizer: Tokenizer, rows: list[Encoded], valid_rows: list[Encoded], valid_examples, out,
          loss, teacher=None, kd_ratio=0.5, temperature=1.0, beta=0.5, alpha=0.1, steps, batch_size, grad_accum=1, lr,
          warmup=0, schedule="cosine", weight_decay=0.01, clip=1.0, gradient_checkpointing=False, eval_every,
          eval_examples, max_new_tokens, rouge, resume=False, seed=0, dtype=torch.float32, title) -> Qwen2:
    """Trains `student` in place; returns it. best/ and last/ under `out` are folders that transformers opens."""
    device, optimizer = student.train().head.device, make_optimizer(student, lr, weight_decay)
    options = dict(temperature=temperature, beta=beta, alpha=alpha)
    divergence = None if loss == "sft" else pick_divergence(loss, **options)
    teacher, kd_ratio = (None, 0.0) if loss == "sft" else (teacher, kd_ratio)
    facts = load_state(out, student, optimizer) if resume and (out / STATE).exists() else {"step": 0, "best": -1.0}
    log = Log(out, upto=facts["step"])
    with Progress(title, steps, start=facts["step"]) as progress:
        for step, micro_batches in optimizer_steps(rows, facts["step"], steps, batch_size, grad_accum, seed):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr, warmup, schedule)
            batches = [collate(batch, tokenizer.pad_id) for batch in micro_batches]
            scored = sum(int(batch.mask.sum()) for batch in batches)            # tokens of this optimizer step
            ce_sum = kd_sum = 0.0
            for batch in batches:
                ids, mask = batch.ids.to(device), batch.mask.to(device)         # [B, T]
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    hidden = student.hidden(ids, checkpointing=gradient_checkpointing)          # [B, T, D]
                    hidden, targets = scored_positions(hidden, ids, mask)       # [N, D], [N]
                    soft, soft_head = teacher_states(teacher, ids, mask)        # [N, D'], [V', D']
                    value, ce, kd = head_loss(hidden, student.head, targets, soft, soft_head, divergence,
                                              kd_ratio, weight=1 / scored)      # paper eq. (3)
                value.backward()
                ce_sum, kd_sum = ce_sum + ce.sum(), kd_sum + kd.sum()
            norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), clip))
            if not math.isfinite(norm):
                raise InputError(f"{out}: the gradient at step {step + 1} is not finite; lower --lr (now {lr:g}), "
                                 "or use --dtype float32")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ce, kd = float(ce_sum) / scored, float(kd_sum) / scored
            log.write(step=step + 1, ce=ce, kd=kd, grad_norm=norm, lr=optimizer.param_groups[0]["lr"], tokens=scored,
                      seconds=round(time.perf_counter() - started, 4))
            progress.update(f"ce {ce:.3f}" + (f" kd {kd:.3f}" if teacher else ""))
            if (step + 1) % eval_every == 0 or step + 1 == steps:
                facts = evaluate(student, tokenizer, valid_rows, valid_examples, teacher, divergence, dtype, batch_size,
                                 eval_examples, max_new_tokens, rouge, facts | {"step": step + 1}, out, log, progress)
                if step + 1 < steps:
                    save_state(out, student, optimizer, **facts)
    log.write(step=steps, done=True)
    (out / STATE).unlink(missing_ok=True)                       # last/ has the weights; the moments are of no more use
    return student


@torch.inference_mode()
def teacher_states(teacher: Qwen2 | None, ids, mask):
    if teacher is None:
        return None, None
    return scored_positions(teacher.hidden(ids), ids, mask)[0], teacher.head


def evaluate(student, tokenizer, rows, examples, teacher, divergence, dtype, batch_size, eval_examples, max_new_tokens,
             rouge, facts, out, log, progress) -> dict:
    """Held-out loss, ROUGE-L of the student's own answers, a sample of them; saves last/, and best/ by ROUGE-L."""
    judged = student if dtype == torch.float32 else copy.deepcopy(student).to(dtype)
    ce, kd = held_out_loss(judged, rows, tokenizer.pad_id, batch_size, teacher, divergence, dtype)
    scores = answer_and_score(judged, tokenizer, rows[:eval_examples], examples, max_new_tokens, batch_size, rouge)
    rouge_l = mean_by_category(scores)["all"]["rouge_l"]
    log.write(step=facts["step"], valid_ce=ce, valid_kd=kd, rouge_l=rouge_l)
    i = random.Random(facts["step"]).randrange(len(scores))     # another sample each time
    progress.say(f"{progress.title} step {facts['step']}: held-out CE {ce:.3f}" + (f", KD {kd:.3f}" if teacher else "")
                 + f", ROUGE-L {rouge_l:.1f}; asked {examples[rows[i].index].messages[-1]['content'][:80]!r}, "
                 + f"said {scores[i]['prediction'][:80]!r}")
    save_checkpoint(student, tokenizer, out / "last", dtype)
    if rouge_l > facts["best"]:
        save_checkpoint(student, tokenizer, out / "best", dtype)
    return facts | {"best": max(rouge_l, facts["best"])}


def save_checkpoint(model: Qwen2, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype):
    tokenizer.save(folder)
    save_model(model, folder, dtype=dtype)


# ---- several runs: the comparison, the sweep, the toy world

def stage(folder: Path, make_student, *, resume: bool, replace: bool, recorded: dict, **settings):
    """One run in its own folder: done already, resumed, or begun; its models are in best/ and last/."""
    recorded |= {key: value for key, value in settings.items() if isinstance(value, (str, int, float, type(None)))}
    lines = read_log(folder)
    if lines and not resume and not replace:
        raise InputError(f"{folder}: holds a run already, {lines[-1]['step']} steps; "
                         "go on with --resume, or choose another --out")
    if resume and lines:
        check_settings(folder, recorded)
        if lines[-1].get("done"):
            return print(f"{folder}: done already")
    write_config(folder, recorded)
    train(student=make_student(), out=folder, resume=resume and bool(lines), title=folder.name, **settings)


def toy_world(out: Path, seed: int, resume: bool):
    """Makes the records, the tokenizer, the teacher and the student's base under `out`."""
    tokenizer = toy.make_tokenizer(out / "tokenizer")
    files = {"teacher": toy.records(12_000, seed=1000 + seed), "train": toy.records(600, 2000 + seed, human=True),
             "test": toy.records(300, seed=3000, test=True)}
    for name, entries in files.items():
        write_jsonl(entries, out / "data" / f"{name}.jsonl")
    clean, report = load_examples(out / "data" / "teacher.jsonl")
    train_part, valid_part = split_examples(clean, 100, seed)
    rows, valid = (encode_examples(part, tokenizer)[0] for part in (train_part, valid_part))
    common = dict(tokenizer=tokenizer, loss="sft", batch_size=32, warmup=30, eval_examples=100, max_new_tokens=48,
                  rouge="unicode", seed=seed, valid_rows=valid, valid_examples=valid_part, resume=resume, replace=True)
    stage(out / "teacher", lambda: Qwen2(toy.teacher_config(len(tokenizer))).init_weights(seed), rows=rows, steps=500,
          lr=2e-3, eval_every=250, recorded={"data": report.files}, **common)
    text = encode_text(toy.plain_text(3000, seed=4000 + seed), tokenizer)
    stage(out / "base", lambda: Qwen2(toy.student_config(len(tokenizer))).init_weights(seed + 1), rows=text, steps=200,
          lr=4e-3, eval_every=200, recorded={}, **common)


def planned(args) -> list[tuple[str, str, float, str]]:
    """(label, loss, learning rate, folder under --out) of every run that the flags ask for."""
    if args.loss is None:
        return [("SFT", "sft", args.lr[0], "sft"), ("KD", "forward_kl", args.lr[0], "kd")]
    if len(args.lr) == 1:
        return [(args.loss, args.loss, args.lr[0], "")]
    return [(f"{args.loss} lr {lr:g}", args.loss, lr, f"lr-{lr:g}") for lr in args.lr]


def main():
    args = parse_args()
    out, started = Path(args.out), time.time()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    if args.toy:
        torch.set_num_threads(1)                                # its matrices are too small to share
        toy_world(out, args.seed, args.resume)
        args.student, args.teacher = str(out / "base" / "best"), str(out / "teacher" / "best")
        args.data, args.eval_data = [str(out / "data" / "train.jsonl")], [str(out / "data" / "test.jsonl")]

    tokenizer = Tokenizer.load(args.student)
    examples, report = load_examples(args.data, args.format)
    print(report)
    if len(examples) < 5:
        raise InputError(f"{', '.join(args.data)}: {len(examples)} usable records; give 5 or more, one is held out")
    train_part, valid_part = split_examples(examples, min(args.validation, len(examples) // 5), args.seed)
    lengths = dict(template=args.template, max_length=args.max_length, max_prompt_length=args.max_prompt_length)
    rows, counts = encode_examples(train_part, tokenizer, **lengths)
    valid_rows, _ = encode_examples(valid_part, tokenizer, **lengths)
    print(", ".join(f"{count:,} {what}" for what, count in counts.items()) + f"; {len(valid_rows):,} for validation")
    per_epoch = steps_per_epoch(len(rows), args.batch_size, args.grad_accum)
    steps = args.steps or math.ceil(args.epochs * per_epoch)

    teacher = None
    if args.loss != "sft":
        teacher = load_model(args.teacher, device, dtype).requires_grad_(False)
        check_vocabulary(args.teacher, teacher, tokenizer)
        tokenizer.check_same(args.teacher)

    def student():
        model = load_model(args.student, device, torch.float32)
        check_vocabulary(args.student, model, tokenizer)
        return model

    settings = dict(tokenizer=tokenizer, rows=rows, valid_rows=valid_rows, valid_examples=valid_part, teacher=teacher,
                    steps=steps, eval_every=args.eval_every or min(per_epoch, steps), dtype=dtype)
    settings |= {name: getattr(args, name) for name in (
        "kd_ratio", "temperature", "beta", "alpha", "batch_size", "grad_accum", "warmup", "schedule", "weight_decay",
        "clip", "gradient_checkpointing", "eval_examples", "max_new_tokens", "rouge", "seed", "resume")}
    recorded = {"student": args.student, "teacher": args.teacher, "data": report.files, "format": args.format,
                "dtype": str(dtype), "validation": args.validation, **lengths}
    for _, loss, lr, folder in planned(args):
        stage(out / folder, student, loss=loss, lr=lr, replace=args.toy, recorded=dict(recorded), **settings)

    models = {"Base": student().to(dtype)}
    models |= {label: load_model(out / folder / "best", device, dtype) for label, _, _, folder in planned(args)}
    models |= {"Teacher": teacher} if teacher else {}
    test, test_rows = valid_part, valid_rows[:args.eval_examples]
    if args.eval_data:
        test, _ = load_examples(args.eval_data, args.format)
        test_rows, _ = encode_examples(test, tokenizer, **lengths)
    answers = dict(max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, rouge=args.rouge)
    show_table(models, tokenizer, test_rows, test, out, **answers)
    dashed = answer_and_score(teacher, tokenizer, valid_rows[:args.eval_examples], valid_part, **answers) if teacher else []
    picture = plot_curves({label: out / folder for label, _, _, folder in planned(args)}, out / "curves.png",
                          mean_by_category(dashed)["all"]["rouge_l"] if teacher else None)
    print(f"\n{f'curves in {picture}; ' if picture else ''}checkpoints under {out}; {time.time() - started:.0f} s")


if __name__ == "__main__":
    with script_errors():
        main()
