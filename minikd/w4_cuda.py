"""w4_matmul.cu from Python: the layout it reads, which kernel it uses for which shapes, and torch.ops.minikd.w4_matmul."""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from minikd.cuda import launch

KERNELS = ("w4_naive", "w4_matvec_1", "w4_matvec_2", "w4_matvec_4", "w4_mma_8", "w4_mma_8_few", "w4_mma_16", "w4_mma_16_few",
           "w4_mma_32", "w4_mma_64", "w4_dequantise")
# The most rows of x for each kind of kernel. By counted instructions, not measured: tensor cores need fewer even for one row.
MATVEC_ROWS, MMA_ROWS = 0, 64
FEW_TILES = 264                         # below two blocks for each of an H100's 132 multiprocessors


def repack(codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes uint8 [O, I], scales and zeros [O, I/g] -> what the kernels read, as w4_matmul.cu draws it.

    words int32 [O/16, I/128, 2, 32, 4], scales float16 [I/g, O'], zeros uint8 [I/g, O'] or None if all are 8.
    O and I are padded to multiples of 16 and 128 with codes of 8 and scales of 0; O' is the padded O.
    """
    O, I = codes.shape
    rows, columns = -(-O // 16) * 16, -(-I // 128) * 128
    padded = codes.new_full((rows, columns), 8)
    padded[:O, :I] = codes
    # [tile of outputs, half, g, tile of inputs, j, t, 8 inputs], the 8 inputs in the order of a word's nibbles
    parts = padded.view(rows // 16, 2, 8, columns // 128, 4, 4, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].int()
    words = functools.reduce(torch.bitwise_or, (parts[..., i] << 4 * i for i in range(8)))  # the 8th nibble has the sign bit
    words = words.permute(0, 3, 1, 2, 5, 4).reshape(rows // 16, columns // 128, 2, 32, 4).contiguous()
    padded_scales = scales.new_zeros(rows, scales.shape[1])
    padded_scales[:O] = scales
    scales = padded_scales.T.half().contiguous()
    if (zeros == 8).all():
        return words, scales, None
    padded_zeros = zeros.new_full(padded_scales.shape, 8)
    padded_zeros[:O] = zeros
    return words, scales, padded_zeros.T.to(torch.uint8).contiguous()


def fits(group_size: int) -> bool:
    """Whether the kernels support groups of this size; a layer's shape can be any that can be packed."""
    return group_size in (32, 64) or group_size % 128 == 0


def plan(M: int, N: int) -> tuple[str, tuple[int, int], int]:
    """The kernel for x [M, K] and W [N, K], M <= MMA_ROWS: its name, its grid, and its threads per block."""
    tiles = -(-N // 16)
    if M <= MATVEC_ROWS:
        return f"w4_matvec_{1 if M == 1 else 2 if M == 2 else 4}", (tiles, 1), 256
    rows = 8 if M <= 8 else 16 if M <= 16 else 32 if M <= 32 else 64
    if rows <= 16 and tiles < FEW_TILES:
        return f"w4_mma_{rows}_few", (tiles, 1), 512
    return f"w4_mma_{rows}", (tiles, 1), 256


def multiply(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, outputs: int,
             group_size: int) -> Tensor:
    """y = x W^T + b.  x [M, K] bfloat16, W as `repack` gives it, bias [N] bfloat16 -> y [M, N] bfloat16

    Up to MMA_ROWS rows: the kernel that `plan` names. More: W is dequantised into a temporary tensor, and cuBLAS multiplies.
    """
    M, K = x.shape
    x = x.contiguous()
    if x.data_ptr() % 16:                                       # a view that begins inside a row: loads are 16 bytes, aligned
        x = x.clone()
    if M > MMA_ROWS:
        return F.linear(x, dequantise(words, scales, zeros, outputs, K, group_size), bias)
    y = x.new_empty(M, outputs)
    if M:
        name, grid, threads = plan(M, outputs)
        launch(name, x.device, grid, threads, words, scales, zeros, x, bias, y, M, outputs, K, group_size)
    return y


w4_matmul = torch.library.custom_op("minikd::w4_matmul", multiply, mutates_args=(), device_types="cuda")


@w4_matmul.register_fake                                        # y's shape and dtype, all that torch.compile's tracing needs
def _(x, words, scales, zeros, bias, outputs, group_size):
    return x.new_empty(x.shape[0], outputs)


def dequantise(words: Tensor, scales: Tensor, zeros: Tensor | None, outputs: int, inputs: int,
               group_size: int) -> Tensor:
    """W [O, I] in bfloat16."""
    weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=words.device)
    blocks = words.shape[1]
    launch("w4_dequantise", words.device, (words.shape[0], -(-blocks // 8)), 256, words, scales, zeros, None, None, weight, 0,
           outputs, inputs, group_size)
    return weight
