"""Sampling against slow loops: full forwards again and again, and distributions counted out."""
import math
import random

import numpy as np
import pytest
import torch

import conftest
from conftest import small
from minikd import generate as generation
from minikd.checkpoint import save_model
from minikd.data import Encoded
from minikd.errors import InputError
from minikd.generate import Decoding, generate, generate_plainly, generate_with_log_probs, invert, respond, sample
from minikd.layout import join
from minikd.model import BLOCKS_PER_GRAPH, Qwen2
from minikd.training import compile_blocks

V = 97
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23], [8, 8]]


def random_model(seed=1, dtype=torch.float32, **shape) -> Qwen2:
    """No part at its initial value, and logits far enough apart that rounding does not choose the token."""
    defaults = dict(vocab_size=V, hidden_size=56, intermediate_size=40, num_hidden_layers=2, num_attention_heads=7,
                    num_key_value_heads=1, rope_theta=1e4, tie_word_embeddings=True, initializer_range=0.3)
    return conftest.random_model(seed, **defaults | shape).to(dtype)


@torch.no_grad()
def slow_greedy(model, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def count_rows(model, monkeypatch) -> list[tuple[int, int]]:
    """The shape of ids at every call of model.hidden from here on."""
    shapes, hidden = [], model.hidden

    def counting(ids, *rest, **named):
        assert not torch.is_grad_enabled()                                      # no graph grows along the answer
        shapes.append(tuple(ids.shape))
        return hidden(ids, *rest, **named)

    monkeypatch.setattr(model, "hidden", counting)
    return shapes


@pytest.mark.parametrize("shape", [dict(), dict(num_attention_heads=6, num_key_value_heads=2, head_dim=10),
                                   dict(num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)])
def test_greedy_is_the_argmax_of_full_forwards_of_each_row_alone(shape):
    model = random_model(**shape)
    for prompts in PROMPTS, [prompt[:1] for prompt in PROMPTS]:                 # equal lengths need no mask
        expected = [slow_greedy(model, prompt, 20) for prompt in prompts]
        assert generate(model, prompts, max_new_tokens=20) == expected
        assert len({token for answer in expected for token in answer}) > 10     # not one token over and over


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.9, 5)])
def test_the_plain_loop_draws_the_same_tokens(temperature, top_p, top_k):
    model, options = random_model(seed=3), dict(temperature=temperature, top_p=top_p, top_k=top_k, eos_ids=[60, 7], seed=5)
    for prompts in PROMPTS, [[1]]:
        for steps in 0, 1, 8, 40:
            assert generate_plainly(model, prompts, steps, **options) == generate(model, prompts, steps, **options)
    assert len({len(answer) for answer in generate(model, PROMPTS, 40, **options)}) > 1 or not temperature  # some rows ended


def until_stop(answer: list[int], stops) -> list[int]:
    for i, token in enumerate(answer):
        if token in stops:
            return answer[:i + 1]
    return answer


def test_a_row_ends_with_any_stop_token_and_then_costs_nothing(monkeypatch):
    model = random_model(seed=3)
    free = generate(model, PROMPTS, max_new_tokens=20)
    stops = {free[0][2], free[2][0], free[3][9]}                                # three rows end at different steps
    expected = [until_stop(answer, stops) for answer in free]
    lengths = [len(answer) for answer in expected]
    assert len(set(lengths)) >= 3 and 20 in lengths
    shapes = count_rows(model, monkeypatch)
    assert generate(model, PROMPTS, max_new_tokens=20, eos_ids=stops) == expected
    assert expected[0][-1] in stops                                             # the stop token is in the answer
    alive = [sum(length > step for length in lengths) for step in range(20)]    # rows whose step-th token is needed
    assert shapes == [(5, 8)] + [(rows, 1) for rows in alive[1:]]
    shapes.clear()
    generate(model, PROMPTS, max_new_tokens=20, eos_ids=range(V))
    assert shapes == [(5, 8)]                                                   # all end at once: the prompts only


