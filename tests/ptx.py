"""Runs PTX on a CPU in numpy: the CUDA sources as nvcc compiles them, inline assembly included.

Driver takes the place of the CUDA driver below cuda.launch. A register is an array of its values in a warp's 32 lanes. Each
instruction becomes a line of Python (expression), those between two branches one function of a warp (translate). Grid lets the
warps run one after the other, each until it reaches a barrier or reads what another one may still write.

Slow, but it finds errors that a GPU hides. Vector clocks check every access to shared memory, and to the global memory that a
kernel writes, for data races with all earlier accesses: barriers, __syncwarp and atom.inc order accesses; shuffles, tensor-core
products and relaxed accesses do not. Relaxed accesses never race, but no ordinary access may touch the same memory. An
asynchronous copy may complete at any time between its issue and the wait for it, so until that wait no access may touch its
target. Lanes that diverge at a branch reconverge at its immediate post-dominator. A Fault is an AssertionError.
"""
import ctypes
import re
from bisect import bisect_right

import numpy as np

LANES, BYTES = np.arange(32), np.arange(16)
STEP, SEVERAL = 64, 32                                  # of a warp's clock, as Memory explains
IN_FLIGHT, RELAXED = 1, 2
UNITS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"} # numpy's types by size, to copy by; c16 is copied bit by bit, too
SHARED, SHARED_BYTES = 1 << 56, 227 << 10               # shared memory's first generic address, far above any pointer; its size


class Fault(AssertionError):
    """An error at which a GPU would stop, hang, or sometimes compute a wrong result."""


def require(good, *message):
    if not good:
        raise Fault(*message)


# ---- reading

