"""The toy world: the same everywhere, shaped like the real datasets, and honest about what is held out."""
import functools
import hashlib
import itertools
import json
from collections import Counter, defaultdict

import pytest

from minikd import toy
from minikd.checkpoint import save_model
from minikd.data import encode_examples, prompt_text
from minikd.errors import InputError
from minikd.formats import recognise, to_example
from minikd.model import Qwen2
from minikd.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return toy.make_tokenizer(tmp_path_factory.mktemp("toy") / "tokenizer")


def parameters(config) -> int:
    return sum(p.numel() for p in Qwen2(config).parameters())


@functools.cache
def right_answers() -> dict[str, tuple[set[str], set[str]]]:
    """To every question of the language domains all true answers, as usually worded and in other words: all that the
    templates can make of the world's people."""
    found = defaultdict(lambda: (set(), set()))
    for p, q in itertools.permutations(toy.people(), 2):
        old, young = sorted((p, q), key=lambda person: -person.age)
        for asks, *answers in toy.ENGLISH + toy.SPANISH:
            for ask in asks:
                for kind, answer in zip(found[ask.format(p=p, q=q)], answers):
                    kind.add(answer.format(p=p, q=q, old=old, young=young))
    return found


def test_the_world_and_its_records_are_the_same_in_every_process():
    """Python's own hash of a text is not: a record that depended on it would differ from one run of this test to the next."""
    world = [vars(person) for person in toy.people()]
    facts = json.dumps([world, toy.records(50, seed=5, human=True), toy.plain_text(5, 6)])
    assert hashlib.sha256(facts.encode()).hexdigest()[:16] == "a00d6fd43c90dc62" and len(world) == 12


def test_what_the_test_set_asks_is_never_trained_on_in_other_words_either():
    test = toy.records(300, seed=3000, test=True)
    assert len({toy.question(entry) for entry in test}) == 300                  # each prompt comes once
    asked = {entry["id"] for entry in test}
    for train in toy.records(3000, seed=1000), toy.records(600, seed=2000, human=True):
        assert not asked & {entry["id"] for entry in train}
    ids = {entry["id"] for entry in toy.records(3000, seed=1000)} | asked
    assert sum(map(toy.held_out, ids)) / len(ids) == pytest.approx(0.2, abs=0.05) and all(map(toy.held_out, asked))


def test_an_id_is_what_is_asked_in_whichever_words_and_order():
    words = {"english 2 Ana Luis": {"Where do Ana and Luis live?", "Where do Luis and Ana live?",
                                    "Tell me the cities of Ana and Luis.", "Tell me the cities of Luis and Ana."},
             "spanish 0 Hugo": {"¿Dónde vive Hugo?", "¿En qué ciudad vive Hugo?"}}
    found = defaultdict(set)
    for test in False, True:
        for seed in range(20):
            for entry in toy.records(300, seed, test=test):
                found[entry["id"]].add(toy.question(entry))
    assert {id: found[id] for id in words} == words
    assert all(id == question for id, (question, *more) in found.items() if id.startswith("Take x") and not more)


def test_more_test_prompts_than_the_world_has_are_refused(monkeypatch):
    monkeypatch.setattr(toy, "held_out", lambda id: id == "english 1 Hugo")                # two prompts
    assert len(toy.records(2, seed=3000, test=True)) == 2
    with pytest.raises(InputError, match="fewer than 3 different toy questions; ask for at most 2 "):
        toy.records(3, seed=3000, test=True)


def test_a_human_record_is_corrected_to_the_clean_answer():
    human = toy.records(300, seed=5, human=True)
    wrong = [entry for entry in human if to_example(entry, "").response != entry["right"]]
    assert 0.3 < len(wrong) / 300 < 0.6
    for entry in human:
        assert to_example(toy.corrected(entry), "").response == entry["right"]
        if entry["category"] != "code":
            assert entry["right"] in right_answers()[entry["instruction"]][0]


def test_the_domains_fall_as_six_to_three_to_two():
    counts = Counter(entry["category"] for entry in toy.records(4000, seed=8))
    for domain, share in {"english": 6 / 11, "spanish": 3 / 11, "code": 2 / 11}.items():
        assert counts[domain] / 4000 == pytest.approx(share, abs=0.04)


def test_records_are_in_the_real_datasets_schemas():
    kinds = {entry["category"]: recognise(entry) for entry in toy.records(200, seed=9)}
    assert kinds == {"english": "dolly", "spanish": "dolly", "code": "pytorrent"}
    for entry in toy.records(200, seed=9, human=True):
        example = to_example(entry, "toy")
        assert example.category == entry["category"]
        assert example.response == entry.get("response", entry.get("code"))


