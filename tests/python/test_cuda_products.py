"""Matrix products on CUDA: against float64 and the CPU, every shape and form; layers without waiting, and in graphs."""

import copy
import re
from ctypes import c_int32, c_void_p

import pytest
import torch

import bitsandbytes.functional as F
import cuda_cases
import test_gemm_ops as on_cpu
from cuda_cases import KINDS, check_same, f32_slack, needs_cuda, on_device, values
from gemm_cases import CASES, OPS, Bench, normal, weight_4bit, weight_int8
from test_gemm_ops import DTYPES, UNIT, arguments, close, int8_reference, product

pytestmark = needs_cuda

SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
# Of the weight: single elements, odd rows that begin in mid-byte and mid-block, whole groups, more than one tile.
WEIGHTS = [(1, 1), (1, 7), (7, 1), (3, 129), (20, 67), (65, 96), (64, 256), (9, 1100), (130, 40), (200, 1031)]
ROWS = [1, 2, 3, 4, 5, 8, 9, 64, 70, 133]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_weight = pytest.mark.parametrize("n, k", WEIGHTS)


def moved(value):
    """Tensors on the device, whatever else as it is."""
    return on_device(value) if isinstance(value, torch.Tensor) else value


def results(value):
    return list(value) if isinstance(value, (tuple, list)) else [value]


def check_all_same(got, expected, what=""):
    """Tensors or None, one by one."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), (what, i)
        if b is not None:
            check_same(a, b, (what, i))


def shifted(t):
    """The same values on the device, one element off its alignment."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=cuda_cases.DEVICE)[1:].view(t.shape)
    return room.copy_(t)


def rounding(dtype):
    """Weights are rounded to a 16-bit dtype, from a table of f16, by the fast kernels (NUMERICS rule 35)."""
    return 0.0 if dtype == torch.float32 else UNIT[dtype] + 2.0**-11


# ---------------------------------------------------------------- 4 bits


@every_dtype
@every_weight
@pytest.mark.parametrize("nested", [False, True])
def test_linear_4bit(dtype, n, k, nested):
    kind, block = ("nf4", "fp4")[n % 2], (32, 64, 4096)[(n + k) % 3]
    packed, state, w = weight_4bit(n, k, nested=nested, quant_type=kind, blocksize=block)
    weight = [moved(t) for t in arguments(packed, state)]
    for m in ROWS:
        x, bias = normal(m, k, dtype=dtype), normal(n, dtype=dtype, seed=9) if m % 2 else None
        expected, magnitude = product(x, w)
        if bias is not None:
            expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
        for form in (on_device(x), shifted(x)):
            got = OPS._linear_4bit(form, *weight, moved(bias), False)
            close(got.cpu(), expected, magnitude, f32_slack(k) + rounding(dtype))
            check_same(OPS._linear_4bit(form, *weight, moved(bias), False), got, "the same call")
            close(OPS._linear_4bit(form, *weight, moved(bias), True).cpu(), expected, magnitude, f32_slack(k))


@every_dtype
@every_weight
@pytest.mark.parametrize("nested", [False, True])
def test_linear_4bit_grad(dtype, n, k, nested):
    packed, state, w = weight_4bit(n, k, nested=nested, quant_type=("fp4", "nf4")[n % 2], blocksize=64)
    weight = [moved(t) for t in arguments(packed, state)]
    for m in ROWS:
        grad = normal(m, n, dtype=dtype)
        expected, magnitude = product(grad, w.t())
        bound = f32_slack(n) + rounding(dtype)
        got = OPS._linear_4bit_grad(on_device(grad), *weight)
        close(got.cpu(), expected, magnitude, bound)
        check_same(OPS._linear_4bit_grad(on_device(grad), *weight), got, "the same call")
        close(OPS._linear_4bit_grad(shifted(grad), *weight).cpu(), expected, magnitude, bound)


