"""Supervised fine-tuning and knowledge distillation of a Qwen2 student.

    python train_kd.py                          the toy world: about 3 minutes on a CPU, ends in the paper's Table 1
    python train_kd.py --teacher Qwen/Qwen2.5-3B-Instruct --student Qwen/Qwen2.5-0.5B \\
                       --data databricks/databricks-dolly-15k            the real thing, on one GPU
    python train_kd.py ... --loss reverse_kl --out runs/rkl         one run instead of the comparison
    python train_kd.py ... --loss reverse_kl --on-policy 1          on the student's own answers (GKD)
    python train_kd.py ... --loss minillm --student runs/kd/sft/best --out runs/minillm     MiniLLM starts from an SFT student
    python train_kd.py ... --cache-teacher runs/cache               the teacher's body runs once, not every epoch
    python train_kd.py ... --loss sft --lr 5e-6 1e-5 5e-5           a sweep, drawn as the paper's figure 2

Without --loss, SFT and KD start from the same student and see the same examples for the same steps; a table
compares Base, SFT, KD and Teacher. Paper: Knowledge Distillation for Large Language Models, eq. (3) and (4).
"""
from minikd.errors import end_at_interrupts

if __name__ == "__main__":
    end_at_interrupts()                                         # while torch is imported

import functools
import inspect
import math
import random
import sys
import time
from pathlib import Path

import torch

from minikd import minillm, toy
from minikd.checkpoint import Checkpoint, has_four_bits, load_config, load_head, load_model, outline, save_model
from minikd.command import (BY_FIELDS, DTYPES, FOUR_BITS, Parser, Progress, check_positive, fill_defaults, flag_group,
                            flags_of, note_unused, pick_device, pick_dtype, spare_threads)
from minikd.data import Encoded, collate, describe_dropped, encode_examples, encode_text, optimizer_steps, steps_per_epoch
from minikd.errors import InputError, script_errors
from minikd.evaluate import answer_and_score, compare, show_table
from minikd.examples import count_shared, hold_out, load_examples, load_texts, split_examples, write_held_out
from minikd.formats import FORMATS, to_example
from minikd.files import fingerprint, remove, write_jsonl
from minikd.generate import respond
from minikd.head import compile_losses, head_loss, scored_positions
from minikd.losses import DIVERGENCES, clipped_surrogate, forward_kl, pick_divergence, reverse_kl
from minikd.model import Qwen2, cast_copy, mixed_precision
from minikd.plots import plot_curves
from minikd.rouge import mean_by_category
from minikd.run import (CONFIG, SAVE_EVERY, STATE, Log, begin_run, check_free, check_settings, load_state, lock, read_log,
                        save_state, write_config)
from minikd.teacher import CachedTeacher, Teacher, check_teacher, fill_cache, teacher_responses
from minikd.tokenizer import Tokenizer
from minikd.training import (apply_gradient, check_gradient, check_student, compile_blocks, keep_freed_memory, learning_rate,
                             make_optimizer, use_graphs)

# What it writes in --out beside the runs' own files.
OWN = "held-out.jsonl", "table.jsonl", "teacher-answers.jsonl", "answers-*.jsonl", "curves.png"
AT_ONCE = 16                                                    # prompts answered at a time, or a micro-batch if that is more


