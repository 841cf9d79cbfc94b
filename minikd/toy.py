"""The default data: a small generated world, so that every script runs without a download.

Twelve people have a city, a job, a pet and an age. Records ask about them in English and in Spanish (Dolly's fields), and for
small Python functions (PyTorrent's), in the ratio 6 : 3 : 2, after the paper's "decreasing context levels". The teacher's are
many and clean. The student's are few and imitate human data: some answers are worded differently, and some are wrong. What the
test set asks in a language is in neither, not in other words either.
"""
import hashlib
import json
import random
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from minikd.config import Qwen2Config
from minikd.errors import InputError
from minikd.formats import to_example
from minikd.files import atomic_path
from minikd.tokenizer import STOPS, Tokenizer

SHARES = {"english": 6, "spanish": 3, "code": 2}    # how often each domain is drawn
OTHER_WORDS, WRONG = 0.3, 0.2                       # chances that a human answer is reworded; is given made-up facts

# How Qwen2 splits text before BPE. transformers assumes it for every qwen2 folder, whatever tokenizer.json says.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")

NAMES = "Ana Bruno Carla Diego Elena Felix Gloria Hugo Irene Jorge Karen Luis".split()
CITIES = "Lima Oslo Rome Cairo Quito Tokyo Delhi Paris Kiev Bogota Miami Lagos".split()
# Words that are the same for women and men, as a person's job is drawn.
JOBS = [("pilot", "piloto"), ("judge", "juez"), ("singer", "cantante"), ("dentist", "dentista"), ("tailor", "sastre"),
        ("pianist", "pianista"), ("florist", "florista"), ("guide", "guía")]
PETS = [("cat", "gato"), ("dog", "perro"), ("horse", "caballo"), ("parrot", "loro"), ("rabbit", "conejo")]

# Questions about one person p or two, p and q; the usual answer; and the same in other words.
ENGLISH = [
    (["Where does {p} live?", "In which city does {p} live?"], "{p} lives in {p.city}.", "It is {p.city}."),
    (["What does {p} do?", "What is the job of {p}?"], "{p} works as a {p.job}.", "{p} is a {p.job}."),
    (["Where do {p} and {q} live?", "Tell me the cities of {p} and {q}."],
     "{p} lives in {p.city} and {q} lives in {q.city}.", "{p.city} and {q.city}."),
    (["Which pets do {p} and {q} have?", "Tell me the pets of {p} and {q}."],
     "{p} has a {p.pet} and {q} has a {q.pet}.", "A {p.pet} and a {q.pet}."),
    (["Who is older, {p} or {q}?", "Is {p} or {q} the older one?"], "{old} is older than {young}.", "It is {old}."),
    (["Introduce {p} to {q}.", "Tell {q} who {p} is."],
     "{q}, this is {p}, a {p.job} from {p.city} with a {p.pet}.", "{p} is a {p.job} who lives in {p.city}."),
]
SPANISH = [
    (["¿Dónde vive {p}?", "¿En qué ciudad vive {p}?"], "{p} vive en {p.city}.", "Es {p.city}."),
    (["¿Qué hace {p}?", "¿Cuál es el oficio de {p}?"], "{p} trabaja como {p.oficio}.", "{p} es {p.oficio}."),
    (["¿Dónde viven {p} y {q}?", "Dime las ciudades de {p} y {q}."],
     "{p} vive en {p.city} y {q} vive en {q.city}.", "{p.city} y {q.city}."),
    (["¿Qué mascotas tienen {p} y {q}?", "Dime las mascotas de {p} y {q}."],
     "{p} tiene un {p.mascota} y {q} tiene un {q.mascota}.", "Un {p.mascota} y un {q.mascota}."),
    (["¿Quién es mayor, {p} o {q}?", "¿Es {p} o {q} mayor?"], "{old} es mayor que {young}.", "Es {old}."),
    (["Presenta a {p} ante {q}.", "Dile a {q} quién es {p}."],
     "{q}, te presento a {p}, {p.oficio} de {p.city} con un {p.mascota}.", "{p} es {p.oficio} y vive en {p.city}."),
]
# What a function should do to x; the usual line of code for it; and another one, as people write it: the other rounding is off
# for negative numbers and some halves.
STEPS = [("double it", "x = x * 2", "x *= 2"), ("halve it", "x = x / 2", "x /= 2"), ("negate it", "x = -x", "x *= -1"),
         ("square it", "x = x * x", "x = x ** 2"), ("add one", "x = x + 1", "x += 1"),
         ("print it", "print(x)", "print(str(x))"), ("subtract ten", "x = x - 10", "x -= 10"),
         ("round it", "x = round(x)", "x = int(x + 0.5)"), ("drop its sign", "x = abs(x)", "x = max(x, -x)")]


class Person:
    """A name with four facts, drawn from rng; str() is the name."""

    def __init__(self, name: str, rng: random.Random):
        self.name, self.city, self.age = name, rng.choice(CITIES), rng.random()
        (self.job, self.oficio), (self.pet, self.mascota) = rng.choice(JOBS), rng.choice(PETS)

    def __str__(self):
        return self.name


def people(seed: int = 7) -> list[Person]:
    """The world's twelve people; with another seed the same names have other facts."""
    rng = random.Random(seed)
    return [Person(name, rng) for name in NAMES]


