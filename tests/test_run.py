"""A run's folder: a state that comes back bit for bit, a log and settings that outlive kills, and nothing that is overwritten."""
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from conftest import change_json, files_in, locked_by_another, refusal, same, small
from minikd import run
from minikd.run import (CONFIG, LOG, STATE, Log, begin_run, check_free, check_settings, load_state, lock, read_log, save_state,
                        settings_of, write_config)
from minikd.training import make_optimizer

IDS = torch.arange(24).view(2, 12)
BEGUN = {"step": 0}                                            # the facts of a run before its first step


def student_of(seed=1, **shape) -> tuple:
    """A model and an optimizer that has not stepped."""
    sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, initializer_range=0.2)
    model = small(seed, **sizes | shape)
    return model, make_optimizer(model, 0.01)


def take_steps(model, optimizer, count: int):
    for _ in range(count):
        torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- the log

def test_a_log_is_one_object_a_line_from_the_moment_it_is_written(tmp_path):
    log = Log(tmp_path)
    log.write(step=1, ce=2.5)
    assert read_log(tmp_path) == [{"step": 1, "ce": 2.5}]
    log.write(step=2, said="¿Qué?")
    log.write({"step": 3}, {"step": 3, "more": 1})
    lines = '{"step": 1, "ce": 2.5}\n{"step": 2, "said": "¿Qué?"}\n{"step": 3}\n{"step": 3, "more": 1}\n'
    assert (tmp_path / LOG).read_text(encoding="utf-8") == lines
    Log(tmp_path, upto=3)
    assert (tmp_path / LOG).read_text(encoding="utf-8") == lines                # kept as they were written


def test_a_log_of_another_name_leaves_the_first_alone(tmp_path):
    Log(tmp_path).write(step=1)
    other = Log(tmp_path, name="answers.jsonl")
    other.write(step=7)
    Log(tmp_path, upto=7, name="answers.jsonl")
    assert read_log(tmp_path) == [{"step": 1}] and read_log(tmp_path, "answers.jsonl") == [{"step": 7}]


@pytest.mark.parametrize("line", ["{", "[1]", "3", '{"ce": 1}', '{"step": null}', '{"step": "2"}', "[" * 9999])
def test_a_line_that_is_no_step_is_named_and_only_a_resumed_log_reads_it(tmp_path, line):
    (tmp_path / LOG).write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    assert f"{LOG}: holds a line that is not a step of a run" in refusal(Log, tmp_path, upto=2)
    Log(tmp_path)
    assert read_log(tmp_path) == []


def test_a_resumed_log_forgets_what_came_after_its_state(tmp_path):
    log = Log(tmp_path)
    for step in range(1, 6):
        log.write(step=step)
        if step == 3:
            log.write(step=step, rouge_l=50.0)
    log = Log(tmp_path, upto=3)
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 3, "rouge_l": 50.0}]
    log.write(step=4, again=True)
    assert read_log(tmp_path)[-1] == {"step": 4, "again": True}


def test_a_last_line_that_a_kill_cut_is_left_out_even_within_a_letter(tmp_path):
    line = '{"step": 2, "said": "¿Qué?"}\n'.encode()
    for cut in range(1, len(line)):
        (tmp_path / LOG).write_bytes(b'{"step": 1}\n' + line[:cut])
        assert read_log(tmp_path) == [{"step": 1}]
    Log(tmp_path, upto=1).write(step=2)
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}]                     # and the next line starts on its own


# ---- the state

@pytest.mark.parametrize("tied", [True, False])
def test_a_state_comes_back_bit_for_bit_moments_and_all(tmp_path, tied):
    model, optimizer = student_of(tie_word_embeddings=tied)
    take_steps(model, optimizer, 3)
    save_state(tmp_path, model, optimizer, {"step": 3, "best": 41.5}, {"ids": torch.arange(5)})
    other, fresh = student_of(2, tie_word_embeddings=tied)
    facts, more = load_state(tmp_path, other, fresh, BEGUN)
    assert facts == {"step": 3, "best": 41.5} and more.keys() == {"ids"} and more["ids"].tolist() == list(range(5))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        moments, again = optimizer.state[mine], fresh.state[theirs]
        assert set(moments) == set(again) == {"step", "exp_avg", "exp_avg_sq"} and moments["exp_avg_sq"].any()
        assert all(torch.equal(moments[key], again[key]) and moments[key].dtype == again[key].dtype for key in moments)
    for number in range(1, 4):                                                  # and so after every further stop
        take_steps(model, optimizer, 3)
        take_steps(other, fresh, 3)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters()))
        save_state(tmp_path, other, fresh, {"step": 3 + 3 * number})
        other, fresh = student_of(2 + number, tie_word_embeddings=tied)
        assert load_state(tmp_path, other, fresh, BEGUN) == ({"step": 3 + 3 * number}, {})
    assert [path.name for path in tmp_path.iterdir()] == [STATE]                # each replaces the one before


