"""ROUGE-L against its definition, against numbers rouge_score once gave, and against rouge_score where installed."""
import json
import random
import re

import pytest

from conftest import SHARED
from minikd.errors import InputError
from minikd.rouge import exact_match, lcs_length, mean_by_category, rouge_l, rouge_l_best, tokens
from minikd.stem import _IRREGULAR, porter_stem

INSTRUCTIONS = "instructions-1100.jsonl"

# Made with rouge_score 0.1.2 and nltk 3.10.4: prediction, reference, rougeL without the stemmer, and with it if that differs.
GOLDEN = [
    ("The cat sat on the mat.", "A cat was sitting on the mat.", (0.6666666666666666, 0.5714285714285714, 0.6153846153846153)),
    ("The committees proceeded, happily organizing relational databases",
     "The committee proceeds: happy organization of a relational database", (0.2857142857142857, 0.2222222222222222, 0.25),
     (0.7142857142857143, 0.5555555555555556, 0.6250000000000001)),
    ("generously generating generic generators", "generate general generosity generously", (0.25, 0.25, 0.25),
     (0.75, 0.75, 0.75)),
    ("¿Qué año es?", "Que ano es", (0.25, 0.3333333333333333, 0.28571428571428575)),
    ("for (i = 0; i < n; i++) { total += a[i]; }", "total = sum(a)",
     (0.2222222222222222, 0.6666666666666666, 0.3333333333333333)),
    ("1 2 3 4 5 6 7", "7 6 5 4 3 2 1", (0.14285714285714285, 0.14285714285714285, 0.14285714285714285)),
    ("", "anything", (0, 0, 0)),
    ("anything else", "nothing here", (0, 0, 0)),
]

# Made with nltk 3.10.4, words of up to three letters left alone. Porter's own examples, then nltk's departures.
STEMS = """
    caresses>caress ponies>poni cats>cat caress>caress agreed>agre feed>feed plastered>plaster bled>bled
    motoring>motor sing>sing conflated>conflat troubled>troubl sized>size hopping>hop tanned>tan falling>fall
    hissing>hiss fizzed>fizz failing>fail filing>file happy>happi relational>relat conditional>condit
    rational>ration valency>valenc hesitancy>hesit digitizer>digit conformably>conform radically>radic
    differently>differ vilely>vile analogously>analog vietnamization>vietnam predication>predic operator>oper
    feudalism>feudal decisiveness>decis hopefulness>hope callousness>callous formality>formal
    sensitivity>sensit sensibility>sensibl triplicate>triplic formative>form formalize>formal
    electricity>electr electrical>electr hopeful>hope goodness>good revival>reviv allowance>allow
    inference>infer airliner>airlin gyroscopic>gyroscop adjustable>adjust defensible>defens irritant>irrit
    replacement>replac adjustment>adjust dependent>depend adoption>adopt opinion>opinion homologous>homolog
    communism>commun activate>activ angularity>angular effective>effect bowdlerize>bowdler probate>probat
    rate>rate cease>ceas controlling>control roll>roll tree>tree syzygy>syzygi
    ties>tie flies>fli dies>die died>die spied>spi enjoy>enjoy geology>geolog theology>theolog skies>sky
    dying>die lying>lie tying>tie news>news innings>inning outing>outing cannings>canning howe>howe
    fixed>fix boxing>box showing>show played>play derivativing>derivativ
    proceed>proceed exceeding>exceed succeed>succeed ating>ate aaed>aa ooed>oo ions>ion
    sky>sky spy>spy was>was 2000s>2000 covid19>covid19 yyyyying>yyyi"""


def table_lcs(a, b):
    """The textbook: L[i][j] = L[i-1][j-1] + 1 where a_i = b_j, else max(L[i-1][j], L[i][j-1])."""
    L = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            L[i][j] = L[i - 1][j - 1] + 1 if a[i - 1] == b[j - 1] else max(L[i - 1][j], L[i][j - 1])
    return L[-1][-1]


def random_text(rng):
    """Up to 50 words of a small or a large vocabulary, with what comes between words in real text."""
    ways = [
        lambda: rng.choice("abc"),
        lambda: "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 9))),
        lambda: rng.choice(["run", "runs", "running", "relational", "relate", "happily", "Happy", "skies", "The"]),
        lambda: str(rng.randrange(100)),
        lambda: "".join(rng.choices("aAbyYéÉñÑßİKſ日\u0301_-'09²", k=rng.randint(1, 6))),
    ]
    ways = rng.sample(ways, rng.randint(1, len(ways)))
    return "".join(rng.choice(ways)() + rng.choice([" ", " ", " ", ", ", "\n", "\t", ".", "\u00a0", "😀", "\x00"])
                   for _ in range(0 if rng.random() < 0.05 else rng.randint(1, 50)))


