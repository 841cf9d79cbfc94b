"""A name -> a folder: a local one, or a repository of the Hugging Face hub in the hub's cache, with only the files asked for."""
import re
import sys
from pathlib import Path

from minikd.errors import InputError

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
             "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
TIMEOUT = 30                                        # seconds in which the hub must answer; else its cache has to do
ADDRESS = re.compile(r"^(https://huggingface\.co/|hf://)(datasets/)?")
KNOWN = {}                                          # (name, kind) -> Repository


def local_folder(name, patterns, kind: str = "model") -> Path:
    """The folder behind a name.

    name      "runs/kd/kd/best", "Qwen/Qwen2.5-0.5B", or "Qwen/Qwen2.5-0.5B@revision": a branch, a tag or a commit
    patterns  the files wanted from the hub: names, or globs
    kind      "model" or "dataset"
    Raises InputError if it is neither, or a training run whose model is in best/ or last/.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if kind == "model":
            held = [path / "best", path / "last"]
            if not any((path / file).exists() for file in ("config.json", "tokenizer.json")):       # a comparison's: several runs
                held += [config.parent for config in sorted(path.glob("*/best/config.json"))]
            if models := [str(model) for model in held if (model / "config.json").exists()]:
                raise InputError(f"{name}: holds a training run; give its model {' or '.join(models)}")
        return path
    if path.exists():
        raise InputError(f"{name}: is a file; give the {kind}'s folder")
    try:
        return repository(str(name), kind).fetch(patterns)
    except Exception:
        KNOWN.pop((str(name), kind), None)
        raise


def files_on_hub(name, kind: str = "model") -> list[str] | None:
    """The names of a repository's files, to choose before gigabytes are fetched; None for a local folder, or if the hub does
    not answer."""
    return None if Path(name).expanduser().exists() else repository(str(name), kind).files


def repository(name: str, kind: str) -> "Repository":
    """Asks the hub once per process; again only after local_folder has raised an error."""
    if (name, kind) not in KNOWN:
        KNOWN[name, kind] = Repository(name, kind)
    return KNOWN[name, kind]


class Repository:
    """A repository on the hub, at the commit from which its first file came: a run that reloads its student hours later must not
    get another commit.

    files    the names of its files; None if the hub did not answer
    failure  the error if it did not; then only what the cache holds is used
    """

    def __init__(self, name: str, kind: str):
        self.name, _, revision = ADDRESS.sub("", name).rstrip("/").partition("@")
        if self.name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise InputError(f"{name}: no such folder; give a local folder or a hub name such as Qwen/Qwen2.5-0.5B"
                             if kind == "model" else
                             f"{name}: no such file or folder; check the path, or give a hub name such as openai/gsm8k or, for "
                             "one of its files, openai/gsm8k:FILE")
        from huggingface_hub import HfApi                       # comes with tokenizers
        self.kind, self.revision = kind, revision or None
        self.files, self.failure, self.folder, self.fetched = None, None, None, set()
        try:
            info = HfApi().repo_info(self.name, repo_type=kind, revision=self.revision, timeout=TIMEOUT)
            self.files = [file.rfilename for file in info.siblings or ()]
        except Exception as error:      # the hub's own, or those of whichever HTTP library its version is built on
            self.failure = error

    def fetch(self, patterns) -> Path:
        """The folder of its files in the hub's cache, those that match the patterns downloaded where they are missing."""
        from huggingface_hub import constants, snapshot_download
        missing = sorted(set(patterns) - self.fetched)
        if missing or not self.folder:
            revision = self.folder.name if self.folder else self.revision       # the hub's cache records a branch's commit
            try:
                folder = Path(snapshot_download(self.name, repo_type=self.kind, revision=revision, allow_patterns=missing,
                                                local_files_only=self.failure is not None))
            except Exception as error:
                if getattr(error, "errno", None):               # the disk's; the hub's own are OSErrors without a number
                    error.filename = error.filename or constants.HF_HUB_CACHE
                    raise
                reason = " ".join(str(self.failure or error).split()) or type(error).__name__
                raise InputError(f"{self.name}: no such folder here, and the hub did not return it ({reason}); check the name, "
                                 "the network and HF_TOKEN") from error
            if self.failure and not self.folder:
                print(f"{self.name}: the hub did not answer ({type(self.failure).__name__}); using commit {folder.name[:12]} "
                      "from its cache", file=sys.stderr)
            self.folder = folder
            self.fetched.update(missing)
        return self.folder
