"""4-bit products on CUDA beside cuBLAS in bf16: the grid of shapes and rows, backward, host time, and plans one by one.

Times are those of graph replays; weights of at least 256 MB take turns, so that none is found in the second-level
cache.  Contestants take turns too; figures are medians of replays.  Speed is the time of cuBLAS over ours.
Exit status 1 if a line misses what it must reach.
Usage: python bench/bench_gemm4.py [--only copy,grid,backward,host,memory,sweep] [--shapes 4096x4096,...]
       [--rows 1,8,...] [--formats nf4n,nf4,fp4] [--json FILE]
--sweep (the part "sweep") times every kernel that can do a shape, and how it can be cut, instead of what is chosen.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import sys
import time

import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F

os.environ.setdefault("BNB_GEMM4", "")  # before the first product: from then on it is read at each

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672)]  # n, k
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096]
FORMATS = {"nf4n": ("nf4", True), "nf4": ("nf4", False), "fp4": ("fp4", False)}
# rows up to: speed relative to bf16 that the geometric mean and the worst shape must reach, and the goal
MUSTS = [
    (1, 2.4, 1.9, 3.2),
    (16, 2.2, 1.6, 3.2),
    (32, 1.8, 1.3, 3.0),
    (64, 1.4, 1.1, 2.6),
    (128, 1.1, 0.95, 1.75),
    (256, 0.95, 0.90, 1.05),
    (math.inf, 0.95, 0.90, 0.98),
]
PARTS = ("copy", "grid", "backward", "host", "memory", "sweep")
ROTATED = 256 << 20
BACKWARD_ROWS = 2048
ops = torch.ops.bitsandbytes
missed = []


def plan():
    function = bnb.cextension.lib.bnb_gemm4_plan
    function.restype = ctypes.c_char_p
    return function().decode()


def geometric_mean(values):
    return math.exp(statistics.fmean(math.log(v) for v in values))


def demand(what, found, must):
    """Note what was missed; returns how a line ends."""
    if must is None or found >= must:
        return ""
    missed.append(what)
    return " MISSED"


class Contest:
    """Runs that take turns, each as a graph of several calls."""

    def __init__(self, runs, milliseconds=12.0):
        self.graphs = {}
        for name, (run, calls) in runs.items():
            run(0)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for turn in range(calls):
                    run(turn)
            self.graphs[name] = graph, calls
        self.milliseconds = milliseconds

    def medians(self, rounds=7):
        """{name: microseconds of one call}"""
        times = {name: [] for name in self.graphs}
        spent = 0.0
        for turn in range(rounds + 1):
            for name, (graph, calls) in self.graphs.items():
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                stop.record()
                stop.synchronize()
                took = start.elapsed_time(stop)
                spent += took
                if turn > 0:  # the first replay uploads the graph
                    times[name].append(took / calls * 1e3)
            if turn >= 3 and spent > self.milliseconds * len(self.graphs):
                break
        return {name: statistics.median(found) for name, found in times.items()}


class Weights:
    """One weight in bf16 and in 4 bits, as many times as must take turns."""

    def __init__(self, n, k, formats):
        torch.manual_seed(0)
        plain = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        self.n, self.k = n, k
        self.plain = [plain, *(plain.clone() for _ in range(self.copies(n * k * 2) - 1))]
        self.packed = {}
        for name in formats:
            kind, nested = FORMATS[name]
            packed, state = F.quantize_4bit(plain, quant_type=kind, compress_statistics=nested, blocksize=64)
            arguments = F.weight_arguments("bench", state)
            self.packed[name] = [
                tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in (packed, *arguments))
                for _ in range(self.copies(n * k // 2))
            ]

    @staticmethod
    def copies(size):
        return max(2, -(-ROTATED // size))

    def runs(self, m, names, backward=False, bf16=True):
        """{name: (run(turn), calls in a graph)}"""
        n, k = self.n, self.k
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)

        def ours(name):
            weights = self.packed[name]

            def run(turn):
                weight = weights[turn % len(weights)]
                ops._linear_4bit(x, *weight, None, False)
                if backward:
                    ops._linear_4bit_grad(grad, *weight)

            return run

        def theirs(turn):
            weight = self.plain[turn % len(self.plain)]
            torch.nn.functional.linear(x, weight)
            if backward:
                torch.mm(grad, weight)

        # A few milliseconds a graph, and whole turns where there is time for them.
        estimate = max(2 * m * n * k / 7e14, n * k / 2e12) * 1e3 + 4e-3
        most = max(2, min(32, int(6 / estimate)))
        found = {"bf16": (theirs, min(most, 4 * len(self.plain)))} if bf16 else {}
        return found | {name: (ours(name), min(most, 4 * len(self.packed[name]))) for name in names}


# ---- parts


def copy_rate():
    """Bytes per second of torch's copy, reads and writes counted."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
    y = torch.empty_like(x)
    us = Contest({"copy": (lambda turn: y.copy_(x), 2)}).medians()["copy"]
    rate = 2 * x.numel() / us * 1e6
    print(f"copy {rate * 1e-9:.0f} GB/s")
    return rate


