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
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minikd.attend_cuda import attend
from minikd.cache import KVCache, Slots, StaticCache
from minikd.config import Qwen2Config
from minikd.fused_cuda import add_norm, can_fuse, silu_up
from minikd.layers import Attachable, Embedding, Branch, Linear, as_built, trains_on_gpu

# cuDNN's attention, torch's first choice on a Hopper GPU, makes a new plan for every length; batches here have many.
torch.backends.cuda.enable_cudnn_sdp(False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension; normalised in float32.  [..., D] -> [..., D]"""

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
        """x + y, the residual sum, and its RMSNorm."""
        if can_fuse(x) and x.shape[-1] % 8 == 0 and x.shape[-1] <= 8192 and as_built(self, kinds=(RMSNorm,)):
            return add_norm(x, y, self.weight.to(x.dtype), self.eps)            # one kernel instead of two
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
    relative positions, not absolute ones.
    """
    low, high = x.chunk(2, dim=-1)                                              # [B, H, T, E/2] each
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, for each query over the keys up to its own position. Padding is on the right, so no query of a
    real token sees it.  q [B, H, T, E], k and v [B, K, T, E] -> [B, T, H, E]"""
    if v.is_cuda and v.dtype == torch.float32:                  # here enable_gqa would hold [B, H, T, T] scores: copy the keys
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))             # [B, H, T, E] each
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def single_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same for one query per row, over the cached keys that `mask` allows. The H/K heads that share a key take the place of
    the query axis, so keys need no copies.  q [B, H, 1, E], k and v [B, K, s, E] -> [B, 1, H, E]"""
    B, H, _, E = q.shape
    y = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, E), k, v, attn_mask=mask)           # [B, K, H/K, E]
    return y.reshape(B, 1, H, E)


class Attention(Branch):
    """Causal attention in which H / K query heads share a key/value head (GQA).  [B, T, D] -> [B, T, D]"""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        D, E = config.hidden_size, config.head_dim
        self.H, self.K, self.E = config.num_attention_heads, config.num_key_value_heads, E
        self.q_proj = Linear(D, self.H * E, bias=True)                          # Qwen2 has a bias here, and only here
        self.k_proj = Linear(D, self.K * E, bias=True)
        self.v_proj = Linear(D, self.K * E, bias=True)
        self.o_proj = Linear(self.H * E, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Slots | None) -> Tensor:
        return self.o_proj(self.concat_heads(x, cos, sin, slots))               # [B, T, D]

    def concat_heads(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Slots | None) -> Tensor:
        """The outputs of all heads side by side, which o_proj multiplies.  [B, T, D] -> [B, T, H E]"""
        B, T, _ = x.shape
        joined = self.one_product(x)
        if joined is None:
            qkv = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)   # [B, T, (H + 2K) E]
        else:
            qkv = joined(x)                                                     # the same in one product
        if slots is not None and slots.parts is not None:                       # a GPU's decoding step: one kernel for the rest
            return attend(qkv, cos, sin, slots.keys, slots.values, slots.used, slots.mask, slots.parts)
        heads = qkv.view(B, T, -1, self.E).transpose(1, 2)                      # [B, H + 2K, T, E]
        qk, v = heads.split((self.H + self.K, self.K), dim=1)                   # [B, H + K, T, E], [B, K, T, E]
        rotated = rotate(qk, cos, sin)                                          # [B, H + K, T, E]
        # torch.compile keeps the strides of the first T, and fails at the third T without this copy. (Autocast copies anyway.)
        if torch.compiler.is_compiling() and rotated.dtype == v.dtype:
            rotated = rotated.contiguous()
        q, k = rotated.split((self.H, self.K), dim=1)                           # [B, H, T, E], [B, K, T, E]
        if slots is not None:
            k, v = slots.write(k, v)                                            # [B, K, s, E]
        if T == 1 and slots is not None:                                        # the newest token
            y = single_attention(q, k, v, slots.mask)                           # [B, 1, H, E]
        else:
            y = causal_attention(q, k, v)                                       # [B, T, H, E]
        return y.reshape(B, T, -1)                                              # [B, T, H E]

    def first_and_last(self) -> tuple[list[nn.Module], nn.Module]:
        return [self.q_proj, self.k_proj, self.v_proj], self.o_proj


class MLP(Branch):
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
        joined = self.one_product(x)
        if joined is None:
            gate, up = self.gate_proj(x), self.up_proj(x)                       # [B, T, W] each
        else:
            gate_up = joined(x)                                                 # [B, T, 2W], the same in one product
            if can_fuse(gate_up) and gate_up.shape[-1] % 16 == 0:               # one kernel instead of two
                return silu_up(gate_up)
            gate, up = gate_up.chunk(2, dim=-1)                                 # [B, T, W] each
        return F.silu(gate) * up                                                # SwiGLU eq. (6)

    def first_and_last(self) -> tuple[list[nn.Module], nn.Module]:
        return [self.gate_proj, self.up_proj], self.down_proj