# ---- the longest common subsequence ----

def test_lcs_in_bits_is_the_lcs_of_the_textbook_table():
    rng = random.Random(0)
    sizes = [(rng.randint(0, 40), rng.randint(0, 40)) for _ in range(2000)]
    for m, n in sizes + [(size, size) for size in (63, 64, 65, 300)]:           # more than a machine word's bits, too
        alphabet = "abcdefghijklmnopqrstuvwxyz"[:rng.choice([1, 2, 4, 26])]
        a, b = rng.choices(alphabet, k=m), rng.choices(alphabet, k=n)
        assert lcs_length(a, b) == table_lcs(a, b), (a, b)


# ---- ROUGE-L ----

def test_rouge_l_is_lin_2004_on_his_own_example():
    """Section 3.1, eq. (2) to (4): with beta = 1 the first candidate scores 3/4 and the second 2/4."""
    reference = "police killed the gunman"
    assert rouge_l("police kill the gunman", reference) == (0.75, 0.75, 0.75)
    assert rouge_l("the gunman kill police", reference) == (0.5, 0.5, 0.5)


def test_precision_is_over_the_prediction_and_recall_over_the_reference():
    precision, recall, f1 = rouge_l("a b c d e f g h", "b d")
    assert (precision, recall) == (2 / 8, 2 / 2)
    assert f1 == 2 * precision * recall / (precision + recall)


def test_rouge_l_is_what_rouge_score_gave():
    for prediction, reference, plain, *stemmed in GOLDEN:
        assert rouge_l(prediction, reference) == plain, prediction
        assert rouge_l(prediction, reference, stemmer=True) == (*stemmed, plain)[0], prediction


def test_nothing_against_nothing_scores_zero():
    for prediction, reference in ("", ""), ("...", "a"), ("a", "¿?"), ("日本語", "日本語"):
        assert rouge_l(prediction, reference, stemmer=True) == (0, 0, 0)


def test_best_reference_is_the_one_with_the_highest_f1():
    prediction, references = "a b c d", ["a b", "a b c x", "x"]
    assert rouge_l_best(prediction, references) == rouge_l(prediction, references[1])
    assert rouge_l_best(prediction, "a b") == rouge_l(prediction, "a b")        # not the letters of a string
    assert rouge_l_best("running", ["x", "runs"], stemmer=True) == (1, 1, 1)
    with pytest.raises(InputError, match="at least one"):
        rouge_l_best(prediction, [])


# ---- the two tokenizers ----

def test_the_ascii_tokenizer_cuts_accents_and_drops_symbols():
    assert tokens("¿Qué año?") == ["qu", "a", "o"]
    assert tokens("x += foo_1") == ["x", "foo", "1"]


def test_the_unicode_tokenizer_keeps_spanish_whole_and_every_symbol():
    assert tokens("¿Qué AÑO?", unicode=True) == ["¿", "qué", "año", "?"]
    assert tokens("x += foo_1", unicode=True) == ["x", "+", "=", "foo", "_", "1"]
    assert rouge_l("qué", "quá") == (1, 1, 1)
    assert rouge_l("qué", "quá", unicode=True) == (0, 0, 0)


def test_an_accent_typed_as_a_combining_mark_is_the_same_letter():
    assert tokens("NIN\u0303O que\u0301", unicode=True) == tokens("niño qué", unicode=True) == ["niño", "qué"]


def test_marks_that_do_not_compose_stay_in_their_word():
    assert tokens("हिन्दी भाषा", unicode=True) == ["हिन्दी", "भाषा"]
    assert tokens("I\u0307x ❤\ufe0f", unicode=True) == ["i\u0307x", "❤\ufe0f"]


def test_with_unicode_the_english_stemmer_leaves_words_that_are_not_ascii():
    assert tokens("Running niñas cats", stemmer=True, unicode=True) == ["run", "niñas", "cat"]


# ---- the stemmer ----

def test_stem_is_what_nltk_gave():
    stems = dict(pair.split(">") for pair in STEMS.split())
    assert {word: porter_stem(word) for word in stems} == stems


