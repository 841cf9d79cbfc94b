"""eval_rouge.py on a model and data, and on two files: the same numbers by hand."""
import errno
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import eval_rouge
from conftest import files_in, passed, records_in, refusal, refused, tiny
from minikd.checkpoint import load_model
from minikd.data import encode_examples, prompt_text
from minikd.evaluate import answer, read_predictions, read_references
from minikd.examples import load_examples
from minikd.generate import generate
from minikd.rouge import rouge_l
from minikd.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[1] / "eval_rouge.py"

# Three answers whose scores are counted on the fingers: F1 = 2 LCS / (words of both).
PREDICTIONS = ["the cat sat", "a dog", "It is Rome."]           # LCS 2 of 3+4; 0 of 2+2; 3 of 3+3
RECORDS = [{"instruction": "Who?", "response": "the cat has sat", "category": "pets"},
           {"instruction": "And who?", "response": "two cats", "category": "pets"},
           {"instruction": "Where?", "response": "it is Rome", "category": "places"}]
TABLE = """\
ROUGE-L (stemmer) and exact match, x 100
category  examples        ROUGE-L    exact match
pets             2           42.9            0.0
places           1          100.0          100.0
all              3           61.9           33.3
"""                                                             # (6/7 + 0) / 2 and (6/7 + 0 + 1) / 3


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if path.suffix == ".txt" else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(shell, monkeypatch, tmp_path):
    """run(*flags) -> (exit status, stdout, stderr), in an empty folder."""
    def call(*flags):
        monkeypatch.chdir(tmp_path)
        return shell(eval_rouge, *flags)
    return call


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """student/, a tiny model, and data.jsonl, a dozen questions in two categories."""
    folder = tmp_path_factory.mktemp("world")
    tiny(1, tokenizer, folder / "student", initializer_range=0.5)
    write(folder / "data.jsonl", [{"instruction": f"Say {'no ' * (5 * i % 12)}", "response": f"n{i} s t u",
                                   "category": "ab"[i % 2]} for i in range(12)])
    return folder


# ---- two files

@pytest.mark.parametrize("ending, wrap", [
    (".txt", str), (".jsonl", str), (".jsonl", lambda text: {"prediction": text}),
    (".jsonl", lambda text: {"text": text}), (".jsonl", lambda text: {"id": 7, "response": text}),
    (".jsonl", lambda text: {"prediction": None, "output": text}), (".jsonl", lambda text: {"prediction": text, "text": None})])
def test_two_files_give_the_table_that_is_counted_by_hand(run, tmp_path, ending, wrap):
    predictions = write(tmp_path / f"answers{ending}", list(map(wrap, PREDICTIONS)))
    references = write(tmp_path / "test.jsonl", RECORDS)
    assert TABLE in passed(run("--predictions", predictions, "--references", references))
    assert [(row["prediction"], row["f1"], row["exact_match"]) for row in records_in("runs/eval/answers.jsonl")] == [
        ("the cat sat", pytest.approx(6 / 7), False), ("a dog", 0.0, False), ("It is Rome.", 1.0, True)]


def test_json_and_csv_are_read_as_jsonl_is(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PREDICTIONS))
    (tmp_path / "a.csv").write_text('prediction,n\n"the cat sat",1\n"a dog",2\n"It is Rome.",3\n')
    assert read_predictions(tmp_path / "a.json") == read_predictions(tmp_path / "a.csv") == PREDICTIONS


def test_what_the_scripts_write_is_both_the_predictions_and_the_references(run, tmp_path):
    predictions, references = write(tmp_path / "p.txt", PREDICTIONS), write(tmp_path / "r.jsonl", RECORDS)
    assert run("--predictions", predictions, "--references", references, "--out", "first.jsonl")[0] == 0
    assert TABLE in passed(run("--predictions", "first.jsonl", "--references", "first.jsonl", "--out", "second.jsonl"))
    keys = {"where", "category", "precision", "recall", "f1", "exact_match", "prediction", "references"}
    first, second = records_in("first.jsonl"), records_in("second.jsonl")
    assert set(first[0]) == keys and [row | {"where": ""} for row in first] == [row | {"where": ""} for row in second]
    assert first[1]["where"] == f"{references}:2"


