"""GRPO: a model learns to reason step by step, on problems whose answers can be checked.

    python train_grpo.py                        two-digit sums, 4 minutes on a CPU; accuracy before and after
    python train_grpo.py --task code            small programs, judged by running them in the sandbox
    python train_grpo.py --model runs/kd/kd/best --data open-r1/codeforces-cots:solutions_py      the real thing
    python train_grpo.py ... --rewards format,code,my_rewards.py:brevity --reward-weights 0.1,1,0.1
    python train_grpo.py ... --norm constant --scale none --beta 0                                  Dr. GRPO
    python train_grpo.py ... --norm token --clip-high 0.28 --drop-flat --beta 0 --inner-epochs 4    DAPO
    python train_grpo.py ... --ratio sequence --clip 3e-4 --clip-high 4e-4 --inner-epochs 4         GSPO

Each step samples a group of answers to each of a few prompts, computes their rewards, and makes the answers that are better
than their group more probable. Paper: Knowledge Distillation for Large Language Models, eq. (5) to (7); see minikd/grpo.py.
"""
from minikd.errors import end_at_interrupts

if __name__ == "__main__":
    end_at_interrupts()                                         # while torch is imported

import functools
import math
import statistics
import time
from pathlib import Path

import torch

from minikd import grpo, problems, sandbox, toy
from minikd.checkpoint import Checkpoint, load_config, model_folder, save_model
from minikd.command import (BY_FIELDS, DTYPES, Parser, Progress, check_positive, fill_defaults, flag_group, flags_of,
                            note_unused, pick_device, pick_dtype, spare_threads)
from minikd.data import Encoded, begins_thoughts, collate, encode_examples, next_rows
from minikd.errors import InputError, script_errors
from minikd.examples import count_shared, split_examples
from minikd.formats import to_example
from minikd.files import fingerprint, remove, sha256
from minikd.head import head_loss, scored_positions
from minikd.losses import entropy
from minikd.model import Qwen2, cast_copy, mixed_precision
from minikd.plots import plot_rewards
from minikd.records import data_files
from minikd.rewards import LARGEST, REWARDS, combine, format_fault, load_rewards, reward_files, summary
from minikd.run import SAVE_EVERY, STATE, Log, begin_run, check_free, check_settings, load_state, lock, read_log, save_state
from minikd.tokenizer import Tokenizer
from minikd.training import (apply_gradient, check_gradient, check_student, compile_blocks, keep_freed_memory, learning_rate,
                             make_optimizer, use_graphs)

TOY_LESSONS = {"sums": 400, "code": 800}                        # steps of supervised fine-tuning before GRPO
FORM = {"format": 0.05, "steps": 0.05}                          # for form: a student that is rarely right learns little else


