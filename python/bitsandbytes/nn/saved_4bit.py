"""What autograd keeps of a dequantised tensor for the backward: its packed codes, and where in it the saved view lay.

Multiplying by a dequantised weight saves the weight, which would keep every weight of the model in full until the
backward.  While a module runs, these hooks exchange each saved view of a tensor that Bnb4bitParametrization has made
for a recipe; the backward decodes that part again, of a 3-D weight the one expert.
Where other hooks are in force (checkpointing, offloading) they stay in force: they release or move what is saved.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from .. import functional
from ..quant_state import QuantState


class Origin(NamedTuple):
    """Where a dequantised tensor came from: codes, QuantState, its version, by which in-place changes show."""

    packed: torch.Tensor
    state: QuantState
    version: int


class _Recipe(NamedTuple):
    """A view of a dequantised tensor: the codes and the statistics that it needs, and its place among them."""

    codes: torch.Tensor  # those of whole blocks, from the first to the last that the view touches
    version: int  # of the codes
    state: QuantState
    first: int  # block
    elements: int
    size: tuple
    stride: tuple
    offset: int  # from the first element of the first block


def remember(tensor: Tensor, packed: Tensor, state: QuantState) -> Tensor:
    """Note on a tensor that it was made from packed codes, if a forward is going to keep it. Returns it."""
    if parametrize._cache_enabled and not torch.compiler.is_compiling() and not tensor.is_inference():
        tensor.bnb_origin = Origin(packed, state, tensor._version)
    return tensor


def keep_packed() -> Any:
    """Start exchanging saved tensors. Returns what let_go() needs; None if nothing was started."""
    graph = torch._C._autograd
    if not torch.is_grad_enabled() or not graph._saved_tensors_hooks_is_enabled():
        return None
    if graph._top_saved_tensors_default_hooks(True) is not None:
        return None
    hooks = torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
    hooks.__enter__()
    return hooks


def let_go(hooks: Any) -> None:
    """End what keep_packed() started."""
    if hooks is not None:
        hooks.__exit__()


def _pack(tensor: Tensor) -> Any:
    if tensor.numel() == 0:
        return tensor
    address = tensor.untyped_storage().data_ptr()
    for whole in parametrize._cache.values():
        origin = getattr(whole, "bnb_origin", None)
        if origin is None or whole.untyped_storage().data_ptr() != address or tensor.dtype != whole.dtype:
            continue
        return tensor if whole._version != origin.version else _recipe(tensor, whole, origin)
    return tensor


def _recipe(tensor: Tensor, whole: Tensor, origin: Origin) -> _Recipe:
    packed, state = origin.packed, origin.state
    block, start = state.blocksize, tensor.storage_offset()
    stop = start + 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = start // block
    elements = min(-(-stop // block) * block, whole.numel()) - first * block
    item = 2 * packed.element_size()  # codes in one
    codes = packed.view(-1)[first * block // item : -(-(first * block + elements) // item)]
    place = tuple(tensor.shape), tensor.stride(), start - first * block
    return _Recipe(codes, packed._version, state, first, elements, *place)


def _unpack(saved: Any) -> Tensor:
    if not isinstance(saved, _Recipe):
        return saved
    codes, state = saved.codes, saved.state
    if codes._version != saved.version:
        raise RuntimeError("a 4-bit parameter was changed between a forward and its backward, expected the same codes")
    scales = functional._plain_absmax(state)[saved.first : saved.first - (-saved.elements // state.blocksize)]
    args = scales, state.blocksize, state.quant_type, [saved.elements], state.dtype
    part = torch.ops.bitsandbytes.dequantize_4bit.default(codes, *args)
    return part.as_strided(saved.size, saved.stride, saved.offset)
