"""quantize.py as it is used: a tiny model, two dozen records, and every way to call it."""
import functools
import itertools
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import eval_rouge
import quantize as qz
import train_grpo
import train_kd
from conftest import DOLLY, change_json, files_in, locked_by_another, passed, refusal, refused, tiny, write_records
from minikd import checkpoint
from minikd.checkpoint import load_model, read_quantization, save_model
from minikd.data import encode_examples
from minikd.examples import load_examples
from minikd.model import Qwen2
from minikd.run import LOCKS, read_log
from minikd.w4 import W4Linear


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny(1, tokenizer, folder / "model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
         num_key_value_heads=2, initializer_range=0.2)
    write_records(folder / "data.jsonl", *({"instruction": f"What is {i}?", "response": f"It is {i}."} for i in range(24)))
    write_records(folder / "text.jsonl", *({"text": f"Page {i} of a book. " * 9} for i in range(9)))
    return folder


@pytest.fixture
def run(world, shell, tmp_path):
    """run(*flags) -> (exit status, stdout, stderr), as a shell would see them."""
    def call(*flags, model=("--model", world / "model"), data=("--calibration", world / "data.jsonl"),
             out=("--out", tmp_path / "w4")):
        return shell(qz, *model, *data, *out, *"--group-size 16 --dtype float32 --device cpu".split(), *flags)
    return call


@pytest.fixture
def computed(spy) -> list[tuple]:
    """Of every forward pass: whether the model has 4 bits, whether it generates, and its dtype."""
    return spy(Qwen2, "hidden", lambda model, ids, cache=None, **options: (
        model.quantization is not None, cache is not None, model.head.dtype))


IDS = torch.randint(400, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(folder) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(IDS)


# ---- the folder

@pytest.mark.parametrize("flags, version", [([], "gptq"), (["--method", "rtn"], "gptq"), (["--asym"], "gptq_v2"),
                                            (["--no-act-order", "--clip-search"], "gptq"), (["--group-size", "-1"], "gptq")])
def test_the_folder_loads_and_is_near_the_model(run, world, tmp_path, flags, version):
    out, model = passed(run(*flags)), load_model(tmp_path / "w4")
    layers = [layer for layer in model.modules() if isinstance(layer, W4Linear)]
    assert len(layers) == 14 and model.quantization["checkpoint_format"] == version
    far = float((logits(tmp_path / "w4") - logits(world / "model")).norm() / logits(world / "model").norm())
    assert 0.001 < far < 0.5
    assert torch.equal(model.head, load_model(world / "model").head)
    assert {"tokenizer.json", "generation_config.json", "quantize_config.json"} <= {
        path.name for path in (tmp_path / "w4").iterdir()}
    assert f"{tmp_path / 'w4'}: " in out and " MB" in out
    assert ("calibration: 24 rows" in out) == ("rtn" not in flags)
    shares = r"; output error 0\.\d\d x that of rounding, averaged over the layers, at most 0\.\d\d x \(model"
    assert bool(re.search(shares, out)) == ("rtn" not in flags)
    assert ("damp_percent" in model.quantization["meta"]) == ("rtn" not in flags)
    assert model.quantization["meta"]["mse"] == 2.4 * ("--clip-search" in flags)


def test_each_flag_of_the_solve_changes_it(run, tmp_path):
    flags = ([], ["--no-act-order"], ["--damp", "0.5"], ["--clip-search"], ["--seed", "1", "--samples", "4"], ["--samples", "4"],
             ["--group-size", "8"], ["--asym"])
    found = []
    for i, more in enumerate(flags):
        assert run(*more, out=("--out", tmp_path / str(i)))[0] == 0
        found.append(logits(tmp_path / str(i)))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_a_damp_that_gptqmodel_refuses_is_not_in_the_folder(run, tmp_path):
    for damp, named in (0, False), (1, False), (0.5, True):
        assert run("--damp", damp)[0] == 0
        assert read_quantization(tmp_path / "w4")["meta"].get("damp_percent") == (damp if named else None)


def test_on_a_cpu_without_bfloat16_inputs_are_in_float32_and_what_is_not_packed_keeps_its_dtype(shell, world, tmp_path,
                                                                                               native_bfloat16):
    native_bfloat16(False)
    shutil.copytree(world / "model", tmp_path / "narrow")
    save_model(load_model(tmp_path / "narrow"), tmp_path / "narrow", dtype=torch.bfloat16)
    saved = {}
    for dtype in "auto", "float32", "bfloat16":
        passed(shell(qz, "--model", tmp_path / "narrow", "--calibration", world / "data.jsonl", "--group-size", 16,
                     "--out", tmp_path / dtype, "--device", "cpu", "--dtype", dtype))
        saved[dtype] = load_file(tmp_path / dtype / "model.safetensors")
        assert saved[dtype]["model.embed_tokens.weight"].dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)
        assert dtype == "bfloat16" or torch.equal(load_model(tmp_path / dtype).head, load_model(tmp_path / "narrow").head)
    differ = lambda dtype: [key for key in saved["auto"] if key.endswith(("qweight", "scales"))
                            and not torch.equal(saved["auto"][key], saved[dtype][key])]
    assert not differ("float32") and differ("bfloat16")


