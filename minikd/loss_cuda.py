"""loss.cu from Python: one kernel computes the costs of a chunk of tokens, another the gradient of its logits, in place."""
import ctypes
import functools

import torch
from torch import Tensor

from minikd.cuda import available, launch
from minikd.losses import entropy, forward_kl, no_divergence, reverse_kl

THREADS, ROW = 512, 6                   # loss.cu's THREADS; the floats of its Row
ALIGN = 8                               # rows of logits begin at multiples of 8 of them: loads are 16 bytes


def can_run(*logits: Tensor | None) -> bool:
    """Whether the kernels can read these logits: bfloat16 on a GPU, in aligned rows with the same stride."""
    good = all(x is not None and x.is_cuda and x.dtype == torch.bfloat16 and x.stride() == (logits[0].stride(0), 1)
               and x.stride(0) % ALIGN == x.data_ptr() % 16 == 0 for x in logits)
    return good and available(logits[0].device.index)


def pick_kernel(divergence, kd_ratio: float, logits: Tensor, teacher_logits: Tensor | None) -> tuple[str, float] | None:
    """This divergence's name in loss.cu, and its temperature; None if torch's operators compute it."""
    options = {}
    if isinstance(divergence, functools.partial) and not divergence.args:       # as pick_divergence makes it
        divergence, options = divergence.func, divergence.keywords
    name = {no_divergence: "ce", entropy: "entropy", forward_kl: "forward", reverse_kl: "reverse"}.get(divergence)
    temperature = options.get("temperature", 1.0)
    if name is None or options.keys() - {"temperature"} or not temperature > 0:
        return None
    if name == "entropy" and kd_ratio:                                          # the kernel has no gradient of the entropy
        return None
    read = [logits, teacher_logits] if name in ("forward", "reverse") else [logits]
    return (name, temperature) if can_run(*read) else None


def losses(kernel, weigh, logits, targets, teacher_logits, kd_ratio, weight, policy_loss, need_grad):
    """What head._torch_losses computes, without its dozens of float32 tensors [n, V]: one kernel for CE and KD, one for the
    logits' gradient dL/dCE dCE/dlogits + dL/dKD dKD/dlogits. Autograd finds dL/dCE and dL/dKD, one number per token each, from
    the formula in `weigh` (head.weigh)."""
    ce, kd, rows = costs(*kernel, logits, targets, teacher_logits)
    with torch.set_grad_enabled(need_grad):
        total = weigh(ce.requires_grad_(need_grad), kd.requires_grad_(need_grad), kd_ratio, weight, policy_loss)
        if need_grad:
            slopes = torch.autograd.grad(total.sum(), (ce, kd), materialize_grads=True)     # dL/dCE, dL/dKD: [n] each
            name, temperature = kernel if kd_ratio else ("ce", 1.0)                         # a divergence that is only measured
            gradient_(name, temperature, logits, targets, teacher_logits, rows, *slopes)
    return ce, kd, total


def costs(name: str, temperature: float, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> list[Tensor]:
    """CE [n]; what `name` says [n]: forward or reverse KL, entropy, or 0 (ce); what `gradient_` needs of each row [n, ROW]."""
    n = len(logits)
    ce, kd, rows = (logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n,), (n, ROW)))
    _launch(f"loss_{name}", temperature, logits, targets, teacher_logits, rows, ce, kd)
    return [ce, kd, rows]


def gradient_(name: str, temperature: float, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, rows: Tensor,
              slope_ce: Tensor, slope_kd: Tensor):
    """Overwrites logits [n, V] with slope_ce dCE/dlogits + slope_kd dD/dlogits; the slopes are [n]."""
    _launch(f"loss_grad_{name}", temperature, logits, targets, teacher_logits, rows, slope_ce.contiguous(),
            slope_kd.contiguous())


def _launch(kernel: str, temperature: float, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None, *values):
    n, V = logits.shape                                         # n > 0: without tokens head_loss has no chunk
    launch(kernel, logits.device, (n, 1), THREADS, logits, teacher_logits, targets.contiguous(), *values, V, logits.stride(0),
           ctypes.c_float(temperature))