def record(rng: random.Random, world: list[Person] | None = None, human: bool = False) -> dict:
    """One record, in Dolly's or PyTorrent's fields, about a world, by default one drawn for it.

    human  as people answer: sometimes in other words, sometimes with made-up facts or a wrong line of code. Then `right` is the
           answer without these
    `id` is what is asked, in whichever words and order of names.
    """
    domain = rng.choices(list(SHARES), list(SHARES.values()))[0]
    world = world or people(rng.randrange(10**6))
    other_words, wrong = human and rng.random() < OTHER_WORDS, human and rng.random() < WRONG
    if domain == "code":
        steps = rng.sample(STEPS, 3)
        asked = "Take x, {}, {} and {}.".format(*(ask for ask, _, _ in steps))
        right = program(steps)
        if wrong:
            steps[rng.randrange(3)] = rng.choice(STEPS)
        made = {"docstring": asked, "code": program(steps, other_words), "language": "python", "category": domain, "id": asked}
    else:
        templates = ENGLISH if domain == "english" else SPANISH
        number = rng.randrange(len(templates))
        asks, *answers = templates[number]
        p, q, somebody = rng.sample(world, 3)
        facts = Person(p.name, random.Random(somebody.name)) if wrong else p    # p's name with wrong facts
        asked = rng.choice(asks)
        who = sorted(person.name for person in (p, q) if person is p or "{q}" in asked)
        made = {"instruction": asked.format(p=p, q=q), "context": "", "category": domain,
                "response": said(answers[other_words], facts, q), "id": f"{domain} {number} {' '.join(who)}"}
        right = said(answers[0], p, q)
    return made | {"right": right} if human else made


def program(steps: list[tuple], other_words: bool = False) -> str:
    """A function that takes these STEPS."""
    return "\n".join(["def f(x):", *(f"    {step[1 + other_words]}" for step in steps), "    return x"])


def said(answer: str, p: Person, q: Person) -> str:
    """An answer's template, filled in."""
    old, young = sorted((p, q), key=lambda person: -person.age)
    return answer.format(p=p, q=q, old=old, young=young)


def corrected(entry: dict) -> dict:
    """A human record with the right answer in place of its own."""
    return {**entry, "code" if "code" in entry else "response": entry["right"]}


def question(entry: dict) -> str:
    """What a record asks."""
    return entry.get("instruction") or entry["docstring"]


def held_out(id: str) -> bool:
    """Whether what is asked belongs to the test set, and so never to training: a fifth of all, decided by a hash."""
    return hashlib.sha256(id.encode()).digest()[0] < 51         # of 256


def draw(make, question, id, count: int, seed: int, test: bool, once: bool) -> list:
    """`count` of what make(rng) returns, which by their id belong to the test set, or do not; with `once`, all questions are
    different.  question, id: functions of one of them.  Raises InputError where there are fewer."""
    rng, found, seen, tries = random.Random(seed), [], set(), 0
    while len(found) < count:
        tries += 1
        if tries > 20 * len(found) + 1000:
            raise InputError(f"there are fewer than {count} different toy questions; ask for at most {len(found)} "
                             "(--eval-examples)")
        drawn = make(rng)
        asked = question(drawn)
        if held_out(id(drawn)) == test and not (once and asked in seen):
            seen.add(asked)
            found.append(drawn)
    return found


def records(count: int, seed: int, human: bool = False, test: bool = False) -> list[dict]:
    """`count` records, domains drawn by SHARES; with `test`, only records of the test set (it has about 510 prompts), each
    prompt once. What the test set asks is in no other record of its language, not in other words either."""
    world = people()
    return draw(lambda rng: record(rng, world, human), question, itemgetter("id"), count, seed, test, once=test)


def plain_text(count: int, seed: int) -> list[str]:
    """Text for the student's pretraining, which teaches the language but not the facts: statements about other worlds."""
    rng = random.Random(seed)
    entries = [record(rng, human=True) for _ in range(2 * count)]
    texts = [entry.get("response") or entry["code"] for entry in entries]
    return [f"{one} {other}" for one, other in zip(texts[::2], texts[1::2])]


def make_tokenizer(folder, texts: list[str] | None = None) -> Tokenizer:
    """A byte-level BPE trained on the texts, by default the world's own, and saved as a folder like Qwen2's: ChatML without
    a system prompt."""
    if texts is None:
        examples = [to_example(entry, "toy") for entry in records(2000, seed=11)]
        texts = [f"user\n{example.messages[0]['content']}\nassistant\n{example.response}" for example in examples]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=512, special_tokens=[STOPS[1], "<|im_start|>", STOPS[0]], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    template = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    with atomic_path(Path(folder), folder=True) as new:
        backend.save(str(new / "tokenizer.json"))
        (new / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": STOPS[0], "pad_token": STOPS[1],
            "chat_template": template}, indent=2) + "\n")
    return Tokenizer.load(folder)


def teacher_config(vocab_size: int) -> Qwen2Config:
    return Qwen2Config(vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                       tie_word_embeddings=True, initializer_range=0.08)


def student_config(vocab_size: int) -> Qwen2Config:
    """Two layers of width 64: a fifth of the teacher's parameters."""
    return replace(teacher_config(vocab_size), hidden_size=64, intermediate_size=160, num_hidden_layers=2, head_dim=None)