@pytest.mark.parametrize("native", [True, False])
def test_what_is_not_packed_of_a_float16_model_stays_as_it_is_on_any_cpu(shell, world, tmp_path, native_bfloat16, native):
    native_bfloat16(native)                                                     # inputs in bfloat16, or in float32
    shutil.copytree(world / "model", tmp_path / "half")
    save_model(load_model(tmp_path / "half"), tmp_path / "half", dtype=torch.float16)
    passed(shell(qz, "--model", tmp_path / "half", "--calibration", world / "data.jsonl", "--group-size", 16,
                 "--out", tmp_path / "w4", "--device", "cpu"))
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "half", tmp_path / "w4"))
    kept = before.keys() & after.keys()
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"} <= kept
    assert all(after[key].dtype == torch.float16 and torch.equal(after[key], before[key]) for key in kept)


def test_a_kill_in_the_middle_leaves_nothing_that_loads(run, tmp_path):
    def write(tensors, path, *rest):
        Path(path).write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)

    out = tmp_path / "w4"
    for before in False, True:                                                  # nothing there; an earlier one
        if before:
            assert run("--method", "rtn", out=("--out", out))[0] == 0
            weights = load_model(out).state_dict()
            for held in list(LOCKS):                                                # the earlier run has ended
                LOCKS.pop(held).close()
        child = os.fork()
        if child == 0:
            checkpoint.save_tensors = write
            try:
                run("--method", "rtn", out=("--out", out))          # without products: a Mac's BLAS may crash in a fork
            finally:
                os._exit(1)                                                     # it was not killed
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert (out / "config.json").exists() == before
    assert all(torch.equal(value, weights[key]) for key, value in load_model(out).state_dict().items())


def test_a_folder_that_is_quantised_already_is_refused(run, tmp_path):
    assert run("--method", "rtn")[0] == 0
    refused(run("--method", "rtn", model=("--model", tmp_path / "w4"), data=(), out=("--out", tmp_path / "again")),
            "w4: is quantised already; give the folder it was made from")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("script, flags", [(train_kd, ["--loss", "sft", "--student"]),
                                           (train_grpo, ["--rewards", "answer", "--model"])])
def test_four_bits_are_not_trained(run, shell, world, tmp_path, script, flags):
    assert run("--method", "rtn")[0] == 0
    refused(shell(script, *flags, tmp_path / "w4", "--data", world / "data.jsonl", "--out", tmp_path / "run"),
            "holds 4-bit weights, which cannot be trained")


