"""CUDA graphs: one call of the host starts all kernels. To start them one by one can take longer than to run them.

`Replay` is for a step of decoding, `GraphedBlocks` for the forward and the backward pass of a body's blocks in training.
"""
import functools
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minikd.layers import Linear
from minikd.model import Body, RMSNorm

TILE = 64       # GraphedBlocks pads sequences to multiples of it, so that few graphs serve batches of all lengths
MOST = 64       # pairs of graphs that it makes: each has some thousand kernels


def can_record(device: torch.device) -> bool:
    """Whether CUDA graphs can record this device: only the current GPU; on others they would stay empty, without an error."""
    return device.type == "cuda" and device.index == torch.cuda.current_device()


@functools.cache
def recording_stream(device: int):
    """A stream to record a GPU's graphs on. torch's own belongs to the first GPU that recorded: others' graphs would be empty."""
    return torch.cuda.Stream(device)


class Replay:
    """Calls `step`: the first time directly, then as a CUDA graph of it, which is one launch and no Python.

    The first call allocates what must not be allocated while a graph is recorded: cuBLAS's workspaces, kernels compiled
    at first use.  on: False always calls it directly.
    """

    def __init__(self, step, on: bool):
        self.step, self.on, self.warm, self.graph = step, on, False, None

    def __call__(self):
        if not (self.on and self.warm):
            self.warm = True
            return self.step()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=recording_stream(torch.cuda.current_device())):     # records, without running
                self.step()
            self.graph = graph                                  # only once it is complete
        self.graph.replay()