class Kernel:
    """One .entry.  code: (guard, opcode, operands); meet: where a branch's lanes reconverge."""

    def __init__(self, head: str, limits: str, body: str):
        self.most = int((re.search(r"\.maxntid (\d+)", limits) or [0, 1024])[1])        # most threads per block
        self.params, self.labels, self.code, self.symbols, end, static = {}, {}, [], {}, 0, 0
        for align, size, name, count in re.findall(r"\.param (?:\.align (\d+) )?\.[busf](\d+) (\w+)(?:\[(\d+)\])?", head):
            size, align = int(size) // 8 * int(count or 1), int(align or int(size) // 8)
            begin = -(-end // align) * align
            self.params[name], end = (begin, size), begin + size
        for name, size in re.findall(r"\.shared \.align 16 \.b8 (\w+)\[(\d+)\]", body):
            self.symbols[name], static = static, static + -(-int(size) // 16) * 16
        self.static = self.symbols["shared_memory"] = static    # a launch's dynamic shared memory follows the declared one
        body = re.sub(r"//[^\n]*|(?<![\w.])\.(reg|shared|pragma)[^;]*;", " ", body)
        for part in re.findall(r"\$\w+:|[^;:]+(?:::[^;]+)?;", body):
            part = re.sub(r"^[{}\s]+", "", part.strip("; \t\n"))
            if part.endswith(":"):
                self.labels[part[:-1]] = len(self.code)
            elif part:
                guard, opcode, rest = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", part, re.S).groups()
                self.code.append((guard, opcode, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)))
        self.meet = self.post_dominators()
        self.starts = set(self.labels.values())                 # a run ends before a label, as a branch may lead there
        self.runs = {}                                          # the functions that run_at and rare compiled

    def run_at(self, at: int, full: bool):
        """-> (function of a warp, where it ends): the instructions from `at` to the next rare one or label, as one Python
        function; None if the instruction at `at` is rare.  full: of a warp whose lanes are all active"""
        if (at, full) not in self.runs:
            end = at
            while end < len(self.code) and not self.is_rare(end) and (end == at or end not in self.starts):
                end += 1
            self.runs[at, full] = (translate(self, at, end, full), end) if end > at else None
        return self.runs[at, full]

    def is_rare(self, at: int) -> bool:
        """Whether Warp.run handles this instruction by itself: control flow, a guard, a relaxed load."""
        guard, opcode, _ = self.code[at]
        return guard is not None or opcode in CONTROL or opcode.startswith(RELAXED_LOADS)

    def rare(self, at: int, full: bool):
        """The one instruction at `at`, without its guard, as a function of a warp."""
        if (at, full, "alone") not in self.runs:
            self.runs[at, full, "alone"] = translate(self, at, at + 1, full)
        return self.runs[at, full, "alone"]

    def post_dominators(self) -> dict[int, int]:
        """For each instruction its immediate post-dominator, the first one that every path from it passes; len(code) is the
        end.  Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm"."""
        count = len(self.code)
        after, before = [[] for _ in range(count + 1)], [[] for _ in range(count + 1)]
        for i, (guard, opcode, operands) in enumerate(self.code):
            jump = [count] if opcode == "ret" else [self.labels[operands[0]]] if opcode.startswith("bra") else []
            after[i] = jump + [i + 1] * (not jump or guard is not None)
            for j in after[i]:
                before[j].append(i)
        order, seen, stack = [], {count}, [(count, iter(before[count]))]        # post-order of the reversed graph
        while stack:
            i = next((i for i in stack[-1][1] if i not in seen), None)
            if i is None:
                order.append(stack.pop()[0])
            else:
                seen.add(i)
                stack.append((i, iter(before[i])))
        rank, meet, changed = {i: n for n, i in enumerate(order)}, {count: count}, True
        while changed:
            changed = False
            for i in reversed(order[:-1]):
                known = [j for j in after[i] if j in meet]
                best = known[0]
                for j in known[1:]:
                    while best != j:
                        best, j = (meet[best], j) if rank[best] < rank[j] else (best, meet[j])
                if meet.get(i) != best:
                    meet[i], changed = best, True
        return meet


def kernels_of(ptx: str) -> dict[str, Kernel]:
    found = re.findall(r"\.entry (\w+)\((.*?)\)([^{]*)\{\n(.*?)\n\}\n", ptx, re.S)
    return {name: Kernel(*parts) for name, *parts in found}


# ---- memory

class Memory:
    """`size` bytes from the address `start` on. If a kernel writes them (warps > 0), it also records for each cell of two bytes
    which warp wrote it last and when, and when each warp read it last.  unwritten: a read before any write is a Fault

    A time is the clock of the warp that made the access, which goes up in steps of 64, minus the lane, or minus 32 for several
    lanes; 0 means never.
    """

    def __init__(self, start: int, size: int, warps: int, view: np.ndarray | None = None, unwritten: bool = False):
        self.base, self.start, self.size, self.warps, self.unwritten = start & -16, start, size, warps, unwritten
        length = start + size - self.base + 15 & -16            # whole units of 16 bytes, of which only the given are accessed
        if view is None:
            view = np.frombuffer((ctypes.c_uint8 * length).from_address(self.base), np.uint8)
        self.units = {size: view[:length].view(unit) for size, unit in UNITS.items()}
        if warps:
            cells = length // 2
            self.barred = np.zeros(cells, np.uint8)             # IN_FLIGHT or RELAXED: no ordinary access
            self.writer, self.written = np.zeros(cells, int), np.zeros(cells, np.int32)
            self.read = np.zeros((cells, warps), np.int32)

    def check(self, warp, lanes: np.ndarray, at: np.ndarray, size: int, write: bool) -> np.ndarray:
        """n lanes of a warp access `size` bytes each, at offsets `at` [n] -> the cells [n, size / 2]; Faults for a race"""
        cells, clock, id, time = self.cells(at, size), warp.clock, warp.id, warp.times(lanes)
        written, now = self.written[cells], clock[id]
        require(not np.count_nonzero(self.barred[cells]),
                "accessed while an asynchronous copy is in flight, or ordinarily where others access relaxed", warp)
        # Written by another warp, later than this one knows of its clock; or by another lane of this warp, and no sync since.
        unordered = clock[self.writer[cells]] < written
        if np.count_nonzero(recent := written > now - STEP):
            unordered |= recent & (self.writer[cells] == id) & (written != time)
        require(not np.count_nonzero(unordered), "race: accesses what another thread wrote", warp)
        if write:
            seen = self.read.take(cells, 0)                                     # [n, size / 2, warps]
            unordered = seen > clock
            unordered[..., id] = (seen[..., id] > now - STEP) & (seen[..., id] != time)
            require(not np.count_nonzero(unordered), "race: writes what another thread reads", warp)
        else:
            require(not self.unwritten or written.all(), "reads what no thread wrote", warp)
            read = self.read[:, id]
            before = read[cells]
            read[cells] = time
            several = (before > now - STEP) & (before != time) | (read[cells] != time)      # the latter: lanes of this access
            if np.count_nonzero(several):
                read[cells[several]] = now - SEVERAL
        return cells

    @staticmethod
    def cells(at: np.ndarray, size: int) -> np.ndarray:
        return (at[:, None] + BYTES[:size:2]) >> 1

    def touch_relaxed(self, warp, at: np.ndarray, size: int):
        require(self.warps, "a relaxed access to what is only read", warp)
        cells = self.cells(at, size)
        require(not (self.written[cells].any() or self.read[cells].any() or (self.barred[cells] == IN_FLIGHT).any()),
                "relaxed, and by ordinary accesses before", warp)
        self.barred[cells] = RELAXED

    def mark(self, warp, lanes, cells):
        """The lanes have written their cells."""
        time = warp.times(lanes)
        self.writer[cells], self.written[cells] = warp.id, time
        require((self.written[cells] == time).all(), "two lanes write to one place", warp)


class Warp:
    def __init__(self, block, number: int):
        self.block, self.number, self.id = block, number, number + block.first
        self.clock = np.zeros(block.grid.clocks, np.int32)      # a vector clock: the latest time it knows of each warp
        self.clock[self.id] = STEP
        self.groups, self.here = [[]], 0                        # of asynchronous copies, the last one still open; instruction
        self.waited = not block.grid.overlap
        full = lambda value: np.full(32, value, np.uint32)
        (x, y), (across, down), threads = block.at, block.grid.shape, block.grid.threads
        self.r = {"%tid.x": (number * 32 + LANES).astype(np.uint32), "%ntid.x": full(threads), "%ctaid.x": full(x),
                  "%ctaid.y": full(y), "%nctaid.x": full(across), "%nctaid.y": full(down)}

    def __repr__(self):
        return f"block {self.block.at}, warp {self.number}, {self.block.grid.kernel.code[self.here]}"

    @property
    def lanes(self) -> np.ndarray:
        return LANES if self.full else LANES[self.mask]

    def times(self, lanes: np.ndarray) -> np.ndarray:
        """[n] -> [n, 1]"""
        return (self.clock[self.id] - lanes.astype(np.int32))[:, None]

    def find(self, space: str, addresses: np.ndarray, size: int) -> list[tuple]:
        """-> (memory, which of the addresses are in it, their offsets from its base) for each memory that is accessed"""
        require(not np.count_nonzero(addresses & size - 1), "misaligned", self)
        if space == "shared" or space == "generic" and addresses[0] >= SHARED:
            at = addresses & SHARED - 1
            require(at.max() + size <= self.block.used, "past the end of shared memory", self)
            return [(self.block.shared, slice(None), at)]
        found, left, memories = [], addresses, self.block.memories
        while len(left):
            memory = memories[max(0, bisect_right(memories, left[0], key=lambda memory: memory.start) - 1)]
            end = memory.start + memory.size - size             # the last address at which an access may begin
            inside = (addresses >= memory.start) & (addresses <= end)
            require(memory.start <= left[0] <= end, "an address is in no tensor", left[0], self)
            if np.count_nonzero(inside) == len(addresses):
                return [(memory, slice(None), addresses - memory.base)]
            found.append((memory, inside, addresses[inside] - memory.base))
            left = left[(left < memory.start) | (left > end)]
        return found

    def together(self, clamp=(31,), members=(0xffffffff,)) -> bool:
        """True; a Fault unless all 32 lanes take part in a shuffle or tensor-core product."""
        require(self.full and clamp[0] == 31 and members[0] == 0xffffffff, "not the whole warp multiplies or shuffles", self)
        return True

    # -- accesses; addresses and values are those of all 32 lanes

    def parameter(self, at: int, type, count: int):
        given = self.block.grid.given
        if (at, type, count) not in given:
            values = [np.full(32, value) for value in np.frombuffer(self.block.grid.arguments, type, count, at)]
            given[at, type, count] = values if count > 1 else values[0]
        return given[at, type, count]

    def load(self, space: str, addresses, type, count: int, constant: bool, relaxed: bool) -> list[np.ndarray]:
        """-> `count` registers.  constant: as by ld.global.nc, only from memory that the kernel does not write"""
        out = self.fetch(space, addresses, count * type().itemsize, constant, False, relaxed).view(type)
        return [out] if count == 1 else list(out.reshape(32, count).T.copy())

    def fetch(self, space: str, addresses, size: int, constant: bool, early: bool, relaxed: bool) -> np.ndarray:
        """-> [32] units of `size` bytes.  early: even if the kernel before has not ended, as an asynchronous copy may"""
        lanes, out = self.lanes, np.zeros(32, UNITS[size])
        for memory, inside, at in self.find(space, addresses[lanes], size):
            require(early or self.waited or memory is self.block.shared, "reads before the kernel ahead has ended", self)
            require(not (constant and memory.warps), "reads by the non-coherent path what the kernel writes", self)
            if relaxed:
                memory.touch_relaxed(self, at, size)
            elif memory.warps:
                memory.check(self, lanes[inside], at, size, False)
            out[lanes[inside]] = memory.units[size][at // size]
        return out

    def store(self, space: str, addresses, relaxed: bool, *values):
        lanes, size = self.lanes, len(values) * values[0].itemsize
        data = (values[0] if len(values) == 1 else np.array(values).T.copy()).view(UNITS[size]).reshape(32)
        for memory, inside, at in self.find(space, addresses[lanes], size):
            require(self.waited or memory is self.block.shared, "writes before the kernel ahead has ended", self)
            require(memory.warps, "writes what it may only read", self)
            if relaxed:
                memory.touch_relaxed(self, at, size)
            else:
                memory.mark(self, lanes[inside], memory.check(self, lanes[inside], at, size, True))
            memory.units[size][at // size] = data[lanes[inside]]

    def count_up(self, addresses, last) -> np.ndarray:
        """atom.inc with acquire and release -> the values before"""
        place, = addresses[self.lanes]                          # only one lane is active
        (memory, _, at), = self.find("global", np.array([place]), 4)
        counts, released = memory.units[4], self.block.grid.released
        before = counts[at // 4]
        counts[at // 4] = 0 if before >= last[self.lanes] else before + 1
        released[place] = self.clock = np.maximum(self.clock, released.get(place, 0))
        self.clock = self.clock.copy()
        self.clock[self.id] += STEP
        return before.repeat(32)

    def copy(self, to, source, size: int, there):
        """cp.async: `size` bytes, the first `there` of them read and the others 0; here `there` is 0 or `size`. Until the wait,
        the target holds 0xff."""
        lanes, full, mask = self.lanes, self.full, self.mask
        (memory, _, at), = self.find("shared", to[lanes], size)
        require(((there[lanes] == 0) | (there[lanes] == size)).all(), "an asynchronous copy of part of its bytes", self)
        data = np.zeros(32, UNITS[size])
        self.mask = mask & (there > 0)
        if self.mask.any():
            self.full = bool(self.mask.all())
            data = self.fetch("global", source, size, False, True, False)
        self.mask, self.full = mask, full
        cells, target = memory.check(self, lanes, at, size, True), memory.units[size]
        memory.barred[cells], target[at // size] = IN_FLIGHT, np.full(size, 0xff, np.uint8).view(UNITS[size])
        self.groups[-1].append((memory, lanes, cells, target, at // size, data[lanes]))

    def wait_for_copies(self, count: int):
        require(self.full, "not all lanes wait for their copies", self)
        while len(self.groups) > count + 1:
            for memory, lanes, cells, target, at, data in self.groups.pop(0):
                memory.barred[cells], target[at] = 0, data
                memory.mark(self, lanes, cells)

    def commit_group(self):
        require(self.full, "not all lanes commit a group", self)
        self.groups.append([])

    def wait_for_previous(self):
        self.waited = True

    def sync(self):
        require(self.full, "not all lanes reach __syncwarp", self)
        self.clock[self.id] += STEP

    # -- control

    def run(self, kernel: Kernel):
        """A generator that yields wherever other warps should run: at a barrier it yields the list of the warps that have arrived
        there, which the last one empties; at a relaxed load it yields None."""
        code, end = kernel.code, len(kernel.code)
        stack = [[0, np.ones(32, bool), end]]                   # instruction, lanes, where these reconverge with the others
        while stack:
            pc, self.mask, meet = stack[-1]
            active = np.count_nonzero(self.mask)                # which is faster than all() and any()
            self.full = active == 32
            while pc != meet and (run := kernel.run_at(pc, self.full)):
                function, pc = run
                function(self)
            if pc == meet or not active:
                stack.pop()
                continue
            (guard, opcode, operands), self.here = code[pc], pc
            taken, stack[-1][0] = self.mask, pc + 1
            if guard:
                taken = self.mask & (~self.r[guard[1:]] if guard[0] == "!" else self.r[guard])
            count = np.count_nonzero(taken)
            if opcode.startswith("bra"):
                target = kernel.labels[operands[0]]
                if count == active:
                    stack[-1][0] = target
                elif count:
                    stack[-1][0] = kernel.meet[pc]
                    stack += [[pc + 1, self.mask & ~taken, kernel.meet[pc]], [target, taken, kernel.meet[pc]]]
            elif opcode == "ret":
                for entry in stack:
                    entry[1] = entry[1] & ~taken
            elif opcode == "bar.sync":
                require(count == 32, "not the whole warp reaches a barrier", self)
                number, *threads = (int(self.r[operand][0]) if operand in self.r else int(operand) for operand in operands)
                yield from self.block.barrier(number, threads[0] // 32 if threads else len(self.block.warps), self)
            elif count:
                require(opcode != "trap", "trap", self)
                self.mask, self.full = taken, count == 32
                kernel.rare(pc, self.full)(self)
                if opcode.startswith(RELAXED_LOADS):
                    yield


class Block:
    def __init__(self, grid, at: tuple[int, int], first: int, memories: list[Memory]):
        self.grid, self.at, self.first, self.memories, self.arrived = grid, at, first, memories, {}
        self.used = grid.kernel.static + grid.dynamic
        require(self.used <= SHARED_BYTES, "too much shared memory")
        self.shared = Memory(0, self.used, grid.clocks, np.full(self.used + 16, 0xff, np.uint8), unwritten=True)
        self.warps = [Warp(self, number) for number in range(grid.threads // 32)]

    def barrier(self, number: int, warps: int, warp: Warp):
        arrived = self.arrived.setdefault(number, [])
        require(warp not in arrived, "a warp arrives twice at a barrier", warp)
        arrived.append(warp)
        while 0 < len(arrived) < warps:
            yield arrived
        if arrived:                                             # the last warp to arrive
            joint = np.max([each.clock for each in arrived], axis=0)
            for each in arrived:
                each.clock = joint.copy()
                each.clock[each.id] += STEP
            self.arrived[number] = []                           # for the next time; the waiting warps hold the old list
            arrived.clear()


class Grid:
    """One launch; the constructor runs it.

    arguments           the kernel's parameters, as bytes
    readable, writable  (address, bytes) of all that the kernel may access
    together            the blocks run at the same time, as in a cooperative launch
    overlap             the kernel before may still run: until griddepcontrol.wait, only asynchronous copies access global memory
    order               which warp runs next when one yields: the "first" that can, the "last", or all in "turns"
    asleep              (warp, polls in a row) -> whether it is held up, as by another program's turn, while others can run
    """

    def __init__(self, kernel: Kernel, shape: tuple[int, int], threads: int, arguments: bytes, readable, writable,
                 dynamic: int, together: bool, order: str, overlap: bool, asleep):
        self.kernel, self.shape, self.threads, self.arguments, self.dynamic = kernel, shape, threads, arguments, dynamic
        self.order, self.overlap, self.released, self.given, warps = order, overlap, {}, {}, threads // 32
        self.asleep = asleep
        self.clocks = warps * (shape[0] * shape[1] if together else 1)
        places = [(x, y) for y in range(shape[1]) for x in range(shape[0])]
        for group in [places] if together else [[place] for place in places]:
            runs = sorted([(*run, 0) for run in readable] + [(*run, self.clocks) for run in writable])
            memories = [Memory(start, size, clocks) for start, size, clocks in runs]
            with np.errstate(all="ignore"):
                self.run([Block(self, at, i * warps, memories) for i, at in enumerate(group)])

    def run(self, blocks: list[Block]):
        running = [(warp, warp.run(self.kernel)) for block in blocks for warp in block.warps]
        waits, polls, turn = {}, 0, 0
        while running:
            ready = [i for i, (warp, _) in enumerate(running) if not waits.get(warp)]
            require(ready, "deadlock", *(warp for warp, _ in running))
            ready = [i for i in ready if not self.asleep(running[i][0], polls)] or ready
            turn += 1
            in_order = {"first": 0, "last": -1}.get(self.order, turn % len(ready))
            pick = ready[in_order if polls < 9 else turn % len(ready)]  # after several polls, other warps get a turn
            warp, steps = running[pick]
            try:
                waits[warp] = next(steps)
                polls = polls + 1 if waits[warp] is None else 0
                require(polls < 10_000, "waits for ever", warp)
            except StopIteration:
                require(not any(warp.groups), "ends with copies in flight", warp)
                running.pop(pick)
                polls = 0


def places(*tensors) -> list[tuple[int, int]]:
    """-> (address, bytes) of each; None and empty ones are left out"""
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor is not None and tensor.nbytes]


class Driver:
    """Stands for the CUDA driver's library that minikd.cuda calls; a kernel's handle is its name.

    readable, writable  (address, bytes) of all that kernels may access
    launched            the names of the kernels launched so far
    """

    def __init__(self, kernels: dict[str, Kernel]):
        self.kernels, self.readable, self.writable, self.launched, self.shared = kernels, [], [], [], {}
        self.order, self.asleep = "turns", lambda warp, polls: False                                # as in Grid

    def cuFuncSetAttribute(self, name, attribute, value):
        require(attribute == 8, "an attribute other than the dynamic shared memory")
        self.shared[name] = value
        return 0

    def cuLaunchKernel(self, name, across, down, deep, threads, rows, layers, shared, stream, addresses, extra, together=False,
                       overlap=False):
        kernel = self.kernels[name]
        require(deep == rows == layers == 1 and threads % 32 == 0 and threads <= kernel.most, "bad launch shape", threads)
        require(shared <= self.shared.get(name, 48 << 10), "more shared memory than was asked for", shared)
        require(len(addresses) == len(kernel.params), "not as many arguments as parameters")
        arguments = bytearray(sum(max(kernel.params.values())))
        for (begin, size), address in zip(kernel.params.values(), addresses):
            arguments[begin:begin + size] = ctypes.string_at(address, size)
        Grid(kernel, (across, down), threads, bytes(arguments), self.readable, self.writable, shared, together, self.order,
             overlap, self.asleep)
        self.launched.append(name)
        return 0

    def cuLaunchKernelEx(self, config, name, addresses, extra):
        config = config._obj
        attribute = config.attributes[0]
        require((config.count, attribute.id, attribute.value) == (1, 6, 1), "an attribute other than overlap")
        return self.cuLaunchKernel(name, *config.shape, config.stream, addresses, extra, overlap=True)

    def cuLaunchCooperativeKernel(self, *given):
        return self.cuLaunchKernel(*given, None, together=True)


# ---- instructions, each translated to a line of Python

CONTROL = "bra", "bra.uni", "ret", "trap", "bar.sync"
RELAXED_LOADS = "ld.relaxed", "ld.volatile"             # volatile is relaxed, for the whole system
REGISTERS = {"%rs": "u2", "%rd": "u8", "%r": "u4", "%fd": "f8", "%f": "f4", "%p": "b1"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPPOSITE = {"leu": ">", "ltu": ">=", "geu": "<", "gtu": "<=", "neu": "=="}     # u: true of nan too
MMA = {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": ("mma", "f4"),
       "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": ("mma_int8", "i4")}
INFIX = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


def type_of(kind: str) -> str:
    """b32, u16, s64, f32, pred -> u4, u2, i8, f4, b1"""
    return "b1" if kind == "pred" else {"f": "f", "s": "i"}.get(kind[0], "u") + str(int(kind[1:]) // 8)


def register(name: str) -> str:
    """The type that a register's values have in Warp.r."""
    return REGISTERS.get(re.match(r"%?[a-z]*", name)[0], "u4" if name[0] == "%" else "b1")      # %tid.x; inline assembly's own


def translate(kernel: Kernel, start: int, end: int, full: bool):
    """Instructions start .. end - 1 as a Python function of a warp, all of whose active lanes run them; full: all 32 are
    active, if not only the active lanes' values change. A register is a variable of the function, and so is each of its views."""
    names, lines, known, written = dict(OPERATIONS), [], set(), {}

    def variable(operand: str) -> str:
        name = re.sub(r"\W", "_", f"_{operand}")
        if name not in known:
            known.add(name)
            lines.append(f'{name} = r["{operand}"]')
        return name

    def read(operand: str, type: str) -> str:
        """Python for the operand's 32 values, their bits taken as `type`."""
        if operand[0] == "%" or operand[0].isalpha() and operand not in kernel.symbols and operand not in kernel.params:
            text, has = variable(operand), register(operand)
            require(int(has[1]) >= int(type[1]), "a register is too narrow", operand)
            if has == type:
                return text
            if (view := f"{text}_{type}") not in known:
                known.add(view)
                lines.append(f"{view} = {text}" + f".astype(u{type[1]})" * (has[1] != type[1]) + f".view({type})")
            return view
        bits = int(operand[2:], 16) if operand.startswith(("0f", "0d")) else kernel.symbols.get(operand)
        bits = kernel.params[operand][0] if operand in kernel.params else bits
        bits = int(operand, 0) if bits is None else bits
        name = f"k{len(names)}"
        names[name] = np.full(32, bits % (1 << 8 * int(type[1])), f"u{type[1]}").view(type)
        return name

    for at in range(start, end):
        targets, types, value = expression(*kernel.code[at][1:], read, kernel)
        if "w." in value:                                       # what may be a Fault
            lines.append(f"w.here = {at}")
        lines.append(f"{', '.join(f'v{i}' for i in range(len(targets)))}{' = ' if targets else ''}{value}")
        for i, (target, type) in enumerate(zip(targets, types)):
            has, new, name = register(target), f"v{i}", re.sub(r"\W", "_", f"_{target}")
            if has != type:                                     # a wider register: extended by its type's sign, as in a load
                new += f".view({has})" if has[1] == type[1] else f".astype({type[0]}{has[1]}).view({has})"
            if not full:
                old = name if name in known else f'r.get("{target}", {has}())'
                new = f"where(mask, {new}, {old})"
            lines.append(f"{name} = {new}")
            known = known - {f"{name}_{type}" for type in TYPES} | {name}
            written[target] = name
    lines += [f'r["{target}"] = {name}' for target, name in written.items()]
    exec("def function(w):\n r, mask = w.r, w.mask\n " + "\n ".join(lines), names)
    return names["function"]


def expression(opcode: str, operands: list[str], read, kernel: Kernel) -> tuple[list[str], list[str], str]:
    """One instruction -> the registers it sets, their values' types, and Python that computes the values.
    Raises KeyError or Fault for an unknown instruction."""
    base, *mods = opcode.split(".")
    kind = mods[-1] if mods else ""
    parts = [re.sub(r"[{}\s]", "", operand).split(",") for operand in operands]
    space = next((mod for mod in mods if mod in ("shared", "global")), "generic")

    def address(operand: str, space: str) -> str:
        name, plus = re.fullmatch(r"\[([%\w$.]+)(?:\+(-?\d+))?\]", operand).groups()
        return f"{read(name, 'u4' if space == 'shared' else 'u8')}.astype(i8)" + (f" + {read(plus, 'i8')}" if plus else "")

    if base == "ld" and mods[0] == "param":
        name, plus = re.fullmatch(r"\[(%?\w+)(?:\+(-?\d+))?\]", operands[1]).groups()
        type, count = type_of(kind), len(parts[0])
        begin = kernel.params[name][0] if name in kernel.params else f"int({read(name, 'u8')}[0])"      # or its address
        return parts[0], [type] * count, f"w.parameter({begin} + {plus or 0}, {type}, {count})"
    if base == "ld":
        type, count, relaxed = type_of(kind), len(parts[0]), opcode.startswith(RELAXED_LOADS)
        value = f'w.load("{space}", {address(operands[1], space)}, {type}, {count}, {"nc" in mods}, {relaxed})'
        return parts[0], [type] * count, value + "[0]" * (count == 1)
    if base == "st":
        values = ", ".join(read(name, type_of(kind)) for name in parts[1])
        return [], [], f'w.store("{space}", {address(operands[0], space)}, {mods[0] in ("relaxed", "volatile")}, {values})'
    if base == "prefetch" or "prefetch" in mods:
        return [], [], "None"
    if base == "atom":
        require(mods == ["acq_rel", "gpu", "global", "inc", "u32"], opcode)
        return operands[:1], ["u4"], f"w.count_up({address(operands[1], space)}, {read(operands[2], 'u4')})"
    if base == "cp" and len(operands) < 2:
        return [], [], {"commit_group": "w.commit_group()", "wait_group": f"w.wait_for_copies({''.join(operands)})"}[mods[1]]
    if base == "cp":
        require(".".join(mods) == ("async.cg.shared.global.L2::128B" if operands[2] == "16" else "async.ca.shared.global"))
        to, source = address(operands[0], "shared"), address(operands[1], "global")
        return [], [], f"w.copy({to}, {source}, {operands[2]}, {read(operands[3], 'u4')})"
    if base == "griddepcontrol":
        return [], [], {"launch_dependents": "None", "wait": "w.wait_for_previous()"}[mods[0]]
    if base == "bar":
        require(mods == ["warp", "sync"] and operands == ["-1"], opcode, operands)
        return [], [], "w.sync()"
    if base == "mma":
        require(opcode in MMA, opcode)
        function, type = MMA[opcode]
        a, b, c = ("[" + ", ".join(read(name, type) for name in part) + "]" for part, type in zip(parts[1:], ("u4", "u4", type)))
        return parts[0], [type] * 4, f"w.together() and {function}({a}, {b}, {c})"
    if base == "shfl":
        require(mods in (["sync", "bfly", "b32"], ["sync", "idx", "b32"]), opcode)
        value, other, clamp, members = (read(operand, "u4") for operand in operands[1:])
        source = f"lanes ^ {other}" if mods[1] == "bfly" else other
        target = operands[0].split("|")[0]                      # after | stands a predicate, which is not used
        type = register(target)
        return [target], [type], f"w.together({clamp}, {members}) and {value}[{source}].view({type})"
    if base == "redux":
        require(mods == ["sync", "max", "u32"], opcode)
        value, members = (read(operand, "u4") for operand in operands[1:])
        return operands[:1], ["u4"], f"w.together(members={members}) and {value}.max().repeat(32)"
    if base == "mov" and len(parts[1]) == 2:                    # a register's halves
        return parts[0], ["u4"], f"{read(parts[1][0], 'u2')} | {read(parts[1][1], 'u2')}.astype(u4) << {read('16', 'u4')}"
    return operands[:1], *lane_by_lane(base, mods, operands, read)


def lane_by_lane(base: str, mods: list[str], operands: list[str], read) -> tuple[list[str], str]:
    """An instruction that computes each lane by itself -> [the result's type], Python that computes it"""
    kind = mods[-1]
    if kind == "bf16x2":
        require(base == "fma" or base == "max" and mods[0] == "NaN", base, mods)
        return ["u4"], f"{base}_pairs({', '.join(read(operand, 'u4') for operand in operands[1:])})"
    if base == "cvt" and mods[-2] == "bf16x2":
        high, low = (read(operand, "f4") for operand in operands[1:])
        return ["u4"], f"to_bf16({low}) | to_bf16({high}).astype(u4) << {read('16', 'u4')}"
    if base == "cvt":
        value, to = read(operands[1], type_of(kind)), mods[-2]
        return (["u2"], f"to_bf16({value})") if to == "bf16" else ([type_of(to)], f"{value}.astype({type_of(to)})")
    if base == "cvta":
        shift = {"to.shared": f" - {SHARED}", "shared": f" + {SHARED}"}.get(".".join(mods[:-1]), "")
        return ["u8"], read(operands[1], "u8") + shift
    if base == "lop3":
        a, b, c = (read(operand, "u4") for operand in operands[1:4])
        return ["u4"], f"lop3({a}, {b}, {c}, {operands[4]})"
    if base == "prmt":
        return ["u4"], f"permute({', '.join(read(operand, 'u4') for operand in operands[1:4])})"
    type = register(operands[0]) if base == "mov" else type_of(kind)
    if base in ("add", "sub") or mods[0] == "lo":               # the same bits with a sign and without
        type = type.replace("i", "u")
    if base == "mov":
        return [type], read(operands[1], type)
    a, *more = (read(operand, type) for operand in operands[1:3])
    if base == "clz":
        return ["u4"], f"leading_zeros({a})"
    if base in ("neg", "not", "ex2", "lg2", "rsqrt", "sqrt", "rcp"):
        return [type], {"neg": f"-{a}", "not": f"~{a}", "ex2": f"exp2({a})", "lg2": f"log2({a})",
                        "rsqrt": f"(1 / sqrt({a})).astype(f4)", "sqrt": f"sqrt({a})",
                        "rcp": f"(1 / {a}).astype(f4)"}[base]
    b, = more
    if base == "setp":
        require(len(operands) == 3, "setp of two predicates")
        if mods[0] == "nan":
            return ["b1"], f"({a} != {a}) | ({b} != {b})"
        return ["b1"], f"~({a} {OPPOSITE[mods[0]]} {b})" if mods[0] in OPPOSITE else f"{a} {COMPARE[mods[0]]} {b}"
    if base == "selp":
        return [type], f"where({read(operands[3], 'b1')}, {a}, {b})"
    if base == "bfi":                                           # the lowest bits of a, at a place in b
        place, width = int(operands[3]), (1 << int(operands[4])) - 1
        return [type], f"({a} & {type}({width})) << {type}({place}) | {b} & ~{type}({width << place})"
    if base in ("fma", "mad"):
        require(base == "fma" or mods[0] == "lo", base, mods)
        c = read(operands[3], type)
        return [type], f"(multiply({a}, {b}, dtype=f8) + {c}).astype(f4)" if type == "f4" else f"{a} * {b} + {c}"
    if base == "mul" and mods[0] in ("wide", "hi"):
        wide = f"{type[0]}{2 * int(type[1])}"
        product = f"{a}.astype({wide}) * {b}"
        return ([wide], product) if mods[0] == "wide" else ([type], f"({product} >> {8 * int(type[1])}).astype({type})")
    if base in ("shl", "shr"):
        count, bits = read(operands[2], "u4"), 8 * int(type[1])
        if operands[2].isdigit() and int(operands[2]) < bits:
            return [type], f"{a} {'<<' if base == 'shl' else '>>'} {read(operands[2], type)}"
        shifted = f"{a} {'<<' if base == 'shl' else '>>'} minimum({count}, {bits - 1}).astype({type})"
        return [type], shifted if type[0] == "i" else f"where({count} < {bits}, {shifted}, {type}(0))"
    if base in INFIX:
        return [type], f"{a} {INFIX[base]} {b}"
    return [type], f"{ {'min': 'fmin', 'max': 'fmax', 'div': 'divide', 'rem': 'fmod'}[base] }({a}, {b})"


def to_bf16(value: np.ndarray) -> np.ndarray:
    bits = value.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(value), 0x7fff, (bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def halves(registers) -> np.ndarray:
    """n registers [32] of two bfloat16 each -> float32 [2n, 32], the lower half first"""
    out = np.empty((len(registers), 2, 32), np.uint32)
    for pair, (low, high) in zip(registers, out):
        low[:], high[:] = pair << 16, pair & 0xffff0000
    return out.reshape(-1, 32).view(np.float32)


def fma_pairs(*pairs) -> np.ndarray:
    a, b, c = halves(pairs).reshape(3, 2, 32)                   # float32 is exact for the small integers of these kernels
    low, high = to_bf16(a * b + c).astype(np.uint32)
    return low | high << 16


def leading_zeros(a) -> np.ndarray:
    return np.array([32 - int(x).bit_length() for x in a], np.uint32)


def max_pairs(a, b) -> np.ndarray:
    low, high = to_bf16(np.maximum(*halves((a, b)).reshape(2, 2, 32))).astype(np.uint32)    # maximum: NaN if one is NaN
    return low | high << 16


def divide(a, b):
    return a / b if a.dtype.kind == "f" else np.trunc(a / np.where(b == 0, 1, b)).astype(a.dtype)


def lop3(a, b, c, table: int) -> np.ndarray:
    """Any function of three bits: bit i of the table is its value for a, b, c = the three bits of i."""
    return np.bitwise_or.reduce([(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
                                 for i in range(8) if table >> i & 1])


def permute(a, b, selector) -> np.ndarray:
    """prmt: each of the result's four bytes is one of the operands' eight."""
    chosen = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 15
    require(chosen.max() < 8, "prmt that copies signs")
    return np.take_along_axis(np.stack([a, b], 1).view(np.uint8), chosen, 1).view(np.uint32)[:, 0]


# The fragments of mma as the PTX manual draws them: row and column of each of a lane's values.
ROW, COLUMN = LANES // 4, LANES % 4 * 2
A = tuple(np.array(part) for part in zip(*((ROW + q % 2 * 8, COLUMN + q // 2 * 8 + e) for q in range(4) for e in range(2))))
B = tuple(np.array(part) for part in zip(*((COLUMN + q * 8 + e, ROW) for q in range(2) for e in range(2))))
C = tuple(np.array(part) for part in zip(*((ROW + q // 2 * 8, COLUMN + q % 2) for q in range(4))))


def mma(a: list, b: list, c: list) -> np.ndarray:
    left, right, total = np.empty((16, 16), np.float32), np.empty((16, 8), np.float32), np.empty((16, 8), np.float32)
    left[A], right[B], total[C] = halves(a), halves(b), np.stack(c)
    return (left @ right + total)[C]


def mma_int8(a: list, b: list, c: list) -> np.ndarray:
    """As mma: each value of a and b stands for two int8 with consecutive k."""
    left, right, total = np.empty((16, 16, 2), np.int8), np.empty((16, 8, 2), np.int8), np.empty((16, 8), np.int32)
    left[A], right[B] = (np.stack(registers).view(np.int8).reshape(-1, 32, 2, 2).transpose(0, 2, 1, 3).reshape(-1, 32, 2)
                         for registers in (a, b))
    total[C] = np.stack(c)
    return (np.einsum("mke,nke->mn", left.astype(np.int32), right.transpose(1, 0, 2).astype(np.int32)) + total)[C]


TYPES = "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "b1"
OPERATIONS = {name: np.dtype(name).type for name in TYPES}
OPERATIONS |= {function.__name__: function for function in (
    to_bf16, fma_pairs, leading_zeros, max_pairs, divide, lop3, permute, mma, mma_int8, np.where, np.exp2, np.log2, np.sqrt,
    np.minimum, np.multiply, np.fmin, np.fmax, np.fmod)}
OPERATIONS["lanes"] = LANES