@pytest.mark.parametrize("flags, avx512", [
    ("--loss forward_kl --cache-teacher {out}/states", False), ("--loss reverse_kl", False), ("--loss reverse_kl", True),
    ("--loss minillm --rollouts 4", False), ("--loss jsd --seq-kd", False)])
def test_four_bits_teach(run, shell, world, tmp_path, native_bfloat16, computed, flags, avx512):
    """In bfloat16 on any CPU, whatever the student's dtype is there: they answer 20 x as fast."""
    native_bfloat16(avx512)
    assert run("--method", "rtn")[0] == 0
    out = tmp_path / "run"
    teach = functools.partial(shell, train_kd, *"--device cpu --steps 2 --lr 1e-3 --batch-size 4 --max-new-tokens 3".split(),
                              "--student", world / "model", "--teacher", tmp_path / "w4", "--data", world / "data.jsonl",
                              "--out", out, *flags.format(out=out).split())
    computed.clear()
    assert "Teacher" in passed(teach()) and sum("kd" in line for line in read_log(out)) == 2
    own = torch.bfloat16 if avx512 else torch.float32
    assert {(True, False, torch.bfloat16), (True, True, torch.bfloat16), (False, True, own)} <= set(computed)
    assert {dtype for four_bits, _, dtype in computed if four_bits} == {torch.bfloat16}
    for dtype in "float32", "bfloat16":                                         # float32 would be the teacher's too
        status, _, err = teach("--resume", "--dtype", dtype)
        assert (status, "--resume with --dtype" in err) == ((0, False) if avx512 and dtype == "bfloat16" else (2, True))


# ---- calibration

@pytest.mark.parametrize("flags, said", [
    (["--samples", "24"], r"tokens$"), ([], r"note: fewer than --samples 128\)$"),
    (["--samples", "1", "--length", "40"], r"calibration: 1 rows, \d\d tokens \(note: fewer tokens than the 64 inputs of a layer")])
def test_little_calibration_is_noted(run, world, flags, said):
    data = world / ("text.jsonl" if "--length" in flags else "data.jsonl")
    assert re.search(said, passed(run(*flags, data=("--calibration", data))), re.MULTILINE)


def test_no_more_records_are_encoded_than_are_drawn(world, tokenizer, tmp_path, monkeypatch, spy):
    encoded = spy(qz, "encode_examples", lambda part, *_: len(part))
    rows = [qz.calibration_rows([world / "data.jsonl"], tokenizer, 4, 512, "chatml", seed) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2] and len(rows[0]) == 4 and encoded == [4, 4, 4]
    longest = max(map(len, qz.calibration_rows([world / "data.jsonl"], tokenizer, 1000, 512, "chatml", 0)))
    assert len(qz.calibration_rows([world / "data.jsonl"], tokenizer, 1, longest - 1, "chatml", 0)) == 1
    few = [{"instruction": "word " * 300, "response": "x"}] * 30 + [{"instruction": "a", "response": "b"}]
    assert len(qz.calibration_rows([write_records(tmp_path / "few.jsonl", *few)], tokenizer, 1, 250, "chatml", 0)) == 1
    assert "no record fits --length 3; raise it" in refusal(
        qz.calibration_rows, [world / "data.jsonl"], tokenizer, 4, 3, "chatml", 0)
    monkeypatch.setattr(tokenizer, "template", SimpleNamespace(render=lambda **_: 1 / 0))
    assert "its chat template rejects" in refusal(qz.calibration_rows, [world / "data.jsonl"], tokenizer, 4, 512, "chatml", 0)


def test_calibration_is_drawn_from_all_documents_and_prompts_are_limited_by_length_alone(world, tokenizer, tmp_path):
    rows = qz.calibration_rows([world / "text.jsonl"], tokenizer, 9, 8, "chatml", 0)
    assert len(rows) == 9 and len({row.index for row in rows}) > 2
    data = write_records(tmp_path / "long.jsonl", {"instruction": "q " * 300, "response": "a"})
    [row] = qz.calibration_rows([data], tokenizer, 1, 2048, "chatml", 0)
    assert len(row.prompt) > 300


