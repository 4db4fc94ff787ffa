"""Sharded parameters: which part of one lies in this process, and tensors that are sharded alike.

Two kinds exist.  A DTensor parameter (FSDP2, tensor parallelism) knows its mesh and placements; its full-size states
are DTensors of the same placement.  A parameter that FSDP1 flattened is a plain tensor, the elements [start, stop) of
the original; what it was is looked up among the live FSDP1 objects, once per parameter.
Nothing here imports torch.distributed: a process that shards nothing pays for a look into sys.modules at most.
"""

import gc
import logging
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger(__name__)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Piece(NamedTuple):
    """The part of a parameter that FSDP1 left in this process, in elements of the original parameter."""

    numel: int  # of the original
    start: int
    stop: int


_pieces = WeakIdKeyDictionary()  # parameter -> its Piece, or None if it cannot be found
_holders = WeakIdKeyDictionary()  # parameter -> (weak reference to a module, name there)


def is_dtensor(t: Any) -> bool:
    """Is t a DTensor?"""
    if type(t) in _PLAIN:
        return False
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(t, kind)


def local(t: Any) -> Tensor:
    """The part of t in this process: the local tensor of a DTensor (it shares memory), else t itself."""
    return t._local_tensor if is_dtensor(t) else t


def whole_numel(p: Any) -> int:
    """Elements of the whole parameter, of which p may be a part."""
    found = piece(p)
    return p.numel() if found is None else found.numel


def piece(p: Any) -> Piece | None:
    """The Piece that p is if FSDP1 flattened it, else None."""
    if not getattr(p, "_fsdp_flattened", False):  # FSDP1 marks what it has taken over
        return None
    if p not in _pieces:
        _find_pieces()
        if p not in _pieces:  # its handle is hidden from the garbage collector, say by gc.freeze()
            _pieces[p] = None
            text = (
                "what FSDP flattened into a parameter of %d elements is unknown: its bits of state follow that number"
            )
            logger.warning(text, p.numel())
    return _pieces[p]


def is_flattened(p: Any) -> bool:
    """Does FSDP1 manage p: one original parameter, or the flat parameter that holds several?"""
    return hasattr(p, "_unpadded_unsharded_size") or getattr(p, "_fsdp_flattened", False)


def new_state(p: Any, dtype: torch.dtype, rows: int = 0) -> Tensor:
    """Zeros in the shape of p, or [rows, *p.shape], with its memory format; for a DTensor p a DTensor placed alike.

    The local tensor of a DTensor is contiguous: its blocks follow the row-major order of the shard.
    """
    if is_dtensor(p):
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(f"a parameter {tuple(p.shape)} is placed as {p.placements}, expected no partial sums")
        part = local(p)
        shape = (rows, *part.shape) if rows else part.shape
        return wrap(p, torch.zeros(shape, dtype=dtype, device=part.device), lead=1 if rows else 0)
    if not rows:
        return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    like = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, device="meta")
    zeros = torch.zeros(rows * p.numel(), dtype=dtype, device=p.device)
    return zeros.as_strided((rows, *p.shape), (p.numel(), *like.stride()))


def gradient(p: Any, g: Any) -> Tensor:
    """The local part of the gradient g, placed as p is (redistributed if it is not; then every process must call)."""
    if not is_dtensor(p):
        return g
    if g.placements != p.placements:
        g = g.redistribute(p.device_mesh, p.placements)
    part = local(g)
    return part.wait() if hasattr(part, "wait") else part


def reduce_sums(params: Sequence[Any], sums: Tensor) -> Tensor:
    """Add up sums over the shards of each sharded parameter, in place. sums: float64 [len(params), k].

    Rows of parameters that are whole in every process stay.  Every process of a mesh must call, with its parameters.
    """
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for row, p in enumerate(params):
        if is_dtensor(p):
            dims = tuple(dim for dim, placement in enumerate(p.placements) if _is_shard(placement))
            if dims:
                groups.setdefault((p.device_mesh, dims), []).append(row)
    for (mesh, dims), rows in groups.items():
        part = sums[rows]
        for dim in dims:
            torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        sums[rows] = part
    return sums


def wrap(p: Any, part: Tensor, lead: int = 0, tail: tuple[int, int] | None = None) -> Any:
    """A DTensor placed as the DTensor p whose local tensor is `part`.

    lead   dimensions in front of those of p
    tail   None: the dimensions of p follow.  Else (depth, size): the first depth + 1 dimensions of p, then one of size
    """
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    behind = tuple(p.shape) if tail is None else (*p.shape[: tail[0] + 1], tail[1])
    shape = torch.Size((*part.shape[:lead], *behind))
    stride = torch.empty(shape, device="meta").stride()
    spec = DTensorSpec(p.device_mesh, _shifted(p.placements, lead), tensor_meta=TensorMeta(shape, stride, part.dtype))
    return type(p)(part, spec, requires_grad=False)


