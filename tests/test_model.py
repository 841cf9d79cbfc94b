"""The decoder against its formulas written as slow loops, against golden files, and live against transformers."""
import cmath
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import random_ids, random_model
from minikd.checkpoint import load_model, save_model
from minikd.config import Qwen2Config
from minikd.generate import generate
from minikd.model import MLP, Attention, Qwen2, RMSNorm, cast_copy, mixed_precision, rope_tables, rotate

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


# ---- each formula, as a loop

def test_rmsnorm_is_the_formula():
    x, norm = torch.randn(2, 3, 8), RMSNorm(8, eps=1e-2)
    torch.nn.init.normal_(norm.weight)
    weight, y = norm.weight.tolist(), norm(x).tolist()
    for b in range(2):
        for t in range(3):
            size = math.sqrt(sum(float(v) ** 2 for v in x[b, t]) / 8 + 1e-2)    # RMSNorm eq. (4)
            for i in range(8):
                assert y[b][t][i] == pytest.approx(float(x[b, t, i]) / size * weight[i], abs=1e-6)


def test_rmsnorm_survives_squares_that_overflow_in_half():
    x = torch.full((1, 1, 4), 60_000.0, dtype=torch.float16)
    assert torch.equal(RMSNorm(4, eps=1e-6).half()(x), torch.ones(1, 1, 4, dtype=torch.float16))


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rope_turns_complex_numbers(theta):
    B, H, T, E = 2, 3, 5, 8
    x, positions = torch.randn(B, H, T, E), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 100, 101]])
    y = rotate(x, *rope_tables(positions, theta, E, torch.float32))
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for i in range(E // 2):
                    z = complex(x[b, h, t, i], x[b, h, t, i + E // 2])                      # halves, not neighbours
                    z *= cmath.exp(1j * float(positions[b, t]) * theta ** (-2 * i / E))     # RoPE eq. (15), (34)
                    assert complex(y[b, h, t, i], y[b, h, t, i + E // 2]) == pytest.approx(z, abs=2e-5)


@pytest.mark.parametrize("theta, E", [(1e4, 8), (1e6, 64), (1e6, 128)])
def test_rope_is_rounded_as_transformers_rounds_it(theta, E):
    """The weights were trained with one rounding of the frequencies; at position 4,095 another is an angle of 2e-4."""
    qwen = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    rope = {"rope_theta": theta, "rope_type": "default"}
    config = qwen.Qwen2Config(hidden_size=2 * E, num_attention_heads=2, rope_parameters=rope)
    positions = torch.arange(4096)[None]
    expected = qwen.Qwen2RotaryEmbedding(config)(torch.zeros(1), positions)
    for ours, theirs in zip(rope_tables(positions, theta, E, torch.float32), expected, strict=True):
        assert torch.equal(ours[:, 0], theirs)


def test_rope_makes_a_score_depend_on_the_distance_alone():
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(at_q, at_k):
        turn = [rope_tables(torch.tensor([[at]]), 1e4, 16, torch.float32) for at in (at_q, at_k)]
        return float((rotate(q, *turn[0]) * rotate(k, *turn[1])).sum())
    assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (7, 1)])
def test_attention_is_the_formula_and_groups_of_query_heads_share_a_key(H, K):
    E, D, B, T = 4, 12, 2, 5
    attention = Attention(Qwen2Config(hidden_size=D, num_attention_heads=H, num_key_value_heads=K, head_dim=E))
    x, positions = torch.randn(B, T, D), torch.arange(T)[None]
    cos, sin = rope_tables(positions, 1e4, E, torch.float32)
    with torch.no_grad():
        y = attention(x, cos, sin, None)
        # One head at a time; q and k turned as above, v and the projections by plain matrices.
        want = torch.zeros(B, T, H * E)
        for b in range(B):
            for h in range(H):
                kv = h // (H // K)
                rows, kv_rows = slice(h * E, (h + 1) * E), slice(kv * E, (kv + 1) * E)
                q = x[b] @ attention.q_proj.weight[rows].T + attention.q_proj.bias[rows]        # [T, E]
                k = x[b] @ attention.k_proj.weight[kv_rows].T + attention.k_proj.bias[kv_rows]
                v = x[b] @ attention.v_proj.weight[kv_rows].T + attention.v_proj.bias[kv_rows]
                q, k = (rotate(a[None, None], cos, sin)[0, 0] for a in (q, k))
                for t in range(T):
                    weight = [math.exp(float(q[t] @ k[s]) / math.sqrt(E)) for s in range(t + 1)]   # causal
                    for s in range(t + 1):
                        want[b, t, rows] += weight[s] / sum(weight) * v[s]
        want = want @ attention.o_proj.weight.T
    torch.testing.assert_close(y, want, atol=1e-5, rtol=0)
    assert attention.o_proj.bias is None


def test_swiglu_is_the_formula():
    mlp = MLP(Qwen2Config(hidden_size=6, intermediate_size=10))
    x = torch.randn(6)
    with torch.no_grad():
        y = mlp(x)
        gate, up, down = (layer.weight.tolist() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def dot(row):
        return sum(w * float(v) for w, v in zip(row, x))
    wide = [dot(gate[j]) / (1 + math.exp(-dot(gate[j]))) * dot(up[j]) for j in range(10)]   # SwiGLU eq. (6)
    for i in range(6):
        assert float(y[i]) == pytest.approx(sum(down[i][j] * wide[j] for j in range(10)), abs=1e-6)


# ---- the whole

def test_no_token_sees_a_later_one_so_right_padding_needs_no_mask():
    model, ids = random_model(), random_ids(2, 9)
    other = ids.clone()
    other[:, 6:] = random_ids(2, 3, seed=1)
    with torch.no_grad():
        a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :6], b[:, :6], atol=1e-6, rtol=0)
    assert (a[:, 6:] - b[:, 6:]).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_the_body_and_the_head_are_the_two_halves_of_the_model(tied):
    model, ids = random_model(tie_word_embeddings=tied), random_ids(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids) @ model.head.T, model(ids), atol=1e-5, rtol=0)
    assert (model.head is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in model.state_dict()) == (not tied)


def test_the_tied_head_gathers_the_gradients_of_both_its_uses():
    tied, free, ids = random_model(tie_word_embeddings=True), random_model(tie_word_embeddings=False), random_ids(2, 7)
    free.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.head.detach()})
    for model in (tied, free):
        for _ in range(2):                                  # as over two micro-batches
            model(ids).log_softmax(-1)[..., 3].sum().backward()
    want = free.model.embed_tokens.weight.grad + free.lm_head.weight.grad
    assert not tied.head.grad.is_sparse and free.model.embed_tokens.weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(tied.head.grad, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_checkpointing_recomputes_each_block_and_gives_the_same_gradients(tied):
    model, ids, runs = random_model(tie_word_embeddings=tied), random_ids(2, 7), Counter()
    for i, block in enumerate(model.model.layers):
        block.input_layernorm.register_forward_hook(lambda *_, i=i: runs.update([i]))
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        (model.hidden(ids, checkpointing=checkpointing) @ model.head.T).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert runs == dict.fromkeys(range(len(model.model.layers)), 3 if checkpointing else 1)     # then forward and backward
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)
        assert gradient.abs().max() > 0, name