class GraphedBlocks:
    """A body's blocks and last norm in training under autocast, their forward and their backward pass replayed from CUDA graphs:
    a pair for each shape of a batch.

    The graphs read bfloat16 copies of the weights and give their gradients in bfloat16 (norms stay in float32). So does autocast,
    which casts every weight and gradient in every step; here the optimizer writes the copies (AdamW.clip_and_step).

    All graphs share one pool of memory, about as large as the largest shape needs. So a forward pass overwrites what the one
    before left for its backward pass, and gradients that are still there are added to .grad first.

    Later versions of torch than 2.11 free a stream's cuBLAS workspace when any graph that was recorded on that stream is dropped,
    and those that are left then read and write other tensors' memory (pytorch issue 193402). So these graphs have a stream of
    their own, and are only dropped all together.
    """

    def __init__(self, body: Body):
        self.copies = Copies(body)                      # no reference to the body itself: the cycle would outlive the run
        self.pairs, self.pool = {}, None                # shape -> Pair; the memory of all of them
        self.stream = torch.cuda.Stream()
        self.lent = {}                                  # weight -> its gradient, which the last backward pass left in the pool
        self.turns = 0                                  # forward and backward passes so far

    def __call__(self, x: Tensor, positions: Tensor, states) -> Tensor:
        """states(x, positions), which is Body.states, for embeddings of whole sequences: [B, T, D] -> [B, T, D]. The next call
        overwrites the result. The backward pass leaves the weights' gradients in `lent`; `settle` adds them to .grad."""
        T = x.shape[1]
        padded = F.pad(x, (0, 0, 0, -T % TILE))                                 # [B, T', D]; causal: no other state sees it
        self.copies.refresh()
        self.settle()                                                           # before they are overwritten
        if padded.shape not in self.pairs:
            if padded.numel() > max((pair.x.numel() for pair in self.pairs.values()), default=0):
                self.pairs, self.pool = {}, None        # a new pool: the larger tensors would fit nowhere in the old one
            elif len(self.pairs) == MOST:
                return states(x, positions)             # to make room would cost a recording in every call, if shapes take turns
            try:
                self.pairs[padded.shape] = self.record(padded, states)
            except BaseException:                       # its graphs will be dropped: so drop all, and their stream (see above)
                self.pairs, self.pool, self.stream = {}, None, torch.cuda.Stream()
                raise
        return _Replayed.apply(padded, self)[:, :T]

    def record(self, like: Tensor, states) -> "Pair":
        """The graphs of both passes for embeddings like these. Each pass runs once before, as in Replay."""
        stream, positions = self.stream, torch.arange(like.shape[1], device=like.device)[None]      # [1, T']
        leaves = [leaf for leaf, _ in self.copies.leaves]
        make = lambda: torch.empty_like(like, requires_grad=True)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.enable_grad(), self.copies.installed(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                x = make()
                y = states(x, positions)
                torch.autograd.grad(y, [x, *leaves], torch.zeros_like(y))
                del x, y
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(forward, pool=self.pool, stream=stream):
                x = make()
                y = states(x, positions)
                slope = torch.empty_like(y)
            with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
                slope_x, *slopes = torch.autograd.grad(y, [x, *leaves], slope)
        self.pool = forward.pool()                      # only now: if a recording fails, its new pool goes with it
        gradients = {}
        for (_, weights), found in zip(self.copies.leaves, slopes, strict=True):
            gradients |= zip(weights, borrow(found).split([len(weight) for weight in weights]))
        return Pair(forward, backward, positions, *map(borrow, (x, y, slope, slope_x)), gradients)

    def settle(self):
        """Adds what the last backward pass left in the pool to the weights' .grad."""
        for weight, found in self.lent.items():
            if weight.grad is None:
                weight.grad = found.to(weight.dtype, copy=True)
            else:
                weight.grad += found
        self.lent = {}


class Pair(NamedTuple):
    """The graphs of both passes for one shape, and the places that they read and write."""
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    positions: Tensor                   # only kept: the graphs read it
    x: Tensor
    y: Tensor
    slope: Tensor                       # dL/dy
    slope_x: Tensor                     # dL/dx
    gradients: dict                     # weight -> dL/dweight


class Copies:
    """bfloat16 copies of the blocks' matrices and biases, those of layers with the same inputs in one matrix."""

    @torch.no_grad()
    def __init__(self, body: Body):
        self.leaves = []                                # what the graphs differentiate by, each with the weights that it copies
        self.branches, self.singles = [], []            # each with what takes its place: a joined layer; a leaf, for the weight
        self.versions = None                            # of the weights, when they were last copied
        for block in body.layers:
            for branch in block.self_attn, block.mlp:
                layers, last = branch.first_and_last()
                joined = Linear(1, 1, bias=layers[0].bias is not None)          # its parameters are replaced
                for name, _ in list(joined.named_parameters()):
                    setattr(joined, name, self.copy([getattr(layer, name) for layer in layers]))
                self.branches.append((branch, joined))
                self.singles.append((last, self.copy([last.weight])))
        self.of = {weight: view for leaf, weights in self.leaves                # weight -> its copy
                   for weight, view in zip(weights, leaf.detach().split([len(weight) for weight in weights]))}
        # Norms are read in float32, as under autocast, so their leaves share the weights' memory. The weights themselves cannot
        # be the leaves: while a plain pass's loss is alive, torch ties them to its stream, and refuses to record on another.
        for norm in (each for each in body.modules() if isinstance(each, RMSNorm)):
            leaf = nn.Parameter(norm.weight.detach())
            self.singles.append((norm, leaf))
            self.leaves.append((leaf, [norm.weight]))

    def copy(self, weights: list[Tensor]) -> nn.Parameter:
        """A new leaf: these weights in bfloat16, one below the other."""
        leaf = nn.Parameter(torch.cat([weight.detach() for weight in weights]).bfloat16())
        self.leaves.append((leaf, weights))
        return leaf

    @torch.no_grad()
    def refresh(self):
        """Copies the weights again if torch has written to them since. (What adamw.cu writes is not counted: it writes both.)"""
        versions = [weight._version for weight in self.of]
        if versions != self.versions:
            torch._foreach_copy_([*self.of.values()], [*self.of])
            self.versions = versions

    @contextmanager
    def installed(self):
        """Inside the `with` block the body's layers and norms multiply by the copies."""
        own = [layer.weight for layer, _ in self.singles]
        try:
            for branch, joined in self.branches:
                branch.joined = joined.forward
            for layer, leaf in self.singles:
                layer.weight = leaf
            yield
        finally:
            for branch, _ in self.branches:
                branch.joined = None
            for (layer, _), weight in zip(self.singles, own):
                layer.weight = weight


def borrow(tensor: Tensor) -> Tensor:
    """A tensor in the same memory that does not keep it: so the pool can give it to the graphs of another shape, too."""
    tensor = tensor.detach()
    words = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor          # the interface knows no bfloat16
    memory = SimpleNamespace(__cuda_array_interface__=words.__cuda_array_interface__)
    return torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)


class _Replayed(torch.autograd.Function):
    """One forward pass of GraphedBlocks, and its backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, graphs: GraphedBlocks) -> Tensor:
        pair = graphs.pairs[x.shape]
        pair.x.copy_(x)
        pair.forward.replay()
        graphs.turns += 1
        ctx.graphs, ctx.turn = graphs, graphs.turns             # not the pair, which would outlive its pool
        return pair.y.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor):
        graphs = ctx.graphs
        if ctx.turn != graphs.turns:
            raise RuntimeError("another pass came between: call backward once, right after its forward pass")
        graphs.turns += 1
        pair = graphs.pairs[slope.shape]
        pair.slope.copy_(slope)
        pair.backward.replay()
        graphs.lent = pair.gradients
        return pair.slope_x.detach(), None
