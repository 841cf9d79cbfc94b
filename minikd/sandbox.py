"""Runs untrusted programs: a model's answers, judged by what they print.

Only the caller knows the expected output; a program gets its source, its stdin and nothing else. One run takes three
processes. None is started with preexec_fn, which would be unsafe in a caller with threads (torch has some):

    run_program    enforces wall-clock time, output size and disk space
    supervisor     adopts every descendant of the program (as a subreaper) and ends after the last of them
    the program    a fresh interpreter, under kernel limits that nothing inside it can lift

The functions from _supervise to _boot run in the last two processes, passed to `python -c` as source. Important limits
are set in more than one way, as a kernel or container may lack some of these; isolation() says which are active:

    rlimits        memory, CPU time, file size, open files, threads, timers (root is exempt: hence the uid)
    uid            root becomes 65534, without access to root's files, processes and environment
    namespaces     no network, TCP or UDP; no IPC; no access to the memory and environment of the uid's other processes
    Landlock       the program may read Python and the system's libraries and write the private folder, but not remove or rename
                   anything there, so that all it wrote is counted; from ABI 4 on no TCP, from 6 on no signals
    seccomp        no processes, sockets, folders, tracing, priorities, modes of files, shared memory; signals, limits and
                   scheduling only for itself. On a kernel without seccomp, the program may not start threads either

It does not protect against bugs of the kernel. Without Landlock, a program can read and write whatever its uid can.

References
    Landlock    docs.kernel.org/userspace-api/landlock.html
    seccomp     docs.kernel.org/userspace-api/seccomp_filter.html
"""
import _signal                  # the C part of signal: importing the enums of signal.py takes 4 ms
import ctypes
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

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
READABLE = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime",
            "/dev/zero", "/dev/random", "/dev/urandom"]
# System calls that no answer needs, by their numbers on (x86_64, aarch64). -1: that machine lacks it.
DENIED = {
    # new processes, sockets, access to other processes, ways around the filter, folders
    "fork": (57, -1), "vfork": (58, -1), "socket": (41, 198), "socketpair": (53, 199), "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "io_uring_setup": (425, 425), "bpf": (321, 280), "userfaultfd": (323, 282),
    "perf_event_open": (298, 241), "seccomp": (317, 277), "landlock_create_ruleset": (444, 444), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "mkdir": (83, -1), "mkdirat": (258, 34),
    # what outlives the process, or takes memory, disk or the machine's own resources that no limit counts
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "vmsplice": (278, 75), "fallocate": (285, 47), "io_setup": (206, 0),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "close_range": (436, 436), "openat2": (437, 437), "inotify_init": (253, -1),
    "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    # what Landlock does not control in a file: its mode, owner, times, attributes, and before ABI 3 its length
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1), "fchown": (93, 55),
    "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1), "futimesat": (261, -1),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469), "truncate": (76, 45)}
