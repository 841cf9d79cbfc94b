"""A 4-bit layer multiplies as its weight does, whichever way it takes and wherever its codes are."""
import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from conftest import same, small
from minikd import products
from minikd.errors import InputError
from minikd.gptq import quantize_model
from minikd.layout import join
from minikd.quant import dequantize_groups, from_words, round_to_nearest, to_words
from minikd.w4 import PART, W4Linear, can_read_int4, choose, codes_of_int4, pack_int4, show_ways, swap_linears, to_w4
from test_quant import matrix


def layer(O=32, I=128, group=64, sym=True, bias=True, version=1):
    """A 4-bit layer, and its weight [O, I]."""
    codes, scales, zeros = round_to_nearest(matrix(O, I), group_size=group, sym=sym)
    zeros = zeros.clamp(min=1)                                  # version 1 has no zero of 0
    made = W4Linear(I, O, group, bias, version)
    made.load_state_dict(to_words(codes, scales, zeros, version) | ({"bias": torch.linspace(-1, 1, O)} if bias else {}))
    return made, dequantize_groups(codes, scales, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sym, version", [(True, 1), (False, 2), (False, 1)])
@pytest.mark.parametrize("rows", [1, 5, 500])
def test_the_layer_multiplies_as_its_weight_does(dtype, sym, version, rows):
    made, weight = layer(sym=sym, version=version)
    assert torch.equal(made.weight(), weight)
    x = torch.randn(2, rows, 128, generator=torch.Generator().manual_seed(rows)).to(dtype)
    expected = x.double() @ weight.double().T + made.bias.double()
    with torch.no_grad():
        y = made(x)
    assert y.dtype == dtype and y.shape == (2, rows, 32)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((y.double() - expected).norm() / expected.norm()) < tolerance


def test_the_gradient_goes_through_to_the_input():
    made, weight = layer()
    x = torch.randn(3, 128, requires_grad=True)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (made(x), x @ weight.T + made.bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_inputs_may_be_strided():
    made, _ = layer()
    wide = torch.randn(3, 256).bfloat16()
    with torch.no_grad():
        assert torch.equal(made(wide[:, ::2]), made(wide[:, ::2].contiguous()))


def test_the_int4_operators_results_are_rounded():
    """Not cut off, as torch's are for bfloat16 operands on ARM: then all are nearer to 0."""
    made, weight = layer(O=64, bias=False)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = x.double() @ weight.double().T
    with torch.no_grad():
        y = made.multiply(x, "int4").double()
    assert float((y * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=1e-3)


def test_on_a_cpu_without_bfloat16_dequantised_weights_are_not_rounded_to_it(monkeypatch):
    made, weight = layer()
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    for avx2 in True, False:
        monkeypatch.setattr(products, "AVX2_ONLY", avx2)
        dtype = torch.float32 if avx2 else torch.bfloat16
        expected = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), made.bias.to(torch.bfloat16).to(dtype))
        assert torch.equal(made.multiply(x, "dequantise"), expected.bfloat16())
        assert made.multiply(x.clone().requires_grad_(), "dequantise").requires_grad
        torch.testing.assert_close(made.multiply(x.double(), "dequantise"), x.double() @ weight.double().T + made.bias.double(),
                                   rtol=1e-12, atol=1e-12)


def test_each_way_is_taken_where_it_may_be():
    made, _ = layer()
    narrow, wide = torch.zeros(1, 128).bfloat16(), torch.zeros(1, 128)
    with torch.no_grad():
        assert choose(made, narrow) == "int4" and choose(made, wide) == "dequantise"
        assert choose(made, narrow.expand(1000, 128)) == "dequantise"           # many rows
        assert choose(layer(group=16)[0], narrow) == "dequantise"               # a group the operator does not know
    assert choose(made, narrow.clone().requires_grad_()) == "dequantise"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_another_width_are_refused_and_none_give_none(dtype):
    made = layer()[0].to(dtype)                                         # 128 -> 32
    with torch.no_grad():
        assert made(torch.zeros(2, 0, 128, dtype=dtype)).shape == (2, 0, 32)
        for shape in (1, 256), (2, 4, 64):
            with pytest.raises(RuntimeError):
                made(torch.zeros(shape, dtype=dtype))


def test_a_layer_that_is_prepared_for_the_kernel_does_not_look_for_it_again(monkeypatch):
    """Else torch.compile would trace what `available` does at its first call: reading files, loading libraries."""
    made, asked = layer(group=128)[0], []
    monkeypatch.setattr("minikd.w4.available", lambda index: (asked.append(index), True)[1])
    x = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, requires_grad=False, device=SimpleNamespace(index=3))
    assert choose(made, x) == "kernel" and asked == [3]
    made.prepared = "kernel", ()
    assert choose(made, x) == "kernel" and asked == [3]


def test_a_cast_leaves_the_scales_as_they_were_stored():
    made, weight = layer()
    for dtype in torch.bfloat16, torch.float32:
        made.to(dtype)
        assert made.bias.dtype == dtype and made.scales.dtype == torch.float16 and torch.equal(made.weight(), weight)


@pytest.mark.parametrize("O, I", [(64, 32), (192, 96), (1088, 64), (2112, 256)])
def test_what_torchs_int4_operator_reads_can_be_read_back(O, I):
    codes = torch.randint(0, 16, (O, I), generator=torch.Generator().manual_seed(O)).to(torch.uint8)
    packed = torch.cat([pack_int4(part) for part in codes.split(PART)])
    assert torch.equal(packed, pack_int4(codes))                                # as all at once
    assert torch.equal(codes_of_int4(packed, O, I), codes)
    assert can_read_int4(O, I) and not can_read_int4(O - 16, I)


