"""Writes that are whole or absent, and reads that name what is wrong."""
import errno
import hashlib
import io
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import refusal
from minikd import files
from minikd.errors import InputError
from minikd.files import append_to, atomic_path, check_writable, parse_json, read_json, remove, save_tensors, sha256, write_jsonl
from minikd.records import read_records


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- atomic_path

def test_a_file_is_replaced_at_the_end_of_the_block_and_not_before(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    path.parent.mkdir()
    path.write_text("old")
    with atomic_path(path) as new:
        new.write_text("new")
        assert path.read_text() == "old" and path.parent in new.parents         # on the same file system, else no rename
    assert path.read_text() == "new" and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)     # a file system or a system without it
    path = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_path(path, folder=True) as new:
            (new / content).write_text(content)
        assert names(path) == [content] and names(tmp_path) == ["model"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_failure_inside_the_block_leaves_what_was_there_and_no_litter(tmp_path, folder):
    path = tmp_path / "a"
    with atomic_path(path, folder=folder) as new:
        (new / "weights" if folder else new).write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path, folder=folder) as new:
        (new / "half" if folder else new).write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["a"] and (path / "weights" if folder else path).read_text() == "old"
    assert not folder or names(path) == ["weights"]


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_going_on(tmp_path, monkeypatch):
    done, rename = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names)))
    with atomic_path(tmp_path / "x.json") as new:
        new.write_text("{}")
    assert done == [(tmp_path / "x.json").stat().st_ino, "rename", tmp_path.stat().st_ino]


