"""Matrix products x Wᵀ + b with a plain weight, cut into blocks of the weight's rows, which is fastest on a CPU.

Nothing here is differentiated. `multiply` serves the LM head in head_loss, and in decoding if it is not packed; and a block's
layers in decoding where that pays (layout.py).
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2048            # rows of the weight in one product: they fit a CPU's cache
MANY = 6                # rows of x from which padded_columns is faster on a CPU with AVX2 only
# Whether this is a CPU with AVX2 only: there torch multiplies bfloat16 row by row, and each row takes the same time.
AVX2_ONLY = torch.backends.cpu.get_cpu_capability() == "AVX2"
AMX = torch.cpu._is_amx_tile_supported()                # whether oneDNN multiplies bfloat16 by this CPU's tile registers


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [n, I], weight [O, I], bias [O] -> x Wᵀ + b [n, O] in x's dtype, written to the first rows of `out` if given.

    On a CPU this is (weight_block @ xᵀ)ᵀ, block by block: in float32, for 8 to 220 rows on two cores, up to 1.9 x as fast as one
    product. One row or two are gemv's where has_gemv. A weight in another dtype is cast block by block, so that no second copy of
    it is held; with AVX2 only, a 16-bit weight is cast to float32 for MANY rows or more: see padded_columns.
    """
    n = len(x)
    if x.device.type == "cpu" and x.dtype == weight.dtype and has_gemv(n, x.dtype):
        y = gemv(x, weight, bias)
        return y if out is None else out[:n].copy_(y)
    out = x.new_empty(n, len(weight)) if out is None else out[:n]
    if x.is_cuda:
        transposed = weight.to(x.dtype).T                                       # [I, O]
        return torch.mm(x, transposed, out=out) if bias is None else torch.addmm(bias, x, transposed, out=out)
    columns = padded_columns(x) if n >= MANY and AVX2_ONLY and x.dtype != torch.float64 else x.T
    for i in range(0, len(weight), BLOCK):
        block = weight[i:i + BLOCK].to(x.dtype).to(columns.dtype)               # to x's dtype first: rounded as on any other CPU
        y = block @ columns if bias is None else torch.addmm(bias[i:i + BLOCK, None].to(columns.dtype), block, columns)
        out[:, i:i + BLOCK] = y[:, :n].T                                        # ([b, I] [I, m])ᵀ, rounded after the bias
    return out


def padded_columns(x: Tensor) -> Tensor:
    """x [n, I] -> [I, m] float32, m = n rounded up to 16, as MKL's kernels for AVX2 take 16 columns at a time.

    In bfloat16 the product with a weight that is cast block by block takes 0.4 of torch's time for 16 rows, and a sixth for
    224; in float32 padding saves up to half (31 rows).
    """
    return F.pad(x.float(), (0, 0, 0, -len(x) % 16)).T


def has_gemv(n: int, dtype: torch.dtype) -> bool:
    """Whether gemv is the fastest product of n rows with a plain weight in this dtype."""
    if dtype == torch.float32:
        return n == 1 or n == 2 and AMX
    return n == 1 and dtype == torch.bfloat16 and AMX


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, I], weight [O, I], bias [O] -> x Wᵀ + b [n, O] on a CPU, for n rows of a dtype that has_gemv.

    bfloat16 (with AMX): as W times a vector. oneDNN reads W for that at 15 to 25 GB/s; as x Wᵀ at 10 to 20, packed at 13 to 24,
    and torch's own kernel at 10 to 22 (results/decoding.txt).
    float32: as a batch of 16 products (gcd(O, 16)), which all threads share. On AMD MKL gives a single product for one row to one
    thread only: with two threads, the batch is 1.5 to 1.8 x as fast. On Intel (where there is AMX) MKL reads W by all threads for
    one row or two, at the memory's full speed.
    """
    if AMX and x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    if x.dtype == torch.bfloat16:
        y = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return y[None]
    parts = math.gcd(len(weight), 16)
    y = torch.bmm(x.expand(parts, 1, -1), weight.unflatten(0, (parts, -1)).mT).view(1, -1)      # [16, 1, I] [16, I, O/16]
    return y if bias is None else y + bias
