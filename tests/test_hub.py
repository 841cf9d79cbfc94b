"""Hub names against a small hub on this machine, through the real huggingface_hub: what is asked, fetched, kept and refused."""
import errno
import json
import os
import threading
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

import eval_rouge
from conftest import DOLLY, files_in, passed, refusal, same, small, tiny, write_records
from fake_hub import Request, again, served, server
from minikd import hub, records
from minikd.checkpoint import Checkpoint, load_model, model_folder, save_model
from minikd.gptq import quantize_model
from minikd.hub import local_folder
from minikd.quant import to_words
from minikd.records import data_files
from minikd.run import check_settings
from minikd.tokenizer import Tokenizer
from minikd.w4 import to_w4


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    again()


COMMITS = ["a" * 40, "b" * 40]
JUNK = {"original/model.safetensors": b"x", "consolidated.safetensors": b"x", "pytorch_model.bin": b"x", "model.gguf": b"x",
        "tokenizer.model": b"x", "tokenization_evil.py": b"x", "pretokenized/data.bin": b"x", "README.md": b"x"}


@pytest.fixture
def model(served, tokenizer, tmp_path):
    """org/model: two commits in shards, with files beside them that no one needs."""
    for seed, commit in enumerate(COMMITS):
        folder = tiny(seed, tokenizer, tmp_path / commit)
        save_model(small(seed), folder, shard_bytes=20_000)
        served.repositories.setdefault(("models", "org/model"), {})[commit] = files_in(folder) | JUNK
    return "org/model"


# ---- models

def test_a_model_and_its_tokenizer_come_without_what_nobody_reads(served, model, tokenizer, capsys):
    assert same(load_model(model).state_dict(), small(1).state_dict())
    assert "did not answer" not in capsys.readouterr().err
    assert len(Tokenizer.load(model)) == len(tokenizer)
    assert not set(served.sent) & JUNK.keys() and len(served.sent) == len(set(served.sent))
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} < set(served.sent)
    assert served.sent.index("config.json") < min(map(served.sent.index, [file for file in served.sent if "-of-" in file]))


def test_a_4_bit_model_of_the_hub_answers_in_bfloat16(served, tokenizer, shell, spy, tmp_path):
    plain = small(1, hidden_size=32, intermediate_size=64)
    words = quantize_model(plain, [], 0, method="rtn", group_size=16, sym=True, store=lambda *parts: to_words(*parts, 1))
    tokenizer.save(tmp_path / "w4")
    save_model(to_w4(plain, words, 16, True), tmp_path / "w4")
    served.repositories["models", "org/w4"] = {COMMITS[0]: files_in(tmp_path / "w4") | JUNK}
    write_records(tmp_path / "data.jsonl", DOLLY)
    flags = "--data", tmp_path / "data.jsonl", "--max-new-tokens", 2, "--device", "cpu"
    told = spy(eval_rouge, "load_model", lambda name, device, dtype: dtype)
    for name in "org/w4", tmp_path / "w4":
        told.append(passed(shell(eval_rouge, "--model", name, *flags, "--out", tmp_path / "answers.jsonl")))
    assert told[:2] == told[2:] and told[0] == torch.bfloat16 and not set(served.sent) & JUNK.keys()


def test_offline_everything_is_there_and_the_hub_is_not_asked(served, model, monkeypatch, capsys):
    first = load_model(model).state_dict()
    served.asked.clear()
    offline(monkeypatch)
    assert same(load_model(model).state_dict(), first) and served.asked == []
    assert capsys.readouterr().err.count(f"using commit {COMMITS[1][:12]} from its cache") == 1         # said once


def test_a_run_sees_one_commit_though_main_moves(served, model):
    later = served.repositories["models", model].pop(COMMITS[1])
    model_folder(model, weights=False)                                          # the tokenizer, hours before the weights
    served.repositories["models", model][COMMITS[1]] = later
    assert same(load_model(model).state_dict(), small(0).state_dict())
    assert f"{COMMITS[0]} (sha256 " in str(Checkpoint(model))
    again()
    assert same(load_model(model).state_dict(), small(1).state_dict())
    assert f"{COMMITS[1]} (sha256 " in str(Checkpoint(model))


def test_another_commit_with_the_same_weights_is_the_same_model(served, model):
    commits = served.repositories["models", model]
    commits[COMMITS[1]] = commits[COMMITS[0]] | {"README.md": b"better"}
    assert str(Checkpoint(model))[-13:] == str(Checkpoint(f"{model}@{COMMITS[0]}"))[-13:]


