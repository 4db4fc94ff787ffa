"""matmul() and matmul_4bit(): products with int8 and 4-bit weights that autograd can differentiate.

A product is one operator of the C library; torch's autograd is entered only if a gradient is wanted.  For the backward
pass the quantised weight and its statistics are kept, never a 16-bit copy of it; the activation only where the weight
itself is trained.
"""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import _ops, gone
from ..codebooks import fill
from ..functional import dequantize_4bit, int8_vectorwise_quant, weight_arguments
from ..quant_state import QuantState

_bnb = torch.ops.bitsandbytes
_GONE = ("CxBt", "formatB", "_tile_indices")  # and CxB, a property


# ---------------------------------------------------------------- LLM.int8()


@dataclasses.dataclass
class MatmulLtState:
    """What matmul() keeps of an int8 weight between calls.

    CB, SCB           int8 [n, k] codes and float32 [n] row statistics of the weight; None before it is quantised
    threshold         activations of at least this magnitude are outliers, multiplied unquantised; 0: none are
    idx               int64 outlier columns of the last call with a threshold, compiled ones aside; None before
    has_fp16_weights  the weight given to matmul() is a 16- or 32-bit master copy, quantised again when it changes
    is_training       set by the layers
    All other attributes have no effect and exist for old clients.
    """

    force_no_igemmlt: bool = False
    CB: torch.Tensor | None = None
    SB: torch.Tensor | None = None
    SCB: torch.Tensor | None = None
    SBt: torch.Tensor | None = None
    CBt: torch.Tensor | None = None
    subB: torch.Tensor | None = None
    outlier_pool: Any | None = None
    idx: torch.Tensor | None = None

    has_accumulated_gradients = False
    threshold = 0.0
    is_training = True
    has_fp16_weights = True
    memory_efficient_backward = False
    use_pool = False

    # Not fields: the flags of the outlier columns, from which idx is made, and which weight CB was made from.
    outlier_flags = None
    source = None

    def reset_grads(self) -> None:
        """Forget the quantised weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None

    def __getattr__(self, name: str) -> Any:
        if name not in _GONE:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        _warn_gone(name)


def _warn_gone(name: str) -> None:
    warnings.warn(f"MatmulLtState.{name} is gone: weights have one layout. It is always None.", FutureWarning, 3)


def _set_CxB(state: MatmulLtState, codes: Tensor | None) -> None:
    """None: forget the codes, which clients that offload a layer expect of their old home; others are dropped."""
    if codes is None:
        state.CB = None
    else:
        _warn_gone("CxB")


def _get_idx(state: MatmulLtState) -> Tensor | None:
    """int64 outlier columns of the last product; None: it had no threshold."""
    if state.outlier_flags is None:
        return None
    return _ops.call(_bnb._int8_outlier_columns.default, state.outlier_flags)


def _set_idx(state: MatmulLtState, columns: Tensor | None) -> None:
    if columns is not None:
        raise AttributeError("MatmulLtState.idx is the result of the last product, expected nothing but None")
    state.outlier_flags = None


# A dataclass field outwardly, made from the flags when somebody reads it.
MatmulLtState.idx = property(_get_idx, _set_idx)
MatmulLtState.CxB = property(lambda state: _warn_gone("CxB"), _set_CxB)


def _identity(weight: Tensor) -> tuple[int, int] | None:
    """Changes whenever torch knows that a weight was written or replaced; None where torch does not count writes."""
    counted = not torch.compiler.is_compiling() and not weight.is_inference()
    return (weight.data_ptr(), weight._version) if counted else None


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    return int8_vectorwise_quant(weight.detach().to(torch.float16))[:2]


def _codes_of(B: Tensor, state: MatmulLtState) -> tuple[Tensor, Tensor]:
    """(CB, SCB) of the weight B [n, k], up to date, and kept in the state.

    A master copy is quantised, as float16, when it was written since the last time; and in training whenever it has no
    gradient yet, because writes through `.data` are not counted.
    """
    if B.dtype == torch.int8:
        if state.SCB is None:
            state.SCB = getattr(B, "SCB", None)
        if state.SCB is None:
            raise ValueError("matmul: B is int8 and neither state nor B has SCB, expected the statistics of its rows")
        state.CB = B.detach()
        return state.CB, state.SCB
    if torch.compiler.is_compiling() and state.has_fp16_weights:
        return _quantise(B)  # a part of the graph, which must not write to the state: it may run under checkpointing
    source = _identity(B)
    fresh = state.CB is not None and state.SCB is not None and source is not None and source == state.source
    # The gradient is looked at last: a compiled graph, where nothing is fresh, need not read it.
    if not fresh or (state.is_training and not (B.is_leaf and B.grad is not None)):
        state.reset_grads()
        state.CB, state.SCB = _quantise(B)
        state.source = source
    return state.CB, state.SCB


class _Int8Linear(torch.autograd.Function):
    """(A, B, bias, CB, SCB, threshold) -> (output, flags of outlier columns).  B, if not None, only gets a gradient."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor | None, bias: Tensor | None, CB: Tensor, SCB: Tensor, threshold: float
    ) -> tuple[Tensor, Tensor]:
        output, flags = _ops.call(_bnb._linear_int8.default, A, CB, SCB, bias, threshold)
        ctx.dtypes = None if B is None else B.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(CB, SCB, A if ctx.needs_input_grad[1] else None)
        ctx.mark_non_differentiable(flags)
        return output, flags

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        CB, SCB, A = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        wanted = ctx.needs_input_grad
        grad_A = grad_B = grad_bias = None
        if wanted[0]:
            grad_A = _ops.call(_bnb._linear_int8_grad.default, grad, CB, SCB)
        if wanted[1]:
            rows, columns = grad.reshape(-1, CB.shape[0]), A.reshape(-1, CB.shape[1])
            # A backward inside autocast: the product stays in the dtype of the activation, as in the forward.
            with torch.autocast(grad.device.type, enabled=False):
                grad_B = torch.mm(rows.t(), columns).to(weight_dtype)
        if wanted[2]:
            grad_bias = _sum_rows(grad, bias_dtype)
        return grad_A, grad_B, grad_bias, None, None, None


