"""The Qwen2 decoder, for training and for decoding alike.

Qwen1.5, Qwen2 and Qwen2.5 dense checkpoints are this model. Parameter names are Hugging Face's, so that
a checkpoint's tensors are the parameters of the same names. The body (ids -> hidden states) and the LM head
(hidden states -> 151,936 logits) are separate: losses and sampling apply the head only where it is needed.

References
    Qwen2 Technical Report                          arXiv:2407.10671
    RMSNorm                                         arXiv:1910.07467, eq. (4)
    RoPE (rotary position embedding)                arXiv:2104.09864, eq. (15), (34)
    GQA (grouped-query attention)                   arXiv:2305.13245
    SwiGLU                                          arXiv:2002.05202, eq. (6)
"""
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minikd.attend_cuda import attend, make_parts
from minikd.files import InputError
from minikd.fused_cuda import add_norm, can_fuse, silu_up

# cuDNN's attention, torch's first choice on a Hopper GPU, makes a new plan for every length; batches here have many.
torch.backends.cuda.enable_cudnn_sdp(False)


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

        Raises InputError, naming the field, for what this decoder does not compute: another model_type,
        sliding-window attention, RoPE scaling, another activation, or sizes that do not fit together.
        """
        def refuse(field, advice):
            raise InputError(f"{where}: {field} = {raw.get(field)!r} is not implemented; {advice}")

        if raw.get("model_type") != "qwen2":
            refuse("model_type", "minikd reads 'qwen2': Qwen1.5, Qwen2 and Qwen2.5 dense models")
        named = raw.get("architectures")
        if isinstance(named, list) and named and not any(str(name).endswith("ForCausalLM") for name in named):
            refuse("architectures", "minikd reads models with a language-model head: 'Qwen2ForCausalLM'")
        if raw.get("use_sliding_window"):
            refuse("use_sliding_window", "use a checkpoint with full attention")
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or set(map(str, kinds)) - {"full_attention"}:
            refuse("layer_types", "use a checkpoint with full attention")
        if raw.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", "Qwen2 uses 'silu'")
        values = {field: value for field, value in raw.items() if field in cls.__dataclass_fields__ and value is not None}
        for field in ("rope_scaling", "rope_parameters"):                       # transformers 4's name, and 5's
            rope = raw.get(field) or {}
            if (not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default"
                    or any(isinstance(value, dict) for value in rope.values())):
                refuse(field, "use a checkpoint without RoPE scaling, the same in all layers")
            if rope.get("rope_theta") is not None:
                values["rope_theta"] = rope["rope_theta"]
        cls._check_values(values, where)
        if "num_attention_heads" in values:                                     # old configs: as many key/value heads
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
        config = cls(**values)
        if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2 or not config.head_dim:
            raise InputError(f"{where}: {config.num_attention_heads} query heads must be a multiple of "
                             f"{config.num_key_value_heads} key/value heads, and the head size, {config.head_dim}, even; "
                             "check num_attention_heads, num_key_value_heads and hidden_size")
        return config

    @classmethod
    def _check_values(cls, values: dict, where: str):
        for name, value in values.items():
            kind = cls.__dataclass_fields__[name].type
            if kind is bool:
                good, wanted = isinstance(value, bool), "true or false"
            elif name == "rope_theta":
                good, wanted = type(value) in (int, float) and 0 < value < 1e30, "a number above 0"
            elif kind is float:
                good, wanted = type(value) in (int, float) and 0 <= value < 1e30, "a number of at least 0"
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


class KVCache:
    """Keys and values of the tokens already read, per layer [B, K, S, E], allocated for the whole answer at the start.

    A slot is a column of the cache, the same for all rows; `valid` [B, S] says which slots hold a token of
    the row. Prompts are right-padded, so a short one leaves a gap before the first new token: of the prompts a b and c d e f,
    with the new tokens x and y,

        slot      0 1 2 3 4
        row 0     a b . . x         x is in slot 4, but at position 2
        row 1     c d e f y         `used` counts slots, `lengths` positions; `valid` hides the dots
    """

    def __init__(self, config: Qwen2Config, lengths: Tensor, capacity: int, dtype: torch.dtype):
        B, prompt, device = len(lengths), int(lengths.max()), lengths.device
        self.config = config
        shape = (B, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.used = 0                                                           # slots filled so far
        self.lengths = lengths                                                  # [B] the next token's position
        self.valid = torch.arange(capacity, device=device) < lengths[:, None]   # [B, S]
        self.valid[:, prompt:] = True                                           # new tokens follow the longest prompt
        self.gapless = bool((lengths == prompt).all())                          # then decoding needs no mask at all

    def layer(self, i: int) -> "Slots":
        """Layer i's slots, for the tokens about to be read; call `advance` after the last layer."""
        mask = None if self.gapless else self.valid[:, None, None, :self.used + 1]
        return Slots(self.keys[i], self.values[i], self.used, mask)

    def advance(self, T: int):
        """To be called when all layers have read T slots of prompts or, later, one more token per row."""
        if self.used:                                                           # `lengths` counts the prompts already
            assert T == 1, f"{T} tokens at once after the prompts"
            self.lengths = self.lengths + 1
        self.used += T

    def keep(self, rows: Tensor):
        """Keeps the rows with indices rows [b], in that order; an index may repeat."""
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.lengths, self.valid = self.lengths[rows], self.valid[rows]


