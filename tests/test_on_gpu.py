"""What runs on a GPU, run on one that the CPU plays (fake_gpu.py): devices, graphs, and every script from end to end."""
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import eval_rouge
import fake_gpu
import quantize
import train_grpo
import train_kd
from conftest import killed_at, small, steps_of, tiny
from fake_gpu import Graph, Played, Wrong, gpu, record
from minikd.command import pick_device
from minikd.data import Encoded
from minikd.generate import Decoding, generate_with_log_probs
from minikd.graphs import GraphedBlocks, Replay
from minikd.layout import can_pack
from minikd.losses import forward_kl
from minikd.model import mixed_precision
from minikd.teacher import Teacher
from minikd.training import apply_gradient, make_optimizer, use_graphs
from minikd.w4 import W4Linear

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23]]


# ---- the fake: what would be an error on a GPU is one here

def test_a_recording_runs_nothing_and_a_replay_reads_what_is_there_by_then():
    with gpu():
        x, count, graph = torch.arange(3.0, device="cuda"), torch.zeros(1, device="cuda"), Graph()
        with record(graph):
            count += 1
            view = x[1:]
            y = view * 2 + count
        assert count.tolist() == [0]
        graph.replay(), graph.replay()
        assert count.tolist() == [2] and y.tolist() == [4, 6]
        view.fill_(5)
        count = torch.zeros(1, device="cuda")                                   # another tensor, which no graph knows
        graph.replay()
        assert y.tolist() == [13, 13] and count.tolist() == [0]


@pytest.mark.parametrize("act", [
    lambda x: x + torch.ones(3), lambda x: torch.cat([x, torch.ones(3)]), lambda x: torch.stack([x[0], torch.ones(())]),
    lambda x: x.numpy(), lambda x: torch.ones(3) @ x, lambda x: torch.zeros(()).add_(x[0]), lambda x: torch.ones(3)[x.long()],
    lambda x: x.index_put_((x.long(),), torch.ones(3)), lambda x: x.pin_memory(), lambda x: x.long()[None] @ x.long()[:, None],
    pytest.param(lambda x: torch.ops.mkldnn._linear_pointwise(x[None], x[None], None, "none", [], ""),
                 marks=pytest.mark.skipif(not can_pack(), reason="this torch has no oneDNN")),
    lambda x: torch.rand(3, device="cuda", generator=torch.Generator()), lambda x: torch.zeros_like(x, device="cpu")])
def test_the_devices_do_not_mix(act):
    with gpu(), pytest.raises(Wrong):
        act(torch.ones(3, device="cuda"))


@pytest.mark.parametrize("act", [lambda x: x.tolist(), lambda x: float(x[0]), lambda x: bool((x > 0).any()), lambda x: x[x > 0],
                                 lambda x: x.cpu(), lambda x: x.copy_(torch.ones(3)), lambda x: Graph().replay(),
                                 lambda x: x + torch.tensor([1.0], device="cuda")])
def test_while_a_graph_is_recorded_the_host_waits_for_nothing(act):
    with gpu():
        x = torch.ones(3, device="cuda")
        with pytest.raises(Wrong, match="recorded"), record(Graph()):
            act(x)
        assert Played.recording is None


def test_what_a_gpu_takes_from_the_cpu():
    with gpu():
        x = torch.arange(3.0, device="cuda")
        x[torch.tensor([0, 2])] = torch.tensor(5.0)                             # indices, and a number
        x += torch.tensor(1.0)
        assert x.tolist() == [6, 2, 6] and x[torch.tensor([True, False, False])].tolist() == [6]


def test_autocast_casts_as_cudas_does():
    with gpu():
        x = torch.ones(3, 3, device="cuda")
        with mixed_precision(x.device, torch.bfloat16):
            product = x @ x
            assert product.dtype == torch.bfloat16 and (x + 1).dtype == torch.float32
            assert product.sum().dtype == product.softmax(-1).dtype == (product ** 2).dtype == torch.float32
            with torch.autocast("cuda", enabled=False):
                assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize("graphs", [True, False])
