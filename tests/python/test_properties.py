"""Properties of the quantisers and of Adam that hold for any input (hypothesis)."""

import json

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bitsandbytes.functional as F
import oracle

CODE = F.create_dynamic_map()
HALF_GAP8 = float(np.max(np.diff(CODE.numpy()))) / 2
HALF_GAP4 = {"nf4": (1 - 0.69619) / 2, "fp4": 1 / 6 + 1e-6}

lengths = st.integers(1, 700)
dtypes = st.sampled_from(sorted(oracle.TORCH))
kinds = st.sampled_from(["nf4", "fp4"])
blocks4 = st.sampled_from([32, 64, 128, 256])
blocks8 = st.integers(1, 300)


@st.composite
def ordinary(draw, least=1e-3, most=1e3):
    """fp32 values without NaN, Inf or subnormal scales: zeros, and magnitudes in a range where nothing underflows."""
    n = draw(lengths)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = np.exp(rng.uniform(np.log(least), np.log(most), n)) * rng.choice([-1.0, 1.0], n)
    x[rng.random(n) < draw(st.sampled_from([0.0, 0.1, 0.9]))] = 0
    return x.astype(np.float32)


anything = hnp.arrays(np.uint32, st.integers(0, 300), elements=st.integers(0, 2**32 - 1)).map(
    lambda a: a.view(np.float32)
)


def quant4(x, kind, block, dtype="f32"):
    p, s = F.quantize_4bit(oracle.to_torch(x, dtype), blocksize=block, quant_type=kind)
    return p, s, oracle.unpack(p.numpy().reshape(-1), x.size)


@given(anything, dtypes, blocks8)
def test_any_bits_8bit(x, dtype, block):
    """NaN, Inf, subnormals, signed zeros in any mixture: the codes are those of the definition."""
    x = oracle.rounded(x, dtype)
    q, s = F.quantize_blockwise(oracle.to_torch(x, dtype), blocksize=block)
    codes, absmax = oracle.quantize8(x, CODE.numpy(), block)
    assert np.array_equal(q.numpy(), codes) and oracle.same_bits(s.absmax.numpy(), absmax)
    got = oracle.from_torch(F.dequantize_blockwise(q, s))
    assert oracle.same_bits(got, oracle.dequantize(codes, CODE.numpy(), absmax, block, dtype))


@given(anything, dtypes, blocks4, kinds)
def test_any_bits_4bit(x, dtype, block, kind):
    x = oracle.rounded(x, dtype)
    p, s, _ = quant4(x, kind, block, dtype)
    nibbles, absmax = oracle.quantize4(x, kind, block)
    assert np.array_equal(p.numpy().reshape(-1), oracle.pack(nibbles, kind))
    assert oracle.same_bits(s.absmax.numpy(), absmax)
    got = oracle.from_torch(F.dequantize_4bit(p, s))
    assert oracle.same_bits(got, oracle.dequantize(nibbles, oracle.TABLE4[kind], absmax, block, dtype))


@given(anything, st.lists(st.floats(-1, 1, width=32), min_size=256, max_size=256), blocks8)
def test_any_sorted_map(x, values, block):
    """Maps with runs of equal entries included: the decoded values agree."""
    code = np.sort(np.array(values, np.float32))
    q, s = F.quantize_blockwise(torch.from_numpy(x.copy()), code=torch.from_numpy(code), blocksize=block)
    codes, absmax = oracle.quantize8(x, code, block)
    assert oracle.same_bits(s.absmax.numpy(), absmax) and np.array_equal(code[q.numpy()], code[codes])


