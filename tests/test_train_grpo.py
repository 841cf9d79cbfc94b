"""train_grpo.py as it is used: a tiny model, sums, the real sandbox, and every way to call it."""
import errno
import itertools
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_grpo as rl
from conftest import files_in, killed_at, passed, refused, same, steps_of, tiny, weights, write_records
from fake_gpu import gpu
from minikd import problems
from minikd.checkpoint import load_model, save_model
from minikd.data import Encoded
from minikd.errors import InputError
from minikd.run import STATE, read_log
from test_problems import RECORD

GOLDEN = Path(__file__).parent / "golden"
FAST = ("--steps 4 --prompts 2 --group-size 4 --max-new-tokens 6 --batch-size 3 --eval-every 2 --eval-examples 3 "
        "--lr 0.01 --device cpu --dtype float32").split()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """model/, sums.jsonl of questions with answers, and ours.py, which pays for low ids: something to learn."""
    folder = tmp_path_factory.mktemp("world")
    tiny(1, tokenizer, folder / "model", vocab_size=416, initializer_range=0.2)
    write_records(folder / "sums.jsonl", *({"question": f"{i}+1", "answer": str(i + 1)} for i in range(20)))
    (folder / "ours.py").write_text("def early(completions, problems):\n"
                                    "    return [sum(c < 'N' for c in text) / max(1, len(text)) for text in completions]\n"
                                    "def nothing(completions, problems):\n    return [0.0] * len(completions)\n"
                                    "def unsure(completions, problems):\n    return [None] * len(completions)\n")
    return folder


def programs(path: Path, *said: str, **more) -> Path:
    """A file of problems in the fields of codeforces-cots, one with each of these statements."""
    return write_records(path, *(RECORD | {"description": text} | more for text in said))


TWICE = [f"Twice, {i}." for i in range(6)]


@pytest.fixture
def run(world, shell, tmp_path):
    """run(*flags) -> (exit status, stdout, stderr), as a shell would see them; --out is tmp_path/run unless given."""
    def call(*flags, rewards="{world}/ours.py:early", model=("--model", world / "model"),
             data=("--data", world / "sums.jsonl"), out=tmp_path / "run"):
        return shell(rl, *model, *data, "--out", out, *FAST, "--rewards", rewards.format(world=world), *flags)
    return call


# ---- one run

def test_a_run_leaves_a_model_a_log_and_every_completion(run, world, tmp_path):
    out = passed(run("--rewards", f"{world}/ours.py:early,format,answer", "--reward-weights", "1,0.5,0.5"))
    folder = tmp_path / "run"
    assert load_model(folder / "last").config == load_model(world / "model").config
    lines = steps_of(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and not (folder / STATE).exists()
    assert {"reward/early", "reward/early/std", "reward/format/unjudged", "reward/format/flat", "flat", "kl", "entropy", "clipped",
            "length", "truncated", "grad_norm"} <= set(lines[0])
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and lines[-1]["kl"] > 0 and lines[0]["clipped"] == 0
    assert 0 < lines[0]["entropy"] <= torch.tensor(416.0).log().item()
    said = read_log(folder, "completions.jsonl")
    assert len(said) == 4 * 8 and {"prompt", "completion", "reward", "advantage", "rewards"} <= set(said[0])
    assert all((row["format_fault"] is None) == (row["rewards"]["format"] == 1) for row in said)
    for step in range(4):                                                       # each group's advantages add up to 0
        for group in 0, 4:
            rows = said[8 * step + group:8 * step + group + 4]
            assert len({row["prompt"] for row in rows}) == 1
            assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-4)
            assert rows[0]["reward"] == pytest.approx(sum(share * rows[0]["rewards"][name] for name, share in (
                ("early", 1), ("format", 0.5), ("answer", 0.5))))
    assert "held-out problems" in out and "greedy" in out and "sampled" in out


