"""What the optimizer tests share: every public class with its row, data, and the comparison with the two oracles."""

from dataclasses import replace

import numpy as np
import torch

import bitsandbytes.functional as F
import bitsandbytes.optim as optim
import oracle
import oracle_optim as ref
import oracle_optim64 as exact

CHUNK = 1 << 15  # elements that are compared at a time: they stay in the second-level cache

# Hyperparameters of the acceptance tests, by family: every one has weight decay.
FAMILY = {
    "Adam": ref.Settings(row="adam", lr=1e-3, wd=0.1),
    "AdamW": ref.Settings(row="adam", lr=2e-3, beta1=0.8, beta2=0.99, wd=0.05),
    "AdEMAMix": ref.Settings(row="ademamix", lr=1e-3, beta3=0.9999, alpha=5.0, wd=0.1),
    "Lion": ref.Settings(row="lion", lr=1e-3, beta2=0.99, eps=0.0, wd=0.1),
    "LAMB": ref.Settings(row="lamb", lr=1e-2, wd=0.1, max_unorm=1.0),
    "LARS": ref.Settings(row="lars", lr=0.1, beta2=0.1, eps=0.0, wd=0.01, max_unorm=0.02),
    "SGD": ref.Settings(row="momentum", lr=0.1, beta2=0.1, eps=0.0, wd=0.01),
    "RMSprop": ref.Settings(row="rmsprop", lr=1e-3, beta1=0.99, beta2=0.0, wd=0.01),
    "Adagrad": ref.Settings(row="adagrad", lr=1e-2, beta1=0.0, beta2=0.0, eps=1e-10, wd=0.01),
}
PAGED = ("Adam", "AdamW", "AdEMAMix", "Lion")
BOTH = [(family, bits) for family in FAMILY for bits in (8, 32)]


def class_names():
    """{class: family} of every class over the table of rows."""
    ends = ("", "8bit", "32bit")
    names = {prefix + family + end: family for family in PAGED for prefix in ("", "Paged") for end in ends}
    return names | {family + end: family for family in FAMILY if family not in PAGED for end in ends}


def class_bits():
    """(class, bits of its state) in every combination that exists."""
    for name in class_names():
        forced = [bits for bits in (8, 32) if name.endswith(f"{bits}bit")]
        for bits in forced or (8, 32):
            yield name, bits


def build(name, params, s, bits=32, **options):
    """The class `name` with the hyperparameters s, through its own arguments; the rest travels in the group dict.

    min_8bit_size is 0, so that bits alone decides. options: further keyword arguments.
    """
    family, cls = class_names()[name], getattr(optim, name)
    group = {"params": list(params)}
    keywords = {"lr": s.lr, "weight_decay": s.wd, "min_8bit_size": 0} | options
    if not name.endswith("bit"):
        keywords["optim_bits"] = bits
    if family in ("Adam", "AdamW", "LAMB"):
        keywords |= {"betas": (s.beta1, s.beta2), "eps": s.eps}
    elif family == "AdEMAMix":
        keywords |= {"betas": (s.beta1, s.beta2, s.beta3), "alpha": s.alpha, "eps": s.eps}
        keywords |= {"t_alpha": s.t_alpha or None, "t_beta3": s.t_beta3 or None}
    elif family == "Lion":
        keywords["betas"] = (s.beta1, s.beta2)
    elif family in ("LARS", "SGD"):
        keywords |= {"momentum": s.beta1, "dampening": s.beta2, "nesterov": s.nesterov}
    elif family == "RMSprop":
        keywords |= {"alpha": s.beta1, "eps": s.eps}
    elif family == "Adagrad":
        keywords["eps"] = s.eps
    if family == "LAMB":
        keywords |= {"bias_correction": s.bias_correction, "adam_w_mode": s.adam_w_mode}
    else:
        group |= {key: getattr(s, key) for key in ("bias_correction", "adam_w_mode") if not getattr(s, key)}
    if s.max_unorm != FAMILY[family].max_unorm or family not in ("LAMB", "LARS"):
        group["max_unorm"] = s.max_unorm
    if s.skip_zeros:
        group["skip_zeros"] = True
    return cls([group], **keywords)


# ---- data


def values(n, dtype, seed, size=0.1):
    return oracle.rounded((np.random.default_rng(seed).standard_normal(n) * size).astype(np.float32), dtype)