class Slots(NamedTuple):
    """One layer's part of a cache."""
    keys: Tensor                                                                # [B, K, S, E]
    values: Tensor                                                              # [B, K, S, E]
    used: int | Tensor                                                          # slots filled so far; StaticCache: a tensor [1]
    mask: Tensor | None                 # which of s slots one more token sees, [B, 1, 1, s] bool; None: all.  StaticCache:
                                        # [B, 1, 1, S], 0 or -inf, to be added to the scores
    parts: Tensor | None = None         # scratch memory of the GPU's attention kernel (attend_cuda.py), where it can run

    def write(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends k, v [B, K, T, E]; returns all that attention reads: the s slots that are filled now, [B, K, s, E]."""
        if isinstance(self.used, Tensor):                                       # StaticCache: attention reads all S slots
            return self.keys.index_copy_(2, self.used, k), self.values.index_copy_(2, self.used, v)
        end = self.used + k.shape[2]
        self.keys[:, :, self.used:end] = k
        self.values[:, :, self.used:end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


class StaticCache(KVCache):
    """The cache of a step that a CUDA graph replays: all that changes between steps is a device tensor at a fixed address.

    `bias`, added to the scores, excludes the slots not yet written, which torch's attention reads too.
    """

    def __init__(self, cache: KVCache):
        """Takes over the tensors of a cache that has read its prompts."""
        self.config, self.keys, self.values, self.used = cache.config, cache.keys, cache.values, cache.used
        for slots in self.keys + self.values:
            slots[:, :, cache.used:] = 0                                        # a masked slot counts 0 x its value: not NaN
        self.valid, self.lengths = cache.valid, cache.lengths.clone()           # changed in place from here on
        self.slot = torch.full((1,), cache.used, device=cache.valid.device)     # [1] where the next token goes
        written = torch.arange(self.valid.shape[1], device=self.valid.device) <= self.slot      # and the next one
        # [B, S] added to the scores: -inf where a row may not look. Built once, not from a bool mask in every layer.
        self.bias = torch.zeros_like(self.valid, dtype=self.keys[0].dtype)
        self.bias.masked_fill_(~(self.valid & written), -torch.inf)
        self.parts = make_parts(self.keys[0], self.config.num_attention_heads)

    def layer(self, i: int) -> Slots:
        return Slots(self.keys[i], self.values[i], self.slot, self.bias[:, None, None], self.parts)

    def advance(self, T: int):
        self.lengths += 1
        self.slot += 1
        self.bias.index_fill_(1, self.slot.clamp(max=self.bias.shape[1] - 1), 0)    # no slot after the last

    def keep(self, rows: Tensor):
        super().keep(rows)
        self.bias, self.parts = self.bias[rows], make_parts(self.keys[0], self.config.num_attention_heads)


class Linear(nn.Linear):
    """nn.Linear that while decoding on a CPU multiplies in another way (layout.Packed, layout.multiply_plain)."""
    packed = None

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed                            # once: another thread may take it away
        return F.linear(x, self.weight, self.bias) if packed is None else packed(x)


def trains_on_gpu(x: Tensor) -> bool:
    """Whether x is part of a training step in bfloat16 on a GPU."""
    return x.is_cuda and torch.is_grad_enabled() and torch.is_autocast_enabled("cuda")


def join_in_training(x: Tensor, *layers: nn.Module):
    """A function x -> the layers' outputs side by side, by one product; None, which leaves one for each, unless trains_on_gpu
    (and for 4-bit layers, which have no weights to join).

    Autocast casts the weights in every step anyway. Joined first they take fewer kernels, and those of a small model take the
    host longer to launch than the GPU to run. A KD step with a 0.5B student took 109 ms on an H200, not 122; from a cache 59,
    not 91.
    """
    if not (trains_on_gpu(x) and isinstance(layers[0], Linear)):
        return None
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return partial(F.linear, weight=weight, bias=bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension.  [..., D] -> [..., D]"""

    def __init__(self, D: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:                                                           # one kernel instead of seven
            with torch.autocast("cuda", enabled=False):                         # autocast would run it in float32
                return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)      # eq. (4), as below
        x32 = x.float()                                                         # float16 overflows in the mean square
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)                                    # RMSNorm eq. (4)

    def add_then_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x + y, a residual sum, and that normalised."""
        if can_fuse(x) and x.shape[-1] % 8 == 0 and x.shape[-1] <= 8192:        # one kernel instead of two
            return add_norm(x, y, self.weight.to(x.dtype), self.eps)
        x = x + y
        return x, self(x)


def rope_tables(positions: Tensor, base: float, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position x θ_i, θ_i = base^(-2i/E) for i = 0 .. E/2 - 1.  positions [B or 1, T] -> two [B or 1, 1, T, E]"""
    # [E/2], RoPE eq. (15); in this order of operations it is rounded as transformers rounds it (on a CPU)
    frequency = 1.0 / base ** (torch.arange(0, E, 2, device=positions.device).float() / E)
    angle = positions[:, None, :, None].float() * frequency                     # [B, 1, T, E/2]
    angle = torch.cat((angle, angle), dim=-1)                                   # [B, 1, T, E]; HF pairs x_i with x_{i+E/2}
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i+E/2}) by its angle.  RoPE eq. (34), where neighbours are paired.  [B, H, T, E] -> the same

    A query at m and a key at n are rotated by m θ_i and n θ_i; their product then depends on m - n only: attention sees
    distances, not places.
    """
    low, high = x.chunk(2, dim=-1)                                              # [B, H, T, E/2] each
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Half(nn.Module):
    """What Attention and MLP share: layers with the same inputs, which layout.py may join."""
    joined = None                                                               # x -> their outputs side by side

    def _apply(self, fn, recurse=True):                                         # what .to(), .cuda() and .half() call
        self.joined = None                                                      # it would stay in the old dtype or device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *given):
        self.joined = None                                                      # it may hold the old weights
        super()._load_from_state_dict(*given)


class Attention(Half):
    """Causal attention in which H / K query heads share a key/value head (GQA).  [B, T, D] -> [B, T, D]"""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.E, self.K = E, config.num_key_value_heads
        self.q_proj = Linear(D, config.num_attention_heads * E, bias=True)      # Qwen2 has a bias here, and only here
        self.k_proj = Linear(D, config.num_key_value_heads * E, bias=True)
        self.v_proj = Linear(D, config.num_key_value_heads * E, bias=True)
        self.o_proj = Linear(config.num_attention_heads * E, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Slots | None) -> Tensor:
        return self.o_proj(self.concat_heads(x, cos, sin, slots))               # [B, T, D]

    def concat_heads(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Slots | None) -> Tensor:
        """The outputs of all heads side by side, which o_proj multiplies.  [B, T, D] -> [B, T, H E]"""
        B, T, _ = x.shape
        joined = join_in_training(x, self.q_proj, self.k_proj, self.v_proj) if self.joined is None else self.joined
        if joined is not None:
            qkv = joined(x)                                                     # [B, T, (H + 2K) E]
        else:
            qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)   # the same shape
        if slots is not None and slots.parts is not None:                       # all that follows, by one kernel on a GPU
            return attend(qkv, cos, sin, slots.keys, slots.values, slots.used, slots.mask, slots.parts)
        heads = qkv.view(B, T, -1, self.E).transpose(1, 2)                      # [B, H + 2K, T, E]
        qk, v = heads.split((heads.shape[1] - self.K, self.K), dim=1)           # [B, H + K, T, E], [B, K, T, E]
        rotated = rotate(qk, cos, sin)                                          # [B, H + K, T, E]
        if torch.compiler.is_compiling() and rotated.dtype == v.dtype:          # compiled q and k would keep the strides of
            rotated = rotated.contiguous()                                      # the first T; under autocast a cast copied them
        q, k = rotated.split((qk.shape[1] - self.K, self.K), dim=1)             # [B, H, T, E], [B, K, T, E]
        if slots is not None:
            k, v = slots.write(k, v)                                            # [B, K, s, E]
        if T == 1 and slots is not None:
            # One query per head: the H/K heads that share a key take the query axis, so keys need no copies.
            q = q.reshape(B, self.K, -1, self.E)                                # [B, K, H/K, E]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=slots.mask)   # [B, K, H/K, E]
        else:                                                                   # right padding: the causal mask suffices
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            y = y.transpose(1, 2)                                               # [B, T, H, E]
        return y.reshape(B, T, -1)                                              # [B, T, H E]


class MLP(Half):
    """SwiGLU.  [B, T, D] -> [B, T, D], by way of the intermediate size W"""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        D, W = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, W, bias=False)
        self.up_proj = Linear(D, W, bias=False)
        self.down_proj = Linear(W, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gated(x))                                    # [B, T, D]

    def gated(self, x: Tensor) -> Tensor:
        """silu(gate) * up, which down_proj multiplies.  [B, T, D] -> [B, T, W]"""
        joined = join_in_training(x, self.gate_proj, self.up_proj) if self.joined is None else self.joined
        if joined is not None:
            gate_up = joined(x)                                                 # [B, T, 2W]
            if can_fuse(gate_up) and gate_up.shape[-1] % 16 == 0:               # one kernel instead of two
                return silu_up(gate_up)
            gate, up = gate_up.chunk(2, dim=-1)                                 # [B, T, W] each
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)                       # the same shape
        return F.silu(gate) * up                                                # SwiGLU eq. (6)


class Block(nn.Module):
    """Attention, then the MLP, each on the normalised states and added to them.  [B, T, D] -> [B, T, D]"""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Slots | None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos, sin, slots)            # [B, T, D]
        x, normed = self.post_attention_layernorm.add_then_norm(x, y)           # x + y, and its norm
        return x + self.mlp(normed)


BLOCKS_PER_GRAPH = 4    # of a compiled body. A call costs the host time: a KD step took 83 ms on an H200, with 1 block 96


def run_blocks(blocks: tuple[Block, ...], x: Tensor, cos: Tensor, sin: Tensor, slots: tuple) -> Tensor:
    """Blocks one after the other.  Body.compiled is this function through torch.compile: a graph for BLOCKS_PER_GRAPH of them."""
    for block, place in zip(blocks, slots):
        x = block(x, cos, sin, place)
    return x


class TiedLookup(torch.autograd.Function):
    """The embedding lookup in a tied table, in train mode: F.embedding, but backward adds its gradient to table.grad in place.

    Autograd would build a second gradient as large as the table (544 MB for the 0.5B) for the few hundred rows looked up, beside
    the head's, which is there already, and that would set the step's peak memory. torch.autograd.grad misses this part: use
    eval mode for it.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """anchor  any tensor that requires grad, so that backward is called: the table itself must not be an input,
        or autograd would hold the head's gradient back until the lookup's arrives."""
        ctx.ids, ctx.table = ids, embedding.weight
        return F.embedding(ids, embedding.weight)                               # [B, T] -> [B, T, D]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.table.grad is None:
            ctx.table.grad = torch.zeros_like(ctx.table)
        ctx.table.grad.index_add_(0, ctx.ids.flatten(), grad.flatten(0, 1).to(ctx.table.dtype))
        return None, None, None


