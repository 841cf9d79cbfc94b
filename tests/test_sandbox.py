"""Programs that nobody has read: the ordinary ones run, every attack is contained, and nothing of either is left."""
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import refusal
from minikd import confine, sandbox
from minikd.errors import InputError
from minikd.files import temporary_folder
from minikd.sandbox import isolation, run_program, run_programs, same_output

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined on Linux alone")


def processes(caller: int | None = None) -> list[str]:
    """The sandboxed programs and supervisors of this process, or of another; orphans are everybody's."""
    found, ours = [], f"'parent': {caller or os.getpid()},"
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_text(errors="replace")
            parent = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
            above = Path(f"/proc/{parent}/cmdline").read_text(errors="replace") if "def boot(" in text else ""
        except OSError:                                             # gone meanwhile
            continue
        supervisor = text if "def supervise(" in text else above
        if supervisor and (ours in supervisor or "def supervise(" not in supervisor):
            found.append(f"{path.name}{'' if ours in supervisor else ' orphan'} {text[:60]}")
    return found


def descriptors() -> list[str]:
    return sorted(f"{name} {os.readlink(f'/proc/self/fd/{name}')}" for name in os.listdir("/proc/self/fd")
                  if os.path.lexists(f"/proc/self/fd/{name}"))


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch, compilation):
    """Around every test: no other processes, descriptors and children afterwards, and an empty temporary folder."""
    if compilation:                                             # conftest's nvcc, which is a child of this process
        compilation[1].exception()                              # which waits; a failure is the `compiled` fixture's
    folder = tempfile.mkdtemp(prefix="test-sandbox-")
    os.chmod(folder, 0o755)
    monkeypatch.setattr(tempfile, "tempdir", folder)
    before = {*processes(), *descriptors()}                     # files of earlier tests among them, which may be closed meanwhile
    yield Path(folder)
    names = os.listdir(folder)
    for _ in range(40):
        more = {*processes(), *descriptors()} - before
        if not any("orphan" in each for each in more):              # it may be of a test that kills a supervisor, beside this one
            break
        time.sleep(0.05)
    shutil.rmtree(folder)
    assert (more, names) == (set(), [])
    with suppress(ChildProcessError):
        ended = os.waitpid(-1, os.WNOHANG)
        assert ended == (0, 0) and sys.version_info >= (3, 14)      # there tqdm keeps a helper, which has not ended


def without(monkeypatch, *layers):
    """Takes layers away, as an older kernel or a container does."""
    source, changes = sandbox.SUPERVISOR, {
        "Landlock": ("abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)", "abi = -1"),
        "NPROC": ("resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))", "pass"),
        "seccomp": ("if machine is None", "if True"), "namespaces": ("libc.unshare(spaces)", "1")}
    for layer in layers:
        assert source.count(changes[layer][0]) == 1
        source = source.replace(*changes[layer])
        if layer == "NPROC":
            monkeypatch.setattr(sandbox, "LIMITS", {k: v for k, v in sandbox.LIMITS.items() if k != "RLIMIT_NPROC"})
    monkeypatch.setattr(sandbox, "SUPERVISOR", source)


def needs(*layers):
    for layer in layers:
        if layer not in isolation() or f"no {layer}" in isolation():
            pytest.skip(f"this machine has no {layer}: {isolation()}")


# ---- ordinary programs

@pytest.mark.parametrize("source, stdin, stdout", [
    ("print(int(input()) + int(input()))", "20\n22\n", "42\n"),
    ("import math, collections, json, heapq, itertools, re, decimal, random, bisect, string, fractions\n"
     "print(json.dumps(collections.Counter('aab')), math.pi, heapq.nsmallest(1, [3, 1]))",
     "", '{"a": 2, "b": 1} 3.141592653589793 [1]\n'),
    ("print('¿año? 世界 🙂', input())", "ñandú", "¿año? 世界 🙂 ñandú\n"),
    ("for text in 'first', 'kept': open('a.txt', 'w').write(text)\nprint(open('a.txt').read())", "", "kept\n"),
    ("import sys\nsys.setrecursionlimit(5000)\nf = lambda n: n and 1 + f(n - 1)\nprint(f(4000))", "", "4000\n"),
    ("open('/dev/null', 'w').write('x')\nprint(len(open('/dev/null').read() + open('/dev/zero').read(9)))", "", "9\n"),
    ("if __name__ == '__main__': print(__file__.split('/')[-1])", "", "program.py\n"),
    ("print('left')\nexit()\nprint('not reached')", "", "left\n"),
    ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))), __name__, sorted(globals())[-1])",
     "", "<class '__main__.A'> __main__ pickle\n"),
    ("print('no newline', end='')", "", "no newline"), ("print(ascii(input()))", "a\0ñ", "'a\\x00\\xf1'\n"),
    ("", "", ""),
    ("import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\nf = lambda n: n and 1 + f(n - 1)\n"
     "threading.Thread(target=lambda: print(f(int(input())))).start()", "30000", "30000\n"),
    ("import time\nfrom concurrent.futures import ThreadPoolExecutor\n"
     "print(len(list(ThreadPoolExecutor(30).map(time.sleep, [0.05] * 60))))", "", "60\n"),
], ids=["input", "imports", "unicode", "a file", "recursion", "devices", "main", "exit", "pickle", "no newline",
        "any character", "empty", "deep recursion in a thread", "30 threads"])
