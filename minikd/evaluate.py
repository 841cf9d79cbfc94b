"""How good a model is: its loss on held-out text, and its own answers against the references."""
import math
from collections.abc import Callable
from pathlib import Path

import torch

from minikd.data import Encoded, by_length, collate, without_empty_thoughts
from minikd.errors import InputError
from minikd.formats import Example, recognise, text_field, to_example
from minikd.files import write_jsonl
from minikd.generate import respond
from minikd.head import compare_heads, head_loss, scored_positions
from minikd.model import Qwen2, mixed_precision
from minikd.records import check_text, names_of, read_records
from minikd.rouge import exact_match, mean_by_category, rouge_l_best, tokens
from minikd.teacher import Teacher
from minikd.tokenizer import Tokenizer

METRICS = {                                         # what show_table prints below ROUGE-L: explanation, decimals
    "exact match": ("% of answers that are a reference, word for word", 1),
    "retention": ("share of the teacher's ROUGE-L", 2), "mean length": ("tokens of an answer's text", 1),
    "distinct-4": ("share of different 4-grams", 2), "ce": ("nats per token, on the references", 3),
    "forward_kl": ("nats per token, on the references", 3), "reverse_kl": ("nats per token, on the references", 3),
    "agreement": ("share of tokens with the teacher's argmax", 3), "sequence KL": ("KL(q||p), nats per own answer", 2)}


