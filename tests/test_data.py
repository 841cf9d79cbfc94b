"""Records -> examples -> ids -> batches: each dataset's schema and quirks, each error, and the masks."""
import csv
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from itertools import chain

import pytest
import torch

from minikd import records
from minikd.data import (Dropped, Encoded, batch_order, by_length, collate, data_files, encode_examples, encode_text,
                         load_examples, load_texts, next_rows, optimizer_steps, prompt_text, read_records, recognise,
                         split_examples, steps_per_epoch, to_example, without_docstring)
from minikd.evaluate import read_references
from minikd.files import InputError
from minikd.tokenizer import Tokenizer
from train_kd import write_held_out

DOLLY = {"instruction": "Which is a fish?", "context": "", "response": "Tope", "category": "classification"}
BUGNET = {"problem_id": "p1", "language": "Python", "original_status": "Wrong Answer", "fail": "print(1)\n",
          "pass": "print(2)\n", "change": "replace", "i1": 6, "i2": 7, "error": "TLE", "stderr": "", "stdout": "1"}
PYTORRENT = {"repo": "r", "docstring": "Add one.\n\nReturns int.", "summary": "Add one.", "func_name": "f",
             "original_string": 'def f(x):\n    """Add one.\n\n    Returns int."""\n    return x + 1\n',
             "code": "def f(x):\n    return x + 1\n"}
CODEFORCES = {"id": "1/A", "note": None, "editorial": None, "prompt": "Solve it.", "generation": "<think>\n</think>",
              "finish_reason": "stop", "messages": [{"role": "user", "content": "Solve it."},
                                                    {"role": "assistant", "content": "<think>\n</think>"}]}


