"""Reads records from .jsonl, .json, .csv (each also .gz) and .parquet files, local or from the Hugging Face hub."""
import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from minikd.errors import InputError
from minikd.files import check_pointer, naming, parse_json
from minikd.hub import ADDRESS, files_on_hub, local_folder

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
HUB_METADATA = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}   # not records


# ---- a name -> files

def data_files(name) -> list[Path]:
    """The files that one --data argument names, or a list of them, in the order they are read.

    It is a file, or a folder or hub dataset that holds one; of several, "name:choice" means all that a file's name, a folder or
    a glob matches: "open-r1/codeforces-cots:solutions_py", or, at a revision, "open-r1/codeforces-cots@main:solutions_py".
    Raises InputError if there is no such file or folder, and as _choose.
    """
    if not isinstance(name, (str, Path)):
        return [file for each in name for file in data_files(each)]
    base, choice = split_choice(name)
    path = Path(base).expanduser()
    if not base:                                                # Path("") would be the current folder
        raise InputError(f"{str(name)!r}: names no file or folder to read; give one")
    if path.exists() and not path.is_dir():
        if choice:
            raise InputError(f"{name}: {base} is a file, so there is nothing to choose; give {base} alone")
        return [path]
    if base.endswith((*ENDINGS, ".txt")) and not path.exists():             # runs/data.jsonl is no hub name: do not ask it
        raise InputError(f"{base}: no such file; check the path (a file of a hub dataset is OWNER/NAME:FILE)")
    on_hub = files_on_hub(base, kind="dataset")
    if on_hub is not None:
        chosen = _choose(base, on_hub, choice)
        folder = local_folder(base, chosen, kind="dataset")
        return [folder / file for file in chosen]               # the cache may hold more, from other choices
    patterns = [choice, f"{choice}/*"] if choice else [f"*{ending}" for ending in ENDINGS]
    folder = local_folder(base, patterns, kind="dataset")       # a local folder; or the cache, if the hub does not answer
    held = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    files = [folder / file for file in _choose(base, held, choice)]
    if not path.is_dir() and not re.search(r"-\d{3}", choice):                         # unless single shards are asked for
        _check_complete(base, files)
    return files


def local_files(names) -> list[Path]:
    """data_files of those names that are files or folders here; the hub is not asked about the others."""
    return data_files([name for name in names if Path(split_choice(name)[0]).expanduser().exists()])


def split_choice(name) -> tuple[str, str]:
    """What a --data argument names, and its choice after a colon, or ""."""
    parts = ADDRESS.sub("", str(name)).rstrip("/").split(":")
    end = len(parts)
    while end > 1 and not Path(":".join(parts[:end])).expanduser().exists():            # a file's own name may hold colons
        end -= 1
    return ":".join(parts[:end]), ":".join(parts[end:]).rstrip("/")


def _check_complete(name: str, files: list[Path]):
    """Raises InputError if one of the files like train-00000-of-00002.parquet is missing, as after a broken download."""
    for file in files:
        part = re.search(r"-\d{5}(-of-(\d{5})\..+)", file.name)
        if part and len(list(file.parent.glob(f"{file.name[:part.start()]}-?????{part[1]}"))) < int(part[2]):
            raise InputError(f"{name}: its cache holds only some of the {int(part[2])} files like {file.name}; run once online")


SPLIT = re.compile(r"(?:.*/)?(train|test|valid|validation|val|dev|eval)(?![a-z]).*")
SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]{16})?")


def _choose(name: str, held: list[str], choice: str) -> list[str]:
    """The data files among `held` that `choice` names.  Raises InputError for none; for several without a choice; and for several
    splits, unless a glob names them."""
    data = sorted(file for file in held if file.endswith(ENDINGS) and "/." not in f"/{file}"
                  and file.rpartition("/")[2] not in HUB_METADATA)
    if not data:
        raise InputError(f"{name}: holds no data file; give a folder or dataset with files that end in {' '.join(ENDINGS)}")
    found = [file for file in data if not choice or file == choice or fnmatch(file, choice) or fnmatch(file, f"{choice}/*")]
    splits = {split[1] for file in found if (split := SPLIT.fullmatch(file.removeprefix(f"{choice}/")))}
    is_glob = any(letter in choice for letter in "*?[")
    if not found:
        fault = f"nothing matches {choice!r}"
    elif not choice and len(found) > 1:
        fault = "holds several data files"
    elif len(splits) > 1 and not is_glob:
        fault = f"{choice} holds several splits"
    else:
        return found
    names = list(dict.fromkeys(SHARD.sub("-*", file) for file in found or data))                    # shards as one glob
    listing = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    raise InputError(f"{name}: {fault}; choose with {name}:FILE, FOLDER or GLOB from {listing}")


# ---- a file -> records

HALF = re.compile("[\ud800-\udfff]")        # half a character, a lone surrogate: possible in JSON's escapes, not in UTF-8


def absent(value) -> bool:
    """Whether a field is as good as missing: null, or NaN, a data frame's empty cell."""
    return value is None or isinstance(value, float) and value != value


def filled(value) -> bool:
    """Whether a field holds more than null, false, 0, a blank text or an empty list (which is text in a CSV)."""
    return value.strip() not in ("", "[]", "{}") if isinstance(value, str) else bool(value) and not absent(value)


def names_of(record: dict) -> str:
    """A record's field names, for a message: at most twelve."""
    return ", ".join(list(record)[:12])


def kind_of(value) -> str:
    """A value's type, as error messages call it."""
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return "null" if absent(value) else "text" if isinstance(value, str) else f"{article} {name}"


