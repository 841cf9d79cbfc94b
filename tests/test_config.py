"""config.json as transformers 4 and 5 write it, and what this decoder refuses."""
import json

import pytest
import torch

from conftest import refusal
from minikd.config import Qwen2Config
from minikd.errors import InputError

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
    ({"use_sliding_window": True}, "use_sliding_window = True"), ({"is_causal": False}, "is_causal = False"),
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
    ({"num_key_value_heads": 2}, "query heads (7) must be a multiple of that of key/value heads (2)"),
    ({"head_dim": 7}, "the head size (7) even"), ({"hidden_size": 6}, "the head size (0) even and above 0"),
])
def test_what_the_decoder_does_not_compute_is_refused_by_name(base, changes, names):
    said = refusal(Qwen2Config.from_dict, {**base, **changes}, where="m/config.json")
    assert said.startswith("m/config.json: ") and names in said


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


def test_a_configs_defaults_are_transformers():
    transformers = pytest.importorskip("transformers")
    assert Qwen2Config.from_dict(transformers.Qwen2Config().to_dict()) == Qwen2Config()
