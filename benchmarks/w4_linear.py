"""Which way of multiplying by 4-bit weights is fastest for how many rows, and for how many the int8 head is faster: w4.choose
and layout.INT8_ROWS follow from this (but w4.MANY_ROWS is a guess).

    python -m benchmarks.w4_linear              # a minute on two cores

One layer of Qwen2.5-0.5B (896 -> 4864, group 128) on a CPU in bfloat16, milliseconds by number of rows: torch's int4
operator, dequantising and multiplying, and the plain bfloat16 layer. Forty different layers take turns, so that none is in
the CPU's cache, as in a model. Then the model's head (896 -> 151,936): packed in bfloat16, and in int8.
"""
import time

import torch
import torch.nn.functional as F

from benchmarks.measure import machine, table
from minikd.layout import multiply_int8, pack_int8
from minikd.quant import round_to_nearest, to_words
from minikd.w4 import W4Linear

ROWS, LAYERS, HEAD_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512), 40, (1, 2, 3, 4, 8)


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
        layer.multiply(torch.zeros(1, 896).bfloat16(), "int4")                  # prepares the layer
    rows = []
    for count in ROWS:
        x = torch.randn(count, 896).bfloat16()
        times = (milliseconds(lambda layer: layer.multiply(x, "int4"), layers),
                 milliseconds(lambda layer: layer.multiply(x, "dequantise"), layers),
                 milliseconds(lambda weight: F.linear(x, weight), plain))
        rows.append([str(count), *(f"{value:.2f}" for value in times)])
    table(["rows", "int4 ms", "dequantise ms", "bfloat16 ms"], rows)
    head, rows = torch.randn(151_936, 896).bfloat16(), []
    packed, int8 = torch.ops.mkldnn._reorder_linear_weight(head, 1), pack_int8(head)
    for count in HEAD_ROWS:
        x = torch.randn(count, 896).bfloat16()
        ways = (lambda _: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), lambda _: multiply_int8(int8, x))
        rows.append([str(count), *(f"{milliseconds(way, [None] * 20):.2f}" for way in ways)])
    table(["head, rows", "bfloat16 ms", "int8 ms"], rows)
    print(machine("torch"))


if __name__ == "__main__":
    main()