def test_an_ordinary_program_runs(source, stdin, stdout):
    result = run_program(source, stdin)
    assert (result.status, result.stdout, result.stderr) == ("ok", stdout, "") and 0.005 < result.seconds < 3


def test_an_exception_is_an_error_with_its_traceback_and_what_was_printed_before():
    result = run_program("print('before')\n1 / 0")
    assert (result.status, result.stdout) == ("error", "before\n")
    lines = result.stderr.splitlines()                              # below the frames that run it
    assert lines[0] == "Traceback (most recent call last):" and '  File "program.py", line 2, in <module>' in lines
    assert lines[-1] == "ZeroDivisionError: division by zero"
    lines = run_program("print('never'").stderr.splitlines()
    assert '  File "program.py", line 1' in lines and lines[-1] == "SyntaxError: '(' was never closed"
    assert run_program("print(1)\nexit(3)").status == run_program("print(sys.argv)").status == "error"


def test_what_is_printed_at_exit_arrives():
    """By the program's objects when the interpreter deletes them, and by functions registered for it."""
    source = """
import atexit, sys
class Out:
    def __init__(self, text): self.text = text
    def __del__(self): print(self.text)
def steps():
    try: yield
    finally: print("finally")
out, running = Out("del"), steps()
next(running)
atexit.register(print, "atexit")
"""
    for more, status in ("", "ok"), ("sys.exit()", "ok"), ("1 / 0", "error"):
        result = run_program(source + more)
        assert (result.status, sorted(result.stdout.split())) == (status, ["atexit", "del", "finally"]), result


def test_the_same_program_prints_the_same_twice():
    source = "print({'a', 'b', 'c', 'd', 'e', 'f'})"                # a random hash seed would shuffle it
    assert run_program(source).stdout == run_program(source).stdout


def test_stdin_larger_than_a_pipe_arrives_and_need_not_be_read():
    text = "x" * 3_000_000
    assert run_program("import sys\nprint(len(sys.stdin.read()))", text).stdout == "3000000\n"
    assert run_program("print('done')", text).stdout == "done\n"


def test_timeout_and_memory_are_the_callers():
    source = "import time\ntime.sleep(0.6)\nprint('late')"
    assert run_program(source, timeout=0.3).status == "timeout" and run_program(source, timeout=3).status == "ok"
    source = "x = bytearray(200 << 20)\nprint(len(x))"
    assert run_program(source, memory_mb=128).status == "memory" and run_program(source, memory_mb=400).status == "ok"


def test_a_timeout_keeps_what_was_printed_and_ends_on_time():
    result = run_program("print('first', flush=True)\nwhile True: pass", timeout=0.5)
    assert (result.status, result.stdout) == ("timeout", "first\n") and 0.5 <= result.seconds < 1.5
    assert run_program("print(1)", timeout=0).status == "timeout"


def test_cpu_time_is_limited_to_a_second_more_than_the_wall_clock():
    result = run_program("import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU))", timeout=5.5)
    assert result.stdout == "(7, 7)\n"


@pytest.mark.parametrize("limits", [dict(timeout=float("inf")), dict(timeout=float("nan")), dict(timeout=-1), dict(timeout=1e300),
                                    dict(memory_mb=0), dict(memory_mb=-5), dict(memory_mb=1e300)])
def test_limits_that_limit_nothing_are_the_callers_error(limits):
    with pytest.raises(ValueError, match="run_program: timeout = "):
        run_program("print(1)", **limits)


