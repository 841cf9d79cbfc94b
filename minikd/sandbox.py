"""Runs untrusted programs: a model's answers, judged by what they print.

Only the caller knows the expected output; a program gets its source, its stdin and nothing else. One run takes three
processes. None is started with preexec_fn, which would be unsafe in a caller with threads (torch has some):

    run_program    enforces wall-clock time, output size and disk space
    supervisor     adopts every descendant of the program (as a subreaper) and ends after the last of them
    the program    a fresh interpreter, under kernel limits that nothing inside it can lift

confine.py runs in the last two. Important limits are set in more than one way, as a kernel or container may lack some of these;
isolation() says which are active:

    rlimits        memory, CPU time, file size, open files, threads, timers (root is exempt: hence the uid)
    uid            root becomes 65534, without access to root's files, processes and environment
    namespaces     no network, TCP or UDP; no IPC; no access to the memory and environment of the uid's other processes
    Landlock       the program may read Python and the system's libraries and write the private folder, but not remove or rename
                   anything there, so that all it wrote is counted; from ABI 4 on no TCP, from 6 on no signals
    seccomp        no processes, sockets, folders, tracing, priorities, modes of files, shared memory; signals, limits and
                   scheduling only for itself. On a kernel without seccomp, the program may not start threads either

It does not protect against bugs of the kernel. Without Landlock, a program can read and write whatever its uid can.
"""
import fcntl
import functools
import inspect
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minikd import confine
from minikd.errors import InputError
from minikd.files import discard, naming, sweep, temporary_folder

MB = 1 << 20
NOBODY = 65534
OUTPUT = MB                 # bytes of stdout, and of stderr
FOLDER = "sandbox"          # in the names of the private folders
DISK, FILES = 8 * MB, 200   # of such a folder, which is flat
TICK = 0.05                 # seconds between two checks of that folder
PATIENCE = 60.0             # seconds to wait for a process, while other programs' threads use up a container's limit
SHARE = Path("/sys/fs/cgroup/cpu.max")          # cgroup v2
# NPROC counts threads; some are allowed, as recursion in a thread with a large stack is common in contests. Without a user
# namespace it counts those of all the uid's programs together. A CORE of 1 stops the kernel from piping core dumps to a program;
# 0 does not.
LIMITS = {"RLIMIT_CORE": 1, "RLIMIT_FSIZE": MB, "RLIMIT_NOFILE": 32, "RLIMIT_NPROC": 64, "RLIMIT_SIGPENDING": 256}
SUPERVISOR = inspect.getsource(confine)         # for `python -c`
READABLE = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime",
            "/dev/zero", "/dev/random", "/dev/urandom"]


@dataclass(frozen=True)
class Result:
    """How a program ended. status "ok" only means exit code 0: stdout decides whether the answer was right.

    status   "ok", "error" (another exit code, an exception, a signal), "timeout", "memory" (ended by MemoryError),
             "output" (more than OUTPUT bytes), "disk" (more than DISK bytes or FILES files; a write beyond the 1 MB of a
             single file fails in the program, and is an "error" if that ends it)
    stdout   decoded as UTF-8, invalid bytes replaced by U+FFFD; cut at OUTPUT bytes
    stderr   likewise
    seconds  wall-clock time, including the start of both interpreters
    limits   the active ones, as isolation() returns them
    """
    status: str
    stdout: str
    stderr: str
    seconds: float
    limits: str = ""


# ---- for the caller

def run_program(source: str, stdin: str = "", timeout: float = 5.0, memory_mb: int = 512) -> Result:
    """Runs Python source in a sandbox; whatever the program does is reported in the result, not raised.

    timeout    wall-clock seconds
    memory_mb  MB of address space; the interpreter itself takes 12 to 30
    The program can import the standard library only.
    Raises InputError if programs cannot be confined, as by a root user that cannot become another user, or not on Linux; and if
    for a minute no process can be started.
    Raises ValueError for a timeout or memory_mb that is negative or above a billion, or for a memory_mb of 0.
    """
    if not (0 <= timeout <= 1e9 and 0 < memory_mb <= 1e9):
        raise ValueError(f"run_program: timeout = {timeout}, memory_mb = {memory_mb}: give 0 to 1e9, memory_mb above 0")
    if sys.platform != "linux":
        raise InputError(f"sandbox: programs cannot be confined on {sys.platform}; run them on Linux")
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return _try(source, stdin, timeout, memory_mb)
        except BlockingIOError as error:                        # before the program began: it was given no process
            if time.monotonic() > end:
                raise InputError("sandbox: no process can be started, as this machine or container has reached its "
                                 "limit; raise the limit, or end other processes") from error
            time.sleep(TICK)