def test_a_state_of_no_step_yet_has_no_moments(tmp_path):
    (model, optimizer), (other, fresh) = student_of(), student_of(2)
    assert load_state(tmp_path, model, optimizer, {"step": 0, "best": 7.5}) == ({"step": 0, "best": 7.5}, {})
    save_state(tmp_path, model, optimizer, {"step": 0})
    assert load_state(tmp_path, other, fresh, BEGUN) == ({"step": 0}, {}) and same(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("shape, named", [(dict(num_hidden_layers=3), "layers.2"),
                                          (dict(num_hidden_layers=1), "layers.1"),
                                          (dict(intermediate_size=16), "mlp.down_proj"),
                                          (dict(intermediate_size=1), "mlp.down_proj"),     # would broadcast
                                          (dict(tie_word_embeddings=False), "lm_head")])
def test_a_state_of_another_model_is_refused_in_one_line_and_nothing_is_touched(tmp_path, shape, named):
    save_state(tmp_path, *student_of(), {"step": 1})
    other, fresh = student_of(2, **shape)
    before = [p.detach().clone() for p in other.parameters()]
    said = refusal(load_state, tmp_path, other, fresh, BEGUN)
    assert f"{STATE}: belongs to another model (" in said and named in said
    assert all(torch.equal(was, now) for was, now in zip(before, other.parameters()))


def test_a_state_with_the_moments_of_other_parameters_is_refused(tmp_path):
    """The fused AdamW would read past their ends."""
    model, optimizer = student_of()
    take_steps(model, optimizer, 1)
    with pytest.MonkeyPatch.context() as patch:
        state = optimizer.state_dict()
        order = sorted(state["state"], key=str)
        patch.setattr(optimizer, "state_dict", lambda: state | {"state": dict(zip(order, state["state"].values()))})
        save_state(tmp_path, model, optimizer, {"step": 1})
    assert f"{STATE}: belongs to another model (optimizer" in refusal(load_state, tmp_path, *student_of(), BEGUN)
    save_state(tmp_path, model, optimizer, {"step": 1})
    left = {key: value for key, value in load_file(tmp_path / STATE).items() if "optimizer.3." not in key}
    save_file(left, tmp_path / STATE, {"facts": "{}"})
    assert "another model (optimizer.3.exp_avg is None" in refusal(load_state, tmp_path, *student_of(), BEGUN)


def test_a_state_cut_short_is_named(tmp_path):
    save_state(tmp_path, *student_of(), {"step": 1})
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-50])
    assert f"{STATE}: is damaged (" in refusal(load_state, tmp_path, *student_of(), BEGUN)


@pytest.mark.parametrize("facts", [None, {}, {"facts": "{"}, {"facts": "{}"}, {"facts": "[]"}, {"facts": '{"step": "a"}'},
                                   {"facts": '{"step": 1.5}'}, {"facts": '{"step": true}'}, {"facts": '{"step": 1}'},
                                   {"facts": '{"step": 1, "best": 2}'}])
def test_a_state_that_does_not_say_its_step_changes_nothing(tmp_path, facts):
    save_state(tmp_path, *student_of(), {"step": 1})
    save_file(load_file(tmp_path / STATE), tmp_path / STATE, facts)
    other, fresh = student_of(7)
    before = [parameter.clone() for parameter in other.parameters()]
    said = refusal(load_state, tmp_path, other, fresh, BEGUN | {"best": -1.0})
    assert f"{STATE}: is damaged (it does not hold step and best); start again" in said
    assert all(map(torch.equal, before, other.parameters()))


# ---- the settings

SETTINGS = {"kd_ratio": 0.5, "data": [["a.jsonl", "0123456789abcdef"]], "dtype": torch.float32, "teacher": None, "lr": 1e-5}


def test_the_settings_are_written_with_the_versions_that_ran_them(tmp_path):
    write_config(tmp_path, SETTINGS)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["settings"] == SETTINGS | {"dtype": "torch.float32"}
    assert written["versions"]["torch"] == torch.__version__ and written["versions"]["tokenizers"] == tokenizers.__version__
    assert set(written["versions"]) >= {"python", "commit", "threads"}


