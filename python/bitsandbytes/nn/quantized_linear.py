"""What the quantised layers share: a weight of a class of its own that survives moves, loading and replacement.

torch.nn.Module moves a parameter by replacing its data, and loads a checkpoint by copying into it or by putting a plain
Parameter in its place.  A quantised weight also has statistics, which must follow; the subclass takes care of those in
_follow(), which runs after every move, _take(), which sees a checkpoint first, and _statistics(), which are saved.
Sharding engines put a DTensor in the place of the weight, or a plain Parameter: codes that do not know what they are.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..utils import LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING

# Clients and tests know the layers' log messages under this name.
logger = logging.getLogger("bitsandbytes.nn.modules")

_said: set[str] = set()

# The one layout of an int8 weight, as checkpoints name it: by number, in old releases by name.
ROW = LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"]


def warn_once(text: str) -> None:
    """Log a warning, once per process."""
    if text not in _said:
        _said.add(text)
        logger.warning(text)


def check_format(given: Any) -> None:
    """ValueError: `given`, the weight_format of a checkpoint as tensor, number or name, is not row-major."""
    value = given.item() if isinstance(given, torch.Tensor) else given
    if value not in (ROW, "row"):
        raise ValueError(f'weight_format is {value!r}, expected {ROW} or "row"')


class QuantizedModule(nn.Module):
    """A module over one parameter `weight` that carries statistics, to be mixed in before nn.Linear or nn.Embedding.

    For subclasses; see _follow(), _take(), _statistics(), _holds_codes() and _table_shape.
    """

    _table_shape: Any = None  # (rows, columns) of the unquantised weight: a property of the subclass

    def _follow(self) -> None:
        """Bring everything that belongs to the weight to where the weight is now."""
        raise NotImplementedError

    def _take(self, weight: Tensor | None, state_dict: dict[str, Any], prefix: str, assign: bool) -> tuple[str, ...]:
        """Load the weight, if it is this layer's to load.

        weight      state_dict[prefix + "weight"], or None
        assign      keep the given tensors instead of copying from them
        Returns the keys that were used; none: the weight is loaded as any parameter.  ValueError, KeyError: it does not
        fit.
        """
        raise NotImplementedError

    def _statistics(self) -> dict[str, Tensor]:
        """{name in a checkpoint: tensor} of what belongs to a quantised weight; empty if it is not quantised."""
        raise NotImplementedError

    def _holds_codes(self) -> bool:
        """True if the weight is quantised, of whatever class it is: no cast may change its values."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "QuantizedModule":
        """nn.Module._apply, for moves and casts."""
        weight = self.weight
        kind, attributes, codes = type(weight), weight.__dict__, self._holds_codes()

        def plain(tensor: Tensor) -> Tensor:
            # Where torch cannot replace the data (on a move to meta), it makes a Parameter, from plain tensors only.
            moved = fn(tensor)
            if codes and tensor is weight and moved.dtype != tensor.dtype:
                moved = tensor.to(moved.device)
            return moved.data if isinstance(moved, kind) else moved

        super()._apply(plain if codes or kind is not nn.Parameter else fn, recurse)
        if type(self.weight) is not kind:
            weight = kind(self.weight.data, self.weight.requires_grad)
            weight.__dict__.update(attributes)
            self.weight = weight
        self._follow()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self._statistics().items():
            destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """nn.Module._load_from_state_dict, for a checkpoint of either kind, into a layer of either kind.

        Load hooks run first, as always: what they take out of the checkpoint is theirs, what they leave is not.
        """
        hooks = self._load_state_dict_pre_hooks
        for hook in hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        key = prefix + "weight"
        try:
            with torch.no_grad():
                used = set(self._take(state_dict.get(key), state_dict, prefix, assign))
        except (ValueError, KeyError) as error:
            error_msgs.append(f"While loading {key!r}: {error.args[0]}")
            used = {name for name in state_dict if self._owns(name, prefix)}
        rest = {name: value for name, value in state_dict.items() if name not in used} if used else state_dict
        absent: list[str] = []
        self._load_state_dict_pre_hooks = type(hooks)()
        try:
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        finally:
            self._load_state_dict_pre_hooks = hooks
        missing_keys.extend(name for name in absent if name not in used)

    def _owns(self, name: str, prefix: str) -> bool:
        """True for the checkpoint entries that describe the weight."""
        raise NotImplementedError

    def _fits(self, weight: Tensor) -> bool:
        """True for an unquantised weight of this layer: float [rows, columns]."""
        return weight.is_floating_point() and tuple(weight.shape) == self._table_shape

    def _takes_float(self, weight: Tensor, quantised: bool, assign: bool) -> bool:
        """True if a weight without statistics needs the subclass: to be quantised, or to be assigned as its class.

        ValueError: this layer's weight is quantised, and the given one is not what can be quantised.
        """
        if quantised and not self._fits(weight):
            given = f"{weight.dtype} {tuple(weight.shape)}"
            raise ValueError(f"size mismatch: {given} without statistics, expected them or a float {self._table_shape}")
        return self._fits(weight) and (quantised or assign)


class QuantizedLinear(QuantizedModule, nn.Linear):
    """nn.Linear over a parameter that carries statistics. For subclasses."""

    _table_shape = property(lambda self: (self.out_features, self.in_features))