def depth(p: Any) -> int:
    """The last dimension that a DTensor p is sharded along; 0 if it is along none."""
    return max((placement.dim % max(p.dim(), 1) for placement in p.placements if _is_shard(placement)), default=0)


def placed_as(p: Any, value: Any, lead: int = 0) -> bool:
    """Is value a DTensor on the mesh of p with its placements, moved by `lead` dimensions?"""
    same = is_dtensor(value) and is_dtensor(p) and value.device_mesh == p.device_mesh
    return same and tuple(value.placements) == _shifted(p.placements, lead)


def whole(value: Any) -> Tensor:
    """All of a DTensor (every process of its mesh must call), a plain tensor as it is."""
    return value.full_tensor() if is_dtensor(value) else value


def part_of(p: Any, value: Tensor, lead: int = 0) -> Tensor:
    """The part of `value` that belongs to the part of p in this process, contiguous or in the memory order of p.

    value   a tensor [..lead.., *shape of the whole parameter], plain or DTensor, or already the part FSDP1 gives p
    ValueError where no part can be cut out.
    """
    value = value.detach()
    if placed_as(p, value, lead):
        return local(value).to(local(p).device, copy=True).contiguous()
    value = whole(value).to(p.device)
    if is_dtensor(p):
        try:
            value = value.contiguous().reshape(*value.shape[:lead], *p.shape)
            cut = _distribute(value, p.device_mesh, _shifted(p.placements, lead))
        except RuntimeError as error:
            raise ValueError(f"cannot place a tensor {tuple(value.shape)} as {p.placements}: {error}") from error
        return local(cut).clone(memory_format=torch.contiguous_format)
    found = piece(p)
    heads = list(value) if lead else [value]
    if found is not None and heads[0].numel() == found.numel != p.numel():
        heads = [in_memory_order(row)[found.start : found.stop] for row in heads]
    out = new_state(p, value.dtype, rows=len(heads) if lead else 0)
    for row, source in zip(out if lead else [out], heads, strict=True):
        row.copy_(source.reshape(p.shape))
    return out


def in_memory_order(t: Tensor) -> Tensor:
    """A dense tensor as a vector that shares its memory, in the order in which the elements lie there.

    Of a tensor with gaps or repeated elements: a copy, in the order of its indices.
    """
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    if t.is_contiguous() or span != t.numel():
        return t.reshape(-1)
    return t.as_strided((t.numel(),), (1,))


def holder(p: Any) -> Any:
    """(weak reference to a module, name) of a module that holds the parameter p, or None.

    Only looked for where parameters may be replaced by sharded ones: when torch.distributed is in use.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized() or is_dtensor(p):
        return None
    if p not in _holders or _holders[p][0]() is None:
        _find_holders()
    return _holders.get(p)


def replaces(new: Any, old_shape: torch.Size) -> bool:
    """Can the parameter `new` be the sharded form of one of shape old_shape?"""
    return is_dtensor(new) and new.shape == old_shape


def _distribute(value: Tensor, mesh: Any, placements: Sequence[Any]) -> Any:
    """The shard of a tensor that every process has; no communication."""
    return sys.modules["torch.distributed.tensor"].distribute_tensor(value, mesh, placements, src_data_rank=None)


def _is_shard(placement: Any) -> bool:
    return hasattr(placement, "dim")


def _shifted(placements: Sequence[Any], lead: int) -> tuple[Any, ...]:
    """The placements of a tensor that has `lead` dimensions more in front."""
    if not lead:
        return tuple(placements)
    return tuple(_moved(placement, lead) if _is_shard(placement) else placement for placement in placements)


def _moved(placement: Any, lead: int) -> Any:
    extra = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + lead, **extra)


def _find_pieces() -> None:
    """Enter every parameter of every living FSDP1 handle in _pieces. torch keeps no index of its handles."""
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    kind = getattr(module, "FlatParamHandle", None)
    for handle in [each for each in gc.get_objects() if type(each) is kind]:
        flat = handle.flat_param
        infos = getattr(flat, "_shard_param_infos", None) or [None] * len(flat._numels)
        for p, numel, info in zip(flat._params or (), flat._numels, infos, strict=False):
            start, stop = 0, numel
            if info is not None and p.numel() != numel:
                start = info.intra_param_start_idx if info.in_shard else 0
                stop = info.intra_param_end_idx + 1 if info.in_shard else 0
            _pieces[p] = Piece(numel, start, stop)


def _find_holders() -> None:
    """Enter every parameter of every living module in _holders."""
    for each in gc.get_objects():
        if issubclass(type(each), torch.nn.Module):
            for name, p in each.__dict__.get("_parameters", {}).items():
                if p is not None and (p not in _holders or _holders[p][0]() is None):
                    _holders[p] = (weakref.ref(each), name)
