"""Differentiable products with quantised weights: see _functions.py."""

from ._functions import (
    GlobalOutlierPooler,
    MatMul4Bit,
    MatMul8bitFp,
    MatMul8bitLt,
    MatmulLtState,
    matmul,
    matmul_4bit,
)

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]
