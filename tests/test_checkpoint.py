"""A Hugging Face folder in and out: every dtype, every kind of damage by name, and a save that is whole or absent."""
import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import change_json, files_in, random_model, refusal, small
from minikd import checkpoint
from minikd.checkpoint import (Checkpoint, load_config, load_head, load_model, open_tensors, read_tensor, save_model,
                               shards_of, stored_dtype)
from minikd.config import Qwen2Config
from minikd.errors import InputError
from minikd.generate import generate
from minikd.model import Qwen2
from minikd.quant import dequantize_groups, round_to_nearest, to_words
from minikd.w4 import W4Linear, to_w4

ROOT = Path(__file__).parents[1]
INDEX = "model.safetensors.index.json"
NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def model(seed: int = 0, tied: bool = False, dtype=torch.float32) -> Qwen2:
    return random_model(seed, vocab_size=37, hidden_size=16, intermediate_size=24, num_attention_heads=4, rope_theta=1e6,
                        tie_word_embeddings=tied).to(dtype)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A small untied model in one file."""
    save_model(model(), tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_model(model(), tmp_path / "s", shard_bytes=6_000)
    return tmp_path / "s"


@pytest.fixture
def opened(spy) -> list[str]:
    """The names of the weight files that are opened, in order."""
    return spy(checkpoint, "open_tensors", lambda path: path.name)


def same(a: Qwen2, b: Qwen2) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return a.config == b.config and left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left)


def rewrite(folder: Path, change):
    """Applies change(tensors) to model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- what loads

@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 6_000])
def test_what_is_saved_is_loaded(tmp_path, tied, shard_bytes):
    save_model(model(tied=tied), tmp_path / "m", shard_bytes=shard_bytes)
    loaded, ids = load_model(tmp_path / "m"), torch.arange(10)[None]
    assert same(model(tied=tied), loaded) and not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert (tmp_path / "m" / INDEX).exists() == (shard_bytes < 10**9)
    assert load_config(tmp_path / "m") == loaded.config
    assert torch.equal(model(tied=tied)(ids), load_model(str(tmp_path / "m"))(ids))


@pytest.mark.parametrize("part", [1, 150, 1_000])
@pytest.mark.parametrize("shard_bytes", [10**9, 6_000])
def test_tensors_larger_than_a_part_are_read_in_parts_and_files_closed_between(tmp_path, monkeypatch, opened, part, shard_bytes):
    save_model(model(), tmp_path / "m", shard_bytes=shard_bytes)                # 37 rows of 64 bytes, 24 of 64, 16 of 96
    monkeypatch.setattr(checkpoint, "PART", part)
    assert same(model(), load_model(tmp_path / "m"))
    opened.clear()
    half = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert same(half, model(dtype=torch.bfloat16))
    size = sum(p.nbytes for p in half.parameters())
    assert size / (2 * part + 64) < len(opened) < 2 * size / part + 20


def test_a_file_is_not_opened_for_each_small_tensor(tmp_path, opened):
    save_model(model(), tmp_path, shard_bytes=10_000)
    load_model(tmp_path)
    assert len(set(opened)) > 2 and len(opened) == 2 * len(set(opened))         # once for its names, once for its tensors


@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_on_disk_becomes_the_one_asked_for(tmp_path, on_disk, asked):
    save_model(model(dtype=on_disk), tmp_path / "m")
    assert all(t.dtype == on_disk for t in load_file(tmp_path / "m" / "model.safetensors").values())
    assert same(load_model(tmp_path / "m", dtype=asked), model(dtype=on_disk).to(asked))


def test_a_model_is_saved_in_the_dtype_asked_for_and_keeps_its_own(tmp_path):
    given = model()
    save_model(given, tmp_path / "m", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(load_model(tmp_path / "m", dtype=torch.bfloat16), model(dtype=torch.bfloat16)) and same(given, model())
    assert {t.dtype for t in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}


def test_dtypes_may_be_mixed_in_one_file(folder):
    rewrite(folder, lambda tensors: tensors.update({NORM: tensors[NORM].bfloat16(), EMBED: tensors[EMBED].half()}))
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.float32}


