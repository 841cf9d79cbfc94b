"""One row of x by 4-bit weights: is the new tree's kernel right, and how fast is it beside the old tree's, cuBLAS, torch's int4?

row.py NEW OLD. A child process for each tree (PYTHONPATH=tree row.py --child) answers requests, one JSON line each; they take turns.
"""
import json
import os
import subprocess
import sys
import time
from statistics import median

SHAPES = [(22016, 2048), (3584, 18944), (37888, 3584), (2048, 11008), (1536, 8960), (17920, 1536), (9728, 896), (2560, 2048),
          (896, 4864), (1152, 896), (896, 896), (128, 896)]                     # the most important first
LIMIT, TURNS, L2 = 215, 5, 64 << 20


# ---- the child

class Child:
    def __init__(self):
        import torch
        import torch.nn.functional as F
        from minikd import cuda, w4_cuda
        from minikd.quant import dequantize_groups, round_to_nearest
        self.torch, self.F, self.cuda, self.w4, self.graphs = torch, F, cuda, w4_cuda, {}
        self.round, self.dequantize, self.new = round_to_nearest, dequantize_groups, "w4_int8_1" in w4_cuda.KERNELS
        self.rule = getattr(w4_cuda, "cluster_of", None)
        self.device = torch.device("cuda", 0)
        torch.manual_seed(0)

    def hello(self):
        gpu = self.w4.gpu_of(self.device)
        return f"{self.torch.cuda.get_device_name()}, torch {self.torch.__version__}; {gpu}"

    def layer(self, N, K, group=128, sym=True):
        weight = self.torch.randn(N, K, device="cuda") * 0.02
        parts = self.round(weight, group_size=group, sym=sym)
        return self.w4.repack(*parts), self.dequantize(*parts)

    def patch(self, variant):
        """'NAME', 'NAME paired', 'NAME unpaired', and with ' policy N': how clusters are placed (0 default, 1 spread, 2 balanced)"""
        words = variant.split()
        if self.new:
            pairs = 2 if "paired" in words else 1
            self.w4.cluster_of = (lambda name, K, gpu: pairs) if {"paired", "unpaired"} & set(words) else self.rule
            if hasattr(self.w4.launch_shape, "cache_clear"):
                self.w4.launch_shape.cache_clear()
            self.cuda.POLICY, self.cuda.SPREAD = 5, int(words[-1]) if "policy" in words else 1
        return words[0]

    def launch(self, variant, x, packed, y, group=128, bias=None, overlap=True) -> bool:
        (M, K), N, gpu, name = x.shape, y.shape[1], self.w4.gpu_of(x.device), self.patch(variant)
        if name == "plan":
            name = self.w4.plan(M, N, K, group, packed[2] is not None, gpu)
        if self.w4.launch_shape(name, M, N, K, group, packed[2] is not None, gpu)[2] > gpu.shared:
            return False
        self.w4.run(name, *packed, x, bias, y, group, overlap=overlap)
        return True

    def check(self, variants):
        """The worst relative error of each, over all shapes, groups, with zeros and without; every output is nan beforehand; 30 runs
        in a row, each beside the one before, give the same bits."""
        torch, worst, differs = self.torch, {}, []
        for N, K in SHAPES + [(8, 64), (40, 192), (1000, 4224), (24, 8192), (3592, 18944), (4232, 9088), (40, 64)]:
            for sym, group in ((True, 128), (False, 128), (True, 64), (False, 32), (True, K)):
                if K % group or group % 32 or not self.w4.supports_groups(group):
                    continue
                packed, weight = self.layer(N, K, group, sym)
                x, bias = (torch.randn(n, device="cuda").bfloat16() for n in (K, N))
                x = x[None]
                exact = x.double() @ weight.double().T + bias.double()
                for variant in variants:
                    if K <= 128 and " paired" in variant:
                        continue
                    ys = [torch.full((1, N), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(30)]
                    if not all([self.launch(variant, x, packed, y, group, bias) for y in ys]):
                        continue
                    error = float((ys[0].double() - exact).norm() / exact.norm())
                    if not error <= worst.get(variant, (0.0,))[0]:
                        worst[variant] = error, f"{N} x {K}, group {group}, sym {sym}"
                    if not all(torch.equal(ys[0].view(torch.int16), y.view(torch.int16)) for y in ys):
                        differs.append(f"{variant}, {N} x {K}, group {group}, sym {sym}")
                del weight, exact
        return dict(worst=worst, differs=differs)

    def check_chain(self):
        """Layers that read each other's outputs, from a graph, each beside the one before: the same bits as one by one, alone."""
        torch, found = self.torch, []
        for first, second in (((37888, 3584), (3584, 18944)), ((22016, 2048), (2048, 11008))):
            packed = [self.layer(*shape)[0] for shape in (first, second) * 3]
            results = {}
            for overlap in False, True:
                ys = [torch.full((1, (first, second)[i % 2][0]), float("nan"), device="cuda", dtype=torch.bfloat16) for i in range(6)]
                x = torch.linspace(-1, 1, first[1], device="cuda").bfloat16()[None]

                def chain():
                    now = x
                    for i in range(6):
                        self.launch("plan", now, packed[i], ys[i], overlap=overlap)
                        now = ys[i][:, :(second, first)[i % 2][1]]
                chain()
                if overlap:
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        chain()
                    for _ in range(50):
                        for y in ys:
                            y.fill_(float("nan"))
                        graph.replay()
                torch.cuda.synchronize()
                results[overlap] = torch.cat([y[0] for y in ys]).view(torch.int16)
            found.append(bool(torch.equal(*results.values())))
        return found

    def record(self, key, calls):
        torch = self.torch
        for call in calls:
            if call() is False:
                return False
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        self.graphs[key] = graph, len(calls)
        return True

    def prepare(self, N, K, variants, peers):
        """Records the graphs of a shape -> their names.  NAME | alone, after, chain"""
        torch, key = self.torch, f"{N} x {K}"
        copies = min(200, max(20, 3 * L2 // (N * K // 2) + 1)) // 20 * 20       # a multiple of a chain's length
        made, _ = self.layer(N, K)
        packed = [made] + [(torch.randint_like(made[0], -2**31, 2**31 - 1), made[1].clone(), None) for _ in range(copies - 1)]
        x, names = torch.randn(1, K, device="cuda").bfloat16(), []
        small, ys = torch.zeros(4096, device="cuda"), [torch.empty(1, N, device="cuda", dtype=torch.bfloat16) for _ in packed]

        def after(variant, p, y):
            small.add_(1)
            return self.launch(variant, x, p, y)

        def chained(variant, i):                            # 20 layers, each reads the output before where it is long enough
            given = x if i % 20 == 0 or N < K else ys[i - 1][:, :K]
            return self.launch(variant, given, packed[i], ys[i])

        for variant in variants:
            for kind, calls in (("alone", [lambda p=p, y=y: self.launch(variant, x, p, y, overlap=False) for p, y in zip(packed, ys)]),
                                ("after", [lambda p=p, y=y: after(variant, p, y) for p, y in zip(packed, ys)]),
                                ("chain", [lambda i=i: chained(variant, i) for i in range(copies)])):
                name = f"{key}|{variant}|{kind}"
                if self.record(name, calls):
                    names.append(name)
        self.record(f"{key}|small|", [lambda: [small.add_(1)] for _ in packed])
        names.append(f"{key}|small|")
        if peers:
            dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, 3 * L2 // (2 * N * K) + 1))]
            self.record(f"{key}|cuBLAS|", [lambda w=w: self.F.linear(x, w) for w in dense])
            names.append(f"{key}|cuBLAS|")
            try:
                codes = torch.randint(256, (N, K // 2), device="cuda", dtype=torch.uint8)
                weights = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in packed]
                scales = torch.rand(K // 128, N, 2, device="cuda").bfloat16()
                self.record(f"{key}|int4|", [lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, scales) for w in weights])
                names.append(f"{key}|int4|")
            except (RuntimeError, NotImplementedError):
                pass
            if "copy" not in self.graphs:
                source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
                target = torch.empty_like(source)
                self.record("copy", [lambda: target.copy_(source)])
                names.append("copy")
        moved = made[0].nbytes + made[1].nbytes + 2 * (N + K)
        return dict(names=names, moved=moved)

    def turn(self, names):
        """Microseconds a call of each: the median of 15 replays, after 2."""
        torch, found = self.torch, {}
        for name in names:
            graph, calls = self.graphs[name]
            times = []
            for i in range(17):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) * 1e3 / calls)
            found[name] = median(times[2:])
        return found

    def drop(self):
        self.graphs = {key: value for key, value in self.graphs.items() if key == "copy"}
        self.torch.cuda.empty_cache()


def serve():
    child = Child()
    for line in sys.stdin:
        what, *given = json.loads(line)
        try:
            answer = getattr(child, what)(*given)
        except Exception as error:                          # a kernel that traps ends this child's part, not the other's
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        sys.stderr.flush()
        print("=" + json.dumps(answer), flush=True)


# ---- the parent

class Tree:
    def __init__(self, path):
        self.process = subprocess.Popen([sys.executable, __file__, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=os.environ | {"PYTHONPATH": path}, cwd="/")

    def ask(self, *request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("="):
                return json.loads(line[1:])
        raise SystemExit(f"the child ended at {request[0]}")


NEW = ["plan", "w4_int8_1", "w4_int8_1_long unpaired", "w4_int8_1_long paired", "w4_int8_1_long paired policy 0", "w4_int8_2",
       "w4_mma_8_few"]


def main(new, old):
    sys.stdout.reconfigure(line_buffering=True)
    start, trees = time.time(), {"new": Tree(new), "old": Tree(old)}
    for name, tree in trees.items():
        print(f"{name}: {tree.ask('hello')}", flush=True)
    found = trees["new"].ask("check", ["plan", "w4_int8_1", "w4_int8_1_long unpaired", "w4_int8_1_long paired",
                                       "w4_int8_1_long paired policy 0"])
    print(f"relative error, worst (limit 1e-2):  ({time.time() - start:.0f} s)")
    for variant, (error, where) in found.get("worst", {}).items():
        print(f"  {variant:<34}{error:.2e}{'' if error < 1e-2 else ' WRONG'}   {where}")
    print("  differs from run to run:", found.get("differs", found))
    print("  chains beside each other, as one by one:", trees["new"].ask("check_chain"), f"({time.time() - start:.0f} s)", flush=True)
    for N, K in SHAPES:
        if time.time() - start > LIMIT - 12:
            print("no time for", N, K)
            continue
        key = f"{N} x {K}"
        prepared = {"new": trees["new"].ask("prepare", N, K, NEW, True), "old": trees["old"].ask("prepare", N, K, ["plan"], False)}
        for name, what in prepared.items():
            if "error" in what:
                print(key, name, what["error"], flush=True)
        times = {}
        for turn in range(TURNS):
            for name, tree in trees.items():
                answer = tree.ask("turn", prepared[name].get("names", []))
                for each, value in answer.items() if "error" not in answer else ():
                    times.setdefault((name, each), []).append(value)
        us = {each: median(values) for each, values in times.items()}
        copy = us.get(("new", "copy")) or main.copy
        main.copy, rate = copy, 2 * (1 << 30) / copy                            # bytes a microsecond
        moved, cublas = prepared["new"].get("moved", 0), us.get(("new", f"{key}|cuBLAS|"), float("nan"))
        print(f"{key}: {moved / 1e6:.1f} MB, copy's speed {rate / 1e6:.2f} TB/s = {moved / rate:.2f} us; cuBLAS {cublas:.2f}, torch int4 "
              f"{us.get(('new', f'{key}|int4|'), float('nan')):.2f}")
        print(f"  {'us':<36}{'alone':>8}{'after':>8}{'chain':>8}{'of copy':>9}{'cuBLAS':>8}{'spread':>8}")
        for name, variant in [("old", "plan")] + [("new", variant) for variant in NEW]:
            row = {kind: us.get((name, f"{key}|{variant}|{kind}"), float("nan")) for kind in ("alone", "after", "chain")}
            row["after"] -= us.get((name, f"{key}|small|"), 0)
            turns = times.get((name, f"{key}|{variant}|chain"), [float("nan")])
            print(f"  {name + ' ' + variant:<36}{row['alone']:>8.2f}{row['after']:>8.2f}{row['chain']:>8.2f}"
                  f"{moved / rate / row['chain']:>9.0%}{cublas / row['chain']:>7.2f}x{max(turns) / min(turns) - 1:>8.0%}", flush=True)
        for tree in trees.values():
            tree.ask("drop")
    print(f"({time.time() - start:.0f} s)")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--child"] else main(*sys.argv[1:])
