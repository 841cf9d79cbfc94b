"""Problems: the toy tasks are right where they say so, and records of datasets keep what decides."""
import json
import math
import random
import re

import pytest

from minikd.answers import boxed
from minikd.data import encode_examples
from minikd.errors import InputError
from minikd.formats import Dropped, to_example
from minikd.problems import (ANSWER, PYTHON, TASKS, encode_problems, load_problems, shows_its_tests, to_problem, toy_problems,
                             toy_records)
from minikd.rewards import answer_part, extract_code, format_reward, steps_reward


def test_a_sums_answer_is_the_sum_and_its_steps_are_true():
    for record in toy_records("sums", 200, seed=1, clean=True):
        a, b = map(int, record["instruction"].split("+"))
        assert answer_part(record["response"]) == str(a + b)
        steps = re.findall(r"^Step \d: ([\d+]+)=(\d+)$", record["response"], re.MULTILINE)
        assert len(steps) == 2 and all(sum(map(int, left.split("+"))) == int(right) for left, right in steps)
        assert record["response"].count("Step") == 2 and format_reward([record["response"]], [{}]) == [1.0]
    pairs = [(tuple(map(int, problem.messages[0]["content"].split("+"))), problem.facts)
             for problem in toy_problems("sums", 1000, seed=3)]
    assert all(facts == {"answer": str(a + b)} for (a, b), facts in pairs)
    assert set(range(10, 100)) == {a for (a, _), _ in pairs} == {b for (_, b), _ in pairs}


def test_a_code_answer_is_the_line_through_both_points():
    for record in toy_records("code", 100, seed=1, clean=True):
        program = extract_code(record["response"])
        m, c = map(int, re.fullmatch(r"print\((\d+)\*int\(input\(\)\)\+(\d+)\)\n", program).groups())
        points = re.findall(r"f\((\d+)\)=(\d+)", record["instruction"])
        assert len(points) == 2 and all(m * int(x) + c == int(y) for x, y in points)
        steps = re.findall(r"^Step \d: ([\d()+*/-]+)=(\d+)$", record["response"], re.MULTILINE)
        assert len(steps) == 2 and all(eval(left) == int(right) for left, right in steps)       # our own text
    for problem in toy_problems("code", 20, seed=3):
        (x, y), *_ = re.findall(r"f\((\d+)\)=(\d+)", problem.messages[0]["content"])
        tests = {int(test["input"]): int(test["output"]) for test in problem.facts["tests"]}
        m = (tests[12] - tests[0]) // 12
        assert m * int(x) + tests[0] == int(y) and all(m * v + tests[0] == out for v, out in tests.items())


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_to_learn_from_are_of_mixed_quality(task):
    mixed, clean = (toy_records(task, 2000, seed=1, clean=clean) for clean in (False, True))
    assert [record["instruction"] for record in mixed] == [record["instruction"] for record in clean]
    bare = [a["response"] for a in mixed if "<think>" not in a["response"]]
    tagged = [(a["response"], b["response"]) for a, b in zip(mixed, clean) if "<think>" in a["response"]]
    assert abs(len(bare) / 2000 - 0.3) < 0.03                       # as the README says
    assert abs(sum(a != b for a, b in tagged) / len(tagged) - 0.25) < 0.03
    if task == "sums":                                              # a wrong step moves the answer by one or two tens
        slips = {int(answer_part(a)) - int(answer_part(b)) for a, b in tagged}
        assert slips == {-20, -10, 0, 10, 20}


@pytest.mark.parametrize("task", TASKS)
def test_questions_of_the_test_are_never_learned_from(task):
    text = lambda problems: {problem.messages[-1]["content"] for problem in problems}
    asked, tests = text(toy_problems(task, 900, seed=0)), text(toy_problems(task, 100, seed=1, test=True))
    taught = {record["instruction"] for record in toy_records(task, 8000, seed=2)}
    assert len(asked) == 900 and len(tests) == 100 and len(taught) > 1500
    swapped = {"+".join(reversed(question.split("+"))) for question in tests}       # 4+3 is the same question as 3+4
    assert not (tests | swapped) & (asked | taught)


