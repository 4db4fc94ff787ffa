"""How the entries of one parameter are written into a state dict.

nested     a parameter that is whole in this process: everything but `step` in a dict of its own, which sharding engines
           leave alone
placed     a DTensor parameter: entries beside `step`; state1 and state2 are DTensors placed as the parameter is, and so
           are the scales, by runs (scales.py), so that another sharding can find those of its elements
elements   a parameter that FSDP1 manages: FSDP1 gathers, cuts and merges tensors of one dtype that have one number per
           element of the parameter, under the same names for all parameters of a unit, and compares what is no tensor.
           Hence float32 codes, a float32 scale per element, and the two usual maps as numbers; beside 32-bit state of
           an optimizer that also has 8-bit state lie scales of 1 and no map
"""

from typing import Any

import torch
from torch import Tensor

from ..codebooks import default_map
from . import scales, sharding

WRAPPER_KEY = "__bnb_optimizer_quant_state__"
_NUMBERED = ("state", "qmap", "absmax", "max", "new_max")
QUANT_STATE_KEYS = frozenset([f"{name}{i}" for name in _NUMBERED for i in (1, 2)] + ["gnorm_vec", "unorm_vec"])
_ROW = "_row"  # of a state with rows, FSDP1 gets each row after the first as an entry of its own: state1_row1
_MAPS = ("dynamic", "udynamic")  # maps that the layout for FSDP1 writes as their position here


def written(optimizer: Any, p: Tensor | None, entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of p as a state dict holds them; tensors that need no change are those of the live state."""
    if sharding.is_dtensor(p):
        return _placed(p, entries)
    if p is not None and sharding.is_flattened(p):
        placed = {name: value.to(p.device) if _is_paged(value) else value for name, value in entries.items()}
        return _per_element(placed, with_scales=_wants_eight(optimizer))
    inner = {
        name: value.detach() if _is_paged(value) else value  # without the attributes, which would be saved
        for name, value in entries.items()
        if name in QUANT_STATE_KEYS
    }
    outer = {name: value for name, value in entries.items() if name not in QUANT_STATE_KEYS}
    return {**outer, WRAPPER_KEY: inner} if inner else outer


def _is_paged(value: Any) -> bool:
    return getattr(value, "is_paged", False)


def flattened(label: str, saved: dict[str, Any]) -> dict[str, Any]:
    """One flat dict of the entries of a parameter, from any layout; rows are joined. ValueError if one is missing."""
    flat = {key: value for key, value in saved.items() if key != WRAPPER_KEY}
    flat |= saved.get(WRAPPER_KEY, {})
    for name in [key for key in flat if key.endswith(f"{_ROW}1")]:
        first, second = flat.get(name[: -len(_ROW) - 1]), flat.pop(name)
        if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor) or first.shape != second.shape:
            raise ValueError(f"{label}: {name} does not match its first row, expected two tensors of one shape")
        flat[name[: -len(_ROW) - 1]] = torch.stack([first, second])
    return flat


def is_eight(flat: dict[str, Any], i: int) -> bool:
    """Are the entries of state i those of 8-bit state? Codes may be float32 where every element has its own scale."""
    state, absmax = flat[f"state{i}"], flat.get(f"absmax{i}")
    if state.dtype == torch.uint8:
        return True
    return isinstance(absmax, torch.Tensor) and absmax.shape == state.shape and flat.get(f"qmap{i}") is not None


def as_map(value: Any, p: Tensor) -> Any:
    """The map that an entry stands for: a tensor, its values by position, or the number of one of the usual maps."""
    if isinstance(value, int) and 0 <= value < len(_MAPS):
        return default_map(_MAPS[value], sharding.local(p))
    if isinstance(value, dict) and len(value) == 256:
        return torch.tensor([value[str(i)] for i in range(256)], dtype=torch.float32)
    return sharding.whole(value) if isinstance(value, torch.Tensor) else value


def _placed(p: Tensor, entries: dict[str, Any]) -> dict[str, Any]:
    result = dict(entries)
    depth, shape = sharding.depth(p), sharding.local(p).shape
    for i in (1, 2):
        if f"absmax{i}" not in entries:
            continue
        absmax = entries[f"absmax{i}"]
        lead = absmax.dim() - 1
        rows = [scales.to_runs(row, shape, depth) for row in (absmax if lead else [absmax])]
        tail = (depth, scales.run_shape(p.shape, depth)[-1])
        result[f"absmax{i}"] = sharding.wrap(p, torch.stack(rows) if lead else rows[0], lead, tail)
        # Loading in place must not reach the map that all parameters share.
        result[f"qmap{i}"] = entries[f"qmap{i}"].clone()
    return result


def _wants_eight(optimizer: Any) -> bool:
    """Do the settings ask for any 8-bit state? The answer is the same in every process, whatever its shards hold."""
    settings = [*optimizer.param_groups, *optimizer._overrides.values()]
    bits = [getattr(getattr(optimizer, "args", None), "optim_bits", 32)]
    return 8 in bits + [each.get("optim_bits") for each in settings]


def _per_element(entries: dict[str, Any], with_scales: bool) -> dict[str, Any]:
    """Norms are left out: they differ between shards, which FSDP1 refuses, and are made anew by the next step.

    with_scales=False: no setting asks for 8-bit state; what a checkpoint brought along is written decoded.
    """
    result = {key: value for key, value in entries.items() if key not in QUANT_STATE_KEYS}
    for i in (1, 2):
        if f"state{i}" not in entries:
            continue
        state, absmax, qmap = (entries.get(f"{name}{i}") for name in ("state", "absmax", "qmap"))
        has_rows = i == 1 and "state2" in entries and state.dim() > entries["state2"].dim()
        for row in range(len(state) if has_rows else 1):
            name = f"{_ROW}{row}" if row else ""
            part = state[row] if has_rows else state
            if absmax is None:
                values, scale = part, torch.ones_like(part) if with_scales else None
            else:
                values, scale = part.float(), scales.spread(absmax[row] if has_rows else absmax, part)
            if with_scales:
                result[f"absmax{i}{name}"] = scale
            elif absmax is not None:
                values = qmap[part.long()] * scale
            result[f"state{i}{name}"] = values
        if absmax is not None and with_scales:
            result[f"qmap{i}"] = _map_number(qmap)
    return result


def _map_number(qmap: Tensor) -> int | dict[str, float]:
    for number, name in enumerate(_MAPS):
        if torch.equal(qmap, default_map(name, qmap)):
            return number
    return {str(i): value for i, value in enumerate(qmap.tolist())}
