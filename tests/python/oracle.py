"""Independent definitions of the numbers: block quantisation, dequantisation and quantiles, in plain numpy.

Nothing here is taken from the library: the tables and thresholds are typed from docs/FORMAT.md, every operation is one
IEEE fp32 operation of numpy (no fused multiply-add), and the 16-bit conversions are written out. A value of any dtype
is held as the fp32 array of the same values; "f32", "f16", "bf16" name the dtypes.
"""

import math

import numpy as np
import torch

from oracle_maps import linspace32

F32 = np.float32
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

# Index -> value of the two 4-bit types that can be quantised.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=F32,
)
FP4_MAGNITUDE = [0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25]
FP4 = np.array(FP4_MAGNITUDE + [0.0] + [-x for x in FP4_MAGNITUDE[1:]], dtype=F32)
TABLE4 = {"nf4": NF4, "fp4": FP4}
ZERO4 = {"nf4": 7, "fp4": 0}

# Largest u that still takes the lower code of each NF4 pair; |u| above which FP4 takes the magnitude code beside it.
NF4_THRESHOLD = np.array(
    [
        -0.8480964004993439,
        -0.6106329262256622,
        -0.4599952697753906,
        -0.33967943489551544,
        -0.23460740596055984,
        -0.13791173323988914,
        -0.045525018125772476,
        0.03979014977812767,
        0.1202552504837513,
        0.2035212516784668,
        0.2920137718319893,
        0.3893125355243683,
        0.5016634166240692,
        0.6427869200706482,
        0.8614784181118011,
    ],
    dtype=F32,
)
FP4_THRESHOLD = np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], dtype=F32)
FP4_ABOVE = np.array([0b000, 0b001, 0b110, 0b111, 0b100, 0b101, 0b010, 0b011], dtype=np.uint8)


# ---- dtypes


def bf16_bits(x):
    """fp32 -> the upper 16 bits, rounded to nearest even; NaN stays NaN."""
    u = np.ascontiguousarray(x, dtype=F32).view(np.uint32).astype(np.uint64)
    low, high = u & 0xFFFF, u >> 16
    up = (low > 0x8000) | ((low == 0x8000) & ((high & 1) == 1))
    return np.where(np.isnan(x), 0x7FC0, high + up).astype(np.uint16)


def rounded(x, dtype):
    """fp32 values -> the nearest values of dtype, as fp32."""
    x = np.asarray(x, dtype=F32)
    if dtype == "f32":
        return x
    with np.errstate(over="ignore"):
        if dtype == "f16":
            return x.astype(np.float16).astype(F32)
    return (bf16_bits(x).astype(np.uint32) << 16).view(F32).reshape(x.shape)


def to_torch(x, dtype):
    """fp32 numpy -> torch tensor of dtype with the rounded values, its own memory."""
    x = np.ascontiguousarray(x, dtype=F32)
    if dtype == "bf16":
        return torch.from_numpy(bf16_bits(x).view(np.int16).copy()).view(torch.bfloat16)
    with np.errstate(over="ignore"):
        return torch.from_numpy(x.astype(np.float16 if dtype == "f16" else F32, copy=True))


def from_torch(t):
    """torch tensor of any of the three dtypes -> fp32 numpy with the same values and shape."""
    t = t.detach().contiguous()
    if t.dtype is torch.bfloat16:
        bits = t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16
        return bits.view(F32)
    return t.numpy().astype(F32)


def same_bits(a, b):
    """Are two fp32 arrays equal, the sign of zero included? NaN equals NaN."""
    a, b = np.asarray(a, dtype=F32), np.asarray(b, dtype=F32)
    if a.shape != b.shape:
        return False
    nan = np.isnan(a) & np.isnan(b)
    return bool(np.all(nan | (a.view(np.uint32) == b.view(np.uint32)))) if a.size else True


def where_different(a, b):
    """The first few places where two flat arrays differ, as text for an assertion."""
    a, b = np.asarray(a).ravel(), np.asarray(b).ravel()
    if a.shape != b.shape:
        return f"shapes {a.shape} and {b.shape}"
    if a.dtype == F32:
        unequal = (a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b))
    else:
        unequal = a != b
    at = np.flatnonzero(unequal)
    return f"{at.size} of {a.size} differ: " + ", ".join(f"[{i}] got {a[i]!r} expected {b[i]!r}" for i in at[:6])


# ---- block quantisation