def test_what_a_process_may_do_to_itself_and_its_files_stays_allowed():
    source = ("import fcntl, mmap, os, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))\n"
              "os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))\n"
              "fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL))\n"
              "assert not os.isatty(0)\nos.set_blocking(0, False)\nos.set_inheritable(0, False)\n"
              "private = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\nprivate[:3] = b'abc'\n"
              "file = open('a', 'wb+')\nfile.write(bytes(4096))\nfile.flush()\nmmap.mmap(file.fileno(), 4096)[:3] = b'abc'\n"
              "assert file.read(0) == b'' and file.seek(0) == 0 and file.read(3) == b'abc'\n"
              "print(resource.prlimit(os.getpid(), resource.RLIMIT_NOFILE))")
    assert run_program(source).stdout == "(16, 16)\n"


# ---- attacks: (source, status); what they print must not be what they hoped for

LOOP = "while True:\n    pass"
ATTACKS = {
    "endless loop": (LOOP, "timeout"),
    "sleep": ("import time\ntime.sleep(60)", "timeout"),
    "one long C call": ("99**98**97", "timeout"),
    "ignored signals": ("import signal\nfor s in (15, 24, 1, 2): signal.signal(s, signal.SIG_IGN)\n" + LOOP, "timeout"),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "closed stdout, then hangs": ("import os, time\nos.close(1); os.close(2); os.close(0)\ntime.sleep(60)", "timeout"),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10 << 20))", "memory"),
    "memory at once": ("x = [0] * 10**10", "memory"),
    "fork bomb": ("import os\nwhile True: os.fork()", "error"),
    "a thread that forks": ("import os, threading\nthreading.Thread(target=os.fork).start()\nprint(os.fork())", "error"),
    "thread bomb": ("import threading, time\nthreading.stack_size(65536)\n"
                    "while True: threading.Thread(target=time.sleep, args=(60,)).start()", "timeout"),  # Python waits for them
    "posix_spawn": ("import os\nos.posix_spawn('/bin/sleep', ['sleep', '60'], {})", "error"),
    "subprocess": ("import subprocess\nsubprocess.run(['/bin/echo', 'hoped'])", "error"),
    "another program in its place": ("import os\nos.execv('/bin/echo', ['echo', 'hoped'])", "error"),
    "1 GB file": ("with open('big', 'wb') as f:\n    for _ in range(1000): f.write(bytes(1 << 20))", "error"),
    "many large files": ("for i in range(99): open(f'f{i}', 'wb').write(bytes(1000000))\n" + LOOP, "disk"),
    "many files, then gone": ("for i in range(3000): open(str(i), 'w').close()", "disk"),
    "folders": ("import os\nwhile True:\n    os.mkdir('a')\n    os.chdir('a')", "error"),
    "locked folder": ("import os\nopen('a', 'w')\nos.chmod('.', 0)", "error"),
    "huge stdout": ("while True: print('x' * 10000)", "output"),
    "huge stderr": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", "output"),
    "large stdout, then ends": ("print('x' * 1_100_000)", "output"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", "error"),
    "kills all": ("import os\nos.kill(-1, 9)", "error"),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", "error"),
    "aborts": ("import os\nos.abort()", "error"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "error"),
    "reads the machine's files": ("print(open('/etc/passwd').read())", "error"),
    "looks around": ("import os\nprint(os.listdir('/tmp'))", "error"),
    "reads processes": ("import os\nos.listdir('/proc')", "error"),
    "becomes root": ("import os\nos.setuid(0)\nos.setgid(0)\nopen('/root/hoped', 'w')", "error"),
    "raises its limits": ("import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (999, 999))", "error"),
    "slows its user's programs": ("import os\nos.setpriority(os.PRIO_USER, os.getuid(), 19)", "error"),
    "lets a pipe signal its parent": ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", "error"),
    "will not die with its parent": ("import ctypes\nassert ctypes.CDLL(None).prctl(1, 0, 0, 0, 0) == 0", "error"),
    "own namespace": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "error"),
    "System V memory": ("import ctypes\nassert ctypes.CDLL(None).shmget(77, 4096, 0o1666) >= 0", "error"),
    "a Unix socket": ("import socket\nsocket.socketpair()", "error"),
    "leaves early": ("import sys\nsys.exit(0)\nprint('hoped')", "ok"),
    "leaves at once": ("import os\nprint('hoped')\nos._exit(0)", "ok"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_contained(name):
    needs("Landlock", "seccomp")
    source, status = ATTACKS[name]
    start = time.monotonic()
    result = run_program(source, timeout=0.5 if status == "timeout" else 10, memory_mb=256)
    assert result.status == status, result
    assert "hoped" not in result.stdout and len(result.stdout) <= sandbox.OUTPUT
    assert time.monotonic() - start < (1.5 if status == "timeout" else 8)


@pytest.mark.parametrize("act", ["resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0))", "os.sched_setaffinity(pid, {0})",
                                 "os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))", "os.kill(pid, 9)",
                                 "os.sched_setparam(pid, os.sched_param(0))", "signal.pidfd_send_signal(os.pidfd_open(pid), 9)"])
def test_other_processes_of_its_user_are_out_of_reach(act):
    """By seccomp alone: an ordinary user's other processes are the caller and the supervisor, too."""
    needs("seccomp")
    other = dict(user=sandbox.NOBODY, group=sandbox.NOBODY) if os.geteuid() == 0 else {}
    with subprocess.Popen(["sleep", "60"], **other) as victim:
        result = run_program(f"import os, resource, signal\npid = {victim.pid}\n{act}")
        alive = victim.poll() is None
        victim.kill()
    assert result.status == "error" and "PermissionError: [Errno 1]" in result.stderr and alive, result


@pytest.mark.parametrize("act", [
    # of any file: an ordinary user's program would reach those outside its folder, too
    "os.chmod('a', 0)", "os.fchmod(1, 0)", "os.chown('a', -1, -1)", "os.fchown(1, -1, -1)", "os.lchown('a', -1, -1)",
    "os.utime('a', (0, 0))", "os.utime(1, (0, 0))", "os.setxattr('a', 'user.x', b'1')", "os.removexattr('a', 'user.x')",
    "os.truncate('a', 0)",
    # a file's flags, leases, memory that many mappings share, files without a name, space past their end
    "fcntl.ioctl(1, 0x40086602, bytes(8))", "fcntl.fcntl(0, fcntl.F_SETLEASE, fcntl.F_RDLCK)", "mmap.mmap(-1, 4096)",
    "os.open('.', os.O_TMPFILE | os.O_RDWR)", "os.posix_fallocate(os.open('a', os.O_RDWR), 0, 4096)"])
def test_what_landlock_does_not_watch_and_no_limit_counts_is_refused(act):
    needs("seccomp")
    result = run_program(f"import fcntl, mmap, os\nopen('a', 'w').close()\n{act}")
    assert result.status == "error" and "PermissionError: [Errno 1]" in result.stderr, result


def test_each_call_that_is_denied_is_refused():
    needs("seccomp")
    machine = ("x86_64", "aarch64").index(os.uname().machine)
    calls = {name: numbers[machine] for name, numbers in confine.DENIED.items() if numbers[machine] >= 0}
    source = (f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nfor name, number in {calls}.items():\n"
              "    if libc.syscall(number, -1, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1: print(name)\nprint('tried all')")
    assert run_program(source).stdout == "tried all\n"


def test_no_filters_and_no_threads_with_descriptors_of_their_own():
    """Without the filter the kernel would answer these arguments with EFAULT and EINVAL."""
    needs("seccomp")
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    source = ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
              f"for call, *given in (libc.prctl, 22, 2), (libc.syscall, {clone}, 0x10000):\n"
              "    print(call(*given, 0, 0, 0, 0), ctypes.get_errno())")
    assert run_program(source).stdout == "-1 1\n-1 1\n"