def make_parser() -> Parser:
    """Every flag, in groups."""
    parser = Parser(__doc__)
    add = flag_group(parser, "model and problems (none of them: a toy task)",
                     f"with --model but without --data the toy's defaults apply, so give --lr;\n{BY_FIELDS}")
    add("--model", help="folder or hub name, preferably a distilled student; default: a toy student")
    add("--data", nargs="+", metavar="FILE", help="records with a question and an answer, or with tests")
    add("--eval-data", nargs="+", metavar="FILE", help="problems to judge the model by; without it some of --data")
    add("--format", choices=problems.FORMATS, help="record schema")
    add("--plain-prompts", action="store_true", help="ask as the records do, not for thoughts and tags (for other rewards)")
    add("--task", choices=list(problems.TASKS), default="sums", help="toy task")
    add("--limit", type=int, help="read only the first N records")
    add("--max-prompt-length", type=int, default=1024, help="tokens; longer prompts are dropped and counted")
    add = flag_group(parser, "sampling and rewards", f"rewards: {', '.join(REWARDS)}, FILE.py:FUNCTION; by default\nanswer, "
                     "code or both, depending on whether problems have answers or tests, then format,steps")
    add("--prompts", type=int, default=8, toy=16, help="problems in a step")
    add("--group-size", type=int, default=8, toy=16, help="answers to each")
    add("--max-new-tokens", type=int, default=512, toy=72, help="longest answer")
    add("--temperature", type=float, default=1.0, help="of sampling, and of the log-probabilities in the loss")
    add("--rewards", metavar="A,B", help="rewards, separated by commas")
    add("--reward-weights", metavar="X,X",
        help="one per reward (1; default format, steps: 0.05); a negative first one: --reward-weights=-1,1")
    add = flag_group(parser, "loss", "--norm sequence, token, constant: a token's weight is 1 / the length of its answer, of all "
                     "answers, or --max-new-tokens")
    add("--clip", type=float, default=0.2, help="how far the ratio of new to old policy may differ from 1")
    add("--clip-high", type=float, help="the same for ratios above 1, if different; DAPO: 0.28")
    add("--beta", type=float, default=0.04, help="weight of the KL to the starting model; 0 needs no copy of it")
    add("--scale", choices=("std", "none"), default="std", help="divide advantages by their group's standard deviation, or not")
    add("--norm", choices=grpo.NORMS, default="sequence", help="a token's weight, see above")
    add("--ratio", choices=("token", "sequence"), default="token", help="one ratio per token, or per sequence (GSPO)")
    add("--inner-epochs", type=int, default=1, help="updates on a step's answers; --clip and --ratio matter from 2 on")
    add("--mask-truncated", action="store_true", help="answers cut at --max-new-tokens do not count")
    add("--drop-flat", action="store_true", help="groups whose answers all have the same reward do not count")
    add = flag_group(parser, "optimisation")
    add("--steps", type=int, default=500, toy=250, help="steps: one sampling and --inner-epochs updates each")
    add("--batch-size", type=int, default=8, toy=256, help="answers in a micro-batch")
    add("--lr", type=float, default=1e-6, toy=3e-4, help="peak learning rate")
    add("--warmup", type=int, default=0, help="steps of linear warm-up")
    add("--schedule", choices=("cosine", "constant"), default="constant", help="rate after warm-up; cosine: to a tenth")
    add("--weight-decay", type=float, default=0.0, help="of weight matrices")
    add("--max-grad-norm", type=float, default=1.0, help="largest gradient norm")
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time (and no CUDA graphs)")
    add("--compile", action="store_true", help="torch.compile the blocks for training: for long runs on a GPU")
    add("--patience", type=int, default=50, help="end with an error after so many steps in a row without a reward")
    add = flag_group(parser, "run", DTYPES)
    add("--eval-every", type=int, default=50, help="steps between evaluations on held-out problems")
    add("--eval-examples", type=int, default=64, toy=200, help="the first of --eval-data, or problems held out: at most a fifth")
    add("--out", help="folder for checkpoints, log, completions and picture (runs/grpo; toy runs/grpo-TASK)")
    add("--resume", action="store_true", help="continue a stopped run; give it the same flags")
    add("--seed", type=int, default=0, help="of the split of --data, sampling, order and the toy")
    add("--device", default="auto", help="cpu, cuda, ...")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", toy="float32",
        help="of products, sampling and saved model")
    return parser


def parse_args():
    """The flags, checked, with the defaults filled in; and `toy`: whether the problems are the toy's."""
    parser = make_parser()
    args = parser.parse_args()
    if args.data and not args.model:
        raise InputError("--data without --model; add --model FOLDER")
    args.toy = not args.data                                    # toy problems, perhaps with a real model
    if args.limit and not args.data:
        raise InputError("--limit without --data; add --data FILE, or leave out --limit")
    if args.data:
        note_unused(args, "with --data", "task")
    else:
        note_unused(args, "without --data", "format", "plain_prompts", "eval_data")
    fill_defaults(args, parser, args.toy)
    args.out = args.out or (f"runs/grpo-{args.task}" if args.toy else "runs/grpo")
    check_positive(args, "limit", "max_prompt_length", "prompts", "group_size", "max_new_tokens", "temperature", "clip",
                   "clip_high", "inner_epochs", "steps", "batch_size", "lr", "max_grad_norm", "patience", "eval_every",
                   "eval_examples")
    if args.group_size < 2:
        raise InputError("--group-size 1: an answer is judged against its group; give 2 or more")
    check_positive(args, "beta", "warmup", "weight_decay", or_zero=True)
    return args


