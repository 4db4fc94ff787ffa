"""Adam and AdamW against oracle_optim.py: codes, absmax and 32-bit states bit for bit, parameters within one ulp."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import oracle
import oracle_optim as ref

LENGTHS = [1, 2, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097]
MILLION = 1000003
PLAIN = ref.Settings()
SETTINGS = {
    "plain": PLAIN,
    "decay": ref.Settings(lr=1e-2, wd=0.1),
    "scaled": ref.Settings(lr=3e-4, beta1=0.8, beta2=0.95, eps=1e-6, wd=0.01, sigma=0.37),
    "no eps": ref.Settings(eps=0.0),
    "beta zero": ref.Settings(beta1=0.0, beta2=0.0, wd=0.5),
}


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
    return oracle.rounded((np.random.default_rng(seed + 1000).standard_normal(n) * 0.1).astype(np.float32), dtype)


class Run8:
    """The library's tensors of one parameter with 8-bit state."""

    def __init__(self, p, dtype, kind="dynamic"):
        n, blocks = p.size, -(-p.size // 256)
        self.dtype, self.p = dtype, oracle.to_torch(p, dtype)
        self.q1, self.q2 = torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        self.a1, self.a2 = torch.zeros(blocks), torch.zeros(blocks)
        self.maps = [torch.from_numpy(m) for m in maps(kind)]

    def step(self, g, step, s):
        F.optimizer_update_8bit_blockwise(
            "adam", oracle.to_torch(g, self.dtype), self.p, self.q1, self.q2, s.beta1, s.beta2, 0.0, 0.0, s.eps,
            step, s.lr, *self.maps, self.a1, self.a2, weight_decay=s.wd, gnorm_scale=s.sigma, skip_zeros=s.skip_zeros,
        )  # fmt: skip

    def check(self, state, what):
        for got, expected in ((self.q1, state.q1), (self.q2, state.q2)):
            assert np.array_equal(got.numpy(), expected), (what, oracle.where_different(got.numpy(), expected))
        for got, expected in ((self.a1, state.a1), (self.a2, state.a2)):
            assert oracle.same_bits(got.numpy(), expected), (what, oracle.where_different(got.numpy(), expected))


def check_parameter(got, expected, dtype, what):
    far = ref.ulps(got, expected, dtype)
    at = np.flatnonzero(far > 1)
    assert at.size == 0, (what, f"{at.size} beyond 1 ulp", [(int(i), got[i], expected[i]) for i in at[:5]])


def follow8(n, dtype, s, steps, seed=0, kind="dynamic", make=gradient):
    """Library and oracle side by side; the oracle takes over the library's p, so that p is compared per step."""
    p = parameter(n, dtype, seed)
    run, state = Run8(p, dtype, kind), ref.State8(n, *maps(kind))
    for step in range(1, steps + 1):
        g = make(n, dtype, seed + step)
        expected, m, v = ref.step8(p, g, state, step, s, dtype)
        exact, change = ref.new_parameter64(p, m, v, step, s)
        run.step(g, step, s)
        what = f"{dtype} n {n} step {step} {s}"
        run.check(state, what)
        got = oracle.from_torch(run.p)
        check_parameter(got, expected, dtype, what)
        counted = (v > 0) & np.isfinite(exact) & ~((g == 0) & s.skip_zeros)
        bound = 1.5 * step_of(got, dtype) + 8 * 2.0**-24 * (np.abs(exact) + change)
        assert np.all(np.abs(got - exact)[counted] <= bound[counted]), what
        p = got
    return run, state


def step_of(x, dtype):
    """Spacing of the values of dtype at x."""
    factor = {"f32": 1.0, "f16": 2.0**13, "bf16": 2.0**16}[dtype]
    least = {"f32": 2.0**-149, "f16": 2.0**-24, "bf16": 2.0**-133}[dtype]
    return np.maximum(np.spacing(np.abs(x)).astype(np.float64) * factor, least)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_8bit_every_length(dtype, name):
    make = nonzero_gradient if SETTINGS[name].eps == 0 else gradient  # 0 / 0 is a test of its own
    for n in LENGTHS:
        follow8(n, dtype, SETTINGS[name], 3, n, make=make)


def test_8bit_twenty_steps(dtype):
    follow8(4097, dtype, SETTINGS["decay"], 20, 5)
    follow8(1000, dtype, SETTINGS["scaled"], 20, 6)


@pytest.mark.large
def test_8bit_million(dtype):
    follow8(MILLION, dtype, SETTINGS["decay"], 2, 7)


@pytest.mark.parametrize("kind", ["linear", "mixed"])
def test_8bit_maps_of_a_checkpoint(dtype, kind):
    """Any map that the state carries is used, not the default one."""
    follow8(2000, dtype, SETTINGS["decay"], 6, 8, kind=kind)


def test_8bit_skip_zeros(dtype):
    follow8(3000, dtype, replace(SETTINGS["decay"], skip_zeros=True), 8, 9)


def test_8bit_zero_without_eps(dtype):
    """eps = 0 and v = 0 gives 0 / 0: the parameter is NaN by the formula, the states stay finite and zero."""
    p = parameter(300, dtype, 1)
    run, s = Run8(p, dtype), SETTINGS["no eps"]
    run.step(np.zeros(300, np.float32), 1, s)
    assert torch.all(run.q1 == 127) and torch.all(run.q2 == 0) and torch.all(run.a1 == 0) and torch.all(run.a2 == 0)


def test_8bit_zero_block_codes(dtype):
    """An all-zero block: codes 127 and 0, absmax 0; decay still acts on the parameter."""
    p = parameter(513, dtype, 2)
    run, s = Run8(p, dtype), SETTINGS["decay"]
    g = gradient(513, dtype, 3)
    g[256:512] = 0
    run.step(g, 1, s)
    assert torch.all(run.q1[256:512] == 127) and torch.all(run.q2[256:512] == 0)
    assert run.a1[1] == 0 and run.a2[1] == 0 and run.a1[0] > 0
    expected = oracle.rounded(p[256:512] * np.float32(1 - s.lr * s.wd), dtype)
    check_parameter(oracle.from_torch(run.p)[256:512], expected, dtype, "decay alone")


def test_8bit_negative_never_becomes_zero():
    """Rule 24: a negative value is never coded as 0, a small positive one may be, and zero of either sign is."""
    p = np.zeros(256, np.float32)
    g = np.zeros(256, np.float32)
    g[0], g[1], g[2], g[3] = 1.0, -1e-9, 1e-9, -0.0
    run, s = Run8(p, "f32"), replace(PLAIN, beta1=0.0)
    run.step(g, 1, s)
    assert run.q1[:4].tolist() == [255, 126, 127, 127]
    state = ref.State8(256, *maps())
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
def test_8bit_non_finite(dtype, case):
    """That element keeps p and loses its states; its neighbours and the next steps are as if it were a zero state."""

    def make(n, d, seed):
        g = gradient(n, d, seed)
        if seed % 2 == 0:
            bad = oracle.rounded(np.array(BAD[case], np.float32), d)
            g[3 :: max(1, n // 7)] = np.resize(bad, g[3 :: max(1, n // 7)].size)
        return g

    run, _ = follow8(1500, dtype, SETTINGS["decay"], 5, 1, make=make)
    assert torch.isfinite(run.a1).all() and torch.isfinite(run.a2).all() and torch.isfinite(run.p).all()


def test_8bit_sigma_overflow():
    """A finite gradient that sigma makes infinite counts as a non-finite state."""
    g = gradient(700, "f32", 4)
    g[5], g[300] = 1e30, -1e30
    p = parameter(700, "f32", 4)
    run, state, s = Run8(p, "f32"), ref.State8(700, *maps()), replace(PLAIN, sigma=1e10)
    expected, _, _ = ref.step8(p, g, state, 1, s, "f32")
    run.step(g, 1, s)
    run.check(state, "sigma")
    check_parameter(run.p.numpy(), expected, "f32", "sigma")
    assert run.p[5] == p[5] and run.p[300] == p[300]


def test_8bit_whole_block_bad(dtype):
    p = parameter(600, dtype, 5)
    run = Run8(p, dtype)
    run.step(gradient(600, dtype, 6), 1, PLAIN)
    before = run.p.clone()
    g = gradient(600, dtype, 7)
    g[256:512] = np.nan
    run.step(g, 2, SETTINGS["decay"])
    assert torch.equal(run.p[256:512], before[256:512])
    assert torch.all(run.q1[256:512] == 127) and torch.all(run.q2[256:512] == 0) and run.a1[1] == 0 and run.a2[1] == 0


def test_8bit_subnormal_states():
    """Gradients whose squares vanish: v is zero, or its absmax has no finite reciprocal."""
    for size in (1e-19, 3e-21, 1e-23, 1e-38, 1e-44):
        follow8(600, "f32", PLAIN, 3, 11, make=lambda n, d, seed, size=size: gradient(n, d, seed, size))


# ---- 32-bit states


def follow32(n, dtype, s, steps, seed=0, make=gradient):
    p = parameter(n, dtype, seed)
    mine = oracle.to_torch(p, dtype)
    m, v = np.zeros(n, np.float32), np.zeros(n, np.float32)
    s1, s2 = torch.zeros(n), torch.zeros(n)
    for step in range(1, steps + 1):
        g = make(n, dtype, seed + step)
        expected, m, v = ref.step32(p, g, m, v, step, s, dtype)
        F.optimizer_update_32bit(
            "adam", oracle.to_torch(g, dtype), mine, s1, s.beta1, s.eps, step, s.lr, s2, s.beta2,
            weight_decay=s.wd, gnorm_scale=s.sigma, skip_zeros=s.skip_zeros,
        )  # fmt: skip
        what = f"{dtype} n {n} step {step} {s}"
        for got, wanted in ((s1, m), (s2, v)):
            assert oracle.same_bits(got.numpy(), wanted), (what, oracle.where_different(got.numpy(), wanted))
        got = oracle.from_torch(mine)
        check_parameter(got, expected, dtype, what)
        p = got
    return mine


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_32bit_every_length(dtype, name):
    for n in LENGTHS:
        follow32(n, dtype, SETTINGS[name], 3, n)


def test_32bit_twenty_steps(dtype):
    follow32(4097, dtype, SETTINGS["decay"], 20, 5)


@pytest.mark.large
def test_32bit_million(dtype):
    follow32(MILLION, dtype, SETTINGS["scaled"], 2, 6)


def test_32bit_skip_zeros(dtype):
    follow32(1000, dtype, replace(SETTINGS["decay"], skip_zeros=True), 5, 7)


def test_32bit_nan_spreads_into_its_own_element_only(dtype):
    def make(n, d, seed):
        g = gradient(n, d, seed)
        if seed == 2:
            g[[1, 40, 300]] = np.array([np.nan, np.inf, -np.inf], np.float32)
        return g

    p = follow32(500, dtype, SETTINGS["decay"], 4, 0, make)
    assert torch.isnan(p).nonzero().flatten().tolist() == [1, 40, 300]


def test_one_rounding_per_step():
    """bf16: the decay alone rounds back to 1, and so does the step alone; together, rounded once, they count."""
    s = ref.Settings(lr=1e-3, wd=1.9)
    run = Run8(np.ones(256, np.float32), "bf16")
    run.step(oracle.rounded(np.full(256, 0.01, np.float32), "bf16"), 1, s)
    assert np.all(oracle.from_torch(run.p) == np.float32(1 - 2.0**-8))