@torch.inference_mode()
def compare(model: Qwen2, rows: list[Encoded], pad_id: int, batch_size: int, teacher=None, divergence=None,
            dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Means over all scored tokens of the rows: `ce`, and with a teacher what head.compare_heads measures, all over the rows of
    both heads.

    teacher  teacher.Teacher or CachedTeacher; None for cross-entropy alone
    """
    device, sums, count = model.head.device, {}, 0
    for at in by_length(rows, batch_size):
        part = [rows[i] for i in at]
        ids, mask = collate(part, pad_id, device)
        with mixed_precision(device, dtype):
            hidden, targets = scored_positions(model.hidden(ids), ids, mask)                # [N, D], [N]
            if teacher:
                values = compare_heads(hidden, model.head, targets, teacher.states(part, ids, mask), teacher.head,
                                       divergence)
            else:
                values = {"ce": head_loss(hidden, model.head, targets)[1]}
        sums = {key: sums.get(key, 0.0) + float(value.double().sum()) for key, value in values.items()}
        count += len(targets)
    return {key: value / max(1, count) for key, value in sums.items()}


def sequence_kl(model: Qwen2, tokenizer: Tokenizer, rows: list[Encoded], teacher, batch_size: int, max_new_tokens: int) -> float:
    """KL(q || p) over whole answers to the rows' prompts, MiniLLM eq. (1), in nats per answer.

    The model samples an answer y to each prompt; the estimate is the exact KL(q_t || p_t) summed over y's tokens, averaged
    over the answers. By the chain rule KL(q || p) = E_y Σ_t KL(q_t || p_t); log q(y) - log p(y) has the same mean, but also the
    noise of each y_t. Of an answer cut at max_new_tokens only the beginning counts: for a rambling model the value is too low.
    """
    own = respond(model, rows, batch_size, max_new_tokens, tokenizer.eos_ids,
                  vocab=min(len(model.head), len(teacher.head)))        # the rows that the KL is over
    length = sum(len(row.response) for row in own) / len(own)
    return compare(model, own, tokenizer.pad_id, batch_size, teacher)["reverse_kl"] * length            # MiniLLM eq. (1)


def distinct(texts: list[str], n: int = 4) -> float:
    """Share of different n-grams among all n-grams of words; 0 without any. (Li et al. 2016, arXiv:1510.03055, divide by the
    number of words.)"""
    grams = [gram for words in (tokens(text, unicode=True) for text in texts) for gram in zip(*(words[i:] for i in range(n)))]
    return len(set(grams)) / max(1, len(grams))


def answer(model: Qwen2, tokenizer: Tokenizer, rows: list[Encoded], max_new_tokens: int, batch_size: int,
           temperature: float = 0.0, **options) -> list[str]:
    """The model's text for each row's prompt, in their order.  options: those of generate.respond"""
    own = respond(model, rows, batch_size, max_new_tokens, tokenizer.eos_ids, temperature, **options)
    return [tokenizer.decode(row.response).strip() for row in own]


def score_answers(answers: list[str], examples: list[Example], rouge: str = "stemmer") -> list[dict]:
    """One dict per example, for mean_by_category and for a jsonl; scores are 0 to 1, the best over its references. Empty
    thoughts do not count.

    rouge  "plain"    rouge_score's ASCII words
           "stemmer"  the same, through its Porter stemmer, as in MiniLLM's tables
           "unicode"  letters of every language and the symbols of code (rouge.tokens)
    """
    if rouge not in ("plain", "stemmer", "unicode"):
        raise ValueError(f"rouge = {rouge!r}; it must be 'plain', 'stemmer' or 'unicode'")
    rows = []
    for text, example in zip(answers, examples, strict=True):
        text, *references = map(without_empty_thoughts, (text, *example.references))
        p, r, f1 = rouge_l_best(text, references, stemmer=rouge == "stemmer", unicode=rouge == "unicode")
        rows.append({"where": example.where, "category": example.category, "precision": p, "recall": r, "f1": f1,
                     "exact_match": exact_match(text, references, unicode=rouge == "unicode"),
                     "prediction": text, "references": references})
    return rows


def answer_and_score(model: Qwen2, tokenizer: Tokenizer, rows: list[Encoded], examples: list[Example],
                     max_new_tokens: int, batch_size: int, rouge: str = "stemmer") -> list[dict]:
    """score_answers of the model's greedy answers to the rows' prompts; row.index points into examples."""
    answers = answer(model, tokenizer, rows, max_new_tokens, batch_size)
    return score_answers(answers, [examples[row.index] for row in rows], rouge)


def show_table(models: dict[str, Callable[[], Qwen2]], teacher: Teacher | None, tokenizer: Tokenizer, rows: list[Encoded],
               examples: list[Example], out, max_new_tokens: int, batch_size: int, rouge: str = "stemmer") -> dict[str, dict]:
    """Measures each model and prints the paper's Table 1. The teacher, if there is one, is the last, and the others are compared
    with it.

    models  functions that load them: beside the teacher, only one is in memory at a time
    The table goes to out/table.jsonl, every answer with its scores to out/answers-MODEL.jsonl.
    returns  {model: {category: ROUGE-L}}, one category being "all"
    """
    if teacher:
        models = models | {"Teacher": lambda: teacher.model}
    columns, metrics, first = {}, {}, {}                        # of each model; first: its answer to the first prompt
    for name, load in models.items():
        model = load()
        scores = answer_and_score(model, tokenizer, rows, examples, max_new_tokens, batch_size, rouge)
        write_jsonl(scores, Path(out) / f"answers-{name.lower().replace(' ', '-')}.jsonl")
        means = mean_by_category(scores)
        columns[name] = {category: mean["rouge_l"] for category, mean in means.items()}
        texts = [row["prediction"] for row in scores]
        first[name] = texts[0]
        metrics[name] = {"exact match": means["all"]["exact_match"],
                         "mean length": sum(len(tokenizer.encode(text)) for text in texts) / len(texts),
                         "distinct-4": distinct(texts)}
        if teacher and name != "Teacher":
            metrics[name] |= compare(model, rows, tokenizer.pad_id, batch_size, teacher)
            metrics[name]["sequence KL"] = sequence_kl(model, tokenizer, rows, teacher, batch_size, max_new_tokens)
        del model                                               # before the next one is loaded
    if teacher and columns["Teacher"]["all"]:
        for name in columns:
            metrics[name]["retention"] = columns[name]["all"] / columns["Teacher"]["all"]
    write_jsonl([{"model": name} | column | {"model": name, "metrics": metrics[name]}   # twice: a category may be called "model"
                 for name, column in columns.items()], Path(out) / "table.jsonl")
    print(f"\nROUGE-L ({rouge}) of {len(rows)} held-out prompts")
    print_table(columns, metrics)
    shown, width = examples[rows[0].index], max(8, *map(len, columns))
    for name, text in {"asked": shown.messages[-1]["content"], "right": shown.references[0], **first}.items():
        print(f"{name:<{width}} {text!r}")
    return columns


def print_table(columns: dict[str, dict[str, float]], metrics: dict[str, dict[str, float]]):
    """One column per model: ROUGE-L by category, then those of METRICS that any model has."""
    categories = list(next(iter(columns.values())))             # the same of every model
    width, first = max(8, *map(len, columns)) + 1, max(14, *(len(category) + 1 for category in categories))
    both = {"KD", "Teacher"} <= columns.keys()
    print(f"{'':<{first}}" + "".join(f"{name:>{width}}" for name in columns) + "  KD / Teacher" * both)
    for category in categories:
        print(f"{category:<{first}}" + "".join(f"{column[category]:{width}.1f}" for column in columns.values())
              + (f"{columns['KD'][category] / (columns['Teacher'][category] or math.nan):>14.0%}" if both else ""))
    for key, (what, digits) in METRICS.items():
        cells = [f"{found[key]:.{digits}f}" if key in found else "-" for found in metrics.values()]
        if set(cells) != {"-"}:
            print(f"{key.replace('_', ' '):<{first}}" + "".join(f"{cell:>{width}}" for cell in cells) + f"  {what}")


# ---- answers and references in files

def read_predictions(path) -> list[str]:
    """One answer per line of a .txt, or per record of any other file: its field prediction, text, response or
    output, or the record itself if it is a string. (MiniLLM's .txt files have <n> for a line break: it stays, as it may be what
    was said.)"""
    return [_texts(value, where, ("prediction", "text", "response", "output"), single=True)[0]
            for where, value in read_records(path, kinds=(dict, str, list))]


def read_references(path, format: str | None = None) -> list[Example]:
    """The reference answers of each line or record of a file, as Examples.

    They are the first of: the record's `references` or `reference` (as in files of score_answers' dicts); what to_example
    makes of it; its response, output or text; the record itself if it is a string. With `format`, only what to_example makes.
    """
    examples = []
    for where, value in read_records(path, kinds=(dict, str, list)):
        fields = value if isinstance(value, dict) else {}
        if format or not {"references", "reference"} & set(fields) and recognise(fields):
            examples.append(to_example(fields, where, format))
        else:
            right = _texts(value, where, ("references", "reference", "response", "output", "text"))
            examples.append(Example((), "", "", right[0], right, text_field(fields, where, "category", default=""), where))
    return examples


def _texts(value, where: str, names: tuple[str, ...], single: bool = False) -> tuple[str, ...]:
    """The text or texts in the first of these fields that a record has, or that it is.  single: refuses a list of them"""
    what = "the record"
    if isinstance(value, dict):
        there = [name for name in names if name in value]
        if not there:
            raise InputError(f"{where}: has none of the fields {', '.join(names)} (its fields: {names_of(value)}); "
                             "rename the one that holds the text")
        what = next((name for name in there if value[name] is not None), there[0])     # null only if all are
        value = value[what]
    texts = tuple(value) if isinstance(value, list) and not single else (value,)
    for text in texts:
        check_text(text, where, what)
    if not texts:
        raise InputError(f"{where}: {what} is an empty list; give a reference")
    return texts
