"""The operators of the matrix products: values against float64, dtypes, shapes, strides, the boundary, refusals."""

import re
import threading

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes import _ops
from gemm_cases import CASES, OPS, Bench, K, N, expert_samples, normal, weight_4bit, weight_int8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of the final rounding
SHAPES = [(K,), (1, K), (5, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def close(got, expected, magnitude, slack):
    """Within one rounding to the dtype, and `slack` of the sum of the magnitudes that were added (both float64)."""
    tolerance = UNIT[got.dtype] * expected.abs() + slack * magnitude + 2.0**-24
    excess = (got.double() - expected).abs() - tolerance
    assert got.shape == expected.shape
    assert got.numel() == 0 or excess.max() <= 0, f"{excess.max()} above a tolerance of {tolerance.max()}"


def product(x, w):
    """x w^T and the sum of magnitudes, in float64."""
    x = x.double()
    return x @ w.t(), x.abs() @ w.abs().t()


def slack_4bit(dtype, k=K):
    """f32 sums of k terms; 16-bit inputs may be multiplied as 16-bit integers (bitsandbytes.h)."""
    return k * 2.0**-24 if dtype == torch.float32 else 1e-4 + k * 2.0**-24


def arguments(packed, state):
    return packed, *F.weight_arguments("test", state)


# ---------------------------------------------------------------- 4 bits


@every_dtype
@every_shape
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_4bit(dtype, shape, nested, with_bias):
    packed, state, w = weight_4bit(nested=nested)
    x = normal(*shape, dtype=dtype)
    bias = normal(N, dtype=dtype, seed=9) if with_bias else None
    expected, magnitude = product(x, w)
    if with_bias:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    for exact in (False, True):
        got = OPS._linear_4bit(x, *arguments(packed, state), bias, exact)
        assert got.dtype == dtype and got.is_contiguous()
        close(got, expected, magnitude, K * 2.0**-24 if exact else slack_4bit(dtype))


@every_dtype
@every_shape
@pytest.mark.parametrize("nested", [False, True])
def test_linear_4bit_grad(dtype, shape, nested):
    packed, state, w = weight_4bit(nested=nested)
    grad = normal(*shape[:-1], N, dtype=dtype)
    got = OPS._linear_4bit_grad(grad, *arguments(packed, state))
    expected, magnitude = product(grad, w.t())
    close(got, expected, magnitude, slack_4bit(dtype, N))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("n, k", [(1, 1), (1, 7), (7, 1), (3, 129), (64, 256), (2, 300)])
def test_linear_4bit_formats(quant_type, blocksize, n, k):
    packed, state, w = weight_4bit(n, k, quant_type=quant_type, blocksize=blocksize)
    for m in (1, 2, 9):
        x = normal(m, k)
        expected, magnitude = product(x, w)
        close(OPS._linear_4bit(x, *arguments(packed, state), None, False), expected, magnitude, k * 2.0**-24)
        grad = normal(m, n)
        expected, magnitude = product(grad, w.t())
        close(OPS._linear_4bit_grad(grad, *arguments(packed, state)), expected, magnitude, n * 2.0**-24)


@pytest.mark.parametrize("n, k", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("m", [0, 3])
def test_products_without_elements(n, k, m):
    packed, absmax = torch.zeros(0, 1, dtype=torch.uint8), torch.zeros(0)
    bias = torch.arange(n, dtype=torch.float32)
    got = OPS._linear_4bit(torch.ones(m, k), packed, absmax, None, None, None, 0, 64, "nf4", n, k, bias, False)
    assert torch.equal(got, bias.expand(m, n))
    got = OPS._linear_4bit_grad(torch.ones(m, n), packed, absmax, None, None, None, 0, 64, "nf4", n, k)
    assert torch.equal(got, torch.zeros(m, k))
    codes, scales = torch.zeros(n, k, dtype=torch.int8), torch.ones(n)
    for threshold in (0.0, 6.0):
        got, flags = OPS._linear_int8(torch.ones(m, k), codes, scales, bias, threshold)
        assert torch.equal(got, bias.expand(m, n)) and flags.numel() == (k if threshold else 0)
    assert torch.equal(OPS._linear_int8_grad(torch.ones(m, n), codes, scales), torch.zeros(m, k))
    assert torch.equal(OPS.int8_linear_matmul(codes[:m], codes), torch.zeros(min(m, n), n, dtype=torch.int32))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_storage_dtype_and_shape_of_the_weight_do_not_matter(storage):
    x = normal(3, K)
    packed, state, _ = weight_4bit()
    expected = OPS._linear_4bit(x, *arguments(packed, state), None, False)
    stored, other, _ = weight_4bit(storage=storage)
    assert torch.equal(OPS._linear_4bit(x, *arguments(stored, other), None, False), expected)
    wide = torch.stack([packed, packed], dim=1)[:, 0]
    padded = torch.cat([packed, torch.full((5, 1), 99, dtype=torch.uint8)])
    for form in (packed.t(), packed.flatten(), wide, padded):
        assert torch.equal(OPS._linear_4bit(x, *arguments(form, state), None, False), expected)


def test_bias_and_offset_of_another_dtype_stand_for_their_values():
    packed, state, _ = weight_4bit(nested=True)
    x, bias = normal(3, K, dtype=torch.bfloat16), normal(N, seed=7)
    expected = OPS._linear_4bit(x, *arguments(packed, state), bias.bfloat16(), False)
    assert torch.equal(OPS._linear_4bit(x, *arguments(packed, state), bias, False), expected)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state.offset = state.offset.to(dtype)
        got = OPS._linear_4bit(x, *arguments(packed, state), None, False)
        state.offset = state.offset.float()
        assert torch.equal(got, OPS._linear_4bit(x, *arguments(packed, state), None, False))


@pytest.mark.parametrize("blocksize2", [1, 3, 256, 1000])
def test_nested_scales_in_blocks_of_any_size(blocksize2):
    packed, state, _ = weight_4bit()
    code = F.create_dynamic_map()
    nested = OPS._quantize_scales(state.absmax, code, blocksize2)
    plain = OPS._dequantize_scales(nested[0], code, *nested[1:], blocksize2)
    x = normal(3, K)
    head = packed, nested[0], code, nested[1], nested[2], blocksize2
    got = OPS._linear_4bit(x, *head, 32, "nf4", N, K, None, True)
    assert torch.equal(got, OPS._linear_4bit(x, packed, plain, None, None, None, 0, 32, "nf4", N, K, None, True))


@every_dtype
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_public_4bit_operators_are_the_private_one(dtype, quant_type):
    packed, state, _ = weight_4bit(quant_type=quant_type)
    nested_packed, nested, _ = weight_4bit(quant_type=quant_type, nested=True)
    x, bias = normal(2, 3, K, dtype=dtype), normal(N, dtype=dtype, seed=8)
    expected = OPS._linear_4bit(x, *arguments(packed, state), None, False)
    assert torch.equal(OPS.gemm_4bit(x, packed, [N, K], state.absmax, 32, quant_type), expected)
    assert torch.equal(OPS.gemv_4bit(x, packed, [N, K], state.absmax, state.code, 32), expected)
    assert torch.equal(F.gemv_4bit(x, packed, state=state), expected)
    for out in (torch.empty(2, 3, N, dtype=dtype), torch.empty(N, 3, 2, dtype=dtype).permute(2, 1, 0)):
        OPS.gemv_4bit.out(x, packed, [N, K], state.absmax, state.code, 32, out)
        assert torch.equal(out, expected)
        assert F.gemv_4bit(x, packed, out=out.zero_(), state=state) is out and torch.equal(out, expected)
    inner = nested.state2
    expected = OPS._linear_4bit(x, *arguments(nested_packed, nested), bias, False)
    parts = nested.absmax, inner.code, nested.offset
    assert torch.equal(OPS.gemm_4bit(x, nested_packed, [N, K], inner.absmax, 32, quant_type, bias, *parts), expected)
    assert torch.equal(F.gemv_4bit(x, nested_packed, state=nested), bnb.matmul_4bit(x, nested_packed, nested))


def test_gemv_4bit_with_the_values_of_another_type():
    bench = Bench()
    with pytest.raises(NotImplementedError, match="code"):
        bench.gemv4(code=bench.code + 0.5)
    assert torch.all(bench.out == 7)


# ---------------------------------------------------------------- int8


def is_nearest(codes, x, stats):
    """Every code is a nearest integer of x 127 / stats, within f32 rounding."""
    exact = torch.where(stats[:, None] > 0, x.double() * 127 / stats.double()[:, None], 0.0)
    return (codes.double() - exact).abs().max() <= 0.5 + 1e-4


@every_dtype
def test_vectorwise_quant(dtype):
    x = normal(6, K, dtype=dtype)
    x[2] = 0
    codes, stats, columns = F.int8_vectorwise_quant(x)
    assert columns is None and codes.dtype == torch.int8 and stats.dtype == torch.float32
    assert torch.equal(stats, x.abs().amax(1).float()) and is_nearest(codes, x, stats)
    for view in (x.t().contiguous().t(), x[None], x.reshape(2, 3, K)):
        again = F.int8_vectorwise_quant(view)
        assert again[0].shape == view.shape
        assert torch.equal(again[0].reshape(6, K), codes) and torch.equal(again[1], stats)
    expected = codes.double() * stats.double()[:, None] / 127
    close(F.int8_vectorwise_dequant(codes, stats), expected, expected.abs(), 2.0**-22)
    assert torch.equal(F.int8_vectorwise_quant(x[0])[0], codes[0])


@every_dtype
@pytest.mark.parametrize("rows", [1, 6])
def test_vectorwise_quant_with_outliers(dtype, rows):
    x = normal(rows, K, dtype=dtype)
    x[0, 5], x[-1, 60] = 20.0, -30.0
    codes, stats, columns = F.int8_vectorwise_quant(x, threshold=6.0)
    assert columns.dtype == torch.int64 and columns.tolist() == [5, 60]
    inliers = x.masked_fill(x.abs() >= 6, 0)
    assert torch.equal(stats, inliers.abs().amax(1).float())
    if rows > 1:
        inliers[:, columns] = 0
    assert is_nearest(codes, inliers, stats) and torch.all(codes[:, columns] == 0)
    quiet = F.int8_vectorwise_quant(x, threshold=100.0)
    assert quiet[2].shape == (0,) and quiet[2].dtype == torch.int64
    assert torch.equal(quiet[0], F.int8_vectorwise_quant(x)[0])


@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_double_quant(dtype, threshold):
    x = normal(6, K, dtype=dtype)
    row, column, row_stats, column_stats, columns = F.int8_double_quant(x, threshold=threshold)
    expected = F.int8_vectorwise_quant(x, threshold=threshold)
    assert torch.equal(row, expected[0]) and torch.equal(row_stats, expected[1])
    assert columns is None if threshold == 0 else torch.equal(columns, expected[2])
    inliers = x.masked_fill(x.abs() >= threshold, 0) if threshold else x
    assert torch.equal(column_stats, inliers.abs().amax(0).float())
    assert is_nearest(column.t(), inliers.t(), column_stats)


@pytest.mark.parametrize("k", [1, 3, 10, 499, 512, 4099])
@pytest.mark.parametrize("lead", [(), (1,), (9,), (2, 3)], ids=str)
def test_int8_products_are_exact(k, lead):
    generator = torch.Generator().manual_seed(k)
    a, b = (torch.randint(-128, 128, (*s, k), generator=generator, dtype=torch.int8) for s in (lead, (30,)))
    a.view(-1)[0] = b.view(-1)[0] = -128
    expected = a.long() @ b.t().long()
    got = F.int8_linear_matmul(a, b)
    assert got.dtype == torch.int32 and torch.equal(got.long(), expected)
    wide = torch.stack([a, a], -1)[..., 0]
    tall = b.t().contiguous().t()
    out = torch.empty((*lead, 30, 2), dtype=torch.int32)[..., 0]
    assert F.int8_linear_matmul(wide, tall, out=out) is out and torch.equal(out.long(), expected)


def test_int8_products_of_extreme_codes_do_not_overflow():
    a = torch.full((2, 16384), -128, dtype=torch.int8)
    assert torch.all(F.int8_linear_matmul(a, a) == 2**28)
    assert torch.all(F.int8_linear_matmul(a, -(a + 1)) == -128 * 127 * 16384)


def int8_reference(x, codes, scales, bias, threshold):
    """The definition of LLM.int8() in float64, from the codes of the activations, and the sum of magnitudes."""
    w = codes.double() * scales.double()[:, None] / 127
    rows = x.reshape(-1, x.shape[-1])
    quantised, stats, columns = OPS.int8_vectorwise_quant(rows, threshold)
    a = quantised.double() * stats.double()[:, None] / 127
    if columns is not None:
        a[:, columns] = rows[:, columns].double()
    expected, magnitude = product(a, w)
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    shape = *x.shape[:-1], codes.shape[0]
    return expected.reshape(shape), magnitude.reshape(shape)


@every_dtype
@every_shape
@pytest.mark.parametrize("threshold", [0.0, 1.5, 50.0])
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES])
def test_linear_int8(dtype, shape, threshold, bias_dtype):
    codes, scales, _ = weight_int8()
    x = normal(*shape, dtype=dtype)
    bias = None if bias_dtype is None else normal(N, dtype=bias_dtype, seed=9)
    got, flags = OPS._linear_int8(x, codes, scales, bias, threshold)
    assert got.dtype == dtype and got.is_contiguous()
    close(got, *int8_reference(x, codes, scales, bias, threshold), 2.0**-21)
    outlier = (x.reshape(-1, K).float().abs() >= threshold).any(0)
    assert flags.dtype == torch.uint8
    assert torch.equal(flags, outlier.to(torch.uint8)) if threshold else flags.numel() == 0
    if threshold:
        assert torch.equal(OPS._int8_outlier_columns(flags), outlier.nonzero()[:, 0])
    wide = torch.stack([x, x], -1)[..., 0]
    tall = codes.t().contiguous().t()
    assert torch.equal(OPS._linear_int8(wide, tall, scales, bias, threshold)[0], got)


@every_dtype
@every_shape
def test_linear_int8_grad(dtype, shape):
    codes, scales, w = weight_int8()
    grad = normal(*shape[:-1], N, dtype=dtype)
    got = OPS._linear_int8_grad(grad, codes, scales)
    assert got.dtype == dtype
    close(got, *product(grad, w.t()), 1e-5)


def test_bfloat16_outputs_have_no_float16_limits():
    codes, scales, w = weight_int8()
    x = normal(4, K, dtype=torch.bfloat16) * 1e6
    got, _ = OPS._linear_int8(x, codes, scales, None, 0.0)
    assert torch.isfinite(got).all() and got.abs().max() > 65504
    assert (got.double() - x.double() @ w.t()).abs().max() < 0.05 * got.double().abs().max()


@every_dtype
def test_scaled_operators(dtype):
    codes, scales, _ = weight_int8()
    x, bias = normal(2, 3, K, dtype=dtype), normal(N, seed=6)
    a, stats, columns = OPS.int8_vectorwise_quant(x, 1.5)
    mixed, sub = OPS.int8_mixed_scaled_mm(x, a, codes, stats, scales, columns, bias)
    assert torch.equal(mixed, OPS._linear_int8(x, codes, scales, bias, 1.5)[0])
    assert torch.equal(sub, x.reshape(6, K)[:, columns]) and len(columns) > 0
    a, stats, _ = OPS.int8_vectorwise_quant(x)
    expected = OPS._linear_int8(x, codes, scales, bias, 0.0)[0]
    for none in (None, columns[:0]):
        mixed, sub = OPS.int8_mixed_scaled_mm(x, a, codes, stats, scales, none, bias)
        assert torch.equal(mixed, expected) and sub.numel() == 0 and sub.dtype == dtype
    assert torch.equal(OPS.int8_scaled_mm(a, codes, stats, scales, bias, dtype), expected)
    c32 = OPS.int8_linear_matmul(a, codes)
    assert torch.equal(OPS.int8_mm_dequant(c32, stats, scales, dtype, bias), expected)
    half = OPS._linear_int8(x, codes, scales, bias, 0.0)[0].half() if dtype == torch.float16 else None
    assert OPS.int8_scaled_mm(a, codes, stats, scales).dtype == torch.float16
    got = F.int8_mm_dequant(c32, stats, scales, bias=bias)
    assert got.dtype == torch.float16 and got.shape == (2, 3, N)
    assert half is None or torch.equal(got, half)
    out = torch.empty_like(got)
    assert F.int8_mm_dequant(c32, stats, scales, out=out, bias=bias) is out and torch.equal(out, got)


# ---------------------------------------------------------------- the boundary


def samples():
    """name -> (operator, fresh arguments)."""
    p, s, _ = weight_4bit()
    np_, ns, _ = weight_4bit(nested=True)
    cb, scb, _ = weight_int8()
    inner = ns.state2
    kinds = {
        "plain": lambda d, w: normal(2, 3, w, dtype=d),
        "strided": lambda d, w: normal(2, w, 3, dtype=d).transpose(1, 2),
        "empty": lambda d, w: normal(2, 0, w, dtype=d),
        "vector": lambda d, w: normal(w, dtype=d),
    }
    for kind, make in kinds.items():
        for d in DTYPES if kind == "plain" else DTYPES[2:]:
            x, g, bias = make(d, K), make(d, N), normal(N, dtype=d)
            out = torch.zeros(*x.shape[:-1], N, dtype=d)
            a, sa, _ = OPS.int8_vectorwise_quant(x)
            c32, columns = OPS.int8_linear_matmul(a, cb), torch.tensor([1, 5, 66])
            flags = torch.tensor([0, 1, 0, 1], dtype=torch.uint8)
            gemm = x, p, [N, K], s.absmax, 32, "nf4"
            nested = ns.absmax, inner.code, ns.offset
            table = {
                "_linear_4bit": (x, *arguments(p, s), bias, False),
                "_linear_4bit nested": (x, *arguments(np_, ns), None, True),
                "_linear_4bit_grad": (g, *arguments(p, s)),
                "_linear_4bit_grad nested": (g, *arguments(np_, ns)),
                "gemm_4bit": (*gemm, bias),
                "gemm_4bit nested": (x, np_, [N, K], inner.absmax, 32, "nf4", bias, *nested),
                "gemv_4bit": (x, p, [N, K], s.absmax, s.code, 32),
                "gemv_4bit.out": (x, p, [N, K], s.absmax, s.code, 32, out),
                "_linear_int8": (x, cb, scb, bias, 0.0),
                "_linear_int8 outliers": (x, cb, scb, None, 1.5),
                "_linear_int8_grad": (g, cb, scb),
                "_int8_outlier_columns": (flags,),
                "int8_vectorwise_quant": (x,),
                "int8_vectorwise_quant outliers": (x, 1.5),
                "int8_vectorwise_dequant": (a, sa),
                "int8_double_quant": (x,),
                "int8_double_quant outliers": (x, 1.5),
                "int8_linear_matmul": (a, cb),
                "int8_linear_matmul.out": (a, cb, torch.zeros(c32.shape, dtype=torch.int32)),
                "int8_mm_dequant": (c32, sa, scb, d, bias),
                "int8_mm_dequant default": (c32, sa, scb),
                "int8_scaled_mm": (a, cb, sa, scb, bias, d),
                "int8_scaled_mm default": (a, cb, sa, scb),
                "int8_mixed_scaled_mm": (x, a, cb, sa, scb, columns, bias),
                "int8_mixed_scaled_mm none": (x, a, cb, sa, scb),
            }
            for name, args in {**table, **expert_samples(x, g, bias)}.items():
                packet, _, which = name.split()[0].partition(".")
                yield (
                    f"{name}-{kind}-{d}".replace("torch.", ""),
                    (getattr(getattr(OPS, packet), which or "default"), args),
                )


SAMPLES = dict(samples())
DYNAMIC = {key for key in SAMPLES if ("outliers" in key and "_linear" not in key) or "_outlier" in key}


def fresh(key):
    op, args = SAMPLES[key]
    return op, tuple(a.clone() if isinstance(a, torch.Tensor) and "strided" not in key else a for a in args)


def tensors(result):
    return [t for t in (result if isinstance(result, (list, tuple)) else [result]) if t is not None]


def same(a, b):
    a, b = tensors(a), tensors(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride() and torch.equal(x, y)


def test_every_operator_has_a_sample():
    names = {str(op).replace(".", "::", 1) for op, _ in SAMPLES.values()}
    assert len(names) == 18
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name.removesuffix(".default"), "CPU")


@pytest.mark.parametrize("key", SAMPLES)
def test_opcheck(key):
    op, args = fresh(key)
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("key", [key for key in SAMPLES if "bfloat16" in key])
def test_compile_fullgraph(key):
    op, args = fresh(key)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda *a: _ops.call(op, *a), fullgraph=True, dynamic=key not in DYNAMIC)
        _, again = fresh(key)
        same(compiled(*args), op(*again))
    same(args[-1:] if ".out" in key else [], again[-1:] if ".out" in key else [])


