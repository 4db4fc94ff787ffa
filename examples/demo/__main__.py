"""The demo: train a small language model on real text with 32-bit AdamW and with AdamW8bit, and compare.

Run by `make demo`. Prints one table, writes a plot, and exits with 1 if AdamW8bit misses what it promises.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

import bitsandbytes as bnb
import corpus
import report
import train

TIMED_STEPS = 60


def optimizers():
    """(name, constructor) of the runs; the last is only timed."""
    return (
        ("AdamW, 32-bit", functools.partial(bnb.optim.AdamW, optim_bits=32)),
        ("AdamW8bit", bnb.optim.AdamW8bit),
        ("torch AdamW, fused", functools.partial(torch.optim.AdamW, fused=True)),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder of the plot and the numbers")
    parser.add_argument("--quick", action="store_true", help="fewer steps: about a minute")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    setting = train.Setting(steps=80) if arguments.quick else train.Setting()
    text, held_out = corpus.load()
    print(f"text: the Python standard library, {len(text):,} bytes to train on, {len(held_out):,} held out")
    print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    (name32, make32), (name8, make8), (name_torch, make_torch) = optimizers()
    full = train.run(name32, make32, text, held_out, setting)
    small = train.run(name8, make8, text, held_out, setting)
    reference = train.run(name_torch, make_torch, text, held_out, setting, steps=TIMED_STEPS)

    results = [full, small, reference]
    print("\n" + report.table(results) + "\n")
    report.plot([full, small], arguments.output / "loss.png")
    report.save(results, arguments.output)
    found = report.checks(full, small)
    for passed, sentence in found:
        print("ok    " if passed else "MISSED", sentence)
    print(f"plot: {arguments.output / 'loss.png'}")
    return 0 if all(passed for passed, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