class Body(nn.Module):
    """Embedding, blocks and the last norm: ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        # Zeros until init_weights or a checkpoint: on the meta device nn.Embedding's own normal_() would import
        # torch._dynamo, 1.5 s and 75 MB.
        table = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiled = None                                                    # set by training.compile_blocks

    def forward(self, ids: Tensor, cache: KVCache | None = None, checkpointing: bool = False) -> Tensor:
        if cache is None or cache.used == 0:                                    # a whole sequence, from its start
            positions = torch.arange(ids.shape[1], device=ids.device)[None]     # [1, T]
        else:                                                                   # one more token per row
            positions = cache.lengths[:, None]                                  # [B, 1]
        learned = self.training and self.embed_tokens.weight.requires_grad and torch.is_grad_enabled()
        if learned and self.config.tie_word_embeddings:
            x = TiedLookup.apply(torch.zeros((), requires_grad=True), ids, self.embed_tokens)   # [B, T, D]
        else:
            x = self.embed_tokens(ids)                                          # [B, T, D]
        rope = rope_tables(positions, self.config.rope_theta, self.config.head_dim, x.dtype)
        blocks = tuple(self.layers)
        slots = tuple(None if cache is None else cache.layer(i) for i in range(len(blocks)))
        fixed = cache is None or isinstance(cache, StaticCache)                 # a plain cache grows: it would compile each step
        run, count = (self.compiled, BLOCKS_PER_GRAPH) if self.compiled and fixed else (run_blocks, 1)
        if checkpointing and torch.is_grad_enabled():                           # block by block
            run, count = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False), 1
        for i in range(0, len(blocks), count):
            x = run(blocks[i:i + count], x, *rope, slots[i:i + count])          # [B, T, D]
        if cache is not None:
            cache.advance(ids.shape[1])
        return self.norm(x)


class Qwen2(nn.Module):
    """model(ids) gives logits; model.hidden(ids) gives the states that model.head turns into them."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.packed_head = self.packed_from = self.int8_head = None             # set by layout.py
        self.quantization = None                                                # quantization_config of a 4-bit model
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The LM head [V, D]: its own weight, or the embedding's where they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, ids: Tensor, cache: KVCache | None = None, checkpointing: bool = False) -> Tensor:
        """Hidden states after the last norm.  ids [B, T] int64 -> [B, T, D]

        checkpointing recomputes each block in the backward pass: less memory, about a third more time.
        """
        return self.model(ids, cache, checkpointing)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V]. Causal; right padding needs no mask."""
        return F.linear(self.hidden(ids), self.head)

    # What layout.py may have hung on the modules. A reader of the model can go on at init_weights.

    def lay_back(self):
        """Undoes layout.laid_out: every layer multiplies by its own weight again."""
        self.packed_head = None
        for module in self.modules():
            for name in "joined", "packed":                                     # of Attention and MLP; of Linear
                held = getattr(module, name, None)
                if hasattr(held, "unpack"):                                     # the weights are there and nowhere else
                    held.unpack()
                if held is not None:
                    setattr(module, name, None)

    def _apply(self, fn, recurse=True):
        self.lay_back()                                                         # another dtype or device
        self.int8_head = None
        return super()._apply(fn, recurse)

    def load_state_dict(self, *given, **options):
        self.lay_back()                                                         # other weights
        self.int8_head = None
        return super().load_state_dict(*given, **options)

    def __getstate__(self) -> dict:
        """For copy and pickle, which oneDNN's packed tensors and the int8 head do not support."""
        return self.__dict__ | {"packed_head": None, "int8_head": None}

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Qwen2":
        """Random weights as transformers initialises Qwen2: N(0, initializer_range), biases 0, norms 1."""
        generator = torch.Generator(self.head.device).manual_seed(seed % 2**63)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return self


def mixed_precision(device: torch.device, dtype: torch.dtype):
    """Inside a `with` block: matrix products in `dtype`, the weights as they are. torch.autocast; float32 needs none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def allocate(model: Qwen2, device) -> Qwen2:
    """A model of the meta device, with memory for its weights on `device`, not yet filled. As by to_empty(), which would import
    sympy, as most of torch's functions do on the meta device: 0.5 s and 35 MB."""
    return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


@torch.no_grad()
def cast_copy(model: Qwen2, dtype: torch.dtype, into: Qwen2 | None = None) -> Qwen2:
    """A copy of the model in `dtype`, to sample with while the model trains; the model itself if it has that dtype.

    into  an earlier copy, to be overwritten: no new memory
    """
    if model.head.dtype == dtype:
        return model
    if into is None:
        with torch.device("meta"):
            into = Qwen2(model.config).to(dtype)
        into = allocate(into, model.head.device).eval().requires_grad_(False)
    into.model.compiled = model.model.compiled
    for new, old in zip(into.parameters(), model.parameters(), strict=True):
        new.copy_(old)
    return into
