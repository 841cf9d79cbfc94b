"""GPTQ: few-bit weights; each column's rounding error is compensated by adjusting the columns after it.

A layer's weight W [O, I] is rounded to Q so that the layer's outputs change little, on the inputs x it really gets:

    min_Q  tr((W - Q) H (W - Q)^T),   H = 2/n sum_x x x^T                                          eq. (1)

The trace is twice the mean squared change of the outputs. The factor 2 makes H the second derivative of the squared error; it
does not change the codes. A column of W belongs to one input, a row to one output, and H is the same for all rows.

Columns are rounded one after the other. Let F be those not rounded yet, j the first of them, and H_F their part of H.
Eq. (2): the cheapest way to compensate the error of column j is to change F by -(w_j - q_j) / [H_F^-1]_jj times row j of H_F^-1.
F shrinks with every column. Eq. (3) would update the inverse, but it is not needed: with H^-1 = U^T U, U upper triangular, the
lower right part of U is the same factor of H_F^-1, so that

    U_jj^2 = [H_F^-1]_jj,   U_j,F / U_jj = [H_F^-1]_j,F / [H_F^-1]_jj

    error = (w_j - q_j) / U_jj,   w_k -= error U_jk  for the columns k after j

Eq. (4) is eq. (2) for several columns at once: the errors of a whole block of columns reach all later ones in one product.

References
    GPTQ                                            arXiv:2210.17323, eq. (1), (2), (4), Algorithm 1
    its reference code: act-order, static groups    github.com/IST-DASLab/gptq

Departures from that code: without act-order a group's grid is found on fully updated weights (blocks end where groups do),
inputs that are always 0 do not count in the damping's mean, errors are computed with the scales as float16 stores them, and
the factor of the inverse comes from one Cholesky instead of two (inverse_factor).
"""
import functools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from minikd.data import Encoded, by_length, collate
from minikd.errors import InputError
from minikd.graphs import Replay, can_record
from minikd.layout import without_onednn
from minikd.model import Qwen2, rope_tables
from minikd.quant import check_weight, dequantize, dequantize_groups, find_grid, quantize, round_to_nearest
from minikd.w4 import give_memory_back, linear_layers

PANEL = 512                                         # columns of a Hessian or of its factor in one product
MAX_DAMP = 10.0                                     # more damping than any sum of x x^T needs


@contextmanager
def full_precision():
    """Float32 products in full float32, whatever the process allows: TF32 and bfloat16 would keep 3 digits of 7."""
    with ExitStack() as stack:
        stack.enter_context(without_onednn())       # on ARM it obeys an environment variable first: DNNL_DEFAULT_FPMATH_MODE
        try:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        except RuntimeError:                                    # set by torch's newer names, which do not mix with this one
            for backend in torch.backends.cuda.matmul, torch.backends.mkldnn.matmul:
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        yield


# ---- one layer

class Hessian:
    """H = 2/n sum x x^T [I, I] in float32, over the n real tokens that reach a layer; padding is left out."""

    def __init__(self, inputs: int, device="cpu"):
        self.H, self.tokens = torch.zeros(inputs, inputs, dtype=torch.float32, device=device), 0

    @full_precision()
    def add(self, inputs: Tensor, mask: Tensor):
        """inputs [..., I] of a layer, mask [...] True or 1 on real tokens.

        H is symmetric: only blocks on and above the diagonal are computed, as this takes most of a calibration's time.
        """
        x = inputs[mask.bool()].float()                                         # [n, I]; a mask of ints would be taken as indices
        if not len(x):
            return
        before, self.tokens = self.tokens, self.tokens + len(x)
        for at in range(0, len(self.H), PANEL):             # the running mean: H <- (before H + 2 sum x x^T) / tokens
            rows = self.H[at:at + PANEL, at:]                                   # [b, I - at]
            rows.addmm_(x[:, at:at + PANEL].T, x[:, at:], beta=before / self.tokens, alpha=2 / self.tokens)

    def finish(self, where: str = "layer") -> Tensor:
        """H [I, I].  Raises InputError if no token arrived: without inputs nothing can be compensated."""
        if not self.tokens:
            raise InputError(f"{where}: no calibration token reached it; give more or longer calibration rows")
        for at in range(0, len(self.H), PANEL):
            self.H[at + PANEL:, at:at + PANEL] = self.H[at:at + PANEL, at + PANEL:].T
        return self.H