def test_a_distillation_step_is_launched_without_waiting_for_the_gpu(monkeypatch, graphs):
    waited = []
    monkeypatch.setattr(fake_gpu, "wait", waited.append)
    rows = [Encoded([5, 6, 7], [8, 9], False, 0), Encoded([5], [8, 9, 10, 11], True, 1)]
    with gpu():
        student, teacher = small(0).to("cuda").train(), Teacher(small(1).to("cuda").requires_grad_(False))
        optimizer = make_optimizer(student, 1e-3, in_place=True)
        if graphs:
            use_graphs(student, torch.bfloat16)
        for _ in range(2):                                                      # recorded, and replayed
            sums = train_kd.forward_backward(rows, student=student, weight=1 / 6, pad_id=0, dtype=torch.bfloat16,
                                             checkpointing=False, teacher=teacher, divergence=forward_kl, kd_ratio=0.5)
            apply_gradient(student, optimizer, 1e-3, 1.0)
        assert not fake_gpu.WAITS & set(waited)
        assert all(block.self_attn.joined and block.mlp.joined for block in teacher.model.model.layers)     # fewer launches
        assert float(sums[0]) > 0 and fake_gpu.WAITS & set(waited)              # reading a number does wait


def test_a_students_products_are_joined_in_training_alone_and_a_teachers_for_good():
    with gpu():
        student, x = small(0).to("cuda"), torch.ones(1, 2, 16, device="cuda")
        mlp = student.model.layers[0].mlp
        joined = lambda: mlp.one_product(x) is not None
        with mixed_precision(x.device, torch.bfloat16):
            assert joined()
            mlp.gate_proj, plain = W4Linear(32, 8, 32, False, 1), mlp.gate_proj
            assert not joined()                                                 # it has no weight to join
            mlp.gate_proj = plain
            with torch.no_grad():
                assert not joined()
        assert not joined()                                                     # in float32: copies would be kept for backward
        for frozen in True, False:                                              # one that is trained too keeps its own layers
            Teacher(student.requires_grad_(not frozen))
            assert (mlp.joined is not None) == frozen
            student.lay_back()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_in_float32_each_query_head_gets_keys_of_its_own(monkeypatch, dtype):
    """torch's fused kernel for float32 does not share them; flash attention, which is for 16 bits, does."""
    heads, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **options: (
        heads.append((q.shape[1], k.shape[1], v.shape[1])), attend(q, k, v, **options))[1])
    ids = torch.tensor([[5, 6, 7]])
    right = small(0)(ids)
    with gpu(), mixed_precision(torch.device("cuda"), dtype):
        logits = small(0).to("cuda")(ids.to("cuda")).float().cpu()
    shared, own = heads[0], heads[-1]
    assert shared[0] > shared[1] and own == ((shared[0],) * 3 if dtype == torch.float32 else shared)
    torch.testing.assert_close(logits, right, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.3)


# ---- sampling by graphs

@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=0.7, top_p=0.9, top_k=20, seed=5),
                                     dict(temperature=1.0, samples=2, seed=2, vocab=390), dict(temperature=1.0, mix=0.4, seed=1)])
@pytest.mark.parametrize("prompts", [PROMPTS, pytest.param([[5, 6], [7, 8]], marks=pytest.mark.slow)], ids=["gaps", "none"])
def test_replayed_graphs_draw_the_plain_paths_tokens(monkeypatch, options, prompts):
    used, replay = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: (used.append(graph), replay(graph)))

    def answers(device, stops=()):
        model, teacher = small(3).to(device), small(4, hidden_size=24).to(device)
        return generate_with_log_probs(model, prompts, 57, eos_ids=stops, teacher=teacher, **options)

    free = answers("cpu")[0]
    for stops, graphs in ((), 1), ({free[0][20], free[1][33], free[-1][17]}, 2):
        used.clear()
        (tokens, logps), (right, right_logps) = (gpu()(answers)("cuda", stops), answers("cpu", stops))
        assert tokens == right and sum(logps, []) == pytest.approx(sum(right_logps, []), abs=1e-5)
        assert len(set(used)) >= min(graphs, len(prompts) - 1) and len(used) > 10   # another one when half of the rows are done


def test_a_step_that_replaces_a_tensor_would_draw_other_tokens(monkeypatch):
    """What a graph reads must be written in place: the test above notices if it is not."""
    def step(rows, real=Decoding.step):
        place, before = rows.tokens, rows.tokens.clone()
        real(rows)
        rows.tokens = place.clone()                                             # as if it had not been written in place
        place.copy_(before)

    free = generate_with_log_probs(small(3), PROMPTS, 40, 0.0)[0]
    monkeypatch.setattr(Decoding, "step", step)
    assert generate_with_log_probs(small(3), PROMPTS, 40, 0.0)[0] == free
    with gpu():
        assert generate_with_log_probs(small(3).to("cuda"), PROMPTS, 40, 0.0)[0] != free


