"""The operators of the matrix products: schemas and fakes, as in _ops.py; then all kernels are registered.

Leading dimensions of an activation are rows.  `_linear_4bit` and `_linear_int8` are the whole forward of a layer in one
call; the operators without an underscore are the public contract.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cextension
from ._ops import _ceil_div, _dtype, _expect, _float, _format_4bit, _one_device, _operator, _out

# ---------------------------------------------------------------- 4 bits


def _rows(op: str, name: str, x: Tensor, width: int) -> torch.Size:
    """The leading dimensions of x [..., width]."""
    _expect(x.dim() >= 1, f"{op}: {name} has 0 dimensions, expected 1 or more")
    _expect(x.shape[-1] == width, f"{op}: {name} has size {x.shape[-1]} in its last dimension, expected {width}")
    return x.shape[:-1]


def _check_4bit(op: str, weight: Tensor, absmax: Tensor, blocksize: int, quant_type: str, count: int) -> None:
    _format_4bit(op, blocksize, quant_type)
    needed = _ceil_div(count, 2)
    found = weight.numel() * weight.element_size()
    _expect(found >= needed, f"{op}: the weight has {found} bytes, expected at least {needed}")
    blocks = _ceil_div(count, blocksize)
    _expect(absmax.numel() == blocks, f"{op}: absmax has {absmax.numel()} elements, expected {blocks}")


def _bias(op: str, bias: Tensor | None, n: int, dtype: torch.dtype | None = None) -> None:
    if bias is None:
        return
    _float(op, "the dtype of bias", bias.dtype)
    _expect(bias.dim() == 1, f"{op}: bias has {bias.dim()} dimensions, expected 1")
    _expect(bias.numel() == n, f"{op}: bias has {bias.numel()} elements, expected {n}")
    if dtype is not None:
        _dtype(op, "bias", bias, dtype)


def _product_4bit(
    op: str,
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor | None, ...],
    blocksize: int,
    quant_type: str,
    widths: tuple[int, int],
    count: int,
) -> Tensor:
    """Checks of both directions; an empty result [..., widths[1]] for x [..., widths[0]]. count: of the weight."""
    absmax, *nested = scales
    _float(op, "the dtype of the input", x.dtype)
    _one_device(op, x, weight=weight, absmax=absmax)
    for tensor in nested:
        _one_device(op, x, nested=tensor)
    present = {tensor is not None for tensor in nested}
    _expect(len(present) == 1, f"{op}: absmax_code, absmax2 and offset: expected all of them or none")
    _dtype(op, "absmax", absmax, torch.uint8 if True in present else torch.float32)
    _check_4bit(op, weight, absmax, blocksize, quant_type, count)
    rows = _rows(op, "the input", x, widths[0])
    return torch.empty((*rows, widths[1]), device=x.device, dtype=x.dtype)


@_operator(
    "_linear_4bit(Tensor x, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, Tensor? offset, "
    "int blocksize2, int blocksize, str quant_type, int n, int k, Tensor? bias, bool exact) -> Tensor",
    autograd=False,
)
def _(x, weight, absmax, absmax_code, absmax2, offset, blocksize2, blocksize, quant_type, n, k, bias, exact):
    op = "_linear_4bit"
    _one_device(op, x, bias=bias)
    _bias(op, bias, n)
    scales = absmax, absmax_code, absmax2, offset
    return _product_4bit(op, x, weight, scales, blocksize, quant_type, (k, n), n * k)


@_operator(
    "_linear_4bit_grad(Tensor grad, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, "
    "Tensor? offset, int blocksize2, int blocksize, str quant_type, int n, int k) -> Tensor",
    autograd=False,
)
def _(grad, weight, absmax, absmax_code, absmax2, offset, blocksize2, blocksize, quant_type, n, k):
    scales = absmax, absmax_code, absmax2, offset
    return _product_4bit("_linear_4bit_grad", grad, weight, scales, blocksize, quant_type, (n, k), n * k)


def _experts(op: str, x: Tensor, first: Tensor) -> int:
    """How many there are."""
    _one_device(op, x, first=first)
    _dtype(op, "first", first, torch.int64)
    _expect(first.numel() >= 2, f"{op}: first has {first.numel()} elements, expected 2 or more")
    return first.numel() - 1


@_operator(
    "_experts_4bit(Tensor x, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, Tensor? offset, "
    "int blocksize2, int blocksize, str quant_type, int n, int k, Tensor first, Tensor? bias) -> Tensor",
    autograd=False,
)
def _(x, weight, absmax, absmax_code, absmax2, offset, blocksize2, blocksize, quant_type, n, k, first, bias):
    """x W_e^T + bias_e, where W [experts, n, k] and rows first[e] .. first[e + 1] - 1 of x are those of expert e.

    first  int64 [experts + 1], ascending.  Rows of no expert are not set.
    """
    op = "_experts_4bit"
    experts = _experts(op, x, first)
    _one_device(op, x, bias=bias)
    if bias is not None:
        _float(op, "the dtype of bias", bias.dtype)
        _expect(bias.numel() == experts * n, f"{op}: bias has {bias.numel()} elements, expected {experts * n}")
    scales = absmax, absmax_code, absmax2, offset
    return _product_4bit(op, x, weight, scales, blocksize, quant_type, (k, n), experts * n * k)


@_operator(
    "_experts_4bit_grad(Tensor grad, Tensor weight, Tensor absmax, Tensor? absmax_code, Tensor? absmax2, "
    "Tensor? offset, int blocksize2, int blocksize, str quant_type, int n, int k, Tensor first) -> Tensor",
    autograd=False,
)
def _(grad, weight, absmax, absmax_code, absmax2, offset, blocksize2, blocksize, quant_type, n, k, first):
    op = "_experts_4bit_grad"
    count = _experts(op, grad, first) * n * k
    scales = absmax, absmax_code, absmax2, offset
    return _product_4bit(op, grad, weight, scales, blocksize, quant_type, (n, k), count)


@_operator(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
def _(
    A,
    B,
    shapeB,
    absmax,
    blocksize,
    quant_type,
    bias=None,
    absmax_8bit=None,
    absmax_code=None,
    absmax_offset=None,
):
    """A W^T + bias, where B holds the 4-bit weight W of shape shapeB [n, k].

    A              [..., k], float32, float16 or bfloat16
    B              packed codes, any storage dtype;  blocksize, quant_type  of the codes
    absmax         float32 [ceil(n k / blocksize)]; with nested scales those of the scales, one per 256
    absmax_8bit, absmax_code, absmax_offset  nested scales: uint8 codes, float32 [256], float32 0-dim; all or none
    bias           [n], dtype of A
    Returns [..., n], dtype of A.
    """
    op = "gemm_4bit"
    _expect(len(shapeB) == 2, f"{op}: shapeB has {len(shapeB)} entries, expected 2")
    _one_device(op, A, bias=bias)
    n, k = shapeB
    _bias(op, bias, n, A.dtype)
    scales = absmax, None, None, None
    if absmax_8bit is not None:
        scales = absmax_8bit, absmax_code, absmax, absmax_offset
    return _product_4bit(op, A, B, scales, blocksize, quant_type, (k, n), n * k)


def _gemv_4bit(
    op: str, A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    _expect(len(shapeB) == 2, f"{op}: shapeB has {len(shapeB)} entries, expected 2")
    _one_device(op, A, code=code)
    _dtype(op, "code", code, torch.float32)
    _expect(code.numel() == 16, f"{op}: code has {code.numel()} elements, expected 16")
    n, k = shapeB
    # The type is in the values of `code`; the shape does not depend on it.
    return _product_4bit(op, A, B, (absmax, None, None, None), blocksize, "nf4", (k, n), n * k)


@_operator("gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor")
def _(A, B, shapeB, absmax, code, blocksize):
    return _gemv_4bit("gemv_4bit", A, B, shapeB, absmax, code, blocksize)


@_operator(
    "gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()"
)
def _(A, B, shapeB, absmax, code, blocksize, out):
    op = "gemv_4bit.out"
    result = _gemv_4bit(op, A, B, shapeB, absmax, code, blocksize)
    _one_device(op, A, out=out)
    _out(op, out, result.shape, A.dtype)


# ---------------------------------------------------------------- LLM.int8()


def _dynamic_size() -> int:
    return torch.library.get_ctx().new_dynamic_size()


def _quantized_rows(op: str, A: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes like A, row statistics, and the outlier columns: None without a threshold."""
    _float(op, "the dtype of A", A.dtype)
    _expect(A.dim() >= 1, f"{op}: A has 0 dimensions, expected 1 or more")
    _expect(threshold >= 0, f"{op}: threshold is {threshold}, expected 0 or more")
    codes = torch.empty(A.shape, device=A.device, dtype=torch.int8)
    stats = torch.empty((A.shape[:-1].numel(),), device=A.device, dtype=torch.float32)
    columns = None
    if threshold > 0:
        columns = torch.empty((_dynamic_size(),), device=A.device, dtype=torch.int64)
    return codes, stats, columns