def test_a_file_system_whose_inode_numbers_change_serves(tmp_path, monkeypatch):
    """As cloud storage is mounted: a file that left the kernel's cache comes back under another number."""
    class Renumbered:
        def __init__(self, result):
            self.result, self.st_ino = result, next(numbers)

        def __getattr__(self, name):
            return getattr(self.result, name)

    save_model(model(), tmp_path / "m")
    numbers, stat = itertools.count(), Path.stat
    monkeypatch.setattr(Path, "stat", lambda *given, **named: Renumbered(stat(*given, **named)))
    assert same(load_model(tmp_path / "m"), model())


def test_a_folder_that_never_stays_as_it_is_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "versions", lambda folder: object())
    assert "m: is written again and again while it is read" in refusal(load_model, folder)


@pytest.mark.parametrize("error", [None, InputError, FileNotFoundError])
def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch, error):
    """Else tensors of two models would stand in one; and an error that is due to the exchange is no error of the folder."""
    first, second = model(0), model(9)
    save_model(first, tmp_path / "m")
    monkeypatch.setattr(checkpoint, "PART", 1)                                  # a file is opened anew for each part
    opened, open_file = [], checkpoint.open_tensors

    def exchange(path):
        opened.append(path)
        if len(opened) == 4:
            save_model(second, tmp_path / "m")
            if error:
                raise error("half of it")
        return open_file(path)

    monkeypatch.setattr(checkpoint, "open_tensors", exchange)
    assert same(load_model(tmp_path / "m"), second)


def test_a_model_whose_weights_are_packed_is_not_saved(tmp_path):
    packed = model()
    packed.layout = "packed"
    packed.decoding = True                                      # in another thread
    with pytest.raises(ValueError, match="m: not saved, as the model generates meanwhile"):
        save_model(packed, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_tied_head_may_be_stored_all_the_same(tmp_path):
    save_model(model(tied=True), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    for stored in lambda table: table.clone(), lambda table: table.new_zeros(0):     # a copy, or an empty place
        rewrite(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": stored(tensors[EMBED])}))
        assert same(model(tied=True), load_model(tmp_path / "m"))


@pytest.mark.parametrize("shape", [(38, 16), (36, 16), (37, 17), (37,), (0, 16)])
def test_a_tied_head_of_another_shape_is_refused(tmp_path, shape):
    save_model(model(tied=True), tmp_path / "m")
    rewrite(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(shape)}))
    said = refusal(load_model, tmp_path / "m")
    assert f"lm_head.weight is {list(shape)}, but config.json ties it to the embedding, [37, 16]" in said


def test_a_tied_head_is_compared_to_its_last_row_and_across_dtypes(tmp_path):
    """Of one that differs transformers 5 would use lm_head.weight, other readers would not."""
    save_model(model(tied=True), tmp_path / "m", dtype=torch.bfloat16)
    for row in None, 0, 36:
        head = load_model(tmp_path / "m").head.detach().double()
        if row is not None:
            head[row, 3] += 1
        rewrite(tmp_path / "m", lambda tensors: tensors.update({"lm_head.weight": head}))
        if row is None:
            assert load_model(tmp_path / "m")
        else:
            for load in load_model, load_head:
                assert "ties the head to the embedding, but lm_head.weight differs from it" in refusal(load, tmp_path / "m")
        rewrite(tmp_path / "m", lambda tensors: tensors.pop("lm_head.weight"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32])
def test_a_tied_head_is_compared_with_an_embedding_in_float8(folder, dtype):
    for more in 0, 1:
        save_model(model(tied=True), folder)
        table = load_file(folder / "model.safetensors")[EMBED].sign()           # which float8 holds exactly
        rewrite(folder, lambda tensors: tensors.update({EMBED: table.to(torch.float8_e4m3fn),
                                                        "lm_head.weight": (table + more).to(dtype)}))
        if more:
            assert "lm_head.weight differs from it" in refusal(load_model, folder)
        else:
            assert torch.equal(load_model(folder).head, table)


def test_the_tables_that_old_checkpoints_store_are_passed_over(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert same(model(), load_model(folder))


def test_a_bias_of_zeros_that_the_model_has_no_place_for_is_passed_over(folder):
    """As AutoGPTQ writes for every layer; any other bias would change what the model computes."""
    name = "model.layers.0.mlp.up_proj.bias"
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(8, dtype=torch.float16)}))
    assert same(model(), load_model(folder))
    rewrite(folder, lambda tensors: tensors.update({name: torch.tensor([0.0] * 7 + [1e-3])}))
    assert f"tensor {name} [8] is not part of the model" in refusal(load_model, folder)


