"""The decoder against its formulas written as slow loops, against golden files, and live against transformers."""
import cmath
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minikd.checkpoint import load_model, save_model
from minikd.files import InputError
from minikd.model import (MLP, Attention, KVCache, Qwen2, Qwen2Config, RMSNorm, StaticCache, cast_copy, mixed_precision,
                          rope_tables, rotate, run_blocks)

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))


def tiny(seed: int = 0, **changes) -> Qwen2:
    """A random model of 2 layers with no bias at 0 and no norm at 1, in eval mode."""
    shape = dict(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, initializer_range=0.3)
    model = Qwen2(Qwen2Config(**{**shape, **changes})).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def random_ids(*shape, seed: int = 0, V: int = 61) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([row + [0] * (max(map(len, rows)) - len(row)) for row in rows])


# ---- each formula, as a loop

def test_rmsnorm_is_the_formula():
    x, norm = torch.randn(2, 3, 8), RMSNorm(8, eps=1e-2)
    torch.nn.init.normal_(norm.weight)
    weight, y = norm.weight.tolist(), norm(x).tolist()
    for b in range(2):
        for t in range(3):
            size = math.sqrt(sum(float(v) ** 2 for v in x[b, t]) / 8 + 1e-2)
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
                    z = complex(x[b, h, t, i], x[b, h, t, i + E // 2])      # halves, not neighbours
                    z *= cmath.exp(1j * float(positions[b, t]) * theta ** (-2 * i / E))
                    assert complex(y[b, h, t, i], y[b, h, t, i + E // 2]) == pytest.approx(z, abs=2e-5)


@pytest.mark.parametrize("theta, E", [(1e4, 8), (1e6, 64), (1e6, 128)])
def test_rope_is_rounded_as_transformers_rounds_it(theta, E):
    """The weights were trained with one rounding of the frequencies; at position 4,095 another is an angle of 2e-4."""
    qwen = pytest.importorskip("transformers.models.qwen2.modeling_qwen2")
    config = qwen.Qwen2Config(hidden_size=2 * E, num_attention_heads=2, rope_parameters={"rope_theta": theta, "rope_type": "default"})
    positions = torch.arange(4096)[None]
    for ours, theirs in zip(rope_tables(positions, theta, E, torch.float32), qwen.Qwen2RotaryEmbedding(config)(torch.zeros(1), positions)):
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
    wide = [dot(gate[j]) / (1 + math.exp(-dot(gate[j]))) * dot(up[j]) for j in range(10)]
    for i in range(6):
        assert float(y[i]) == pytest.approx(sum(down[i][j] * wide[j] for j in range(10)), abs=1e-6)


# ---- the whole

def test_no_token_sees_a_later_one_so_right_padding_needs_no_mask():
    model, ids = tiny(), random_ids(2, 9)
    other = ids.clone()
    other[:, 6:] = random_ids(2, 3, seed=1)
    with torch.no_grad():
        a, b = model(ids), model(other)
    torch.testing.assert_close(a[:, :6], b[:, :6], atol=1e-6, rtol=0)
    assert (a[:, 6:] - b[:, 6:]).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_the_body_and_the_head_are_the_two_halves_of_the_model(tied):
    model, ids = tiny(tie_word_embeddings=tied), random_ids(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(ids) @ model.head.T, model(ids), atol=1e-5, rtol=0)
    assert (model.head is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in model.state_dict()) == (not tied)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [3, 7, 1], [1, 1, 1]], ids=str)
def test_cached_decoding_equals_the_full_forward(lengths):
    model, new = tiny(), 5
    rows = [random_ids(n + new, seed=n).tolist() for n in lengths]
    cache = KVCache(model.config, torch.tensor(lengths), max(lengths) + new, torch.float32)
    with torch.no_grad():
        states = model.hidden(padded([row[:n] for row, n in zip(rows, lengths)]), cache)
        steps = [torch.stack([states[b, n - 1] for b, n in enumerate(lengths)])]
        for i in range(new - 1):
            tokens = torch.tensor([[row[n + i]] for row, n in zip(rows, lengths)])
            steps.append(model.hidden(tokens, cache)[:, 0])
        for b, n in enumerate(lengths):
            full = model.hidden(torch.tensor([rows[b]]))[0, n - 1:n - 1 + new]
            torch.testing.assert_close(torch.stack(steps)[:, b], full, atol=2e-5, rtol=0)


@pytest.mark.parametrize("static", [False, True])
def test_rows_that_leave_the_cache_change_nothing_for_those_that_stay(static):
    model, lengths = tiny(), torch.tensor([4, 2, 5])
    ids, next_ids = random_ids(3, 5), random_ids(3, 3, seed=1)
    stay = torch.tensor([2, 1])
    with torch.no_grad():
        all_rows, fewer = (KVCache(model.config, lengths, 8, torch.float32) for _ in range(2))
        for cache in (all_rows, fewer):
            model.hidden(ids, cache)
        fewer = StaticCache(fewer) if static else fewer
        for cache in (all_rows, fewer):
            model.hidden(next_ids[:, :1], cache)
        fewer.keep(stay)
        for i in 1, 2:                                      # the last slot too
            want = model.hidden(next_ids[:, i:i + 1], all_rows)[stay]
            torch.testing.assert_close(model.hidden(next_ids[stay, i:i + 1], fewer), want, atol=1e-5, rtol=0)


def test_the_tied_head_gathers_the_gradients_of_both_its_uses():
    tied, free, ids = tiny(tie_word_embeddings=True), tiny(tie_word_embeddings=False), random_ids(2, 7)
    free.load_state_dict({**tied.state_dict(), "lm_head.weight": tied.head.detach()})
    for model in (tied, free):
        for _ in range(2):                                  # as over two micro-batches
            model(ids).log_softmax(-1)[..., 3].sum().backward()
    want = free.model.embed_tokens.weight.grad + free.lm_head.weight.grad
    assert not tied.head.grad.is_sparse and free.model.embed_tokens.weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(tied.head.grad, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_embedding_gets_no_gradient(tied):
    model = tiny(tie_word_embeddings=tied).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    model(random_ids(2, 5)).sum().backward()
    assert model.model.embed_tokens.weight.grad is None and model.model.norm.weight.grad is not None
    assert not model.requires_grad_(False)(random_ids(2, 5)).requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_checkpointing_recomputes_each_block_and_gives_the_same_gradients(tied):
    model, ids, runs = tiny(tie_word_embeddings=tied), random_ids(2, 7), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        (model.hidden(ids, checkpointing=checkpointing) @ model.head.T).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        assert len(runs) == (3 if checkpointing else 1)     # once; then forward and backward
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-5)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_products_joined_as_in_training_on_a_gpu_give_the_same_gradients(monkeypatch, compiled):
    products, linear = [], F.linear
    if not compiled:
        monkeypatch.setattr(F, "linear", lambda *given, **named: (products.append(1), linear(*given, **named))[1])

    def gradients(joined):
        monkeypatch.setattr("minikd.model.trains_on_gpu", lambda x: joined)
        model = tiny(num_hidden_layers=3).train()
        if compiled:
            model.model.compiled = torch.compile(run_blocks, backend="eager", fullgraph=True)
        weight = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        (weight * model.hidden(torch.arange(18).view(2, 9))).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.model.parameters()])

    found, right = gradients(True), gradients(False)
    assert (found - right).norm() < 1e-5 * right.norm() and right.norm() > 1
    assert compiled or len(products) == 3 * 4 + 3 * 7


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