def test_nothing_is_asked_twice(served, model, spy):
    load_model(model)
    served.asked.clear()
    downloads = spy(huggingface_hub, "snapshot_download", lambda *given, **named: given)        # which may ask, or not
    load_model(model), Tokenizer.load(model), Checkpoint(model)
    assert served.asked == downloads == []


def test_a_hub_that_failed_once_is_asked_again(served, model):
    served.faults["/api/*"] = (503, {}, b"")
    refusal(model_folder, model)
    served.faults.clear()
    load_model(model)


def test_with_both_one_file_and_shards_the_file_is_taken_as_from_a_local_folder(served, model, tmp_path):
    save_model(small(7), tmp_path / "single")
    served.repositories["models", model][COMMITS[1]] |= files_in(tmp_path / "single")
    assert same(load_model(model).state_dict(), small(7).state_dict())


def test_a_revision_is_named_after_an_at(served, model):
    assert same(load_model(f"{model}@{COMMITS[0]}").state_dict(), small(0).state_dict())
    assert same(load_model(f"https://huggingface.co/{model}/").state_dict(), small(1).state_dict())
    assert "Revision Not Found" in refusal(load_model, f"{model}@v7")


def test_a_resumed_run_knows_a_model_by_its_files_whatever_it_is_called_now(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"student": f"org/model@{COMMITS[0]} (sha256 0123456789ab)"}}))
    check_settings(tmp_path, {"student": "/here/model (sha256 0123456789ab)"})
    said = refusal(check_settings, tmp_path, {"student": "x (sha256 f)"})
    assert f"--student x (sha256 f), but the run began with org/model@{COMMITS[0]}" in said


def test_what_minikd_does_not_compute_is_refused_before_its_weights_are_fetched(served, model):
    files = served.repositories["models", model][COMMITS[1]]
    files["config.json"] = files["config.json"].replace(b'"qwen2"', b'"llama"')
    assert "'llama' is not implemented" in refusal(model_folder, model)
    assert not any("safetensors" in name and "index" not in name for name in served.sent)


def test_a_repository_of_pickles_is_refused_as_one(served, model):
    files = served.repositories["models", model][COMMITS[1]]
    for name in [name for name in files if "safetensors" in name]:
        del files[name]
    assert "org/model: has only pickled weights (*.bin)" in refusal(model_folder, model)


@pytest.mark.parametrize("name, said", [("q4.gguf", "holds GGUF files"), ("adapter_config.json", "is a LoRA adapter")])
def test_a_repository_of_another_kind_is_called_what_it_is(served, model, name, said):
    files = served.repositories["models", model][COMMITS[1]]
    del files["config.json"]
    files[name] = b"{}"
    assert f"org/model: {said}" in refusal(model_folder, model)


# ---- what goes wrong

@pytest.mark.parametrize("fault, says", [
    ((404, {"X-Error-Code": "RepoNotFound"}, b""), "Repository Not Found"), ((401, {}, b""), "401"),
    ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""), "Invalid credentials"),
    ((403, {"X-Error-Code": "GatedRepo"}, b""), "gated"), ((429, {"Retry-After": "155"}, b""), "Too Many Requests"),
    ((200, {"Content-Type": "text/html"}, b"<html>hotel</html>"), "Expecting value"), ((503, {}, b""), "503")])
def test_a_refusal_says_why_in_the_hubs_words(served, fault, says):
    served.faults["/api/*"] = fault
    for name, kind in ("org/model", "model"), ("org/data", "dataset"):
        text = refusal(local_folder, name, ["*"], kind)
        assert text.startswith(f"{name}: no such folder here, and the hub did not return it (") and says in text
        assert text.endswith("); check the name, the network and HF_TOKEN")


@pytest.mark.parametrize("fault, says", [((403, {"X-Error-Code": "GatedRepo"}, b""), "gated"), ((429, {}, b""), "try again"),
                                         ((404, {"X-Error-Code": "EntryNotFound"}, b""), "Entry Not Found")])
def test_so_does_that_of_a_single_file(served, model, fault, says):
    served.faults["/org/*"] = fault
    text = refusal(local_folder, model, ["config.json"])
    assert says in text and "None" not in text and text.endswith("); check the name, the network and HF_TOKEN")


def test_without_a_network_the_cache_serves_and_what_it_lacks_is_refused(served, model, monkeypatch, capsys):
    model_folder(model)
    again()
    served.faults["*"] = (503, {}, b"")
    load_model(model)
    assert "org/model: the hub did not answer (" in capsys.readouterr().err
    offline(monkeypatch)
    assert "HF_HUB_OFFLINE" in refusal(load_model, "org/other")


