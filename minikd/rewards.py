"""Rewards for answers of the form `<think>...</think>`, then the answer, bare or in `<answer>...</answer>`.

    f(completions, facts, **options) -> a number each, or None for what cannot be judged

facts[i] is Problem.known: "question" (as it is asked); "answer" (text); "tests" [{"input", "output"}], "time_limit" (s),
"memory_limit" (MB), "language".
None is left out of every sum and mean. (The paper's script gives 0.5 when it cannot read the gold answer.)

Sources
    the paper       Knowledge Distillation for Large Language Models; its grpo_rl.py follows open-r1
    open-r1         huggingface/open-r1 at 1416fa0, src/open_r1/rewards.py, by line; cf_code: its cf_scoring.py
    DAPO            arXiv:2503.14476, eq. (13)

Each function says where it departs from its source; most departures close loopholes.
"""
import importlib.util
import math
import re
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial, wraps
from pathlib import Path

from minikd import sandbox
from minikd.answers import boxed, same_answer
from minikd.errors import InputError

Values = list[float | None]
LARGEST = 1e9                                   # of a reward, and of a weight: squares of the sums must fit into float32

_MARKERS = re.compile(r"\bStep \d+\b|^\d+\.(?!\d)|^[-*] +\S.*|\b(?:First|Second|Next|Finally),", re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")       # languages of a code fence; without one it is taken for Python


# ---- the parts of a completion

def think_part(completion: str) -> str | None:
    """The first <think>...</think>, stripped; None where there is none, or where it never ends."""
    thoughts, end, _ = completion.partition("<think>")[2].partition("</think>")
    return thoughts.strip() if end else None


def answer_part(completion: str) -> str | None:
    """Inside the one <answer> pair after the thoughts, or else all that follows the last </think>; stripped.

    None without either, and if thoughts begin but never end: text inside them is no answer.
    """
    _, closed, rest = completion.rpartition("</think>")
    if "<think>" in rest:
        return None
    inside, end, _ = rest.partition("<answer>")[2].partition("</answer>")
    if end and rest.count("<answer>") == rest.count("</answer>") == 1:          # of two pairs, neither is the answer
        return inside.strip()
    return rest.strip() if closed else None


def extract_code(text: str) -> str | None:
    """The last closed code block; None if there is none, or its language is not Python. A block in a list is indented with the
    list: that is taken off its lines, and a fence that is indented further does not end it."""
    fence, lines, code = None, [], None
    for line in text.split("\n"):
        mark = re.fullmatch(r"([ \t]*)(`{3,})([^`]*)", line)
        if mark and fence is None:
            fence, lines = mark, []
        elif mark and len(mark[1]) <= len(fence[1]) and len(mark[2]) >= len(fence[2]) and not mark[3].strip():
            language = (fence[3].split() or [""])[0].lower()
            code = "".join(line.removeprefix(fence[1]) + "\n" for line in lines)
            fence, code = None, code if lines and language in _PYTHON else None
        else:
            lines.append(line)
    return code


# ---- form

def format_fault(completion: str) -> str | None:
    """What is wrong with a completion's form, in a few words. None if it is thoughts and then an answer, neither of them blank,
    with only blanks between and after, and nothing at all before (as open-r1 wants it)."""
    before, *rest = re.split("(</?(?:think|answer)>)", completion)
    tags, texts = rest[::2], [text.strip() for text in rest[1::2]]              # a text, maybe blank, follows each tag
    if tags not in (["<think>", "</think>"], ["<think>", "</think>", "<answer>", "</answer>"]):
        return f"its tags are {' '.join(tags)[:80]}" if tags else "no tags"
    thoughts, between, answer, after = texts if len(texts) == 4 else (texts[0], "", texts[1], "")       # 2: without answer tags
    faults = {"text before <think>": before, "no thoughts": not thoughts, "no answer": not answer,
              "text outside the tags": between or after}
    return next((fault for fault, found in faults.items() if found), None)


def format_reward(completions: list[str], facts: list[dict]) -> Values:
    """1 for thoughts and then an answer, nothing before, between or after; else 0 (format_fault).     open-r1 line 85

    All of it must match, each tag once: open-r1's MULTILINE also accepts text after the end and a second think block.
    Answer tags are optional, and so are line breaks inside the tags.
    """
    return [float(format_fault(completion) is None) for completion in completions]


def tags_reward(completions: list[str], facts: list[dict]) -> Values:
    """A quarter for each tag, with its line breaks, that is there exactly once.                open-r1 line 93

    (The paper's figure plots another function, which is not in its code: xmlcount, an eighth for each tag, less 0.001 for each
    character after the answer.)
    """
    tags = "<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"
    return [0.25 * sum(completion.count(tag) == 1 for tag in tags) for completion in completions]


def steps_reward(completions: list[str], facts: list[dict]) -> Values:
    """min(1, n / 3) for n different markers of steps in the thoughts.                          open-r1 line 115

    Markers: `Step 1`, with a colon or without; `1.`, not 3.14, at the start of a line (open-r1: of the text); a bullet
    line, not -5 or ---; `First,` `Second,` `Next,` `Finally,`. Each counts once, however often it is repeated.
    """
    return [min(1.0, len(set(_MARKERS.findall(think_part(completion) or ""))) / 3) for completion in completions]


# ---- length and repetition

def length_reward(completions: list[str], facts: list[dict], max_length: int = 2000, margin: int = 400) -> Values:
    """0 up to max_length - margin characters, then falling to -1 at max_length.      DAPO eq. (13), open-r1 line 620

    In characters, not tokens: the defaults are for about 512, with DAPO's margin of a fifth. It is open-r1's
    soft_overlong_punishment; open-r1's own `length` is another reward.
    """
    over = [len(completion) - (max_length - margin) for completion in completions]
    return [0.0 if n <= 0 else -n / margin if n <= margin else -1.0 for n in over]


def repetition_reward(completions: list[str], facts: list[dict], n: int = 3, max_penalty: float = -1.0) -> Values:
    """max_penalty (1 - different / all) over the n-grams of lower-case words; 0 if too short.     open-r1 line 285"""
    values = []
    for completion in completions:
        words = completion.lower().split()
        grams = list(zip(*(words[i:] for i in range(n))))
        again = len(grams) - len(set(grams))
        values.append(max_penalty * again / len(grams) if again else 0.0)
    return values


# ---- right or wrong

def answer_reward(completions: list[str], facts: list[dict]) -> Values:
    """1 if the answer is the problem's as text or as a number (answers.same_answer; open-r1: math-verify), else 0; None
    without a gold answer. In a text without tags, only what the last \\boxed{...} holds is an answer."""
    values = []
    for completion, problem in zip(completions, facts, strict=True):
        answer, gold = answer_part(completion), (problem.get("answer") or "").strip()
        if answer is None and not re.search("</?(?:think|answer)>", completion):
            answer = boxed(completion)
        values.append(float(answer is not None and same_answer(answer, gold)) if gold else None)
    return values


def _tests_of(completion: str, problem: dict, max_seconds: float, max_memory: int) -> list[tuple] | None:
    """Per test (run_program's arguments, the expected output); [] without a program, None if the problem cannot be judged."""
    tests = [test for test in problem.get("tests") or () if len(test["output"].encode()) < sandbox.OUTPUT]
    if not tests or not (problem.get("language") or "python").lower().startswith("py"):
        return None
    answer = answer_part(completion)
    if answer is None and "<think>" not in completion:
        answer = completion
    source = extract_code(answer or "")
    limits = (min(problem.get("time_limit") or 5.0, max_seconds),                          # 5 s: open-r1's
              int(max(64, min(problem.get("memory_limit") or 512, max_memory))))           # the interpreter takes up to 30
    return [((source, test["input"], *limits), test["output"]) for test in tests] if source else []


def code_reward(completions: list[str], facts: list[dict], partial: bool = False, max_seconds: float = 10.0,
                max_memory: int = 512) -> Values:
    """1 if the answer's program passes all tests, else 0; with `partial` the fraction it passes.  open-r1 line 511

    The program is the last code block of the answer, or of the whole text if that has no think tags. None if the
    problem wants another language or has no tests; those with sandbox.OUTPUT bytes of output or more are left out.
    stdout is compared completely (open-r1's zip accepts the first line alone); a timeout fails only its own test. No
    code, code that does not compile (cf_code: -1, -0.1), and a last block that is not Python (open-r1 takes the last
    ```python) get 0.
    max_seconds and max_memory (MB, but a program has at least 64) cap the problem's own limits.
    The programs of all completions run in parallel, their tests in rounds of 1, 1, 2, 4, .... A program that failed a test runs
    in no later round; with `partial`, one that was stopped in two tests (for its time, its output, ...). Tests that it did not
    run count as failed. So an endless loop costs few time limits: one or two if every input causes it.
    """
    asked = [_tests_of(completion, problem, max_seconds, max_memory)
             for completion, problem in zip(completions, facts, strict=True)]
    passed, stopped = [0] * len(asked), [0] * len(asked)        # per completion: tests passed, tests in which it was stopped
    most = max((len(tests) for tests in asked if tests), default=0)
    start, end = 0, 1
    while start < most:                                         # in rounds of 1, 1, 2, 4, ...
        due = [i for i, tests in enumerate(asked) if tests and (stopped[i] < 2 if partial else passed[i] == start)]
        results = _run_all({run for i in due for run, _ in asked[i][start:end]})
        for i in due:
            for run, wanted in asked[i][start:end]:
                stopped[i] += results[run].status not in ("ok", "error")
                passed[i] += results[run].status == "ok" and sandbox.same_output(results[run].stdout, wanted)
        start, end = end, 2 * end
    shares = [None if tests is None else passed[i] / max(1, len(tests)) for i, tests in enumerate(asked)]
    return shares if partial else [share if share is None else float(share == 1) for share in shares]


_DONE = {}                                      # run_program's arguments -> its result, in this process


def _run_all(runs: set[tuple]) -> dict[tuple, sandbox.Result]:
    """run -> its result. As a policy repeats its programs, results are remembered if they are short and the program ended by
    itself, but not if it could not start a thread: other programs may have been the reason (sandbox.LIMITS)."""
    if len(_DONE) > 50_000:
        _DONE.clear()
    missing = sorted(runs - _DONE.keys())
    results = {run: _DONE[run] for run in runs & _DONE.keys()} | dict(zip(missing, sandbox.run_programs(missing)))
    for run, result in results.items():
        short = len(result.stdout) + len(result.stderr) <= 10_000
        if short and result.status in ("ok", "error") and "start new thread" not in result.stderr:
            _DONE[run] = result
    return results


REWARDS = {"format": format_reward, "tags": tags_reward, "steps": steps_reward, "length": length_reward,
           "repetition": repetition_reward, "answer": answer_reward, "code": code_reward,
           "code_partial": partial(code_reward, partial=True)}


# ---- several rewards together

def combine(values: dict[str, Values], weights: dict[str, float]) -> Values:
    """Per completion the weighted sum of the rewards that judged it, None if none did.  values: name -> one per completion"""
    totals = []
    for row in zip(*values.values(), strict=True):
        judged = [weights[name] * value for name, value in zip(values, row) if value is not None]
        totals.append(sum(judged) if judged else None)
    return totals


def summary(values: dict[str, Values], group_size: int = 0) -> dict[str, float | None]:
    """For the log, per reward:

    reward/format            mean over the answers that it judged, and
    reward/format/std        their standard deviation (the population's); both None if it judged none
    reward/format/unjudged   share of the answers that it did not judge
    reward/format/flat       only for answers in groups of group_size: share of the groups in which it tells no two apart
    """
    found = {}
    for name, column in values.items():
        judged = [value for value in column if value is not None]
        mean, std = (statistics.fmean(judged), statistics.pstdev(judged)) if judged else (None, None)
        found |= {f"reward/{name}": mean, f"reward/{name}/std": std,
                  f"reward/{name}/unjudged": 1 - len(judged) / max(1, len(column))}
        if group_size:
            groups = [set(column[at:at + group_size]) - {None} for at in range(0, len(column), group_size)]
            found[f"reward/{name}/flat"] = sum(len(group) < 2 for group in groups) / max(1, len(groups))
    return found


def load_rewards(names: str) -> dict[str, Callable[..., Values]]:
    """"format,steps,my_rewards.py:brevity" -> {name: function}; a user's function is called as those in REWARDS.

    Raises InputError for a name that is unknown, given twice or taken, a file that does not load, and a function not in it.
    """
    found = {}
    for path, name in _entries(names):
        if not path and name not in REWARDS:
            raise InputError(f"--rewards {names}: there is no reward {name!r}; give some of {', '.join(REWARDS)}, or "
                             "FILE.py:FUNCTION")
        if name in found or path and name in REWARDS:           # both would have one name in the log
            raise InputError(f"--rewards {names}: there are two rewards {name!r}; leave one out, or rename your function")
        found[name] = _from_file(path, name) if path else REWARDS[name]
    return found


def reward_files(names: str) -> list[str]:
    """The Python files named in load_rewards' argument."""
    return [str(Path(path).expanduser()) for path, _ in _entries(names) if path]


def _entries(names: str) -> list[tuple[str, str]]:
    """(file or "", name of the function) of each."""
    return [tuple(entry.strip().rpartition(":")[::2]) for entry in names.split(",")]


def _from_file(path: str, name: str) -> Callable[..., Values]:
    """A function of the user's file, with checked results: NaN and infinity become None, numbers beyond LARGEST an InputError."""
    file, module_name = Path(path).expanduser(), "rewards_of_" + re.sub(r"\W", "_", path)
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"{path}:{name}: there is no Python file {path}; give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(module_name, file)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)   # dataclasses look it up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:                                    # whatever the file does
        raise InputError(f"{path}: does not load ({type(error).__name__}: {error}); fix it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"{path}: has no function {name!r}; define it, or check the name")

    @wraps(function)
    def checked(completions, facts, **options):
        try:
            values = function(list(completions), [dict(each) for each in facts], **options)     # others read them too
            values = list(values) if isinstance(values, Iterator) else values
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)                  # the last in the user's file, if any
            at = next((frame for frame in reversed(frames) if frame.filename == str(file)), frames[-1])
            raise InputError(f"{path}:{name}: raised {type(error).__name__}: {error} ({at.filename}:{at.lineno}); fix it, "
                             "or return None for what cannot be judged") from error
        try:
            numbers = [None if value is None or not math.isfinite(value) else float(value)
                       for _, value in zip(completions, values, strict=True)]
            if isinstance(values, (Mapping, Set)) or any(abs(number or 0) > LARGEST for number in numbers):
                raise ValueError(values)
            return numbers
        except Exception:                                                       # of the wrong type or length, whatever it is
            raise InputError(f"{path}:{name}: returned {values!r:.60} for {len(completions)} completions; "
                             "return for each a number from -10^9 to 10^9, or None") from None

    return checked
