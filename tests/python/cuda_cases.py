"""What the tests on CUDA share: the device, values of every kind, equality of bits, distance in last places."""

import hashlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import bitsandbytes as bnb
import oracle
import oracle_optim as ref

DEVICE = torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")

KINDS = ("normal", "wide", "zero", "subnormal", "special")
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def values(n, dtype, kind="normal", seed=0):
    """CPU tensor [n] of the dtype ("f32", "f16", "bf16"). special: NaN, infinities, zeros of both signs."""
    rng = np.random.default_rng(seed * 7919 + n)
    x = rng.standard_normal(n)
    if kind == "wide":
        x = x * 2.0 ** rng.integers(-30, 30, n)
    elif kind == "zero":
        x = np.where(x < 0, -0.0, 0.0)
    elif kind == "subnormal":
        x = x * (1e-40 if dtype != "f16" else 1e-6)
    elif kind == "special":
        for value in (np.nan, np.inf, -np.inf, 0.0, -0.0):
            if n > 0:
                x[rng.random(n) < 0.01] = value
                x[rng.integers(n)] = value
    with np.errstate(over="ignore"):
        return oracle.to_torch(x.astype(np.float32), dtype)


def on_device(t):
    """A copy on the device, with the same strides."""
    return torch.empty_like(t, device=DEVICE, memory_format=torch.preserve_format).copy_(t)


def check_same(got, expected, what=""):
    """Same dtype, shape and bits; NaN equals any NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, (what, got.dtype, got.shape, expected.shape)
    a, b = got.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if a.numel() == 0:
        return
    integer = _INTEGER[a.element_size()]
    one, two = a.reshape(-1).view(integer), b.reshape(-1).view(integer)
    if torch.equal(one, two):
        return
    unequal = one != two
    if a.dtype.is_floating_point:
        unequal &= ~(a.reshape(-1).isnan() & b.reshape(-1).isnan())
    at = unequal.nonzero().flatten()
    a, b = a.reshape(-1), b.reshape(-1)
    shown = [(int(i), a[i].item(), b[i].item()) for i in at[:5]]
    assert at.numel() == 0, (what, f"{at.numel()} of {a.numel()} differ: (place, got, expected)", shown)


def check_parameter(got, expected, before, dtype, what=""):
    """f32: the same bits. 16-bit: NUMERICS rule 22, one unit in the last place.

    Where old value and update nearly cancel, that is a unit of what was subtracted: the root and the quotient behind
    the update have relative errors up to 2^-20, and a bf16 result may be smaller than that by any factor.
    """
    if dtype == "f32":
        check_same(got, expected, what)
        return
    assert got.dtype == expected.dtype and got.shape == expected.shape, (what, got.shape, expected.shape)
    a, b, old = (oracle.from_torch(t.detach().cpu()).ravel() for t in (got, expected, before))
    with np.errstate(invalid="ignore"):
        cancelled = np.abs(a - b) <= 2.0**-20 * (np.abs(old) + np.abs(b))
    at = np.flatnonzero((ref.ulps(a, b, dtype) > 1) & ~cancelled)
    shown = [(int(i), old[i], a[i], b[i]) for i in at[:5]]
    assert at.size == 0, (what, f"{at.size} of {a.size} beyond one ulp: (place, before, got, expected)", shown)


def digest(*tensors):
    """One hash of the bytes of all tensors."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def python(*arguments, **environment):
    """Run the interpreter on this package and these helpers. Returns (exit status, stdout, stderr)."""
    folders = [pathlib.Path(bnb.__file__).parents[1], pathlib.Path(__file__).parent]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    run = [sys.executable, *arguments]
    done = subprocess.run(run, capture_output=True, text=True, env=env, check=False, timeout=300)
    return done.returncode, done.stdout, done.stderr


def host(value):
    return value.cpu() if isinstance(value, torch.Tensor) else value


def f32_slack(terms):
    """f32 sums of so many products, the weight's own rounding, and a bias."""
    return (terms + 3) * 2.0**-24
