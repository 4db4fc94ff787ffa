"""Operator calls: the tensor lists of the parameters that are updated together, kept from step to step.

Walking a thousand parameters in Python costs more than updating small ones, so the lists are made once and reused as
long as the parameters, the gradients that are present, and the state tensors are the same objects.  From its second
step on, a call also leaves parameters and states with the library, in a table: what is checked and looked up once there
need not travel again (src/torch/ops_optim_table.c).  The table refuses a step where a tensor is not what it was; then
the lists go to the operator as in the first step, which copes with any layout and has the words for what it refuses.

Python's garbage collector does not see that a table holds a parameter, so it would never free a parameter whose hooks
or attributes lead back to the optimizer.  Such a parameter is handed over in every step; and a full collection ends all
tables that hold parameters, for hooks that came later.
"""

import ctypes
import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .. import _ops, cextension
from . import sharding
from .settings import Settings

_bnb = torch.ops.bitsandbytes
_LISTS = ("state1", "state2", "absmax1", "absmax2")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CHANCES = 3  # tables that may fail in a row before a call does without
_ATOMS = (bool, int, float, str, type(None))
_holding: "weakref.WeakSet[Call]" = weakref.WeakSet()  # calls whose table holds parameters


def _let_go(phase: str, info: dict[str, int]) -> None:
    """What the garbage collector calls when it starts, and when it ends."""
    if phase == "start" and info["generation"] == 2:
        for call in list(_holding):
            call.drop_table()


gc.callbacks.append(_let_go)


def _may_be_held(p: Tensor) -> bool:
    """Does nothing lead from p to the optimizer, as far as can be seen?"""
    return (
        not p._backward_hooks
        and not p._post_accumulate_grad_hooks
        and all(isinstance(value, _ATOMS) for value in p.__dict__.values())
    )


class _Own(NamedTuple):
    """What each parameter of a call brings to one step; lists without a use are empty, scale is None."""

    grads: list[Tensor]
    steps: list[Tensor]
    unorm: list[Tensor]
    scale: Tensor | None
    step: list[int]
    seeds: list[int]


class _Table:
    """A table of the library, forgotten there when this object dies.

    number  what the library knows it by;  params  what a run must bring: [] if the table holds the parameters
    finds   can the library find the gradients?
    """

    def __init__(self, number: int, params: list[Tensor], own: _Own) -> None:
        self.number, self.params, self._steps, self._unorm = number, params, own.steps, own.unorm
        self.finds = not params
        weakref.finalize(self, cextension.lib.bnb_torch_forget, ctypes.c_int64(number)).atexit = False

    def is_ready(self) -> bool:
        """Has every parameter a gradient, so that the next run need be given the first alone?"""
        answer = cextension.lib.bnb_torch_ready(ctypes.c_int64(self.number)) if self.finds else 0
        self.finds = answer >= 0 and self.finds
        return answer > 0

    def holds(self, own: _Own) -> bool:
        """Are the counters and norms those that the library has?"""
        return (
            len(own.steps) == len(self._steps)
            and len(own.unorm) == len(self._unorm)
            and all(map(is_, own.steps, self._steps))
            and all(map(is_, own.unorm, self._unorm))
        )


