"""Optimizer state dicts: the nested layout that is written, and every layout that is read.

Written: {"state": {i: {"step": int, "__bnb_optimizer_quant_state__": {state1, qmap1, absmax1, ...}}}, "param_groups"}.
Read: the same; flat entries beside `step` (releases before 0.49.2); `step` as a 0-dim tensor; scales for blocks of
2048 elements (before 0.44) and one scale per tensor ("max1"), which become blocks of 256; unsigned maps of more than
256 entries (0.36 to 0.41).  Everything is checked against the parameters before anything is changed.
Layout: docs/FORMAT.md, section 7.
"""

from collections import defaultdict

import torch

from .. import _ops
from ..codebooks import default_map

WRAPPER_KEY = "__bnb_optimizer_quant_state__"
_NUMBERED = ("state", "qmap", "absmax", "max", "new_max")
QUANT_STATE_KEYS = frozenset([f"{name}{i}" for name in _NUMBERED for i in (1, 2)] + ["gnorm_vec", "unorm_vec"])
_BLOCK, _OLD_BLOCK = 256, 2048  # elements per scale: now, and before 0.44
_bnb = torch.ops.bitsandbytes


def new_absmax(p):
    """Scales of a new 8-bit state of p: float32 [ceil(n / 256)], zero."""
    return torch.zeros(_blocks(p, _BLOCK), dtype=torch.float32, device=p.device)


def nest(state_dict):
    """torch's state dict with the quantisation entries of every parameter moved into a dict of their own."""
    nested = {}
    for key, entries in state_dict["state"].items():
        inner = {name: value for name, value in entries.items() if name in QUANT_STATE_KEYS}
        nested[key] = {name: value for name, value in entries.items() if name not in QUANT_STATE_KEYS}
        if inner:
            nested[key][WRAPPER_KEY] = inner
    return {**state_dict, "state": nested}


def move_state(state):
    """Bring the tensors of every parameter's state to the parameter's device, shared ones once."""
    moved = {}
    for p, entries in state.items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor) and value.device != p.device:
                key = (id(value), p.device)
                moved.setdefault(key, (value, value.to(p.device)))
                entries[name] = moved[key][1]


