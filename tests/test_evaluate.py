"""Distances between two models, on references and on answers of their own, against full forwards one row at a time."""
import copy
import itertools
import json
import weakref

import pytest
import torch

from conftest import small
from minikd import evaluate
from minikd.data import Encoded
from minikd.evaluate import answer, answer_and_score, compare, distinct, score_answers, sequence_kl, show_table
from minikd.formats import Example
from minikd.losses import reverse_kl
from minikd.model import Qwen2
from minikd.rouge import rouge_l
from minikd.teacher import Teacher


class Ids:
    """A tokenizer's two numbers, and ids as its text."""
    pad_id, eos_ids = 0, {0}
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))
    encode = staticmethod(lambda text: [int(token) for token in text.split()])


def model(seed: int, **shape) -> Qwen2:
    return small(seed, **dict(vocab_size=3, initializer_range=0.5) | shape).eval().requires_grad_(False)


STUDENT, TEACHER = model(1), model(2, hidden_size=24, num_attention_heads=3)
ROWS = [Encoded([1, 2, 1][:1 + i % 3], [2, 1, 1, 0][:1 + i % 4], False, i) for i in range(11)]


def steps(row):
    """(log q, log p, target) of each response token of one row."""
    logq, logp = (m(torch.tensor([row.prompt + row.response]))[0].double().log_softmax(-1) for m in (STUDENT, TEACHER))
    return [(logq[at - 1], logp[at - 1], (row.prompt + row.response)[at])
            for at in range(len(row.prompt), len(row.prompt) + len(row.response))]


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_means_run_over_all_scored_tokens(batch_size):
    found = [step for row in ROWS for step in steps(row)]
    expected = {"ce": [-float(q[token]) for q, _, token in found],
                "forward_kl": [float((p.exp() * (p - q)).sum()) for q, p, _ in found],
                "reverse_kl": [float((q.exp() * (q - p)).sum()) for q, p, _ in found],
                "agreement": [float(q.argmax() == p.argmax()) for q, p, _ in found]}
    ours = compare(STUDENT, ROWS, 0, batch_size, Teacher(TEACHER), reverse_kl)
    for name, values in expected.items():
        assert ours[name] == pytest.approx(sum(values) / len(values), rel=1e-5), name
    assert ours["kd"] == ours["reverse_kl"]
    alone = compare(STUDENT, ROWS, 0, batch_size)
    assert alone.keys() == {"ce"} and alone["ce"] == pytest.approx(ours["ce"], rel=1e-6)


def test_sequence_kl_is_the_kl_between_whole_answers():
    """The exact sum over all answers, each ended by 0 or after three tokens, against the estimate from 6,000."""
    exact = 0.0
    for y in (y for n in (1, 2, 3) for y in itertools.product(range(3), repeat=n)
              if 0 not in y[:-1] and (y[-1] == 0 or n == 3)):
        found = steps(Encoded([1, 2], list(y), False, 0))
        log_q, log_p = sum(float(q[token]) for q, _, token in found), sum(float(p[token]) for _, p, token in found)
        exact += torch.tensor(log_q).exp().item() * (log_q - log_p)
    ours = sequence_kl(STUDENT, Ids, [Encoded([1, 2], [1], False, 0)] * 6000, Teacher(TEACHER), 2000, 3)
    assert ours == pytest.approx(exact, rel=0.03)
    larger = model(3, vocab_size=60)                                            # it says what the teacher has a row for
    assert 0 < sequence_kl(larger, Ids, ROWS, Teacher(TEACHER), 11, 3) < 100


def test_sequence_kl_is_that_of_answers_that_end_early(monkeypatch):
    own = [Encoded([1, 2], list(y), False, 0) for y in ([0], [1, 2, 0], [2, 0], [1, 1, 1])]
    monkeypatch.setattr(evaluate, "respond", lambda *_, **__: own)
    exact = sum(float((q.exp() * (q - p)).sum()) for row in own for q, p, _ in steps(row)) / len(own)
    assert sequence_kl(STUDENT, Ids, own, Teacher(TEACHER), 3, 3) == pytest.approx(exact, rel=1e-5)


def test_distinct_4_counts_different_runs_of_four_words():
    assert distinct(["a b c d e", "b c d e f"]) == 3 / 4                        # abcd, bcde twice, cdef
    assert distinct(["a b c", ""]) == 0 and distinct(["a b a b a b"], n=2) == 2 / 5
    assert distinct(["x + 1 = y", "x - 1 = y"]) == 1                            # the symbols of code are words
    assert distinct(["a dog", "a dogs"], n=2) == 1 and distinct(["One, two.", "one , TWO ."], n=2) == 1 / 2     # case is not told


def test_answers_are_the_likeliest_tokens_in_the_order_of_the_rows():
    for row, text in zip(ROWS, answer(STUDENT, Ids, ROWS, 5, batch_size=4), strict=True):
        ids = list(row.prompt)
        while len(ids) < len(row.prompt) + 5 and (ids == row.prompt or ids[-1] != 0):
            ids.append(int(STUDENT(torch.tensor([ids]))[0, -1].argmax()))
        assert text == Ids.decode(ids[len(row.prompt):])


