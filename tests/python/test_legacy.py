"""The removed functions of legacy.py against definitions in numpy."""

import numpy as np
import pytest
import torch

import bitsandbytes as bnb
import oracle
import oracle_maps
from bitsandbytes import functional as F

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def int8(*shape, seed=0):
    """The whole range, -128 included."""
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def of(t):
    """The float64 values of a tensor of any floating dtype."""
    return t.detach().double().numpy()


# ---------------------------------------------------------------- one scale, or none


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 33, 41)])
def test_quantize_has_one_scale(shape, dtype):
    A = normal(*shape, dtype=dtype)
    codes, (absmax, code) = F.quantize(A)
    x, table = A.float().numpy().ravel(), oracle_maps.dynamic()
    expected, scale = oracle.quantize8(x, table, x.size)
    assert (codes.dtype, codes.shape) == (torch.uint8, A.shape)
    assert (absmax.dtype, absmax.shape) == (torch.float32, ())
    assert np.array_equal(codes.numpy().ravel(), expected)
    assert absmax.item() == scale[0]
    assert np.array_equal(code.numpy(), table)
    restored = F.dequantize(codes, (absmax, code))
    assert restored.dtype == torch.float32
    assert oracle.same_bits(restored.numpy().ravel(), oracle.dequantize(expected, table, scale, x.size, "f32"))
    for other in (
        F.dequantize(codes, quant_state=(absmax, code)),
        F.dequantize(codes, absmax=absmax),
        F.dequantize(codes, absmax=absmax.view(1), code=code),
        F.dequantize(codes, (absmax, code), out=torch.empty(shape)),
    ):
        assert torch.equal(other, restored)


def test_quantize_with_a_map_of_the_callers_and_out():
    code, A = F.create_linear_map(), normal(6, 50, seed=5)
    out = torch.empty(6, 50, dtype=torch.uint8)
    codes, state = F.quantize(A, code, out)
    assert codes is out
    expected, _ = oracle.quantize8(A.numpy().ravel(), oracle_maps.linear(), A.numel())
    assert np.array_equal(out.numpy().ravel(), expected)
    assert torch.equal(F.quantize(A.t(), code)[0], codes.t())  # a view is read in its own order
    zeros = F.quantize(torch.zeros(4))
    assert zeros[0].tolist() == [127] * 4
    assert F.dequantize(*zeros).tolist() == [0.0] * 4


def test_a_default_map_that_is_edited_stays_the_callers():
    _, (_, code) = F.quantize(normal(10))
    code.zero_()
    assert F.name2qmap["dynamic"].abs().max() == 1


@pytest.mark.parametrize("make", [oracle_maps.dynamic, oracle_maps.linear, oracle_maps.fp8])
def test_codes_without_a_scale(make):
    table = make()
    ties, edges = oracle.midpoints(table), np.array([-9, 9, 0, -0.0, np.inf, -np.inf, np.nan], np.float32)
    x = np.concatenate([ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(-9)), table, edges])
    codes = F.quantize_no_absmax(torch.from_numpy(x), torch.from_numpy(table))
    assert codes.dtype == torch.uint8
    assert np.array_equal(codes.numpy(), oracle.nearest8_slow(x, table))
    restored = F.dequantize_no_absmax(codes, torch.from_numpy(table))
    assert restored.dtype == torch.float32
    assert oracle.same_bits(restored.numpy(), table[codes.numpy()])
    out8, out32 = torch.empty_like(codes), torch.empty_like(restored)
    assert F.quantize_no_absmax(torch.from_numpy(x), torch.from_numpy(table), out8) is out8
    assert F.dequantize_no_absmax(codes, torch.from_numpy(table), out32) is out32
    assert torch.equal(out8, codes)
    assert oracle.same_bits(out32.numpy(), restored.numpy())


def test_short_maps_and_empty_tensors_without_a_scale():
    code = torch.tensor([-1.0, 0.5])
    assert F.quantize_no_absmax(torch.tensor([-0.3, -0.2]), code).tolist() == [0, 1]
    assert F.quantize_no_absmax(torch.empty(0, 3), code).shape == (0, 3)
    assert F.dequantize_no_absmax(torch.empty(0, 3, dtype=torch.uint8), code).shape == (0, 3)


def test_the_old_quantisers_refuse():
    codes = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(AssertionError, match="state and absmax are None"):
        F.dequantize(codes)
    with pytest.raises(ValueError, match="A has no elements"):
        F.quantize(torch.empty(0))
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        F.quantize(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="out: shape"):
        F.quantize(normal(3), out=torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"A has dtype torch\.int32, expected torch\.uint8"):
        F.dequantize(codes.int(), absmax=torch.ones(()))
    with pytest.raises(ValueError, match=r"code has shape \[1\]"):
        F.quantize_no_absmax(normal(3), torch.zeros(1))


