"""4-bit storage for any parameter of any module: the module goes on reading a float tensor of the old shape and dtype.

    replace_parameter_4bit(module, "gate_up_proj")

The parameter is quantised in place and becomes module.parametrizations.<name>.original; module.<name> is a property
that dequantises, once in each forward of the module (torch.nn.utils.parametrize).  What a training forward keeps for
its backward is the packed codes, not the dequantised tensor: that one lives no longer than the forward.
Checkpoints have the keys of a 4-bit linear layer: <name> and <name>.absmax and so on (docs/FORMAT.md, section 6).
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.types import Device

from .. import functional
from ..quant_state import QuantState
from .params4bit import is_packed
from .saved_4bit import keep_packed, let_go, remember

__all__ = ["Bnb4bitParametrization", "replace_parameter_4bit", "replace_parameter_4bit_prequantized"]

_entered = threading.local()


class Bnb4bitParametrization(nn.Module):
    """Turns packed codes back into the tensor that quant_state describes.

    quant_state  QuantState of the codes, plain or nested
    forward: codes [items, 1], any storage dtype -> quant_state.shape in quant_state.dtype; no gradient.
    """

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    def follow(self, packed: Tensor) -> None:
        """Bring the statistics to the device of the codes; to meta they do not go, and from there they cannot come."""
        absmax = self.quant_state.absmax
        if absmax.device != packed.device and not (packed.is_meta or absmax.is_meta):
            self.quant_state.to(packed.device)

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """The dequantised tensor. ValueError: the codes are not those of quant_state."""
        state = self.quant_state
        if quantized_param.is_meta:
            return torch.empty(state.shape, dtype=state.dtype, device="meta")
        if not torch.compiler.is_compiling():
            self.follow(quantized_param)
        return remember(functional.dequantize_4bit(quantized_param, state), quantized_param, state)


class PackedList(parametrize.ParametrizationList):
    """The parametrisations of one parameter, over codes that moves carry along and casts leave alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedList":
        """nn.Module._apply. fn sees the codes as bytes, which a cast to another float type does not touch."""
        original = self.original

        def on_bytes(tensor: Tensor) -> Tensor:
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if tensor is original else fn(tensor)

        super()._apply(on_bytes, recurse)
        _find(self).follow(self.original)
        return self


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: str = "nf4",
    blocksize: int | None = None,
) -> None:
    """Store a parameter in 4 bits, in place. Returns None.

    module, param_name   module.<param_name> is a parameter of any shape: float32, float16 or bfloat16
    compress_statistics  quantise the scales too
    quant_type           "fp4" or "nf4"
    blocksize            elements per scale, a power of two, 32..4096; None: 64.  Blocks run over the row-major
                         flattening, rows and experts notwithstanding
    The parameter is frozen from then on.  On meta it becomes a skeleton that load_state_dict() fills.
    AttributeError: no such attribute.  TypeError: not a parameter (or quantised already).  ValueError: dtype or an
    option outside these lists; the module is then as it was.
    """
    parameter = _parameter(module, param_name)
    packed, state = functional.quantize_4bit(
        parameter.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    _install(module, param_name, packed, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: Device
) -> None:
    """Let a parameter that holds packed codes be read as the tensor that they stand for. Returns None.

    module, param_name  module.<param_name> is a parameter of packed codes, any storage dtype
    qs_dict             their statistics, either form of QuantState.as_dict(), with any prefix; not changed
    device              where the statistics go
    AttributeError, TypeError: see replace_parameter_4bit().  KeyError, ValueError: see QuantState.from_dict(); the
    parameter has not the bytes that the statistics describe.
    """
    parameter = _parameter(module, param_name)
    state = QuantState.from_dict(qs_dict, device=device)
    _check_bytes(f"parameter {param_name!r}", parameter, state)
    _install(module, param_name, parameter.data, state)


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"Module does not have parameter '{name}'")
    parameter = getattr(module, name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"Parameter '{name}' is not an instance of nn.Parameter")
    return parameter