def run_programs(jobs) -> list[Result]:
    """Results in the order of the jobs, each a tuple of run_program's arguments. As many run at a time as there are
    cores, but at least 2, so that an endless loop does not hold up all others."""
    with ThreadPoolExecutor(max(2, cores())) as pool:
        return list(pool.map(lambda job: run_program(*job), jobs))


def cores() -> int:
    """The cores this process may use: with more programs than that at a time, correct ones would time out."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    with suppress(OSError, ValueError):                         # a container's share: "200000 100000" is two cores, "max" all
        quota, period = SHARE.read_text().split()
        count = min(count, max(1, int(quota) // int(period)))
    return count


@functools.cache
def isolation() -> str:
    """Which limits are active on this machine, as text to print beside results; found once, by running an empty program. Also
    removes private folders that killed processes left."""
    with suppress(PermissionError):                             # a temporary folder that one may not list
        sweep(Path(tempfile.gettempdir()), FOLDER)
    return run_program("", timeout=30.0).limits


def same_output(stdout: str, expected: str) -> bool:
    """Whether both texts have the same words line by line, apart from blanks around words, empty lines at the end, and the case
    of yes and no.

    All lines must match: comparing with zip would accept the first line alone, or a right answer followed by anything.
    """
    same = lambda word: word.upper() if word.upper() in ("YES", "NO") else word
    ours, theirs = ([[*map(same, line.split())] for line in text.rstrip().split("\n")] for text in (stdout, expected))
    return ours == theirs


# ---- one run, seen from outside

def _try(source, stdin, timeout, memory_mb) -> Result:
    """run_program, once.  Raises BlockingIOError if no process can be started now."""
    start = time.monotonic()
    try:
        source, stdin = source.encode(), stdin.encode()
        if b"\0" in source:                                     # Python 3.10 would run the lines before it
            raise ValueError("a NUL in the source")
    except ValueError as error:                                 # or a lone surrogate
        return Result("error", "", f"not run: {error}", 0.0)
    folder, held = temporary_folder(Path(tempfile.gettempdir(), FOLDER))
    try:
        options = _prepare(folder, source, stdin, timeout, memory_mb)
        verdict, out, err, said = _supervise(folder, options, start + timeout)
        seconds = time.monotonic() - start
    finally:
        if os.geteuid():                # the program may have locked it. Root can delete it all the same, and might chmod a
            with suppress(OSError):     # link put in its place
                os.chmod(folder, 0o700)
        discard(folder, held)
    limits, code, *_ = said.decode().split("\n") + [""]         # as confine.supervise writes them; or "busy", or "refused: why"
    if limits == "busy":
        raise BlockingIOError("the supervisor could not start the program")
    if limits.startswith("refused") or not (limits or verdict):
        raise InputError(f"sandbox: {limits or 'did not start: ' + err.decode(errors='replace')[-300:]}")
    out, err = (bytes(text[:OUTPUT]).decode(errors="replace") for text in (out, err))
    if not verdict:
        last = err.rstrip().rpartition("\n")[2]
        memory = code == "1" and last.partition(":")[0] == "MemoryError"
        verdict = "ok" if code == "0" else "memory" if memory else "error"
    return Result(verdict, out, err, seconds, limits)


def _prepare(folder, source, stdin, timeout, memory_mb) -> dict:
    """Fills the private folder and gives it to the user that the program will run as -> the supervisor's options."""
    for path, content in ((f"{folder}/program.py", source), (f"{folder}/stdin", stdin)):
        with naming(path), open(path, "xb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)                     # whatever the umask: a program may open /dev/stdin by name
    uid = NOBODY if os.geteuid() == 0 and os.environ.get("MINIKD_SANDBOX_AS_ROOT") != "1" else None
    if uid is not None:
        try:
            for path in folder, f"{folder}/program.py":
                os.chown(path, uid, uid)
        except OSError as error:                                # as in a container that has no other user than its root
            raise InputError(f"sandbox: {path}: cannot be given to uid {uid} ({error.strerror}); run as an ordinary user, or set "
                             "MINIKD_SANDBOX_AS_ROOT=1") from error
    python = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)         # not a venv's link
    seconds = math.ceil(timeout) + 1                            # of CPU time, if the wall clock should fail
    boot = f"exec({inspect.getsource(confine.boot) + 'boot()'!r}, {{}})"        # {}: not the program's globals
    return {"parent": os.getpid(), "python": python, "prefix": sys.base_prefix, "boot": boot, "uid": uid,
            "readable": READABLE + [python, f"{sys.base_prefix}/lib", os.path.dirname(os.__file__)],
            "limits": LIMITS | {"RLIMIT_CPU": seconds, "RLIMIT_AS": int(memory_mb * MB)}}