def test_what_is_paid_for_comes_more_often(run, tmp_path):
    assert run("--steps", "30", "--beta", "0", "--eval-every", "30", "--prompts", "4", "--group-size", "8")[0] == 0
    lines = steps_of(tmp_path / "run")
    assert all(line["kl"] is None for line in lines)                            # no reference, no KL
    early, late = (sum(line["reward"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert late > early + 0.15


class NoText:
    """A tokenizer of 200 ids, for a model with more rows, and of no text."""
    pad_id, eos_ids, decode = 0, {0}, str

    def __len__(self):
        return 200

    def save(self, folder):
        pass


@pytest.mark.parametrize("name, options", [
    ("grpo", dict(beta=0.1, inner_epochs=2)),
    ("dapo", dict(clip_high=0.28, beta=0.0, norm="token", mask_truncated=True, drop_flat=True, inner_epochs=2)),
    ("dr-grpo", dict(beta=0.04, scale="none", norm="constant", temperature=0.7)),
    ("gspo", dict(ratio="sequence", clip=0.1, beta=0.02, inner_epochs=2))])
def test_three_steps_are_those_of_transformers_on_full_logits(tmp_path, monkeypatch, name, options):
    """Advantages, weights, clips, KL, gradients, AdamW: tests/make_golden.py computes them without minikd, answer by answer."""
    golden, folder = load_file(GOLDEN / "training" / f"{name}.safetensors"), GOLDEN / "gqa7-tied"
    sampled = zip(*(golden[key] for key in ("ids", "prompt_lengths", "lengths", "cut", "old")))
    paid = iter(golden["rewards"].tolist())

    def sample_groups(*_, **__):
        answers = [(Encoded(ids[:start].tolist(), ids[start:end].tolist(), bool(cut), 0), old[start - 1:end - 1])
                   for ids, start, end, cut, old in zip(*next(sampled))]
        return tuple(map(list, zip(*answers)))

    monkeypatch.setattr(rl.grpo, "sample_groups", sample_groups)
    rewards = {"paid": lambda *_: [None if math.isnan(value) else value for value in next(paid)]}
    policy = load_model(folder)
    before = policy(golden["ids"][0]).detach()
    after = rl.train(model=policy, reference=load_model(folder) if options["beta"] else None, tokenizer=NoText(),
                     rows=[Encoded([1], [], False, 0)] * 2, judge=lambda _: {"sampled": 0.0, "sample": ""},
                     reward=lambda answers: rl.compute_rewards(answers, NoText(), [{}], rewards, {"paid": 1.0}),
                     out=tmp_path, prompts=2, group_size=3, max_new_tokens=8, steps=3, batch_size=2, lr=1e-4,
                     weight_decay=0.1, eval_every=3, **options)(golden["ids"][0]).detach()
    for row, length in enumerate(golden["lengths"][0]):
        torch.testing.assert_close(after[row, :length], golden["after"][row, :length], atol=2e-3, rtol=0)
    assert (after - before).std() > 0.05
    for line, *right in zip(steps_of(tmp_path), *(golden[key].tolist() for key in ("norm", "kl", "clipped")), strict=True):
        found = [line["grad_norm"], line["kl"] if options["beta"] else right[1], line["clipped"]]
        assert found == pytest.approx(right, rel=1e-2, abs=1e-5)


def test_micro_batches_change_nothing(run, tmp_path):
    for size in 1, 8:
        assert run("--batch-size", size, "--inner-epochs", "2", out=tmp_path / str(size))[0] == 0
    one, eight = steps_of(tmp_path / "1"), steps_of(tmp_path / "8")
    for a, b in zip(one[:2], eight[:2], strict=True):                           # later samples may differ by a rounding
        assert a["reward"] == pytest.approx(b["reward"]) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_recomputes_and_changes_nothing_else(run, tmp_path, recomputed):
    assert run(out=tmp_path / "plain")[0] == 0 and not recomputed
    assert run("--gradient-checkpointing", out=tmp_path / "recomputed")[0] == 0 and recomputed
    one, other = (weights(tmp_path / name / "last") for name in ("plain", "recomputed"))
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-4)


def test_an_answers_ratio_is_1_until_the_first_update_in_bfloat16_too(run, tmp_path):
    """A bfloat16 sampler's log-probabilities differ from the trainer's by more than GSPO's clip."""
    for epochs, lr, clipped in (("1", "1e-3", False), ("3", "1e-3", True),
                                ("2", "1e-30", False), ("3", "1e-30", False)):                  # the last two: updates by nothing
        out = tmp_path / f"{epochs} {lr}"
        passed(run("--ratio", "sequence", "--clip", "1e-7", "--dtype", "bfloat16", "--inner-epochs", epochs, "--lr", lr, out=out))
        assert any(line["clipped"] > 0 for line in steps_of(out)) == clipped


def test_every_step_of_every_seed_draws_other_answers(run, tmp_path, monkeypatch, spy):
    seeds = spy(rl.grpo, "sample_groups", lambda *_, seed: seed)
    monkeypatch.setattr(rl, "accuracy", lambda *_, **__: {"sampled": 0.0, "sample": ""})
    assert run()[0] == 0 and run("--seed", 1, out=tmp_path / "other")[0] == 0
    assert len(set(seeds)) == len(seeds) == 8


def test_the_schedule_and_the_warm_up_reach_the_rate(run, spy):
    asked = spy(rl, "learning_rate", lambda *given: given)
    assert run("--steps", 2, "--schedule", "cosine", "--warmup", 1)[0] == 0
    assert asked == [(0, 2, 0.01, 1, "cosine"), (1, 2, 0.01, 1, "cosine")]


def test_the_longest_answers_are_learned_from_first():
    answers = [Encoded([1], [2] * length, False, 0) for length in (3, 9, 5, 7)]
    assert rl.longest_first(answers, [True, True, False, True], 2) == [[1, 3], [0]]


def test_a_steps_line_describes_its_answers():
    answers = [Encoded([1], [2] * n, n == 5, 0) for n in (3, 5, 1, 3)]
    rewards = torch.tensor([1.0, 0.0, math.nan, 0.5])
    line = rl.describe(answers, {"answer": [1.0, 0.0, None, 0.5]}, rewards, torch.tensor([True, False]),
                       torch.tensor([6.0, 12.0, 3.0, 12.0]), [1.0, 1.5, 1.75, 4.0])
    assert (line["length"], line["truncated"], line["reward"], line["flat"]) == (3, 0.25, 0.5, 0.5)
    assert (line["kl"], line["entropy"], line["clipped"]) == (0.5, 1, 0.25)
    assert line["seconds"] == {"sampling": 0.5, "rewards": 0.25, "update": 2.25}


def test_a_step_in_which_no_answer_counts_logs_no_entropy(run, world, tmp_path):
    passed(run("--drop-flat", "--steps", 2, rewards=f"{world}/ours.py:nothing"))
    assert all(line["entropy"] is None and line["kl"] is None and line["flat"] == 1 for line in steps_of(tmp_path / "run"))


# ---- problems and rewards

def test_a_codeforces_record_goes_through_prompt_rollout_sandbox_and_update(run, world, tmp_path, monkeypatch):
    """The dataset's own fields; a model this small writes no program, so one is put into its mouth."""
    data, count, decode = programs(tmp_path / "cots.jsonl", *TWICE), itertools.count(), rl.Tokenizer.decode
    right = "<think>\nStep 1: double it\n</think>\n```python\nprint(2 * int(input()))\n```"
    wrong = right.replace("2 *", "3 *")
    monkeypatch.setattr(rl.Tokenizer, "decode", lambda *given: [right, wrong, decode(*given)][next(count) % 3])
    out = passed(run("--max-prompt-length", "600", rewards="format,steps,code", data=("--data", data)))
    assert "sandbox: " in out and "note: the prompts show all tests" in out
    paid = [row["rewards"]["code"] for row in read_log(tmp_path / "run", "completions.jsonl")]
    assert set(paid) == {0.0, 1.0} and abs(sum(paid) / len(paid) - 1 / 3) < 0.15
    assert not same(weights(tmp_path / "run/last"), weights(world / "model"))


def test_by_default_what_the_problems_can_be_checked_by_is_rewarded(shell, world, tmp_path):
    def settings(data, out):
        status, _, err = shell(rl, "--model", world / "model", "--data", data, "--max-prompt-length", "600", *FAST,
                               "--steps", "1", "--out", tmp_path / out)
        return json.loads((tmp_path / out / "config.json").read_text())["settings"] if status == 0 else err

    found = settings(world / "sums.jsonl", "a")
    assert found["rewards"] == "answer,format,steps" and list(found["reward_weights"].values()) == [1, 0.05, 0.05]
    cots = programs(tmp_path / "cots.jsonl", *TWICE)
    assert settings(cots, "b")["reward_weights"] == {"code": 1, "format": 0.05, "steps": 0.05}
    with cots.open("a") as file:
        file.write((world / "sums.jsonl").read_text())
    assert list(settings(cots, "c")["reward_weights"].values()) == [1, 1, 0.05, 0.05]
    said = settings(programs(cots, *TWICE, generated_checker="x"), "d")
    assert "no record has an answer, or tests" in said and said.count("\n") == 1 and not (tmp_path / "d").exists()


def test_a_reward_of_ones_own_is_given_the_question_and_what_it_is_checked_by(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def f(completions, facts):\n"
        "    assert all(int(each['question'].split('+')[0]) + 1 == int(each['answer']) for each in facts)\n"
        "    return [1.0] * len(facts)\n")
    passed(run("--steps", 1, rewards=f"{tmp_path}/mine.py:f"))


def test_a_question_asked_twice_is_one_problem_and_what_is_held_out_is_not_trained_on(run, world, tmp_path):
    lines = (world / "sums.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "thrice.jsonl").write_text("".join(line for i in range(20) for line in (
        lines[i], lines[i], lines[i].replace('+1"', '+1  "'))))           # spacing makes no other question
    out = passed(run("--steps", "8", data=("--data", tmp_path / "thrice.jsonl")))
    assert "40 records left out: they repeat an earlier question" in out and "17 problems, 3 held out" in out
    assert len({row["prompt"] for row in read_log(tmp_path / "run", "completions.jsonl")}) == 8 * 2     # 2 a step, no repeats


