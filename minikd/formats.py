"""A record of one of the paper's datasets -> an example: what is asked, what is learned, what ROUGE compares with.

Read Example, to_example and FORMATS first; the functions between them, one for a format, when you need that format.

A record's format is recognised from its fields; those that no function reads (`id`, `topic`, ...) are ignored. But what would
belong to the question and is not shown (`history`, a pair's `choices`, images), or is another answer than the one that is
learned (a `generation` beside a pair's), is refused (check_shown). Any record may have a `category` and, if there is no system
turn, a `system` (or `system_prompt`). `reasoning_content` or `thinking`, of the answer's turn or of a pair, dolly or alpaca
record, is put before the answer in <think> tags.

A format of your own, for records {"pregunta": ..., "respuesta": ...}, is a function and an entry of FORMATS; --format mine then
works, and such records are recognised:

    def _mine(record, where):
        return _ask(text_field(record, where, "pregunta"), "", (text_field(record, where, "respuesta"),))

    FORMATS = {..., "mine": (_mine, [("pregunta",), ("respuesta",)])}

A training target is the answer and nothing else, so that it is also the reference for ROUGE. In the paper's code the targets of
BugNet and PyTorrent have a frame around the code (lines 46 of process_data_bugnet.py and 53 of process_data_pytorrent.py in
AlejandroParedesLT/knowledge_distillLLM), but the references have none (lines 127 and 153), which biases the paper's scores.
"""
import ast
import re
import textwrap
import warnings
from dataclasses import dataclass
from functools import partial

from minikd.errors import InputError
from minikd.records import absent, check_text, filled, kind_of, names_of


class Dropped(InputError):
    """A well-formed record with nothing to learn from: load_examples and load_problems skip and count it."""

    def __init__(self, where: str, reason: str):
        super().__init__(f"{where}: {reason}; leave the record out")
        self.reason = reason


@dataclass(frozen=True)
class Example:
    messages: tuple[dict, ...]          # the conversation up to the answer: {"role", "content"}
    instruction: str                    # the same question for the "alpaca" template (data.prompt_text)
    input: str                          # its optional second part; may be ""
    response: str                       # the training target
    references: tuple[str, ...]         # what ROUGE compares with, one or more
    category: str                       # the record's own, else the format's name
    where: str                          # "file.jsonl:812"


def recognise(record: dict) -> str | None:
    """The first of FORMATS whose fields the record has, or None. Filled fields count first, then blank ones, then null ones."""
    there = [{key for key in record if filled(record[key])}, {key for key in record if not absent(record[key])}, set(record)]
    for fields in there:
        for name, (_, needs) in FORMATS.items():
            if all(fields & {*one_of} for one_of in needs):
                return name


def to_example(record: dict, where: str, format: str | None = None) -> Example:
    """One record as an Example; format None recognises it from its fields.  Raises Dropped for an empty prompt or response, else
    InputError naming the place and the field."""
    name = format or recognise(record)
    if name not in FORMATS:
        known = "; ".join(f"{key} ({', '.join(' or '.join(n) for n in needs)})" for key, (_, needs) in FORMATS.items())
        fault = (f"format {name!r} is not known; give one of:" if name else
                 f"its fields ({names_of(record)}) fit no known format; rename them to those of one:")
        raise InputError(f"{where}: {fault} {known}")
    check_shown(record, where, *MEDIA, fault="would not be shown to the model; leave the record out")
    if record.get("finish_reason") == "length":
        raise Dropped(where, "generation cut short")            # else the student would learn to stop there
    messages, instruction, input, answers = FORMATS[name][0](record, where)
    system = "" if messages[0]["role"] == "system" else text_field(record, where, "system", "system_prompt", default="")
    if system:
        messages = {"role": "system", "content": system}, *messages
        instruction = f"{system}\n\n{instruction}"
    category = text_field(record, where, "category", default="").strip() or name
    return Example(messages, instruction, input, answers[0], answers, category, where)


