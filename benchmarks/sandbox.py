"""Claim: of 1,000 short programs, right, wrong, raising, endless or hostile, none is misjudged, and none leaves anything behind.

    python -m benchmarks.sandbox                # about a minute

Each program should print the sum of its stdin. A program is misjudged if its status is not its kind's, or if the status is "ok"
and same_output says otherwise than its kind. `left` counts the processes, descriptors and folders that remain after all runs.
"""
import os
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import median_high

from benchmarks.measure import machine, make_parser, table
from minikd.sandbox import isolation, run_programs, same_output

WAIT = 1.0                  # time limit of an endless loop, in seconds
RIGHT = "print(sum(map(int, input().split())))"
KINDS = {                   # kind: (programs, [sources], status, is the output right?)
    "right": (700, [RIGHT, "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))",
                    "import collections, heapq, json, math, re\na = list(map(int, input().split()))\nprint(sum(a), '')",
                    "import os, sys\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)"], "ok", True),
    "wrong": (130, ["print(0)", f"{RIGHT}\nprint('done')", "print('sum:')\n" + RIGHT, "print(input())", "",
                    "import sys\nsys.exit(0)"], "ok", False),
    "raising": (100, ["print(1 / 0)", "print(int(input()))", "print(", f"{RIGHT}\nexit(1)", "import numpy"],
                "error", False),
    "endless": (20, ["while True: pass", "import time\ntime.sleep(99)"], "timeout", False),
    "hostile": (50, ["import os\nwhile True: os.fork()", "import os\nos.kill(os.getppid(), 9)",
                     "import socket\nsocket.socket(type=socket.SOCK_DGRAM)", "print(open('/etc/passwd').read())",
                     "open('f', 'wb').write(bytes(1 << 25))", "import os\nos.kill(os.getpid(), 9)",
                     "import os\nprint(open(f'/proc/{os.getppid()}/environ').read())"], "error", False),
}


def programs() -> list[tuple]:
    """[(kind, status, is the output right?, expected output, job)], the kinds evenly mixed."""
    found = []
    for kind, (count, sources, status, right) in KINDS.items():
        for i in range(count):
            job = (sources[i % len(sources)], f"{i + 1} {7 * i + 2} {i * i}\n")
            if kind == "endless":
                job += (WAIT,)
            found.append(((i + 0.5) / count, kind, status, right, f"{1 + i + 7 * i + 2 + i * i}\n", job))
    return [rest for _, *rest in sorted(found, key=lambda entry: entry[0])]


def processes() -> int:
    """How many there are of any sandbox."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):                                     # it has ended meanwhile
            line = path.read_bytes()
            count += b"def boot(" in line or b"def supervise(" in line
    return count


def left(folder: str) -> int:
    """How many there are: processes of any sandbox, this process's descriptors, entries of the temporary folder."""
    return processes() + len(os.listdir("/proc/self/fd")) + len(os.listdir(folder))


def main():
    make_parser(__doc__).parse_args()
    print(isolation())
    entries, rows = programs(), []
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        os.chmod(folder, 0o755)                                     # programs may run as another user, who must enter it
        tempfile.tempdir, before = folder, left(folder)
        for loops in (True, False):
            chosen = [entry for entry in entries if loops or entry[0] != "endless"]
            start = time.monotonic()
            results = run_programs([job for *_, job in chosen])
            seconds = time.monotonic() - start
            wrong = Counter(kind for (kind, status, right, expected, _), result in zip(chosen, results)
                            if result.status != status
                            or status == "ok" and same_output(result.stdout, expected) != right)
            each = median_high(result.seconds for result in results)
            rows.append(["all" if loops else "without the endless loops", len(chosen), f"{seconds:.1f}",
                         f"{len(chosen) / seconds:.0f}", f"{1000 * each:.0f}", sum(wrong.values()), left(folder) - before])
            if wrong:
                print("misjudged:", dict(wrong))
        tempfile.tempdir = None
    table(["", "programs", "seconds", "programs/s", "median ms each", "misjudged", "left"], rows)
    print(machine())
    if any(row[-1] or row[-2] for row in rows):
        raise SystemExit("the claim does not hold")


if __name__ == "__main__":
    main()
