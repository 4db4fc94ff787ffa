"""Our operations beside torch's, where torch has the operation: same run, same threads, same data.

Prints optimizers against torch's fused AdamW (bench_optim.py), quantiles against torch.sort, and linear layers with NF4
and int8 weights against torch's (bench_linear.py).
Usage: python bench/bench_torch.py [--json FILE] [--elements N] [--only optim|quantiles|linear]
"""

import argparse
import json

import bench_linear
import bench_optim
import torch
from bench_optim import SAMPLES, median_seconds

import bitsandbytes as bnb
from bitsandbytes import functional as F


def quantile_rows(elements):
    """256 exact quantiles, against sorting all values (torch.quantile refuses more than 16 million)."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(elements, generator=torch.Generator().manual_seed(1)).to(dtype)
        ours = median_seconds(lambda x=x: F.estimate_quantiles(x))
        theirs = median_seconds(lambda x=x: torch.sort(x))
        rows.append(("256 quantiles", "torch.sort", dtype, ours / elements * 1e9, theirs / elements * 1e9))
    return rows


def compare_quantiles(elements):
    """Print the table of quantiles; its rows as dictionaries."""
    print(f"{'ours':20} {'torch':18} {'dtype':6} {'threads':>7} {'ns/elem':>8} {'torch':>8} {'torch / ours':>12}")
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for ours, theirs, dtype, ns, torch_ns in quantile_rows(elements):
            short = bench_optim.SHORT[dtype]
            print(f"{ours:20} {theirs:18} {short:6} {threads:7} {ns:8.3f} {torch_ns:8.3f} {torch_ns / ns:12.2f}")
            results.append(
                {"ours": ours, "torch": theirs, "dtype": short, "threads": threads, "ns": ns, "torch_ns": torch_ns}
            )
    return results


def main():
    """Print the tables; with --json also write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the rows to this file too")
    parser.add_argument("--elements", type=int, default=1 << 24, help="values per tensor (default: 16 Mi)")
    parser.add_argument("--only", choices=("optim", "quantiles", "linear"), help="one table alone")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, {args.elements} elements, medians of {SAMPLES}")
    tables = {
        "optim": lambda: bench_optim.compare(args.elements),
        "quantiles": lambda: compare_quantiles(args.elements // 4),
        "linear": bench_linear.compare,
    }
    found = {"torch": torch.__version__, "elements": args.elements}
    for name, table in tables.items():
        if args.only in (None, name):
            found[name] = table()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