def make_parser() -> Parser:
    """Every flag, in groups."""
    parser = Parser(__doc__)
    add = flag_group(parser, "models and data (none of them: the toy world)", BY_FIELDS)
    add("--student", help="folder or hub name to start from")
    add("--teacher", help="folder or hub name; with --loss sft used only for the table and --seq-kd")
    add("--data", nargs="+", metavar="FILE",
        help="records to train on: .jsonl .json .csv .parquet, a folder or a hub dataset")
    add("--valid-data", nargs="+", metavar="FILE", help="records for the curves and to choose best/; without it some of --data")
    add("--eval-data", nargs="+", metavar="FILE", help="records for the table; without it those that choose best/")
    add("--lm-data", nargs="+", metavar="FILE",
        help="plain text (records with `text`): its cross-entropy is added to every step")
    add("--format", choices=FORMATS, help="record schema")
    add("--template", choices=("chatml", "alpaca"), default="chatml", help="format of the prompt")
    add("--max-length", type=int, default=512,
        help="tokens of prompt and response; longer responses are cut, but not the student's own")
    add("--max-prompt-length", type=int, default=256, help="tokens; longer prompts are dropped")
    add("--limit", type=int, help="read only the first N usable records of --data")
    add("--validation", type=int, default=500, help="without --valid-data: examples held out of --data, at most a fifth")
    add = flag_group(parser, "loss", "without --loss two runs, sft and forward_kl")
    add("--loss", choices=["sft", *DIVERGENCES, "minillm"], help="one run with")
    add("--kd-ratio", type=float, default=0.5, help="share of the divergence, the rest being cross-entropy; not for MiniLLM")
    add("--temperature", type=float, default=1.0,
        help="divides both models' logits in the divergence, but not in CE; not for MiniLLM")
    add("--beta", type=float, default=0.5, help="jsd: weight of the teacher in the mixture")
    add("--alpha", type=float, default=0.1,
        help="skew_forward_kl: the teacher's share of its mixture; skew_reverse_kl: the student's")
    add("--lm-coef", type=float, default=1.0, help="weight of the loss on --lm-data")
    add = flag_group(parser, "whose answers to learn from")
    add("--on-policy", type=float, default=0.0, help="share of steps on the student's own answers, without CE")
    add("--seq-kd", action="store_true", help="replace the data's answers by the teacher's, sampled once")
    add("--cache-teacher", metavar="DIR", help="keep the teacher's states there; only its head stays in memory")
    add = flag_group(parser, "MiniLLM")
    add("--mix", type=float, default=0.2, help="share of the teacher in the distribution sampled from")
    add("--rollouts", type=int, default=256, help="answers sampled at a time")
    add("--inner-epochs", type=int, default=4, help="passes over the sampled answers")
    add("--ratio-clip", type=float, default=0.2, help="how far the ratio q / q_old may differ from 1")
    add = flag_group(parser, "optimisation", "several --lr: a sweep, of forward_kl if there is no --loss; in the toy world, runs "
                     "with --on-policy or minillm\nfollow an SFT (at 3e-3), and their default --lr is 1e-3")
    add("--epochs", type=float, help="passes over the data; MiniLLM takes as many steps as these would (1; toy: --steps 400)")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, default=8, toy=16, help="examples in a micro-batch")
    add("--grad-accum", type=int, default=1, toy=2, help="micro-batches in an optimizer step: each is padded by itself")
    add("--lr", type=float, nargs="+", default=[1e-5], toy=[3e-3],
        help="peak learning rate; several: one run each")
    add("--warmup", type=int, default=0, toy=30, help="steps of linear warm-up")
    add("--schedule", choices=("cosine", "constant"), default="cosine",
        help="learning rate after the warm-up (cosine falls to --lr / 10)")
    add("--weight-decay", type=float, default=0.01, help="of weight matrices")
    add("--max-grad-norm", type=float, default=1.0, help="a larger gradient is scaled down to it")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time (and no CUDA graphs)")
    add("--compile", action="store_true", help="torch.compile the blocks and divergences: for long runs on a GPU")
    add = flag_group(parser, "evaluation")
    add("--eval-every", type=int, toy=50, help="steps between evaluations; without it: one for each epoch")
    add("--eval-examples", type=int, default=200, toy=100,
        help="validation examples answered each time, and for the table without --eval-data")
    add("--max-new-tokens", type=int, default=256, toy=48, help="longest answer")
    add("--rouge", choices=("plain", "stemmer", "unicode"), default="stemmer", toy="unicode", help="how ROUGE-L forms its words")
    add = flag_group(parser, "run", DTYPES + FOUR_BITS)
    add("--out", default="runs/kd", toy="runs/toy", help="folder for checkpoints, log, table and picture")
    add("--resume", action="store_true", help="continue a stopped run; give it the same flags")
    add("--seed", type=int, default=0, help="of the split, the order, the sampling and the toy world")
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", toy="float32",
        help="of products, teacher and saved models")
    return parser


def parse_args():
    """The flags, checked, with the defaults filled in; and three things that follow from them:

    toy       whether this is the toy world
    from_sft  whether its student is fine-tuned first
    plan      the runs, as planned() gives them
    """
    parser = make_parser()
    args = parser.parse_args()
    if args.loss is None and len(args.lr or ()) > 1:            # figure 2 of the paper. (A flag not given is None until below)
        args.loss = "forward_kl"
        print("note: several --lr without --loss: a sweep with --loss forward_kl", file=sys.stderr)
    note_flags(args)
    takes = inspect.signature(DIVERGENCES.get(args.loss, forward_kl)).parameters
    own = {name: takes[name].default for name in takes.keys() & {"temperature", "beta", "alpha"}
           if getattr(args, name) is None and takes[name].default is not takes[name].empty}
    args.toy = args.student is None
    args.from_sft = args.toy and (args.loss == "minillm" or args.on_policy)     # both need a student that can answer
    if args.from_sft:
        args.lr = args.lr or [1e-3]                             # lower: these runs continue from the SFT student
    if args.epochs is None and args.steps is None:
        args.epochs, args.steps = (None, 400) if args.toy else (1, None)
    fill_defaults(args, parser, args.toy)
    check_flags(args)
    vars(args).update(own)                                      # a divergence's own defaults go before the flags', unchecked
    if args.cache_teacher:
        args.cache_teacher = str(Path(args.cache_teacher).expanduser())
    args.plan = planned(args.loss, args.lr)
    return args