def test_more_questions_than_there_are_is_one_line():
    with pytest.raises(InputError, match="there are fewer than 6700 different toy questions"):
        toy_problems("sums", 6700, seed=0)


def test_toy_records_are_what_train_kd_reads(tokenizer):
    rows, counts = encode_examples([to_example(record, "x") for record in toy_records("sums", 20, seed=1)], tokenizer)
    assert counts["encoded"] == 20 and steps_reward([tokenizer.decode(rows[0].response)], [{}])[0] in (0.0, 2 / 3)


# ---- records of datasets

RECORD = {  # the fields of open-r1/codeforces-cots, as its card lists them; the text is our own
    "id": "1/A", "aliases": None, "contest_id": "1", "contest_name": "Practice", "contest_type": "ICPC",
    "contest_start": 0, "contest_start_year": 2010, "index": "A", "time_limit": 1.0, "memory_limit": 256.0,
    "title": "Twice", "description": "Given n, print 2n.", "input_format": "One integer n.",
    "output_format": "One integer.", "examples": [{"input": "3\n", "output": "6\n"}], "note": None, "editorial": None,
    "prompt": "You will be given a problem ...", "generation": "<think>\n...", "finish_reason": "stop",
    "api_metadata": {"completion_tokens": 3}, "interaction_format": None,
    "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}


def test_a_codeforces_record_becomes_its_statement_and_its_tests():
    official = [{"input": "3\n", "output": "6\n"}, {"input": "10\n", "output": "20\n"}]
    problem = to_problem(RECORD | {"official_tests": official, "note": "n is small."}, "cots.jsonl:1")
    asked = problem.messages[-1]["content"]
    assert [message["role"] for message in problem.messages] == ["system", "user"]
    # All of the prompt: the official tests stay secret.
    assert asked == ("# Twice\n\nGiven n, print 2n.\n\n## Input\nOne integer n.\n\n## Output\nOne integer.\n\n"
                     "## Example\nInput:\n3\n\nOutput:\n6\n\n\n## Note\nn is small.\n\nTime limit: 1.0 seconds. " + PYTHON)
    assert problem.facts == {"tests": official, "language": "python", "time_limit": 1.0, "memory_limit": 256.0}
    assert to_problem(RECORD | {"examples": None}, "x").facts["tests"] == []
    assert to_problem(RECORD | {"examples": official}, "x").messages[-1]["content"].count("## Example\nInput:\n") == 2
    for fields in ("description", "examples"), ("description", "input_format"):             # as the error about others asks for
        least = {key: RECORD[key] for key in fields} | {"official_tests": official}
        assert to_problem(least, "x").facts["tests"] == official


@pytest.mark.parametrize("field, said", [
    ("generated_checker", "def check(): ..."), ("input_mode", "file"), ("interaction_format", "Print a guess, then flush."),
    ("description", "This is an interactive problem. Guess n."),
    ("output_format", "If there are several such answers, output any."),
    ("note", "If there are multiple valid solutions, you may show one of them."),
    ("description", "Print any two numbers whose sum is n."), ("output_format", "Print\nany of them."),
    ("output_format", "Print them in any order."), ("note", "Any valid path will be accepted."),
    ("output_format", "If multiple optimal strategies exist, print one."),
    ("note", "There may be many ways to do it; print one of them."),
    ("output_format", "The absolute or relative error must not exceed 1e-6."),
    ("output_format", "Print it with an error of at most 1e-6."), ("output_format", "Its error must be at most 1e-6."),
    ("note", "The error is not greater than 1e-6."), ("note", "An answer is right if its error does not exceed 1e-6."),
    ("description", "Find any permutation of n numbers that is its own inverse.")])
def test_what_a_comparison_could_not_judge_has_no_tests(field, said):
    problem = to_problem(RECORD | {field: said}, "x")
    assert problem.facts["tests"] == []
    assert field != "interaction_format" or said in problem.messages[-1]["content"]


@pytest.mark.parametrize("said", ["You can choose any two of them, in any order, and swap them. Don't print any extra spaces.",
                                  "There are several ways; print their number.", "Print one of these two words: YES or NO.",
                                  "Is there any answer? Print YES or NO.", "He does not find any coins.", "Print ERROR if not.",
                                  "Print how many solutions there are, or -1 if there are infinitely many solutions."])
def test_what_has_one_answer_keeps_its_tests(said):
    for usual in {"input_mode": "stdio", "generated_checker": None}, dict.fromkeys(("input_mode", "generated_checker"), math.nan):
        assert to_problem(RECORD | usual | {"description": said}, "x").facts["tests"] == RECORD["examples"]


def test_a_prompt_that_shows_all_of_its_tests_is_known():
    hidden = {"official_tests": [{"input": "10\n", "output": "20\n"}]}
    assert shows_its_tests(to_problem(RECORD, "x")) and not shows_its_tests(to_problem(RECORD | hidden, "x"))
    assert not shows_its_tests(to_problem(RECORD | {"examples": None}, "x"))                # there are none
    assert not any(map(shows_its_tests, toy_problems("code", 5, seed=1)))
    begins = {"examples": [], "official_tests": [{"input": "1", "output": "1"}], "note": "Input:\n1\nOutput:\n10"}
    assert not shows_its_tests(to_problem(RECORD | begins, "x"))                            # 10 is no 1
    more = begins | {"official_tests": [{"input": "1", "output": "10"}], "note": "Input:\n1\nOutput:\n10 11"}
    assert not shows_its_tests(to_problem(RECORD | more, "x"))
    for end in "10 \n", "10`", "10\r\n":
        shown = begins | {"official_tests": [{"input": "1", "output": "10\n"}], "note": f"Input:\n1\nOutput:\n{end}"}
        assert shows_its_tests(to_problem(RECORD | shown, "x"))


def test_an_empty_cell_is_no_limit():
    problem = to_problem(RECORD | {"time_limit": float("nan")}, "x")
    assert "time_limit" not in problem.facts and "Time limit" not in problem.messages[-1]["content"]


def test_plain_prompts_ask_as_the_records_do():
    brief, asked = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}
    for record in {"prompt": [brief, asked], "answer": "4"}, {"question": "2 + 2?", "system": "Be brief.", "answer": "4"}:
        problem = to_problem(record, "x", plain=True)
        assert problem.messages == (brief, asked) and problem.facts == {"answer": "4"}
        assert to_problem(record, "x").messages[0] != brief
    for record in {"question": "2 + 2?"}, {"question": "2 + 2?", "prompt": []}, {"prompt": [asked], "system_prompt": ""}:
        assert to_problem(record | {"answer": "4"}, "x", plain=True).messages == (asked,)
    other = to_problem({"prompt": [asked], "system_prompt": "Be brief.", "answer": "4"}, "x", plain=True)
    assert other.messages == (brief, asked)
    stated = {"description": "Add.", "input_format": "two", "examples": [{"input": "1 2\n", "output": "3\n"}], "time_limit": 1.0}
    usual, plain = (to_problem(stated, "x", plain=plain) for plain in (False, True))
    assert usual.messages[-1]["content"] == f"{plain.messages[-1]['content']}\n\nTime limit: 1.0 seconds. {PYTHON}"
    assert usual.facts == plain.facts and len(plain.messages) == 1