# System calls judged by one argument: (numbers, the argument's place, its bits that count, values, ONLY these values are allowed
# or NEVER). SELF is the program's pid: on the same user's other processes, such as the caller, these calls would work too.
ONLY, NEVER, SELF, ALL = True, False, -1, 0xFFFFFFFF
JUDGED = {
    **{name: (numbers, 0, ALL, (0, SELF), ONLY) for name, numbers in {
        "kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261), "sched_setaffinity": (203, 122),
        "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274)}.items()},
    "clone": ((56, 220), 0, 0x10400, (0x10400,), ONLY),     # CLONE_THREAD and CLONE_FILES: a thread
    "prctl": ((157, 167), 0, ALL, (1, 22), NEVER),          # PR_SET_PDEATHSIG, PR_SET_SECCOMP
    "fcntl": ((72, 25), 1, ALL, (8, 10, 15, 1024), NEVER),  # F_SETOWN, F_SETSIG, F_SETOWN_EX, which signal others; F_SETLEASE
    # TCGETS, TCGETS2, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; others change a file's flags, or make folders
    "ioctl": ((16, 29), 1, ALL, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451), ONLY),
    "mmap": ((9, 222), 3, 0x21, (0x21,), NEVER),            # MAP_SHARED with MAP_ANONYMOUS: AS stops counting it too early
    "open": ((2, -1), 1, 0x400000, (0x400000,), NEVER),     # O_TMPFILE: a file without a name
    "openat": ((257, 56), 2, 0x400000, (0x400000,), NEVER)}


@dataclass(frozen=True)
class Result:
    """How a program ended. status "ok" only means exit code 0: stdout decides whether the answer was right.

    status   "ok", "error" (another exit code, an exception, a signal), "timeout", "memory" (ended by MemoryError),
             "output" (more than OUTPUT bytes), "disk" (more than DISK bytes or FILES files; a write beyond the 1 MB of a
             single file fails in the program, and is an "error" if that ends it)
    stdout   decoded as UTF-8, invalid bytes replaced by U+FFFD; cut at OUTPUT bytes
    stderr   likewise
    seconds  wall-clock time, including the start of both interpreters
    """
    status: str
    stdout: str
    stderr: str
    seconds: float


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
    return _run(source, stdin, timeout, memory_mb)[0]


def run_programs(jobs, workers: int | None = None) -> list[Result]:
    """Results in the order of the jobs, each a tuple of run_program's arguments.

    workers  programs at a time; by default the cores this process may use, but at least 2, so that an endless loop does
             not hold up all others
    """
    with ThreadPoolExecutor(workers or max(2, cores())) as pool:
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
    return _run("", "", 30.0, 512)[1]


def same_output(stdout: str, expected: str) -> bool:
    """Whether both texts have the same words line by line, apart from blanks around words, empty lines at the end, and the case
    of yes and no.

    All lines must match: comparing with zip would accept the first line alone, or a right answer followed by anything.
    """
    same = lambda word: word.upper() if word.upper() in ("YES", "NO") else word
    ours, theirs = ([[*map(same, line.split())] for line in text.rstrip().split("\n")] for text in (stdout, expected))
    return ours == theirs


# ---- one run, seen from outside

def _run(source, stdin, timeout, memory_mb) -> tuple[Result, str]:
    """run_program, and the active limits as isolation() returns them."""
    if sys.platform != "linux":
        raise InputError(f"sandbox: programs cannot be confined on {sys.platform}; run them on Linux")
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return _try(source, stdin, timeout, memory_mb)
        except BlockingIOError as error:                        # before the program began: it could not be given a process
            if time.monotonic() > end:
                raise InputError("sandbox: no process can be started, as this machine or container has reached its limit; raise "
                                 "the limit, or end other processes") from error
            time.sleep(TICK)


def _try(source, stdin, timeout, memory_mb) -> tuple[Result, str]:
    """_run, once.  Raises BlockingIOError if no process can be started now."""
    start = time.monotonic()
    try:
        source, stdin = source.encode(), stdin.encode()
    except UnicodeEncodeError as error:                         # a lone surrogate
        return Result("error", "", f"not run: {error}", 0.0), ""
    if b"\0" in source:                                         # Python 3.10 would run the lines before it
        return Result("error", "", "not run: a NUL in the source", 0.0), ""
    folder, held = temporary_folder(Path(tempfile.gettempdir(), FOLDER))
    try:
        options = _prepare(folder, source, stdin, timeout, memory_mb)
        with _supervisor(folder, options) as (process, report):
            verdict, out, err, said = _watch(process, report, folder, start + timeout)
        seconds = time.monotonic() - start
    finally:
        if os.geteuid():                # the program may have locked it. Root can delete it all the same, and might chmod a
            with suppress(OSError):     # link put in its place
                os.chmod(folder, 0o700)
        discard(folder, held)
    limits, code, *_ = said.decode().split("\n") + [""]         # as _supervise writes them; or "busy", or "refused: why"
    if limits == "busy":
        raise BlockingIOError("the supervisor could not start the program")
    if limits.startswith("refused") or not (limits or verdict):
        raise InputError(f"sandbox: {limits or 'did not start: ' + err.decode(errors='replace')[-300:]}")
    out, err = (bytes(text[:OUTPUT]).decode(errors="replace") for text in (out, err))
    if not verdict:
        last = err.rstrip().rpartition("\n")[2]
        memory = code == "1" and last.partition(":")[0] == "MemoryError"
        verdict = "ok" if code == "0" else "memory" if memory else "error"
    return Result(verdict, out, err, seconds), limits


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
    return {"parent": os.getpid(), "python": python, "prefix": sys.base_prefix, "denied": DENIED, "judged": JUDGED,
            "boot": f"exec({inspect.getsource(_boot) + '_boot()'!r}, {{}})", "uid": uid,       # {}: not the program's globals
            "readable": READABLE + [python, f"{sys.base_prefix}/lib", os.path.dirname(os.__file__)],
            "limits": LIMITS | {"RLIMIT_CPU": seconds, "RLIMIT_AS": int(memory_mb * MB)}}


@contextmanager
def _supervisor(folder, options):
    """The supervisor's process and the pipe it reports on; on exit it and all its descendants are dead."""
    report, low = os.pipe()
    write = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 3)          # `low` may be 0, 1 or 2 if the caller closed it; Popen uses these
    os.close(low)
    try:
        with open(f"{folder}/stdin", "rb") as stdin:
            os.unlink(stdin.name)
            process = subprocess.Popen(
                [options["python"], "-I", "-S", "-B", "-c", f"{_trampoline()}\n_supervise({write}, {options!r})"],
                stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, pass_fds=[write], env={},
                cwd=folder, start_new_session=True)
    except BaseException:
        os.close(report)
        raise
    finally:
        os.close(write)
    try:
        with process:
            try:
                if options["uid"] is not None:                  # for a program that opens /dev/stdout by name
                    for stream in process.stdout, process.stderr:
                        os.fchown(stream.fileno(), options["uid"], options["uid"])
                yield process, report
            finally:
                _stop(process)
    finally:
        os.close(report)


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

    while report in texts and said.count(b"\n") < 2 and not verdict:
        read(min(TICK, deadline - time.monotonic()))
        now = time.monotonic()
        if too_long():
            verdict = "output"
        elif now >= due:
            verdict, due = "disk" if _too_much(folder) else "", now + TICK
        if now >= deadline and said.count(b"\n") < 2:
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
    size = count = 0
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


