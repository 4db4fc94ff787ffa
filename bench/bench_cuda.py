"""Every CUDA operation against the card's copy rate, measured in the same run, and against torch's fused AdamW.

A share is the bytes that the job must move, over its time, over the copy rate.  Times are medians of event timings;
before each sample a buffer larger than the second-level cache is written, so that no operand is in it.  Wall and host
time of 1000 small tensors are medians too.  Exit status 1 if a line misses what it must reach.
Usage: python bench/bench_cuda.py [--json FILE] [--only copy,optim,small,quant,quantiles] [--elements N] [--samples N]
"""

import argparse
import gc
import json
import statistics
import sys
import time

import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F
from bitsandbytes import optim

SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
SMALL = [(768, 768)] * 500 + [(768,)] * 500
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
PARTS = ("copy", "optim", "small", "quant", "quantiles")
ops = torch.ops.bitsandbytes


class Bench:
    """Times jobs on one card and keeps what it found."""

    def __init__(self, samples):
        self.samples, self.rows, self.rate = samples, [], 0.0
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(max(4 * cache, 1 << 26), dtype=torch.uint8, device="cuda")

    def median_ms(self, run):
        """The median of one call, by events, cold; after three calls that are not timed."""
        for _ in range(3):
            run()
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.samples)]
        for start, stop in pairs:
            self.flush.zero_()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in pairs)

    def measure_copy(self, elements):
        """Bytes per second of torch's copy, reads and writes counted: the best of three dtypes."""
        for dtype in (torch.uint8, torch.bfloat16, torch.float32):
            x = torch.empty(4 * elements // dtype.itemsize, dtype=dtype, device="cuda").fill_(1)
            y = torch.empty_like(x)
            ms = self.median_ms(lambda x=x, y=y: y.copy_(x))
            self.rate = max(self.rate, 2 * x.numel() * dtype.itemsize / ms * 1e3)
        print(f"copy {self.rate * 1e-9:.0f} GB/s")

    def share(self, job, ms, size, must, goal, **more):
        """One line: time, rate and share, and whether it is enough."""
        share = size / ms * 1e3 / self.rate
        self.line(job, ms, must is None or share >= must, share=share, must=must, goal=goal, bytes=size, **more)

    def line(self, job, ms, passed, **more):
        """Keep and print a row; ms may be None."""
        self.rows.append({"job": job, "ms": ms, "passed": passed} | more)
        text = f"{job:44} {ms:8.3f} ms"
        if "share" in more:
            text += f"  {more['bytes'] / ms * 1e-6:6.0f} GB/s  share {more['share']:.3f}"
        if more.get("must") is not None:
            text += f"  must {more['must']:g}  goal {more['goal']:g}  {'ok' if passed else 'MISSED'}"
        if "per_1e9" in more:
            text += f"  {more['per_1e9']:.2f} ms per 10^9"
        if "note" in more:
            text += f"  {more['note']}"
        print(text, flush=True)


def give_back():
    """Return the memory of what was deleted to the card; optimizers refer to themselves."""
    gc.collect()
    torch.cuda.empty_cache()


# ---- optimizers


def one_tensor(elements, dtype):
    p = torch.nn.Parameter(torch.randn(elements, device="cuda", dtype=dtype))
    p.grad = torch.randn(elements, device="cuda", dtype=dtype).mul_(0.01)
    return p


def step_bytes(dtype, states, bits, passes):
    """Bytes of a step per parameter: gradient and parameter read, parameter written, states read and written.

    A first pass for the norms of trust clipping reads gradient, parameter and states once more.
    """
    state = states * (1 + 4 / 256 if bits == 8 else 4)
    return 3 * dtype.itemsize + 2 * state + (passes - 1) * (2 * dtype.itemsize + state)


# class, keywords, states, bits, dtype, passes, must, goal
STEPS = [
    ("AdamW8bit", {}, 2, 8, torch.bfloat16, 1, 0.75, 0.88),
    ("AdamW8bit", {}, 2, 8, torch.float32, 1, None, None),
    ("Lion8bit", {}, 1, 8, torch.bfloat16, 1, 0.75, 0.88),
    ("SGD8bit", {"momentum": 0.9}, 1, 8, torch.bfloat16, 1, 0.75, 0.88),
    ("RMSprop8bit", {}, 1, 8, torch.bfloat16, 1, 0.75, 0.88),
    ("Adagrad8bit", {}, 1, 8, torch.bfloat16, 1, 0.75, 0.88),
    ("AdEMAMix8bit", {}, 3, 8, torch.bfloat16, 1, 0.70, 0.85),
    ("LAMB8bit", {}, 2, 8, torch.bfloat16, 2, 0.70, 0.85),
    ("LARS8bit", {"momentum": 0.9}, 1, 8, torch.bfloat16, 2, 0.70, 0.85),
    ("AdamW32bit", {}, 2, 32, torch.float32, 1, 0.88, 0.94),
    ("AdamW32bit", {}, 2, 32, torch.bfloat16, 1, 0.88, 0.94),
]


def steps(bench, elements):
    """One large tensor per optimizer; then torch's fused AdamW, which ours with 32-bit state must beat."""
    times = {}
    for name, keywords, states, bits, dtype, passes, must, goal in STEPS:
        optimizer = getattr(optim, name)([one_tensor(elements, dtype)], lr=1e-5, **keywords)
        times[name, dtype] = ms = bench.median_ms(optimizer.step)
        size = elements * step_bytes(dtype, states, bits, passes)
        bench.share(f"{name} {SHORT[dtype]}", ms, size, must, goal, per_1e9=ms / elements * 1e9)
        del optimizer
        give_back()
    for dtype in (torch.float32, torch.bfloat16):  # its states have the dtype of the parameter
        optimizer = torch.optim.AdamW([one_tensor(elements, dtype)], lr=1e-5, fused=True)
        times["torch", dtype] = ms = bench.median_ms(optimizer.step)
        size = elements * 7 * dtype.itemsize
        bench.share(f"torch fused AdamW {SHORT[dtype]}, states too", ms, size, None, None, per_1e9=ms / elements * 1e9)
        del optimizer
        give_back()
    theirs = times["torch", torch.float32]
    for dtype in (torch.float32, torch.bfloat16):
        ours = times["AdamW32bit", dtype]
        note = f"{theirs / ours:.2f} x torch's fused AdamW with f32 states ({theirs:.3f} ms)"
        bench.line(f"AdamW32bit {SHORT[dtype]} against torch", ours, ours < theirs, torch_ms=theirs, note=note)


def small_tensors(bench):
    """Wall and host time of a step over a thousand tensors, 295 million parameters."""
    makers = {
        "AdamW8bit": optim.AdamW8bit,
        "AdamW32bit": optim.AdamW32bit,
        "torch fused AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, fused=True),
    }
    for name, make in makers.items():
        params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16)) for s in SMALL]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer = make(params, lr=1e-5)
        for _ in range(5):
            optimizer.step()
        wall, host = [], []
        for _ in range(max(bench.samples, 20)):
            torch.cuda.synchronize()
            start = time.perf_counter()
            optimizer.step()
            host.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            wall.append(time.perf_counter() - start)
        limits = ((2.0, 1.3), (1.0, 0.5)) if name == "AdamW8bit" else ((None, None), (None, None))
        for what, times, (must, goal) in (("wall", wall, limits[0]), ("host", host, limits[1])):
            ms = statistics.median(times) * 1e3
            bench.line(f"1000 tensors {name} {what}", ms, must is None or ms <= must, must=must, goal=goal)
        del optimizer, params
        give_back()


