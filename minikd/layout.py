"""The memory layout of weights that are not trained: joining layers that share an input, packing for a CPU, an int8 head.

A decoding step reads every weight once and computes little, so its time depends on the bytes it reads, on their layout,
and on the number of calls.
"""
import platform
import threading
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikd import products
from minikd.errors import InputError
from minikd.layers import Linear, as_built
from minikd.model import Qwen2
from minikd.w4 import W4Linear, give_memory_back

# Fewer steps do not pay for joining or packing: to pack and unpack takes as long as ten, for two rows in float32 15 to 20.
FEWEST_STEPS = 16
# Fewer rows than this use the int8 head: 1.5 to 1.7 x as fast at 1, 1.3 x at 4, 0.9 to 1.0 x at 8 (results/w4_linear.txt). With
# AMX, which multiplies bfloat16 faster, 1.6 x at 1, 1.1 x at 3, 0.97 x at 4.
INT8_ROWS = 4 if products.AMX else 8
LAYING = threading.RLock()                              # held while any model decodes or oneDNN is off: threads take turns


@contextmanager
def laid_out(model: Qwen2, rows: int, steps: int):
    """Inside the `with` block the model's layers multiply in the fastest way for decoding this many rows and steps: pick_layout.

    While packed, the blocks' weights are held in that layout only, but the head twice: a tied embedding reads it plain. A 4-bit
    model's layers stay joined afterwards. A `with laid_out` inside another changes nothing: respond lays a model out once, and
    generate in it for every batch. Threads take turns; each must leave where it entered.
    """
    with LAYING:
        if model.decoding:
            yield
            return
        try:
            undo_layout(model)                          # one whose own end was interrupted
            model.decoding = True
            model.layout = pick_layout(model, rows, steps)
            if model.layout == "plain":
                use_multiply(model)
            elif model.layout is not None:
                join_layers(model, rows, pack=model.layout == "packed")
            yield
        finally:
            try:
                undo_layout(model)
            except BaseException:                       # an interrupt, or no memory: restore the weights, then raise
                undo_layout(model)
                raise


def undo_layout(model: Qwen2):
    """The end of laid_out: model.lay_back, except for a 4-bit model, whose layers stay joined, as its codes never change."""
    model.decoding = False
    packed = model.layout == "packed"
    if model.quantization is not None:
        model.packed_head = model.layout = None
    elif model.layout is not None:
        model.lay_back()
    if packed:
        give_memory_back()


def pick_layout(model: Qwen2, rows: int, steps: int) -> str | None:
    """How the layers are best read. In the order in which it is decided:

    None      layers that are joined for good (teacher.Teacher)
    "plain"   on a CPU: one row in float32 without AMX, or in bfloat16 with it, by products.gemv; bfloat16 with AVX2 only, by
              padded_columns
    None      fewer than FEWEST_STEPS
    "packed"  on a CPU, several rows: from oneDNN's layout, q/k/v as one product and gate/up as another. Plain weights are read at
              60% of the memory's bandwidth in bfloat16, and take two to five times as long in float32 (two rows with AMX: 0.8
              times). In a 4-bit model only the head is packed; the layers are joined
    "joined"  on a GPU, or in a 4-bit model: q/k/v as one product and gate/up as another
    None      the rest: one bfloat16 row without AMX (torch_products), one or two float32 rows with it, a toy
    """
    weight, mlp = model.head, model.model.layers[0].mlp
    cpu, four_bits = weight.device.type == "cpu", model.quantization is not None
    large = weight.numel() > 1 << 20                                                        # a toy's weights fit in cache
    float32, bfloat16 = (weight.dtype == dtype for dtype in (torch.float32, torch.bfloat16))
    if not four_bits and mlp.joined is not None:
        return None
    if cpu and large and not four_bits and (
            bfloat16 and products.AVX2_ONLY
            or rows == 1 and (bfloat16 if products.AMX else float32 and torch.get_num_threads() > 1)):
        return "plain"
    if steps < FEWEST_STEPS:
        return None
    several = rows > 1 and not products.has_gemv(rows, weight.dtype)
    if cpu and several and can_pack() and (float32 and large or bfloat16 and packs_bfloat16()):
        return "packed"
    return "joined" if weight.is_cuda or four_bits else None


def torch_products(weight: Tensor, rows: int):
    """A `with` block in which, for one row and a bfloat16 weight on a CPU, torch multiplies by its own kernels: for one row they
    read a plain weight at the memory's full speed, as oneDNN reads a packed one. For two rows they take twice as long. With AMX
    products.gemv, which is oneDNN's, is faster."""
    needed = rows == 1 and weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and not products.AMX
    return without_onednn() if needed else nullcontext()


