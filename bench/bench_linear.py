"""Linear layers with NF4 and int8 weights beside torch's F.linear with f32 and bf16 weights: same run, same threads.

Every call takes the next of several weights that together exceed the caches, as the layers of a model do.  Whatever is
compared takes turns, so that a disturbance meets all of it; figures are medians.
"""

import copy
import ctypes
import statistics
import time

import torch

import bitsandbytes as bnb
from bitsandbytes import cextension

SHAPES = [(4096, 4096), (14336, 4096)]  # out, in
ROWS = [1, 16, 128, 512]
ROTATED = 160 << 20  # bytes of weights that take turns, and of memory that is read: more than the last caches hold
SECONDS = 3.0  # of one comparison, about
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}
F32, BF16, READ = "torch f32", "torch bf16", "read"


def copies(layer, size):
    """As many copies of a layer of `size` bytes as must take turns."""
    return [layer, *(copy.deepcopy(layer) for _ in range(ROTATED // size))]


def layers(n, k):
    """{name: (dtype of the input, layers without bias that take turns)} of an [n, k] weight."""
    torch.manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain = torch.nn.Linear(k, n, bias=False, dtype=dtype)
        four = bnb.nn.LinearNF4(k, n, bias=False, compute_dtype=dtype)
        eight = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
        found[f"torch {SHORT[dtype]}"] = dtype, copies(plain, n * k * dtype.itemsize)
        found[f"NF4 {SHORT[dtype]}"] = dtype, copies(four.to("cpu"), n * k // 2)
        found[f"int8 {SHORT[dtype]}"] = dtype, copies(eight.to("cpu").eval(), n * k)
    return found


def race(runs):
    """{name: median seconds of one call of runs[name](turn)}: one call each in turn, 3 to 120 rounds, warmed up."""
    seconds = {name: [] for name in runs}

    def play(turn):
        for name, run in runs.items():
            start = time.perf_counter()
            run(turn)
            seconds[name].append(time.perf_counter() - start)

    play(0)
    play(1)
    rounds = max(3, min(120, int(SECONDS / sum(times[-1] for times in seconds.values()))))
    for times in seconds.values():
        times.clear()
    for turn in range(rounds):
        play(2 + turn)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(contestants, rows, k):
    """Median seconds of every contestant on [rows, k], and with one row of a pass over ROTATED bytes."""
    inputs = {dtype: torch.randn(rows, k).to(dtype) for dtype in SHORT}
    runs = {
        name: lambda turn, x=inputs[dtype], turns=turns: turns[turn % len(turns)](x)
        for name, (dtype, turns) in contestants.items()
    }
    if rows == 1:
        memory = torch.ones(ROTATED // 4)
        runs[READ] = lambda turn: memory.sum()
    return race(runs)


def print_row(n, k, rows, threads, seconds):
    cells = "".join(f" {seconds[name] * 1e3:10.3f}" for name in sorted(seconds) if name != READ)
    cells += f"   memory {ROTATED / seconds[READ] * 1e-9:.1f} GB/s" if READ in seconds else ""
    print(f"{n}x{k:<6} {rows:4} {threads:7} |{cells}", flush=True)


def speedup(results):
    """What two threads gained in torch's largest product: about 2 where both cores are free."""
    one, two = (seconds[F32] for shape, rows, _, seconds in results if shape == SHAPES[0] and rows == ROWS[-1])
    return one / two


def musts(results):
    """(what, found, least that is expected) for everything that the layers must reach."""
    for shape, rows, threads, seconds in results:
        where = f"{shape[0]}x{shape[1]} M={rows}, {threads} thread{'s' if threads > 1 else ''}"
        if rows == 1:
            rate = shape[0] * shape[1] / 2 / seconds["NF4 bf16"]
            if threads == 1:
                yield f"NF4 bf16 {where}: GB/s", rate * 1e-9, 8.0
            else:
                yield f"NF4 bf16 {where}: share of read rate", rate * seconds[READ] / ROTATED, 0.7
            for theirs in (BF16, F32):
                yield f"NF4 bf16 {where}: speed against {theirs}", seconds[theirs] / seconds["NF4 bf16"], 1.0
        if rows == 128:
            for ours in ("NF4 bf16", "NF4 f32"):
                yield f"{ours} {where}: speed against {F32}", seconds[F32] / seconds[ours], 0.8
        for ours in ("int8 bf16", "int8 f32"):
            yield f"{ours} {where}: speed against {F32}", seconds[F32] / seconds[ours], 1.0


@torch.no_grad()
def compare():
    """Print the table and what must be reached; the rows as dictionaries."""
    results = []
    isa = cextension.lib.bnb_cpu_isa
    isa.restype = ctypes.c_char_p
    print(f"\nlinear layers, {isa().decode()}; ms of one call")
    for shape in SHAPES:
        contestants = layers(*shape)
        if shape == SHAPES[0]:
            print(f"{'weight':11} {'M':>4} {'threads':>7} |" + "".join(f" {name:>10}" for name in sorted(contestants)))
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for rows in ROWS:
                seconds = measure(contestants, rows, shape[1])
                print_row(*shape, rows, threads, seconds)
                results.append((shape, rows, threads, seconds))
    print("\nWhat the layers must reach")
    gain = speedup(results)
    if gain < 1.6:
        print(f"The machine is busy: two threads made torch {gain:.2f} times as fast.  Run again when it is idle.")
    for what, found, expected in musts(results):
        print(f"{what:65} {found:7.2f} (must >= {expected}): {'met' if found >= expected else 'MISSED'}")
    return [
        {"n": shape[0], "k": shape[1], "m": rows, "threads": threads, "seconds": seconds}
        for shape, rows, threads, seconds in results
    ]
