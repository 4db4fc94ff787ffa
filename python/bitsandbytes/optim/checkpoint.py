"""Optimizer state dicts: the layouts that are written, and every layout that is read.

Written for a parameter that is whole in every process (one process, DDP): the nested layout,
{"step": int, "__bnb_optimizer_quant_state__": {state1, qmap1, absmax1, ...}}.  For sharded parameters the entries lie
beside `step`, where torch.distributed.checkpoint and FSDP find them: layouts.py.
Read: all of these; flat entries of releases before 0.49.2; `step` as a 0-dim tensor; scales for blocks of 2048 elements
(before 0.44) and one scale per tensor ("max1"), which become blocks of 256; unsigned maps of more than 256 entries
(0.36 to 0.41); scales of AdEMAMix as CUDA releases laid them out.  Everything is checked against the parameters before
anything is changed.  Layout: docs/FORMAT.md, section 7.
"""

import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from .. import paged
from ..codebooks import default_map
from . import layouts, scales, sharding
from .layouts import QUANT_STATE_KEYS
from .scales import BLOCK

_OLD_BLOCK = 2048  # elements per scale before 0.44
_LENGTHS = {"gnorm_vec": 100, "unorm_vec": 1}
_STATES = ("state1", "state2")
_bnb = torch.ops.bitsandbytes


def new_absmax(p: Tensor, rows: int = 0) -> Tensor:
    """Scales of new 8-bit state of p, or of its shard here: zeros, float32 [ceil(n / 256)] or [rows, ceil(n / 256)]."""
    part = sharding.local(p)
    count = scales.blocks(part.numel())
    return torch.zeros((rows, count) if rows else count, dtype=torch.float32, device=part.device)