@contextmanager
def without_onednn():
    """Inside the `with` block torch's own kernels multiply. The switch belongs to the process: threads take turns."""
    with LAYING:
        before = torch.backends.mkldnn.enabled
        try:
            torch.backends.mkldnn.enabled = False
            yield
        finally:
            torch.backends.mkldnn.enabled = before


def can_pack() -> bool:
    """Whether this torch has oneDNN: a Mac's has not, though `enabled` is true there."""
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled


def packs_bfloat16() -> bool:
    """Whether oneDNN reads packed bfloat16 weights fast: not on ARM, where before torch 2.14 its reference code multiplies, over
    a hundred times more slowly (pytorch issue 180447)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not torch.ops.mkldnn._is_mkldnn_acl_supported()


def join_layers(model: Qwen2, rows: int, pack: bool):
    """Joins, and with `pack` packs, the layers of every block, then packs the head; model.lay_back undoes it."""
    for block in model.model.layers:
        for branch in block.self_attn, block.mlp:
            parts, last = branch.first_and_last()
            if pack and as_built(*parts):
                branch.joined = Packed(parts, rows)
                branch.joined.free_parts()              # only once it is stored: see there
            elif branch.joined is None and (as_built(*parts) or as_built(*parts, kinds=(W4Linear,))):
                branch.joined = join(parts)
            if pack and as_built(last):
                last.packed = Packed([last], rows)
                last.packed.free_parts()
    if pack:
        give_memory_back()
        few = rows == 2 and model.head.dtype == torch.float32               # then products.multiply is as fast
        if not few and not (model.int8_head and rows < INT8_ROWS):
            model.packed_head = torch.ops.mkldnn._reorder_linear_weight(model.head, rows)


def use_multiply(model: Qwen2):
    """Makes all layers multiply by multiply_plain; model.lay_back undoes it."""
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.packed is None:         # a packed layer holds its weight nowhere else
            layer.packed = partial(multiply_plain, layer)


def multiply_plain(layer: Linear, x: Tensor) -> Tensor:
    """The layer's output for x [..., I]: by products.multiply for one row, or for many in bfloat16 with AVX2 only, else by
    torch."""
    rows = x.flatten(0, -2)                                                                 # [n, I]
    faster = len(rows) >= products.MANY if x.dtype == torch.bfloat16 and products.AVX2_ONLY else len(rows) <= 1
    if faster:
        return products.multiply(rows, layer.weight, layer.bias).unflatten(0, x.shape[:-1])          # [..., O]
    return F.linear(x, layer.weight, layer.bias)


class Packed:
    """x -> the outputs of several layers side by side, by one product with their weights in oneDNN's layout."""

    @torch.no_grad()
    def __init__(self, parts: list[Linear], rows: int):
        self.parts, self.sizes = parts, [len(part.weight) for part in parts]
        weights = [part.weight for part in parts]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights) if len(parts) > 1 else weights[0], rows)
        self.bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():         # oneDNN would give no gradient to what lies before, and only warn
            raise RuntimeError("packed weights have no gradient: the model generates meanwhile, or this was interrupted twice; "
                               "wait for it, or call the model's lay_back()")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    @torch.inference_mode(False)                        # the parts may be trained later
    def free_parts(self):
        """Empties the layers' own weights. __init__ does not: an interrupt before the object is stored would lose them."""
        for part in self.parts:
            part.weight.data = part.weight.new_empty(0)

    @torch.inference_mode(False)
    def unpack(self):
        """Gives the layers their weights back, bit for bit."""
        for part, weight in zip(self.parts, self.weight.to_dense().split(self.sizes)):
            part.weight.data = weight