def test_a_format_says_what_the_records_are(run, tokenizer, tmp_path):
    both = {"instruction": "Say a.", "output": "a.", "text": "One book. " * 9}
    data = write_records(tmp_path / "both.jsonl", both)
    [row] = qz.calibration_rows([data], tokenizer, 9, 512, "chatml", 0, "alpaca")
    assert "Say a." in tokenizer.decode(row.prompt)
    refused(run("--format", "dolly", data=("--calibration", data)), "both.jsonl:1", "response")
    passed(run("--format", "alpaca", data=("--calibration", data)))


def test_rounding_reads_no_calibration_and_says_so(run):
    status, _, err = run("--method", "rtn", data=("--calibration", "never.jsonl"))
    assert status == 0 and "note: ignored with --method rtn: --calibration" in err, err


# ---- the measurement

@torch.no_grad()
def test_perplexity_and_kl_are_those_of_the_full_distributions(run, world, tokenizer, tmp_path):
    rows, _ = encode_examples(load_examples(world / "data.jsonl", limit=5)[0], tokenizer)
    out = passed(run("--method", "rtn", "--eval-data", world / "data.jsonl", "--eval-examples", 5, "--max-new-tokens", 2))
    models = {"unquantised": load_model(world / "model"), "rtn": load_model(tmp_path / "w4")}
    logs = {name: [model(torch.tensor([row.prompt + row.response]))[0, len(row.prompt) - 1:-1].double().log_softmax(-1)
                   for row in rows] for name, model in models.items()}          # [n, V] of each row
    for name, found in logs.items():
        cells = next(line for line in out.splitlines() if line.startswith(name)).split()
        chosen = torch.cat([logq[range(len(logq)), row.response] for logq, row in zip(found, rows)])
        kl = torch.cat([(logp.exp() * (logp - logq)).sum(-1) for logp, logq in zip(logs["unquantised"], found)])
        assert float(cells[2]) == pytest.approx((-chosen.mean()).exp().item(), rel=1e-4)
        assert float(cells[3]) == pytest.approx(kl.mean().item(), abs=6e-5)
    assert kl.mean() > 1e-3                                     # of the rounded model: there is something to see


def test_plain_text_calibrates_too_and_the_evaluation_is_printed(run, world):
    out = passed(run("--eval-data", world / "data.jsonl", "--max-new-tokens", "4", "--eval-examples", "5",
                     data=("--calibration", world / "text.jsonl")))
    rows = [line.split() for line in out.splitlines() if line.startswith(("unquantised", "gptq"))]
    assert len(rows) == 2 and "5 examples" in out
    assert float(rows[1][2]) == pytest.approx(float(rows[0][2]), rel=0.5)       # perplexities


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_without_a_dtype_four_bits_answer_in_bfloat16_on_any_cpu(run, shell, world, tmp_path, native_bfloat16, computed, dtype):
    """torch's int4 operator takes nothing else; their perplexity is computed in the dtype of the unquantised model's."""
    native_bfloat16(False)
    flags = ["--dtype", dtype, "--eval-data", world / "data.jsonl", "--eval-examples", "2", "--max-new-tokens", "2"]
    assert run("--method", "rtn", *flags)[0] == 0
    answers = torch.bfloat16 if dtype == "auto" else torch.float32
    assert set(computed) == {(False, False, torch.float32), (False, True, torch.float32),
                             (True, False, torch.float32), (True, True, answers)}
    computed.clear()
    for folder in world / "model", tmp_path / "w4":
        passed(shell(eval_rouge, "--model", folder, "--data", world / "data.jsonl", "--dtype", dtype, "--limit", "2",
                     "--max-new-tokens", "2", "--out", tmp_path / "answers.jsonl"))
    assert set(computed) == {(False, True, torch.float32), (True, True, answers)}


