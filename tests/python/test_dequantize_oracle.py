"""Decoded values, bit for bit against oracle.py: one fp32 product, one rounding; plain and nested statistics."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import oracle

LENGTHS = [0, 1, 2, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097]
MILLION = 1000003
BLOCKS8 = [1, 7, 64, 100, 256, 4096, 16384]
BLOCKS4 = [32, 64, 128, 256, 512, 1024, 2048, 4096]
SPECIAL = [0.0, 1e-45, 1e-40, 1.1754944e-38, 65504.0, 65519.0, 65520.0, 3.4028235e38, np.inf, 6e-8, 2.9e-8]


def scales(blocks, seed):
    """Positive fp32 scales over all magnitudes, the special ones among them."""
    rng = np.random.default_rng(seed)
    absmax = (rng.uniform(0.1, 1, blocks) * 10.0 ** rng.integers(-44, 38, blocks)).astype(np.float32)
    absmax[rng.random(blocks) < 0.5] = rng.uniform(0.1, 4)
    at = np.flatnonzero(rng.random(blocks) < 0.2)
    absmax[at] = np.resize(np.array(SPECIAL, np.float32), at.size)
    return absmax


def maps():
    random = np.sort(np.random.default_rng(3).uniform(-2, 2, 256).astype(np.float32))
    return {
        "default": F.create_dynamic_map().numpy().copy(),
        "unsigned": F.create_dynamic_map(False).numpy().copy(),
        "fp8": F.create_fp8_map().numpy().copy(),
        "random": random,
        "unsorted": np.random.default_rng(4).permutation(random),
    }


def check8(codes, absmax, block, code, dtype):
    out = F.dequantize_blockwise(
        torch.from_numpy(codes),
        F.QuantState(
            absmax=torch.from_numpy(absmax), code=torch.from_numpy(code), blocksize=block, dtype=oracle.TORCH[dtype]
        ),
    )
    assert out.dtype == oracle.TORCH[dtype] and out.shape == codes.shape
    got, expected = oracle.from_torch(out), oracle.dequantize(codes, code, absmax, block, dtype)
    assert oracle.same_bits(got, expected), (dtype, block, codes.size, oracle.where_different(got, expected))


@pytest.mark.parametrize("block", BLOCKS8)
@pytest.mark.parametrize("name", ["default", "unsigned", "fp8", "random"])
def test_8bit_every_length(dtype, block, name):
    code = maps()[name]
    for n in LENGTHS:
        codes = np.random.default_rng(n + block).integers(0, 256, n).astype(np.uint8)
        check8(codes, scales(-(-n // block), n), block, code, dtype)


@pytest.mark.large
def test_8bit_million(dtype):
    codes = np.random.default_rng(1).integers(0, 256, MILLION).astype(np.uint8)
    for name, block in (("default", 256), ("unsigned", 4096), ("random", 100)):
        check8(codes, scales(-(-MILLION // block), block), block, maps()[name], dtype)


def op4(packed, absmax, block, kind, n, dtype):
    return torch.ops.bitsandbytes.dequantize_4bit(
        torch.from_numpy(packed).reshape(-1, 1), torch.from_numpy(absmax), block, kind, [n], oracle.TORCH[dtype]
    )


@pytest.mark.parametrize("block", BLOCKS4)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_every_length(dtype, block, kind):
    for n in LENGTHS:
        packed = np.random.default_rng(n + block).integers(0, 256, (n + 1) // 2).astype(np.uint8)
        absmax = scales(-(-n // block), n)
        got = oracle.from_torch(op4(packed, absmax, block, kind, n, dtype))
        expected = oracle.dequantize(oracle.unpack(packed, n), oracle.TABLE4[kind], absmax, block, dtype)
        assert oracle.same_bits(got, expected), (dtype, block, n, kind, oracle.where_different(got, expected))


@pytest.mark.large
@pytest.mark.parametrize("kind, block", [("nf4", 64), ("fp4", 64), ("nf4", 4096), ("fp4", 32)])
def test_4bit_million(dtype, kind, block):
    packed = np.random.default_rng(2).integers(0, 256, (MILLION + 1) // 2).astype(np.uint8)
    absmax = scales(-(-MILLION // block), block)
    got = oracle.from_torch(op4(packed, absmax, block, kind, MILLION, dtype))
    expected = oracle.dequantize(oracle.unpack(packed, MILLION), oracle.TABLE4[kind], absmax, block, dtype)
    assert oracle.same_bits(got, expected), oracle.where_different(got, expected)


def test_fp4_codes_by_value(dtype):
    """All sixteen codes; code 8 is +0.0."""
    packed = np.array([0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF], np.uint8)
    for kind in ("fp4", "nf4"):
        got = oracle.from_torch(op4(packed, np.array([1.0], np.float32), 64, kind, 16, dtype))
        assert oracle.same_bits(got, oracle.rounded(oracle.TABLE4[kind], dtype)), kind


def test_rounding_is_once_and_to_even(dtype):
    """Products that lie on, just under and just over the middle of two 16-bit values."""
    code = np.zeros(256, np.float32)
    code[:8] = [
        1.0,
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        1 + 2.0**-11,
        1 + 3 * 2.0**-11,
        1 + 2.0**-11 + 2.0**-23,
        2.0**-25,
        -1.0,
    ]
    absmax = np.array([1.0, 1 + 2.0**-23, 1 - 2.0**-24, 3.0, 65504.0, 2.0**-126, 2.0**-24], np.float32)
    check8(np.tile(np.arange(8, dtype=np.uint8), absmax.size), absmax, 8, code, dtype)


@pytest.mark.parametrize("n", [1, 63, 65, 4097, 300001])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_4bit(dtype, n, kind):
    rng = np.random.default_rng(n)
    x = oracle.rounded((rng.standard_normal(n) * 0.05).astype(np.float32), dtype)
    x[: n // 4] = 0
    packed, state = F.quantize_4bit(oracle.to_torch(x, dtype), compress_statistics=True, quant_type=kind)
    got = F.dequantize_4bit(packed, state)
    assert got.dtype == oracle.TORCH[dtype] and got.shape == (n,)
    absmax = oracle.dequantize_scales(
        state.absmax.numpy(),
        state.state2.code.numpy(),
        state.state2.absmax.numpy(),
        np.float32(state.offset.item()),
        256,
    )
    nibbles = oracle.unpack(packed.numpy().reshape(-1), n)
    expected = oracle.dequantize(nibbles, oracle.TABLE4[kind], absmax, 64, dtype)
    got = oracle.from_torch(got)
    assert oracle.same_bits(got, expected), oracle.where_different(got, expected)
    assert np.all(got[: n // 4 // 64 * 64] == 0), "a zero block decodes to zero under nested statistics"


@pytest.mark.parametrize("n", [1, 257, 70001])
def test_nested_8bit(dtype, n):
    rng = np.random.default_rng(n)
    x = oracle.rounded(rng.standard_normal(n).astype(np.float32), dtype)
    q, state = F.quantize_blockwise(oracle.to_torch(x, dtype), blocksize=64, nested=True)
    got = oracle.from_torch(F.dequantize_blockwise(q, state))
    absmax = oracle.dequantize_scales(
        state.absmax.numpy(),
        state.state2.code.numpy(),
        state.state2.absmax.numpy(),
        np.float32(state.offset.item()),
        64,
    )
    expected = oracle.dequantize(q.numpy(), state.code.numpy(), absmax, 64, dtype)
    assert oracle.same_bits(got, expected), oracle.where_different(got, expected)


def test_scales_ops():
    """The two private operators on their own: several block sizes, a large offset that makes fma visible."""
    rng = np.random.default_rng(6)
    code = F.create_dynamic_map()
    for n, block in ((1, 256), (255, 256), (257, 256), (1000, 64), (5000, 7)):
        absmax = (rng.uniform(0.5, 1, n) * 1000).astype(np.float32)
        q, absmax2, offset = torch.ops.bitsandbytes._quantize_scales(torch.from_numpy(absmax), code, block)
        exact = oracle.mean(absmax)
        assert abs(offset.item() - exact) <= float(np.spacing(np.float32(exact)))
        codes, expected2 = oracle.quantize_scales(absmax, np.float32(offset.item()), code.numpy(), block)
        assert np.array_equal(q.numpy(), codes) and oracle.same_bits(absmax2.numpy(), expected2)
        plain = torch.ops.bitsandbytes._dequantize_scales(q, code, absmax2, offset, block)
        expected = oracle.dequantize_scales(codes, code.numpy(), expected2, np.float32(offset.item()), block)
        assert oracle.same_bits(plain.numpy(), expected), oracle.where_different(plain.numpy(), expected)


def test_mean_is_a_double_mean():
    """A million scales whose fp32 sum would be off; and one that cancels."""
    n = MILLION
    absmax = np.full(n, 0.1, np.float32)
    absmax[::1000] = 1e6
    code = F.create_dynamic_map()
    offset = torch.ops.bitsandbytes._quantize_scales(torch.from_numpy(absmax), code, 256)[2].item()
    exact = oracle.mean(absmax)
    assert abs(offset - exact) <= float(np.spacing(np.float32(exact)))


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 1023, 1024, 1025, 33000, 1024 * 1024 + 1, MILLION])
def test_mean_is_the_fixed_tree(n):
    """Rule 9, bit for bit: values of many magnitudes, so that another order of the sum would show."""
    rng = np.random.default_rng(n)
    absmax = (rng.random(n) * 10.0 ** rng.integers(-20, 20, n)).astype(np.float32)
    offset = torch.ops.bitsandbytes._quantize_scales(torch.from_numpy(absmax), F.create_dynamic_map(), 256)[2].item()
    assert np.float32(offset) == oracle.tree_mean(absmax)


def test_out_arguments_and_devices_of_result(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(oracle.TORCH[dtype])
    q, state = F.quantize_blockwise(x, blocksize=100)
    out = torch.empty_like(x)
    given = F.dequantize_blockwise(q, state, out=out)
    assert given is out and torch.equal(out, F.dequantize_blockwise(q, state))
    p, state = F.quantize_4bit(x, quant_type="nf4")
    out = torch.empty_like(x)
    given = F.dequantize_4bit(p, state, out=out)
    assert given is out and torch.equal(out, F.dequantize_4bit(p, state))
    wide = torch.full((1000, 2), 7.0, dtype=x.dtype)
    F.dequantize_4bit(p, state, out=wide[:, 0])
    assert torch.equal(wide[:, 0], out) and torch.all(wide[:, 1] == 7), (
        "a strided out= is filled, its neighbours are not"
    )


def test_bare_absmax_gives_f32():
    x = torch.randn(300, generator=torch.Generator().manual_seed(1)).half()
    q, state = F.quantize_blockwise(x, blocksize=64)
    out = F.dequantize_blockwise(q, absmax=state.absmax, blocksize=64)
    expected = oracle.dequantize(q.numpy(), state.code.numpy(), state.absmax.numpy(), 64, "f32")
    assert out.dtype == torch.float32 and oracle.same_bits(out.numpy(), expected)


def test_transposed_packed_weight():
    """A packed tensor given as [1, n] returns the transposed weight."""
    w = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    p, state = F.quantize_4bit(w, quant_type="nf4")
    assert torch.equal(F.dequantize_4bit(p.t(), state), F.dequantize_4bit(p, state).t())


def test_strided_codes_and_absmax():
    codes = torch.randint(0, 256, (40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    absmax = torch.rand(24 * 2, generator=torch.Generator().manual_seed(5))[::2]
    code = F.create_dynamic_map()
    view = codes.t()
    got = torch.ops.bitsandbytes.dequantize_blockwise(view, absmax[:19], code, 64, torch.float32)
    expected = oracle.dequantize(view.contiguous().numpy().ravel(), code.numpy(), absmax[:19].numpy().copy(), 64, "f32")
    assert got.shape == view.shape and oracle.same_bits(got.contiguous().numpy().ravel(), expected)
