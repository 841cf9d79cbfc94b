"""What the student is compared with: the teacher model, or its hidden states on disk, computed once."""
import json
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minikd.checkpoint import check_vocabulary, load_config, model_folder
from minikd.data import Encoded, collate, send
from minikd.errors import InputError
from minikd.files import (append_to, atomic_path, fingerprint, hold, parse_json, read_json, save_tensors, sweep,
                          write_jsonl)
from minikd.generate import respond
from minikd.head import scored_positions
from minikd.layout import join_layers
from minikd.model import Qwen2, mixed_precision

FACTS, SHARD_TOKENS = "cache.json", 50_000          # a shard of a 3B teacher's states is 205 MB


def check_teacher(name, tokenizer):
    """Raises InputError if the teacher's vocabulary differs from the student's other than by lacking added tokens (it prints
    these), or if the student's tokenizer has more ids than the teacher has rows."""
    folder = model_folder(name, weights=False)
    if lacks := tokenizer.check_same(folder):
        print(f"note: {name} cannot teach the tokens {', '.join(lacks)}: its tokenizer lacks them")
    check_vocabulary(name, load_config(folder), tokenizer)


class Teacher:
    """The model in memory: `states` runs its body on every batch. (The loop passes ids and mask, which the model needs, and the
    rows, by which CachedTeacher finds the stored states.)"""

    def __init__(self, model: Qwen2):
        self.model, self.head = model, model.head                               # head [V', D']
        if self.head.is_cuda and not self.head.requires_grad:       # q/k/v one product, gate/up another, for good: it is frozen
            join_layers(model, rows=0, pack=False)

    @torch.inference_mode()
    def states(self, rows: list[Encoded], ids: Tensor, mask: Tensor) -> Tensor:
        """The hidden states that score the rows' responses, in order: ids and mask [B, T] -> [N, D']. They are inference tensors:
        a loss of your own that differentiates a product with them needs a clone()."""
        return scored_positions(self.model.hidden(ids), ids, mask)[0]


class CachedTeacher:
    """The same states, read from a folder that fill_cache wrote; only the teacher's head is in memory.

    Applied to these states, the head gives the teacher's whole distribution, unlike stored top-k probabilities. A state
    is D' bfloat16 numbers: 2 D' bytes per scored token.
    """

    def __init__(self, folder, head: Tensor):
        self.head, self.shards = head, {}                                       # row's digest -> the open shard that holds it
        # Last file first, so that for a row in two files the first file counts: fill_cache numbers its own from 0, without gaps.
        for path in sorted(Path(folder).glob("states-[0-9][0-9][0-9][0-9][0-9].safetensors"), reverse=True):
            with suppress(SafetensorError):                                     # not fill_cache's: those are complete
                shard = safe_open(path, framework="pt")                         # mapped into memory, not read whole
                self.shards |= dict.fromkeys(shard.keys(), shard)

    def states(self, rows: list[Encoded], ids: Tensor, mask: Tensor) -> Tensor:
        """As Teacher.states, in bfloat16 as stored.  Raises KeyError for a row that fill_cache was not given."""
        digests = [row.digest for row in rows]
        stored = [self.shards[digest].get_tensor(digest) for digest in digests]     # [n, D'] each
        return send(torch.cat(stored), self.head.device)


def fill_cache(folder, rows: list[Encoded], made_from: dict, load, width: int, pad_id: int, batch_size: int,
               dtype: torch.dtype = torch.float32, progress=None) -> int:
    """Computes and writes the teacher's states of each row whose states `folder` lacks; returns how many tokens it scored.

    made_from  JSON values that the states depend on; a folder made from others is refused (InputError)
    load       () -> the teacher; only called if states are missing, and its memory is freed afterwards
    width      D' of the teacher
    progress   called after each batch with its number of rows
    A shard holds about 50,000 tokens, each row's states [n, D'] under its digest. It appears only when it is complete; a run
    after a kill makes the missing shards, and those whose header or size is wrong. A second process waits for the first.
    """
    folder, unique = Path(folder), {row.digest: row for row in rows}
    made_from = made_from | {"rows": fingerprint(sorted(unique))}
    check_made_from(folder, made_from)                          # before anything is written
    with alone(folder):
        check_made_from(folder, made_from)                      # again: another process may have been first
        if not (folder / FACTS).exists():
            write_jsonl([{"made_from": made_from}], folder / FACTS)
        sweep(folder)                                           # also leftovers beside files that are not written again
        missing = {name: held for name, held in plan_shards(unique).items() if not whole(folder / name, held, width)}
        teacher = Teacher(load()) if missing else None
        for name, held in missing.items():
            states = states_of(teacher, held, pad_id, batch_size, dtype, progress)
            with atomic_path(folder / name) as new:
                save_tensors(states, new)
        return sum(len(row.response) for held in missing.values() for row in held.values())


def states_of(teacher: Teacher, held: dict[str, Encoded], pad_id: int, batch_size: int, dtype: torch.dtype,
              progress) -> dict[str, Tensor]:
    """The teacher's states of a shard's rows by their digests: [n, D'] each, in bfloat16 on the CPU."""
    states, rows, device = [], list(held.values()), teacher.head.device
    for start in range(0, len(rows), batch_size):
        part = rows[start:start + batch_size]
        with mixed_precision(device, dtype):
            found = teacher.states(part, *collate(part, pad_id, device)).bfloat16().cpu()               # [N, D']
        states += found.split([len(row.response) for row in part])
        if progress:
            progress(len(part))
    return dict(zip(held, states, strict=True))