def test_shards_of_another_naming_and_order_load(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((sharded / INDEX).read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    assert index["weight_map"].keys() == model().state_dict().keys()
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model().parameters())
    shards[0].rename(sharded / "zebra.safetensors")
    moved = {key: "zebra.safetensors" if file == shards[0].name else file for key, file in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert same(model(), load_model(sharded))


def test_shards_are_in_the_order_of_their_names(tmp_path):
    """A run's identity is their hashes in this order."""
    names = [f"model-{i:05d}-of-00009.safetensors" for i in range(1, 10)]
    where = {f"t{i}": name for i, name in enumerate(reversed(names))}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    assert shards_of(tmp_path) == names


def test_the_dtype_of_the_embeddings_is_told(sharded):
    assert stored_dtype(sharded) == torch.float32
    first = next(file for file in sharded.glob("*.safetensors") if EMBED in load_file(file))
    save_file({key: tensor.half() for key, tensor in load_file(first).items()}, first)
    assert stored_dtype(sharded) == torch.float16


def test_two_files_have_an_index_already(tmp_path):
    save_model(model(), tmp_path, shard_bytes=sum(p.nbytes for p in model().parameters()) - 1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2 and same(model(), load_model(tmp_path))


def test_each_shard_holds_what_fits_and_at_least_one_tensor(tmp_path):
    for most in 2_400, 1_000:                                                   # the embeddings are 37 x 16 x 4 bytes
        save_model(model(), tmp_path, shard_bytes=most)
        held = [list(load_file(file).values()) for file in sorted(tmp_path.glob("*.safetensors"))]
        assert same(model(), load_model(tmp_path))
        assert all(len(shard) == 1 or 0 < sum(t.nbytes for t in shard) <= most for shard in held)
        assert [file.name[:14] for file in sorted(tmp_path.glob("*.safetensors"))] == [
            f"model-{i:05d}-of" for i in range(1, len(held) + 1)]


# ---- what is refused, by name

def test_a_missing_tensor_is_named_with_the_shape_it_should_have(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    assert "model.layers.1.self_attn.k_proj.bias [8] is missing" in refusal(load_model, folder)


def test_a_surplus_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}))
    text = refusal(load_model, folder)
    assert "model.layers.2.mlp.up_proj.weight [24, 16] is not part" in text and "model.safetensors" in text


def test_a_misshapen_tensor_is_named_with_both_shapes(folder):
    rewrite(folder, lambda tensors: tensors.update({EMBED: torch.zeros(38, 16)}))
    assert f"{EMBED} is [38, 16], but config.json asks for [37, 16]; use files" in refusal(load_model, folder)


def test_an_integer_tensor_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({NORM: torch.ones(16, dtype=torch.int8)}))
    assert f"{NORM} is torch.int8, not a float tensor" in refusal(load_model, folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1], ids=str)
def test_a_truncated_file_is_named_with_its_size(folder, kept):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:int(kept * len(data)) if isinstance(kept, float) else kept])
    text = refusal(load_model, folder)
    assert text.startswith(f"{path}: is damaged or truncated, {path.stat().st_size:,} bytes (")