@pytest.mark.parametrize("key", [key for key in SAMPLES if "plain-bfloat16" in key])
def test_modes_and_threads(key):
    """Inference mode, autocast, one thread or a fresh one: the same bits."""
    op, args = fresh(key)
    expected = op(*args)
    results = []
    with torch.inference_mode():
        results.append(op(*fresh(key)[1]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results.append(op(*fresh(key)[1]))
    thread = threading.Thread(target=lambda: results.append(op(*fresh(key)[1])))
    thread.start()
    thread.join()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results.append(op(*fresh(key)[1]))
    torch.set_num_threads(threads)
    for result in results:
        same(result, expected)


def test_optional_results_do_not_leak():
    """The box of a Tensor? result, and the tensor in it, are freed: memory stays where it is over many calls."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    x, cb, scb = normal(64, 1024), *weight_int8(8, 1024)[:2]
    a, sa, columns = OPS.int8_vectorwise_quant(x, 1.5)
    for _ in range(2):  # the first round also fills caches
        before = resident()
        for _ in range(300):
            OPS.int8_vectorwise_quant(x, 1.5)
            OPS.int8_vectorwise_quant(x)
            OPS.int8_mixed_scaled_mm(x, a, cb, sa, scb, columns)
            with pytest.raises(RuntimeError):
                OPS.int8_mixed_scaled_mm(x, a, cb, sa, scb, columns + 2000)
        grown = resident() - before
    assert grown < 2048  # pages: 300 leaked results would be 36000


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", CASES)
def test_refusal(name):
    call, words = CASES[name]
    bench = Bench()
    before = {key: value.clone() for key, value in bench.tensors().items()}
    with pytest.raises(ValueError) as caught:
        call(bench)
    text = str(caught.value)
    missing = [w for w in words if not re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text)]
    assert not missing, f"{missing} are no words of: {text}"
    assert "expected" in text
    for key, value in bench.tensors().items():
        assert torch.equal(value, before[key]), f"{key} was written"


def test_the_bench_itself_is_accepted():
    bench = Bench()
    for call in (bench.linear4, bench.linear4_nested, bench.linear4_grad, bench.gemm4, bench.gemv4, bench.linear8):
        call()
    for call in (bench.linear8_grad, bench.matmul8, bench.scaled8, bench.mixed8, bench.dequant8):
        call()
    assert not torch.any(bench.out == 7) and not torch.any(bench.out32 == 7)