def alone(folder: Path):
    """A `with` block in which no other process fills this cache: it waits. Where files cannot be locked, all may."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / ".filling"                                 # not run.LOCK: a run in the same folder holds that
    try:
        return hold(place)
    except BlockingIOError:
        print(f"{folder}: another process is filling this cache; waiting for it", flush=True)
        return hold(place, wait=True)
    except OSError:                                     # no permission to write there: a complete cache needs none
        return nullcontext()


def plan_shards(unique: dict[str, Encoded]) -> dict[str, dict[str, Encoded]]:
    """Each shard's file -> its rows by their digests, similar lengths together; it is full at SHARD_TOKENS scored tokens."""
    shards, tokens = {}, SHARD_TOKENS
    for digest, row in sorted(unique.items(), key=lambda item: (len(item[1]), item[0])):
        if tokens >= SHARD_TOKENS:
            held = shards[f"states-{len(shards):05d}.safetensors"] = {}
            tokens = 0
        held[digest] = row
        tokens += len(row.response)
    return shards


def check_made_from(folder: Path, made_from: dict):
    """Raises InputError, naming what differs, if `folder` holds a cache made from other things, or files but no cache."""
    if not (folder / FACTS).exists():
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder}: is not empty and not a teacher's cache; choose another --cache-teacher")
        return
    before = read_json(folder / FACTS, "delete the folder, or choose another --cache-teacher").get("made_from")
    if not isinstance(before, dict):
        raise InputError(f"{folder / FACTS}: does not say what the cache was made from; choose another --cache-teacher")
    for key in made_from | before:
        if before.get(key) != made_from.get(key):
            what = ("its rows differ (because of --limit, the tokenizer, or the answers of --seq-kd)" if key == "rows" else
                    f"its {key} is {before.get(key)}, here {made_from.get(key)}")
            raise InputError(f"{folder}: was made from other data or settings: {what}; choose another --cache-teacher")


def whole(path: Path, held: dict[str, Encoded], width: int) -> bool:
    """Whether a shard exists and holds these rows, complete as far as its header and its size can tell."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {digest: (file.get_slice(digest).get_shape(), file.get_slice(digest).get_dtype()) for digest in file.keys()}
    except (OSError, SafetensorError):
        return False
    return found == {digest: ([len(row.response), width], "BF16") for digest, row in held.items()}


def teacher_responses(path, load, rows: list[Encoded], made_from: dict, tokenizer, batch_size: int,
                      max_new_tokens: int, seed: int, progress=None) -> list[Encoded]:
    """Sequence-level KD (Kim and Rush 2016, arXiv:1606.07947): the rows with responses sampled from the teacher.

    load  () -> the teacher; only called if answers are missing, and its memory is freed afterwards
    The answers are sampled once, at temperature 1, and kept in `path`: the first line says what they were made from, the others
    hold one JSON object per answer. After a kill, the next call samples what is missing or incomplete, and gets the same tokens.
    Raises InputError if `path` is damaged, or was made from something else.
    """
    path, at_once = Path(path), 8 * batch_size                  # at_once: rows sampled between two writes
    made_from = made_from | {"rows": fingerprint(row.digest for row in rows), "seed": seed, "max_new_tokens": max_new_tokens,
                             "batch_size": batch_size}
    lines, responses = kept_answers(path, made_from, len(rows), len(tokenizer))
    if len(responses) < len(rows):
        del responses[len(responses) // at_once * at_once:]     # a write was cut short: one seed draws `at_once` answers
    with atomic_path(path) as new:
        new.write_text("\n".join(lines[:1 + len(responses)]) + "\n", encoding="utf-8")
    teacher = load() if len(responses) < len(rows) else None
    for start in range(len(responses), len(rows), at_once):
        own = respond(teacher, rows[start:start + at_once], batch_size, max_new_tokens, tokenizer.eos_ids,
                      seed=seed + start, vocab=len(tokenizer))
        with append_to(path) as file:
            file.writelines(json.dumps({"ids": row.response, "text": tokenizer.decode(row.response)}) + "\n"
                            for row in own)
        responses += [row.response for row in own]
        if progress:
            progress(len(own))
    return [row.answered(ids, tokenizer.eos_ids) for row, ids in zip(rows, responses, strict=True)]


def kept_answers(path: Path, made_from: dict, most: int, vocab: int) -> tuple[list[str], list[list[int]]]:
    """The complete lines of teacher_responses' file, if there is none its first one, and the ids of the answers in them.  Raises
    InputError for other settings, for more answers than `most`, and for an answer without ids or with one not below `vocab`."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    lines = text.split("\n")[:-1] or [json.dumps(made_from)]    # the last is empty, or cut by a kill
    try:
        before, *answers = map(parse_json, lines)
        responses = [answer["ids"] for answer in answers]
        other = [key for key in before | made_from if before.get(key) != made_from.get(key)]
        good = len(responses) <= most and all(
            set(map(type, ids)) == {int} and 0 <= min(ids) <= max(ids) < vocab for ids in responses)
        if not (good or other):                                 # other settings, below, explain strange ids better
            raise ValueError("too many answers, or one that is empty or has ids that the tokenizer has not")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: holds a damaged line ({error}); delete the file, and it will be made again") from error
    if other:
        what = ("rows differ (--data, --valid-data, --limit, --validation, --seed or the tokenizer)" if other[0] == "rows" else
                f"{other[0]} is {before.get(other[0])}, here {made_from.get(other[0])}")
        raise InputError(f"{path}: holds answers made with other data or settings: their {what}; choose another --out")
    return lines, responses