def test_a_question_with_its_answer_is_a_problem():
    gsm = to_problem({"question": "2 + 2?", "answer": "Two and two is 4.\n#### 4"}, "x")
    flat = {"question": "2 + 2?", "answer": "Two and two is 4. #### 4"}         # a copy without line breaks
    assert gsm.facts == to_problem(flat, "x").facts == {"answer": "4"} and gsm.messages[-1]["content"] == f"2 + 2?\n\n{ANSWER}"
    assert to_problem({"problem": "1 + 1?", "answer": 2}, "x").facts == {"answer": "2"}
    assert to_problem({"question": "Who?", "answer": "Ada Lovelace", "examples": []}, "x").facts == {"answer": "Ada Lovelace"}
    for asks in {"problem": "1 + 1?", "solution": "1 + 1 = 2"}, {"prompt": "1 + 1?"}:       # in the place of a blank question
        problem = to_problem({"question": " ", "answer": "2"} | asks, "x")
        assert problem.facts == {"answer": "2"} and problem.messages[-1]["content"] == f"1 + 1?\n\n{ANSWER}"
    numina = {"problem": "1/2 + 1/4?", "solution": r"$\boxed{x}$ is the unknown. So $x = \boxed{\frac{3}{4}}$, not {1}."}
    assert to_problem(numina, "x").facts == {"answer": r"\frac{3}{4}"}
    assert to_problem({"problem": "1 + 1?", "solution": "2 "}, "x").facts == {"answer": "2"}
    with pytest.raises(Dropped):                                             # a heading is no GSM8K answer
        to_problem({"problem": "1 + 1?", "solution": "#### Step 1\nAdd.\n#### Conclusion\nSo the sum is 2."}, "x")


