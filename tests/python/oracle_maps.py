"""Independent constructions of the 256-entry maps, typed from docs/FORMAT.md section 1, in numpy."""

import numpy as np

F32 = np.float32


def linspace32(start, stop, steps):
    """fp32 linspace: fp32 step, the lower half counted from the start, the upper half from the stop."""
    if steps == 1:
        return np.array([start], dtype=F32)
    start, stop = F32(start), F32(stop)
    step = F32((stop - start) / F32(steps - 1))
    out = np.empty(steps, dtype=F32)
    for i in range(steps):
        out[i] = start + step * F32(i) if i < steps // 2 else stop - step * F32(steps - 1 - i)
    return out


def _filled(values):
    """Zeros up to 256, ascending."""
    out = np.zeros(256, dtype=F32)
    out[: len(values)] = values
    return np.sort(out)


def _centres(cells, scale):
    edges = linspace32(0.1, 1.0, cells + 1)
    middle = ((edges[:-1] + edges[1:]) / F32(2)).astype(F32)
    return [F32(F32(scale) * v) for v in middle]


def dynamic(signed=True, exponent_bits=7, total_bits=8):
    """Decades of cell centres, twice as many unsigned; centres that fill up the top decade; negatives, 0 and 1."""
    n = total_bits - 1
    values = []
    for i in range(exponent_bits):
        cells = int(2.0 ** (i + n - exponent_bits + (0 if signed else 1)))
        if cells:
            values += _centres(cells, 10.0 ** (i - (exponent_bits - 1)))
    extra = (int(2.0 ** (n - exponent_bits)) - 1) * (1 if signed else 2)
    if extra > 0:
        values += _centres(extra, 1.0)
    if signed:
        values += [-v for v in values]
    values += [F32(0), F32(1)]
    assert len(values) == 2**total_bits, (signed, exponent_bits, total_bits)
    return _filled(values)


def dynamic64(signed=True):
    """The default map in double: what the fp32 one approximates."""
    values = [0.0, 1.0]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        for j in range(cells):
            values.append((0.1 + 0.9 * (j + 0.5) / cells) * 10.0 ** (i - 6))
            if signed:
                values.append(-values[-1])
    return np.sort(np.array(values))


def linear(signed=True, total_bits=8, add_zero=True):
    """fp32 linspace with zeros inserted at the middle."""
    points = 2**total_bits - (1 if signed and (add_zero or total_bits < 8) else 0)
    values = linspace32(-1.0 if signed else 0.0, 1.0, points)
    half = points // 2
    return np.concatenate([values[:half], np.zeros(256 - points, F32), values[half:]])


def fp8(signed=True, exponent_bits=5, precision_bits=2):
    """Every (field, fraction): a larger exponent field is a smaller value, field 0 holds the denormals."""
    bias = 2 ** (exponent_bits - 1)
    values = []
    for field in range(2**exponent_bits):
        for mantissa in range(2**precision_bits):
            fraction = mantissa / 2**precision_bits
            value = fraction * 2.0**-bias if field == 0 else (1 + fraction) * 2.0 ** (bias + 1 - field)
            values += [value, -value] if signed else [value]
    out = _filled(np.array(values, dtype=F32))
    return (out / out.max()).astype(F32)


def quantile(estimates):
    """Estimates and one zero, zeros up to 256, sorted, divided by the largest magnitude."""
    out = _filled(list(estimates) + [F32(0)])
    return (out / np.abs(out).max()).astype(F32)
