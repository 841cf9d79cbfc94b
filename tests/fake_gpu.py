"""A GPU simulated by the CPU: in the tests, code for CUDA runs on any machine and computes its values.

Inside `with gpu():` torch sees one GPU. Each of its tensors (OnGPU) holds a CPU tensor that does the computing. What a real GPU
refuses raises Wrong here: an operator that is given tensors of both devices; while a graph is recorded, a copy to or from the
host, or a value that the host waits for; a generator of the other device; numpy; a product of integers; operators for CPUs only.
A graph is what it is on a GPU: operators with the addresses that they read and write. Recording changes no memory, and a replay
reads what those addresses hold at that time; what a graph has in its pool is lost when another one there replays that does not
read it, and when it is dropped. Autocast casts as CUDA's does, in forward passes. Not simulated: time, memory, what streams do
at the same time, and which of torch's kernels would run.
"""
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from types import SimpleNamespace
from unittest import mock
from weakref import WeakSet

import torch
import torch._dynamo                    # torch's optimizers import it, and it lists torch's functions: before they are replaced
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from minikd import graphs

aten = torch.ops.aten
BOTH = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # take a CPU's tensors
INDEXED = BOTH - {aten.copy_.default}   # these only as indices, and one value
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
FILLS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}     # take a number of the CPU
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
         aten.repeat_interleave.Tensor, aten._unique2.default}          # the host waits for a value, or for a shape
# What CUDA's autocast casts (torch's documentation: "CUDA Ops that can autocast"), as far as this project could call it.
LOW = set("addbmm addmm addmv addr baddbmm bmm einsum linear matmul mm mv scaled_dot_product_attention".split())
FLOAT32 = set("cosine_similarity cross_entropy cumprod cumsum exp expm1 kl_div layer_norm log log1p log_softmax mse_loss "
              "nll_loss norm normalize pow prod reciprocal rdiv rms_norm rpow rsqrt rtruediv smooth_l1_loss softmax softplus "
              "sum".split())


class Wrong(AssertionError):
    """What would be an error on a GPU."""


class Played:
    """The GPU's state."""
    recording = None                    # while a graph is recorded, its steps: (operator, args, kwargs, its new tensors)
    before = None                       # and what they overwrite: (address, shape, strides) -> tensor, its values before
    autocast = None                     # autocast's dtype


def raw(x):
    return x.held if isinstance(x, OnGPU) else x


def each(kind, act, value):
    """value, with every x of that kind in its lists, tuples and dicts replaced by act(x)."""
    if isinstance(value, kind):
        return act(value)
    if type(value) in (list, tuple):
        return type(value)([each(kind, act, x) for x in value])
    return {key: each(kind, act, x) for key, x in value.items()} if type(value) is dict else value


@lru_cache(None)
def facts_of(func) -> SimpleNamespace:
    """What `compute` asks about an operator."""
    places = func._schema.arguments
    return SimpleNamespace(
        names=[place.name for place in places],
        writes=[place.name for place in places if place.alias_info and place.alias_info.is_write],
        takes_numbers=torch.Tag.pointwise in func.tags or func in BOTH | FILLS,         # of the CPU: not cat, stack, ...
        for_cpus=func.namespace in ("mkldnn", "quantized") or "for_cpu" in func.__name__ and "attention" not in func.__name__,
        is_product=func in PRODUCTS, waits=func in WAITS)


def wait(what):
    if Played.recording is not None:
        raise Wrong(f"{what}: while a graph is recorded")


class OnGPU(Tensor):
    """A tensor of the GPU.  held: the CPU's tensor"""

    @staticmethod
    def __new__(cls, held: Tensor):
        inference = held.is_inference()                         # a view of a plain tensor is plain in inference mode too
        with nullcontext() if inference == torch.is_inference_mode_enabled() else torch.inference_mode(inference):
            self = Tensor._make_wrapper_subclass(cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype)
        self.held = held.detach()
        return self

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        wait("tolist")
        return self.held.tolist()

    def numpy(self, *_, **__):
        raise Wrong("numpy of a GPU's tensor")

    __array__ = __reduce_ex__ = numpy

    def __repr__(self):
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():                   # Places has had its say
            return cls.compute(func, args, kwargs or {})

    @classmethod
    def compute(cls, func, args, kwargs):
        tensors, facts = [], facts_of(func)
        held = each(Tensor, lambda x: (tensors.append(x), raw(x))[1], (args, kwargs))           # the CPU's arguments
        others = [x for x in tensors if type(x) is not OnGPU and (x.dim() or not facts.takes_numbers)]
        given = dict(zip(facts.names, args)) | kwargs if facts.writes else {}
        written = [x for name in facts.writes for x in tree_leaves(given.get(name)) if isinstance(x, Tensor)]
        # What must be on the GPU: of an indexed tensor all but the indices; of a copy nothing.
        here = [args[0], *(x for x in args[2:3] if x.dim())] if func in INDEXED else [] if func in BOTH else others + written
        if any(not isinstance(x, OnGPU) for x in here):
            raise Wrong(f"{func}: on cuda {[tuple(x.shape) for x in tensors if isinstance(x, OnGPU)]}, on the CPU "
                        f"{[tuple(x.shape) for x in tensors if not isinstance(x, OnGPU)]}")
        if facts.for_cpus:
            raise Wrong(f"{func}: is for CPUs")
        if facts.is_product and not all(x.is_floating_point() for x in tensors):
            raise Wrong(f"{func}: of integers, which CUDA does not multiply")
        by_mask = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if others or by_mask or facts.waits:
            wait(func)
        for x in written if Played.recording is not None else ():
            Played.before.setdefault((x.data_ptr(), x.shape, x.stride()), (raw(x), raw(x).clone()))
        args, kwargs = held
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        # With AMX, oneDNN also reads what lies between rows, and NaNs there spread (its issue 5717).
        out = func(*(x.contiguous() for x in args) if facts.is_product else args, **kwargs)
        if Played.recording is not None:
            Played.recording.append((func, args, kwargs, tree_leaves(out)))
        same = {id(raw(x)): x for x in written}                 # an operator that writes in place returns its argument
        return each(Tensor, lambda x: same[id(x)] if id(x) in same else OnGPU(x), out)


