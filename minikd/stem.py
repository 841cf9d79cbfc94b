"""Porter's stemmer for English, which rouge_score applies to words of more than three letters.

Porter 1980 with the departures of nltk's PorterStemmer in its default mode, NLTK_EXTENSIONS, each marked "nltk".

Reference
    Porter 1980, "An algorithm for suffix stripping", Program 14(3)
"""
from functools import lru_cache

_IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "howe": "howe",
              "inning": "inning", "innings": "inning", "outing": "outing", "outings": "outing",
              "canning": "canning", "cannings": "canning",
              "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}       # nltk
_ENDINGS = frozenset("cdegilmnrstuy")                           # no rule touches a word that ends otherwise


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
    if word[-1] == "y" and len(word) > 2 and _shape(word[:-1]).endswith("c"):
        word = word[:-1] + "i"                                  # step 1c; nltk: after a consonant, so enjoy stays
    if word.endswith("alli"):
        word = _replace(word, _STEP2["li"], 1)                  # nltk: rationalli -> rational, and step 2 again
    for rules, least in (_STEP2, 1), (_STEP3, 1), (_STEP4, 2):
        if word[-2:] in rules:
            word = _replace(word, rules[word[-2:]], least)
    return _step5(word) if word[-1] in "el" else word


def _shape(word: str) -> str:
    """'toy' -> 'cvc', 'syzygy' -> 'cvcvcv': a y is a vowel after a consonant. Each 'vc' counts one in Porter's m."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or letter == "y" and shape[-1:] == "c" else "c"
    return shape


def _measure(word: str) -> int:
    """Porter's m, the number of vowel-consonant sequences: tree 0, trouble 1, private 2."""
    return _shape(word).count("vc")


def _ends_short(word: str, shape: str) -> bool:
    """*o: consonant, vowel, consonant other than w, x, y, as in hop. nltk: also a word that is one vc, as in at."""
    return shape.endswith("cvc") and word[-1] not in "wxy" or shape == "vc"


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
    if "v" not in shape:
        return word
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if stem[-1] == stem[-2:-1] and shape.endswith("c"):        # *d, a double consonant
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if shape.count("vc") == 1 and _ends_short(stem, shape) else stem


def _step5(word: str) -> str:
    """Drops a final e, and one of two final l's: probate -> probat, cease -> ceas, controll -> control; rate stays."""
    if word.endswith("e"):
        stem, shape = word[:-1], _shape(word[:-1])
        m = shape.count("vc")
        word = stem if m > 1 or m == 1 and not _ends_short(stem, shape) else word
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