class Block(nn.Module):
    """Attention, then the MLP, each applied to the normalised states and added to the states.  [B, T, D] -> [B, T, D]"""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Slots | None) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), cos, sin, slots)            # [B, T, D]
        x, normed = self.post_attention_layernorm.add_then_norm(x, y)           # x + y, and its norm
        return x + self.mlp(normed)


BLOCKS_PER_GRAPH = 4    # compiled together. A KD step on an H200 (no CUDA graphs) took 83 ms; with single blocks 96


def run_blocks(blocks: tuple[Block, ...], x: Tensor, cos: Tensor, sin: Tensor, slots: tuple) -> Tensor:
    """Blocks one after the other.  Body.compiled is this function through torch.compile: a graph for BLOCKS_PER_GRAPH of them."""
    for block, place in zip(blocks, slots):
        x = block(x, cos, sin, place)
    return x


class Body(nn.Module):
    """Embedding, blocks and the last norm: ids [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.compiled = self.graphs = None                                      # set by training.compile_blocks, use_graphs

    def forward(self, ids: Tensor, cache: KVCache | None = None, checkpointing: bool = False) -> Tensor:
        if cache is not None:
            cache.check(ids.shape[1])
        if cache is None or cache.used == 0:                                    # a whole sequence, from its start
            positions = torch.arange(ids.shape[1], device=ids.device)[None]     # [1, T]
        else:                                                                   # one more token per row
            positions = cache.lengths[:, None]                                  # [B, 1]
        x = self.embed_tokens(ids)                                              # [B, T, D]
        learned = self.training and self.embed_tokens.weight.requires_grad
        if self.graphs is not None and learned and cache is None and not checkpointing and trains_on_gpu(x):
            return self.graphs(x, positions, self.states)                       # the line below, as a CUDA graph: GraphedBlocks
        return self.states(x, positions, cache, checkpointing)

    def states(self, x: Tensor, positions: Tensor, cache: KVCache | None = None, checkpointing: bool = False) -> Tensor:
        """The blocks and the last norm, of the embeddings [B, T, D] of tokens at `positions` [B or 1, T].  -> [B, T, D]"""
        rope = rope_tables(positions, self.config.rope_theta, self.config.head_dim, x.dtype)
        blocks = tuple(self.layers)
        slots = tuple(None if cache is None else cache.layer(i) for i in range(len(blocks)))
        run, count = run_blocks, 1                                              # what runs blocks, and how many at a time
        if self.compiled and (cache is None or isinstance(cache, StaticCache)):     # a KVCache's slices grow: each step compiles
            run, count = self.compiled, BLOCKS_PER_GRAPH
        if checkpointing and torch.is_grad_enabled():                           # block by block
            run, count = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False), 1
        for i in range(0, len(blocks), count):
            x = run(blocks[i:i + count], x, *rope, slots[i:i + count])          # [B, T, D]
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def as_built(self, *more: type) -> bool:
        """Whether nothing in the body was replaced or hooked (layers.as_built).  more: classes that its layers may have"""
        return as_built(*self.modules(), kinds=(Body, Block, Attention, MLP, RMSNorm, Linear, Embedding, nn.ModuleList, *more))

    def _apply(self, fn, recurse=True):                                         # what .to(), .cuda() and .half() call
        self.graphs = None                                                      # they are for the old dtype and device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"graphs": None}                                 # for copy and pickle


class Qwen2(Attachable):
    """model(ids) gives logits; model.hidden(ids) gives the states that model.head turns into them."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.quantization = None                                                # quantization_config of a 4-bit model
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The LM head [V, D]: its own weight, or the embedding's where they are tied. (lm_head is not called as a module.)"""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def hidden(self, ids: Tensor, cache: KVCache | None = None, checkpointing: bool = False) -> Tensor:
        """Hidden states after the last norm.  ids [B, T] int64 -> [B, T, D]

        cache          ids are first the prompts, then one more token of each row (KVCache)
        checkpointing  recomputes each block in the backward pass: less memory, about a third more time
        """
        return self.model(ids, cache, checkpointing)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 -> logits [B, T, V]. Causal; right padding needs no mask."""
        return F.linear(self.hidden(ids), self.head)

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
    """torch.autocast, for a `with` block: matrix products in `dtype`, the weights stay as they are. Off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def allocate(model: Qwen2, device) -> Qwen2:
    """Gives a model on the meta device uninitialised memory for its weights on `device`. to_empty() does the same, but imports
    sympy, as most of torch's functions do on the meta device: 0.5 s and 35 MB."""
    return model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


@torch.no_grad()
def cast_copy(model: Qwen2, dtype: torch.dtype, into: Qwen2 | None = None) -> Qwen2:
    """A copy of the model in `dtype`, without its hooks, to sample with while it trains; the model itself if that is its dtype.

    into  an earlier copy, to be overwritten: no new memory
    """
    if model.head.dtype == dtype:
        return model
    if into is None:
        with torch.device("meta"):
            into = Qwen2(model.config).to(dtype)
        into = allocate(into, model.head.device).eval().requires_grad_(False)
    into.model.compiled = model.model.compiled
    into.load_state_dict(model.state_dict())                                    # by name: what pruning or LoRA adds is an error
    return into