@pytest.mark.parametrize("m", [1, 40])
def test_codes_at_any_address(m):
    packed, state, w = weight_4bit(64, 256)
    weight = arguments(packed, state)
    for form in (shifted(packed), on_device(packed).t(), on_device(torch.stack([packed, packed], 1))[:, 0]):
        x = normal(m, 256)
        expected, magnitude = product(x, w)
        got = OPS._linear_4bit(on_device(x), form, *map(moved, weight[1:]), None, False)
        close(got.cpu(), expected, magnitude, f32_slack(256))


@pytest.mark.parametrize("blocksize2", [1, 3, 256, 1000])
def test_nested_scales_in_blocks_of_any_size(blocksize2):
    packed, state, _ = weight_4bit(20, 67)
    code = F.create_dynamic_map()
    nested = OPS._quantize_scales(state.absmax, code, blocksize2)
    plain = OPS._dequantize_scales(nested[0], code, *nested[1:], blocksize2)
    scales = nested[0], code, nested[1], nested[2], blocksize2
    for m in (3, 30):
        x = on_device(normal(m, 67))
        got = OPS._linear_4bit(x, *map(moved, (packed, *scales)), 32, "nf4", 20, 67, None, True)
        same = OPS._linear_4bit(x, *map(moved, (packed, plain)), None, None, None, 0, 32, "nf4", 20, 67, None, True)
        check_same(got, same)


@every_dtype
@pytest.mark.parametrize("m", [1, 3, 20])
def test_gemv_4bit_multiplies_by_the_values_it_is_given(dtype, m):
    """On CUDA they are read where they are, so that nothing waits: any 16 values do, on the CPU those of a type."""
    packed, state, _ = weight_4bit(40, 96)
    x, weight = normal(m, 96, dtype=dtype), (on_device(packed), [40, 96], on_device(state.absmax))
    other = torch.linspace(-3, 2, 16)
    for code in (state.code, F.get_4bit_type("fp4", device="cpu"), other):
        code = code.flatten()[:16]
        nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
        w = (code[nibbles].view(-1, 32) * state.absmax[:, None]).view(40, 96).double()
        got = OPS.gemv_4bit(on_device(x), *weight, on_device(code), 32)
        close(got.cpu(), *product(x, w), f32_slack(96))
        out = torch.empty_like(got)
        OPS.gemv_4bit.out(on_device(x), *weight, on_device(code), 32, out)
        check_same(out, got)


@every_dtype
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_function_that_clients_bind(dtype, kind, rows):
    packed, state, w = weight_4bit(40, 192, quant_type=kind, blocksize=64)
    x = normal(rows, 192, dtype=dtype)
    operands = [on_device(t) for t in (x, packed, state.absmax, state.code)]
    out = torch.full((rows, 40), float("nan"), dtype=dtype, device=cuda_cases.DEVICE)
    name = {"f32": "fp32", "f16": "fp16", "bf16": "bf16"}[SHORT[dtype]]
    getattr(F.lib, f"cgemm_4bit_inference_naive_{name}")(
        c_int32(40), c_int32(rows), c_int32(192), *map(F.get_ptr, operands), F.get_ptr(out),
        c_int32(40), c_int32(96), c_int32(40), c_int32(64), c_void_p(torch.cuda.current_stream().cuda_stream),
    )  # fmt: skip
    close(out.cpu(), *product(x, w), f32_slack(192))


# ---------------------------------------------------------------- int8: quantising gives the CPU's bits


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.0, 1.5, 1e-60, float("inf")])
def test_quantisers_give_the_bits_of_the_cpu(dtype, kind, threshold):
    for rows, cols in [(1, 1), (1, 67), (3, 5), (9, 64), (70, 300), (2, 1024), (5, 1040), (4, 2503), (2, 9000)]:
        x = values(rows * cols, SHORT[dtype], kind).view(rows, cols)
        for operator in (OPS.int8_vectorwise_quant, OPS.int8_double_quant):
            expected = operator(x, threshold)
            for form in (on_device(x), shifted(x), on_device(x.t().contiguous()).t()):
                check_all_same(operator(form, threshold), expected, (rows, cols))
        codes, stats = expected[0], expected[2]
        check_same(
            OPS.int8_vectorwise_dequant(on_device(codes), on_device(stats)), OPS.int8_vectorwise_dequant(codes, stats)
        )