class Letters:
    """A tokenizer of one id a character; <e> and <p> are its stop and pad."""
    eos_ids, end_id, pad_id = {1, 2}, 1, 0

    def encode(self, text):
        return [ord(letter) for letter in text.replace("<e>", "\x01")]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def chat(self, messages, add_generation_prompt=False):
        return "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:" * add_generation_prompt


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def message(record, format=None):
    with pytest.raises(InputError) as caught:
        to_example(record, "data.jsonl:812", format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the schemas

def test_dolly_puts_its_context_under_the_instruction():
    example = to_example({**DOLLY, "context": "Tope swim."}, "d.jsonl:1")
    assert example.messages == ({"role": "user", "content": "Which is a fish?\n\nTope swim."},)
    assert (example.instruction, example.input, example.response) == ("Which is a fish?", "Tope swim.", "Tope")
    assert (example.references, example.category, example.where) == (("Tope",), "classification", "d.jsonl:1")


@pytest.mark.parametrize("context", ["", None, float("nan"), "  "])
def test_an_absent_context_is_empty_however_it_is_written(context):
    assert to_example({**DOLLY, "context": context}, "d:1").input == ""
    assert to_example({key: DOLLY[key] for key in ("instruction", "response")}, "d:1").messages[0]["content"] == \
        "Which is a fish?"


def test_spanish_dolly_ignores_the_english_originals():
    record = {**DOLLY, "instruction": "¿Qué año?", "instruction_original_en": "Which year?", "id": 3}
    assert to_example(record, "d:1").instruction == "¿Qué año?"


def test_instruction_input_response_is_read_as_dolly_without_losing_the_input():
    assert to_example({"instruction": "Add.", "input": "1 2", "response": "3"}, "d:1").input == "1 2"


def test_alpaca_with_several_outputs_trains_on_the_first_and_compares_with_all():
    record = {"instruction": "Say hi.", "input": "", "output": ["Hi", "", "Hello"], "prompt": "Say<n>hi", "topic": "x"}
    example = to_example(record, "d:1")
    assert (example.response, example.references, example.category) == ("Hi", ("Hi", "Hello"), "alpaca")
    assert "<n>" not in example.messages[0]["content"]
    assert to_example({**record, "output": "Hi"}, "d:1").references == ("Hi",)


def test_chat_trains_on_the_last_assistant_turn_and_keeps_the_system_prompt():
    turns = [("system", "Be brief."), ("user", "1?"), ("assistant", "one"), ("user", "2?"), ("assistant", "two"),
             ("user", "bye")]
    example = to_example({"messages": [{"role": role, "content": content} for role, content in turns]}, "d:1")
    assert [m["content"] for m in example.messages] == ["Be brief.", "1?", "one", "2?"]
    assert (example.response, example.category) == ("two", "chat")
    assert example.instruction == "Be brief.\n\nUser: 1?\n\nAssistant: one\n\nUser: 2?"
    single = to_example({"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "one"}]}, "")
    assert single.instruction == "1?"


def test_bugnet_answers_with_bare_code_and_says_how_it_failed():
    example = to_example(BUGNET, "d:1")
    assert example.response == "print(2)\n" and example.references == ("print(2)\n",)
    asked = example.messages[0]["content"]
    assert "this Python program" in asked and "Wrong Answer" in asked and "TLE" in asked
    assert "replace" not in asked + example.instruction + example.input         # `change` is part of the answer
    assert "C++ program" in to_example({**BUGNET, "language": "C++"}, "d:1").messages[0]["content"]


@pytest.mark.parametrize("error", ["0", None, ""])
def test_bugnet_error_0_means_not_reproduced_and_only_the_verdict_is_told(error):
    example = to_example({**BUGNET, "error": error}, "d:1")
    assert "rerun" not in example.messages[0]["content"] and example.messages[0]["content"].endswith("Wrong Answer")
    assert example.input.endswith("error in the code:\nWrong Answer")
    bare = to_example({"fail": "x", "pass": "y"}, "d:1")
    assert bare.messages[0]["content"] == "Fix the bug in this program. Answer with the whole program.\n\nx"


def test_pytorrent_target_has_lost_the_docstring_that_is_its_prompt():
    example = to_example(PYTORRENT, "d:1")
    assert example.response == "def f(x):\n    return x + 1\n" == example.references[0]
    assert example.input == "Add one." and example.messages[0]["content"].endswith("\n\nAdd one.")


@pytest.mark.parametrize("summary", [None, "", "absent"])
def test_pytorrent_without_a_summary_asks_with_the_docstring(summary):
    record = {**PYTORRENT, "summary": summary}
    if summary == "absent":
        del record["summary"]
    assert to_example(record, "d:1").input == PYTORRENT["docstring"]


def test_pytorrent_without_original_string_uses_code():
    assert to_example({"summary": "Add.", "code": "x = 1"}, "d:1").response == "x = 1"


def test_codeforces_reads_messages_or_prompt_and_generation_alike():
    by_messages = to_example(CODEFORCES, "d:1")
    by_prompt = to_example({**CODEFORCES, "messages": None}, "d:1")
    assert by_messages == by_prompt
    assert (by_messages.response, by_messages.category) == ("<think>\n</think>", "codeforces")


def test_codeforces_trace_that_ran_into_its_limit_teaches_no_end():
    with pytest.raises(Dropped, match="cut short"):
        to_example({**CODEFORCES, "finish_reason": "length"}, "d:1")


@pytest.mark.parametrize("name, record", [("dolly", DOLLY), ("bugnet", BUGNET), ("pytorrent", PYTORRENT),
                                          ("codeforces", CODEFORCES), ("chat", {"messages": []}),
                                          ("alpaca", {"instruction": "", "input": "", "output": ""}),
                                          (None, {"text": "Llama-2 dolly"})])
def test_format_is_recognised_from_fields(name, record):
    assert recognise(record) == name


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
@pytest.mark.parametrize("record", [
    DOLLY, {**DOLLY, "context": ""}, BUGNET, {**BUGNET, "error": "0"}, PYTORRENT, CODEFORCES,
    {"instruction": "Add.", "input": "1 2", "output": ["3", "three"]}, {"instruction": "Say a.", "input": "", "output": "a"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}])
def test_what_was_held_out_is_read_as_the_same_example(tokenizer, tmp_path, record, template):
    example = to_example(record, "d:1")
    write_held_out([example], tmp_path / "held-out.jsonl")
    (again,), _ = load_examples(tmp_path / "held-out.jsonl")
    assert replace(again, where="d:1") == example and read_references(tmp_path / "held-out.jsonl")[0].references == example.references
    assert prompt_text(again, tokenizer, template) == prompt_text(example, tokenizer, template)


def test_format_can_be_forced_and_the_records_own_category_wins():
    both = {"instruction": "i", "response": "r", "output": "o", "category": "es"}
    assert to_example(both, "d:1").response == "r"
    assert to_example(both, "d:1", "alpaca").response == "o"
    assert to_example({**PYTORRENT, "category": "code"}, "d:1").category == "code"
    assert to_example({**DOLLY, "category": None}, "d:1").category == "dolly"


# ---- the docstring that would leak

@pytest.mark.parametrize("code, expected", [
    ("def f():\n    '''doc'''\n\n    return 1  # why\n", "def f():\n    return 1  # why\n"),
    ("def f():\n\t'''doc'''\n", "def f():\n\tpass\n"),
    ("class A:\n    'doc'  # noqa\n    x = 1\n", "class A:\n    x = 1\n"),
    ("'''module'''\n@wrap\nasync def f(\n    a,\n):\n    r'''doc\n    more'''\n    return a\n",
     "@wrap\nasync def f(\n    a,\n):\n    return a\n"),
    ("def f(): 'doc'; return 1", "def f():\n    return 1"),
    ("    def f(self):\n        '''doc'''\n        return 1\n", "def f(self):\n    return 1\n"),
    ("def f(self):\n        '''doc'''\n        return 1\n", "def f(self):\n        return 1\n"),
    ("def f():\r\n    '''doc'''\r\n    return 'é'\r\n", "def f():\n    return 'é'\n"),
    ("def f():\n    def g():\n        'kept'\n    return g\n", None),
    ("def f():\n    x = '''kept'''\n    return '\\d'\n", None),
    ("def f(a):\n    '''doc\n    more'''\n    print 'python 2'\n", "def f(a):\n    print 'python 2'\n"),
    ("def f(a):  # c\n    \"\"\"doc\"\"\"\n    print a, '''kept'''\n", "def f(a):  # c\n    print a, '''kept'''\n"),
    ("print 'no docstring'\n", None),
    ("def f():\n    'doc'; return 1  # why\n", "def f():\n    return 1"),
    ("def é(): 'doc'\n", "def é():\n    pass"),
    ("def f():\n    'doc'\n\n\n", "def f():\n    pass\n"),
    ("def f():\n    '''doc'''\ndef g():\n    '''kept'''\n    print 2\n", "def f():\ndef g():\n    '''kept'''\n    print 2\n"),
])
def test_docstring_is_removed_and_the_rest_stays_as_written(code, expected):
    assert without_docstring(code) == (code if expected is None else expected)


# ---- malformed records

def test_missing_field_is_named_with_file_and_line():
    assert message({"instruction": "i", "context": "c"}, "dolly").startswith(
        "data.jsonl:812: field 'response' is missing; ")


@pytest.mark.parametrize("value, words", [(None, "null"), (float("nan"), "null"), (3, "a int"), (["x"], "a list"),
                                          ({"a": 1}, "a dict"), (True, "a bool"), ("\ud800", "lone surrogate")])
def test_required_field_of_the_wrong_kind_is_named(value, words):
    text = message({**DOLLY, "response": value})
    assert "data.jsonl:812" in text and "'response'" in text and words in text


@pytest.mark.parametrize("record", [{**DOLLY, "context": 7}, {**DOLLY, "category": 7}, {**BUGNET, "error": 0}])
def test_optional_field_of_the_wrong_kind_is_named_too(record):
    assert "a int; make it text" in message(record)


def test_unknown_fields_and_unknown_format_list_what_is_known():
    assert "fields (text) not known" in message({"text": "x"}) and "dolly (instruction, response)" in message({})
    assert "format 'doly' not known" in message(DOLLY, "doly")


@pytest.mark.parametrize("messages, words", [
    ("hi", "'messages' is text"), (None, "'messages' is null"),
    ([], "no assistant turn"), ([{"role": "user", "content": "hi"}], "no assistant turn"),
    ([{"role": "assistant", "content": "hi"}], "no assistant turn"),
    (["hi"], "messages[0]: not a turn"), ([{"role": "tool", "content": "hi"}], "messages[0]: not a turn"),
    ([{"role": "user"}], "messages[0]: field 'content' is missing"),
    ([{"role": "user", "content": None}], "messages[0]: field 'content' is null"),
    ([{"role": "user", "content": [{"type": "text"}]}], "field 'content' is a list")])
def test_malformed_conversation_names_the_turn(messages, words):
    assert words in message({"messages": messages})


@pytest.mark.parametrize("record", [
    {**DOLLY, "response": " \n"}, {**DOLLY, "instruction": ""}, {**BUGNET, "pass": ""}, {**BUGNET, "fail": " "},
    {**PYTORRENT, "docstring": "", "summary": " "}, {**PYTORRENT, "original_string": "'''only a docstring'''"},
    {"instruction": "i", "output": ["", " "]}, {"instruction": "i", "output": []},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]}])
def test_empty_prompt_or_response_is_dropped_not_an_error(record, tmp_path):
    with pytest.raises(Dropped):
        to_example(record, "d:1")
    examples, report = load_examples(write(tmp_path / "d.jsonl", DOLLY, record))
    assert len(examples) == 1 and report.read == 2 and sum(report.dropped.values()) == 1


def test_record_that_lost_a_field_is_judged_as_the_record_before_it(tmp_path):
    file = write(tmp_path / "d.jsonl", DOLLY, {"instruction": "i"})
    with pytest.raises(InputError, match="d.jsonl:2: field 'response' is missing"):
        load_examples(file)


def test_skipped_records_are_counted_and_the_first_is_shown(tmp_path):
    file = write(tmp_path / "d.jsonl", {"summary": "s"}, PYTORRENT, {**PYTORRENT, "summary": None, "docstring": None})
    examples, report = load_examples(file, format="pytorrent")
    assert (len(examples), report.read, report.dropped) == (1, 3, {"malformed": 2})
    assert "1 of 3 records kept (dropped: 2 malformed)" in str(report) and "d.jsonl:1" in report.first_bad
    assert "d.jsonl:1" in str(report).splitlines()[1] and "malformed" not in str(load_examples(write(file, DOLLY))[1])


@pytest.mark.parametrize("first", ['{"docstring": "d"}', '{"zz": 1}', 'no JSON', 'no JSON\n{"zz": 1}'])
def test_what_is_malformed_before_the_first_whole_record_is_judged_by_that(tmp_path, first):
    (tmp_path / "p.jsonl").write_text(f"{first}\n{json.dumps(PYTORRENT)}\n")
    examples, report = load_examples(tmp_path / "p.jsonl")
    assert len(examples) == 1 and report.dropped["malformed"] == first.count("\n") + 1
    (tmp_path / "d.jsonl").write_text(f"{first}\n{json.dumps(DOLLY)}\n")
    for name in "d.jsonl", "none.jsonl":
        (tmp_path / "none.jsonl").write_text(first)
        with pytest.raises(InputError, match=f"{name}:1: "):
            load_examples(tmp_path / name)


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
    assert load_examples([shard, tmp_path / "later.jsonl"])[1].dropped["malformed"] == 3
    with gzip.open(shard, "wt") as handle:
        handle.write("\n".join([json.dumps(DOLLY), good[:50]]))
    with pytest.raises(InputError, match="shard.jsonl.gz:2: not JSON"):
        load_examples(shard)


# ---- files

def test_jsonl_takes_bom_crlf_blank_lines_and_no_last_newline(tmp_path):
    file, line = tmp_path / "d.jsonl", json.dumps(DOLLY).encode()
    file.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    assert [where for where, _ in read_records(file)] == [f"{file}:1", f"{file}:4"]


def test_gz_json_and_csv_give_the_same_records_as_jsonl(tmp_path):
    records = [DOLLY, {**DOLLY, "context": 'commas, "quotes"\nand lines', "response": "é" * 200_000}]
    text = json.dumps(records)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as handle:
        handle.write("\n".join(map(json.dumps, records)))
    (tmp_path / "d.json").write_text(text)
    (tmp_path / "e.json").write_text('{"version": 1, "data": ' + text + "}")
    write(tmp_path / "f.json", *records)                                        # JSON Lines under another name
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8-sig") as handle:
        rows = csv.DictWriter(handle, DOLLY)
        rows.writeheader()
        rows.writerows(records)
    for name in "d.json", "d.csv":
        (tmp_path / "packed" / name).mkdir(parents=True)
        (tmp_path / "packed" / name / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("d.jsonl.gz", "d.json", "e.json", "f.json", "d.csv", "packed/d.json", "packed/d.csv"):     # or a folder of one
        assert [record for _, record in read_records(tmp_path / name)] == records, name
    write(tmp_path / "f.json", DOLLY)                                           # of one line
    assert [record for _, record in read_records(tmp_path / "f.json")] == [DOLLY]


def test_where_counts_lines_in_csv_and_records_in_json(tmp_path):
    (tmp_path / "d.csv").write_text('instruction,response\n"a\nb",c\n\nd,e\n')
    assert [where[-6:] for where, _ in read_records(tmp_path / "d.csv")] == [".csv:2", ".csv:5"]
    (tmp_path / "d.json").write_text("[{}, {}]")
    assert [where[-9:] for where, _ in read_records(tmp_path / "d.json")] == [":record 1", ":record 2"]


def test_parquet_streams_through_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}, {"messages": turns}]),
                                tmp_path / "d.parquet")
    examples, _ = load_examples(tmp_path / "d.parquet")
    assert [example.response for example in examples] == ["ho", "ho"] and examples[1].where.endswith(":row 2")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    latin = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pyarrow.py_buffer(b"\xf1"))
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    for name in "broken", "latin":
        with pytest.raises(InputError, match="not a whole parquet file"):
            list(read_records(tmp_path / f"{name}.parquet"))


