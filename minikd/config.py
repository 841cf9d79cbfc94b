"""The fields of config.json, and which of them this decoder can compute."""
from dataclasses import asdict, dataclass

import torch

from minikd.errors import InputError


@dataclass(frozen=True)
class Qwen2Config:
    """The fields of config.json that shape the model; the defaults are transformers' Qwen2Config."""
    vocab_size: int = 151_936
    hidden_size: int = 4096
    intermediate_size: int = 22_016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 32_768
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    head_dim: int | None = None                     # None: hidden_size / num_attention_heads

    def __post_init__(self):
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)

    @classmethod
    def from_dict(cls, raw: dict, where: str = "config.json") -> "Qwen2Config":
        """config.json as transformers 4 writes it (rope_theta) and as 5 does (rope_parameters).

        Raises InputError, naming the field, for what this decoder does not compute: another model_type, no language-model head,
        sliding-window or non-causal attention, RoPE scaling, another activation, or sizes that do not fit together.
        """
        def refuse(field, advice):
            raise InputError(f"{where}: {field} = {raw.get(field)!r} is not implemented; {advice}")

        if raw.get("model_type") != "qwen2":
            refuse("model_type", "minikd reads 'qwen2': Qwen1.5, Qwen2 and Qwen2.5 dense models")
        named = raw.get("architectures")
        if isinstance(named, list) and named and not any(str(name).endswith("ForCausalLM") for name in named):
            refuse("architectures", "minikd reads models with a language-model head: 'Qwen2ForCausalLM'")
        if raw.get("is_causal") is False:                                       # gte-Qwen2 and other models of embeddings
            refuse("is_causal", "minikd reads only causal models, in which no token sees a later one")
        if raw.get("use_sliding_window"):
            refuse("use_sliding_window", "use a checkpoint with full attention")
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
            refuse("layer_types", "use a checkpoint with full attention")
        if raw.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", "use a checkpoint with 'silu'")
        values = {field: value for field, value in raw.items() if field in cls.__dataclass_fields__ and value is not None}
        for field in ("rope_scaling", "rope_parameters"):                       # transformers 4's name, and 5's
            rope = raw.get(field) or {}
            if (not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default"
                    or any(isinstance(value, dict) for value in rope.values())):
                refuse(field, "use a checkpoint whose RoPE is not scaled and is the same in all layers")
            if rope.get("rope_theta") is not None:
                values["rope_theta"] = rope["rope_theta"]
        cls._check_values(values, where)
        if "num_attention_heads" in values:                                     # old configs: as many key/value heads
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
        config = cls(**values)
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2 or not config.head_dim:
            raise InputError(f"{where}: the number of query heads ({config.num_attention_heads}) must be a multiple of that of "
                             f"key/value heads ({config.num_key_value_heads}), and the head size ({config.head_dim}) even and "
                             "above 0; check num_attention_heads, num_key_value_heads and hidden_size")
        return config

    @classmethod
    def _check_values(cls, values: dict, where: str):
        for name, value in values.items():
            kind = cls.__dataclass_fields__[name].type
            if kind is bool:
                good, wanted = isinstance(value, bool), "true or false"
            elif kind is float:
                good, wanted = type(value) in (int, float) and 0 < value < 1e30, "a number above 0"
            elif name == "num_hidden_layers":
                good, wanted = type(value) is int and 0 < value <= 1000, "a whole number from 1 to 1,000"
            else:
                good, wanted = type(value) is int and 0 < value, "a whole number above 0"
            if not good:
                raise InputError(f"{where}: {name} = {value!r}; give {wanted}")

    def to_dict(self, dtype: torch.dtype = torch.float32) -> dict:
        """What transformers 4 and 5 both read: each one's name for the RoPE base and for the dtype."""
        name = str(dtype).removeprefix("torch.")
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", **asdict(self),
                "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"}, "attention_dropout": 0.0,
                "use_sliding_window": False, "use_cache": True, "dtype": name, "torch_dtype": name}