@pytest.mark.parametrize("act", ["remove('a')", "rename('a', 'b')", "replace('a', 'b')"])
def test_files_stay_where_they_are_counted(act):
    needs("Landlock")
    result = run_program(f"import os\nopen('a', 'w').close()\nos.{act}")
    assert result.status == "error" and "PermissionError: [Errno 13]" in result.stderr, result


def test_a_program_that_takes_back_what_it_wrote_cannot_hold_its_caller(monkeypatch):
    """It might do so between poll, which says that there is something to read, and the read. Here poll always says so."""
    class Hopeful:
        def __init__(self):
            self.streams = {}

        def register(self, stream, events):
            self.streams[stream] = events

        def unregister(self, stream):
            del self.streams[stream]

        def poll(self, milliseconds):
            time.sleep(0.01)
            return [*self.streams.items()] if milliseconds else []

    monkeypatch.setattr(sandbox.select, "poll", Hopeful)
    result = run_program("import time\nprint('first', flush=True)\ntime.sleep(20)", timeout=0.5)
    assert (result.status, result.stdout) == ("timeout", "first\n") and result.seconds < 1.5


def test_a_thread_bomb_leaves_its_neighbours_their_threads():
    needs("own network")                                            # namespaces
    if "no user namespace" in isolation() or tuple(map(int, os.uname().release.split(".")[:2])) < (5, 14):
        pytest.skip("here NPROC counts the threads of all the uid's programs together")
    bomb = ("import threading, time\nthreading.stack_size(65536)\n"
            "try:\n    while True: threading.Thread(target=time.sleep, args=(9,)).start()\n"
            "except RuntimeError: print('full', flush=True)")
    neighbour = "import threading\nthread = threading.Thread(target=print, args=(7,))\nthread.start()\nthread.join()"
    with ThreadPoolExecutor(1) as pool:
        bombed = pool.submit(run_program, bomb, timeout=2)
        time.sleep(0.7)                                             # it is full long before; nothing outside shows it
        assert [run_program(neighbour).stdout for _ in range(3)] == ["7\n"] * 3 and not bombed.done()
    assert (bombed.result().status, bombed.result().stdout) == ("timeout", "full\n")