@pytest.mark.parametrize("said, commit, worktree", [("abc1234-dirty\n", "abc1234-dirty", False), ("", None, True)])
def test_a_run_records_the_commit_of_this_code_wherever_it_is_started(tmp_path, monkeypatch, said, commit, worktree):
    asked, checkout = [], tmp_path / "checkout"
    (checkout / "minikd").mkdir(parents=True)
    monkeypatch.setattr(run, "__file__", str(checkout / "minikd" / "run.py"))
    monkeypatch.setattr(run, "commit", run.commit.__wrapped__)        # not cached
    monkeypatch.setattr(subprocess, "run", lambda *given, **how: asked.append((*given, how)) or SimpleNamespace(stdout=said))
    write_config(tmp_path, SETTINGS)                                            # installed: a repository around is another's
    assert json.loads((tmp_path / CONFIG).read_text())["versions"]["commit"] is None and asked == []
    (checkout / ".git").touch() if worktree else (checkout / ".git").mkdir()
    write_config(tmp_path, SETTINGS)
    assert json.loads((tmp_path / CONFIG).read_text())["versions"]["commit"] == commit
    (command, how), = asked
    assert command == ["git", "-C", str(checkout.resolve()), "describe", "--always", "--dirty"]         # no tags
    assert how == dict(capture_output=True, text=True)                          # text: else the commit is a b'...'


def test_the_same_settings_may_resume_and_others_are_named_as_the_flag_and_both_values(tmp_path):
    write_config(tmp_path, SETTINGS)
    for equal in {}, {"data": [["../b.jsonl", "0123456789abcdef"]]}, {"newer_flag": None}:      # the second: the file was moved
        check_settings(tmp_path, SETTINGS | equal)
    for changed, said in (
            ({"kd_ratio": 0.7}, "--kd-ratio 0.7, but the run began with 0.5; give the same flags"),
            ({"data": [["torch.jsonl", "f"]]}, "--data [['torch.jsonl', 'f']], but the run began with [['a.jsonl', '0123"),
            ({"data": [["a.jsonl", "f"]]}, "the content of --data a.jsonl has changed since the run began; put it back"),
            ({"newer_flag": 1}, "holds a run of another script, or of a minikd without --newer-flag; choose another")):
        assert said in refusal(check_settings, tmp_path, SETTINGS | changed)
    began = SETTINGS | {"dtype": "torch.float32", "steps": 12, "batch_size": 4}
    write_config(tmp_path, began)
    for changed, said in (({"dtype": "torch.bfloat16"}, "--dtype bfloat16, but the run began with float32"),         # as given
                          ({"steps": 6}, "--steps 6, but"),
                          ({"steps": 6, "batch_size": 8}, "--batch-size 8, but")):      # it decides the steps of --epochs
        assert said in refusal(check_settings, tmp_path, began | changed)


def test_a_cache_may_move_and_a_tokenizer_may_not_change(tmp_path):
    began = SETTINGS | {"cache_teacher": "cache", "rows": "0123"}
    write_config(tmp_path, began)
    check_settings(tmp_path, began | {"cache_teacher": "elsewhere/cache"})
    for changed, said in (({"cache_teacher": None}, "--cache-teacher None, but the run began with cache"),
                          ({"rows": "4567"}, "the run began with; undo the change to the tokenizer"),
                          ({"rows": "4567", "lr": 1.0}, "--lr 1")):             # a flag that explains it is named first
        assert said in refusal(check_settings, tmp_path, began | changed)
    write_config(tmp_path, SETTINGS)                                            # of a version that did not record them
    check_settings(tmp_path, SETTINGS | {"rows": "4567"})


def test_without_git_no_commit_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "commit", run.commit.__wrapped__)        # not cached
    monkeypatch.setenv("PATH", str(tmp_path))
    write_config(tmp_path, SETTINGS)
    assert json.loads((tmp_path / CONFIG).read_text())["versions"]["commit"] is None


def test_a_disk_that_fills_leaves_the_files_before(tmp_path, monkeypatch):
    model, optimizer = student_of()
    write_config(tmp_path, SETTINGS)
    Log(tmp_path).write(step=1)
    save_state(tmp_path, model, optimizer, {"step": 1})
    files = files_in(tmp_path)

    def full(path, *_, **__):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr("minikd.run.open", lambda path, mode: full(path) if "w" in mode else open(path, mode),
                        raising=False)
    monkeypatch.setattr("minikd.run.save_tensors", lambda tensors, path, facts: full(path))
    for write in (lambda: write_config(tmp_path, SETTINGS), lambda: Log(tmp_path, upto=1),
                  lambda: save_state(tmp_path, model, optimizer, {"step": 2})):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert files_in(tmp_path) == files