class Move(torch.autograd.Function):
    """x on the other device.  torch raises if a gradient would have to follow: minikd sends none."""

    @staticmethod
    def forward(ctx, x):
        return x.held.clone() if isinstance(x, OnGPU) else OnGPU(x.detach().clone())


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Places(TorchFunctionMode):
    """Makes tensors where `device` says, moves them, and casts under autocast."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name == "__get__":                                   # x.shape
            return func(*args)
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self.to(*args, **kwargs, **({} if func is Tensor.to else {"device": func.__name__}))
        if func is Tensor.pin_memory:
            if isinstance(args[0], OnGPU):
                raise Wrong("pin_memory of a GPU's tensor")
            return args[0]
        if name == "__set__" and func.__self__ is Tensor.data and isinstance(args[0], OnGPU):       # x.data = y
            args[0].held = args[1].held
        if Played.autocast is not None and "out" not in kwargs:
            plain = name[2:-2] if name.startswith("__") else name           # __matmul__
            if dtype := Played.autocast if plain in LOW else torch.float32 if plain in FLOAT32 else None:
                args, kwargs = each(OnGPU, lambda x: x.to(dtype) if x.dtype in (torch.float32, torch.bfloat16) else x,
                                    (args, kwargs))
        if "device" not in kwargs:
            return func(*args, **kwargs)
        there = is_gpu(kwargs["device"])
        if kwargs.get("generator") is not None and kwargs["generator"].there != there:
            raise Wrong(f"{name}: its generator is on the other device")
        if not there and any(isinstance(x, OnGPU) for x in args):
            raise Wrong(f"{name}: on the CPU, like a tensor of the GPU")
        if there and func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], OnGPU):
            wait(f"{name}: a copy of the host's values")
        out = func(*args, **kwargs | {"device": "cpu"})
        return OnGPU(out).requires_grad_(out.requires_grad) if there and not isinstance(out, OnGPU) else out

    @staticmethod
    def to(x, *args, device=None, **kwargs):
        kept = []
        for value in args:                                      # to(device, dtype, non_blocking), to(dtype), to(other)
            if isinstance(value, (str, torch.device)):
                device = value
            elif isinstance(value, Tensor):
                device, kwargs["dtype"] = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                kept.append(value)
        if device is not None and is_gpu(device) != isinstance(x, OnGPU):
            wait("a copy between the devices")
            x = Move.apply(x)
        return Tensor.to(x, *kept, **kwargs) if kept or kwargs else x


class Pool:
    """Memory that graphs share."""
    def __init__(self):
        self.graphs = WeakSet()


class Graph:
    alive = WeakSet()

    def __init__(self):
        self.stream, self.broken, self.made = self, False, {}

    def pool(self):
        return self.memory

    def __del__(self):
        """In later versions of torch than 2.11 a stream's cuBLAS workspace goes with any graph that was recorded there."""
        for other in Graph.alive:
            other.broken |= other.stream is self.stream
        self.lose()

    def lose(self):
        """Others use the memory that it allocated."""
        with torch.inference_mode(), torch._C.DisableTorchFunction():
            for x in self.made.values():
                x.fill_(torch.nan if x.is_floating_point() else 0)

    def keep(self, steps: list, stream, pool):
        """What was recorded, on a stream, in a pool of its own or the one given."""
        self.steps, self.stream, self.memory = steps, stream, pool or Pool()
        self.memory.graphs.add(self)
        self.reads, self.made = set(), {}                       # addresses; address -> a tensor that it allocated
        for func, args, kwargs, outputs in steps:
            self.reads |= {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            new = {x.untyped_storage().data_ptr(): x for x in outputs if isinstance(x, Tensor)}
            self.made |= {at: x for at, x in new.items() if at not in self.reads}
        if any(func in PRODUCTS for func, *_ in steps):
            Graph.alive.add(self)

    def replay(self):
        wait("a replay")
        if self.broken:
            raise Wrong("a replay after another graph of its stream was dropped")
        with torch.inference_mode(), torch._C.DisableTorchFunction():           # it runs on the CPU: nothing to place
            for other in self.memory.graphs:                    # it uses the memory of all graphs but those it reads from
                if other is not self and self.reads.isdisjoint(other.made):
                    other.lose()
            for func, args, kwargs, outputs in self.steps:
                if "empty" in func.__name__:                    # which is no kernel
                    continue
                results = tree_leaves(func(*args, **kwargs))
                for place, result in zip(outputs, results):
                    if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():     # neither view nor in place
                        place.copy_(result)


@contextmanager
def record(graph: Graph, stream=None, pool=None):
    Played.recording, Played.before = [], {}
    try:
        yield
        graph.keep(Played.recording, stream, pool)
    finally:
        before, Played.recording = Played.before, None
        for place, values in reversed(before.values()):         # a recording runs nothing
            with torch.inference_mode(place.is_inference()), torch.no_grad():
                place.copy_(values)


class Autocast:
    """torch.autocast; the CPU's is torch's own."""
    real = torch.autocast

    def __new__(cls, device_type, dtype=None, enabled=True, **rest):
        return super().__new__(cls) if is_gpu(device_type) else cls.real(device_type, dtype, enabled, **rest)

    def __init__(self, device_type, dtype=None, enabled=True, **_):
        self.dtype = dtype if enabled else None

    def __enter__(self):
        self.outer, Played.autocast = Played.autocast, self.dtype
        lost = not torch.overrides._get_current_function_mode_stack()           # in backward: checkpointing runs blocks again
        self.places = Places() if lost else nullcontext()
        self.places.__enter__()

    def __exit__(self, *error):
        self.places.__exit__(*error)
        Played.autocast = self.outer


class Stream:
    """A class, not a function: transformers annotates with torch.cuda.Stream | None."""
    def __init__(self, device=0):
        self.wait_stream, self.cuda_stream = lambda other: None, 0


class Event:
    def __init__(self, **_):
        self.record = self.synchronize = lambda: None
        self.elapsed_time = lambda end: 1.0


RealGenerator = torch.Generator


class Generator(RealGenerator):
    def __new__(cls, device="cpu"):
        self = RealGenerator.__new__(cls, "cpu")
        self.there = is_gpu(device)
        return self


@contextmanager
def gpu():
    """Inside the block there is one GPU, too old for minikd's kernels, so that torch's operators run."""
    shallow = torch._has_compatible_shallow_copy_type
    cuda = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, set_device=lambda _: None,
        get_device_capability=lambda *_: (7, 5),
        get_device_properties=lambda *_: SimpleNamespace(name="played", multi_processor_count=1, total_memory=1 << 40,
                                                          major=7, minor=5, shared_memory_per_block_optin=227 << 10),
        device=lambda _: nullcontext(), synchronize=lambda *_: None, empty_cache=lambda: None, CUDAGraph=Graph, graph=record,
        Stream=Stream, current_stream=lambda: Stream(0), stream=lambda _: nullcontext(), Event=Event,
        get_rng_state=lambda *_: torch.get_rng_state(), set_rng_state=lambda state, *_: torch.set_rng_state(state),
        is_current_stream_capturing=lambda: Played.recording is not None, get_device_name=lambda *_: "a CPU",
        reset_peak_memory_stats=lambda *_: None, max_memory_allocated=lambda *_: 0, memory_snapshot=lambda: [])
    enabled, its_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
    rest = dict(
        Generator=Generator, autocast=Autocast,
        is_autocast_enabled=lambda device: Played.autocast is not None if is_gpu(device) else enabled(device),
        get_autocast_dtype=lambda device: Played.autocast or torch.bfloat16 if is_gpu(device) else its_dtype(device),
        _has_compatible_shallow_copy_type=lambda input, from_:
            isinstance(input, OnGPU) == isinstance(from_, OnGPU) and shallow(input, from_))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        stack.enter_context(mock.patch.multiple(torch, **rest))
        stack.enter_context(mock.patch.object(torch.amp, "autocast", Autocast))                 # checkpointing's
        stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", lambda *_: SimpleNamespace(
            is_capturing=lambda: Played.recording is not None)))        # optimizers of a torch built with CUDA ask it
        stack.enter_context(mock.patch.object(graphs, "borrow", torch.Tensor.detach))           # Graph.lose plays the rest
        stack.enter_context(Places())
        yield
