"""Examples -> ids -> batches: the templates, the lengths, the masks and the order."""
from itertools import chain

import pytest
import torch

from conftest import BUGNET, DOLLY, PYTORRENT
from minikd.data import (Encoded, after_prompt, batch_order, by_length, collate, describe_dropped, encode_examples, encode_text,
                         next_rows, optimizer_steps, prompt_text, steps_per_epoch, without_empty_thoughts)
from minikd.errors import InputError
from minikd.examples import load_examples, split_examples
from minikd.formats import to_example
from minikd.tokenizer import Tokenizer


class Letters:
    """A tokenizer of one id a character; <e> and <p> are its stop and pad."""
    eos_ids, end_id, pad_id = {1, 2}, 1, 0

    def encode(self, text):
        return [ord(letter) for letter in text.replace("<e>", "\x01")]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def chat(self, messages, add_generation_prompt=False):
        return "".join(f"{m['role'][0]}:{m['content']};" for m in messages) + "a:" * add_generation_prompt


# ---- ids

def encode(*pairs, **options):
    examples = [to_example({"instruction": prompt, "response": response}, "d:1") for prompt, response in pairs]
    return encode_examples(examples, Letters(), **options)


def test_a_response_ends_in_the_end_token_and_follows_the_chat_prompt():
    (row,), counts = encode(("hi", "yo"))
    assert "".join(map(chr, row.prompt)) == "u:hi;a:" and row.response == [ord("y"), ord("o"), 1]
    assert not row.cut and row.index == 0 and counts["encoded"] == 1


def test_alpaca_template_is_the_papers_without_chat_markers():
    with_input = prompt_text(to_example({**DOLLY, "context": "Tope swim."}, "d:1"), Letters(), "alpaca")
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nWhich is a fish?\n\n"
        "### Input:\nTope swim.\n\n### Response:\n")
    without = prompt_text(to_example(DOLLY, "d:1"), Letters(), "alpaca")
    assert "### Input" not in without and without.startswith("Below is an instruction that describes a task. Write a")
    with pytest.raises(InputError, match="template 'alpacca' is not known; choose chatml or alpaca"):
        prompt_text(to_example(DOLLY, "d:1"), Letters(), "alpacca")


def test_alpaca_template_words_bugnet_and_pytorrent_as_the_paper_does():
    bug = prompt_text(to_example(BUGNET, "d:1"), Letters(), "alpaca")
    assert "Write a Python program that contains the correction of the code bug" in bug and "TLE" in bug
    assert "solution code" not in bug.lower()
    assert "Write a programming script that appropriately completes the request." in \
        prompt_text(to_example(PYTORRENT, "d:1"), Letters(), "alpaca")


def test_a_sampled_response_is_cut_unless_it_ends_in_a_stop_token():
    row = Encoded([5, 6], [7, 1], False, 3)
    for ids, cut in ([8, 1], False), ([1, 8], True), ([8, 2], False), ([8], True), ([], True):
        assert row.answered(ids, {1, 2}) == Encoded([5, 6], ids, cut, 3)


def test_a_row_is_cut_in_its_response_alone():
    row = Encoded([5] * 4, [7] * 3, False, 0)
    assert row.cut_to(7) is row and row.cut_to(5) == Encoded([5] * 4, [7], True, 0)
    assert row.cut_to(4) == row.cut_to(2) == Encoded([5] * 4, [], True, 0)


def test_long_response_is_cut_without_an_invented_end_and_counted():
    (exact, cut, only_the_end), counts = encode(("h", "123"), ("h", "12345"), ("h", "1234"), max_length=10)
    assert exact.response[-1] == 1 and not exact.cut and len(exact.prompt + exact.response) == 10
    assert "".join(map(chr, cut.response)) == "1234" and cut.cut
    assert "".join(map(chr, only_the_end.response)) == "1234" and only_the_end.cut
    assert counts["responses cut"] == 2


def test_long_prompts_are_dropped_and_counted_and_the_index_still_points_at_the_example():
    rows, counts = encode(("h" * 9, "x"), ("h", "x"), max_prompt_length=6)
    assert [row.index for row in rows] == [1] and counts["dropped: prompt too long"] == 1
    rows, counts = encode(("hhh", "x"), ("h", "x"), max_length=8)               # eight prompt tokens leave no room
    assert [row.index for row in rows] == [1] and counts["dropped: prompt too long"] == 1


def test_a_template_that_renders_nothing_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "chat", lambda *_, **__: "")
    with pytest.raises(InputError, match="a prompt has no tokens; check its chat template"):
        encode_examples([to_example({"instruction": "a", "response": "b"}, "x")], tokenizer)


