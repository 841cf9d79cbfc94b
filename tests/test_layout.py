"""Weights laid out for decoding give what plain ones give, and leave no trace."""
import copy
import threading
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from conftest import same
from minikd import products
from minikd.checkpoint import load_model, save_model
from minikd.data import Encoded
from minikd.errors import InputError
from minikd.gptq import full_precision, quantize_model
from minikd.generate import generate, respond
from minikd.layout import (INT8_ROWS, Packed, can_pack, head_logits, join, laid_out, packs_bfloat16, pick_layout,
                           torch_products, use_int8_head)
from minikd.layers import Linear
from minikd.model import Qwen2
from minikd.products import gemv
from minikd.quant import to_words
from minikd.w4 import W4Linear, to_w4
from test_generate import PROMPTS, V, random_model


@pytest.fixture
def large() -> Qwen2:
    """Large enough to be packed in float32, which every x86 CPU can."""
    if not can_pack():
        pytest.skip("this torch has no oneDNN")
    return random_model(vocab_size=20_000)


@pytest.fixture
def narrow() -> Qwen2:
    """In bfloat16, which only some CPUs pack."""
    if not (can_pack() and packs_bfloat16()):
        pytest.skip("oneDNN has no fast bfloat16 on this CPU: it wants AVX-512")
    return random_model(dtype=torch.bfloat16, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)


def packed_parts(model) -> int:
    """How many packed or joined layers and heads there are: at most 9, of two blocks q/k/v, o, gate/up and down, and the head."""
    parts = [m.packed for m in model.modules() if isinstance(m, Linear)] + [model.packed_head]
    parts += [branch.joined for block in model.model.layers for branch in (block.self_attn, block.mlp)]
    return sum(part is not None for part in parts)


def bits_of(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("device, dtype, rows, there, layout", [
    ("cpu", torch.float32, 1, {}, "plain"), ("cpu", torch.float32, 1, dict(threads=1), None),
    ("cpu", torch.float32, 3, {}, "packed"), ("cpu", torch.float32, 1, dict(four_bits=True), "joined"),
    ("cpu", torch.float32, 1, dict(amx=True), None), ("cpu", torch.float32, 3, dict(amx=True), "packed"),
    ("cpu", torch.float32, 2, dict(amx=True), None), ("cpu", torch.float32, 2, {}, "packed"),
    ("cpu", torch.bfloat16, 2, dict(amx=True), "packed"),
    ("cpu", torch.float32, 1, dict(toy=True), None), ("cpu", torch.float32, 3, dict(toy=True), None),
    ("cpu", torch.float32, 3, dict(onednn=False), None), ("cpu", torch.float64, 3, {}, None),
    ("cpu", torch.bfloat16, 1, {}, None), ("cpu", torch.bfloat16, 3, {}, "packed"),
    ("cpu", torch.bfloat16, 1, dict(amx=True), "plain"), ("cpu", torch.bfloat16, 1, dict(amx=True, threads=1), "plain"),
    ("cpu", torch.bfloat16, 1, dict(amx=True, toy=True), None), ("cpu", torch.bfloat16, 3, dict(amx=True), "packed"),
    ("cpu", torch.bfloat16, 1, dict(amx=True, four_bits=True), "joined"), ("cpu", torch.float64, 1, dict(amx=True), None),
    ("cpu", torch.bfloat16, 3, dict(toy=True), "packed"), ("cpu", torch.bfloat16, 3, dict(four_bits=True), "packed"),
    ("cpu", torch.bfloat16, 3, dict(capability="AVX2"), "plain"), ("cpu", torch.bfloat16, 1, dict(capability="AVX2"), "plain"),
    ("cpu", torch.bfloat16, 3, dict(capability="AVX2", toy=True), None),
    ("cpu", torch.bfloat16, 3, dict(capability="AVX2", four_bits=True), "joined"),
    ("cpu", torch.bfloat16, 3, dict(capability="ARM"), None), ("cpu", torch.float32, 3, dict(capability="ARM"), "packed"),
    ("cpu", torch.bfloat16, 3, dict(capability="ARM", four_bits=True), "joined"),
    ("cuda", torch.float32, 1, {}, "joined"), ("cuda", torch.bfloat16, 3, {}, "joined"),
    ("cuda", torch.bfloat16, 1, dict(capability="AVX2"), "joined"), ("cuda", torch.bfloat16, 3, dict(four_bits=True), "joined")])
def test_a_layout_is_picked_by_device_dtype_and_rows(monkeypatch, device, dtype, rows, there, layout):
    """For decoding many steps; for few steps only a layout that costs nothing is picked."""
    there = dict(threads=2, capability="AVX512", amx=False, onednn=True, toy=False, four_bits=False) | there
    monkeypatch.setattr(torch, "get_num_threads", lambda: there["threads"])
    monkeypatch.setattr(products, "AVX2_ONLY", there["capability"] == "AVX2")
    monkeypatch.setattr(products, "AMX", there["amx"])
    monkeypatch.setattr("minikd.layout.can_pack", lambda: there["onednn"])
    for name, where in ("bf16", ("AVX512", "ARM")), ("acl", ("ARM",)):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda where=where: there["capability"] in where,
                            raising=False)
    mlp = SimpleNamespace(joined=None)
    head = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda", dtype=dtype,
                           numel=lambda: 1 << (10 if there["toy"] else 27))
    model = SimpleNamespace(head=head, quantization={} if there["four_bits"] else None,
                            model=SimpleNamespace(layers=[SimpleNamespace(mlp=mlp)]))
    assert pick_layout(model, rows, steps=16) == layout
    assert pick_layout(model, rows, steps=15) == ("plain" if layout == "plain" else None)
    mlp.joined = "held"                                                         # a teacher's, for good; 4 bits keep theirs
    assert pick_layout(model, rows, steps=16) == (layout if there["four_bits"] else None)


