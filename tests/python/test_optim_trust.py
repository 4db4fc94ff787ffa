"""Clipping: the trust ratio of every row (max_unorm), and percentile clipping of gradient norms.

U is the sum of squares of the updates, P that of the parameter before them. The update is multiplied by
max_unorm sqrt(P) / sqrt(U) where that is below 1; not where P is 0 or U is not finite. unorm_vec holds U.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import bitsandbytes.optim as optim
import optim_cases as cases
import oracle
import oracle_optim as ref
import oracle_optim64 as exact

N = 5000
LAYERWISE = {"LAMB": 1.0, "LARS": 0.02}


def run(name, bits, s, dtype, steps=4, seed=0, p=None, make=None, n=N):
    """Steps checked against both oracles, and U as well. Returns the scales that the double oracle found."""
    make = make or cases.Gradients(n, dtype, seed)
    p = cases.parameter(n, dtype, seed) if p is None else torch.nn.Parameter(oracle.to_torch(p, dtype))
    optimizer, scales = cases.build(name, [p], s, bits), []
    for t in range(1, steps + 1):
        p.grad = make(n, t)
        before, g = cases.Snapshot(optimizer, p, s.row), oracle.from_torch(p.grad)
        optimizer.step()
        after = cases.Snapshot(optimizer, p, s.row)
        assert after.bits == bits
        what = f"{name} {bits} bits {dtype} max_unorm {s.max_unorm} step {t}"
        cases.check_exact(before, after, g, t, s, dtype, what)
        cases.check_bits(before, after, g, t, s, dtype, what)
        trust, u = exact.Trust(s), optimizer.state[p]["unorm_vec"]
        with np.errstate(all="ignore"):
            trust.add(before.p.astype(np.float64), g.astype(np.float64), before.values(), t, bits)
        assert u.shape == (1,) and u.dtype == torch.float32
        bound = trust.square_error + 2 * exact.EPS * trust.square
        assert abs(u.item() - trust.square) <= bound, (what, u, trust.square)
        scales.append(trust.scale.value)
    return scales


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_clipped(dtype, family, bits):
    scales = run(family, bits, cases.with_trust(family, 0.01), dtype)
    assert all(scale < 0.95 for scale in scales), scales


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_not_clipped(dtype, family, bits):
    """A wide limit: the same as none, and U is still there."""
    s = cases.with_trust(family, 1e4)
    assert run(family, bits, s, dtype, 3) == [1.0] * 3
    p, q = cases.parameter(N, dtype, 5), cases.parameter(N, dtype, 5)
    a, b = cases.build(family, [p], s, bits), cases.build(family, [q], cases.with_trust(family, 0.0), bits)
    for t in range(1, 4):
        p.grad = q.grad = cases.Gradients(N, dtype, 6)(N, t)
        a.step()
        b.step()
    assert torch.equal(p.data, q.data)
    assert "unorm_vec" not in b.state[q]


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_parameter_of_zeros_moves(dtype, family, bits):
    """P = 0: the update is taken as it is, so that zero-initialised parameters learn."""
    s = cases.with_trust(family, 0.01)
    scales = run(family, bits, s, dtype, 2, p=np.zeros(N, np.float32))
    assert scales[0] == 1.0
    assert scales[1] < 1.0  # no longer zeros


@pytest.mark.parametrize("bits", ["8bit", "32bit"])
@pytest.mark.parametrize("family", LAYERWISE)
def test_layerwise_classes_clip_by_default(dtype, family, bits):
    """LAMB8bit and LARS8bit scale their updates on 8-bit state; the default limit of a class is the one of its row."""
    s = cases.FAMILY[family]
    assert s.max_unorm == LAYERWISE[family]
    scales = run(family + bits, 8 if bits == "8bit" else 32, s, dtype)
    assert all(scale < 0.95 for scale in scales), scales


@pytest.mark.parametrize("family, bits", cases.BOTH)
@pytest.mark.parametrize("n", [1, 255, 257, 1025])
def test_short_and_odd_lengths(family, bits, n):
    run(family, bits, cases.with_trust(family, 0.01), "f32", 2, n=n, make=_nonzero(n))


@pytest.mark.large
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["LAMB", "LARS"])
def test_million(family, bits):
    run(family, bits, cases.FAMILY[family], "bf16", 2, n=10**6 + 3)


def _nonzero(n):
    def make(_, t, i=0):
        return torch.from_numpy(np.random.default_rng(t).standard_normal(n).astype(np.float32)) * 0.01

    return make


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["Adam", "AdEMAMix", "LAMB", "RMSprop", "Adagrad"])
def test_without_eps(family, bits):
    """eps = 0 and no zero gradient: the elements behind a short last block, 0 / 0, must not enter U."""
    s = replace(cases.with_trust(family, 0.01), eps=0.0)
    assert all(scale < 0.95 for scale in run(family, bits, s, "f32", 2, n=1000, make=_nonzero(1000)))


@pytest.mark.parametrize("family", cases.FAMILY)
def test_held_elements_do_not_count(family):
    """skip_zeros: elements with a zero gradient are left out of U, though their state would have moved them."""
    s = replace(cases.with_trust(family, 0.01), skip_zeros=True)
    for bits in (8, 32):
        run(family, bits, s, "f32", 4, make=cases.Gradients(N, "f32", 3, zeros=0.4))


@pytest.mark.parametrize("family", cases.FAMILY)
def test_lost_elements_do_not_count(family):
    """8-bit state: a NaN gradient has no part in U, and its parameter stays."""

    def make(n, t, i=0):
        g = cases.gradient_values(n, "f32", t)
        g[7::100] = np.nan
        return torch.from_numpy(g)

    assert all(scale < 0.95 for scale in run(family, 8, cases.with_trust(family, 0.01), "f32", 3, make=make))


@pytest.mark.parametrize("family", cases.FAMILY)
def test_not_finite_norm(family):
    """32-bit state: an infinite gradient makes U not finite (but for Lion, whose step is a sign): no clipping."""
    if family == "Lion":
        return
    s = cases.with_trust(family, 0.01)
    p, q = cases.parameter(N, "f32", 1), cases.parameter(N, "f32", 1)
    p.grad = cases.Gradients(N, "f32", 2)(N, 1).clone()
    p.grad[17] = math.nan
    q.grad = p.grad.clone()
    a, b = cases.build(family, [p], s), cases.build(family, [q], cases.with_trust(family, 0.0))
    a.step()
    b.step()
    assert not torch.isfinite(a.state[p]["unorm_vec"]).any()
    assert torch.isnan(p[17]) and torch.isfinite(p).sum() == N - 1
    assert torch.equal(p.nan_to_num(), q.nan_to_num())


@pytest.mark.parametrize("family", cases.FAMILY)
def test_functional_form(dtype, family):
    """optimizer_update_32bit clips as the class does, and fills unorm_vec."""
    s = cases.with_trust(family, 0.01)
    p = cases.parameter(N, dtype, 3)
    mine, u = p.data.clone(), torch.full((1,), -1.0)
    optimizer = cases.build(family, [p], s)
    states = [torch.zeros(2, N) if s.row == "ademamix" else torch.zeros(N)]
    states += [torch.zeros(N)] * (s.row in ("adam", "lamb", "ademamix"))
    for t in range(1, 4):
        p.grad = cases.Gradients(N, dtype, 4)(N, t)
        optimizer.step()
        cases.functional_step(s, mine, p.grad, states, t, unorm_vec=u)
        assert torch.equal(u, optimizer.state[p]["unorm_vec"])
    assert torch.equal(p.data, mine)


def test_many_parameters_have_their_own_ratio():
    """One call for all of them: every parameter has its own norms."""
    sizes = (10, 4096, 300, 70000, 1)
    s = replace(cases.FAMILY["LAMB"], max_unorm=0.3)
    for bits in (8, 32):
        cases.follow("LAMB", bits, s, sizes, "f32", 3, seed=3)


@pytest.mark.parametrize("bits", [8, 32])
def test_threads_do_not_matter(bits):
    """The sums run over a tree that depends on the length alone."""
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = cases.parameter(300_007, "f32", 1)
        optimizer = cases.build("LAMB", [p], cases.FAMILY["LAMB"], bits)
        for t in range(1, 4):
            p.grad = cases.Gradients(300_007, "f32", 2)(300_007, t)
            optimizer.step()
        seen.append((p.data, optimizer.state[p]["unorm_vec"]))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


# ---- percentile clipping


class Ring:
    """The last hundred squared norms of one parameter's gradients, in plain numpy: fp32, as the library keeps them."""

    def __init__(self):
        self.slots = np.zeros(100, np.float32)

    def sigma(self, g, t, percentile):
        """(current, limit, scale) of step t."""
        square = np.float32(math.fsum(float(x) * float(x) for x in g))
        self.slots[:] = square if t == 1 else self.slots
        self.slots[t % 100] = square
        current, limit = np.sqrt(square), np.sqrt(np.sort(self.slots)[percentile])
        return float(current), float(limit), float(limit / current if current > limit else 1.0)


