"""Maps and 4-bit tables against docs/FORMAT.md: anchor values, counts, zeros, and constructions of our own."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import oracle
import oracle_maps


def ulps(a, b):
    """Distance in fp32 steps, for values of equal sign."""
    return np.abs(a.astype(np.float32).view(np.int32).astype(np.int64) - b.astype(np.float32).view(np.int32))


def as_map(t):
    """Check the container rule of maps, give numpy."""
    assert t.dtype == torch.float32 and t.shape == (256,) and t.device.type == "cpu" and t.is_contiguous()
    return t.numpy()


def test_dynamic_anchors():
    signed, unsigned = as_map(F.create_dynamic_map()), as_map(F.create_dynamic_map(signed=False))
    assert [np.float32(x) for x in (-0.99296874, -0.97890627)] == list(signed[:2])
    assert signed[127] == 0 and signed[254] == np.float32(0.99296874) and signed[255] == 1
    assert ulps(signed[128:129], np.array([5.5e-07]))[0] <= 1
    assert unsigned[0] == 0 and unsigned[254] == np.float32(0.9964844) and unsigned[255] == 1
    assert ulps(unsigned[1:2], np.array([3.25e-07]))[0] <= 1
    assert np.array_equal(signed[:127], -signed[128:255][::-1]), "signed map: negatives mirror positives"


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_default_is_the_double_construction(signed):
    got, exact = as_map(F.create_dynamic_map(signed=signed)), oracle_maps.dynamic64(signed)
    assert np.all(np.diff(got) > 0), "256 different values, ascending"
    scale = np.maximum(np.abs(exact), 1e-30)
    assert np.max(np.abs(got - exact) / scale) < 4e-7
    assert np.max(ulps(got, oracle_maps.dynamic(signed))) <= 2


@pytest.mark.parametrize("total_bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_every_legal_bit_count(signed, total_bits):
    for exponent_bits in range(1, total_bits + (1 if signed else 0)):
        expected = oracle_maps.dynamic(signed, exponent_bits, total_bits)
        got = as_map(F.create_dynamic_map(signed, exponent_bits, total_bits))
        assert np.array_equal(got == 0, expected == 0), (signed, exponent_bits, total_bits)
        assert np.max(ulps(got, expected)) <= 2, (signed, exponent_bits, total_bits)
        assert len(np.unique(got)) == 2**total_bits
        assert np.all(np.diff(got) >= 0)


def test_dynamic_exponent_bits_equal_to_total_bits_is_the_map_below():
    for bits in range(2, 8):
        assert torch.equal(F.create_dynamic_map(True, bits, bits), F.create_dynamic_map(True, bits - 1, bits))


@pytest.mark.parametrize(
    "signed, bits, add_zero, points, zeros",
    [
        (True, 8, True, 255, [127, 128]),
        (True, 8, False, 256, []),
        (False, 8, True, 256, [0]),
        (True, 5, True, 31, list(range(15, 241))),
        (True, 4, False, 15, list(range(7, 249))),
        (True, 2, True, 3, list(range(1, 255))),
    ],
)
def test_linear(signed, bits, add_zero, points, zeros):
    got = as_map(F.create_linear_map(signed, bits, add_zero))
    assert list(np.flatnonzero(got == 0)) == zeros
    assert got[0] == (-1 if signed else 0) and got[255] == 1 and np.all(np.diff(got) >= 0)
    assert len(np.unique(got)) == (points if zeros else 256)
    exact = np.linspace(-1.0 if signed else 0.0, 1.0, points)
    values = got if points == 256 else np.concatenate([got[: points // 2], got[points // 2 + 256 - points :]])
    assert np.max(np.abs(values - exact)) < 1.3e-7
    if signed and not zeros:
        assert abs(got[128] - 0.0039215) < 1e-6 and got[127] == -got[128]


def test_linear_unsigned_few_bits_is_sorted():
    """A map must be sorted, and this one is not in other implementations."""
    for bits in range(2, 8):
        got = as_map(F.create_linear_map(False, bits))
        assert np.all(np.diff(got) >= 0)
        assert np.max(np.abs(np.unique(got) - np.linspace(0, 1, 2**bits))) < 1.3e-7


@pytest.mark.parametrize(
    "signed, e, p, distinct, raw_max, raw_min",
    [
        (True, 5, 2, 255, 114688, 3.814697265625e-06),
        (True, 4, 3, 255, 480, 4.8828125e-04),
        (False, 4, 4, 256, 496, None),
    ],
)
def test_fp8(signed, e, p, distinct, raw_max, raw_min):
    got = as_map(F.create_fp8_map(signed, e, p, 8))
    assert np.array_equal(got, oracle_maps.fp8(signed, e, p))
    assert len(np.unique(got)) == distinct and got[255] == 1 and np.all(np.diff(got) >= 0)
    if raw_min:
        assert list(np.flatnonzero(got == 0)) == [127, 128]
        assert got[129] == np.float32(np.float32(raw_min) / np.float32(raw_max))


def test_fp8_four_bits_is_not_fp4():
    got = np.unique(as_map(F.create_fp8_map(True, 2, 1, 4)))
    positive = np.array([0, 1 / 48, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1])
    assert np.allclose(got, np.concatenate([-positive[:0:-1], positive]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [(True, 5, 3, 8), (False, 5, 2, 8), (True, 4, 2, 8), (True, 2, 1, 5)])
def test_fp8_bit_sum(bad):
    with pytest.raises((AssertionError, ValueError)):
        F.create_fp8_map(*bad)


def test_normal_map_holds_nf4():
    got = as_map(F.create_normal_map())
    assert np.array_equal(np.concatenate([got[:8], got[-8:]])[[*range(7), 7, *range(8, 16)]], oracle.NF4)
    assert np.all(got[7:248] == 0) and np.all(np.diff(got) >= 0)
    fewer = as_map(F.create_normal_map(use_extra_value=False))
    assert np.count_nonzero(fewer > 0) == 7 and np.count_nonzero(fewer < 0) == 7
    assert fewer[255] == 1 and fewer[0] == -1


def test_4bit_tables():
    assert oracle.same_bits(F.get_4bit_type("nf4", device="cpu").numpy(), oracle.NF4)
    fp4 = F.get_4bit_type("fp4", device="cpu")
    assert fp4.shape == (16,) and fp4.dtype == torch.float32
    assert oracle.same_bits(fp4.numpy(), oracle.FP4), "code 8 is +0.0"
    sevenths = [7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7]
    assert np.allclose(F.get_4bit_type("int4", device="cpu").numpy(), np.array(sevenths) / 7, rtol=1e-7, atol=1e-9)
    af4 = [1, 0.72424863, 0.55496234, 0.42563882, 0.31675666, 0.21961274, 0.12934483, 0.04273164, 0.0, -0.04934812]
    af4 += [-0.14982478, -0.25607552, -0.3736951, -0.51243739, -0.69441008, -1]
    assert np.allclose(F.get_4bit_type("af4", device="cpu").numpy(), af4, rtol=1e-6, atol=0)


def test_4bit_table_names():
    with pytest.raises(NotImplementedError, match="nf5"):
        F.get_4bit_type("nf5", device="cpu")
    with pytest.raises(NotImplementedError, match="128"):
        F.get_4bit_type("af4", device="cpu", blocksize=128)


def test_nf4_thresholds_are_the_midpoints():
    """Checks the oracle: the thresholds, typed as decimals, are the fp32 midpoints of the table (rule 6)."""
    assert np.array_equal(oracle.midpoints(oracle.NF4), oracle.NF4_THRESHOLD)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_quantile_map(bits):
    x = np.random.default_rng(bits).standard_normal(5000).astype(np.float32)
    got = as_map(F.create_quantile_map(torch.from_numpy(x), bits))
    count = 2**bits - 1
    expected = oracle_maps.quantile(oracle.quantiles(x, 1 / (2 * count), count))
    assert oracle.same_bits(got, expected), oracle.where_different(got, expected)


def test_oracle_search_is_the_slow_definition():
    code = oracle_maps.dynamic()
    x = np.random.default_rng(1).uniform(-1.1, 1.1, 500).astype(np.float32)
    x = np.concatenate([x, oracle.midpoints(code), code, [np.float32(0)]])
    assert np.array_equal(oracle.nearest8(x, code), oracle.nearest8_slow(x, code))
    assert oracle.zero_code8(code) == 127 and oracle.zero_code8(oracle_maps.dynamic(False)) == 0


def test_oracle_conversions_are_those_of_torch():
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(20000) * 10.0 ** rng.integers(-45, 38, 20000)).astype(np.float32)
    x = np.concatenate([x, np.array([0, -0.0, np.inf, -np.inf, 65519, 65520, 2.0**-25, 2.0**-24 * 1.5], np.float32)])
    for name, kind in oracle.TORCH.items():
        assert oracle.same_bits(oracle.rounded(x, name), torch.from_numpy(x).to(kind).float().numpy())
        assert oracle.same_bits(oracle.from_torch(oracle.to_torch(x, name)), oracle.rounded(x, name))
