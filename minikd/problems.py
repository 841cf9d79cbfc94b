"""Problems whose answers can be checked: two generated toy tasks, and records of datasets.

    sums        two-digit addition, ones and tens as Step 1 and Step 2; the answer is a number
    code        f(2)=7, f(5)=13: write a program that prints f(x) for the x it reads; tests decide
    codeforces  open-r1/codeforces-cots and open-r1/codeforces: statement, examples, official_tests, limits. -cots has no
                official_tests: all its tests are in the prompt, so a program that only prints their outputs is rewarded too
    question    GSM8K, NuminaMath, verl's and others: one of QUESTIONS; one of ANSWERS, or tests [{input, output}]

The toy students first learn from answers of mixed quality, some wrong and some without thoughts; GRPO then makes the good
ones more frequent. It strengthens what the student can do already, and teaches no new skill.
"""
import json
import random
import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter

from minikd.data import Encoded
from minikd.errors import InputError
from minikd.answers import boxed
from minikd.examples import same_prompt
from minikd.formats import MEDIA, Dropped, check_shown, text_field, with_passage
from minikd.files import parse_json
from minikd.records import absent, check_text, names_of, read_records
from minikd.toy import draw

NOISE, UNTAGGED = 0.25, 0.3             # share of the answers with thoughts that have a wrong step; share without thoughts

SYSTEM = ("You first think about the problem step by step and then give the answer. Write your thoughts between "
          "<think> and </think>, as Step 1, Step 2 and so on, and the answer after them.")
ANSWER = "Write the answer, and nothing else, between <answer> and </answer>."
PYTHON = "Write a Python 3 program that reads standard input and writes standard output, in a ```python block."

# What a statement says if several outputs are right, or if nearly right ones are accepted: comparing texts cannot judge these.
UNDECIDED = re.compile(r"(?:print|output|report|return)\W+(?:any\b(?! (?:extra|other|additional))|one of (?:them|these(?! \w))\b)"
                       r"|any (?:of them|(?:valid|correct|such) \w+) (?:will be|is|are) (?:accepted|allowed|correct)"
                       r"|(?<!how )(?<!infinitely )(?:multiple|several|many|more than one)"
                       r"(?: (?:possible|correct|valid|optimal|such))* (?:answers?|solutions?|outputs?|strategies)\b"
                       r"|(?:absolute|relative)(?: or (?:absolute|relative))? error"
                       r"|\berror (?:(?:of |is |must be )?(?:at most|less than|no more than)|(?:\w+ )?not (?:exceed|greater))"
                       r"|(?-i:Find any)\b", re.IGNORECASE)
ANY_ORDER = re.compile(r"in (?:any|(?:an )?arbitrary) order", re.IGNORECASE)        # of the output; elsewhere it may be of a move

CHECKS = {"answer": "answer", "code": "tests", "code_partial": "tests"}     # reward of right or wrong -> the fact it needs
FORMATS = "codeforces", "question"                                          # of records
QUESTIONS = "question", "problem", "instruction", "prompt"
ANSWERS = "answer", "final_answer", "expected_answer", "response", "output", "solution", "answer_number"    # a question's


@dataclass(frozen=True)
class Problem:
    messages: tuple[dict, ...]          # what is asked, for tokenizer.chat
    facts: dict                         # what it is checked by: answer; tests [{input, output}], time_limit (s), ...

    @property
    def known(self) -> dict:
        """What rewards are given: the facts, and the question as it is asked."""
        return self.facts | {"question": self.messages[-1]["content"]}


# ---- toy tasks

def tagged(steps: list[str], answer: str) -> str:
    """Numbered steps between <think> tags, then the answer."""
    thoughts = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, 1))
    return f"<think>\n{thoughts}\n</think>\n{answer}"


