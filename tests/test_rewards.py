"""Rewards by examples written by hand; the loopholes of open-r1's format reward beside what they are paid here."""
import itertools
import math
import random
import re
from types import SimpleNamespace

import pytest

from minikd import rewards, sandbox
from minikd.errors import InputError
from minikd.rewards import (REWARDS, answer_part, answer_reward, code_reward, combine, extract_code, format_fault,
                            format_reward, length_reward, load_rewards, repetition_reward, reward_files, steps_reward,
                            summary, tags_reward, think_part)

GOOD = "<think>\nStep 1: 3+4=7\n</think>\n<answer>\n7\n</answer>"
TAGS = "<think>", "</think>", "<answer>", "</answer>"


def one(reward, completion, problem=None, **options):
    [value] = reward([completion], [problem or {}], **options)
    return value


def steps_in(thoughts):
    """Hits, of three, in these thoughts."""
    return round(3 * one(steps_reward, f"<think>\n{thoughts}\n</think>\nx"))


def block(code, mark="python"):
    return f"```{mark}\n{code}\n```"


def says(code):
    return f"<think>\nhm\n</think>\n<answer>\n{code}\n</answer>"


# ---- the parts

def test_thoughts_are_the_first_closed_pair():
    assert think_part(GOOD) == "Step 1: 3+4=7"
    assert think_part("<think>a</think> b <think>c</think>") == "a"
    for text in "", "a", "<think>a", "a</think>", "</think>a<think>":
        assert think_part(text) is None


@pytest.mark.parametrize("text, answer", [
    (GOOD, "7"),
    ("<think>a</think> 7 ", "7"),
    ("<think>a</think>", ""),
    ("a</think>7", "7"),                                                # the prompt may have opened the thoughts
    ("<answer>7</answer>", "7"),
    ("<think><answer>6</answer></think><answer>7</answer>", "7"),       # what is drafted in the thoughts is no answer
    ("<think><answer>6</answer></think>7", "7"),
    ("<think>a</think>It is <answer>7</answer>.", "7"),
    ("<think>a</think>6<think>b</think>7", "7"),
    ("<think>a</think><answer>7", "<answer>7"),                         # cut: not the text 7
    ("<think>a</think><answer>6</answer><answer>7</answer>", "<answer>6</answer><answer>7</answer>"),
    ("<think>a</think></answer>7<answer>", "</answer>7<answer>"),
    ("7", None),
    ("", None),
    ("<think>a <answer>7</answer>", None),                              # the thoughts never end
    ("<think>a</think>6<think>7", None),
    ("<answer>6</answer><answer>7</answer>", None),
])
def test_the_answer_stands_in_its_tags_or_after_the_thoughts(text, answer):
    assert answer_part(text) == answer


@pytest.mark.parametrize("text, code", [
    ("```python\na = 1\n```", "a = 1\n"),
    ("```py\na\n```", "a\n"),
    ("```Python3 title=x\na\n```", "a\n"),
    ("```\na\n```", "a\n"),
    ("So:\n```python\na\n\n  b\n```\nDone.", "a\n\n  b\n"),
    ("```python\r\na\r\n```\r\n", "a\r\n"),
    ("```python\nfirst\n```\nno:\n```python\nsecond\n```", "second\n"),
    ("```python\nfirst\n```\n```python\ncut", "first\n"),               # a block that is not closed is none
    ("```python\ns = '''\n    ```\n'''\n```", "s = '''\n    ```\n'''\n"),
    ("1. So:\n\n   ```python\n   def f():\n       return 1\n\n   ```\n2. Done.", "def f():\n    return 1\n\n"),   # in a list
    ("- So:\n\t```python\n\ta\n```\nDone.", "a\n"),
    ("````python\n```\na\n```\n````", "```\na\n```\n"),                 # as in CommonMark
    ("```\na\n```python\nb\n```", "a\n```python\nb\n"),                # a fence with a language opens a block, and closes none
    ("```cpp\nint x;\n```", None),
    ("```c++\nint x;\n```", None),
    ("```python\nfirst\n```\n```cpp\nint x;\n```", None),               # the last block is the answer, whatever it is
    ("```python\n```", None),
    ("a = `1`", None),
    ("```a```", None),
    ("", None),
])
def test_code_is_the_last_fenced_block(text, code):
    assert extract_code(text) == code