def test_parquet_without_pyarrow_gives_the_conversion_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "es.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"duckdb -c \"COPY \(FROM '.*es.parquet'\) TO 'es.jsonl' \(FORMAT json\)\""):
        list(read_records(tmp_path / "es.parquet"))


GOOD = json.dumps(DOLLY).encode()


@pytest.mark.parametrize("name, content, words", [
    ("d.jsonl", GOOD + b"\n{'instruction'}\n", "d.jsonl:2: not JSON (Expecting property name"),
    ("d.jsonl", GOOD + b"\n[1]\n", "d.jsonl:2: a record is an object with named fields, not a list"),
    ("d.jsonl", GOOD + b'\n{"response": "\xff"}\n', "d.jsonl:2: not JSON ('utf-8' codec can't decode byte 0xff"),
    ("d.jsonl", b"[" * 200_000, "d.jsonl:1: not JSON ("),
    ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "d.jsonl:1: not JSON"),
    ("d.jsonl", b"", "d.jsonl: holds no records"),
    ("d.jsonl", b"\xef\xbb\xbf\n \n", "d.jsonl: holds no records"),
    ("d.jsonl.gz", b"plain", "d.jsonl.gz: not a whole gzip file (Not a gzipped file"),
    ("d.jsonl.gz", gzip.compress(GOOD * 99)[:-20], "d.jsonl.gz: not a whole gzip file (Compressed file ended"),
    ("d.json", b'[{"a": 1},\n {"b"', "d.json:2: not JSON"),
    ("d.json", b'[{"a": 1},\n {"b": "\xff"}]', "d.json:2: not JSON"),
    ("d.json", b"[1]", "d.json:record 1: a record is an object"),
    ("d.json", b'{"data": 3}', 'd.json: a .json file is a list of records, or {"data": [...]}'),
    ("d.json", b" ", "d.json: holds no records"),
    ("d.csv", b"", "d.csv: holds no records"),
    ("d.csv", b"instruction,response\n", "d.csv: holds no records"),
    ("d.csv", b"response,response\na,b\n", "d.csv:1: the column 'response' is there twice"),
    ("d.csv", b"instruction,response\na,b\ninstruction,response\n", "d.csv:3: the header again"),
    ("d.csv", b"instruction,response\na,b,c\n", "d.csv:2: 3 cells under 2 columns"),
    ("d.csv", b"instruction,response\na\n", "d.csv:2: 1 cells under 2 columns"),
    ("d.csv", b'instruction,response\na,b\nc,"d\ne,f\n', "d.csv:3: not CSV in UTF-8 (unexpected end of data)"),
    ("d.csv", b"instruction,response\na,b\nc,\xff\n", "d.csv:3: not CSV in UTF-8 ('utf-8' codec"),
    ("d.txt", GOOD, "d.txt: the name does not say what it holds; unpack it, or rename it to end in .jsonl"),
])
def test_broken_file_is_one_line_that_says_where(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_examples(tmp_path / name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_usable_record_is_an_error_that_counts_why(tmp_path):
    with pytest.raises(InputError, match="no usable record; 0 of 2 records kept .dropped: 2 empty response"):
        load_examples(write(tmp_path / "d.jsonl", *[{**DOLLY, "response": ""}] * 2))


def test_report_counts_hashes_and_fits_a_line(tmp_path):
    a, b = write(tmp_path / "a.jsonl", DOLLY, {**DOLLY, "response": ""}), write(tmp_path / "b.jsonl", BUGNET)
    examples, report = load_examples([a, b])
    assert [example.category for example in examples] == ["classification", "bugnet"]
    assert (report.read, report.kept, report.dropped) == (3, 2, {"empty response": 1})
    digest = subprocess.run(["sha256sum", a], capture_output=True, text=True).stdout[:16]
    assert report.files[0] == (str(a), digest) and len(report.files) == 2
    assert str(report).startswith(f"2 of 3 records kept (dropped: 1 empty response); a.jsonl sha256 {digest}, b.jsonl")
    read = []
    assert len(load_examples([a, b], limit=1, progress=lambda: read.append(1))[0]) == len(read) == 1


def test_a_format_that_is_named_is_taken_where_another_would_be_recognised(tmp_path):
    file = write(tmp_path / "d.jsonl", {**DOLLY, "output": "Cod"})
    assert [load_examples(file, format)[0][0].response for format in (None, "alpaca")] == ["Tope", "Cod"]


# ---- folders and the hub

def test_folder_with_one_data_file_is_that_file(tmp_path):
    file = write(tmp_path / "train.jsonl", DOLLY)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "dataset_infos.json").write_text("{}")
    write(tmp_path / "._train.jsonl", DOLLY)                                    # as a Mac leaves them
    assert data_files(tmp_path) == [file]


def test_several_data_files_are_listed_and_a_choice_picks_file_folder_or_glob(tmp_path):
    for name in ("es", "solutions_py"):
        (tmp_path / name).mkdir()
    shards = [write(tmp_path / "solutions_py" / f"train-{i}.jsonl", CODEFORCES) for i in (1, 0)][::-1]
    es = write(tmp_path / "es" / "test.jsonl", DOLLY)
    with pytest.raises(InputError, match="holds several.*from es/test.jsonl, solutions_py/train-0.jsonl, solutions"):
        data_files(tmp_path)
    assert data_files(f"{tmp_path}:es/test.jsonl") == [es]
    assert data_files(f"{tmp_path}:solutions_py") == shards == data_files(f"{tmp_path}:*train*")
    with pytest.raises(InputError, match="nothing matches 'fr'"):
        data_files(f"{tmp_path}:fr")


def test_missing_file_is_not_taken_for_a_hub_name(monkeypatch):
    monkeypatch.setattr(records, "local_folder", None)
    with pytest.raises(InputError, match="runs/none.jsonl: no such file"):
        load_examples("runs/none.jsonl")


def test_a_file_has_no_parts(tmp_path):
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(InputError, match="d.jsonl:es: .*d.jsonl is a file, which has no parts; leave out the rest"):
        load_examples(f"{tmp_path}/d.jsonl:es")


def test_folder_without_data_says_what_it_takes(tmp_path):
    with pytest.raises(InputError, match="holds no data file"):
        data_files(tmp_path)


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


# ---- ids

def encode(*pairs, **options):
    examples = [to_example({"instruction": prompt, "response": response}, "d:1") for prompt, response in pairs]
    return encode_examples(examples, Letters(), **options)


def test_response_ends_in_the_end_token_and_follows_the_chat_prompt():
    (row,), counts = encode(("hi", "yo"))
    assert "".join(map(chr, row.prompt)) == "u:hi;a:" and row.response == [ord("y"), ord("o"), 1]
    assert not row.cut and row.index == 0 and counts["encoded"] == 1


def test_long_response_is_cut_without_an_invented_end_and_counted():
    (exact, cut, only_the_end), counts = encode(("h", "123"), ("h", "12345"), ("h", "1234"), max_length=10)
    assert exact.response[-1] == 1 and not exact.cut and len(exact.prompt + exact.response) == 10
    assert "".join(map(chr, cut.response)) == "1234" and cut.cut
    assert "".join(map(chr, only_the_end.response)) == "1234" and only_the_end.cut
    assert counts["responses cut"] == 2


def test_long_prompts_are_dropped_and_counted_and_the_index_still_points_at_the_example():
    rows, counts = encode(("h" * 9, "x"), ("h", "x"), max_prompt_length=6)
    assert [row.index for row in rows] == [1] and counts["dropped: prompt too long"] == 1
    rows, counts = encode(("hhh", "x"), ("h", "x"), max_length=7)               # eight prompt tokens leave no room
    assert [row.index for row in rows] == [1] and counts["dropped: prompt too long"] == 1


def test_a_template_that_renders_nothing_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "chat", lambda *_, **__: "")
    with pytest.raises(InputError, match="a prompt has no tokens; check its chat template"):
        encode_examples([to_example({"instruction": "a", "response": "b"}, "x")], tokenizer)


