"""The one-kernel decoder of a checkout: is it right, how long do the kernel and a whole token take, beside an older tree, and which
settings are best.   PYTHONPATH=$PWD python step.py [--old TREE] [--seconds 290] [--only 0.5B:16,3B:4] [--no-search] [--dry]

Each tree runs in a child process of its own, which stays alive and does what the parent asks, one child at a time: so old and new
take turns within one call on one GPU.  --dry: on a CPU, the kernels on the tests' simulated GPU, tiny shapes, times meaningless.
"""
import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

START, MARK = time.monotonic(), "@@"


def spread(values) -> float:
    ranked = sorted(values)
    return (ranked[int(0.9 * (len(ranked) - 1))] - ranked[int(0.1 * (len(ranked) - 1))]) / median(values)


# ---- the child

class Child:
    """One tree's model, cache and kernel."""

    def __init__(self, tree: str, dry: bool):
        self.dry, self.device = dry, "cpu" if dry else "cuda"
        sys.path.insert(0, tree)
        if dry:
            sys.path.insert(1, tree + "/tests")
        import torch
        self.torch = torch
        if dry:
            self.simulate()
        from minikd import cuda, decode_cuda
        self.decode_cuda, self.cuda = decode_cuda, cuda
        if not dry:
            assert cuda.available(0), "the kernels could not be built"

    def simulate(self):
        """The tests' GPU: launches run in ptx.py."""
        from contextlib import nullcontext
        from types import SimpleNamespace
        from minikd import cuda, decode_cuda
        from ptx import Driver, kernels_of, places
        folder = Path(tempfile.mkdtemp())
        (folder / "all.cu").write_bytes(cuda.program())
        subprocess.run(["nvcc", "-arch=sm_90", "-std=c++17", "-ptx", folder / "all.cu", "-o", folder / "all.ptx"], check=True)
        driver, self.places = Driver(kernels_of((folder / "all.ptx").read_text())), places
        cuda.load, cuda.find = (lambda device: (driver, None)), (lambda device, name: name)
        self.torch.cuda.device = lambda device: nullcontext()
        self.torch.cuda.current_stream = lambda: SimpleNamespace(cuda_stream=0)
        decode_cuda.can_run = lambda device: True
        original, plain = decode_cuda.OneKernel.__init__, decode_cuda.launch

        def init(one, *given):
            original(one, *given)
            one.blocks = min(2, one.step.I // 8)
            model = getattr(one, "model", None)
            body = model.model if model is not None else one.body
            tables = ("layers", "cos", "sin")
            weights = (tensor for *tensors, _, _ in one.weights for tensor in tensors)
            one.readable = sorted(set(places(*(one.held[name] for name in tables), body.embed_tokens.weight, *weights)))
            one.writable = places(getattr(one, "logits", None), *(one.held[name] for name in one.held if name not in tables),
                                  *(tensor for *_, keys, values in one.weights for tensor in (keys, values)))
            self.latest = one

        def launch(name, device, grid, threads, step, **options):
            driver.readable, driver.writable = self.latest.readable + [(step.token, 8)], self.latest.writable
            plain(name, device, grid, threads, step, **options)

        decode_cuda.OneKernel.__init__, decode_cuda.launch = init, launch

    def make(self, name: str, bits: int):
        """A random model, its cache after 128 tokens, the kernel; and what it computes against float32."""
        torch = self.torch
        from contextlib import ExitStack
        from dataclasses import replace
        from benchmarks.gpu import SHAPES, bytes_of_a_step, four_bits, make
        from minikd.cache import StaticCache
        from minikd.generate import prefill
        from minikd.layout import laid_out
        from minikd.w4 import W4Linear
        self.drop()
        config = replace(SHAPES["0.5B"], hidden_size=256, intermediate_size=256, num_attention_heads=4,
                         vocab_size=1000) if name == "narrow" else SHAPES[name]
        if self.dry:
            config = replace(config, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
                             head_dim=64, vocab_size=304)
        self.model = make(config, self.device)
        if bits == 4:
            self.model = four_bits(self.model)
        if self.dry:
            from test_decode_cuda import joined
            self.model = joined(self.model)
        self.stack = ExitStack()
        self.stack.enter_context(torch.inference_mode())
        if not self.dry:
            self.stack.enter_context(laid_out(self.model, rows=1, steps=256))
        self.before = 8 if self.dry else 128
        self.caches = [StaticCache(prefill(self.model, [list(range(self.before))], 16 if self.dry else 256, 1)[0])
                       for _ in range(2)]
        self.kernel = self.decode_cuda.OneKernel(self.model, self.caches[1])
        self.token = torch.tensor([[7]], device=self.device)
        dense = {key: weight for key, weight in self.model.state_dict().items()
                 if weight.is_floating_point() and "scales" not in key}
        dense |= {f"{key}.weight": layer.weight() for key, layer in self.model.named_modules() if isinstance(layer, W4Linear)}
        exact = make(config, self.device, torch.float32)
        exact.load_state_dict(dense)
        cache = StaticCache(prefill(exact, [list(range(self.before))], 16 if self.dry else 256, 1)[0])
        right, plain, one = (each.hidden(self.token, its).double()
                             for each, its in ((exact, cache), (self.model, self.caches[0]), (self.kernel, self.caches[1])))
        error = lambda found, right: float((found - right).norm() / right.norm())
        found = {"error": error(one, right), "plain": error(plain, right)}
        logits = getattr(self.kernel, "logits", None)
        if logits is not None:
            head = exact.head.double()
            found |= {"logits": error(logits.double(), right[0] @ head.T),
                      "plain logits": error((plain[0].bfloat16() @ self.model.head.T).double(), right[0] @ head.T)}
        del exact, cache, dense
        self.graph = None
        has_head = logits is not None
        return found | {"bytes": bytes_of_a_step(self.model), "head": self.model.head.nbytes, "has_head": has_head}

    def drop(self):
        if hasattr(self, "stack"):
            self.stack.close()
            del self.model, self.kernel, self.caches
            self.graph = None
        gc.collect()
        if not self.dry:
            self.torch.cuda.empty_cache()

    def once(self):
        """The kernel alone."""
        kernel, its = self.kernel, self.decode_cuda
        self.latest = kernel                            # for the simulated GPU
        kernel.step.token = self.token.data_ptr()
        its.launch(kernel.name, self.token.device, (kernel.blocks, 1), its.THREADS, kernel.step, together=True, shared=its.SHARED)

    def time_kernel(self, repeats: int, slot: int | None = None, bits: list | None = None):
        """Microseconds of each launch, from a graph, from a slot on; words are cleared, as tags depend on the slot."""
        torch = self.torch
        if bits is not None:
            if hasattr(self.kernel.step, "products"):
                for product, value in zip(self.kernel.step.products, bits):
                    product.bits = value
            else:
                for i in range(4):
                    self.kernel.step.bits[i] = bits[i]
            self.graph = None
        self.caches[1].slot.fill_(slot or self.before + 1)
        for name in "heads middle wide last parts".split():
            self.kernel.held[name].zero_()
        if self.dry:
            begin = time.perf_counter()
            self.once()
            return [1e6 * (time.perf_counter() - begin)]
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.once()
        found = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(), self.graph.replay(), end.record(), end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3)
        return found[3:] if repeats > 10 else found

    def bits(self):
        step = self.kernel.step
        return [product.bits for product in step.products] if hasattr(step, "products") else list(step.bits)

    def tokens(self, count: int):
        """generate's greedy tokens after 28, and the seconds of the call."""
        from minikd.generate import generate
        prompt = [(37 * i + 11) % (300 if self.dry else 1000) for i in range(5 if self.dry else 28)]
        if not self.dry:
            self.torch.cuda.synchronize()
        begin = time.perf_counter()
        answer = generate(self.model, [prompt], count, **({"graphs": True} if self.dry else {}))[0]
        if not self.dry:
            self.torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - begin, "tokens": answer}

    def plain_tokens(self, count: int):
        """How many of the tokens are the plain path's before the first that is not."""
        from minikd.generate import generate
        prompt = [(37 * i + 11) % (300 if self.dry else 1000) for i in range(5 if self.dry else 28)]
        given = {"graphs": True} if self.dry else {}
        one, plain = (generate(self.model, [prompt], count, one_kernel=on, **given)[0] for on in (True, False))
        return next((i for i, (a, b) in enumerate(zip(one, plain)) if a != b), count)

    def copy(self):
        """The bandwidth of a copy, bytes a second."""
        torch, size = self.torch, 1 << 20 if self.dry else 4 << 30
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target, times = torch.empty_like(source), []
        for _ in range(8):
            if not self.dry:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            target.copy_(source)
            if not self.dry:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        del source, target
        return 2 * size / median(times[2:])


