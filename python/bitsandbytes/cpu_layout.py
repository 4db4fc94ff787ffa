"""The repacked 4-bit layout that upstream's CPU kernels read: conversions only, no function of this package reads it.

The kernels here work on the bytes of docs/FORMAT.md, so nothing ever has to be repacked.
"""

import copy

import torch
from torch import Tensor

from .functional import _plain_absmax
from .quant_state import QuantState

_ROWS, _HALF = 32, 32  # rows of a group; nibbles that share the low (or the high) half of the bytes of a group


def has_avx512bf16() -> bool:
    """Whether 4-bit weights shall be repacked for the CPU: False on every machine."""
    return False


def _need(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(f"_convert_weight_packed_for_cpu: {text}")


def _convert_weight_packed_for_cpu(
    qweight: Tensor, quant_state: QuantState, block_n: int = _ROWS
) -> tuple[Tensor, QuantState]:
    """Repack a 4-bit weight [n, k]. qweight: as quantize_4bit() returns it, any storage dtype.

    Returns (uint8 [n, k / 2], a new state; quant_state stays as it is).  For each group of block_n rows and each pair
    of columns, nibble i < 32 of the row-major group is the low half of byte i, nibble i + 32 its high half.  The new
    state has plain bfloat16 scales [k / blocksize, n], dtype bfloat16, packing_format_for_cpu, and the old state as
    original_state.  AssertionError: not a matrix, block_n is not 32, n no multiple of it, k no multiple of the block.
    """
    _need(len(quant_state.shape) == 2, f"the weight has {len(quant_state.shape)} dimensions, expected 2")
    n, k = quant_state.shape
    _need(block_n == _ROWS, f"block_n is {block_n}, expected {_ROWS}")
    _need(n % block_n == 0, f"the weight has {n} rows, expected a multiple of {block_n}")
    _need(k % quant_state.blocksize == 0, f"a row has {k} elements, expected a multiple of {quant_state.blocksize}")
    raw = qweight.reshape(-1).view(torch.uint8)
    nibbles = torch.stack((raw >> 4, raw & 15), dim=-1).view(n // block_n, block_n, k // 2, 2)
    groups = nibbles.transpose(1, 2).reshape(-1, 2, _HALF)
    packed = (groups[:, 0] | (groups[:, 1] << 4)).view(n, k // 2)
    state = copy.copy(quant_state)
    state.absmax = _plain_absmax(quant_state).view(n, -1).t().to(torch.bfloat16).contiguous()
    state.nested, state.state2, state.offset, state.dtype = False, None, None, torch.bfloat16
    state.original_state, state.packing_format_for_cpu = quant_state, True
    state.original_dtype, state.original_nested = quant_state.dtype, quant_state.nested
    state.original_qshape, state.original_storage_type = qweight.shape, qweight.dtype
    return packed, state


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: Tensor, quant_state: QuantState, block_n: int = _ROWS
) -> tuple[Tensor, QuantState]:
    """Undo _convert_weight_packed_for_cpu(): the bytes, their dtype and shape, and the state, exactly."""
    _need(getattr(quant_state, "packing_format_for_cpu", False), "the state is not one of a repacked weight")
    n, k = quant_state.shape
    raw = packed_weight.reshape(-1, _HALF)
    groups = torch.stack((raw & 15, raw >> 4), dim=1).view(n // block_n, k // 2, block_n, 2)
    nibbles = groups.transpose(1, 2).reshape(-1, 2)
    plain = (nibbles[:, 0] << 4) | nibbles[:, 1]
    return plain.view(quant_state.original_storage_type).view(quant_state.original_qshape), quant_state.original_state
