"""A record -> an example: each dataset's schema and quirks, each malformed record."""
import warnings
from dataclasses import replace

import pytest

from conftest import BUGNET, CODEFORCES, DOLLY, PYTORRENT, write_records
from minikd.data import prompt_text
from minikd.errors import InputError
from minikd.evaluate import read_references
from minikd.examples import load_examples, write_held_out
from minikd.formats import Dropped, recognise, to_example, without_docstring

BRIEF, ASKED, ANSWERED = ({"role": role, "content": content} for role, content in (
    ("system", "Be brief."), ("user", "1?"), ("assistant", "one")))


def message(record, format=None):
    """The error's."""
    with pytest.raises(InputError) as caught:
        to_example(record, "data.jsonl:812", format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the schemas

def test_dolly_puts_its_context_under_the_instruction():
    """Other fields are ignored: the Spanish set has the English text beside its own."""
    example = to_example({**DOLLY, "context": "Tope swim.", "instruction_original_en": "Which?", "id": 3}, "d.jsonl:1")
    assert example.messages == ({"role": "user", "content": "Which is a fish?\n\nTope swim."},)
    assert (example.instruction, example.input, example.response) == ("Which is a fish?", "Tope swim.", "Tope")
    assert (example.references, example.category, example.where) == (("Tope",), "classification", "d.jsonl:1")
    assert to_example({"instruction": "Add.", "input": "1 2", "response": "3"}, "d:1").input == "1 2"


@pytest.mark.parametrize("context", ["", None, float("nan"), "  "])
def test_an_absent_context_is_empty_however_it_is_written(context):
    assert to_example({**DOLLY, "context": context}, "d:1").input == ""
    assert to_example({key: DOLLY[key] for key in ("instruction", "response")}, "d:1").messages[0]["content"] == \
        "Which is a fish?"


def test_alpaca_with_several_outputs_trains_on_the_first_and_compares_with_all():
    record = {"instruction": "Say hi.", "input": "", "output": ["Hi", "", "Hello"], "prompt": "Say<n>hi", "topic": "x"}
    example = to_example(record, "d:1")
    assert (example.response, example.references, example.category) == ("Hi", ("Hi", "Hello"), "alpaca")
    assert "<n>" not in example.messages[0]["content"]
    assert to_example({**record, "output": "Hi"}, "d:1").references == ("Hi",)
    assert to_example({**DOLLY, "response": ["Hi", "", "Hello"]}, "d:1").references == ("Hi", "Hello")


def test_chat_trains_on_the_last_assistant_turn_and_keeps_the_system_prompt():
    more, said, bye = ASKED | {"content": "2?"}, ANSWERED | {"content": "two"}, ASKED | {"content": "bye"}
    example = to_example({"messages": [BRIEF, ASKED, ANSWERED, more, said, bye]}, "d:1")
    assert example.messages == (BRIEF, ASKED, ANSWERED, more) and (example.response, example.category) == ("two", "chat")
    assert example.instruction == "Be brief.\n\nUser: 1?\n\nAssistant: one\n\nUser: 2?"
    assert to_example({"messages": [said, ASKED, ANSWERED]}, "").messages == (said, ASKED)             # it was greeted
    assert to_example({"messages": [ASKED, ANSWERED]}, "").instruction == "1?"                          # one turn is not marked
    with pytest.raises(Dropped, match="empty message"):
        to_example({"messages": [ASKED | {"content": " "}, ANSWERED]}, "")


@pytest.mark.parametrize("name, record", [
    ("chat", {"messages": [BRIEF, ASKED, ANSWERED]}),
    ("sharegpt", {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "1?"},
                                    {"from": "gpt", "value": "one"}], "source": "x"}),
    ("sharegpt", {"system": "Be brief.",
                  "conversations": [{"from": "user", "value": "1?"}, {"from": "assistant", "value": "one"}]}),
    ("sharegpt", {"conversations": [BRIEF, ASKED, ANSWERED]}),
    ("pair", {"system_prompt": "Be brief.", "question": "1?", "response": "one", "id": 3}),
    ("alpaca", {"system": "Be brief.", "instruction": "1?", "input": "", "output": "one", "history": []}),
    ("chat", {"system": "Be long.", "messages": [BRIEF, ASKED, ANSWERED]}),
    ("pair", {"prompt": [BRIEF, ASKED], "completion": [ANSWERED]}),
    ("pair", {"system": "Be brief.", "prompt": "1?", "completion": "one"}),
    ("pair", {"system": "Be brief.", "prompt": None, "problem": "1?", "answer": "1", "solution": "one"}),
    ("pair", {"system": "Be brief.", "query": "1?", "solution": None, "answer": "one"})])
