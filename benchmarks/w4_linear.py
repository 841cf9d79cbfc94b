"""Where each way of multiplying by 4-bit weights pays: what quant.choose is set by.

    python -m benchmarks.w4_linear              # a minute on two cores

One layer of Qwen2.5-0.5B (896 -> 4864, group 128) on a CPU in bfloat16, milliseconds by number of rows: torch's int4
operator, dequantising and multiplying, and the plain bfloat16 layer. Forty different layers take turns, so that none lies
in the cache, as in a model.
"""
import time

import torch
import torch.nn.functional as F

from benchmarks.measure import machine, table
from minikd.quant import W4Linear, round_to_nearest, to_words

ROWS, LAYERS = (1, 4, 8, 16, 32, 64, 128, 256, 512), 40


def milliseconds(function, layers: list) -> float:
    for layer in layers[:4]:
        function(layer)
    start = time.perf_counter()
    for layer in layers:
        function(layer)
    return 1000 * (time.perf_counter() - start) / len(layers)


@torch.inference_mode()
def main():
    torch.set_num_threads(2)
    words = to_words(*round_to_nearest(torch.randn(4864, 896)))
    layers = [W4Linear(896, 4864, 128, bias=False) for _ in range(LAYERS)]
    plain = [torch.randn(4864, 896).bfloat16() for _ in range(LAYERS)]
    for layer in layers:
        layer.load_state_dict(words)
        layer.prepare(torch.bfloat16)
    rows = []
    for count in ROWS:
        x = torch.randn(count, 896).bfloat16()
        times = (milliseconds(lambda layer: layer.multiply(x, "int4"), layers),
                 milliseconds(lambda layer: layer.multiply(x, "dequantise"), layers),
                 milliseconds(lambda weight: F.linear(x, weight), plain))
        rows.append([str(count), *(f"{value:.2f}" for value in times)])
    table(["rows", "int4 ms", "dequantise ms", "bfloat16 ms"], rows)
    print(machine("torch"))


if __name__ == "__main__":
    main()