# ---- config.json

FIVE = {"model_type": "qwen2", "vocab_size": 300, "hidden_size": 56, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 7, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16", "hidden_act": "silu",
        "layer_types": ["full_attention"] * 2, "sliding_window": None, "use_sliding_window": False}
FOUR = {**{key: FIVE[key] for key in FIVE if key not in ("rope_parameters", "dtype", "layer_types")},
        "rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "sliding_window": 32768,
        "max_window_layers": 24, "bos_token_id": 151643, "transformers_version": "4.43.1"}


def test_config_json_of_transformers_4_and_of_5_mean_the_same():
    four, five = Qwen2Config.from_dict(FOUR), Qwen2Config.from_dict(FIVE)
    assert four == five
    assert (five.rope_theta, five.head_dim, five.vocab_size, five.tie_word_embeddings) == (1e6, 8, 300, True)


def test_the_rope_base_may_stand_in_rope_scaling():
    """transformers 5 reads it there too."""
    rest = {key: value for key, value in FOUR.items() if key != "rope_theta"}
    assert Qwen2Config.from_dict(rest | {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}).rope_theta == 5e5


def test_what_config_json_leaves_out_is_transformers_default():
    config = Qwen2Config.from_dict({"model_type": "qwen2", "num_attention_heads": 16})
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (1e4, 1e-6, False)
    assert (config.num_key_value_heads, config.head_dim) == (16, 256)       # as many as there are query heads
    assert Qwen2Config.from_dict({**FIVE, "head_dim": 12}).head_dim == 12


def test_a_config_survives_its_own_writing():
    config = Qwen2Config.from_dict({**FIVE, "head_dim": 12, "rope_parameters": {"rope_theta": 5e5}})
    raw = json.loads(json.dumps(config.to_dict(torch.bfloat16)))
    assert Qwen2Config.from_dict(raw) == config
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 5e5     # transformers 4's place, and 5's
    assert raw["torch_dtype"] == raw["dtype"] == "bfloat16"