def test_a_conversation_is_the_same_under_other_names(name, record):
    example = to_example(record, "d:1")
    assert example.messages == (BRIEF, ASKED)
    assert (example.response, example.references, example.category) == ("one", ("one",), name)
    assert example.instruction == "Be brief.\n\n1?"


@pytest.mark.parametrize("record, asked", [
    ({"context": "Paris is in France.", "question": "Where is it?", "answer": "a"}, "Where is it?\n\nParis is in France."),
    ({"prompt": "Translate.", "input": "hola", "completion": "a"}, "Translate.\n\nhola"),
    ({"prompt": "hola: translate.", "input": "hola", "completion": "a"}, "hola: translate."),
    ({"prompt": [{"role": "user", "content": "hola: translate."}], "input": "hola", "answer": "a"}, "hola: translate."),
    ({"prompt": [{"role": "user", "content": "Which, a or b?"}], "choices": ["a", "b"], "answer": "a"}, "Which, a or b?"),
    ({"question": "Why?", "choices": [], "options": "", "answer": "a"}, "Why?")])
def test_a_pair_is_asked_with_what_it_is_about(record, asked):
    assert to_example(record, "d:1").messages[0]["content"] == asked


@pytest.mark.parametrize("record, words", [
    ({"question": "Which?", "choices": ["a", "b"], "answer": "a"}, "field 'choices' would not be shown"),
    ({"question": "Which?", "options": ["a", "b"], "answer": "a"}, "field 'options' would not be shown"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0]: is not a turn"),
    ({"conversations": [{"from": ["human"], "value": "hi"}]}, "conversations[0]: is not a turn"),
    ({"conversations": None}, "'conversations' is null"), ({"conversations": ["hi"]}, "conversations[0]: is not a turn"),
    ({"conversations": [{"from": "bot", "value": "hi"}]}, "conversations[0]: is not a turn"),
    ({"prompt": None, "completion": "a"}, "'prompt' is null"), ({"prompt": {}, "completion": "a"}, "'prompt' is a dict"),
    ({"question": "a", "answer": ["b"]}, "field 'answer' is a list; make it text or [{role, content}, ...]"),
    ({"prompt": "a", "completion": [{"role": "assistant"}]}, "messages[1]: field 'content' is missing")])
def test_a_malformed_pair_or_conversation_is_named_too(record, words):
    assert words in message(record) and words in message(record, recognise(record))


def test_bugnet_answers_with_bare_code_and_says_how_it_failed():
    example = to_example(BUGNET, "d:1")
    assert example.response == "print(2)\n" and example.references == ("print(2)\n",)
    asked = example.messages[0]["content"]
    assert "this Python program" in asked and "Wrong Answer" in asked and "TLE" in asked
    assert "replace" not in asked + example.instruction + example.input         # `change` is part of the answer
    assert "C++ program" in to_example({**BUGNET, "language": "C++"}, "d:1").messages[0]["content"]


@pytest.mark.parametrize("error", ["0", 0, None, ""])
def test_bugnet_error_0_means_not_reproduced_and_only_the_verdict_is_told(error):
    example = to_example({**BUGNET, "error": error}, "d:1")
    assert "rerun" not in example.messages[0]["content"] and example.messages[0]["content"].endswith("Wrong Answer")
    assert example.input.endswith("error in the code:\nWrong Answer")
    bare = to_example({"fail": "x", "pass": "y"}, "d:1")
    assert bare.messages[0]["content"] == "Fix the bug in this program. Answer with the whole program.\n\nx"


def test_pytorrent_target_has_lost_the_docstring_that_is_its_prompt():
    example = to_example(PYTORRENT, "d:1")
    assert example.response == "def f(x):\n    return x + 1\n" == example.references[0]
    assert example.input == "Add one."
    assert example.messages[0]["content"] == "Write Python code for this description. Answer with code only.\n\nAdd one."


@pytest.mark.parametrize("summary", [None, "", "absent"])
def test_pytorrent_without_a_summary_asks_with_the_docstring(summary):
    record = {**PYTORRENT, "summary": summary}
    if summary == "absent":
        del record["summary"]
    assert to_example(record, "d:1").input == PYTORRENT["docstring"]
    assert to_example({"docstring": "Add.", "summary": summary, "code": "x = 1"}, "d:1").response == "x = 1"


