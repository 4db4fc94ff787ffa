"""What the quantised layers share: a weight of a class of its own that survives moves, loading and replacement.

torch.nn.Module moves a parameter by replacing its data, and loads a checkpoint by copying into it or by putting a plain
Parameter in its place.  A quantised weight also has statistics, which must follow; the subclass takes care of those in
_follow(), which runs after every move, and _take(), which sees a checkpoint first.
"""

import logging

import torch
from torch import nn

# Clients and tests know the layers' log messages under this name.
logger = logging.getLogger("bitsandbytes.nn.modules")

_said = set()


def warn_once(text):
    """Log a warning, once per process."""
    if text not in _said:
        _said.add(text)
        logger.warning(text)


class QuantizedModule(nn.Module):
    """A module over one parameter `weight` that carries statistics, to be mixed in before nn.Linear or nn.Embedding.

    For subclasses; see _follow(), _take() and _table_shape.
    """

    _table_shape = None  # (rows, columns) of the unquantised weight: a property of the subclass

    def _follow(self):
        """Bring everything that belongs to the weight to where the weight is now."""
        raise NotImplementedError

    def _take(self, weight, state_dict, prefix, assign):
        """Load the weight, if it is this layer's to load.

        weight      state_dict[prefix + "weight"], or None
        assign      keep the given tensors instead of copying from them
        Returns the keys that were used; none: the weight is loaded as any parameter.  ValueError, KeyError: it does not
        fit.
        """
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        """nn.Module._apply, for moves and casts."""
        weight = self.weight
        kind, attributes = type(weight), weight.__dict__

        def plain(tensor):
            # Where torch cannot replace the data (on a move to meta), it makes a Parameter, from plain tensors only.
            moved = fn(tensor)
            return moved.data if isinstance(moved, kind) else moved

        super()._apply(plain if kind is not nn.Parameter else fn, recurse)
        if type(self.weight) is not kind:
            weight = kind(self.weight.data, self.weight.requires_grad)
            weight.__dict__.update(attributes)
            self.weight = weight
        self._follow()
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """nn.Module._load_from_state_dict, for a checkpoint of either kind, into a layer of either kind."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        key = prefix + "weight"
        try:
            with torch.no_grad():
                used = set(self._take(state_dict.get(key), state_dict, prefix, assign))
        except (ValueError, KeyError) as error:
            error_msgs.append(f"While loading {key!r}: {error.args[0]}")
            used = {name for name in state_dict if self._owns(name, prefix)}
        rest = {name: value for name, value in state_dict.items() if name not in used} if used else state_dict
        absent = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        missing_keys.extend(name for name in absent if name not in used)

    def _owns(self, name, prefix):
        """True for the checkpoint entries that describe the weight."""
        raise NotImplementedError

    def _fits(self, weight):
        """True for an unquantised weight of this layer: float [rows, columns]."""
        return weight.is_floating_point() and tuple(weight.shape) == self._table_shape

    def _takes_float(self, weight, quantised, assign):
        """True if a float weight needs the subclass: to be quantised, or to be assigned as a parameter of its class.

        Where load hooks are registered, quantising is theirs.
        """
        return self._fits(weight) and (quantised or assign) and not self._load_state_dict_pre_hooks


class QuantizedLinear(QuantizedModule, nn.Linear):
    """nn.Linear over a parameter that carries statistics. For subclasses."""

    _table_shape = property(lambda self: (self.out_features, self.in_features))