def _sum_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias: grad [..., n] summed over all rows, rounded to `dtype` after the sum; [n]."""
    accurate = dtype if dtype == grad.dtype else torch.float32
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=accurate).to(dtype)


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """A W^T + bias with the int8 form of the weight W [n, k]: LLM.int8(), Dettmers et al. 2022.

    A          [..., k], float32, float16 or bfloat16, any rank >= 1; its rows are quantised, except outliers
    B          W, in 16 or 32 bits or int8; quantised into state.CB where the state says so
    out        ignored
    state      MatmulLtState, None: a new one
    threshold  above 0: stored into the state
    bias       [n], any float dtype
    Returns [..., n] in the dtype of A.  Gradients: A, bias, and B if state.has_fp16_weights.
    ValueError: shapes or dtypes do not fit.
    """
    if state is None:
        state = MatmulLtState()
    if threshold > 0.0 and threshold != state.threshold:
        state.threshold = threshold
    CB, SCB, threshold = state.CB, state.SCB, state.threshold
    if state.has_fp16_weights or CB is None or SCB is None:
        CB, SCB = _codes_of(B, state)
    trains = state.has_fp16_weights and B.requires_grad
    if torch.is_grad_enabled() and (A.requires_grad or trains or (bias is not None and bias.requires_grad)):
        output, flags = _Int8Linear.apply(A, B if trains else None, bias, CB, SCB, threshold)
    else:
        output, flags = _ops.call(_bnb._linear_int8.default, A, CB, SCB, bias, threshold)
    if threshold > 0.0 and not torch.compiler.is_compiling():
        state.outlier_flags = flags
    return output


class MatMul8bitLt:
    """The old name of the autograd function behind matmul()."""

    @staticmethod
    def apply(
        A: Tensor, B: Tensor, out: Tensor | None = None, bias: Tensor | None = None, state: MatmulLtState | None = None
    ) -> Tensor:
        """matmul(), by position."""
        return matmul(A, B, out=out, state=state, bias=bias)


class MatMul8bitFp(MatMul8bitLt):
    """The old name of the CPU's training path, which is the same as any other."""


# ---------------------------------------------------------------- 4 bits


