"""loss.cu from Python: one kernel computes the costs of a chunk of tokens, another the gradient of its logits, in place."""
import ctypes

import torch
from torch import Tensor

from minikd.cuda import available, launch

THREADS, ROW = 512, 6                   # loss.cu's THREADS; the floats of its Row
ALIGN = 8                               # rows of logits begin at multiples of 8 of them: loads are 16 bytes


def can_run(*logits: Tensor | None) -> bool:
    """Whether the kernels can read these logits: bfloat16 on a GPU, in aligned rows with the same stride."""
    good = all(x is not None and x.is_cuda and x.dtype == torch.bfloat16 and x.stride() == (logits[0].stride(0), 1)
               and x.stride(0) % ALIGN == x.data_ptr() % 16 == 0 for x in logits)
    return good and available(logits[0].device.index)


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
