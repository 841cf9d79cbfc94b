"""decode.cu from Python: the next token of one row, all layers in one kernel."""
import ctypes

import torch
from torch import Tensor, nn

from minikd.cache import StaticCache
from minikd.config import Qwen2Config
from minikd.cuda import available, launch
from minikd.layers import Linear
from minikd.model import Block, Qwen2, rope_tables
from minikd.w4 import W4Linear

THREADS, WIDEST, SPLITS, BIASES, SHARED = 512, 20_480, 8, 5120, 221_264         # decode.cu's; SHARED is sizeof(Shared)
AHEAD = 96 << 10                        # bytes of gate/up, and of down, that a block prefetches into the L2


class Step(ctypes.Structure):
    """decode.cu's Step, field by field."""
    _fields_ = [(name, ctypes.c_void_p) for name in "layers table token y heads middle wide last parts cos sin slot".split()]
    _fields_ += [(name, ctypes.c_int) for name in "L D I H K E S group zeros".split()]
    _fields_ += [("bits", 4 * ctypes.c_int), ("ahead", 2 * ctypes.c_int), ("eps", ctypes.c_float)]


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
    groups of one size, a multiple of 128, and no wider than it has room for."""
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
    return (good and D <= 8 * THREADS and max(wide, outputs) <= WIDEST and outputs <= BIASES and E in (32, 64, 128)
            and D % 8 == wide % 8 == 0 and all(weight.data_ptr() % 16 == 0 for weight in model.parameters()))


def tensors_of(block: Block, keys: Tensor, values: Tensor) -> list[Tensor | None]:
    """One layer's tensors in the order of decode.cu's Layer."""
    def matrix(layer) -> tuple:
        return (layer.weight, None, None) if isinstance(layer, Linear) else layer.ready("kernel")

    qkv, o, gate_up, down = block_matrices(block)
    return [block.input_layernorm.weight, qkv.bias, *matrix(qkv), *matrix(o), block.post_attention_layernorm.weight,
            *matrix(gate_up), *matrix(down), keys, values]


def team_bits(config: Qwen2Config, four: bool, blocks: int) -> tuple[int, ...]:
    """For q/k/v, o, gate/up and down: log2 of how many warps work on a task together.  four: whether the weights are 4-bit

    Few turns of few units each are best. After each turn the team's warps wait for each other: in short tasks about as long as
    one unit takes; in long bfloat16 tasks the copies in flight hide the wait. The best values were searched on an H200 for the
    0.5B, 1.5B and 3B (benchmarks/results/gpu.txt); other sizes were not measured.
    """
    D, I, E, H = config.hidden_size, config.intermediate_size, config.head_dim, config.num_attention_heads
    block = 128 if four else 64                                                                 # inputs of a part

    def best(outputs: int, inputs: int, parts: int) -> int:
        tasks, units = outputs // 8, -(-inputs // (parts * block))
        wait = 0.2 if units >= 24 and not four else 1
        turns = lambda bits: -(-tasks // ((THREADS // 32 >> bits) * blocks))
        return min(range(5), key=lambda bits: (turns(bits) * (-(-units // 2**bits) + wait), bits))

    pairs = (H + 2 * config.num_key_value_heads) * E // 2                                       # of q/k/v's outputs
    return best(pairs, D, 1), best(D, H * E, 2), best(I, D, 1), best(D, I, 2)


class OneKernel:
    """Replaces the model in generate's steps: `hidden` computes the hidden states of the one row's next token.

    cache  a StaticCache that holds the prompt; from here on only the kernel fills it and advances its slot
    """

    def __init__(self, model: Qwen2, cache: StaticCache):
        config, self.body, device = model.config, model.model, model.head.device
        L, D, I = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        H, K, E, S = config.num_attention_heads, config.num_key_value_heads, config.head_dim, cache.keys[0].shape[2]
        outputs = (H + 2 * K) * E                                                               # of q/k/v
        # The kernel gets only addresses: `weights` and `held` keep the tensors alive.
        self.weights = [tensors_of(*parts) for parts in zip(self.body.layers, cache.keys, cache.values)]
        table = [[0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in self.weights]
        cos, sin = rope_tables(torch.arange(S, device=device)[None], config.rope_theta, E, torch.bfloat16)
        words = lambda count: torch.zeros(count, dtype=torch.int32, device=device)              # 0 is no tag
        self.held = dict(
            layers=torch.tensor(table, device=device), cos=cos, sin=sin, slot=cache.slot,               # [L, 17], [S, E], [1]
            y=torch.empty(1, 1, D, dtype=torch.bfloat16, device=device), heads=words(outputs), middle=words(D),
            wide=words(2 * I), last=words(D), parts=words(H * SPLITS * (E + 4)))
        first = self.body.layers[0].self_attn.o_proj
        four = isinstance(first, W4Linear)
        self.name = "decode_w4" if four else "decode_bf16"
        count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
        self.blocks = min(count, I // 8)                        # each must compute a part of `wide`: see decode.cu
        zeros = four and any(layer.ready("kernel")[2] is not None for each in self.body.layers for layer in block_matrices(each))
        # Prefetching pays on an H200 at 0.5B (30 MB a layer); at 1.5B, 3B and for 4-bit codes it only delays the words.
        small = not four and 6 * I * D + 2 * D * (outputs + H * E) < 48 << 20
        ahead = (AHEAD // (32 * D), AHEAD // (16 * I)) if small else (0, 0)                     # bytes of a task's weights
        self.step = Step(L=L, D=D, I=I, H=H, K=K, E=E, S=S, group=first.group_size if four else 0, zeros=zeros, ahead=ahead,
                         bits=team_bits(config, four, self.blocks), eps=config.rms_norm_eps,
                         table=self.body.embed_tokens.weight.data_ptr(),
                         **{name: tensor.data_ptr() for name, tensor in self.held.items()})

    def hidden(self, ids: Tensor, cache: StaticCache) -> Tensor:
        """ids [1, 1] -> hidden states after the last norm [1, 1, D]"""
        self.step.token = ids.data_ptr()
        launch(self.name, ids.device, (self.blocks, 1), THREADS, self.step, together=True, shared=SHARED)
        return self.body.norm(self.held["y"])