def test_in_parts_the_rows_are_the_same_and_a_response_without_its_prompt_is_not_tokenized(monkeypatch):
    pairs = [("h" * (1 + i % 5), "x" * i) for i in range(1, 12)]
    whole, counts = encode(*pairs, max_prompt_length=8)
    seen, done, batch = [], [], Letters.encode_batch
    monkeypatch.setattr(Letters, "encode_batch", lambda self, texts: (seen.extend(texts), batch(self, texts))[1])
    monkeypatch.setattr("minikd.data.ENCODED_AT_ONCE", 4)
    assert encode(*pairs, max_prompt_length=8, progress=done.append) == (whole, counts) and done == [4, 4, 3]
    assert counts["dropped: prompt too long"] == 4 and len(seen) == 2 * len(pairs) - 4


def test_response_that_spells_a_stop_token_is_dropped_and_counted():
    rows, counts = encode(("h", "x<e>y"), ("h", "x"))
    assert [row.index for row in rows] == [1] and counts["dropped: stop token inside"] == 1


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="no example is left of 1 .*--max-prompt-length"):
        encode(("hello", "x"), max_prompt_length=3)


def test_alpaca_template_is_the_papers_without_chat_markers():
    with_input = prompt_text(to_example({**DOLLY, "context": "Tope swim."}, "d:1"), Letters(), "alpaca")
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nWhich is a fish?\n\n"
        "### Input:\nTope swim.\n\n### Response:\n")
    without = prompt_text(to_example(DOLLY, "d:1"), Letters(), "alpaca")
    assert "### Input" not in without and without.startswith("Below is an instruction that describes a task. Write a")
    with pytest.raises(InputError, match="template 'alpacca' is not known; choose chatml or alpaca"):
        prompt_text(to_example(DOLLY, "d:1"), Letters(), "alpacca")


