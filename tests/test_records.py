"""Files, folders and hub names -> records, and every way in which a file can be broken."""
import csv
import gzip
import json
import sys

import pytest

from conftest import CODEFORCES, DOLLY, refusal, write_records
from minikd import records
from minikd.errors import InputError
from minikd.examples import load_examples
from minikd.records import data_files, local_files, read_records


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
    write_records(tmp_path / "f.json", *records)                                        # JSON Lines under another name
    with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8-sig") as handle:
        rows = csv.DictWriter(handle, DOLLY)
        rows.writeheader()
        rows.writerows(records)
    for name in "d.json", "d.csv":
        (tmp_path / "packed" / name).mkdir(parents=True)
        (tmp_path / "packed" / name / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    for name in ("d.jsonl.gz", "d.json", "e.json", "f.json", "d.csv", "packed/d.json", "packed/d.csv"):     # or a folder of one
        assert [record for _, record in read_records(tmp_path / name)] == records, name
    write_records(tmp_path / "f.json", DOLLY)                                           # of one line
    assert [record for _, record in read_records(tmp_path / "f.json")] == [DOLLY]


def test_where_counts_lines_in_csv_and_records_in_json(tmp_path):
    (tmp_path / "d.csv").write_text('\ninstruction,response\n"a\nb",c\n\nd,e\n')
    assert [where[-6:] for where, _ in read_records(tmp_path / "d.csv")] == [".csv:3", ".csv:6"]
    (tmp_path / "d.json").write_text("[{}, {}]")
    assert [where[-9:] for where, _ in read_records(tmp_path / "d.json")] == [":record 1", ":record 2"]


def test_parquet_is_read_through_pyarrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(600 * [{"messages": turns}]), tmp_path / "d.parquet")
    examples, _ = load_examples(tmp_path / "d.parquet")                         # more than are read at a time
    assert [example.response for example in examples] == 600 * ["ho"] and examples[-1].where.endswith(":row 600")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    latin = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0])), pyarrow.py_buffer(b"\xf1"))
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    for name in "broken", "latin":
        assert "is not a valid parquet file" in refusal(load_examples, tmp_path / f"{name}.parquet")


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
    ("d.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "d.jsonl: is only a Git LFS pointer"),
    ("d.jsonl", b"", "d.jsonl: holds no records"),
    ("d.jsonl", b"\xef\xbb\xbf\n \n", "d.jsonl: holds no records"),
    ("d.jsonl.gz", b"plain", "d.jsonl.gz: is not a valid gzip file (Not a gzipped file"),
    ("d.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-20], "d.jsonl.gz: is not a valid gzip file (Compressed file ended"),
    ("d.json", b'[{"a": 1},\n {"b"', "d.json:2: not JSON"),
    ("d.json", b'[{"a": 1},\n {"b": "\xff"}]', "d.json:2: not JSON"),
    ("d.json", b"[1]", "d.json:record 1: a record is an object"),
    ("d.json", b'{"data": 3}', 'd.json: holds neither a list of records nor {"data": [...]}'),
    ("d.json", b" ", "d.json: holds no records"),
    ("d.csv", b"", "d.csv: holds no records"),
    ("d.csv", b"instruction,response\n", "d.csv: holds no records"),
    ("d.csv", b"response,response\na,b\n", "d.csv:1: the column 'response' occurs twice"),
    ("d.csv", b"\nresponse,response\na,b\n", "d.csv:2: the column 'response' occurs twice"),
    ("d.csv", b"instruction,response\na,b\ninstruction,response\n", "d.csv:3: repeats the header"),
    ("d.csv", b"instruction;response\na;b\n", "d.csv:1: separates its columns by semicolons; save it with commas"),
    ("d.csv", b"instruction\tresponse\na\tb\n", "d.csv:1: separates its columns by tabs; save it with commas"),
    ("d.jsonl", b'[\n  {"a": 1}\n]\n', "d.jsonl:1: not a record, but the beginning of a JSON value over many lines; rename"),
    ("d.json", b'{\n"a": 1\n}\n{\n"a": 2\n}\n', "d.json:1: not JSON (Expecting property name"),
    ("d.json", b'[\n{"a": 1},\n{"a": }]\n', "d.json:3: not JSON (Expecting value, column 7): b'{\"a\": }]'; fix"),
    ("d.csv", b"instruction,response\na,b,c\n", "d.csv:2: has 3 cells for 2 columns"),
    ("d.csv", b"instruction,response\na\n", "d.csv:2: has 1 cells for 2 columns"),
    ("d.csv", b'instruction,response\na,b\nc,"d\ne,f\n', "d.csv:3: not CSV in UTF-8 (unexpected end of data)"),
    ("d.csv", b"instruction,response\na,b\nc,\xff\n", "d.csv:3: not CSV in UTF-8 ('utf-8' codec"),
    ("d.csv", b'"a,b\nc,d\n', "d.csv:1: not CSV in UTF-8"),
    ("d.txt", GOOD, "d.txt: its name does not tell its format; write its texts as records of a .jsonl file"),
    ("d.zip", GOOD, "d.zip: its name does not tell its format; unpack or convert it, or rename it to end in one of .jsonl"),
])
def test_a_broken_file_is_one_line_that_says_where(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert words in refusal(load_examples, tmp_path / name)


def test_a_record_of_another_type_is_an_error_that_is_raised_or_yielded(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    assert "d.jsonl:2: a record is an object" in refusal(list, read_records(tmp_path / "d.jsonl"))
    (_, first), (_, error), (_, last) = read_records(tmp_path / "d.jsonl", (dict, InputError))
    assert (first, last) == ({"a": 1}, {"a": 3}) and isinstance(error, InputError)


# ---- folders and the hub

def test_a_folder_with_one_data_file_is_that_file(tmp_path):
    file = write_records(tmp_path / "train.jsonl", DOLLY)
    (tmp_path / "README.md").write_text("x")
    for name in "dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json":
        (tmp_path / name).write_text("{}")                                              # as the hub and save_to_disk leave them
    for folder in tmp_path, tmp_path / "__MACOSX":                                      # as a Mac leaves them, and its archives
        folder.mkdir(exist_ok=True)
        write_records(folder / "._train.jsonl", DOLLY)
    assert data_files(tmp_path) == [file]


def test_several_data_files_are_listed_and_a_choice_picks_file_folder_or_glob(tmp_path):
    for name in ("es", "solutions_py"):
        (tmp_path / name).mkdir()
    shards = [write_records(tmp_path / "solutions_py" / f"train-{i}.jsonl", CODEFORCES) for i in (1, 0)][::-1]
    es = write_records(tmp_path / "es" / "test.jsonl", DOLLY)
    said = refusal(data_files, tmp_path)
    assert "holds several data files" in said
    assert said.endswith("from es/test.jsonl, solutions_py/train-0.jsonl, solutions_py/train-1.jsonl")
    assert data_files(f"{tmp_path}:es/test.jsonl") == [es]
    assert data_files(f"{tmp_path}:solutions_py") == shards == data_files(f"{tmp_path}:*train*")
    brackets = write_records(tmp_path / "es" / "test[1].jsonl", DOLLY)                  # as a glob, test1.jsonl
    assert data_files(f"{tmp_path}:es/test[1].jsonl") == [brackets]
    assert "nothing matches 'fr'" in refusal(data_files, f"{tmp_path}:fr")
    (tmp_path / "empty").mkdir()
    assert "holds no data file" in refusal(data_files, tmp_path / "empty")


def test_a_folder_of_several_splits_is_not_read_as_one(tmp_path):
    """Else openai/gsm8k:main would train on the test set."""
    (tmp_path / "main").mkdir()
    names = ["test-00000-of-00001.jsonl", *(f"train-0000{i}-of-00002-0123456789abcdef.jsonl" for i in range(2))]
    test, *train = [write_records(tmp_path / "main" / name, DOLLY) for name in names]
    for name, said in (":main", "main holds several splits"), ("/main", "holds several data files"):
        with pytest.raises(InputError, match=rf"{said}; choose .* from (main/)?test-\*.jsonl, (main/)?train-\*.jsonl$"):
            data_files(f"{tmp_path}{name}")
    assert data_files(f"{tmp_path}:main/train-*") == train and data_files(f"{tmp_path}:main/{test.name}") == [test]
    assert data_files(f"{tmp_path}:main/*") == [test, *train]                           # who asks for all of them gets them
    test.unlink()
    assert data_files(f"{tmp_path}:main") == train


@pytest.mark.parametrize("names, several", [(["devices", "values", "testimonials"], False), (["train/0", "test/0"], True),
                                            (["validation_a", "train_b"], True)])
def test_a_split_is_a_word_at_the_start_of_a_file_or_folder(tmp_path, names, several):
    for name in names:
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write_records(tmp_path / "d" / f"{name}.jsonl", DOLLY)
    if several:
        assert "d holds several splits" in refusal(data_files, f"{tmp_path}:d")
    else:
        assert len(data_files(f"{tmp_path}:d")) == len(names)


def test_a_missing_file_is_not_taken_for_a_hub_name(monkeypatch):
    monkeypatch.setattr(records, "local_folder", None)
    assert "runs/none.jsonl: no such file" in refusal(load_examples, "runs/none.jsonl")


def test_a_name_may_hold_colons(tmp_path):
    for folder in "run 12:30", "run 12:30/d:x":
        (tmp_path / folder).mkdir()
    file = write_records(tmp_path / "run 12:30/d:x/a:1.jsonl", DOLLY)
    for name in file, file.parent, f"{file.parent}:a:1.jsonl":
        assert data_files(name) == [file], name
    write_records(file.parent / "b.jsonl", DOLLY)
    assert data_files(f"{file.parent}:b.jsonl") == [file.parent / "b.jsonl"]
    assert local_files([file, "org/name:a:b", f"{file.parent}:b.jsonl"]) == [file, file.parent / "b.jsonl"]


def test_a_name_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    file = write_records(tmp_path / "data/d.jsonl", DOLLY)
    for name in "~/data/d.jsonl", "~/data", "~/data:d.jsonl":
        assert data_files(name) == local_files([name]) == [file], name


def test_a_file_has_no_parts(tmp_path):
    (tmp_path / "d.jsonl").touch()
    file = tmp_path / "d.jsonl"
    assert f"{file} is a file, so there is nothing to choose; give {file} alone" in refusal(load_examples, f"{file}:es")


def test_where_nothing_matches_all_files_are_listed_and_of_a_choice_only_its_own(tmp_path):
    for name in "a/train.jsonl", "a/test.jsonl", "b.jsonl":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    for choice, fault, listed in (("c", "nothing matches 'c'", "a/test.jsonl, a/train.jsonl, b.jsonl"),
                                  ("a", "a holds several splits", "a/test.jsonl, a/train.jsonl")):
        said = refusal(data_files, f"{tmp_path}:{choice}")
        assert f"{fault}; choose with" in said and said.endswith(f" from {listed}")


def test_a_name_without_a_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.jsonl").write_text("{}\n")
    for name in "", ":r.jsonl":
        assert "names no file or folder to read" in refusal(data_files, name)