class Call:
    """The parameters of one operator call, one entry each; absmax1 and absmax2 hold those of 8-bit state alone.

    own       what GlobalOptimManager says of these parameters, on top of their group; {} for most
    places    of the parameters in their group
    ordinals  the same in the optimizer: the stream of each one's random numbers
    """

    def __init__(self, name: str, own: dict[str, Any], qmaps: Iterable[Tensor]) -> None:
        self.name, self.own, self.qmaps = name, own, list(qmaps)
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.places: list[int] = []
        self.ordinals: list[int] = []
        self._ready: tuple[bool, bool, bool] | None = None  # what ready_for() has made
        self._table: _Table | None = None
        self._chances = _CHANCES

    def add(self, p: Tensor, state: dict[str, Any], place: int, first: int) -> None:
        """Take in one parameter with its state; place: its own in the group, first: the group's in the optimizer."""
        self.params.append(p)
        self.states.append(state)
        self.places.append(place)
        self.ordinals.append(first + place)

    def close(self, shared: Iterable[Tensor]) -> None:
        """All parameters are in: make the lists that stay. shared: the maps of 8-bit state without maps of its own."""
        if not self.qmaps and any("qmap1" in state for state in self.states):
            self.qmaps = list(shared)
        self.sharded = any(sharding.is_dtensor(p) for p in self.params)
        plain = all(type(p) in _PLAIN for p in self.params)
        self._may_have_table = plain and self.params[0].device.type in ("cpu", "cuda")
        self._is_first = True
        self.kept = [[state[key] for state in self.states if key in state] for key in _LISTS]
        kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for state in self.states:
            kinds.setdefault(tuple(key for key in _LISTS if key in state), []).append(state)
        self._checks = [(keys, states, [[s[k] for s in states] for k in keys]) for keys, states in kinds.items()]

    def is_current(self, of: Mapping[Tensor, dict[str, Any]] | None) -> bool:
        """Are states and their tensors still the objects of the lists? of: parameter -> state, None: as it was."""
        if of is not None and not all(map(is_, map(of.__getitem__, self.params), self.states)):
            return False
        return all(_are_same(*check) for check in self._checks)

    def finds_gradients(self) -> bool:
        """May the next run be given None for the gradients: has each parameter one, and the library found it?"""
        return self._table is not None and self._wants_table() and self._table.is_ready()

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
        self._ready, self._table = wanted, None

    def run(self, settings: Settings, grads: list[Tensor] | None) -> None:
        """Update the parameters, and count the step. grads: those of the parameters, None after finds_gradients()."""
        found = grads is None and self._table is not None and settings.percentile >= 100
        if grads is None:
            grads = self._gradients(1 if found else None)
        if self.sharded:
            grads = [sharding.gradient(p, g) for p, g in zip(self.params, grads, strict=True)]
        counts = [state["step"] for state in self.states]
        steps, step = (counts, []) if settings.capturable else ([], _next(counts))
        scale = self._clip(grads, steps, step, settings) if settings.percentile < 100 else None
        seeds = [] if settings.seed is None else [(settings.seed << 32) + i & 2**63 - 1 for i in self.ordinals]
        unorm = [state["unorm_vec"] for state in self.states] if settings.max_unorm > 0 else []
        own = _Own(grads, steps, unorm, scale, step, seeds)
        if not self._run_table(settings, own):
            self._run_lists(settings, own._replace(grads=self._gradients()) if found else own)
        torch.autograd.graph.increment_version(self.params)  # as every in-place operation does; saved tensors notice
        if _are_equal(step):
            count = step[0]
            for state in self.states:
                state["step"] = count
        else:
            for state, count in zip(self.states, step, strict=False):
                state["step"] = count

    def _gradients(self, count: int | None = None) -> list[Tensor]:
        """Those of the first `count` parameters, or of all."""
        return [p.grad for p in self.params[:count]]  # type: ignore[misc]

    def _run_lists(self, settings: Settings, own: "_Own") -> None:
        params, lists = self.params, self.kept
        if self.sharded:
            params, *lists = ([sharding.local(t) for t in tensors] for tensors in (params, *lists))
        first = (self.name, params, own.grads, *lists, self.qmaps, own.steps, own.unorm)
        last = (settings.lr, own.step, own.seeds, *settings.scalars)
        norms = None
        if self.sharded and settings.max_unorm > 0:
            norms = _ops.call(_bnb._optimizer_norms.default, *first, own.scale, None, *last)
            sharding.reduce_sums(self.params, norms)
        _ops.call(_bnb._optimizer_step.default, *first, own.scale, norms, *last)
        if self._is_first:  # a call that is made once is not worth a table
            self._is_first = False
        elif self._chances and self._wants_table():
            self._make_table(first, last, own)

    def _make_table(self, first: tuple[Any, ...], last: tuple[Any, ...], own: "_Own") -> None:
        self._chances -= 1
        held = all(map(_may_be_held, self.params))
        number = _ops.call(_bnb._optimizer_table.default, held, *first, None, None, None, *last[1:])
        self._table = _Table(number, [] if held else self.params, own) if number else None
        if number and held:
            _holding.add(self)

    def drop_table(self) -> None:
        """The next step makes another."""
        self._table = None
        _holding.discard(self)

    def _run_table(self, settings: Settings, own: "_Own") -> bool:
        """Make the step with the table. False: there is none that fits, and nothing has been done."""
        table = self._table
        if table is None or not self._wants_table():
            return False
        if table.holds(own):
            step = own.step[:1] if _are_equal(own.step) else own.step
            last = (own.scale, None, settings.lr, step, own.seeds, *settings.scalars)
            if _ops.call(_bnb._optimizer_run.default, table.number, table.params, own.grads, *last):
                self._chances = _CHANCES
                return True
        self.drop_table()
        return False

    def _wants_table(self) -> bool:
        """A table is out of sight of whoever traces operators."""
        return self._may_have_table and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()

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
        self._is_whole = len(calls) == 1 and all(present)

    def fits(self, params: Sequence[Tensor], of: Mapping[Tensor, dict[str, Any]] | None) -> bool:
        """May the calls be run once more if the same gradients are there? of: parameter -> state, None: as it was."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        return all(call.is_current(of) for call in self.calls)

    def finds_gradients(self) -> bool:
        """Have all parameters a gradient, and the library found them?"""
        return self._is_whole and self.calls[0].finds_gradients()

    def deal(self, grads: list[Any] | None) -> list[tuple[Call, list[Tensor] | None]]:
        """Every call with the gradients of its parameters. grads: those of the group; None if the library has them."""
        if grads is None or self._is_whole:
            return [(call, grads) for call in self.calls]
        return [(call, [grads[i] for i in call.places]) for call in self.calls]


def _next(counts: list[int]) -> list[int]:
    """Every count plus 1; most often they are all the same."""
    return [counts[0] + 1] * len(counts) if _are_equal(counts) else [count + 1 for count in counts]


def _are_equal(counts: list[int]) -> bool:
    return len(counts) > 0 and counts.count(counts[0]) == len(counts)


def _are_same(keys: tuple[str, ...], states: list[dict[str, Any]], tensors: list[list[Tensor]]) -> bool:
    """Are the entries of the states under each key the objects of its list?

    Written out for the usual keys: this is a fifth of the host time of a step over many small parameters.
    """
    if len(keys) == 4:
        k, j, m, n = keys
        for state, a, b, c, d in zip(states, *tensors, strict=True):
            if state[k] is not a or state[j] is not b or state[m] is not c or state[n] is not d:
                return False
        return True
    if len(keys) == 2:
        k, j = keys
        return all(state[k] is a and state[j] is b for state, a, b in zip(states, *tensors, strict=True))
    return all(all(map(is_, map(itemgetter(key), states), each)) for key, each in zip(keys, tensors, strict=True))
