"""ROUGE-L: how much of a reference answer a model's answer repeats, in order. Standard library only.

rouge_l equals rouge_score 0.1.2's rougeL to the last digit, with and without its Porter stemmer (nltk's, in nltk's own
mode). It is faster in two ways: the longest common subsequence is computed for all words of a text at once, in the
bits of one big integer, and each word is stemmed only once in a process.

References
  Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.1
  Crochemore, Iliopoulos, Pinzon, Reid 2001, "A fast and practical bit-vector algorithm for the LCS problem"
  Hyyrö 2004, "Bit-parallel LCS-length computation revisited"
"""
import re
import string
import sys
import unicodedata
from functools import cache
from math import fsum

from minikd.errors import InputError, visible
from minikd.stem import porter_stem

_ASCII_WORDS = bytes(byte if chr(byte) in string.ascii_lowercase + string.digits else ord(" ") for byte in range(256))
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(prediction: str, reference: str, stemmer=False, unicode=False) -> tuple[float, float, float]:
    """-> (precision, recall, f1), each 0 to 1.       Lin 2004 eq. 2-4 with beta = 1

    Prediction first: rouge_score's own score() takes the reference ("target") first.
    See tokens() for what `stemmer` and `unicode` make of a text.
    """
    return _score(tokens(prediction, stemmer, unicode), tokens(reference, stemmer, unicode))


def rouge_l_best(prediction: str, references, stemmer=False, unicode=False) -> tuple[float, float, float]:
    """rouge_l against the reference that gives the highest F1, the first of equals (rouge_score's score_multi)."""
    predicted = tokens(prediction, stemmer, unicode)
    scores = [_score(predicted, tokens(reference, stemmer, unicode)) for reference in _as_list(references)]
    return max(scores, key=lambda score: score[2])


def exact_match(prediction: str, references, unicode=False) -> bool:
    """Whether the prediction equals one of the references, apart from case, ASCII punctuation and spacing.

    MiniLLM's rule (rouge_metric.py, from Natural Instructions): SQuAD's, without removing a, an and the. In code
    punctuation carries meaning ("x + 1" would match "x - 1"), so with `unicode` the unicode tokens must be equal.
    """
    def plain(text):
        return tokens(text, unicode=True) if unicode else text.lower().translate(_NO_PUNCTUATION).split()
    return plain(prediction) in map(plain, _as_list(references))


def mean_by_category(examples: list[dict]) -> dict:
    """Mean scores x 100: {category: {"examples", "rouge_l", "exact_match"}}, sorted by name, "all" (every example) last.

    examples  dicts with "f1" and "exact_match", and "category" if they have one; one called "all" becomes "all (category)",
              control characters become escapes
    """
    def mean(group, score):
        return 100 * fsum(example[score] for example in group) / len(group)

    groups = {}
    for example in examples:
        if category := example.get("category"):
            groups.setdefault("all (category)" if category == "all" else visible(str(category)), []).append(example)
    groups = dict(sorted(groups.items())) | ({"all": examples} if examples else {})
    return {category: {"examples": len(group), "rouge_l": mean(group, "f1"), "exact_match": mean(group, "exact_match")}
            for category, group in groups.items()}


def _as_list(references) -> list:
    """References as a list; a single string is one reference."""
    references = [references] if isinstance(references, str) else list(references)
    if not references:
        raise InputError("no reference to compare with; give at least one")
    return references


# ---- Text to tokens ----

def tokens(text: str, stemmer=False, unicode=False) -> list[str]:
    """The words that ROUGE-L compares.

    By default as rouge_score: lower-cased, each run of a-z and 0-9 is a word, everything else is space. That loses the
    accents of Spanish and the symbols of code: 'qué' -> 'qu'; 'año' -> 'a', 'o'; 'x += 1' and 'x - 1' -> 'x', '1'.
    unicode=True keeps them: lower-cased and in NFC (a separate accent mark joins its letter), each run of letters,
    digits and their marks in any script is a word, and so is every other single symbol that is not space.
    stemmer=True stems words of more than three letters, by English rules; words that are not ASCII are unchanged.
    """
    if unicode:
        words = _unicode_word().findall(unicodedata.normalize("NFC", text.lower()))
    else:                                                       # a table look-up per byte: 3 x as fast as a regex
        words = text.lower().encode("ascii", "replace").translate(_ASCII_WORDS).decode("ascii").split()
    return list(map(porter_stem, words)) if stemmer else words


@cache
def _unicode_word() -> re.Pattern:
    """A word: letters and digits, then any mix of combining marks with more of them; or one symbol with its marks.

    `re` has no class for combining marks, so they are listed (0.1 s, once, at the first call).
    """
    marks = "".join(filter(lambda c: unicodedata.category(c)[0] == "M", map(chr, range(sys.maxunicode + 1))))
    return re.compile(rf"[^\W_]+(?:[{marks}]+[^\W_]*)*|\S[{marks}]*")


# ---- Tokens to scores ----

def _score(predicted: list[str], wanted: list[str]) -> tuple[float, float, float]:
    common = lcs_length(predicted, wanted)
    if not common:                                              # also if a side is empty
        return 0.0, 0.0, 0.0
    precision, recall = common / len(predicted), common / len(wanted)          # Lin 2004 eq. 3, 2
    return precision, recall, 2 * precision * recall / (precision + recall)    # eq. 4


def lcs_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence.      Crochemore et al. 2001, Hyyrö 2004

    In the textbook table a row (b's words up to one, against all of a) grows by 0 or 1 from cell to cell, so it fits in
    len(a) bits: bit i of V is 0 where the row grows at a[i]. One addition gives the next row: its carry moves each
    growth back to the first match after the previous growth. So len(b) steps replace len(a) x len(b) cells.
    """
    masks, bit = {}, 1
    for word in a:
        masks[word] = masks.get(word, 0) | bit                  # M: the positions of each word in `a`
        bit <<= 1
    V = ones = bit - 1                                          # all len(a) bits are 1: a row of zeros grows nowhere
    for M in filter(None, map(masks.get, b)):                   # a word that is not in `a` changes no row
        U = V & M
        V = (V + U) | (V - U)                                   # carries past the last bit are cut off below
    return len(a) - (V & ones).bit_count()
