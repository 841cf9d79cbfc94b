"""Claim: minikd's GPTQ gives the codes of the paper's own code: 99.9% of all codes are equal, and each objective to 0.1%.

    git clone https://github.com/IST-DASLab/gptq /tmp/istgptq
    python -m benchmarks.gptq_codes /tmp/istgptq        # needs transformers; 20 seconds on one core

Random layers with correlated inputs, weights in float32; each side computes its own Hessian. Two settings: asymmetric, one
grid per row, no act-order; and symmetric, groups of 128, act-order with static groups. Damping 0.01.
minikd rounds scales to float16, as they are stored; the reference keeps them in float32. So its Quantizer.find_params is
wrapped to return the grid of minikd.quant.find_grid (the zero follows from the scale). Columns:
    equal       the share of equal codes
    rows apart  rows in which a code differs: once the two round a near-tie (within 1.2e-5 of a step) differently, the rest of the
                row differs too, and both are as good
    objective   tr((W - Q) H (W - Q)^T) in float64, minikd's divided by the reference's; for all layers, the mean
    own scales  the share of equal codes if the reference keeps its float32 scales
The reference's codes are recovered from its weights; its torch.cuda.synchronize is replaced by a no-op.
"""
import contextlib
import io
import sys

import torch

from benchmarks.measure import machine, make_parser, table
from minikd.gptq import Hessian, quantize_matrix
from minikd.quant import dequantize_groups, find_grid

SHAPES = [(128, 896), (896, 128), (896, 896), (256, 1024), (384, 512), (1024, 256)]             # outputs x inputs
SETTINGS = [("asym, row", dict(sym=False, group_size=-1, act_order=False)),
            ("sym, g128, act-order", dict(sym=True, group_size=128, act_order=True))]
SEEDS = 3


def random_layer(outputs: int, inputs: int, seed: int):
    """Weights [O, I] and inputs [8, 512, I]: a few directions have most of the inputs' variance, some channels are large."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.arange(1, inputs + 1)[:, None] ** -0.5
    size = torch.randn(inputs, generator=generator).mul(0.5).exp()
    x = torch.randn(8, 512, inputs, generator=generator) @ mix * size / 3
    return 0.05 * torch.randn(outputs, inputs, generator=generator), x


def reference(weight, x, sym: bool, group_size: int, act_order: bool, own_scales: bool):
    """-> codes [O, I], scales, zeros [O, I/g] and H [I, I] by the paper's code."""
    import gptq
    import quant
    grids = []

    class Quantizer(quant.Quantizer):
        def find_params(self, x, weight=False):
            super().find_params(x, weight)
            if not own_scales:
                self.scale, self.zero = (part[:, None] for part in find_grid(x, 4, sym))
            grids.append((self.scale, self.zero))

    layer = torch.nn.Linear(*weight.T.shape, bias=False)
    layer.weight.data = weight.clone()
    solver = gptq.GPTQ(layer)
    for row in x:
        solver.add_batch(row, None)
    H = solver.H.clone()
    solver.quantizer = Quantizer()
    solver.quantizer.configure(4, perchannel=True, sym=sym)
    solver.fasterquant(groupsize=group_size, actorder=act_order, static_groups=act_order)
    grids = grids[1:] if act_order else grids                                   # the first is for the whole row, and not used
    scales, zeros = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    spread = weight.shape[1] // scales.shape[1]
    codes = (layer.weight.data / scales.repeat_interleave(spread, 1)).round() + zeros.repeat_interleave(spread, 1)
    assert ((codes >= 0) & (codes < 16)).all() and torch.equal(dequantize_groups(codes, scales, zeros), layer.weight.data)
    return codes.to(torch.uint8), scales, zeros, H


def objective(weight, quantized, H) -> float:
    error = weight.double() - quantized.double()
    return float((error @ H.double() * error).sum())


@torch.no_grad()
def main():
    parser = make_parser(__doc__)
    parser.add_argument("folder", help="a checkout of the paper's code")
    sys.path.insert(0, parser.parse_args().folder)
    torch.cuda.synchronize = lambda: None
    rows, worst = [], []
    for setting, options in SETTINGS:
        shares, counts, ratios, apart = [], [], [], []
        for outputs, inputs in SHAPES:
            for seed in range(SEEDS):
                weight, x = random_layer(outputs, inputs, seed)
                hessian = Hessian(inputs)
                hessian.add(x, torch.ones(x.shape[:2], dtype=torch.bool))
                codes, scales, zeros = quantize_matrix(weight, hessian.finish(), damp=0.01, **options)
                with contextlib.redirect_stdout(io.StringIO()):
                    own = reference(weight, x, own_scales=True, **options)
                    *theirs, H = reference(weight, x, own_scales=False, **options)
                assert torch.equal(scales, theirs[1]) and torch.equal(zeros, theirs[2])
                shares.append([float((codes == other).float().mean()) for other in (theirs[0], own[0])])
                counts.append(codes.numel())
                apart.append((int((codes != theirs[0]).any(1).sum()), outputs))
                ratios.append(objective(weight, dequantize_groups(codes, scales, zeros), H)
                              / objective(weight, dequantize_groups(*theirs), H))
                rows.append([f"{setting}: {outputs} x {inputs}, seed {seed}", f"{shares[-1][0]:.3%}",
                             "{} of {}".format(*apart[-1]), f"{ratios[-1]:.6f}", f"{shares[-1][1]:.2%}"])
        total = [sum(share[i] * n for share, n in zip(shares, counts)) / sum(counts) for i in (0, 1)]
        rows.append([f"{setting}: all {len(counts)}", f"{total[0]:.3%}", "{} of {}".format(*map(sum, zip(*apart))),
                     f"{sum(ratios) / len(ratios):.6f}", f"{total[1]:.2%}"])
        worst.append(f"{max(abs(ratio - 1) for ratio in ratios):.3%}")
    table(["", "equal", "rows apart", "objective", "own scales"], rows)
    print(f"objectives differ by at most {' and '.join(worst)}; {machine('torch', 'transformers')}")


if __name__ == "__main__":
    main()
