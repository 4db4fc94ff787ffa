"""Functions that releases before this one had and that clients still call, apart from the ones for new code.

They keep their old signatures and are found where they used to be (functional.NAME, bitsandbytes.NAME) through gone.py.
What is not here is gone for good: docs/MIGRATION.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from .codebooks import default_map, fill
from .igemm import multiply
from .int8 import int8_double_quant

_bnb = torch.ops.bitsandbytes
_INT8_MAX = 127.0
_ZERO_POINT_LEVELS = 255.0

# ---------------------------------------------------------------- 8-bit codes with one scale, or none


def quantize(A: Tensor, code: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Quantise to 8 bits with one scale for the whole tensor; until release 0.49.

    A     float32, float16 or bfloat16, any shape, at least one element
    code  float32 [256], ascending; None: the signed dynamic map
    out   filled and returned: uint8, shape of A
    Returns (uint8 codes, (absmax float32 0-dim, code)).  ValueError: A is empty; dtype, map or out do not fit.
    """
    if A.numel() == 0:
        raise ValueError("quantize: A has no elements, expected at least one")
    code = default_map("dynamic", A).clone() if code is None else code.to(A.device)
    codes, absmax = _ops.call(_bnb.quantize_blockwise.default, A, code, A.numel())
    return codes if out is None else fill("out", out, codes), (absmax.view(()), code)