def test_in_parts_the_rows_are_the_same_and_a_response_without_its_prompt_is_not_tokenized(monkeypatch):
    pairs = [("h" * (1 + i % 5), "x" * i) for i in range(1, 12)]
    whole, counts = encode(*pairs, max_prompt_length=8)
    seen, done, batch = [], [], Letters.encode_batch
    monkeypatch.setattr(Letters, "encode_batch", lambda self, texts: (seen.extend(texts), batch(self, texts))[1])
    monkeypatch.setattr("minikd.data.ENCODED_AT_ONCE", 4)
    assert encode(*pairs, max_prompt_length=8, progress=done.append) == (whole, counts) and done == [4, 4, 3]
    assert counts["dropped: prompt too long"] == 4 and len(seen) == 2 * len(pairs) - 4


def test_response_that_spells_a_stop_token_is_dropped_and_counted():
    rows, counts = encode(("h", "x<e>y"), ("h", "x"))
    assert [row.index for row in rows] == [1] and counts["dropped: stop token inside"] == 1


@pytest.mark.parametrize("prompt, response, learned", [
    ("a<think>", "<think>b</think>c", "b</think>c"), ("a<think>\n", " <think>\nb</think>", "b</think>"),
    ("a<think>\n", "b</think><think>", "b</think><think>"), ("a", "<think>b</think>c", "<think>b</think>c"),
    ("a<think>\n", "<think>b", "b"), ("a<think>\n", "x->think>0", "\n</think>\n\nx->think>0"),
    ("a<think>\n", "b", "\n</think>\n\nb"), ("a", "b", "b")])
def test_thoughts_that_the_prompt_begins_are_not_begun_again(monkeypatch, prompt, response, learned):
    monkeypatch.setattr(Letters, "chat", lambda self, messages, add_generation_prompt: prompt)
    (row,), _ = encode(("ignored", response))
    assert "".join(map(chr, row.response[:-1])) == learned


def test_an_answer_that_was_taught_without_thoughts_is_scored_without_their_end():
    assert without_empty_thoughts(after_prompt("b", "a<think>\n")) == without_empty_thoughts("<think>\n\n</think>\n\nb") == "b"
    for text in "b", "b</think>c", "<think>b</think>c":
        assert without_empty_thoughts(text) == text


def test_nothing_left_is_an_error():
    with pytest.raises(InputError, match="none of 1 examples can be used .*; of the too long, the shortest has 10 tokens: raise"):
        encode(("hello", "x"), max_prompt_length=3)
    with pytest.raises(InputError, match="of the too long, the shortest has 24 tokens"):             # not of those that fit
        encode(("hello", "<e>"), ("hello, hello, hello", "x"), ("hello " * 9, "x"), max_prompt_length=12)


def test_what_was_dropped_is_told_and_nothing_else():
    none = {"encoded": 3, "responses cut": 2, "dropped: prompt too long": 0, "dropped: stop token inside": 0}
    assert describe_dropped(none) == ""
    assert describe_dropped(none | {"dropped: prompt too long": 1200}) == "1,200 dropped: prompt too long"


# ---- batches

def rows_of(*lengths):
    return [Encoded([5] * p, [7] * r, False, i) for i, (p, r) in enumerate(lengths)]


def test_the_mask_is_true_on_response_tokens_only_even_where_they_equal_the_pad():
    rows = [Encoded([0, 5], [0, 1], False, 0), Encoded([5], [7, 8, 9, 1], False, 1)]
    ids, mask = collate(rows, pad_id=0)
    assert ids.tolist() == [[0, 5, 0, 1, 0], [5, 7, 8, 9, 1]] and ids.dtype == torch.int64
    assert mask.tolist() == [[False, False, True, True, False], [False, True, True, True, True]] and mask.dtype == torch.bool


def test_batches_are_made_on_the_cpu_whatever_the_default_device():
    torch.set_default_device("meta")                                            # as of a program that has set "cuda"
    try:
        ids, mask = collate([Encoded([1, 2], [3], False, 0)], pad_id=0)
    finally:
        torch.set_default_device(None)
    assert ids.tolist() == [[1, 2, 3]] and mask.tolist() == [[False, False, True]]