@torch.inference_mode(False)                            # the parts may be trained later
def join(parts: list[nn.Module]):
    """x -> the outputs of several layers side by side, by one product for all of them.

    The parts' tensors become views of the joined ones, and 4-bit parts ask the joined layer for their codes, so that no weight
    is held twice. (To load one 4-bit part alone is not supported: the joined layer keeps its codes. A deep copy holds both: call
    its lay_back before its weights change.)  Returns None if 4-bit parts group their inputs differently, as act-order in other
    tools may.
    """
    first = parts[0]
    if isinstance(first, W4Linear):
        if not all(torch.equal(part.g_idx, first.g_idx) for part in parts):
            return None
        with torch.device(first.scales.device):
            joined = W4Linear(first.inputs, 8, first.group_size, first.bias is not None, first.version)   # 8: replaced below
        joined.outputs, joined.g_idx = sum(part.outputs for part in parts), first.g_idx
        joined.qweight = torch.cat([part.words() for part in parts], 1)
        at = 0
        for part in parts:
            part.whole, part.prepared = (joined, at), None
            part.qweight = joined.qweight.new_empty(0)
            at += part.outputs
        give_memory_back()
        dims = {"qzeros": 1, "scales": 1, "bias": 0}    # in which of its dimensions a tensor is joined
    else:
        joined = Linear(1, 1, bias=first.bias is not None, device=first.weight.device).requires_grad_(False)
        dims = {"weight": 0, "bias": 0}
    for name, dim in dims.items():
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is not None:
            together = torch.cat([tensor.detach() for tensor in tensors], dim)
            for tensor, view in zip(tensors, together.split([tensor.shape[dim] for tensor in tensors], dim)):
                tensor.data = view
            getattr(joined, name).data = together
    return joined.forward                               # as a module it would appear in the model's state_dict


# ---- the head

def head_logits(model: Qwen2, states: Tensor) -> Tensor:
    """states [B, D] -> logits [B, V], by the int8 head (for fewer than INT8_ROWS) or the packed one if there is one."""
    if model.int8_head is not None and len(states) < INT8_ROWS:
        return model.int8_head(states)
    if model.packed_head is not None:
        return torch.ops.mkldnn._linear_pointwise(states, model.packed_head, None, "none", [], "")
    return products.multiply(states, model.head)


def use_int8_head(model: Qwen2):
    """Makes generate use the head at 8 bits where that is faster, for a few rows on a CPU, until `to` or load_state_dict is
    called. Only for a model that is not trained further: the codes do not follow the head. Nothing else that the model computes
    or saves changes.  Raises InputError if the model is not on a CPU, or if torch has no int8 product: on CPUs other than x86,
    and everywhere once torch has moved the product to torchao."""
    if model.head.device.type != "cpu":
        raise InputError(f"an int8 head works only on a CPU, not on {model.head.device}; leave out --int8-head")
    if (not hasattr(torch, "_make_per_channel_quantized_tensor") or torch.backends.quantized.engine not in ("x86", "fbgemm")
            or platform.machine() != "x86_64"):                                     # on ARM, too, the engine is called x86
        raise InputError(f"an int8 head: torch {torch.__version__} has no int8 product for this CPU; leave out --int8-head")
    model.int8_head = partial(multiply_int8, pack_int8(model.head.detach()))


def pack_int8(weight: Tensor) -> list:
    """[V, D] -> scale_v x int8 codes, scale_v = max_d |w_vd| / 127, packed for torch's int8 product: in parts of 8,192 rows, as
    packing makes two more copies of a part."""
    packed = []
    for part in weight.split(8192):
        scales = part.abs().amax(1).double().clamp(min=1e-12) / 127                         # [v]
        codes = torch.div(part, scales[:, None].float()).round_().to(torch.int8)            # [v, D]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # it will leave torch: see use_int8_head
            grid = torch._make_per_channel_quantized_tensor(codes, scales, torch.zeros(len(codes), dtype=torch.long), 0)
        packed.append(torch.ops.quantized.linear_prepack(grid, None))
        give_memory_back()
    return packed


def multiply_int8(packed: list, x: Tensor) -> Tensor:
    """[B, D] -> [B, V].  torch's operator rounds inputs to 8 bits: too coarse if some are 50 times larger than others. So
    their rounding errors are multiplied too, as B more rows, and added back; the weights are read once. Only 7 of the 8 bits
    are used, 14 in all: a CPU without VNNI adds pairs of products in 16 bits, where 2 x 255 x 127 would not fit.
    """
    wide = x.float()
    most = wide.abs().amax(1, keepdim=True).clamp(min=1e-12)                                # [B, 1]
    wide = wide / most * 63
    high = wide.round()                                                                     # [B, D] in -63..63
    rows = torch.cat([high, (wide - high) * 126])               # errors are at most half a step: x 126 fills the range
    # Scale 1 and zero point 64 for the inputs: -63..63 is stored as 1..127.
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    y = torch.cat([multiply(rows, 1.0, 64, part) for part in packed], 1)                    # [2B, V]
    return (torch.add(y[:len(x)], y[len(x):], alpha=1 / 126) * (most / 63)).to(x.dtype)     # [B, V]