def note_flags(args):
    """Says which flags do nothing with this loss."""
    loss = args.loss or "sft or forward_kl"
    if loss in ("sft", "minillm"):
        note_unused(args, f"with --loss {loss}", "kd_ratio", "temperature")
    if args.on_policy == 1:
        note_unused(args, "with --on-policy 1, which has no cross-entropy", "kd_ratio")
    takes = inspect.signature(DIVERGENCES.get(loss, forward_kl)).parameters
    note_unused(args, f"with --loss {loss}", *(name for name in ("temperature", "beta", "alpha") if name not in takes))
    if loss != "minillm":
        note_unused(args, f"with --loss {loss}", "mix", "rollouts", "inner_epochs", "ratio_clip")
    if not args.lm_data:
        note_unused(args, "without --lm-data", "lm_coef")
    if args.valid_data or args.student is None:
        note_unused(args, "with --valid-data" if args.valid_data else "in the toy world", "validation")
    if args.steps:
        note_unused(args, "with --steps", "epochs")


def check_flags(args):
    """Raises InputError for flags that do not go together."""
    asks = args.on_policy or args.seq_kd or args.cache_teacher
    if args.student is None and any((args.teacher, args.data, args.valid_data, args.eval_data, args.limit, args.format)):
        raise InputError("--teacher, --data, --valid-data, --eval-data, --limit or --format without --student; add --student "
                         "NAME, or leave them all out for the toy world")
    if args.student and not args.data:
        raise InputError("--student without --data; add --data FILE")
    if args.student and not args.teacher and (args.loss != "sft" or asks):
        raise InputError("--student without --teacher; add --teacher NAME, or use --loss sft without --on-policy, --seq-kd and "
                         "--cache-teacher")
    check_positive(args, "limit", "max_length", "max_prompt_length", "validation", "temperature", "epochs", "steps",
                   "batch_size", "grad_accum", "lr", "max_grad_norm", "eval_every", "eval_examples", "max_new_tokens",
                   "rollouts", "inner_epochs", "ratio_clip", "lm_coef")
    if not (0 <= args.kd_ratio <= 1 and 0 < args.beta < 1 and 0 < args.alpha < 1):
        raise InputError(f"--kd-ratio {args.kd_ratio}, --beta {args.beta}, --alpha {args.alpha}: --kd-ratio must be from 0 to 1, "
                         "--beta and --alpha above 0 and below 1; fix the wrong one")
    if not (0 <= args.on_policy <= 1 and 0 <= args.mix < 1):
        raise InputError(f"--on-policy {args.on_policy}, --mix {args.mix}: --on-policy must be from 0 to 1, --mix from 0 to "
                         "below 1; fix the wrong one")
    if args.on_policy and args.loss in ("sft", "minillm", None):
        raise InputError("--on-policy needs a divergence (MiniLLM is on-policy by itself); add --loss reverse_kl")
    if args.cache_teacher and (args.on_policy or args.loss in ("sft", "minillm")):
        raise InputError("--cache-teacher with --on-policy, --loss minillm or --loss sft: it stores states for the data only, "
                         "but the student's own answers are new each time, and SFT uses no teacher; leave it out")
    if args.seq_kd and (args.loss == "minillm" or args.on_policy == 1 and not args.from_sft):
        raise InputError("--seq-kd with --loss minillm or --on-policy 1: these learn from the student's own answers; leave one "
                         "out")
    check_positive(args, "warmup", "weight_decay", or_zero=True)
    if len({f"{lr:g}" for lr in args.lr}) < len(args.lr):
        raise InputError(f"--lr {args.lr}: two rates are the same; give each once")


# ---- one run: the loop