def test_the_same_seed_gives_the_same_tokens_whatever_ran_before():
    model = random_model()
    options = dict(max_new_tokens=12, temperature=1.5, top_p=0.95, top_k=50)
    first = generate(model, PROMPTS, seed=7, **options)
    torch.manual_seed(123)
    torch.rand(5)
    before = torch.random.get_rng_state()
    assert generate(model, PROMPTS, seed=7, **options) == first
    assert torch.equal(torch.random.get_rng_state(), before)                    # the global generator is left alone
    assert generate(model, PROMPTS, seed=8, **options) != first
    assert generate(model, PROMPTS, **options) != generate(model, PROMPTS, **options)       # no seed: torch's own
    twins = generate(model, [[5, 6]] * 4, seed=7, **options)
    assert len({tuple(answer) for answer in twins}) == 4                        # each row draws for itself


# ---- one token from logits ----

DRAWS = 20_000


def draw(logits, temperature, top_p, top_k, generator) -> torch.Tensor:
    """The tokens of sample, without their log-probabilities."""
    return sample(logits, temperature, top_p, top_k, torch.rand(len(logits), generator=generator, dtype=torch.float64))[0]


def draws(logits, temperature=1.0, top_p=1.0, top_k=0) -> list[int]:
    """How often each token came, of DRAWS."""
    tokens = draw(torch.as_tensor(logits).expand(DRAWS, -1), temperature, top_p, top_k, torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=len(logits)).tolist()


def slow_probabilities(logits, temperature, top_p, top_k) -> list[float]:
    """The definitions, token by token: temperature, then top-k, then the nucleus."""
    powers = [math.exp(x / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda v: -powers[v])
    kept = ranked[:top_k] if top_k else ranked
    total, mass, nucleus = sum(powers[v] for v in kept), 0.0, []
    for v in kept:                                                              # the fewest whose mass reaches top_p
        nucleus.append(v)
        mass += powers[v] / total
        if mass >= top_p:
            break
    total = sum(powers[v] for v in nucleus)
    return [powers[v] / total if v in nucleus else 0.0 for v in range(len(logits))]


@pytest.mark.parametrize("temperature,top_p,top_k", [
    (1.0, 1.0, 0), (0.5, 1.0, 0), (2.0, 1.0, 0), (1.0, 1.0, 5), (1.0, 0.8, 0), (1.0, 0.5, 0), (1.0, 0.0, 0),
    (0.7, 0.9, 0), (1.0, 1.0, 1), (1.0, 1.0, 1000), (1.5, 0.7, 8), (1.0, 0.6, 3)])
def test_tokens_come_as_often_as_the_definitions_say(temperature, top_p, top_k):
    rng = random.Random(1)
    logits = [rng.uniform(-1.5, 1.5) for _ in range(20)]
    expected = slow_probabilities(logits, temperature, top_p, top_k)
    counts = draws(logits, temperature, top_p, top_k)
    assert [count > 0 for count in counts] == [p > 0 for p in expected]
    kept = [(count, DRAWS * p) for count, p in zip(counts, expected) if p > 0]
    chi_square = sum((count - mean) ** 2 / mean for count, mean in kept)
    freedom = len(kept) - 1
    assert chi_square <= freedom + 4 * math.sqrt(2 * freedom)                   # mean and 4 standard deviations


def test_tokens_whose_mass_is_exactly_top_p_are_enough():
    assert sorted(draws([0.0, 0.0, -math.inf], top_p=0.5)) == [0, 0, DRAWS]


def test_a_top_p_of_1_keeps_the_tail():
    u = torch.tensor([1 - 1e-10], dtype=torch.double)
    assert sample(torch.tensor([[0.0, -18.0]]), 1.0, 1.0, 0, u)[0].tolist() == [1]


def test_the_inverse_is_that_of_the_whole_running_sum():
    """Over several blocks of the vocabulary, most of them empty, and at the ends of each."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(6, 1000, generator=generator) ** 8
    probs[1, :400], probs[2, 130:], probs[3, ::3], probs[4, 1:999] = 0, 0, 0, 0
    u = torch.rand(500, 6, 1, generator=generator, dtype=torch.float64)
    u[0], u[1] = 0, 1 - 2**-53
    cdf = probs.double().cumsum(1)
    for row in u:
        tokens, total = invert(probs, row)
        torch.testing.assert_close(total, cdf[:, -1:], rtol=1e-12, atol=0)
        assert (probs.gather(1, tokens) > 0).all()
        before = cdf.gather(1, tokens) - probs.double().gather(1, tokens)       # the token's stretch of the sum
        assert ((before <= row * total + 1e-12) & (row * total <= cdf.gather(1, tokens) + 1e-12)).all()


def test_a_draw_at_the_very_end_of_a_block_stays_in_it():
    """The block's mass and the running sum within it round differently, and the first token after the block has mass 0."""
    probs = (4 * torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))).softmax(-1)
    probs[:, 128] = 0
    first, second = probs.double().unflatten(1, (2, 128)).sum(-1, keepdim=True).unbind(1)
    u = torch.nextafter(first / (first + second), torch.zeros(()).double())
    tokens, _ = invert(probs, u)
    assert (probs.gather(1, tokens) > 0).all()


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (1.0, 0.9), (0.7, 1.0)])
def test_probabilities_of_bfloat16_logits_are_in_float32(temperature, top_p):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, chances = sample(logits, temperature, top_p, 0, torch.linspace(0.01, 0.99, 50).double())
    p = (logits.double() / temperature).softmax(-1)
    ranked = p.sort(descending=True).values
    kept = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0).sum(-1)
    torch.testing.assert_close(chances, (p.gather(1, tokens[:, None])[:, 0] / kept).log(), atol=1e-5, rtol=0)