def _supervise(folder, options, deadline) -> tuple[str, bytearray, bytearray, bytearray]:
    """Runs the supervisor's process -> what _watch returns; then it and all its descendants are dead."""
    report, low = os.pipe()
    with open(report, "rb"), open(low, "wb") as low, open(f"{folder}/stdin", "rb") as stdin:
        os.unlink(stdin.name)
        # `low` may be 0, 1 or 2 if the caller closed it; Popen uses these.
        with low, open(fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3), "wb") as write:
            source = f"{SUPERVISOR}\nsupervise({write.fileno()}, {options!r})"
            process = subprocess.Popen([options["python"], "-I", "-S", "-B", "-c", source], stdin=stdin,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env={}, cwd=folder,
                                       pass_fds=[write.fileno()], start_new_session=True)
        with process:
            try:
                if options["uid"] is not None:                  # for a program that opens /dev/stdout by name
                    for stream in process.stdout, process.stderr:
                        os.fchown(stream.fileno(), options["uid"], options["uid"])
                return _watch(process, report, folder, deadline)
            finally:
                _stop(process)


def _watch(process, report, folder, deadline) -> tuple[str, bytearray, bytearray, bytearray]:
    """Reads until the supervisor has ended or a limit is exceeded -> (which limit, or "", stdout, stderr, the report).

    The end of stdout says nothing: a program may close it and continue, or leave it open in a child.
    """
    out, err, said = bytearray(), bytearray(), bytearray()
    texts = {process.stdout.fileno(): out, process.stderr.fileno(): err, report: said}      # of the streams still open
    poll, verdict, due = select.poll(), "", 0.0                # due: when to look at the folder next
    for stream in texts:
        poll.register(stream, select.POLLIN)
        os.set_blocking(stream, False)                          # a program may take back what it wrote, between poll and read

    def read(seconds) -> bool:
        ready = poll.poll(1000 * max(0.0, seconds))
        for stream, _ in ready:
            with suppress(BlockingIOError):
                data = os.read(stream, 1 << 16)
                texts[stream].extend(data)
                if not data:
                    poll.unregister(stream)
                    texts.pop(stream)
        return bool(ready)

    def too_long() -> bool:
        return max(len(out), len(err)) > OUTPUT

    while not verdict:
        read(min(TICK, deadline - time.monotonic()))
        if report not in texts or said.count(b"\n") >= 2:
            break
        now = time.monotonic()
        if too_long():
            verdict = "output"
        elif now >= due:
            verdict, due = "disk" if _too_much(folder) else "", now + TICK
        if now >= deadline:
            verdict = verdict or "timeout"
    _stop(process)
    while not too_long() and read(0):                           # the rest in the pipes; all writers are dead
        pass
    return verdict or ("output" if too_long() else "disk" if _too_much(folder) else ""), out, err, said


def _stop(process):
    """Ends the supervisor, which ends the program and all its descendants first."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:                           # a stuck machine; the program dies with its parent
        process.kill()


def _too_much(folder) -> bool:
    count = size = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):               # deleted meanwhile
                    count, size = count + 1, size + 512 * entry.stat(follow_symlinks=False).st_blocks
                if count > FILES or size > DISK:
                    return True
    except PermissionError:                                     # locked by the program: only where there is no seccomp
        return True
    except FileNotFoundError:                                   # removed by the supervisor, at somebody else's SIGHUP
        return False
    return False