@pytest.mark.parametrize("rouge, expected", [("plain", [0.5, 1]), ("stemmer", [1, 1]), ("unicode", [0.5, 0])])
def test_answers_are_scored_in_the_words_that_were_asked_for(rouge, expected):
    examples = [Example((), "", "", right, (right,), "", "") for right in ("the dog", "a o")]
    assert [row["f1"] for row in score_answers(["the dogs", "año"], examples, rouge)] == expected
    [row] = score_answers(["x - 1"], [Example((), "", "", "x + 1", ("x + 1",), "", "")], rouge)
    assert row["exact_match"] == (rouge != "unicode")           # in code the symbols count
    with pytest.raises(ValueError, match="rouge = 'rougeL'"):
        score_answers([], [], "rougeL")


def test_empty_thoughts_are_not_scored_on_either_side():
    response = "<think>\n\n</think>\n\nParis"
    example = Example((), "?", "", response, (response,), "", "d:1")
    for text in "Paris", "\n</think>\n\nParis", "<think>\n</think>Paris":
        [row] = score_answers([text], [example])
        assert (row["f1"], row["exact_match"], row["prediction"], row["references"]) == (1, 1, "Paris", ["Paris"])


def test_an_answer_is_scored_against_its_own_records_reference():
    """Records whose prompts were too long have no rows."""
    examples = [Example((), "", "", str(i), (str(i),), "", "") for i in range(11)]
    for rows in ROWS, ROWS[3:9:2]:
        scores = answer_and_score(STUDENT, Ids, rows, examples, max_new_tokens=2, batch_size=4, rouge="plain")
        assert [score["references"] for score in scores] == [[str(row.index)] for row in rows]


@pytest.mark.parametrize("category", ["model", "information_extraction"])
def test_a_category_may_be_called_as_a_column_of_the_table_and_be_long(tmp_path, capsys, category):
    examples = [Example(({"role": "user", "content": "?"},), "", "", "1", ("1",), category, "")] * len(ROWS)
    show_table({"KD": lambda: STUDENT}, None, Ids, ROWS, examples, tmp_path, max_new_tokens=2, batch_size=5)
    assert json.loads((tmp_path / "table.jsonl").read_text())["model"] == "KD"
    head, *rows = capsys.readouterr().out.splitlines()[2:5]
    assert len({len(line) for line in (head, *rows)}) == 1 and rows[0].startswith(f"{category} ")


def test_the_table_holds_one_model_at_a_time_beside_the_teacher(tmp_path):
    alive = weakref.WeakSet()

    def load():
        assert not alive
        alive.add(model := copy.deepcopy(STUDENT))
        return model

    examples = [Example(({"role": "user", "content": "?"},), "", "", "1", ("1",), "", "")] * len(ROWS)
    columns = show_table(dict.fromkeys("abc", load), Teacher(TEACHER), Ids, ROWS, examples, tmp_path, max_new_tokens=2,
                         batch_size=5)
    assert list(columns) == ["a", "b", "c", "Teacher"] and not alive


def test_the_table_holds_means_over_the_answers_and_distances_to_the_teacher(tmp_path, capsys):
    asked = ({"role": "user", "content": "?"},)
    examples = [Example(asked, "", "", "1 2 1", ("1 2 1",), "ab"[i % 2], "") for i in range(11)]
    columns = show_table({"KD": lambda: STUDENT}, Teacher(TEACHER), Ids, ROWS, examples, tmp_path, max_new_tokens=4, batch_size=5)
    lines = [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()]
    for line, name, said_by in zip(lines, columns, (STUDENT, TEACHER), strict=True):
        held = [json.loads(row) for row in (tmp_path / f"answers-{name.lower()}.jsonl").read_text().splitlines()]
        texts, metrics = answer(said_by, Ids, ROWS, 4, 5), line["metrics"]
        assert line["model"] == name and [row["prediction"] for row in held] == texts
        f1 = [rouge_l(text, "1 2 1")[2] for text in texts]
        for category, part in dict(a=f1[::2], b=f1[1::2], all=f1).items():
            assert line[category] == columns[name][category] == pytest.approx(100 * sum(part) / len(part))
        assert metrics["mean length"] == pytest.approx(sum(len(text.split()) for text in texts) / 11)
        assert metrics["distinct-4"] == distinct(texts)
        assert metrics["exact match"] == pytest.approx(100 * sum(text == "1 2 1" for text in texts) / 11)
        assert metrics["retention"] == pytest.approx(line["all"] / lines[1]["all"])
    metrics, teacher = lines[0]["metrics"], Teacher(TEACHER)
    for name, value in compare(STUDENT, ROWS, 0, 3, teacher).items():
        assert metrics[name] == pytest.approx(value, rel=1e-5)
    assert metrics["sequence KL"] == sequence_kl(STUDENT, Ids, ROWS, teacher, 5, 4)
    assert lines[1]["metrics"].keys() == {"exact match", "mean length", "distinct-4", "retention"}
    printed = capsys.readouterr().out.splitlines()
    head, *rows = printed[2:6]                                                  # and the paper's last column
    assert head.split() == ["KD", "Teacher", "KD", "/", "Teacher"]
    for row, category in zip(rows, columns["KD"], strict=True):
        name, *cells, share = row.split()
        assert name == category and cells == [f"{column[category]:.1f}" for column in columns.values()]
        assert share == f"{columns['KD'][category] / columns['Teacher'][category]:.0%}"
    for name in metrics:                                                        # a line for each below the table
        [line] = [line for line in printed if line.startswith(name.replace("_", " ") + " ")]
        for cell, value in zip(line.removeprefix(name.replace("_", " ")).split(), (metrics[name], lines[1]["metrics"].get(name))):
            assert cell in ("-" if value is None else f"{value:.{digits}f}" for digits in (1, 2, 3)), line