def write(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """torch's state dict with the entries of every parameter in the layout that suits how the parameter is sharded."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {}
    for key, entries in state_dict["state"].items():
        p = params[key] if isinstance(key, int) and key < len(params) else None
        state[key] = layouts.written(optimizer, p, entries)
    return {**state_dict, "state": state}


def move_state(optimizer: Any) -> None:
    """Bring the tensors of every parameter's state to where a step wants them, shared ones once."""
    moved: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
    for p, entries in optimizer.state.items():
        for name, value in entries.items():
            if name in _STATES and optimizer._pages(p):
                entries[name] = _paged(p, value)
            elif isinstance(value, torch.Tensor) and value.device != p.device:
                key = (id(value), p.device)
                moved.setdefault(key, (value, value.to(p.device)))
                entries[name] = moved[key][1]


def read(
    optimizer: Any, state_dict: dict[str, Any], move_to_device: bool
) -> tuple[dict[Any, dict[str, Any]], list[dict[str, Any]]]:
    """Check a state dict against an optimizer. Returns (state, param_groups); ValueError where it does not fit.

    With sharded parameters every process must call, with the same parameters.  Sharded state is always moved.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"load_state_dict: no key {key!r} among {sorted(state_dict)}, expected it there")
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"load_state_dict: {len(saved_groups)} parameter groups, expected {len(groups)}")
    owners: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    merged: list[dict[str, Any]] = []
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            got, want = len(saved["params"]), len(group["params"])
            raise ValueError(f"load_state_dict: group {i} has {got} parameters, expected {want}")
        merged.append(_merged_group(group, saved))
        owners.update((key, (p, merged[-1])) for key, p in zip(saved["params"], group["params"], strict=True))
    reader = _Reader(optimizer, move_to_device)
    state = {}
    for key, entries in _by_owner(state_dict["state"], owners).items():
        if key in owners:
            p, group = owners[key]
            state[p] = reader.entries(f"state {key}", p, group, entries)
        else:
            state[key] = entries
    return defaultdict(dict, state), merged


def _by_owner(saved: dict[Any, dict[str, Any]], owners: dict[Any, Any]) -> dict[Any, dict[str, Any]]:
    """The saved entries by the keys of the groups.

    torch.distributed.checkpoint loads tensors in place, but what is no tensor under a key made of a string: it leaves
    the step of parameter 0 in state["0"], which completes state[0].
    """
    result = dict(saved)
    for key in [key for key in saved if isinstance(key, str) and key.isdecimal() and key not in owners]:
        if int(key) in owners:
            result[int(key)] = {**result.get(int(key), {}), **result.pop(key)}
    return result


def _merged_group(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved options over the optimizer's own; lists that a checkpoint made of tuples are tuples again."""
    merged = {**group, **saved, "params": group["params"]}
    for key, value in group.items():
        if isinstance(value, tuple) and isinstance(merged[key], list):
            merged[key] = tuple(merged[key])
    return merged


class _Reader:
    """Turns the saved entries of one parameter after the other into state of this release."""

    def __init__(self, optimizer: Any, move_to_device: bool) -> None:
        self.optimizer, self.move_to_device = optimizer, move_to_device
        self.states = optimizer._states
        self.maps: list[Tensor] = []  # maps met so far that are not the optimizer's own

    def entries(self, label: str, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        """The entries of parameter p: checked, copied, converted."""
        flat = layouts.flattened(label, saved)
        if not flat:
            return {}
        result = {"step": _step(label, p, flat.pop("step", None), group.get("capturable", False))}
        for i in range(1, self.states + 1):
            _check_state(f"{label}: state{i}", p, flat.get(f"state{i}"), self._rows(i))
        kinds = {"8-bit" if layouts.is_eight(flat, i) else "32-bit" for i in range(1, self.states + 1)}
        if len(kinds) > 1:
            raise ValueError(f"{label}: the states differ ({' and '.join(sorted(kinds))}), expected one precision")
        for i in range(1, self.states + 1):
            result |= self._state(label, p, flat, i)
        result |= {key: self._other(label, p, key, value) for key, value in flat.items() if value is not None}
        return {sys.intern(key) if type(key) is str else key: value for key, value in result.items()}

    def _rows(self, i: int) -> int:
        """Rows that state i has per parameter: 0 if it has the parameter's shape."""
        return getattr(self.optimizer, "_rows", 0) if i == 1 else 0

    def _state(self, label: str, p: Tensor, flat: dict[str, Any], i: int) -> dict[str, Any]:
        """Take state i with its map and scales out of `flat`; the result has one scale per 256 elements."""
        result = self._read_state(label, p, flat, i)
        if self._pages(p):
            result[f"state{i}"] = _paged(p, result[f"state{i}"])
        return result

    def _pages(self, p: Tensor) -> bool:
        """Is p's state paged, and now?"""
        return self.move_to_device and self.optimizer._pages(p)

    def _read_state(self, label: str, p: Tensor, flat: dict[str, Any], i: int) -> dict[str, Any]:
        eight, rows = layouts.is_eight(flat, i), self._rows(i)
        state, qmap, absmax, static = (flat.pop(f"{name}{i}", None) for name in ("state", "qmap", "absmax", "max"))
        flat.pop(f"new_max{i}", None)
        if not eight:
            return {f"state{i}": self._placed(p, state, rows)}
        _check_codes(f"{label}: state{i}", state)
        qmap = layouts.as_map(qmap, p)
        _check_map(f"{label}: qmap{i}", qmap, wide=i == 2)
        if absmax is None and isinstance(static, torch.Tensor) and static.numel() == 1:
            absmax = static.float().reshape(1).expand(scales.blocks(p.numel()))
        form = _scale_form(f"{label}: absmax{i}", state, absmax, rows)
        if rows and form == BLOCK:
            absmax = _row_scales(state, absmax)
        old, new = self._old_and_new_map(p, qmap, i)
        if form == BLOCK and old is new and self._is_here(p, state, rows):
            return {f"state{i}": self._shaped(p, state, rows), f"qmap{i}": new, f"absmax{i}": self._copy(p, absmax)}
        return self._regrouped(p, i, state, absmax, form, old, new)

    def _is_here(self, p: Tensor, state: Tensor, rows: int) -> bool:
        """Is a saved state exactly what p needs in this process, but for a copy?"""
        if sharding.is_dtensor(p) or sharding.is_dtensor(state) or state.dtype != torch.uint8:
            return False
        return state.numel() == p.numel() * (rows or 1)

    def _regrouped(
        self, p: Tensor, i: int, state: Tensor, absmax: Tensor, form: int | str, old: Tensor, new: Tensor
    ) -> dict[str, Any]:
        """State i of p out of codes and scales that are cut or ordered differently."""
        rows = self._rows(i)
        per_element = _per_element(p, state, absmax, form, rows)
        lead = 1 if rows else 0
        codes = sharding.part_of(p, state, lead).to(torch.uint8)
        per_element = sharding.part_of(p, per_element, lead)
        old, held = old.to(codes.device), new.to(codes.device)
        held = old if old is new else held
        pairs = zip(codes, per_element, strict=True) if rows else [(codes, per_element)]
        done = [scales.regroup(*pair, old, held) for pair in pairs]  # codes change in place
        found = torch.stack([each[1] for each in done]) if rows else done[0][1]
        codes = sharding.wrap(p, codes, lead) if sharding.is_dtensor(p) else codes
        return {f"state{i}": codes, f"qmap{i}": new, f"absmax{i}": found}

    def _placed(self, p: Tensor, value: Tensor, rows: int) -> Tensor:
        """A 32-bit state, placed as p is."""
        lead = 1 if rows else 0
        if sharding.is_dtensor(p):
            return sharding.wrap(p, sharding.part_of(p, value, lead), lead)
        if sharding.is_dtensor(value) or value.numel() != p.numel() * (rows or 1):
            return sharding.part_of(p, value, lead)
        return self._shaped(p, value, rows)

    def _shaped(self, p: Tensor, value: Tensor, rows: int) -> Tensor:
        shape = (rows, *p.shape) if rows else p.shape
        value = value if value.shape == shape else value.reshape(shape)
        return value.detach() if self._pages(p) else self._copy(p, value)  # pages get a copy of their own

    def _old_and_new_map(self, p: Tensor, qmap: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """(the map that decodes, the map of the state from now on): one object, but for maps that were too long."""
        if qmap.numel() == 256:
            held = self._map(p, qmap, i)
            return held, held
        old = qmap[:256].contiguous()
        return old, self._map(p, default_map("udynamic", qmap), i)

    def _map(self, p: Tensor, qmap: Tensor, i: int) -> Tensor:
        """A map equal to `qmap`: the optimizer's own where that has the same values, else one shared copy."""
        qmap = qmap.to(p.device) if self.move_to_device or sharding.is_dtensor(p) else qmap
        own = self.optimizer._shared_maps(p)[i - 1]
        for held in (own, *self.maps):
            if held.device == qmap.device and torch.equal(held, qmap):
                return held
        self.maps.append(qmap.clone())
        return self.maps[-1]

    def _copy(self, p: Tensor, value: Tensor) -> Tensor:
        """A copy of a tensor that the state dict keeps; on p's device unless that has to wait."""
        return value.detach().to(p.device if self.move_to_device else value.device, copy=True)

    def _other(self, label: str, p: Tensor, key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if key in _LENGTHS:
            _check_length(f"{label}: {key}", value, _LENGTHS[key])
        if key in QUANT_STATE_KEYS:
            return self._copy(p, value)
        return value.to(p.dtype, copy=True) if value.is_floating_point() else value.clone()


def _paged(p: Tensor, value: Tensor) -> Tensor:
    """A state in page-locked memory: itself if it is there, else a copy."""
    if paged.is_paged(value):
        return value
    rows = len(value) if value.dim() > p.dim() else 0
    return paged.paged_like(p, value.dtype, rows).copy_(value)


def _per_element(p: Tensor, state: Tensor, absmax: Tensor, form: int | str, rows: int) -> Tensor:
    """One scale per element of the saved state, whole or, where the scales are placed as p is, of the shard here."""
    lead = 1 if rows else 0
    if form == "elements":
        return absmax
    if form == "runs":
        if sharding.placed_as(p, absmax, lead) and absmax.dim() - lead - 2 >= sharding.depth(p):
            runs, shape = sharding.local(absmax).to(sharding.local(p).device), sharding.local(p).shape
            each = [scales.from_runs(row, shape) for row in runs] if rows else scales.from_runs(runs, shape)
            return sharding.wrap(p, torch.stack(each) if rows else each, lead)
        runs, shape = sharding.whole(absmax), state.shape[lead:]
        return torch.stack([scales.from_runs(row, shape) for row in runs]) if rows else scales.from_runs(runs, shape)
    state, absmax = sharding.whole(state), sharding.whole(absmax)
    if not rows:
        return scales.spread(absmax, state, form)
    return torch.stack([scales.spread(scale, row, form) for scale, row in zip(absmax, state, strict=True)])


def _row_scales(state: Tensor, absmax: Tensor) -> Tensor:
    """Scales [2, B] of a state of two rows, the second one where it belongs.

    CUDA releases stored the scale of block b of the second row at floor(n / 256) + b of the flat array: one slot early
    if 256 does not divide n, with the last slot never written.  A last slot of 0 also stands for a block of zeros; then
    the last block of the first row is zero as well, and all codes of the block are the same.
    """
    n, count = state[0].numel(), absmax.shape[1]
    if len(absmax) != 2 or n % BLOCK == 0 or absmax[1, -1] != 0:
        return absmax
    tail = sharding.in_memory_order(state[1])[(count - 1) * BLOCK :]
    if absmax[0, -1] == 0 and bool((tail == tail[0]).all()):
        return absmax
    slots = absmax.reshape(-1)
    return torch.stack([slots[:count], slots[count - 1 : 2 * count - 1]])


def _step(label: str, p: Tensor, step: Any, capturable: bool) -> int | Tensor:
    """The step count as an int, or for a capturable group as a 0-dim float32 tensor on p's device; either is read."""
    count = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    if isinstance(count, bool) or not isinstance(count, (int, float)) or not count >= 0 or count != int(count):
        raise ValueError(f"{label}: step is {step!r}, expected an integer >= 0")
    return torch.tensor(float(count), dtype=torch.float32, device=p.device) if capturable else int(count)


def _check_tensor(label: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{label} is {type(value).__name__}, expected a tensor")


def _check_state(label: str, p: Tensor, value: Any, rows: int) -> None:
    _check_tensor(label, value)
    if value.dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"{label} has dtype {value.dtype}, expected torch.float32 or torch.uint8")
    if rows and (value.dim() == 0 or len(value) != rows):
        raise ValueError(f"{label} has shape {list(value.shape)}, expected [{rows}, *{list(p.shape)}]")
    want = p.numel() * (rows or 1)
    if value.numel() not in (want, sharding.whole_numel(p) * (rows or 1)):
        raise ValueError(f"{label} has {value.numel()} elements, expected {want} like its parameter")


def _check_codes(label: str, value: Any) -> None:
    part = sharding.local(value)
    if part.dtype != torch.uint8 and not bool(((part >= 0) & (part <= 255) & (part == part.floor())).all()):
        raise ValueError(f"{label} has scales and values that are no codes, expected integers in 0..255")


def _check_map(label: str, value: Any, wide: bool) -> None:
    _check_tensor(label, value)
    fits = value.numel() >= 256 if wide else value.numel() == 256
    if value.dtype != torch.float32 or value.dim() != 1 or not fits:
        raise ValueError(f"{label} is {value.dtype} {list(value.shape)}, expected torch.float32 [256]")


def _check_length(label: str, value: Any, length: int) -> None:
    if value.dtype != torch.float32 or list(value.shape) != [length]:
        raise ValueError(f"{label} is {value.dtype} {list(value.shape)}, expected torch.float32 [{length}]")


def _scale_form(label: str, state: Tensor, value: Any, rows: int) -> int | str:
    """What the scales of a state stand for: blocks of 256 or 2048 elements (the number), "runs" or "elements"."""
    _check_tensor(label, value)
    if value.dtype != torch.float32:
        raise ValueError(f"{label} has dtype {value.dtype}, expected torch.float32")
    lead = [rows] if rows else []
    shape = state.shape[len(lead) :]
    numel = state.numel() // (rows or 1)
    for block in (BLOCK, _OLD_BLOCK):
        if list(value.shape) == [*lead, scales.blocks(numel, block)]:
            return block
    if list(value.shape[: len(lead)]) == lead:
        if scales.is_runs(value.shape[len(lead) :], shape):
            return "runs"
        if value.shape == state.shape:
            return "elements"
    raise ValueError(f"{label} has shape {list(value.shape)}, expected {[*lead, scales.blocks(numel)]}")