@pytest.mark.parametrize("record, references, category", [
    ({"references": ["a", "b"], "category": "x"}, ("a", "b"), "x"), ({"reference": "a"}, ("a",), ""),
    ({"instruction": "?", "output": ["a", "b"]}, ("a", "b"), "alpaca"), ({"output": ["a", "b"]}, ("a", "b"), ""),
    ({"response": "a"}, ("a",), ""), ("a", ("a",), ""), (["a", "b"], ("a", "b"), ""),
    ({"text": "a b"}, ("a b",), ""), ({"response": None, "output": "c", "text": "d"}, ("c",), ""),
    ({"fail": "x = 1", "pass": "x = 2"}, ("x = 2",), "bugnet"),
    ({"instruction": "?", "response": "a", "references": ["b"]}, ("b",), "")])
def test_references_are_a_list_a_text_or_what_the_record_is_trained_on(tmp_path, record, references, category):
    [_, example] = read_references(write(tmp_path / "r.jsonl", [record, record]))
    assert (example.references, example.category, example.where) == (references, category, f"{tmp_path}/r.jsonl:2")


def test_a_format_that_is_named_decides_what_the_reference_is(tmp_path):
    path = write(tmp_path / "r.jsonl", [{"instruction": "?", "response": "a", "references": ["b"]}])
    assert read_references(path, format="dolly")[0].references == ("a",)
    assert "r.jsonl:1: field 'fail' is missing" in refusal(read_references, path, format="bugnet")


def test_the_best_of_several_references_counts(run, tmp_path):
    run("--predictions", write(tmp_path / "p.txt", ["one two"]),
        "--references", write(tmp_path / "r.jsonl", [{"references": ["three", "one two four", "one"]}]))
    assert records_in("runs/eval/answers.jsonl")[0]["f1"] == pytest.approx(4 / 5)


