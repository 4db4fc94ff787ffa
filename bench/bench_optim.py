"""Optimizer steps: every family beside torch's fused AdamW, and many small tensors beside one of the same size.

The C part (bnb_bench) times the kernels alone; this is what a training loop pays.  Run by bench_torch.py.
"""

import statistics
import time

import torch

from bitsandbytes import optim

SAMPLES = 15
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16"}
FAMILIES = {
    "AdamW": {"lr": 1e-5},
    "AdEMAMix": {"lr": 1e-5},
    "LAMB": {"lr": 1e-5},
    "LARS": {"lr": 1e-5, "momentum": 0.9},
    "SGD": {"lr": 1e-5, "momentum": 0.9},
    "Lion": {"lr": 1e-5},
    "RMSprop": {"lr": 1e-5},
    "Adagrad": {"lr": 1e-5},
}
# Name, and the elements of each tensor.  4096 is the smallest tensor with 8-bit state.
MODELS = {
    "1000 x 4 Ki": [4096] * 1000,
    "1000 x 16 Ki": [16384] * 1000,
    "500 x 768^2, 768": [768 * 768, 768] * 500,
}


def median_seconds(run):
    """Median seconds of one call of run() over SAMPLES samples of at least 5 ms each, after a warm-up of two calls."""
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


def parameters(sizes, dtype):
    """Parameters of these numbers of elements, with gradients."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for elements in sizes:
        p = torch.nn.Parameter(torch.randn(elements, generator=generator).to(dtype))
        p.grad = (0.01 * torch.randn(elements, generator=generator)).to(dtype)
        result.append(p)
    return result


def fused_adamw(params):
    """torch's AdamW, all tensors of a dtype in one kernel call."""
    return torch.optim.AdamW(params, lr=1e-5, fused=True)


def family_rows(elements, dtype):
    """One row per family and precision of state: ns per parameter of ours, and of torch's fused AdamW."""
    torch_ns = median_seconds(fused_adamw(parameters([elements], dtype)).step) / elements * 1e9
    for family, arguments in FAMILIES.items():
        for bits in (8, 32):
            optimizer = getattr(optim, f"{family}{bits}bit")(parameters([elements], dtype), **arguments)
            ns = median_seconds(optimizer.step) / elements * 1e9
            yield {"optimizer": family, "bits": bits, "ns": ns, "torch_ns": torch_ns}


def model_rows():
    """Many small f32 tensors against one of the same total size: ms per step of each."""
    for model, sizes in MODELS.items():
        for name, make in (("AdamW8bit", optim.AdamW8bit), ("AdamW32bit", optim.AdamW32bit), ("torch", fused_adamw)):
            many = median_seconds(make(parameters(sizes, torch.float32)).step) * 1e3
            one = median_seconds(make(parameters([sum(sizes)], torch.float32)).step) * 1e3
            yield {"optimizer": name, "model": model, "many_ms": many, "one_ms": one}


def compare(elements):
    """Print both tables; their rows as dictionaries."""
    found = {"families": [], "models": []}
    print(
        f"{'optimizer':12} {'bits':>4} {'dtype':6} {'threads':>7} {'ns/param':>8} {'AdamW of torch':>14} {'ratio':>6}"
    )
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype, short in SHORT.items():
            for row in family_rows(elements, dtype):
                found["families"].append(row | {"dtype": short, "threads": threads})
                print(
                    f"{row['optimizer']:12} {row['bits']:4} {short:6} {threads:7} {row['ns']:8.3f} "
                    f"{row['torch_ns']:14.3f} {row['torch_ns'] / row['ns']:6.2f}",
                    flush=True,
                )
    print(f"{'optimizer':12} {'tensors':>16} {'threads':>7} {'ms/step':>8} {'as one tensor':>13} {'ratio':>6}")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for row in model_rows():
            found["models"].append(row | {"threads": threads})
            print(
                f"{row['optimizer']:12} {row['model']:>16} {threads:7} {row['many_ms']:8.2f} "
                f"{row['one_ms']:13.2f} {row['many_ms'] / row['one_ms']:6.2f}",
                flush=True,
            )
    return found