def text_field(record: dict, where: str, *names: str, default: str | None = None) -> str:
    """The first of the fields `names` that holds text; `default` if all are absent or blank. Without a default, raises InputError
    if all are absent, and Dropped if one is blank."""
    held = {name: record[name] for name in names if not absent(record.get(name))}
    for name, value in held.items():
        check_text(value, where, f"field {name!r}")
        if value.strip():
            return value
    if default is not None:
        return default
    if held:
        raise Dropped(where, f"empty {next(iter(held))}")
    there = [name for name in names if name in record][:1] or names
    raise InputError(f"{where}: field {' or '.join(map(repr, there))} is {_state(record, there[0])}; fill it or remove the "
                     f"record (its fields: {names_of(record)})")


def _state(record: dict, name: str) -> str:
    return kind_of(record[name]) if name in record else "missing"


def _ask(instruction: str, input: str, answers: tuple[str, ...], question: str = "") -> tuple:
    """(messages, instruction, input, answers); the user turn of `messages` is `question`, or instruction and input joined."""
    content = question or (f"{instruction}\n\n{input}" if input else instruction)
    return ({"role": "user", "content": content},), instruction, input, answers


def _alpaca(record, where, more=("input",), field="output"):
    check_shown(record, where, "history")
    asked = text_field(record, where, "instruction"), text_field(record, where, *more, default="")
    if not isinstance(record.get(field), list):
        return _ask(*asked, (with_thoughts(record, where, text_field(record, where, field)),))
    texts = [text_field({field: text}, where, field, default="") for text in record[field]]
    if not any(texts):
        raise Dropped(where, f"empty {field}")
    first, *others = filter(None, texts)
    return _ask(*asked, (with_thoughts(record, where, first), *others))         # the first is the target, all are references


def _chat(record, where, field="messages"):
    if not isinstance(record.get(field), list):
        raise InputError(f"{where}: field {field!r} is {_state(record, field)}; make it [{{role, content}}, ...]")
    turns = []
    for i, turn in enumerate(record[field]):
        at = f"{where}: {field}[{i}]"
        if isinstance(turn, dict) and (turn.get("role") in TOOLS or turn.get("tool_calls")):
            raise Dropped(where, "use of a tool")
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            why = f"its role is {turn.get('role')!r:.40}" if isinstance(turn, dict) else f"it is {kind_of(turn)}"
            raise InputError(f"{at}: is not a turn of system, user or assistant: {why}; give it one of these roles, or remove it")
        if absent(turn.get("content")):
            raise InputError(f"{at}: field 'content' is {_state(turn, 'content')}; fill it or remove the record")
        turns.append({"role": turn["role"], "content": text_field(turn, at, "content", default="")})
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    asked = [turn for turn in turns[:last] if turn["role"] != "system"]
    if not any(turn["role"] == "user" for turn in asked):
        raise Dropped(where, "no assistant turn after a user turn")
    if not asked[-1]["content"] or not turns[last]["content"]:
        raise Dropped(where, "empty message")
    # One text for the "alpaca" template; in a conversation of several turns each is marked User: or Assistant:.
    marked = lambda turn: turn["role"] != "system" and len(asked) > 1
    instruction = "\n\n".join(f"{turn['role'].title()}: " * marked(turn) + turn["content"] for turn in turns[:last])
    answer = with_thoughts(record[field][last], where, turns[last]["content"])
    return tuple(turns[:last]), instruction, "", (answer,)


def with_thoughts(held: dict, where: str, answer: str) -> str:
    """The answer after the thoughts that its turn or record `held` has in a field of their own, if there are none in it."""
    for name in THOUGHTS:
        thoughts = held.get(name)
        if isinstance(thoughts, str) and filled(thoughts) and thoughts.strip().casefold() not in MODES:
            check_text(thoughts, where, f"field {name!r}")
            return answer if "</think>" in answer else f"<think>\n{thoughts.strip()}\n</think>\n\n{answer}"
    return answer


