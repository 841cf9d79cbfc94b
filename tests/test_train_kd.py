"""train_kd.py as it is used: a tiny student, a tiny teacher, two dozen records, and every way to call it."""
import errno
import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import eval_rouge
import train_kd as kd
from conftest import (DOLLY, change_json, files_in, killed_at, locked_by_another, passed, records_in, refused, same, steps_of, tiny,
                      weights, write_records)
from fake_gpu import gpu
from minikd import evaluate, head, minillm, toy
from minikd.checkpoint import Checkpoint, load_model, save_model
from minikd.data import Encoded, encode_examples
from minikd.evaluate import sequence_kl
from minikd.examples import load_examples
from minikd.losses import DIVERGENCES
from minikd.run import LOG, STATE, read_log, write_config
from minikd.teacher import Teacher

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
NO_TEXT = SimpleNamespace(pad_id=0, eos_ids={0}, decode=str, save=lambda folder: None)          # golden models have ids alone
FAST = "--lr 0.01 --max-new-tokens 4 --eval-examples 2 --device cpu --dtype float32".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """student/, teacher/ with a taller head, and data.jsonl: 24 questions with answers of 1 to 8 words."""
    folder = tmp_path_factory.mktemp("world")
    tiny(1, tokenizer, folder / "student")
    tiny(2, tokenizer, folder / "teacher", vocab_size=416, hidden_size=24, num_hidden_layers=2, initializer_range=0.5)
    records = [{"instruction": f"What is {i} + {i}?", "context": "", "category": "sum" if i % 2 else "echo",
                "response": " ".join(["It is", str(2 * i), "and", "no", "more", "than", "that"][:1 + i % 7])}
               for i in range(24)]
    write_records(folder / "data.jsonl", *records)
    return folder


@pytest.fixture
def run(world, shell, tmp_path):
    """run(*flags) -> (exit status, stdout, stderr), as a shell would see them; --out is tmp_path/run unless given."""
    def call(*flags, models=("--student", world / "student", "--teacher", world / "teacher"),
             data=("--data", world / "data.jsonl"), out=tmp_path / "run"):
        return shell(kd, *models, *data, "--out", out, *FAST, *flags)
    return call


@pytest.fixture
def settings(world, tokenizer, tmp_path):
    """What train() takes, on 20 rows of the data; each call for a fresh student."""
    examples, _ = load_examples(world / "data.jsonl")
    rows, _ = encode_examples(examples, tokenizer)
    return lambda **changed: dict(
        student=load_model(world / "student"), teacher=Teacher(load_model(world / "teacher").requires_grad_(False)),
        tokenizer=tokenizer, rows=rows[:20], valid_rows=rows[20:], valid_examples=examples, out=tmp_path / "run",
        loss="forward_kl", steps=1, batch_size=8, lr=0.01, eval_every=1000, eval_examples=2, max_new_tokens=2,
        rouge="plain") | changed


@pytest.fixture
def learned(spy) -> list:
    """(rows, the loss's terms) of every micro-batch that is learned from."""
    return spy(kd, "forward_backward", lambda batch, **terms: (batch, terms))


def spoil(folder):
    save_model(load_model(folder).init_weights(9), folder)


# ---- one run

def test_one_run_leaves_checkpoints_a_log_its_settings_and_a_table(run, tmp_path, world):
    out, folder = passed(run("--loss", "reverse_kl", "--batch-size", 4, "--eval-every", 2)), tmp_path / "run"
    for name in "best", "last":
        assert load_model(folder / name).config == load_model(world / "student").config
        assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in (folder / name).iterdir()}
    assert not same(weights(folder / "last"), weights(world / "student"))
    lines = read_log(folder)
    assert [line["step"] for line in lines if "ce" in line] == [1, 2, 3, 4, 5]  # 20 rows for training, 4 a step
    assert [line["step"] for line in lines if "rouge_l" in line] == [2, 4, 5]   # and after the last
    assert lines[-1] == {"step": 5, "done": True} and not (folder / STATE).exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["loss"] == "reverse_kl" and config["settings"]["student"] == str(Checkpoint(world / "student"))
    table = records_in(folder / "table.jsonl")
    assert [row["model"] for row in table] == ["Base", "reverse_kl", "Teacher"]
    shown = {line.split()[0] for line in out.split("held-out prompts")[1].splitlines() if line.startswith(("sum", "echo"))}
    assert shown and set(table[0]) == {"model", "all", "metrics"} | shown


def test_sft_needs_no_teacher_and_logs_no_divergence(run, tmp_path, world):
    assert "Teacher" not in passed(run("--loss", "sft", "--steps", 2, models=("--student", world / "student")))
    assert not any("kd" in line or "own_answers" in line for line in steps_of(tmp_path / "run"))


def test_while_sft_trains_its_teacher_is_not_in_memory(run, tmp_path, world, loaded, spy):
    """It is loaded only for the table, so its files are checked before the training."""
    flags = "--loss", "sft", "--steps", 1
    spy(kd, "train", lambda **_: loaded.append("train"))
    assert "Teacher" in passed(run(*flags)) and loaded[:2] == ["student", "train"] and "teacher" in loaded[2:]
    assert json.loads((tmp_path / "run/config.json").read_text())["settings"]["teacher"] == str(Checkpoint(world / "teacher"))
    shutil.copytree(world / "teacher", tmp_path / "damaged")
    os.truncate(tmp_path / "damaged/model.safetensors", (world / "teacher/model.safetensors").stat().st_size - 1)
    loaded.clear()
    refused(run(*flags, models=("--student", world / "student", "--teacher", tmp_path / "damaged"), out=tmp_path / "new"),
            "damaged or truncated")
    assert not loaded


@torch.no_grad()
def slow_losses(student, teacher, rows) -> tuple[float, float, int]:
    """Paper eq. (3) and (4) as a loop over rows and tokens: cross-entropy and KL a token, and how many tokens."""
    ce, kl, count = 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([row.prompt + row.response])
        q, p = (model(ids)[0, :, :400].double().log_softmax(-1) for model in (student, teacher))
        for at in range(len(row.prompt), ids.shape[1]):
            ce -= float(q[at - 1, ids[0, at]])
            kl += float((p[at - 1].exp() * (p[at - 1] - q[at - 1])).sum())
            count += 1
    return ce / count, kl / count, count


def test_the_logged_loss_is_the_mean_over_all_scored_tokens_of_the_step(settings, tmp_path, world):
    given = settings(batch_size=3, grad_accum=7)                                # 20 rows: six of 3, one of 2
    ce, kl, count = slow_losses(load_model(world / "student"), given["teacher"].model, given["rows"])
    kd.train(**given)
    line = steps_of(tmp_path / "run")[0]
    assert (line["ce"], line["kd"], line["tokens"]) == (pytest.approx(ce, rel=1e-5), pytest.approx(kl, rel=1e-5), count)


def test_the_held_out_loss_is_the_same_mean_over_rows_the_student_never_sees(settings, tmp_path):
    given = settings(batch_size=3)                                              # 4 rows: one batch of 3, one of 1
    ce, kl, _ = slow_losses(kd.train(**given), given["teacher"].model, given["valid_rows"])
    [line] = [line for line in read_log(tmp_path / "run") if "rouge_l" in line]
    assert (line["valid_ce"], line["valid_kd"]) == (pytest.approx(ce, rel=1e-5), pytest.approx(kl, rel=1e-5))


@pytest.mark.parametrize("name, student, teacher, options", [
    ("sft", "gqa7-tied", None, dict(loss="sft")),
    ("forward", "gqa7-tied", "mha-head-dim", dict(loss="forward_kl", kd_ratio=0.3)),
    ("reverse", "gqa6-untied-sharded", "mha-head-dim", dict(loss="reverse_kl", kd_ratio=1.0))])