def bursts(n, t):
    """Gradients whose norm changes a lot between steps; a few steps have none at all."""
    rng = np.random.default_rng(t)
    size = 10.0 ** rng.uniform(-3, 1) * (t % 41 != 0)
    return (rng.standard_normal(n) * size).astype(np.float32)


@pytest.mark.parametrize("percentile", [0, 5, 50, 99])
def test_percentile_function(dtype, percentile):
    ring, vector = Ring(), torch.zeros(100)
    for t in range(1, 251):
        g = oracle.rounded(bursts(300, t), dtype)
        current, limit, scale = F.percentile_clipping(oracle.to_torch(g, dtype), vector, t, percentile)
        expected = ring.sigma(g, t, percentile)
        np.testing.assert_allclose([float(current), float(limit), float(scale)], expected, rtol=4e-7, err_msg=str(t))
        np.testing.assert_allclose(vector.numpy(), ring.slots, rtol=2e-7)


@pytest.mark.parametrize("max_unorm", [0.0, 0.01])
@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_percentile_in_the_classes(family, bits, max_unorm):
    """250 steps of two parameters, each with a ring of its own; every step checked against the oracle.

    With max_unorm both kinds of clipping act, one on the gradient and one on the update.
    """
    s, percentile, sizes = cases.with_trust(family, max_unorm), 20, (300, 40)
    params = [cases.parameter(n, "f32", 7) for n in sizes]
    optimizer = cases.build(family, params, s, bits, percentile_clipping=percentile)
    rings, clipped = [Ring(), Ring()], 0
    for t in range(1, 251):
        before = [cases.Snapshot(optimizer, p, s.row) for p in params]
        for i, p in enumerate(params):
            p.grad = torch.from_numpy(bursts(sizes[i], t + 1000 * i))
        optimizer.step()
        for p, old, ring in zip(params, before, rings, strict=True):
            g = p.grad.numpy()
            _, _, scale = ring.sigma(g, t, percentile)
            clipped += scale < 0.9
            state = optimizer.state[p]
            np.testing.assert_allclose(state["gnorm_vec"].numpy(), ring.slots, rtol=2e-7)
            new = cases.Snapshot(optimizer, p, s.row)
            cases.check_exact(old, new, g, t, replace(s, sigma=scale), "f32", f"{family} {bits} bits step {t}")
    assert 200 < clipped < 490
    assert params[0].grad.abs().max() == np.abs(bursts(300, 250)).max(), "the gradient itself is not scaled"