# ---- form

@pytest.mark.parametrize("text, fault", [
    (GOOD, None),
    (GOOD + "\n", None),
    ("<think>a</think>7", None),
    ("<think>a\nb\n</think>\n\n7\n", None),
    ("<think>a</think><answer>7</answer>", None),
    ("", "no tags"),
    ("7", "no tags"),
    ("<think>a", "its tags are <think>"),
    ("So <think>a</think>7", "text before <think>"),
    ("\n<think>a</think>7", "text before <think>"),
    ("</think>7<think>", "its tags are </think> <think>"),
    ("<think>\n \n</think>7", "no thoughts"),
    ("<think>a</think>\n", "no answer"),
    ("<think>a</think><answer>\n</answer>", "no answer"),
    ("<think>a</think><answer>7", "its tags are <think> </think> <answer>"),
    ("<think>a</think><answer>7</answer> done", "text outside the tags"),
    ("<think>a</think>so <answer>7</answer>", "text outside the tags"),
    ("<think>a</think><answer>6</answer><answer>7</answer>",
     "its tags are <think> </think> <answer> </answer> <answer> </answer>"),
    ("<Think>a</Think>7", "no tags"),
])
def test_format_is_thoughts_and_then_an_answer(text, fault):
    assert format_fault(text) == fault and one(format_reward, text) == (fault is None)