def serve(tree: str, dry: bool):
    child = Child(tree, dry)
    say = lambda value: print(MARK + json.dumps(value), flush=True)
    say("ready")
    for line in sys.stdin:
        name, *given = json.loads(line)
        try:
            say({"ok": getattr(child, name)(*given)})
        except Exception as error:                      # a trap makes every later call fail too: the parent sees each
            say({"failed": f"{type(error).__name__}: {str(error)[:300]}"})


# ---- the parent

class Peer:
    def __init__(self, name: str, tree: str, dry: bool):
        self.name = name
        command = [sys.executable, __file__, "--child", tree] + ["--dry"] * dry
        env = os.environ | {"PYTHONPATH": tree} | ({"CUDA_VISIBLE_DEVICES": ""} if dry else {})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tree)

    def answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK):])
            print(f"  [{self.name}] {line.rstrip()}", flush=True)
        return {"failed": "the child ended"}

    def ask(self, name: str, *given):
        try:
            self.process.stdin.write(json.dumps([name, *given]) + "\n")
            self.process.stdin.flush()
            answer = self.answer()
        except (BrokenPipeError, OSError) as error:
            answer = {"failed": str(error)}
        if "failed" in answer:
            print(f"  {self.name}: {name} FAILED: {answer['failed']}", flush=True)
            return None
        return answer["ok"]


