"""Independent Adam/AdamW: states in exact fp32 order of operations, parameters in fp32 and in double.

The formulas of docs/NUMERICS.md (rules 20 to 25), typed here once more, one numpy fp32 operation at a time:

    g = sigma * g;  m = b1 * m + (1 - b1) * g;  v = b2 * v + ((1 - b2) * g) * g
    p = round(p * (1 - lr wd) + step_size * (m / (sqrt(v) + eps c2))),  step_size = -lr c2 / c1
"""

import math
from dataclasses import dataclass, field

import numpy as np

import oracle

F32 = np.float32
BLOCK = 256


@dataclass
class Settings:
    """Hyperparameters, with the scalars of one update: double, rounded once."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    wd: float = 0.0
    sigma: float = 1.0
    skip_zeros: bool = False

    def corrections(self, step):
        return 1.0 - self.beta1**step, math.sqrt(1.0 - self.beta2**step)


@dataclass
class State8:
    """Codes and scales of both states, and their maps; new state is all zero bytes."""

    n: int
    map1: np.ndarray
    map2: np.ndarray
    q1: np.ndarray = field(init=False)
    q2: np.ndarray = field(init=False)
    a1: np.ndarray = field(init=False)
    a2: np.ndarray = field(init=False)

    def __post_init__(self):
        blocks = -(-self.n // BLOCK)
        self.q1, self.q2 = np.zeros(self.n, np.uint8), np.zeros(self.n, np.uint8)
        self.a1, self.a2 = np.zeros(blocks, F32), np.zeros(blocks, F32)

    def values(self):
        return (
            oracle.dequantize(self.q1, self.map1, self.a1, BLOCK, "f32"),
            oracle.dequantize(self.q2, self.map2, self.a2, BLOCK, "f32"),
        )


def new_states(g, m, v, s):
    """One update of both moments in fp32, every operation rounded, none fused."""
    b1, b2 = F32(s.beta1), F32(s.beta2)
    with np.errstate(all="ignore"):
        scaled = (F32(s.sigma) * g).astype(F32)
        m2 = (b1 * m + F32(1.0 - s.beta1) * scaled).astype(F32)
        v2 = (b2 * v + (F32(1.0 - s.beta2) * scaled) * scaled).astype(F32)
    return m2, v2


def new_parameter(p, m, v, step, s, dtype):
    """The parameter in fp32 arithmetic, rounded to dtype once."""
    c1, c2 = s.corrections(step)
    with np.errstate(all="ignore"):
        u = F32(-s.lr * c2 / c1) * (m / (np.sqrt(v) + F32(s.eps * c2)))
        return oracle.rounded((p * F32(1.0 - s.lr * s.wd) + u).astype(F32), dtype)


def new_parameter64(p, m, v, step, s):
    """The parameter in double, and the size of what was added, for a bound."""
    c1, c2 = s.corrections(step)
    p, m, v = p.astype(np.float64), m.astype(np.float64), v.astype(np.float64)
    with np.errstate(all="ignore"):
        u = (-s.lr * c2 / c1) * (m / (np.sqrt(v) + s.eps * c2))
    return p * (1.0 - s.lr * s.wd) + u, np.abs(u)


def requantize(value, code, signed):
    """(codes, absmax) of one state. Signed: an entry of the wrong sign moves one index toward the value's sign.

    A zero of either sign has no wrong entry.
    """
    codes, absmax = oracle.quantize8(value, code, BLOCK)
    if signed:
        _, _, dead = oracle.scaled(value, BLOCK)
        down, up = (value < 0) & ~(code[codes] < 0), (value > 0) & (code[codes] < 0)
        move = np.where(dead, 0, up.astype(np.int64) - down)
        codes = np.clip(codes + move, 0, 255).astype(np.uint8)
    return codes, absmax


def step32(p, g, m, v, step, s, dtype):
    """32-bit states. Returns (p, m, v). A NaN or Inf gradient spreads into its own element only."""
    m2, v2 = new_states(g, m, v, s)
    p2 = new_parameter(p, m2, v2, step, s, dtype)
    if s.skip_zeros:
        keep = g == 0
        m2, v2, p2 = np.where(keep, m, m2), np.where(keep, v, v2), np.where(keep, p, p2)
    return p2, m2, v2


def step8(p, g, state, step, s, dtype):
    """8-bit states, updated in place. Returns (p, m, v): p in fp32, m and v before they are quantised again."""
    m, v = state.values()
    m2, v2 = new_states(g, m, v, s)
    p2 = new_parameter(p, m2, v2, step, s, dtype)
    bad = ~np.isfinite(g) | ~np.isfinite(m2) | ~np.isfinite(v2)
    m2, v2, p2 = np.where(bad, F32(0), m2), np.where(bad, F32(0), v2), np.where(bad, p, p2)
    if s.skip_zeros:
        keep = g == 0
        m2, v2, p2 = np.where(keep, m, m2), np.where(keep, v, v2), np.where(keep, p, p2)
    state.q1, state.a1 = requantize(m2, state.map1, signed=True)
    state.q2, state.a2 = requantize(v2, state.map2, signed=False)
    return p2, m2, v2


def ulps(a, b, dtype):
    """Distance of two value arrays in steps of dtype, as int64; NaN against NaN is 0."""

    def ordered(x):
        if dtype == "f32":
            bits, width = x.astype(F32).view(np.uint32).astype(np.int64), 31
        elif dtype == "f16":
            bits, width = x.astype(np.float16).view(np.uint16).astype(np.int64), 15
        else:
            bits, width = oracle.bf16_bits(x).astype(np.int64), 15
        magnitude = bits & ((1 << width) - 1)
        return np.where(bits >> width, -magnitude, magnitude)

    return np.where(np.isnan(a) & np.isnan(b), 0, np.abs(ordered(a) - ordered(b)))
