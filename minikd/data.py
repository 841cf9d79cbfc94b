"""Examples -> (prompt ids, response ids) -> right-padded batches, each with its own mask."""
import hashlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from minikd.errors import InputError
from minikd.formats import Example

ENCODED_AT_ONCE = 512                               # examples between two steps of the progress

# ---- an example -> ids

def prompt_text(example: Example, tokenizer, template: str = "chatml") -> str:
    """The prompt as text; the response follows it directly.

    template  "chatml"  the conversation by the tokenizer's own chat template (Tokenizer.chat), up to where an answer begins
              "alpaca"  the paper's, without oddities of its code (tools/process_data_*.py): stray <|im_start|> and <|im_end|>,
                        headings that differ by dataset, "C++" in prompts about Python and the reverse
    Raises InputError for another template.
    """
    if template == "chatml":
        return tokenizer.chat(list(example.messages), add_generation_prompt=True)
    if template != "alpaca":
        raise InputError(f"template {template!r} is not known; choose chatml or alpaca")
    more = ", paired with an input that provides further context" if example.input else ""
    given = f"### Input:\n{example.input}\n\n" if example.input else ""
    return (f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{example.instruction}\n\n{given}### Response:\n")


def begins_thoughts(prompt: str) -> bool:
    """Whether the prompt ends in <think>, as QwQ's and DeepSeek-R1's templates make it."""
    return prompt.rstrip().endswith("<think>")


def after_prompt(response: str, prompt: str) -> str:
    """The response as it follows the prompt. If the prompt has opened the thoughts, the response's own <think> is removed; a
    response without thoughts closes them first, or a reasoning model would learn to answer inside them and never to leave."""
    if not begins_thoughts(prompt):
        return response
    if re.match(r"\s*<think>", response) or "</think>" in response:
        return re.sub(r"^\s*<think>\n?", "", response)
    return f"\n</think>\n\n{response}"


def without_empty_thoughts(text: str) -> str:
    """The text without empty thoughts at its start: <think></think>, or only the </think> that after_prompt adds."""
    return re.sub(r"^\s*(<think>\s*)?</think>\s*", "", text)


class NothingLeft(InputError):
    """All the examples to encode were dropped."""


@dataclass(frozen=True)
class Encoded:
    """One row of a batch, as token ids, before padding; len() is its length."""
    prompt: list[int]
    response: list[int]                 # ends in a stop token, unless cut; empty where there is only a prompt
    cut: bool                           # the response stopped at a limit of length, or goes on in the next row (encode_text)
    index: int                          # place of its Example, Problem or text in the list it was made from

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def digest(self) -> str:
        """A hash of its ids, and of which of them are scored: all that a teacher's states for it depend on."""
        return hashlib.sha256(f"{self.prompt}{self.response}".encode()).hexdigest()[:24]

    def answered(self, ids: list[int], eos_ids) -> "Encoded":
        """The same prompt with a sampled response; cut unless it ends in a stop token."""
        return Encoded(self.prompt, ids, cut=not ids or ids[-1] not in eos_ids, index=self.index)

    def cut_to(self, length: int) -> "Encoded":
        """This row with its response cut so that prompt and response have at most `length` tokens; the prompt is not cut."""
        room = max(0, length - len(self.prompt))
        return self if len(self.response) <= room else Encoded(self.prompt, self.response[:room], cut=True, index=self.index)


def encode_examples(examples: list[Example], tokenizer, template: str = "chatml", max_length: int = 512,
                    max_prompt_length: int = 256, progress=None) -> tuple[list[Encoded], dict[str, int]]:
    """Prompt ids and response ids of each example, and counts to print; lengths are in tokens.

    An example is dropped if its prompt exceeds max_prompt_length or leaves no room for a response, or if its response contains a
    stop token, where sampling would end. A response is cut so that prompt + response <= max_length; then it has no end token.

    progress  called after each part of the examples, with the size of the part
    Raises NothingLeft when nothing is left; InputError for a prompt without a token.
    """
    encoded, too_long, with_stop = [], [], 0                    # too_long: lengths of the dropped prompts
    room = min(max_prompt_length, max_length - 1)               # the most tokens of a prompt
    for start in range(0, len(examples), ENCODED_AT_ONCE):
        part = examples[start:start + ENCODED_AT_ONCE]
        # Tokenized separately, then joined, because sampling also appends new ids to the prompt's.
        texts = [prompt_text(example, tokenizer, template) for example in part]
        prompts = list(tokenizer.encode_batch(texts))
        if not all(prompts):
            raise InputError(f"{tokenizer.folder}: a prompt has no tokens; check its chat template")
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= room]
        too_long += [len(prompt) for prompt in prompts if len(prompt) > room]
        responses = tokenizer.encode_batch([after_prompt(part[i].response, texts[i]) for i in fitting])
        for i, response in zip(fitting, responses):
            if tokenizer.eos_ids.isdisjoint(response):
                row = Encoded(prompts[i], response + [tokenizer.end_id], cut=False, index=start + i)
                encoded.append(row.cut_to(max_length))
            else:
                with_stop += 1
        if progress:
            progress(len(part))
    counts = {"encoded": len(encoded), "responses cut": sum(row.cut for row in encoded),
              "dropped: prompt too long": len(too_long), "dropped: stop token inside": with_stop}
    if examples and not encoded:
        mend = (f"of the too long, the shortest has {min(too_long)} tokens: raise --max-prompt-length to that, --max-length "
                "above it" if too_long else "remove the stop tokens from the responses")
        raise NothingLeft(f"none of {len(examples)} examples can be used ({describe_dropped(counts)}); {mend}")
    return encoded, counts