@pytest.mark.parametrize("there", [True, False])
def test_a_torch_without_onednn_has_no_packed_layout(large, monkeypatch, there):
    """A Mac's; `enabled` is true there too, but torch.ops.mkldnn has no operators."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    with laid_out(large, rows=3, steps=16):
        assert packed_parts(large) == 9 * there
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)                # or it is switched off
    with laid_out(large, rows=3, steps=16):
        assert packed_parts(large) == 0


# ---- packed weights, for several rows on a CPU ----

@torch.no_grad()
def test_packed_weights_give_the_logits_of_plain_ones(narrow):
    ids, before = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(0)), bits_of(narrow)
    states = narrow.hidden(ids)
    plain = head_logits(narrow, states[:, -1]).float()
    with laid_out(narrow, rows=3, steps=16):
        assert packed_parts(narrow) == 9
        quick = head_logits(narrow, narrow.hidden(ids)[:, -1]).float()
        torch.testing.assert_close(head_logits(narrow, states[:, -1]).float(), plain, rtol=1e-2, atol=1e-2)
    assert packed_parts(narrow) == 0 and same(narrow.state_dict(), before)
    assert (quick - plain).norm() < 2e-2 * plain.norm()
    exact = narrow.float()(ids)[:, -1]
    assert (quick - exact).norm() < 1.5 * (plain - exact).norm() + 1e-3 * exact.norm()      # no coarser than plain


def test_generation_with_packed_weights_takes_the_plain_models_likeliest_token(narrow):
    answers = generate(narrow, PROMPTS, max_new_tokens=24)                      # long enough to be packed
    assert len({token for answer in answers for token in answer}) > 10
    for prompt, answer in zip(PROMPTS, answers):
        with torch.no_grad():
            logits = narrow(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].float()     # [24, V]
        taken = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (taken >= logits.max(-1).values - 0.03 * logits.abs().max()).all()   # but for bfloat16's near ties


def test_in_float32_a_large_model_is_packed_for_several_rows(large, monkeypatch):
    """For two rows the head is as fast without."""
    monkeypatch.setattr(products, "AMX", False)
    with torch.inference_mode():
        ids, states = torch.tensor(PROMPTS[2:3]), torch.randn(6, 56)
        plain = large.hidden(ids), head_logits(large, states), head_logits(large, states[:1])
        for rows, steps, parts in (3, 16, 9), (2, 16, 8), (6, 15, 0):
            with laid_out(large, rows=rows, steps=steps):
                assert packed_parts(large) == parts
                for ours, right in zip((large.hidden(ids), head_logits(large, states), head_logits(large, states[:1])), plain):
                    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-4)


def test_the_blocks_weights_are_held_once_and_come_back_bit_for_bit(large):
    before, linears = bits_of(large), [m for m in large.modules() if isinstance(m, Linear)]
    with torch.inference_mode(), laid_out(large, rows=6, steps=16):
        assert sum(layer.weight.numel() for layer in linears) == 0 < large.head.numel()
    assert packed_parts(large) == 0 and same(large.state_dict(), before)
    optimizer = torch.optim.AdamW(large.parameters(), 0.1, fused=True)
    for _ in range(2):
        large(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()         # no weight is an inference tensor
        assert all(layer.weight.grad.norm() > 0 for layer in linears)
        assert len(generate(large, [[1, 2]] * 6, 16)) == 6 and same(large.state_dict(), before)      # between backward and step
        optimizer.step()
        assert not same(large.state_dict(), before)
        before = bits_of(large)


def test_a_model_is_packed_once_for_many_batches_and_when_mixed_with_itself(large, monkeypatch):
    before, pack, packed = bits_of(large), Packed.__init__, []
    monkeypatch.setattr(Packed, "__init__", lambda *given: (packed.append(given), pack(*given))[1])
    generate(large, [[1, 2]] * 6, 16, temperature=1.0, teacher=large, mix=0.5)
    assert len(packed) == 8 and packed_parts(large) == 0 and same(large.state_dict(), before)
    rows = [Encoded([1 + i, 2], [3], False, i) for i in range(9)]
    respond(large, rows, 4, 16, eos_ids=(), progress=lambda count: packed.append(packed_parts(large)))
    assert packed[16:] == [9, 9, 9] and packed_parts(large) == 0 and same(large.state_dict(), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_weights_come_back_after_an_error_also_of_their_unpacking(large, monkeypatch, error):
    before, unpack, calls = bits_of(large), Packed.unpack, []

    def failing(*_):
        raise error

    def stopped(packed):
        calls.append(packed)
        if len(calls) == 3:
            raise error
        unpack(packed)

    for place, name, method in ((large, "hidden", failing), (Packed, "__call__", failing), (Packed, "unpack", stopped),
                                (Packed, "free_parts", failing)):
        monkeypatch.setattr(place, name, method)
        with pytest.raises(error):
            generate(large, [[1, 2]] * 6, 16)
        monkeypatch.undo()
        assert packed_parts(large) == 0 and same(large.state_dict(), before)
    assert len(calls) > 3


@pytest.mark.parametrize("mend", [
    lambda model, weights: generate(model.eval(), PROMPTS[:3], 20), lambda model, weights: model.to(model.head.dtype),
    lambda model, weights: model.load_state_dict(weights)], ids=["generate", "to", "load_state_dict"])
def test_a_layout_whose_end_was_interrupted_twice_is_undone_by_the_next_and_not_trained_through(large, monkeypatch, mend):
    def interrupted(packed):
        raise KeyboardInterrupt

    before = bits_of(large)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Packed, "unpack", interrupted)
        with laid_out(large, rows=3, steps=16):
            pass
    assert packed_parts(large) == 8                             # all but the head
    assert large.model.layers[-1].mlp.down_proj.weight.numel() == 0
    with pytest.raises(RuntimeError, match="packed weights have no gradient"):
        large.train()(torch.tensor([[7, 8, 9]])).sum().backward()
    mend(large, before)
    assert packed_parts(large) == 0 and same(large.state_dict(), before)


def test_threads_that_generate_with_one_model_leave_its_weights_alone(large):
    before, found, failed = bits_of(large), [], []

    def work(prompts):
        try:
            found.extend((len(prompts), generate(large, prompts, 20)) for _ in range(6))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(PROMPTS[:rows],)) for rows in (2, 3, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(found) == 24 and packed_parts(large) == 0 and same(large.state_dict(), before)
    assert all(answers == generate(large, PROMPTS[:rows], 20) for rows, answers in found)


# ---- plain weights on a CPU, multiplied in another way ----

@pytest.mark.parametrize("dtype, amx", [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_one_row_in_bfloat16_is_decoded_without_onednn(monkeypatch, dtype, amx):
    """The prompt is read with oneDNN, which is on again after an error too. Not with AMX, where oneDNN is faster."""
    model, hidden, used = random_model(dtype=dtype), Qwen2.hidden, []
    monkeypatch.setattr(products, "AMX", amx)

    def watched(self, ids, cache=None, **options):
        used.append((ids.shape[1], torch.backends.mkldnn.enabled))
        if len(used) == fails:
            raise KeyboardInterrupt
        return hidden(self, ids, cache, **options)

    monkeypatch.setattr(Qwen2, "hidden", watched)
    narrow = dtype == torch.bfloat16 and not amx
    for prompts, fails in ([[1, 2, 3]], 9), ([[1, 2, 3]], 3), ([[1, 2, 3]] * 2, 9):
        used.clear()
        with suppress(KeyboardInterrupt):
            generate(model, prompts, 4)
        assert used == [(3, True), (1, not narrow or len(prompts) > 1), *used[1:2] * 2][:min(fails, 4)]
        assert torch.backends.mkldnn.enabled


def test_another_thread_waits_with_exact_products_until_a_row_is_decoded(large, monkeypatch):
    """oneDNN's switch belongs to the process: it would be on inside, or stay off."""
    inside, weight = [], torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setattr(products, "AMX", False)

    def exact():
        with full_precision():
            inside.append(torch.backends.mkldnn.enabled)

    thread = threading.Thread(target=exact)
    with laid_out(large, rows=1, steps=16), torch_products(weight, 1):
        thread.start()
        thread.join(0.2)
        assert not inside
    thread.join()
    assert inside == [False] and torch.backends.mkldnn.enabled