def test_alpaca_template_words_bugnet_and_pytorrent_as_the_paper_does():
    bug = prompt_text(to_example(BUGNET, "d:1"), Letters(), "alpaca")
    assert "Write a Python program that contains the correction of the code bug" in bug and "TLE" in bug
    assert "solution code" not in bug.lower()
    assert "Write a python script that appropriately completes the request." in \
        prompt_text(to_example(PYTORRENT, "d:1"), Letters(), "alpaca")


# ---- batches

def rows_of(*lengths):
    return [Encoded([5] * p, [7] * r, False, i) for i, (p, r) in enumerate(lengths)]


def test_mask_is_true_on_response_tokens_only_even_where_they_equal_the_pad():
    rows = [Encoded([0, 5], [0, 1], False, 0), Encoded([5], [7, 8, 9, 1], False, 1)]
    ids, mask = collate(rows, pad_id=0)
    assert ids.tolist() == [[0, 5, 0, 1, 0], [5, 7, 8, 9, 1]] and ids.dtype == torch.int64
    assert mask.tolist() == [[False, False, True, True, False], [False, True, True, True, True]]


def test_mask_and_ids_equal_a_slow_loop():
    rows = rows_of((3, 2), (1, 9), (7, 1), (2, 4))
    ids, mask = collate(rows, pad_id=99)
    assert ids.shape == mask.shape == (4, 10) and mask.dtype == torch.bool
    for b, row in enumerate(rows):
        whole = row.prompt + row.response
        for t in range(10):
            assert ids[b, t] == (whole[t] if t < len(whole) else 99)
            assert mask[b, t] == (len(row.prompt) <= t < len(whole))
    assert mask.sum() == sum(len(row.response) for row in rows)