def train(*, student: Qwen2, tokenizer: Tokenizer, rows: list[Encoded], valid_rows: list[Encoded], valid_examples, out,
          loss, teacher: Teacher | CachedTeacher | None = None, kd_ratio=0.5, temperature=1.0, beta=0.5, alpha=0.1,
          lm_rows=(), lm_coef=1.0, on_policy=0.0, mix=0.2, rollouts=256, inner_epochs=4, ratio_clip=0.2, steps,
          batch_size, grad_accum=1, lr, warmup=0, schedule="cosine", weight_decay=0.01, max_grad_norm=1.0,
          gradient_checkpointing=False, compile=False, eval_every, eval_examples, max_new_tokens, rouge, seed=0,
          dtype=torch.float32) -> Qwen2:
    """Trains `student` in place; returns it. best/ and last/ under `out` are folders that transformers opens.

    rows     to learn from; in valid_rows, row.index points into valid_examples
    teacher  its states and its head; None for sft
    lm_rows  the rows of --lm-data
    loss     one name of --loss
    dtype    that of matrix products and of sampling
    The other arguments are the flags of the same names; main passes them by flags_of. A saved state in `out` is continued. In the
    log, `ce` is that of the tokens learned from: in MiniLLM and in on-policy steps -log q of the student's own samples.
    Raises InputError for a gradient or a held-out loss that is not finite; the student that it comes from is not saved.
    """
    out = Path(out)
    optimizer = make_optimizer(student.train(), lr, weight_decay, in_place=True)
    if not gradient_checkpointing:
        use_graphs(student, dtype)
    if loss == "sft":
        divergence, teacher, kd_ratio, on_policy = None, None, 0.0, 0.0
    elif loss == "minillm":
        divergence, kd_ratio = reverse_kl, 1.0                  # its exact first term, added in full to the policy's loss
    else:
        divergence = pick_divergence(loss, temperature=temperature, beta=beta, alpha=alpha)     # of one token's distributions
    if compile:
        compile_blocks(student, *([teacher.model] if isinstance(teacher, Teacher) else []))
        compile_losses()
    state, saved = load_state(out, student, optimizer, {"step": 0, "best": -1.0})       # best: the highest ROUGE-L so far
    rollouts_now = minillm.unpack_rollouts(saved)               # those that MiniLLM is learning from; else []
    batching = batch_size, grad_accum, seed
    answering = dict(batch_size=batch_size * grad_accum, max_new_tokens=max_new_tokens, eos_ids=tokenizer.eos_ids)
    if loss == "minillm":
        collecting = dict(answering, student=student, teacher=teacher.model, pad_id=tokenizer.pad_id, mix=mix, dtype=dtype)
        train_steps = minillm.rollout_steps(rollouts_now, rows, state["step"], steps, *batching, rollouts, inner_epochs,
                                            collecting)
    else:
        train_steps = optimizer_steps(rows, state["step"], steps, *batching)    # yields (step, its micro-batches)
    lm_steps = optimizer_steps(lm_rows, state["step"], steps, *batching)        # the same of --lm-data; lazy: unused without it
    backward = functools.partial(                                               # of one micro-batch; gradients add up
        forward_backward, student=student, teacher=teacher, divergence=divergence, ratio_clip=ratio_clip,
        pad_id=tokenizer.pad_id, dtype=dtype, checkpointing=gradient_checkpointing)
    log = Log(out, upto=state["step"])
    sampler = None                                              # in on-policy steps a copy of the student in `dtype`
    judge = functools.partial(
        evaluate_and_save, student, tokenizer=tokenizer, rows=valid_rows, examples=valid_examples, teacher=teacher,
        divergence=divergence, dtype=dtype, batch_size=batch_size, eval_examples=eval_examples, max_new_tokens=max_new_tokens,
        rouge=rouge, out=out, log=log)
    with keep_freed_memory(), Progress(out.name, steps, start=state["step"]) as progress:
        started = kept = time.perf_counter()                                    # kept: when the state was last saved
        for step, batches in train_steps:                                       # MiniLLM's rollouts are sampled in here
            lm_batches = next(lm_steps)[1] if lm_rows else []
            own_answers = random.Random(f"{seed}:{step}").random() < on_policy  # GKD: this step on the student's answers
            kd_share = 1.0 if own_answers else kd_ratio                         # no CE: its own answers are no targets
            if own_answers:
                sampler = cast_copy(student, dtype, sampler)
                own = respond(sampler, sum(batches, []), seed=seed + 7919 * step,          # a prime: small seeds do not collide
                              vocab=len(tokenizer), **answering)
                batches = [own[i:i + batch_size] for i in range(0, len(own), batch_size)]

            # Forward and backward; the gradients of all micro-batches add up. Each sum is [2]: of CE, and of the divergence.
            scored, lm_scored = response_tokens(batches), response_tokens(lm_batches)
            sums = sum(backward(batch, weight=1 / scored, kd_ratio=kd_share) for batch in batches)
            lm_sums = sum(backward(batch, weight=lm_coef / lm_scored) for batch in lm_batches)
            rate = learning_rate(step, steps, lr, warmup, schedule)
            norm = float(apply_gradient(student, optimizer, rate, max_grad_norm))               # here the host waits for a GPU

            ce, kd = (sums / scored).tolist()                                   # nats per token
            check_gradient(norm, f"{out}, step {step + 1}", lr, dtype, first=step == 0)     # what was saved before stays
            line = dict(ce=ce, kd=kd if kd_share else None, grad_norm=norm, lr=rate, tokens=scored,
                        own_answers=own_answers if on_policy else None,
                        lm_ce=float(lm_sums[0]) / lm_scored if lm_batches else None,
                        seconds=round(time.perf_counter() - started, 4))
            log.write(step=step + 1, **{key: value for key, value in line.items() if value is not None})
            progress.update(note=f"ce {ce:.3f}" + (f" kd {kd:.3f}" if kd_share else ""))
            state, news = state | {"step": step + 1}, None
            if (step + 1) % eval_every == 0 or step + 1 == steps:
                state, news = judge(state=state, sampler=sampler)
            if step + 1 == steps:
                log.write(step=steps, done=True)
                remove(out / STATE)                             # last/ has the weights; the moments are of no more use
            elif news or time.perf_counter() - kept > SAVE_EVERY:
                save_state(out, student, optimizer, state, minillm.pack_rollouts(rollouts_now))
                kept = time.perf_counter()
            if news:
                progress.say(f"{out.name} step {step + 1}: {news}")             # last: if stdout is closed, this ends the run
            started = time.perf_counter()
    return student


