"""Base classes of the optimizers: settings, state, and the step.

A step makes one operator call per parameter group; parameters with settings of their own (GlobalOptimManager), maps of
their own (old checkpoints) or another device go into further calls.  State starts as zero bytes: 8-bit state is codes
whose scales are 0.  Entries of state[p]: docs/FORMAT.md, section 7.  Formulas: docs/OPTIMIZERS.md.
Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization".
"""

import logging
import sys
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import cextension, paged
from ..codebooks import default_map
from . import checkpoint, sharding
from .calls import Call, Plan
from .manager import GlobalOptimManager
from .settings import Settings, arguments, check
from .settings import betas as read_betas
from .settings import options as read_options

__all__ = ["GlobalOptimManager", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

logger = logging.getLogger(__name__)


class Optimizer8bit(torch.optim.Optimizer):
    """What all optimizers here share: state that is never cast, and a checkpoint layout that hides it from sharding.

    params       parameters or group dicts, as for torch.optim.Optimizer
    defaults     values of a group: lr, betas, eps, weight_decay, ...
    optim_bits   32 or 8: bits of the state
    is_paged     keep large states of CUDA parameters in page-locked memory of the CPU, from where each step moves them
                 through the GPU; other parameters get ordinary state, and one warning
    """

    non_castable_tensor_keys = checkpoint.QUANT_STATE_KEYS
    _states = 0

    def __init__(self, params: ParamsT, defaults: dict[str, Any], optim_bits: int = 32, is_paged: bool = False) -> None:
        self.optim_bits = optim_bits
        self.is_paged = is_paged
        self._start()
        super().__init__(params, defaults)

    def _start(self) -> None:
        """What belongs to the running process and is neither copied nor saved."""
        self.mng = GlobalOptimManager.get_instance()
        self._seen: int | None = None  # the manager's version when _overrides was made
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        self._plans: dict[int, Plan] = {}  # index of a group -> its calls
        self._known: tuple[list[Tensor], list[dict[str, Any]]] = [], []  # the state of the last step
        self._move_state = False
        self._warned_paged = False

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        kept = ("optim_bits", "is_paged", "args", "optimizer_name", "_maps")
        own = {key: self.__dict__[key] for key in kept if key in self.__dict__}
        return {**own, **super().__getstate__()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()
        self._move_state = self.is_paged  # a copy of paged state is ordinary CPU memory
        self.mng.hold(p for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. The group may also carry optim_bits, min_8bit_size, max_unorm and skip_zeros."""
        super().add_param_group(param_group)
        self.mng.hold(self.param_groups[-1]["params"])
        self._seen = None

    def state_dict(self) -> dict[str, Any]:
        """torch's layout; what is not `step` lies in a nested dict, where sharding engines leave it alone."""
        self._settle()
        return checkpoint.write(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Read a state dict, nested or flat, of this or an earlier release. Tensors are copied, never cast.

        The saved state decides the precision: 8-bit state goes on as such in a 32-bit class.
        move_to_device=False leaves tensors where they are until the next step.
        ValueError: groups, parameters or lengths that do not fit; nothing has been changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state, groups = checkpoint.read(self, state_dict, move_to_device)
        super().__setstate__({"state": state, "param_groups": groups})
        self._move_state = not move_to_device
        self._seen = None
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: evaluates the model again; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._move_state:
            checkpoint.move_state(self)
            self._move_state = False
        if self._seen != self.mng.version:
            self._overrides = self.mng.resolve(self.param_groups)
            self._seen = self.mng.version
            self._plans = {}
        # All state is made, and every setting read, before the first parameter changes.
        of = None
        if not self._is_same_state():
            of, self._known = self.state, ([], [])
        calls = [
            (call, self._settings(group, call.own), grads)
            for index, group in enumerate(self.param_groups)
            for call, grads in self._plan(index, group, of)
        ]
        if of is not None:
            self._known = list(of.keys()), list(of.values())
        for call, settings, _ in calls:
            call.ready_for(settings)
        for call, settings, grads in calls:
            self._update(call, settings, grads)
        return loss

    def _settle(self) -> None:
        """Wait for the steps under way, which write paged state that the CPU is about to read."""
        if self.is_paged:
            for device in {p.device for p in self.state if isinstance(p, Tensor) and p.device.type == "cuda"}:
                torch.cuda.synchronize(device)

    def _pages(self, p: Tensor) -> bool:
        """Does p get paged state?"""
        if not self.is_paged:
            return False
        if p.device.type == "cuda" and not sharding.is_dtensor(p):
            return p.numel() >= cextension.lib.bnb_pages_least()
        if not self._warned_paged:
            self._warned_paged = True
            text = "%s: paged state needs parameters that are whole on a GPU; others, as one on %s, get ordinary state"
            logger.warning(text, type(self).__name__, p.device)
        return False

    def _is_same_state(self) -> bool:
        """Has the state the parameters and dicts of the last step, in their order?"""
        (params, states), of = self._known, self.state
        return len(of) == len(params) and all(map(is_, of, params)) and all(map(is_, of.values(), states))

    def _plan(
        self, index: int, group: dict[str, Any], of: dict[Tensor, dict[str, Any]] | None
    ) -> list[tuple[Call, list[Tensor] | None]]:
        """The calls of a group with their gradients, as Plan.deal(); the calls of the last step where they still hold.

        of: the state, or None if its dicts are those of the last step.
        """
        raise NotImplementedError(f"{type(self).__name__}: a subclass must say how a group is updated")


class _BlockwiseOptimizer(Optimizer8bit):
    """Optimizers of the C table: one or two states per parameter, each 32-bit, or 8-bit in blocks of 256."""

    def __init__(
        self, name: str, params: ParamsT, defaults: dict[str, Any], args: Any, optim_bits: int, is_paged: bool
    ) -> None:
        check(defaults)
        self.args = args
        self.optimizer_name = name
        self._maps: dict[torch.device, tuple[Tensor, ...]] = {}  # device -> its maps, shared by all states there
        super().__init__(params, defaults, optim_bits, is_paged)

    def _settings(self, group: dict[str, Any], own: dict[str, Any] | None) -> Settings:
        return Settings({**group, **own} if own else group, self.args)

    def _plan(
        self, index: int, group: dict[str, Any], of: dict[Tensor, dict[str, Any]] | None
    ) -> list[tuple[Call, list[Tensor] | None]]:
        plan = self._plans.get(index)
        if plan is not None and not plan.fits(group["params"], of):
            plan = None
        if plan is not None and plan.finds_gradients():
            return plan.deal(None)
        grads = [p.grad for p in group["params"]]
        present = [g is not None for g in grads]
        if plan is None or plan.present != present:
            plan = self._plans[index] = Plan(group["params"], present, self._calls(index, group))
        return plan.deal(grads)

    def _calls(self, index: int, group: dict[str, Any]) -> list[Call]:
        """Sort the parameters that have a gradient into calls; makes missing state."""
        calls, settings = {}, self._settings(group, None)
        first = sum(len(other["params"]) for other in self.param_groups[:index])
        for place, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            self._check_gradient(p)
            own = self._overrides.get(p, {})
            state = self.state[p]
            if not state:
                self._new_state(p, state, self._settings(group, own) if own else settings)
            maps = self._own_maps(p, state)
            key = (p.device, *map(id, maps), self._call_key(group, own))
            if key not in calls:
                calls[key] = Call(self.optimizer_name, own, maps)
            calls[key].add(p, state, place, first)
        for call in calls.values():
            call.close(self._maps.get(call.params[0].device, ()))
        return list(calls.values())

    def _call_key(self, group: dict[str, Any], own: dict[str, Any]) -> tuple[Any, ...]:
        """Parameters with equal values of this share a call: the bits of a state are each parameter's own."""
        names = own.keys() - {"optim_bits", "min_8bit_size"}
        if not names:
            return ()
        settings = self._settings(group, own)
        return (*sorted(names), settings.scalars, settings.percentile)

    def _check_gradient(self, p: Tensor) -> None:
        if p.grad.layout is not torch.strided:
            raise RuntimeError(f"{type(self).__name__}: a gradient {tuple(p.shape)} is sparse, expected dense")

    def _own_maps(self, p: Tensor, state: dict[str, Any]) -> tuple[Tensor, ...]:
        """The maps of an 8-bit state that are not the shared ones, else ()."""
        maps = tuple(state[f"qmap{i}"] for i in range(1, self._states + 1) if f"qmap{i}" in state)
        shared = self._maps.get(p.device)
        return () if shared is not None and all(a is b for a, b in zip(maps, shared, strict=False)) else maps

    def _new_state(self, p: Tensor, state: dict[str, Any], settings: Settings) -> None:
        """Fill the empty dict `state` with zero state for p."""
        make = paged.paged_like if self._pages(p) else sharding.new_state
        eight = settings.optim_bits == 8 and sharding.whole_numel(p) >= settings.min_8bit_size
        entries: dict[str, Any] = {"step": 0}
        maps = self._shared_maps(p) if eight else ()
        for i in range(1, self._states + 1):
            rows = self._rows if i == 1 else 0
            entries[f"state{i}"] = make(p, torch.uint8 if eight else torch.float32, rows)
            if eight:
                entries[f"qmap{i}"] = maps[i - 1]
                entries[f"absmax{i}"] = checkpoint.new_absmax(p, rows)
        state.update((sys.intern(key), value) for key, value in entries.items())  # they are looked up in every step

    @property
    def _rows(self) -> int:
        """2 where state1 holds two averages, in rows; else 0."""
        averages = cextension.lib.bnb_optim_averages(cextension.optimizer_row(self.optimizer_name))
        return averages if averages > 1 else 0

    def _shared_maps(self, p: Tensor) -> tuple[Tensor, ...]:
        """The maps of all 8-bit states on p's device: signed for averages of the gradient, else unsigned."""
        if p.device not in self._maps:
            row = cextension.optimizer_row(self.optimizer_name)
            signed = [cextension.lib.bnb_optim_is_signed(row, i) for i in range(self._states)]
            self._maps[p.device] = tuple(default_map("dynamic" if each else "udynamic", p).clone() for each in signed)
        return self._maps[p.device]

    def _update(self, call: Call, settings: Settings, grads: list[Tensor] | None) -> None:
        try:
            call.run(settings, grads)
        except (RuntimeError, ValueError):
            for p in call.params:
                self._check_gradient(p)
            raise


class Optimizer1State(_BlockwiseOptimizer):
    """An optimizer with one state per parameter. optimizer_name: a row of the optimizer table of the C library.

    betas, eps, lr, weight_decay as the row uses them; optim_bits, min_8bit_size (fewer elements: 32-bit state),
    max_unorm (trust clipping, 0: none) and skip_zeros (elements with a zero gradient stay as they are) may come from
    the object `args` instead.  Options, keyword-only, for every class:
    percentile_clipping   below 100: no gradient's norm exceeds that percentile of its last 100
    capturable            state["step"] is a 0-dim float32 tensor, and a tensor lr is never read by the host
    stochastic_rounding   16-bit parameters are rounded up or down at random, right on average;  seed  of its numbers
    page_bytes            of GPU memory that paged state passes through in a step; 0: a quarter of it, 256 MiB at most
    nesterov (momentum, lars), bias_correction and adam_w_mode (adam, lamb)   as the classes of these rows say
    block_wise            of old releases: False is taken as True, with a FutureWarning
    ValueError: a negative value, a beta outside [0, 1).  TypeError: an unknown option.
    """

    _states = 1

    def __init__(
        self,
        optimizer_name: str,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        options = read_options(self, options)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= options
        args = args or arguments(optim_bits, min_8bit_size, max_unorm, skip_zeros)
        super().__init__(optimizer_name, params, defaults, args, optim_bits, is_paged)


class Optimizer2State(_BlockwiseOptimizer):
    """An optimizer with two states per parameter; otherwise as Optimizer1State.

    betas: a tuple of two (three for rows with a third average), or a string such as "(0.9, 0.999)".
    alpha, t_alpha, t_beta3: used by rows that mix a third average.
    """

    _states = 2

    def __init__(
        self,
        optimizer_name: str,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: Sequence[float] | str = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        **options: Any,
    ) -> None:
        options = read_options(self, options)
        betas = read_betas(betas)
        if len(betas) < 2:
            raise ValueError(f"betas is {betas}, expected two numbers or more")
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        defaults |= options
        args = args or arguments(optim_bits, min_8bit_size, max_unorm, skip_zeros)
        super().__init__(optimizer_name, params, defaults, args, optim_bits, is_paged)
