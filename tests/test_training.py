"""What two training loops share: the schedule as a slow formula, and a state that comes back bit for bit."""
import argparse
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from minikd.files import InputError
from minikd.model import Qwen2, Qwen2Config
from minikd.training import (CONFIG, LOG, STATE, Log, Progress, check_positive, check_settings, learning_rate,
                             load_state, make_optimizer, pick_device, pick_dtype, read_log, save_state, spare_threads,
                             write_config)

IDS = torch.arange(24).view(2, 12)


def small_model(seed=1, **shape) -> Qwen2:
    sizes = dict(vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2)
    return Qwen2(Qwen2Config(**sizes | shape)).init_weights(seed)


def take_steps(model, optimizer, count: int):
    for _ in range(count):
        torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- the schedule and the optimizer

@pytest.mark.parametrize("steps, warmup", [(10, 0), (10, 3), (7, 6), (1, 0)])
def test_the_rate_climbs_in_a_line_and_falls_as_a_cosine_to_a_tenth(steps, warmup):
    for step in range(steps):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            angle = math.pi * (step - warmup) / (steps - warmup)
            expected = 0.1 + 0.9 * (math.cos(angle) + 1) / 2
        assert learning_rate(step, steps, 2.0, warmup, "cosine") == pytest.approx(2.0 * expected, rel=1e-12)


def test_the_rate_starts_above_nothing_reaches_its_peak_and_never_falls_under_a_tenth():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0.1 < rates[-1] < 0.101


def test_a_constant_rate_stays_after_its_warm_up():
    assert [learning_rate(step, 6, 4.0, 2, "constant") for step in range(6)] == [2.0, 4.0, 4.0, 4.0, 4.0, 4.0]


def test_matrices_are_decayed_and_biases_and_norms_are_not():
    model = small_model()
    groups = make_optimizer(model, 0.5, weight_decay=0.3).param_groups
    sets = {group["weight_decay"]: {id(p) for p in group["params"]} for group in groups}
    for name, parameter in model.named_parameters():
        plain = name.endswith("bias") or "norm" in name
        assert id(parameter) in sets[0.0 if plain else 0.3], name
    assert len(sets[0.0] | sets[0.3]) == len(list(model.parameters()))          # the tied head once
    assert all(group["lr"] == 0.5 and group["betas"] == (0.9, 0.95) for group in groups)


def test_decay_alone_moves_a_matrix_and_leaves_a_norm():
    model = small_model()
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = 1 - 0.1 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * shrunk, msg=name)


# ---- device, dtype, numbers

def test_auto_takes_a_gpu_where_there_is_one_and_a_named_dtype_is_taken_at_its_word():
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_dtype("float32", "cuda") == torch.float32 and pick_dtype("bfloat16", "cpu") == torch.bfloat16
    assert pick_dtype("auto", "cuda:0") == torch.bfloat16


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there_is_one_line(name):
    with pytest.raises(InputError, match=f"--device {name}: .*; use --device cpu") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), [1e-3, 0.0]])
def test_a_number_that_must_be_above_zero_is_named_by_its_flag(value):
    check_positive(argparse.Namespace(batch_size=1, grad_accum=None, lr=[1e-5]), "batch_size", "grad_accum", "lr")
    with pytest.raises(InputError, match="--batch-size .*: must be above 0"):
        check_positive(argparse.Namespace(batch_size=value), "batch_size")


# ---- the log

def test_a_log_is_one_object_a_line_from_the_moment_it_is_written(tmp_path):
    log = Log(tmp_path)
    log.write(step=1, ce=2.5)
    assert read_log(tmp_path) == [{"step": 1, "ce": 2.5}]
    log.write(step=2, said="¿Qué?")
    assert json.loads((tmp_path / LOG).read_text(encoding="utf-8").splitlines()[1]) == {"step": 2, "said": "¿Qué?"}


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


def test_a_run_that_begins_anew_has_a_log_of_its_own(tmp_path):
    Log(tmp_path).write(step=1)
    Log(tmp_path)
    assert read_log(tmp_path) == []


def test_a_last_line_that_a_kill_cut_is_left_out_even_within_a_letter(tmp_path):
    line = '{"step": 2, "said": "¿Qué?"}\n'.encode()
    for cut in range(1, len(line)):
        (tmp_path / LOG).write_bytes(b'{"step": 1}\n' + line[:cut])
        assert read_log(tmp_path) == [{"step": 1}]
    Log(tmp_path, upto=1).write(step=2)
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}]                     # and the next line starts on its own


def test_no_run_has_no_log(tmp_path):
    assert read_log(tmp_path / "nowhere") == []


# ---- the state