def gradient_values(n, dtype, seed, size=1e-2, zeros=0.02):
    """Gradients of several magnitudes with zeros of both signs."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal(n) * size * np.where(rng.random(n) < 0.1, 10.0 ** rng.uniform(-3, 1, n), 1)
    g[rng.random(n) < zeros] = 0
    g[rng.random(n) < zeros / 2] = -0.0
    return oracle.rounded(g.astype(np.float32), dtype)


class Gradients:
    """Gradients of many steps out of one array: step t of parameter i is a window of it."""

    def __init__(self, longest, dtype, seed, **options):
        self.spare = 4096
        self.all = oracle.to_torch(gradient_values(longest + self.spare, dtype, seed, **options), dtype)

    def __call__(self, n, t, i=0):
        start = (t * 37 + i * 101) % self.spare
        return self.all[start : start + n]


def parameter(n, dtype, seed):
    return torch.nn.Parameter(oracle.to_torch(values(n, dtype, seed), dtype))


# ---- the state of the library, as arrays


class Snapshot:
    """p and state of one parameter at one moment, copied: fp32 p, codes and scales or fp32 states, one per state."""

    def __init__(self, optimizer, p, row):
        self.row, self.n, self.p = row, p.numel(), oracle.from_torch(p).ravel().copy()
        state, count = optimizer.state[p], len(ref.SIGNED[row])
        self.bits = 8 if state and state["state1"].dtype is torch.uint8 else 32
        self.states, self.absmax, self.maps = [], [], []
        if not state:
            self.states = [np.zeros(self.n, np.float32) for _ in range(count)]
            return
        self.states = _rows(state, "state", self.n)
        if self.bits == 8:
            self.absmax = _rows(state, "absmax", -(-self.n // 256))
            own = [state[key].numpy().copy() for key in ("qmap1", "qmap2") if key in state]
            self.maps = [own[0]] * (count - 1) + [own[-1]]
        assert len(self.states) == count, (row, len(self.states))

    def values(self, low=0, high=None):
        """The states from element low (a multiple of 256) on, in double."""
        high = self.n if high is None else high
        if self.bits == 32:
            return [x[low:high].astype(np.float64) for x in self.states]
        parts = zip(self.states, self.absmax, self.maps, strict=True)
        return [m.astype(np.float64)[q[low:high]] * scales(a, low, high) for q, a, m in parts]

    def packed(self):
        """As the State8 of the fp32 oracle."""
        state = ref.State8(self.n, self.maps[0], self.maps[-1], self.row)
        state.codes, state.absmax = [x.copy() for x in self.states], [x.copy() for x in self.absmax]
        return state


def _rows(state, prefix, length):
    """Every state of that prefix as a flat array; the two rows of AdEMAMix's first one apart."""
    found = []
    for key in (prefix + "1", prefix + "2"):
        if key in state:
            found += list(state[key].detach().reshape(-1, length).numpy().copy() if length else [state[key].numpy()])
    return found


def scales(absmax, low, high):
    return np.repeat(absmax[low // 256 : -(-high // 256)].astype(np.float64), 256)[: high - low]


# ---- comparison


def half_step(x, dtype):
    """Half the spacing of dtype at x: what one rounding to it may change."""
    grain = {"f32": 2.0**-23, "f16": 2.0**-10, "bf16": 2.0**-7}[dtype]
    least = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 1e-300)))
    return 0.5 * np.maximum(np.exp2(exponent) * grain, least)


def cell_error(value, error, codes, absmax, code, signed):
    """How far each value lies outside the cell of its code, beyond rounding: positive where wrong.

    Within a cell, |value - code[k] * absmax| is at most half the gap of the map, times absmax. A signed state keeps
    its sign (NUMERICS rule 24): the cell of zero begins at 0, and that of the entry below reaches up to it.
    """
    code = code.astype(np.float64)
    middle = (code[1:] + code[:-1]) / 2
    lower, upper = np.append(-np.inf, middle), np.append(middle, np.inf)
    if signed:
        zero = int(np.flatnonzero(code == 0)[0])
        lower[zero] = upper[zero - 1] = 0.0
    with np.errstate(invalid="ignore"):
        outside = np.maximum(value - upper[codes] * absmax, lower[codes] * absmax - value)
    outside = np.where(absmax == 0, np.abs(value), outside)  # a block of zeros
    return outside - error - 4 * exact.EPS * np.abs(value) - exact.TINY


