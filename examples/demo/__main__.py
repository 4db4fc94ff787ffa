"""The demo: train a language model with 32-bit AdamW and with AdamW8bit; quantise a trained encoder to int8 and NF4.

Run by `make demo`. Prints one table for each, writes plots, and exits with 1 if something misses what it promises.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch

import bitsandbytes as bnb
import corpus
import encoder
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


def train_part(arguments):
    """The language model: table, plot, and what report.checks() found."""
    setting = train.Setting(steps=80) if arguments.quick else train.Setting()
    text, held_out = corpus.load()
    print(f"text: the Python standard library, {len(text):,} bytes to train on, {len(held_out):,} held out")

    (name32, make32), (name8, make8), (name_torch, make_torch) = optimizers()
    full = train.run(name32, make32, text, held_out, setting)
    small = train.run(name8, make8, text, held_out, setting)
    reference = train.run(name_torch, make_torch, text, held_out, setting, steps=TIMED_STEPS)

    results = [full, small, reference]
    print("\n" + report.table(results) + "\n")
    report.plot([full, small], arguments.output / "loss.png")
    report.save(results, arguments.output / "results.json")
    return report.checks(full, small)


def encoder_part(arguments):
    """The encoder: table, plot, and what report.encoder_checks() found."""
    try:
        results = encoder.run(*((24, 2) if arguments.quick else (96, 7)))
    except encoder.Missing as error:
        return [(False, f"encoder: not run, {error}")]
    print(f"\nMiniLM, {len(results[0].cosines)} docstrings of the standard library")
    print("\n" + report.encoder_table(results) + "\n")
    report.encoder_plot(results, arguments.output / "encoder.png")
    report.save(results, arguments.output / "encoder.json")
    return report.encoder_checks(results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo"), help="folder of the plots and the numbers")
    parser.add_argument("--quick", action="store_true", help="fewer steps: about a minute")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"bitsandbytes {bnb.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")

    all_passed = True
    for part in (train_part, encoder_part):
        for passed, sentence in part(arguments):
            print("ok    " if passed else "MISSED", sentence, flush=True)
            all_passed = all_passed and passed
    print(f"plots and numbers: {arguments.output}")
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