def _sharegpt(record, where):
    turns = record.get("conversations")
    check_shown(record, where, "chosen", fault="would not be learned; append it to the conversation, and remove the field")
    if isinstance(turns, list):
        turns = [turn | {"role": SHAREGPT.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
                 if isinstance(turn, dict) and "from" in turn else turn for turn in turns]
    return _chat({"conversations": turns}, where, "conversations")


def _pair(record, where):
    if record.get("label") is False:                            # in KTO's data; the text "False" may be a class
        raise Dropped(where, "labelled as a bad answer")
    distilled = [name for name in DISTILLED if not isinstance(record.get(name), (int, float))]      # a number only counts them
    check_shown(record, where, *distilled, fault="holds another answer than the one that would be learned; remove it, or "
                                                 "the other, and call what is to be learned `completion`")
    turns = []
    for role, names in zip(("user", "assistant"), PAIR):
        name = next((name for name in names if not absent(record.get(name))), names[0])
        part = record.get(name)
        if not isinstance(part, list):                          # (messages hold their passage and choices themselves)
            text = text_field(record, where, *names)
            if role == "user":
                text = with_passage(record, where, text, record.get("prompt"))
            part = [{"role": role, "content": text}]
        elif not all(isinstance(turn, dict) for turn in part):
            raise InputError(f"{where}: field {name!r} is a list; make it text or [{{role, content}}, ...]")
        turns += part
    *asked, (answer,) = _chat({"messages": turns}, where)
    return *asked, (with_thoughts(record, where, answer),)


def with_passage(record: dict, where: str, asked: str, prompt=None) -> str:
    """The question and the passage that it is about; only the question if it is a `prompt` that already contains the passage.
    Raises InputError for answer choices and earlier turns, which would not be shown."""
    check_shown(record, where, "choices", "options", "history")
    more = text_field(record, where, "context", "input", "passage", default="")
    contained = not more or asked == prompt and more in asked
    return asked if contained else f"{asked}\n\n{more}"


def check_shown(record: dict, where: str, *names: str,
                fault: str = "would not be shown to the model; write it into the question, and remove the field"):
    """Raises InputError if one of these fields, which are not read, holds something."""
    for name in names:
        if filled(record.get(name)):
            raise InputError(f"{where}: field {name!r} {fault}")


def _bugnet(record, where):
    fail, answer = text_field(record, where, "fail"), text_field(record, where, "pass")
    program = f"{text_field(record, where, 'language', default='')} program".strip()
    status = text_field(record, where, "original_status", default="")
    if type(record.get("error")) is int:                        # 61 records of the published files have 0, not "0"
        record = record | {"error": str(record["error"])}
    error = text_field(record, where, "error", default="0").strip()     # TLE, MLE, WA, an exception's text or a return code
    error = "" if error == "0" else error                       # "0": no failure when rerun (a quarter of the records)
    seen = "".join(f"\n{what}: {text}" for what, text in [("Verdict", status), ("Error when rerun", error)] if text)
    return _ask(f"Write a {program} that contains the correction of the code bug in order to fix the bug, fix the "
                "issue or fix the error.",                      # the wording of the paper's code, with the record's own language
                f"Code that has the bug issue or is incorrect:\n{fail}\n"
                f"Use as context the reported error in the code:\n{error or status or 'unknown'}", (answer,),
                question=f"Fix the bug in this {program}. Answer with the whole program.\n\n{fail}\n{seen}".rstrip())


def _pytorrent(record, where):
    task = text_field(record, where, "summary", "docstring")
    source = text_field(record, where, "original_string", "code")
    try:
        code = without_docstring(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Dropped(where, "code that is not Python 3") from error
    if not code.strip():
        raise Dropped(where, "empty code")
    return _ask("Write a programming script that appropriately completes the request.", task, (code,),    # its code's wording
                question=f"Write Python code for this description. Answer with code only.\n\n{task}")


def _codeforces(record, where):
    if isinstance(record.get("messages"), list):
        return _chat(record, where)
    asked, answer = text_field(record, where, "prompt"), text_field(record, where, "generation")
    check_shown(record, where, *PAIR[1], fault="holds another answer than `generation`, which would be learned; remove one")
    return _ask(asked, "", (answer,))


def _held_out(record, where):
    messages, *_ = _chat(record, where)
    return messages, *_alpaca(record, where, field="references")[1:]            # its instruction, input and answers


DISTILLED = ("generation", "generations", "r1_generation", "deepseek_solution", "deepseek_attempt", "thinking_trajectories",
             "reannotated_messages")
MEDIA = "image", "images", "video", "videos", "audio", "audios"
THOUGHTS = "reasoning_content", "thinking"                      # fields of a turn, or of a record with one answer
MODES = "true", "false", "on", "off", "yes", "no", "none", "0", "1"              # some hold there whether a model thought
TOOLS = "tool", "tool_call", "tool_response", "function", "function_call", "observation"       # roles of turns
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
PAIR = [("prompt", "question", "problem", "query"), ("completion", "response", "solution", "answer")]
# In the order they are tried: (record, where) -> (messages, instruction, input, answers), as in Example; and the fields
# that identify the format, one of each tuple.
FORMATS = {
    # What train_kd.py held out: the two parts of the "alpaca" template, and all references, beside the conversation.
    "held-out": (_held_out, [("messages",), ("instruction",), ("references",), ("category",)]),
    "codeforces": (_codeforces, [("messages", "prompt"), ("generation",)]),         # open-r1/codeforces-cots
    "chat": (_chat, [("messages",)]),                           # the last assistant turn is the answer
    "sharegpt": (_sharegpt, [("conversations",)]),              # before dolly: Magpie has its first turn as a Dolly record too
    # databricks-dolly-15k; in Spanish argilla/databricks-dolly-15k-curated-multilingual
    "dolly": (partial(_alpaca, more=("context", "input"), field="response"), [("instruction",), ("response",)]),
    "alpaca": (_alpaca, [("instruction",), ("output",)]),       # in MiniLLM/dolly `prompt` repeats the question
    "pair": (_pair, PAIR),                                      # trl's, OpenOrca's, GSM8K's, MATH's, MetaMathQA's
    "bugnet": (_bugnet, [("fail",), ("pass",)]),                # alexjercan/bugnet; its `change` belongs to the answer
    "pytorrent": (_pytorrent, [("summary", "docstring"), ("original_string", "code")]),         # Zenodo 4546290
}


def without_docstring(code: str) -> str:
    """Python source without the docstrings of the module and of its outermost defs and classes.

    The docstring is the prompt: if it stayed in the target, a model could copy it, which would inflate ROUGE. A body that is
    only a docstring becomes `pass`. A method is dedented, including the lines of its multi-line strings.  Raises what ast.parse
    raises for source that is not Python 3, or too deep for it.
    """
    code = textwrap.dedent(re.sub("\r\n?", "\n", code))           # a method is still indented as in its class
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                         # about escapes like "\d" in the source
        tree = ast.parse(code)
    defs = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    lines, shared = code.split("\n"), False
    for scope in reversed([tree, *defs]):                       # from the end: earlier line numbers stay valid
        if ast.get_docstring(scope, clean=False) is None:
            continue
        doc, *rest = scope.body
        scope.body = rest if rest or scope is tree else [ast.Pass()]
        start, end = doc.lineno - 1, doc.end_lineno
        before, after = lines[start][:doc.col_offset], lines[end - 1].encode()[doc.end_col_offset:]  # ast counts bytes
        # Docstring and code share a line, def f(): "doc"; return 1: then ast writes the whole source anew.
        shared |= bool(before.strip()) or after.strip()[:1] not in (b"", b"#")
        while end < len(lines) - 1 and not lines[end].strip():
            end += 1
        lines[start:end] = [] if scope.body == rest else [before + "pass"]
    return ast.unparse(tree) if shared else "\n".join(lines)
