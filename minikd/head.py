"""The LM head, applied chunk by chunk to the states that score a token: full logits [N, 151,936] are never held.

`scored_positions` picks those states, `head_loss` computes a loss of them with its gradients, and `compare_heads` metrics.

References
    Knowledge Distillation for Large Language Models, eq. (3) the mixed loss
    the head's gradient found chunk by chunk in the forward pass: Liger Kernel (arXiv:2410.10989), fused linear cross-entropy
    no full logits at all, the chunks inside one kernel: Cut Cross-Entropy (arXiv:2411.09009)
"""
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minikd import loss_cuda, products
from minikd.data import send
from minikd.losses import kl, log_probs, no_divergence

PIECE_BYTES = {"cpu": 256 << 10, "cuda": 64 << 20}  # bytes of float32 logits in one softmax, at least: less is mostly overhead
# Bytes of student logits in memory at once, least and most; in between a tenth of all logits in float32 (full logits take about
# six such tensors). On an H200, 128 and 160 MB were slower, and with a cached teacher also 480 (benchmarks/results/gpu.txt). On a
# CPU each chunk reads both heads, casts the student's under autocast and adds to its gradient: few are fast (head_loss.txt).
CHUNK_BYTES = {"cpu": (84 << 20, 240 << 20), "cuda": (240 << 20, 240 << 20)}
# A chunk is a multiple of this many tokens, as matrices are multiplied in tiles: 16 suits MKL with AVX-512 (chunks of 48 take 0.8
# of the time per token of chunks of 55, benchmarks/results/head_loss.txt; in bfloat16 there is no such step), 128 suits cuBLAS.
TILES = {("cpu", torch.float32): 16, ("cuda", torch.float32): 128, ("cuda", torch.bfloat16): 128}


