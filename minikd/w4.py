"""The linear layer whose weight is 4-bit codes, and the choice among its ways to multiply."""
import ctypes
import functools
import platform
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikd import products
from minikd.cuda import available
from minikd.errors import InputError
from minikd.layers import Linear
from minikd.model import Qwen2
from minikd.quant import check_groups, dequantize_groups, nibbles, pack, read_grid, unpack
from minikd.w4_cuda import MMA_ROWS, codes_of, gpu_of, plan, repack, supports_groups

# What torch's int4 operator is given: on ARM it cuts bfloat16 results off (0.3% too small on average) instead of rounding them.
OPERAND = torch.float32 if platform.machine() in ("aarch64", "arm64") else torch.bfloat16
PART = 256              # outputs that are packed or dequantised at a time on a CPU: whole blocks of the int4 operator's layout


class W4Linear(nn.Module):
    """y = x W^T + b, W held as 4-bit codes. `choose` decides how it multiplies.

    The buffers are those of a `gptq` folder. The codes are held once, and `codes` reads them from there: in qweight; after
    `ready`, in the layout that the chosen way needs, if it can be read back (int4: if O is a multiple of 64); or in the joined
    layer that this one is a part of. Away from qweight, qweight is empty; a state_dict gets a copy.
    """

    def __init__(self, inputs: int, outputs: int, group_size: int, bias: bool, version: int = 1):
        super().__init__()
        size = check_groups(inputs, group_size)
        self.inputs, self.outputs, self.group_size, self.version = inputs, outputs, size, version
        self.register_buffer("qweight", torch.zeros(inputs // 8, outputs, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(inputs // size, outputs // 8, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(inputs // size, outputs, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))
        if not self.g_idx.is_meta:                              # there arange imports sympy: see model.allocate
            self.g_idx.copy_(torch.arange(inputs) // size)
        self.register_buffer("bias", torch.zeros(outputs) if bias else None)
        self.prepared = None                                    # (way, prepare(way)); not saved
        self.whole = None                                       # of a part of a joined layer: (that layer, first row)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantised [O, I], computed in float32: what every other way is tested against.

        On a CPU part by part, so that the float32 numbers stay in its cache: a quarter of the time, and only the result is held.
        """
        scales, zeros = read_grid(self.qzeros, self.scales, self.version)                       # [O, I/g] each
        g_idx = None if self.in_order else self.g_idx.long()
        weight = torch.empty(self.outputs, self.inputs, dtype=dtype, device=scales.device)
        part = self.outputs if scales.is_cuda or torch.compiler.is_compiling() else PART        # compiled it is fused anyway
        for first in range(0, self.outputs, part):
            at = slice(first, first + part)
            weight[at] = dequantize_groups(self.codes(at), scales[at], zeros[at], g_idx)
        return weight

    def codes(self, rows: slice = slice(None)) -> Tensor:
        """uint8 [O, I], or some of the rows, from where they are."""
        words, whole = self.qweight, self.whole                 # once: another thread may let them go
        if words.numel():
            return unpack(words[:, rows].T, 1)
        first, last, _ = rows.indices(self.outputs)
        if whole is not None:
            layer, at = whole
            return layer.codes(slice(at + first, at + last))
        start, stop = first // 64 * 64, min(-(-last // 64) * 64, self.outputs)     # whole blocks of either layout
        way, (prepared, *_) = self.prepared
        if way == "kernel":
            codes = codes_of(prepared[start // 16:-(-stop // 16)], stop - start, self.inputs)
        else:
            codes = codes_of_int4(prepared[start:stop], stop - start, self.inputs)
        return codes[first - start:last - start]

    def words(self) -> Tensor:
        """The codes as qweight holds them, int32 [I/8, O]."""
        words = self.qweight
        return words if words.numel() else pack(self.codes().T, 0)

    @torch.inference_mode(False)                                # it may be written to later
    def take_back(self):
        """Puts the codes into qweight again; this layer is no longer prepared, or a part of a joined one."""
        self.qweight, self.whole, self.prepared = self.words(), None, None

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether each group is consecutive inputs; act-order in other tools shuffles them."""
        return bool((self.g_idx == torch.arange(self.inputs, device=self.g_idx.device) // self.group_size).all())

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, choose(self, x))

    def multiply(self, x: Tensor, way: str) -> Tensor:
        """x [..., I] -> [..., O], by one of the ways that `choose` names."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if way == "dequantise":                                 # any dtype, anywhere; gradients with respect to x
            slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and products.AVX2_ONLY          # products.py says why
            dtype = torch.float32 if slow else x.dtype
            bias = None if bias is None else bias.to(dtype)     # rounded to x's dtype before, as in the other ways
            return F.linear(x.to(dtype), self.weight(dtype), bias).to(x.dtype)
        rows = x.reshape(-1, self.inputs).contiguous()                                          # [M, I]
        if way == "kernel":
            y = torch.ops.minikd.w4_matmul(rows, *self.ready(way), bias, self.outputs, self.group_size)
        else:
            packed, scales_zeros = self.ready(way)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.to(OPERAND), packed, self.group_size, scales_zeros).to(x.dtype)
            y = y if bias is None else y + bias
        return y.view(*x.shape[:-1], self.outputs)                                              # [..., O]

    def ready(self, way: str) -> tuple:
        """What `prepare` gives, kept."""
        if self.prepared is None or self.prepared[0] != way:
            readable = way == "kernel" or can_read_int4(self.outputs, self.inputs)
            words = self.qweight.new_empty(0) if readable else self.words()
            self.prepared = way, self.prepare(way)
            self.qweight, self.whole = words, None              # in this order: another thread may look for the codes
            give_memory_back()
        return self.prepared[1]

    def choose_ways(self, dtype: torch.dtype):
        """Finds out and prepares what a few rows of inputs in `dtype` need: torch.compile cannot trace that. (On a CPU, MANY_ROWS
        and more then dequantise from the int4 operator's layout: a compiled layer takes 1.2 x as long for 1,024 rows.)"""
        way = choose(self, torch.empty(1, self.inputs, dtype=dtype, device=self.scales.device)) if self.in_order else "dequantise"
        if way != "dequantise":
            self.ready(way)

    def prepare(self, way: str) -> tuple:
        """Codes and grid in the layout of a way, for bfloat16 inputs. int4's layout depends on the CPU: it is never saved."""
        scales, zeros = read_grid(self.qzeros, self.scales, self.version)
        if way == "kernel":
            return repack(self.codes(), scales, zeros)
        pair = torch.stack([scales, (8 - zeros) * scales], dim=-1).transpose(0, 1)              # [I/g, O, 2]
        packed = [pack_int4(self.codes(slice(i, i + PART))) for i in range(0, self.outputs, PART)]
        return torch.cat(packed), pair.to(OPERAND).contiguous() # w = (code - 8) scale + (8 - zero) scale

    def _apply(self, fn, recurse=True):
        """model.to(bfloat16) must not round the scales: they stay in float16, as stored."""
        self.take_back()
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def __getstate__(self) -> dict:
        """For copy and pickle: the buffers as stored, because the layout depends on the CPU."""
        held = {} if self.whole is not None else {"_buffers": self._buffers | {"qweight": self.words()}}
        return self.__dict__ | held | {"prepared": None}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "qweight"] = self.words()

    def _load_from_state_dict(self, *given):
        self.take_back()                                        # the memory that is copied into
        super()._load_from_state_dict(*given)
        self.__dict__.pop("in_order", None)


MANY_ROWS = 192         # from here on dequantise: as fast near 200 rows at 896 -> 4864, near 150 at 2048 -> 11008 (w4_linear.txt;
                        # without AVX-512 near 300 and 270, with AMX near 120 and 165)


def choose(layer: W4Linear, x: Tensor) -> str:
    """How `layer` multiplies x [..., I]: "kernel", minikd's own on a GPU (w4_cuda.plan picks one by the number of rows);
    "int4", torch's operator on a CPU; or "dequantise", then multiply: works anywhere, also where a gradient is needed."""
    if x.dtype != torch.bfloat16 or not layer.in_order or torch.is_grad_enabled() and x.requires_grad:
        return "dequantise"
    has_kernel = layer.prepared is not None and layer.prepared[0] == "kernel"   # torch.compile cannot trace `available`
    if x.is_cuda and supports_groups(layer.group_size) and (has_kernel or available(x.device.index)):
        return "kernel"
    rows = x.numel() // layer.inputs
    if x.device.type == "cpu" and layer.outputs % 16 == 0 and layer.group_size in (32, 64, 128, 256) and rows < MANY_ROWS:
        return "int4"
    return "dequantise"


# ---- the layout of torch's int4 operator

def pack_int4(codes: Tensor) -> Tensor:
    """uint8 [O, I] -> uint8 [O, I/2], for _weight_int4pack_mm_for_cpu on this CPU"""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def codes_of_int4(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """pack_int4's inverse, uint8 [O, I]. O must be a multiple of 64, where a block of the layout always ends."""
    blocks = nibbles(packed).view(outputs // 64, 64 * inputs)
    return blocks.gather(1, int4_places(inputs).expand(len(blocks), -1)).view(outputs, inputs)     # indexing takes 3 x as long


@functools.cache
def can_read_int4(outputs: int, inputs: int) -> bool:
    """Whether codes_of_int4 reads the codes of such a layer on this CPU; tried once."""
    if outputs > PART:
        return can_read_int4(PART, inputs) and can_read_int4(outputs % PART or PART, inputs)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (outputs, inputs), generator=generator, dtype=torch.uint8, device="cpu")
    return outputs % 64 == 0 and torch.equal(codes_of_int4(pack_int4(codes), outputs, inputs), codes)


@functools.cache
def int4_places(inputs: int) -> Tensor:
    """Where the codes of 64 outputs are in their block, [64 I]. It depends on the CPU, and torch does not tell: so this packs the
    codes' indices, one hexadecimal digit at a time, and looks where they end up."""
    index = torch.arange(64 * inputs, dtype=torch.int32, device="cpu").view(64, inputs)
    digits = (nibbles(pack_int4(index >> 4 * i & 15)).flatten().int() for i in range(6))
    return sum(digit << 4 * i for i, digit in enumerate(digits)).argsort()


# ---- a model of such layers

def linear_layers(model: Qwen2) -> dict[str, Linear]:
    """What is quantised: the blocks' linear layers, by name. Embeddings, norms and the head stay as they are.

    Raises InputError for a layer that is more than its weight: what is added to it would be lost.
    """
    layers = {f"model.{name}": layer for name, layer in model.model.named_modules() if isinstance(layer, Linear)}
    for name, layer in layers.items():
        if type(layer) is not Linear or "weight" not in layer._parameters:
            raise InputError(f"{name}: has an adapter, a parametrisation or a mask; merge it into the weight first")
    return layers


def swap_linears(model: Qwen2, group_size: int, version: int, words: dict[str, dict] | None = None):
    """Replaces each linear layer by a W4Linear of its shape, device and bias, with its words if given.

    Raises InputError for a group size that does not divide a layer, and as linear_layers does; ValueError if words lack a layer.
    """
    layers = linear_layers(model)
    if words is not None and (missing := layers.keys() - words.keys()):
        raise ValueError(f"to_w4: {min(missing)} is left out; quantise all layers of the blocks")
    for name, layer in layers.items():                          # all, before the first is replaced
        check_groups(layer.in_features, group_size, name)
    for name, layer in layers.items():
        with torch.device(layer.weight.device):
            new = W4Linear(layer.in_features, layer.out_features, group_size, False, version)
        if words is not None:
            new.load_state_dict(words[name])
        if layer.bias is not None:
            new.bias = layer.bias.detach()
        model.set_submodule(name, new)                          # once it is complete: this may be interrupted


def to_w4(model: Qwen2, layers: dict[str, dict], group_size: int, sym: bool, **meta) -> Qwen2:
    """The model, changed in place: the linear layers of its blocks are replaced by packed ones.

    layers  name -> to_words of that layer, in version 1 where it is symmetric, else 2
    meta    how they were found, for the folder's config: damp_percent, static_groups, ...
    Raises ValueError, with the model unchanged, for symmetric layers whose zeros are not 8, and as swap_linears does.
    """
    version, format = (1, "gptq") if sym else (2, "gptq_v2")
    if sym and any((words["qzeros"] != 0x77777777).any() for words in layers.values()):
        raise ValueError("to_w4: a symmetric layer's zeros are 8; give to_words in version 1, of codes of 4 bits")
    swap_linears(model, group_size, version, layers)
    model.partly_quantized = False
    model.quantization = {                                      # as transformers, GPTQModel and vLLM expect it
        "quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": sym,
        "desc_act": False,                                      # whether groups are shuffled: act_order keeps them static
        "lm_head": False, "checkpoint_format": format, "format": format, "pack_dtype": "int32",
        "meta": {"quantizer": ["minikd:0.1"], **meta}}
    return model


@torch.no_grad()
def show_ways(model: Qwen2, rows=(1, 16, 64, 1024)):
    """Prints which way (`choose`) each shape of 4-bit layer takes for these numbers of rows, on the model's device."""
    layers = [layer for layer in model.modules() if isinstance(layer, W4Linear)]
    print(f"{f'{len(layers)} 4-bit layers, rows:':<28}" + "".join(f"{count:>16,}" for count in rows))
    for inputs, outputs in dict.fromkeys((layer.inputs, layer.outputs) for layer in layers):
        alike = [layer for layer in layers if (layer.inputs, layer.outputs) == (inputs, outputs)]
        cells = []
        for count in rows:
            x = torch.empty(count, inputs, dtype=model.head.dtype, device=model.head.device)
            way = "/".join(dict.fromkeys(choose(layer, x) for layer in alike))
            if way == "kernel" and count <= MMA_ROWS:
                way = plan(count, outputs, inputs, alike[0].group_size, True, gpu_of(x.device))
            cells.append(way)
        print(f"{f'{len(alike)} of {inputs:,} -> {outputs:,}':<28}" + "".join(f"{cell:>16}" for cell in cells))


def give_memory_back():
    """Returns freed memory to the system. For the 0.5B, glibc would keep 0.07 GB after 4-bit layers are prepared, and 0.25 GB
    after weights move between layouts."""
    with suppress(OSError, AttributeError):                     # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