def test_a_program_waits_for_a_process_to_run_in(monkeypatch):
    """As in a container whose processes are used up by other programs' threads."""
    begin, source, tries = subprocess.Popen, sandbox.SUPERVISOR, []
    no_fork = "\ndef fork(): raise BlockingIOError(11, 'Resource temporarily unavailable')\nos.fork = fork"

    def busy(*command, **options):
        tries.append(command)
        monkeypatch.setattr(sandbox, "SUPERVISOR", source + no_fork * (len(tries) == 1))            # for the second try
        if len(tries) == 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return begin(*command, **options)

    monkeypatch.setattr(subprocess, "Popen", busy)
    result = run_program("print(7)")
    assert (result.status, result.stdout, len(tries)) == ("ok", "7\n", 3)
    tries.clear()
    monkeypatch.setattr(sandbox, "PATIENCE", 0.0)
    assert "no process can be started" in refusal(run_program, "print(7)")


def test_descendants_are_killed_also_if_proc_cannot_be_listed_at_once():
    source = (f"{sandbox.SUPERVISOR}\nlist_of, child, failed = os.listdir, os.fork(), []\n"
              "if not child: time.sleep(60)\n"
              "def listdir(path):\n    if len(failed) < 3: failed.append(path); raise OSError(24, 'Too many open files')\n"
              "    return list_of(path)\nos.listdir = listdir\n_kill_below()\nprint(failed)\nos.kill(child, 0)")
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=20)
    assert run.stdout == "['/proc', '/proc', '/proc']\n" and "ProcessLookupError" in run.stderr


@pytest.mark.parametrize("layers", [("Landlock",), ("seccomp",)])
def test_folders_are_refused_by_more_than_one_layer(monkeypatch, layers):
    needs("Landlock", "seccomp")
    without(monkeypatch, *layers)
    for make in "os.mkdir('a')", "os.mkdir('a', dir_fd=os.open('.', os.O_RDONLY))":
        result = run_program(f"import os\n{make}")
        assert result.status == "error" and "PermissionError" in result.stderr, result


def test_nothing_outside_is_read_or_written(nothing_left):
    needs("Landlock")
    with tempfile.TemporaryDirectory(dir=nothing_left.parent) as folder:
        fixture = f"{folder}/expected.txt"
        Path(fixture).write_text("hoped")
        os.chmod(folder, 0o777), os.chmod(fixture, 0o666)           # everybody's: only Landlock is between
        for source in (f"print(open({fixture!r}).read())", f"open({fixture!r}, 'w').write('gone')",
                       f"import os\nos.unlink({fixture!r})", f"open('{folder}/new', 'w')", "open('/dev/shm/new', 'w')",
                       f"import os\nos.link({fixture!r}, 'mine')", f"import os\nos.rename({fixture!r}, 'mine')",
                       f"import os\nos.symlink({fixture!r}, 'link')\nprint(open('link').read())"):
            result = run_program(source)
            assert result.status == "error" and "hoped" not in result.stdout, source
            assert "PermissionError" in result.stderr or "cross-device" in result.stderr.lower(), result.stderr
        assert Path(fixture).read_text() == "hoped" and os.listdir(folder) == ["expected.txt"]