def check_text(value, where: str, what: str):
    """Raises InputError, naming `what`, for a value that is not text, or holds half a character."""
    if not isinstance(value, str):
        raise InputError(f"{where}: {what} is {kind_of(value)}; make it text")
    if HALF.search(value):
        raise InputError(f"{where}: {what} holds half a character (a lone surrogate); fix its escapes")


def read_records(path, kinds: tuple[type, ...] = (dict,)) -> Iterator[tuple[str, dict]]:
    """Streams (where, record) from every file that data_files finds; where is "file.jsonl:812", "file.json:record 3" or
    "file.parquet:row 3".

    kinds  the types that a record may have. With str: also the lines of a .txt, empty ones included. With InputError: in the
           place of a malformed record its error, which is raised otherwise.
    Raises InputError naming file and line. After some errors (a broken gzip, an unclosed quote in a csv) nothing more can be
    read: these are raised always.
    """
    readers = {".jsonl": _json_lines, ".json": _json_file, ".csv": _csv_rows, ".parquet": _parquet_rows}
    readers |= {".txt": _text_lines} if str in kinds else {}
    for file in data_files(path):
        reader = readers.get(Path(file.stem).suffix if file.suffix == ".gz" else file.suffix)
        if reader is None:
            mend = ("write its texts as records of a .jsonl file, plain text in a field `text`" if file.suffix == ".txt" else
                    f"unpack or convert it, or rename it to end in one of "
                    f"{' '.join((*ENDINGS, '.txt') if str in kinds else ENDINGS)}")
            raise InputError(f"{file}: its name does not tell its format; {mend}")
        check_pointer(file)
        read = 0
        for read, (where, record) in enumerate(reader(file), 1):
            if not isinstance(record, (*kinds, InputError)):    # readers yield an error that they can read past
                record = InputError(f"{where}: a record is an object with named fields, not {kind_of(record)}; fix it")
            if not isinstance(record, kinds):
                raise record
            yield where, record
        if not read:
            raise InputError(f"{file}: holds no records; check that it was written or downloaded completely")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """(its number, a line) of a file, unpacked, less a BOM."""
    number = 0
    with naming(file):
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as handle:
                for number, line in enumerate(handle, 1):
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{file}: is not a valid gzip file ({error}, after line {number}); download it again") from error


def _parse(data: bytes, file: Path, first: int = 1):
    """The JSON value in the lines of a file from `first` on, or the InputError that says why there is none."""
    line = first
    try:
        return parse_json(data)                                 # given bytes, it checks UTF-8
    except json.JSONDecodeError as error:
        line, reason = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except UnicodeDecodeError as error:
        line, reason = line + error.object.count(b"\n", 0, error.start), str(error)
    except ValueError as error:
        reason = str(error)
    near = data.split(b"\n")[line - first][:40]
    return InputError(f"{file}:{line}: not JSON ({reason}): {near!r}; fix or remove it")


def _text_lines(file: Path):
    for number, line in _lines(file):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{file}:{number}: is not UTF-8 ({error}); save it as UTF-8") from error
        yield f"{file}:{number}", text.rstrip("\r\n")


def _json_lines(file: Path):
    for number, line in _lines(file):
        if number == 1 and line.strip() in (b"[", b"{") and ".json" not in file.suffixes:
            yield f"{file}:1", InputError(f"{file}:1: not a record, but the beginning of a JSON value over many lines; "
                                          "rename the file to end in .json")
        elif line.strip():
            yield f"{file}:{number}", _parse(line.rstrip(b"\r\n"), file, number)


def _json_file(file: Path):
    data = b"".join(line for _, line in _lines(file))
    value = _parse(data, file) if data.strip() else []
    if isinstance(value, InputError):
        if "(Extra data" not in str(value):
            raise value
        yield from _json_lines(file)                            # JSON Lines named .json, as the hub often has it
        return
    if isinstance(value, dict):
        value = value.get("data", [value])                      # without `data`: JSON Lines of one line
    if not isinstance(value, list):
        raise InputError(f'{file}: holds neither a list of records nor {{"data": [...]}}; rewrite it as one of them')
    yield from ((f"{file}:record {number}", record) for number, record in enumerate(value, 1))


def _csv_rows(file: Path):
    csv.field_size_limit(2**31 - 1)                             # the default, 128 KiB, is too little for long texts
    rows = csv.reader((line.decode() for _, line in _lines(file)), strict=True)     # an unclosed quote must not swallow the rest
    start = 1                                                   # a record may span lines: name its first
    try:
        header = [name.strip() for name in next(filter(None, rows), [])]    # after blank lines, if any
        if len(header) == 1 and re.search("[;\t]", header[0]):
            mark = "semicolons" if ";" in header[0] else "tabs"
            raise InputError(f"{file}:{rows.line_num}: separates its columns by {mark}; save it with commas")
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise InputError(f"{file}:{rows.line_num}: the column {twice[0]!r} occurs twice; rename or remove one")
        start = rows.line_num + 1
        for row in rows:
            where, start = f"{file}:{start}", rows.line_num + 1
            if row and row == header:
                yield where, InputError(f"{where}: repeats the header, as in joined files; remove the line")
            elif row and len(row) != len(header):
                yield where, InputError(f"{where}: has {len(row)} cells for {len(header)} columns; "
                                        "put cells that hold commas or line breaks in quotes")
            elif row:
                yield where, dict(zip(header, row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{file}:{start}: not CSV in UTF-8 ({error}); fix the record's quotes or encoding") from error


def _parquet_rows(file: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{file}: .parquet needs pyarrow; pip install 'pyarrow>=14', or convert the file once: duckdb -c "
                         f"\"COPY (FROM '{file}') TO '{file.stem}.jsonl' (FORMAT json)\"") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches(batch_size=256) for row in batch.to_pylist())
            yield from ((f"{file}:row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: is not a valid parquet file ({error}); download it again") from error