@_operator("int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)")
def _(A, threshold=0.0):
    return _quantized_rows("int8_vectorwise_quant", A, threshold)


@_operator("int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)")
def _(A, threshold=0.0):
    codes, stats, columns = _quantized_rows("int8_double_quant", A, threshold)
    column_stats = torch.empty((A.shape[-1],), device=A.device, dtype=torch.float32)
    return codes, torch.empty_like(codes), stats, column_stats, columns


@_operator("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor")
def _(A, stats):
    op = "int8_vectorwise_dequant"
    _one_device(op, A, stats=stats)
    _dtype(op, "A", A, torch.int8)
    _dtype(op, "stats", stats, torch.float32)
    return torch.empty(A.shape, device=A.device, dtype=torch.float32)


@_operator("_int8_outlier_columns(Tensor flags) -> Tensor", autograd=False)
def _(flags):
    _dtype("_int8_outlier_columns", "flags", flags, torch.uint8)
    return torch.empty((_dynamic_size(),), device=flags.device, dtype=torch.int64)


def _product_int8(op: str, A: Tensor, B: Tensor) -> tuple[int, ...]:
    """The shape of A B^T, both int8."""
    _one_device(op, A, B=B)
    _dtype(op, "A", A, torch.int8)
    return _weight_int8(op, "A", A, B)


