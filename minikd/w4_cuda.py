"""w4_matmul.cu from Python: the layout it reads, which kernel it uses for which shapes, and torch.ops.minikd.w4_matmul."""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minikd.cuda import launch

KERNELS = ("w4_naive", "w4_int8_2", "w4_mma_8", "w4_mma_8_few", "w4_mma_16", "w4_mma_16_few", "w4_mma_32", "w4_mma_64",
           "w4_dequantise")
MMA_ROWS = 64                           # the most rows of x that w4_mma_* take; above, cuBLAS multiplies
INPUTS = [0, 2, 4, 6, 1, 3, 5, 7]       # which of a word's 8 inputs is in its nibble i, from the lowest bits on


def repack(codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """codes uint8 [O, I], scales and zeros [O, I/g] -> what the kernels read, as w4_matmul.cu draws it.

    words int32 [O/16, I/128, 2, 32, 4], scales float16 [I/g, O'], zeros uint8 [I/g, O'] or None if all are 8.
    O and I are padded to multiples of 16 and 128 with codes of 8 and scales of 0; O' is the padded O.
    """
    O, I = codes.shape
    rows, columns = -(-O // 16) * 16, -(-I // 128) * 128
    codes = F.pad(codes, (0, columns - I, 0, rows - O), value=8)
    # [tile of outputs, half, g, tile of inputs, j, t, nibble]
    parts = codes.view(rows // 16, 2, 8, columns // 128, 4, 4, 8)[..., INPUTS].int()
    words = sum(parts[..., i] << 4 * i for i in range(8))       # as quant.pack
    words = words.permute(0, 3, 1, 2, 5, 4).reshape(rows // 16, columns // 128, 2, 32, 4).contiguous()
    scales = F.pad(scales, (0, 0, 0, rows - O)).T.half().contiguous()
    zeros = F.pad(zeros, (0, 0, 0, rows - O), value=8).T.to(torch.uint8).contiguous()
    # all() makes the host wait for everything above: an overlapping kernel reads its weights before those ahead of it have ended.
    return words, scales, None if (zeros == 8).all() else zeros


def codes_of(words: Tensor, outputs: int, inputs: int) -> Tensor:
    """repack's codes again, from its words.  -> uint8 [O, I]"""
    tiles, blocks = words.shape[:2]
    words = words.view(tiles, blocks, 2, 8, 4, 4).permute(0, 2, 3, 1, 5, 4)     # [tile of outputs, half, g, tile of inputs, j, t]
    parts = [(words >> 4 * INPUTS.index(i) & 15).to(torch.uint8) for i in range(8)]
    return torch.stack(parts, -1).view(16 * tiles, 128 * blocks)[:outputs, :inputs]


def supports_groups(group_size: int) -> bool:
    """Whether the kernels support groups of this size; a layer's shape can be any that can be packed."""
    return group_size in (32, 64) or group_size % 128 == 0


class GPU(NamedTuple):
    """What a launch depends on; the defaults are an H100's and H200's."""
    processors: int = 132
    shared: int = 227 << 10             # bytes of shared memory that a block can have
    overlap: bool = True                # whether a kernel can start before the one ahead has ended (cuda.launch)


@functools.cache
def gpu_of(device: torch.device) -> GPU:
    if device.type != "cuda":                                   # in tests
        return GPU()
    found = torch.cuda.get_device_properties(device)
    return GPU(found.multi_processor_count, found.shared_memory_per_block_optin, found.major >= 9)


@functools.cache
def launch_shape(name: str, M: int, N: int, K: int, group_size: int, zeros: bool, gpu: GPU) -> tuple[tuple[int, int], int, int]:
    """How a kernel is launched for x [M, K] and W [N, K]: grid, threads, bytes of shared memory, which may be more than fit. (Not
    w4_dequantise: see dequantise.)"""
    strips, blocks = -(-N // 16), -(-K // 128)                  # of 16 outputs, of 128 inputs: a tile is where the two meet
    sets = 1 if group_size % 128 == 0 else 4                    # of scales and zeros for a tile
    slot = 1024 + 48 * sets                                     # bytes of a tile in shared memory, scales and zeros included
    if name == "w4_naive":
        return (-(-N // 128), M), 128, 0
    if name.startswith("w4_mma"):
        warps = 16 if name.endswith("few") else 8
        return (strips, 1), 32 * warps, warps * 4 * slot        # each warp has 4 tiles there

    grid = min(strips, gpu.processors)
    tiles = 16 * 5 * slot                                       # 5 for each of 16 warps
    digits = blocks * M * (3 * 128 + 4 + 4 * sets * zeros)      # of x: for each block 3 digits an input, their unit, maybe sums
    sums = (16 + -(-strips // grid)) * M * 16 * 4               # one per warp and strip that share tiles, each of 16 outputs
    return (grid, 1), 512, tiles + digits + sums


def plan(M: int, N: int, K: int, group_size: int, zeros: bool, gpu: GPU) -> str:
    """The fastest kernel for x [M, K] and W [N, K], M <= MMA_ROWS.

    On an H200 (benchmarks/results/gpu.txt) one row took, in us:       w4_int8_2     w4_mma_8     w4_mma_8_few
        22016 x 2048                                                         8.3         10.1             13.5
        37888 x 3584                                                        21.8         24.2             30.0
         2560 x 2048                                                         2.4          3.3              2.4
         2048 x 11008                                                        6.4          9.8              7.1
          896 x 4864                                                         3.3            -              2.8
    """
    strips = -(-N // 16)                                        # of 16 outputs
    few = strips < 2 * gpu.processors                           # 264 on an H200
    long = M == 1 and K >= 8192 and 2 * strips > gpu.processors # 0.5 to 2 long strips per multiprocessor
    if M <= 2 and (long or not few) and launch_shape("w4_int8_2", M, N, K, group_size, zeros, gpu)[2] <= gpu.shared:
        return "w4_int8_2"                                      # of 2 rows at most: each takes 4 of a product's 8 columns
    rows = next(rows for rows in (8, 16, 32, 64) if M <= rows)
    return f"w4_mma_{rows}" + "_few" * (few and rows <= 16)


def run(name: str, words: Tensor, scales: Tensor, zeros: Tensor | None, x: Tensor, bias: Tensor | None, y: Tensor,
        group_size: int, overlap: bool = True):
    """Launches one kernel: y = x W^T + b, as `multiply`."""
    (M, K), N, gpu = x.shape, y.shape[1], gpu_of(x.device)
    grid, threads, shared = launch_shape(name, M, N, K, group_size, zeros is not None, gpu)
    overlap = overlap and gpu.overlap and name != "w4_naive"
    launch(name, x.device, grid, threads, words, scales, zeros, x, bias, y, M, N, K, group_size, shared=shared, overlap=overlap)


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
        name = plan(M, outputs, K, group_size, zeros is not None, gpu_of(x.device))
        run(name, words, scales, zeros, x, bias, y, group_size)
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
