"""ROUGE-L: how much of a reference answer a model's answer repeats, in order. Standard library only.

rouge_l equals rouge_score 0.1.2's rougeL to the last digit, with and without its Porter stemmer (nltk's, in nltk's own
mode). It is faster in two ways: the longest common subsequence is computed for all words of a text at once, in the
bits of one big integer, and each word is stemmed only once in a process.

References
  Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.1
  Crochemore, Iliopoulos, Pinzon, Reid 2001, "A fast and practical bit-vector algorithm for the LCS problem"
  Hyyrö 2004, "Bit-parallel LCS-length computation revisited"
  Porter 1980, "An algorithm for suffix stripping", Program 14(3)
"""
import re
import string
import sys
import unicodedata
from functools import cache, lru_cache
from math import fsum

from minikd.errors import InputError, visible

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


# ---- Porter's stemmer ----
# Porter 1980 with the departures of nltk's PorterStemmer in its default mode, NLTK_EXTENSIONS, each marked "nltk".

_IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "howe": "howe",
              "inning": "inning", "innings": "inning", "outing": "outing", "outings": "outing",
              "canning": "canning", "cannings": "canning",
              "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}       # nltk
_ENDINGS = frozenset("cdegilmnrstuy")                           # no rule touches a word that ends otherwise
_SHAPE = bytes(ord("v") if chr(byte) in "aeiou" else byte if byte == ord("y") else ord("c") for byte in range(256))


def _rules(table: str) -> dict:
    """'ational>ate ...' -> rules by their last two letters, so that most words pass a step by one look-up."""
    rules = {}
    for rule in table.split():
        suffix, _, replacement = rule.partition(">")
        rules.setdefault(suffix[-2:], []).append((suffix, replacement))
    return rules


_STEP2 = _rules("ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e ousli>ous "
                "ization>ize ation>ate ator>ate alism>al iveness>ive fulness>ful ousness>ous aliti>al iviti>ive "
                "biliti>ble fulli>ful ogi>og")                  # nltk: bli for abli, fulli, and ogi (after an l)
_STEP3 = _rules("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>")
_STEP4 = _rules("al> ance> ence> er> ic> able> ible> ant> ement> ment> ent> ion> ou> ism> ate> iti> ous> ive> ize>")
_ONLY_AFTER = {"ogi": "l", "ion": ("s", "t")}       # suffix -> the letters that it must follow


@lru_cache(maxsize=1 << 18)                                     # about 40 MB; a corpus rarely has a tenth of this
def porter_stem(word: str) -> str:
    """The stem of a lower-case word of ASCII letters and digits, as rouge_score gives it: up to three letters stay."""
    if len(word) <= 3 or word[-1] not in _ENDINGS or not word.isascii():
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    word = _step1b(_step1a(word))
    if word[-1] == "y" and len(word) > 2 and _shape(word[:-1]).endswith(b"c"):
        word = word[:-1] + "i"                                  # step 1c; nltk: after a consonant, so enjoy stays
    if word.endswith("alli"):
        word = _replace(word, _STEP2["li"], 1)                  # nltk: rationalli -> rational, and step 2 again
    for rules, least in (_STEP2, 1), (_STEP3, 1), (_STEP4, 2):
        if word[-2:] in rules:
            word = _replace(word, rules[word[-2:]], least)
    return _step5(word) if word[-1] in "el" else word


def _shape(word: str) -> bytearray:
    """'toy' -> b'cvc', 'syzygy' -> b'cvcvcv': a y is a vowel after a consonant. Each 'vc' counts one in Porter's m."""
    shape = bytearray(word.encode().translate(_SHAPE))
    y = shape.find(b"y")
    while y >= 0:                                               # from the left: each y depends on the one before
        shape[y:y + 1] = b"v" if shape.endswith(b"c", 0, y) else b"c"
        y = shape.find(b"y", y + 1)
    return shape


def _measure(word: str) -> int:
    """Porter's m, the number of vowel-consonant sequences: tree 0, trouble 1, private 2."""
    return _shape(word).count(b"vc")


def _ends_short(word: str, shape: bytearray) -> bool:
    """*o: consonant, vowel, consonant other than w, x, y, as in hop. nltk: also a word that is one vc, as in at."""
    return shape.endswith(b"cvc") and word[-1] not in "wxy" or shape == b"vc"


def _replace(word: str, rules: list, least: int) -> str:
    """Steps 2 to 4: the first suffix that fits is replaced, if m of what precedes it is `least` or more.

    Rules list longer suffixes first; if the condition fails, no shorter one is tried.
    """
    for suffix, replacement in rules:
        if word.endswith(suffix):
            stem = word[:-len(suffix)]
            allowed = suffix not in _ONLY_AFTER or stem.endswith(_ONLY_AFTER[suffix])
            return stem + replacement if allowed and _measure(stem) >= least else word
    return word


def _step1a(word: str) -> str:
    """Plurals: caresses -> caress, ponies -> poni, cats -> cat."""
    if word[-1] != "s" or word[-2] == "s":
        return word
    if word.endswith("ies") and len(word) == 4:
        return word[:-1]                                        # nltk: dies -> die, but flies -> fli
    return word[:-2] if word.endswith(("sses", "ies")) else word[:-1]


def _step1b(word: str) -> str:
    """-ed and -ing: agreed -> agree, hopping -> hop, filing -> file; sing stays."""
    if word[-1] not in "dg":
        return word
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]       # nltk: died -> die, spied -> spi
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    stem = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
    shape = _shape(stem)
    if b"v" not in shape:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1] == stem[-2:-1] and shape.endswith(b"c"):        # *d, a double consonant
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if shape.count(b"vc") == 1 and _ends_short(stem, shape) else stem


def _step5(word: str) -> str:
    """Drops a final e, and one of two final l's: probate -> probat, cease -> ceas, controll -> control; rate stays."""
    if word.endswith("e"):
        stem, shape = word[:-1], _shape(word[:-1])
        m = shape.count(b"vc")
        word = stem if m > 1 or m == 1 and not _ends_short(stem, shape) else word
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
