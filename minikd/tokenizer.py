"""Text <-> token ids: tokenizer.json through `tokenizers`, and the chat template."""
import json
import re
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import tokenizers

from minikd.errors import InputError
from minikd.files import atomic_path, check_pointer, read_json
from minikd.hub import TOKENIZER, local_folder

QWEN25_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
STOPS = ("<|im_end|>", "<|endoftext|>")             # an answer ends with either; the first ends a turn of ChatML
CONFIG, GENERATION = "tokenizer_config.json", "generation_config.json"
COPIED = [name for name in TOKENIZER if name != GENERATION]         # saved as they were loaded
# Those of them whose content nothing here reads: as links they could lead to private files.
UNREAD = "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"
AT_ONCE = 1 << 19                                   # characters of the texts that are encoded at once


class Tokenizer:
    """encode, decode and chat for one Qwen2 tokenizer folder.

    eos_ids  every id that ends an answer. A set, since Instruct models stop at <|im_end|>, base models at <|endoftext|>,
             and a base model after a little fine-tuning at either; it also holds the eos_token, and the ids named in
             generation_config.json or, if it names none, in config.json
    end_id   the id that training appends to an answer
    pad_id   <|endoftext|>: fills rows, and stands between documents (data.encode_text). So padding is found by masks, never by
             comparing ids.
    For a tokenizer with a chat template but without ChatML, such as DeepSeek-R1-Distill-Qwen's, its eos_token is all three.
    """

    def __init__(self, backend: tokenizers.Tokenizer, folder: Path):
        settings = lambda name: read_json(folder / name) if (folder / name).exists() else {}
        config, self.generation = settings(CONFIG), settings(GENERATION)
        self.backend, self.folder, self.template = backend, folder, read_template(folder, config)
        self.files = {name: (folder / name).read_bytes() for name in COPIED if (folder / name).exists()
                      and not (name in UNREAD and links_outside(folder / name))}
        stops = [backend.token_to_id(token) for token in STOPS]
        eos = backend.token_to_id(named(config, "eos_token") or "")
        if None in stops and self.template and eos is not None:
            stops = [eos, eos]                      # one token ends an answer and fills rows
        if None in stops:
            raise InputError(f"{folder}: the tokenizer has no {STOPS[stops.index(None)]}; "
                             "minikd needs a ChatML tokenizer, such as Qwen2's")
        self.end_id, self.pad_id = stops
        more = self.generation.get("eos_token_id")              # an id, several, or none
        if more is None:
            more = settings("config.json").get("eos_token_id")
        more = more if isinstance(more, list) else [more]
        self.eos_ids = {*stops, *(stop for stop in (eos, *more) if type(stop) is int)}
        self.numbers = {}                           # id -> the one int object for it in all encoded texts

    @classmethod
    def load(cls, name) -> "Tokenizer":
        """From a local folder or a hub name.  Raises InputError if tokenizer.json is missing or damaged, if no token is known
        to end an answer, and as read_template."""
        folder = local_folder(name, ["config.json", *TOKENIZER])
        path = folder / "tokenizer.json"
        if not path.exists():
            mend = "copy the tokenizer's files into the model's folder"
            if (folder / "vocab.json").exists():
                mend = "make it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            raise InputError(f"{path}: is missing; {mend}")
        check_pointer(path)
        content = path.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
            backend.no_truncation()                 # the saved settings may include either
            backend.no_padding()
        except Exception as error:                  # tokenizers raises bare Exception, and nothing narrower
            raise InputError(f"{path}: is damaged ({error}); fetch it again") from error
        return cls(backend, folder)

    def save(self, folder):
        """Writes the tokenizer's files, as they were loaded, into `folder`, unless it is their own, and removes another
        tokenizer's files from it. The generation_config.json there then names every id that ends an answer. (A base model's own
        lacks <|im_end|>, at which a student fine-tuned from it stops.)"""
        folder = Path(folder)
        is_own = self.folder.resolve() == folder.resolve()      # then they are there
        for name in () if is_own else COPIED:
            if name in self.files:
                with atomic_path(folder / name) as new:
                    new.write_bytes(self.files[name])
            else:
                (folder / name).unlink(missing_ok=True)
        config = {"pad_token_id": self.pad_id} | self.generation | {"eos_token_id": sorted(self.eos_ids)}
        with atomic_path(folder / GENERATION) as new:
            new.write_text(json.dumps(config, indent=2) + "\n")

    def check_same(self, name) -> list[str]:
        """This tokenizer's added tokens that the one of `name`, a folder or hub name, lacks: Qwen2's lacks 19 of Qwen2.5's.
        Raises InputError if their vocabularies differ otherwise. (How they split and merge text is not compared.)

        A student learns its teacher's probabilities id by id: if the teacher had more tokens, the student would learn ids that
        it has no text for. A folder without a tokenizer is not checked.
        """
        if not (local_folder(name, TOKENIZER) / "tokenizer.json").exists():
            return []
        mine, other = (t.backend.get_vocab(with_added_tokens=True).items() for t in (self, Tokenizer.load(name)))
        lacks = mine - other - self.backend.get_vocab(with_added_tokens=False).items()      # added here only: {(token, id)}
        if differing := (mine ^ other) - lacks:
            token = min(differing, key=lambda pair: pair[1])[0]
            raise InputError(f"{name}: its tokenizer differs from {self.folder}'s, first in {token!r}; token-level "
                             "distillation needs a teacher with the student's tokenizer")
        return [token for token, _ in sorted(lacks, key=lambda pair: pair[1])]

    def __len__(self) -> int:
        """Ids in use, added tokens included: 151,665 for Qwen2.5, fewer than the head's rows."""
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens written out in it, such as <|im_end|>, become their ids."""
        return next(self.encode_batch([text]))

    def encode_batch(self, texts: list[str]) -> Iterator[list[int]]:
        """Encodes each text, on all cores, about AT_ONCE characters at a time, as the tokenizer's own result takes 60 bytes a
        token. Equal ids share one object, so that a list of ids takes 9 bytes a token, not 34."""
        part, size = [], 0
        for count, text in enumerate(texts, 1):
            part.append(text)
            size += len(text)
            if size >= AT_ONCE or count == len(texts):
                for encoding in self.backend.encode_batch_fast(part, add_special_tokens=False):
                    yield [self.numbers.setdefault(token, token) for token in encoding.ids]
                part, size = [], 0

    def decode(self, ids) -> str:
        """Text of the ids; special tokens are left out."""
        return self.backend.decode(list(ids))

    def chat(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The conversation as text, by the folder's own chat template; by Qwen2.5's, ChatML, if it has none.

        messages  [{"role": "system" | "user" | "assistant", "content": str}, ...]
        Without a system message, Qwen2.5's template and others put one of their own first.
        Raises InputError for other roles, contents that are not text, calls of tools, and what the template refuses.
        """
        for turn in messages:
            if (turn.get("role") not in ("system", "user", "assistant") or not isinstance(turn.get("content"), str)
                    or turn.get("tool_calls")):
                raise InputError(f"chat: a turn of role {turn.get('role')!r} with the fields {', '.join(turn)} is not supported; "
                                 "use the roles system, user and assistant, with text as content and no tool calls")
        if self.template is not None:
            try:
                return self.template.render(messages=list(messages), add_generation_prompt=add_generation_prompt)
            except Exception as error:              # the template is a program, and may raise anything
                raise InputError(f"{self.folder}: its chat template rejects this conversation ({error}); change the template or "
                                 "the conversation") from error
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": QWEN25_SYSTEM}, *messages]
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
        return text + ("<|im_start|>assistant\n" if add_generation_prompt else "")

    def stream(self) -> "Stream":
        """A decoder that takes one id at a time and returns text as soon as its characters are complete."""
        return Stream(self)