@pytest.mark.parametrize("count, size", [(1, 4), (4, 4), (10, 4), (1000, 7), (1000, 1)])
def test_each_example_comes_once_an_epoch_and_the_partial_batch_is_kept(count, size):
    order = batch_order(rows_of(*[(i % 50 + 1, 1) for i in range(count)]), size, seed=0, epoch=0)
    assert sorted(chain(*order)) == list(range(count))
    assert sorted(map(len, order))[1:] == [size] * (len(order) - 1) and len(order) == -(-count // size)


def test_batches_are_random_and_only_within_them_lengths_are_sorted():
    """A short answer's token must not count more for having only short neighbours: batches differ in their tokens as
    random ones do."""
    rows = rows_of(*[((37 * i) % 200 + 1, 1) for i in range(800)])              # lengths 2..201, four of each
    lengths = [[len(rows[i].prompt) + 1 for i in batch] for batch in batch_order(rows, 8, seed=0, epoch=0)]
    assert all(batch == sorted(batch) for batch in lengths)
    means = [sum(batch) / 8 for batch in lengths]
    spread = (sum((mean - 101.5) ** 2 for mean in means) / len(means)) ** 0.5
    assert spread == pytest.approx(57.7 / 8 ** 0.5, rel=0.25)                   # the deviation of a length, over √8


def test_order_differs_by_seed_and_epoch_and_is_the_same_in_every_process():
    rows = rows_of(*[(i % 5 + 1, 1) for i in range(40)])
    order = batch_order(rows, 4, seed=3, epoch=1)
    assert order == batch_order(rows, 4, seed=3, epoch=1)
    assert order != batch_order(rows, 4, seed=3, epoch=2) and order != batch_order(rows, 4, seed=4, epoch=1)
    assert {frozenset(batch) for batch in order} != {frozenset(batch) for batch in batch_order(rows, 4, 3, 2)}
    assert order == [[31, 32, 12, 24], [21, 7, 34, 29], [5, 25, 2, 28], [37, 3, 33, 38], [26, 18, 23, 4], [30, 36, 22, 19],
                     [16, 27, 13, 9], [15, 35, 1, 8], [20, 0, 6, 11], [10, 17, 14, 39]]        # whatever PYTHONHASHSEED is
    split = split_examples([to_example({"instruction": f"q{i}", "response": "r"}, "d:1") for i in range(30)], 5, 0)[1]
    assert [example.instruction for example in split] == ["q1", "q4", "q7", "q21", "q25"]


def test_passes_that_only_read_take_the_shortest_rows_first():
    assert by_length(rows_of((1, 3), (4, 4), (1, 1), (2, 2), (1, 2)), 2) == [[2, 4], [0, 3], [1]]


@pytest.mark.parametrize("start", range(7))
def test_a_step_is_a_batch_of_its_epoch_in_micro_batches_wherever_the_run_began(start):
    rows = rows_of(*[(i + 1, 1) for i in range(7)])                             # epochs of 4 + 3 rows
    orders = [order for epoch in range(3) for order in batch_order(rows, 4, seed=5, epoch=epoch)]
    assert steps_per_epoch(7, 2, 2) == 2 and steps_per_epoch(8, 2, 2) == 2 and steps_per_epoch(9, 2, 2) == 3
    want = [(step, [[rows[i] for i in orders[step][at:at + 2]] for at in range(0, len(orders[step]), 2)])
            for step in range(start, 6)]
    assert list(optimizer_steps(rows, start, 6, batch_size=2, grad_accum=2, seed=5)) == want


def test_an_endless_stream_holds_each_row_once_a_turn_however_it_is_cut():
    rows = rows_of(*[(i + 1, 1) for i in range(5)])
    stream = [row.index for turn in range(20) for row in next_rows(rows, turn, 1, seed=2)]
    assert all(sorted(stream[at:at + 5]) == list(range(5)) for at in range(0, 20, 5)) and stream[:5] != stream[5:10]
    assert [row.index for turn in range(2) for row in next_rows(rows, turn, 8, seed=2)] == stream[:16]
    assert [row.index for row in next_rows(rows, 0, 20, seed=3)] != stream


# ---- plain text

def test_plain_text_is_scored_whole_and_once_in_windows():
    rows = encode_text(["abcdefgh", "xy", ""], Letters(), max_length=4)
    assert [(row.prompt, row.response) for row in rows] == [
        ([0], [97, 98, 99]), ([99], [100, 101, 102]), ([102], [103, 104, 0]), ([0], [120, 121, 0]), ([0], [0])]
    assert [row.index for row in rows] == [0, 0, 0, 1, 2] and [row.cut for row in rows] == [True, True, False, False, False]


def test_texts_are_the_field_text_of_any_data_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n{"text": " "}\n{"text": "two"}\n')
    texts, files = load_texts(tmp_path / "a.jsonl")
    assert texts == ["one", "two"] and [name for name, _ in files] == [str(tmp_path / "a.jsonl")]
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


def test_real_records_through_the_real_tokenizer_come_back_as_text(shared):
    qwen = Tokenizer.load(shared / "qwen2-tokenizer")
    examples, _ = load_examples(shared / "dolly-sample.jsonl")
    rows, counts = encode_examples(examples, qwen, template="alpaca", max_length=200)
    assert counts["encoded"] == len(rows) > 0
    ids, mask = collate(rows, pad_id=151643)
    for row, line, own in zip(rows, ids, mask):
        said = qwen.decode(line[own].tolist())
        assert examples[row.index].response.startswith(said) if row.cut else said == examples[row.index].response
        assert qwen.decode(line[~own].tolist()) == prompt_text(examples[row.index], qwen, "alpaca")


def test_a_line_that_breaks_off_is_named_by_its_own_number(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(DOLLY) + "\n" + '{"instruction": "a"\n' + json.dumps(DOLLY) + "\n")
    with pytest.raises(InputError, match="d.jsonl:2: "):
        load_examples(tmp_path / "d.jsonl")


def test_a_file_s_own_records_decide_about_the_lines_before_them(tmp_path):
    good = json.dumps(PYTORRENT)
    (tmp_path / "shard.jsonl").write_text(good + "\n")
    (tmp_path / "other.jsonl").write_text("{broken\n" + json.dumps(DOLLY) + "\n")
    with pytest.raises(InputError, match="other.jsonl:1: not JSON"):
        load_examples([tmp_path / "shard.jsonl", tmp_path / "other.jsonl"])
    (tmp_path / "other.jsonl").write_text("{broken\n{broken\n")
    with pytest.raises(InputError, match="other.jsonl:1: not JSON"):
        load_examples([tmp_path / "shard.jsonl", tmp_path / "other.jsonl"])
