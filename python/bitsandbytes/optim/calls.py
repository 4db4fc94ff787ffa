"""Operator calls: the tensor lists of the parameters that are updated together, kept from step to step.

Walking a thousand parameters in Python costs more than updating small ones, so the lists are made once and reused as
long as the parameters, the gradients that are present, and the state tensors are the same objects.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import _ops
from . import sharding
from .settings import Settings

_bnb = torch.ops.bitsandbytes
_LISTS = ("state1", "state2", "absmax1", "absmax2")


class Call:
    """The parameters of one operator call, one entry each; absmax1 and absmax2 hold those of 8-bit state alone.

    own       what GlobalOptimManager says of these parameters, on top of their group; {} for most
    ordinals  places of the parameters in the optimizer: the stream of each one's random numbers
    """

    def __init__(self, name: str, own: dict[str, Any], qmaps: Iterable[Tensor]) -> None:
        self.name, self.own, self.qmaps = name, own, list(qmaps)
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.ordinals: list[int] = []
        self._ready: tuple[bool, bool, bool] | None = None  # what ready_for() has made

    def add(self, p: Tensor, state: dict[str, Any], ordinal: int) -> None:
        """Take in one parameter with its state; ordinal: its place in the optimizer."""
        self.params.append(p)
        self.states.append(state)
        self.ordinals.append(ordinal)

    def close(self, shared: Iterable[Tensor]) -> None:
        """All parameters are in: make the lists that stay. shared: the maps of 8-bit state without maps of its own."""
        if not self.qmaps and any("qmap1" in state for state in self.states):
            self.qmaps = list(shared)
        self.sharded = any(sharding.is_dtensor(p) for p in self.params)
        self.kept = []
        for key in _LISTS:
            states = [state for state in self.states if key in state]
            self.kept.append((itemgetter(key), states, [state[key] for state in states]))

    def is_current(self, of: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Are states and their tensors still the objects of the lists? of: parameter -> state."""
        return all(map(is_, map(of.__getitem__, self.params), self.states)) and all(
            all(map(is_, map(get, states), tensors)) for get, states, tensors in self.kept
        )

    def ready_for(self, settings: Settings) -> None:
        """Make the entries of the states that the settings ask for, and each `step` a tensor or an int."""
        wanted = (settings.max_unorm > 0, settings.percentile < 100, settings.capturable)
        if wanted == self._ready:
            return
        for p, state in zip(self.params, self.states, strict=True):
            for key, shape, needed in (("unorm_vec", 1, wanted[0]), ("gnorm_vec", 100, wanted[1])):
                if needed and key not in state:
                    state[key] = torch.zeros(shape, dtype=torch.float32, device=p.device)
            if settings.capturable != isinstance(state["step"], torch.Tensor):
                count = float(state["step"])
                state["step"] = torch.tensor(count, device=p.device) if settings.capturable else int(count)
        self._ready = wanted

    def run(self, settings: Settings) -> None:
        """Update the parameters, and count the step."""
        params, grads, lists = self.params, [p.grad for p in self.params], [tensors for _, _, tensors in self.kept]
        if self.sharded:
            grads = [sharding.gradient(p, g) for p, g in zip(params, grads, strict=True)]
            params, *lists = ([sharding.local(t) for t in tensors] for tensors in (params, *lists))
        counts = [state["step"] for state in self.states]
        steps, step = (counts, []) if settings.capturable else ([], [count + 1 for count in counts])
        scale = self._clip(grads, steps, step, settings) if settings.percentile < 100 else None
        seeds = [] if settings.seed is None else [(settings.seed << 32) + i & 2**63 - 1 for i in self.ordinals]
        unorm = [state["unorm_vec"] for state in self.states] if settings.max_unorm > 0 else []
        first, last = (self.name, params, grads, *lists, self.qmaps, steps, unorm, scale), (settings.lr, step, seeds)
        norms = None
        if self.sharded and settings.max_unorm > 0:
            norms = _ops.call(_bnb._optimizer_norms.default, *first, None, *last, *settings.scalars)
            sharding.reduce_sums(self.params, norms)
        _ops.call(_bnb._optimizer_step.default, *first, norms, *last, *settings.scalars)
        torch.autograd.graph.increment_version(self.params)  # as every in-place operation does; saved tensors notice
        for state, count in zip(self.states, step, strict=False):
            state["step"] = count

    def _clip(self, grads: list[Tensor], steps: list[Tensor], step: list[int], settings: Settings) -> Tensor:
        """What each gradient is multiplied with, f32 [count], by the percentile of its last norms."""
        norms = _ops.call(_bnb._gradient_norms.default, grads)
        if self.sharded:
            sharding.reduce_sums(self.params, norms.unsqueeze(1))
        history = [state["gnorm_vec"] for state in self.states]
        report = _ops.call(_bnb._percentile_clip.default, history, norms, steps, step, settings.percentile)
        return report[:, 2]


class Plan:
    """The calls of one group, and what they depend on."""

    def __init__(self, params: Sequence[Tensor], present: list[bool], calls: list[Call]) -> None:
        self.params, self.present, self.calls = list(params), present, calls

    def fits(self, params: Sequence[Tensor], present: list[bool], of: Mapping[Tensor, dict[str, Any]]) -> bool:
        """May the calls be run once more?"""
        if len(params) != len(self.params) or present != self.present or not all(map(is_, params, self.params)):
            return False
        return all(call.is_current(of) for call in self.calls)