def response_tokens(batches: list[list[Encoded]]) -> int:
    """Scored tokens of an optimizer step, what its losses are divided by."""
    return sum(len(row.response) for batch in batches for row in batch)


def forward_backward(batch: list[Encoded], *, student: Qwen2, weight: float, pad_id: int, dtype: torch.dtype,
                     checkpointing: bool, teacher=None, divergence=None, kd_ratio=0.0, ratio_clip=0.2) -> torch.Tensor:
    """Forward and backward of one micro-batch, its tokens weighted by `weight`: leaves its gradients for apply_gradient, and
    returns the sums of CE and divergence [2].

    For rollouts the loss is MiniLLM's: the clipped surrogate takes the place of CE, and kd_ratio must be 1.
    """
    device = student.head.device
    policy_loss = teacher_states = None
    ids, mask = collate(batch, pad_id, device)                                  # [B, T]
    with mixed_precision(device, dtype):
        if isinstance(batch[0], minillm.Rollout):
            old = torch.cat([row.old_logq for row in batch]).to(device)                     # [N]
            advantage = torch.cat([row.advantage for row in batch]).to(device)              # [N]
            teacher_states = torch.cat([row.teacher for row in batch]).to(device)           # [N, D']

            def policy_loss(logq, at):                          # [n] of the tokens at `at`, a chunk: MiniLLM eq. (7)
                return clipped_surrogate(logq, old[at], advantage[at], ratio_clip)
        elif kd_ratio:                                                          # paper eq. (3)
            # The teacher first: without graphs, a GPU runs it while the host launches the student.
            teacher_states = teacher.states(batch, ids, mask)                   # [N, D']
        states, targets = scored_positions(student.hidden(ids, checkpointing=checkpointing), ids, mask)         # [N, D], [N]
        loss, ce, kd = head_loss(                               # the teacher's head also where only CE counts: see there
            states, student.head, targets, teacher_states, teacher.head if teacher else None,
            divergence if kd_ratio else None, kd_ratio, weight, policy_loss)
    loss.backward()
    return torch.stack([ce.sum(), kd.sum()])


def evaluate_and_save(student, *, sampler, tokenizer, rows, examples, teacher, divergence, dtype, batch_size, eval_examples,
                      max_new_tokens, rouge, state, out, log) -> tuple[dict, str]:
    """Logs the held-out loss and ROUGE-L of the student's own answers; saves last/, and best/ if its ROUGE-L is the best so far.
    Returns `state` with the best ROUGE-L, and a line to print, with one of the answers."""
    sampler = cast_copy(student, dtype, sampler)
    metrics = compare(sampler, rows, tokenizer.pad_id, batch_size, teacher, divergence, dtype)
    if not math.isfinite(metrics["ce"]):                        # before it replaces what was saved earlier
        raise InputError(f"{out}: the held-out loss after step {state['step']} is not finite; lower --lr")
    scores = answer_and_score(sampler, tokenizer, rows[:eval_examples], examples, max_new_tokens, max(AT_ONCE, batch_size),
                              rouge)
    rouge_l = mean_by_category(scores)["all"]["rouge_l"]
    log.write(step=state["step"], rouge_l=rouge_l, **{f"valid_{key}": value for key, value in metrics.items()})
    i = random.Random(state["step"]).randrange(len(scores))     # another sample each time
    news = (f"held-out CE {metrics['ce']:.3f}" + (f", KD {metrics['kd']:.3f}" if teacher else "")
            + f", ROUGE-L {rouge_l:.1f}; asked {examples[rows[i].index].messages[-1]['content'][:80]!r}, "
            + f"said {scores[i]['prediction'][:80]!r}")
    for name in ["last", "best"] if rouge_l > state["best"] else ["last"]:
        tokenizer.save(out / name)
        save_model(student, out / name, dtype=dtype)            # a run is resumed from STATE's weights, in float32
    return state | {"best": max(rouge_l, state["best"])}, news