def test_boxed_is_what_the_last_box_holds():
    texts = "2", "2}", r"\boxed{", r"\boxed{{2}", r"\boxed{}", r"\boxed{ 2 }{", "\\boxed \n{{3}}"
    assert list(map(boxed, texts)) == [None, None, None, None, "", "2", "{3}"]


def test_a_prompt_may_be_a_list_of_messages_with_one_question():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    problem = to_problem({"prompt": turns, "solution": "$4$"}, "x")
    assert problem == to_problem({"prompt": "2 + 2?", "solution": "$4$"}, "x") and problem.facts == {"answer": "$4$"}
    for odd in (turns[:1], [*turns, {"role": "assistant", "content": "4"}], [*turns, turns[1]], ["2 + 2?"], [], [{}],
                [{"role": "user", "content": None}]):
        with pytest.raises(InputError, match="is not a problem"):
            to_problem({"prompt": odd, "solution": "4"}, "x")


def test_a_short_answer_with_spaces_is_no_proof():
    matrix = r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}"
    for answer in (matrix + ", " + matrix, r"2 \pi", "y = Ce^{-x} + 1", r"$\frac{1}{2} + x$", "Ada Lovelace",
                   r"\left( 3, \frac{\pi}{2} \right)"):
        for field in "solution", "answer", "response":
            assert to_problem({"question": "?", field: answer}, "x").facts == {"answer": answer}
    for told in "so\n#### 110\nThe answer is: 110", "It is more. The answer is 110", "x\n#### 110":
        assert to_problem({"question": "?", "response": told}, "x").facts == {"answer": "110"}
    assert to_problem({"question": "?", "answer": ["7"]}, "x").facts == to_problem(
        {"question": "?", "answer": None, "answer_number": 7}, "x").facts == {"answer": "7"}