def open_r1_format(text):
    """rewards.py line 87."""
    pattern = r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$"
    return bool(re.match(pattern, text, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("text", [
    GOOD + "\nand more text",
    "<think>\na\n</think>\n<think>\nb\n</think>\n<answer>\n7\n</answer>",
    GOOD + "\n" + GOOD,
    "<think>\na\n</think>\n<answer>\n6\n</answer>\n<answer>\n7\n</answer>",
])
def test_the_loopholes_of_multiline_are_closed(text):
    assert open_r1_format(text) and one(format_reward, text) == 0
    assert open_r1_format(GOOD) and one(format_reward, GOOD) == 1


def slow_format(text):
    """A second way: the text as a list of its tags and of what is between them."""
    parts = [part for part in re.split("(</?(?:think|answer)>)", text) if part.strip()]
    words = [part if part in TAGS else "text" for part in parts]
    shapes = (["<think>", "text", "</think>", "text"],
              ["<think>", "text", "</think>", "<answer>", "text", "</answer>"])
    return text.startswith("<think>") and words in shapes


def test_format_agrees_with_a_second_implementation_on_tag_soup():
    rng, right = random.Random(0), 0
    pieces = [*TAGS, "a", "b\nc", "\n", " ", "<", "think>"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(20_000)]
    texts += ["".join(x) for n in range(7) for x in itertools.product(["<think>", "</think>", "a\n", "\n"], repeat=n)]
    for _ in range(5_000):                                              # a good one, damaged in a place or in none
        parts = ["<think>", "a", "</think>", "<answer>", "7", "</answer>"]
        for _ in range(rng.randint(0, 2)):
            parts[rng.randrange(6)] = rng.choice(pieces)
        texts.append("".join(parts))
    for text in texts:
        assert one(format_reward, text) == slow_format(text), text
        if slow_format(text):
            assert think_part(text) and answer_part(text)
            right += 1
    assert right > 500


@pytest.mark.parametrize("text, value", [
    (GOOD, 1), ("", 0), ("<think>\na", 0.25), ("<think>a</think>7", 0), ("<think>\na\n</think>\n7", 0.5),
    (GOOD + GOOD, 0),                                                   # every tag twice; the </think> as well
    (GOOD + "\n</answer>", 0.75), ("\n</think>\n<answer>\n", 0.5),      # one line break may serve two tags
])
def test_tags_pays_a_quarter_for_each_that_is_there_once(text, value):
    assert one(tags_reward, text) == value


@pytest.mark.parametrize("thoughts, hits", [
    ("Step 1: a\nStep 2: b\nStep 3: c", 3),
    ("Step 1 a\nStep 2 b", 2),                                          # the colon may be missing
    ("We do Step 1: a, then Step 2: b", 2),
    ("1. a\n2. b\n3. c", 3),                                            # open-r1 counts the first line of a text alone
    ("- a\n- b\n* c", 3),
    ("First, a. Second, b. Next, c. Finally, d.", 3),                   # 1 is the most there is
    ("First a, Next b", 0),
    ("Step 1: Step 1: Step 1:", 1),                                     # said again, it counts once
    ("First, First, First,", 1),
    ("1.\n1.\n1.", 1),
    ("- a\n- a\n- a", 1),
    ("-\n-\n-", 0),
    ("---\n-5\n**bold**\n*x*", 0),
    ("3.14\n2.71\n1.41", 0),
    ("a 1. b 2. c", 0),
    ("Steps 1, Step A, step 1, FirstStep 1", 0),
    ("no marker", 0),
])
def test_steps_counts_different_markers(thoughts, hits):
    assert steps_in(thoughts) == hits


def test_steps_outside_the_thoughts_do_not_count():
    steps = "Step 1: a\nStep 2: b\nStep 3: c"
    assert one(steps_reward, f"<think>\nhm\n</think>\n{steps}") == 0
    assert one(steps_reward, f"{steps}<think>\nStep 1: a\n</think>\n{steps}") == 1 / 3
    assert one(steps_reward, steps) == 0
    assert one(steps_reward, f"<think>\n{steps}") == 0                  # never closed
    assert one(steps_reward, f"<think>\n{steps}\n</think>") == 1


# ---- length and repetition

@pytest.mark.parametrize("margin", [20, 0])                             # without a margin it is a wall
def test_length_is_eq_13_of_dapo(margin):
    def paper(n, longest, cache):
        return 0 if n <= longest - cache else ((longest - cache) - n) / cache if n <= longest else -1
    for n in range(130):
        assert one(length_reward, "x" * n, max_length=100, margin=margin) == paper(n, 100, margin)


@pytest.mark.parametrize("text, value", [
    ("", 0), ("a b", 0), ("a b c", 0), ("a b c d e f", 0),
    ("a a a a", -1 / 2),                                                # aaa twice
    ("A b C a B c", -1 / 4),                                            # abc bca cab abc
    ("a " * 102, -99 / 100),
])
def test_repetition_is_the_share_of_word_trigrams_said_before(text, value):
    assert one(repetition_reward, text) == pytest.approx(value)
    assert math.copysign(1, one(repetition_reward, "a b c")) == 1       # 0, not -0


def test_repetition_takes_other_lengths_and_penalties():
    assert one(repetition_reward, "a b a b", n=2, max_penalty=-0.3) == pytest.approx(-0.1)


# ---- answers

SAME = [                                                # said, gold
    # numbers
    ("42", "42"), ("42", " 42\n"), ("1,000", "1000"), ("1000.0", "1,000"), ("1E3", "1000"), ("-7", "-7.0"), ("+7", "7"),
    (".5", "0.50"), ("5.", "5"), ("-0", "0"), ("**42**", "42"), ("(1,2)", "(1, 2)"), ("x=3", "3"), ("**5**.", "5"),
    ("Answer: 34", "34"), ("#### 72", "72"), ("Final answer is: 3", "3"), ("1 - 2", "1-2"), ("\u22123", "-3"),
    ("9" * 5000, "9" * 5000 + ".0"),
    # fractions
    ("1/2", "0.5"), ("1/0", "1/0"), (r"$\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"), ("63/400", r"\frac{63}{400}"),
    (r"\dfrac{63}{400}", r"\tfrac{63}{400}"), (r"-\frac{1}{2}", "-.5"), (r"\frac{3}{4}.", "0.75"), ("0.75", r"\(\frac{3}{4}\)."),
    (r"\frac12", "0.5"), (r"\dfrac1{12}", "1/12"), (r"\frac{3}4", ".75"), ("1 / 2", "1/2"), ("1 /2", ".5"),
    (r"\frac{x}{2}", "x/2"), (r"1\frac{1}{2}", r"1\frac{1}{2}"), (r"\frac {1}{2}", "1/2"), (r"\frac 12", ".5"),
    # LaTeX
    (r"so \boxed{42}", "42"), ("$42$", "42"), ("$42", "$42.0$"), ("12345", "12{,}345"), (r"\(42\)", "42"),
    (r"\$5.00", "5"), (r"\left(1,2\right)", "(1,2)"), (r"2\sqrt{3}", r"2 \sqrt 3"), (r"\sqrt2", r"\sqrt{2}"), ("3", "$x = 3$"),
    (r"\begin{pmatrix} 1 & 0 \\ 2 & 1 \end{pmatrix}", r"\begin{pmatrix}1&0\\2&1\end{pmatrix}"), (r"10\,000", "10000"),
    ("$5$.", "5"), ("2^{3}", "2^3"), ("11_8", "11_{8}"), (r"\boxed {7}", "7"), (r"\(x = 3\)", "3"),
    # units, and text in LaTeX
    ("18", r"18 \text{ cm}"), ("Tuesday", r"\text{Tuesday}"), ("25", r"25\%"), ("60", r"60^\circ"),
    (r"\frac{1}{2}\text{ cm}", "0.5"), (r"5\text{ cm}^2", "5"), (r"5\text{ cm}^{2}", r"5 \text{ m}"), (r"120\degree", "120"),
    (r"2\mathrm{n}^2", "2n^2"), (r"2\mathrm{m}^2", "2"), (r"2\text{ s}", "2"),
    # words
    ("Paris", "Paris"), ("nan", "nan"), ("*", "*"), ("Paris.", "Paris"), ("a - b", "a-b"),
]
OTHER = [
    # numbers
    ("43", "42"), ("", "42"), ("١٢", "12"), ("1,00", "100"), ("0.1", "0.10000000000000001"),
    ("9007199254740993", "9007199254740992"), ("1e9999", "1"), ("1e999999999999", "1"), ("sNaN", "1"), ("42 apples", "42"),
    ("6 7", "67"), ("41, 42, 43", "42"), ("1 2", "12"), ("2**3", "23"), ("1, 2", "12"), ("1, 234", "1234"), ("x == 3", "3"),
    ("dx=3", "3"), (".5", "5"), ("Answers: 3", "3"), ("0.333...", "0.333"), ("1 -2", "1-2"), ("1 .5", "1.5"),
    ("1" + 40_000 * " " + "2", "12"),
    # fractions
    ("1/0", "2/0"), ("1/2/3", "1/6"), (r"\frac{1}{2}.5", "1/2.5"), (r"\frac12", "1/12"), (r"\frac123", "1/23"),
    (r"\frac{x+1}{2}", "x+1/2"), ("5.5", r"1\frac{1}{2}"),
    # LaTeX
    (r"\boxed{42} or \boxed{43}", "42"), (r"\boxed{}", "42"), (r"42 \boxed{", "42"),
    (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1 2\end{pmatrix}"), ("2^{30}", "2^30"), (r"\leftarrow", "arrow"),
    # units, and text in LaTeX
    (r"\frac{3}4", "75%"), ("cm", r"18 \text{ cm}"), ("25%", "26"), (r"\text{A}, \text{C}", r"\text{A}, \text{B}"),
    (r"n\text{ is even}", r"n\text{ is odd}"), (r"\mathrm{H}_2\mathrm{O}", r"\mathrm{H}_2\mathrm{S}"), ("%", "*"),
    (r"2\mathrm{e}^3", "2"), (r"2\mathrm{n}^2", "2"),
    # words
    ("paris", "Paris"), ("", "*"), ("the answer", "answer"), ("New York", "NewYork"),
]


def test_answers_are_equal_as_texts_or_as_numbers():
    for pairs, right in (SAME, 1), (OTHER, 0):
        for said, gold in pairs:
            for completion in f"<think>a</think><answer>{said}</answer>", f"<think>a</think>\n{said}\n":
                assert one(answer_reward, completion, {"answer": gold}) == right, (said, gold)


def test_an_answer_that_is_not_marked_is_none():
    gold = {"answer": "42"}
    for text in "42", "", "<think>42", "<think>so <answer>42</answer>", "<answer>41</answer><answer>42</answer>":
        assert one(answer_reward, text, gold) == 0
    assert one(answer_reward, "<answer>42</answer>", gold) == 1
    assert one(answer_reward, r"It is $\boxed{41}$, no, $\boxed{42}$.", gold) == 1            # open-r1's form
    for text in r"<think>\boxed{42}", r"<think>\boxed{42}</think>", r"<answer>\boxed{42}":
        assert one(answer_reward, text, gold) == 0


def test_without_a_right_answer_nobody_is_judged():
    facts = [{"answer": "7"}, {}, {"answer": None}, {"answer": " "}, {"answer": ""}]
    assert answer_reward([GOOD, GOOD, "x", "<think>a</think>", "<think>a</think>x"], facts) == [1, None, None, None, None]


# ---- code, in the sandbox

DOUBLE = {"tests": [{"input": "3\n", "output": "6\n"}, {"input": "5\n", "output": "10\n"}], "time_limit": 5.0,
          "language": "python"}
LINES = {"tests": [{"input": "2\n", "output": "1\n2\n"}]}
RIGHT = "print(2 * int(input()))"


@pytest.mark.parametrize("completion, problem, value", [
    (says(block(RIGHT)), DOUBLE, 1),
    (says(block(RIGHT, "")), DOUBLE, 1),
    (block(RIGHT), DOUBLE, 1),                                          # no thoughts: `format` pays those
    ("<think>a</think>" + block(RIGHT), DOUBLE, 1),
    (says("It is " + block(RIGHT)), DOUBLE, 0),                         # a fence begins its line, or it is none
    (says(block("print(3 * int(input()))")), DOUBLE, 0),
    (says(block("print(6)")), DOUBLE, 0),                               # one test of two
    (says(block("print(' ', 2 * int(input()), ' \\n')")), DOUBLE, 1),   # blanks
    (says(block("print(1)")), LINES, 0),                                # the first line alone
    (says(block(RIGHT + "\nexit(1)")), DOUBLE, 0),                      # right, then a failure
    (says(block("import sys; sys.exit(0)")), DOUBLE, 0),
    (says(block("print(2 *")), DOUBLE, 0),
    (says(RIGHT), DOUBLE, 0),                                           # no block
    (says(block("int main() {}", "cpp")), DOUBLE, 0),
    (says(block("print()") + "\nNo:\n" + block(RIGHT)), DOUBLE, 1),     # the last counts
    (says(block(RIGHT) + "\nNo:\n" + block("print()")), DOUBLE, 0),
    (f"<think>\n{block(RIGHT)}\n</think>\nSee above.", DOUBLE, 0),      # not what stands in the thoughts
    (f"<think>\n{block(RIGHT)}", DOUBLE, 0),
    (f"<answer>\n{block('print()')}\n</answer>\n{block(RIGHT)}", DOUBLE, 0),       # nor what follows the answer's tags
    (says(block(RIGHT)), {}, None),
    (says(block(RIGHT)), {"tests": []}, None),
    (says(block(RIGHT)), {"tests": None}, None),
    (says(block(RIGHT)), {**DOUBLE, "language": "cpp"}, None),
    (says("nothing"), {**DOUBLE, "language": "cpp"}, None),
])
def test_code_is_right_when_it_passes_every_test(completion, problem, value):
    assert one(code_reward, completion, problem) == value


def test_a_test_that_no_program_can_pass_is_left_out():
    large = {"input": "", "output": "9 " * sandbox.OUTPUT}
    program = block("print(7)")
    assert code_reward([program, program], [{"tests": [large]}, {"tests": [large, {"input": "", "output": "7"}]}]) == [None, 1.0]


def test_an_endless_loop_fails_its_own_test_only():
    program = "n = int(input())\nwhile n == 3: pass\nprint(2 * n)"
    problem = {**DOUBLE, "time_limit": 0.7}
    assert [one(REWARDS[name], says(block(program)), problem) for name in ("code", "code_partial")] == [0, 0.5]
    assert one(code_reward, says(block(program)), {**DOUBLE, "time_limit": 60}, max_seconds=0.7) == 0


def test_partial_credit_ends_with_the_round_in_which_a_program_has_been_stopped_twice(monkeypatch):
    """What it did not run counts as failed. An exception stops nothing but its own test. All print the right output."""
    statuses, asked = [], []
    monkeypatch.setattr(sandbox, "run_programs", lambda jobs: (asked.extend([len(jobs)] if jobs else []), [
        SimpleNamespace(status=statuses[int(job[1])], stdout="1", stderr="") for job in jobs])[1])
    problem = {"tests": [{"input": str(i), "output": "1"} for i in range(10)]}
    for stops, rounds, passed in (({0: "timeout", 1: "output"}, [1, 1], 0), ({0: "timeout"}, [1, 1, 2, 4, 2], 9),
                                  ({1: "timeout", 2: "disk"}, [1, 1, 2], 2), ({0: "error", 1: "error"}, [1, 1, 2, 4, 2], 8)):
        rewards._DONE.clear()
        asked.clear()
        statuses[:] = [stops.get(i, "ok") for i in range(10)]
        assert one(code_reward, says(block("x")), problem, partial=True) == passed / 10 and asked == rounds


# ---- code, the sandbox counted

@pytest.fixture(autouse=True)
def nothing_remembered():
    rewards._DONE.clear()
    yield
    rewards._DONE.clear()


@pytest.fixture
def calls(monkeypatch):
    """What run_programs was asked for; its programs print their own text and the stdin."""
    seen = []
    def run_programs(jobs):
        seen.append(jobs)
        return [SimpleNamespace(status="ok", stdout=job[0] + job[1], stderr="", seconds=0) for job in jobs]
    monkeypatch.setattr(sandbox, "run_programs", run_programs)
    return seen


def test_completions_run_side_by_side_the_same_run_once_and_none_after_it_failed(calls):
    problem = {"tests": [{"input": "x", "output": "a\nx"}, {"input": "y", "output": "a\ny"}]}
    other = {"tests": [{"input": "x", "output": "b\nx"}]}
    completions = [says(block("a")), says(block("a")), says("none"), says(block("b")), says(block("b"))]
    assert code_reward(completions, [problem] * 3 + [problem, other]) == [1, 1, 0, 0, 1]
    asked = [[job[:2] for job in jobs] for jobs in calls if jobs]
    assert asked == [[("a\n", "x"), ("b\n", "x")], [("a\n", "y")]]             # b failed its first test of the two
    assert code_reward(completions, [problem] * 3 + [problem, other]) == [1, 1, 0, 0, 1]
    assert not any(calls[2:])                                                   # all of it is remembered


def test_when_too_much_is_remembered_all_is_forgotten_and_run_again(calls):
    job = [says(block("a"))], [{"tests": [{"input": "x", "output": "a\nx"}]}]
    assert code_reward(*job) == [1] and len(calls) == 1
    rewards._DONE.update({(i,): None for i in range(50_000)})
    assert code_reward(*job) == [1] and len(calls) == 2 and len(rewards._DONE) == 1


def test_rounds_grow_and_reach_every_test(calls):
    problem = {"tests": [{"input": str(i), "output": f"a\n{i}"} for i in range(11)]}
    assert one(code_reward, says(block("a")), problem) == 1
    assert [len(jobs) for jobs in calls] == [1, 1, 2, 4, 3]
    problem["tests"][10]["output"] = "no"
    assert one(code_reward, says(block("a")), problem) == 0
    assert one(code_reward, says(block("a")), problem, partial=True) == pytest.approx(10 / 11)


def test_the_limits_are_the_problems_and_are_capped(calls):
    test = [{"input": "", "output": ""}]
    limits = [{}, {"time_limit": 1.5, "memory_limit": 256.0}, {"time_limit": 60, "memory_limit": 4096},
              {"memory_limit": 4}, {"time_limit": None, "memory_limit": None}]
    code_reward([says(block(str(i))) for i in range(5)], [{"tests": test} | limit for limit in limits], max_seconds=4.0)
    given = [job[2:] for job in calls[0]]
    assert given == [(4, 512), (1.5, 256), (4, 512), (4, 64), (4, 512)]
    code_reward([says(block("a"))], [{"tests": test}])
    assert calls[1][0][2] == 5


def test_a_program_that_prints_much_is_not_remembered(calls, monkeypatch):
    short, long = "a", "b" * 10_000
    for program in short, short, long, long:
        code_reward([says(block(program))], [{"tests": [{"input": "x", "output": program + "\nx"}]}])
    assert [len(jobs) for jobs in calls if jobs] == [1, 1, 1]
    noisy = [SimpleNamespace(status="error", stdout="", stderr="!" * 10_001)]
    monkeypatch.setattr(sandbox, "run_programs", lambda jobs: noisy[:len(jobs)])
    code_reward([says(block("c"))], [{"tests": [{"input": "x", "output": "c"}]}])
    assert [result.stdout for result in rewards._DONE.values()] == ["a\nx"]


def test_a_program_that_ran_into_a_limit_is_run_again(monkeypatch):
    """On a busy machine it may have been the machine's fault."""
    for status in "timeout", "memory", "output", "disk":
        late = [SimpleNamespace(status=status, stdout="", stderr="")]
        monkeypatch.setattr(sandbox, "run_programs", lambda jobs: late[:len(jobs)])
        assert one(code_reward, says(block(status)), {"tests": [{"input": "x", "output": "c"}]}) == 0
    assert not rewards._DONE


def test_the_tests_of_one_input_may_want_two_outputs(calls):
    problem = {"tests": [{"input": "x", "output": "a\nx"}, {"input": "x", "output": "no"}]}
    assert one(code_reward, says(block("a")), problem, partial=True) == 0.5
    assert len(calls[0]) == 1


def test_every_reward_gives_a_value_a_completion(calls):
    for name, reward in REWARDS.items():
        assert reward([], []) == []
        values = reward([GOOD, "", "x"], [{"answer": "7"}, {}, DOUBLE])
        assert len(values) == 3 and all(value is None or isinstance(value, float) for value in values), name


# ---- several rewards

def test_combine_is_the_weighted_sum_of_those_that_judged():
    values = {"code": [1.0, None, 0.0, None], "format": [1.0, 1.0, 0.0, None]}
    assert combine(values, {"code": 1.0, "format": 0.1}) == [1.1, 0.1, 0.0, None]
    assert combine({"code": []}, {"code": 1.0}) == []


def test_combine_refuses_columns_of_different_lengths():
    with pytest.raises(ValueError):
        combine({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1.0, "b": 1.0})


def test_summary_is_over_what_was_judged():
    found = summary({"code": [1.0, None, 0.0, None], "format": [1.0, 1.0], "none": [None], "empty": []})
    expected = {"code": (0.5, 0.5, 0.5), "format": (1, 0, 0), "none": (None, None, 1), "empty": (None, None, 1)}
    assert found == {f"reward/{name}{key}": value for name, values in expected.items()
                     for key, value in zip(("", "/std", "/unjudged"), values)}


def test_summary_counts_groups_in_which_a_reward_tells_no_two_answers_apart():
    found = summary({"code": [1.0, 0.0, 0.0, None, 1.0, 1.0], "dead": [0.0] * 6, "length": [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]}, 2)
    assert {name: found[f"reward/{name}/flat"] for name in ("code", "dead", "length")} == {"code": 2 / 3, "dead": 1, "length": 0}


# ---- rewards by name, and one's own

def test_rewards_are_found_by_name_in_the_order_given():
    assert list(load_rewards("steps, format,code")) == ["steps", "format", "code"]
    assert load_rewards("format")["format"] is format_reward
    assert load_rewards(",".join(REWARDS)) == REWARDS


@pytest.mark.parametrize("names, message", [
    ("formal", "--rewards formal: there is no reward 'formal'; give some of format, tags, steps, .* FILE.py:FUNCTION"),
    ("format,", "no reward ''"), ("", "no reward ''"), ("format,format", "two rewards 'format'"),
    ("mine.py", "no reward 'mine.py'"), ("nowhere/mine.py:f", "nowhere/mine.py:f: there is no Python file"),
    ("code:partial", "no Python file code"),
])
def test_a_wrong_name_is_told_in_one_line(names, message):
    with pytest.raises(InputError, match=message) as error:
        load_rewards(names)
    assert "\n" not in str(error.value)


def user_file(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_function_of_ones_own_file_is_a_reward(tmp_path):
    path = user_file(tmp_path, """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Scale:
    by: float = 100

def brevity(completions, problems, scale=1):
    "Short is good."
    return [1 - scale * len(c) / Scale().by if p.get("answer") else None for c, p in zip(completions, problems)]

def odd(completions, problems):
    return [float("nan"), float("inf"), True, 2][:len(completions)]
""")
    rewards = load_rewards(f"format,{path}:brevity,{path}:odd")
    assert list(rewards) == ["format", "brevity", "odd"]
    assert rewards["brevity"](["x" * 10, "x"], [{"answer": "1"}, {}]) == [0.9, None]
    assert rewards["brevity"](["x" * 10], [{"answer": "1"}], scale=2) == [0.8]
    assert rewards["brevity"].__doc__ == "Short is good."
    assert rewards["odd"](list("abcd"), [{}] * 4) == [None, None, 1.0, 2.0]


@pytest.mark.parametrize("body, message", [
    ("return [1.0]", r"mine.py:f: returned \[1.0\] for 2 completions; return"),
    ("return None", "returned None for 2"), ("return {0: 1.0, 1: 0.5}", "returned {0: 1.0"), ("return 1.0", "returned 1.0 for 2"),
    ("return ['a', 'b']", r"returned \['a', 'b'\]"), ("return [10**400] * 2", "returned .1000.* for 2 completions"),
    ("return [1e10, 0]", "from -10.9 to 10.9"),
    ("return type('Odd', (), {'__iter__': lambda self: {}[1]})()", "returned <.* for 2 comp"),
    ("import sys; sys.exit(0)", "raised SystemExit: 0"), ("return (1 / 0 for _ in completions)", "raised ZeroDivisionError"),
])
def test_what_a_reward_function_returns_is_checked(tmp_path, body, message):
    path = user_file(tmp_path, f"def f(completions, problems):\n    {body}\n")
    with pytest.raises(InputError, match=message):
        load_rewards(f"{path}:f")["f"](["a", "b"], [{}, {}])


def test_a_reward_function_cannot_change_the_texts_that_others_judge(tmp_path):
    path = user_file(tmp_path, "def f(completions, problems):\n    completions.clear(), problems[0].clear()\n    return [0.0]\n")
    texts, facts = ["a"], [{"answer": "1"}]
    assert load_rewards(f"{path}:f")["f"](texts, facts) == [0.0] and (texts, facts) == (["a"], [{"answer": "1"}])


def test_an_error_in_a_reward_function_is_reported_with_its_line(tmp_path):
    path = user_file(tmp_path, "def f(completions, problems):\n    return g()\ndef g():\n    raise KeyError('mine')\n")
    with pytest.raises(InputError, match=r"mine.py:f: raised KeyError: 'mine' \(\S*mine.py:4\); fix it") as error:
        load_rewards(f"{path}:f")["f"](["a"], [{}])
    assert isinstance(error.value.__cause__, KeyError)
    path = user_file(tmp_path, "import json\ndef f(completions, problems):\n    return json.loads('[')\n")
    with pytest.raises(InputError, match=r"raised JSONDecodeError: .* \(\S*mine.py:3\); fix it"):      # not json's own line
        load_rewards(f"{path}:f")["f"](["a"], [{}])


def test_the_files_among_the_names_are_known(tmp_path):
    assert reward_files("format, a/b.py:f,code") == ["a/b.py"] and reward_files("format") == []


@pytest.mark.parametrize("text, message", [
    ("def g(: pass", r"mine.py: does not load \(SyntaxError"), ("import nothing_of_this_name", "ModuleNotFoundError"),
    ("1 / 0", "ZeroDivisionError"), ("f = 3", "has no function 'f'"), ("", "has no function 'f'"),
])
def test_a_file_that_does_not_load_is_told_in_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_rewards(f"{user_file(tmp_path, text)}:f")


def test_one_name_from_two_places_is_refused(tmp_path):
    """The log would call the values of both by it, and the held-out accuracy is counted by a reward's name."""
    a, b = (user_file(tmp_path, "def f(completions, problems): return [0] * len(completions)\nanswer = f\n", name)
            for name in ("a.py", "b.py"))
    for names, name in (f"{a}:f,{b}:f", "f"), (f"code,{b}:answer", "answer"):
        with pytest.raises(InputError, match=f"b.py:{name}: there are two rewards '{name}'; leave one out, or rename"):
            load_rewards(names)