def test_one_problem_is_too_few_and_those_left_out_are_counted(run, tmp_path):
    again = {"question": "1 + 1?", "answer": "2"}
    data = write_records(tmp_path / "d.jsonl", again, {"question": "Why?", "solution": "Well,\nso."}, again)
    refused(run(data=("--data", data)), f"error: {data}: different questions with tests, or an answer that others can be "
                                        "compared with: 1 of 3 records; give 2 or more, as one is held out\n")


def test_what_no_chosen_reward_can_judge_is_left_out_unless_one_of_ones_own_might(run, world, tmp_path):
    """Of 8 problems 3 accept any of several outputs; their answers would be paid for form alone."""
    said = [f"Twice, {i}.{' Print any of them.' * (i % 3 == 0)}" for i in range(8)]
    data = programs(tmp_path / "cots.jsonl", *said)
    flags = "--max-prompt-length", "600", "--steps", "1"
    out = passed(run(*flags, rewards="format,code", data=("--data", data)))
    assert "3 problems left out: no reward tells a right answer" in out and "4 problems, 1 held out" in out
    assert not any("any of them" in row["prompt"] for row in read_log(tmp_path / "run", "completions.jsonl"))
    for name, rewards in ("form", "format,length"), ("own", "{world}/ours.py:early,code"):
        out = passed(run(*flags, rewards=rewards, data=("--data", data), out=tmp_path / name))
        assert "left out" not in out and "7 problems, 1 held out" in out