@pytest.mark.parametrize("base", [FOUR, FIVE], ids=["4", "5"])
@pytest.mark.parametrize("changes, names", [
    ({"model_type": "qwen3"}, "model_type = 'qwen3'"),
    ({"model_type": None}, "model_type = None"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = "),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling = "),                 # transformers 4's spelling
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling = "),
    ({"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5e5}}}, "rope_parameters = "),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters = "),  # and 5
    ({"rope_parameters": [1e6]}, "rope_parameters = "),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures = ['Qwen2ForSequenceClassification']"),
    ({"hidden_size": 56.0}, "hidden_size = 56.0"), ({"vocab_size": "300"}, "vocab_size = '300'"),
    ({"vocab_size": True}, "vocab_size = True"), ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000; give a whole number from 1 to 1,000"),
    ({"num_attention_heads": 0}, "num_attention_heads = 0"), ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps = 'tiny'"), ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps = inf"), ({"initializer_range": -1.0}, "initializer_range = -1.0"),
    ({"num_key_value_heads": 2}, "7 query heads must be a multiple of 2 key/value heads"),
    ({"head_dim": 7}, "the head size, 7, even"), ({"hidden_size": 6}, "the head size, 0, even"),
])
def test_what_the_decoder_does_not_compute_is_refused_by_name(base, changes, names):
    with pytest.raises(InputError) as caught:
        Qwen2Config.from_dict({**base, **changes}, where="m/config.json")
    text = str(caught.value)
    assert text.startswith("m/config.json: ") and names in text and "\n" not in text


@pytest.mark.parametrize("where, theta", [("rope_theta", "x"), ("rope_parameters", {"rope_theta": [1]}),
                                          ("rope_theta", 0), ("rope_parameters", {"rope_theta": 0.0})])
def test_a_rope_base_that_is_no_number_is_refused(where, theta):
    raw = {key: FOUR[key] for key in FOUR if key != "rope_theta"}
    with pytest.raises(InputError, match="rope_theta = .*; give a number"):
        Qwen2Config.from_dict({**raw, where: theta})


def test_a_null_means_the_default_as_it_does_to_transformers():
    raw = {**FOUR, "rope_theta": None, "head_dim": None, "num_key_value_heads": None, "layer_types": None}
    config = Qwen2Config.from_dict(raw)
    assert (config.rope_theta, config.head_dim, config.num_key_value_heads) == (1e4, 8, 7)


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


def test_logits_equal_transformers_on_a_full_batch(golden):
    model, reference = golden
    with torch.no_grad():
        logits = model(reference["ids"])
    assert (logits - reference["logits"]).abs().max() < 1e-4 and logits.std() > 0.5


def test_logits_equal_transformers_on_right_padded_rows_of_unequal_lengths(golden):
    model, reference = golden
    with torch.no_grad():
        logits = model(reference["padded"])
    for row, want, length in zip(logits, reference["padded_logits"], reference["lengths"]):
        assert (row[:length] - want[:length]).abs().max() < 1e-4


def test_64_greedy_tokens_equal_transformers_on_a_batch_of_unequal_prompts(golden):
    from minikd.generate import generate
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
    from minikd.generate import generate
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
    model = tiny(tie_word_embeddings=tied, head_dim=6, rope_theta=3e5).to(dtype)
    save_model(model, tmp_path / "m", shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard_bytes < 10**9)
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(loading.values()), loading
    assert theirs.dtype == dtype and type(theirs).__name__ == "Qwen2ForCausalLM"
    ids = random_ids(2, 9)
    with torch.no_grad():
        want, got = theirs.float().eval()(ids).logits, model.float()(ids)
    assert (got - want).abs().max() < 1e-4


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_train_mode_gives_a_tied_table_the_same_gradient_in_place(micro_batches):
    grads = []
    for train in (False, True):
        config = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                             num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
        model = Qwen2(config).init_weights(3).train(train)
        for i in range(micro_batches):                          # from the second on, .grad is there before the head's
            ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(i))
            torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads.append(model.head.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-7)
    assert grads[0].abs().sum() > 0


def test_states_alone_give_a_tied_table_the_same_gradient_in_train_mode():
    grads = []
    for train in (False, True):                                 # there is no head's gradient to add to
        model = tiny(tie_word_embeddings=True).train(train)
        model.hidden(random_ids(2, 5)).square().sum().backward()
        grads.append(model.head.grad)
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_multiplies_in_the_dtype_and_leaves_the_weights_in_float32(dtype):
    model = tiny()
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


def test_a_configs_defaults_are_transformers():
    transformers = pytest.importorskip("transformers")
    assert Qwen2Config.from_dict(transformers.Qwen2Config().to_dict()) == Qwen2Config()


def test_what_memory_held_before_does_not_reach_a_static_cache():
    model = tiny().eval()
    with torch.inference_mode():
        cache = KVCache(model.config, torch.tensor([2, 1]), 8, torch.float32)
        for slots in cache.keys + cache.values:
            slots.fill_(math.nan)
        model.hidden(torch.tensor([[5, 6], [7, 0]]), cache)
        assert model.hidden(torch.tensor([[1], [2]]), StaticCache(cache)).isfinite().all()


def test_a_copy_in_a_wider_dtype_rounds_nothing():
    model = tiny()
    for new, old in zip(cast_copy(model, torch.float64).parameters(), model.parameters(), strict=True):
        assert torch.equal(new, old.double())