def test_prompts_too_long_to_evaluate_are_counted_and_nothing_is_cast_in_vain(run, world, tmp_path, spy):
    cast = spy(Qwen2, "to", lambda model, *given: given)
    write_records(tmp_path / "some.jsonl", dict(DOLLY, instruction="long " * 300), DOLLY, DOLLY)
    printed = passed(run("--method", "rtn", "--eval-data", tmp_path / "some.jsonl", "--max-new-tokens", "2"))
    assert "2 of 3 records of --eval-data; 1 dropped: prompt too long\n" in printed
    assert cast.count((torch.float32,)) == 3                                    # by load_model: to quantise, and to measure both
    assert "records of --eval-data" not in run("--method", "rtn", "--eval-data", world / "data.jsonl", "--max-new-tokens", "2",
                                               out=("--out", tmp_path / "again"))[1]


def test_eval_data_without_a_short_prompt_is_one_line_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(qz, "quantize", None)                                   # would fail
    data = write_records(tmp_path / "long.jsonl", {"instruction": "word " * 300, "response": "x"})
    refused(run("--method", "rtn", "--eval-data", data, data=()),
            "long.jsonl: each of the 1 records read has a prompt that is too long, or a stop token")
    assert not (tmp_path / "w4").exists()


# ---- what the user can fix

@pytest.mark.parametrize("flags, said", [
    (dict(data=()), "--method gptq without --calibration"), (dict(out=()), "--model without --out"),
    (dict(flags=["--group-size", "48"]), "--group-size: 32 inputs cannot be cut into groups of 48; give a"),
    (dict(flags=["--bits", "3"]), "--bits 3"), (dict(flags=["--length", "1"]), "--length 1: a row needs at least two tokens"),
    (dict(model=("--model", "no/such")), "no/such: no such folder"),
    (dict(data=("--calibration", "no/such.jsonl")), "no/such.jsonl: no such file"),
    (dict(out=("--out", "{world}/model")), "holds something other than a 4-bit model")])
def test_bad_input_is_one_line(run, world, flags, said):
    flags = {name: [value.format(world=world) for value in values] for name, values in flags.items()}
    refused(run(*flags.pop("flags", []), **flags), said)


@pytest.mark.parametrize("hidden, inner, keys, group, said", [
    (20, 24, 2, -1, "a layer of 20 inputs and 20 outputs cannot be packed"),
    (24, 32, 1, -1, "a layer of 24 inputs and 12 outputs cannot be packed"),
    (32, 20, 2, -1, "a layer of 32 inputs and 20 outputs cannot be packed"),
    (32, 24, 2, 16, "--group-size: 24 inputs cannot be cut into groups of 16")])
def test_layers_of_odd_sizes_are_refused_those_without_whole_groups_before_the_calibration(
        shell, world, tokenizer, tmp_path, monkeypatch, hidden, inner, keys, group, said):
    if group != -1:
        monkeypatch.setattr(qz, "calibration_rows", None)
    tiny(1, tokenizer, tmp_path / "odd", hidden_size=hidden, intermediate_size=inner, num_attention_heads=2,
         num_key_value_heads=keys)
    refused(shell(qz, "--model", tmp_path / "odd", "--calibration", world / "data.jsonl", "--group-size", group,
                  "--device", "cpu", "--out", tmp_path / "w4"), said)