# ---- several runs: the comparison, the sweep, the toy world

def stage(folder: Path, make_student, *, resume: bool, recorded: dict, **settings):
    """One run in its own folder, started or resumed unless it is finished; its models are then in best/ and last/.

    recorded  what config.json holds beside the settings; a resumed run must have the same
    """
    if begin_run(folder, recordable(settings) | recorded, resume):
        train(student=make_student(), out=folder, **settings)
    elif not (folder / "best" / CONFIG).exists():
        raise InputError(f"{folder / 'best'}: is missing, though the run is done; put it back, or choose another --out")


def recordable(settings: dict) -> dict:
    """Those of a run's settings that go into its config.json: numbers, strings and None."""
    return {key: value for key, value in settings.items() if isinstance(value, (str, int, float, type(None)))}


def toy_world(out: Path, seed: int, resume: bool, device):
    """Makes the records, the tokenizer, the teacher and the student's base under `out`, both trained on `device`."""
    if resume and read_log(out / "teacher"):                    # before anything is written
        check_settings(out / "teacher", {"seed": seed})
    if not any((out / name / CONFIG).exists() for name in ("teacher", "base")):
        for folder in out / "data", out / "tokenizer":
            if folder.exists():
                raise InputError(f"{folder}: was not made by the toy world, which would write there; choose another --out")
        write_config(out / "teacher", {"toy": True})            # marks both folders as the toy world's
    lock(out)
    tokenizer = toy.make_tokenizer(out / "tokenizer")
    human = toy.records(600, seed=2000 + seed, human=True)
    train_at, valid_at = ([int(example.where) for example in part] for part in
                          split_examples([to_example(entry, str(i)) for i, entry in enumerate(human)], 100, seed))
    files = {"teacher": toy.records(12_000, seed=1000 + seed), "train": [human[i] for i in train_at],
             "valid": [toy.corrected(human[i]) for i in valid_at], "test": toy.records(300, seed=3000, test=True)}
    for name, entries in files.items():
        write_jsonl(entries, out / "data" / f"{name}.jsonl")
    clean, report = load_examples(out / "data" / "teacher.jsonl")
    train_part, valid_part = split_examples(clean, 100, seed)
    rows, valid = (encode_examples(part, tokenizer)[0] for part in (train_part, valid_part))
    common = dict(tokenizer=tokenizer, loss="sft", batch_size=16, grad_accum=2, warmup=30, eval_examples=100, max_new_tokens=48,
                  rouge="unicode", seed=seed, valid_rows=valid, valid_examples=valid_part, resume=resume)
    stage(out / "teacher", lambda: Qwen2(toy.teacher_config(len(tokenizer))).init_weights(seed).to(device), rows=rows,
          steps=500, lr=2e-3, eval_every=250, recorded={"toy": True, "data": report.files}, **common)
    text = encode_text(toy.plain_text(3000, seed=4000 + seed), tokenizer)
    stage(out / "base", lambda: Qwen2(toy.student_config(len(tokenizer))).init_weights(seed + 1).to(device), rows=text,
          steps=200, lr=4e-3, eval_every=200, recorded={"toy": True}, **common)


def planned(loss: str | None, rates: list[float]) -> list[tuple[str, str, float, str]]:
    """(label, loss, learning rate, folder under --out) of every run that --loss and --lr ask for; "" is --out itself."""
    if loss is None:
        return [("SFT", "sft", rates[0], "sft"), ("KD", "forward_kl", rates[0], "kd")]
    if len(rates) == 1:
        return [(loss, loss, rates[0], "")]
    return [(f"{loss} lr {rate:g}", loss, rate, f"lr-{rate:g}") for rate in rates]


def ask_teacher(teacher: Checkpoint, tokenizer, rows, device, dtype, path, *, batch_size, max_length, max_new_tokens,
                seed) -> list[Encoded]:
    """--seq-kd: the rows with the teacher's answers, kept in `path`; those not sampled by an earlier run are sampled now."""
    load = functools.partial(teacher.load, device, dtype)
    made_from = {"teacher": teacher.files, "dtype": str(dtype)}
    with Progress("the teacher's answers", len(rows)) as progress:
        rows = teacher_responses(path, load, rows, made_from, tokenizer, max(AT_ONCE, batch_size), max_new_tokens, seed,
                                 progress.update)
    if long := sum(len(row) > max_length for row in rows):
        print(f"{long:,} of the teacher's {len(rows):,} answers cut at --max-length")
    return [row.cut_to(max_length) for row in rows]