# ---- one run, seen from inside: these functions go to a bare interpreter as source

def _supervise(report, options):
    """Forks the program, waits, kills its descendants; writes "LIMITS\\nEXIT CODE\\n" to `report`, or "refused: why", or "busy"
    if it cannot fork."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + 4 * [ctypes.c_ulong]
    libc.prctl(36, 1, 0, 0, 0)                                  # PR_SET_CHILD_SUBREAPER: orphans become our children

    def end(number=0, _=None):                                  # also called by SIGTERM and SIGHUP, at any moment
        _kill_below()
        # If the caller is dead, remove its folder. SIGHUP tells, too: while its threads end, it is still our parent.
        if number == _signal.SIGHUP or os.getppid() != options["parent"]:
            for name in os.listdir("."):
                os.unlink(name)
            os.rmdir(os.getcwd())
        os._exit(0)                                             # 1 ms faster than a normal exit

    _signal.signal(_signal.SIGTERM, end)                        # from _stop
    _signal.signal(_signal.SIGHUP, end)                         # from the kernel, when the caller dies: see PR_SET_PDEATHSIG
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)            # if the caller ignores it, exit codes are lost
    libc.prctl(1, _signal.SIGHUP, 0, 0, 0)                      # PR_SET_PDEATHSIG
    os.set_inheritable(report, False)
    if os.getppid() != options["parent"]:
        end()
    try:
        child = os.fork()
    except BlockingIOError:
        os.write(report, b"busy\n\n")
        end()
    if not child:
        try:
            _become(libc, report, options)
        except BaseException as error:
            os.write(report, f"refused: {error}".encode())
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    _kill_below()
    os.write(report, f"\n{os.waitstatus_to_exitcode(status)}\n".encode())
    end()


def _kill_below():
    """Kills children until there are none: the children of a dead child become ours, even after setsid."""
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        try:
            pids = [name for name in os.listdir("/proc") if name.isdigit()]
        except OSError:                                         # the machine can open no more files: wait until it can
            pids = []
        for pid in pids:
            try:
                with open(f"/proc/{pid}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
                if parent == os.getpid():
                    os.kill(int(pid), _signal.SIGKILL)
            except OSError:                                     # gone meanwhile, or another user's
                pass
        time.sleep(0.001)


def _become(libc, report, options):
    """Drops all rights that the program does not need, then becomes it (execve). Raises if it must not be run."""
    import resource                                             # here: it is not among the trampoline's imports
    os.setsid()
    root, uid = os.geteuid() == 0, options["uid"]
    active = ["rlimits", f"uid {os.geteuid() if uid is None else uid}"]
    spaces = 0x40000000 | 0x08000000 | (0 if root else 0x10000000)      # CLONE_NEWNET, NEWIPC, NEWUSER
    active.append("no network namespace" if libc.unshare(spaces) else "own network and IPC namespaces")
    if root and uid is not None:
        _uncover(libc, options["prefix"])
    if libc.prctl(38, 1, 0, 0, 0):                              # PR_SET_NO_NEW_PRIVS
        raise OSError("this kernel lacks no_new_privs")
    abi = _landlock(libc, options["readable"])
    active.append(f"Landlock ABI {abi}" if abi else "no Landlock: that user's files can be read and written")
    if root and uid is None:                                    # by MINIKD_SANDBOX_AS_ROOT
        for capability in range(64):
            libc.prctl(24, capability, 0, 0, 0)                 # PR_CAPBSET_DROP: none is left after execve
    elif root:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            raise OSError(f"root cannot become uid {uid} ({error}); run as an ordinary user, or set "
                          "MINIKD_SANDBOX_AS_ROOT=1") from error
        if libc.unshare(0x10000000):                            # CLONE_NEWUSER: NPROC counts within it
            active.append("no user namespace")
    for name, value in options["limits"].items():               # after the uid, whose change NPROC could forbid
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    libc.prctl(1, _signal.SIGKILL, 0, 0, 0)                     # PR_SET_PDEATHSIG: dies with the supervisor
    filtered = _seccomp(libc, options["denied"], options["judged"])
    if not filtered:                                            # then only this keeps it from starting processes
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    active.append("seccomp" if filtered else "no seccomp")
    os.write(report, ", ".join(active).encode())
    python = options["python"]
    environment = {"PYTHONHASHSEED": "0",                       # the same source, the same output
                   "MALLOC_ARENA_MAX": "1"}                     # or AS counts 64 MB for each thread
    os.execve(python, [python, "-s", "-S", "-B", "-X", "utf8", "-c", options["boot"]], environment)


def _uncover(libc, prefix):
    """Makes root's own Python (/root/.pyenv) readable for other users, and nothing beside it: in a mount namespace, an empty
    tmpfs covers the folder that hides it, and Python's folder is mounted inside."""
    paths = [prefix[:i] for i, letter in enumerate(prefix + "/") if letter == "/" and i]
    above = [path for path in paths if not os.stat(path).st_mode & 1]
    if not above:
        return

    def mount(source, target, kind, flags, data):
        source, target, kind, data = (text and text.encode() for text in (source, target, kind, data))
        return libc.mount(source, target, kind, ctypes.c_ulong(flags), data)

    os.umask(0o022)
    failed = libc.unshare(0x20000) or mount(None, "/", None, 0x44000, None)         # CLONE_NEWNS; MS_REC, MS_PRIVATE
    handle = os.open(prefix, os.O_PATH)
    if not failed and not mount("tmpfs", above[0], "tmpfs", 0, "mode=755,size=64k"):
        os.makedirs(prefix)
        failed = mount(f"/proc/self/fd/{handle}", prefix, None, 0x1000, None)       # MS_BIND
    os.close(handle)
    if failed or not os.path.exists(f"{prefix}/lib"):
        raise OSError(f"{above[0]} hides this Python from other users; use a Python that all can run, or chmod o+x that folder")