def test_six_steps_are_those_of_transformers_on_full_logits(settings, tmp_path, name, student, teacher, options):
    """Gradients, clipping, AdamW, decay, schedule and all: tests/make_golden.py computes them without minikd."""
    golden = load_file(GOLDEN / "training" / f"{name}.safetensors")
    rows = [Encoded(ids[:start].tolist(), ids[start:end].tolist(), False, 0)
            for ids, start, end in zip(golden["ids"], golden["prompt_lengths"], golden["lengths"])]
    given = settings(student=load_model(GOLDEN / student), tokenizer=NO_TEXT, rows=rows, valid_rows=rows[:2], steps=6, lr=4e-3,
                     batch_size=2, grad_accum=3, warmup=2, weight_decay=0.1, max_grad_norm=1.0,
                     teacher=Teacher(load_model(GOLDEN / teacher).requires_grad_(False)) if teacher else None, **options)
    before = given["student"](golden["ids"]).detach()
    after = kd.train(**given)(golden["ids"]).detach()
    for row, length in enumerate(golden["lengths"]):
        for logits, key in (before, "before"), (after, "after"):
            torch.testing.assert_close(logits[row, :length], golden[key][row, :length], atol=2e-2, rtol=0)
    assert (golden["after"] - golden["before"]).std() > 0.3 and golden["norm"].max() > 1.0
    for line, ce, kl, norm in zip(steps_of(tmp_path / "run"), golden["ce"], golden["kd"], golden["norm"], strict=True):
        assert (line["ce"], line.get("kd", 0), line["grad_norm"]) == pytest.approx((float(ce), float(kl), float(norm)), rel=1e-3)


def test_four_steps_of_minillm_are_those_of_transformers_on_full_logits(settings, tmp_path, monkeypatch):
    """Rewards, whitening, importance weights, clip, exact step, plain text: see tests/make_golden.py."""
    golden = load_file(GOLDEN / "training" / "minillm.safetensors")
    sets = iter([[Encoded(ids[:start].tolist(), ids[start:end].tolist(), True, 0) for ids, start, end in zip(*answers)]
                 for answers in zip(golden["ids"], golden["prompt_lengths"], golden["lengths"])])
    monkeypatch.setattr(kd.minillm, "respond", lambda *_, **__: next(sets))
    text = [Encoded(ids[:1].tolist(), ids[1:].tolist(), True, 0) for ids in golden["text"]]
    student = load_model(GOLDEN / "gqa7-tied")
    before = student(golden["ids"][0]).detach()
    after = kd.train(**settings(
        student=student, teacher=Teacher(load_model(GOLDEN / "mha-head-dim").requires_grad_(False)), tokenizer=NO_TEXT, rows=text,
        valid_rows=text[:2], loss="minillm", steps=4, rollouts=6, inner_epochs=2, lm_rows=text, lm_coef=0.5, lr=1e-4, warmup=0,
        schedule="constant", batch_size=2, grad_accum=3, weight_decay=0.1, max_grad_norm=1.0))(golden["ids"][0]).detach()
    for row, length in enumerate(golden["lengths"][0]):
        torch.testing.assert_close(after[row, :length], golden["after"][row, :length], atol=2e-3, rtol=0)
    assert (after - before).std() > 0.05
    for line, *right in zip(steps_of(tmp_path / "run"), *(golden[key].tolist() for key in ("ce", "kd", "norm")), strict=True):
        assert [line[key] for key in ("ce", "kd", "grad_norm")] == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("batch_size, grad_accum", [(1, 8), (2, 4), (4, 2)])
def test_eight_at_once_is_one_at_a_time_accumulated_to_eight(settings, tmp_path, batch_size, grad_accum):
    """Over two epochs of three steps, of which the third has 4 rows: the same rows, and each token weighs the same."""
    runs = {}
    for sizes in (8, 1), (batch_size, grad_accum):
        given = settings(out=tmp_path / str(sizes), batch_size=sizes[0], grad_accum=sizes[1], steps=6, lr=1e-3)
        runs[sizes] = kd.train(**given).state_dict(), steps_of(tmp_path / str(sizes))
    (one, log), (other, other_log) = runs.values()
    assert len(log) == len(other_log) == 6 and log[2]["tokens"] < log[1]["tokens"]
    for a, b in zip(log, other_log):
        assert a == pytest.approx(b, rel=1e-4)
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_distilling_brings_the_student_nearer_to_its_teacher_on_what_it_reads(settings, tmp_path, loss):
    kd.train(**settings(loss=loss, kd_ratio=1.0, steps=15, batch_size=20, weight_decay=0.0))
    distance = [line["kd"] for line in steps_of(tmp_path / "run")]
    assert distance[0] > 0 and distance[-1] < 0.9 * distance[0]


def test_kd_ratio_weighs_the_two_losses(settings, tmp_path):
    """At 0 the teacher changes nothing: the weights are SFT's. At 1 the targets change nothing; the log has their CE."""
    sft = kd.train(**settings(loss="sft", steps=2)).state_dict()
    assert same(sft, kd.train(**settings(kd_ratio=0.0, steps=2)).state_dict())
    assert not same(sft, kd.train(**settings(kd_ratio=0.5, steps=2)).state_dict())
    rows = settings()["rows"]
    others = [replace(row, response=[*row.response[:-1], 5]) for row in rows]       # a last token is a target and no input
    for ratio, equal in (0.5, False), (1.0, True):
        (one, log), (other, other_log) = (
            (kd.train(**settings(kd_ratio=ratio, steps=2, rows=given)).state_dict(), steps_of(tmp_path / "run"))
            for given in (rows, others))
        assert same(one, other) == equal
        assert log[0]["kd"] == other_log[0]["kd"] and log[0]["ce"] != other_log[0]["ce"]


def test_the_loss_options_reach_the_loss(settings, tmp_path):
    first = lambda **changed: (kd.train(**settings(**changed)), steps_of(tmp_path / "run")[0]["kd"])[1]
    assert first(loss="jsd", beta=0.5) != first(loss="jsd", beta=0.9)
    assert first(loss="skew_forward_kl", alpha=0.1) != first(loss="skew_forward_kl", alpha=0.5)
    assert first(temperature=1.0) > first(temperature=4.0) > 0
    assert first(temperature=1.0) == first(temperature=1.0, beta=0.9, alpha=0.5)    # that forward_kl does not take


@pytest.mark.slow
def test_compile_changes_time_and_nothing_else(settings, monkeypatch):
    """torch.compile's tracing, one graph for all blocks of a model, without its code generator (half a minute)."""
    graphs, compiler = {}, torch.compile                        # name of a compiled function -> its graphs

    def compile(f, **options):
        def backend(graph, _):
            graphs.setdefault(f.__name__, []).append(graph)
            return graph.forward
        return compiler(f, backend=backend, fullgraph=True, **options)

    plain = kd.train(**settings(steps=2)).state_dict()
    monkeypatch.setattr(head, "_compiled_costs", None)        # and afterwards again
    monkeypatch.setattr(torch, "compile", compile)
    again = kd.train(**settings(steps=2, compile=True, gradient_checkpointing=True)).state_dict()
    assert all(torch.equal(plain[key], value) for key, value in again.items())
    assert 2 <= len(graphs["run_blocks"]) <= 6                   # student and teacher, with gradients and without
    assert len(graphs["_costs"]) == 1                           # of the divergence, whatever the number of tokens
    queries = [node.args[0] for graph in graphs["run_blocks"] for node in graph.graph.nodes
               if node.target is torch.nn.functional.scaled_dot_product_attention]
    parts = [query.args[0] for query in queries]                # of a split
    assert parts and all(split.args[0].target == "contiguous" for split in parts)           # else torch's code generator keeps
                                                                # its strides, and fails at another length: see model.Attention