def test_a_text_file_is_an_answer_a_line_an_empty_one_included(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffuno\r\n\r\nvector<n> x\n".encode())
    assert read_predictions(tmp_path / "p.txt") == ["uno", "", "vector<n> x"]   # <n> stays: it may be what was said
    assert [example.where for example in read_references(tmp_path / "p.txt")] == [f"{tmp_path}/p.txt:{i}" for i in (1, 2, 3)]
    (tmp_path / "p.txt").write_text("\n")
    assert read_predictions(tmp_path / "p.txt") == [""]
    (tmp_path / "p.txt").write_text("")                                         # a job that failed
    assert "p.txt: holds no records" in refusal(read_predictions, tmp_path / "p.txt")


@pytest.mark.parametrize("words, predicted, wanted, expected", [
    ("plain", "the running", "the runs", 50.0), ("stemmer", "the running", "the runs", 100.0),
    ("plain", "qué", "quá", 100.0), ("unicode", "qué", "quá", 0.0)])
def test_the_words_of_rouge_are_a_choice(run, tmp_path, words, predicted, wanted, expected):
    """Stems of English words agree; of 'qué' and 'quá' plain words are 'qu', unicode words are all of them."""
    _, out, _ = run("--rouge", words, "--predictions", write(tmp_path / "p.txt", [predicted]),
                    "--references", write(tmp_path / "r.txt", [wanted]))
    assert f"ROUGE-L ({words})" in out and out.split("all")[1].split()[:2] == ["1", f"{expected:.1f}"]


# ---- a model and data

def test_the_models_own_answers_are_asked_for_and_scored(run, world, tokenizer):
    out = passed(run("--model", world / "student", "--data", world / "data.jsonl", "--max-new-tokens", 6,
                     "--batch-size", 5, "--dtype", "float32", "--rouge", "plain"))
    rows, (examples, _) = records_in(world / "student/answers.jsonl"), load_examples(world / "data.jsonl")
    model = load_model(world / "student")
    for row, example in zip(rows, examples, strict=True):                       # in the data's order, one at a time
        ids = generate(model, [tokenizer.encode(prompt_text(example, tokenizer))], 6, eos_ids=tokenizer.eos_ids)[0]
        assert row["prediction"] == tokenizer.decode(ids).strip() and row["where"] == example.where
        assert (row["precision"], row["recall"], row["f1"]) == rouge_l(row["prediction"], example.response)
    mean = 100 * statistics.fmean(row["f1"] for row in rows)
    assert out.split("\nall")[1].split()[:2] == ["12", f"{mean:.1f}"]
    assert [line.split()[:2] for line in out.splitlines() if line[:2] in ("a ", "b ")] == [["a", "6"], ["b", "6"]]


def test_a_link_in_a_models_folder_is_not_written_through(run, world, tmp_path):
    """In a folder from elsewhere it may lead to any file."""
    shutil.copytree(world / "student", tmp_path / "model")
    (tmp_path / "profile").write_text("mine")
    (tmp_path / "model" / "answers.jsonl").unlink(missing_ok=True)              # of another test
    (tmp_path / "model" / "answers.jsonl").symlink_to(tmp_path / "profile")
    passed(run("--model", tmp_path / "model", "--data", world / "data.jsonl", "--max-new-tokens", 2, "--limit", 2))
    assert (tmp_path / "profile").read_text() == "mine" and len(records_in(tmp_path / "runs/eval/answers.jsonl")) == 2


def test_beside_a_model_in_a_folder_that_cannot_be_written_the_scores_go_into_runs(run, world, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != world / "student")
    status, out, _ = run("--model", world / "student", "--data", world / "data.jsonl", "--max-new-tokens", 2)
    assert status == 0 and len(records_in("runs/eval/answers.jsonl")) == 12


def test_seeds_give_a_mean_and_a_spread_and_the_same_answers_again(run, world):
    flags = ["--model", world / "student", "--data", world / "data.jsonl", "--max-new-tokens", 6, "--dtype", "float32",
             "--temperature", 1, "--rouge", "plain"]
    out = passed(run(*flags, "--seeds", 10, 20, 30, "--out", "three.jsonl"))
    assert "standard deviation of 3 seeds" in out
    rows = records_in("three.jsonl")
    rounds = {seed: [row for row in rows if row["seed"] == seed] for seed in (10, 20, 30)}
    assert [len(part) for part in rounds.values()] == [12, 12, 12]
    assert len({tuple(row["prediction"] for row in part) for part in rounds.values()}) == 3
    means = [100 * statistics.fmean(row["f1"] for row in part) for part in rounds.values()]
    assert f"{statistics.fmean(means):.1f} ± {statistics.stdev(means):.1f}" in out.split("\nall")[1]
    run(*flags, "--seed", 20, "--out", "one.jsonl")
    assert records_in("one.jsonl") == rounds[20]
    run(*flags, "--seed", 20, "--out", "strict.jsonl", "--no-repeat-ngram-size", 1)
    model, tokenizer = load_model(world / "student"), Tokenizer.load(world / "student")
    rows, _ = encode_examples(load_examples(world / "data.jsonl")[0], tokenizer)
    assert [row["prediction"] for row in records_in("strict.jsonl")] == answer(
        model, tokenizer, rows, 6, 16, 1.0, seed=20, no_repeat_ngram_size=1) != [row["prediction"] for row in rounds[20]]
    run(*flags, "--limit", 2, "--out", "default.jsonl")
    assert [row["seed"] for row in records_in("default.jsonl")] == [10, 10, 20, 20, 30, 30, 40, 40, 50, 50]  # MiniLLM's


def test_prompts_that_are_too_long_are_left_out_and_counted(run, world, tokenizer):
    examples, _ = load_examples(world / "data.jsonl")
    longest = sorted(len(tokenizer.encode(prompt_text(example, tokenizer))) for example in examples)[7]
    status, out, err = run("--model", world / "student", "--data", world / "data.jsonl", "--max-new-tokens", 2,
                           "--max-prompt-length", longest, "--out", "short.jsonl")
    assert status == 0 and "; 4 dropped: prompt too long" in out and len(records_in("short.jsonl")) == 8, err


# ---- as a shell sees it

def test_with_no_flags_and_no_toy_student_it_says_what_to_run_first(run, tmp_path):
    assert run() == (2, "", "error: runs/toy/kd/best: no toy student yet; run train_kd.py first, "
                            "or give --model and --data\n")
    assert list(tmp_path.iterdir()) == []


def test_the_script_prints_the_table_and_where_every_example_is(tmp_path):
    write(tmp_path / "p.txt", PREDICTIONS), write(tmp_path / "r.jsonl", RECORDS)
    done = subprocess.run([sys.executable, SCRIPT, "--predictions", "p.txt", "--references", "r.jsonl"], cwd=tmp_path,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"\n{TABLE}\nscores of every example in runs/eval/answers.jsonl\n"


@pytest.mark.parametrize("flags, said", [
    (["--predictions", "p.txt"], "error: --predictions: give --model and --data, for"),
    (["--data", "r.jsonl"], "error: --data: give --model and --data, for"),
    (["--model", "m", "--data", "r.jsonl", "--predictions", "p.txt", "--references", "r.jsonl"],
     "--model --data --predictions --references: give"),
    (["--model", "m", "--references", "r.jsonl"], "--model --references: give"),
    (["--predictions", "p.txt", "--references", "two.txt"], "p.txt: has 3 predictions, but two.txt has 2 references"),
    (["--predictions", "none.txt", "--references", "r.jsonl"], "none.txt: no such file"),
    (["--predictions", "p.txt", "--references", "wrong.jsonl"], "wrong.jsonl:2: has none of the fields references"),
    (["--predictions", "number.jsonl", "--references", "r.jsonl"], "number.jsonl:1: text is an int; make it text"),
    (["--predictions", "half.jsonl", "--references", "r.jsonl"], "half.jsonl:1: text holds half a character"),
    (["--predictions", "null.jsonl", "--references", "r.jsonl"], "null.jsonl:1: prediction is null; make it text"),
    (["--predictions", "latin.txt", "--references", "r.jsonl"], "latin.txt:2: is not UTF-8"),
    (["--predictions", "p.txt", "--references", "empty.jsonl"], "empty.jsonl:1: references is an empty list"),
    (["--predictions", "p.txt", "--references", "r.jsonl", "--out", "./p.txt"], "is one of the files to read"),
    (["--predictions", "p.txt", "--references", "r.jsonl", "--out", "r.jsonl"], "is one of the files to read"),
    (["--predictions", "p.txt", "--references", "r.jsonl", "--out", "d"], "--out d: exists and is not a .jsonl file"),
    (["--model", "m", "--data", "r.jsonl", "--out", "two.txt"], "two.txt: exists and is not a .jsonl file"),
    (["--model", "m", "--data", "n\udcff"], "is not UTF-8; rename"),
    (["--model", "~nobody-here/m", "--data", "~nobody-here/r.jsonl"], "give another path"),
    (["--predictions", "p.txt", "--references", "odd.jsonl"], "odd.jsonl:1: field 'category' holds half a character"),
    (["--predictions", "p.txt", "--references", "mixed.jsonl"], "mixed.jsonl:1: references is an int; make it text"),
    (["--model", "m", "--data", "d", "--out", "d/r.jsonl"], "is one of the files to read"),
    (["--model", "m", "--data", "d:*.jsonl", "--out", "d/r.jsonl"], "is one of the files to read"),
    (["--model", "no/such/model", "--data", "r.jsonl"], "no/such/model: no such folder"),
    (["--model", "m", "--data", "r.jsonl", "--seeds", "1", "2"], "--seeds with --temperature 0"),
    (["--model", "m", "--data", "r.jsonl", "--temperature", "1", "--seeds", "5", "5"], "two are the same"),
    (["--model", "m", "--data", "r.jsonl", "--temperature", "1", "--top-p", "0"], "--top-p 0.0: must be above 0"),
    (["--model", "m", "--data", "r.jsonl", "--temperature", "1", "--top-p", "1.1"], "--top-p 1.1: is a probability")])
def test_bad_input_is_one_line_that_says_what_and_where(run, tmp_path, flags, said):
    write(tmp_path / "p.txt", PREDICTIONS), write(tmp_path / "two.txt", PREDICTIONS[:2])
    write(tmp_path / "r.jsonl", RECORDS), write(tmp_path / "wrong.jsonl", [RECORDS[0], {"answer": "a"}, RECORDS[2]])
    write(tmp_path / "number.jsonl", [{"text": 3}]), write(tmp_path / "empty.jsonl", [{"references": []}])
    write(tmp_path / "half.jsonl", [{"text": "\ud83d"}]), write(tmp_path / "null.jsonl", [{"prediction": None}])
    write(tmp_path / "odd.jsonl", [{"reference": "a", "category": "\ud83d"}] * 3)
    write(tmp_path / "mixed.jsonl", [{"references": ["a", 3]}] * 3)
    (tmp_path / "latin.txt").write_bytes("uno\naño\ndos\n".encode("latin-1"))
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "r.jsonl", RECORDS)
    before = files_in(tmp_path)
    refused(run(*flags), said)
    assert files_in(tmp_path) == before


def test_the_table_is_printed_though_the_disk_is_full(run, tmp_path, monkeypatch):
    def full(rows, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(eval_rouge, "write_jsonl", full)
    (tmp_path / "a.txt").write_text("a b\n")
    status, out, err = run("--predictions", tmp_path / "a.txt", "--references", tmp_path / "a.txt")
    assert status == 2 and "all" in out and "100.0" in out and "scores of every" not in out
    assert "No space left on device; free some space" in err and err.count("\n") == 1


def test_the_scores_are_written_though_nobody_reads_the_table(run, tmp_path, monkeypatch):
    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(eval_rouge, "show_table", closed)
    (tmp_path / "a.txt").write_text("a b\n")
    assert run("--predictions", tmp_path / "a.txt", "--references", tmp_path / "a.txt")[0] == 2
    assert len(records_in("runs/eval/answers.jsonl")) == 1


def test_an_int8_head_gives_most_answers_that_the_head_gives(int8, run, world):
    flags = "--model", world / "student", "--data", world / "data.jsonl", "--dtype", "float32", "--max-new-tokens", 12
    assert run(*flags, "--batch-size", 2, "--out", "plain.jsonl")[0] == 0
    assert run(*flags, "--batch-size", 2, "--out", "int8.jsonl", "--int8-head")[0] == 0
    plain, rounded = read_predictions("plain.jsonl"), read_predictions("int8.jsonl")
    assert sum(map(str.__eq__, plain, rounded)) >= len(plain) / 2               # a near tie may fall the other way


def test_flags_that_do_nothing_are_named(run, tmp_path):
    write(tmp_path / "p.txt", PREDICTIONS)
    status, _, err = run("--predictions", "p.txt", "--references", "p.txt", "--limit", 1, "--top-k", 0)
    assert status == 0 and err == "note: ignored with answers in a file: --limit --top-k\n"


def test_top_k_and_top_p_reach_the_sampling(run, world):
    flags = ("--model", world / "student", "--data", world / "data.jsonl", "--max-new-tokens", 6, "--rouge", "plain",
             "--dtype", "float32")      # in bfloat16, `auto` on some CPUs, several tokens can be as likely as the likeliest
    sampled, answers = ("--temperature", 1, "--seeds", 3), {}
    for name, more in ("greedy", ()), ("free", sampled), ("k", (*sampled, "--top-k", 1)), ("p", (*sampled, "--top-p", 1e-6)):
        passed(run(*flags, *more, "--out", f"{name}.jsonl"))
        answers[name] = read_predictions(Path(f"{name}.jsonl"))
    assert answers["k"] == answers["p"] == answers["greedy"] != answers["free"]


def test_ways_and_the_int8_heads_limit_are_said(run, world, monkeypatch, int8):
    seen, rows = [], eval_rouge.INT8_ROWS
    monkeypatch.setattr(eval_rouge, "show_ways", seen.append)
    flags = ("--model", world / "student", "--data", world / "data.jsonl", "--max-new-tokens", 1, "--out", "a.jsonl",
             "--dtype", "float32", "--int8-head", "--batch-size")
    assert "note: --int8-head is used for fewer than" in passed(run(*flags, rows, "--show-ways")) and len(seen) == 1
    assert "--int8-head" not in passed(run(*flags, rows - 1)) and len(seen) == 1


def test_of_a_file_without_a_known_ending_it_says_that_txt_is_one(shell, tmp_path):
    (tmp_path / "a.md").write_text("yes\n")
    refused(shell(eval_rouge, "--predictions", tmp_path / "a.md", "--references", tmp_path / "a.md"), "a.md", ".parquet", ".txt")