def read(optimizer, state_dict, move_to_device):
    """Check a state dict against an optimizer. Returns (state, param_groups); ValueError where it does not fit."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"load_state_dict: no key {key!r} among {sorted(state_dict)}, expected it there")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"load_state_dict: {len(saved_groups)} parameter groups, expected {len(groups)}")
    owners = {}
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            got, want = len(saved["params"]), len(group["params"])
            raise ValueError(f"load_state_dict: group {i} has {got} parameters, expected {want}")
        owners.update(zip(saved["params"], group["params"], strict=True))
    reader = _Reader(optimizer, move_to_device)
    state = {}
    for key, entries in state_dict["state"].items():
        if key in owners:
            state[owners[key]] = reader.entries(f"state {key}", owners[key], entries)
        else:
            state[key] = entries
    pairs = zip(groups, saved_groups, strict=True)
    return defaultdict(dict, state), [{**saved, "params": group["params"]} for group, saved in pairs]


class _Reader:
    """Turns the saved entries of one parameter after the other into state of this release."""

    def __init__(self, optimizer, move_to_device):
        self.optimizer, self.move_to_device = optimizer, move_to_device
        self.states = optimizer._states
        self.maps = []  # maps met so far that are not the optimizer's own

    def entries(self, label, p, saved):
        """The entries of parameter p: checked, copied, converted."""
        flat = {**{key: value for key, value in saved.items() if key != WRAPPER_KEY}, **saved.get(WRAPPER_KEY, {})}
        if not flat:
            return {}
        result = {"step": _step(label, flat.pop("step", None))}
        for i in range(1, self.states + 1):
            _check_state(f"{label}: state{i}", p, flat.get(f"state{i}"))
        dtypes = {flat[f"state{i}"].dtype for i in range(1, self.states + 1)}
        if len(dtypes) > 1:
            raise ValueError(f"{label}: dtypes {', '.join(map(str, dtypes))} of the states differ, expected one")
        for i in range(1, self.states + 1):
            result |= self._state(label, p, flat, str(i))
        return result | {key: self._other(p, key, value) for key, value in flat.items() if value is not None}

    def _state(self, label, p, flat, i):
        """Take state i with its map and scales out of `flat`; old forms of scales become one per 256 elements."""
        codes, qmap, scales, static = (flat.pop(name + i, None) for name in ("state", "qmap", "absmax", "max"))
        flat.pop(f"new_max{i}", None)
        codes = self._copy(p, codes.reshape(p.shape) if codes.shape != p.shape else codes)
        if codes.dtype == torch.float32:
            return {f"state{i}": codes}
        _check_map(f"{label}: qmap{i}", qmap, wide=i == "2")
        if scales is None and isinstance(static, torch.Tensor) and static.numel() == 1:
            scales = static.float().reshape(1).expand(_blocks(p, _BLOCK))
        block = _check_scales(f"{label}: absmax{i}", p, scales)
        scales = self._copy(p, scales)
        if block == _BLOCK and qmap.numel() == 256:
            return {f"state{i}": codes, f"qmap{i}": self._map(p, qmap, i), f"absmax{i}": scales}
        old = qmap[:256].to(codes.device).contiguous()
        new = self._map(p, old if qmap.numel() == 256 else default_map("udynamic", codes), i)
        values = _ops.call(_bnb.dequantize_blockwise.default, codes, scales, old, block, torch.float32)
        codes, scales = _ops.call(_bnb.quantize_blockwise.default, values, new, _BLOCK)
        return {f"state{i}": codes, f"qmap{i}": new, f"absmax{i}": scales}

    def _map(self, p, qmap, i):
        """A map equal to `qmap`: the optimizer's own where that has the same values, else one shared copy."""
        qmap = qmap.to(p.device) if self.move_to_device else qmap
        own = self.optimizer._shared_maps(p)[int(i) - 1]
        for held in (own, *self.maps):
            if held.device == qmap.device and torch.equal(held, qmap):
                return held
        self.maps.append(qmap.clone())
        return self.maps[-1]

    def _copy(self, p, value):
        """A copy of a tensor that the state dict keeps; on p's device unless that has to wait."""
        return value.detach().to(p.device if self.move_to_device else value.device, copy=True)

    def _other(self, p, key, value):
        if not isinstance(value, torch.Tensor):
            return value
        if key in QUANT_STATE_KEYS:
            return self._copy(p, value)
        return value.to(p.dtype, copy=True) if value.is_floating_point() else value.clone()


def _blocks(p, size):
    return -(-p.numel() // size)


def _step(label, step):
    """The step count as an int; a 0-dim tensor is read."""
    count = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    if isinstance(count, bool) or not isinstance(count, (int, float)) or not count >= 0 or count != int(count):
        raise ValueError(f"{label}: step is {step!r}, expected an integer >= 0")
    return int(count)


def _check_tensor(label, value):
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{label} is {type(value).__name__}, expected a tensor")


def _check_state(label, p, value):
    _check_tensor(label, value)
    if value.dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"{label} has dtype {value.dtype}, expected torch.float32 or torch.uint8")
    if value.numel() != p.numel():
        raise ValueError(f"{label} has {value.numel()} elements, expected {p.numel()} like its parameter")


def _check_map(label, value, wide):
    _check_tensor(label, value)
    fits = value.numel() >= 256 if wide else value.numel() == 256
    if value.dtype != torch.float32 or value.dim() != 1 or not fits:
        raise ValueError(f"{label} is {value.dtype} {list(value.shape)}, expected torch.float32 [256]")


def _check_scales(label, p, value):
    """The block size that the number of scales stands for."""
    _check_tensor(label, value)
    if value.dtype != torch.float32:
        raise ValueError(f"{label} has dtype {value.dtype}, expected torch.float32")
    for block in (_BLOCK, _OLD_BLOCK):
        if value.dim() == 1 and value.numel() == _blocks(p, block):
            return block
    raise ValueError(f"{label} has shape {list(value.shape)}, expected [{_blocks(p, _BLOCK)}]")