def test_greedy_and_a_tiny_temperature_take_the_likeliest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.9]])
    assert draw(logits, 0.0, 1.0, 0, None).tolist() == [1, 0]
    assert draw(logits, 0.0, 0.1, 2, None).tolist() == [1, 0]
    assert draw(logits, 1e-4, 1.0, 0, torch.Generator().manual_seed(0)).tolist() == [1, 0]


@pytest.mark.parametrize("top_p,top_k", [(1.0, 0), (0.9, 0), (1.0, 7)])
def test_a_token_of_probability_zero_is_never_drawn(top_p, top_k):
    logits = torch.full((40,), -torch.inf)
    logits[[3, 4, 20, 36]] = torch.tensor([1.0, 0.5, 0.7, 0.2])                 # zeros first, last and between
    counts = draws(logits, top_p=top_p, top_k=top_k)
    assert {v for v, count in enumerate(counts) if count} <= {3, 4, 20, 36}
    for u in 0.0, 1 - 2**-53:                                                   # the least and the greatest draw
        chosen, _ = sample(logits[None], 1.0, top_p, top_k, torch.tensor([u], dtype=torch.float64))
        assert chosen.item() in {3, 4, 20, 36}


# ---- groups, and the log-probability of what was drawn

def test_samples_of_a_prompt_are_what_its_repeats_would_give():
    """With the same seed, G rows from one prefill get the same tokens as G rows with a prefill each."""
    model = random_model()
    grouped = generate(model, PROMPTS, 12, temperature=1.0, seed=3, samples=3, eos_ids={3, 50, 71})
    repeated = generate(model, [prompt for prompt in PROMPTS for _ in range(3)], 12, temperature=1.0, seed=3,
                        eos_ids={3, 50, 71})
    assert grouped == repeated and len({tuple(row) for row in grouped}) > 10
    assert len({len(row) for row in grouped}) > 1                               # some ended early


def test_a_group_reads_its_prompt_once(monkeypatch):
    model = random_model()
    shapes = count_rows(model, monkeypatch)
    generate(model, PROMPTS[:2], 3, temperature=1.0, seed=1, samples=4)
    assert shapes == [(2, 3), (8, 1), (8, 1)]