# ---------------------------------------------------------------- vectorwise_*


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1, [0, 1]])
@pytest.mark.parametrize("kind", ["vector", "row", "linear", "truncated-vector"])
def test_int8_codes_along_a_dimension(kind, dim, dtype):
    x = normal(4, 12, 10, dtype=dtype)
    before = x.clone()
    codes, scale = F.vectorwise_quant(x, dim=dim, quant_type=kind)
    assert torch.equal(x, before)
    v = x.float().numpy()
    axis = None if kind == "linear" else tuple(dim) if isinstance(dim, list) else dim
    top = np.abs(v).max(axis=axis, keepdims=kind != "linear")
    if kind == "truncated-vector":
        top = (top * np.float32(0.7)).astype(np.float32)
        v = np.clip(v, -top, top)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert np.array_equal(scale.numpy(), top)
    assert np.array_equal(codes.numpy(), np.rint(v * (np.float32(127) / top)))
    assert np.abs(codes.numpy().astype(int)).max() == 127
    restored = F.vectorwise_dequant(codes, scale)
    assert restored.dtype == torch.float32
    assert (np.abs(restored.numpy() - v) <= top / 254 * 1.001).all()


def test_rows_are_those_of_llm_int8():
    x = normal(40, 130, dtype=torch.float16)
    codes, stats, _ = F.int8_vectorwise_quant(x)
    other, scale = F.vectorwise_quant(x, dim=1)
    assert torch.equal(codes, other)
    assert torch.equal(stats, scale.flatten())


@pytest.mark.parametrize("kind", ["zeropoint", "vector-zeropoint", "row-zeropoint"])
def test_zero_point_codes(kind):
    x = normal(6, 9) * 3 + 1
    codes, step = F.vectorwise_quant(x, dim=1, quant_type=kind)
    v = of(x)
    axis = None if kind == "zeropoint" else 1
    low, high = v.min(axis, keepdims=axis is not None), v.max(axis, keepdims=axis is not None)
    assert step.shape == low.shape
    assert np.allclose(step.numpy(), 255 / (high - low), rtol=1e-6)
    assert (of(codes) == np.rint(of(codes))).all()
    assert (np.abs(of(codes).max(axis) - of(codes).min(axis) - 255) <= 1).all()
    assert (np.abs(of(codes) / (255 / (high - low)) - v) <= 0.502 / (255 / (high - low))).all()
    constant, one = F.vectorwise_quant(torch.full((2, 3), 5.0), dim=1, quant_type=kind)
    assert constant.isfinite().all()
    assert (one == 255).all()


def test_zeros_and_values_without_a_scale_give_code_zero():
    x = torch.tensor([[0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0], [1e-42, 0.0]])
    codes, _ = F.vectorwise_quant(x)
    assert codes.tolist() == [[0, 0]] * 4


def test_unknown_kinds_give_none():
    assert F.vectorwise_quant(normal(2, 2), quant_type="other") is None
    assert F.vectorwise_dequant(int8(2, 2), torch.ones(2, 1), "linear") is None
    assert F.vectorwise_mm_dequant(int8(2, 2).int(), torch.ones(()), torch.ones(()), quant_type="other") is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["vector", "row", "linear", "truncated-vector", "zeropoint", "row-zeropoint"])