def open_teacher(teacher: Checkpoint, tokenizer, rows, device, dtype, made_from: dict, *, cache_teacher,
                 batch_size) -> Teacher | CachedTeacher:
    """The teacher that the loop uses: the model, or with --cache-teacher its states of `rows`, computed where missing.

    made_from  what the rows were made from, beside the teacher (fill_cache)
    """
    load = lambda: teacher.load(device, dtype).requires_grad_(False)
    if not cache_teacher:
        return Teacher(load())
    made_from = {"teacher": teacher.files, "dtype": str(dtype)} | made_from
    width = load_config(teacher.folder).hidden_size
    with Progress(f"{cache_teacher}: teacher's states, rows", len(rows)) as progress:
        computed = fill_cache(cache_teacher, rows, made_from, load, width, tokenizer.pad_id, batch_size, dtype, progress.update)
    print(f"{cache_teacher}: states of {computed:,} scored tokens computed now; the data have "
          f"{sum(len(row.response) for row in rows):,}, repeated rows included; {2 * width:,} bytes each")
    head = load_head(teacher.folder, device, dtype)
    teacher.check()
    return CachedTeacher(cache_teacher, head)


def read_data(tokenizer, lengths: dict, *, data, valid_data, eval_data, format, limit, validation, seed, eval_examples) -> tuple:
    """--data, --valid-data and --eval-data -> the Reports of the first two, the training rows, (rows, examples) held out, (rows,
    examples) of the table."""
    def encode(part, what):
        try:
            return encode_examples(part, tokenizer, **lengths)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error

    with Progress("reading", limit) as progress:
        examples, report = load_examples(data, format, limit, progress.update)
    print(report)
    if valid_data:
        train_part, (valid_part, valid_report) = examples, load_apart(valid_data, format, examples, "--valid-data")
    else:
        (train_part, valid_part), valid_report = hold_out(examples, validation, seed), None
    with Progress("encoding", len(train_part)) as progress:
        rows, counts = encode_examples(train_part, tokenizer, **lengths, progress=progress.update)
    valid_rows, valid_counts = encode(valid_part, "--valid-data" if valid_data else "held-out records")
    told = lambda counts: ", ".join(f"{count:,} {what}" for what, count in counts.items())
    print(f"{told(counts)}; for validation {told(valid_counts)}")
    asked = valid_rows[:eval_examples], valid_part              # what the table's models are asked
    if eval_data:
        test, _ = load_apart(eval_data, format, train_part, "--eval-data")
        asked_rows, counts = encode(test, "--eval-data")
        lost = describe_dropped(counts)
        print(f"{len(asked_rows):,} of {len(test):,} records of --eval-data{f', {lost}' if lost else ''}")
        asked = asked_rows, test
    return report, valid_report, rows, (valid_rows, valid_part), asked


def load_apart(paths, format, learned: list, flag: str) -> tuple:
    """load_examples of files that are not trained on; says how many of their prompts are in `learned` too."""
    apart, report = load_examples(paths, format)
    if both := count_shared(apart, learned):
        print(f"note: {both:,} of {len(apart):,} records of {flag} have a prompt that is also trained on")
    return apart, report


def conclude(models: dict, teacher: Teacher | None, runs: dict[str, Path], tokenizer, asked: tuple, held_out: tuple, out: Path,
             *, eval_data, eval_examples, batch_size, max_new_tokens, rouge) -> Path | None:
    """Prints show_table's table of the models' answers to `asked`, and draws the curves of the runs, measured on `held_out`, with
    the teacher's ROUGE-L dashed; both are (rows, examples). Returns the picture's path."""
    answers = dict(max_new_tokens=max_new_tokens, batch_size=max(AT_ONCE, batch_size), rouge=rouge)
    dashed = show_table(models, teacher, tokenizer, *asked, out, **answers).get("Teacher", {}).get("all")
    if teacher and eval_data:                                   # then the table is of --eval-data, the curves are of held_out
        rows, examples = held_out
        scores = answer_and_score(teacher.model, tokenizer, rows[:eval_examples], examples, **answers)
        dashed = mean_by_category(scores)["all"]["rouge_l"]
    return plot_curves(runs, out / "curves.png", dashed)