def test_a_recording_that_fails_is_made_again():
    fail = [True]

    def step():
        if Played.recording is not None and fail:
            raise MemoryError(fail.pop())
        count.add_(1)

    with gpu():
        count, replay = torch.zeros(1, device="cuda"), Replay(step, on=True)
        replay()
        with pytest.raises(MemoryError):
            replay()
        replay(), replay()
        assert count.tolist() == [3]


def test_no_graph_is_recorded_of_another_gpu_than_the_current_one(monkeypatch):
    """Such a graph would stay empty, without an error. The scripts make --device the current GPU."""
    model, made = small(3), []
    right = generate_with_log_probs(model, PROMPTS, 40, 0.0)[0]
    with gpu():
        monkeypatch.setattr(torch.cuda, "set_device", made.append)
        assert pick_device("cuda") == "cuda" and made == [] and pick_device("cuda:0") == "cuda:0" and made == ["cuda:0"]
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
        assert generate_with_log_probs(model.to("cuda"), PROMPTS, 40, 0.0)[0] == right


# ---- the scripts

@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer) -> Path:
    """student/, teacher/ with a taller head, records, sums, plain text, and a reward for low ids: something to learn."""
    folder = tmp_path_factory.mktemp("world")
    tiny(1, tokenizer, folder / "student", hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    tiny(2, tokenizer, folder / "teacher", vocab_size=416, hidden_size=24, num_hidden_layers=2)
    (folder / "ours.py").write_text("def early(completions, problems):\n"
                                    "    return [sum(c < 'N' for c in text) / max(1, len(text)) for text in completions]\n")
    records = {"data": lambda i: {"instruction": f"What is {i} + {i}?", "response": f"It is {2 * i}." * (1 + i % 3)},
               "sums": lambda i: {"question": f"{i}+1", "answer": str(i + 1)}, "text": lambda i: {"text": f"Page {i}. " * 9}}
    for name, make in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(make(i)) + "\n" for i in range(24)))
    return folder


@pytest.fixture
def start(shell, world, tmp_path):
    """start(script, "--flags ...", device, --out's name) -> (exit status, stdout, stderr), in float32 if no flag says more."""
    def call(script, flags: str, device: str, name: str) -> tuple[int, str, str]:
        out = tmp_path / name
        with gpu() if device == "cuda" else nullcontext():
            return shell(script, "--device", device, "--dtype", "float32", "--out", out, *flags.format(w=world, out=out).split())
    return call


@pytest.fixture
def run(start, tmp_path):
    """run(script, "--flags ...", device) -> (stdout, --out) of a run that ends well."""
    def call(script, flags: str, device: str) -> tuple[str, Path]:
        name = f"run{len(list(tmp_path.iterdir()))}"
        status, told, err = start(script, flags, device, name)
        assert status == 0, err
        return told, tmp_path / name
    return call


KD = ("--student {w}/student --teacher {w}/teacher --data {w}/data.jsonl --steps 3 --batch-size 4 --lr 0.01 --max-new-tokens 4 "
      "--eval-every 2 --eval-examples 3 ")
GRPO = ("--model {w}/student --data {w}/sums.jsonl --steps 3 --prompts 2 --group-size 4 --batch-size 3 --max-new-tokens 12 "
        "--lr 0.01 --rewards {w}/ours.py:early,answer --eval-examples 3 ")


@pytest.mark.parametrize("script, flags", [
    (train_kd, KD + "--loss forward_kl --grad-accum 2 --cache-teacher {out}/states"),
    pytest.param(train_kd, KD + "--loss jsd --on-policy 0.5 --gradient-checkpointing", marks=pytest.mark.slow),
    pytest.param(train_kd, KD + "--loss minillm --rollouts 8 --lm-data {w}/text.jsonl", marks=pytest.mark.slow),
    pytest.param(train_kd, KD + "--loss skew_reverse_kl --seq-kd", marks=pytest.mark.slow), (train_grpo, GRPO),
    pytest.param(train_grpo, GRPO + "--inner-epochs 2 --ratio sequence --gradient-checkpointing", marks=pytest.mark.slow)])