def block_absmax(x, block):
    """Largest |x| of each block of the flat array; NaN does not count. fp32 [ceil(n / block)]."""
    blocks = -(-x.size // block)
    magnitude = np.zeros(blocks * block, dtype=F32)
    magnitude[: x.size] = np.where(np.isnan(x), 0, np.abs(x))
    return magnitude.reshape(blocks, block).max(axis=1) if blocks else np.zeros(0, F32)


def scaled(x, block):
    """u = x * (1 / absmax), and absmax, and which elements lie in a block whose codes are all the code of zero."""
    absmax = block_absmax(x, block)
    with np.errstate(all="ignore"):
        r = (F32(1) / absmax).astype(F32)
        dead = (absmax == 0) | ~np.isfinite(r)
        u = (x * np.repeat(r, block)[: x.size]).astype(F32)
    return u, absmax, np.repeat(dead, block)[: x.size]


def midpoints(code):
    """fp32 midpoints of neighbouring entries of an ascending map."""
    return ((code[:-1] + code[1:]) * F32(0.5)).astype(F32)


def nearest8(u, code):
    """Index of the nearest entry: how many midpoints lie strictly below u; ON one, the even index. NaN: 0."""
    mid = midpoints(code)
    k = np.searchsorted(mid, u, side="left")
    on = mid[np.minimum(k, mid.size - 1)] == u
    k = np.where(on & (k % 2 == 1), k + 1, k)
    return np.where(np.isnan(u), 0, k).astype(np.uint8)


def nearest8_slow(u, code):
    """The same definition without a search, one value at a time."""
    mid, out = midpoints(code), []
    for value in u:
        below = sum(bool(m < value) for m in mid)
        on = below < mid.size and mid[below] == value
        out.append(below + 1 if on and below % 2 else below)
    return np.array(out, dtype=np.uint8)


def zero_code8(code):
    return int(nearest8(np.zeros(1, F32), code)[0])


def quantize8(x, code, block):
    """Flat fp32 x -> (codes u8 [n], absmax fp32 [blocks])."""
    u, absmax, dead = scaled(x, block)
    return np.where(dead, zero_code8(code), nearest8(u, code)).astype(np.uint8), absmax


def nearest4(u, kind):
    if kind == "nf4":
        k = np.searchsorted(NF4_THRESHOLD, u, side="left")
    else:
        k = FP4_ABOVE[np.searchsorted(FP4_THRESHOLD, np.abs(u), side="left")] + 8 * (u < 0)
    return np.where(np.isnan(u), 0, k).astype(np.uint8)


def quantize4(x, kind, block):
    """Flat fp32 x -> (nibbles u8 [n], absmax fp32 [blocks])."""
    u, absmax, dead = scaled(x, block)
    return np.where(dead, ZERO4[kind], nearest4(u, kind)).astype(np.uint8), absmax


def pack(nibbles, kind):
    """Element 2i in the high nibble of byte i; a missing last element is the code of zero."""
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(ZERO4[kind]))
    return (nibbles[0::2] * 16 + nibbles[1::2]).astype(np.uint8)


def unpack(packed, n):
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]


def dequantize(codes, code, absmax, block, dtype):
    """code[codes] * absmax of its block: one fp32 product, then one rounding to dtype. fp32 array of the values."""
    with np.errstate(all="ignore"):
        value = (code[codes] * np.repeat(absmax, block)[: codes.size]).astype(F32)
    return rounded(value, dtype)


def quantize_scales(absmax, offset, code, block=256):
    """Nested statistics, given the offset that was used: codes and absmax of (absmax - offset)."""
    with np.errstate(all="ignore"):
        return quantize8((absmax - F32(offset)).astype(F32), code, block)


def dequantize_scales(codes, code, absmax2, offset, block=256):
    """code[codes] * absmax2 + offset in fp32, two roundings."""
    with np.errstate(all="ignore"):
        product = (code[codes] * np.repeat(absmax2, block)[: codes.size]).astype(F32)
        return (product + F32(offset)).astype(F32)


def mean(x):
    """The mean, correctly rounded sum, in double."""
    return math.fsum(float(v) for v in x) / len(x) if len(x) else 0.0


def tree_mean(x):
    """The mean over the fixed tree of rule 9: runs of 1024, 32 lanes, folded in half; rounded once to fp32."""
    level = x.astype(np.float64)
    while level.size > 1:
        rows = np.zeros(-(-level.size // 1024) * 1024)
        rows[: level.size] = level
        rows = rows.reshape(-1, 32, 32)
        total = np.zeros((len(rows), 32))
        for row in range(32):
            total += rows[:, row]
        while total.shape[1] > 1:
            half = total.shape[1] // 2
            total = total[:, :half] + total[:, half:]
        level = total[:, 0]
    return F32(level[0] / x.size)


# ---- quantiles


def quantile_targets(offset, count):
    """The probabilities: offset + t (1 - 2 offset) / 255 with t = trunc(linspace(0, 255, count)) in fp32."""
    t = [int(v) for v in linspace32(0, 255, count)]
    return [offset + i * (1 - 2 * offset) / 255 for i in t]


def quantiles(x, offset, count):
    """The elements of rank rint(p * (n - 1)), NaN above every number. fp32 [count]."""
    ordered = np.sort(x)
    ranks = [round(p * (x.size - 1)) for p in quantile_targets(offset, count)]
    return ordered[ranks].astype(F32)