def test_the_ground_truth_of_verls_records_may_be_json():
    verl = lambda truth: to_problem({"prompt": "?", "reward_model": {"ground_truth": truth}}, "x").facts
    for truth, answer in ("34", "34"), ("[1, 2]", "[1, 2]"), (r'["\\frac{1}{2}"]', r"\frac{1}{2}"):
        assert verl(truth) == {"answer": answer}
    tests = [{"input": "1\n", "output": "2\n"}, {"input": "2\n", "output": "3\n"}]
    assert verl(json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2\n", "3\n"]})) == {"tests": tests, "language": "python"}
    for strange in {"inputs": ["1"], "outputs": ["2"], "fn_name": "f"}, {"inputs": ["1"], "outputs": []}, {"target": 7}:
        with pytest.raises(InputError, match="x: field 'ground_truth' holds .*, which cannot be judged; leave the record out"):
            verl(json.dumps(strange))


def test_tests_of_a_function_are_refused():
    test = {"input": "1", "output": "2"}
    for more in {"testtype": "functional"}, {"fn_name": "f"}, {"type": "function_call"}:
        with pytest.raises(InputError, match="x: field 'tests' tests a function"):
            to_problem({"question": "?", "tests": [test | {"testtype": "stdin"}, test | more]}, "x")
    assert to_problem({"question": "?", "tests": [test | {"type": ["stdin"]}]}, "x").facts["tests"] == [test]


def test_a_question_with_an_image_is_refused():
    with pytest.raises(InputError, match="x: field 'images' would not be shown to the model; leave the record out"):
        to_problem({"problem": "<image>Find x.", "answer": "3", "images": [{"path": "a.png"}]}, "x")


def test_a_question_may_have_tests_in_place_of_an_answer():
    tests = [{"input": "3\n", "output": "6\n"}]
    problem = to_problem({"question": "Double it.", "tests": tests, "time_limit": 2}, "x")
    assert problem.facts == {"tests": tests, "language": "python", "time_limit": 2.0}
    assert problem.messages[-1]["content"].startswith("Double it.\n\nWrite a Python 3 program")
    for field in "answer", "response", "solution":                              # beside tests it is one program of many
        both = to_problem({"question": "Double it.", "tests": tests, field: "print(2 * int(input()))"}, "x")
        assert both.facts == {"tests": tests, "language": "python"}
    assert to_problem({"question": "1 + 1?", "tests": [], "answer": "2", "time_limit": "x"}, "x").facts == {"answer": "2"}


def test_a_format_decides_where_fields_are_of_both(tmp_path):
    record = RECORD | {"question": "What is doubled?", "answer": "n"}
    assert to_problem(record, "x").facts["tests"] and to_problem(record, "x", "codeforces") == to_problem(record, "x")
    assert to_problem(record, "x", "question").facts == {"answer": "n"}
    (tmp_path / "d.jsonl").write_text(json.dumps(record))
    (problem,), _ = load_problems(tmp_path / "d.jsonl", format="question")
    assert problem.messages[-1]["content"] == f"What is doubled?\n\n{ANSWER}"
    with pytest.raises(InputError, match="x: has no `description`; add one, or leave out --format codeforces") as caught:
        to_problem({"question": "Why?", "answer": "b"}, "x", "codeforces")
    assert not isinstance(caught.value, Dropped)


@pytest.mark.parametrize("more", [{"input": "3 and 4", "output": "7"}, {"context": "3 and 4", "input": None, "response": "7"}])
def test_an_instruction_is_asked_with_what_it_is_about(more):
    problem = to_problem({"instruction": "Add the numbers."} | more, "x")
    assert problem.messages[-1]["content"] == f"Add the numbers.\n\n3 and 4\n\n{ANSWER}" and problem.facts == {"answer": "7"}
    alone = {"instruction": "Why?", "input": " ", "output": "7"}
    assert to_problem(alone, "x").messages[-1]["content"] == f"Why?\n\n{ANSWER}"
    asked = to_problem({"question": "Is it?", "passage": "It is.", "answer": "yes"}, "x").messages[-1]["content"]
    assert asked == f"Is it?\n\nIt is.\n\n{ANSWER}"
    short = to_problem({"instruction": "Double it; 1.5 gives 3.", "input": "5", "output": "10"}, "x")     # a 5 is there already
    assert short.messages[-1]["content"] == f"Double it; 1.5 gives 3.\n\n5\n\n{ANSWER}"
    again = to_problem({"prompt": "It is. Is it?", "context": "It is.", "answer": "yes"}, "x")
    assert again.messages[-1]["content"] == f"It is. Is it?\n\n{ANSWER}"


@pytest.mark.parametrize("record, said", [
    ({"title": "x"}, "(its fields: title); give `question` and `answer` or `tests`"),
    ({"question": "Why?"}, "is not a problem: neither"),
    ({"question": "Why?", "tests": []}, "is not a problem: neither answer nor tests (its fields"),
    ({"question": "Why?", "tests": ["3"]}, "field 'tests' is not a list of {input, output} texts"),
    ({"question": ["Why?"], "answer": "b"}, "is not a problem: no text that asks something (its fields"),
    ({"question": "Which?", "choices": ["a", "b"], "answer": 1}, "field 'choices' would not be shown to the model; write it"),
    (RECORD | {"examples": [{"input": 3, "output": "6"}]}, "field 'examples' is not a list of {input, output} texts"),
    (RECORD | {"examples": 3}, "field 'examples' is not a list"),
    (RECORD | {"examples": ["3"]}, "field 'examples' is not a list"),
    (RECORD | {"examples": [*RECORD["examples"], {"input": "3"}]}, "field 'examples' is not a list"),
    (RECORD | {"note": 3}, "field 'note' is an int; make it text"),
    (RECORD | {"time_limit": -1}, "field 'time_limit' is -1; give a number above 0"),
    (RECORD | {"memory_limit": float("inf")}, "field 'memory_limit' is inf"),
    (RECORD | {"time_limit": "2 seconds"}, "field 'time_limit' is '2 seconds'; give a number"),
    (RECORD | {"time_limit": 10**400}, "field 'time_limit' is 1000"),
    (RECORD | {"time_limit": True}, "field 'time_limit' is True"),
    ({"instruction": "Why?", "input": 3, "output": "b"}, "field 'input' is an int; make it text"),
    ({"question": "\ud800", "answer": "b"}, "holds half a character"), ({"question": "a", "answer": "\ud800"}, "half a"),
    (RECORD | {"examples": [{"input": "1", "output": "\ud800"}]}, "half a character")])
def test_a_record_that_is_no_problem_is_one_line_with_its_place(tmp_path, record, said):
    (tmp_path / "bad.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(InputError) as error:
        load_problems(str(tmp_path / "bad.jsonl"))
    assert said in str(error.value) and "bad.jsonl:2" in str(error.value)
    assert len(load_problems([str(tmp_path / "bad.jsonl")], limit=1)[0]) == 1


def test_records_without_an_answer_to_compare_with_are_left_out_and_counted(tmp_path):
    answers = [{"answer": " "}, {"answer": "so\n#### "}, {"answer": None, "solution": "Suppose not. Then, as before, 1 = 2."},
               {"solution": "There are seven apples in the basket."}, {"solution": "7\n\nas shown"},
               {"answer": float("nan")}, {"answer": []}]
    good = [{"answer": None, "solution": r"so \boxed{3}"}, {"answer": "", "solution": "4"}, {"answer": "5", "tests": "unread"}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"question": f"{i}?"} | more) + "\n"
                                              for i, more in enumerate([*answers, *good])))
    found, left = load_problems(tmp_path / "d.jsonl")
    assert [problem.facts for problem in found] == [{"answer": n} for n in "345"] and left == len(answers)


