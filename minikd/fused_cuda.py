"""fused.cu from Python: what surrounds a decoding step's products, as torch.ops.minikd.silu_up, add_norm and draw."""
import ctypes
import functools
import math

import torch
from torch import Tensor

from minikd.cuda import available, launch

GREEDY = 1e-6                           # lower temperatures count as 0: dividing by much lower ones would overflow
MOST_TOKENS = 1 << 18                   # of a vocabulary: fused.cu's PARTS x CHUNKS x CHUNK


def can_fuse(x: Tensor) -> bool:
    """Whether the kernels can run: on a GPU, in bfloat16, without gradients. (torch.compile fuses by itself.)"""
    return (not torch.compiler.is_compiling() and x.is_cuda and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
            and available(x.device.index))


def multiply_by_silu(gate_up: Tensor) -> Tensor:
    """silu(gate) up: SwiGLU between its products.  [..., 2W] -> [..., W]"""
    W = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], W)
    launch("silu_up", y.device, (gate_up.shape[:-1].numel(), -(-W // 2048)), 256, gate_up.contiguous(), y, W)
    return y


def add_and_normalise(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its RMSNorm.  [..., D] each"""
    total, normed, D = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    launch("add_norm", x.device, (x.shape[:-1].numel(), 1), -(-D // 256) * 32, x, y.contiguous(), weight, total, normed, D,
           ctypes.c_float(eps))
    return total, normed


def draw_tokens(logits: Tensor, u: Tensor, at: Tensor, tokens: Tensor, drawn: Tensor, logps: Tensor, temperature: float) -> None:
    """The next token of every row as generate.sample draws it without top-k and top-p, written where generate.Decoding needs it.

    logits [B, V], u [max_new_tokens, B] float64; in place: at [B], the newest token's index in its answer, tokens [B], that
    token, drawn [max_new_tokens, B], logps [max_new_tokens, B] float64. All but logits are contiguous.
    """
    (B, V), answers = logits.shape, (at, tokens, drawn, logps)
    if temperature < GREEDY:
        launch("draw_largest", logits.device, (B, 1), 1024, logits, *answers, V, logits.stride(0))
    else:
        launch("draw", logits.device, (B, 1), 512, logits, u, *answers, V, logits.stride(0),
               ctypes.c_float(math.log2(math.e) / temperature))


def can_draw(logits: Tensor) -> bool:
    """Whether `draw_on_gpu` can run: it loads 16 aligned bytes at a time."""
    return (can_fuse(logits) and len(logits) > 0 and logits.shape[1] <= MOST_TOKENS and logits.stride(1) == 1
            and logits.stride(0) % 8 == 0 and logits.data_ptr() % 16 == 0)


operator = functools.partial(torch.library.custom_op, device_types="cuda")
silu_up = operator("minikd::silu_up", multiply_by_silu, mutates_args=())
add_norm = operator("minikd::add_norm", add_and_normalise, mutates_args=())
draw_on_gpu = operator("minikd::draw", draw_tokens, mutates_args=("at", "tokens", "drawn", "logps"))
