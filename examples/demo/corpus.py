"""The text: the sources of the Python standard library, read as bytes, so that the vocabulary is 256.

Every machine that runs the demo has them. Every tenth file is held out. Batches are random windows; two runs that
start from the same seed see the same batches. Their docstrings are the sentences that the encoder reads.
"""

import ast
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
    paths = _sources(root)
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


def _sources(root):
    return [path for path in sorted(root.rglob("*.py")) if not SKIPPED.intersection(path.relative_to(root).parts)]


def sentences(count, root=None):
    """The first lines of `count` docstrings of modules, 30 to 200 characters each, no two equal; fewer if there are not
    as many."""
    found = {}
    for path in _sources(Path(root or sysconfig.get_path("stdlib"))):
        first = (ast.get_docstring(ast.parse(path.read_bytes())) or "").split("\n\n")[0]
        line = " ".join(first.split())
        if 30 <= len(line) <= 200:
            found[line] = None
        if len(found) == count:
            break
    return list(found)


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