@pytest.mark.parametrize("temperature, top_p, top_k", [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 5)])
def test_log_probabilities_are_those_of_the_distribution_that_was_sampled(temperature, top_p, top_k):
    model = random_model()
    answers, chances = generate_with_log_probs(model, PROMPTS, 8, temperature, top_p, top_k, eos_ids={3}, seed=2, samples=2)
    for prompt, answer, chance in zip([p for p in PROMPTS for _ in range(2)], answers, chances, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1].double() / temperature
        for row, token, ours in zip(logits, answer, chance, strict=True):
            p = row.softmax(-1)
            ranked = p.argsort(descending=True).tolist()
            kept = ranked[:top_k or V]
            while top_p < 1 and float(p[kept[:-1]].sum()) >= top_p:
                kept.pop()
            assert token in kept and ours == pytest.approx(math.log(p[token] / p[kept].sum()), abs=2e-5)


def test_greedy_chances_are_certain_and_ids_past_vocab_are_never_drawn():
    model = random_model()
    answers, chances = generate_with_log_probs(model, PROMPTS, 5, temperature=0.0)
    assert answers == generate(model, PROMPTS, 5) and all(chance == 0 for row in chances for chance in row)
    few = generate(model, PROMPTS, 30, temperature=3.0, seed=1, vocab=11)
    assert {token for row in few for token in row} == set(range(11))


# ---- no run of tokens twice

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_run_of_tokens_is_repeated_as_in_transformers(tmp_path, n):
    model = random_model(seed=5)
    save_model(model, tmp_path)
    prompts = [[7, 8, 9, 7, 8], [5], [4, 4, 4, 4]]
    answers = generate(model, prompts, max_new_tokens=30, no_repeat_ngram_size=n)
    assert answers != generate(model, prompts, max_new_tokens=30)               # it repeats itself
    for prompt, answer in zip(prompts, answers):
        row = prompt + answer
        runs = [tuple(row[i:i + n]) for i in range(len(row) - n + 1)]
        assert all(run not in runs[:i] for i, run in enumerate(runs) if i + n > len(prompt))
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs.generation_config.update(pad_token_id=0, eos_token_id=None)
    for prompt, answer in zip(prompts, answers):
        expected = theirs.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=30, no_repeat_ngram_size=n)
        assert answer == expected[0, len(prompt):].tolist()


def test_what_may_not_be_repeated_is_left_out_of_the_distribution_that_is_drawn_from():
    model, prompt = random_model(seed=5), [4, 9, 4]                             # after 4, no second 9
    rows = 4000
    answers, chances = generate_with_log_probs(model, [prompt], 1, 1.0, seed=1, samples=rows, no_repeat_ngram_size=2, vocab=12)
    probs = model(torch.tensor([prompt]))[0, -1, :12].softmax(-1)
    probs[9] = 0.0
    probs /= probs.sum()
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=12)
    assert counts[9] == 0 and (counts / rows - probs).abs().max() < 4 * (0.25 / rows) ** 0.5
    torch.testing.assert_close(torch.tensor(chances)[:, 0], probs.log()[torch.tensor(answers)[:, 0]], atol=1e-5, rtol=0)
    assert generate(model, [[4, 50, 4]], 2, no_repeat_ngram_size=2, vocab=12)   # 50 is no id that could be drawn


# ---- respond

def test_respond_answers_prompts_of_similar_length_together_and_no_two_batches_draw_the_same(monkeypatch):
    model, rows = small(1).eval(), [Encoded([5, 6], [7], False, i) for i in range(3)]
    zero, one = ({tuple(row.response) for row in respond(model, rows, 1, 12, (), seed=seed)} for seed in (0, 1))
    assert len(zero) == len(one) == 3 and not zero & one
    with pytest.raises(ValueError):                                             # two answers for each row: whose is whose?
        respond(model, rows, 1, 12, (), samples=2)
    lengths = []
    monkeypatch.setattr(generation, "generate", lambda model, prompts, *_, **__: (
        lengths.append([*map(len, prompts)]), [[1]] * len(prompts))[1])
    respond(model, [Encoded([5] * n, [7] * (9 - 2 * n), False, n) for n in (3, 1, 4, 2)], 2, 4, ())
    assert lengths == [[1, 2], [3, 4]]