def test_the_code_does_what_the_question_asks():
    """Run, not read: a function of the clean records gives what its three steps give in the order asked."""
    steps = {ask: {"double it": lambda x: 2 * x, "halve it": lambda x: x / 2, "negate it": lambda x: -x,
                   "square it": lambda x: x * x, "add one": lambda x: x + 1, "print it": lambda x: x,
                   "subtract ten": lambda x: x - 10, "round it": round, "drop its sign": abs}[ask]
             for ask, _, _ in toy.STEPS}
    code = [entry for entry in toy.records(300, seed=10) if entry["category"] == "code"]
    for entry in code:
        scope = {"print": lambda x: None}
        exec(entry["code"], scope)
        asked = entry["docstring"].removeprefix("Take x, ").removesuffix(".").replace(" and ", ", ")
        first, second, third = asked.split(", ")
        for x in -7, 3, 12.75:
            assert scope["f"](x) == steps[third](steps[second](steps[first](x)))
    assert len(code) > 30


def test_clean_answers_are_right_and_human_ones_are_reworded_and_wrong_at_their_rates():
    language = [entry for entry in toy.records(300, seed=12) if entry["category"] != "code"]
    assert all(entry["response"] in right_answers()[entry["instruction"]][0] for entry in language)
    human = [entry for entry in toy.records(1000, seed=13, human=True) if entry["category"] != "code"]
    kinds = Counter()
    for entry in human:
        usual, other = right_answers()[entry["instruction"]]
        kinds["reworded" if entry["response"] in other else "usual" if entry["response"] in usual else "wrong"] += 1
    right = kinds["reworded"] + kinds["usual"]
    assert kinds["reworded"] / right == pytest.approx(toy.OTHER_WORDS, abs=0.06)
    # Somebody else's fact is now and then the same: the one is older in half of the cases, whoever is meant.
    assert 0.6 * toy.WRONG < kinds["wrong"] / len(human) < 1.1 * toy.WRONG


def test_plain_text_asks_nothing_and_tells_nothing_of_this_world():
    texts = toy.plain_text(400, seed=4)
    assert not any(mark in text for text in texts for mark in "?¿")
    asked = {ask.split("{")[0] for asks, _, _ in toy.ENGLISH + toy.SPANISH for ask in asks}
    assert not any(text.startswith(start) for text in texts for start in asked if start)
    cities = {person.name: person.city for person in toy.people()}
    told = [text.split(" lives in ")[:2] for text in texts if text.count(" lives in ") == 1]
    told = [(before.split()[-1], after.split(".")[0].split()[0]) for before, after in told if before and after]
    true = sum(cities.get(name) == city for name, city in told)
    assert len(told) > 20 and true / len(told) < 0.35                           # by chance alone, about 1 in 12


def test_the_teacher_has_four_to_six_times_the_students_parameters(tokenizer):
    V = len(tokenizer)
    assert 4 <= parameters(toy.teacher_config(V)) / parameters(toy.student_config(V)) <= 6


def test_the_tokenizer_gives_every_record_back(tokenizer):
    characters = tokens = 0
    for entry in toy.records(300, seed=14, human=True) + toy.records(300, seed=3000, test=True):
        for text in toy.question(entry), to_example(entry, "toy").response:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            characters, tokens = characters + len(text), tokens + len(ids)
    assert len(tokenizer) == 512 and characters > 2.5 * tokens


def test_no_record_is_cut_or_dropped_at_the_default_lengths(tokenizer):
    examples = [to_example(entry, "toy") for entry in toy.records(500, seed=15, human=True)]
    _, counts = encode_examples(examples, tokenizer)
    assert counts == {"encoded": 500, "responses cut": 0, "dropped: prompt too long": 0,
                      "dropped: stop token inside": 0}


def test_the_chat_has_no_system_prompt(tokenizer):
    assert tokenizer.chat([{"role": "user", "content": "Hi"}], add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer.encode("<|im_start|>")) == len(tokenizer.encode("<|im_end|>")) == 1


def test_transformers_opens_the_folder_to_the_same_ids_and_the_same_chat(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    save_model(Qwen2(toy.student_config(len(tokenizer))).init_weights(1), tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for entry in toy.records(100, seed=16, human=True):
        example = to_example(entry, "toy")
        text = prompt_text(example, tokenizer)
        assert theirs.apply_chat_template(list(example.messages), tokenize=False, add_generation_prompt=True) == text
        assert theirs(text + example.response)["input_ids"] == tokenizer.encode(text + example.response)
    assert theirs.eos_token_id == tokenizer.end_id and theirs.pad_token_id == tokenizer.pad_id
