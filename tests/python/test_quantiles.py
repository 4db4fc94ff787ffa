"""estimate_quantiles: exact order statistics of any n, against a sort."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import oracle

LENGTHS = [1, 2, 3, 255, 256, 257, 513, 1000, 4097, 100003]


def kinds(n, dtype, seed):
    """Shapes of data that trouble a selection: ties, skew, few distinct values, infinities."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(n)
    data = {
        "normal": normal,
        "skewed": np.exp(4 * normal),
        "equal": np.full(n, -2.5),
        "zeros of both signs": np.where(rng.random(n) < 0.5, 0.0, -0.0),
        "few": rng.integers(-3, 4, n).astype(float),
        "sorted": np.arange(n) * 0.5,
        "reversed": -np.arange(n) * 0.25,
        "infinite": np.where(rng.random(n) < 0.3, np.inf, np.where(rng.random(n) < 0.3, -np.inf, normal)),
        "tiny": normal * 1e-42,
        "one outlier": np.append(np.zeros(n - 1), 1e30),
    }
    with np.errstate(over="ignore"):
        return {k: oracle.rounded(v.astype(np.float32), dtype) for k, v in data.items()}


def check(x, dtype, offset=1 / 512, count=256, **keywords):
    """offset: the one in force."""
    got = F.estimate_quantiles(oracle.to_torch(x, dtype), **keywords)
    assert got.dtype == torch.float32 and got.shape == (count,)
    expected = oracle.quantiles(x, offset, count)
    assert np.array_equal(got.numpy(), expected), oracle.where_different(got.numpy(), expected)


@pytest.mark.parametrize("n", LENGTHS)
def test_256_quantiles(dtype, n):
    for name, x in kinds(n, dtype, n).items():
        try:
            check(x, dtype)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 11, 16, 18, 51, 52, 86, 100, 127, 128, 129, 200, 254, 255, 256])
def test_fewer_quantiles(count):
    """The default offset becomes 1 / (2 count); an offset that is given is kept."""
    for n in (1, 256, 1000, 10007):
        x = kinds(n, "f32", n)["normal"]
        check(x, "f32", 1 / 512 if count == 256 else 1 / (2 * count), count, num_quantiles=count)
        got = F.estimate_quantiles(torch.from_numpy(x), offset=1 / 64, num_quantiles=count)
        assert np.array_equal(got.numpy(), oracle.quantiles(x, 1 / 64, count))


def test_offset_zero_is_minimum_and_maximum():
    x = kinds(1000, "f32", 1)["skewed"]
    got = F.estimate_quantiles(torch.from_numpy(x), offset=0.0)
    assert got[0] == x.min() and got[255] == x.max() and np.array_equal(got.numpy(), oracle.quantiles(x, 0.0, 256))


def test_targets_of_every_count():
    """n = 256 and offset 0: the result is the table t = trunc(linspace(0, 255, count)) itself, in fp32 as torch has it.

    Exact arithmetic differs in one place of them all: 255 * 79 / 237 is 85, a hair less in fp32.
    """
    x = torch.arange(256, dtype=torch.float32)
    for count in range(2, 257):
        got = F.estimate_quantiles(x, offset=0.0, num_quantiles=count).int().tolist()
        assert got == torch.linspace(0, 255, count).int().tolist(), count
        different = [(j, t) for j, t in enumerate(got) if t != 255 * j // (count - 1)]
        assert different == ([(79, 84)] if count == 238 else []), count


def test_halfway_ranks_round_to_even():
    """n = 257: every rank is t + 1/2."""
    x = np.arange(257, dtype=np.float32)
    got = F.estimate_quantiles(torch.from_numpy(x)).numpy()
    assert list(got[:6]) == [0, 2, 2, 4, 4, 6]


def test_nan_sorts_above_every_number(dtype):
    x = oracle.rounded(np.array([3, np.nan, np.inf, -1, -np.nan, 2, -np.inf, 5], np.float32), dtype)
    got = F.estimate_quantiles(oracle.to_torch(x, dtype), offset=0.0, num_quantiles=256).numpy()
    expected = oracle.quantiles(x, 0.0, 256)
    assert np.array_equal(got, expected, equal_nan=True)
    assert got[0] == -np.inf and np.isnan(got[-1])


def test_views_and_out():
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1))
    expected = oracle.quantiles(x[:, ::2].contiguous().numpy().ravel(), 1 / 512, 256)
    assert np.array_equal(F.estimate_quantiles(x[:, ::2]).numpy(), expected)
    assert np.array_equal(F.estimate_quantiles(x[:, ::2].t()).numpy(), expected)
    out = torch.zeros(256)
    given = F.estimate_quantiles(x[:, ::2], out=out)
    assert given is out and np.array_equal(out.numpy(), expected)


def test_input_is_not_changed(dtype):
    x = oracle.to_torch(kinds(5000, dtype, 3)["normal"], dtype)
    before = x.clone()
    F.estimate_quantiles(x)
    assert torch.equal(x, before)


def test_threads_do_not_matter():
    x = torch.randn(300007, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = F.estimate_quantiles(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, F.estimate_quantiles(x))


def test_removed_upstream_bounds():
    """docs: uniform data near linspace(1/512, 511/512); normal data within 0.05 of the true quantile."""
    g = torch.Generator().manual_seed(7)
    u = torch.rand(1024, 1024, generator=g)
    torch.testing.assert_close(F.estimate_quantiles(u), torch.linspace(1 / 512, 511 / 512, 256), atol=1e-3, rtol=1e-2)
    z = torch.randn(1024, 1024, generator=g)
    true = torch.special.ndtri(torch.linspace(1 / 512, 511 / 512, 256, dtype=torch.float64)).float()
    assert torch.max(torch.abs(F.estimate_quantiles(z) - true)) < 0.05