def scored_positions(hidden: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The shift by one: the state at t-1 scores the token at t.

    hidden [B, T, D], ids [B, T], mask [B, T] True on response tokens -> states [N, D], targets [N]. Column 0 has no state before
    it, and is left out.  Raises ValueError if the three do not agree on B and T.

    With the mask on the CPU, where `collate` leaves it, the host never waits for a GPU: it launches a step's kernels while
    earlier ones still run. On an H200, waiting here for the teacher took a third of a distillation step.
    """
    if not hidden.shape[:2] == ids.shape == mask.shape:
        raise ValueError(f"scored_positions: states {list(hidden.shape)}, ids {list(ids.shape)}, mask {list(mask.shape)}; give "
                         "all of the same rows and tokens: the shift by one is made here")
    row, before = mask[:, 1:].nonzero(as_tuple=True)                            # [N] each; column t-1 of the slice is token t
    at = send(row * mask.shape[1] + before, hidden.device)                      # [N] among the B T positions
    return hidden.flatten(0, 1).index_select(0, at), ids.flatten().index_select(0, at + 1)


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Tensor | None = None,
              teacher_head: Tensor | None = None, divergence=None, kd_ratio: float = 0.0, weight: Tensor | float = 1.0,
              policy_loss=None, vocab: int | None = None, chunk_bytes: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Paper eq. (3) summed over tokens:  Σ_n weight_n ((1 - kd_ratio) CE_n + kd_ratio KD_n), KD_n = divergence(q_n, p_n).

    In plain lines, which would hold about six float32 tensors of 151,936 x N (2.5 GB each for 8 x 512 tokens):
        logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T           # [N, V] each
        CE, KD = F.cross_entropy(logits, targets, reduction="none"), divergence(logits, teacher_logits)     # [N] each
        return (weight * ((1 - kd_ratio) * CE + kd_ratio * KD)).sum(), CE, KD
    Instead, for each chunk of tokens this computes the logits, the loss and its gradient G [n, V] with respect to the logits (for
    CE: softmax - one-hot). While it holds G, it finds its inputs' gradients: dL/dhidden = G head, dL/dhead += G^T hidden.
    That is why `weight` must be known here; recomputing the logits in the backward pass would cost a second head product.

    hidden          [N, D]   the student's states that score a token (scored_positions)
    head            [V, D]   the student's LM head
    targets         [N]      the tokens they score: ids below the rows used (on a GPU not checked: another gives NaN)
    teacher_hidden  [N, D']  the teacher's states for the same tokens; constants, as is teacher_head
    teacher_head    [V', D'] the teacher's LM head. If given, CE and KD use only the rows that both heads have
    divergence      any function (student logits [n, V], teacher logits [n, V], or None without a teacher) -> [n], as in
                    losses.py. With kd_ratio 0 its values are only returned, for GRPO's log of entropy and compare_heads' metrics
    weight          of each token, often 1 / scored tokens of the optimizer step: a number, or one per token [N]
    policy_loss     (log q of the targets [n], at=slice of the N tokens) -> [n], a loss that takes the place of CE, in full:
                    Σ_n weight_n (policy_n + kd_ratio KD_n). The objective of a policy gradient (clipped_surrogate)
    vocab           use only the head's first `vocab` rows, as sampling did
    chunk_bytes     of student logits in memory at once, in place of CHUNK_BYTES
    returns         the loss (differentiable once), and for logs CE [N] and KD [N] of each token

    Under autocast the student's head multiplies in autocast's dtype; the teacher's always in its own. Losses are
    float32, of float64 inputs too; gradients have their input's dtype.

    Raises ValueError for a kd_ratio without divergence or teacher, for more or fewer targets or teacher's states than the
    student's states, for targets that are no ids, for a divergence or policy_loss that gives anything but a value per token, and
    for gradients in float16.
    """
    V = len(head) if teacher_head is None else min(len(head), len(teacher_head))            # rows of both heads, for CE too
    V = min(V, vocab or V)
    _check_inputs(hidden, targets, V, teacher_hidden, teacher_head, divergence, kd_ratio)
    divergence = divergence or no_divergence
    N, kind = len(hidden), hidden.device.type                                   # kind: "cpu", "cuda"
    if not isinstance(weight, Tensor):
        weight = torch.full((), weight, dtype=torch.float32, device=hidden.device)      # as_tensor would wait for a GPU
    weight = weight.to(hidden.device, torch.float32).expand(N)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    need_hidden, need_head = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, head))
    need_grad = need_hidden or need_head
    if need_hidden and torch.float16 in (dtype, hidden.dtype) or need_head and torch.float16 in (dtype, head.dtype):
        raise ValueError("head_loss: gradients underflow in float16; train in bfloat16 or float32")

    least, most = CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"])
    budget = chunk_bytes or min(max(least, 4 * N * V // 10), most)
    chunk = tokens_at_once(N, most=budget // (V * dtype.itemsize), tile=TILES.get((kind, dtype), 1))
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        grad_hidden = torch.empty_like(hidden) if need_hidden else None         # [N, D]
        grad_head = torch.zeros_like(head) if need_head else None               # [len(head), D]
        ce, kd, total = (hidden.new_zeros(N, dtype=torch.float32) for _ in range(3))
        states, student_head = hidden.to(dtype), head[:V]                       # [N, D], [V, D]
        if hidden.is_cuda:
            student_head = student_head.to(dtype)                               # cast once; on a CPU block by block
        logits = aligned(states, chunk, V)                                      # [chunk, V]; their gradient overwrites them
        teacher_logits = None if teacher_hidden is None else aligned(teacher_head, chunk, V)            # [chunk, V]
        kernel = loss_cuda.pick_kernel(divergence, kd_ratio, logits, teacher_logits)        # None on a CPU
        losses = partial(loss_cuda.losses, kernel, weigh) if kernel else partial(_torch_losses, divergence)
        # A chunk's logits are in memory at once. The float32 softmax takes one piece of them at a time, on a CPU a row for each
        # thread, so that a piece's tensors stay in the cache, or PIECE_BYTES if that is more.
        piece = chunk if kernel else max(torch.get_num_threads(), PIECE_BYTES.get(kind, PIECE_BYTES["cpu"]) // (4 * V))
        for at in slices(0, N, chunk):
            products.multiply(states[at], student_head, out=logits)             # [n, D] -> [n, V]
            if teacher_logits is not None:
                products.multiply(teacher_hidden[at].to(teacher_logits.dtype), teacher_head[:V], out=teacher_logits)
            for tokens in slices(at.start, at.stop, piece):
                rows = slice(tokens.start - at.start, tokens.stop - at.start)   # the same tokens, counted within the chunk
                teacher_rows = None if teacher_logits is None else teacher_logits[rows]
                policy = policy_loss and partial(policy_loss, at=tokens)
                ce[tokens], kd[tokens], total[tokens] = losses(                 # with need_grad, leaves dL/dlogits in logits
                    logits[rows], targets[tokens], teacher_rows, kd_ratio, weight[tokens], policy, need_grad)
            if need_grad:
                _backward_head(logits[:at.stop - at.start], states[at], student_head,
                               grad_hidden[at] if need_hidden else None, grad_head[:V] if need_head else None)
    return _Sum.apply(hidden, head, total, grad_hidden, grad_head), ce, kd


def _check_inputs(hidden, targets, V, teacher_hidden, teacher_head, divergence, kd_ratio):
    """head_loss's errors about what it was given, V being the rows that it uses."""
    if kd_ratio and (divergence is None or teacher_hidden is None or teacher_head is None):
        raise ValueError(f"kd_ratio = {kd_ratio} needs a divergence, teacher_hidden and teacher_head")
    for x, what in (targets, "targets"), (teacher_hidden, "states of the teacher"):
        if x is not None and len(x) != len(hidden):
            raise ValueError(f"head_loss: {len(hidden)} states for {len(x)} {what}; give as many of each")
    if targets.device.type == "cpu" and not (targets.ge(0) & targets.lt(V)).all():          # a GPU would have to be waited for
        raise ValueError(f"head_loss: targets must be ids from 0 to {V - 1}, these are from {targets.min()} to {targets.max()}; "
                         "give only the tokens to score (elsewhere -100 marks the others)")


class _Sum(torch.autograd.Function):
    """The sum of head_loss's totals. hidden and head are inputs only so that backward can give them their known gradients."""

    @staticmethod
    def forward(ctx, hidden, head, total, *grads):
        ctx.grads = grads
        return total.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.grads is None:
            raise RuntimeError("head_loss can be differentiated once; call it again for a second backward")
        grads, ctx.grads = ctx.grads, None                                      # scaled in place, so good for one use
        return *(g if g is None else g.mul_(grad_loss) for g in grads), None, None, None


def slices(start: int, stop: int, size: int) -> list[slice]:
    """start .. stop in slices of `size`; the last may be smaller."""
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def tokens_at_once(N: int, most: int, tile: int) -> int:
    """Tokens in a chunk: at most `most`, in whole tiles if one fits; chunks are as equal in size as that allows."""
    if most >= tile and N:
        chunks = -(-N // (most // tile * tile))                 # as few as possible
        most = -(-N // (chunks * tile)) * tile                  # 3,072 tokens by at most 1,766: 2 x 1,536, not 1,664 + 1,408
    return max(1, min(N, most))


def aligned(like: Tensor, n: int, V: int) -> Tensor:
    """An uninitialised [n, V], whose rows begin at multiples of 8 elements, for loads of 16 bytes."""
    return like.new_empty(n, -(-V // loss_cuda.ALIGN) * loss_cuda.ALIGN)[:, :V]


def weigh(ce: Tensor, kd: Tensor, kd_ratio: float, weight: Tensor, policy_loss) -> Tensor:
    """Each token's part of the loss [n], of its CE and divergence [n]."""
    if policy_loss:
        cost = policy_loss(-ce)                                                 # in full: GRPO; MiniLLM eq. (7). -CE is log q
    else:
        cost = (1 - kd_ratio) * ce                                              # paper eq. (3)
    if not kd.shape == cost.shape == ce.shape:                                  # it would be broadcast over the piece's tokens
        raise ValueError(f"head_loss: for {len(ce)} tokens the divergence gave {list(kd.shape)}, and the cost is "
                         f"{list(cost.shape)}; give one value for each token, no sum or mean")
    if kd_ratio:
        cost = cost + kd_ratio * kd
    return weight * cost


def _costs(logits, targets, teacher_logits, divergence, kd_ratio, weight, policy_loss) -> tuple[Tensor, Tensor, Tensor]:
    """CE [n], divergence [n] and their weighted sum [n], of logits [n, V]; what is only logged gets no gradient."""
    logits = logits.float()
    constant = logits.detach()
    ce = F.cross_entropy(logits if kd_ratio != 1 or policy_loss else constant, targets, reduction="none")
    kd = divergence(logits if kd_ratio else constant, teacher_logits)
    return ce, kd, weigh(ce, kd, kd_ratio, weight, policy_loss)


_compiled_costs = None


def compile_losses():
    """Lets torch.compile fuse the passes that a divergence makes over the logits, in distillation steps from here on."""
    global _compiled_costs
    _compiled_costs = torch.compile(_costs, dynamic=True)


def _torch_losses(divergence, logits, targets, teacher_logits, kd_ratio, weight, policy_loss, need_grad):
    """_costs; with need_grad, the gradient of the weighted sum overwrites the logits [n, V]."""
    fused = _compiled_costs is not None and need_grad and kd_ratio and policy_loss is None      # else recompiled for each piece
    costs = _compiled_costs if fused else _costs
    with torch.set_grad_enabled(need_grad):
        leaf = logits.detach().requires_grad_(need_grad)
        ce, kd, total = costs(leaf, targets, teacher_logits, divergence, kd_ratio, weight, policy_loss)
        if need_grad:
            logits.copy_(torch.autograd.grad(total.sum(), leaf)[0])
    return ce, kd, total


def target_log_probs(hidden: Tensor, head: Tensor, targets: Tensor, vocab: int | None = None) -> Tensor:
    """log q of each target [N], not differentiated: minus its CE.  The inputs as in head_loss."""
    with torch.no_grad():
        return -head_loss(hidden, head, targets, vocab=vocab)[1]


@torch.inference_mode()
def compare_heads(hidden: Tensor, head: Tensor, targets: Tensor, teacher_hidden: Tensor, teacher_head: Tensor,
                  divergence=None) -> dict[str, Tensor]:
    """Metrics of each token [N], the inputs as in head_loss: ce, forward_kl, reverse_kl in nats; agreement, 1 where both
    models' likeliest token is the same; and kd, the given divergence, if there is one."""
    values = [hidden.new_zeros(3, 0, dtype=torch.float32)]      # of no token; `metrics` appends each piece's [3, n]

    def metrics(logits, teacher_logits):                # takes a divergence's place to see all logits, piece by piece
        logq, logp = log_probs(logits, teacher_logits, temperature=1.0)
        values.append(torch.stack([kl(logp, logq), kl(logq, logp), (logq.argmax(-1) == logp.argmax(-1)).float()]))
        return (divergence or no_divergence)(logits, teacher_logits)

    _, ce, kd = head_loss(hidden, head, targets, teacher_hidden, teacher_head, metrics)
    found = dict(zip(("forward_kl", "reverse_kl", "agreement"), torch.cat(values, dim=1), strict=True))
    return {"ce": ce, **found} | ({"kd": kd} if divergence else {})


def _backward_head(grads: Tensor, states: Tensor, head: Tensor, grad_hidden: Tensor | None, grad_head: Tensor | None):
    """From grads [n, V] of the logits: writes grad_hidden [n, D], and adds to grad_head [V, D] in place."""
    if grads.is_cuda:       # one product each, all rows of V or D elements; those below have n, which a GPU would read unaligned
        if grad_hidden is not None:
            grad_hidden.copy_(grads @ head)                                     # [n, V] [V, D]
        if grad_head is not None:
            _add_product(grad_head, grads.T, states)                            # += [V, n] [n, D]
        return
    columns = states.new_zeros(states.T.shape, dtype=torch.float32)             # [D, n], grad_hidden transposed
    for i in range(0, len(head), products.BLOCK):
        grad = grads[:, i:i + products.BLOCK].T                                 # [b, n]
        if grad_hidden is not None:
            _add_product(columns, head[i:i + products.BLOCK].to(grad.dtype).T, grad)        # += [D, b] [b, n]
        if grad_head is not None:
            _add_product(grad_head[i:i + products.BLOCK], grad, states)         # += [b, n] [n, D]
    if grad_hidden is not None:
        grad_hidden.copy_(columns.T)


def _add_product(total: Tensor, a: Tensor, b: Tensor):
    """total += a @ b, without a second matrix of total's size if the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    if total.is_cuda:
        with suppress(RuntimeError):                    # added within the product, in float32: newer versions of torch on CUDA
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
            return
    total += a @ b