def test_a_config_without_settings_is_named(tmp_path):
    write_config(tmp_path, SETTINGS)
    assert settings_of(tmp_path) == SETTINGS | {"dtype": "torch.float32"}
    (tmp_path / CONFIG).write_text('{"settings": [1]}')
    assert f"{CONFIG}: has no settings of a run" in refusal(settings_of, tmp_path)


# ---- where a run may begin, and where it goes on

def test_a_new_folder_is_free_and_a_resume_of_nothing_is_said(tmp_path, capsys):
    out = tmp_path / "new"
    check_free(out, [out], resume=True, toy=False)
    assert begin_run(out, {"seed": 0}, resume=True)
    assert "no run to resume; a new one begins" in capsys.readouterr().out
    (tmp_path / "file").touch()
    said = refusal(check_free, tmp_path / "file", [tmp_path / "file"], resume=False, toy=False)
    assert said == f"{tmp_path / 'file'}: is a file; choose a folder with --out"


@pytest.mark.parametrize("was_toy", [True, False, None])
@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("toy", [True, False])
def test_a_run_is_only_resumed_and_a_toys_replaced_only_by_the_toy(tmp_path, was_toy, resume, toy):
    empty, held = tmp_path / "empty", tmp_path / "held"
    held.mkdir()
    write_config(held, SETTINGS if was_toy is None else SETTINGS | {"toy": was_toy})
    check_free(empty, [held], resume=resume, toy=toy)                           # a config alone is no run
    for step in 1, 2:
        Log(held, upto=step).write(step=step)
    if bool(was_toy) == toy and (resume or toy):
        check_free(empty, [held], resume=resume, toy=toy)
    else:
        may = bool(was_toy) == toy                              # --resume would go on with it
        said = "a run of 2 steps; continue it with --resume, or choose" if may else "another run of 2 steps; choose"
        assert f"held: already holds {said} another --out" in refusal(check_free, empty, [held], resume=resume, toy=toy)


@pytest.mark.parametrize("was", ["", "sft", "kd", "lr-0.001"])
def test_a_run_is_refused_beside_others_whose_table_it_would_replace(tmp_path, was):
    Log(tmp_path / was).write(step=1)
    write_config(tmp_path / was, SETTINGS)
    for other in set(["", "kd", "lr-0.001", "lr-0.1"]) - {was}:
        for resume in True, False:
            assert "run of 1 steps" in refusal(check_free, tmp_path, [tmp_path / other], resume=resume, toy=False)
    check_free(tmp_path, [tmp_path / was, tmp_path / "lr-0.1"], resume=True, toy=False)    # the same ones, and one more
    check_free(tmp_path / "other", [tmp_path / "other"], resume=False, toy=False)


@pytest.mark.parametrize("folder", ["", "kd"])
def test_a_model_is_not_replaced_by_a_run(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / CONFIG).write_text('{"model_type": "qwen2"}')
    assert "belongs to a model, not to a run; choose another" in refusal(
        check_free, tmp_path, [tmp_path / "kd"], resume=False, toy=False)


@pytest.mark.parametrize("part", ["best", "last"])
def test_a_folder_that_the_run_cannot_write_is_refused_before_it(tmp_path, part, read_only):
    (tmp_path / part).mkdir()
    check_free(tmp_path, [tmp_path], resume=False, toy=False)
    read_only(tmp_path / part)
    assert f"{part}: cannot be written" in refusal(check_free, tmp_path, [tmp_path], resume=False, toy=False)


@pytest.mark.parametrize("part", ["best", "last"])
def test_a_model_that_no_run_wrote_is_not_replaced_by_a_runs_checkpoints(tmp_path, part):
    (tmp_path / part).mkdir()
    (tmp_path / part / CONFIG).write_text('{"model_type": "qwen2"}')
    for runs in [tmp_path], [tmp_path / "kd", tmp_path]:
        assert f"{part}: holds a model, which would be replaced" in refusal(check_free, tmp_path, runs, resume=False, toy=False)
    check_free(tmp_path, [tmp_path / "kd"], resume=False, toy=False)            # a comparison writes below kd/
    (tmp_path / part / CONFIG).rename(tmp_path / part / "notes.txt")
    assert f"{part}: holds files, which would be replaced" in refusal(check_free, tmp_path, [tmp_path], resume=False, toy=False)
    write_config(tmp_path, SETTINGS)                                            # a run that ended before its first log line
    check_free(tmp_path, [tmp_path], resume=False, toy=False)
    for cache in part, f"{part}/cache":
        assert f"{part}, which this run replaces; choose another folder" in refusal(
            check_free, tmp_path, [tmp_path], resume=False, toy=False, cache=tmp_path / cache)
    check_free(tmp_path, [tmp_path], resume=False, toy=False, cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["held-out.jsonl", "table.jsonl", "answers-base.jsonl"])