def test_the_environment_holds_nothing_of_the_callers(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hoped")
    result = run_program("import os\nprint(dict(os.environ), open('/proc/self/environ').read())\n")
    assert "hoped" not in result.stdout
    names = eval(run_program("import os\nprint(sorted(os.environ))").stdout)
    assert set(names) - {"LC_CTYPE"} == {"MALLOC_ARENA_MAX", "PYTHONHASHSEED"}


@pytest.mark.parametrize("layers", [(), ("Landlock",), ("seccomp",), ("namespaces",)])
def test_the_callers_environment_is_closed_by_more_than_one_layer(monkeypatch, layers):
    if layers == ("Landlock",) and "namespaces" not in isolation() and os.geteuid():
        pytest.skip("an ordinary user without namespaces has Landlock alone")
    without(monkeypatch, *layers)
    result = run_program(f"for pid in ({os.getpid()}, __import__('os').getppid()):\n    try:\n"
                         "        print(open(f'/proc/{pid}/environ').read())\n    except OSError: print('no')")
    assert (result.status, result.stdout) == ("ok", "no\nno\n"), result


@pytest.mark.parametrize("layers", [(), ("Landlock",), ("seccomp",), ("namespaces",)])
def test_no_network_with_any_one_layer_missing(monkeypatch, layers):
    if layers == ("seccomp",):
        needs("namespaces")
    without(monkeypatch, *layers)
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for server in (tcp, udp):
            server.bind(("127.0.0.1", 0))
            server.settimeout(0.05)
        tcp.listen()
        result = run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {tcp.getsockname()[1]}))")
        assert result.status == "error", result
        run_program("import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\n"
                    f"s.sendto(b'hoped', ('127.0.0.1', {udp.getsockname()[1]}))")
        for receive in (tcp.accept, lambda: udp.recv(99)):
            with pytest.raises(TimeoutError):
                receive()


@pytest.mark.parametrize("layers", [("NPROC",), ("seccomp",)])
def test_no_process_is_made_with_either_layer_missing(monkeypatch, layers):
    without(monkeypatch, *layers)
    assert run_program("import os\nprint(os.fork())").status == "error"
    if "seccomp" in layers:                                         # then threads cannot be told from processes
        assert run_program("import threading\nthreading.Thread(target=print).start()").status == "error"


@pytest.mark.parametrize("layers", [("seccomp",), ("Landlock",), ("seccomp", "Landlock", "namespaces")])
def test_the_caller_is_not_killed_with_layers_missing(monkeypatch, layers):
    if len(layers) == 3 and os.geteuid():
        pytest.skip("an ordinary user's program is that user: the uid protects root's processes alone")
    without(monkeypatch, *layers)
    result = run_program(f"import os\nfor pid in (os.getppid(), {os.getpid()}):\n    try: os.kill(pid, 9)\n"
                         "    except OSError: print('no')")
    assert (result.status, result.stdout) == ("ok", "no\nno\n"), result


FORKS = "import os, time\nfor _ in range(20):\n" \
        "    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n" \
        "            time.sleep(0.3)\n            open('late', 'w').write('x')\n            os.write(1, b'late')\n" \
        "            time.sleep(60)\n        os._exit(0)\n"


@pytest.mark.parametrize("end, status", [("print('hoped')", "ok"), ("time.sleep(60)", "timeout"),
                                         ("os.kill(os.getpid(), 9)", "error")])
def test_grandchildren_in_their_own_sessions_die_with_the_run_if_the_kernel_lets_them_start(monkeypatch, end, status):
    without(monkeypatch, "NPROC", "seccomp")
    result = run_program(FORKS + end, timeout=0.8 if status == "timeout" else 5)
    assert result.status == status and result.seconds < 2, result
    assert ("late" in result.stdout) == (status == "timeout")       # it ran; in the others it was dead before


@pytest.mark.parametrize("layers", [("Landlock",), ("seccomp",), ("namespaces",),
                                    ("Landlock", "seccomp", "namespaces")])
def test_isolation_says_what_is_missing(monkeypatch, layers):
    sandbox.isolation.cache_clear()
    without(monkeypatch, *layers)
    text = isolation()
    sandbox.isolation.cache_clear()
    assert text.startswith(f"rlimits, uid {os.geteuid() or 65534}, ")
    for layer, words in (("Landlock", "no Landlock: that user's files can be read and written"), ("namespaces", "no network namespace"),
                         ("seccomp", "no seccomp")):
        assert (words in text) == (layer in layers) or f"no {layer}" in sandbox.isolation(), text


# ---- the verdict is the caller's

@pytest.mark.parametrize("source", [
    "import sys\nframe = sys._getframe()\nwhile frame.f_back: frame = frame.f_back\n"
    "for value in list(frame.f_globals.values()): print(str(value)[:200])\nprint(sorted(sys.modules)[:3])",
    "class Equal:\n    def __eq__(self, other): return True\n    def __repr__(self): return ''\nprint(Equal())",
    "import builtins\nbuiltins.print = lambda *a: None\nbuiltins.open = None\nstr.__eq__\nprint(42)",
    "import gc\nfor x in gc.get_objects():\n    if isinstance(x, dict) and 'expected' in x: print(x['expected'])",
    "import sys\nsys.exit(0)",
    "import os\nos._exit(0)",
    "import atexit, os\natexit.register(lambda: os._exit(0))\nraise SystemError",
], ids=["frames", "__eq__", "builtins", "gc", "sys.exit", "os._exit", "atexit"])
def test_a_trick_inside_the_program_does_not_reach_what_is_compared(source):
    expected = "42\n"
    result = run_program(source)
    assert result.status == "ok" and not same_output(result.stdout, expected) and "42" not in result.stdout.split()