def test_random_weights_are_qwens_and_the_seed_decides_them():
    config = Qwen2Config(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)
    a, b, c = (Qwen2(config).init_weights(seed).state_dict() for seed in (1, 1, 2))
    for name, weight in a.items():
        assert torch.equal(weight, b[name])
        if weight.dim() == 2:
            assert float(weight.std()) == pytest.approx(0.05, rel=0.1) and not torch.equal(weight, c[name]), name
        else:
            assert weight.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name


# ---- other dtypes

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_multiplies_in_the_dtype_and_leaves_the_weights_in_float32(dtype):
    model = random_model()
    with mixed_precision(torch.device("cpu"), dtype):
        logits = model(random_ids(2, 5))
    assert logits.dtype == dtype and {p.dtype for p in model.parameters()} == {torch.float32}


def test_in_bfloat16_angles_are_computed_in_float32_and_norms_equal_transformers():
    at = torch.arange(3000)[None]
    for narrow, wide in zip(rope_tables(at, 1e6, 16, torch.bfloat16), rope_tables(at, 1e6, 16, torch.float32)):
        assert torch.equal(narrow, wide.bfloat16())
    qwen = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    ours, theirs = RMSNorm(64, 1e-6).bfloat16(), qwen.Qwen2RMSNorm(64, 1e-6).bfloat16()
    ours.weight.data = theirs.weight.data = torch.randn(64).bfloat16()
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(ours(x), theirs(x))


def test_a_copy_in_another_dtype_follows_the_model_and_shares_nothing():
    source = random_model(5).requires_grad_(False).train()
    copy = cast_copy(source, torch.bfloat16)
    assert not copy.training and copy.head.dtype == torch.bfloat16 and not copy.head.requires_grad
    source.head.mul_(2)
    assert not torch.equal(copy.head, source.head.bfloat16())
    assert cast_copy(source, torch.bfloat16, copy) is copy and torch.equal(copy.head, source.head.bfloat16())
    assert cast_copy(source, torch.float32) is source
    assert all(torch.equal(new, old.double())                   # a wider one rounds nothing
               for new, old in zip(cast_copy(source, torch.float64).parameters(), source.parameters(), strict=True))
    source.model.compiled = len                                 # --compile, after the copy was made
    assert cast_copy(source, torch.bfloat16, copy).model.compiled is len


