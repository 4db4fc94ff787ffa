"""Every optimizer row from the equations of its paper, in double, with a bound on what fp32 may lose.

Written from the papers, in their notation, and without a line of oracle_optim.py: hats for corrected averages,
(1 - lr wd) p - lr update for decoupled decay, g + wd p for coupled.

    Adam      Kingma & Ba 2015; AdamW: Loshchilov & Hutter 2019
    AdEMAMix  Pagliardini et al. 2024
    Lion      Chen et al. 2023
    momentum  Sutskever et al. 2013, with dampening and Nesterov's form as PyTorch writes them
    RMSprop   Hinton 2012, not centred;  Adagrad: Duchi et al. 2011
    LAMB and LARS are Adam and momentum with the update clipped at max_unorm times the norm of the parameter.
"""

import math

import numpy as np

EPS = 2.0**-24  # relative error of one fp32 operation
TINY = 2.0**-149
MAX = float(np.finfo(np.float32).max)


class Num:
    """A double (scalar or array) and a first-order bound of its error when every operation is done in fp32."""

    __array_ufunc__ = None  # numpy arrays leave the arithmetic to this class
    __slots__ = ("error", "value")

    def __init__(self, value, error=None):
        self.value = value
        self.error = EPS * np.abs(value) if error is None else error

    def __add__(self, other):
        other = num(other)
        value = self.value + other.value
        return Num(value, self.error + other.error + EPS * np.abs(value))

    def __sub__(self, other):
        return self + -num(other)

    def __rsub__(self, other):
        return num(other) - self

    def __neg__(self):
        return Num(-self.value, self.error)

    def __mul__(self, other):
        other = num(other)
        value = self.value * other.value
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error
        return Num(value, error + EPS * np.abs(value) + TINY)

    def __truediv__(self, other):
        other = num(other)
        value = self.value / other.value
        error = (self.error + np.abs(value) * other.error) / np.abs(other.value)
        return Num(value, error + EPS * np.abs(value) + TINY)

    __radd__, __rmul__ = __add__, __mul__

    def sqrt(self):
        value = np.sqrt(self.value)
        return Num(value, value - np.sqrt(np.maximum(self.value - self.error, 0)) + EPS * value)

    def sign(self):
        """0 for 0 and NaN. Where the sign is within rounding of the other one, the error is 2."""
        value = np.where(np.isnan(self.value), 0.0, np.sign(self.value))
        return Num(value, np.where(np.abs(self.value) > self.error, 0.0, np.where(self.error > 0, 2.0, 0.0)))


def num(x):
    return x if isinstance(x, Num) else Num(x)


def direction(p, gradient, states, t, s):
    """(new states, update) as Num: what the papers call the step, without learning rate and decoupled decay."""
    p, old = Num(p, 0.0), [Num(x) for x in states]  # a dequantised state has been rounded once
    g = Num(gradient, 0.0) * s.sigma
    if s.wd and not (s.row in ("ademamix", "lion") or (s.row in ("adam", "lamb") and s.adam_w_mode)):
        g = g + s.wd * p
    if s.row in ("adam", "lamb"):
        return _adam(g, *old, t, s)
    if s.row == "ademamix":
        return _ademamix(g, *old, t, s)
    if s.row in ("momentum", "lars"):
        buffer = g if t == 1 else s.beta1 * old[0] + (1 - s.beta2) * g
        return [buffer], (g + s.beta1 * buffer if s.nesterov else buffer)
    if s.row == "lion":
        return [s.beta2 * old[0] + (1 - s.beta2) * g], (s.beta1 * old[0] + (1 - s.beta1) * g).sign()
    if s.row == "rmsprop":
        mean = s.beta1 * old[0] + (1 - s.beta1) * (g * g)
        return [mean], g / (mean.sqrt() + s.eps)
    total = old[0] + g * g
    return [total], g / (total.sqrt() + s.eps)