def test_an_out_that_holds_something_else_is_refused_before_the_work(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(qz, "quantize", None)                                   # would fail
    ask = lambda name: run("--method", "rtn", out=("--out", tmp_path / name), data=())
    for folder in "model", "comparison/sft/best":
        shutil.copytree(world / "model", tmp_path / folder)
    for name in "begun/sft/log.jsonl", "adapter/adapter_model.safetensors", "file":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    files = files_in(tmp_path)
    for name in "model", "comparison", "begun", "adapter", "file":
        refused(ask(name), f"{name}: holds something other than a 4-bit model")
    refused(ask("file/below"), "cannot be written")
    assert files_in(tmp_path) == files
    for other in {"quant_method": "fp8"}, {"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 8, "group_size": 8}:
        change_json(tmp_path / "model/config.json", quantization_config=other)
        refused(ask("model"), "holds something other than a 4-bit model")


def test_another_tokenizer_is_not_replaced(run, world, tmp_path):
    (tmp_path / "w4").mkdir()
    (tmp_path / "w4/tokenizer.json").write_bytes(theirs := b'{"version": "1.0"}')
    refused(run("--method", "rtn", data=()), "w4: holds something other than a 4-bit model")
    assert (tmp_path / "w4/tokenizer.json").read_bytes() == theirs
    shutil.copy(world / "model/tokenizer.json", tmp_path / "w4")                # as if a run had been killed after that
    assert run("--method", "rtn")[0] == 0
    (tmp_path / "w4/tokenizer.json").write_bytes(theirs)                        # beside 4-bit weights of another model
    refused(run("--method", "rtn", data=()), "w4: holds a 4-bit model with another tokenizer; choose")
    assert (tmp_path / "w4/tokenizer.json").read_bytes() == theirs


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, monkeypatch, read_only):
    out = tmp_path / "w4"
    assert run("--method", "rtn")[0] == 0
    monkeypatch.setattr(qz, "quantize", None)                                   # would fail
    for folder in out, tmp_path:
        read_only(folder)
        refused(run("--method", "rtn", data=()), f"error: {folder}: cannot be written (Permission denied); choose another")


def test_an_out_that_another_process_writes_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(qz, "quantize", None)                                   # would fail
    (tmp_path / "w4").mkdir()
    with locked_by_another(tmp_path / "w4"):
        refused(run("--method", "rtn", data=()), "w4: another process is writing a run there; wait for it, or choose another")


def test_the_folder_one_works_in_is_refused_before_the_work(run, tmp_path, monkeypatch):
    (tmp_path / "w4").mkdir()
    monkeypatch.chdir(tmp_path / "w4")
    monkeypatch.setattr(qz, "quantize", None)                                   # would fail
    for out in tmp_path / "w4", ".":
        refused(run("--method", "rtn", data=(), out=("--out", out)),
                f"--out {out}: is or contains the current folder; choose another, or one inside it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "w4")
    refused(run("--method", "rtn", data=()), "w4: is a mount point, which cannot be replaced; choose a folder inside it")


# ---- the toy

def test_with_no_flags_the_toy_student_is_quantised_in_both_ways(shell, world, tokenizer, tmp_path, monkeypatch):
    tiny(1, tokenizer, tmp_path / "runs/toy/kd/best", hidden_size=32, intermediate_size=64, num_attention_heads=4,
         num_key_value_heads=2)
    (tmp_path / "runs/toy/data").mkdir()
    for name in "train", "test":
        shutil.copy(world / "data.jsonl", tmp_path / f"runs/toy/data/{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    flags = "--device", "cpu", "--eval-examples", 3, "--max-new-tokens", 4
    shutil.copytree("runs/toy/kd/best", "runs/toy/w4-gptq")                     # the second of the two
    refused(shell(qz, *flags), "w4-gptq: holds something other than a 4-bit model")
    assert not Path("runs/toy/w4-rtn").exists()
    shutil.rmtree("runs/toy/w4-gptq")
    out = passed(shell(qz, *flags))
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["unquantised", "rtn", "gptq"]
    for method in "rtn", "gptq":
        assert load_model(f"runs/toy/w4-{method}").quantization["bits"] == 4


def test_with_no_flags_and_no_toy_student_it_says_what_to_run_first(shell, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused(shell(qz), "run train_kd.py first")
