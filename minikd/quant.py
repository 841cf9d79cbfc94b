"""Few-bit weights: the grid, and int4 codes packed into words.

A weight is  scale x (code - zero),  paper eq. (9), with one scale and one zero for each group of g consecutive inputs of an
output row. Eq. (8):  code = clamp(round(w / scale) + zero, 0, 2^bits - 1).

int4 as the `gptq` format stores it (qweight, int32 [I/8, O]; qzeros, int32 [I/g, O/8]):

    qweight[r, o]   bits 31..28  27..24  23..20  19..16  15..12  11..8   7..4    3..0
                    input  8r+7    8r+6    8r+5    8r+4    8r+3    8r+2    8r+1    8r        of output o
    qzeros[k, c]    output 8c+7    8c+6    8c+5    8c+4    8c+3    8c+2    8c+1    8c        of group k

Format v1 stores zero - 1 (so a symmetric zero of 8 reads 0x77777777), v2 the zero itself.
"""
import torch
from torch import Tensor

from minikd.errors import InputError


# ---- the grid

def check_groups(inputs: int, group_size: int, where: str = "weight") -> int:
    """The group size in inputs; -1 means the whole row.  Raises InputError if it does not divide the row."""
    size = inputs if group_size == -1 else group_size
    if size < 1 or inputs % size:
        raise InputError(f"{where}: {inputs} inputs cannot be cut into groups of {group_size}; give a group size that divides "
                         f"{inputs}, or -1 for one group per row")
    return size


def is_finite(x: Tensor) -> bool:
    """Whether all values are finite, by the smallest and the largest: a NaN makes both NaN. isfinite() takes 40 times as long."""
    x = x if x.itemsize > 1 else x.float()                      # float8 has no aminmax
    return not x.numel() or all(value.isfinite() for value in x.aminmax())


def check_weight(weight: Tensor, group_size: int, where: str = "weight") -> int:
    """check_groups of a weight [O, I].  Raises InputError for values that are not finite, too."""
    if not is_finite(weight):
        raise InputError(f"{where}: has weights that are not finite; fetch or train the model again")
    return check_groups(weight.shape[1], group_size, where)


POWER = 2.4             # of an error in the clipping search: GPTQ's reference code's