@given(ordinary(), blocks8, dtypes)
def test_8bit_error_bound(x, block, dtype):
    """|x - x'| <= half the widest gap of the map times absmax, and one rounding of the dtype."""
    x = oracle.rounded(x, dtype)
    q, s = F.quantize_blockwise(oracle.to_torch(x, dtype), blocksize=block)
    got = oracle.from_torch(F.dequantize_blockwise(q, s)).astype(np.float64)
    scale = np.repeat(s.absmax.numpy(), block)[: x.size].astype(np.float64)
    eps = {"f32": 2.0**-22, "f16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    assert np.all(np.abs(x - got) <= (HALF_GAP8 + eps) * scale + 2.0**-24)


@given(ordinary(), blocks4, kinds, dtypes)
def test_4bit_error_bound(x, block, kind, dtype):
    x = oracle.rounded(x, dtype)
    p, s, _ = quant4(x, kind, block, dtype)
    got = oracle.from_torch(F.dequantize_4bit(p, s)).astype(np.float64)
    scale = np.repeat(s.absmax.numpy(), block)[: x.size].astype(np.float64)
    eps = {"f32": 2.0**-22, "f16": 2.0**-11, "bf16": 2.0**-8}[dtype]
    assert np.all(np.abs(x - got) <= (HALF_GAP4[kind] + eps) * scale + 2.0**-24)


@given(ordinary(), blocks4, kinds, dtypes)
def test_4bit_twice_changes_nothing(x, block, kind, dtype):
    """Quantising decoded values gives the same values and scales again."""
    x = oracle.rounded(x, dtype)
    p, s, _ = quant4(x, kind, block, dtype)
    once = F.dequantize_4bit(p, s)
    p2, s2 = F.quantize_4bit(once, blocksize=block, quant_type=kind)
    assert torch.equal(s2.absmax, s.absmax)
    assert torch.equal(F.dequantize_4bit(p2, s2), once)
    if kind == "nf4":
        assert torch.equal(p2, p)


@given(ordinary(), blocks8)
def test_8bit_twice_changes_nothing_with_positive_peaks(x, block):
    """The signed dynamic map has 1.0 and no -1.0: a block whose largest magnitude is positive is a fixed point."""
    blocks = -(-x.size // block)
    for b in range(blocks):
        part = x[b * block : (b + 1) * block]
        part[np.argmax(np.abs(part))] = np.max(np.abs(part))
    q, s = F.quantize_blockwise(torch.from_numpy(x), blocksize=block)
    once = F.dequantize_blockwise(q, s)
    q2, s2 = F.quantize_blockwise(once, blocksize=block)
    assert torch.equal(s2.absmax, s.absmax) and torch.equal(F.dequantize_blockwise(q2, s2), once)


@given(ordinary(), st.integers(-20, 20), blocks8, blocks4, kinds)
def test_a_power_of_two_moves_absmax_never_a_code(x, shift, block, block4, kind):
    moved = np.ldexp(x, shift).astype(np.float32)
    q, s = F.quantize_blockwise(torch.from_numpy(x), blocksize=block)
    q2, s2 = F.quantize_blockwise(torch.from_numpy(moved), blocksize=block)
    assert torch.equal(q, q2) and torch.equal(torch.ldexp(s.absmax, torch.tensor(shift)), s2.absmax)
    p, t, _ = quant4(x, kind, block4)
    p2, t2, _ = quant4(moved, kind, block4)
    assert torch.equal(p, p2) and torch.equal(torch.ldexp(t.absmax, torch.tensor(shift)), t2.absmax)


@given(anything, st.integers(0, 2**32 - 1), blocks4, kinds)
def test_a_block_does_not_see_its_neighbours(x, other, block, kind):
    """Replacing every other block by any bits leaves the remaining codes and scales."""
    if x.size <= block:
        return
    noise = np.random.default_rng(other).integers(0, 2**32, x.size, dtype=np.uint32).view(np.float32)
    odd = (np.arange(x.size) // block) % 2 == 1
    mixed = np.where(odd, noise, x).astype(np.float32)
    _, s, a = quant4(x, kind, block)
    _, t, b = quant4(mixed, kind, block)
    assert np.array_equal(a[~odd], b[~odd]) and oracle.same_bits(s.absmax[::2].numpy(), t.absmax[::2].numpy())
    q, s = F.quantize_blockwise(torch.from_numpy(x.copy()), blocksize=block)
    r, t = F.quantize_blockwise(torch.from_numpy(mixed), blocksize=block)
    assert np.array_equal(q.numpy()[~odd], r.numpy()[~odd]) and oracle.same_bits(
        s.absmax[::2].numpy(), t.absmax[::2].numpy()
    )


@given(ordinary(), blocks8, st.randoms())
def test_order_within_a_block_does_not_matter(x, block, random):
    order = []
    for b in range(0, x.size, block):
        part = list(range(b, min(b + block, x.size)))
        random.shuffle(part)
        order += part
    q, s = F.quantize_blockwise(torch.from_numpy(x), blocksize=block)
    r, t = F.quantize_blockwise(torch.from_numpy(x[order]), blocksize=block)
    assert np.array_equal(q.numpy()[order], r.numpy()) and torch.equal(s.absmax, t.absmax)


@given(ordinary(), kinds, blocks4)
def test_codes_rise_with_the_values(x, kind, block):
    """Within a block, a larger value never decodes to less."""
    p, s, _ = quant4(np.sort(x[:block]), kind, block)
    assert torch.all(torch.diff(F.dequantize_4bit(p, s)) >= 0)
    q, s = F.quantize_blockwise(torch.from_numpy(np.sort(x)), blocksize=x.size)
    assert np.all(np.diff(q.numpy().astype(int)) >= 0)


@given(ordinary(), kinds, dtypes, st.booleans(), st.booleans())
def test_state_dict_round_trip(x, kind, dtype, nested, packed):
    """as_dict and from_dict, packed and not, with any key prefix; the decoded weight stays bit-equal."""
    p, s = F.quantize_4bit(oracle.to_torch(x, dtype), quant_type=kind, compress_statistics=nested)
    d = s.as_dict(packed=packed)
    if packed:
        assert all(isinstance(v, torch.Tensor) for v in d.values())
        payload = d[f"quant_state.bitsandbytes__{kind}"]
        assert payload.dtype == torch.uint8 and payload.dim() == 1
        names = list(json.loads(bytes(payload.tolist()).decode("utf-8")))
        expected = ["quant_type", "blocksize", "dtype", "shape"]
        assert names == expected + (["nested_blocksize", "nested_dtype", "nested_offset"] if nested else [])
    prefixed = {f"layers.0.weight.{k}": v for k, v in d.items()}
    for given_dict in (dict(d), prefixed):
        back = F.QuantState.from_dict(given_dict, torch.device("cpu"))
        assert back == s and back.shape == torch.Size([x.size]) and back.dtype == s.dtype
        assert torch.equal(F.dequantize_4bit(p, back), F.dequantize_4bit(p, s))


@given(st.integers(0, 2**32 - 1), st.integers(1, 600), dtypes)
def test_adam_is_odd(seed, n, dtype):
    """Without decay, turning the sign of p and g turns the sign of p and m; v is unchanged."""
    rng = np.random.default_rng(seed)
    p, g = (oracle.to_torch(rng.standard_normal(n).astype(np.float32), dtype) for _ in range(2))
    results = []
    for sign in (1, -1):
        q, m, v = (p * sign).clone(), torch.zeros(n), torch.zeros(n)
        for step in (1, 2):
            F.optimizer_update_32bit("adam", g * sign, q, m, 0.9, 1e-8, step, 1e-2, v, 0.999)
        results.append((q * sign, m * sign, v))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@given(st.integers(0, 2**32 - 1), st.integers(1, 600), dtypes, st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_adam_sigma_is_a_scaled_gradient(seed, n, dtype, sigma):
    """gnorm_scale by a power of two equals the gradient times it."""
    rng = np.random.default_rng(seed)
    p, g = (oracle.to_torch(rng.standard_normal(n).astype(np.float32), dtype) for _ in range(2))
    results = []
    for grad, scale in ((g, sigma), (g * sigma, 1.0)):
        q, codes = p.clone(), [torch.zeros(n, dtype=torch.uint8) for _ in range(2)]
        absmax = [torch.zeros(-(-n // 256)) for _ in range(2)]
        for step in (1, 2):
            F.optimizer_update_8bit_blockwise(
                "adam", grad, q, *codes, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
                CODE, F.create_dynamic_map(signed=False), *absmax, weight_decay=0.1, gnorm_scale=scale,
            )  # fmt: skip
        results.append((q, *codes, *absmax))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