def test_a_long_answer_takes_no_longer_to_read_than_its_length():
    record = {"problem": "1 + 2?", "answer": 300_000 * "so " + r"the answer is: \boxed{3}"}     # tried from each place: minutes
    assert to_problem(record, "x").facts == {"answer": "3"}


@pytest.mark.parametrize("record, answer", [
    ({"answer": "proof", "solution": "So it is."}, None), ({"answer": "Proof"}, None),
    ({"answer": "notfound", "solution": "So 3."}, None),
    ({"answer": "so the answer is 3 x 4 = 12 #### 12"}, "12"), ({"answer": "the answer is 5, or so. The answer is: 6"}, "6"),
    ({"answer": "the answer isn't known"}, "the answer isn't known"), ({"answer": "3", "question_type": "proof"}, None),
    ({"answer": "Proofs", "question_type": "math-word-problem"}, "Proofs"),
    ({"final_answer": "3", "r1_solution_1": "So 3."}, "3"), ({"expected_answer": "3", "generated_solution": "So 3."}, "3"),
    ({"reward_model": {"ground_truth": "3", "style": "rule"}, "ability": "MATH"}, "3"),
    ({"reward_model": {"ground_truth": "4"}, "answer": "3"}, "3"), ({"reward_model": {"style": "rule"}}, None),
    ({"reward_model": {"ground_truth": "3"}, "answer": None}, "3"), ({"answer": "3", "choices": [], "options": ""}, "3")])