@pytest.mark.parametrize("bits", [8, 32])
def test_percentile_that_never_clips(bits):
    """Equal norms: the scale is 1, and the run equals one without clipping bit for bit."""
    p, q = cases.parameter(N, "bf16", 1), cases.parameter(N, "bf16", 1)
    a = optim.AdamW([p], optim_bits=bits, percentile_clipping=5)
    b = optim.AdamW([q], optim_bits=bits)
    p.grad = q.grad = cases.Gradients(N, "bf16", 3)(N, 1)
    for _ in range(120):
        a.step()
        b.step()
    assert torch.equal(p.data, q.data)
    assert "gnorm_vec" not in b.state[q]


def test_percentile_by_group():
    """A group may carry percentile_clipping."""
    p, q = cases.parameter(64, "f32", 1), cases.parameter(64, "f32", 1)
    optimizer = optim.SGD([{"params": [p], "percentile_clipping": 10}, {"params": [q]}], lr=0.1, momentum=0.9)
    for t in range(1, 4):
        p.grad = q.grad = torch.full((64,), 10.0**t)
        optimizer.step()
    assert optimizer.state[p]["gnorm_vec"].shape == (100,) and "gnorm_vec" not in optimizer.state[q]
    # steps of norm 80, 80, 80: momentum 0.9 adds 10, 10 + 9, 10 + 17.1 to the clipped one
    start = torch.from_numpy(cases.values(64, "f32", 1))
    torch.testing.assert_close(p.data, start - 0.1 * (10 + 19 + 27.1), rtol=1e-5, atol=1e-5)
    assert not torch.equal(p.data, q.data)


@pytest.mark.parametrize("value", [-1, 101, 3.5])
def test_percentile_out_of_range(value):
    p = cases.parameter(8, "f32", 1)
    p.grad = torch.ones(8)

    def clip():
        optim.AdamW([p], percentile_clipping=value).step()

    with pytest.raises((ValueError, TypeError), match="percentile"):
        clip()


def test_rows_are_covered():
    assert {s.row for s in cases.FAMILY.values()} == set(ref.ROWS)
