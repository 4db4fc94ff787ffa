"""Independent definition of every optimizer row, in exact fp32 order of operations: it gives bits.

The formulas of docs/NUMERICS.md, typed here once more, one numpy fp32 operation at a time, none fused. Scalars are
double, rounded once. t counts updates from 1.

    g = sigma * gradient, plus wd * p for coupled decay
    p = round(p * decay + factor * u),  decay = 1 - lr wd for decoupled decay

    adam, lamb        m = b1 m + (1 - b1) g;  v = b2 v + ((1 - b2) g) g;  u = m / (sqrt(v) + eps c2);  factor -lr c2/c1
    ademamix          m1 with b1, m2 with b3, v;  u = (m1 / c1 + alpha m2) / (sqrt(v) + eps c2);  factor -lr c2
    momentum, lars    m = g at t = 1, else b1 m + (1 - b2) g (b2: dampening);  u = m, or g + b1 m with nesterov
    lion              u = sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g
    rmsprop, adagrad  v = b1 v + ((1 - b1) g) g, or v + g g;  u = g / (sqrt(v) + eps)

The same rows from the papers, in double and with error bounds: oracle_optim64.py, which shares nothing but Settings.
"""

import math
from dataclasses import dataclass

import numpy as np

import oracle

F32 = np.float32
BLOCK = 256

# Which states of a row may be negative. The states of ademamix are m1, m2, v; the first two share a tensor.
SIGNED = {
    "adam": (True, False),
    "lamb": (True, False),
    "ademamix": (True, True, False),
    "momentum": (True,),
    "lars": (True,),
    "lion": (True,),
    "rmsprop": (False,),
    "adagrad": (False,),
}
ROWS = tuple(SIGNED)


@dataclass(frozen=True)
class Settings:
    """A row and its hyperparameters. beta2 of momentum and lars is the dampening, 0 to be given for none."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    wd: float = 0.0
    sigma: float = 1.0
    skip_zeros: bool = False
    row: str = "adam"
    beta3: float = 0.0
    alpha: float = 0.0
    t_alpha: float = 0.0
    t_beta3: float = 0.0
    nesterov: bool = False
    bias_correction: bool = True
    adam_w_mode: bool = True
    max_unorm: float = 0.0

    @property
    def decoupled(self):
        if self.row in ("adam", "lamb"):
            return self.adam_w_mode
        return self.row in ("ademamix", "lion")

    def corrections(self, step):
        """c1 and c2 of Adam."""
        if not self.bias_correction:
            return 1.0, 1.0
        return 1.0 - self.beta1**step, math.sqrt(1.0 - self.beta2**step)

    def mixing(self, step):
        """alpha and beta3 of AdEMAMix at this step."""
        alpha, beta3 = self.alpha, self.beta3
        if self.t_alpha:
            alpha = min(step * alpha / self.t_alpha, alpha)
        if self.t_beta3:
            ln1, ln3, part = math.log(self.beta1), math.log(beta3), step / self.t_beta3
            beta3 = min(math.exp(ln1 * ln3 / ((1.0 - part) * ln3 + part * ln1)), beta3)
        return alpha, beta3

    def factor(self, step):
        """What u is multiplied by, before trust clipping; and what makes u the size of the paper's update."""
        c1, c2 = self.corrections(step)
        if self.row in ("adam", "lamb"):
            return -self.lr * c2 / c1, c2 / c1
        if self.row == "ademamix":
            return -self.lr * c2, c2
        return -self.lr, 1.0