def _landlock(libc, readable) -> int:
    """Limits file access to `readable` and, for writing, the current folder without subfolders; no TCP; no signals to others.

    Returns the kernel's Landlock ABI, 0 if it has none. The ABI decides what can be forbidden or allowed by rules: moves
    between folders from 2 on (1 forbids all), truncation 3, TCP 4, devices' ioctl 5, signals and abstract sockets 6.
    """
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)        # landlock_create_ruleset: the version
    if abi < 1:
        return 0
    every = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1        # all access rights to files that this ABI knows
    handled = (ctypes.c_uint64 * 3)(every, 3, 3)                # struct landlock_ruleset_attr: files, network, scope
    ruleset = libc.syscall(444, handled, ctypes.c_size_t(8 if abi < 4 else 16 if abi < 6 else 24), 0)
    execute, write, read, read_dir, make, truncate = 1, 2, 4, 8, 256, 1 << 14
    rules = [(path, execute | read | read_dir) for path in readable]
    rules += [("/dev/null", read | write), (".", read | write | read_dir | make | truncate)]      # what is removed is not counted
    for path, allowed in rules:
        if os.path.exists(path):
            handle = os.open(path, os.O_PATH)
            allowed &= every if os.path.isdir(path) else execute | read | write
            rule = allowed.to_bytes(8, sys.byteorder) + handle.to_bytes(4, sys.byteorder)
            if libc.syscall(445, ruleset, 1, rule, 0):          # landlock_add_rule, LANDLOCK_RULE_PATH_BENEATH
                raise OSError(f"Landlock refused a rule for {path}: {os.strerror(ctypes.get_errno())}")
            os.close(handle)
    if ruleset < 0 or libc.syscall(446, ruleset, 0):            # landlock_restrict_self
        raise OSError(f"Landlock failed: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)
    return abi


def _seccomp(libc, denied, judged) -> bool:
    """Makes these fail with EPERM: the system calls in `denied`, those in `judged` whose arguments are not allowed, and new
    processes. False if not supported."""
    machine = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if machine is None:
        return False
    # An instruction of BPF: (operation, instructions to skip if it is true, if it is false, value).
    load, mask, equal, above, end = 0x20, 0x54, 0x15, 0x35, 0x06        # load a word; bitwise and; is it ==; is it >=; return
    deny, allow = (end, 0, 0, 0x50001), (end, 0, 0, 0x7FFF0000)     # SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_ALLOW
    code = [(load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[machine]), deny,    # another ABI's numbers
            (load, 0, 0, 0), (above, 0, 1, 0x40000000), deny]                           # x32
    for numbers in denied.values():
        if numbers[machine] >= 0:
            code += [(equal, 0, 1, numbers[machine]), deny]
    for numbers, place, bits, values, only in judged.values():
        if numbers[machine] >= 0:
            rule = [(load, 0, 0, 16 + 8 * place), (mask, 0, 0, bits)]       # the first argument is at 16, the next at 24
            rule += [(equal, len(values) - i, 0, os.getpid() if value < 0 else value) for i, value in enumerate(values)]
            rule += [deny, allow] if only else [allow, deny]    # the first is for none of the values, the second for any
            code += [(equal, 0, len(rule), numbers[machine]), *rule]
    code += [(equal, 0, 1, 435), (end, 0, 0, 0x50026), allow]   # clone3's flags are out of sight: ENOSYS, and libc calls clone
    word = sys.byteorder
    raw = b"".join(c.to_bytes(2, word) + bytes([yes, no]) + k.to_bytes(4, word) for c, yes, no, k in code)
    program = ctypes.create_string_buffer(raw, len(raw))
    length = int.from_bytes(len(code).to_bytes(2, word) + bytes(6), word)               # struct sock_fprog
    header = (ctypes.c_uint64 * 2)(length, ctypes.addressof(program))
    failed = libc.prctl(22, 2, ctypes.addressof(header), 0, 0)          # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    if failed and ctypes.get_errno() not in (22, 38):                   # EINVAL, ENOSYS: a kernel without it
        raise OSError(f"seccomp failed: {os.strerror(ctypes.get_errno())}")
    return not failed


def _boot():
    """In the new interpreter: runs program.py as `python program.py` does, but without installed packages (-S)."""
    import _sitebuiltins
    import builtins
    import sys
    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "Ctrl-D")     # -S leaves these out too
    main = sys.modules["__main__"].__dict__
    main["__file__"] = sys.argv[0] = "program.py"
    with open("program.py", "rb") as file:
        code = compile(file.read(), "program.py", "exec", dont_inherit=True)
    exec(code, main)


@functools.cache
def _trampoline() -> str:
    """Source of the supervisor's functions, for `python -c`."""
    parts = (_supervise, _kill_below, _become, _uncover, _landlock, _seccomp)
    return "import _signal, ctypes, os, sys, time\n\n" + "\n\n".join(map(inspect.getsource, parts))