@pytest.mark.parametrize("count, size", [(1, 4), (4, 4), (10, 4), (1000, 7), (1000, 1)])
def test_each_example_comes_once_an_epoch_and_the_partial_batch_is_kept(count, size):
    order = batch_order(rows_of(*[(i % 50 + 1, 1) for i in range(count)]), size, seed=0, epoch=0)
    assert sorted(chain(*order)) == list(range(count))
    assert sorted(map(len, order))[1:] == [size] * (len(order) - 1) and len(order) == -(-count // size)


def test_batches_are_random_and_only_within_them_lengths_are_sorted():
    """A short answer's tokens must not weigh more because all others in its batch are short, too: batches differ in their
    number of tokens as random ones do."""
    rows = rows_of(*[((37 * i) % 200 + 1, 1) for i in range(800)])              # lengths 2..201, four of each
    lengths = [[len(rows[i].prompt) + 1 for i in batch] for batch in batch_order(rows, 8, seed=0, epoch=0)]
    assert all(batch == sorted(batch) for batch in lengths)
    means = [sum(batch) / 8 for batch in lengths]
    spread = (sum((mean - 101.5) ** 2 for mean in means) / len(means)) ** 0.5
    assert spread == pytest.approx(57.7 / 8 ** 0.5, rel=0.25)                   # the deviation of a length, over √8


def test_order_differs_by_seed_and_epoch_and_is_the_same_in_every_process():
    rows = rows_of(*[(i % 5 + 1, 1) for i in range(40)])
    order = batch_order(rows, 4, seed=3, epoch=1)
    assert order == batch_order(rows, 4, seed=3, epoch=1)
    assert order != batch_order(rows, 4, seed=3, epoch=2) and order != batch_order(rows, 4, seed=4, epoch=1)
    assert {frozenset(batch) for batch in order} != {frozenset(batch) for batch in batch_order(rows, 4, 3, 2)}
    assert order == [[31, 32, 12, 24], [21, 7, 34, 29], [5, 25, 2, 28], [37, 3, 33, 38], [26, 18, 23, 4], [30, 36, 22, 19],
                     [16, 27, 13, 9], [15, 35, 1, 8], [20, 0, 6, 11], [10, 17, 14, 39]]        # whatever PYTHONHASHSEED is
    split = split_examples([to_example({"instruction": f"q{i}", "response": "r"}, "d:1") for i in range(30)], 5, 0)[1]
    assert [example.instruction for example in split] == ["q1", "q4", "q7", "q21", "q25"]


def test_passes_that_only_read_take_the_shortest_rows_first():
    assert by_length(rows_of((1, 3), (4, 4), (1, 1), (2, 2), (1, 2)), 2) == [[2, 4], [0, 3], [1]]


@pytest.mark.parametrize("start", range(7))
def test_a_step_is_a_batch_of_its_epoch_in_micro_batches_wherever_the_run_began(start):
    rows = rows_of(*[(i + 1, 1) for i in range(7)])                             # epochs of 4 + 3 rows
    orders = [order for epoch in range(3) for order in batch_order(rows, 4, seed=5, epoch=epoch)]
    assert steps_per_epoch(7, 2, 2) == 2 and steps_per_epoch(8, 2, 2) == 2 and steps_per_epoch(9, 2, 2) == 3
    want = [(step, [[rows[i] for i in orders[step][at:at + 2]] for at in range(0, len(orders[step]), 2)])
            for step in range(start, 6)]
    assert list(optimizer_steps(rows, start, 6, batch_size=2, grad_accum=2, seed=5)) == want


def test_an_endless_stream_holds_each_row_once_a_turn_however_it_is_cut():
    rows = rows_of(*[(i + 1, 1) for i in range(5)])
    stream = [row.index for turn in range(20) for row in next_rows(rows, turn, 1, seed=2)]
    assert all(sorted(stream[at:at + 5]) == list(range(5)) for at in range(0, 20, 5)) and stream[:5] != stream[5:10]
    assert [row.index for turn in range(2) for row in next_rows(rows, turn, 8, seed=2)] == stream[:16]
    assert [row.index for row in next_rows(rows, 0, 20, seed=3)] != stream


# ---- plain text

def test_plain_text_is_scored_whole_and_once_in_windows():
    rows = encode_text(["abcdefgh", "xy", ""], Letters(), max_length=4)
    assert [(row.prompt, row.response) for row in rows] == [
        ([0], [97, 98, 99]), ([99], [100, 101, 102]), ([102], [103, 104, 0]), ([0], [120, 121, 0]), ([0], [0])]
    assert [row.index for row in rows] == [0, 0, 0, 1, 2] and [row.cut for row in rows] == [True, True, False, False, False]
    with pytest.raises(ValueError, match="max_length = 1: a row needs"):
        encode_text(["ab"], Letters(), max_length=1)


# ---- real data

def test_real_records_through_the_real_tokenizer_come_back_as_text(shared):
    qwen = Tokenizer.load(shared / "qwen2-tokenizer")
    examples, _ = load_examples(shared / "dolly-sample.jsonl")
    rows, counts = encode_examples(examples, qwen, template="alpaca", max_length=200)
    assert counts["encoded"] == len(rows) > 0
    ids, mask = collate(rows, pad_id=151643)
    for row, line, own in zip(rows, ids, mask):
        said = qwen.decode(line[own].tolist())
        assert examples[row.index].response.startswith(said) if row.cut else said == examples[row.index].response
        assert qwen.decode(line[~own].tolist()) == prompt_text(examples[row.index], qwen, "alpaca")
