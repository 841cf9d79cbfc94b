"""decode.cu from Python: the next token of one row, all layers and a bfloat16 model's head in one kernel."""
import ctypes

import torch
from torch import Tensor, nn

from minikd.cache import StaticCache
from minikd.config import Qwen2Config
from minikd.cuda import available, launch
from minikd.layers import Linear
from minikd.layout import head_logits
from minikd.model import Block, Qwen2, rope_tables
from minikd.w4 import W4Linear

THREADS, WIDEST, HEADS, SPLITS, LAYERS, PART = 512, 20_480, 5120, 8, 64, 132        # decode.cu's
SHARED = 227 << 10                      # bytes of shared memory: all that a block can have


class Product(ctypes.Structure):
    """decode.cu's Product, field by field."""
    _fields_ = [(name, ctypes.c_int) for name in "tasks K units bits gap pairs".split()]


class Step(ctypes.Structure):
    """decode.cu's Step, field by field."""
    _fields_ = [(name, ctypes.c_void_p) for name in "layers table token y logits heads middle wide last parts cos sin "
                                                        "slot".split()]
    _fields_ += [("products", 5 * Product)] + [(name, ctypes.c_int) for name in "L D I H K E S zeros inverse head count".split()]
    _fields_ += [("one_by_D", ctypes.c_float), ("eps", ctypes.c_float)]


def block_matrices(block: Block) -> list[nn.Module | None]:
    """A block's four matrices: q/k/v, o, gate/up and down; None for q/k/v or gate/up if layout.laid_out has not joined them."""
    attention, mlp = block.self_attn, block.mlp
    qkv, gate_up = (getattr(branch.joined, "__self__", None) for branch in (attention, mlp))     # joined: a layer's bound forward
    return [qkv, attention.o_proj, gate_up, mlp.down_proj]


def can_run(device: torch.device) -> bool:
    """Whether the kernel can run there: it needs as much shared memory per block as a Hopper GPU has."""
    return (device.type == "cuda" and available(device.index)
            and torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= SHARED)


def fits(model: Qwen2, rows: int) -> bool:
    """Whether the kernel supports the model as it is laid out now: one row, bfloat16, matrices all plain or all at 4 bits in
    groups of one size, a multiple of 128, and neither wider nor deeper than it has room for."""
    if rows != 1 or model.head.dtype != torch.bfloat16 or not can_run(model.head.device):
        return False
    config, layers = model.config, [layer for block in model.model.layers for layer in block_matrices(block)]
    D, E, wide = config.hidden_size, config.head_dim, config.intermediate_size
    if all(isinstance(layer, W4Linear) and layer.in_order for layer in layers):
        good = len({layer.group_size for layer in layers}) == 1 and layers[0].group_size % 128 == 0
    else:
        good = all(isinstance(layer, Linear) for layer in layers)
    good = good and model.model.as_built(W4Linear)                                              # it calls no hook
    outputs = (config.num_attention_heads + 2 * config.num_key_value_heads) * E                 # of q/k/v
    return (good and D <= 8 * THREADS and wide <= WIDEST and outputs <= HEADS and E in (32, 64, 128)
            and config.num_hidden_layers <= LAYERS and D % 8 == wide % 8 == 0
            and all(weight.data_ptr() % 16 == 0 for weight in model.parameters()))


def tensors_of(block: Block, keys: Tensor, values: Tensor) -> list[Tensor | None]:
    """One layer's tensors in the order of decode.cu's Layer."""
    def matrix(layer) -> tuple:
        return (layer.weight, None, None) if isinstance(layer, Linear) else layer.ready("kernel")

    layers = block_matrices(block)
    return [*(part for layer in layers for part in matrix(layer)), block.input_layernorm.weight,
            block.post_attention_layernorm.weight, layers[0].bias, keys, values]