def test_codeforces_reads_messages_or_prompt_and_generation_alike():
    by_messages = to_example(CODEFORCES, "d:1")
    by_prompt = to_example({**CODEFORCES, "messages": None}, "d:1")
    assert by_messages == by_prompt == to_example({key: CODEFORCES[key] for key in ("messages", "generation")}, "d:1")
    assert (by_messages.response, by_messages.category) == ("<think>\n</think>", "codeforces")


@pytest.mark.parametrize("name, record", [("dolly", DOLLY), ("bugnet", BUGNET), ("pytorrent", PYTORRENT),
                                          ("codeforces", CODEFORCES), ("chat", {"messages": []}),
                                          ("alpaca", {"instruction": "", "input": "", "output": ""}),
                                          (None, {"text": "Llama-2 dolly"})])
def test_format_is_recognised_from_fields(name, record):
    assert recognise(record) == name


@pytest.mark.parametrize("template", ["chatml", "alpaca"])
@pytest.mark.parametrize("record", [
    DOLLY, {**DOLLY, "context": ""}, BUGNET, {**BUGNET, "error": "0"}, PYTORRENT, CODEFORCES,
    {"instruction": "Add.", "input": "1 2", "output": ["3", "three"]},
    {"instruction": "Say a.", "input": "", "output": ["a", "b"]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
                  {"role": "assistant", "content": "d"}]}])
def test_what_was_held_out_is_read_as_the_same_example(tokenizer, tmp_path, record, template):
    example = to_example(record, "d:1")
    write_held_out([example], tmp_path / "held-out.jsonl")
    (again,), _ = load_examples(tmp_path / "held-out.jsonl")
    assert replace(again, where="d:1") == example
    assert read_references(tmp_path / "held-out.jsonl")[0].references == example.references
    assert prompt_text(again, tokenizer, template) == prompt_text(example, tokenizer, template)


def test_format_can_be_forced_and_the_records_own_category_wins():
    both = {"instruction": "i", "response": "r", "output": "o", "category": "es"}
    assert to_example(both, "d:1").response == "r"
    assert to_example(both, "d:1", "alpaca").response == "o"
    assert to_example({**PYTORRENT, "category": "code"}, "d:1").category == "code"
    assert to_example({**DOLLY, "category": None}, "d:1").category == "dolly"
    assert to_example({**DOLLY, "category": " pets\n"}, "d:1").category == "pets"


# ---- the docstring that would leak