@pytest.mark.parametrize("form", [int, lambda stop: [stop, stop], lambda stop: None])
def test_respond_takes_one_stop_token_several_or_none(form):
    model, rows = random_model(), [Encoded([1, 2], [], False, 0)]
    whole = respond(model, rows, 1, 6, None, temperature=0.0)[0].response
    row, = respond(model, rows, 1, 6, form(whole[2]), temperature=0.0)
    assert (row.response, row.cut) == ((whole, True) if form(0) is None else (whole[:whole.index(whole[2]) + 1], False))


def test_weights_are_laid_out_for_no_more_rows_than_there_are(monkeypatch):
    asked, laid_out = [], generation.laid_out
    monkeypatch.setattr(generation, "laid_out", lambda model, rows, steps: asked.append(rows) or laid_out(model, rows, steps))
    respond(random_model(), [Encoded([1, 2], [], False, i) for i in range(3)], 10**8, 2, {3})
    assert max(asked) == 3


# ---- a step at fixed places, as a CUDA graph replays it

def test_with_graphs_answers_and_log_probabilities_are_those_without():
    model, given = random_model(), dict(temperature=1.0, eos_ids={3, 50, 71}, seed=3, samples=2)
    (answers, chances), (looked, their_chances) = (generate_with_log_probs(model, PROMPTS, 40, graphs=graphs, **given)
                                                   for graphs in (False, True))
    assert looked == answers and len({len(answer) for answer in answers}) > 3              # some end between two looks
    assert their_chances == [pytest.approx(row, abs=1e-4) for row in chances]