def variant(tree: str, edits: list[tuple[str, str]]) -> str:
    """A copy of the tree whose decode.cu has other constants."""
    folder = Path(tempfile.mkdtemp(prefix="variant-"))
    for part in "minikd", "benchmarks", "tests":
        shutil.copytree(Path(tree) / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    path = folder / "minikd" / "decode.cu"
    text = path.read_text()
    for before, after in edits:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text)
    return str(folder)


def left(options) -> float:
    return options.seconds - (time.monotonic() - START)


def kernel_times(peers, options, slots=(None,)):
    """Alternating: each peer in turn, several times -> {peer: microseconds}"""
    found = {}
    for slot in slots:
        for _ in range(1 if options.dry else 4):
            for peer in peers:
                found.setdefault((peer.name, slot), []).extend(peer.ask("time_kernel", 33, slot) or [])
    return found


def search(peer, options):
    """Each product's `bits` one by one, the others as chosen; then the best of each together."""
    chosen = peer.ask("bits")
    if chosen is None:
        return
    measure = lambda bits: median(peer.ask("time_kernel", 3 if options.dry else 43, None, bits) or [9e9])
    base, best, lines = measure(chosen), list(chosen), []
    for i in range(len(chosen)):
        times = [measure([*chosen[:i], value, *chosen[i + 1:]]) for value in range(1 if options.dry else 5)]
        lines.append(" ".join(f"{value:.1f}" for value in times))
        if min(times) < 0.995 * base:
            best[i] = times.index(min(times))
    both = [measure(chosen), measure(best), measure(chosen), measure(best)]
    print(f"  bits {chosen}: {base:.1f} us; by product 2^0..2^4 warps: " + " | ".join(lines), flush=True)
    print(f"  best of each {best}: {both[1]:.1f} {both[3]:.1f}, chosen again {both[0]:.1f} {both[2]:.1f}", flush=True)
    measure(chosen)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--old"), parser.add_argument("--child"), parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=290), parser.add_argument("--dry", action="store_true")
    parser.add_argument("--no-search", action="store_true"), parser.add_argument("--no-variants", action="store_true")
    options = parser.parse_args()
    if options.child:
        return serve(options.child, options.dry)
    new = os.environ.get("PYTHONPATH", os.getcwd()).split(":")[0]
    peers = [Peer("new", new, options.dry)] + ([Peer("old", options.old, options.dry)] if options.old else [])
    extra = []
    if not options.no_variants:
        extra = [Peer("EMPTY = 1", variant(new, [("EMPTY = 3;", "EMPTY = 1;")]), options.dry),
                 Peer("ring of 4, w4 6", variant(new, [("SLOT = 2048, DEPTH = 5", "SLOT = 2048, DEPTH = 4"),
                                                       ("SLOT = 1072, DEPTH = 8", "SLOT = 1072, DEPTH = 6")]), options.dry),
                 # Timing only, the results are wrong: an instruction copies 128 bytes of 4 rows, not 64 of 8.
                 Peer("4 rows of 128 bytes, WRONG", variant(new, [
                     ("(n + lane / 4) * product.K + k + lane % 4 * 8);", "(n + lane / 8) * product.K + k + lane % 8 * 8), rows = 8 * product.K;"),
                     ("    int other;                                          // bytes from there", "    int rows = 64, other;                               // bytes from there"),
                     ("slot + 512, at + 64);", "slot + 512, at + rows);"), ("at + other + 64);", "at + other + rows);")]), options.dry)]
    for peer in peers + extra:
        print(peer.name, peer.answer(), f"{time.monotonic() - START:.0f} s", flush=True)
    copy = peers[0].ask("copy") or 4.2e12
    print(f"copy {copy / 1e12:.2f} TB/s", flush=True)
    cases = [("narrow", 16), ("0.5B", 16), ("1.5B", 16), ("3B", 16), ("0.5B", 4), ("1.5B", 4), ("3B", 4), ("narrow", 4)]
    if options.only:
        cases = [(name, int(bits)) for name, bits in (each.split(":") for each in options.only.split(","))]
    for name, bits in cases[:2] + cases[4:5] if options.dry and not options.only else cases:
        if left(options) < 15:
            print(f"no time left for {name}, {bits} bits")
            continue
        print(f"== {name}, {bits} bits ({time.monotonic() - START:.0f} s)", flush=True)
        with_extra = peers + (extra if name in ("0.5B", "narrow") else [])
        facts = {peer.name: peer.ask("make", name, bits) for peer in with_extra}
        for peer in with_extra:
            if fact := facts[peer.name]:
                print(f"  {peer.name}: error {fact['error']:.2e}, plain's {fact['plain']:.2e}" + (
                    f", logits {fact['logits']:.2e}, plain's {fact['plain logits']:.2e}" if "logits" in fact else "")
                      + ("" if fact["error"] < 1.3 * fact["plain"] or "WRONG" in peer.name else "   TOO LARGE"), flush=True)
        good = [peer for peer in with_extra if facts[peer.name]]
        for (who, slot), times in kernel_times(good, options, (None, 129 if options.dry else 280)[:1 if options.dry else 2]).items():
            if times:
                fact = facts[who]
                moved = fact["bytes"] - (not fact["has_head"]) * fact["head"]
                print(f"  {who}: kernel {median(times):.1f} us from slot {slot or 129}, spread {spread(times):.0%}, its bytes take "
                      f"{moved / copy * 1e6:.1f}: {moved / copy * 1e6 / median(times):.0%}"
                      + (" (with the head)" if fact["has_head"] else ""), flush=True)
        if name != "narrow":
            count, seconds, answers = 8 if options.dry else 512, {}, {}
            mine = [peer for peer in good if peer in peers]
            for turn in range(1 if options.dry else 4):
                for peer in mine:
                    for length in count, count // 2:
                        said = peer.ask("tokens", length)
                        if said and (turn or options.dry):              # the first call warms up
                            seconds.setdefault((peer.name, length), []).append(said["seconds"])
                            answers[peer.name] = said["tokens"]
            for peer in mine:
                if (peer.name, count) in seconds:
                    whole, half = (median(seconds[peer.name, length]) for length in (count, count // 2))
                    token = (whole - half) / (count - count // 2)
                    share = facts[peer.name]["bytes"] / copy / token
                    print(f"  {peer.name}: a token {token * 1e6:.1f} us, {1 / token:,.0f}/s, {share:.1%} of the copy's; whole call "
                          f"{count / whole:,.0f}/s, spread {spread(seconds[peer.name, count]):.0%}; the plain path's tokens up to "
                          f"{peer.ask('plain_tokens', 16 if options.dry else 64)}", flush=True)
            if len(answers) == 2:
                same = next((i for i, (a, b) in enumerate(zip(*answers.values())) if a != b), "all")
                print(f"  new and old agree on tokens up to {same}", flush=True)
        if not options.no_search and left(options) > 20 and facts.get("new"):
            search(peers[0], options)
    for peer in peers + extra:
        peer.process.stdin.close()
    print(f"done in {time.monotonic() - START:.0f} s")


if __name__ == "__main__":
    main()