def plan(config: Qwen2Config, four: bool, blocks: int) -> list[Product]:
    """q/k/v, o, gate/up, down and the head.  four: whether the weights are 4-bit

    Few turns of few units each are best: a turn ends with sums to add, which costs about as much as a unit, but less than waiting
    for the weights of long bfloat16 tasks. What a warp's ring does not hold when the inputs arrive, it has to wait for. The best
    `bits` for the 0.5B, 1.5B and 3B were searched on an H200 with a kernel that waited after each turn and whose rings held only
    one product's weights (benchmarks/results/gpu.txt). They are the same here but for the 0.5B's gate/up in bfloat16: 4, not 1.
    """
    D, I, E, H = config.hidden_size, config.intermediate_size, config.head_dim, config.num_attention_heads
    block, ring = (128, 8) if four else (64, 5)                                                 # decode.cu's BLOCK and DEPTH
    outputs = (H + 2 * config.num_key_value_heads) * E                                          # of q/k/v

    def product(N: int, K: int, gap: int, pairs: int) -> Product:
        """Of a matrix [N, K].  gap, pairs: see decode.cu's `output`; without a gap a unit has two blocks of inputs."""
        tasks, units = (N // 16, -(-K // block)) if gap else (N // 8, -(-K // (2 * block)))
        wait = 0.2 if not four and (units >= 24 or pairs == -8) else 1.2                        # -8: the head

        def cost(bits: int) -> float:
            turns, each = -(-tasks // ((THREADS // 32 >> bits) * blocks)), -(-units // 2**bits)
            return turns * (each + wait) + 1.5 * max(0, turns * each - ring)

        return Product(tasks, K, units, min(range(5), key=cost), gap, pairs)

    return [product(outputs, D, E // 2, -E // 2), product(D, H * E, 0, 0), product(2 * I, D, I, 0), product(D, I, 0, 0),
            product(config.vocab_size, D, 8, -8)]


class OneKernel:
    """Replaces the model in generate's steps: `next_logits` computes the logits after the one row's next token.

    cache   a StaticCache that holds the prompt; from here on only the kernel fills it and advances its slot
    logits  [1, V] the latest, if the kernel multiplies by the head too; else None: after 4-bit layers, or if V is odd to it
    """

    def __init__(self, model: Qwen2, cache: StaticCache):
        config, self.model, device = model.config, model, model.head.device
        L, D, I = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        H, K, E, S = config.num_attention_heads, config.num_key_value_heads, config.head_dim, cache.keys[0].shape[2]
        first = model.model.layers[0].self_attn.o_proj
        four = isinstance(first, W4Linear)
        # The kernel gets only addresses: `weights` and `held` keep the tensors alive.
        self.weights = [tensors_of(*parts) for parts in zip(model.model.layers, cache.keys, cache.values)]
        self.weights.append([model.head] + 11 * [None] + [model.model.norm.weight] + 4 * [None])    # see decode.cu's Step
        table = [[0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in self.weights]
        cos, sin = rope_tables(torch.arange(S, device=device)[None], config.rope_theta, E, torch.bfloat16)
        words = lambda count: torch.zeros(count, dtype=torch.int32, device=device)              # 0 is no tag
        states = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.logits = states(1, len(model.head)) if not four and len(model.head) % 16 == 0 else None
        self.held = dict(
            layers=torch.tensor(table, device=device), cos=cos, sin=sin, slot=cache.slot,       # [L + 1, 17], [S, E], [S, E], [1]
            y=states(1, 1, D), heads=words((H + 2 * K) * E), middle=words(D), wide=words(2 * I), last=words(D),
            parts=words(H * SPLITS * PART))
        self.name = "decode_w4" if four else "decode_bf16"
        count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
        self.blocks = min(count, I // 8)                        # each must compute a part of `wide`: see decode.cu
        zeros = four and any(layer.ready("kernel")[2] is not None for each in model.model.layers for layer in block_matrices(each))
        inverse = (2**32 - 1) // (first.group_size // 128) + 1 & 2**32 - 1 if four else 0           # 0: of one block
        self.step = Step(L=L, D=D, I=I, H=H, K=K, E=E, S=S, zeros=zeros, inverse=inverse, eps=config.rms_norm_eps,
                         head=4 * L, count=4 * L + (self.logits is not None), one_by_D=1 / D,
                         products=tuple(plan(config, four, self.blocks)), table=model.model.embed_tokens.weight.data_ptr(),
                         logits=None if self.logits is None else self.logits.data_ptr(),
                         **{name: tensor.data_ptr() for name, tensor in self.held.items()})

    def run(self, ids: Tensor):
        """ids [1, 1], the newest token -> `logits` if the kernel has the head, and in any case held["y"], the states [1, 1, D]"""
        self.step.token = ids.data_ptr()
        launch(self.name, ids.device, (self.blocks, 1), THREADS, self.step, together=True, shared=SHARED)

    def hidden(self, ids: Tensor, cache: StaticCache) -> Tensor:
        """ids [1, 1] -> hidden states after the last norm [1, 1, D], as Qwen2.hidden"""
        self.run(ids)
        return self.model.model.norm(self.held["y"])

    def next_logits(self, ids: Tensor) -> Tensor:
        """ids [1, 1] -> logits [1, V], which the next call overwrites"""
        if self.logits is None:
            return head_logits(self.model, self.hidden(ids, None)[0])
        self.run(ids)
        return self.logits