def test_a_word_is_stemmed_once_and_the_cache_is_bounded():
    porter_stem.cache_clear()
    assert tokens("running running runs", stemmer=True) == ["run", "run", "run"]
    assert porter_stem.cache_info().misses == 2 and porter_stem.cache_info().maxsize == 1 << 18


# ---- exact match and the table ----

def test_exact_match_puts_case_punctuation_and_spacing_aside_but_not_articles():
    assert exact_match(" The  Answer: 42!", ["41", "the answer 42"])
    assert exact_match("well-known", "wellknown")
    assert not exact_match("the answer", "answer")              # SQuAD would say yes
    assert not exact_match("the answer", ["the", "answer"])


def test_exact_match_of_code_minds_the_symbols():
    assert exact_match("x + 1", "x - 1")                        # what MiniLLM's rule says, and why unicode is there
    assert not exact_match("x + 1", "x - 1", unicode=True)
    assert exact_match("x+1\n", ["x + 1"], unicode=True)


def test_means_are_per_category_and_over_all_examples():
    examples = [{"category": "qa", "f1": 1.0, "exact_match": True}, {"category": "qa", "f1": 0.5, "exact_match": False},
                {"category": "code", "f1": 0.0, "exact_match": False}, {"f1": 0.5, "exact_match": False},
                {"category": "", "f1": 0.5, "exact_match": False}]
    table = mean_by_category(examples)
    assert list(table) == ["code", "qa", "all"]
    assert table["qa"] == {"examples": 2, "rouge_l": 75.0, "exact_match": 50.0}
    assert table["all"] == {"examples": 5, "rouge_l": 50.0, "exact_match": 20.0}
    assert mean_by_category([]) == {}
    assert list(mean_by_category([*examples, examples[0] | {"category": "all"}])) == ["all (category)", "code", "qa", "all"]


# ---- against rouge_score and nltk themselves, where installed ----

def assert_equal_to_rouge_score(pairs):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    for stemmer in False, True:
        theirs = scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
        for prediction, reference in pairs:
            expected = tuple(theirs.score(reference, prediction)["rougeL"])
            assert rouge_l(prediction, reference, stemmer) == expected, (prediction, reference, stemmer)


def test_rouge_l_equals_rouge_score_on_random_pairs():
    rng = random.Random(2)
    pairs = []
    for _ in range(1000):
        prediction = random_text(rng)
        halves = prediction[:len(prediction) // 2] + random_text(rng)           # a reference that shares a part
        pairs.append((prediction, rng.choice([halves, random_text(rng)])))
    assert_equal_to_rouge_score(pairs)


def test_rouge_l_equals_rouge_score_on_real_pairs(shared):
    records, rng = [*map(json.loads, (shared / INSTRUCTIONS).read_text(encoding="utf-8").splitlines())], random.Random(3)
    pairs = [(record["output"], record["instruction"] + " " + record["input"]) for record in records]
    pairs += [(record["output"], rng.choice(records)["output"]) for record in records[:400]]
    assert_equal_to_rouge_score(pairs)


def test_best_reference_equals_score_multi():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng = random.Random(4)
    for _ in range(200):
        prediction, references = random_text(rng), [random_text(rng) for _ in range(rng.randint(1, 4))]
        assert rouge_l_best(prediction, references) == tuple(scorer.score_multi(references, prediction)["rougeL"])


def test_stem_equals_nltk_on_real_words_and_on_suffixes_piled_up():
    nltk_stem = pytest.importorskip("nltk.stem.porter").PorterStemmer().stem
    rng = random.Random(5)
    suffixes = """s es ies sses ss us ed eed ied ing y ly e ll at bl iz al ational tional ation ator alism aliti alli
        anci ance enci ence er izer ization ic able ible abli bli ant ement ment ent entli eli ousli ou ous ism ate iti
        iviti biliti ive iveness fulness ful fulli ousness logi ogi icate ative alize iciti ical ness ize ion sion
        tion""".split()
    words = set(_IRREGULAR)
    for _ in range(30_000):
        start = "".join(rng.choices("bcdfghlmnrstwxz" + "aeiouy" * 3 + "09", k=rng.randint(0, 5)))
        words.add(start + "".join(rng.choices(suffixes, k=rng.randint(1, 3))))
    if (SHARED / INSTRUCTIONS).exists():
        words.update(re.findall("[a-z0-9]+", (SHARED / INSTRUCTIONS).read_text(encoding="utf-8").lower()))
    wrong = {word: (porter_stem(word), nltk_stem(word)) for word in words
             if len(word) > 3 and porter_stem(word) != nltk_stem(word)}
    assert not wrong