def grid(shapes, rows, formats, rate):
    """Every shape, number of rows and format; then means and worst shapes."""
    results = []
    print(
        f"\n{'weight':>11} {'M':>5} {'bf16 us':>8} " + " ".join(f"{name + ' us':>8} {'speed':>6}" for name in formats)
    )
    for n, k in shapes:
        weights = Weights(n, k, formats)
        for m in rows:
            us = Contest(weights.runs(m, formats)).medians()
            chosen = plan()
            line = f"{n:>5}x{k:<5} {m:>5} {us['bf16']:8.1f} "
            line += " ".join(f"{us[name]:8.1f} {us['bf16'] / us[name]:6.2f}" for name in formats)
            if m == 1:
                size = n * k / 2
                line += "  of copy " + " ".join(f"{size / us[name] * 1e6 / rate:.2f}" for name in formats)
            print(f"{line}  {chosen}", flush=True)
            results.append({"n": n, "k": k, "m": m, "us": us, "plan": chosen})
        del weights
        torch.cuda.empty_cache()
    print(f"\nspeed relative to bf16 over {len(shapes)} shapes: geometric mean / worst")
    for m in rows:
        must = next(line for line in MUSTS if m <= line[0])
        for name in formats:
            speeds = [r["us"]["bf16"] / r["us"][name] for r in results if r["m"] == m]
            mean, worst = geometric_mean(speeds), min(speeds)
            end = demand(f"M={m} {name} mean", mean, must[1]) + demand(f"M={m} {name} worst", worst, must[2])
            print(f"M {m:>5} {name:>5} {mean:6.2f} / {worst:5.2f}  must {must[1]} / {must[2]}  goal {must[3]}{end}")
    return results


def backward(shapes, formats):
    """Forward and the gradient of the input, as in a training step."""
    results = []
    print(f"\nforward + backward, M = {BACKWARD_ROWS}")
    for n, k in shapes:
        weights = Weights(n, k, formats[:1])
        us = Contest(weights.runs(BACKWARD_ROWS, formats[:1], backward=True)).medians()
        speed = us["bf16"] / us[formats[0]]
        end = demand(f"backward {n}x{k}", speed, 0.90)
        print(
            f"{n:>5}x{k:<5} bf16 {us['bf16']:8.1f} {formats[0]} {us[formats[0]]:8.1f} speed {speed:5.2f}  {plan()}{end}"
        )
        results.append({"n": n, "k": k, "us": us, "plan": plan()})
        del weights
        torch.cuda.empty_cache()
    return results


def host():
    """Wall time of a small module's call, idle card: median of 1000."""
    x = torch.randn(1, 256, device="cuda", dtype=torch.bfloat16)
    plain = torch.nn.Linear(256, 256, bias=False, device="cuda", dtype=torch.bfloat16)
    four = bnb.nn.LinearNF4(256, 256, bias=False, compute_dtype=torch.bfloat16).to("cuda")
    found = {}
    with torch.no_grad():
        for name, layer in {"nn.Linear": plain, "Linear4bit": four, "nn.Linear again": plain}.items():
            times = []
            for _ in range(1100):
                torch.cuda.synchronize()
                start = time.perf_counter()
                layer(x)
                times.append((time.perf_counter() - start) * 1e6)
            found[name] = statistics.median(times[100:])
    ratio = found["Linear4bit"] / min(found["nn.Linear"], found["nn.Linear again"])
    text = "  ".join(f"{name} {us:.1f} us" for name, us in found.items())
    print(f"\nhost: {text}  ratio {ratio:.2f}, must 1.2 or less{demand('host', -ratio, -1.2)}")
    return found | {"ratio": ratio}