@pytest.mark.parametrize("code, expected", [
    ("def f():\n    '''doc'''\n\n    return 1  # why\n", "def f():\n    return 1  # why\n"),
    ("def f():\n\t'''doc'''\n", "def f():\n\tpass\n"),
    ("class A:\n    'doc'  # noqa\n    x = 1\n", "class A:\n    x = 1\n"),
    ("'''module'''\n@wrap\nasync def f(\n    a,\n):\n    r'''doc\n    more'''\n    return a\n",
     "@wrap\nasync def f(\n    a,\n):\n    return a\n"),
    ("def f(): 'doc'; return 1", "def f():\n    return 1"),
    ("    def f(self):\n        '''doc'''\n        return 1\n", "def f(self):\n    return 1\n"),
    ("def f(self):\n        '''doc'''\n        return 1\n", "def f(self):\n        return 1\n"),
    ("def f():\r\n    '''doc'''\r\n    return 'é'\r\n", "def f():\n    return 'é'\n"),
    ("def f():\n    def g():\n        'kept'\n    return g\n", None),
    ("def f():\n    x = '''kept'''\n    return '\\d'\n", None),
    ("def f():\n    'doc'; return 1  # why\n", "def f():\n    return 1"),
    ("def é(): 'doc'\n", "def é():\n    pass"),
    ("def f():\n    'doc'\n\n\n", "def f():\n    pass\n"),
])
def test_a_docstring_is_removed_where_there_is_one(code, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert without_docstring(code) == (code if expected is None else expected)


@pytest.mark.parametrize("code", [
    "def f(a):\n    '''doc'''\n    print a\n", "return x; }", "def f():\n'''doc'''", "x = \0", "(" * 300, "-" * 10_000 + "1",
    # The docstring shares its line, so ast would write the whole source anew.
    f"def f(): 'doc'; return {' + '.join(['x'] * 5000)}", f"def f(): 'doc'; return {'+'.join(600 * ['1'])}",
    f"def f(): 'doc'; return 0x{100_000 * 'f'}"])
def test_code_that_python_3_cannot_parse_or_write_anew_is_dropped(code):
    with pytest.raises(Dropped, match="code that is not Python 3"):
        to_example({"summary": "s", "code": code}, "d:1")


# ---- fields that change what is asked or learned

def test_a_field_of_the_question_that_would_not_be_shown_is_refused():
    alpaca = {"instruction": "And now?", "input": "", "output": "o"}
    for record in alpaca, DOLLY, {"prompt": "q", "completion": "a"}:
        for none in None, [], "", " ", "[]", False, 0:
            assert to_example(record | {"history": none, "images": none, "options": none}, "d:1") == to_example(record, "d:1")
        with pytest.raises(InputError, match="d:1: field 'history' would not be shown to the model; write it into"):
            to_example(record | {"history": [["q0", "a0"]]}, "d:1")
        for image in "a.png", b"\x89PNG", {"bytes": b"\x89PNG"}, 391895, True:
            with pytest.raises(InputError, match="d:1: field 'image' would not be shown to the model; leave the record out"):
                to_example(record | {"image": image}, "d:1")


def test_answers_that_are_labelled_bad_are_dropped_and_preference_pairs_refused():
    pair = {"prompt": "q", "completion": "a"}
    for good in True, "False":
        assert to_example(pair | {"label": good}, "d:1").response == "a"
    with pytest.raises(Dropped, match="labelled as a bad answer"):
        to_example(pair | {"label": False}, "d:1")
    with pytest.raises(InputError, match="field 'chosen' would not be learned"):
        to_example({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}, "d:1")


def test_fields_that_are_null_do_not_decide_the_format():
    """As in tables merged from several sets."""
    alpaca = {"instruction": "i", "input": "", "output": "o"}
    for none in None, [], "":
        assert to_example(alpaca | {"conversations": none, "messages": none, "chosen": none}, "d:1") == to_example(alpaca, "d:1")


@pytest.mark.parametrize("record, response", [
    ({"messages": None, "prompt": "q", "completion": ""}, None),
    ({"instruction": "i", "response": " ", "conversations": None}, None),
    ({"question": "q", "answer": "", "instruction": None, "response": None}, None),
    ({"instruction": "i", "input": "", "output": "[]", "messages": None}, "[]"),
    ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "instruction": "Be helpful",
      "references": ["http://doc"]}, "a")])
def test_a_blank_answer_does_not_make_a_null_field_decide_nor_references_a_held_out_record(record, response):
    if response is None:
        with pytest.raises(Dropped):
            to_example(record, "d:1")
    else:
        assert to_example(record, "d:1").response == response


def test_a_cut_answer_of_any_format_is_dropped():
    for record in DOLLY, {"prompt": "q", "completion": "a"}, CODEFORCES:
        assert to_example(record | {"finish_reason": "stop"}, "d:1") == to_example(record, "d:1")
        with pytest.raises(Dropped, match="cut short"):
            to_example(record | {"finish_reason": "length"}, "d:1")


def test_a_pair_with_two_answers_is_refused():
    pair = {"problem": "q", "solution": "human"}
    for none in None, [], False, 3:                             # the last is the number of one
        assert to_example(pair | {"generation": none, "generations": none}, "d:1").response == "human"
    with pytest.raises(InputError, match="d:1: field 'solution' holds another answer than `generation`, which would be learned"):
        to_example({"prompt": "q", "solution": "human", "generation": "distilled"}, "d:1")
    for name, value in ("generation", "distilled"), ("generations", ["distilled"]), ("thinking_trajectories", ["long"]):
        with pytest.raises(InputError, match=f"d:1: field '{name}' holds another answer than the one that would be learned; re"):
            to_example(pair | {name: value}, "d:1")