def test_gradient_checkpointing_recomputes_and_changes_nothing_else(settings, recomputed):
    plain = kd.train(**settings(steps=2)).state_dict()
    assert not recomputed
    again = kd.train(**settings(steps=2, gradient_checkpointing=True)).state_dict()
    assert recomputed
    for key in plain:
        torch.testing.assert_close(plain[key], again[key], atol=1e-6, rtol=1e-5)


def test_a_student_whose_head_is_taller_than_the_teachers_learns_the_shared_rows(settings, world, tokenizer, tmp_path):
    tall = tiny(3, tokenizer, tmp_path / "tall", vocab_size=432, tie_word_embeddings=False)
    before = weights(tall)["lm_head.weight"]
    student = kd.train(**settings(student=load_model(tall), steps=3, weight_decay=0.0))
    after = student.state_dict()["lm_head.weight"]
    assert torch.equal(before[416:], after[416:]) and not torch.equal(before[:416], after[:416])
    assert load_model(tmp_path / "run" / "last").config.vocab_size == 432


def test_best_is_the_checkpoint_of_the_highest_rouge_and_last_the_last(settings, tmp_path, monkeypatch):
    scores = iter([30.0, 50.0, 40.0, 45.0])
    monkeypatch.setattr(kd, "mean_by_category", lambda rows: {"all": {"rouge_l": next(scores)}})
    saved = {}
    monkeypatch.setattr(kd, "save_model", lambda model, folder, dtype: saved.setdefault(folder.name, []).append(
        model.head.detach().clone()))
    kd.train(**settings(steps=4, eval_every=1))
    assert len(saved["last"]) == 4 and len(saved["best"]) == 2
    assert torch.equal(saved["best"][1], saved["last"][1]) and not torch.equal(saved["best"][1], saved["last"][2])
    scores, saved["best"] = iter([50.0, 50.0]), []
    kd.train(**settings(steps=2, eval_every=1, out=tmp_path / "tie"))
    assert len(saved["best"]) == 1                              # of equal ones the first


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_is_saved_before_a_line_about_it_is_printed(settings, tmp_path, monkeypatch, every):
    """Its reader may have gone."""
    def gone(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(kd.Progress, "say", gone)
    with pytest.raises(BrokenPipeError):
        kd.train(**settings(steps=2, eval_every=every))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"last", "best"} <= left and (STATE in left) == (every == 1)
    assert any(line.get("done") for line in kd.read_log(tmp_path / "run")) == (every == 2)


def test_every_step_on_own_answers_draws_others(settings, spy):
    seeds = spy(kd, "respond", lambda *_, seed, **named: seed)
    kd.train(**settings(steps=3, on_policy=1.0, loss="reverse_kl"))
    assert len(set(seeds)) == len(seeds) == 3


# ---- several runs

def test_without_a_loss_sft_and_kd_read_the_same_batches_in_the_same_order(run, tmp_path, learned):
    out, folder = passed(run("--batch-size", 4, "--grad-accum", 2, "--epochs", 2)), tmp_path / "run"
    batches = [[row.index for row in batch] for batch, _ in learned]
    half = len(batches) // 2
    assert batches[:half] == batches[half:] and sorted(sum(batches[:half], [])) == sorted(2 * list(range(20)))
    assert [line["lr"] for line in steps_of(folder / "sft")] == [line["lr"] for line in steps_of(folder / "kd")]
    assert steps_of(folder / "sft")[0]["ce"] == steps_of(folder / "kd")[0]["ce"]     # the same student, not yet moved
    assert not same(weights(folder / "sft/last"), weights(folder / "kd/last"))
    table = records_in(folder / "table.jsonl")
    assert [row["model"] for row in table] == ["Base", "SFT", "KD", "Teacher"]
    for row in table:
        answers = records_in(folder / f"answers-{row['model'].lower()}.jsonl")
        assert 100 * sum(answer["f1"] for answer in answers) / len(answers) == pytest.approx(row["all"])
    assert "\nsequence KL " in out and "asked" in out


def test_a_sweep_is_a_run_for_each_rate_and_a_picture(run, world, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(kd, "plot_curves", lambda *picture: drawn.append(picture))
    passed(run("--loss", "sft", "--steps", 2, "--lr", "0.001", "0.01"))
    for lr in 0.001, 0.01:
        assert steps_of(tmp_path / "run" / f"lr-{lr}")[0]["lr"] == lr
    [(runs, path, teacher)] = drawn
    assert runs == {f"sft lr {lr}": tmp_path / "run" / f"lr-{lr}" for lr in (0.001, 0.01)}
    last = records_in(tmp_path / "run/table.jsonl")[-1]
    assert path == tmp_path / "run/curves.png" and teacher == last["all"] and last["model"] == "Teacher"
    shutil.rmtree(tmp_path / "run/lr-0.001")                                    # the second run's settings count too
    refused(run("--loss", "sft", "--steps", 3, "--lr", "0.001", "0.01", "--resume"), "lr-0.01")
    (tmp_path / "new/lr-0.01/best/mine").mkdir(parents=True)                    # and its folder
    refused(run("--loss", "sft", "--steps", 2, "--lr", "0.001", "0.01", out=tmp_path / "new"), "lr-0.01/best: holds files")
    assert not (tmp_path / "run/lr-0.001").exists() and not (tmp_path / "new/lr-0.001").exists()
    run("--loss", "sft", "--steps", 2, "--eval-data", world / "data.jsonl", out=tmp_path / "other")
    assert drawn[1][2] == teacher                                               # of the held-out records all the same
    status, _, err = run("--steps", 1, "--lr", "0.001", "0.01", out=tmp_path / "unnamed")
    assert status == 0 and "several --lr without --loss: a sweep with --loss forward_kl" in err
    assert list(drawn[2][0]) == ["forward_kl lr 0.001", "forward_kl lr 0.01"]


# ---- whose answers are learned from

MODES = {"on-policy": ["--loss", "reverse_kl", "--on-policy", "0.6"],
         "minillm": ["--loss", "minillm", "--rollouts", "16", "--inner-epochs", "4"],     # 8 steps from one sampling on
         "minillm in bfloat16": ["--loss", "minillm", "--rollouts", "16", "--inner-epochs", "4", "--dtype", "bfloat16"],
         "on-policy in bfloat16": ["--loss", "jsd", "--on-policy", "0.6", "--dtype", "bfloat16"],
         "seq-kd": ["--loss", "forward_kl", "--seq-kd"],
         "cache": ["--loss", "forward_kl", "--cache-teacher", "{cache}"],
         "plain text": ["--loss", "forward_kl", "--lm-data", "{text}"]}


@pytest.fixture
def mode(tmp_path):
    """The flags of a mode of MODES."""
    write_records(tmp_path / "text.jsonl", *({"text": f"Line {i} of a book."} for i in range(9)))
    return lambda name: [flag.format(cache=tmp_path / "cache", text=tmp_path / "text.jsonl") for flag in MODES[name]]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("bfloat16" in name)) for name in MODES])
def test_every_mode_goes_on_from_its_last_state_to_the_same_bits(run, mode, tmp_path, spy, name):
    seeds = spy(minillm, "collect", lambda **options: options["seed"])
    flags = [*mode(name), "--steps", "10", "--eval-every", "3", "--batch-size", "4", "--grad-accum", "2", "--lr", "0.003"]
    assert run(*flags, out=tmp_path / "whole")[0] == 0
    for step, resume in (5, []), (8, ["--resume"]):                             # the second state is that of a resumed run
        with killed_at(step):
            assert run(*flags, *resume, out=tmp_path / "killed")[0] == 130
    before = len(seeds)
    passed(run(*flags, "--resume", out=tmp_path / "killed"))
    if "minillm" in name:                                                       # the state of step 6 held the rollouts
        assert seeds[:2] == [0, 7919] and seeds[before:] == [7919]
    assert len(steps_of(tmp_path / "whole")) == 10 and steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")
    assert same(weights(tmp_path / "killed/last"), weights(tmp_path / "whole/last"))