def dequantize(
    A: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    *,
    quant_state: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The inverse of quantize(): code[A] * absmax. Returns float32, shape of A.

    A      uint8 codes
    state  (absmax, code); before release 0.42 its name was quant_state.  Without it: absmax, float32 with one element,
           and code, float32 [256], or None for the signed dynamic map
    out    filled and returned
    AssertionError: neither state nor absmax.  ValueError: A is not uint8, or out does not fit.
    """
    state = quant_state if state is None else state
    if state is None and absmax is None:
        raise AssertionError("dequantize: state and absmax are None, expected one of them")
    if state is not None:
        absmax, code = state
    result = dequantize_no_absmax(A, default_map("dynamic", A) if code is None else code) * absmax.to(A.device)
    return result if out is None else fill("out", out, result)


def quantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """The nearest codes of A, without a scale; until release 0.49.

    A     float32, float16 or bfloat16, in the range of code; NaN takes code 0
    code  float32 [2..256], ascending
    out   filled and returned: uint8, shape of A
    Returns uint8, shape of A.  Ties: docs/NUMERICS.md, rule 4.  ValueError: size of code, or out.
    """
    if code.dim() != 1 or not 2 <= code.numel() <= 256:
        raise ValueError(f"quantize_no_absmax: code has shape {list(code.shape)}, expected 2 to 256 values")
    code = code.to(A.device, torch.float32)
    middle = (code[:-1] + code[1:]) * 0.5
    values = A.to(torch.float32)
    below = torch.bucketize(values, middle)  # midpoints strictly below
    tie = values == middle[below.clamp(max=middle.numel() - 1)]
    codes = torch.where(tie, below + below % 2, below).masked_fill(values.isnan(), 0).to(torch.uint8)
    return codes if out is None else fill("out", out, codes)


def dequantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """code[A] as float32, shape of A. A: uint8 codes; out: filled and returned. ValueError: dtype of A, or out."""
    if A.dtype != torch.uint8:
        raise ValueError(f"dequantize_no_absmax: A has dtype {A.dtype}, expected torch.uint8")
    result = code.to(A.device, torch.float32)[A.int()]
    return result if out is None else fill("out", out, result)


# ---------------------------------------------------------------- int8 codes with scales along dimensions


def _zero_point(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    span = high - low
    step = _ZERO_POINT_LEVELS / torch.where(span == 0, torch.ones_like(span), span)
    zero = torch.round(low * step)
    return torch.round(x * step - zero) + zero, step


def vectorwise_quant(x: Tensor, dim: int | list[int] = 1, quant_type: str = "vector") -> tuple[Tensor, Tensor] | None:
    """Codes of x and their scales; until release 0.46. x: any floating dtype, computed in float32.

    "vector", "row"       scale: largest magnitude over dim, kept with size 1; int8 codes round(x * 127 / scale)
    "linear"              the same with one scale, 0-dim, for the whole tensor
    "truncated-vector"    as "vector", with 0.7 of that scale and x clamped to it
    "zeropoint"           scale: 255 / (max - min), 0-dim; codes round(x * scale - z) + z, z = round(min * scale),
                          float32
    "vector-zeropoint", "row-zeropoint"  the same with a scale over dim
    Returns (codes, float32 scales), or None for another quant_type.  Int8 codes are 0 where a scale is 0 or not finite.
    """
    x = x.float()
    if quant_type == "zeropoint":
        return _zero_point(x, x.amin(), x.amax())
    if quant_type in ("vector-zeropoint", "row-zeropoint"):
        return _zero_point(x, x.amin(dim, keepdim=True), x.amax(dim, keepdim=True))
    if quant_type == "linear":
        scale = x.abs().amax()
    elif quant_type in ("vector", "row", "truncated-vector"):
        scale = x.abs().amax(dim, keepdim=True)
    else:
        return None
    if quant_type == "truncated-vector":
        scale = scale * 0.7
        x = torch.minimum(torch.maximum(x, -scale), scale)
    factor = _INT8_MAX / scale
    factor = factor.masked_fill(~factor.isfinite(), 0.0)
    return torch.round(x * factor).nan_to_num(0.0).to(torch.int8), scale


def vectorwise_dequant(xq: Tensor, max1: Tensor, quant_type: str = "vector") -> Tensor | None:
    """xq * max1 / 127 as float32: the inverse of vectorwise_quant(); None unless quant_type is "vector"."""
    return xq.float() / _INT8_MAX * max1 if quant_type == "vector" else None


def vectorwise_mm_dequant(
    xq: Tensor, S1: Tensor, S2: Tensor, dtype: torch.dtype = torch.half, quant_type: str = "vector"
) -> Tensor | None:
    """The product of the numbers that two tensors of codes stand for, given that of their codes.

    xq      int32 or float32 [..., m, n]
    S1, S2  scales of vectorwise_quant(), which broadcast: [..., m, 1] and [..., 1, n]
    dtype   of the result
    Returns xq * (S1 / 127) * (S2 / 127), or xq / (S1 S2) for the zero-point types; None for an unknown quant_type.
    """
    x = xq.float()
    S1, S2 = (s.squeeze(0) if s.dim() == 3 and x.dim() == 2 else s for s in (S1, S2))
    if quant_type in ("zeropoint", "vector-zeropoint", "row-zeropoint"):
        return (x / (S1.float() * S2.float())).to(dtype)
    if quant_type in ("linear", "row", "vector", "truncated-vector"):
        return (x * (S1.float() / _INT8_MAX) * (S2.float() / _INT8_MAX)).to(dtype)
    return None


class OutlierRecord(NamedTuple):
    """Entries of a matrix by position. rows, cols, nnz: ints; rowidx, colidx: int32 [nnz]; values: [nnz]."""

    rows: int
    cols: int
    nnz: int
    rowidx: Tensor
    colidx: Tensor
    values: Tensor


def double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, OutlierRecord | None]:
    """int8_double_quant() with the outlier columns as a record; until release 0.45. A: [..., cols].

    Returns (codes by row, codes by column, row statistics, column statistics, OutlierRecord or None).  The record holds
    every entry of every outlier column, because the codes by row are 0 there; None without a threshold or outliers.
    ValueError: as int8_double_quant().
    """
    *parts, columns = int8_double_quant(A, col_stats, row_stats, out_col, out_row, threshold)
    if columns is None or columns.numel() == 0:
        return *parts, None
    matrix = A.reshape(-1, A.shape[-1])
    rows, cols = matrix.shape
    rowidx = torch.arange(rows, dtype=torch.int32, device=A.device).repeat_interleave(columns.numel())
    colidx = columns.int().repeat(rows)
    values = matrix[:, columns].reshape(-1)
    return *parts, OutlierRecord(rows, cols, values.numel(), rowidx, colidx, values)


# ---------------------------------------------------------------- a product of two quantised operands


def _quantised_product(X: Tensor, Y: Tensor, quant_type: str) -> Tensor:
    """X [..., m, k] times Y [k, n], or [b, m, k] times [b, k, n], through int8; dtype of X."""
    shape = *X.shape[:-1], Y.shape[-1]
    if Y.dim() == 2:
        X = X.reshape(-1, X.shape[-1])
    codes_X, scale_X = vectorwise_quant(X, -1, quant_type)
    codes_Y, scale_Y = vectorwise_quant(Y, -2, quant_type)
    product = multiply("matmul_cublas", codes_X, codes_Y)
    return vectorwise_mm_dequant(product, scale_X, scale_Y, X.dtype, quant_type).view(shape)


class MatMul8bit(torch.autograd.Function):
    """The product behind matmul_cublas(): apply(A, B, out, quant_type, precision)."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        quant_type: str = "vector",
        precision: list[int] | None = None,
    ) -> Tensor:
        """The product. ValueError: quant_type or precision."""
        precision = [8, 8, 8] if precision is None else list(precision)
        if quant_type not in ("linear", "row", "vector", "truncated-vector"):
            raise ValueError(
                f"matmul_cublas: quant_type is {quant_type!r}, expected linear, row, vector or truncated-vector"
            )
        if len(precision) != 3:
            raise ValueError(f"matmul_cublas: precision is {precision}, expected three numbers of bits")
        ctx.save_for_backward(A, B)
        ctx.quant_type, ctx.precision = quant_type, precision
        return _quantised_product(A, B, quant_type) if precision[0] == 8 else torch.matmul(A, B)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of A and B that are wanted, through int8 where precision has an 8."""
        A, B = ctx.saved_tensors
        multiplied = [
            (lambda x, y: _quantised_product(x, y, ctx.quant_type)) if bits == 8 else torch.matmul
            for bits in ctx.precision
        ]
        grad_A = grad_B = None
        if ctx.needs_input_grad[1]:
            rows_A, rows_grad = (A, grad) if B.dim() == 3 else (A.flatten(0, -2), grad.flatten(0, -2))
            grad_B = multiplied[1](rows_A.mT, rows_grad)
        if ctx.needs_input_grad[0]:
            grad_A = multiplied[2](grad, B.mT)
        return grad_A, grad_B, None, None, None


def matmul_cublas(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    quant_type: str = "vector",
    precision: list[int] | None = None,
) -> Tensor:
    """A B through int8, with both operands quantised along the inner dimension; gradients likewise; until release 0.45.

    A           [..., k] with B [k, n], or [b, m, k] with B [b, k, n]; floating dtypes
    out         ignored
    quant_type  "vector", "row", "linear" or "truncated-vector": see vectorwise_quant()
    precision   bits of the forward product, of the gradient of B, and of that of A; None: [8, 8, 8]; an entry other
                than 8 asks for an ordinary product there
    Returns [..., n], dtype of A.  ValueError: shapes, quant_type, precision.
    """
    return MatMul8bit.apply(A, B, out, quant_type, precision)


mm_cublas = bmm_cublas = matmul_cublas