def memory():
    """The peak of a training step of one layer beyond what lies there before it."""
    found = {}
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    four = bnb.nn.LinearNF4(4096, 14336, bias=False, compute_dtype=torch.bfloat16).to("cuda")
    plain = torch.nn.Linear(4096, 14336, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    for name, layer in {"bf16": plain, "nf4n": four}.items():
        for _ in range(2):
            x.grad = None
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer(x).backward(torch.ones(2048, 14336, device="cuda", dtype=torch.bfloat16))
            found[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    sizes = ", ".join(f"{name} {size:.0f} MiB" for name, size in found.items())
    print(f"\nmemory of a step of 2048 x 4096 -> 14336, beside the weight: {sizes}")
    return found


def cuts(name):
    """What to ask a kernel for: its own choice, and others."""
    if name.startswith("few"):
        yield from ("", ",0,1", ",0,2", ",0,4", ",0,7", ",0,14", ",2", ",0,0,2", ",0,0,3")
    elif name.startswith(("wide", "meet", "grad")):
        yield from ("", ",1", ",2", ",3", ",4", ",6", ",8")
    else:
        yield ""


SWEPT = ["few8", "few16", "few32", "few64", "wide32", "wide64", "wide128", "wide256", "meet128", "meet256", "tile"]


def sweep(shapes, rows, formats):
    """All kernels and cuts, the best five of each shape and number of rows; what is chosen is marked."""
    results = []
    name = formats[0]
    print(f"\nsweep, {name}")
    for n, k in shapes:
        weights = Weights(n, k, [name])
        for m in rows:
            os.environ["BNB_GEMM4"] = ""
            found = Contest(weights.runs(m, [name]), 3.0).medians(3)
            chosen, times = plan(), {plan(): found[name]}
            for kernel in SWEPT:
                for cut in cuts(kernel):
                    os.environ["BNB_GEMM4"] = kernel + cut
                    run, _ = weights.runs(m, [name], bf16=False)[name]
                    run(0)
                    if plan() in times or not plan().startswith(f"{kernel} "):
                        continue
                    taken = plan()
                    times[taken] = Contest(weights.runs(m, [name], bf16=False), 3.0).medians(3)[name]
            os.environ["BNB_GEMM4"] = ""
            best = sorted(times, key=times.get)
            print(f"{n}x{k} M {m}: bf16 {found['bf16']:.1f} us, chosen {times[chosen]:.1f} {chosen}", flush=True)
            for each in best[:5]:
                print(f"    {times[each]:8.1f}  {found['bf16'] / times[each]:5.2f}  {each}", flush=True)
            families = {each.split()[0]: times[each] for each in reversed(best)}
            print("    best of each: " + "  ".join(f"{key} {us:.1f}" for key, us in families.items()), flush=True)
            results.append({"n": n, "k": k, "m": m, "bf16": found["bf16"], "chosen": chosen, "us": times})
        del weights
        torch.cuda.empty_cache()
    return results


def main():
    """Print the lines; with --json also write them. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results to this file too")
    parser.add_argument("--only", default="copy,grid,backward,host,memory", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--sweep", action="store_true", help="time plans one by one: --only sweep")
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--formats", default=",".join(FORMATS))
    args = parser.parse_args()
    parts = ["sweep"] if args.sweep else args.only.split(",")
    shapes = [tuple(map(int, each.split("x"))) for each in args.shapes.split(",")]
    rows, formats = [int(each) for each in args.rows.split(",")], args.formats.split(",")
    if unknown := set(parts) - set(PARTS) | set(formats) - set(FORMATS):
        parser.error(f"{', '.join(sorted(unknown))}: expected parts {','.join(PARTS)}, formats {','.join(FORMATS)}")
    if not torch.cuda.is_available():
        print("bench_gemm4: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    start = time.perf_counter()
    found = {"card": torch.cuda.get_device_name(0), "torch": torch.__version__, "kernels": bnb.cextension.card_text(0)}
    print(f"{found['card']}, torch {found['torch']}, {found['kernels']}")
    rate = copy_rate() if {"copy", "grid"} & set(parts) else None
    found["copy_bytes_per_s"] = rate
    jobs = {
        "grid": lambda: grid(shapes, rows, formats, rate),
        "backward": lambda: backward(shapes, formats),
        "host": host,
        "memory": memory,
        "sweep": lambda: sweep(shapes, rows, formats),
    }
    for name, job in jobs.items():
        if name in parts:
            found[name] = job()
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(found, file, indent=1)
    print(f"\n{time.perf_counter() - start:.0f} s; missed: {', '.join(missed) or 'nothing'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
