"""Files and hub datasets -> examples, with a count of what was dropped; and which of them are held out."""
import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from minikd.errors import InputError
from minikd.files import sha256, write_jsonl
from minikd.formats import Dropped, Example, recognise, text_field, to_example
from minikd.records import data_files, read_records


@dataclass
class Report:
    """Counts of what load_examples read. str() is the line to print and log."""
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)           # reason -> number of records
    first_bad: str = ""                                         # error message of the first malformed record
    # (its path, first 16 hex digits of its sha256) in the order they were read; the hub revises files under one name
    files: list[tuple[str, str]] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Records that were read, dropped ones included."""
        return self.kept + self.dropped.total()

    def __str__(self):
        lost = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        files = ", ".join(f"{Path(path).name} sha256 {digest}" for path, digest in self.files)
        return (f"{self.kept:,} of {self.read:,} records kept{f' (dropped: {lost})' if lost else ''}; {files}"
                + (f"\nfirst malformed: {self.first_bad}" if self.first_bad else ""))


def load_examples(paths, format: str | None = None, limit: int | None = None, progress=None) -> tuple[list[Example], Report]:
    """Every usable record of one or more files, folders or hub datasets, in order.

    format    one of formats.FORMATS; None recognises each record
    limit     stop after that many examples
    progress  called after each example
    Raises InputError for the first malformed record, and where no record is usable. In PyTorrent, whose published shards hold
    corrupt lines, these are only counted; if one begins with such a line, `format` must be given.
    """
    report, files, examples = Report(), data_files(paths), []   # every name is looked up before a file is read
    for example in islice(chain.from_iterable(_examples(file, format, report) for file in files), limit):
        examples.append(example)
        if progress:
            progress()
    report.kept = len(examples)
    if not examples:
        raise InputError(f"{', '.join(map(str, files))}: no usable record; fix the records, or give others: {report}")
    return examples, report


def _examples(file: Path, format: str | None, report: Report) -> Iterator[Example]:
    report.files.append((str(file), sha256(file)))
    name = format                                               # the last record's format
    for where, record in read_records(file, (dict, InputError)):
        try:
            if isinstance(record, InputError):
                raise record
            name = format or recognise(record) or name          # if a field is missing, the last record's format
            yield to_example(record, where, name)
        except Dropped as error:
            report.dropped[error.reason] += 1
        except InputError as error:
            if name != "pytorrent":                             # needs --format where a file begins with a corrupt line
                raise
            report.dropped["malformed"] += 1
            report.first_bad = report.first_bad or str(error)


def load_texts(paths) -> tuple[list[str], list[tuple[str, str]]]:
    """Plain text for a language-model loss: the non-blank field `text` of every record, and each file's hash.  Raises InputError
    for the first malformed record, and when there is no text."""
    files, texts = data_files(paths), []
    hashes = [(str(file), sha256(file)) for file in files]      # before they are read: it refuses a pipe
    for where, record in read_records(files):
        with suppress(Dropped):
            texts.append(text_field(record, where, "text"))
    if not texts:
        raise InputError(f"{', '.join(map(str, files))}: holds no text; give records with a field 'text'")
    return texts, hashes


def same_prompt(messages) -> str:
    """A text that two conversations share if they differ only in spacing and capitals."""
    return " ".join(" ".join(f"{turn['role']}: {turn['content']}" for turn in messages).split()).casefold()


def count_shared(apart: list, learned: list) -> int:
    """How many of `apart`, Examples or Problems that are not trained on, have the prompt of one that is."""
    prompts = {same_prompt(example.messages) for example in learned}
    return sum(same_prompt(example.messages) in prompts for example in apart)


def split_examples(examples: list, count: int, seed: int = 42) -> tuple[list, list]:
    """(train, validation) of Examples or Problems, each in the given order; the same prompt is never in both.

    The second list has at most `count`: fewer if prompts repeat. A hash of prompt and seed decides, so that adding or reordering
    records moves few others between the lists.
    Raises InputError when none can be set apart, or none would be left to train on.
    """
    if not 0 <= count < len(examples):
        raise InputError(f"{count} validation examples of {len(examples)} leave none to train on; ask for fewer")
    groups = {}                                                 # hash -> indices of the examples with that prompt
    for i, example in enumerate(examples):
        groups.setdefault(hashlib.sha256(f"{seed}:{same_prompt(example.messages)}".encode()).digest(), []).append(i)
    held = set()
    for key in sorted(groups):
        if len(held) + len(groups[key]) <= count:
            held.update(groups[key])
    if count and not held:
        raise InputError(f"every prompt occurs more than {count} times, so no validation examples can be set apart; ask for "
                         "more, or remove repeats")
    return ([example for i, example in enumerate(examples) if i not in held],
            [example for i, example in enumerate(examples) if i in held])


def hold_out(examples: list, count: int, seed: int) -> tuple[list, list]:
    """(train, validation) by split_examples: at most a fifth for validation, but at least one prompt. If there are fewer than
    five records or only one prompt, all are trained on, and some of them also serve as validation."""
    repeats = Counter(same_prompt(example.messages) for example in examples)
    if len(examples) >= 5 and len(repeats) > 1:
        return split_examples(examples, max(min(count, len(examples) // 5), min(repeats.values())), seed)   # room for a prompt
    print(f"note: none of {len(examples)} records with {len(repeats)} different prompts can be held out: validation uses records "
          "that are trained on; without --eval-data, so do the table and held-out.jsonl")
    return examples, examples[:count]


def write_held_out(examples: list, path: Path):
    """Writes validation examples as records that load as the same ones, but for `where`."""
    write_jsonl([{"messages": [*example.messages, {"role": "assistant", "content": example.response}],
                  "instruction": example.instruction, "input": example.input, "references": example.references,
                  "category": example.category} for example in examples], path)