def main():
    args = parse_args()
    out, started = Path(args.out).expanduser(), time.time()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    runs = {label: out / folder for label, *_, folder in args.plan}
    earlier = [out / name for name in (("teacher", "base") if args.toy else ()) + (("sft",) if args.from_sft else ())]
    check = functools.partial(check_free, out, [*runs.values(), *earlier], resume=args.resume, toy=args.toy, own=OWN,
                              cache=args.cache_teacher)
    check()
    if args.toy:
        spare_threads(toy.teacher_config(1))
        toy_world(out, args.seed, args.resume, device)
        args.student, args.teacher = str(out / "base" / "best"), str(out / "teacher" / "best")
        args.data, args.valid_data, args.eval_data = (
            [str(out / "data" / f"{name}.jsonl")] for name in ("train", "valid", "test"))

    # ---- read and check all; only the toy world has written yet
    tokenizer = Tokenizer.load(args.student)
    lengths = dict(template=args.template, max_length=args.max_length, max_prompt_length=args.max_prompt_length)
    if args.teacher:
        check_teacher(args.teacher, tokenizer)                  # before a hub's student is fetched
    teacher_dtype = pick_dtype(args.dtype, device, bool(args.teacher) and has_four_bits(args.teacher))
    report, valid_report, rows, held_out, asked = read_data(tokenizer, lengths, **flags_of(read_data, args))
    texts, text_files = load_texts(args.lm_data) if args.lm_data else ([], None)
    per_epoch = steps_per_epoch(len(rows), args.batch_size, args.grad_accum)
    steps = args.steps or max(1, math.ceil(round(args.epochs * per_epoch, 6)))  # 0.07 x 100 is 7.000000000000001
    check_student(args.student, tokenizer)
    start_from = Checkpoint(args.student)
    teacher_from = Checkpoint(args.teacher) if args.teacher else None
    if teacher_from:
        outline(teacher_from.folder)                            # checks its files now: SFT only loads it for the table
    settings = flags_of(train, args, but=("student", "teacher", "loss", "lr", "out")) | dict(
        tokenizer=tokenizer, valid_rows=held_out[0], valid_examples=held_out[1], steps=steps, dtype=dtype,
        eval_every=args.eval_every or min(per_epoch, steps), lm_rows=encode_text(texts, tokenizer, args.max_length))
    recorded = {"toy": args.toy, "student": str(start_from), "teacher": teacher_from and str(teacher_from),
                "data": report.files, "format": args.format, "lm_data": text_files, "seq_kd": args.seq_kd,
                "cache_teacher": args.cache_teacher, "limit": args.limit,
                "dtype": str(dtype) if teacher_dtype == dtype else f"{dtype}, of the teacher {teacher_dtype}",
                "valid_data": valid_report and valid_report.files, "validation": None if valid_report else args.validation,
                "rows": fingerprint(row.digest for row in rows + held_out[0]), **lengths}
    for label, loss, lr, _ in args.plan:                                                    # before anything is written
        if args.resume and not args.toy and read_log(runs[label]):
            check_settings(runs[label], recordable(settings | dict(loss=loss, lr=lr)) | recorded)

    # ---- the runs
    lock(out)
    check()                                                     # another process may have run here while the data were read
    if not args.eval_data:
        write_held_out(held_out[1], out / "held-out.jsonl")
    if args.seq_kd:
        rows = ask_teacher(teacher_from, tokenizer, rows, device, teacher_dtype, out / "teacher-answers.jsonl",
                           **flags_of(ask_teacher, args))
    teacher = None
    if teacher_from and args.loss != "sft":
        made_from = {"data": sorted(digest for _, digest in report.files), "seq_kd": args.seq_kd, **lengths}
        teacher = open_teacher(teacher_from, tokenizer, rows + held_out[0], device, teacher_dtype, made_from,
                               **flags_of(open_teacher, args))
    settings |= dict(rows=rows, teacher=teacher, resume=args.resume)
    if args.from_sft:
        stage(out / "sft", functools.partial(start_from.load, device), loss="sft", lr=3e-3, recorded=recorded, **settings)
        start_from = Checkpoint(out / "sft" / "best")
        recorded["student"] = str(start_from)
    for label, loss, lr, _ in args.plan:
        stage(runs[label], functools.partial(start_from.load, device), loss=loss, lr=lr, recorded=recorded, **settings)

    # ---- the table
    if teacher_from and not isinstance(teacher, Teacher):       # the table needs answers: the whole model, not the head
        teacher = settings["teacher"] = Teacher(teacher_from.load(device, teacher_dtype).requires_grad_(False))
    models = {"SFT" if args.from_sft else "Base": functools.partial(start_from.load, device, dtype)}
    models |= {label: functools.partial(load_model, run / "best", device, dtype) for label, run in runs.items()}
    picture = conclude(models, teacher, runs, tokenizer, asked, held_out, out, **flags_of(conclude, args))
    print(f"\n{f'curves in {picture}; ' if picture else ''}checkpoints under {out}; {time.time() - started:.0f} s")


if __name__ == "__main__":
    with script_errors():
        main()
