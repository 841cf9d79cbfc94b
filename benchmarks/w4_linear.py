"""Which way of multiplying by 4-bit weights is fastest for how many rows, and for how many the int8 head is faster: w4.choose,
w4.MANY_ROWS and layout.INT8_ROWS follow from this.

    python -m benchmarks.w4_linear              # two minutes on two cores

One layer of Qwen2.5-0.5B (896 -> 4864, group 128) and one of the 3B (2048 -> 11008) on a CPU in bfloat16, milliseconds by
number of rows: torch's int4 operator, dequantising and multiplying, and the plain bfloat16 layer. Forty (eight) different layers
take turns, so that none is in the CPU's cache, as in a model. Then the 0.5B's head (896 -> 151,936): packed in bfloat16, and in
int8.
"""
import time

import torch
import torch.nn.functional as F

from benchmarks.measure import machine, make_parser, table
from minikd.layout import multiply_int8, pack_int8, packs_bfloat16
from minikd.products import multiply
from minikd.quant import round_to_nearest, to_words
from minikd.w4 import W4Linear

ROWS, HEAD_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048), (1, 2, 3, 4, 8)
LAYERS = {(896, 4864): 40, (2048, 11008): 8}                                    # (inputs, outputs) -> how many take turns


def milliseconds(function, layers: list) -> float:
    for layer in layers[:4]:
        function(layer)
    start = time.perf_counter()
    for layer in layers:
        function(layer)
    return 1000 * (time.perf_counter() - start) / len(layers)


@torch.inference_mode()
def main():
    make_parser(__doc__).parse_args()
    torch.set_num_threads(2)
    for (inputs, outputs), many in LAYERS.items():
        words = to_words(*round_to_nearest(torch.randn(outputs, inputs)))
        layers = [W4Linear(inputs, outputs, 128, bias=False) for _ in range(many)]
        plain = [torch.randn(outputs, inputs).bfloat16() for _ in range(many)]
        for layer in layers:
            layer.load_state_dict(words)
            layer.multiply(torch.zeros(1, inputs).bfloat16(), "int4")           # prepares the layer
        rows = []
        for count in ROWS:
            x = torch.randn(count, inputs).bfloat16()
            times = (milliseconds(lambda layer: layer.multiply(x, "int4"), layers),
                     milliseconds(lambda layer: layer.multiply(x, "dequantise"), layers),
                     milliseconds(lambda weight: F.linear(x, weight), plain))
            rows.append([str(count), *(f"{value:.2f}" for value in times)])
        table([f"{inputs} -> {outputs}, rows", "int4 ms", "dequantise ms", "bfloat16 ms"], rows)
    head, rows = torch.randn(151_936, 896).bfloat16(), []
    packed, int8 = torch.ops.mkldnn._reorder_linear_weight(head, 1) if packs_bfloat16() else None, pack_int8(head)
    for count in HEAD_ROWS:
        x = torch.randn(count, 896).bfloat16()
        ways = (lambda _: (multiply(x, head) if packed is None else
                           torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")),
                lambda _: multiply_int8(int8, x))
        rows.append([str(count), *(f"{milliseconds(way, [None] * 20):.2f}" for way in ways)])
    table(["head, rows", "bfloat16 ms", "int8 ms"], rows)
    print(machine("torch"))


if __name__ == "__main__":
    main()