def test_quantising_a_million_values():
    x = values(700 * 3000, "bf16").view(700, 3000)
    for threshold in (0.0, 4.0):
        check_all_same(OPS.int8_double_quant(on_device(x), threshold), OPS.int8_double_quant(x, threshold))


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 8191, 8192, 8193, 20001])
def test_outlier_columns_are_listed_in_order(count):
    flags = (torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.3).to(torch.uint8)
    check_same(OPS._int8_outlier_columns(on_device(flags)), flags.nonzero()[:, 0])


# ---------------------------------------------------------------- int8 products


@every_weight
def test_int8_products_are_exact(n, k):
    b, _, _ = weight_int8(n, k)
    for m in ROWS:
        a = torch.randint(-128, 128, (m, k), generator=torch.Generator().manual_seed(m), dtype=torch.int8)
        a[0, 0] = b[0, 0] = -128
        expected = (a.double() @ b.double().t()).int()
        for left, right in ((on_device(a), on_device(b)), (shifted(a), on_device(b.t().contiguous()).t())):
            check_same(F.int8_linear_matmul(left, right), expected, m)
        out = torch.zeros(n, m, dtype=torch.int32, device=cuda_cases.DEVICE).t()
        F.int8_linear_matmul(on_device(a), on_device(b), out=out)
        check_same(out, expected, m)


@pytest.mark.parametrize("m", [2, 9])
def test_int8_products_of_the_largest_sums(m):
    a = torch.full((m, 131071), -128, dtype=torch.int8, device=cuda_cases.DEVICE)
    assert torch.all(F.int8_linear_matmul(a, a) == 128 * 128 * 131071)
    assert torch.all(F.int8_linear_matmul(a, -(a + 1)) == -128 * 127 * 131071)
    with pytest.raises(NotImplementedError, match="131072"):
        F.int8_linear_matmul(*[torch.zeros(1, 131072, dtype=torch.int8, device=cuda_cases.DEVICE)] * 2)


@every_dtype
@every_weight
@pytest.mark.parametrize("threshold", [0.0, 1.5, 50.0])
def test_linear_int8(dtype, n, k, threshold):
    """Without outliers the CPU's bits (NUMERICS rule 34); with them, within rounding of the definition."""
    codes, scales, _ = weight_int8(n, k)
    weight = on_device(codes), on_device(scales)
    for i, m in enumerate(ROWS):
        x = normal(m, k, dtype=dtype)
        bias = None if i % 4 == 3 else normal(n, dtype=DTYPES[i % 4], seed=9)
        expected, flags = OPS._linear_int8(x, codes, scales, bias, threshold)
        got, marked = OPS._linear_int8(on_device(x), *weight, moved(bias), threshold)
        check_same(marked, flags, m)
        if not flags.any():
            check_same(got, expected, m)
        # NUMERICS rule 34: of outlier columns, what the codes leave over is rounded to 16 bits.
        # One of f32 is three values of 16 bits: so many products are summed in f32.
        outliers = int(flags.sum()) * (3 if dtype == torch.float32 else 1)
        slack = 2.0**-18 if dtype == torch.bfloat16 and outliers else max(2.0**-21, f32_slack(outliers))
        close(got.cpu(), *int8_reference(x, codes, scales, bias, threshold), slack)
        check_same(OPS._linear_int8(shifted(x), *weight, moved(bias), threshold)[0], got, m)


@pytest.mark.parametrize("m", [1, 5, 20])
def test_many_outlier_columns(m):
    codes, scales, _ = weight_int8(3, 20000)
    x = normal(m, 20000)
    got, _ = OPS._linear_int8(on_device(x), on_device(codes), on_device(scales), None, 0.7)
    close(got.cpu(), *int8_reference(x, codes, scales, None, 0.7), 1e-5)


