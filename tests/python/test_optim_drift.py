"""A thousand steps of a small real model: the loss under each 8-bit optimizer stays within 2 % of its 32-bit form.

The task is that of examples/demo, made small: predict the next byte of the Python standard library from the sixteen
before it. Both runs of a pair see the same start and the same batches; every parameter has 8-bit state in one of them.
"""

import statistics
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as tnf

import bitsandbytes.optim as optim

STEPS, LAST = 1000, 100
BATCH, CONTEXT, WIDTH, HIDDEN = 64, 16, 24, 64
GAP = 0.02
FILES = ("argparse.py", "ast.py", "datetime.py", "doctest.py", "inspect.py", "tarfile.py", "typing.py", "zipfile.py")

# Learning rates at which the 32-bit form trains well; the rest as the classes have it, but for decay.
RUNS = {
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3, "weight_decay": 0.1},
    "AdEMAMix": {"lr": 2e-3, "betas": (0.9, 0.999, 0.999), "alpha": 2.0, "t_alpha": STEPS, "t_beta3": STEPS},
    "Lion": {"lr": 5e-4, "weight_decay": 0.1},
    "LAMB": {"lr": 1e-2, "weight_decay": 0.01},
    "LARS": {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4},
    "SGD": {"lr": 0.2, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "RMSprop": {"lr": 1e-3},
    "Adagrad": {"lr": 2e-2},
}


class Model(nn.Module):
    """bytes int64 [batch, CONTEXT] -> logits f32 [batch, 256]."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.hidden = nn.Linear(CONTEXT * WIDTH, HIDDEN)
        self.out = nn.Linear(HIDDEN, 256)
        nn.init.normal_(self.bytes.weight, std=0.3)

    def forward(self, x):
        return self.out(tnf.relu(self.hidden(self.bytes(x).flatten(1))))


@pytest.fixture(scope="module")
def batches():
    """STEPS pairs (bytes int64 [BATCH, CONTEXT], next byte int64 [BATCH])."""
    library = Path(sysconfig.get_path("stdlib"))
    text = b"\n".join((library / name).read_bytes() for name in FILES if (library / name).exists())
    assert len(text) > 200_000
    data = torch.from_numpy(np.frombuffer(text, np.uint8).copy())
    start = torch.randint(len(data) - CONTEXT - 1, (STEPS, BATCH, 1), generator=torch.Generator().manual_seed(1))
    windows = data[start + torch.arange(CONTEXT + 1)].long()
    return [(window[:, :-1], window[:, -1]) for window in windows]


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def losses(batches, make):
    torch.manual_seed(0)
    model = Model()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 50) * (1 - 0.9 * t / STEPS))
    found = []
    for x, y in batches:
        loss = tnf.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        found.append(loss.item())
    return found, optimizer


def bits_of(optimizer):
    return {state["state1"].dtype for state in optimizer.state.values()}


@pytest.mark.parametrize("family", RUNS)
def test_eight_bits_train_as_well_as_32(batches, family):
    options = RUNS[family]
    full, optimizer = losses(batches, lambda p: getattr(optim, family + "32bit")(p, **options))
    assert bits_of(optimizer) == {torch.float32}
    small, optimizer = losses(batches, lambda p: getattr(optim, family + "8bit")(p, min_8bit_size=0, **options))
    assert bits_of(optimizer) == {torch.uint8}
    end, end8 = statistics.fmean(full[-LAST:]), statistics.fmean(small[-LAST:])
    assert end < 0.55 * full[0], f"{family}: the 32-bit run itself must learn: {full[0]:.3f} -> {end:.3f}"
    assert abs(end8 / end - 1) <= GAP, f"{family}: final loss {end8:.4f} with 8-bit state, {end:.4f} with 32-bit state"