def test_a_run_on_a_gpu_learns_what_it_learns_on_a_cpu(run, script, flags):
    ours, theirs = (steps_of(run(script, flags, device)[1]) for device in ("cuda", "cpu"))
    assert len(ours) == len(theirs) > 2
    for line, right in zip(ours, theirs):
        assert line == pytest.approx(right, rel=2e-3, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("script, flags", [
    (train_kd, KD + "--loss minillm --rollouts 16 --inner-epochs 2"),
    (train_grpo, GRPO + "--eval-every 2 --eval-examples 1 --prompts 1 --max-new-tokens 6")])
def test_a_run_stopped_twice_on_a_gpu_goes_on_there_to_the_same_steps(start, tmp_path, script, flags):
    flags += " --steps 6 "
    assert start(script, flags, "cuda", "whole")[0] == 0
    for step, resume in (3, ""), (5, "--resume"):
        with killed_at(step):
            assert start(script, flags + resume, "cuda", "stopped")[0] == 130
    status, _, err = start(script, flags + "--resume", "cuda", "stopped")
    assert status == 0, err
    assert len(steps_of(tmp_path / "whole")) == 6 and steps_of(tmp_path / "stopped") == steps_of(tmp_path / "whole")


@pytest.mark.parametrize("first, then", [("cuda", "cpu"), pytest.param("cpu", "cuda", marks=pytest.mark.slow)])
def test_a_run_goes_on_on_another_device(start, tmp_path, first, then):
    flags = KD + "--loss minillm --rollouts 16 --inner-epochs 2 --steps 5 "
    assert start(train_kd, flags, "cpu", "whole")[0] == 0
    with killed_at(4):                                                          # within its rollouts, which the state holds
        assert start(train_kd, flags, first, "moved")[0] == 130
    status, _, err = start(train_kd, flags + "--resume", then, "moved")
    assert status == 0, err
    for line, right in zip(steps_of(tmp_path / "moved"), steps_of(tmp_path / "whole"), strict=True):
        assert line == pytest.approx(right, rel=2e-3, abs=2e-4)


@pytest.fixture
def recorded(monkeypatch) -> list:
    """Grows by one whenever training's passes are recorded."""
    calls, record_pair = [], GraphedBlocks.record
    monkeypatch.setattr(GraphedBlocks, "record", lambda *given: (calls.append(given), record_pair(*given))[1])
    return calls


@pytest.mark.slow
def test_grpo_in_bfloat16_begins_as_in_float32(run, recorded):
    """It draws other answers, so only means are alike, and those only before the first update."""
    flags = GRPO + "--group-size 12 --batch-size 8 --inner-epochs 2 --drop-flat --norm token --dtype "
    ours, theirs = (steps_of(run(train_grpo, flags + dtype, "cuda")[1]) for dtype in ("bfloat16", "float32"))
    assert len(ours) == 3 and all(line["grad_norm"] > 0.1 for line in ours) and recorded
    assert ours[0]["entropy"] != theirs[0]["entropy"] == pytest.approx(ours[0]["entropy"], rel=0.1)
    assert ours[0]["reward"] == pytest.approx(theirs[0]["reward"], rel=0.2)


@pytest.mark.parametrize("flags, near", [
    ("--loss forward_kl --cache-teacher {out}/states", 0.02), pytest.param("--loss sft", 0.02, marks=pytest.mark.slow),
    pytest.param("--loss reverse_kl --gradient-checkpointing", 0.02, marks=pytest.mark.slow),
    pytest.param("--loss minillm --rollouts 8", 0.3, marks=pytest.mark.slow)])      # draws other answers than in float32
def test_in_bfloat16_a_gpus_autocast_suits_every_operator(run, recorded, flags, near):
    ours, theirs = (steps_of(run(train_kd, KD + flags + " --steps 1" + dtype, "cuda")[1]) for dtype in (" --dtype bfloat16", ""))
    assert ours[0]["ce"] != theirs[0]["ce"] and ours[0]["ce"] == pytest.approx(theirs[0]["ce"], rel=near)
    assert ours[0].get("kd", 0) == pytest.approx(theirs[0].get("kd", 0), rel=2 * near)
    assert bool(recorded) == ("checkpointing" not in flags)


def test_a_model_quantised_on_a_gpu_answers_there_as_on_a_cpu(run):
    """Codes that a graph found column by column; the 4-bit model without minikd's kernel."""
    flags = ("--model {w}/student --calibration {w}/data.jsonl --group-size 16 --eval-data {w}/data.jsonl --eval-examples 2 "
             "--max-new-tokens 20")
    (told, folder), (right, _) = (run(quantize, flags, device) for device in ("cuda", "cpu"))
    table, other = ([[float(cell) for cell in line.split()[1:]] for line in text.splitlines()[-2:]] for text in (told, right))
    assert table[1] == pytest.approx(other[1], rel=1e-3) and table[0][1] != pytest.approx(table[1][1], rel=1e-3)
    asked = f"--model {folder} --data {{w}}/data.jsonl --max-new-tokens 20 --show-ways"
    (told, ours), (right, theirs) = (run(eval_rouge, asked, device) for device in ("cuda", "cpu"))
    assert ours.read_bytes() == theirs.read_bytes() and "dequantise" in told