@every_dtype
@every_weight
def test_linear_int8_grad(dtype, n, k):
    codes, scales, w = weight_int8(n, k)
    for m in ROWS:
        grad = normal(m, n, dtype=dtype)
        got = OPS._linear_int8_grad(on_device(grad), on_device(codes), on_device(scales))
        # Tiles on matrix units round the weight to the dtype of the gradient.
        slack = f32_slack(n + 3) + (0 if dtype == torch.float32 else on_cpu.UNIT[dtype])
        close(got.cpu(), *product(grad, w.t()), slack)
        check_same(OPS._linear_int8_grad(on_device(grad), on_device(codes), on_device(scales)), got, m)
        close(
            OPS._linear_int8_grad(shifted(grad), on_device(codes), on_device(scales)).cpu(),
            *product(grad, w.t()),
            slack,
        )


# ---------------------------------------------------------------- every operator


SUMS_OF_FLOATS = ("outliers", "4bit", "grad", "mixed_scaled_mm-")  # all others have the bits of the CPU


@pytest.mark.parametrize("key", on_cpu.SAMPLES)
def test_operators_agree_with_the_cpu(key):
    op, args = on_cpu.fresh(key)
    there = [moved(a) for a in args]
    expected, got = results(op(*args)), results(op(*there))
    if ".out" in key:
        expected, got = [args[-1]], [there[-1]]
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if b is None:
            continue
        assert a.device.type == cuda_cases.DEVICE.type and a.stride() == b.stride()
        if not b.dtype.is_floating_point or not any(part in key for part in SUMS_OF_FLOATS):
            check_same(a, b, key)
            continue
        scale = b.double().abs().max().item() if b.numel() else 0.0
        # Both sides are within one rounding; the CPU's 16-bit integers of few rows add 1e-4 (NUMERICS rule 32).
        close(a.cpu(), b.double(), torch.full(b.shape, scale, dtype=torch.float64), 2e-4 + on_cpu.UNIT[b.dtype])


@pytest.mark.parametrize("n, k", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("m", [0, 3, 20])
def test_products_without_elements(n, k, m):
    def ones(*shape):
        return torch.ones(*shape, device=cuda_cases.DEVICE)

    packed, absmax = on_device(torch.zeros(0, 1, dtype=torch.uint8)), ones(0)
    bias = on_device(torch.arange(n, dtype=torch.float32))
    rest = packed, absmax, None, None, None, 0, 64, "nf4", n, k
    check_same(OPS._linear_4bit(ones(m, k), *rest, bias, False), bias.expand(m, n))
    check_same(OPS._linear_4bit_grad(ones(m, n), *rest), torch.zeros(m, k))
    codes, scales = on_device(torch.zeros(n, k, dtype=torch.int8)), ones(n)
    for threshold in (0.0, 6.0):
        got, flags = OPS._linear_int8(ones(m, k), codes, scales, bias, threshold)
        check_same(got, bias.expand(m, n))
        assert flags.numel() == (k if threshold else 0) and not flags.any()
        expected = OPS.int8_double_quant(torch.ones(m, k), threshold)
        check_all_same(OPS.int8_double_quant(ones(m, k), threshold), expected)
    check_same(OPS._linear_int8_grad(ones(m, n), codes, scales), torch.zeros(m, k))


@pytest.mark.parametrize("name", CASES)
def test_refusal(name):
    """The same words as on the CPU, and nothing is written."""
    call, words = CASES[name]
    bench = Bench()
    for key, value in vars(bench).items():
        is_state = isinstance(value, F.QuantState)
        setattr(bench, key, copy.copy(value) if is_state else moved(value))
        if is_state:
            getattr(bench, key).to(cuda_cases.DEVICE)
    before = {key: value.clone() for key, value in bench.tensors().items()}
    with torch.device(cuda_cases.DEVICE), pytest.raises(ValueError) as caught:
        call(bench)
    text = str(caught.value)
    missing = [w for w in words if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text)]
    assert not missing, f"{missing} are no words of: {text}"
    for key, value in bench.tensors().items():
        assert torch.equal(value, before[key]), f"{key} was written"
