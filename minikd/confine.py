"""Confines a program, from inside: sandbox.py passes this file's text to a bare interpreter, python -I -S -B -c, and calls
supervise() there. So it may import little, and nothing of minikd. Read supervise and _become first; _landlock, _seccomp and the
tables below them only to change what is allowed. boot is passed on alone, as text, to the interpreter that runs the program.

References
    Landlock    docs.kernel.org/userspace-api/landlock.html
    seccomp     docs.kernel.org/userspace-api/seccomp_filter.html
"""
import _signal                  # the C part of signal: importing the enums of signal.py takes 4 ms
import ctypes
import os
import struct
import time


def supervise(report, options):
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

    _signal.signal(_signal.SIGTERM, end)                        # from sandbox._stop
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
    import resource                                             # here: only the child needs it
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
    filtered = _seccomp(libc)
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
    libc.mount.argtypes = [*3 * [ctypes.c_char_p], ctypes.c_ulong, ctypes.c_char_p]
    os.umask(0o022)
    failed = libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None)   # CLONE_NEWNS; MS_REC, MS_PRIVATE
    handle = os.open(prefix, os.O_PATH)
    if not failed and not libc.mount(b"tmpfs", above[0].encode(), b"tmpfs", 0, b"mode=755,size=64k"):
        os.makedirs(prefix)
        failed = libc.mount(b"/proc/self/fd/%d" % handle, prefix.encode(), None, 0x1000, None)      # MS_BIND
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
    handled = struct.pack("QQQ", every, 3, 3)                   # struct landlock_ruleset_attr: files, network, scope
    ruleset = libc.syscall(444, handled, ctypes.c_size_t(8 if abi < 4 else 16 if abi < 6 else 24), 0)
    execute, write, read, read_dir, make, truncate = 1, 2, 4, 8, 256, 1 << 14
    rules = [(path, execute | read | read_dir) for path in readable]
    rules += [("/dev/null", read | write), (".", read | write | read_dir | make | truncate)]      # what is removed is not counted
    for path, allowed in rules:
        if os.path.exists(path):
            handle = os.open(path, os.O_PATH)
            allowed &= every if os.path.isdir(path) else execute | read | write
            # landlock_add_rule, LANDLOCK_RULE_PATH_BENEATH
            if libc.syscall(445, ruleset, 1, struct.pack("Qi", allowed, handle), 0):
                raise OSError(f"Landlock refused a rule for {path}: {os.strerror(ctypes.get_errno())}")
            os.close(handle)
    if ruleset < 0 or libc.syscall(446, ruleset, 0):            # landlock_restrict_self
        raise OSError(f"Landlock failed: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)
    return abi


def _seccomp(libc) -> bool:
    """Makes these fail with EPERM: the system calls in DENIED, those in JUDGED whose arguments are not allowed, and new
    processes. False if not supported."""
    machine = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if machine is None:
        return False
    # An instruction of BPF: (operation, instructions to skip if it is true, if it is false, value).
    load, mask, equal, above, end = 0x20, 0x54, 0x15, 0x35, 0x06        # load a word; bitwise and; is it ==; is it >=; return
    deny, allow = (end, 0, 0, 0x50001), (end, 0, 0, 0x7FFF0000)     # SECCOMP_RET_ERRNO with EPERM, SECCOMP_RET_ALLOW
    code = [(load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[machine]), deny,    # another ABI's numbers
            (load, 0, 0, 0), (above, 0, 1, 0x40000000), deny]                           # x32
    for numbers in DENIED.values():
        if numbers[machine] >= 0:
            code += [(equal, 0, 1, numbers[machine]), deny]
    for numbers, place, bits, values, only in JUDGED.values():
        if numbers[machine] >= 0:
            rule = [(load, 0, 0, 16 + 8 * place), (mask, 0, 0, bits)]       # the first argument is at 16, the next at 24
            rule += [(equal, len(values) - i, 0, os.getpid() if value < 0 else value) for i, value in enumerate(values)]
            rule += [deny, allow] if only else [allow, deny]    # the first is for none of the values, the second for any
            code += [(equal, 0, len(rule), numbers[machine]), *rule]
    code += [(equal, 0, 1, 435), (end, 0, 0, 0x50026), allow]   # clone3's flags are out of sight: ENOSYS, and libc calls clone
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))    # struct sock_filter
    header = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(program)))   # struct sock_fprog
    failed = libc.prctl(22, 2, ctypes.addressof(header), 0, 0)          # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    if failed and ctypes.get_errno() not in (22, 38):                   # EINVAL, ENOSYS: a kernel without it
        raise OSError(f"seccomp failed: {os.strerror(ctypes.get_errno())}")
    return not failed


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


def boot():
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