def test_the_format_may_be_given(run, tmp_path):
    data = write_records(tmp_path / "both.jsonl", *(RECORD | {"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(6)))
    assert "5 problems, 1 held out" in passed(run("--format", "question", "--steps", 1, data=("--data", data)))
    assert all("?" in row["prompt"] for row in read_log(tmp_path / "run", "completions.jsonl"))


def test_thoughts_that_the_prompt_begins_are_rewarded(tokenizer):
    row = lambda prompt: Encoded(tokenizer.encode(prompt), tokenizer.encode("Step 1: 2\n</think>\n4"), False, 0)
    thought = "<think>\nStep 1: 2\n</think>\n4"
    assert rl.text_of(tokenizer, row("<|im_start|>assistant\n<think>\n")) == thought
    assert rl.text_of(tokenizer, row("<|im_start|>assistant\n")) == thought.removeprefix("<think>\n")


def test_when_nothing_is_ever_paid_it_stops_and_says_so(run, tmp_path):
    for more in [], ["--resume"]:                                               # which goes on counting at 2
        refused(run("--patience", "3", "--eval-every", "2", *more, rewards="{world}/ours.py:nothing"),
                "every answer's rewards summed to 0 for 3 steps")
        assert len(steps_of(tmp_path / "run")) == 3


def test_what_nobody_can_judge_moves_nothing(run, world, tmp_path):
    assert run("--beta", "0", rewards="{world}/ours.py:unsure")[0] == 0
    assert same(weights(tmp_path / "run/last"), weights(world / "model"))
    assert all(line["reward"] is None and line["flat"] == 1 for line in steps_of(tmp_path / "run"))
    refused(run("--patience", "2", rewards="{world}/ours.py:unsure", out=tmp_path / "other"),
            "no answer could be judged (all rewards None or NaN) for 2 steps")


# ---- evaluation, and its notes

def test_each_held_out_answer_is_judged_by_the_check_that_it_has(tokenizer, world):
    """`answer` for a question, `code` for a program: neither alone is the accuracy of both."""
    verdicts = {"answer": [1.0, None, None, 0.0], "code": [None, 1.0, None, None]}
    rows = [Encoded([5, 6, 7], [], False, i) for i in range(4)]
    found = rl.accuracy(load_model(world / "model"), tokenizer, rows, lambda _: (
        [""] * 4, {**verdicts, "form": [0.0] * 4}, torch.zeros(4)), max_new_tokens=2, at_once=4, seed=0)
    assert found["greedy"] == found["sampled"] == pytest.approx(2 / 3)          # one answer could not be judged


def test_without_a_check_the_mean_weighted_sum_of_the_rewards_stands_in_for_accuracy(tokenizer, monkeypatch):
    monkeypatch.setattr(rl.grpo, "sample_groups", lambda model, part, *_, **__: (part, None))
    rows, rewards = [Encoded([5], [6], False, i) for i in range(3)], {"a": lambda *_: [1.0, 0.0, None],
                                                                      "b": lambda *_: [0.5, None, None]}
    reward = lambda answers: rl.compute_rewards(answers, tokenizer, [{}] * 3, rewards, {"a": 1.0, "b": 3.0})
    found = rl.accuracy(None, tokenizer, rows, reward, 4, 3, 0)
    assert found["greedy"] == found["sampled"] == (2.5 + 0) / 2 and found["reward/a"] == found["reward/b"] == 0.5


def test_evaluation_samples_no_more_at_once_than_a_step(run, spy):
    rows = spy(rl.grpo, "sample_groups", lambda model, part, size, *_, seed: len(part) * size)
    assert run("--eval-examples", "4", "--prompts", "1", "--group-size", "3", "--steps", "1", "--eval-every", "1")[0] == 0
    assert sorted(rows) == [1] * 4 + [3] * 5                                    # greedy and sampled, before and after; one step


def test_every_batch_of_an_evaluation_is_sampled_with_another_seed(tokenizer, monkeypatch):
    seeds = []
    monkeypatch.setattr(rl.grpo, "sample_groups", lambda model, part, *_, seed: (seeds.append(seed), (part, None))[1])
    rows = [Encoded([5], [6], False, 0)] * 3
    rewards = {"a": lambda texts, _: [1.0] * len(texts)}
    reward = lambda answers: rl.compute_rewards(answers, tokenizer, [{}], rewards, {"a": 1.0})
    rl.accuracy(None, tokenizer, rows, reward, 4, 1, seed=7)
    assert len(set(seeds[:3])) == 3


def test_what_is_judged_in_bfloat16_is_the_model_that_is_saved(run, tmp_path, monkeypatch):
    heads = []
    monkeypatch.setattr(rl, "accuracy", lambda model, **_: (
        heads.append(model.head.float().clone()), {"sampled": 0.0, "sample": ""})[1])
    assert run("--dtype", "bfloat16", "--steps", 2)[0] == 0
    assert torch.equal(heads[-1], load_model(tmp_path / "run/last").head) and not torch.equal(heads[0], heads[-1])


def test_answers_that_are_cut_are_noted(run):
    """The model's rarely end by themselves."""
    assert "of the answers were cut; raise --max-new-tokens" in run("--max-new-tokens", "1")[1]


def test_a_run_that_collapses_is_noted():
    step = {"length": 40.0, "truncated": 0.1, "flat": 0.5, "kl": None, "entropy": 0.1}
    tests = [{"valid_sample": "", "valid_greedy": greedy} for greedy in (0.8, None)]
    told = lambda greedy, **now: rl.signs_of_collapse(
        [tests[0], step, tests[1], *[step | now] * 10, tests[1] | {"valid_greedy": greedy}])
    assert told(0.4, length=10.0, truncated=0.9, flat=0.9, kl=1.0) == []        # at the bounds
    for word, signs in (("cut", told(0.8, truncated=0.95)), ("--temperature", told(0.8, flat=0.95)),
                        ("have 9 tokens, at first 40", told(0.8, length=9.0)), ("1.5 nats a token", told(0.8, kl=1.5)),
                        ("fell from 0.80 to 0.39", told(0.39))):
        assert len(signs) == 1 and word in signs[0]
    assert len(told(0.0, length=9.0, truncated=1.0, flat=1.0, kl=2.0)) == 5


def test_a_log_that_lost_its_start_still_ends_in_a_table(capsys):
    """As after --resume where the power's failure had left a state but no log."""
    rl.show_change([{"step": 3, "kl": 0.1}, {"step": 4, "valid_answer": 0.5, "valid_sample": "2"}, {"step": 4, "done": True}])
    assert "answer                     0.500     0.500" in capsys.readouterr().out


# ---- stopping and going on

VARIANTS = [["--inner-epochs", "2", "--mask-truncated"], ["--norm", "constant", "--scale", "none", "--beta", "0"],
            ["--norm", "token", "--clip-high", "0.28", "--drop-flat"],
            ["--ratio", "sequence", "--inner-epochs", "2", "--gradient-checkpointing"], ["--temperature", "0.7"]]


@pytest.mark.parametrize("flags", VARIANTS, ids=" ".join)
def test_every_variant_goes_on_from_its_last_state_to_the_same_bits(run, tmp_path, monkeypatch, flags):
    flags = [*flags, "--eval-every", "4"]
    monkeypatch.setattr(rl, "SAVE_EVERY", 0)                                    # seconds
    assert run(*flags, out=tmp_path / "whole")[0] == 0
    for step, resume in (2, []), (4, ["--resume"]):                             # the second state is that of a resumed run
        with killed_at(step):
            assert run(*flags, *resume, out=tmp_path / "killed")[0] == 130
    passed(run(*flags, "--resume", out=tmp_path / "killed"))
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole") and len(steps_of(tmp_path / "whole")) == 4
    assert read_log(tmp_path / "killed", "completions.jsonl") == read_log(tmp_path / "whole", "completions.jsonl")
    assert same(weights(tmp_path / "killed/last"), weights(tmp_path / "whole/last"))


def test_a_step_is_saved_before_a_line_about_it_is_printed(run, tmp_path, monkeypatch):
    """Its reader may have gone."""
    say = rl.Progress.say

    def gone(self, text):
        if text.startswith("step 2"):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        say(self, text)

    for steps, left in (4, "state.safetensors"), (2, "last"):
        monkeypatch.setattr(rl.Progress, "say", gone)
        refused(run("--steps", steps, "--eval-every", "2", out=tmp_path / left), "Broken pipe; the program that read it has")
        assert (tmp_path / left / left).exists() and (tmp_path / left / "last").exists()
        monkeypatch.setattr(rl.Progress, "say", say)
        assert run("--steps", steps, "--eval-every", "2", "--resume", out=tmp_path / left)[0] == 0
        assert [line["step"] for line in steps_of(tmp_path / left)] == list(range(1, steps + 1))


def test_a_run_is_neither_overwritten_nor_resumed_with_other_flags(run, world):
    assert run("--steps", "2")[0] == 0
    refused(run("--steps", "2"), "already holds a run of 2 steps")
    refused(run("--steps", "2", "--clip", "0.3", "--resume"), "--clip 0.3, but the run began with 0.2")
    refused(run("--steps", "2", "--eval-examples", "2", "--resume"), "--eval-examples 2, but the run began with 3")
    out = passed(run("--steps", "2", "--resume", model=("--model", f"{world / 'model'}/")))        # the same folder
    assert "done already" in out and "held-out problems" in out                     # if it was killed before it could say so


def test_a_toy_run_does_not_replace_a_real_one(run, shell, world, tmp_path):
    """--data forgotten."""
    assert run("--steps", "1")[0] == 0
    files = files_in(tmp_path / "run")
    for more, said in ([], "holds a run of 1 steps"), (["--resume"], "the run began with"), (["--limit", "9"], "without --data"):
        refused(shell(rl, "--model", world / "model", "--steps", "1", "--out", tmp_path / "run", *more), said)
    assert files_in(tmp_path / "run") == files


def test_a_model_of_ones_own_taught_the_toys_task_is_not_replaced(shell, world, tmp_path):
    flags = "--task", "sums", "--steps", 1, "--prompts", 2, "--group-size", 2, "--eval-examples", 2, "--out", tmp_path / "sums"
    assert shell(rl, "--model", world / "model", *flags)[0] == 0
    refused(shell(rl, "--model", world / "model", *flags), "already holds a run of 1 steps; continue it with --resume")
    assert shell(rl, "--model", world / "model", *flags, "--resume")[0] == 0    # done already


def test_a_run_goes_on_with_a_reward_whose_bug_was_mended_and_says_so(run, tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions, problems):\n    return [0.5] * len(completions)\n")
    flags = "--steps", "2", "--eval-every", "1"
    assert run(*flags, rewards=f"{tmp_path}/mine.py:f")[0] == 0
    assert all(line["flat"] == 1 and line["grad_norm"] < 1e-6 for line in steps_of(tmp_path / "run"))
    (tmp_path / "mine.py").write_text("def f(completions, problems):\n    return [0.7] * len(completions)\n")
    status, _, err = run(*flags, "--resume", rewards=f"{tmp_path}/mine.py:f")
    assert status == 0 and "a file of --rewards has changed" in err and err.count("\n") == 1


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_ends_if_its_model_was_replaced_since_it_began(run, world, tmp_path, monkeypatch, resume):
    """Between two processes, or before it is loaded: its reference would be another."""
    shutil.copytree(world / "model", tmp_path / "start")
    spoil = lambda: save_model(load_model(tmp_path / "start").init_weights(9), tmp_path / "start")
    go = lambda *more: run("--steps", "1", *more, model=("--model", tmp_path / "start"))
    if resume:
        assert go()[0] == 0
        spoil()
        refused(go("--resume"), "the content of --model", "start has changed since the run began; put it back")
    else:
        begin = rl.begin_run
        monkeypatch.setattr(rl, "begin_run", lambda *given: begin(*given) and not spoil())
        refused(go(), "start: has changed since this run began")
        assert not (tmp_path / "run/last").exists()


# ---- what the user can fix

@pytest.mark.parametrize("flags, said", [
    (["--group-size", "1"], "--group-size 1: an answer is judged against its group"),
    (["--rewards", "nice"], "no reward 'nice'"), (["--reward-weights", "1,2"], "2 weights for 1 rewards"),
    (["--reward-weights", "much"], "is not a list of numbers"), (["--reward-weights", "nan"], "a number from -10^9 to 10^9"),
    (["--reward-weights", "0"], "--reward-weights 0: are all 0"),
    (["--rewards", "format,answer", "--reward-weights", "1,2e9"], "a number from -10^9 to 10^9"),
    (["--beta", "nan"], "--beta nan"), (["--limit", "1"], "1 of 1 records; give 2 or more"),
    (["--rewards", "format,code"], "`code` can judge none of the 20 problems, which have no tests to compare with"),
    (["--rewards", "code_partial"], "`code_partial` can judge none of the 20 problems"),
    (["--data", "no/such.jsonl"], "no/such.jsonl: no such file"), (["--max-prompt-length", "2"], "raise --max-prompt-length"),
    (["--lr", "1e12"], "training diverged (lower --lr)"), (["--model", "no/such/model"], "no/such/model: no such folder")])
def test_bad_input_is_one_line(run, flags, said):
    refused(run(*flags), said)


def test_data_without_a_model_is_refused(run):
    refused(run(model=()), "error: --data without --model; add --model FOLDER\n")


@pytest.mark.parametrize("norms, said", [
    ([math.nan], "step 1: the gradient is not finite; take another model, or raise --temperature if the loss uses it\n"),
    ([1.0, math.inf], "step 1: the gradient is not finite; lower --lr (now 0.5)\n"),
    ([1.0, 1.0, math.nan], "step 2: the gradient is not finite; lower --lr (now 0.5)\n")])
def test_the_rate_is_to_blame_from_the_first_update_on(run, monkeypatch, norms, said):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: norms.pop(0))
    refused(run("--inner-epochs", "2", "--lr", "0.5", "--max-new-tokens", "3"), said)
    assert not norms


def test_where_no_program_can_be_confined_a_code_task_is_refused_before_its_student_is_taught(shell, monkeypatch, tmp_path):
    def refuse():
        raise InputError("sandbox: programs cannot be confined on darwin; run them on Linux")

    monkeypatch.setattr(rl.sandbox, "isolation", refuse)
    refused(shell(rl, "--task", "code", "--out", tmp_path / "run"), "cannot be confined")
    assert not (tmp_path / "run").exists()


# ---- the toy

@pytest.mark.parametrize("task", ["sums", "code"])
def test_with_no_flags_a_toy_student_is_taught_and_goes_through_a_step(monkeypatch, spy, tmp_path, capsys, task):
    records, steps = problems.toy_records, spy(rl, "learning_rate", lambda step, *_, **named: step)
    monkeypatch.setattr(problems, "toy_records", lambda task, count, **named: records(task, 300, **named))
    monkeypatch.setattr(rl, "TOY_LESSONS", {"sums": 3, "code": 3})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--task", task, "--steps", "2", "--eval-examples", "5", "--prompts",
                                      "2", "--group-size", "2", "--max-new-tokens", "5"])
    rl.main()
    assert steps == [0, 1, 2, 0, 1]                                             # three lessons, two steps
    out = capsys.readouterr().out
    assert "step 0: held-out greedy" in out and "held-out problems" in out
    assert out.count("note: fewer than 25% of the sampled answers are right") == 1 and "show all tests" not in out
    assert {f"start-{task}-0", "last", "log.jsonl", "completions.jsonl", "config.json"} <= {
        path.name for path in (tmp_path / f"runs/grpo-{task}").iterdir()}