def test_with_graphs_rows_leave_by_halves_at_every_look(monkeypatch):
    model = random_model(seed=3)
    free = generate(model, PROMPTS, max_new_tokens=64)
    stops = {free[0][2], free[2][0], free[3][9]}
    lengths = [len(until_stop(answer, stops)) for answer in free]
    shapes = count_rows(model, monkeypatch)
    generate(model, PROMPTS, max_new_tokens=64, eos_ids=stops, graphs=True)
    expected, rows, left = [(5, 8)], 5, lengths
    for done in range(1, 64):
        if done == 1 or done % 16 == 0:
            left = [length for length in left if length > done]
            if not left:
                break
            rows = len(left) if len(left) <= rows // 2 else rows
        expected.append((rows, 1))
    assert shapes == expected and len({rows for rows, _ in shapes}) > 1


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_tokens_from_one_graph_for_all_groups_of_blocks(monkeypatch):
    """torch.compile's tracing, without its code generator."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend, fullgraph=True))
    model = random_model(seed=3, num_hidden_layers=2 * BLOCKS_PER_GRAPH)
    plain = generate(model, PROMPTS, max_new_tokens=40, eos_ids=[60])
    compile_blocks(model)
    for _ in range(3):
        for block in model.model.layers:                                        # as every call on a GPU does
            attention, mlp = block.self_attn, block.mlp
            attention.joined = join([attention.q_proj, attention.k_proj, attention.v_proj])
            mlp.joined = join([mlp.gate_proj, mlp.up_proj])
        assert generate(model, PROMPTS, max_new_tokens=40, eos_ids=[60], graphs=True) == plain
    assert 1 <= len(graphs) <= 3                                                # fewer than blocks; rows left once or twice


# ---- what is given, and what is refused

def test_prompts_may_be_tuples_or_tensors_and_one_stop_a_number():
    model, prompts = random_model(), [[5, 6, 7], [8, 9, 10]]
    answers = generate(model, prompts, 8)
    for given in [(5, 6, 7), (8, 9, 10)], torch.tensor(prompts), [torch.tensor(prompt) for prompt in prompts]:
        assert generate(model, given, 8) == answers
    stop = answers[0][3]
    stopped = generate(model, prompts, 8, eos_ids=[stop])
    for given in (stop, {stop}, torch.tensor([stop]), torch.tensor([stop, stop]), (0 * stop + stop,),
                  torch.tensor(stop), np.int64(stop), np.array([stop])):
        assert generate(model, prompts, 8, eos_ids=given) == stopped != answers
    assert generate(model, prompts, 8, eos_ids=None) == answers


def test_nothing_to_do_gives_nothing():
    model = random_model()
    assert generate(model, []) == []
    assert generate(model, [[1, 2], [3]], max_new_tokens=0) == [[], []]
    assert [len(answer) for answer in generate(model, [[1, 2], [3]], max_new_tokens=1)] == [1, 1]


def test_generation_leaves_the_model_ready_for_training():
    model = random_model()
    generate(model, PROMPTS, max_new_tokens=3)
    model(torch.tensor([[1, 2, 3]])).sum().backward()                           # no inference tensor is left in it
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("options", [dict(samples=0), dict(temperature=-1.0), dict(temperature=math.nan), dict(top_p=0.0),
                                     dict(top_p=1.5), dict(top_k=-1), dict(no_repeat_ngram_size=-1), dict(vocab=0)])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="samples and vocab must be at least 1"):
        generate(random_model(), [[1, 2]], 4, **options)


@pytest.mark.parametrize("token", [-1, 50])
def test_an_id_without_a_row_is_refused(token):
    with pytest.raises(ValueError, match=f"{token} in a prompt is not an id of the model, which has 50"):
        generate(random_model(vocab_size=50), [[1, 2], [3, token, 4]], 2)
    with pytest.raises(ValueError, match="not an id of the model, which has 50"):           # the teacher reads it too
        generate(random_model(vocab_size=60), [[1, 55]], 2, 1.0, teacher=random_model(2, vocab_size=50), mix=0.2)
    generate(random_model(vocab_size=60), [[1, 55]], 2, teacher=random_model(2, vocab_size=50))     # without mix it does not


@pytest.mark.parametrize("prompts", [[1, 2, 3], ["12"], [[1.5]], torch.tensor([1, 2])], ids=str)
def test_what_is_no_list_of_ids_is_refused(prompts):
    with pytest.raises(ValueError, match="prompts must be lists of ids, one list for each prompt"):
        generate(random_model(), prompts)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(random_model(), [[1, 2], []])


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(graphs, temperature):
    model = small(3)
    model.model.norm.weight.data[2] = math.nan
    with pytest.raises(InputError, match="the model's logits are not finite"):
        generate(model, [[5, 6], [7]], 5, temperature, graphs=graphs)
    with pytest.raises(InputError, match="the model's or the teacher's logits"):
        generate(small(3), [[5, 6], [7]], 5, 1.0, graphs=graphs, teacher=model, mix=0.5)


def test_what_follows_a_stop_token_may_be_nan():
    made = object.__new__(Decoding)
    made.alive, made.seen, made.answers, made.answer_logps = [0], 0, [[]], [[]]
    made.drawn, made.logps = torch.tensor([[5], [2], [7]]), torch.tensor([[-1.0], [-1.0], [math.nan]])
    assert made.read(3, frozenset({2})) == [] and made.answers == [[5, 2]]


def test_a_model_that_diverged_gives_tokens_all_the_same():
    """On a GPU an index past the vocabulary would end the process; the loss says what is wrong."""
    for top_p, top_k in (1.0, 0), (0.9, 0), (1.0, 5):
        tokens = draw(torch.full((3, 361), torch.nan), 1.0, top_p, top_k, None)
        assert ((tokens >= 0) & (tokens < 361)).all()
