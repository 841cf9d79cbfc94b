"""Files -> examples: what is counted, skipped and hashed; the split."""
import gzip
import json
import subprocess
from types import SimpleNamespace

import pytest

from conftest import BUGNET, DOLLY, PYTORRENT, write_records
from minikd.errors import InputError
from minikd.examples import hold_out, load_examples, load_texts, split_examples
from minikd.formats import to_example


# ---- files

def test_record_that_lost_a_field_is_judged_as_the_record_before_it(tmp_path):
    file = write_records(tmp_path / "d.jsonl", DOLLY, {"instruction": "i"})
    with pytest.raises(InputError, match="d.jsonl:2: field 'response' is missing"):
        load_examples(file)


def test_skipped_records_are_counted_and_the_first_is_shown(tmp_path):
    file = write_records(tmp_path / "d.jsonl", {"summary": "s"}, PYTORRENT, {**PYTORRENT, "summary": None, "docstring": None})
    examples, report = load_examples(file, format="pytorrent")
    assert (len(examples), report.read, report.dropped) == (1, 3, {"malformed": 2})
    assert "1 of 3 records kept (dropped: 2 malformed)" in str(report) and "d.jsonl:1" in report.first_bad
    assert "d.jsonl:1" in str(report).splitlines()[1] and "malformed" not in str(load_examples(write_records(file, DOLLY))[1])


@pytest.mark.parametrize("first", ['{"docstring": "d"}', '{"zz": 1}', 'no JSON'])
def test_what_is_malformed_before_a_files_first_whole_record_needs_the_format_to_be_skipped(tmp_path, first):
    (tmp_path / "p.jsonl").write_text(f"{first}\n{json.dumps(PYTORRENT)}\n")
    with pytest.raises(InputError, match="p.jsonl:1: "):
        load_examples(tmp_path / "p.jsonl")
    examples, report = load_examples(tmp_path / "p.jsonl", "pytorrent")
    assert len(examples) == report.dropped["malformed"] == 1


def test_a_bad_line_between_two_formats_is_judged_by_the_one_before(tmp_path):
    lines = [json.dumps(PYTORRENT), "no JSON", json.dumps(DOLLY)]
    (tmp_path / "both.jsonl").write_text("\n".join(lines))
    assert len(load_examples(tmp_path / "both.jsonl")[0]) == 2
    (tmp_path / "both.jsonl").write_text("\n".join(reversed(lines)))
    with pytest.raises(InputError, match="both.jsonl:2: not JSON"):
        load_examples(tmp_path / "both.jsonl")


def test_corrupt_lines_are_skipped_and_counted_in_pytorrent_alone(tmp_path):
    good = json.dumps(PYTORRENT)
    shard = tmp_path / "shard.jsonl.gz"
    with gzip.open(shard, "wt") as handle:
        handle.write("\n".join([good, good[:50], '{"summary": null, "code": "x"}', good]))
    examples, report = load_examples(shard)
    assert [example.where[-1] for example in examples] == ["1", "4"]
    assert (report.read, report.kept, report.dropped["malformed"]) == (4, 2, 2)
    (tmp_path / "later.jsonl").write_text(good[:50] + "\n" + good)             # the next shard of the same set
    assert load_examples([shard, tmp_path / "later.jsonl"], "pytorrent")[1].dropped["malformed"] == 3


def test_no_usable_record_is_an_error_that_counts_why(tmp_path):
    with pytest.raises(InputError, match="no usable record; fix .*: 0 of 2 records kept .dropped: 2 empty response"):
        load_examples(write_records(tmp_path / "d.jsonl", *[{**DOLLY, "response": ""}] * 2))


def test_the_report_counts_and_hashes_in_one_line(tmp_path):
    a = write_records(tmp_path / "a.jsonl", DOLLY, {**DOLLY, "response": ""})
    b = write_records(tmp_path / "b.jsonl", BUGNET)
    examples, report = load_examples([a, b])
    assert [example.category for example in examples] == ["classification", "bugnet"]
    assert (report.read, report.kept, report.dropped) == (3, 2, {"empty response": 1})
    digest = subprocess.run(["sha256sum", a], capture_output=True, text=True).stdout[:16]
    assert report.files[0] == (str(a), digest) and len(report.files) == 2
    assert str(report).startswith(f"2 of 3 records kept (dropped: 1 empty response); a.jsonl sha256 {digest}, b.jsonl")
    assert "\n" not in str(report)
    read = []
    assert len(load_examples([a, b], limit=1, progress=lambda: read.append(1))[0]) == len(read) == 1


def test_a_format_that_is_named_is_taken_where_another_would_be_recognised(tmp_path):
    file = write_records(tmp_path / "d.jsonl", {**DOLLY, "output": "Cod"})
    assert [load_examples(file, format)[0][0].response for format in (None, "alpaca")] == ["Tope", "Cod"]


