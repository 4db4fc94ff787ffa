"""Our operations beside torch's, where torch has the operation: same run, same threads, same data.

Prints AdamW8bit and 32-bit AdamW against torch's fused AdamW (f32, bf16), quantiles against torch.sort, and linear
layers with NF4 and int8 weights against torch's (bench_linear.py).
Usage: python bench/bench_torch.py [--json FILE] [--elements N] [--linear]
"""

import argparse
import json
import statistics
import time

import bench_linear
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F

SAMPLES = 15


def median_seconds(run):
    """Median seconds of one call of run() over 15 samples of at least 5 ms each, after a warm-up of two calls."""
    run()
    start = time.perf_counter()
    run()
    repeats = int(5e-3 / max(time.perf_counter() - start, 1e-9)) + 1
    samples = []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        samples.append((time.perf_counter() - start) / repeats)
    return statistics.median(samples)


def optimizer_seconds(make, elements, dtype):
    """Seconds of one step of the optimizer make([p]) for one parameter of `elements` values of `dtype`."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(elements, generator=generator).to(dtype))
    p.grad = (0.01 * torch.randn(elements, generator=generator)).to(dtype)
    return median_seconds(make([p]).step)


def optimizer_rows(elements):
    """(name, dtype, ns per element of ours, of torch's) for every optimizer that both have."""
    ours = {"AdamW8bit": bnb.optim.AdamW8bit, "AdamW, 32-bit state": bnb.optim.AdamW}
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        theirs = optimizer_seconds(lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True), elements, dtype)
        for name, cls in ours.items():
            seconds = optimizer_seconds(lambda p, cls=cls: cls(p, lr=1e-5), elements, dtype)
            rows.append((name, "torch fused AdamW", dtype, seconds / elements * 1e9, theirs / elements * 1e9))
    return rows


def quantile_rows(elements):
    """256 exact quantiles, against sorting all values (torch.quantile refuses more than 16 million)."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(elements, generator=torch.Generator().manual_seed(1)).to(dtype)
        ours = median_seconds(lambda x=x: F.estimate_quantiles(x))
        theirs = median_seconds(lambda x=x: torch.sort(x))
        rows.append(("256 quantiles", "torch.sort", dtype, ours / elements * 1e9, theirs / elements * 1e9))
    return rows


def compare_elementwise(args):
    """Print the table of operations over many elements; its rows as dictionaries."""
    print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, {args.elements} elements, medians of {SAMPLES}")
    print(f"{'ours':20} {'torch':18} {'dtype':6} {'threads':>7} {'ns/elem':>8} {'torch':>8} {'torch / ours':>12}")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for ours, theirs, dtype, ns, torch_ns in optimizer_rows(args.elements) + quantile_rows(args.elements // 4):
            short = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
            print(
                f"{ours:20} {theirs:18} {short:6} {threads:7} {ns:8.3f} {torch_ns:8.3f} {torch_ns / ns:12.2f}",
                flush=True,
            )
            results.append(
                {"ours": ours, "torch": theirs, "dtype": short, "threads": threads, "ns": ns, "torch_ns": torch_ns}
            )
    return results


def main():
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file too")
    parser.add_argument("--elements", type=int, default=1 << 24, help="values per tensor (default: 16 Mi)")
    parser.add_argument("--linear", action="store_true", help="linear layers only")
    args = parser.parse_args()
    results = [] if args.linear else compare_elementwise(args)
    linear = bench_linear.compare()
    if args.json:
        with open(args.json, "w") as file:
            found = {"torch": torch.__version__, "elements": args.elements, "rows": results, "linear": linear}
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
