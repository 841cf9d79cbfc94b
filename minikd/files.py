"""Files: writes that complete or leave nothing."""
import ctypes
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from minikd.errors import InputError

MARK = "minikd-"         # in the names of temporary folders


@contextmanager
def naming(path):
    """Adds the file's name to an OSError raised inside: the error of a full or failing disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_path(path, folder: bool = False, keep=None):
    """Yields a temporary path beside `path`; renames it to `path` if the block ends without an error, else removes it.

    A reader, or a restart after kill -9, finds the old content or the new, never a part of either. (Where two names cannot be
    swapped in one step, as on macOS, an old folder is for a moment only in the temporary folder beside `path`.)
    With `folder`, the yielded path is an empty folder; what the old folder holds stays where `keep` is true of its name.
    Raises InputError if `path` exists but is no regular file (with `folder`, no folder), or holds the working directory.
    """
    path = Path(path).resolve()                                 # gives "." a name; a link is kept, its target replaced
    if path.exists() and not (path.is_dir() if folder else path.is_file()):
        raise InputError(f"{path}: is not a {'folder' if folder else 'regular file'} and would be replaced; give another path")
    if folder and holds_cwd(path):
        raise InputError(f"{path}: is or contains the current folder, and would be replaced; give another, or one inside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():                                           # else a killed process's folder may hold the only copy
        sweep(path.parent, path.name)
    work, held = temporary_folder(path)
    try:
        with naming(path):
            new = work / path.name
            if folder:
                new.mkdir()
            yield new
            for file in [new, *new.rglob("*")] if folder else [new]:
                if file.is_file() or file.is_dir():             # not a broken link
                    _fsync(file)                                # the data, before the new name makes it visible
            if keep and path.exists():
                _keep(path, new, keep)
                _fsync(new)
            if not (folder and path.exists() and _exchange(new, path)):
                if folder and path.exists():
                    os.rename(path, work / "old")               # os.replace cannot replace a full folder
                os.replace(new, path)
            _fsync(path.parent)
            sweep(path.parent, path.name)                       # again: now there is a `path`, whatever was left
    finally:
        try:
            if (work / "old").exists() and not path.exists():   # an error or Ctrl-C between two renames
                os.rename(work / "old", path)
        finally:
            discard(work, held)


def _keep(old: Path, new: Path, keep=lambda name: True):
    """Puts into the folder `new` what `old` holds, of the names that `keep` is true of. Files are linked: nothing is copied, and
    a log that is open stays the same file."""
    for path in old.iterdir():
        temporary = path.name.startswith(".") and f".{MARK}" in path.name       # a temporary_folder inside `old`
        if temporary or not keep(path.name):
            continue
        place = new / path.name
        with suppress(FileNotFoundError):                       # deleted by another process meanwhile
            if path.is_dir() and not path.is_symlink():
                place.mkdir(exist_ok=True)
                _keep(path, place)
                _copystat(path, place)
                _fsync(place)
            elif not os.path.lexists(place):
                _link(path, place)


def _link(old: Path, new: Path):
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:                                             # a file system without hard links, on a Mac also a link
        shutil.copyfile(old, new, follow_symlinks=False)
        _copystat(old, new)
        if not new.is_symlink():
            _fsync(new)


def _copystat(old: Path, new: Path):
    with suppress(OSError):                                     # a file system without times or permissions of its own
        shutil.copystat(old, new, follow_symlinks=False)


def holds_cwd(path: Path) -> bool:
    """Whether a folder is or contains the current folder, which may have been deleted."""
    with suppress(FileNotFoundError):
        return Path.cwd().is_relative_to(path.resolve())
    return False


def hold(path: Path, wait: bool = False) -> io.FileIO:
    """Locks a file, made if there is none, until the file object that it returns is closed, or this process has ended.
    Raises BlockingIOError if it is locked already and `wait` is false. Where there are no locks it does nothing."""
    file = open(path, "ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass
    return file


def remove(path: Path):
    """Deletes a file, if there is one, and what killed processes left of it."""
    path.unlink(missing_ok=True)
    sweep(path.parent, path.name)


def write_jsonl(rows: list[dict], path):
    """Writes one JSON object per line; the file is complete or not there."""
    with atomic_path(Path(path)) as new:
        new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8",
                       errors="backslashreplace")               # JSON's own escape, for a file's name that is not UTF-8


@contextmanager
def append_to(path):
    """Yields `path`, open to append text to."""
    with naming(path), open(path, "a", encoding="utf-8") as file:
        yield file


def temporary_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, on the same file system, and the open handle that keeps it locked."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.{MARK}", dir=path.parent))
        with suppress(FileNotFoundError):
            held = os.open(work, os.O_RDONLY)
            with suppress(OSError):                             # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX)
            if work.exists():
                return work, held
            os.close(held)                                      # another process swept it before it was locked: try again


def discard(work: Path, held: int):
    """Deletes a temporary folder. If that is interrupted, its lock is let go all the same, and a later sweep removes the rest."""
    try:
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(held)


def sweep(folder: Path, name: str | None = None):
    """Removes the temporary folders that killed processes left in `folder`: those made for the file or folder `name`, or all if
    it is None. A model's take gigabytes. Those of running processes are locked, and stay."""
    for left in folder.iterdir():
        beside, mark, _ = left.name.rpartition(f".{MARK}")
        if mark and beside.startswith(".") and name in (None, beside[1:]):
            with suppress(OSError):                             # locked, or gone, or a file system without locks
                handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)        # not another user's pipe or link
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                finally:
                    os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step (Linux's renameat2), so that `b` exists at every moment; False if not supported."""
    try:
        here, swap = -100, 2                                    # AT_FDCWD, RENAME_EXCHANGE
        return ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0
    except (AttributeError, OSError):
        return False


def _fsync(path: Path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:                                    # some network and user-space file systems cannot
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def check_writable(folder: Path):
    """Makes the folder if there is none.  Raises InputError if no file can be made in it: now, not after hours of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error


def parse_json(text: str | bytes):
    """json.loads, but all that it cannot parse raises ValueError: bytes, syntax, a number of 5,000 digits, lists 1,000 deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error


def read_json(path: Path, mend: str | None = None) -> dict:
    """One JSON object from a file.  Raises InputError, with file and position, if it is missing or not one; `mend` says
    what the user can do then, by default about a file in a Hugging Face folder."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: is missing; {mend or 'give the folder of a Hugging Face model, which has one'}") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); {mend or 'fetch it again'}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}, not an object; {mend or 'fetch it again'}")
    return value


def check_pointer(path: Path):
    """Raises InputError for what a clone without git-lfs has in a large file's place."""
    if path.is_file() and path.stat().st_size < 1024 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is only a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


def save_tensors(tensors: dict, path, metadata: dict[str, str] | None = None):
    """safetensors' save_file, but with the usual permissions of a new file (it makes files that only their owner can read), and
    with its error for a full disk turned back into an OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    Path(path).touch()
    mode = os.stat(path).st_mode & 0o777
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=metadata)
        with suppress(OSError):                                 # a file system without permissions of its own
            os.chmod(path, mode)
    except SafetensorError as error:
        number = re.search(r"(?:os error|code:) (\d+)", str(error))          # code: up to 0.5
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error), str(path)) from error


def sha256(path) -> str:
    """The first 16 hex digits of a file's sha256: enough to notice that it changed.  Raises InputError for a pipe or a device,
    which cannot be hashed first and then read again."""
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise InputError(f"{path}: is a pipe or a device, but must be read twice; save its content to a file, and give that")
    digest = hashlib.sha256()
    with naming(path), open(path, "rb") as file:
        while block := file.read(1 << 20):                      # 1 MB at a time
            digest.update(block)
    return digest.hexdigest()[:16]


def fingerprint(digests) -> str:
    """One hash of many."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:24]