# ---- quantisers


def quantisers(bench, elements):
    """Both directions, 8 and 4 bits, every dtype and block."""
    code = F.create_dynamic_map().to("cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.randn(elements, device="cuda", dtype=torch.float32).to(dtype)
        for block in BLOCKS:
            scales = 4 * -(-elements // block)
            both = elements * (dtype.itemsize + 1) + scales
            codes, absmax = ops.quantize_blockwise(x, code, block)
            ms = bench.median_ms(lambda x=x, block=block: ops.quantize_blockwise(x, code, block))
            bench.share(f"quantize 8-bit {SHORT[dtype]} block {block}", ms, both, 0.80, 0.92)
            run = lambda q=codes, a=absmax, b=block, d=dtype: ops.dequantize_blockwise(q, a, code, b, d)  # noqa: E731
            bench.share(f"dequantize 8-bit {SHORT[dtype]} block {block}", bench.median_ms(run), both, 0.80, 0.92)
            del codes, absmax, run
            both = elements * (dtype.itemsize + 0.5) + scales
            for kind in ("nf4", "fp4"):
                codes, absmax = ops.quantize_4bit(x, block, kind, torch.uint8)
                ms = bench.median_ms(lambda x=x, b=block, k=kind: ops.quantize_4bit(x, b, k, torch.uint8))
                bench.share(f"quantize {kind} {SHORT[dtype]} block {block}", ms, both, 0.80, 0.92)
                run = lambda q=codes, a=absmax, b=block, k=kind, d=dtype: ops.dequantize_4bit(  # noqa: E731
                    q, a, b, k, [elements], d
                )
                bench.share(f"dequantize {kind} {SHORT[dtype]} block {block}", bench.median_ms(run), both, 0.80, 0.92)
                del codes, absmax, run
        del x
        give_back()


def quantiles(bench):
    """256 exact quantiles of 2^26 f32, beside torch.sort."""
    elements = 1 << 26
    x = torch.randn(elements, device="cuda")
    try:
        F.estimate_quantiles(x)
    except RuntimeError as error:
        bench.rows.append({"job": "256 quantiles", "ms": None, "passed": False, "note": str(error)})
        print(f"256 quantiles: {error}")
        return
    ms = bench.median_ms(lambda: F.estimate_quantiles(x))
    share = elements * 4 / ms * 1e3 / bench.rate
    bench.line("256 quantiles of 2^26 f32", ms, ms <= 0.5, must=0.5, goal=0.3, bytes=elements * 4, share=share)
    bench.line("torch.sort of 2^26 f32", bench.median_ms(lambda: torch.sort(x)), True)


def main():
    """Print the lines; with --json also write them. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file too")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--elements", type=int, default=1 << 28, help="values of a large tensor (default: 2^28)")
    parser.add_argument("--samples", type=int, default=15, help="timings per line (default: 15)")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only holds {', '.join(sorted(unknown))}, expected some of {','.join(PARTS)}")
    if not torch.cuda.is_available():
        print("bench_cuda: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name(0)
    print(f"{card}, torch {torch.__version__}, bitsandbytes {bnb.__version__}, {args.elements} elements")
    print(f"medians of {args.samples}, kernels: {bnb.cextension.card_text(0)}")
    bench = Bench(args.samples)
    bench.measure_copy(args.elements)
    if "optim" in parts:
        steps(bench, args.elements)
    if "small" in parts:
        small_tensors(bench)
    if "quant" in parts:
        quantisers(bench, args.elements)
    if "quantiles" in parts:
        quantiles(bench)
    missed = [row["job"] for row in bench.rows if not row["passed"]]
    print(f"{len(bench.rows)} lines, {len(missed)} missed" + (": " + ", ".join(missed) if missed else ""))
    if args.json:
        found = {"card": card, "torch": torch.__version__, "elements": args.elements, "copy_bytes_per_s": bench.rate}
        with open(args.json, "w") as file:
            json.dump(found | {"kernels": bnb.cextension.card_text(0), "rows": bench.rows}, file, indent=1)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