def test_a_hub_that_never_answers_is_given_up(served, monkeypatch):
    def hang(self):
        threading.Event().wait(5)

    monkeypatch.setattr(Request, "find", hang)
    monkeypatch.setattr(hub, "TIMEOUT", 0.05)
    assert "did not return it" in refusal(local_folder, "org/model", ["*"])


def test_without_network_and_cache_the_error_is_no_disks(served, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")        # an OSError
    assert "did not return it" in refusal(local_folder, "org/model", ["*"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("file", ["/cache/blob", None])
def test_a_disk_that_fails_is_the_disks_error_and_names_the_file_or_the_cache(served, model, monkeypatch, number, file):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number), file)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{file or huggingface_hub.constants.HF_HUB_CACHE}'"):
        local_folder(model, ["*"])


# ---- datasets

@pytest.fixture
def data(served) -> str:
    line = b'{"instruction": "a", "response": "b"}\n'
    served.repositories["datasets", "org/data"] = {COMMITS[0]: {
        "solutions_py/train-00000-of-00002.jsonl": line, "solutions_py/train-00001-of-00002.jsonl": line, "es/test.jsonl": line,
        "README.md": b"x"}}
    return "org/data"


def test_of_a_dataset_only_what_is_chosen_is_fetched(served, data):
    assert "holds several data files" in refusal(data_files, data) and served.sent == []
    assert [file.name for file in data_files(f"{data}:es")] == ["test.jsonl"] and served.sent == ["es/test.jsonl"]
    assert [file.name for file in data_files(f"hf://datasets/{data}:solutions_py/")] == ["train-00000-of-00002.jsonl",
                                                                                      "train-00001-of-00002.jsonl"]
    assert [file.parent.name for file in data_files(f"{data}@{COMMITS[0]}:es/test.jsonl")] == ["es"]


def test_half_of_a_dataset_in_the_cache_is_not_taken_for_all_of_it(served, data, monkeypatch):
    first = data_files(f"{data}:solutions_py/train-00000-of-00002.jsonl")
    offline(monkeypatch)
    said = "org/data: its cache holds only some of the 2 files like train-00000-of-00002.jsonl; run once online"
    assert data_files(f"{data}:solutions_py/train-00000-of-00002.jsonl") == first
    refusal(data_files, f"{data}:solutions_py")
    monkeypatch.setattr(records, "local_folder", lambda *_, **__: first[0].parents[1])  # as an older huggingface_hub answers that
    assert refusal(data_files, f"{data}:solutions_py") == said
    first[0].with_name("test-00000-of-00002.jsonl").write_bytes(first[0].read_bytes())         # half of another split
    assert refusal(records._check_complete, data, first) == said
    assert data_files(f"{data}:*/train-00000*") == first                        # a glob may mean just some


def test_a_dataset_that_was_fetched_whole_is_read_without_the_hub(served, data, monkeypatch):
    both, single = data_files(f"{data}:solutions_py"), data_files(f"{data}:es")
    offline(monkeypatch)
    served.asked.clear()
    assert data_files(f"{data}:solutions_py") == both and data_files(f"{data}:es") == single and len(both) == 2
    assert not served.asked


def test_a_listing_that_fails_does_not_fetch_everything(served, data):
    served.faults["/api/datasets/org/data"] = (503, {}, b"")
    refusal(data_files, data)
    assert served.sent == []


# ---- names

def test_a_local_folder_is_itself_and_asks_no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert local_folder(tmp_path, ["*"]) == tmp_path
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder("a/b", ["*"]) == Path("a/b")        # looks like a hub name, and is there


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such", "a/b/c", "~/no-such-folder"])
def test_what_cannot_be_a_hub_name_is_refused_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert "no such folder; give a local folder or a hub name" in refusal(local_folder, name, ["*"])
    assert "no such file or folder; check the path, or give a hub name such as openai/gsm8k" in refusal(data_files, name)


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "is a file; give the model's folder" in refusal(local_folder, tmp_path / "model.safetensors", ["*"])


def test_a_training_run_is_not_taken_for_a_model_and_its_models_are_named(tmp_path):
    last, kd, sft, both = (tmp_path / name for name in ("last", "both/kd/best", "both/sft/best", "both"))
    for folder in last, kd, sft:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert refusal(local_folder, tmp_path, ["*"]).endswith(f"holds a training run; give its model {last}")
    assert refusal(local_folder, both, ["*"]).endswith(f"holds a training run; give its model {kd} or {sft}")     # a comparison
    assert local_folder(tmp_path, ["*"], kind="dataset") == tmp_path
    (both / "config.json").write_text("{}")                     # a model that has runs beside it
    assert local_folder(tmp_path / "both", ["*"]) == tmp_path / "both"
    assert local_folder(tmp_path / "last", ["*"]) == tmp_path / "last"