def test_a_state_is_saved_by_the_clock_too_where_no_evaluation_saves_one(run, mode, tmp_path, monkeypatch, spy):
    """As by default, where a run is evaluated once, at its end."""
    flags = [*mode("minillm"), "--steps", "7", "--eval-every", "7", "--batch-size", "4"]
    assert run(*flags, out=tmp_path / "whole")[0] == 0
    for every, step, told in ((600, 4, "no run to resume; a new one begins"),
                              (0, 5, "no state was saved; the run starts again at step 1")):
        monkeypatch.setattr(kd, "SAVE_EVERY", every)
        with killed_at(step):
            status, out, _ = run(*flags, "--resume", out=tmp_path / "killed")
        assert status == 130 and told in out and (tmp_path / "killed" / STATE).exists() == (every == 0)
    begun = spy(kd, "learning_rate", lambda step, *_: step)
    assert "begins" not in passed(run(*flags, "--resume", out=tmp_path / "killed")) and begun == [4, 5, 6]
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")
    assert same(weights(tmp_path / "killed/last"), weights(tmp_path / "whole/last"))


def test_on_policy_answers_hold_only_ids_that_the_tokenizer_has(settings, tokenizer, tmp_path, learned):
    tall = load_model(tiny(3, tokenizer, tmp_path / "tall", vocab_size=432, tie_word_embeddings=False))
    tall.lm_head.weight.data[400:] *= 50                        # rows past the tokenizer's, here the likeliest or least likely
    kd.train(**settings(student=tall, loss="reverse_kl", on_policy=1.0, steps=2, max_new_tokens=5))
    seen = {id for batch, _ in learned for row in batch for id in row.response}
    assert len(seen) > 10 and max(seen) < len(tokenizer)


def test_on_policy_steps_learn_from_the_students_own_answers_without_cross_entropy(settings, tmp_path, learned):
    given = settings(loss="jsd", on_policy=0.5, steps=12, max_new_tokens=5)
    kd.train(**given)
    data = {(tuple(row.prompt), tuple(row.response)) for row in given["rows"]}
    own = [not data & {(tuple(row.prompt), tuple(row.response)) for row in batch} for batch, _ in learned]
    assert 2 < sum(own) < 10 and [terms["kd_ratio"] for _, terms in learned] == [1.0 if mine else 0.5 for mine in own]
    assert [line["own_answers"] for line in steps_of(tmp_path / "run")] == own
    prompts = {prompt for prompt, _ in data}
    assert all(tuple(row.prompt) in prompts and len(row.response) <= 5
               for (batch, _), mine in zip(learned, own) for row in batch if mine)
    learned.clear()
    kd.train(**settings(loss="reverse_kl", on_policy=1.0, steps=2, batch_size=3, grad_accum=3))
    assert [len(batch) for batch, _ in learned] == [3] * 6                      # all micro-batches of a step


def test_minillm_draws_the_student_to_its_teacher_in_the_reverse_kl_of_its_own_answers(settings, tokenizer, world):
    given = settings(loss="minillm", steps=60, rollouts=40, inner_epochs=2, batch_size=20, max_new_tokens=6, lr=0.01)
    distance = lambda student: sequence_kl(student, tokenizer, given["rows"] * 10, given["teacher"], 200, 6)
    before = distance(load_model(world / "student"))
    assert distance(kd.train(**given).eval()) < 0.8 * before


def test_a_minillm_step_is_the_formula_on_full_logits(world, settings, tokenizer):
    """forward_backward, and collect's numbers in it, against autograd on every logit: KL_t and the clipped surrogate, each
    once a token."""
    given = settings()
    teacher = given["teacher"].model
    rollouts = minillm.collect(student=load_model(world / "student"), teacher=teacher, rows=given["rows"] * 2, mix=0.2,
                               pad_id=tokenizer.pad_id, eos_ids=tokenizer.eos_ids, batch_size=7, max_new_tokens=6)
    student = load_model(world / "student").train()
    with torch.no_grad():                                                       # so that some ratios are past the clip
        for i, weight in enumerate(student.parameters()):
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    tokens = sum(len(row.response) for row in rollouts)
    for at in range(0, len(rollouts), 7):
        kd.forward_backward(rollouts[at:at + 7], student=student, weight=1 / tokens, pad_id=0, dtype=torch.float32,
                            checkpointing=False, teacher=given["teacher"], divergence=kd.reverse_kl, kd_ratio=1.0, ratio_clip=0.2)
    ours = [weight.grad.clone() for weight in student.parameters()]
    student.zero_grad(set_to_none=True)
    loss, clipped = 0.0, 0
    student.eval()
    for row in rollouts:
        ids, at = torch.tensor([row.prompt + row.response]), slice(len(row.prompt) - 1, -1)
        logq, logp = (model(ids)[0, at, :400].log_softmax(-1) for model in (student, teacher))
        chosen = logq.gather(1, torch.tensor(row.response)[:, None])[:, 0]
        for t in range(len(row.response)):
            ratio, A = (chosen[t] - row.old_logq[t]).exp(), row.advantage[t]
            clipped += not 0.8 < ratio < 1.2
            loss = loss - torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) + (logq[t].exp() * (logq[t] - logp[t])).sum()
    assert 10 < clipped < tokens - 10
    for grad, theirs in zip(ours, torch.autograd.grad(loss / tokens, list(student.parameters())), strict=True):
        torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flags", [["--loss", "forward_kl"], ["--loss", "reverse_kl", "--on-policy", "1"],
                                   ["--loss", "minillm"], ["--loss", "minillm", "--mix", "0"]], ids=" ".join)
def test_a_student_with_more_rows_than_its_teacher_says_nothing_the_teacher_has_no_row_for(run, tokenizer, tmp_path, world,
                                                                                            flags):
    tiny(3, tokenizer, tmp_path / "tall", vocab_size=999, initializer_range=0.1)
    models = "--student", tmp_path / "tall", "--teacher", world / "teacher"
    assert "sequence KL" in passed(run(*flags, "--steps", "2", models=models))