@torch.no_grad()
@pytest.mark.parametrize("O", [192, 320, 80])
def test_a_layer_holds_its_codes_once(O):
    made, weight = layer(O)
    stored = {name: value.clone() for name, value in made.state_dict().items()}
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = made(x)
    assert made.prepared[0] == "int4" and made.qweight.numel() == (O * 128 // 8 if O == 80 else 0)
    for each in made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)):
        assert each is made or each.prepared is None and torch.equal(each.qweight, stored["qweight"])
        assert torch.equal(each.weight(), weight) and torch.equal(each(x), y)
        assert same(each.state_dict(), stored)
    other = layer(O, sym=False)[0]
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(x), other(x)) and not torch.equal(made(x), y)
    assert torch.equal(made.float().qweight, other.state_dict()["qweight"])


@torch.no_grad()
@pytest.mark.parametrize("way", ["qweight", "int4", "kernel", "joined"])
def test_some_rows_codes_are_read_from_wherever_they_are(way):
    made, weight = layer(O=640, group=128)
    whole = made.codes()
    if way == "joined":
        join([layer(O=192, group=128)[0], made])                        # makes it a part of a joined layer, from row 192 on
        layers = made, made.whole[0]
        layers[1].ready("int4")
    elif way == "kernel":                                               # with a last tile of 8 outputs
        made, weight = layer(O=632, group=128)
        whole = made.codes()
    if way in ("int4", "kernel"):
        made.ready(way)
    assert (made.qweight.numel() > 0) == (way == "qweight")
    for first, last in (0, 640), (0, 64), (64, 320), (1, 2), (63, 65), (70, 601), (600, 640):
        assert torch.equal(made.codes(slice(first, last)), whole[first:last])
    for dtype in torch.float32, torch.bfloat16, torch.float64:
        assert made.weight(dtype).dtype == dtype and torch.equal(made.weight(dtype), weight.to(dtype))


def test_groups_in_another_order_are_read_by_g_idx():
    """As other tools' act-order writes them."""
    made, weight = layer()
    order = torch.randperm(128, generator=torch.Generator().manual_seed(4))
    codes, scales, zeros = from_words(made.qweight, made.qzeros, made.scales)
    shuffled = W4Linear(128, 32, 64, True)
    shuffled.load_state_dict(to_words(codes[:, order], scales, zeros) | {"g_idx": made.g_idx[order], "bias": made.bias})
    assert not shuffled.in_order and torch.equal(shuffled.weight(), weight[:, order])
    x = torch.randn(3, 128).bfloat16()
    with torch.no_grad():
        assert choose(shuffled, x) == "dequantise"
        torch.testing.assert_close(shuffled(x[:, order]), made(x), rtol=5e-2, atol=5e-1)
        made.load_state_dict(shuffled.state_dict())             # nothing of the old order is remembered
        assert torch.equal(made(x[:, order]), shuffled(x[:, order]))


def test_layers_are_all_checked_before_the_first_is_swapped():
    model = small(0, hidden_size=64, intermediate_size=72)
    with pytest.raises(InputError, match="mlp.down_proj.* 72 "):
        swap_linears(model, 16, 1)
    assert not any(isinstance(layer, W4Linear) for layer in model.modules())


def test_a_call_of_to_w4_that_is_interrupted_is_completed_by_the_next(monkeypatch):
    plain = small(0, hidden_size=32, intermediate_size=32)
    words = quantize_model(copy.deepcopy(plain), [], 0, method="rtn", group_size=16, store=to_words)
    wanted, real = to_w4(copy.deepcopy(plain), words, 16, True).state_dict(), W4Linear.load_state_dict
    for k in range(7):
        model, calls = copy.deepcopy(plain), iter(range(7))
        with monkeypatch.context() as patch:
            patch.setattr(W4Linear, "load_state_dict", lambda layer, given: (
                real(layer, given) if next(calls) < k else (_ for _ in ()).throw(KeyboardInterrupt)))
            with pytest.raises(KeyboardInterrupt):
                to_w4(model, words, 16, True)
        assert model.quantization is None                       # so save_model refuses it
        found = to_w4(model, words, 16, True).state_dict()
        assert same(found, wanted)


def test_the_ways_are_shown_by_shape_and_rows(capsys, monkeypatch):
    model = small(0, hidden_size=64, intermediate_size=96, num_hidden_layers=2).bfloat16()
    show_ways(model)
    assert capsys.readouterr().out.startswith("0 4-bit layers")
    swap_linears(model, 32, 1)
    show_ways(model, rows=(1, 1000))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["14", "4-bit", "layers,", "rows:", "1", "1,000"]
    assert lines[1:] == [["4", "of", "64", "->", "64", "int4", "dequantise"], ["4", "of", "64", "->", "32", "int4", "dequantise"],
                         ["4", "of", "64", "->", "96", "int4", "dequantise"], ["2", "of", "96", "->", "64", "int4", "dequantise"]]
    monkeypatch.setattr("minikd.w4.choose", lambda *_: "kernel")
    show_ways(model, rows=(1, 20, 100))
    assert capsys.readouterr().out.splitlines()[1].split()[-3:] == ["w4_mma_8_few", "w4_mma_32", "kernel"]


def test_trying_a_layout_draws_none_of_the_process_s_random_numbers():
    before = torch.get_rng_state()
    can_read_int4.__wrapped__(64, 32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_4_bit_layers_bias_is_no_parameter():
    model = small(0, hidden_size=32, intermediate_size=32)
    swap_linears(model, 16, 1)
    biases = [layer.bias for layer in model.modules() if isinstance(layer, W4Linear) and layer.bias is not None]
    assert len(biases) == 3 and not any(bias.requires_grad for bias in biases)
    assert not any("proj" in name for name, _ in model.named_parameters())
