"""What the demo shows: one table and one plot for each part, and the promises that it checks."""

import json
import math
import statistics
from dataclasses import asdict

from train import LAST

MAX_LOSS_GAP = 0.02  # between AdamW8bit's final loss and 32-bit AdamW's, as a share of the latter
MAX_STATE_RATIO = 0.26  # and its state, over parameters of at least 4096 elements
MIN_FALL = 0.40  # share of the first loss that must be gone at the end

MIN_COSINE = {"LLM.int8()": 0.99, "NF4, nested": 0.95}  # of the worst sentence
MAX_WEIGHTS = {"LLM.int8()": 0.26, "NF4, nested": 0.135}  # of float32's bytes: 8 and 4.127 of 32 bits, and tables

HEADER = ("optimizer", "train loss", "held-out loss", "state, large", "state, all", "optimizer", "training")
UNITS = ("", f"nats, last {LAST}", "nats", "KiB", "KiB", "ms/step", "ms/step")
ENCODER_HEADER = ("linear layers", "cosine", "cosine", "weights", "weights", "one sentence", "batches")
ENCODER_UNITS = ("", "mean", "worst", "KiB", "of float32", "ms", "us/token")


def table(results):
    """The results as aligned text, one row each; a run that was only timed has no losses."""
    rows = [HEADER, UNITS]
    for r in results:
        timed_only = math.isnan(r.held_out)
        rows.append(
            (
                r.name,
                "-" if timed_only else f"{r.final:.4f}",
                "-" if timed_only else f"{r.held_out:.4f}",
                f"{r.large_state / 1024:.1f}",
                f"{r.state / 1024:.1f}",
                f"{r.optimizer_time * 1e3:.2f}",
                f"{r.step_time * 1e3:.1f}",
            )
        )
    return _aligned(rows)


def encoder_table(results):
    """The same for the forms of the encoder."""
    rows = [ENCODER_HEADER, ENCODER_UNITS]
    for r in results:
        rows.append(
            (
                r.name,
                f"{r.mean:.4f}",
                f"{r.worst:.4f}",
                f"{r.weights / 1024:.0f}",
                f"{r.weights / results[0].weights:.1%}",
                f"{statistics.median(r.sentence_times) * 1e3:.2f}",
                f"{statistics.median(r.token_times) * 1e6:.0f}",
            )
        )
    return _aligned(rows)


def _aligned(rows):
    """Rows of texts, the first two of which are the head, as one text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"{row[0]:<{widths[0]}}" + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


def checks(full, small):
    """[(passed, sentence)] for the 32-bit run `full` and the 8-bit run `small`."""
    loss, state = small.final / full.final, small.large_state / full.large_state
    found = []
    for r in (full, small):
        fall = 1 - r.final / r.losses[0]
        found.append((fall >= MIN_FALL, f"{r.name}: loss fell by {fall:.1%} (at least {MIN_FALL:.0%})"))
    found.append((abs(loss - 1) <= MAX_LOSS_GAP, f"8-bit / 32-bit final loss: {loss:.4f} (within {MAX_LOSS_GAP:.0%})"))
    found.append((state <= MAX_STATE_RATIO, f"8-bit / 32-bit state: {state:.2%} (at most {MAX_STATE_RATIO:.0%})"))
    return found


def encoder_checks(results):
    """[(passed, sentence)] for the forms of the encoder; the first is float32."""
    found = []
    for r in results[1:]:
        least, share, most = MIN_COSINE[r.name], r.weights / results[0].weights, MAX_WEIGHTS[r.name]
        text = f"{r.name}: cosine to float32 {r.mean:.4f}, worst {r.worst:.4f} of {len(r.cosines)} (at least {least})"
        found.append((r.worst >= least, text))
        found.append((share <= most, f"{r.name}: weights {share:.2%} of float32's (at most {most:.1%})"))
    return found


def smooth(values, weight=0.9):
    """Exponential mean with the bias of its start divided out (as Adam does)."""
    out, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        out.append(mean / (1 - weight**i))
    return out


def plot(results, path):
    """Write both loss curves and, below, their relative difference as a PNG."""
    pyplot = _pyplot()
    full, small = results
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6.5), height_ratios=(3, 1), layout="constrained"
    )
    steps = range(1, len(full.losses) + 1)
    for r, colour, style in ((full, "tab:blue", "-"), (small, "tab:orange", "--")):
        top.plot(steps, r.losses, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{r.name}: {r.final:.3f} at the end, state {r.state / 2**20:.1f} MiB"
        top.plot(steps, smooth(r.losses), color=colour, linestyle=style, label=label)
    top.set(
        ylabel="training loss (nats per byte)",
        title="Language model on Python's standard library: same seed, same batches",
    )
    top.legend()
    gap = [100 * (b / a - 1) for a, b in zip(smooth(full.losses), smooth(small.losses), strict=True)]
    bottom.plot(steps, gap, color="tab:gray")
    bottom.axhline(0, color="black", linewidth=0.6)
    bottom.set(xlabel="step", ylabel="8-bit against\n32-bit (%)")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def encoder_plot(results, path):
    """Write, side by side, each sentence's cosine to float32 and the bytes of the weights, as a PNG."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), width_ratios=(2, 1), layout="constrained")
    colours = ("tab:gray", "tab:blue", "tab:orange")
    for r, colour in list(zip(results, colours, strict=True))[1:]:
        left.plot(sorted(r.cosines), color=colour, label=f"{r.name}: mean {r.mean:.4f}, worst {r.worst:.4f}")
        left.axhline(MIN_COSINE[r.name], color=colour, linestyle=":", linewidth=0.9)
    left.set(
        xlabel="sentence, from the worst (dotted: required)", ylabel="cosine to float32", title="MiniLM embeddings"
    )
    left.legend()
    bars = right.bar([r.name for r in results], [r.weights / 2**20 for r in results], color=colours)
    right.bar_label(bars, fmt="%.1f")
    right.set(ylabel="MiB", title="weights of the linear layers")
    right.margins(y=0.12)
    left.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(results, path):
    """Write the numbers behind a table as JSON."""
    path.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