def _weight_int8(op: str, name: str, A: Tensor, weight: Tensor) -> tuple[int, ...]:
    _dtype(op, "the weight", weight, torch.int8)
    _expect(weight.dim() == 2, f"{op}: the weight has {weight.dim()} dimensions, expected 2")
    return (*_rows(op, name, A, weight.shape[1]), weight.shape[0])


@_operator("int8_linear_matmul(Tensor A, Tensor B) -> Tensor")
def _(A, B):
    return torch.empty(_product_int8("int8_linear_matmul", A, B), device=A.device, dtype=torch.int32)


@_operator("int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> ()")
def _(A, B, out):
    op = "int8_linear_matmul.out"
    _one_device(op, A, out=out)
    _out(op, out, _product_int8(op, A, B), torch.int32)


@_operator(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor"
)
def _(A, row_stats, col_stats, dtype=None, bias=None):
    op = "int8_mm_dequant"
    _one_device(op, A, row_stats=row_stats, col_stats=col_stats, bias=bias)
    _dtype(op, "A", A, torch.int32)
    _bias(op, bias, A.shape[-1])
    return torch.empty(A.shape, device=A.device, dtype=dtype or torch.float16)


@_operator(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor"
)
def _(A, B, row_stats, col_stats, bias=None, dtype=None):
    """(A B^T) row_stats col_stats / 127^2 + bias: int8_linear_matmul() and int8_mm_dequant() in one call.

    A  int8 [..., k];  B  int8 [n, k];  row_stats  float32 [rows];  col_stats  float32 [n];  bias  [n], any float dtype
    Returns [..., n] in dtype, float16 if that is None.
    """
    op = "int8_scaled_mm"
    shape = _product_int8(op, A, B)
    _one_device(op, A, row_stats=row_stats, col_stats=col_stats, bias=bias)
    _bias(op, bias, B.shape[0])
    return torch.empty(shape, device=A.device, dtype=dtype or torch.float16)


@_operator(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)"
)
def _(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
    """A W^T + bias through int8, but for the outlier columns of A, which are multiplied unquantised.

    A             [..., k], float32, float16 or bfloat16;  CA, SCA  its codes, int8, and statistics, float32 [rows]
    CB, SCB       int8 [n, k] and float32 [n]: the codes and statistics of W
    outlier_cols  int64, ascending;  bias  [n], any float dtype
    Returns ([..., n] in the dtype of A, A[:, outlier_cols] as [rows, outliers]).
    """
    op = "int8_mixed_scaled_mm"
    _float(op, "the dtype of A", A.dtype)
    shape = _product_int8(op, CA, CB)
    _one_device(op, A, CA=CA, SCA=SCA, SCB=SCB, outlier_cols=outlier_cols, bias=bias)
    _bias(op, bias, CB.shape[0])
    outliers = 0 if outlier_cols is None else outlier_cols.numel()
    sub = torch.empty((CA.shape[:-1].numel(), outliers), device=A.device, dtype=A.dtype)
    return torch.empty(shape, device=A.device, dtype=A.dtype), sub


@_operator(
    "_linear_int8(Tensor x, Tensor CB, Tensor SCB, Tensor? bias, float threshold) -> (Tensor, Tensor)", autograd=False
)
def _(x, CB, SCB, bias, threshold):
    op = "_linear_int8"
    _float(op, "the dtype of x", x.dtype)
    _one_device(op, x, CB=CB, SCB=SCB, bias=bias)
    shape = _weight_int8(op, "x", x, CB)
    _bias(op, bias, CB.shape[0])
    _expect(threshold >= 0, f"{op}: threshold is {threshold}, expected 0 or more")
    flags = torch.empty((x.shape[-1] if threshold > 0 else 0,), device=x.device, dtype=torch.uint8)
    return torch.empty(shape, device=x.device, dtype=x.dtype), flags


@_operator("_linear_int8_grad(Tensor grad, Tensor CB, Tensor SCB) -> Tensor", autograd=False)
def _(grad, CB, SCB):
    op = "_linear_int8_grad"
    _float(op, "the dtype of grad", grad.dtype)
    _one_device(op, grad, CB=CB, SCB=SCB)
    _dtype(op, "CB", CB, torch.int8)
    rows = _rows(op, "grad", grad, CB.shape[0])
    return torch.empty((*rows, CB.shape[1]), device=grad.device, dtype=grad.dtype)


cextension.register_operators()