def inverse_factor(hessian: Tensor, order: Tensor, damp: float, where: str = "layer") -> Tensor:
    """U, upper triangular with U^T U = (H + damp mean(diag H) Id)^-1, rows and columns in `order`.  [I, I] -> [I, I]

    The paper's way is torch.linalg.cholesky(torch.linalg.inv(H), upper=True). Here, with J the matrix that reverses the order,
    Cholesky of J H J gives L L^T; R = J L J is upper triangular, R R^T = J L L^T J = H, and U = R^-1 has U^T U = H^-1. That
    takes 0.6 of the time, without a second Cholesky that could fail, and all in one copy of H: 95 MB for the 4,864 inputs of
    the 0.5B's down_proj.
    While H is not positive definite, the damping grows tenfold, to 0.001 at least, with a warning. Raises InputError past
    MAX_DAMP.
    """
    diagonal, backwards = hessian.diagonal(), order.flip(0)
    alive = diagonal != 0
    mean = diagonal[alive].mean() if alive.any() else torch.ones_like(diagonal[0])
    while True:
        M = hessian[backwards[:, None], backwards].float()                      # J H J [I, I], a copy
        M.diagonal().add_(torch.where(alive, damp * mean, mean)[backwards])     # dead inputs: any number above 0 will do
        failed = torch.empty((), dtype=torch.int32, device=M.device)
        torch.linalg.cholesky_ex(M.T, out=(M.T, failed))                        # M.T, column by column as in LAPACK, becomes L
        if not failed:
            break
        tried, damp = damp, max(10 * damp, 1e-3)
        if damp > MAX_DAMP:
            raise InputError(f"{where}: its Hessian is not positive definite, even with a damping of {tried:g}; pass 2/n X X^T")
        warnings.warn(f"{where}: its Hessian is singular with a damping of {tried:g}; trying {damp:g}", stacklevel=3)
    if M.is_cuda:
        M = M.flip(0, 1)                                                        # L^T becomes J L^T J = R^T
    else:
        for i in range((len(M) + 1) // 2):                                      # the same in place: rows i and -1 - i change
            M[[i, -1 - i]] = M[[-1 - i, i]].flip(1)                             # places, each read backwards
    U = M.T                                                                     # R, inverted in place below
    # Panel by panel: [A B; 0 C]^-1 = [A^-1  -A^-1 B D; 0  D] with D = C^-1, where A^-1 is there already.
    for start in range(0, len(U), PANEL):
        at = slice(start, start + PANEL)
        D = torch.linalg.solve_triangular(U[at, at], torch.eye(len(U[at]), dtype=U.dtype, device=U.device), upper=True)
        U[:start, at] = U[:start, :start] @ (U[:start, at] @ -D)
        U[at, at] = D
    return U


@torch.no_grad()
@full_precision()
def quantize_matrix(weight: Tensor, hessian: Tensor, bits: int = 4, group_size: int = 128, sym: bool = True,
                    act_order: bool = True, damp: float = 0.01, clip_search: bool = False,
                    block: int = 128, where: str = "layer") -> tuple[Tensor, Tensor, Tensor]:
    """GPTQ's Algorithm 1.  [O, I], [I, I] -> codes uint8 [O, I], scales, zeros [O, I/g], as round_to_nearest returns them

    group_size  inputs that share a scale; -1 for the whole row
    act_order   quantise inputs of large diag(H) first, while most columns are left to compensate their errors. All grids
                are then found at the start, on the original weights (static groups), so that a group stays consecutive
                inputs; without it each grid is found when its group is reached, on weights already adjusted for the errors
                of all columns before it
    damp        share of the mean of diag(H) that is added to diag(H); more if H is then still singular (with a warning)
    block       columns quantised between two updates of all later columns; it changes the time, not the result
    where       the layer's name, for messages
    An input that was 0 in every token gets weight 0. Everything is float32: at the default damp float64 changes the objective by
    at most 0.1%.
    Raises InputError for values that are not finite, a group size that does not divide I, and an H that no damping makes
    positive definite; ValueError for bits outside 2 to 8, a damp below 0 and an H of another size.
    """
    if not 0 <= damp < torch.inf:
        raise ValueError(f"{where}: damp = {damp}; give a finite number of 0 or more")
    (O, I), size = weight.shape, check_weight(weight, group_size, where)
    if hessian.shape != (I, I):
        raise ValueError(f"{where}: a Hessian {list(hessian.shape)} for {I} inputs; give one [{I}, {I}]")
    if not hessian.sum(dtype=torch.float32).isfinite():     # isfinite() of all would take two more Hessians' memory
        raise InputError(f"{where}: its Hessian has values that are not finite, as its inputs overflow; calibrate in another "
                         "dtype, or fetch or train the model again")
    W = weight.float().masked_fill(hessian.diagonal() == 0, 0.0)                # [O, I], a copy
    # Columns are quantised span by span, a span block by block. With act_order all grids are known now: one span. Without it each
    # group is a span, as its grid is found when it is reached.
    if act_order:
        order, span = hessian.diagonal().argsort(descending=True, stable=True), I
        scales, zeros = (part.view(O, -1) for part in find_grid(W.view(-1, size), bits, sym, clip_search))  # [O, I/g]
    else:
        order, span = torch.arange(I, device=W.device), size
        scales, zeros = W.new_empty(O, I // size), W.new_empty(O, I // size)
    U = inverse_factor(hessian, order, damp, where)
    columns = W.T.index_select(0, order)                                        # [I, O]: a column of W is contiguous
    codes = torch.empty_like(columns, dtype=torch.uint8)
    for first in range(0, I, span):
        if not act_order:
            at = first // size
            scales[:, at], zeros[:, at] = find_grid(columns[first:first + size].T, bits, sym, clip_search)
        for start in range(first, first + span, block):
            end = min(start + block, first + span)
            scale, zero = (part[:, order[start:end] // size].T for part in (scales, zeros))     # [n, O] each: of their groups
            solve = (replayed_columns(end - start, O, bits, W.device) if can_record(W.device) else
                     functools.partial(quantize_columns, bits=bits))
            codes[start:end], errors = solve(columns[start:end], U[start:end, start:end], scale, zero)
            columns[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)        # [I - end, n] [n, O], the lazy update: eq. (4)
    return codes[order.argsort()].T.contiguous(), scales, zeros                 # codes: back in the inputs' own order


def quantize_columns(columns: Tensor, U: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1's inner loop over n columns of the weight.

    columns [n, O] (overwritten), U [n, n], scale, zero [n, O] -> codes uint8, errors [n, O]
    """
    codes, errors = torch.empty_like(columns, dtype=torch.uint8), torch.empty_like(columns)
    for j, w in enumerate(columns):                                             # [O]
        codes[j] = quantize(w, scale[j], zero[j], bits)
        errors[j] = (w - dequantize(codes[j], scale[j], zero[j])) / U[j, j]     # [O] (w_j - q_j) / U_jj
        columns[j + 1:].addr_(U[j, j + 1:], errors[j], alpha=-1)                # w_k -= error U_jk: GPTQ eq. (2), in the block
    return codes, errors


@functools.cache
def replayed_columns(n: int, O: int, bits: int, device: torch.device):
    """quantize_columns as a CUDA graph: a column takes some 14 small kernels, and launching them is most of the time."""
    columns, scale, zero = (torch.full((n, O), value, dtype=torch.float32, device=device) for value in (0.0, 1.0, 0.0))
    places = [columns, torch.eye(n, dtype=torch.float32, device=device), scale, zero]       # what the graph reads
    results = []                                                                            # the two tensors that it writes

    def step():
        results[:] = quantize_columns(*places, bits)

    replay = Replay(step, on=True)

    def solve(*given: Tensor) -> tuple[Tensor, Tensor]:
        for place, value in zip(places, given, strict=True):
            place.copy_(value)
        replay()
        return tuple(result.clone() for result in results)

    return solve


@full_precision()
def output_errors(weight: Tensor, quantized: list[Tensor], hessian: Tensor) -> list[float]:
    """GPTQ eq. (1) relative to the output: tr((W - Q) H (W - Q)^T) / tr(W H W^T) of each Q [O, I]"""
    def trace(A: Tensor) -> float:
        total = 0.0
        for at in range(0, len(hessian), PANEL):                                # H is symmetric: from the diagonal on,
            product = (A[:, at:at + PANEL] @ hessian[at:at + PANEL, at:]).mul_(A[:, at:])           # [O, I - at]
            total += 2 * float(product.sum()) - float(product[:, :PANEL].sum())     # all but the diagonal block counts twice
        return total

    W = weight.float()
    whole = max(trace(W), torch.finfo(torch.float32).tiny)
    return [trace(W - Q) / whole for Q in quantized]                            # eq. (1), relative


# ---- a model, layer by layer

@torch.no_grad()
def calibrate(model: Qwen2, rows: list[Encoded], pad_id: int, batch_size: int, device, dtype) -> Iterator[tuple[str, Tensor]]:
    """Yields each layer's name and Hessian, in the order to quantise them. All tokens of the rows count, prompt and response.

        h = input_layernorm(x):           q, k, v  <- h;  o    <- heads(h);  x += o(heads(h))
        h = post_attention_layernorm(x):  gate, up <- h;  down <- gated(h);  x += down(gated(h))
    The caller must put the layer's quantised weight in place before asking for the next one: later inputs are computed
    through it. `device` holds one Hessian and, in `dtype`, the batches' hidden states and one block; the model may be elsewhere
    and in another dtype.
    """
    head, config = model.head, model.config                     # the head has the model's device and dtype
    names = {layer: name for name, layer in linear_layers(model).items()}
    rows = [Encoded([], row.prompt + row.response, row.cut, row.index) for row in rows]     # a mask over every token
    batches = [collate([rows[i] for i in at], pad_id) for at in by_length(rows, batch_size)]        # [B, T] ids and mask
    states = [model.model.embed_tokens(ids.to(head.device)).to(device, dtype) for ids, _ in batches]      # [B, T, D] each
    rope = {T: rope_tables(torch.arange(T, device=device)[None], config.rope_theta, config.head_dim, states[0].dtype)
            for T in {x.shape[1] for x in states}}
    for block in model.model.layers:
        kept = [(vector, vector.data) for vector in block.parameters() if vector.dim() == 1]    # norms, biases: they stay
        model.partly_quantized |= dtype != head.dtype           # the next line rounds weights: no second call may follow
        block.to(device, dtype)

        def heads(h):                                                           # [B, T, D] -> [B, T, H E]
            return block.self_attn.concat_heads(h, *rope[h.shape[1]], None)

        for branch, norm, inner in ((block.self_attn, block.input_layernorm, heads),
                                    (block.mlp, block.post_attention_layernorm, block.mlp.gated)):
            first, last = branch.first_and_last()
            for layers, inputs_of in (first, norm), ([last], lambda x: inner(norm(x))):
                hessian = Hessian(layers[0].in_features, device)
                for x, (_, mask) in zip(states, batches, strict=True):
                    hessian.add(inputs_of(x), mask.to(device))
                H = hessian.finish(names[layers[0]])                            # of all that share these inputs
                for layer in layers:
                    yield names[layer], H
            for x in states:
                x += last(inputs_of(x))                                         # by its weight quantised by now
        block.to(head.device, head.dtype)
        for vector, exact in kept:
            vector.data = exact


def quantize_layer(weight: Tensor, hessian: Tensor | None, name: str, grid: dict, act_order: bool, damp: float):
    """A layer's weight -> (codes, scales, zeros), (error, RTN's error)

    grid  keywords of round_to_nearest.  Without a Hessian the layer is only rounded, and the errors are None.
    """
    rounded = round_to_nearest(weight, **grid)
    if hessian is None:
        return rounded, (None, None)
    found = quantize_matrix(weight, hessian, act_order=act_order, damp=damp, where=name, **grid)
    error, rtn = output_errors(weight, [dequantize_groups(*found), dequantize_groups(*rounded)], hessian)
    if not (error < rtn or error == 0):
        warnings.warn(f"{name}: GPTQ's output error {error:.3g} is not below round-to-nearest's {rtn:.3g}; calibrate with text "
                      "like what the model will read")
    return found, (error, rtn)


@torch.no_grad()
def quantize_model(model: Qwen2, rows: list[Encoded], pad_id: int, *, bits: int = 4, group_size: int = 128, sym: bool = True,
                   act_order: bool = True, damp: float = 0.01, clip_search: bool = False, method: str = "gptq",
                   batch_size: int = 4, device=None, dtype: torch.dtype | None = None, on_layer=None, store=None) -> dict:
    """Quantises every linear layer of the blocks; embeddings, norms, biases and head stay.

    rows      calibration data: all their tokens count, prompt and response
    method    "gptq", or "rtn": round_to_nearest, which needs no rows
    device    where one block at a time is quantised; the model's own by default
    dtype     in which blocks compute there, and with "gptq" also that of their weights; the model's own by default
    on_layer  called after each layer with (name, its relative output error, that of RTN); for "rtn" both errors are None. A
              warning names layers whose error is not below RTN's
    store     (codes, scales, zeros) -> dict of tensors to return for a layer instead, such as quant.to_words, for to_w4.
              The float weights of finished blocks are then freed, so that memory falls during the work
    returns   {"model.layers.0.self_attn.q_proj": (codes uint8 [O, I], scales [O, I/g], zeros [O, I/g]), ...}

    Afterwards the model has the decoded weights; with `store`, only the last block still has them.
    Raises InputError for a 4-bit model, and, naming the layer, as quantize_matrix and Hessian.finish do; if that happens after
    the first layer, the model is partly quantised: another call refuses it, too.
    """
    if method not in ("gptq", "rtn"):
        raise InputError(f"method {method!r} is not known; choose gptq or rtn")
    if model.quantization:
        raise InputError("the model holds 4-bit weights already; give the one that it was made from")
    if model.partly_quantized:
        raise InputError("the model is partly quantised, or its weights were freed, by an earlier call; load it again")
    layers = linear_layers(model)
    for name, layer in layers.items():                                          # all, before the first is changed
        check_weight(layer.weight, group_size, name)
    home, results, hessians = model.head.device, {}, dict.fromkeys(layers).items()          # None each: only rounded
    if method == "gptq":
        hessians = calibrate(model, rows, pad_id, batch_size, torch.device(device or home), dtype or model.head.dtype)
    grid = dict(bits=bits, group_size=group_size, sym=sym, clip_search=clip_search)
    for name, hessian in hessians:
        if store and name.endswith("q_proj"):                                   # a block begins: free the weights before it
            for done in results:
                layers[done].weight.data = layers[done].weight.new_empty(0)
        found, report = quantize_layer(layers[name].weight, hessian, name, grid, act_order, damp)
        model.partly_quantized = True
        layers[name].weight.copy_(dequantize_groups(*found))
        if store:                                                               # packed before it is moved: fewer bytes
            results[name] = {key: part.to(home) for key, part in store(*found).items()}
        else:
            results[name] = tuple(part.to(home) for part in found)
        del found, hessian
        give_memory_back()
        if on_layer:
            on_layer(name, *report)
    replayed_columns.cache_clear()                                              # the graphs hold memory
    model.partly_quantized = store is not None                  # its weights are freed; to_w4 may follow
    return results
