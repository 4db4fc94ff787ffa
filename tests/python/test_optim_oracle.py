"""The two oracles against each other, and every row of the functional form against them, over odd settings and data.

Codes, absmax and 32-bit states are equal bit for bit to oracle_optim.py, parameters within one ulp of it and within
rounding of oracle_optim64.py. NUMERICS rules 12 and 20 to 25. The classes: test_optim_rows.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import optim_cases as cases
import oracle
import oracle_optim as ref
import oracle_optim64 as exact

LENGTHS = [1, 2, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097]
MILLION = 1000003
PLAIN = ref.Settings()
ADAPTIVE = ("adam", "lamb", "ademamix", "rmsprop", "adagrad")  # rows that divide by a square root
VARIANTS = {
    "plain": {},
    "decay": {"lr": 1e-2, "wd": 0.1},
    "scaled": {"lr": 3e-4, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "wd": 0.01, "sigma": 0.37},
    "no eps": {"eps": 0.0},
    "beta zero": {"beta1": 0.0, "beta2": 0.0, "wd": 0.5},
}


def settings(row, name="plain", **more):
    base = {"beta3": 0.999, "alpha": 3.0} if row == "ademamix" else {}
    if row in ("momentum", "lars"):
        base["beta2"] = 0.0
    return ref.Settings(row=row, **(base | VARIANTS[name] | more))


def maps(kind="dynamic"):
    if kind == "linear":  # no zero in map 1
        return F.create_linear_map(add_zero=False).numpy().copy(), F.create_linear_map(signed=False).numpy().copy()
    second = F.create_fp8_map(False, 4, 4, 8) if kind == "mixed" else F.create_dynamic_map(signed=False)
    return F.create_dynamic_map().numpy().copy(), second.numpy().copy()


def gradient(n, dtype, seed, size=1e-2):
    """Gradients of many magnitudes, with zeros of both signs and some whole blocks of zeros."""
    rng = np.random.default_rng(seed)
    g = rng.standard_normal(n) * size * np.where(rng.random(n) < 0.2, 10.0 ** rng.uniform(-4, 2, n), 1)
    g[rng.random(n) < 0.05] = 0
    g[rng.random(n) < 0.02] = -0.0
    if n > 1024:
        g[512:768] = 0
    return oracle.rounded(g.astype(np.float32), dtype)


def nonzero_gradient(n, dtype, seed):
    g = gradient(n, dtype, seed)
    return np.where(g == 0, oracle.rounded(np.float32(0.01), dtype), g)


def parameter(n, dtype, seed):
    return cases.values(n, dtype, seed + 1000)


class Run:
    """The library's tensors of one parameter, updated through the functional form; seen as a Snapshot."""

    def __init__(self, p, dtype, row="adam", bits=8, kind="dynamic"):
        n, signed = p.size, ref.SIGNED[row]
        self.row, self.bits, self.n, self.dtype, self.p = row, bits, n, dtype, oracle.to_torch(p, dtype)
        shapes = [(2, n) if row == "ademamix" else (n,)] + [(n,)] * (len(signed) > 1)
        self.states = [torch.zeros(s, dtype=torch.uint8 if bits == 8 else torch.float32) for s in shapes]
        self.absmax = [torch.zeros(*s[:-1], -(-n // 256)) for s in shapes] if bits == 8 else []
        self.maps = [torch.from_numpy(m) for m in maps(kind)]
        if not signed[0]:  # one non-negative state
            self.maps.reverse()

    def step(self, g, t, s):
        cases.functional_step(s, self.p, oracle.to_torch(g, self.dtype), self.states, t, self.absmax, self.maps)

    def oracle(self):
        """The same new state, for the fp32 oracle."""
        first, second = (m.numpy() for m in self.maps)
        return ref.State8(self.n, first, second, self.row)

    @property
    def codes(self):
        return [row for state in self.states for row in state.reshape(-1, self.n)]

    @property
    def scales(self):
        return [row for a in self.absmax for row in a.reshape(-1, a.shape[-1])]

    def check(self, state, what):
        for got, expected in zip(self.codes, state.codes, strict=True):
            assert np.array_equal(got.numpy(), expected), (what, oracle.where_different(got.numpy(), expected))
        for got, expected in zip(self.scales, state.absmax, strict=True):
            assert oracle.same_bits(got.numpy(), expected), (what, oracle.where_different(got.numpy(), expected))


def check_parameter(got, expected, dtype, what):
    far = ref.ulps(got, expected, dtype)
    at = np.flatnonzero(far > 1)
    assert at.size == 0, (what, f"{at.size} beyond 1 ulp", [(int(i), got[i], expected[i]) for i in at[:5]])


def check_formula(p, g, old, got, t, s, dtype, bits, what):
    """The new p within its rounding of the formula in double, where that is finite."""
    arrays = [x.astype(np.float64) for x in (p, g, *old)]
    with np.errstate(all="ignore"):
        formula, _ = exact.step(arrays[0], arrays[1], arrays[2:], t, s, bits)
        bound = formula.error + cases.half_step(np.maximum(np.abs(got), np.abs(formula.value)), dtype)
        far = np.isfinite(bound) & ~(np.abs(got - formula.value) <= bound)
    at = np.flatnonzero(far)
    assert at.size == 0, (what, [(int(i), got[i], formula.value[i], bound[i]) for i in at[:5]])


def follow8(n, dtype, s, steps, seed=0, kind="dynamic", make=gradient, formula=True):
    """Library and oracle side by side; the oracle takes over the library's p, so that p is compared per step."""
    p = parameter(n, dtype, seed)
    run = Run(p, dtype, s.row, 8, kind)
    state = run.oracle()
    for t in range(1, steps + 1):
        g, old = make(n, dtype, seed + t), state.values()
        expected, *_ = ref.step8(p, g, state, t, s, dtype)
        run.step(g, t, s)
        what = f"{dtype} n {n} step {t} {s}"
        run.check(state, what)
        got = oracle.from_torch(run.p)
        check_parameter(got, expected, dtype, what)
        if formula:
            check_formula(p, g, old, got, t, s, dtype, 8, what)
        p = got
    return run, state


def follow32(n, dtype, s, steps, seed=0, make=gradient):
    p = parameter(n, dtype, seed)
    run = Run(p, dtype, s.row, 32)
    states = [np.zeros(n, np.float32) for _ in ref.SIGNED[s.row]]
    for t in range(1, steps + 1):
        g, old = make(n, dtype, seed + t), states
        expected, *states = ref.step32(p, g, *old, t, s, dtype)
        run.step(g, t, s)
        what = f"{dtype} n {n} step {t} {s}"
        for got, wanted in zip(run.codes, states, strict=True):
            assert oracle.same_bits(got.numpy(), wanted), (what, oracle.where_different(got.numpy(), wanted))
        got = oracle.from_torch(run.p)
        check_parameter(got, expected, dtype, what)
        p = got
    return run


# ---- 8-bit states


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_every_length(dtype, row, name):
    make = nonzero_gradient if name == "no eps" else gradient  # 0 / 0 is a test of its own
    for n in LENGTHS:
        follow8(n, dtype, settings(row, name), 3, n, make=make)


@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_twenty_steps(dtype, row):
    follow8(4097, dtype, settings(row, "decay"), 20, 5)
    follow8(1000, dtype, settings(row, "scaled"), 20, 6)


@pytest.mark.large
@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_million(row):
    follow8(MILLION, "bf16", settings(row, "decay"), 2, 7, formula=False)


@pytest.mark.parametrize("kind", ["linear", "mixed"])
@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_maps_of_a_checkpoint(dtype, row, kind):
    """Any map that the state carries is used, not the default one."""
    follow8(2000, dtype, settings(row, "decay"), 6, 8, kind=kind)


@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_skip_zeros(dtype, row):
    follow8(3000, dtype, settings(row, "decay", skip_zeros=True), 8, 9)


@pytest.mark.parametrize("row", ADAPTIVE)
def test_8bit_zero_without_eps(dtype, row):
    """eps = 0 and v = 0 gives 0 / 0: the parameter is NaN by the formula, the states stay finite and zero."""
    p = parameter(300, dtype, 1)
    run, s = Run(p, dtype, row), settings(row, "no eps")
    run.step(np.zeros(300, np.float32), 1, s)
    for codes, signed in zip(run.codes, ref.SIGNED[row], strict=True):
        assert torch.all(codes == (127 if signed else 0))
    assert all(torch.all(a == 0) for a in run.absmax)


@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_zero_block_codes(dtype, row):
    """An all-zero block: codes 127 and 0, absmax 0; decoupled decay still acts on the parameter."""
    p = parameter(513, dtype, 2)
    s = settings(row, "decay" if row in ("adam", "lamb", "ademamix", "lion") else "plain")
    run, g = Run(p, dtype, row), gradient(513, dtype, 3)
    g[256:512] = 0
    run.step(g, 1, s)
    for codes, scale, signed in zip(run.codes, run.scales, ref.SIGNED[row], strict=True):
        assert torch.all(codes[256:512] == (127 if signed else 0)) and scale[1] == 0 and scale[0] > 0
    expected = oracle.rounded(p[256:512] * np.float32(1 - s.lr * s.wd), dtype)
    check_parameter(oracle.from_torch(run.p)[256:512], expected, dtype, "decay alone")


@pytest.mark.parametrize("row", ["adam", "lamb", "ademamix", "momentum", "lars", "lion"])
def test_8bit_negative_never_becomes_zero(row):
    """Rule 24: a negative value is never coded as 0, a small positive one may be, and zero of either sign is."""
    p, g = np.zeros(256, np.float32), np.zeros(256, np.float32)
    g[0], g[1], g[2], g[3] = 1.0, -1e-9, 1e-9, -0.0
    run, s = Run(p, "f32", row), replace(settings(row), beta1=0.0)
    run.step(g, 1, s)
    assert run.codes[0][:4].tolist() == [255, 126, 127, 127]
    state = run.oracle()
    ref.step8(p, g, state, 1, s, "f32")
    run.check(state, "signs")


BAD = {
    "nan": [np.nan],
    "inf": [np.inf],
    "-inf": [-np.inf],
    "square overflows": [3e38],
    "mixed": [np.nan, -np.inf, 3e38, 1e30],
}


@pytest.mark.parametrize("case", sorted(BAD))
@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_non_finite(dtype, row, case):
    """That element keeps p and loses its states; its neighbours and the next steps are as if it were a zero state."""

    def make(n, d, seed):
        g = gradient(n, d, seed)
        if seed % 2 == 0:
            bad = oracle.rounded(np.array(BAD[case], np.float32), d)
            g[3 :: max(1, n // 7)] = np.resize(bad, g[3 :: max(1, n // 7)].size)
        return g

    run, _ = follow8(1500, dtype, settings(row, "decay"), 5, 1, make=make, formula=False)
    assert all(torch.isfinite(a).all() for a in run.absmax)
    if row not in ("momentum", "lars", "lion") or dtype == "f16" or case in ("nan", "inf", "-inf"):
        assert torch.isfinite(run.p).all()  # without a square, 3e38 is a gradient like any other


@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_sigma_overflow(row):
    """A finite gradient that sigma makes infinite counts as a non-finite state."""
    g = gradient(700, "f32", 4)
    g[5], g[300] = 1e30, -1e30
    p = parameter(700, "f32", 4)
    run, s = Run(p, "f32", row), replace(settings(row), sigma=1e10)
    state = run.oracle()
    expected, *_ = ref.step8(p, g, state, 1, s, "f32")
    run.step(g, 1, s)
    run.check(state, "sigma")
    check_parameter(run.p.numpy(), expected, "f32", "sigma")
    assert run.p[5] == p[5] and run.p[300] == p[300]


@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_whole_block_bad(dtype, row):
    run = Run(parameter(600, dtype, 5), dtype, row)
    run.step(gradient(600, dtype, 6), 1, settings(row))
    before = run.p.clone()
    g = gradient(600, dtype, 7)
    g[256:512] = np.nan
    run.step(g, 2, settings(row, "decay"))
    assert torch.equal(run.p[256:512], before[256:512])
    for codes, scale, signed in zip(run.codes, run.scales, ref.SIGNED[row], strict=True):
        assert torch.all(codes[256:512] == (127 if signed else 0)) and scale[1] == 0


@pytest.mark.parametrize("row", ref.ROWS)
def test_8bit_subnormal_states(row):
    """Gradients whose squares vanish: v is zero, or its absmax has no finite reciprocal."""
    for size in (1e-19, 3e-21, 1e-23, 1e-38, 1e-44):
        make = lambda n, d, seed, size=size: gradient(n, d, seed, size)  # noqa: E731
        follow8(600, "f32", settings(row), 3, 11, make=make, formula=False)


# ---- 32-bit states


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("row", ref.ROWS)
def test_32bit_every_length(dtype, row, name):
    for n in LENGTHS:
        follow32(n, dtype, settings(row, name), 3, n)


@pytest.mark.parametrize("row", ref.ROWS)
def test_32bit_twenty_steps(dtype, row):
    follow32(4097, dtype, settings(row, "decay"), 20, 5)


@pytest.mark.large
@pytest.mark.parametrize("row", ref.ROWS)
def test_32bit_million(row):
    follow32(MILLION, "bf16", settings(row, "scaled"), 2, 6)


@pytest.mark.parametrize("row", ref.ROWS)
def test_32bit_skip_zeros(dtype, row):
    follow32(1000, dtype, settings(row, "decay", skip_zeros=True), 5, 7)


@pytest.mark.parametrize("row", ref.ROWS)
def test_32bit_nan_spreads_into_its_own_element_only(dtype, row):
    """As in PyTorch. Only Lion's step, a sign, hides it: the momentum is NaN, and p only decays."""

    def make(n, d, seed):
        g = gradient(n, d, seed)
        if seed == 2:
            g[[1, 40, 300]] = np.nan
        return g

    run = follow32(500, dtype, settings(row, "decay"), 4, 0, make)
    assert torch.isnan(run.codes[0]).nonzero().flatten().tolist() == [1, 40, 300]
    assert torch.isnan(run.p).nonzero().flatten().tolist() == ([] if row == "lion" else [1, 40, 300])


def test_one_rounding_per_step():
    """bf16: the decay alone rounds back to 1, and so does the step alone; together, rounded once, they count."""
    s = ref.Settings(lr=1e-3, wd=1.9)
    run = Run(np.ones(256, np.float32), "bf16")
    run.step(oracle.rounded(np.full(256, 0.01, np.float32), "bf16"), 1, s)
    assert np.all(oracle.from_torch(run.p) == np.float32(1 - 2.0**-8))


# ---- the oracles themselves: no library below this line


OPTIONS = [
    {},
    {"wd": 0.1, "sigma": 0.3},
    {"wd": 0.1, "adam_w_mode": False},
    {"bias_correction": False},
    {"nesterov": True, "beta2": 0.25},
    {"skip_zeros": True, "wd": 0.1},
    {"max_unorm": 0.01},
    {"max_unorm": 100.0, "wd": 0.1},
    {"t_alpha": 7.0, "t_beta3": 9.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("row", ref.ROWS)
@pytest.mark.parametrize("bits", [8, 32])
def test_the_oracles_agree(dtype, row, bits, options):
    """Twelve steps: the fp32 oracle lies within the bounds of the double one."""
    s = replace(settings(row), **{"lr": 1e-2} | options)
    n, p = 3000, parameter(3000, dtype, 3)
    old = Bare(p, ref.State8(n, *(maps() if ref.SIGNED[row][0] else maps()[::-1]), row), bits)
    for t in range(1, 13):
        g = gradient(n, dtype, t)
        new = old.next(g, t, s, dtype)
        cases.check_exact(old, new, g, t, s, dtype, f"{s} step {t}")
        old = new


class Bare:
    """A Snapshot of the fp32 oracle instead of the library."""

    values = cases.Snapshot.values

    def __init__(self, p, state, bits, states=None):
        self.p, self.n, self.bits, self.maps, self.absmax = p, p.size, bits, state.maps, list(state.absmax)
        self.state = state
        self.states = list(state.codes) if bits == 8 else states or [np.zeros(p.size, np.float32) for _ in state.codes]

    def next(self, g, t, s, dtype):
        if self.bits == 8:
            p, *_ = ref.step8(self.p, g, self.state, t, s, dtype)
            return Bare(p, self.state, 8)
        p, *states = ref.step32(self.p, g, *self.states, t, s, dtype)
        return Bare(p, self.state, 32, states)


@pytest.mark.parametrize("row", ref.ROWS)
def test_the_comparison_sees_small_errors(row):
    """A code one off, a wrong scale or a parameter two ulps off is found."""
    s, n = settings(row, "decay"), 600
    old = Bare(parameter(n, "f32", 3), ref.State8(n, *(maps() if ref.SIGNED[row][0] else maps()[::-1]), row), 8)
    g = nonzero_gradient(n, "f32", 1)
    good = old.next(g, 1, s, "f32")
    old = Bare(old.p, ref.State8(n, *maps(), row), 8)
    cases.check_exact(old, good, g, 1, s, "f32", "good")
    for i in range(len(good.states)):
        for wrong in (good.states[i].astype(int) + 1, good.states[i].astype(int) - 1):
            codes = list(good.states)
            codes[i] = np.clip(wrong, 0, 255).astype(np.uint8)
            _expect_failure(old, good, g, s, states=codes)
        absmax = list(good.absmax)
        absmax[i] = absmax[i] * np.float32(1 + 2.0**-18)
        _expect_failure(old, good, g, s, absmax=absmax)
    far = good.p.copy()
    far[100] = far[100] * np.float32(1 + 2.0**-18) + np.float32(2.0**-24)
    _expect_failure(old, good, g, s, p=far)


def _expect_failure(old, good, g, s, **changed):
    bad = Bare(good.p, good.state, 8)
    for key, value in changed.items():
        setattr(bad, key, value)
    with pytest.raises(AssertionError, match="out of bounds"):
        cases.check_exact(old, bad, g, 1, s, "f32", "bad")