def _check_bytes(what: str, packed: Tensor, state: QuantState) -> None:
    if not is_packed(packed, state):
        given = packed.numel() * packed.element_size()
        raise ValueError(f"{what} has {given} bytes, expected two codes a byte for shape {tuple(state.shape)}")


def _install(module: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
    """Put codes in the place of module.<name>, and everything that reads, saves, loads and copies them."""
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    module.parametrizations[name].__class__ = PackedList
    _make_copyable(type(module))
    _register_parametrization_hooks(module, name)


def _find(parametrizations: Iterable[nn.Module]) -> Any:
    """The Bnb4bitParametrization among the parametrisations of a parameter, or None."""
    return next((each for each in parametrizations if isinstance(each, Bnb4bitParametrization)), None)


def _list_of(module: nn.Module, name: str) -> Any:
    """The parametrisations of module.<name> if it is stored in 4 bits, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    found = module.parametrizations[name]
    return found if _find(found) is not None else None


def packed_names(module: nn.Module) -> list[str]:
    """The names of the parameters of a module that are stored in 4 bits."""
    names = module.parametrizations if parametrize.is_parametrized(module) else ()
    return [name for name in names if _list_of(module, name) is not None]


def packed_parameter(module: nn.Module, name: str) -> tuple[Tensor, QuantState] | None:
    """The codes of module.<name> and what describes them, on one device; None if it is not stored in 4 bits."""
    found = _list_of(module, name)
    if found is None:
        return None
    holder, packed = _find(found), found.original
    if not torch.compiler.is_compiling():
        holder.follow(packed)
    return packed, holder.quant_state


# ---------------------------------------------------------------- reading: once in each forward


def _enable_parametrization_cache(module: nn.Module, inputs: Any) -> None:
    """Forward pre-hook: what parametrisations compute from here on is kept for the forward."""
    parametrize._cache_enabled += 1
    if torch.compiler.is_compiling():
        return
    if not hasattr(_entered, "modules"):
        _entered.modules = []
    _entered.modules.append((module, keep_packed()))


def _disable_parametrization_cache(module: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook, run after an exception too, and then even if the pre-hook had not run."""
    parametrize._cache_enabled = max(parametrize._cache_enabled - 1, 0)
    if not parametrize._cache_enabled:
        parametrize._cache = {}
    if torch.compiler.is_compiling():
        return
    entered = getattr(_entered, "modules", None)
    if entered and entered[-1][0] is module:
        let_go(entered.pop()[1])


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    """Hooks that save, load and cache module.<param_name>. Without effect on checkpoints if it is not stored in 4 bits.

    The forward hook is always called: checkpointing ends a recomputation by an exception, and a count that stayed up
    would keep every dequantised tensor alive.
    """
    module.register_state_dict_post_hook(functools.partial(_save, param_name=param_name))
    module.register_load_state_dict_pre_hook(functools.partial(_load, param_name=param_name))
    module.register_load_state_dict_post_hook(functools.partial(_name_missing, param_name=param_name))
    module.register_forward_pre_hook(_enable_parametrization_cache)
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


# ---------------------------------------------------------------- checkpoints


def _save(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *, param_name: str
) -> None:
    """State dict post-hook: the codes under the name of the parameter, the statistics beside them."""
    found = _list_of(module, param_name)
    key = f"{prefix}parametrizations.{param_name}.original"
    if found is None or key not in state_dict:
        return
    state_dict[prefix + param_name] = state_dict.pop(key)
    for name, value in _find(found).quant_state.as_dict(packed=True).items():
        state_dict[f"{prefix}{param_name}.{name}"] = value.detach()


def _load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    param_name: str,
) -> None:
    """Load pre-hook: take what _save() wrote, or a float tensor, and hand the codes to torch under their inner name."""
    found = _list_of(module, param_name)
    key = prefix + param_name
    statistics = {name: value for name, value in state_dict.items() if name.startswith(f"{key}.")}
    if found is None or not (key in state_dict or statistics):
        return
    for name in statistics:
        del state_dict[name]
    inner = f"{prefix}parametrizations.{param_name}.original"
    assign = local_metadata.get("assign_to_params_buffers", False)
    try:
        if key not in state_dict:
            raise KeyError("the checkpoint has the statistics, but not the codes")
        with torch.no_grad():
            state_dict[inner] = _take(found, state_dict[key], statistics, assign)
    except (ValueError, KeyError) as error:
        error_msgs.append(f"While loading {key!r}: {error.args[0]}")
        state_dict[inner] = found.original
    state_dict.pop(key, None)


