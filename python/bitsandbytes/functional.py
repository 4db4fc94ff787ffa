"""Functions on tensors: quantise, dequantise, codebooks, quantiles, and single optimizer updates.

Thin by design: every function names its arguments, hands them to one operator of the C library (schemas: _ops.py) and
names the results.  The operators check, allocate and compute; their errors arrive as ValueError or NotImplementedError.
Numbers follow docs/NUMERICS.md, byte layouts docs/FORMAT.md.
"""

import ctypes
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _ops, gone
from .cextension import lib
from .codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    create_quantile_map,
    default_map,
    estimate_quantiles,
    get_4bit_type,
    name2qmap,
)
from .codebooks import fill as _fill
from .igemm import batched_igemm, check_matmul, igemm
from .int8 import (
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from .paged import (
    FIRST_CUDA_DEVICE,
    CUBLAS_Context,
    GlobalPageManager,
    _mul,
    elementwise_func,
    fill,
    get_paged,
    prefetch_tensor,
)
from .quant_state import QuantState

__all__ = [
    "FIRST_CUDA_DEVICE",
    "C",
    "CUBLAS_Context",
    "GlobalPageManager",
    "QuantState",
    "_mul",
    "batched_igemm",
    "check_matmul",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "create_quantile_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "elementwise_func",
    "estimate_quantiles",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "percentile_clipping",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

_bnb = torch.ops.bitsandbytes
NESTED_BLOCKSIZE = 256  # of the scales of a 4-bit tensor: part of the checkpoint format
DEFAULT_BLOCKSIZE_4BIT = 64
C = 127.0  # the largest int8 code of LLM.int8()


def __getattr__(name: str) -> Any:
    """Functions of old releases (legacy.py) and conversions (cpu_layout.py), loaded when asked for."""
    return gone.find(__name__, name)


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """Address of A's first element as ctypes.c_void_p; None for None."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True if all tensors share one device, the CPU included; None and paged tensors are passed over.

    Raises RuntimeError naming the devices otherwise.
    """
    devices = {str(t.device) for t in tensors if t is not None and not getattr(t, "is_paged", False)}
    if len(devices) > 1:
        raise RuntimeError(f"the tensors live on {', '.join(sorted(devices))}, expected one device")
    return True


def _nest(absmax: Tensor, blocksize: int) -> tuple[Tensor, Tensor, QuantState]:
    """Quantise scales once more. Returns (uint8 codes [n], float32 0-dim offset, QuantState of the codes)."""
    code = default_map("dynamic", absmax)
    codes, absmax2, offset = _ops.call(_bnb._quantize_scales.default, absmax, code, blocksize)
    return codes, offset, QuantState(absmax2, code=code.clone(), blocksize=blocksize, dtype=torch.float32)


def _plain_absmax(state: QuantState) -> Tensor:
    """The scales of a state as float32 [blocks], expanded where they are nested."""
    if not state.nested:
        return state.absmax
    inner = state.state2
    args = state.absmax, inner.code, inner.absmax, state.offset, inner.blocksize
    return _ops.call(_bnb._dequantize_scales.default, *args)


def _hand_over(
    codes: Tensor, state: QuantState, out: Tensor | None, absmax: Tensor | None
) -> tuple[Tensor, QuantState]:
    """Finish a quantiser: fill the caller's `out` and `absmax`, if given, and return (codes, state)."""
    if absmax is not None:
        state.absmax = _fill("absmax", absmax, state.absmax)
    return codes if out is None else _fill("out", out, codes), state


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantise to 8 bits with one scale per block of the row-major flattening of A.

    A          float32, float16 or bfloat16, any shape
    code       float32 [256], ascending; None: the signed dynamic map
    absmax     filled and put into the state: float32 [ceil(n / blocksize)], uint8 if nested
    out        filled and returned: uint8, shape of A
    blocksize  elements per scale, any value > 0
    nested     quantise the scales too, with the same block size
    Returns (uint8 codes of A's shape, QuantState).  ValueError: dtype, block size, map, absmax or out do not fit.
    Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.
    """
    code = default_map("dynamic", A) if code is None else code.to(A.device)
    codes, scales = _ops.call(_bnb.quantize_blockwise.default, A, code, blocksize)
    offset = state2 = None
    if nested:
        scales, offset, state2 = _nest(scales, blocksize)
    state = QuantState(scales, code=code.clone(), blocksize=blocksize, dtype=A.dtype, offset=offset, state2=state2)
    return _hand_over(codes, state, out, absmax)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The inverse of quantize_blockwise(): code[A] * scale, rounded once to the output dtype.

    A                        uint8 codes, any shape
    quant_state              decides everything else; without it absmax is needed, and the output is float32
    absmax, code, blocksize  used without quant_state: float32 [ceil(n / blocksize)], float32 [256] or None, > 0
    out                      filled and returned: shape of A, output dtype
    nested                   ignored: the state knows
    ValueError: neither state nor absmax; A is not uint8; lengths or block size do not fit.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise: quant_state and absmax are None, expected one of them")
        code = default_map("dynamic", A) if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    scales = _plain_absmax(quant_state)
    args = A, scales, quant_state.code.to(A.device), quant_state.blocksize, quant_state.dtype
    if out is None:
        return _ops.call(_bnb.dequantize_blockwise.default, *args)
    _ops.call(_bnb.dequantize_blockwise.out, *args, out)
    return out


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantise to 4 bits with one scale per block of the row-major flattening of A.

    A                    float32, float16 or bfloat16, any shape, n elements
    absmax               filled and put into the state: float32 [ceil(n / blocksize)], uint8 if compress_statistics
    out                  filled and returned: like the packed result
    blocksize            a power of two, 32..4096; None: 64
    compress_statistics  quantise the scales to 8 bits too, in blocks of 256 (QLoRA's double quantisation)
    quant_type           "fp4" or "nf4"
    quant_storage        dtype that carries the bytes: uint8, float16, bfloat16 or float32
    Returns (packed, QuantState): ceil(n / 2) bytes, padded to whole items, as [items, 1].
    ValueError: anything outside these lists.
    Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3.
    """
    blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
    packed, scales = _ops.call(_bnb.quantize_4bit.default, A, blocksize, quant_type, quant_storage)
    offset = state2 = None
    if compress_statistics:
        scales, offset, state2 = _nest(scales, NESTED_BLOCKSIZE)
    state = QuantState(
        scales,
        shape=A.shape,
        code=default_map(quant_type, A).clone(),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=A.dtype,
        offset=offset,
        state2=state2,
    )
    return _hand_over(packed, state, out, absmax)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """quantize_4bit() with quant_type "fp4": same arguments, results and errors."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """quantize_4bit() with quant_type "nf4": same arguments, results and errors."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The inverse of quantize_4bit(): code * scale, rounded once to the output dtype.

    A            packed codes [n, 1], any storage dtype; [1, n] (a transposed view) asks for the transposed result
    quant_state  decides everything else; without it absmax and out are needed, and out gives shape and dtype
    out          filled and returned: shape and dtype of the state
    ValueError: statistics missing or of wrong length, block size, quant_type or dtype outside the lists.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit: without quant_state both absmax and out are needed")
        blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, blocksize=blocksize, quant_type=quant_type, dtype=out.dtype)
    # A single element is [1, 1] either way round, and stands for the tensor as it was.
    transposed = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    if transposed and len(quant_state.shape) > 2:
        given, shape = list(A.shape), list(quant_state.shape)
        raise ValueError(f"dequantize_4bit: A is {given}, a transposed view, of a tensor {shape}; expected [n, 1]")
    result = _dequantize_4bit(A, quant_state, out)
    return result.t() if transposed else result


def _dequantize_4bit(A: Tensor, state: QuantState, out: Tensor | None) -> Tensor:
    tail = state.blocksize, state.quant_type, state.shape, state.dtype
    if out is not None:
        _ops.call(_bnb.dequantize_4bit.out, A, _plain_absmax(state), *tail, out)
        return out
    if not state.nested:
        return _ops.call(_bnb.dequantize_4bit.default, A, state.absmax, *tail)
    inner = state.state2
    args = state.absmax, inner.code, inner.absmax, state.offset, inner.blocksize
    return _ops.call(_bnb._dequantize_4bit_nested.default, A, *args, *tail)


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """dequantize_4bit() with quant_type "fp4": same arguments, results and errors."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """dequantize_4bit() with quant_type "nf4": same arguments, results and errors."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def weight_arguments(function: str, state: QuantState, dimensions: int = 2) -> tuple[Any, ...]:
    """The state of a weight [n, k] as operators take it, read afresh on every call: states are edited by clients.

    dimensions  3: of weights [experts, n, k]
    Returns (absmax, absmax_code, absmax2, offset, blocksize2, blocksize, quant_type, n, k).
    ValueError, opened by the name `function`: the state is not that of a matrix.
    """
    shape = state.shape
    if shape is None or len(shape) != dimensions:
        found = None if shape is None else list(shape)
        raise ValueError(f"{function}: the state has shape {found}, expected {dimensions} dimensions")
    tail = state.blocksize, state.quant_type, *shape[-2:]
    if not state.nested:
        return state.absmax, None, None, None, 0, *tail
    inner = state.state2
    return state.absmax, inner.code, inner.absmax, state.offset, inner.blocksize, *tail


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A W^T, where B holds the 4-bit weight W [n, k]; any number of rows.

    A      [..., k], float32, float16 or bfloat16
    B      packed codes, any storage dtype
    out    filled and returned: [..., n], dtype of A
    state  QuantState of W, plain or nested;  transposed_A, transposed_B  ignored
    ValueError: state is missing, shapes, dtypes or statistics do not fit.
    """
    if state is None:
        raise ValueError("gemv_4bit: state is None, expected the QuantState of B")
    result = _ops.call(_bnb._linear_4bit.default, A, B, *weight_arguments("gemv_4bit", state), None, False)
    return result if out is None else _fill("out", out, result)


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One update of p, state1 and state2 in place, with 32-bit state. Returns None.

    optimizer_name  adam, lamb, ademamix, momentum, lars, lion, rmsprop or adagrad: see docs/OPTIMIZERS.md
    g, p            gradient and parameter: same shape and dtype, float32, float16 or bfloat16
    state1, state2  float32, shape of p (ademamix: state1 is [2, *shape]); zeros before the first step.  state2 is None
                    but for adam, lamb and ademamix
    beta2           momentum and lars: the dampening
    step            1 for the first update
    max_unorm       above 0: the norm of the update is at most max_unorm times that of p; unorm_vec, float32 [1], then
                    receives the sum of squares of the update, if given
    ValueError: unknown name, a value out of range, dtypes or lengths that do not fit.
    """
    _ops.call(
        _bnb.optimizer_update_32bit.default,
        *(optimizer_name, g, p, state1, state2, unorm_vec, max_unorm, 0.0),
        *(beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros),
    )


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One update of p, its 8-bit states and their scales in place, in blocks of 256. Returns None.

    optimizer_name    adam, lamb, ademamix, momentum, lars, lion, rmsprop or adagrad: see docs/OPTIMIZERS.md
    g, p              gradient and parameter: same shape and dtype, float32, float16 or bfloat16
    state1, state2    uint8 codes, shape of p;  absmax1, absmax2  float32 [ceil(n / 256)]; zeros before the first step.
                      ademamix: state1 is [2, *shape], absmax1 [2, ceil(n / 256)].  One-state rows: state2, qmap2 and
                      absmax2 are None
    qmap1, qmap2      float32 [256] maps of the two states
    step              1 for the first update
    ValueError: unknown name, dtypes or lengths that do not fit.  Dettmers et al. 2021, section 2.
    """
    _ops.call(
        _bnb.optimizer_update_8bit_blockwise.default,
        *(optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, lr),
        *(qmap1, qmap2, absmax1, absmax2, weight_decay, gnorm_scale, skip_zeros),
    )


def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Note a gradient's norm, and what would bring it down to a percentile of the last 100.

    grad        float32, float16 or bfloat16, any shape
    gnorm_vec   float32 [100], changed in place: squared norms; step 1 fills all slots, later ones slot step % 100
    step        1 for the first call
    Returns 0-dim float32 tensors (norm, limit, scale): limit is the norm at rank `percentile` of the sorted history,
    scale is limit / norm where the norm is above it, else 1.  ValueError: percentile outside 0 to 99, step below 1.
    """
    norms = _ops.call(_bnb._gradient_norms.default, [grad])
    report = _ops.call(_bnb._percentile_clip.default, [gnorm_vec], norms, [], [step], percentile)
    return tuple(report[0].unbind())
