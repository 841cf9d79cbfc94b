"""The teacher's states on disk: the same numbers, refused where they are another's, completed where they are cut."""
import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import refusal, small
from minikd import run
from minikd import teacher as module
from minikd.checkpoint import load_head, load_model, save_model
from minikd.data import Encoded, collate
from minikd.files import hold, temporary_folder
from minikd.head import head_loss, scored_positions
from minikd.losses import forward_kl
from minikd.model import Qwen2
from minikd.teacher import CachedTeacher, Teacher, fill_cache, plan_shards, teacher_responses


def model(seed=2, **shape) -> Qwen2:
    sizes = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3)
    return small(seed, **sizes | shape).eval().requires_grad_(False)


ROWS = [Encoded([1 + i, 2][:1 + i % 2], [3 + i, 4, 5, 6][:1 + i % 4], False, i) for i in range(30)]
TEACHER, STUDENT = model(), model(1, hidden_size=16, num_attention_heads=2).requires_grad_(True)


@pytest.fixture
def fill(tmp_path, monkeypatch):
    """fill(rows=..., made_from=..., ...) -> tokens computed, in shards of 10 tokens; fill.loads counts teachers."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 10)

    def call(rows=ROWS, made_from=dict(teacher="a"), width=24, batch_size=3, **options):
        return fill_cache(tmp_path / "cache", rows, made_from, load, width, pad_id=0, batch_size=batch_size, **options)

    def load():
        call.loads += 1
        return TEACHER

    call.loads = 0
    return call


def test_cached_states_are_the_teachers_own_in_bfloat16(fill, tmp_path):
    assert fill() == sum(len(row.response) for row in ROWS)
    cached, live = CachedTeacher(tmp_path / "cache", TEACHER.head), Teacher(TEACHER)
    for rows in ROWS[:7], ROWS[::-3], [ROWS[4]]:
        expected = live.states(rows, *collate(rows, 0))
        ours = cached.states(rows, *collate(rows, 0))
        assert ours.dtype == torch.bfloat16 and ours.shape == expected.shape
        torch.testing.assert_close(ours.float(), expected, rtol=2**-8, atol=1e-4)           # one rounding to 8 bits
    sizes = [sum(map(len, load_file(path).values())) for path in sorted((tmp_path / "cache").glob("states-*"))]
    assert len(sizes) > 3 and all(10 <= size < 14 for size in sizes[:-1])       # full, with a last row of 4 at most


def test_a_cache_is_filled_in_the_dtype_that_is_asked_for(tmp_path):
    teacher, rows = small(2).eval().requires_grad_(False), [Encoded([5, 6], [7, 8, 9], False, 0)]
    fill_cache(tmp_path / "cache", rows, dict(teacher="a"), lambda: teacher, 16, 0, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        right = Teacher(teacher).states(rows, *collate(rows, 0)).bfloat16()
    assert torch.equal(CachedTeacher(tmp_path / "cache", teacher.head).states(rows, *collate(rows, 0)), right)


def test_a_shard_holds_rows_of_similar_length():
    rows = [Encoded([1], [2] * (1 + i * 7 % 11), False, i) for i in range(11)]
    planned = plan_shards({row.digest: row for row in rows})
    assert [len(row) for held in planned.values() for row in held.values()] == list(range(2, 13))


def test_loss_and_gradient_with_the_cache_are_those_of_the_live_teacher(fill, tmp_path):
    fill()
    ids, mask = collate(ROWS[:8], 0)
    found = []
    for teacher in Teacher(TEACHER), CachedTeacher(tmp_path / "cache", TEACHER.head):
        states, targets = scored_positions(STUDENT.hidden(ids), ids, mask)
        loss, *_ = head_loss(states, STUDENT.head, targets, teacher.states(ROWS[:8], ids, mask), teacher.head, forward_kl,
                             kd_ratio=1.0, weight=1 / len(targets))
        found.append((loss, torch.autograd.grad(loss, STUDENT.model.layers[0].mlp.up_proj.weight)[0]))
    (loss, grad), (other, other_grad) = found
    assert other.item() == pytest.approx(loss.item(), rel=1e-3)
    assert float((grad - other_grad).norm()) < 5e-3 * float(grad.norm())        # a teacher in float32, its states rounded
    assert not torch.equal(grad, other_grad)


def test_the_states_and_settings_of_a_cache_have_the_same_permissions(fill, tmp_path):
    fill()
    modes = {file.stat().st_mode for file in (tmp_path / "cache").iterdir() if file.suffix in (".safetensors", ".json")}
    assert len(modes) == 1, modes


def test_what_a_kill_left_beside_a_shard_that_is_whole_is_removed(fill, tmp_path):
    """Killed between the renaming and the removal of the temporary folder; or another process has finished the same shard."""
    fill()
    shard = min((tmp_path / "cache").glob("states-*"))
    left, held = temporary_folder(shard)
    shutil.copy(shard, left)
    os.close(held)
    assert fill() == 0 and not left.exists()


def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(fill, tmp_path):
    whole = fill()
    folder = tmp_path / "cache"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shards = sorted(folder.glob("states-*"))
    shards[0].unlink()                                                          # never written
    shards[1].write_bytes(shards[1].read_bytes()[:-5])                          # cut short
    shards[2].write_bytes(b"")                                                  # and to nothing
    shutil.copy(shards[4], shards[3])                                           # another shard's
    kept = shards[5].stat().st_mtime_ns
    made = fill()
    assert 0 < made == sum(len(states) for path in shards[:4] for states in load_file(path).values()) < whole
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert shards[5].stat().st_mtime_ns == kept
    (folder / "states-99999.safetensors").write_bytes(b"half a cop")            # nobody asked for it
    assert CachedTeacher(folder, torch.zeros(1)).states(ROWS[:1], None, None).shape[0] == len(ROWS[0].response)


def test_states_of_another_dtype_are_made_again(fill, tmp_path):
    fill()
    shard = min((tmp_path / "cache").glob("states-*"))
    before, states = shard.read_bytes(), load_file(shard)
    save_file({digest: value.float() for digest, value in states.items()}, shard)
    assert fill() == sum(map(len, states.values())) and shard.read_bytes() == before


def test_a_cache_of_something_else_is_refused_by_name(fill, tmp_path):
    fill()
    for changed, said in ((dict(made_from=dict(teacher="b")), "its teacher is a, here b"),
                          (dict(rows=ROWS[:-1]), "its rows differ"),
                          (dict(made_from=dict(teacher="a", template="alpaca")), "its template is None, here alpaca"),
                          (dict(made_from={}), "its teacher is a, here None")):
        assert f"was made from other data or settings: {said}" in refusal(fill, **changed)
    assert fill() == 0                                                          # and it is still what it was


def test_of_two_processes_that_begin_a_cache_at_once_the_second_sees_what_the_first_made(fill, tmp_path, monkeypatch, capsys):
    """A real process holds the lock, and makes a cache of another teacher once this one waits; without the second look this one
    would go on in it."""
    (tmp_path / "cache").mkdir()
    script = ("import fcntl, sys; file = open('.filling', 'a'); fcntl.flock(file, fcntl.LOCK_EX); print('in', flush=True); "
              "input(); open('cache.json', 'w').write(sys.argv[1])")
    theirs = json.dumps({"made_from": {"teacher": "b"}})
    with subprocess.Popen([sys.executable, "-c", script, theirs], cwd=tmp_path / "cache", stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        lock = fcntl.flock

        def flock(file, how):
            if how == fcntl.LOCK_EX and other.poll() is None and not told:      # it waits now
                told.append(other.stdin.write("go on\n"))
                other.stdin.flush()
            return lock(file, how)

        told = []
        monkeypatch.setattr(fcntl, "flock", flock)
        assert "its teacher is b, here a" in refusal(fill)
    assert fill.loads == 0 and "cache: another process is filling this cache; waiting for it" in capsys.readouterr().out
    assert (tmp_path / "cache/cache.json").read_text() == theirs


def test_filling_a_cache_in_a_runs_own_folder_keeps_the_run_locked(fill, tmp_path):
    """They are two files: on NFS a process loses its lock on a file when it closes any handle of that file."""
    run.lock(tmp_path / "cache")
    fill()
    with pytest.raises(BlockingIOError):                                        # even for this process
        hold(tmp_path / "cache" / run.LOCK)
    run.LOCKS.pop((tmp_path / "cache").resolve()).close()


def test_a_stray_shard_is_not_used(fill, tmp_path):
    fill()
    states = load_file(sorted((tmp_path / "cache").glob("states-*"))[0])
    for stray in "states-99999", "states-00000 (1)":
        save_file({digest: value * 0 for digest, value in states.items()}, tmp_path / f"cache/{stray}.safetensors")
    rows = [row for row in ROWS if row.digest in states]
    assert rows and CachedTeacher(tmp_path / "cache", TEACHER.head).states(rows, *collate(rows, 0)).any(1).all()


def test_a_folder_with_other_files_is_not_taken_for_a_cache(fill, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("!")
    assert "is not empty and not a teacher's cache" in refusal(fill)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.tex"]
    (tmp_path / "cache" / "thesis.tex").rename(tmp_path / "cache" / ".DS_Store")
    assert fill() > 0                                                           # an empty one is


def test_the_order_of_the_rows_and_repeats_do_not_matter_and_each_is_computed_once(fill):
    computed = []
    fill(progress=computed.append, rows=ROWS + ROWS[:2])
    assert sum(computed) == len(ROWS)
    assert fill(rows=ROWS[::-1] + ROWS[:5]) == 0 and fill.loads == 1            # a cache that is whole needs no teacher


def test_the_digest_tells_prompt_from_response():
    assert Encoded([1, 2], [3], False, 0).digest != Encoded([1], [2, 3], False, 0).digest
    assert Encoded([1], [2], False, 0).digest == Encoded([1], [2], True, 9).digest


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_alone_is_the_models_head(tmp_path, tied):
    save_model(model(tie_word_embeddings=tied), tmp_path, shard_bytes=20_000)
    assert torch.equal(load_head(tmp_path, dtype=torch.bfloat16), load_model(tmp_path, dtype=torch.bfloat16).head)


# ---- sequence-level KD

@pytest.fixture
def respond(tmp_path, tokenizer):
    return lambda rows=ROWS, made_from=dict(teacher="a"), seed=0, load=lambda: TEACHER, **options: teacher_responses(
        tmp_path / "answers.jsonl", load, rows, made_from, tokenizer, seed=seed, **dict(batch_size=1, max_new_tokens=4) | options)


def test_the_teachers_answers_take_the_place_of_the_datas(respond, tokenizer):
    own = respond()
    assert [(row.prompt, row.index) for row in own] == [(row.prompt, row.index) for row in ROWS]
    assert all(row.response != old.response and 1 <= len(row.response) <= 4 for row, old in zip(own, ROWS))
    assert all(row.cut == (row.response[-1] not in tokenizer.eos_ids) for row in own)


def test_every_part_draws_other_answers(respond):
    own = respond(rows=[ROWS[0]] * 24, load=lambda: TEACHER, max_new_tokens=12)  # written by eights
    assert len({tuple(row.response) for row in own}) > 20


def test_answers_cut_off_by_a_kill_are_completed_to_the_same(respond, tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = respond()
    text = path.read_bytes()
    lines = text.split(b"\n")
    for kept in 0, 1, 9, 12, 30:
        path.write_bytes(b"".join(line + b"\n" for line in lines[:kept]) + b'{"ids": [1')
        asked = []
        assert respond(progress=asked.append) == whole and path.read_bytes() == text
        assert sum(asked) == 30 - max(0, kept - 1) // 8 * 8                     # 8 answers are written at a time
    assert respond(load=lambda: pytest.fail("all of them are there")) == whole


def test_answers_of_another_teacher_or_to_other_prompts_are_refused(respond):
    respond()
    for changed, said in ((dict(made_from=dict(teacher="b")), "their teacher is a, here b"), (dict(rows=ROWS[1:]), "their rows"),
                          (dict(seed=1), "their seed is 0, here 1"), (dict(batch_size=2), "their batch_size is 1, here 2"),
                          (dict(max_new_tokens=5), "their max_new_tokens is 4, here 5"),
                          (dict(made_from={}), "their teacher is a, here None")):
        assert said in refusal(respond, **changed)


@pytest.mark.parametrize("line", ['{"ids": []}', '{"ids": [400]}', '{"ids": [-1]}', '{"ids": [5.0]}', '{"ids": null}', "ÿ",
                                  "[" * 9999])
def test_answers_without_ids_of_the_tokenizer_are_refused(respond, tmp_path, line):
    respond()
    path = tmp_path / "answers.jsonl"
    first, second, *more = path.read_text().splitlines()
    for lines in [first, line, *more], [first, second, line], [first, second, *more, second]:      # the last: one too many
        path.write_text("\n".join(lines) + "\n", encoding="latin-1")            # ÿ: a byte that is not UTF-8
        said = refusal(respond)
        assert "holds a damaged line (" in said and said.endswith("delete the file, and it will be made again")


def test_an_answers_ids_may_be_the_tokenizers_last_and_no_later_one(respond, tokenizer, tmp_path):
    respond(rows=ROWS[:1])
    first, _ = (tmp_path / "answers.jsonl").read_text().splitlines()
    for id, good in (len(tokenizer) - 1, True), (len(tokenizer), False):
        (tmp_path / "answers.jsonl").write_text(f'{first}\n{{"ids": [{id}]}}\n')
        if good:
            assert respond(rows=ROWS[:1])[0].response == [id]
        else:
            assert "damaged line" in refusal(respond, rows=ROWS[:1])
