"""Whether two answers to a problem of mathematics are the same: compared as text and as a number, without a parser of LaTeX."""
import re
from decimal import Decimal
from fractions import Fraction


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same, as text or as a number (1,000 = 1000.0, 1/2 = \\frac{1}{2} = 0.5).

    If an answer has a LaTeX \\boxed{...}, only what the last one holds counts. The comparison ignores $ and * around the answer,
    `Answer:` or #### before it, a full stop after it, percent and degree signs, a letter and = before it, LaTeX's spaces, a space
    beside a symbol (beside a minus only if both sides have one), and a number's unit in \\text{...}.
    """
    a, b = map(_plain, (a, b))
    tight = lambda text: re.sub(r" ?([^\w .-]) ?| (-) ", r"\1\2", " ".join(text.split()))   # (1, 2) is (1,2), but 1 2 not 12
    if tight(a) == tight(b):
        return True
    value = _value(a)                                           # only now: long numbers take a while
    return value is not None and value == _value(b)


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces balanced; None without one."""
    *before, inside = re.split(r"\\boxed\s*\{", text)
    depth = 1
    for at, letter in enumerate(inside if before else ""):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return inside[:at].strip()
    return None


def _plain(answer: str) -> str:
    """The answer without what _LATEX takes off it."""
    text = boxed(answer) or answer
    for pattern, replacement in _LATEX:
        text = re.sub(r"(?<!\.)\.$", "", text.strip("$* \n")).rstrip("$* \n")             # the full stop, and marks around it
        text = re.sub(pattern, replacement, text)
    return text.strip() or answer.strip()                       # all of it may be marks


def _value(text: str) -> Fraction | None:
    """The number that a text is: a decimal, or a fraction of two; exact, unlike a float. None for more than 10,000 characters, as
    the time grows with their square."""
    parts = [part.strip() for part in text.split("/")]
    if len(text) > 10_000 or len(parts) > 2 or not all(map(_NUMBER.fullmatch, parts)):
        return None
    top, bottom = (Fraction(Decimal(part.replace(",", ""))) for part in (*parts, "1")[:2])
    return top / bottom if bottom else None


_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,4})?", re.ASCII | re.IGNORECASE)
# What does not change an answer, mostly as in the MATH dataset's own comparison (arXiv:2103.03874): pattern -> what replaces it.
_LATEX = [(r"^(?:####|(?i:(?:final )?answer(?: is)?\s*:))\s*", ""),                                            # Answer: 5
          (r"\\[dt]?frac\s*", r"\\frac"),
          (r"\\frac(\d)", r"\\frac{\1}"), (r"\\frac(\{[^{}]*\})(\d)", r"\\frac\1{\2}"),                     # \frac12, \frac1{12}
          (r"\{,\}", ","), ("\u2212", "-"), (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),                                # 1{,}000; \sqrt2
          (r"([\^_])\{(\w)\}", r"\1\2"),                                                                      # 2^{3}, 11_{8}
          (r"\\(?:left|right)(?![a-z])|(?<!\\)\\[!,;: ()$\[\]]|\\?%|\^\\circ|\^\{\\circ\}|\\degree|°", ""),   # \\ ends a row
          (r"^[A-Za-z]\s*=(?!=)", ""),
          (r"^(-?(?:[\d.,]+|\\frac\{\d+\}\{\d+\}))\s*"                                  # a number's unit: m^2, but not e^3 or n^2
           r"\\(?:text|mbox|mathrm)\{(?! *[eix] *\}| *[a-ln-z] *\}\^)[^{}]*\}(?:\^\d)?$", r"\1"),
          (r"\\(?:text|textbf|mbox|mathrm)\{([^{}]*)\}", r"\1"),
          (r"(?<![\w.])\\frac\{(-?[\w.]+)\}\{(-?[\w.]+)\}(?!\.?\w)", r"\1/\2")]                             # 1/2, x/2
