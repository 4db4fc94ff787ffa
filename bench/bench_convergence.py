"""Do 8-bit states train as well as 32-bit ones? Every family of optimizers, on a small language model and real text.

Trains the demo's model (examples/demo), made smaller, on the demo's text, bytes of the Python standard library: each
family once with 32-bit and once with 8-bit state, from the same start and over the same batches.  min_8bit_size is 0:
every tensor of the model has 8-bit state, norms and biases included.  Prints a Markdown table and writes a plot.
With --twin, each 32-bit run is repeated from a start that differs by a millionth: what chance alone does to a loss.
Usage: python bench/bench_convergence.py [--quick] [--steps N] [--only FAMILY ...] [--twin] [--plot FILE] [--json FILE]
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

import bitsandbytes as bnb

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "demo"))
import corpus
from model import LanguageModel
from report import smooth
from train import loss_of, state_bytes

SEED, THREADS = 20260101, 2
STEPS, QUICK_STEPS, LAST = 600, 40, 50  # LAST: steps whose mean is the final loss
BATCH, LENGTH, HELD_OUT_BATCHES = 12, 64, 24
WIDTH, HEADS, DEPTH = 96, 4, 2
MAX_NORM = 1.0  # gradients are clipped to it, as in the demo
NUDGE = 1e-6  # by which the parameters of a twin start larger
PLOTTED_LOSS = 3.6  # the plot starts here: the first steps say nothing

# Peak learning rates at which the 32-bit form trains well; what is not named is the default of the class.
# AdEMAMix: schedules over the whole run, and a slow average that fits a short one.
FAMILIES = {
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3, "weight_decay": 0.1},
    "AdEMAMix": {"lr": 2e-3, "betas": (0.9, 0.999, 0.999), "alpha": 4.0, "t_alpha": STEPS, "t_beta3": STEPS},
    "Lion": {"lr": 1e-3, "weight_decay": 0.1},
    "LAMB": {"lr": 2e-2, "weight_decay": 0.01},
    "LARS": {"lr": 0.5, "momentum": 0.9},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 5e-4},
    "Adagrad": {"lr": 1e-2},
}


def lr_factor(step, steps):
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def new_model():
    """The model, the same one every time."""
    torch.manual_seed(SEED)
    return LanguageModel(corpus.VOCABULARY, LENGTH, WIDTH, HEADS, DEPTH)


def train(family, bits, pairs, held_out, nudge=0.0):
    """One run over all pairs: its losses (nats per byte), its held-out loss, and the bytes of its state.

    nudge: the parameters start larger by this share of themselves.
    """
    model = new_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + nudge)
    make = getattr(bnb.optim, f"{family}{bits}bit")
    optimizer = make(model.parameters(), min_8bit_size=0, **FAMILIES[family])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, len(pairs)))
    losses, started = [], time.perf_counter()
    for inputs, targets in pairs:
        loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    dtypes = {state["state1"].dtype for state in optimizer.state.values()}
    if dtypes != {torch.uint8 if bits == 8 else torch.float32}:
        raise SystemExit(f"{family}{bits}bit: state has {dtypes}, expected {bits} bits everywhere")
    with torch.no_grad():
        found = statistics.fmean(loss_of(model, inputs, targets).item() for inputs, targets in held_out)
    final = statistics.fmean(losses[-LAST:])
    name = f"{family}{bits}bit" + (", twin" if nudge else "")
    print(f"{name}: {losses[0]:.3f} -> {final:.4f}, {seconds:.1f} s", file=sys.stderr, flush=True)
    return {"losses": losses, "final": final, "held_out": found, "state_bytes": state_bytes(optimizer)[1]}


def table(results):
    """A Markdown table, one row per family. results: {family: {32: run, 8: run}}, each maybe with a run "twin"."""
    head = ["family", "train loss, 32-bit", "8-bit", "8 / 32", "held-out loss, 32-bit", "8-bit", "8 / 32"]
    head += ["state bytes, 32-bit", "8-bit", "8 / 32"]
    with_twin = any("twin" in runs for runs in results.values())
    if with_twin:
        head[4:4], head[8:8] = ["twin / 32"], ["twin / 32"]
    rows = [head, ["---"] * len(head)]
    for family, runs in results.items():
        cells = [family]
        for key in ("final", "held_out"):
            full, small = runs[32][key], runs[8][key]
            cells += [f"{full:.4f}", f"{small:.4f}", f"{small / full:.4f}"]
            cells += [f"{runs['twin'][key] / full:.4f}"] if with_twin else []
        full, small = runs[32]["state_bytes"], runs[8]["state_bytes"]
        rows.append([*cells, f"{full:,}", f"{small:,}", f"{100 * small / full:.2f} %"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(results, path):
    """Write one panel per family, the smoothed losses of both runs in it, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(3, len(results))
    rows = math.ceil(len(results) / columns)
    size = {"figsize": (3.2 * columns, 0.8 + 2.3 * rows), "layout": "constrained"}
    figure, panels = pyplot.subplots(rows, columns, sharex=True, sharey=True, squeeze=False, **size)
    for axes, (family, runs) in zip(panels.flat, results.items(), strict=False):
        for bits, colour, style in ((32, "tab:blue", "-"), (8, "tab:orange", "--")):
            losses = runs[bits]["losses"]
            label = f"{bits}-bit: {runs[bits]['final']:.3f}, {runs[bits]['state_bytes'] / 1024:,.0f} KiB"
            axes.plot(range(1, len(losses) + 1), smooth(losses), color=colour, linestyle=style, label=label)
        axes.set_title(family, fontsize=10)
        axes.legend(fontsize=8, loc="upper right")
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    lowest = min(min(smooth(run["losses"])) for runs in results.values() for run in runs.values())
    panels[0][0].set_ylim(lowest - 0.1, max(PLOTTED_LOSS, lowest + 0.5))
    figure.suptitle("32-bit and 8-bit state, same start and batches: final loss, size of the state", fontsize=11)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("training loss (nats per byte)", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps: shows that it runs, no more")
    parser.add_argument("--steps", type=int, help=f"steps of every run; {STEPS} unless given")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="families to train")
    parser.add_argument("--twin", action="store_true", help="repeat the 32-bit runs from a nudged start")
    parser.add_argument("--plot", type=Path, default=Path("build/convergence.png"), help="file of the plot")
    parser.add_argument("--json", type=Path, help="file for the numbers, losses of all steps included")
    arguments = parser.parse_args()
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else STEPS)

    torch.set_num_threads(THREADS)
    started = time.perf_counter()
    text, held_out = corpus.load()
    pairs = list(corpus.batches(text, steps, BATCH, LENGTH, SEED))
    held_out = list(corpus.batches(held_out, HELD_OUT_BATCHES, BATCH, LENGTH, SEED + 1))
    parameters = sum(p.numel() for p in new_model().parameters())
    print(
        f"bitsandbytes {bnb.__version__}, torch {torch.__version__}, {THREADS} threads; {parameters:,} parameters, "
        f"{steps} steps of {BATCH} x {LENGTH} bytes; train loss: mean of the last {LAST} steps, nats per byte\n"
    )
    results = {}
    for family in arguments.only:
        results[family] = {bits: train(family, bits, pairs, held_out) for bits in (32, 8)}
        if arguments.twin:
            results[family]["twin"] = train(family, 32, pairs, held_out, NUDGE)
    print(table(results))
    plot(results, arguments.plot)
    print(f"\n{time.perf_counter() - started:.0f} s; plot: {arguments.plot}")
    if arguments.json:
        setting = {"torch": torch.__version__, "parameters": parameters, "steps": steps, "families": FAMILIES}
        arguments.json.write_text(json.dumps({**setting, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
