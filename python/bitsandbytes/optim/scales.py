"""Scales of 8-bit state that can be cut anywhere.

Live state has one scale per 256 consecutive elements of the local shard.  Another sharding cuts elsewhere, so a
checkpoint of sharded state holds scales by "runs" instead: with d the last sharded dimension, a line is the
C = prod(shape[d + 1:]) elements behind one index of the dimensions 0..d.  Shards consist of whole lines, and blocks
start at multiples of 256 of the shard, hence at multiples of g = gcd(C, 256) within every line: a run of g elements has
one scale.  The tensor of runs, shape[:d + 1] + (C / g,), is sharded just as the parameter is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _ops
from . import sharding

BLOCK = 256
_bnb = torch.ops.bitsandbytes


def blocks(numel: int, size: int = BLOCK) -> int:
    """Scales of so many elements."""
    return -(-numel // size)


def run_shape(shape: Sequence[int], depth: int) -> tuple[int, ...]:
    """Shape of the scales by runs of a state of that shape."""
    behind = math.prod(shape[depth + 1 :])
    return (*shape[: depth + 1], behind // math.gcd(behind, BLOCK))


def to_runs(absmax: Tensor, shape: Sequence[int], depth: int) -> Tensor:
    """Scales by runs, float32 run_shape(shape, depth), from scales by blocks [ceil(n / 256)] of a contiguous state."""
    run = math.gcd(math.prod(shape[depth + 1 :]), BLOCK)
    starts = torch.arange(0, math.prod(shape), run, device=absmax.device)
    return absmax[starts.div_(BLOCK, rounding_mode="floor")].reshape(run_shape(shape, depth))


def from_runs(runs: Tensor, shape: Sequence[int]) -> Tensor:
    """One scale per element, in that shape, from scales by runs."""
    length = math.prod(shape[runs.dim() - 1 :]) // max(runs.shape[-1], 1)
    return runs.unsqueeze(-1).expand(*runs.shape, length).reshape(shape).contiguous()


def is_runs(runs_shape: Sequence[int], shape: Sequence[int]) -> bool:
    """Are those the scales by runs of a state of that shape?"""
    depth = len(runs_shape) - 2
    return 0 <= depth < len(shape) and tuple(runs_shape) == run_shape(shape, depth)


def spread(absmax: Tensor, state: Tensor, block: int = BLOCK) -> Tensor:
    """One scale per element, in the memory order of `state`, from scales by blocks."""
    result = torch.empty_like(state, dtype=torch.float32)
    sharding.in_memory_order(result).copy_(absmax.repeat_interleave(block)[: state.numel()])
    return result


def regroup(codes: Tensor, per_element: Tensor, old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales by blocks of a state that is given with one scale per element.

    codes u8 and per_element f32 of one shape and memory order; old, new: the maps of `codes` and of the result.
    A block throughout which one scale holds keeps it, and its codes, to the bit, if the map stays.  Others are decoded
    and quantised again.  Returns u8 in the layout of codes, f32 [ceil(n / 256)].
    """
    flat, scale = sharding.in_memory_order(codes), sharding.in_memory_order(per_element)
    n, count = flat.numel(), blocks(flat.numel())
    if n == 0:
        return codes, scale.new_zeros(0)
    table = torch.cat([scale, scale[-1:].expand(count * BLOCK - n)]).reshape(count, BLOCK)
    first = table[:, 0].contiguous()
    uniform = (table == first[:, None]).all(1)
    if old is not new:
        uniform.zero_()
    elif bool(uniform.all()):
        return codes, first
    values = _ops.call(_bnb.dequantize_blockwise.default, flat, torch.ones_like(first), old, BLOCK, torch.float32)
    fresh, absmax = _ops.call(_bnb.quantize_blockwise.default, values * scale, new, BLOCK)
    keeps = uniform.repeat_interleave(BLOCK)[:n]
    flat.copy_(torch.where(keeps, flat, fresh))
    return codes, torch.where(uniform, first, absmax)