class State8:
    """Codes and scales of the states of one parameter, one array per state; new state is all zero bytes."""

    def __init__(self, n, map1, map2=None, row="adam"):
        self.signed = SIGNED[row]
        two_tensors = len(self.signed) > 1
        self.maps = [map2 if two_tensors and i == len(self.signed) - 1 else map1 for i in range(len(self.signed))]
        self.codes = [np.zeros(n, np.uint8) for _ in self.signed]
        self.absmax = [np.zeros(-(-n // BLOCK), F32) for _ in self.signed]

    def values(self):
        """The states in fp32."""
        parts = zip(self.codes, self.maps, self.absmax, strict=True)
        return [oracle.dequantize(codes, code, absmax, BLOCK, "f32") for codes, code, absmax in parts]

    def store(self, values):
        for i, value in enumerate(values):
            self.codes[i], self.absmax[i] = requantize(value, self.maps[i], self.signed[i])

    q1 = property(lambda self: self.codes[0])
    a1 = property(lambda self: self.absmax[0])
    q2 = property(lambda self: self.codes[-1])
    a2 = property(lambda self: self.absmax[-1])


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


def advance(p, raw, states, step, s):
    """(new states, u) in fp32, every operation rounded, none fused."""
    b1, rest1 = F32(s.beta1), F32(1.0 - s.beta1)
    b2, rest2 = F32(s.beta2), F32(1.0 - s.beta2)
    g = F32(s.sigma) * raw
    if s.wd > 0 and not s.decoupled:
        g = g + F32(s.wd) * p
    if s.row in ("adam", "lamb", "ademamix"):
        c1, c2 = s.corrections(step)
        v = b2 * states[-1] + (rest2 * g) * g
        root = np.sqrt(v) + F32(s.eps * c2)
        m = b1 * states[0] + rest1 * g
        if s.row != "ademamix":
            return [m, v], m / root
        alpha, beta3 = s.mixing(step)
        slow = F32(beta3) * states[1] + F32(1.0 - beta3) * g
        return [m, slow, v], (m * F32(1.0 / c1) + slow * F32(alpha)) / root
    if s.row in ("momentum", "lars"):
        keep, gain = (F32(0), F32(1)) if step == 1 else (b1, rest2)
        m = keep * states[0] + gain * g
        return [m], (g + m * b1 if s.nesterov else m)
    if s.row == "lion":
        d = b1 * states[0] + rest1 * g
        return [b2 * states[0] + rest2 * g], np.where(np.isnan(d), F32(0), np.sign(d))
    if s.row == "adagrad":
        b1 = rest1 = F32(1)
    v = b1 * states[0] + (rest1 * g) * g
    return [v], g / (np.sqrt(v) + F32(s.eps))


def trust(p, u, counted, step, s):
    """(U, scale): the sum of squares of the counted updates, and what clipping multiplies the step by."""
    size = s.factor(step)[1]
    square = float(np.sum(np.square(u[counted].astype(np.float64)))) * size**2
    norm = float(np.sum(np.square(p.astype(np.float64))))
    limit = s.max_unorm * math.sqrt(norm) + (s.eps if len(SIGNED[s.row]) == 1 else 0.0)
    if s.max_unorm <= 0 or norm == 0 or not math.isfinite(square) or math.sqrt(square) <= limit:
        return square, 1.0
    return square, limit / math.sqrt(square)


def update(p, g, states, step, s, dtype, bits=32):
    """One step from fp32 states: (p, states, U). bits 8: an element whose new state is not finite is lost.

    p and g are fp32 arrays of values of dtype; the states that come back are not yet quantised.
    """
    with np.errstate(all="ignore"):
        new, u = advance(p, g, states, step, s)
        lost = np.zeros(p.shape, bool)
        if bits == 8:
            lost = ~np.all([np.isfinite(x) for x in new], axis=0)
        held = (g == 0) if s.skip_zeros else np.zeros(p.shape, bool)
        square, scale = trust(p, u, ~(lost | held), step, s)
        decay = F32(1.0 - s.lr * s.wd) if s.decoupled else F32(1)
        moved = oracle.rounded(p * decay + F32(s.factor(step)[0] * scale) * u, dtype)
    new = [np.where(held, old, np.where(lost, F32(0), x)) for old, x in zip(states, new, strict=True)]
    return np.where(lost | held, p, moved), new, square


def step8(p, g, state, step, s, dtype):
    """8-bit states, updated in place. Returns p and the states before they are quantised again, one after another."""
    p2, new, _ = update(p, g, state.values(), step, s, dtype, 8)
    state.store(new)
    return p2, *new


def step32(p, g, *rest):
    """step32(p, g, state, ..., step, settings, dtype): returns p and the states, one after another."""
    *states, step, s, dtype = rest
    p2, new, _ = update(p, g, states, step, s, dtype)
    return p2, *new


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