def test_gits_pointer_to_a_file_is_not_called_damaged(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert refusal(load_model, folder) == (f"{folder / 'model.safetensors'}: is only a Git LFS pointer, not the file itself; run "
                               "`git lfs pull` in its folder")


@pytest.mark.parametrize("held, said", [
    (["adapter_config.json", "adapter_model.safetensors"], "is a LoRA adapter; merge it into its base model first"),
    (["q4.gguf", "q8.gguf"], "holds GGUF files; give the folder with safetensors"),
    (["checkpoint-500/config.json", "checkpoint-1000/config.json", "runs/x"],
     "holds a training run; give one of its models, the folders checkpoint-*"),
    (["checkpoint-500-merged/x", "checkpoint-7.zip"], "config.json: is missing; give the folder of a Hugging Face model"),
    (["notes.txt"], "config.json: is missing; give the folder of a Hugging Face model")])
def test_a_folder_of_another_kind_is_called_what_it_is(tmp_path, held, said):
    for name in held:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert said in refusal(load_model, tmp_path)


def test_an_index_that_names_an_absent_file_is_refused(sharded):
    absent = sorted(sharded.glob("*.safetensors"))[1]
    absent.unlink()
    text = refusal(load_model, sharded)
    assert text.startswith(f"{sharded / INDEX}: names {absent.name}, which is not in the folder")


@pytest.mark.parametrize("content, complaint", [
    ('{"weight_map": {"a"', "is not JSON"), ("[]", "holds a list"), ('{"metadata": {}}', "has no weight_map"),
    ('{"weight_map": []}', "has no weight_map"), ('{"weight_map": {"a": 1}}', "has no weight_map"),
    ('{"weight_map": {"a": "../model.safetensors"}}', "has no weight_map from tensors to files in its folder"),
    ('{"weight_map": {"a": "model.safetensors", "b": "../model.safetensors"}}', "has no weight_map"),
    ('{"weight_map": {"a": "."}}', "has no weight_map"), ('{"weight_map": {}}', f"{EMBED} [37, 16] is missing")])
def test_a_damaged_index_is_named(sharded, content, complaint):
    (sharded / INDEX).write_text(content)
    assert complaint in refusal(load_model, sharded)


def test_pickled_weights_are_not_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only pickled weights (*.bin)" in refusal(load_model, folder) and "save_pretrained(...)" in refusal(load_model, folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(load_model, folder).startswith(f"{folder}: has neither model.safetensors nor {INDEX}")


@pytest.mark.parametrize("content, complaint", [(None, "is missing"), ("{", "is not JSON"), ("[]", "holds a list"),
                                                ('{"model_type": "llama"}', "model_type = 'llama'"),
                                                ('{"model_type": "qwen2", "hidden_size": 1000000000000}', "are impossible"),
                                                ('{"model_type": "qwen2", "hidden_size": 1%s}' % ("0" * 30), "are impossible")])
def test_a_config_that_is_not_there_or_not_ours_is_named(folder, content, complaint):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    text = refusal(load_model, folder)
    assert text.startswith(f"{folder / 'config.json'}: ") and complaint in text


def test_weights_of_another_model_are_refused(tmp_path, folder):
    save_model(model(tied=True), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", folder)
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    assert load_model(folder).config.tie_word_embeddings
    change_json(folder / "config.json", num_hidden_layers=1)
    assert "model.layers.1." in refusal(load_model, folder) and "is not part" in refusal(load_model, folder)


@pytest.mark.parametrize("name", ["embed_tokens", "layers.0.mlp.up_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, name, value):
    spoilt = small(0)
    spoilt.model.get_submodule(name).weight.data[-1, 2] = value
    save_model(spoilt.bfloat16(), tmp_path)
    assert f"model.{name}.weight: has values that are not finite" in refusal(load_model, tmp_path)


def test_weights_that_overflow_in_the_dtype_asked_for_are_named(tmp_path):
    large = small(0)
    large.head.data[-1, 2] = 1e5
    save_model(large, tmp_path)
    assert load_model(tmp_path).head.max() == 1e5
    for load in load_model, load_head:
        assert "embed_tokens.weight: has values that are not finite in torch.float16" in refusal(
            load, tmp_path, dtype=torch.float16)


def test_a_link_to_nothing_or_a_folder_in_the_weights_place_is_named(folder):
    weights = folder / "model.safetensors"
    for replace in lambda: weights.symlink_to("gone"), weights.mkdir:
        weights.unlink()
        replace()
        assert "model.safetensors: is not a file; fetch the model again" in refusal(load_model, folder)


def test_a_file_that_is_missing_or_may_not_be_opened_is_named(tmp_path):
    said = refusal(open_tensors, tmp_path / "no.safetensors")                   # safetensors says the same of both
    assert said.endswith("no.safetensors: is missing, or cannot be opened; check its permissions, or fetch it again")


def test_a_tensor_of_a_dtype_that_torch_lacks_is_one_line(folder):
    """Four-bit floats, as in NVFP4 folders."""
    path = folder / "model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header, data = json.loads(path.read_bytes()[8:8 + length]), path.read_bytes()[8 + length:]
    start, end = header[NORM]["data_offsets"]
    header[NORM] |= {"dtype": "F4", "shape": [2 * (end - start)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert "norm.weight: cannot be read" in refusal(read_tensor, path, NORM)


def test_a_model_that_is_replaced_while_it_is_hashed_is_another(folder, monkeypatch):
    hashes = Checkpoint.hashes

    def slowly(self):
        found = hashes(self)
        monkeypatch.undo()
        save_model(model(seed=9), folder)
        return found

    monkeypatch.setattr(Checkpoint, "hashes", slowly)
    begun = Checkpoint(folder)
    assert "m: has changed since this run began" in refusal(begun.check)


# ---- what a save leaves

def test_a_save_keeps_the_tokenizer_the_log_and_the_subfolders_and_replaces_the_weights(sharded):
    (sharded / "state").mkdir()
    for name in "tokenizer.json", "log.jsonl", "state/optimizer.pt", "quantize_config.json":
        (sharded / name).write_text("{}")
    save_model(model(seed=1), sharded)
    assert set(files_in(sharded)) == {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl", "state/optimizer.pt"}
    assert same(model(seed=1), load_model(sharded))
    save_model(model(), sharded, shard_bytes=6_000)          # and back: no single file is left to be read instead
    assert not (sharded / "model.safetensors").exists() and same(model(), load_model(sharded))


def test_whoever_may_read_the_config_may_read_the_weights(folder):
    modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_save_into_the_folder_it_was_loaded_from_is_safe(folder):
    save_model(load_model(folder), folder)
    assert same(model(), load_model(folder))


def test_weights_that_load_model_would_refuse_are_not_saved(folder):
    before, large = files_in(folder), load_model(folder)
    said = "not saved, as model.norm.weight has values that are not finite in torch.float16"
    large.model.norm.weight.data[0] = 7e4
    assert said in refusal(save_model, large, folder, torch.float16)
    large.half().model.norm.float().weight.data[0] = 7e4        # the head has that dtype already
    assert said in refusal(save_model, large, folder, torch.float16)
    assert files_in(folder) == before
    save_model(large, folder, torch.bfloat16)                   # which can hold it


@pytest.mark.parametrize("shards_written", [0, 2])
def test_a_save_that_fails_in_the_middle_leaves_the_old_folder_whole(sharded, monkeypatch, shards_written):
    before, written = files_in(sharded), []

    def full_disk(tensors, path, metadata):
        if len(written) == shards_written:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(save_file(tensors, path, metadata=metadata))
    monkeypatch.setattr(checkpoint, "save_tensors", full_disk)
    with pytest.raises(OSError):
        save_model(model(seed=1), sharded, shard_bytes=6_000)
    assert len(written) == shards_written and files_in(sharded) == before
    assert [path.name for path in sharded.parent.iterdir()] == [sharded.name]
    assert same(model(), load_model(sharded))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_save_that_is_killed_in_the_middle_leaves_the_old_folder_whole(folder):
    before = files_in(folder)
    child = os.fork()
    if child == 0:                                          # no finally, no atexit: as kill -9 from outside
        def die(tensors, path, metadata):
            save_file(tensors, path, metadata=metadata)
            os.kill(os.getpid(), 9)
        checkpoint.save_tensors = die
        save_model(model(seed=1), folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert files_in(folder) == before and same(model(), load_model(folder))
    save_model(model(seed=1), folder)                        # and what it left beside is in nobody's way
    assert same(model(seed=1), load_model(folder))


# ---- memory

PEAK = """
import sys, torch
from minikd.checkpoint import load_model
def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
for folder in sys.argv[2:]:
    load_model(folder)                                      # whatever is imported or allocated only once
assert "sympy" not in sys.modules                           # most of torch's functions on the meta device import it
for dtype in (torch.bfloat16, torch.float32):
    open("/proc/self/clear_refs", "w").write("5")           # the peak starts anew
    start = memory("VmRSS")
    model = load_model(sys.argv[1], dtype=dtype)
    print((memory("VmHWM") - start) / sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_loading_never_holds_a_second_copy_of_the_model(tmp_path, folder):
    config = Qwen2Config(vocab_size=20_000, hidden_size=512, intermediate_size=2048, num_hidden_layers=7,
                         num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True)
    with torch.device("meta"):
        big = Qwen2(config)
    big = big.bfloat16().to_empty(device="cpu")             # 75 MB; the weights' values do not matter
    with torch.no_grad():
        for parameter in big.parameters():
            parameter.zero_()
    save_model(big, tmp_path / "big")
    save_model(rounded()[1], tmp_path / "four bits")
    done = subprocess.run([sys.executable, "-c", PEAK, tmp_path / "big", folder, tmp_path / "four bits"], capture_output=True,
                          text=True, cwd=ROOT, check=True)
    same_dtype, wider = map(float, done.stdout.split())
    assert 0.5 < same_dtype < 1.25 and 0.5 < wider < 1.25   # the bound on a real shape, 1.15, is benchmarks/'


# ---- 4-bit folders

SHAPE = dict(vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, initializer_range=0.3)


def rounded(tied=True, sym=True, group=32, seed=3):
    """A model with every layer rounded to nearest in place, and the same with packed layers."""
    plain = Qwen2(Qwen2Config(**SHAPE | dict(tie_word_embeddings=tied))).init_weights(seed).eval()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("bias"):
                weight.copy_(torch.linspace(-1, 1, len(weight)).half().float())
    layers = {}
    for name, layer in plain.named_modules():
        if name.startswith("model.layers.") and hasattr(layer, "weight") and layer.weight.dim() == 2:
            found = round_to_nearest(layer.weight.detach(), group_size=group, sym=sym)
            layers[name] = to_words(*found, version=1 if sym else 2)
            with torch.no_grad():
                layer.weight.copy_(dequantize_groups(*found))
    return plain, to_w4(copy.deepcopy(plain), layers, group, sym, damp_percent=0.01)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sym", [True, False])
def test_a_4_bit_folder_is_the_rounded_model(tmp_path, tied, sym):
    plain, packed = rounded(tied, sym)
    save_model(packed, tmp_path / "w4", dtype=torch.bfloat16)
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(packed(ids), plain(ids), rtol=1e-5, atol=1e-5)
    again = load_model(tmp_path / "w4")
    save_model(plain, tmp_path / "plain", dtype=torch.bfloat16)                 # whose embeddings lose the same bits
    for name, layer in again.named_modules():
        if isinstance(layer, W4Linear):
            assert torch.equal(layer.weight(), plain.get_submodule(name).weight)
            assert layer.scales.dtype == torch.float16
    for dtype in torch.float32, torch.bfloat16:
        loaded = load_model(tmp_path / "w4", dtype=dtype)
        assert loaded.model.layers[0].mlp.up_proj.scales.dtype == torch.float16 # not rounded by the model's own dtype
        with torch.no_grad():
            ours, theirs = loaded(ids).float(), load_model(tmp_path / "w4")(ids)
        assert float((ours - theirs).norm() / theirs.norm()) < (1e-6 if dtype == torch.float32 else 0.06)
    config = json.loads((tmp_path / "w4/config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "w4/quantize_config.json").read_text())
    assert {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": sym, "desc_act": False,
            "checkpoint_format": "gptq" if sym else "gptq_v2"}.items() <= config.items()
    with safe_open(tmp_path / "w4/model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied
    save_model(again, tmp_path / "twice")
    assert (load_model(tmp_path / "twice").state_dict()["model.layers.1.mlp.down_proj.qweight"]
            == packed.state_dict()["model.layers.1.mlp.down_proj.qweight"]).all()


def test_a_4_bit_layer_may_be_one_group(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPE, "intermediate_size", 64)
    plain, packed = rounded(group=64)
    save_model(packed, tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids), plain(ids), rtol=1e-3, atol=1e-3)


def test_a_4_bit_model_answers_as_any_other(tmp_path):
    plain, packed = rounded()
    save_model(packed, tmp_path)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert generate(load_model(tmp_path), prompts, 20) == generate(plain, prompts, 20)
    narrow = load_model(tmp_path, dtype=torch.bfloat16)
    assert [len(row) for row in generate(narrow, prompts, 20)] == [20, 20, 20]


@pytest.mark.parametrize("names", [["quantization"], ["quantization", "quantization_config"]])
def test_mlx_s_quantisation_is_called_so(folder, names):
    change_json(folder / "config.json", **dict.fromkeys(names, {"group_size": 64, "bits": 4}))
    assert "`quantization` is MLX's; minikd reads the gptq format" in refusal(load_model, folder)


@pytest.mark.parametrize("changed, said", [
    ({"quant_method": "awq"}, "quant_method = 'awq'"), ({"bits": 8}, "bits = 8"), ({"group_size": "128"}, "group_size = '128'"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin'"), ({"lm_head": True}, "lm_head = True"),
    ({"group_size": 48}, "group_size = 48, which does not divide the inputs"), (None, "quantization_config is not an object"),
    ({"format": "gptq_v2"}, "has format = 'gptq_v2'"), ({"pack_dtype": "int64"}, "has pack_dtype = 'int64'"),
    ({"dynamic": {"-:.*down": {}}}, "has dynamic = "),
    ({"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, "symmetric zero points are 8, these are 7")])
def test_another_quantisation_is_one_line(tmp_path, changed, said):
    _, packed = rounded()
    save_model(packed, tmp_path)
    change_json(tmp_path / "config.json", quantization_config="gptq" if changed is None else packed.quantization | changed)
    assert said in refusal(load_model, tmp_path)


def test_the_format_is_read_under_its_older_name_too(tmp_path):
    plain, packed = rounded(sym=False)
    save_model(packed, tmp_path)
    change_json(tmp_path / "config.json", quantization_config=packed.quantization | {"checkpoint_format": None})
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(ids), plain(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name, at, value, said", [
    ("g_idx", 3, 9, "names a group outside 0 to 2"), ("g_idx", 3, -1, "names a group outside 0 to 2"),
    ("scales", (0, 1), float("nan"), "not finite"),
    ("qzeros", slice(None), -0x77777778, "symmetric zero points are 8, these are 9")])     # version 2's 8, read as version 1
def test_words_that_are_damaged_are_refused_by_their_layer(tmp_path, name, at, value, said):
    _, packed = rounded()
    getattr(packed.model.layers[1].mlp.down_proj, name)[at] = value
    save_model(packed, tmp_path)
    found = refusal(load_model, tmp_path)
    assert f"model.layers.1.mlp.down_proj.{name}: " in found and said in found


def test_a_4_bit_folder_without_its_settings_says_where_they_are(tmp_path):
    _, packed = rounded()
    save_model(packed, tmp_path)
    change_json(tmp_path / "config.json", quantization_config=None)
    assert "add one with the content of quantize_config.json" in refusal(load_model, tmp_path)
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == packed.quantization


def test_settings_that_are_null_are_the_defaults(tmp_path):
    _, packed = rounded()
    save_model(packed, tmp_path)
    nulls = dict.fromkeys(["checkpoint_format", "format", "pack_dtype", "lm_head", "dynamic", "sym"])
    change_json(tmp_path / "config.json", quantization_config=packed.quantization | nulls)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(ids), packed(ids))
    packed.model.layers[1].mlp.down_proj.qzeros[:] = -0x77777778    # version 2's 8: symmetric unless it says otherwise
    save_model(packed, tmp_path)
    change_json(tmp_path / "config.json", quantization_config=packed.quantization | nulls)
    assert "symmetric zero points are 8, these are 9" in refusal(load_model, tmp_path)
