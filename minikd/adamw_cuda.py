"""adamw.cu from Python: an optimizer step of all weights, clipping included, by two kernels."""
import ctypes
import struct

import torch
from torch import Tensor

from minikd.cuda import available, launch
from minikd.data import send

CHUNK, LANES = 16384, 4                 # adamw.cu's


class AdamW(torch.optim.AdamW):
    """torch's AdamW (arXiv:1711.05101, Algorithm 2), which on a GPU can take its step by adamw.cu, too."""
    held = None                         # steps, moments and adamw.cu's list of chunks (hold)
    sent = None, None                   # its table of pieces: as a list, and on the GPU

    def add_param_group(self, group):
        super().add_param_group(group)
        self.held = None                                        # one weight more

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.held = None                                        # the moments are other tensors now

    @torch.no_grad()
    def clip_and_step(self, max_grad_norm: float, gradients: dict = {}, copies: dict = {}) -> Tensor | None:
        """torch.nn.utils.clip_grad_norm_ and step().  Returns the norm [] before clipping; None, with no weight changed, if
        adamw.cu cannot run (can_run), or if the weights have taken different numbers of steps.

        gradients  by weight: in place of its .grad, in float32 or bfloat16
        copies     by weight: in bfloat16, rewritten with it
        """
        weights = [weight for group in self.param_groups for weight in group["params"]]
        found = [gradients.get(weight, weight.grad) for weight in weights]
        if not can_run(self.param_groups, weights, found):
            return None
        steps, moments, chunks = self.held or self.hold(weights)
        if chunks is None:
            return None
        device, group = weights[0].device, self.param_groups[0]
        pieces = self.pieces(weights, moments, found, copies)
        if pieces != self.sent[0]:                              # a tensor lies elsewhere: seldom, with graphs
            self.sent = pieces, send(torch.tensor(pieces), device)
        squares = torch.empty(len(chunks), dtype=torch.float32, device=device)
        launch("adamw_norm", device, (len(chunks), 1), 256, self.sent[1], chunks, squares)
        norm = squares.sum().sqrt()
        torch._foreach_add_(steps, 1)                           # t
        (beta1, beta2), lr = group["betas"], group["lr"]
        bias1, bias2 = (1 - torch.pow(beta, steps[0].double()) for beta in (beta1, beta2))  # 1 - beta^t
        factors = torch.stack([(max_grad_norm / (norm + 1e-6)).clamp(max=1), lr / bias1, bias2.rsqrt()]).float()
        launch("adamw_step", device, (len(chunks), 1), 256, self.sent[1], chunks, factors,
               *map(ctypes.c_float, (lr, 1 - beta1, beta2, 1 - beta2, group["eps"])))
        return norm

    def hold(self, weights: list[Tensor]) -> tuple:
        """Makes the moments at the first step. -> steps, pairs of moments, and chunks [c, 2]: each one's weight, and its place in
        it; None in their place if the steps differ"""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight].update(step=torch.zeros((), dtype=torch.float32, device=weight.device),      # as torch does
                                          exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        states = [self.state[weight] for weight in weights]
        steps = [state["step"] for state in states]
        moments = [(state["exp_avg"], state["exp_avg_sq"]) for state in states]
        chunks = [(i, at) for i, weight in enumerate(weights) for at in range(-(-weight.numel() // CHUNK))]
        same = len(torch.stack(steps).unique()) == 1
        self.held = steps, moments, send(torch.tensor(chunks, dtype=torch.int32), weights[0].device) if same else None
        return self.held

    def pieces(self, weights, moments, gradients, copies) -> list[tuple]:
        """adamw.cu's Piece of each weight, as words of 8 bytes: the last holds both `low` (a bfloat16 gradient) and `decay`."""
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        return [(weight.data_ptr(), first.data_ptr(), second.data_ptr(), gradient.data_ptr(),
                 copies[weight].data_ptr() if weight in copies else 0, weight.numel(),
                 *struct.unpack("q", struct.pack("if", gradient.dtype == torch.bfloat16, decay)))
                for weight, (first, second), gradient, decay in zip(weights, moments, gradients, decays, strict=True)]


def can_run(groups: list[dict], weights: list[Tensor], gradients: list[Tensor | None]) -> bool:
    """Whether adamw.cu can: contiguous, aligned float32 weights on one GPU, all with a gradient, in multiples of LANES; groups
    that differ in weight decay alone, without amsgrad and maximize."""
    good = {torch.float32, torch.bfloat16}
    return (weights[0].is_cuda and all(g is not None and g.dtype in good and g.is_contiguous() for g in gradients)
            and all(w.dtype == torch.float32 and w.device == weights[0].device and w.is_contiguous() and w.numel() % LANES == 0
                    and w.data_ptr() % 16 == g.data_ptr() % (LANES * g.element_size()) == 0 for w, g in zip(weights, gradients))
            and len({(group["lr"], *group["betas"], group["eps"]) for group in groups}) == 1
            and not any(group["amsgrad"] or group["maximize"] for group in groups) and available(weights[0].device.index))