def sum_problem(rng: random.Random) -> tuple[str, dict, str, str, str]:
    """Question, facts, a right answer, one that is wrong in a step, and one without its thoughts."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    wrong = rng.choice([-2, -1, 1, 2])

    def worked(slip):
        ones = a % 10 + b % 10
        carry = ones // 10
        tens = a // 10 + b // 10 + carry + slip
        plus = f"+{carry}" if carry else ""
        return tagged([f"{a % 10}+{b % 10}={ones}", f"{a // 10}+{b // 10}{plus}={tens}"],
                      f"<answer>\n{10 * tens + ones % 10}\n</answer>")

    return f"{a}+{b}", {"answer": str(a + b)}, worked(0), worked(wrong), str(a + b)


def program_problem(rng: random.Random) -> tuple[str, dict, str, str, str]:
    """As sum_problem, for a line f(x) = m x + c given by two points: the answer is a program."""
    m, c = rng.randint(2, 9), rng.randint(0, 9)
    x, z = sorted(rng.sample(range(1, 10), 2))
    wrong = rng.choice([-2, -1, 1, 2])

    def program(m, c):
        return f"```python\nprint({m}*int(input())+{c})\n```"

    def worked(m, c):
        return tagged([f"({m * (z - x)})/({z}-{x})={m}", f"{m * x + c}-{m}*{x}={c}"], program(m, c))

    tests = [{"input": f"{v}\n", "output": f"{m * v + c}\n"} for v in (0, 3, 7, 12)]
    slipped = (m, c + wrong) if rng.random() < 0.5 else (max(1, m + wrong), c)
    return (f"f({x})={m * x + c}, f({z})={m * z + c}", {"tests": tests, "time_limit": 2.0, "language": "python"},
            worked(m, c), worked(*slipped), program(m, c))


TASKS = {"sums": sum_problem, "code": program_problem}


def terms(drawn) -> str:
    """What decides whether a drawn problem belongs to the test set: its question, in which 4+3 counts as 3+4."""
    return "+".join(sorted(drawn[0].split("+")))


def toy_problems(task: str, count: int, seed: int, test: bool = False) -> list[Problem]:
    """`count` different problems; with `test`, of the test set, which shares no question with the others."""
    return [Problem(({"role": "user", "content": question},), facts)
            for question, facts, *_ in draw(TASKS[task], itemgetter(0), terms, count, seed, test, once=True)]


def toy_split(task: str, tests: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """The problems to train on, and so many of the test set, the same for every seed."""
    return toy_problems(task, 3000 if task == "sums" else 1000, seed), toy_problems(task, tests, seed=99, test=True)


def toy_records(task: str, count: int, seed: int, clean: bool = False) -> list[dict]:
    """Records for supervised fine-tuning (train_kd.py reads them), of mixed quality, or with `clean` all right."""
    rng, records = random.Random(seed + 1), []
    for question, _, right, wrong, bare in draw(TASKS[task], itemgetter(0), terms, count, seed, test=False, once=False):
        answer = wrong if rng.random() < NOISE else right
        if rng.random() < UNTAGGED:
            answer = bare
        records.append({"instruction": question, "context": "", "response": right if clean else answer, "category": task})
    return records


# ---- records

def load_problems(paths, limit: int | None = None, format: str | None = None,
                  plain: bool = False) -> tuple[list[Problem], int]:
    """The problems in files, folders or hub datasets, every question once; and how many records were left out: those with an
    earlier question, with a blank or null one, or with an answer that cannot be compared with others (blank, a proof, several).

    limit   read only so many records
    format  one of FORMATS; without it each record is recognised
    plain   ask as the records do: SYSTEM is not put before the question, nor ANSWER or PYTHON after it
    Raises InputError for a record that is no problem, or whose tests, limits or passage have the wrong type, naming the place.
    """
    found, read = {}, 0
    for read, (where, record) in enumerate(islice(read_records(paths), limit), 1):
        with suppress(Dropped):
            problem = to_problem(record, where, format, plain)
            found.setdefault(same_prompt(problem.messages[-1:]), problem)      # whatever the system turn
    return list(found.values()), read - len(found)


def shows_its_tests(problem: Problem) -> bool:
    """Whether the prompt shows every test of its program, as _shown writes it."""
    asked = problem.messages[-1]["content"]
    tests = [_shown(test).rstrip() for test in problem.facts.get("tests") or ()]
    return bool(tests) and all(test in asked and re.search(re.escape(test) + r"[ \t\r]*(\n|`|$)", asked) for test in tests)


def _shown(test: dict) -> str:
    return f"Input:\n{test['input']}\nOutput:\n{test['output']}"


def to_problem(record: dict, where: str, format: str | None = None, plain: bool = False) -> Problem:
    """One record, of a format or recognised by its fields; plain as in load_problems.  Raises Dropped where the answer is blank
    or cannot be compared with others, or the statement is null or blank."""
    stated = _of_codeforces(record) and not absent(record["description"])
    read = _codeforces if format == "codeforces" or stated and not format else _question
    text, form, facts = read(record, where)
    check_text(text + json.dumps(facts, ensure_ascii=False), where, "the record")
    system = _system(record, where) if plain else SYSTEM
    asked = {"role": "user", "content": text if plain else f"{text}\n\n{form}"}
    return Problem(({"role": "system", "content": system}, asked) if system else (asked,), facts)


def _system(record: dict, where: str) -> str:
    """A record's own system turn: the first beside the question, or a field."""
    asked = next((record[name] for name in QUESTIONS if _asked(record.get(name))), "")
    turns = [turn for turn in asked if turn.get("role") == "system"] if isinstance(asked, list) else []
    return (text_field((turns or [{}])[0], where, "content", default="")
            or text_field(record, where, "system", "system_prompt", default=""))