def read_problems(*, data, eval_data, limit, format, plain_prompts, task, rewards, eval_examples,
                  seed) -> tuple[list[problems.Problem], list[problems.Problem]]:
    """The problems to train on, and those to judge the model by: of --data and --eval-data, every question once; without
    --eval-data some held out of --data; without either, the toy's."""
    if not data:
        return problems.toy_split(task, eval_examples, seed)
    read = functools.partial(judged_problems, format=format, plain_prompts=plain_prompts, rewards=rewards)
    found = read(data, limit=limit, fewest=1 if eval_data else 2)
    if not eval_data:
        return split_examples(found, min(eval_examples, max(1, len(found) // 5)), seed)
    tests = read(eval_data, fewest=1)[:eval_examples]
    if both := count_shared(tests, found):
        print(f"note: {both:,} of {len(tests):,} problems of --eval-data are also trained on")
    return found, tests


def judged_problems(files: list[str], *, format, plain_prompts, rewards, limit=None, fewest: int) -> list[problems.Problem]:
    """The files' problems, every question once, but for those that no reward can judge by more than form; says how many were left
    out.  Raises InputError for fewer than `fewest`."""
    found, left = problems.load_problems(files, limit, format, plain_prompts)
    if len(found) < fewest:
        raise InputError(f"{', '.join(files)}: different questions with tests, or an answer that others can be compared with: "
                         f"{len(found)} of {len(found) + left:,} records; give {fewest} or more"
                         f"{', as one is held out' if fewest > 1 else ''}")
    if left:
        print(f"{', '.join(files)}: {left:,} records left out: they repeat an earlier question, or have no statement or no "
              "comparable answer")
    names = {name.strip() for name in (rewards or ",".join(problems.CHECKS)).split(",")}
    facts = [fact for name, fact in problems.CHECKS.items() if name in names]
    judged = [problem for problem in found if any(problem.facts.get(fact) for fact in facts)]
    if 1 < len(judged) < len(found) and not reward_files(rewards or ""):   # (a reward of the user's own may judge all)
        print(f"{', '.join(files)}: {len(found) - len(judged):,} problems left out: no reward tells a right answer to them from "
              "a wrong one, so only form would be rewarded")
        return judged
    return found


def choose_rewards(asked: list[problems.Problem], *, rewards, reward_weights, data) -> tuple[str, dict, dict[str, float]]:
    """--rewards and --reward-weights -> the rewards' names, separated by commas; functions and weights by name. By default they
    are what the problems can be checked by, and a little for form.  Raises InputError if one could judge no problem."""
    checks = [name for name, fact in problems.CHECKS.items() if any(problem.facts.get(fact) for problem in asked)]
    if not rewards:
        if not checks:
            raise InputError(f"{', '.join(data)}: no record has an answer, or tests that outputs can be compared with; "
                             "choose what to reward with --rewards")
        weights = dict.fromkeys((name for name in checks if name != "code_partial"), 1.0) | FORM
        rewards, reward_weights = ",".join(weights), reward_weights or ",".join(map(str, weights.values()))
    functions = load_rewards(rewards)
    for name in functions:
        if name in problems.CHECKS and name not in checks:
            raise InputError(f"--rewards {rewards}: `{name}` can judge none of the {len(asked)} problems, which have no "
                             f"{problems.CHECKS[name]} to compare with; leave it out")
    return rewards, functions, parse_weights(reward_weights, list(functions))


def parse_weights(text: str | None, names: list[str]) -> dict[str, float]:
    """'1,0.05' and the rewards' names -> a weight each; without a text, 1 each."""
    try:
        weights = [float(part) for part in text.split(",")] if text else [1.0] * len(names)
        if not all(abs(weight) <= LARGEST for weight in weights):
            raise ValueError
    except ValueError:
        raise InputError(f"--reward-weights {text}: is not a list of numbers, each a number from -10^9 to 10^9; give "
                         f"{len(names)}, separated by commas") from None
    if not any(weights):
        raise InputError(f"--reward-weights {text}: are all 0, so there is nothing to learn from; give one that is not")
    if len(weights) != len(names):
        raise InputError(f"--reward-weights {text}: {len(weights)} weights for {len(names)} rewards; "
                         f"give one for each: {', '.join(names)}")
    return dict(zip(names, weights))


# ---- the loop

def train(*, model: Qwen2, reference: Qwen2 | None, tokenizer: Tokenizer, rows: list[Encoded], reward, judge, out,
          prompts, group_size, max_new_tokens, temperature=1.0, clip=0.2, clip_high=None, beta=0.04, scale="std",
          norm="sequence", ratio="token", inner_epochs=1, mask_truncated=False, drop_flat=False, steps, batch_size, lr,
          warmup=0, schedule="constant", weight_decay=0.0, max_grad_norm=1.0, gradient_checkpointing=False,
          compile=False, patience=50, eval_every, seed=0, dtype=torch.float32) -> Qwen2:
    """Trains `model` in place; returns it, and saves it as last/ under `out`.

    reference  the frozen starting model; None with beta 0
    rows       prompts (encode_problems)
    reward     answers -> what compute_rewards gives for them
    judge      model -> the dict of accuracy(), on held-out problems
    The other arguments are the flags of the same names. A saved state in `out` is continued.
    Raises InputError for a gradient that is not finite, and when every answer's rewards summed to 0, or none could be judged,
    for `patience` steps in a row.
    """
    out, optimizer = Path(out), make_optimizer(model.train(), lr, weight_decay, in_place=True)
    if not gradient_checkpointing:
        use_graphs(model, dtype)
    if compile:
        compile_blocks(model, *([reference] if reference else []))
    state, _ = load_state(out, model, optimizer, {"step": 0, "unpaid": 0})      # steps done; those in a row without a reward
    log, completions = Log(out, upto=state["step"]), Log(out, upto=state["step"], name="completions.jsonl")
    scoring = dict(pad_id=tokenizer.pad_id, temperature=temperature, vocab=len(tokenizer), dtype=dtype)
    log_probs = functools.partial(grpo.token_log_probs, batch_size=batch_size, **scoring)   # (model, answers) -> [n] of each
    backward = functools.partial(forward_backward, model=model, clip=clip, clip_high=clip_high, beta=beta,
                                 checkpointing=gradient_checkpointing, **scoring)           # of one micro-batch; gradients add up
    with keep_freed_memory(), Progress("grpo", steps, start=state["step"]) as progress:
        sampler = cast_copy(model, dtype)                       # a copy of the policy in `dtype`
        if state["step"] == 0:
            progress.say(report(judge(sampler), 0, log))
        kept = time.perf_counter()                              # when the state was last saved
        for step in range(state["step"], steps):
            clock = [time.perf_counter()]
            # Sample: P prompts, G answers to each, and the log-probabilities that they were drawn with.
            sampler = cast_copy(model, dtype, sampler)
            asked = next_rows(rows, step, prompts, seed)
            answers, old = grpo.sample_groups(sampler, asked, group_size, max_new_tokens, tokenizer, temperature,
                                              seed=seed * 1_000_003 + step)
            clock.append(time.perf_counter())

            # Reward: each reward's values, their weighted sum [P G], and the advantages [P, G], paper eq. (5).
            texts, values, total = reward(answers)
            advantages = grpo.group_advantages(total.view(-1, group_size), scale)
            clock.append(time.perf_counter())

            # Learn: inner_epochs optimizer steps on these answers.
            flat = advantages.eq(0).all(1)                                      # [P] groups without signal
            counted = [not (mask_truncated and answer.cut or drop_flat and flat[i // group_size])
                       for i, answer in enumerate(answers)]
            weight = grpo.token_weights([len(answer.response) for answer in answers], norm, max_new_tokens, counted)
            ref = log_probs(reference, answers) if beta else old                # with beta 0 the KL is not used
            if ratio == "sequence" and inner_epochs > 1:
                old = log_probs(model, answers)                 # a bfloat16 sampler's differ by more than GSPO's small clip
            rate = learning_rate(step, steps, lr, warmup, schedule)
            log_s = [0.0] * len(answers) if ratio == "sequence" else None       # GSPO: log s of each answer, 0 before an update
            for epoch in range(inner_epochs):
                if ratio == "sequence" and epoch:
                    log_s = [grpo.sequence_log_ratio(*pair) for pair in zip(log_probs(model, answers), old)]
                sums = torch.zeros(4)
                for batch in longest_first(answers, counted, batch_size):
                    pick = lambda column: [column[i] for i in batch]
                    sums += backward(pick(answers), pick(old), pick(ref), advantages.view(-1)[batch], pick(weight),
                                     log_s and pick(log_s))     # [4] for the log
                grad_norm = float(apply_gradient(model, optimizer, rate, max_grad_norm))
                check_gradient(grad_norm, f"{out}, step {step + 1}", lr, dtype, first=step == epoch == 0)
            clock.append(time.perf_counter())

            line = describe(answers, values, total, flat, sums, clock) | {"grad_norm": grad_norm}
            if not beta:
                line["kl"] = None                               # there is no reference to compare with
            log.write(step=step + 1, **line)
            completions.write(*lines_of(step + 1, answers, texts, values, total, advantages, tokenizer))
            progress.update(note=f"reward {line['reward'] or 0:.3f} kl {line['kl'] or 0:.3f} length {line['length']:.0f}")
            unpaid = count_unpaid(state["unpaid"], total, patience, out)        # may end the run with an error
            state, news = {"step": step + 1, "unpaid": unpaid}, None            # news: a line to print once all is saved
            if (step + 1) % eval_every == 0 or step + 1 == steps:
                sampler = cast_copy(model, dtype, sampler)
                news = report(judge(sampler), step + 1, log)
                tokenizer.save(out / "last")
                save_model(model, out / "last", dtype=dtype)
            if step + 1 == steps:
                log.write(step=steps, done=True)
                remove(out / STATE)                             # last/ has the weights; the moments are of no more use
            elif news or time.perf_counter() - kept > SAVE_EVERY:
                save_state(out, model, optimizer, state)
                kept = time.perf_counter()
            if news:
                progress.say(news)                                              # last: if stdout is closed, this ends the run
    return model


def count_unpaid(unpaid: int, total: torch.Tensor, patience: int, out) -> int:
    """Steps in a row in which every answer's rewards summed to 0 or none was judged: `unpaid` before this step, whose sums are
    `total` [P G].  Raises InputError when they are `patience`."""
    if total.nan_to_num().any():
        return 0
    if unpaid + 1 < patience:
        return unpaid + 1
    what = ("no answer could be judged (all rewards None or NaN)" if total.isnan().all() else
            "every answer's rewards summed to 0")
    raise InputError(f"{out}: {what} for {patience} steps, so there is nothing to learn from; choose other --rewards, or start "
                     "from a model that sometimes succeeds")


def lines_of(step: int, answers: list[Encoded], texts: list[str], values: dict[str, list], total, advantages,
             tokenizer) -> list[dict]:
    """The lines of completions.jsonl for one step: each answer, its rewards, its advantage; for `format` also why it has none."""
    return [dict(step=step, prompt=tokenizer.decode(answer.prompt), completion=text, reward=number(reward),
                 advantage=float(advantage), rewards={name: column[i] for name, column in values.items()},
                 **({"format_fault": format_fault(text)} if "format" in values else {}))
            for i, (answer, text, reward, advantage) in enumerate(zip(answers, texts, total, advantages.view(-1)))]


def text_of(tokenizer: Tokenizer, answer: Encoded) -> str:
    """The answer's text, with <think> before it if the chat template has put that at the end of the prompt."""
    opening = "<think>\n" if begins_thoughts(tokenizer.decode(answer.prompt[-8:])) else ""
    return opening + tokenizer.decode(answer.response)


def compute_rewards(answers: list[Encoded], tokenizer, facts: list[dict], rewards: dict,
                    weights: dict) -> tuple[list[str], dict[str, list], torch.Tensor]:
    """The answers' texts, each reward's values for them (None: not judged), and weighted sums, NaN where none did.

    facts             what the rewards know about each problem; answer.index points into them
    rewards, weights  name -> function, as load_rewards gives them; name -> weight in the sum
    """
    texts = [text_of(tokenizer, answer) for answer in answers]
    known = [facts[answer.index] for answer in answers]
    values = {name: reward(texts, known) for name, reward in rewards.items()}
    sums = [math.nan if total is None else total for total in combine(values, weights)]
    return texts, values, torch.tensor(sums, dtype=torch.float64)


def longest_first(answers: list[Encoded], counted: list[bool], batch_size: int) -> list[list[int]]:
    """Micro-batches of the answers that count, the longest first: if memory does not suffice, the first fails."""
    order = sorted((i for i, keep in enumerate(counted) if keep), key=lambda i: -len(answers[i]))
    return [order[at:at + batch_size] for at in range(0, len(order), batch_size)]


def forward_backward(batch: list[Encoded], old, ref, advantages, weights, log_s=None, *, model: Qwen2, pad_id: int,
                     dtype: torch.dtype, temperature: float, vocab: int, clip: float, clip_high: float | None, beta: float,
                     checkpointing: bool) -> torch.Tensor:
    """Forward and backward of one micro-batch of answers: leaves its gradients for apply_gradient, and returns sums over its
    tokens [4]: KL, entropy, the number clipped, and the number of tokens.

    old, ref             per answer the log-probabilities [n] of its tokens when it was sampled, and the reference's
    advantages, weights  per answer its advantage, and the weight of each of its tokens
    log_s                per answer its sequence_log_ratio, which all its tokens share (GSPO); or None
    """
    device = model.head.device
    ids, mask = collate(batch, pad_id, device)                                  # [B, T]
    lengths = torch.tensor([len(row.response) for row in batch])
    per_token = lambda x: torch.as_tensor(x, dtype=torch.float32).repeat_interleave(lengths).to(device)
    A, weight = per_token(advantages), per_token(weights)                       # [N] each
    log_s = None if log_s is None else per_token(log_s)                         # [N]
    old, ref = torch.cat(old).to(device), torch.cat(ref).to(device)             # [N]

    def old_logp(logp, at=slice(None)):
        """log π_old [n] of the tokens `at`; for GSPO what gives each of them its answer's ratio s (grpo.sequence_log_ratio)."""
        return old[at] if log_s is None else logp.detach() - log_s[at]

    def policy_loss(logp, at):                                                  # [n], paper eq. (6)
        return grpo.token_loss(logp, old_logp(logp, at), ref[at], A[at], clip, beta, clip_high)

    with mixed_precision(device, dtype):
        states, targets = scored_positions(model.hidden(ids, checkpointing=checkpointing), ids, mask)  # [N, D], [N]
        value, ce, entropies = head_loss(                                       # scaling the states scales the logits
            states / temperature, model.head, targets, divergence=entropy, weight=weight, vocab=vocab, policy_loss=policy_loss)
    value.backward()
    clipped = grpo.was_clipped(-ce, old_logp(-ce), A, clip, clip_high)          # -CE is log π of a sampled token
    sums = torch.stack([grpo.k3(-ce, ref).sum(), entropies.sum(), clipped.sum()]).cpu()
    return torch.cat([sums, lengths.sum()[None]])


def describe(answers, values: dict[str, list], total, flat, sums, clock) -> dict:
    """The log's line of one step; KL and entropy (nats per token) and the clipped share are those of the last update."""
    kl, mean_entropy, clipped, _ = (number(value) for value in sums / sums[3])  # None if no answer counted
    seconds = {name: round(b - a, 4) for name, a, b in zip(("sampling", "rewards", "update"), clock, clock[1:])}
    return {"reward": number(total.nanmean()), **summary(values, len(answers) // len(flat)), "flat": float(flat.float().mean()),
            "kl": kl, "entropy": mean_entropy, "clipped": clipped, "seconds": seconds,
            "length": sum(len(answer.response) for answer in answers) / len(answers),
            "truncated": sum(answer.cut for answer in answers) / len(answers)}


def number(value) -> float | None:
    """A float, or None for NaN, which JSON does not have."""
    return None if math.isnan(value) else float(value)


def accuracy(model: Qwen2, tokenizer: Tokenizer, rows: list[Encoded], reward, max_new_tokens: int, at_once: int,
             seed: int) -> dict:
    """Accuracy on held-out problems, `greedy` and `sampled` at temperature 1, and each reward's mean over the sampled.

    The first of `answer`, `code` and `code_partial` that judged a problem says whether it is solved (the last: in part);
    without those, the mean weighted sum of all rewards is used instead.

    reward   answers -> what compute_rewards gives for them
    at_once  answers in a batch: as many as a step samples, so that evaluation needs no more memory
    """
    found = {}
    for name, temperature in ("greedy", 0.0), ("sampled", 1.0):
        answers = []
        for start in range(0, len(rows), at_once):
            answers += grpo.sample_groups(model, rows[start:start + at_once], 1, max_new_tokens, tokenizer, temperature,
                                          seed=seed + start)[0]
        texts, values, total = reward(answers)
        checks = [values[key] for key in problems.CHECKS if key in values] or [[number(value) for value in total]]
        # Each is judged by the first that can.
        solved = [next((value for value in row if value is not None), None) for row in zip(*checks)]
        found[name] = number(torch.tensor([value for value in solved if value is not None]).float().mean())
    means = summary(values)                                     # of the last answers, the sampled
    found |= {f"reward/{name}": means[f"reward/{name}"] for name in values}
    return found | {"length": sum(len(answer.response) for answer in answers) / len(answers), "sample": texts[0]}


ENOUGH = 0.25                   # share of right answers, sampled before the first step


def report(found: dict, step: int, log: Log) -> str:
    """Logs what accuracy() found; returns it as a line to print, with notes: at step 0 if there is little to learn from, later
    signs_of_collapse."""
    log.write(step=step, **{f"valid_{key}": value for key, value in found.items()})
    numbers = ", ".join(f"{key.removeprefix('reward/')} {value:.2f}" for key, value in found.items()
                        if isinstance(value, float))
    notes = signs_of_collapse(read_log(log.path.parent)) if step else []
    checked = any(f"reward/{name}" in found for name in problems.CHECKS) and found["sampled"] is not None
    if step == 0 and checked and found["sampled"] < ENOUGH:
        notes = [f"fewer than {ENOUGH:.0%} of the sampled answers are right, so GRPO may teach only the form; "
                 "fine-tune or distil the student first, or use easier problems"]
    return "\nnote: ".join([f"step {step}: held-out {numbers}; says {found['sample'][:120]!r}", *notes])


def signs_of_collapse(lines: list[dict]) -> list[str]:
    """Signs that a run goes wrong, in a log's last ten steps and last evaluation compared with the first; the bounds are
    rules of thumb. (A collapse of the entropy shows as equal rewards. The entropy itself also falls when all is well.)"""
    steps, tests = ([line for line in lines if key in line] for key in ("length", "valid_sample"))
    cut, flat, length, kl = (statistics.fmean(line[key] or 0 for line in steps[-10:])
                             for key in ("truncated", "flat", "length", "kl"))
    first = steps[0]["length"]
    was, right = (line.get("valid_greedy") or 0 for line in (tests[0], tests[-1]))
    return [sign for shown, sign in (
        (cut > 0.9, f"{cut:.0%} of the answers were cut; raise --max-new-tokens"),
        (flat > 0.9, f"{flat:.0%} of the groups have equal rewards, which teach nothing; give other problems, or a "
                     "higher --temperature"),
        (length < first / 4, f"answers have {length:.0f} tokens, at first {first:.0f}; check what is rewarded"),
        (kl > 1, f"the policy is {kl:.1f} nats a token from the starting model; lower --lr or raise --beta"),
        (was > max(0, 2 * right), f"held-out greedy fell from {was:.2f} to {right:.2f}: the form may be all that is "
                                  "learned; give rewards for it less weight")) if shown]


def show_change(lines: list[dict]):
    """Prints the metrics on held-out problems before and after training, from a run's log."""
    found = [line for line in lines if "valid_sample" in line]
    before, after = found[0], found[-1]
    print(f"\n{'held-out problems':<22}{'before':>10}{'after':>10}")
    for key in (key for key in before if key not in ("step", "valid_sample")):
        cells = ["-" if value is None else f"{value:.3f}" for value in (before[key], after[key])]
        print(f"{key.removeprefix('valid_').removeprefix('reward/'):<22}{cells[0]:>10}{cells[1]:>10}")
    print(f"before {before['valid_sample']!r}\nafter  {after['valid_sample']!r}")


# ---- the toy: a student that GRPO can start from

def toy_student(task: str, out: Path, seed: int, resume: bool, device) -> Path:
    """A tokenizer and a small student, taught on `device` by supervised fine-tuning on answers of mixed quality."""
    if resume and read_log(out):                                # refuse now, not after the fine-tuning
        check_settings(out, {"task": task, "seed": seed})
    lock(out)
    folder = out / f"start-{task}-{seed}"
    if resume and (folder / "config.json").exists():
        return folder
    records = problems.toy_records(task, 8000, seed=1000 + seed)
    tokenizer = toy.make_tokenizer(folder, [f"{r['instruction']}\n{r['response']}" for r in records[:2000]])
    rows, _ = encode_examples([to_example(record, f"{task}:{i}") for i, record in enumerate(records)], tokenizer)
    student = Qwen2(toy.student_config(len(tokenizer))).init_weights(seed).to(device).train()
    steps, batch_size = TOY_LESSONS[task], 64
    optimizer = make_optimizer(student, 4e-3, in_place=True)
    with Progress("teaching the student", steps) as progress:
        for step in range(steps):
            batch = next_rows(rows, step, batch_size, seed)
            ids, mask = collate(batch, tokenizer.pad_id, device)                # [B, T]
            states, targets = scored_positions(student.hidden(ids), ids, mask)  # [N, D], [N]
            loss, _, _ = head_loss(states, student.head, targets, weight=1 / len(targets))
            loss.backward()
            apply_gradient(student, optimizer, learning_rate(step, steps, 4e-3, warmup=50), 1.0)
            progress.update(note=f"ce {float(loss.detach()):.3f}")
    tokenizer.save(folder)
    save_model(student, folder)
    return folder


def main():
    args = parse_args()
    out, started = Path(args.out).expanduser(), time.time()
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    anew = args.toy and not args.model                          # the student is the toy's too: all of it can be made again
    check = functools.partial(check_free, out, [out], resume=args.resume, toy=anew, own=["completions.jsonl", "curves.png"])
    check()
    files, eval_files = ([[str(file), sha256(file)] for file in data_files(paths or ())]     # first: it refuses a pipe
                         for paths in (args.data, args.eval_data))
    asked, tests = read_problems(**flags_of(read_problems, args))
    names, rewards, weights = choose_rewards(asked + tests, **flags_of(choose_rewards, args))
    if rewards.keys() & {"code", "code_partial"}:               # it may not work here: check before a student is taught
        print(f"sandbox: {sandbox.isolation()}")
        if all(problems.shows_its_tests(problem) for problem in asked + tests if problem.facts.get("tests")):
            print("note: the prompts show all tests, so a program that only prints the expected outputs is rewarded too; "
                  "open-r1/codeforces has hidden tests")
    if anew:
        spare_threads(toy.student_config(1))
        args.model = str(toy_student(args.task, out, args.seed, args.resume, device))
    spare_threads(load_config(model_folder(args.model, weights=False)))
    tokenizer = Tokenizer.load(args.model)
    check_student(args.model, tokenizer)
    rows = problems.encode_problems(asked, tokenizer, args.max_prompt_length)
    valid_rows = problems.encode_problems(tests, tokenizer, args.max_prompt_length, "held-out problems")
    dropped = len(asked) + len(tests) - len(rows) - len(valid_rows)
    print(f"{len(rows):,} problems, {len(valid_rows)} held out; {dropped} dropped: prompt too long")
    begun = Checkpoint(args.model)
    settings = flags_of(train, args, but=("model", "out", "dtype"))
    recorded = settings | {"toy": anew, "model": str(begun), "data": files or None,
                           "eval_data": eval_files or None, "task": args.task,
                           "rewards": names, "reward_weights": weights,
                           "reward_files": {path: sha256(path) for path in reward_files(names)},
                           "dtype": str(dtype), "limit": args.limit, "format": args.format,
                           "plain_prompts": args.plain_prompts or None, "max_prompt_length": args.max_prompt_length,
                           "eval_examples": args.eval_examples,
                           "rows": fingerprint(row.digest for row in rows + valid_rows)}
    lock(out)
    check()                                                     # another process may have run here meanwhile
    if begin_run(out, recorded, args.resume):
        model = begun.load(device)
        reference = begun.load(device, dtype).requires_grad_(False) if args.beta else None
        reward, test_reward = (functools.partial(compute_rewards, tokenizer=tokenizer, rewards=rewards, weights=weights,
                                                 facts=[problem.known for problem in part]) for part in (asked, tests))
        judge = functools.partial(accuracy, tokenizer=tokenizer, rows=valid_rows, reward=test_reward, seed=args.seed,
                                  max_new_tokens=args.max_new_tokens, at_once=args.prompts * args.group_size)
        train(model=model, reference=reference, tokenizer=tokenizer, rows=rows, reward=reward, judge=judge, out=out,
              dtype=dtype, **settings)
    show_change(read_log(out))
    picture = plot_rewards(out, out / "curves.png")
    print(f"\n{f'curves in {picture}; ' if picture else ''}{out}/last is the model; {time.time() - started:.0f} s")


if __name__ == "__main__":
    with script_errors():
        main()