@pytest.mark.slow
def test_on_a_gpu_the_toy_student_is_taught_there(shell, monkeypatch, spy, tmp_path):
    devices = spy(rl, "make_optimizer", lambda model, *_, **options: model.head.device.type)
    monkeypatch.setattr(rl, "TOY_LESSONS", {"sums": 3})
    with gpu():
        passed(shell(rl, "--device", "cuda", "--steps", 1, "--eval-examples", 2, "--prompts", 2, "--group-size", 2,
                     "--max-new-tokens", 5, "--out", tmp_path / "run"))
    assert devices == ["cuda", "cuda"]


def test_a_toy_that_is_resumed_keeps_its_student_and_its_seed(shell, monkeypatch, tmp_path):
    monkeypatch.setattr(rl, "TOY_LESSONS", {"sums": 3})
    flags = "--steps 1 --prompts 2 --group-size 2 --max-new-tokens 2 --eval-examples 2 --out".split() + [tmp_path / "toy"]
    assert shell(rl, *flags)[0] == 0
    monkeypatch.setattr(rl, "TOY_LESSONS", {})                                  # no second lesson
    assert "done already" in passed(shell(rl, *flags, "--resume"))
    refused(shell(rl, *flags, "--resume", "--seed", 1), "--resume with --seed 1, but the run began with 0")
    assert not (tmp_path / "toy/start-sums-1").exists()