def test_a_product_of_codes_is_restored(kind, dtype):
    xq = torch.randint(-(2**20), 2**20, (5, 7), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    S1, S2 = normal(5, 1, seed=1).abs() + 0.1, normal(1, 7, seed=2).abs() + 0.1
    if kind in ("linear", "zeropoint"):
        S1, S2 = S1[0, 0], S2[0, 0]
    scales = 1 / (of(S1) * of(S2)) if "zeropoint" in kind else of(S1) * of(S2) / 127**2
    expected = xq.numpy() * scales
    result = F.vectorwise_mm_dequant(xq, S1, S2, dtype, kind)
    assert result.dtype == dtype
    unit = torch.finfo(dtype).eps
    fits = np.abs(expected) < torch.finfo(dtype).max
    assert fits.any()
    assert (np.abs(of(result) - expected) <= (unit + 5e-7) * np.abs(expected))[fits].all()
    if S1.dim():
        assert torch.equal(F.vectorwise_mm_dequant(xq, S1[None], S2[None], dtype, kind), result)
    assert F.vectorwise_mm_dequant(xq, S1, S2).dtype == torch.half


# ---------------------------------------------------------------- double_quant


def test_double_quant_without_a_threshold():
    A = normal(11, 30, dtype=torch.float16)
    *parts, record = F.double_quant(A)
    assert record is None
    assert len(parts) == 4
    v = A.float().numpy()
    for codes, stats, axis in ((parts[0], parts[2], 1), (parts[1], parts[3], 0)):
        top = np.abs(v).max(axis)
        assert np.array_equal(stats.numpy(), top)
        factor = np.expand_dims(np.float32(127) / top, axis)
        assert np.array_equal(codes.numpy(), np.rint(v * factor))


@pytest.mark.parametrize("shape", [(11, 30), (2, 3, 30), (1, 30)])
def test_double_quant_records_the_outlier_columns(shape):
    A = normal(*shape, dtype=torch.float16).clamp(-4, 4)
    flat = A.view(-1, 30)
    flat[-1, 4], flat[0, 17] = 9.0, -8.0
    codes, _, stats, _, record = F.double_quant(A, threshold=6.0)
    assert record.rows == flat.shape[0]
    assert record.cols == 30
    assert record.nnz == 2 * flat.shape[0] == record.values.numel()
    assert record.rowidx.dtype == record.colidx.dtype == torch.int32
    assert record.values.dtype == torch.float16
    dense = np.zeros(tuple(flat.shape))
    dense[record.rowidx.numpy(), record.colidx.numpy()] = of(record.values)
    kept = np.isin(np.arange(30), [4, 17])
    assert np.array_equal(dense, np.where(kept, of(flat), 0))
    restored = codes.view(-1, 30).numpy() * of(stats)[:, None] / 127 + dense
    assert (np.abs(restored - of(flat)) <= of(stats)[:, None] / 254 * 1.001).all()
    assert F.double_quant(A, threshold=60.0)[4] is None
    with pytest.raises(ValueError, match="out_row is given"):
        F.double_quant(A, out_row=codes)


# ---------------------------------------------------------------- matmul_cublas


def fake_quantised(x, axis, kind="vector"):
    """What int8 codes along an axis leave of float64 values."""
    top = np.abs(x).max() if kind == "linear" else np.abs(x).max(axis, keepdims=True)
    if kind == "truncated-vector":
        top = 0.7 * top
        x = np.clip(x, -top, top)
    return np.rint(x * 127 / top) * top / 127


def product(X, Y, kind="vector"):
    return np.matmul(fake_quantised(X, -1, kind), fake_quantised(Y, -2, kind))


def contracted(A, grad, multiply):
    """The gradient of a 2-D B: over all leading dimensions."""
    return multiply(A.reshape(-1, A.shape[-1]).T, grad.reshape(-1, grad.shape[-1]))


@pytest.mark.parametrize("precision", [None, [8, 8, 8], [16, 8, 8], [8, 16, 8], [8, 8, 16], (32, 32, 32)])
@pytest.mark.parametrize(("a", "b"), [((6, 24), (24, 10)), ((2, 6, 24), (24, 10)), ((2, 6, 24), (2, 24, 10))])
def test_matmul_cublas(a, b, precision):
    A, B, grad = normal(*a, seed=1), normal(*b, seed=2), normal(*a[:-1], b[-1], seed=3)
    A.requires_grad_(), B.requires_grad_()
    result = bnb.matmul_cublas(A, B, precision=precision)
    result.backward(grad)
    plain = [bits != 8 for bits in precision or (8, 8, 8)]
    forward, for_B, for_A = (np.matmul if p else product for p in plain)
    x, w, g = of(A), of(B), of(grad)
    tight = {"rtol": 2e-5, "atol": 2e-5}
    assert np.allclose(of(result), forward(x, w), **tight)
    assert np.allclose(of(A.grad), for_A(g, np.swapaxes(w, -1, -2)), **tight)
    expected = contracted(x, g, for_B) if B.dim() == 2 else for_B(np.swapaxes(x, -1, -2), g)
    assert np.allclose(of(B.grad), expected, **tight)
    assert not np.allclose(product(x, w), np.matmul(x, w), **tight)  # the two kinds of product can be told apart


@pytest.mark.parametrize("kind", ["vector", "row", "linear", "truncated-vector"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_cublas_kinds_and_dtypes(kind, dtype):
    A, B = normal(5, 40, seed=1, dtype=dtype), normal(40, 8, seed=2, dtype=dtype)
    result = bnb.matmul_cublas(A, B, quant_type=kind)
    assert result.dtype == dtype
    expected = product(of(A), of(B), kind)
    assert np.allclose(of(result), expected, rtol=torch.finfo(dtype).eps, atol=3e-5)


def test_matmul_cublas_gives_only_wanted_gradients_and_refuses():
    A, B = normal(4, 6), normal(6, 3).requires_grad_()
    bnb.matmul_cublas(A, B).sum().backward()
    assert A.grad is None
    assert B.grad.shape == (6, 3)
    assert bnb.mm_cublas is bnb.bmm_cublas is bnb.matmul_cublas
    with pytest.raises(ValueError, match="quant_type is 'zeropoint'"):
        bnb.matmul_cublas(A, B, quant_type="zeropoint")
    with pytest.raises(ValueError, match="expected three numbers"):
        bnb.matmul_cublas(A, B, precision=[8])
    with pytest.raises(ValueError, match="matmul_cublas: A is"):
        bnb.matmul_cublas(A, B.t())