@pytest.mark.parametrize("tied", [True, False])
def test_a_state_comes_back_bit_for_bit_moments_and_all(tmp_path, tied):
    model = small_model(tie_word_embeddings=tied)
    optimizer = make_optimizer(model, 0.01)
    take_steps(model, optimizer, 3)
    save_state(tmp_path, model, optimizer, {"step": 3, "best": 41.5}, {"ids": torch.arange(5)})
    other = small_model(seed=2, tie_word_embeddings=tied)
    fresh = make_optimizer(other, 0.01)
    facts, more = load_state(tmp_path, other, fresh)
    assert facts == {"step": 3, "best": 41.5} and more.keys() == {"ids"} and more["ids"].tolist() == list(range(5))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        moments, again = optimizer.state[mine], fresh.state[theirs]
        assert set(moments) == set(again) == {"step", "exp_avg", "exp_avg_sq"} and moments["exp_avg_sq"].any()
        assert all(torch.equal(moments[key], again[key]) and moments[key].dtype == again[key].dtype for key in moments)
    take_steps(model, optimizer, 3)
    take_steps(other, fresh, 3)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), other.parameters()))


def test_a_state_is_one_file_that_replaces_the_one_before(tmp_path):
    model = small_model()
    optimizer = make_optimizer(model, 0.01)
    for step in 1, 2:
        take_steps(model, optimizer, 1)
        save_state(tmp_path, model, optimizer, {"step": step})
    assert [path.name for path in tmp_path.iterdir()] == [STATE]
    assert float(load_file(tmp_path / STATE)["optimizer.0.step"]) == 2
    assert load_state(tmp_path, small_model(), make_optimizer(small_model(), 0.01))[0]["step"] == 2


@pytest.mark.parametrize("shape, named", [(dict(num_hidden_layers=3), "layers.2"),
                                          (dict(num_hidden_layers=1), "layers.1"),
                                          (dict(intermediate_size=16), "mlp.down_proj"),
                                          (dict(intermediate_size=1), "mlp.down_proj"),     # would broadcast
                                          (dict(tie_word_embeddings=False), "lm_head")])
def test_a_state_of_another_model_is_refused_in_one_line_and_nothing_is_touched(tmp_path, shape, named):
    model = small_model()
    save_state(tmp_path, model, make_optimizer(model, 0.01), {"step": 1})
    other = small_model(seed=2, **shape)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(InputError, match=f"{STATE}: belongs to another model .*{named}.*; start again") as error:
        load_state(tmp_path, other, make_optimizer(other, 0.01))
    assert "\n" not in str(error.value)
    assert all(torch.equal(was, now) for was, now in zip(before, other.parameters()))


def test_a_state_cut_short_is_named(tmp_path):
    model = small_model()
    save_state(tmp_path, model, make_optimizer(model, 0.01), {"step": 1})
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:-50])
    with pytest.raises(InputError, match=f"{STATE}: is damaged .*; start again"):
        load_state(tmp_path, model, make_optimizer(model, 0.01))


def test_small_matrices_are_not_shared_between_threads(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    spare_threads(Qwen2Config(hidden_size=896, num_attention_heads=14, num_key_value_heads=2))
    assert asked == []
    spare_threads(Qwen2Config(hidden_size=128, num_attention_heads=4, num_key_value_heads=2))
    assert asked == [1]


# ---- the settings

SETTINGS = {"kd_ratio": 0.5, "data": ["a.jsonl"], "dtype": torch.float32, "teacher": None, "lr": 1e-5}


def test_the_settings_are_written_with_the_versions_that_ran_them(tmp_path):
    write_config(tmp_path, SETTINGS)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["settings"] == SETTINGS | {"dtype": "torch.float32"}
    assert written["versions"]["torch"] == torch.__version__
    assert set(written["versions"]) >= {"python", "commit", "threads"}


def test_the_same_settings_may_resume_and_others_are_named_as_the_flag_and_both_values(tmp_path):
    write_config(tmp_path, SETTINGS)
    check_settings(tmp_path, SETTINGS)
    with pytest.raises(InputError, match="--kd-ratio 0.7, but the run began with 0.5; give the same flags"):
        check_settings(tmp_path, SETTINGS | {"kd_ratio": 0.7})
    with pytest.raises(InputError, match=r"--data \['b.jsonl'\], but the run began with \['a.jsonl'\]"):
        check_settings(tmp_path, SETTINGS | {"data": ["b.jsonl"]})


def test_a_models_own_config_is_not_replaced_by_a_runs(tmp_path):
    (tmp_path / CONFIG).write_text('{"model_type": "qwen2"}')
    with pytest.raises(InputError, match="belongs to a model, not to a run.*choose another --out"):
        write_config(tmp_path, SETTINGS)
    assert (tmp_path / CONFIG).read_text() == '{"model_type": "qwen2"}'


# ---- progress

def test_progress_in_a_log_is_plain_lines_now_and_then(capsys):
    with Progress("KD", total=10, start=4, every=0.0) as progress:
        progress.update("ce 2.5")
        progress.update(by=3)
        progress.say("a sample answer")
    out, err = capsys.readouterr()
    assert err == "KD 5/10 ce 2.5\nKD 8/10 \n" and out == "a sample answer\n"
    with Progress("KD", total=10, every=60.0) as progress:
        for _ in range(10):
            progress.update()
    assert capsys.readouterr().err == ""                                        # not a line a step


def test_progress_on_a_terminal_is_a_bar_that_counts_to_its_total(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("KD", total=10, start=4) as progress:
        progress.update("ce 2.5", by=6)
        assert progress.bar.n == progress.bar.total == 10
    assert "KD" in capsys.readouterr().err