def find_grid(weight: Tensor, bits: int = 4, sym: bool = True, clip_search: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row.  [O, n] -> [O], [O], float32; the scale is one that float16 can store

    sym          zero is 2^(bits-1), and the range is symmetric around 0; else it runs from the smallest to the largest
                 weight, 0 included
    clip_search  shrink the range by up to a half, to where the sum of |error|^POWER is least (GPTQ's reference code: by up
                 to four fifths)
    Raises ValueError for bits outside 2 to 8: codes are uint8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits = {bits}; it must be 2 to 8")
    top = 2**bits - 1
    low, high = weight.float().amin(1).clamp(max=0), weight.float().amax(1).clamp(min=0)           # [O] each
    if sym:
        high = torch.maximum(high, -low)
        low = -high

    def grid(share: float) -> tuple[Tensor, Tensor]:
        """Of that share of the range.  -> [O], [O]"""
        scale = ((share * high - share * low) / top).clamp(max=65504).half().float()    # as stored: at most 65504
        scale = torch.where(scale > 0, scale, 1.0)              # a row of zeros, or one whose scale is 0 in float16
        zero = torch.full_like(scale, (top + 1) // 2) if sym else (-share * low / scale).round().clamp(0, top)
        return scale, zero

    scale, zero = grid(1.0)
    if clip_search:
        best = torch.full_like(scale, torch.inf)
        for share in torch.linspace(1, 0.5, 41, dtype=torch.float32).tolist():
            s, z = (x[:, None] for x in grid(share))                                               # [O, 1] each
            error = (dequantize(quantize(weight, s, z, bits), s, z) - weight).abs().pow(POWER).sum(1)      # [O]
            scale, zero = torch.where(error < best, s[:, 0], scale), torch.where(error < best, z[:, 0], zero)
            best = torch.minimum(best, error)
    return scale, zero


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, bits: int = 4) -> Tensor:
    """Paper eq. (8).  [O, n] by scale and zero that broadcast -> uint8 [O, n]"""
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Paper eq. (9): scale (code - zero).  [O, n] by scale and zero that broadcast -> float32 [O, n]"""
    return scale * (codes.float() - zero)


def dequantize_groups(codes: Tensor, scales: Tensor, zeros: Tensor, g_idx: Tensor | None = None) -> Tensor:
    """[O, I], [O, groups] twice -> the weight [O, I] in float32.  g_idx [I]: each input's group, if groups are shuffled"""
    if g_idx is not None:
        return dequantize(codes, scales[:, g_idx], zeros[:, g_idx])
    groups = codes.unflatten(1, (scales.shape[1], -1))                                          # [O, groups, g]
    return dequantize(groups, scales[..., None], zeros[..., None]).flatten(1)


def round_to_nearest(weight: Tensor, bits: int = 4, group_size: int = 128, sym: bool = True,
                     clip_search: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The baseline (RTN): every weight to the nearest point of its group's grid.

    [O, I] -> codes uint8 [O, I], scales [O, I/g], zeros [O, I/g]
    Raises InputError as check_weight does, ValueError as find_grid does.
    """
    (O, I), size = weight.shape, check_weight(weight, group_size)
    groups = weight.float().reshape(-1, size)                                                   # [O I/g, g]
    scale, zero = find_grid(groups, bits, sym, clip_search)
    codes = quantize(groups, scale[:, None], zero[:, None], bits)
    return codes.view(O, I), scale.view(O, -1), zero.view(O, -1)


# ---- int4 in int32 words

def pack(codes: Tensor, dim: int) -> Tensor:
    """Eight 4-bit codes per word along `dim` (not negative), the first in the lowest bits.
    uint8 [..., n, ...] -> int32 [..., n/8, ...]"""
    parts = codes.unflatten(dim, (-1, 8)).int().unbind(dim + 1)                                 # 8 x [..., n/8, ...]
    return sum(part << 4 * i for i, part in enumerate(parts)).contiguous()      # the eighth code has the sign bit


def unpack(words: Tensor, dim: int) -> Tensor:
    """pack's inverse.  int32 [..., m, ...] -> uint8 [..., 8m, ...]"""
    pairs = words.movedim(dim, -1).contiguous().view(torch.uint8)               # [..., 4m]: a word's lowest byte comes first
    return nibbles(pairs).flatten(-2).movedim(-1, dim)


def nibbles(pairs: Tensor) -> Tensor:
    """uint8 [...] -> [..., 2], the lower four bits first"""
    return torch.stack([pairs & 15, pairs >> 4], -1)


def to_words(codes: Tensor, scales: Tensor, zeros: Tensor, version: int = 1) -> dict[str, Tensor]:
    """A layer's tensors as a `gptq` folder names them.

    codes uint8 [O, I], scales and zeros [O, I/g] -> qweight int32 [I/8, O], qzeros int32 [I/g, O/8],
    scales float16 [I/g, O], g_idx int32 [I]
    Raises InputError if O or I is no multiple of 8, and for a zero of 0 in v1: stored as -1, it would borrow from its
    neighbour's bits in most programs that read it; ValueError for codes or zeros of more than 4 bits, and for another version.
    """
    (O, I), size = codes.shape, codes.shape[1] // scales.shape[1]
    if O % 8 or I % 8:
        raise InputError(f"a layer of {I} inputs and {O} outputs cannot be packed: both must be multiples of 8")
    if not (codes.max() <= 15 and 0 <= zeros.min() and zeros.max() <= 15):      # with bits=5 a symmetric zero is 16
        raise ValueError("to_words: codes and zeros must be from 0 to 15 to fit into 4 bits; quantise with bits=4")
    if version not in (1, 2):
        raise ValueError(f"to_words: version = {version}; it must be 1 (gptq) or 2 (gptq_v2)")
    if version == 1 and (zeros < 1).any():
        raise InputError("a zero point of 0 cannot be stored in format gptq; use gptq_v2")
    stored = zeros.to(torch.uint8) - (1 if version == 1 else 0)
    return {"qweight": pack(codes.T, 0), "qzeros": pack(stored.T, 1), "scales": scales.T.half().contiguous(),
            "g_idx": torch.arange(I, dtype=torch.int32, device=codes.device) // size}


def from_words(qweight: Tensor, qzeros: Tensor, scales: Tensor, version: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """to_words' inverse, for folders of any tool: codes uint8 [O, I], scales, zeros float32 [O, I/g] by g_idx's groups."""
    return unpack(qweight.T, 1), *read_grid(qzeros, scales, version)


def read_grid(qzeros: Tensor, scales: Tensor, version: int) -> tuple[Tensor, Tensor]:
    """As stored -> scales, zeros, float32 [O, I/g]"""
    return scales.T.float().contiguous(), read_zeros(qzeros, version).T.float().contiguous()


def read_zeros(qzeros: Tensor, version: int) -> Tensor:
    """int32 [I/g, O/8] -> uint8 [I/g, O].  Version 1 stores zero - 1: the 1s are added to whole words, as GPTQModel subtracts
    them, so that a borrow of a zero of 0 from its neighbour is undone too."""
    return unpack(qzeros + 0x11111111 if version == 1 else qzeros, 1)
