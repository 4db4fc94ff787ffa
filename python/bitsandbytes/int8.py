"""LLM.int8() on tensors: row-wise quantisation with outliers, exact int8 products, and their scales.

Thin, as functional.py: one operator each.  Leading dimensions are rows; inputs need not be contiguous.
Numbers follow docs/NUMERICS.md.  Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at
Scale".
"""

import torch
from torch import Tensor

from . import _ops
from .codebooks import fill

_bnb = torch.ops.bitsandbytes


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise each row of A [..., cols] to int8 by its largest magnitude.

    A          float32, float16 or bfloat16
    threshold  above 0: elements with abs(x) >= threshold are outliers; they do not count for the statistics and their
               codes are 0, and with more than one row so are all codes of their columns
    Returns (int8 codes of A's shape, float32 statistics [rows], int64 outlier columns or None without a threshold).
    ValueError: dtype, threshold below 0.
    """
    return _ops.call(_bnb.int8_vectorwise_quant.default, A, threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """The inverse: A * stats / 127 as float32. A int8 [..., cols], stats float32 [rows]. ValueError: no such shapes."""
    return _ops.call(_bnb.int8_vectorwise_dequant.default, A, stats)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantise A [..., cols] by rows and by columns.

    Returns (codes by row, codes by column, row statistics [rows], column statistics [cols], outlier columns or None);
    the parts are those of int8_vectorwise_quant().  Outliers count as 0 in the part by columns.
    ValueError: dtype, threshold below 0, or one of the four tensors that old releases let the caller allocate.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"int8_double_quant: {name} is given, expected None: results are always new tensors")
    return _ops.call(_bnb.int8_double_quant.default, A, threshold)


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """A B^T in exact int32 arithmetic.

    A      int8 [..., k]
    B      int8 [n, k]
    out    filled and returned: int32 [..., n]
    dtype  ignored
    ValueError: dtypes or shapes do not fit.
    """
    if out is None:
        return _ops.call(_bnb.int8_linear_matmul.default, A, B)
    _ops.call(_bnb.int8_linear_matmul.out, A, B, out)
    return out


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A row_stats col_stats / 127^2 + bias, rounded once to float16.

    A          int32 [..., n], a product of int8_linear_matmul()
    row_stats  float32 [rows];  col_stats  float32 [n]
    bias       [n], float32, float16 or bfloat16
    out        filled and returned: float16, shape of A
    ValueError: dtypes or lengths do not fit.
    """
    result = _ops.call(_bnb.int8_mm_dequant.default, A, row_stats, col_stats, torch.float16, bias)
    return result if out is None else fill("out", out, result)