def test_a_full_disk_is_one_line_and_what_was_saved_stays(run, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))              # the state is larger than that, a model not
    try:
        refused(run("--loss", "forward_kl", "--eval-every", "1"), "state.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_model(tmp_path / "run/last").config.hidden_size == 16


def test_with_a_cache_a_run_equals_the_live_teachers_up_to_bfloat16_and_trains_without_its_body(run, mode, tmp_path, loaded):
    flags = ["--loss", "forward_kl", "--epochs", "3", "--batch-size", "4"]
    assert run(*flags, out=tmp_path / "live")[0] == 0
    loaded.clear()
    out = passed(run(*flags, *mode("cache")[2:], out=tmp_path / "cached"))
    assert "; 48 bytes each" in out                                             # 2 x 24, the teacher's width
    assert loaded == ["teacher", "student", "teacher", "student", "best"]        # to fill the cache, and for the table
    live, cached = (steps_of(tmp_path / name) for name in ("live", "cached"))
    assert len(live) == 15
    for a, b in zip(live, cached, strict=True):
        assert b["kd"] == pytest.approx(a["kd"], rel=1e-2) and b["ce"] == pytest.approx(a["ce"], rel=1e-2)
    one, other = (records_in(tmp_path / name / "table.jsonl")[2] for name in ("live", "cached"))
    assert one == other                                                         # the teacher's own column
    loaded.clear()
    assert run(*flags, *mode("cache")[2:], out=tmp_path / "again")[0] == 0
    assert loaded == ["student", "teacher", "student", "best"]                   # all was in the cache


def test_a_cache_of_other_data_or_another_template_is_refused(run, mode, world, tmp_path):
    assert run(*mode("cache"), "--steps", "1", out=tmp_path / "first")[0] == 0
    assert run(*mode("cache"), "--steps", "1", "--seed", "5", out=tmp_path / "split")[0] == 0   # the same rows, split anew
    (tmp_path / "fewer.jsonl").write_text("".join((world / "data.jsonl").read_text().splitlines(keepends=True)[3:]))
    for changed, said in ((["--template", "alpaca"], "its template is chatml, here alpaca"),
                          (["--max-length", "300"], "its max_length is 512, here 300"),
                          (["--data", tmp_path / "fewer.jsonl"], "its data is ['c0ef53cc07026d77'], here")):
        refused(run(*mode("cache"), "--steps", "1", *changed, out=tmp_path / "second"), said, "choose another --cache-teacher")


def test_plain_text_joins_every_step_and_is_logged(run, mode, tmp_path):
    assert run(*mode("plain text"), "--steps", "3", out=tmp_path / "with")[0] == 0
    assert run(*mode("plain text"), "--steps", "3", "--lm-coef", "1e-9", out=tmp_path / "without")[0] == 0
    assert all(line["lm_ce"] > 0 for line in steps_of(tmp_path / "with"))
    assert steps_of(tmp_path / "with")[2]["lm_ce"] < steps_of(tmp_path / "without")[2]["lm_ce"]


def test_sequence_level_kd_learns_from_what_the_teacher_says(run, mode, tmp_path, learned):
    assert run(*mode("seq-kd"), "--steps", "2")[0] == 0
    first, *answers = records_in(tmp_path / "run/teacher-answers.jsonl")
    assert len(answers) == 20 and "model.safetensors" in str(first)
    said = [answer["ids"] for answer in answers]
    assert all(row.response in said for batch, _ in learned for row in batch) and max(map(len, said)) == 4  # --max-new-tokens 4


def test_the_teachers_answers_are_cut_at_the_longest_row_too(run, mode, tmp_path, learned):
    out = passed(run(*mode("seq-kd"), "--steps", "3", "--max-length", "150", "--max-new-tokens", "120"))
    rows = [row for batch, _ in learned for row in batch]
    cut = [row for row in rows if len(row) == 150 and row.cut]
    assert max(map(len, rows)) == 150 and len({tuple(row.prompt) for row in rows}) == 20
    told = int(re.search(r"(\d+) of the teacher's 20 answers cut at --max-length", out)[1])
    assert told == len({tuple(row.prompt) for row in cut}) > 1
    answers = [answer["ids"] for answer in records_in(tmp_path / "run/teacher-answers.jsonl")[1:]]
    assert max(map(len, answers)) == 120 and all(any(ids[:len(row.response)] == row.response for ids in answers) for row in cut)


def renew(folder):
    """The same bytes under another inode, and another time; and a file that is none of the model's."""
    file = folder / "model.safetensors"
    shutil.copy(file, folder / "copy")
    (folder / "copy").replace(file)
    (folder / "config.json").touch()
    shutil.copy(file, folder / "adapter_model.safetensors")


CACHED = "--loss", "forward_kl", "--cache-teacher", "cache"


@pytest.mark.parametrize("which, flags, after, change, ends", [
    ("student", (), "lock", spoil, True), ("student", (), "train", spoil, True), ("student", (), "train", renew, False),
    ("teacher", (), "lock", spoil, True), ("teacher", (), "open_teacher", spoil, False),            # it is in memory then
    ("teacher", ("--loss", "sft"), "train", spoil, True), ("teacher", ("--loss", "sft"), "train", renew, False),
    ("teacher", CACHED, "lock", spoil, True), ("teacher", CACHED, "train", spoil, True), ("teacher", CACHED, "lock", renew, False),
    ("teacher", CACHED, "load_head", spoil, True)])
def test_a_model_that_another_replaces_during_the_run_ends_it(run, world, tmp_path, monkeypatch, which, flags, after, change,
                                                              ends):
    """Both runs of a comparison begin with one student, and the table has the teacher that the run began with."""
    for name in "student", "teacher":
        shutil.copytree(world / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    before, times = getattr(kd, after), []

    @functools.wraps(before)
    def and_change(*given, **named):
        found = before(*given, **named)
        if not times:
            times.append(change(tmp_path / which))
        return found

    monkeypatch.setattr(kd, after, and_change)
    status, _, err = run("--steps", "2", *flags, models=("--student", tmp_path / "student", "--teacher", tmp_path / "teacher"))
    told = f"{which}: has changed since this run began; put its files back and go on with --resume" in err
    assert after != "load_head" or not list(tmp_path.glob("run/**/log.jsonl"))              # before it trains
    assert times and (status, told) == ((2, True) if ends else (0, False)), err
    if ends and after == "lock":
        assert not list((tmp_path / "cache").glob("states-*")) and not (tmp_path / "run/best").exists()


# ---- stopping and going on

def test_after_kill_minus_nine_resume_ends_in_the_same_bits(run, tmp_path, world):
    flags = ["--loss", "forward_kl", "--steps", "36", "--eval-every", "6", "--batch-size", "8", "--warmup", "5"]
    assert run(*flags, out=tmp_path / "whole")[0] == 0
    killed = tmp_path / "killed"
    command = [sys.executable, ROOT / "train_kd.py", "--student", world / "student", "--teacher", world / "teacher",
               "--data", world / "data.jsonl", "--out", killed, *FAST, *flags]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        try:
            deadline = time.monotonic() + 60
            while not ((killed / STATE).exists() and len(steps_of(killed)) > 7):
                assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and 7 < len(steps_of(killed)) < 36
    with open(killed / LOG, "a") as log:
        log.write('{"step": 1')                                                 # as if the kill had cut a line
    passed(run(*flags, "--resume", out=killed))
    assert steps_of(killed) == steps_of(tmp_path / "whole")
    for name in "last", "best":
        assert same(weights(killed / name), weights(tmp_path / "whole" / name))


def test_resume_skips_what_is_done_and_runs_what_is_not(run, tmp_path, monkeypatch):
    out = passed(run("--steps", 2, "--resume"))                                 # a job that is always put back with it
    assert "run/sft: no run to resume; a new one begins" in out
    before = (tmp_path / "run/sft/last/model.safetensors").stat().st_mtime_ns
    (tmp_path / "run/kd" / LOG).unlink()                                        # stopped between the two
    assert "run/sft: done already" in passed(run("--steps", 2, "--resume"))
    assert (tmp_path / "run/sft/last/model.safetensors").stat().st_mtime_ns == before
    assert read_log(tmp_path / "run/kd")[-1]["done"]


def test_a_state_that_an_earlier_run_left_is_not_resumed_from(tmp_path, settings):
    """The toy's runs replace earlier ones: killed before its first state, a run must not find the earlier one's."""
    def begin(lr, at, resume=False):
        given = settings(steps=6, eval_every=2, lr=lr)
        student, out = given.pop("student"), given.pop("out")
        with killed_at(at):
            kd.stage(out, lambda: student, resume=resume, recorded={}, **given)

    for lr, at in (0.01, 5), (0.001, 2):
        with pytest.raises(KeyboardInterrupt):
            begin(lr, at)
    begin(0.001, 99, resume=True)
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_resume_with_the_files_in_another_order_is_refused(run, world, tmp_path):
    records = (world / "data.jsonl").read_text().splitlines(keepends=True)
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    parts[0].write_text("".join(records[:12])), parts[1].write_text("".join(records[12:]))
    flags = "--loss", "sft", "--steps", "2"
    assert run(*flags, data=("--data", *parts))[0] == 0
    for files in parts[::-1], [*parts, parts[1]]:
        refused(run(*flags, "--resume", data=("--data", *files)), "--resume with --data")
    assert run(*flags, "--resume", data=("--data", *parts))[0] == 0


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_model_that_was_replaced_since_is_not_resumed_with(run, world, tmp_path, which):
    """A comparison's second run would otherwise have another student, or teacher, than its first."""
    for name in "student", "teacher":
        shutil.copytree(world / name, tmp_path / name)
    models = "--student", tmp_path / "student", "--teacher", tmp_path / "teacher"
    assert run("--steps", "1", models=models)[0] == 0
    (tmp_path / "run/kd" / LOG).unlink()
    spoil(tmp_path / which)
    refused(run("--steps", "1", "--resume", models=models), f"the content of --{which}", f"{which} has changed since")


def test_a_student_that_is_cut_is_refused_before_the_teacher_is_asked(run, world, tmp_path):
    shutil.copytree(world / "student", tmp_path / "s")
    os.truncate(tmp_path / "s/model.safetensors", 1000)
    refused(run("--loss", "forward_kl", "--seq-kd", "--cache-teacher", tmp_path / "c",
                models=("--student", tmp_path / "s", "--teacher", world / "teacher")),
            "s/model.safetensors: is damaged or truncated")
    assert not (tmp_path / "c").exists() and not (tmp_path / "run").exists()


def test_a_second_toy_in_the_same_folder_is_refused_before_it_changes_the_first_ones_data(shell, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text('{"settings": {"toy": true}}')
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("the first one's")
    with locked_by_another(tmp_path):
        refused(shell(kd, "--out", tmp_path, "--seed", "1"), "another process is writing a run there")
    assert (tmp_path / "data/train.jsonl").read_text() == "the first one's"


@pytest.mark.parametrize("folder", ["data", "tokenizer"])
def test_the_toy_world_does_not_replace_what_lies_in_its_folders(shell, tmp_path, monkeypatch, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "test.jsonl").write_text("mine")
    refused(shell(kd, "--out", tmp_path), f"{folder}: was not made by the toy world")
    monkeypatch.setattr(toy, "make_tokenizer", lambda _: 1 / 0)                 # it goes on to that in a world of its own
    for name in "teacher", "base":                                              # either may have been deleted
        (tmp_path / "world" / folder).mkdir(parents=True, exist_ok=True)
        kd.write_config(tmp_path / "world" / name, {"toy": True})
        with pytest.raises(ZeroDivisionError):
            kd.toy_world(tmp_path / "world", 0, False, "cpu")
        shutil.rmtree(tmp_path / "world")
    assert [path.name for path in tmp_path.iterdir()] == [folder] and (tmp_path / folder / "test.jsonl").read_text() == "mine"


def test_resume_with_another_flag_is_refused(run):
    first = ["--loss", "forward_kl", "--steps", "2", "--limit", "20"]
    assert "20 of 20 records kept" in passed(run(*first))
    for flag, value, before in (("--kd-ratio", "0.9", "0.5"), ("--seed", "3", "0"), ("--max-length", "300", "512"),
                                ("--template", "alpaca", "chatml"), ("--limit", "19", "20"), ("--steps", "3", "2")):
        refused(run(*first, "--resume", flag, value), f"--resume with {flag} {value}, but the run began with {before}")


def test_a_finished_run_whose_model_was_moved_away_is_named(run, tmp_path):
    flags = "--loss", "sft", "--steps", 1
    assert run(*flags)[0] == 0
    (tmp_path / "run/best").rename(tmp_path / "mine")
    refused(run(*flags, "--resume"), "run/best: is missing, though the run is done; put it back, or choose another --out\n")


@pytest.mark.parametrize("count, times", [(1, 1), (4, 1), (1, 9)])
def test_where_no_prompt_can_be_held_out_a_run_goes_on_with_a_note(run, world, tmp_path, count, times):
    lines = (world / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:count] * times))
    out = passed(run("--loss", "sft", "--steps", 2, "--validation", 3, data=("--data", tmp_path / "few.jsonl")))
    assert f"note: none of {count * times} records with {count} different prompts can be held out" in out
    assert len((tmp_path / "run/held-out.jsonl").read_text().splitlines()) == min(3, count * times)


def test_of_prompts_that_repeat_a_whole_one_is_held_out(run, world, tmp_path):
    lines = (world / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "thrice.jsonl").write_text("".join(lines[:4] * 3))
    status, out, err = run("--loss", "sft", "--steps", 2, "--validation", 1, data=("--data", tmp_path / "thrice.jsonl"))
    held = [record["instruction"] for record in records_in(tmp_path / "run/held-out.jsonl")]
    assert status == 0 and "note:" not in out + err and len(held) == 3 and len(set(held)) == 1


# ---- what the user can fix

@pytest.mark.parametrize("flags, said", [
    (dict(data=("--data", "no/such.jsonl")), "no/such.jsonl: no such file"),
    (dict(models=("--student", "no/such/student", "--teacher", "no/such/teacher")), "no/such/student: no such folder"),
    (dict(models=("--student", "{world}/student")), "--student without --teacher"),
    (dict(models=("--teacher", "{world}/teacher")),
     "--teacher, --data, --valid-data, --eval-data, --limit or --format without --student"),
    (dict(models=("--format", "dolly"), data=()), "--limit or --format without --student"),
    (dict(models=("--limit", "3"), data=()),
     "--teacher, --data, --valid-data, --eval-data, --limit or --format without --student"),
    (dict(models=("--student", "{world}/student", "--teacher", "{world}/short")), "short: the tokenizer has "),
    (dict(data=()), "--student without --data"),
    (dict(data=("--data", "{world}/bad.jsonl")), "bad.jsonl:7: field 'response' is an int; make it text")])
def test_bad_input_is_one_line_that_says_what_and_where(run, world, tokenizer, tmp_path, flags, said):
    lines = (world / "data.jsonl").read_text().splitlines(keepends=True)
    (world / "bad.jsonl").write_text("".join([*lines[:6], '{"instruction": "Why?", "response": 3}\n', *lines[6:]]))
    tiny(4, tokenizer, world / "short", vocab_size=100)
    refused(run(**{name: [value.format(world=world) for value in values] for name, values in flags.items()}), said)
    assert not (tmp_path / "run").exists()                                      # and nothing was begun


@pytest.mark.parametrize("flags, said", [
    (["--lr", "nan"], "--lr [nan]: must be above 0"), (["--batch-size", "many"], "invalid int value: 'many'; see --help"),
    (["--kd-ratio", "1.5"], "--kd-ratio must be from 0 to 1"), (["--loss", "skew_forward_kl", "--alpha", "0"], "--alpha above 0"),
    (["--loss", "sft", "--lr", "0.01", "1e-2"], "two rates are the same"),
    (["--eval-data", "no/such.jsonl"], "no/such.jsonl: no such file"),
    (["--on-policy", "1.5"], "--on-policy must be from 0 to 1"), (["--loss", "minillm", "--mix", "1"], "--mix from 0 to below 1"),
    (["--on-policy", "0.5"], "--on-policy needs a divergence"),
    (["--loss", "minillm", "--cache-teacher", "x"], "own answers are new each time"),
    (["--loss", "minillm", "--seq-kd"], "leave one out"),
    (["--loss", "jsd", "--on-policy", "1", "--seq-kd"], "leave one out"),
    (["--lm-data", "no/such.jsonl"], "no/such.jsonl: no such file"),
    (["--loss", "sft", "--lr", "1e12", "--steps", "9"], "is not finite; lower --lr (now 1e+12)"),
    (["--lm-data", ""], "'': is empty"),
    (["--temperature", "1e-30"], "run/kd, step 1: the gradient is not finite; take another model, or raise --temperature"),
    (["--out="], "'--out=': is empty"), (["--loss", "sft", "--data", "/"], "'/': names no file or folder"),
    (["--loss", "sft", "--steps", "1", "--lr", "1e12"], "the held-out loss after step 1 is not finite; lower --lr")])
def test_a_flag_out_of_range_is_one_line_that_names_it(run, flags, said):
    refused(run(*flags), said)


def test_a_run_that_is_refused_leaves_everything_as_it_was(run, shell, world, tmp_path):
    """Refused before the split is written anew, and before a teacher is asked for hours."""
    flags = "--loss", "forward_kl", "--steps", "1", "--validation", "4"
    assert run(*flags)[0] == 0
    shutil.copytree(world / "student", tmp_path / "model")
    (tmp_path / "model/held-out.jsonl").write_text("mine")
    files = files_in(tmp_path)
    refused(run(*flags, "--seed", "7"), "already holds a run of 1 steps; continue it with --resume")
    refused(run(*flags, "--seed", "7", "--resume"), "the run began with 0")
    refused(run(*flags, "--cache-teacher", tmp_path / "cache"), "already holds a run")
    refused(run("--steps", "1"), "already holds another run")                   # a comparison has files of the same names
    for more in [], ["--resume"]:                                               # --data forgotten: no toy in its place
        refused(shell(kd, "--out", tmp_path / "run", "--steps", "1", *more), "run of 1 steps")
    refused(run(*flags, out=tmp_path / "model"), "belongs to a model, not to a run; choose another --out")
    assert files_in(tmp_path) == files and not (tmp_path / "cache").exists()


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(run, tmp_path, monkeypatch):
    read_data, log = kd.read_data, tmp_path / "run/log.jsonl"

    @functools.wraps(read_data)
    def slowly(*given, **flags):                                # half a million records take minutes
        read = read_data(*given, **flags)
        write_config(log.parent, {"toy": False})
        log.write_text('{"step": 5, "done": true}\n')
        return read

    monkeypatch.setattr(kd, "read_data", slowly)
    refused(run("--loss", "sft", "--steps", 1), "already holds a run of 5 steps")
    assert log.read_text() == '{"step": 5, "done": true}\n'


def test_a_run_does_not_go_on_with_another_chat_template(run, world, tmp_path):
    shutil.copytree(world / "student", tmp_path / "mine")
    go = lambda *more: run("--loss", "sft", "--steps", 3, "--eval-every", 1, *more, models=("--student", tmp_path / "mine"))
    with killed_at(2):
        assert go()[0] == 130
    before = (tmp_path / "mine/tokenizer_config.json").read_text()
    change_json(tmp_path / "mine/tokenizer_config.json", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    refused(go("--resume"), "undo the change to the tokenizer, its chat template or minikd")
    (tmp_path / "mine/tokenizer_config.json").write_text(before)
    passed(go("--resume"))


@pytest.mark.parametrize("epochs, steps", [(1.1, 28), (1e-9, 1), (0.28, 7)])
def test_part_of_an_epoch_is_its_steps_rounded_up_but_not_for_a_floats_sake(run, tmp_path, epochs, steps):
    """50 records, 2 a step; 0.28 x 25 is 7.000000000000001."""
    data = write_records(tmp_path / "more.jsonl", *({"instruction": f"Say {i}.", "response": str(i)} for i in range(60)))
    passed(run("--loss", "sft", "--epochs", epochs, "--batch-size", 2, "--validation", 10, data=("--data", data)))
    assert len(steps_of(tmp_path / "run")) == steps


def test_of_eval_data_those_too_long_and_those_trained_on_are_counted(run, world, tmp_path):
    flags = "--loss", "sft", "--steps", 1, "--eval-data"
    long = {"instruction": "word " * 300, "response": "x"}
    data = write_records(tmp_path / "test.jsonl", long, {"instruction": "Why?", "response": "x"})
    out = passed(run(*flags, data))
    assert "1 of 2 records of --eval-data, 1 dropped: prompt too long" in out and "also trained on" not in out
    refused(run(*flags, write_records(data, long), out=tmp_path / "other"), "error: --eval-data: none of 1 examples can be used")
    out = passed(run(*flags, world / "data.jsonl", out=tmp_path / "all"))
    assert "note: 20 of 24 records of --eval-data have a prompt that is also trained on" in out


def test_a_teacher_may_be_trained_in_a_folder_of_the_comparison(run, tmp_path):
    flags = "--loss", "sft", "--steps", "1"
    assert run(*flags, out=tmp_path / "run/teacher")[0] == 0
    assert run("--steps", "1", models=("--student", tmp_path / "run/teacher/best", "--teacher",
                                       tmp_path / "run/teacher/best"))[0] == 0


def test_what_was_held_out_can_be_asked_for_afterwards(run, shell, world, tmp_path):
    assert run("--loss", "sft", "--validation", "4")[0] == 0
    lines = records_in(tmp_path / "run/held-out.jsonl")
    asked = {line["messages"][-2]["content"] for line in lines}
    assert len(lines) == 4 and {line["category"] for line in lines} <= {"sum", "echo"}
    known = {record["instruction"]: record["response"] for record in records_in(world / "data.jsonl")}
    assert all(known[line["messages"][-2]["content"]] == line["messages"][-1]["content"] for line in lines) and len(asked) == 4
    out = passed(shell(eval_rouge, "--model", tmp_path / "run/best", "--data", tmp_path / "run/held-out.jsonl",
                       "--device", "cpu", "--max-new-tokens", "4"))
    assert out.split("\nall")[1].split()[0] == "4"


def test_prompts_are_answered_many_at_a_time_whatever_the_micro_batch(run, tmp_path, spy):
    at_once = spy(evaluate, "respond", lambda model, rows, size, *_, **named: size)
    for size in "1", "20":
        assert run("--loss", "sft", "--steps", "1", "--batch-size", size, out=tmp_path / size)[0] == 0
    assert set(at_once) == {16, 20}


def test_a_steps_seconds_include_the_sampling_of_its_rollouts(run, tmp_path, spy):
    spy(minillm, "collect", lambda **_: time.sleep(0.5))
    assert run("--loss", "minillm", "--rollouts", "4", "--batch-size", "4", "--inner-epochs", "2", "--steps", "2")[0] == 0
    assert next(line["seconds"] for line in read_log(tmp_path / "run") if "seconds" in line) > 0.5


def test_the_script_itself_ends_with_status_2_and_no_traceback(tmp_path):
    """And it starts without torch's compiler, which takes as long to import as all the rest."""
    command = [sys.executable, "-X", "importtime", ROOT / "train_kd.py", "--student", "x"]
    done = subprocess.run(command, capture_output=True, text=True)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    told = [line for line in done.stderr.splitlines() if line not in imports]
    assert done.returncode == 2 and told == ["error: --student without --data; add --data FILE"]
    names = {line.split("|")[-1].strip() for line in imports}
    assert "minikd.layout" in names and not {"torch._dynamo", "torch._inductor", "matplotlib", "pyarrow"} & names


# ---- the toy world, shrunk

@pytest.fixture
def shrunk(tmp_path, monkeypatch) -> dict:
    """Little data and few steps, in an empty folder; run's folder -> the head of the student that it started from."""
    few, train, text, starts = toy.records, kd.train, toy.plain_text, {}

    @functools.wraps(train)                                                     # with its signature
    def shortened(**settings):
        starts[settings["out"].name] = settings["student"].head.detach().clone()
        return train(**settings | dict(steps=2, eval_every=2, eval_examples=4, max_new_tokens=4, batch_size=8))

    monkeypatch.setattr(toy, "records", lambda count, *rest, **named: few(
        min(count, 30 if "test" in named else 160), *rest, **named))
    monkeypatch.setattr(toy, "plain_text", lambda count, seed: text(20, seed))
    monkeypatch.setattr(kd, "train", shortened)
    monkeypatch.chdir(tmp_path)
    return starts


@pytest.mark.parametrize("flags, steps, epochs, lr", [
    ([], 400, None, 3e-3), (["--epochs", "2"], None, 2, 3e-3), (["--steps", "7"], 7, None, 3e-3),
    (["--loss", "minillm"], 400, None, 1e-3), (["--loss", "jsd", "--on-policy", "1"], 400, None, 1e-3)])
def test_the_toy_takes_400_steps_and_a_lower_rate_on_own_answers(monkeypatch, flags, steps, epochs, lr):
    monkeypatch.setattr(sys, "argv", ["train_kd.py", *flags])
    args = kd.parse_args()
    assert (args.steps, args.epochs, args.lr) == (steps, epochs, [lr])


def test_with_no_flags_the_toy_world_goes_from_nothing_to_a_table_and_eval_rouge_agrees(shrunk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_kd.py", "--max-new-tokens", "4"])
    kd.main()
    out, err = capsys.readouterr()
    assert all(f"\n{name} " in out for name in "code english spanish all asked right Base SFT KD Teacher".split())
    assert {"teacher", "base", "sft", "kd", "data", "table.jsonl"} <= {path.name for path in Path("runs/toy").iterdir()}
    train, valid = (records_in(f"runs/toy/data/{name}.jsonl") for name in ("train", "valid"))
    assert valid and not {toy.question(entry) for entry in train} & {toy.question(entry) for entry in valid}
    assert all(entry.get("response", entry.get("code")) == entry["right"] for entry in valid)           # these are clean
    assert any(entry.get("response", entry.get("code")) != entry["right"] for entry in train)
    table = {row["model"]: row["all"] for row in records_in("runs/toy/table.jsonl")}
    assert list(table) == ["Base", "SFT", "KD", "Teacher"]
    monkeypatch.setattr(sys, "argv", ["eval_rouge.py", "--max-new-tokens", "4"])
    eval_rouge.main()
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all ")][-1]
    assert float(last.split()[2]) == pytest.approx(table["KD"], abs=0.051)


@pytest.mark.slow
def test_on_a_gpu_the_toy_world_trains_there(shrunk, shell):
    with gpu():
        passed(shell(kd, "--device", "cuda", "--max-new-tokens", "4"))
    assert list(shrunk) == ["teacher", "base", "sft", "kd"] and all(head.is_cuda for head in shrunk.values())


@pytest.mark.parametrize("flags", [
    pytest.param(["--loss", "minillm"], marks=pytest.mark.slow), ["--loss", "reverse_kl", "--on-policy", "1"]], ids=" ".join)
def test_in_the_toy_world_own_answers_begin_from_a_student_that_was_fine_tuned(shrunk, monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["train_kd.py", "--max-new-tokens", "4", *flags])
    kd.main()
    assert list(shrunk) == ["teacher", "base", "sft", "toy"]
    assert torch.equal(shrunk["toy"], load_model("runs/toy/sft/best").head)
    assert [row["model"] for row in records_in("runs/toy/table.jsonl")] == ["SFT", flags[1], "Teacher"]


def test_a_toy_that_is_resumed_with_another_seed_is_refused_with_its_data_as_they_were(shrunk, shell):
    flags = "--max-new-tokens", "4"
    assert shell(kd, *flags)[0] == 0
    files = files_in(Path("runs/toy"))
    refused(shell(kd, *flags, "--resume", "--seed", "3"), "--resume with --seed 3, but the run began with 0")
    assert files_in(Path("runs/toy")) == files


@pytest.mark.parametrize("flags, said", [
    ("--loss sft --kd-ratio 0 --temperature 2", "with --loss sft: --kd-ratio --temperature\n"),
    ("--loss jsd --alpha 0.3 --beta 0.3", "with --loss jsd: --alpha\n"),
    ("--loss jsd --on-policy 1 --kd-ratio 0.3", "with --on-policy 1, which has no cross-entropy: --kd-ratio\n"),
    ("--mix 0.1", "with --loss sft or forward_kl: --mix\n"), ("--loss sft --lm-coef 3", "without --lm-data: --lm-coef\n"),
    ("--epochs 2", "with --steps: --epochs\n"), ("--loss minillm --mix 0.3 --rollouts 8", "")])
def test_a_flag_that_does_nothing_is_named(run, flags, said):
    status, _, err = run("--steps", 1, "--batch-size", 4, *flags.split())
    assert status == 0 and err.partition("note: ")[2].endswith(said) and err.count("note: ") == bool(said)


# ---- what flags reach

def test_no_more_are_answered_than_eval_examples_says(run, spy):
    asked = spy(kd, "answer_and_score", lambda model, tokenizer, rows, *_: len(rows))
    out = passed(run("--loss", "sft", "--steps", 1, "--validation", 4))         # and --eval-examples 2
    assert asked == [2] and "of 2 held-out prompts" in out


def test_validation_records_may_have_a_file_of_their_own(run, world, tmp_path):
    """Then all of --data is trained on, and the curves, best/ and the table are of that file."""
    data = records_in(world / "data.jsonl")
    file = write_records(tmp_path / "valid.jsonl", data[0], DOLLY, DOLLY | {"instruction": "Another?"})
    status, out, err = run("--loss", "sft", "--steps", 1, "--valid-data", file, "--validation", 9, "--eval-examples", 3)
    assert status == 0 and "note: ignored with --valid-data: --validation" in err
    assert f"{len(data)} encoded" in out and "for validation 3 encoded" in out and "of 3 held-out prompts" in out
    flags = "--loss", "sft", "--steps", 1, "--eval-examples", 3, "--resume"
    assert "done already" in passed(run(*flags, "--valid-data", file, "--validation", 7))       # which has no effect
    refused(run(*flags), "--resume with --valid-data None, but the run began with")
    write_records(file, data[0], DOLLY)
    refused(run(*flags, "--valid-data", file), "the content of --valid-data")
    write_records(file, DOLLY | {"instruction": "long " * 3000})
    refused(run(*flags[:-1], "--valid-data", file, out=tmp_path / "other"), "error: --valid-data: none of 1 examples can be used")
    assert "note: 1 of 3 records of --valid-data have a prompt that is also trained on" in out
    assert [record["references"] for record in records_in(tmp_path / "run/held-out.jsonl")][1:] == 2 * [[DOLLY["response"]]]


def test_plain_text_is_cut_into_rows_of_max_length(run, tmp_path, monkeypatch):
    write_records(tmp_path / "text.jsonl", {"text": "A long line of a book. " * 90})
    longest = []
    monkeypatch.setattr(kd, "train", lambda *, lm_rows, **_: longest.append(max(map(len, lm_rows))) or sys.exit(3))
    assert run("--loss", "sft", "--steps", 1, "--max-length", 200, "--lm-data", tmp_path / "text.jsonl")[0] == 3
    assert longest == [200]


def test_the_error_says_if_it_is_the_held_out_prompts_that_are_all_too_long(run, tmp_path, monkeypatch):
    monkeypatch.setattr(kd, "hold_out", lambda examples, *_: (examples[:-1], examples[-1:]))
    data = write_records(tmp_path / "r.jsonl", *({"instruction": "word " * (300 * (i == 5) or 1 + i), "response": "x"}
                                                 for i in range(6)))
    refused(run("--loss", "sft", data=("--data", data)), "error: held-out records: none of 1 examples can be used")
