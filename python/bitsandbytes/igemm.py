"""Products of int8 matrices under their old names; int8.int8_linear_matmul() is what new code should call.

Exact int32 arithmetic.  Every function warns (FutureWarning) and is re-exported by functional.py.
"""

import warnings

import torch
from torch import Tensor

from .codebooks import fill
from .int8 import int8_linear_matmul


def _warn(name: str) -> None:
    warnings.warn(f"{name} is deprecated, use int8_linear_matmul(A, B), which is A B^T", FutureWarning, stacklevel=3)


def _is_contraction(A: Tensor, B: Tensor, out: Tensor | None) -> bool:
    return A.dim() == 3 and B.dim() == 3 and out is not None and out.dim() == 2


def _result_shape(
    name: str,
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype,
) -> tuple[int, ...]:
    for label, x in (("A", A), ("B", B)):
        if x.dtype != expected_type:
            raise TypeError(f"{name}: {label} has dtype {x.dtype}, expected {expected_type}")
    found = f"{name}: A is {list(A.shape)} (transposed: {transposed_A}), B is {list(B.shape)} ({transposed_B})"
    if (A.dim(), B.dim()) not in ((2, 2), (3, 2), (3, 3)):
        raise ValueError(f"{found}; expected 2-D x 2-D, 3-D x 2-D or 3-D x 3-D")
    if _is_contraction(A, B, out):
        if transposed_A or transposed_B or A.shape[:2] != B.shape[:2]:
            raise ValueError(f"{found}; with a 2-D out expected A [b, s, i] and B [b, s, o], not transposed")
        shape = A.shape[2], B.shape[2]
    else:
        rows, inner = reversed(A.shape[-2:]) if transposed_A else A.shape[-2:]
        inner_B, columns = reversed(B.shape[-2:]) if transposed_B else B.shape[-2:]
        if inner != inner_B or (B.dim() == 3 and A.shape[0] != B.shape[0]):
            raise ValueError(f"{found}; expected equal inner dimensions, and equal batches where both are 3-D")
        shape = *A.shape[:-2], rows, columns
    if out is not None and tuple(out.shape) != tuple(shape):
        raise ValueError(f"{found}, out is {list(out.shape)}; expected out of shape {list(shape)}")
    return tuple(shape)


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> tuple[int, ...]:
    """The shape of igemm(A, B, out, transposed_A, transposed_B). Deprecated (FutureWarning).

    TypeError: A or B is not of expected_type.  ValueError: the shapes do not fit.
    """
    _warn("check_matmul")
    return _result_shape("check_matmul", A, B, out, transposed_A, transposed_B, expected_type)


def multiply(
    name: str, A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """igemm() without the warning; `name` opens the text of errors."""
    shape = _result_shape(name, A, B, out, transposed_A, transposed_B, torch.int8)
    if _is_contraction(A, B, out):
        A, B = A.flatten(0, 1).mT, B.flatten(0, 1)
    else:
        A, B = A.mT if transposed_A else A, B.mT if transposed_B else B
    if B.dim() == 2:
        result = int8_linear_matmul(A, B.mT)
    else:
        result = torch.empty(shape, dtype=torch.int32, device=A.device)
        for a, b, target in zip(A, B, result, strict=True):
            int8_linear_matmul(a, b.mT, out=target)
    return result if out is None else fill("out", out, result)


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """The matrix product of int8 tensors, as int32. Deprecated (FutureWarning).

    A, B          int8: A [m, k] or [b, m, k] with B [k, n]; A [b, m, k] with B [b, k, n]
    transposed_A  A is [.., k, m];  transposed_B  B is [.., n, k]
    out           filled and returned: int32, shape of the result.  A 2-D out [i, o] with A [b, s, i] and B [b, s, o]
                  asks for the sum over b and s
    Returns int32 [.., m, n].  TypeError: an operand is not int8.  ValueError: shapes, or dtype of out.
    """
    _warn("igemm")
    return multiply("igemm", A, B, out, transposed_A, transposed_B)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """igemm() for A [b, m, k] and B [b, k, n]; ValueError for other ranks. Returns int32 [b, m, n]. Deprecated."""
    _warn("batched_igemm")
    ranks = [x.dim() for x in (A, B) if x.dim() != 3] + ([out.dim()] if out is not None and out.dim() != 3 else [])
    if ranks:
        raise ValueError(f"batched_igemm: an operand has {ranks[0]} dimensions, expected 3")
    return multiply("batched_igemm", A, B, out, transposed_A, transposed_B)