def _adam(g, m, v, t, s):
    m = s.beta1 * m + (1 - s.beta1) * g
    v = s.beta2 * v + (1 - s.beta2) * (g * g)
    if not s.bias_correction:
        return [m, v], m / (v.sqrt() + s.eps)
    m_hat, v_hat = m / (1 - s.beta1**t), v / (1 - s.beta2**t)
    return [m, v], m_hat / (v_hat.sqrt() + s.eps)


def _ademamix(g, m1, m2, v, t, s):
    alpha, beta3 = s.alpha, s.beta3
    if s.t_alpha:
        alpha = min(t * s.alpha / s.t_alpha, s.alpha)
    if s.t_beta3:
        log1, log3 = math.log(s.beta1), math.log(s.beta3)
        beta3 = min(math.exp(log1 * log3 / ((1 - t / s.t_beta3) * log3 + t / s.t_beta3 * log1)), s.beta3)
    m1 = s.beta1 * m1 + (1 - s.beta1) * g
    m2 = beta3 * m2 + (1 - beta3) * g
    v = s.beta2 * v + (1 - s.beta2) * (g * g)
    c1, c2 = (1 - s.beta1**t, 1 - s.beta2**t) if s.bias_correction else (1, 1)
    m1_hat, v_hat = m1 / c1, v / c2
    return [m1, m2, v], (m1_hat + alpha * m2) / (v_hat.sqrt() + s.eps)


class Trust:
    """Trust clipping of one parameter: add() its pieces, then scale is what the update is multiplied by.

    square, square_error  U, the sum of squares of the updates, and its error;  norm  the sum of squares of p
    """

    def __init__(self, s):
        self.s, self.square, self.square_error, self.norm = s, 0.0, 0.0, 0.0

    def add(self, p, gradient, states, t, bits):
        new, u = direction(p, gradient, states, t, self.s)
        counted = ~(lost(new, bits) | held(gradient, self.s))
        value, error = u.value[counted], u.error[counted]
        self.square += float(np.sum(value * value))
        self.square_error += float(np.sum(error * (2 * np.abs(value) + error))) + EPS * float(np.sum(value * value))
        self.norm += float(np.sum(p * p))

    @property
    def scale(self):
        size = math.sqrt(self.square) if math.isfinite(self.square) else math.inf
        limit = self.s.max_unorm * math.sqrt(self.norm)
        if self.s.row not in ("adam", "lamb", "ademamix"):
            limit += self.s.eps
        if self.norm == 0 or not math.isfinite(size) or size <= limit:
            return Num(1.0, 0.0)
        return Num(limit / size, limit / size * (0.5 * self.square_error / self.square + 2 * EPS))


def lost(new, bits):
    """8-bit state: elements with a new state that fp32 cannot hold."""
    if bits == 32:
        return np.zeros(new[0].value.shape, bool)
    return ~np.all([np.abs(x.value) <= MAX for x in new], axis=0)


def held(gradient, s):
    return (gradient == 0) if s.skip_zeros else np.zeros(gradient.shape, bool)


def step(p, gradient, states, t, s, bits=32, scale=None):
    """One update of double arrays. Returns (p, states) as Num, p not rounded to a dtype.

    scale: of a Trust over the whole parameter, if this is a piece of one; else it is found here when max_unorm > 0.
    """
    with np.errstate(all="ignore"):
        if scale is None and s.max_unorm > 0:
            trust = Trust(s)
            trust.add(p, gradient, states, t, bits)
            scale = trust.scale
        new, u = direction(p, gradient, states, t, s)
        change = s.lr * (u if scale is None else scale * u)
        decoupled = s.row in ("ademamix", "lion") or (s.row in ("adam", "lamb") and s.adam_w_mode)
        moved = (1 - s.lr * s.wd if decoupled else Num(1.0, 0.0)) * Num(p, 0.0) - change
        gone, kept = lost(new, bits), held(gradient, s)
        zero = Num(0.0)
        new = [_choose(kept, Num(old), _choose(gone, zero, x)) for old, x in zip(states, new, strict=True)]
        return _choose(gone | kept, Num(p, 0.0), moved), new


def _choose(where, one, other):
    if not where.any():
        return other
    return Num(np.where(where, one.value, other.value), np.where(where, one.error, other.error))