@torch.inference_mode()
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_one_row_is_read_from_the_plain_weights(large, monkeypatch, dtype, near):
    """In float32 without AMX, in bfloat16 with it."""
    read, ids, prompt = [], torch.tensor([[7]]), torch.tensor([[7, 8]])
    large.to(dtype)
    monkeypatch.setattr(products, "AVX2_ONLY", False)
    monkeypatch.setattr(products, "AMX", False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with laid_out(large, rows=1, steps=16):
        assert packed_parts(large) == 0                                         # there is nothing to share for one thread
    monkeypatch.setattr(products, "AMX", dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(products, "gemv", lambda x, weight, bias: (read.append(weight), gemv(x, weight, bias))[1])
    plain, whole = large.hidden(ids), large.hidden(prompt)
    with laid_out(large, rows=1, steps=1):
        with laid_out(large, rows=1, steps=1):
            assert torch.equal(large.hidden(prompt), whole) and read == []
        torch.testing.assert_close(large.hidden(ids), plain, rtol=near, atol=near)
        assert [id(weight) for weight in read] == [id(m.weight) for m in large.modules() if isinstance(m, Linear)]
    assert torch.equal(large.hidden(ids), plain) and len(read) == 7 * 2


def test_one_row_leaves_layers_as_they_are_that_an_interrupt_left_packed(large, monkeypatch):
    """They hold their weights nowhere else."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(products, "AMX", False)
    before, last = bits_of(large), large.model.layers[-1].mlp.down_proj
    last.packed = Packed([last], 3)
    last.packed.free_parts()
    with laid_out(large, rows=1, steps=16):
        assert isinstance(last.packed, Packed)
    assert packed_parts(large) == 0 and same(large.state_dict(), before)


@torch.inference_mode()
def test_a_cpu_without_bfloat16_multiplies_many_rows_in_float32(large, monkeypatch):
    """Few rows, such as a decoding's of one prompt, are torch's."""
    monkeypatch.setattr(products, "AVX2_ONLY", True)
    wide, pad = [], products.padded_columns
    monkeypatch.setattr(products, "padded_columns", lambda x: (wide.append(len(x)), pad(x))[1])
    few, many = (torch.randint(20_000, shape, generator=torch.Generator().manual_seed(0)) for shape in ((1, 5), (3, 2)))
    exact = large.hidden(many)
    large.bfloat16()
    plain = large.hidden(few), large.hidden(many)
    for rows, steps in (3, 16), (1, 1):
        with laid_out(large, rows=rows, steps=steps):
            with laid_out(large, rows=rows, steps=steps):
                assert torch.equal(large.hidden(few), plain[0])
            assert wide == []
            quick = large.hidden(many)
        assert wide == [6] * 7 * 2                                              # every layer of two blocks
        wide.clear()
        assert (quick - exact).norm() < 1.02 * (plain[1] - exact).norm() < 0.1 * exact.norm()
        assert torch.equal(large.hidden(many), plain[1]) and wide == [] and packed_parts(large) == 0


# ---- joined layers, as on a GPU ----

@torch.no_grad()
def test_joined_layers_give_the_outputs_of_all_and_hold_nothing_twice():
    model, x = random_model(), torch.randn(3, 56)
    attention = model.model.layers[0].self_attn
    parts, _ = attention.first_and_last()
    before = bits_of(model)
    expected = torch.cat([part(x) for part in parts], -1)
    joined = join(parts)
    torch.testing.assert_close(joined(x), expected)
    parts[1].weight += 1                                                        # as an optimizer moves it, in place
    torch.testing.assert_close(joined(x), torch.cat([part(x) for part in parts], -1))
    parts[1].weight -= 1
    assert len({part.weight.untyped_storage().data_ptr() for part in parts}) == 1
    torch.testing.assert_close(dict(model.state_dict()), before)


def test_parts_of_a_joined_layer_are_trained_and_saved_as_before(tmp_path):
    model = random_model()
    with torch.inference_mode():
        mlp = model.model.layers[0].mlp
        join([mlp.gate_proj, mlp.up_proj])
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert mlp.gate_proj.weight.grad.shape == (40, 56) and mlp.up_proj.weight.grad.abs().sum() > 0
    save_model(model, tmp_path)
    assert same(load_model(tmp_path).state_dict(), model.state_dict())


# ---- 4-bit models ----

def four_bits(dtype=torch.bfloat16, sym=True, **shape) -> Qwen2:
    model = random_model(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, dtype=dtype, **shape)
    words = quantize_model(model, [], 0, method="rtn", group_size=32, sym=sym, store=partial(to_words, version=1 if sym else 2))
    return to_w4(model, words, 32, sym)


@torch.no_grad()
@pytest.mark.parametrize("sym", [True, False])
def test_joined_4_bit_layers_give_the_outputs_of_all(sym):
    for shuffled in False, True:                                                # as other tools' act-order leaves groups
        attention = four_bits(sym=sym).model.layers[0].self_attn
        parts, _ = attention.first_and_last()
        for part in parts if shuffled else ():
            part.g_idx = part.g_idx.flip(0)
        x = torch.randn(3, 64).bfloat16()
        expected = torch.cat([part(x) for part in parts], -1)
        torch.testing.assert_close(join(parts)(x), expected)
        assert all(part.prepared is None for part in parts)


def test_4_bit_layers_grouped_differently_are_not_joined():
    for i in range(3):
        model = four_bits()
        attention = model.model.layers[0].self_attn
        parts, _ = attention.first_and_last()
        parts[i].g_idx = parts[i].g_idx.flip(0)
        assert join(parts) is None
    assert isinstance(parts[0], W4Linear) and len(generate(model, PROMPTS, 20)[0]) == 20


def test_a_4_bit_model_is_joined_once_and_stays_so_until_it_moves():
    model, ids = four_bits(), torch.tensor(PROMPTS[2:3])
    stored = bits_of(model)
    with torch.inference_mode():
        expected = model(ids).float()
        with laid_out(model, rows=2, steps=16):
            packed = model.packed_head
        attention = model.model.layers[0].self_attn
        assert attention.joined is not None
        assert (packed is not None) == (can_pack() and packs_bfloat16()) and model.packed_head is None
        parts, _ = attention.first_and_last()
        joined = attention.joined.__self__
        assert joined.qweight.numel() == 64 * 128 // 8 and not any(part.qweight.numel() for part in parts)
        assert len({part.scales.untyped_storage().data_ptr() for part in parts}) == 1
        for part in parts:
            part.multiply = None                                                # what follows does not call the parts
        kept, first = attention.joined, model(ids).float()
        assert joined.qweight.numel() == 0                                      # the prepared copy holds the codes now
        assert (first - expected).norm() <= 2e-2 * expected.norm()
        for rows in 1, 2:
            with laid_out(model, rows=rows, steps=16):
                assert attention.joined is kept
    for part in parts:
        del part.multiply
    assert same(model.state_dict(), stored)
    model.float()
    assert packed_parts(model) == 0 and all(part.qweight.numel() for part in parts)
    assert same(model.bfloat16().state_dict(), stored)
    model.float()
    with torch.inference_mode():
        assert (model(ids) - expected).norm() <= 6e-2 * expected.norm()        # bfloat16 against float32


def test_a_4_bit_models_codes_are_held_once():
    def held(model) -> int:
        layers = [layer for layer in model.modules() if isinstance(layer, W4Linear)]
        layers += {id(layer): layer for layer, _ in (part.whole for part in layers if part.whole)}.values()
        return sum(layer.qweight.nbytes + (layer.prepared[1][0].nbytes if layer.prepared else 0) for layer in layers)

    model, ids = four_bits(), torch.tensor(PROMPTS[2:3])
    once = held(model)
    generate(model, PROMPTS, 20)
    assert held(model) == held(copy.deepcopy(model)) == once
    model.lay_back()
    with torch.inference_mode():
        model(ids)                                                              # each part for itself again
    assert not any(layer.whole for layer in model.modules() if isinstance(layer, W4Linear))


def test_a_used_4_bit_model_takes_other_weights_whole_or_in_part():
    other = bits_of(four_bits())
    for key, value in other.items():
        if key.endswith("qweight"):
            value ^= 0x11111111
    for part in "", "model", "model.layers.0", "model.layers.0.mlp":
        model, ids = four_bits(), torch.tensor(PROMPTS[2:3])
        generate(model, PROMPTS, 20)                                            # joins, and lets all qweights go
        with torch.inference_mode():
            model.to(torch.bfloat16)
        generate(model, PROMPTS, 20)
        right = model.state_dict() | {key: value for key, value in other.items() if key.startswith(part)}
        model.get_submodule(part).load_state_dict({key.removeprefix(f"{part}." if part else ""): value
                                                   for key, value in other.items() if key.startswith(part)})
        for steps in 4, 20:                                                     # not joined again, and joined
            assert same(model.state_dict(), right)
            generate(model, PROMPTS, steps)
        expected = four_bits()
        expected.load_state_dict(right)
        assert torch.equal(model(ids), expected(ids)), part


def test_a_4_bit_model_is_copied_refilled_and_cast_in_part(int8):
    model, other = four_bits(), four_bits()
    with torch.no_grad():
        other.head.mul_(-1)
        for layer in other.modules():
            if isinstance(layer, W4Linear):
                layer.qweight ^= 0x11111111
    plain = [generate(m, PROMPTS, 20) for m in (model, other)]
    assert plain[0] != plain[1]
    twin = copy.deepcopy(model)
    assert twin.packed_head is None and generate(twin, PROMPTS, 20) == plain[0]
    use_int8_head(model)
    model.load_state_dict(other.state_dict())
    assert model.int8_head is None and generate(model, PROMPTS, 20) == plain[1]
    model.model.layers[0].to(torch.float32)                                     # nothing that is joined stays behind
    assert model.model.layers[0].mlp.joined is None
    model.model.float()
    assert [len(answer) for answer in generate(model, PROMPTS, 20)] == [20] * len(PROMPTS)


def test_a_4_bit_models_head_may_be_trained():
    model = four_bits().requires_grad_(False)
    before, weight = generate(model, PROMPTS, 20), model.head.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=50.0)
    for _ in range(5):
        model(torch.tensor([[1, 2, 3]])).float()[..., 7].sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = generate(model, PROMPTS, 20)
    assert after == generate(copy.deepcopy(model), PROMPTS, 20) != before


def test_generate_decodes_outside_of_autocast():
    for model in four_bits(), four_bits(torch.float32):
        expected = generate(model, PROMPTS, 20)
        with torch.autocast("cpu", torch.bfloat16):
            assert generate(model, PROMPTS, 20) == expected


# ---- the head in int8 ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_int8_head_is_the_head_to_8_bits_even_beside_outliers(int8, dtype):
    model = random_model(dtype=dtype)
    use_int8_head(model)
    head = model.head.detach().double()
    scale = head.abs().amax(1, keepdim=True) / 127
    rounded = (head / scale).round() * scale                                    # what 8 bits hold of the weights
    states = torch.randn(INT8_ROWS - 1, 56)
    states[0, 3], states[1, 5] = 60.0, -300.0
    states[2] = head[7].sign() * states[2].abs().max()                          # every product at its most: nothing overflows
    states = states.to(dtype)
    expected = states.double() @ rounded.T
    for row in range(len(states)):                                              # alone, and with rows of other sizes
        ours = head_logits(model, states[row:row + 1]).double()
        most = (5e-4 if dtype == torch.float32 else 5e-3) * expected[row].norm()
        assert ours.shape == (1, V) and (ours - expected[row]).norm() < most
    ours = head_logits(model, states).double()
    assert ((ours - expected).norm(dim=1) < 5e-3 * expected.norm(dim=1)).all()
    assert not torch.equal(ours, head_logits(random_model(dtype=dtype), states).double())
    assert head_logits(model, states[:1] * 0).eq(0).all()


def test_all_of_a_large_head_is_in_int8(int8):
    model = random_model(vocab_size=9000)
    states = torch.randn(2, 56)
    expected = head_logits(model, states)
    use_int8_head(model)
    assert len(model.int8_head.args[0]) == 2                                    # packing one part at a time takes less memory
    off = (head_logits(model, states) - expected).abs().amax(0)                 # [V]
    assert off.max() < 2e-2 * expected.abs().max()


def test_many_rows_read_the_head_as_it_is(int8):
    model = random_model()
    states = torch.randn(INT8_ROWS, 56)
    expected = head_logits(model, states)
    use_int8_head(model)
    assert torch.equal(head_logits(model, states), expected)
    model.to(torch.bfloat16)
    assert model.int8_head is None


def test_a_head_that_is_read_in_int8_is_not_packed_as_well(int8, large):
    use_int8_head(large)
    for rows, parts in (INT8_ROWS - 1, 8), (INT8_ROWS, 9):
        with laid_out(large, rows=rows, steps=16):
            assert packed_parts(large) == parts


def test_an_int8_head_is_for_cpus():
    model = random_model().to("meta")
    with pytest.raises(InputError, match="leave out --int8-head"):
        use_int8_head(model)


@pytest.mark.parametrize("lacking", ["operator", "x86"])
def test_without_the_operator_an_int8_head_is_refused(monkeypatch, lacking):
    if lacking == "operator":
        monkeypatch.delattr(torch, "_make_per_channel_quantized_tensor")
    else:
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(InputError, match="has no int8 product for this CPU; leave out --int8-head"):
        use_int8_head(random_model())