class _Linear4bit(torch.autograd.Function):
    """(A, bias, weight, *weight_arguments()) -> output."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, bias: Tensor | None, weight: Tensor, *arguments: Any) -> Tensor:
        ctx.save_for_backward(weight, *arguments[:4])
        ctx.rest = arguments[4:]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _ops.call(_bnb._linear_4bit.default, A, weight, *arguments, bias, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_A = _ops.call(_bnb._linear_4bit_grad.default, grad, *ctx.saved_tensors, *ctx.rest)
        if ctx.needs_input_grad[1]:
            grad_bias = _sum_rows(grad, ctx.bias_dtype)
        return grad_A, grad_bias, *(None,) * (len(ctx.rest) + 5)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A W^T + bias, where B holds the 4-bit weight W [n, k]: QLoRA, Dettmers et al. 2023.

    A            [..., k], float32, float16 or bfloat16, any rank >= 1
    B            packed codes [i, 1] or their transposed view [1, i], any storage dtype
    quant_state  QuantState of W, plain or nested
    out          filled and returned: [..., n], dtype of A
    bias         [n], any float dtype
    Returns [..., n] in the dtype of A.  Gradients: A and bias.
    A weight that was quantised as [k, n], not square, still works, with a DeprecationWarning.
    ValueError: no state, or shapes, dtypes or statistics do not fit.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is None, expected the QuantState of B")
    arguments = weight_arguments("matmul_4bit", quant_state)
    n, k = arguments[-2:]
    if n != k and A.dim() > 0 and A.shape[-1] == n:
        result = _matmul_transposed(A, B, quant_state, bias)
    elif torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        result = _Linear4bit.apply(A, bias, B, *arguments)
    else:
        result = _ops.call(_bnb._linear_4bit.default, A, B, *arguments, bias, False)
    return result if out is None else fill("out", out, result)


class _Experts4bit(torch.autograd.Function):
    """(x, weight, first, transposed, *weight_arguments()) -> output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, first: Tensor, transposed: bool, *arguments: Any) -> Tensor:
        ctx.save_for_backward(weight, first, *arguments[:4])
        ctx.rest, ctx.transposed = arguments[4:], transposed
        return _multiply_experts(x, weight, arguments, first, transposed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, first, *scales = ctx.saved_tensors
        result = _multiply_experts(grad, weight, (*scales, *ctx.rest), first, not ctx.transposed)
        return result, *(None,) * (len(ctx.rest) + 7)


def _multiply_experts(x: Tensor, weight: Tensor, arguments: Any, first: Tensor, transposed: bool) -> Tensor:
    if transposed:
        return _ops.call(_bnb._experts_4bit_grad.default, x, weight, *arguments, first)
    return _ops.call(_bnb._experts_4bit.default, x, weight, *arguments, first, None)


def experts_matmul_4bit(
    x: Tensor, weight: Tensor, quant_state: QuantState, first: Tensor, transposed: bool = False
) -> Tensor:
    """x times one weight of a mixture of experts for each group of rows: all of them in one call, none dequantised.

    x            [rows, k], float32, float16 or bfloat16, rows sorted by expert
    weight       packed codes of W [experts, n, k], any storage dtype;  quant_state  QuantState of W, plain or nested
    first        int64 [experts + 1], ascending, on the device of x: rows first[e] .. first[e + 1] - 1 are expert e's
    transposed   False: x W_e^T.  True: x W_e, with x [rows, n]
    Returns [rows, n], transposed [rows, k], in the dtype of x; rows of no expert are not set.  Gradient: x.
    ValueError: shapes, dtypes or statistics do not fit; on the CPU also what first holds.
    """
    arguments = weight_arguments("experts_matmul_4bit", quant_state, 3)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Experts4bit.apply(x, weight, first, transposed, *arguments)
    return _multiply_experts(x, weight, arguments, first, transposed)


def _matmul_transposed(A: Tensor, B: Tensor, quant_state: QuantState, bias: Tensor | None) -> Tensor:
    """A times a weight that was quantised as [k, n]."""
    if not torch.compiler.is_compiling():
        text = "matmul_4bit: the weight was quantised as [in, out]. Re-quantize from the weight [out, in]."
        warnings.warn(text, DeprecationWarning, stacklevel=3)
    weight = dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
    return torch.nn.functional.linear(A, weight.t(), None if bias is None else bias.to(A.dtype)).to(A.dtype)


class MatMul4Bit:
    """The old name of the autograd function behind matmul_4bit()."""

    @staticmethod
    def apply(
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        """matmul_4bit(), by position."""
        return matmul_4bit(A, B, quant_state, out=out, bias=bias)


# ---------------------------------------------------------------- outliers of a whole model


class GlobalOutlierPooler:
    """A process-wide set of outlier columns of one feature dimension; the layers do not use it."""

    _instance = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOutlierPooler: call get_instance()")

    def initialize(self) -> None:
        """Forget everything."""
        self.outliers: set[int] = set()
        self.model_dim: int | None = None

    @classmethod
    def get_instance(cls) -> "GlobalOutlierPooler":
        """The one pooler."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add int64 columns; those of another feature dimension than the first one seen are ignored."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """All columns so far: int64 [count], ascending, on the CPU."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


def __getattr__(name: str) -> Any:
    return gone.find(__name__, name)