def test_a_file_s_own_records_decide_about_the_lines_before_them(tmp_path):
    good = json.dumps(PYTORRENT)
    (tmp_path / "shard.jsonl").write_text(good + "\n")
    (tmp_path / "other.jsonl").write_text("{broken\n" + json.dumps(DOLLY) + "\n")
    with pytest.raises(InputError, match="other.jsonl:1: not JSON"):
        load_examples([tmp_path / "shard.jsonl", tmp_path / "other.jsonl"])
    with pytest.raises(InputError, match="other.jsonl:1: not JSON"):            # also where nothing after it is read
        load_examples(tmp_path / "other.jsonl", limit=1)
    (tmp_path / "other.jsonl").write_text("{broken\n{broken\n")
    with pytest.raises(InputError, match="other.jsonl:1: not JSON"):
        load_examples([tmp_path / "shard.jsonl", tmp_path / "other.jsonl"])


# ---- the split

def examples_of(*prompts):
    return [to_example({"instruction": prompt, "response": f"r{i}"}, f"d:{i}") for i, prompt in enumerate(prompts)]


def test_split_is_exact_disjoint_and_keeps_the_order():
    examples = examples_of(*[f"q{i}" for i in range(100)])
    for count in (0, 1, 37, 99):
        train, validation = split_examples(examples, count, seed=1)
        assert len(validation) == count
        assert sorted(train + validation, key=examples.index) == examples
        assert train == [e for e in examples if e in train]


def test_split_depends_on_prompt_and_seed_not_on_the_file_order():
    examples = examples_of(*[f"q{i}" for i in range(100)])
    held = {e.instruction for e in split_examples(examples, 20, seed=1)[1]}
    assert held == {e.instruction for e in split_examples(examples[::-1], 20, seed=1)[1]}
    assert held != {e.instruction for e in split_examples(examples, 20, seed=2)[1]}
    fewer = {e.instruction for e in split_examples(examples[:90], 20, seed=1)[1]}
    assert len(held & fewer) >= 15


def test_split_keeps_the_same_prompt_on_one_side():
    prompts = [f"q{i % 30}" for i in range(60)] + [f" Q{i}  " for i in range(30)]   # spacing and case do not hide it
    train, validation = split_examples(examples_of(*prompts, "alone", "apart"), 32)
    plain = [{e.instruction.strip().casefold() for e in side} for side in (train, validation)]
    assert len(validation) == 32 and plain[0].isdisjoint(plain[1])


def test_split_that_cannot_be_made_says_so():
    with pytest.raises(InputError, match="5 validation examples of 5 leave none"):
        split_examples(examples_of(*"abcde"), 5)
    with pytest.raises(InputError, match="more than 1 times, so no validation examples can be set apart"):
        split_examples(examples_of(*"aabb"), 1)


def test_where_only_whole_groups_fit_fewer_are_held_out():
    train, validation = split_examples(examples_of(*"aabb"), 3)
    assert len(train) == len(validation) == 2 and train[0].instruction != validation[0].instruction


def test_one_prompt_in_several_spellings_is_one_prompt():
    examples = [SimpleNamespace(messages=[{"role": "user", "content": text}])
                for text in ("Go  on", "go on", "GO ON", "go\non", "Go on")]
    assert hold_out(examples, 2, 0) == (examples, examples[:2])


# ---- plain text

def test_texts_are_the_field_text_of_any_data_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n{"text": " "}\n{"text": "two"}\n')
    texts, files = load_texts(tmp_path / "a.jsonl")
    assert texts == ["one", "two"] and [name for name, _ in files] == [str(tmp_path / "a.jsonl")]
    (tmp_path / "more.jsonl").write_text('{"text": "three"}\n')
    texts, files = load_texts([tmp_path / "a.jsonl", tmp_path / "more.jsonl"])
    assert texts == ["one", "two", "three"]
    assert [name for name, _ in files] == [str(tmp_path / name) for name in ("a.jsonl", "more.jsonl")]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"words": "two"}\n')
    with pytest.raises(InputError, match="b.jsonl:2: field 'text' is missing"):
        load_texts(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(InputError, match="holds no text"):
        load_texts([tmp_path / "c.jsonl"])


# ---- real data

def test_real_dolly_and_alpaca_records_load_and_split(shared):
    examples, report = load_examples([shared / "dolly-sample.jsonl", shared / "instructions-1100.jsonl"])
    assert report.read == 1108 and report.kept == len(examples) == 1108 - sum(report.dropped.values())
    assert {"open_qa", "alpaca"} <= {example.category for example in examples}
    train, validation = split_examples(examples, 100)
    assert {e.messages[0]["content"] for e in train}.isdisjoint(e.messages[0]["content"] for e in validation)