class Stream:
    """push(id) returns the text that this id completes, never part of a character. For byte-level tokenizers such as Qwen's:
    with others, where a space can depend on the position in the text, some spaces are lost.

    A non-ASCII character may be spread over several byte-level tokens; until the last one arrives, decoding
    ends in one U+FFFD (the replacement character). Only the ids since the text was last complete are decoded again.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.given = tokenizer, [], 0

    def push(self, token: int) -> str:
        """One more id -> the text that it completes: usually a word, sometimes nothing."""
        self.ids.append(int(token))
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\ufffd"):
            return self.end()
        new, self.given = text[self.given:-1], len(text) - 1    # only the last character is still in doubt
        return new

    def end(self) -> str:
        """What is left when generation stops, an unfinished character as U+FFFD."""
        text = self.tokenizer.decode(self.ids)[self.given:]
        self.ids, self.given = [], 0
        return text


def links_outside(path: Path) -> bool:
    """Whether a file is a link out of its folder, to anywhere but the blobs of the hub's cache."""
    homes = path.parent.resolve(), (path.parent / "../../blobs").resolve()
    return path.resolve().parent not in homes


def named(config: dict, key: str) -> str | None:
    """The text of a special token that tokenizer_config.json names under `key`: a string, or an object with its `content`."""
    value = config.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def read_template(folder: Path, config: dict):
    """The folder's chat template, compiled with transformers' settings, or None. It is a foreign program, so it runs in jinja's
    sandbox.  Raises InputError if it is damaged, or if this version of jinja has known holes in its sandbox."""
    path, apart = folder / CONFIG, folder / "chat_template.jinja"
    source = config.get("chat_template")
    if isinstance(source, list):                                                # several, each with a name
        source = next((one.get("template") for one in source if isinstance(one, dict) and one.get("name") == "default"), None)
    if apart.exists():                                                          # transformers 5: in its own file
        source, path = apart.read_text(encoding="utf-8", errors="replace"), apart
    if not isinstance(source, str) or not source.strip():
        return None
    held = version("jinja2")                                                    # comes with torch, of whichever version
    if [int(part) for part in re.findall(r"\d+", held)[:3]] < [3, 1, 6]:
        raise InputError(f"{path}: has a chat template, a program that jinja2 {held} cannot run safely; pip install -U jinja2")
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks for training what the model writes; a scope, the text inside rendered as it is."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def refuse(text):
        raise TemplateError(text)

    given = {key: text for key in config if key.endswith("_token") and (text := named(config, key))}   # it may write eos_token
    given |= {"tools": None, "documents": None, "raise_exception": refuse,
              "strftime_now": lambda format: datetime.now().strftime(format)}
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)     # jinja's own is for HTML
    try:
        return environment.from_string(source, globals=given)
    except (TemplateError, RecursionError, SyntaxError, ValueError) as error:   # jinja's, or Python's about what jinja made of it
        raise InputError(f"{path}: its chat template is damaged ({error}); fetch it again") from error