def test_a_model_that_is_given_to_a_toy_task_decides_about_threads(shell, world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(rl, "spare_threads", lambda config: asked.append(config.hidden_size))
    passed(shell(rl, "--model", world / "model", "--steps", 1, "--prompts", 2, "--group-size", 2, "--max-new-tokens", 2,
                 "--eval-examples", 2, "--out", tmp_path / "run"))
    assert asked == [load_model(world / "model").config.hidden_size]


@pytest.mark.parametrize("task", ["sums", "code"])
def test_no_toy_problem_is_both_trained_on_and_held_out(task):
    asked, held = ({problem.messages[-1]["content"] for problem in part} for part in rl.read_problems(
        data=None, eval_data=None, limit=None, format=None, plain_prompts=False, task=task, rewards=None, eval_examples=50,
        seed=0))
    assert len(held) == 50 and not asked & held


def test_with_plain_prompts_the_records_are_asked_as_they_are_each_question_once(tmp_path):
    data = write_records(tmp_path / "data.jsonl", *({"question": f"{i} + 1?", "answer": str(i + 1), "system": system}
                                                    for i in range(10) for system in ("Be brief.", "Be kind.")))
    common = dict(data=[str(data)], eval_data=None, limit=None, format=None, task=None, rewards=None, eval_examples=2, seed=0)
    asked, held = rl.read_problems(plain_prompts=True, **common)
    assert {problem.messages[-1]["content"] for problem in asked + held} == {f"{i} + 1?" for i in range(10)}
    assert len(asked) + len(held) == 10 and {problem.messages[0]["content"] for problem in asked} == {"Be brief."}
    assert all("<answer>" in problem.messages[-1]["content"] for problem in rl.read_problems(plain_prompts=False, **common)[0])


def test_a_file_of_its_own_judges_the_model_in_the_place_of_held_out_problems(run, world, tmp_path):
    tests = write_records(tmp_path / "tests.jsonl", {"question": "3+1", "answer": "4"},
                          *({"question": f"{i}+2", "answer": str(i + 2)} for i in range(9)))
    flags = "--eval-data", tests, "--eval-examples", 5
    said = passed(run(*flags))
    assert "20 problems, 5 held out" in said and "note: 1 of 5 problems of --eval-data are also trained on" in said
    asked = {line["prompt"] for line in read_log(tmp_path / "run", "completions.jsonl")}
    assert not any("+2" in prompt for prompt in asked)
    tests.write_text(tests.read_text().replace('"6"', '"7"'))                   # the same question, another answer
    refused(run(*flags, "--resume"), "--resume, but the content of --eval-data", "has changed")
    refused(run("--resume"), "--resume with --eval-data None")
    one = write_records(tmp_path / "one.jsonl", {"question": "9+9", "answer": "18"})
    assert "1 problems, 5 held out" in passed(run(*flags, data=("--data", one), out=tmp_path / "one"))
    refused(run("--eval-data", write_records(tmp_path / "none.jsonl", {"question": "Why?", "answer": ""}),
                out=tmp_path / "none"), "none.jsonl", "0 of 1 records; give 1 or more\n")
    assert "ignored without --data: --eval-data" in run(*flags, data=(), out=tmp_path / "toy")[2]
