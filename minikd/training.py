"""What the training loops share: the optimizer, its schedule and step, CUDA graphs, compilation, the C library's memory. The
loops are in the scripts."""
import ctypes
import math
import sys
from contextlib import contextmanager
from itertools import chain

import torch

from minikd.adamw_cuda import AdamW
from minikd.checkpoint import check_vocabulary, model_folder, outline
from minikd.decode_cuda import block_matrices
from minikd.errors import InputError
from minikd.graphs import GraphedBlocks, can_record
from minikd.layers import watched
from minikd.model import Qwen2, run_blocks
from minikd.w4 import W4Linear, give_memory_back


def check_student(name, tokenizer):
    """Raises InputError for a model to train that lacks a tensor or has a file cut short, for a 4-bit one, whose weights cannot
    be trained, and for one with too few rows for the tokenizer."""
    model, _ = outline(model_folder(name))
    if model.quantization:
        raise InputError(f"{name}: holds 4-bit weights, which cannot be trained; give the folder it was made from")
    check_vocabulary(name, model.config, tokenizer)


def make_optimizer(model: Qwen2, lr: float, weight_decay: float = 0.01, in_place: bool = False) -> AdamW:
    """AdamW (arXiv:1711.05101, Algorithm 2, as torch has it: the decay is lr x weight_decay, so a change of lr changes both);
    biases and norm weights have no weight decay.

    in_place  in train mode the backward pass itself adds a tied embedding's gradient to .grad, which saves as much memory as the
              table has (layers.TiedLookup). torch.autograd.grad, unlike .backward(), then misses it
    """
    model.model.embed_tokens.in_place = in_place and model.config.tie_word_embeddings
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)      # betas: as MiniLLM's trainer; fused: in one pass


def use_graphs(model: Qwen2, dtype: torch.dtype):
    """Replays the blocks' forward and backward passes from CUDA graphs, in bfloat16 training on a GPU, if all weights are trained
    and no hook or other class is in the way. Hooks that are added later are not called. After a backward pass the gradients are
    in graphs.lent, where apply_gradient finds them; graphs.settle() adds them to .grad.

    Not in float32: generate then samples from this very model (cast_copy), and may move its weights (layout.join)."""
    trained = all(p.requires_grad and not watched(p) for p in model.parameters())
    if dtype == torch.bfloat16 and can_record(model.head.device) and trained and model.model.as_built():
        model.model.graphs = GraphedBlocks(model.model)


def compile_blocks(*models: Qwen2):
    """Lets torch.compile fuse the operations between a block's matrix products, for whole sequences and for decoding steps
    that a CUDA graph replays. One compiled graph serves all groups of blocks; the two models of a KD step took 27 s to compile.
    """
    torch._dynamo.config.recompile_limit = 64                   # run_blocks of all models, modes and numbers of rows (default: 8)
    # Recomputes some values in the backward pass instead of keeping them, such as silu(gate) up. A KD step on an H200 held 17.0
    # GB, not 18.5 (before use_graphs), and took 1% longer. The setting applies to all that this process compiles.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for model in models:
        for layer in {*model.modules(), *chain(*map(block_matrices, model.model.layers))}:        # joined layers are no modules
            if isinstance(layer, W4Linear) and layer.whole is None:             # no part of a joined one
                layer.choose_ways(model.head.dtype)
        model.model.compiled = torch.compile(run_blocks)


@contextmanager
def keep_freed_memory():
    """Meanwhile the C library keeps the memory that tensors on a CPU leave, for the next ones. By default glibc returns much of
    it to the system, which clears every page that it hands out again: a seventh of a KD step of Qwen2.5-0.5B in bfloat16 with
    4 x 256 tokens (benchmarks/results/kd_step.txt). Blocks of 32 MB and more are returned at once, as ever, unless they fitted
    into what was kept; all is returned at the end. Does nothing with another C library."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "malloc_trim"):                        # musl's, or a Mac's
        yield
        return
    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1                 # glibc adapts both by itself, until one of them is set
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)                    # bytes: as far as glibc goes
    libc.mallopt(M_TRIM_THRESHOLD, -1)                          # never
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)                # twice the other, as glibc has it
        give_memory_back()


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "cosine") -> float:
    """The learning rate at step 0 .. steps-1: linear warm-up to peak, then constant, or a cosine towards peak / 10."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule != "cosine":
        raise ValueError(f"schedule = {schedule!r}; it must be 'cosine' or 'constant'")
    done = (step - warmup) / (steps - warmup)                   # from 0; 1 would be the step after the last
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))  # from 1.0 towards 0.1


def apply_gradient(model: Qwen2, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> torch.Tensor:
    """One step of the optimizer, at the rate `lr` for all of its groups, after scaling a longer gradient down to `max_grad_norm`;
    frees the gradients. The gradient is that of the optimizer's weights, which may belong to other modules, too, such as a
    projection. Returns its norm [] before the scaling, which may not be finite (check_gradient), without waiting for a GPU
    (except at the first step)."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    graphs = model.model.graphs                                 # None but in bfloat16 on a GPU
    if graphs and any(weight.grad is not None for weight in graphs.lent):       # earlier micro-batches': add the last one's
        graphs.settle()
    lent, copies = (graphs.lent, graphs.copies.of) if graphs else ({}, {})
    norm = optimizer.clip_and_step(max_grad_norm, lent, copies) if isinstance(optimizer, AdamW) else None
    if norm is None:                                            # on a CPU, and where adamw.cu cannot run
        if graphs:
            graphs.settle()
        own = dict.fromkeys(chain(*(group["params"] for group in optimizer.param_groups)))
        # The model's own first, in its order: the norm's last digits depend on the order.
        weights = [weight for weight in dict.fromkeys(chain(model.parameters(), own)) if weight in own]
        norm = torch.nn.utils.clip_grad_norm_(weights, max_grad_norm)
        optimizer.step()
        torch.autograd.graph.increment_version(weights)                         # a fused step does not; graphs.Copies goes by it
    model.zero_grad()                                                           # and forgets graphs.lent
    optimizer.zero_grad()                                                       # also of weights outside the model
    return norm


def check_gradient(norm: float, where: str, lr: float, dtype: torch.dtype, first: bool):
    """Raises InputError for a norm that is not finite.  first: no weight had changed before, so lr is not to blame"""
    if not math.isfinite(norm):
        mend = "take another model, or raise --temperature if the loss uses it" if first else f"lower --lr (now {lr:g})"
        raise InputError(f"{where}: the gradient is not finite; {mend}"
                         + (", or use --dtype float32" if dtype != torch.float32 else ""))
