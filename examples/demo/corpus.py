"""The text: the sources of the Python standard library, read as bytes, so that the vocabulary is 256.

Every machine that runs the demo has them. Every tenth file is held out. Batches are random windows; two runs that
start from the same seed see the same batches.
"""

import sysconfig
from pathlib import Path

import numpy as np
import torch

VOCABULARY = 256
MAX_BYTES = 12_000_000
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def load(root=None):
    """(training text, held-out text): uint8 tensors. root: a folder of .py files, else the standard library."""
    root = Path(root or sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not SKIPPED.intersection(path.relative_to(root).parts)]
    train, held_out, total = [], [], 0
    for i, path in enumerate(paths):
        data = path.read_bytes()
        total += len(data)
        (held_out if i % 10 == 9 else train).append(data)
        if total > MAX_BYTES:
            break
    if len(held_out) == 0 or total < 1_000_000:
        raise SystemExit(f"{root}: {total} bytes of Python sources in {len(paths)} files, expected a megabyte or more")
    return _tensor(train), _tensor(held_out)


def _tensor(parts):
    return torch.from_numpy(np.frombuffer(b"\n".join(parts), dtype=np.uint8).copy())


def batches(text, count, size, length, seed):
    """Yields `count` pairs (inputs, targets), int64 [size, length]; targets are the inputs one byte later."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(length + 1)
    for _ in range(count):
        start = torch.randint(len(text) - length - 1, (size, 1), generator=generator)
        piece = text[start + window].long()
        yield piece[:, :-1], piece[:, 1:]