@pytest.mark.parametrize("stdout, expected, same", [
    ("1\n2\n", "1\n2", True), ("1  2 \t3 \n", "1 2 3\n", True), ("1\r\n2\r\n", "1\n2\n", True), ("1\n\n\n", "1", True),
    ("", "", True), ("\n", "", True), ("1", "1\n2\n", False), ("1\n", "1\n2\n", False), ("1\n2\n3\n", "1\n2\n", False),
    ("1\n2\nand more", "1\n2\n", False), ("1 2", "12", False), ("1 2", "1\n2", False), ("1\n\n2", "1\n2", False),
    ("\n1\n", "1", False), (" 1", "1", True), ("2\n1", "1\n2", False),
    ("", "1", False), ("1", "", False), ("1.0", "1", False), ("Yes no", "YES NO", True),
    ("Yess", "YES", False), ("A", "a", False),
    ("debug\n1", "1", False)])
def test_outputs_are_the_same_line_by_line_whatever_the_blanks(stdout, expected, same):
    assert same_output(stdout, expected) == same


@pytest.mark.parametrize("written, seen", [(b"\xff\xfe caf\xc3", "\ufffd\ufffd caf\ufffd"), (b"a\0b", "a\0b"),
                                           (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd")])
def test_any_bytes_in_stdout_become_text(written, seen):
    result = run_program(f"import sys\nsys.stdout.buffer.write({written!r})\nsys.stderr.buffer.write({written!r})")
    assert (result.status, result.stdout, result.stderr) == ("ok", seen, seen)


@pytest.mark.parametrize("source, stdin", [("print(1)\0", ""), ("print('\ud800')", ""), ("print(1)", "\ud800")])
def test_what_cannot_be_handed_over_is_an_error_and_no_exception(source, stdin):
    result = run_program(source, stdin)
    assert (result.status, result.stdout) == ("error", "") and result.stderr.startswith("not run: ")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_whatever_the_callers_umask_is_a_program_opens_its_streams_by_name_and_finds_only_itself_in_its_folder(umask):
    source = ("import os\nfor name in 'stdout', 'stderr':\n"
              "    open(f'/dev/{name}', 'w').write(name + open('/dev/stdin').read() + str(os.listdir()))")
    before = os.umask(umask)
    try:
        result = run_program(source, "x")
    finally:
        os.umask(before)
    assert (result.status, result.stdout, result.stderr) == ("ok", "stdoutx['program.py']", "stderrx['program.py']")


# ---- many, and from odd callers

def test_a_caller_that_ignores_its_childrens_ends_gets_the_verdict_all_the_same():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run_program("print(1)").status == "ok"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_one_endless_loop_among_fifty_stalls_nobody(monkeypatch):
    jobs = [(f"print({i})",) for i in range(50)]
    jobs[3] = (LOOP, "", 1.5)
    ended, run = [], sandbox.run_program
    monkeypatch.setattr(sandbox, "run_program", lambda *job: (result := run(*job), ended.append(result.status))[0])
    results = run_programs(jobs)
    assert results[3].status == "timeout"
    assert [r.stdout for i, r in enumerate(results) if i != 3] == [f"{i}\n" for i in range(50) if i != 3]
    assert ended.index("timeout") > 5                               # others ended while it ran


@pytest.mark.parametrize("share, here", [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 16),
                                         ("9900000 100000\n", 16), (None, 16)])
def test_a_container_s_share_of_the_cores_is_seen(monkeypatch, share, here):
    class File:
        def read_text(self):
            if share is None:
                raise FileNotFoundError
            return share

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(sandbox, "SHARE", File())
    assert sandbox.cores() == here
    pools = []
    monkeypatch.setattr(sandbox, "ThreadPoolExecutor", lambda workers: (pools.append(workers), ThreadPoolExecutor(workers))[1])
    assert run_programs([]) == [] and pools == [max(2, here)]       # an endless loop leaves one for the others


def test_parallel_runs_do_not_meet(monkeypatch):
    without(monkeypatch, "NPROC", "seccomp")
    waits = "import time\ntime.sleep(0.5)\nprint('kept')"
    monkeypatch.setattr(sandbox, "cores", lambda: 6)
    results = run_programs([(FORKS + "print('hoped')",), (waits,)] * 3)
    assert [r.stdout for r in results] == ["hoped\n", "kept\n"] * 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_thread_may_call_and_another_process_may_hold_the_pipes():
    results = []
    thread = threading.Thread(target=lambda: results.append(run_program("import time\ntime.sleep(0.3)\nprint(1)")))
    thread.start()
    time.sleep(0.1)
    child = os.fork()                                               # as a DataLoader's workers are
    if not child:
        time.sleep(3)
        os._exit(0)
    thread.join()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert results[0].status == "ok" and results[0].seconds < 2


def test_a_caller_without_stdin_and_stdout_gets_the_verdict_all_the_same():
    code = ("import os; os.close(0); os.close(1); from minikd.sandbox import run_program; "
            "assert run_program('print(input())', stdin='7').stdout == '7\\n'")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def test_a_caller_that_is_killed_leaves_nothing(nothing_left):
    code = f"import tempfile\ntempfile.tempdir = {str(nothing_left)!r}\nfrom minikd.sandbox import run_program\n" \
           "run_program('open(chr(97), \"w\"), open(chr(98), \"w\")\\nwhile True: pass', timeout=60)"
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 10
    while (len(running := processes(caller.pid)) < 2 or not any(nothing_left.glob("*/b"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    caller.kill()
    caller.wait()
    assert len(running) == 2                                        # not counted again: one that is just started has no name
    while (processes(caller.pid) or os.listdir(nothing_left)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes(caller.pid) == os.listdir(nothing_left) == []


def test_the_folder_goes_when_the_starting_thread_dies_before_its_process(nothing_left, monkeypatch):
    """The kernel then sends SIGHUP, as asked for, while the supervisor still has its parent."""
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)        # the caller's own
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_program, LOOP, timeout=60)
        deadline = time.monotonic() + 10
        code = lambda line: Path(f"/proc/{line.split()[0]}/cmdline").read_text()
        supervisors = lambda found: [line for line in found if "def supervise(" in code(line)]
        while (len(found := processes()) < 2 or len(supervisors(found)) > 1) and time.monotonic() < deadline:
            time.sleep(0.01)                                        # until execve the program's process looks like its parent
        [supervisor] = supervisors(found)
        os.kill(int(supervisor.split()[0]), signal.SIGHUP)
        assert running.result().status == "error"                   # the caller lives on in this test
    monkeypatch.undo()
    assert os.listdir(nothing_left) == []


def test_folders_that_killed_processes_left_are_removed(nothing_left):
    left, held = temporary_folder(nothing_left / sandbox.FOLDER)
    (left / "program.py").touch()
    isolation.__wrapped__()
    assert left.exists()                                            # a living process's is locked
    os.close(held)
    os.mkfifo(nothing_left / ".sandbox.minikd-pipe")                # another user's: nobody writes to it
    isolation.__wrapped__()
    assert os.listdir(nothing_left) == [".sandbox.minikd-pipe"]
    os.unlink(nothing_left / ".sandbox.minikd-pipe")


def test_a_full_disk_is_told_with_the_path(monkeypatch, nothing_left):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")                  # as write() says it

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(OSError) as error:
        run_program("print(1)")
    assert Path(error.value.filename).parent.parent == nothing_left and os.listdir(nothing_left) == []


def test_an_interrupt_ends_the_run(nothing_left):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background job ignores it
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_program(LOOP, timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.geteuid() != 0, reason="root's refusal")
def test_a_root_that_cannot_become_another_user_refuses_unless_told_otherwise(monkeypatch):
    source = sandbox.SUPERVISOR.replace("os.setgroups([])", "raise OSError('not permitted')")
    monkeypatch.setattr(sandbox, "SUPERVISOR", source)
    with pytest.raises(InputError, match="root cannot become uid 65534 .* or set MINIKD_SANDBOX_AS_ROOT=1"):
        run_program("print(1)")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="given to uid 65534 .* or set MINIKD_SANDBOX_AS_ROOT=1"):
        patch.setattr(os, "chown", lambda *_: os.close(-1))                     # as where only root is mapped: unshare -Ur
        run_program("print(1)")
    monkeypatch.setenv("MINIKD_SANDBOX_AS_ROOT", "1")
    assert run_program("print(__import__('os').getuid())").stdout == "0\n"
    assert run_program("import os\nprint(os.fork())").status == "error"
    assert run_program("open('/etc/new', 'w')").status == "error"
    assert run_program("import os\nos.chown('program.py', 1, 1)").status == "error"     # no capability is left


def test_other_systems_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "cannot be confined on darwin; run them on Linux" in refusal(run_programs, [("print(1)",)])