def describe_dropped(counts: dict[str, int]) -> str:
    """encode_examples' counts of dropped examples, as text; "" if none was dropped."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if what.startswith("dropped") and count)


def encode_text(texts: list[str], tokenizer, max_length: int = 512) -> list[Encoded]:
    """Rows for a language-model loss: <|endoftext|> document <|endoftext|>, every token but the first scored.

    A document longer than max_length becomes several rows; each after the first begins with the last token of the row
    before, which it does not score: so every token is scored once.  Raises ValueError for a max_length below 2.
    """
    if max_length < 2:
        raise ValueError(f"max_length = {max_length}: a row needs a token to score and one before it; give 2 or more")
    rows = []
    for index, text in enumerate(tokenizer.encode_batch(texts)):
        ids = [tokenizer.pad_id, *text, tokenizer.pad_id]                       # pad_id is <|endoftext|>
        rows += [Encoded(prompt=ids[at:at + 1], response=ids[at + 1:at + max_length], cut=at + max_length < len(ids), index=index)
                 for at in range(0, len(ids) - 1, max_length - 1)]
    return rows


# ---- ids -> batches

def send(tensor: Tensor, device) -> Tensor:
    """Copies a CPU tensor to a device. To a GPU the copy is asynchronous, from pinned memory: while the GPU computes one
    batch, the CPU prepares the next."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def collate(encoded: list[Encoded], pad_id: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Rows of prompt + response, padded on the right -> ids [B, T] int64 on `device`, and mask [B, T] bool on the CPU.

    The mask is True on the response's tokens, its end token included; padding is never found by comparing ids with pad_id. It
    stays on the CPU so that scored_positions knows how many tokens are scored without waiting for a GPU.
    """
    T = max(map(len, encoded))
    ids = torch.full((len(encoded), T), pad_id, device="cpu")                   # [B, T]
    mask = torch.zeros_like(ids, dtype=torch.bool)                              # [B, T]
    for i, row in enumerate(encoded):
        ids[i, :len(row)] = ids.new_tensor(row.prompt + row.response)
        mask[i, len(row.prompt):len(row)] = True
    return send(ids, device), mask


def batch_order(encoded: list[Encoded], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's random batches, as positions in `encoded`: each row once, within a batch the shortest rows first.

    It depends on its arguments only, so a resumed run gets batch k without replaying the others. Rows of similar length are not
    put into one batch, though that would save padding: a step divides by its own scored tokens, so in a batch of only short
    answers each token would weigh many times more, and the student would learn to be brief. Sorting within a batch keeps the
    padding of its micro-batches small.
    """
    rows = list(range(len(encoded)))
    random.Random(f"{seed}:{epoch}").shuffle(rows)              # a str seed gives the same order in every process (sha512)
    return [sorted(rows[at:at + batch_size], key=lambda i: len(encoded[i])) for at in range(0, len(rows), batch_size)]


def by_length(rows: list, batch_size: int) -> list[list[int]]:
    """Positions of all rows or prompts, in batches of similar length, the shortest first: not for training."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[at:at + batch_size] for at in range(0, len(order), batch_size)]


def optimizer_steps(rows: list[Encoded], start: int, steps: int, batch_size: int, grad_accum: int,
                    seed: int) -> Iterator[tuple[int, list[list[Encoded]]]]:
    """(step, its micro-batches) for steps start .. steps-1; step k needs no replay of those before it."""
    per_epoch = steps_per_epoch(len(rows), batch_size, grad_accum)
    for step in range(start, steps):
        epoch, at = divmod(step, per_epoch)
        if at == 0 or step == start:
            order = batch_order(rows, batch_size * grad_accum, seed, epoch)     # the same for batches of 1 x 8 and of 8 x 1
        whole = [rows[i] for i in order[at]]
        yield step, [whole[i:i + batch_size] for i in range(0, len(whole), batch_size)]


def steps_per_epoch(rows: int, batch_size: int, grad_accum: int) -> int:
    """Optimizer steps in one pass over so many rows."""
    return math.ceil(rows / (batch_size * grad_accum))


def next_rows(rows: list[Encoded], turn: int, count: int, seed: int) -> list[Encoded]:
    """Items turn * count to (turn + 1) * count of an endless stream: all rows in random order, then again in another."""
    places = [divmod(i, len(rows)) for i in range(turn * count, (turn + 1) * count)]       # (epoch, place in it)
    return [rows[_shuffled(len(rows), epoch, seed)[at]] for epoch, at in places]


@lru_cache(maxsize=2)                                           # a turn may end one epoch and begin the next
def _shuffled(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}:{epoch}").sample(range(count), count)