def test_thoughts_that_stand_beside_an_answer_are_learned_with_it():
    thought = "<think>\nlong\n</think>\n\na"
    for field in "reasoning_content", "thinking":
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", field: " long\n"}]
        assert to_example({"messages": turns}, "d:1").response == thought
        assert to_example({"messages": turns + turns}, "d:1").messages[1]["content"] == "a"         # not in earlier turns
        assert to_example({"problem": "q", "solution": "a", field: "long"}, "d:1").response == thought
        assert to_example({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", field: "long"}]},
                          "d:1").response == thought
        assert to_example(DOLLY | {field: "long"}, "d:1").response == thought[:-1] + DOLLY["response"]
        alpaca = to_example({"instruction": "q", "output": ["a", "b"], field: "long"}, "d:1")
        assert alpaca.references == (thought, "b")
        lists = {"prompt": turns[:1], "completion": [{"role": "assistant", "content": "a"}], field: "long"}
        assert to_example(lists, "d:1").response == thought
        for none in False, True, 1.0, [], ["s1"], None, "False", " on":         # mostly whether a model thought
            assert to_example({"problem": "q", "solution": "a", field: none}, "d:1").response == "a"
        thought_out = {"problem": "q", "solution": "<think>b</think>a", field: "long"}                  # it has thoughts already
        assert to_example(thought_out, "d:1").response == "<think>b</think>a"


def test_the_whole_conversation_is_read_where_its_first_turn_is_a_dolly_record_too():
    turns = [{"from": "human", "value": "q1"}, {"from": "gpt", "value": "a1"}, {"from": "human", "value": "q2"},
             {"from": "chatgpt", "value": "a2"}]
    example = to_example({"instruction": "q1", "response": "a1", "conversations": turns}, "d:1")           # Magpie
    assert [turn["content"] for turn in example.messages] == ["q1", "a1", "q2"] and example.response == "a2"


# ---- malformed records

def test_missing_field_is_named_with_file_and_line():
    assert message({"instruction": "i", "context": "c"}, "dolly").startswith(
        "data.jsonl:812: field 'response' is missing; ")


@pytest.mark.parametrize("value, words", [(None, "null"), (float("nan"), "null"), (3, "an int"), ([3], "an int"),
                                          ({"a": 1}, "a dict"), (True, "a bool"), ("\ud800", "lone surrogate")])
def test_required_field_of_the_wrong_kind_is_named(value, words):
    text = message({**DOLLY, "response": value})
    assert "data.jsonl:812" in text and "'response'" in text and words in text


@pytest.mark.parametrize("record", [{**DOLLY, "context": 7}, {**DOLLY, "category": 7}, {**BUGNET, "original_status": 0}])
def test_optional_field_of_the_wrong_kind_is_named_too(record):
    assert "an int; make it text" in message(record)


def test_unknown_fields_and_unknown_format_list_what_is_known():
    assert "its fields (text) fit no known format; rename them" in message({"text": "x"})
    assert "dolly (instruction, response)" in message({})
    assert "format 'doly' is not known; give one of: " in message(DOLLY, "doly")


@pytest.mark.parametrize("messages, words", [
    ("hi", "'messages' is text"), (None, "'messages' is null"),
    ([], "no assistant turn"), ([{"role": "user", "content": "hi"}], "no assistant turn"),
    ([{"role": "assistant", "content": "hi"}], "no assistant turn"),
    (["hi"], "messages[0]: is not a turn"), ([{"role": "tol", "content": "hi"}], "messages[0]: is not a turn"),
    ([{"role": "user"}], "messages[0]: field 'content' is missing"),
    ([{"role": "user", "content": None}], "messages[0]: field 'content' is null"),
    ([{"role": "user", "content": [{"type": "text"}]}], "field 'content' is a list")])
def test_malformed_conversation_names_the_turn(messages, words):
    assert words in message({"messages": messages})


@pytest.mark.parametrize("record", [
    {**DOLLY, "response": " \n"}, {**DOLLY, "instruction": ""}, {**BUGNET, "pass": ""}, {**BUGNET, "fail": " "},
    {**PYTORRENT, "docstring": "", "summary": " "}, {**PYTORRENT, "original_string": "'''only a docstring'''"},
    {"instruction": "i", "output": ["", " "]}, {"instruction": "i", "output": []},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"role": "user", "content": "hi"}]}, {"conversations": [{"from": "human", "value": "hi"}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}]},
    {"question": "Why?", "answer": " "}, {"prompt": "", "completion": "a"}])
def test_empty_prompt_or_response_is_dropped_not_an_error(record, tmp_path):
    with pytest.raises(Dropped):
        to_example(record, "d:1")
    examples, report = load_examples(write_records(tmp_path / "d.jsonl", DOLLY, record))
    assert len(examples) == 1 and report.read == 2 and sum(report.dropped.values()) == 1


def test_a_field_that_may_have_several_names_is_missed_under_all_of_them():
    with pytest.raises(InputError, match="x: field 'prompt' or 'question' or 'problem' or 'query' is missing; fill it or remove"):
        to_example({"pregunta": "1 + 1?", "completion": "2"}, "x", "pair")
    with pytest.raises(InputError, match="x: field 'question' is null; fill it"):
        to_example({"question": None, "completion": "2"}, "x", "pair")