def _take(found: Any, value: Tensor, statistics: dict[str, Any], assign: bool) -> Tensor:
    """Check codes and statistics, or quantise a float tensor; set the statistics. Returns the codes to load."""
    holder, current = _find(found), found.original
    old = holder.quant_state
    device = value.device if assign or current.is_meta else current.device
    if statistics:
        if not assign:
            statistics = {name: tensor.clone() for name, tensor in statistics.items()}
        packed, state = value, QuantState.from_dict(statistics, device=device)
        _check_bytes("the checkpoint", packed, state)
        if not assign and packed.dtype != current.dtype and is_packed(current, state):
            packed = _with_storage(packed, current.dtype, current.shape)
    elif not value.is_floating_point() or tuple(value.shape) != tuple(old.shape):
        found_shape, shape = tuple(value.shape), tuple(old.shape)
        raise ValueError(f"{value.dtype} {found_shape} without statistics, expected codes with them or float {shape}")
    else:
        packed, state = functional.quantize_4bit(
            value.to(device=device, dtype=old.dtype),
            blocksize=old.blocksize,
            compress_statistics=old.nested,
            quant_type=old.quant_type,
            quant_storage=current.dtype,
        )
    if tuple(state.shape) != tuple(old.shape):
        raise ValueError(f"size mismatch: the checkpoint has {tuple(state.shape)}, expected {tuple(old.shape)}")
    holder.quant_state = state
    if assign and packed.shape != current.shape:
        found.original = nn.Parameter(torch.empty_like(packed, device="meta"), requires_grad=False)
    elif current.is_meta and not assign:
        found.original = nn.Parameter(torch.empty_like(packed, device=device), requires_grad=False)
    return packed


def _with_storage(packed: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The same bytes in items of another dtype, the last one padded with zeros."""
    result = torch.zeros(shape, dtype=dtype, device=packed.device)
    target, source = result.view(torch.uint8).view(-1), packed.contiguous().view(torch.uint8).view(-1)
    size = min(target.numel(), source.numel())
    target[:size] = source[:size]
    return result


def _name_missing(module: nn.Module, incompatible_keys: Any, *, param_name: str) -> None:
    """Load post-hook: a missing parameter is reported by the name that a checkpoint has for it."""
    inner = f"parametrizations.{param_name}.original"
    missing = incompatible_keys.missing_keys
    missing[:] = [key.removesuffix(inner) + param_name if key.endswith(inner) else key for key in missing]


# ---------------------------------------------------------------- copies and pickles


def _make_copyable(cls: type) -> None:
    """Let modules of a parametrised class be copied and pickled.

    torch would share the class, and so the cache entries, between copies, and refuses to pickle.
    """
    if cls.__dict__.get("__reduce_ex__") is _reduce:
        return
    cls.__reduce_ex__ = _reduce
    if "__deepcopy__" in cls.__dict__:
        cls.__deepcopy__ = _deepcopy


def _outline(base: type, names: list[str]) -> nn.Module:
    """An empty module whose class extends base by the properties `names`."""
    module = base.__new__(base)
    nn.Module.__init__(module)
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.empty(0), requires_grad=False))
        parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    _make_copyable(type(module))
    return module


def _reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    names = list(self.parametrizations)
    return _outline, (parametrize.type_before_parametrizations(self), names), self.__dict__


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    result = _outline(parametrize.type_before_parametrizations(self), list(self.parametrizations))
    memo[id(self)] = result
    result.__dict__ = copy.deepcopy(self.__dict__, memo)
    return result