def test_a_file_of_the_name_that_a_run_writes_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("")
    given = dict(resume=False, toy=False)
    check_free(tmp_path, [tmp_path / "kd"], **given, own=["completions.jsonl"])             # it writes no such file
    for own in name, f"{name[:3]}*.jsonl":
        assert f"{name}: was not written by a run, and would be replaced" in refusal(
            check_free, tmp_path, [tmp_path / "kd"], **given, own=["completions.jsonl", own])
    write_config(tmp_path / "kd", SETTINGS)                                     # then it is a run's
    check_free(tmp_path, [tmp_path / "kd"], **given, own=[name])
    (tmp_path / "kd" / CONFIG).unlink()
    lock(tmp_path)
    check_free(tmp_path, [tmp_path / "kd"], **given, own=[name])


def test_the_folder_that_one_works_in_is_not_to_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "kd/last").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "kd/last")
    assert "last: is or contains the current folder" in refusal(check_free, tmp_path, [tmp_path / "kd"], resume=False, toy=False)


def test_two_processes_do_not_write_runs_into_one_folder(tmp_path):
    with locked_by_another(tmp_path):
        assert "another process is writing a run there" in refusal(begin_run, tmp_path, SETTINGS, resume=False)
        assert not (tmp_path / CONFIG).exists()
    assert begin_run(tmp_path, SETTINGS, resume=False) and begin_run(tmp_path, SETTINGS, resume=False)


@pytest.mark.parametrize("resume, logged, goes_on", [
    (True, [dict(step=1)], True), (True, [], True), (False, [dict(step=1)], False),
    (False, [dict(step=1, done=True)], False), (True, [dict(step=1, done=True), dict(step=2)], True)])
def test_a_state_is_left_only_to_the_run_that_goes_on_from_it(tmp_path, resume, logged, goes_on):
    write_config(tmp_path, SETTINGS)
    log = Log(tmp_path)
    for line in logged:
        log.write(line)
    (tmp_path / STATE).touch()
    if goes_on:                                                                 # also where its log was lost
        assert "--lr 1.0, but the run began with 1e-05" in refusal(begin_run, tmp_path, SETTINGS | {"lr": 1.0}, resume)
    assert begin_run(tmp_path, SETTINGS if goes_on else SETTINGS | {"lr": 1.0}, resume) is True
    assert (tmp_path / STATE).exists() == goes_on and settings_of(tmp_path)["lr"] == (1e-5 if goes_on else 1.0)
    if not goes_on:
        assert not (tmp_path / LOG).exists()                                    # or a kill now, and that run would be "done"
    for _ in range(2):                                                          # the second time there is none
        assert begin_run(tmp_path, SETTINGS, resume=False) and not (tmp_path / STATE).exists()


def test_a_run_that_goes_on_with_other_threads_says_so(tmp_path, capsys):
    write_config(tmp_path, SETTINGS)
    Log(tmp_path).write(step=1)
    (tmp_path / STATE).touch()
    begin_run(tmp_path, SETTINGS, resume=True)
    assert capsys.readouterr().out == ""
    settings = json.loads((tmp_path / CONFIG).read_text())["settings"]
    change_json(tmp_path / CONFIG, versions={"torch": torch.__version__, "threads": 77})
    begin_run(tmp_path, SETTINGS, resume=True)
    assert f"began with threads 77, continues with {torch.get_num_threads()};" in capsys.readouterr().out
    for unsaid in {}, {"versions": None}, {"versions": "x"}:
        (tmp_path / CONFIG).write_text(json.dumps({"settings": settings} | unsaid))
        assert begin_run(tmp_path, SETTINGS, resume=True) and capsys.readouterr().out == ""


def test_a_run_that_is_done_or_had_other_settings_is_left_as_it_is(tmp_path, capsys):
    write_config(tmp_path, SETTINGS)
    Log(tmp_path).write(dict(step=1), dict(step=2, done=True))
    files = {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    (tmp_path / STATE).touch()                                                  # killed before it could remove it
    assert begin_run(tmp_path, SETTINGS, resume=True) is False
    assert capsys.readouterr().out == f"{tmp_path}: done already\n"
    assert "--lr 1.0, but the run began with 1e-05" in refusal(begin_run, tmp_path, SETTINGS | {"lr": 1.0}, resume=True)
    assert files == {path: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