def test_a_file_system_that_cannot_flush_serves_and_a_failing_disk_does_not(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    code = errno.EINVAL                                                         # of folders on some network mounts
    with atomic_path(tmp_path / "x.json") as new:
        new.write_text("{}")
    assert names(tmp_path) == ["x.json"]
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"), atomic_path(tmp_path / "y.json") as new:
        new.write_text("{}")
    assert names(tmp_path) == ["x.json"]


def test_a_full_disk_is_told_with_the_path(tmp_path):
    with pytest.raises(OSError) as error, atomic_path(tmp_path / "x.json"):
        raise OSError(errno.ENOSPC, "No space left on device")                  # as write() says it
    assert error.value.filename == str(tmp_path / "x.json") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("swap", [True, False])
def test_what_a_folder_holds_stays_where_its_name_is_to_be_kept(tmp_path, monkeypatch, swap):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for name in "config.json", "log", "sub/deep", "weights", f".x.{files.MARK}abc", "minikd-notes":
        (folder / name).write_text("old")
    (tmp_path / "token").write_text("beside")
    (folder / "link").symlink_to("../token")
    (folder / "sub/latest").symlink_to("deep")
    os.utime(folder / "sub", (1, 1))
    exchange, link = files._exchange, os.link
    monkeypatch.setattr(files, "_exchange", lambda a, b: swap and exchange(a, b))
    monkeypatch.setattr(os, "link", lambda old, new, follow_symlinks=True: link(        # as on a Mac, and in Python 3.14
        os.path.realpath(old) if follow_symlinks else old, new, follow_symlinks=False))
    with open(folder / "log", "a") as log, atomic_path(folder, folder=True, keep=lambda name: name != "config.json") as new:
        (new / "weights").write_text("new")
        (folder / "soon").write_text("theirs")
        log.write("+")
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert found == {"weights": "new", "log": "old+", "sub/deep": "old", "sub/latest": "old", "soon": "theirs", "link": "beside",
                     "minikd-notes": "old"}
    assert (folder / "link").is_symlink() and (folder / "sub/latest").is_symlink() and (folder / "sub").stat().st_mtime == 1


def test_what_another_process_deletes_meanwhile_does_not_end_a_save(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    for name in "gone", "stays":
        (tmp_path / "model" / name).write_text("old")
    link = os.link
    monkeypatch.setattr(os, "link", lambda old, new, **how: (old.unlink() if old.name == "gone" else None, link(old, new, **how)))
    with atomic_path(tmp_path / "model", folder=True, keep=lambda name: True) as new:
        (new / "weights").write_text("new")
    assert names(tmp_path / "model") == ["stays", "weights"]


def test_a_file_system_without_links_locks_times_and_permissions_of_its_own_serves(tmp_path, monkeypatch):
    """As cloud storage is mounted, or a memory stick."""
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / "model/sub").mkdir(parents=True)
    for name in "log", "sub/deep":
        (tmp_path / "model" / name).write_text("old")
    (tmp_path / "model/latest").symlink_to("log")
    for name in "link", "chmod", "utime":
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    with atomic_path(tmp_path / "model", folder=True, keep=lambda name: True) as new:
        save_tensors({"a": torch.ones(2)}, new / "weights")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["latest", "log", "sub", "weights"]
    assert (tmp_path / "model/sub/deep").read_text() == "old" and (tmp_path / "model/latest").is_symlink()
    assert torch.equal(load_file(tmp_path / "model/weights")["a"], torch.ones(2))


def free(path) -> bool:
    """Whether another process could lock the file."""
    code = "import sys; from minikd.files import hold; hold(sys.argv[1])"
    ended = subprocess.run([sys.executable, "-c", code, path], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert ended.returncode == 0 or "BlockingIOError" in ended.stderr, ended.stderr
    return ended.returncode == 0


def test_a_lock_in_a_folder_outlives_its_replacement(tmp_path):
    """quantize.py locks the folder that it then writes the model into."""
    (tmp_path / "model").mkdir()
    held = files.hold(tmp_path / "model/.lock")
    with atomic_path(tmp_path / "model", folder=True, keep=lambda name: True) as new:
        (new / "weights").write_text("new")
    assert names(tmp_path / "model") == [".lock", "weights"] and not free(tmp_path / "model/.lock")
    held.close()
    assert free(tmp_path / "model/.lock")


def test_a_lock_that_is_not_had_leaves_no_handle_and_without_locks_nothing_is_refused(tmp_path, monkeypatch):
    held, opened = files.hold(tmp_path / "lock"), len(os.listdir("/dev/fd"))
    with pytest.raises(BlockingIOError):
        files.hold(tmp_path / "lock")
    assert len(os.listdir("/dev/fd")) == opened

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    files.hold(tmp_path / "lock").close()
    held.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_error_between_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/weights").write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error), atomic_path(tmp_path / "model", folder=True) as new:
        (new / "weights").write_text("new")
    assert (tmp_path / "model/weights").read_text() == "old" and names(tmp_path) == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_on_linux_a_folder_exists_at_every_moment_of_its_replacement(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    (new / "mark").touch()
    assert files._exchange(new, old)                        # in place of two renames with a gap between them
    assert names(old) == ["mark"] and names(new) == []
    assert not files._exchange(new, tmp_path / "absent")


def test_the_folder_one_works_in_is_not_replaced_under_one(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for path in (".", tmp_path, tmp_path / "inner"):
        with pytest.raises(InputError, match="is or contains the current folder"), atomic_path(path, folder=True):
            pass
    with atomic_path("below", folder=True) as new:
        (new / "a").touch()
    assert names(tmp_path / "inner") == ["below"]


def test_a_current_folder_that_was_deleted_holds_nothing_and_stops_no_save(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    assert files.holds_cwd(tmp_path / "gone") and files.holds_cwd(tmp_path) and not files.holds_cwd(tmp_path / "other")
    (tmp_path / "gone").rmdir()
    with atomic_path(tmp_path / "x", folder=True) as new:
        (new / "a").touch()
    assert not files.holds_cwd(tmp_path) and names(tmp_path / "x") == ["a"]


def test_a_link_keeps_leading_to_the_folder_that_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    with atomic_path(tmp_path / "runs", folder=True) as new:
        (new / "a").touch()
        (new / "to nowhere").symlink_to("absent")
    assert (tmp_path / "runs").is_symlink() and names(tmp_path / "disk") == ["a", "to nowhere"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("last", ["write", "removal"])
def test_what_a_killed_writer_left_is_swept_by_the_next_write_but_not_a_living_ones(tmp_path, before, last):
    path = tmp_path / "last"
    if before:
        path.touch()
    left, other, user = (tmp_path / name for name in (".last.minikd-x", ".lasting.minikd-x", ".last.x"))
    opened = os.listdir("/dev/fd")
    for folder in (left, other, user):
        folder.mkdir()
    if last == "removal":
        remove(path)
    else:
        with atomic_path(path) as new:
            assert left.exists() == (not before)                # a folder that is being replaced may be there and nowhere else
            with atomic_path(path) as inner:
                inner.touch()
            new.touch()                                         # the second has not swept the first, which is at work
    assert not left.exists() and other.exists() and user.exists() and path.exists() == (last == "write")
    assert len(os.listdir("/dev/fd")) == len(opened)            # no handle is left open


def test_a_folder_that_is_swept_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    made, make = [], tempfile.mkdtemp

    def mkdtemp(**where):
        made.append(make(**where))
        if len(made) == 1:
            os.rmdir(made[0])                                   # by another process, between two instructions of this one
        return made[-1]

    def flock(handle, how):
        if len(made) == 2:
            os.rmdir(made[1])                                   # while this one waits for the lock

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(files.fcntl, "flock", flock)
    opened = os.listdir("/dev/fd")
    with atomic_path(tmp_path / "x") as new:
        new.write_text("all")
    assert (tmp_path / "x").read_text() == "all" and names(tmp_path) == ["x"] and len(made) == 3
    assert len(os.listdir("/dev/fd")) == len(opened)


def test_a_device_or_a_folder_is_not_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in "pipe", "folder":
        with pytest.raises(InputError, match=f"{name}: is not a regular file"), atomic_path(tmp_path / name) as new:
            new.write_text("")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "folder").is_dir()


def test_what_an_interrupted_removal_leaves_the_next_write_removes(tmp_path, monkeypatch):
    """As of a model's old folder: the handle that locks it would stay open until the process ends."""
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "file") as new:
            new.write_text("1")
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_path(tmp_path / "file") as new:
        new.write_text("2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "2"


# ---- other files

def test_lines_are_read_as_they_are_and_a_hash_is_of_the_whole_file(tmp_path):
    write_jsonl([{"said": "año"}, {}], tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == '{"said": "año"}\n{}\n'.encode()
    for end in b"", b"x":
        (tmp_path / "big").write_bytes(bytes(3 << 20) + end)
        assert sha256(tmp_path / "big") == hashlib.sha256(bytes(3 << 20) + end).hexdigest()[:16]


def test_what_cannot_be_written_whole_is_the_systems_error_with_the_path(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))                # of safetensors, too, whose error is its own
    try:
        with pytest.raises(OSError, match="File too large: '.*tensors'") as caught:
            save_tensors({"a": torch.zeros(1000)}, tmp_path / "tensors")
        with pytest.raises(OSError, match="File too large: '.*log'"), append_to(tmp_path / "log") as file:
            file.write("x" * 9999)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_a_file_that_cannot_be_read_on_is_named(monkeypatch, tmp_path):
    """As on a failing disk."""
    (tmp_path / "data.jsonl").write_text("{}\n")

    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")
        readline = __next__ = read

    monkeypatch.setattr("builtins.open", lambda *_, **__: Failing())
    for read in sha256, lambda path: list(read_records(path)):
        with pytest.raises(OSError) as failed:
            read(tmp_path / "data.jsonl")
        assert failed.value.filename == str(tmp_path / "data.jsonl")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, read_only):
    check_writable(tmp_path / "deep/new")
    assert list((tmp_path / "deep/new").iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "file: cannot be written (" in refusal(check_writable, tmp_path / "file")
    read_only(tmp_path / "deep")
    said = refusal(check_writable, tmp_path / "deep")
    assert said == f"{tmp_path}/deep: cannot be written (Permission denied); choose another --out"


def test_a_pipe_is_not_waited_for_twice(tmp_path):
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(IsADirectoryError):
        sha256(tmp_path)
    for path in tmp_path / "data.jsonl", "/dev/zero":                           # nor a file without an end read
        assert f"{path}: is a pipe or a device, but must be read twice; save its content" in refusal(sha256, path)


def test_a_name_that_is_not_utf_8_does_not_lose_the_answers(tmp_path):
    write_jsonl([{"where": "\udcff.jsonl:1", "text": "é"}], tmp_path / "answers.jsonl")
    assert parse_json((tmp_path / "answers.jsonl").read_text(encoding="utf-8")) == {"where": "\udcff.jsonl:1", "text": "é"}


# ---- read_json

@pytest.mark.parametrize("content, complaint", [(b"{\"a\": 1,}", "is not JSON"), (b"", "is not JSON"),
                                                (b"\xff\xfe{}", "is not JSON"), (b"[1]", "holds a list"),
                                                (b"[" * 9999, "is not JSON"), (b"9" * 9999, "is not JSON")])
def test_what_is_not_a_json_object_is_named_in_one_line(tmp_path, content, complaint):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    said = refusal(read_json, path)
    assert said.startswith(f"{path}: {complaint}") and said.endswith("; fetch it again")
    assert refusal(read_json, path, "start anew").endswith("; start anew")