def _of_codeforces(record: dict) -> bool:
    """Whether it has the fields of a Codeforces statement, which may be null."""
    return "description" in record and ("input_format" in record or "examples" in record)


def _question(record: dict, where: str) -> tuple[str, str, dict]:
    """What is asked, in which form the answer shall be, and the answer, or the tests that a program must pass."""
    asked = next(filter(None, (_asked(record.get(name)) for name in QUESTIONS)), "")
    check_shown(record, where, *MEDIA, fault="would not be shown to the model; leave the record out")
    if isinstance(record.get("reward_model"), dict) and absent(record.get("answer")):      # verl's
        record = record | _ground_truth(record["reward_model"].get("ground_truth"), where)
    given = any(name in record for name in ANSWERS)
    tests = _tests(record, "tests", where) if isinstance(record.get("tests"), list) or not given else []
    if tests:                                                                   # an answer beside them is one program of many
        facts = {"tests": tests, "language": "python"} | _limits(record, where)
    else:
        answer = _answer(record)
        facts = {"answer": answer} if answer else {}
    if asked and facts:
        return with_passage(record, where, asked, _asked(record.get("prompt"))), PYTHON if tests else ANSWER, facts
    # With fields for a question and an answer it is a problem, left out if one is blank or of no use; else an error.
    blank = any(name in record and (absent(record[name]) or isinstance(record[name], str)) for name in QUESTIONS[:2])
    unstated = _of_codeforces(record) and absent(record["description"])
    if unstated or (asked or blank) and (given or tests):
        raise Dropped(where, "no answer to compare with, or no statement")
    lacks = "neither answer nor tests" if asked else "no text that asks something"
    raise InputError(f"{where}: is not a problem: {lacks} (its fields: {names_of(record)}); give `question` and `answer` "
                     "or `tests`, or Codeforces' `description` and `examples`")


def _ground_truth(value, where: str) -> dict:
    """verl's ground truth as fields of a question: text, or JSON: the answer in a list, or a program's inputs and outputs."""
    held = None
    with suppress(ValueError):
        held = parse_json(value) if isinstance(value, str) else None
    if isinstance(held, dict):
        pairs = held.get("inputs"), held.get("outputs")
        if held.get("fn_name") or not all(isinstance(texts, list) for texts in pairs) or len(pairs[0]) != len(pairs[1]):
            what = ", ".join(list(held)[:6]) or "nothing"
            raise InputError(f"{where}: field 'ground_truth' holds {what}, which cannot be judged; leave the record out")
        return {"tests": [{"input": text, "output": wanted} for text, wanted in zip(*pairs)]}
    return {"answer": held[0] if isinstance(held, list) and len(held) == 1 and isinstance(held[0], str) else value}


def _answer(record: dict) -> str:
    """The answer that others are compared with; "" where it is blank, or a proof, which nobody will repeat."""
    name = next((name for name in ANSWERS if not absent(record.get(name)) and str(record[name]).strip()), None)
    value = record[name] if name else ""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    whole = str(value).strip() if isinstance(value, (str, int, float)) else ""
    last_line = whole.rpartition("\n")[2]
    marked = re.match(r".*(?:####|\b[Tt]he answer is\b:?)\s*(.*)$", last_line)              # GSM8K's, MetaMath's: the last one
    answer = boxed(whole) or (marked[1] if marked else whole).strip()                       # NuminaMath boxes it
    without_latex = re.sub(r"\\(?:begin|end)\{\w+\*?\}|\\[A-Za-z]+", " ", answer)
    wordy = len(re.findall("[A-Za-z]{3,}", without_latex)) > 3 or "\n" in answer
    prose = name == "solution" and answer == whole and wordy                                # a solution that marks no answer
    proof = answer.casefold() in ("proof", "notfound") or record.get("question_type") == "proof"            # NuminaMath-1.5's
    return "" if prose or proof else answer


