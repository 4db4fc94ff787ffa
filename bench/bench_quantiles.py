"""256 exact quantiles on CUDA: ms, share of one read at the copy rate of the same run, and torch.sort beside it.

Times are those of a graph that is replayed, so the host has no part in them.  From 2^24 f32 on the data is larger than
the cache.  --kernels also lists the time of every kernel.
Usage: python bench/bench_quantiles.py [--log2 26 ...] [--dtype f32 ...] [--data normal ...] [--kernels]
"""

import argparse
import statistics

import torch

from bitsandbytes import functional as F

SAMPLES, REPEATS = 15, 10
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DATA = {
    "normal": lambda z, u: z,
    "laplace": lambda z, u: (u - 0.5).sign() * (1 - 2 * (u - 0.5).abs()).clamp_min(1e-7).log(),
    "uniform": lambda z, u: u,
    "90% zeros": lambda z, u: torch.where(u < 0.9, 0.0, z),
    "all equal": lambda z, u: torch.full_like(z, 1.2345),
    "two values": lambda z, u: torch.where(u < 0.3, -2.5, 7.0),
    "sorted": lambda z, u: z.sort().values,
    "near one": lambda z, u: 1 + 0.01 * z,
    "bf16 values": lambda z, u: z.bfloat16().float(),
    "any bits": lambda z, u: (u * 2.0**32 - 2.0**31).to(torch.int32).view(torch.float32),
}


def graph_ms(run):
    """Median milliseconds of one call of run(), replayed REPEATS times in a graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    graph.replay()
    samples = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / REPEATS)
    return statistics.median(samples)


def call_ms(run):
    """Median milliseconds of one call of run(), which may not be captured."""
    run()
    samples = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def copy_rate():
    """Bytes per second, read and written, of a copy of 1 GiB."""
    x = torch.empty(1 << 28, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / (graph_ms(lambda: y.copy_(x)) * 1e-3)


def kernel_times(x):
    """Print the microseconds of each kernel of one call."""
    for _ in range(3):
        F.estimate_quantiles(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPEATS):
            F.estimate_quantiles(x)
        torch.cuda.synchronize()
    for row in sorted(profile.key_averages(), key=lambda r: -r.device_time_total):
        if row.device_time_total > 0:
            print(f"    {row.device_time_total / REPEATS:9.1f} us  {row.count // REPEATS} x {row.key}")


def main():
    """Print one line for each size, dtype and kind of data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log2", type=int, nargs="+", default=[20, 24, 26, 28], help="log2 of the number of values")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["f32", "bf16"])
    parser.add_argument("--data", nargs="+", choices=sorted(DATA), default=list(DATA))
    parser.add_argument("--kernels", action="store_true", help="the time of every kernel too")
    args = parser.parse_args()
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate * 1e-9:.0f} GB/s")
    print(f"{'data':12} {'dtype':5} {'n':>5} {'ms':>8} {'one read':>9} {'share':>6} {'torch.sort':>10} {'ratio':>6}")
    for log2 in args.log2:
        g = torch.Generator("cuda").manual_seed(1)
        z = torch.randn(1 << log2, generator=g, device="cuda")
        u = torch.rand(1 << log2, generator=g, device="cuda")
        for kind in args.data:
            for dtype in args.dtype:
                x = DATA[kind](z, u).to(DTYPES[dtype])
                ms, floor = graph_ms(lambda x=x: F.estimate_quantiles(x)), x.nbytes / rate * 1e3
                sort = call_ms(lambda x=x: torch.sort(x))
                print(
                    f"{kind:12} {dtype:5} {f'2^{log2}':>5} {ms:8.4f} {floor:9.4f} {floor / ms:6.1%} "
                    f"{sort:10.4f} {sort / ms:6.2f}",
                    flush=True,
                )
                if args.kernels:
                    kernel_times(x)


if __name__ == "__main__":
    main()
