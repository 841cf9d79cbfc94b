"""The shapes of Qwen2.5, in which the benchmarks make models with random weights."""
from minikd.config import Qwen2Config

COMMON = dict(num_key_value_heads=2, rope_theta=1e6, tie_word_embeddings=True)
SHAPES = {"0.5B": Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, **COMMON),
          "1.5B": Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, **COMMON),
          "3B": Qwen2Config(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, **COMMON)}
