"""The layers that the decoder is made of, and what may be attached to them for the sake of speed.

Linear computes what nn.Linear computes, and Embedding what nn.Embedding does; Branch and Attachable are nn.Modules: that is
enough to know for reading model.py. layout.py, graphs.py and training.py attach other ways to compute the same.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear that while decoding on a CPU multiplies in another way (layout.Packed, layout.multiply_plain)."""
    packed = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if self.packed is None else self.packed(x)


def as_built(*modules: nn.Module, kinds: tuple[type, ...] = (Linear,)) -> bool:
    """Whether modules are of exactly these classes, not of subclasses (adapters, parametrised layers), and have no hooks. What
    joins, packs or records their computations would skip anything else that they do."""
    return all(type(each) in kinds and "forward" not in vars(each)
               and not (each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks)
               for each in modules)


def watched(weight: Tensor) -> bool:
    """Whether hooks wait for its gradient, which must then come by way of autograd."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


def trains_on_gpu(x: Tensor) -> bool:
    """Whether x is part of a training step in bfloat16 on a GPU."""
    return x.is_cuda and torch.is_grad_enabled() and torch.is_autocast_enabled("cuda")


class Branch(nn.Module):
    """Branch of a block, Attention or MLP. Its first layers all read x, so layout.py and graphs.py may join them into
    one; `first_and_last` gives those layers, and the one that their results enter."""
    joined = None                                           # once joined: x -> the outputs of its first layers side by side

    def _apply(self, fn, recurse=True):                                         # what .to(), .cuda() and .half() call
        self.joined = None                                                      # it would stay in the old dtype or device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *given):
        self.joined = None                                                      # it may hold the old weights
        super()._load_from_state_dict(*given)

    def one_product(self, x: Tensor):
        """One function x -> the outputs of these layers side by side, or None if each has to multiply for itself.

        In training on a GPU the weights are concatenated anew in every step, where autocast copies them anyway: this saves
        kernels, which for a small model take the host longer to launch than the GPU to run. On an H200 a KD step with a 0.5B
        student took 109 ms instead of 122; with a cached teacher, 59 instead of 91. With CUDA graphs, graphs.Copies joins them.
        """
        if self.joined is not None:
            return self.joined
        if not trains_on_gpu(x):
            return None
        layers, _ = self.first_and_last()
        if not as_built(*layers):
            return None
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        return partial(F.linear, weight=weight, bias=bias)


class TiedLookup(torch.autograd.Function):
    """F.embedding, but backward adds the table's gradient to table.grad in place.

    For the few hundred rows looked up, autograd would build a gradient as large as the table, 544 MB for the 0.5B. Where the
    table is also the head, it would stand beside the head's gradient and set the step's peak memory.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, ids: Tensor, embedding: nn.Embedding) -> Tensor:
        """anchor  any tensor that requires grad, so that backward is called: the table itself must not be an input,
        or autograd would hold the head's gradient back until the lookup's arrives."""
        ctx.ids, ctx.table = ids, embedding.weight
        return F.embedding(ids, embedding.weight)                               # [B, T] -> [B, T, D]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        if ctx.table.grad is None:
            ctx.table.grad = torch.zeros_like(ctx.table)
        ctx.table.grad.index_add_(0, ctx.ids.flatten(), grad.flatten(0, 1).to(ctx.table.dtype))
        return None, None, None


class Embedding(nn.Embedding):
    """nn.Embedding, in whose place TiedLookup looks up a table that is also the head, once `in_place` is set, in train
    mode, and if nothing watches the table's gradient."""
    in_place = False    # training.make_optimizer(in_place=True): a step reads .grad, but torch.autograd.grad would miss it

    def __init__(self, V: int, D: int):
        # Zeros until init_weights or a checkpoint: on the meta device nn.Embedding's own normal_() would import
        # torch._dynamo, 1.5 s and 75 MB.
        super().__init__(V, D, _weight=torch.zeros(V, D))

    def forward(self, ids: Tensor) -> Tensor:
        table = self.weight
        learned = self.training and torch.is_grad_enabled() and table.requires_grad
        if self.in_place and learned and table.is_leaf and not watched(table):
            return TiedLookup.apply(torch.zeros((), requires_grad=True), ids, self)         # [B, T] -> [B, T, D]
        return super().forward(ids)                                                         # the same

    def __getstate__(self) -> dict:
        return self.__dict__ | {"in_place": False}                              # a copy has no optimizer yet


class Attachable(nn.Module):
    """An nn.Module that drops what layout.py attached to it when its dtype, device or weights change; zero_grad also drops the
    gradients that graphs.py lent."""
    packed_head = int8_head = layout = None         # set by layout.py
    decoding = False                                # inside layout.laid_out
    partly_quantized = False                        # gptq.quantize_model was interrupted, or has freed the weights

    def lay_back(self):
        """Undoes layout.join_layers and layout.use_multiply: every layer multiplies by its own weight again."""
        self.packed_head = None
        for module in self.modules():
            for name in "joined", "packed":                                     # of Attention and MLP; of Linear
                held = getattr(module, name, None)
                if hasattr(held, "unpack"):                                     # a layout.Packed: only it holds the weights
                    held.unpack()
                if held is not None:
                    setattr(module, name, None)
        self.layout = None                                      # last: after an interrupt the next laid_out calls this again

    def _apply(self, fn, recurse=True):
        self.lay_back()                                                         # another dtype or device
        self.int8_head = None
        return super()._apply(fn, recurse)

    def load_state_dict(self, *given, **options):
        self.lay_back()                                                         # other weights
        self.int8_head = None
        found = super().load_state_dict(*given, **options)
        self.partly_quantized = False
        return found

    def zero_grad(self, set_to_none: bool = True):
        if self.model.graphs is not None:
            self.model.graphs.lent = {}                                         # gradients that are not in .grad yet
        super().zero_grad(set_to_none)

    def __getstate__(self) -> dict:
        """For copy and pickle, which oneDNN's packed tensors and the int8 head do not support. (While another thread generates, a
        model's layers may be packed too: then both raise NotImplementedError.)"""
        return self.__dict__ | {"packed_head": None, "int8_head": None, "layout": None, "decoding": False}