# ---- golden files, made by transformers

@pytest.fixture(scope="module", params=CASES)
def golden(request):
    """A model and what transformers computed from the same folder (tests/make_golden.py)."""
    return load_model(GOLDEN / request.param), load_file(GOLDEN / f"{request.param}.safetensors")


def test_the_golden_folders_hold_what_they_are_there_for():
    configs = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in CASES}
    ratios = {c["num_attention_heads"] // c["num_key_value_heads"] for c in configs.values()}
    assert ratios == {7, 6, 1} and {c["tie_word_embeddings"] for c in configs.values()} == {True, False}
    assert {"rope_theta" in c for c in configs.values()} == {"rope_parameters" in c for c in configs.values()}
    assert any((GOLDEN / name / "model.safetensors.index.json").exists() for name in CASES)
    assert set(json.loads((GOLDEN / "made_with.json").read_text())["cases"]) == set(CASES)


def test_logits_equal_transformers_of_a_full_batch_and_of_right_padded_rows(golden):
    model, reference = golden
    with torch.no_grad():
        logits, padded = model(reference["ids"]), model(reference["padded"])
    assert (logits - reference["logits"]).abs().max() < 1e-4 and logits.std() > 0.5
    for row, want, length in zip(padded, reference["padded_logits"], reference["lengths"]):
        assert (row[:length] - want[:length]).abs().max() < 1e-4


def test_64_greedy_tokens_equal_transformers_on_a_batch_of_unequal_prompts(golden):
    model, reference = golden
    prompts = [row[:n].tolist() for row, n in zip(reference["prompts"], reference["prompt_lengths"])]
    want = reference["greedy"].tolist()
    assert generate(model, prompts, max_new_tokens=64) == want
    assert [generate(model, [prompt], max_new_tokens=64)[0] for prompt in prompts] == want


# ---- live, where transformers is installed

LIVE = [  # query heads, key/value heads, head size, layers, tied, theta, shards
    (14, 2, 8, 2, True, 1e6, None), (12, 2, 10, 3, True, 1e6, "60KB"), (6, 1, 16, 1, False, 1e4, None),
    (4, 4, 6, 2, False, 1e6, "60KB"), (7, 1, 12, 2, False, 5e5, "90KB"),
]


@pytest.mark.parametrize("seed, case", list(enumerate(LIVE)))
def test_logits_and_greedy_tokens_equal_a_fresh_transformers_model(tmp_path, seed, case):
    pytest.importorskip("transformers")
    from make_golden import V, greedy, random_model
    H, K, E, layers, tied, theta, shards = case
    shape = dict(hidden_size=H * E, intermediate_size=11 * H, num_attention_heads=H, num_key_value_heads=K,
                 num_hidden_layers=layers, tie_word_embeddings=tied, rope_theta=theta)
    theirs = random_model(shape, seed=100 + seed)
    theirs.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    ours = load_model(tmp_path)
    ids, mask = random_ids(3, 40, seed=seed, V=V), torch.arange(40) < torch.tensor([[40], [13], [27]])
    with torch.no_grad():
        difference = ours(ids) - theirs(ids, attention_mask=mask.long()).logits
    assert difference[mask].abs().max() < 1e-4
    prompts = [random_ids(n, seed=n, V=V).tolist() for n in (5, 1, 17)]
    want, margin = greedy(theirs, prompts)
    assert generate(ours, prompts, max_new_tokens=64) == want.tolist(), f"the nearest choice was {margin} apart"


@pytest.mark.parametrize("tied, dtype, shard_bytes", [(True, torch.float32, 10**9), (False, torch.float32, 20_000),
                                                      (True, torch.bfloat16, 8_000), (False, torch.bfloat16, 10**9)])
def test_transformers_opens_what_we_saved_unchanged(tmp_path, tied, dtype, shard_bytes):
    transformers = pytest.importorskip("transformers")
    model = random_model(tie_word_embeddings=tied, head_dim=6, rope_theta=3e5).to(dtype)
    save_model(model, tmp_path / "m", shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.dtype == dtype and type(theirs).__name__ == "Qwen2ForCausalLM"
    ids = random_ids(2, 9)
    with torch.no_grad():
        want, got = theirs.float().eval()(ids).logits, model.float()(ids)
    assert (got - want).abs().max() < 1e-4