def _asked(value) -> str:
    """The text of a question; or of the one user turn in a list of messages, as trl's datasets have it; "" for anything else."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        turns = [turn for turn in value if turn.get("role") != "system"]        # _system reads them, or SYSTEM takes their place
        value = turns[0].get("content") if [turn.get("role") for turn in turns] == ["user"] else None
    return value if isinstance(value, str) and value.strip() else ""


def _codeforces(record: dict, where: str) -> tuple[str, str, dict]:
    """Statement, form of the answer, and facts. No tests if comparing outputs cannot decide: several outputs are right, or nearly
    right ones (by UNDECIDED), a program of the contest checks or answers, or files are used."""
    title, description, stdin, stdout, interaction, note = (text_field(record, where, name, default="") for name in (
        "title", "description", "input_format", "output_format", "interaction_format", "note"))
    if not description:
        if "description" in record:
            raise Dropped(where, "empty description")
        raise InputError(f"{where}: has no `description`; add one, or leave out --format codeforces")
    examples, tests = (_tests(record, name, where) for name in ("examples", "official_tests"))
    undecided = (interaction or "this is an interactive problem" in description.lower()
                 or UNDECIDED.search("\n".join((description, stdout, note))) or ANY_ORDER.search(stdout)
                 or not absent(record.get("generated_checker"))
                 or text_field(record, where, "input_mode", default="stdio") != "stdio")
    parts = [("# ", title), ("", description), ("## Input\n", stdin), ("## Output\n", stdout), ("## Interaction\n", interaction),
             *(("## Example\n", _shown(test)) for test in examples), ("## Note\n", note)]
    form = (f"Time limit: {record['time_limit']} seconds. " if not absent(record.get("time_limit")) else "") + PYTHON
    tests = examples + [test for test in tests if test not in examples]
    facts = {"tests": [] if undecided else tests, "language": "python"} | _limits(record, where)
    return "\n\n".join(heading + text for heading, text in parts if text), form, facts


def _limits(record: dict, where: str) -> dict[str, float]:
    found = {name: record[name] for name in ("time_limit", "memory_limit") if not absent(record.get(name))}
    for name, value in found.items():
        if type(value) not in (int, float) or not 0 < value < 1e12:
            raise InputError(f"{where}: field {name!r} is {value!r:.40}; give a number above 0, or leave it out")
    return {name: float(value) for name, value in found.items()}


def _tests(record: dict, name: str, where: str) -> list[dict]:
    value = record.get(name)
    if absent(value):
        return []
    if not isinstance(value, list) or not all(isinstance(test, dict) and isinstance(test.get("input"), str)
                                              and isinstance(test.get("output"), str) for test in value):
        raise InputError(f"{where}: field {name!r} is not a list of {{input, output}} texts; fix the record")
    if any(test.get("fn_name") or any(test.get(key) in ("functional", "function_call") for key in ("testtype", "type"))
           for test in value):
        raise InputError(f"{where}: field {name!r} tests a function, and minikd only whole programs; leave the record out")
    return [{"input": test["input"], "output": test["output"]} for test in value]


def encode_problems(problems: list[Problem], tokenizer, max_prompt_length: int = 1024, what: str = "problems") -> list[Encoded]:
    """Prompts as rows without a response; row.index points into `problems`. Longer prompts are left out.  Raises InputError when
    none is left, calling the problems `what`."""
    prompts = tokenizer.encode_batch([tokenizer.chat(list(problem.messages), add_generation_prompt=True)
                                      for problem in problems])
    rows = [Encoded(prompt, [], False, i) for i, prompt in enumerate(prompts) if len(prompt) <= max_prompt_length]
    if not rows:
        raise InputError(f"all {len(problems)} {what} have prompts of more than {max_prompt_length} tokens; "
                         "raise --max-prompt-length")
    return rows