def test_answers_under_the_names_that_datasets_give_them(record, answer):
    record = {"problem": "1 + 2?"} | record
    if answer is None:
        with pytest.raises(Dropped):
            to_problem(record, "x")
    else:
        assert to_problem(record, "x").facts == {"answer": answer}


def test_a_statement_that_is_null_or_blank_is_left_out_and_counted(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (
        RECORD | {"description": None}, RECORD | {"description": " \n"}, RECORD)))
    for format in None, "codeforces":
        found, left = load_problems(tmp_path / "p.jsonl", format=format)
        assert [problem.messages for problem in found] == [to_problem(RECORD, "x").messages] and left == 2


@pytest.mark.parametrize("blank", [None, " \n"])
def test_a_question_that_is_null_or_blank_is_left_out_and_counted(tmp_path, blank):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in (
        {"question": blank, "answer": "10"}, {"problem": blank, "tests": [{"input": "1", "output": "2"}]},
        {"question": "1 + 2?", "prompt": blank, "answer": "3"})))
    found, left = load_problems(tmp_path / "p.jsonl")
    assert [problem.facts for problem in found] == [{"answer": "3"}] and left == 2


@pytest.mark.parametrize("record", [{"description": "Add 1 and 2.", "solution_text": "3"}, {"description": None, "anser": "3"},
                                    {"description": "x", "question": "2+2", "anser": "4"},
                                    {"prompt": None, "statement": "3+7", "answer": "10"}])
def test_a_description_alone_does_not_make_a_misnamed_record_vanish(record, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError, match="p.jsonl:1: is not a problem"):
        load_problems(tmp_path / "p.jsonl")


def test_of_records_that_ask_the_same_the_first_is_the_problem(tmp_path):
    records = [{"question": q, "answer": a} for q, a in (("1+1", "2"), ("2+2", "4"), ("1+1", "two"), ("1+1", "II"))]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found, repeats = load_problems(tmp_path / "sums.jsonl")
    assert [problem.facts["answer"] for problem in found] == ["2", "4"] and repeats == 2


def test_prompts_that_are_too_long_are_left_out(tokenizer):
    problems = toy_problems("sums", 5, seed=1) + [to_problem(RECORD, "x")]
    longest = max(len(row.prompt) for row in encode_problems(problems[:5], tokenizer))
    rows = encode_problems(problems, tokenizer, max_prompt_length=longest)
    assert [row.index for row in rows] == [0, 1, 2, 3, 4] and all(row.response == [] for row in rows)
    with pytest.raises(InputError, match="raise --max-prompt-length"):
        encode_problems(problems, tokenizer, max_prompt_length=3)


def test_the_random_draw_is_the_seeds_alone():
    random.seed(1)
    first = toy_records("code", 5, seed=9)
    random.seed(2)
    assert toy_records("code", 5, seed=9) == first != toy_records("code", 5, seed=10)