def check_exact(before, after, g, t, s, dtype, what, freedom=0.0):
    """One step of the library between two snapshots, against the double oracle. g: fp32 array of the gradients.

    freedom: relative error of the update beyond that of IEEE operations (NUMERICS rule 22).
    """
    bits, scale = after.bits, None
    pieces = [(low, min(low + CHUNK, before.n)) for low in range(0, before.n, CHUNK)]
    if s.max_unorm > 0:
        trust = exact.Trust(s)
        for low, high in pieces:
            piece = before.p[low:high].astype(np.float64), g[low:high].astype(np.float64)
            trust.add(*piece, before.values(low, high), t, bits)
        scale = trust.scale
    for low, high in pieces:
        p, gradient = before.p[low:high].astype(np.float64), g[low:high].astype(np.float64)
        expected, states = exact.step(p, gradient, before.values(low, high), t, s, bits, scale)
        got = after.p[low:high].astype(np.float64)
        bound = expected.error + half_step(np.maximum(np.abs(got), np.abs(expected.value)), dtype)
        bound = bound + freedom * (np.abs(p) + np.abs(expected.value))
        _none(np.abs(got - expected.value) - bound, (what, "p", low), got, expected.value)
        for i, state in enumerate(states):
            if bits == 32:
                got = after.states[i][low:high].astype(np.float64)
                _none(np.abs(got - state.value) - state.error, (what, "state", i, low), got, state.value)
                continue
            codes, absmax = after.states[i][low:high], scales(after.absmax[i], low, high)
            wrong = cell_error(state.value, state.error, codes, absmax, after.maps[i], ref.SIGNED[s.row][i])
            _none(wrong, (what, "codes of state", i, low), codes, state.value)
            _check_absmax(state, after.absmax[i][low // 256 : -(-high // 256)], (what, "absmax", i, low))


def _check_absmax(state, absmax, what):
    padded = np.zeros((2, absmax.size * 256))
    padded[:, : state.value.size] = np.abs(state.value), state.error
    largest, error = padded.reshape(2, -1, 256).max(axis=2)
    _none(np.abs(absmax - largest) - error - exact.TINY, what, absmax, largest)


def _none(excess, what, got, expected):
    """No element may exceed its bound; NaN fails."""
    at = np.flatnonzero(~(excess <= 0))
    assert at.size == 0, (
        *what,
        f"{at.size} of {excess.size} out of bounds",
        [(int(i), got[i], expected[i], f"by {excess[i]:.3g}") for i in at[:4]],
    )


def check_bits(before, after, g, t, s, dtype, what):
    """The same step against the fp32 oracle: states, codes and scales bit for bit, parameters within one ulp."""
    if after.bits == 8:
        state = before.packed() if before.bits == 8 else ref.State8(before.n, after.maps[0], after.maps[-1], s.row)
        p, _, _ = ref.update(before.p, g, state.values(), t, s, dtype, 8)
        ref_p, *_ = ref.step8(before.p, g, state, t, s, dtype)
        assert np.array_equal(p, ref_p, equal_nan=True)
        for i, (codes, absmax) in enumerate(zip(state.codes, state.absmax, strict=True)):
            assert np.array_equal(after.states[i], codes), (what, i, oracle.where_different(after.states[i], codes))
            assert oracle.same_bits(after.absmax[i], absmax), (what, i, oracle.where_different(after.absmax[i], absmax))
    else:
        p, states, _ = ref.update(before.p, g, before.states, t, s, dtype)
        for i, state in enumerate(states):
            assert oracle.same_bits(after.states[i], state), (what, i, oracle.where_different(after.states[i], state))
    far = np.flatnonzero(ref.ulps(after.p, p, dtype) > 1)
    assert far.size == 0, (what, f"{far.size} beyond 1 ulp", [(int(i), after.p[i], p[i]) for i in far[:5]])


def follow(name, bits, s, lengths, dtype, steps, check_at=None, seed=0, make=None, exactly=True, twice=True, **options):
    """Run one optimizer over parameters of those lengths and compare the steps in check_at (all, if None).

    make(n, t, i) -> gradient tensor of parameter i. The oracles start every step from what the library had before it.
    exactly: compare with the double oracle; twice: with the fp32 one as well. Returns (optimizer, parameters).
    """
    make = make or Gradients(max(lengths), dtype, seed)
    params = [parameter(n, dtype, seed + 100 + i) for i, n in enumerate(lengths)]
    optimizer = build(name, params, s, bits, **options)
    for t in range(1, steps + 1):
        for i, p in enumerate(params):
            p.grad = make(p.numel(), t, i)
        if check_at is not None and t not in check_at:
            optimizer.step()
            continue
        before = [Snapshot(optimizer, p, s.row) for p in params]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            new, g = Snapshot(optimizer, p, s.row), oracle.from_torch(p.grad).ravel()
            what = f"{name} {bits} bits {dtype} n {old.n} step {t}"
            assert new.bits == bits, what
            if exactly:
                check_exact(old, new, g, t, s, dtype, what)
            if twice:
                check_bits(old, new, g, t, s, dtype, what)
    return optimizer, params


def with_trust(family, max_unorm):
    return replace(FAMILY[family], max_unorm=max_unorm)


def functional_step(s, p, g, states, t, absmax=(), maps=(), **options):
    """One step through the functional form: flat tensors, changed in place. states: as state1 and state2."""
    state2 = states[1] if len(states) > 1 else None
    if not len(absmax):
        F.optimizer_update_32bit(
            s.row, g, p, states[0], s.beta1, s.eps, t, s.lr, state2, s.beta2, s.beta3, s.alpha, s.wd,
            s.sigma, max_unorm=s.max_unorm, skip_zeros=s.skip_zeros, **options,
        )  # fmt: skip
        return
    F.optimizer_update_8bit_blockwise(
        s.row, g, p, states[0], state2, s.beta1, s.beta2, s.beta3, s.alpha, s.eps, t, s.lr, maps[0],
        maps[1] if state2 is not None else None, absmax[0], absmax[1] if state2 is not None else None,
        weight_decay=s.wd, gnorm_scale=s.sigma, skip_zeros=s.skip_zeros,
    )  # fmt: skip
