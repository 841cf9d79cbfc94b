"""How good a model is: its loss on held-out text, and its own answers against the references."""
import json
from pathlib import Path

import torch

from minikd.data import Encoded, Example, collate, recognise, to_example
from minikd.files import InputError, atomic_path
from minikd.generate import generate
from minikd.losses import head_loss, scored_positions
from minikd.model import Qwen2
from minikd.records import kind_of, read_records
from minikd.rouge import exact_match, mean_by_category, rouge_l_best
from minikd.tokenizer import Tokenizer


def check_vocabulary(name, model: Qwen2, tokenizer: Tokenizer):
    """Raises InputError where the tokenizer has ids that the model has no row for."""
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(f"{name}: the tokenizer has {len(tokenizer):,} ids, the model {model.config.vocab_size:,} "
                         "rows; do the two belong together?")


@torch.inference_mode()
def held_out_loss(model: Qwen2, encoded: list[Encoded], pad_id: int, batch_size: int, teacher: Qwen2 | None = None,
                  divergence=None, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Cross-entropy and divergence from the teacher, in nats a scored token (0 without a teacher)."""
    rows = sorted(encoded, key=lambda row: len(row.prompt) + len(row.response))
    device, sums, count = model.head.device, torch.zeros(2, dtype=torch.float64), 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start:start + batch_size], pad_id)
        ids, mask = batch.ids.to(device), batch.mask.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden, targets = scored_positions(model.hidden(ids), ids, mask)
            soft = scored_positions(teacher.hidden(ids), ids, mask)[0] if teacher else None
            _, ce, kd = head_loss(hidden, model.head, targets, soft, teacher.head if teacher else None, divergence,
                                  kd_ratio=0.5 if teacher else 0.0)
        sums += torch.stack([ce.double().sum(), kd.double().sum()]).cpu()
        count += len(targets)
    return tuple((sums / max(1, count)).tolist())


def answer(model: Qwen2, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, batch_size: int,
           temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None,
           progress=None) -> list[str]:
    """The model's text for each prompt, in their order; batches hold prompts of similar length.

    progress  is called after each batch with the number of answers it made
    """
    order, texts = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        tokens = generate(model, [prompts[i] for i in rows], max_new_tokens, temperature, top_p, top_k,
                          tokenizer.eos_ids, None if seed is None else seed * 1_000_003 + start)
        for i, ids in zip(rows, tokens):
            texts[i] = tokenizer.decode(ids).strip()
        if progress:
            progress(len(rows))
    return texts


def score_answers(answers: list[str], examples: list[Example], rouge: str = "stemmer") -> list[dict]:
    """One dict an example, for means and for a jsonl; scores are 0 to 1, the best over its references.

    rouge  "plain"    rouge_score's ASCII words
           "stemmer"  and its Porter stemmer, as MiniLLM's tables have it
           "unicode"  letters of every language and the symbols of code (rouge.tokens)
    """
    rows = []
    for text, example in zip(answers, examples, strict=True):
        p, r, f1 = rouge_l_best(text, example.references, stemmer=rouge == "stemmer", unicode=rouge == "unicode")
        rows.append({"where": example.where, "category": example.category, "precision": p, "recall": r, "f1": f1,
                     "exact_match": exact_match(text, example.references, unicode=rouge == "unicode"),
                     "prediction": text, "references": list(example.references)})
    return rows


def answer_and_score(model: Qwen2, tokenizer: Tokenizer, rows: list[Encoded], examples: list[Example],
                     max_new_tokens: int, batch_size: int, rouge: str = "stemmer") -> list[dict]:
    """score_answers of the model's own greedy answers to rows; row.index points into examples."""
    answers = answer(model, tokenizer, [row.prompt for row in rows], max_new_tokens, batch_size)
    return score_answers(answers, [examples[row.index] for row in rows], rouge)


def show_table(models: dict[str, Qwen2], tokenizer: Tokenizer, rows: list[Encoded], examples: list[Example], out,
               max_new_tokens: int, batch_size: int, rouge: str = "stemmer"):
    """Prints the paper's Table 1: ROUGE-L by category, a column a model, and one prompt's answers side by side.

    The table goes to out/table.jsonl, every answer with its scores to out/answers-MODEL.jsonl.
    """
    columns, first = {}, {}
    for name, model in models.items():
        scores = answer_and_score(model, tokenizer, rows, examples, max_new_tokens, batch_size, rouge)
        write_jsonl(scores, Path(out) / f"answers-{name.lower().replace(' ', '-')}.jsonl")
        columns[name] = {key: value["rouge_l"] for key, value in mean_by_category(scores).items()}
        first[name] = scores[0]["prediction"]
    write_jsonl([{"model": name, **column} for name, column in columns.items()], Path(out) / "table.jsonl")
    ratio, width = {"KD", "Teacher"} <= set(columns), max(8, *map(len, columns))
    print(f"\nROUGE-L ({rouge}) of {len(rows)} held-out prompts")
    print(f"{'':<14}" + "".join(f"{name:>{width + 1}}" for name in columns) + ("  KD / Teacher" if ratio else ""))
    for category in next(iter(columns.values())):
        line = f"{category:<14}" + "".join(f"{column[category]:{width + 1}.1f}" for column in columns.values())
        kept = 100 * columns["KD"][category] / max(columns["Teacher"][category], 1e-9) if ratio else 0
        print(line + (f"{kept:13.0f}%" if ratio else ""))
    shown = examples[rows[0].index]
    for name, text in {"asked": shown.messages[-1]["content"], "right": shown.references[0], **first}.items():
        print(f"{name:<{width}} {text!r}")


def write_jsonl(rows: list[dict], path):
    """One JSON object a line; whole or not there at all."""
    with atomic_path(Path(path)) as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---- answers that are written already

def read_predictions(path) -> list[str]:
    """One answer a line or record: .txt; or .jsonl .json .csv with prediction, text, response or output, or strings."""
    return [_texts(value, where, ("prediction", "text", "response", "output"), single=True)[0]
            for where, value in _entries(path)]


def read_references(path, format: str | None = None) -> list[Example]:
    """What each line or record of a file takes for right, one reference or a list.

    Its `references` or `reference` come first (score_answers writes such files); then whatever to_example makes of
    the record, in `format` where one is given; then a response, output or text of its own, or a plain string.
    """
    examples = []
    for where, value in _entries(path):
        fields = value if isinstance(value, dict) else {}
        if format or not {"references", "reference"} & set(fields) and recognise(fields):
            examples.append(to_example(fields, where, format))
        else:
            right = _texts(value, where, ("references", "reference", "response", "output", "text"))
            examples.append(Example((), "", "", right[0], right, str(fields.get("category") or ""), where))
    return examples


def _entries(path):
    """(where, value) of each record, or of each line of a .txt, where an empty line is an empty answer."""
    if Path(path).suffix != ".txt":
        yield from read_records(path, kinds=(dict, str, list))
        return
    data = Path(path).read_bytes()
    try:
        lines = data.decode("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: is not UTF-8 ({error}); save it as UTF-8") from error
    yield from ((f"{path}:{number}", line.removesuffix("\r")) for number, line in enumerate(lines, 1))


def _texts(value, where: str, names: tuple[str, ...], single: bool = False) -> tuple[str, ...]:
    name = next((name for name in names if value.get(name) is not None), None) if isinstance(value, dict) else None
    if isinstance(value, dict) and name is None:
        raise InputError(f"{where}: has none of the fields {', '.join(names)}, but {', '.join(list(value)[:12])}; "
                         "rename the one that holds the text")
    found = value if name is None else value[name]
    texts = tuple(found) if isinstance(found, list) and not single else (found,)
    for text in texts:
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
            kind = "half a character" if isinstance(text, str) else kind_of(text)
            raise InputError(f"{where}: {name or 'the record'} is {kind}; make it text")
    if not texts:
        raise InputError(f"{where}: {name or 'the record'} is an empty list; give a reference")
    return texts
