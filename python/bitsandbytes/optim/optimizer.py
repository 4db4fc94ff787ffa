"""Base classes of the optimizers: settings, state, and the step.

A step collects, per parameter group, the lists of tensors and makes one operator call for all of them; parameters with
settings of their own (GlobalOptimManager), maps of their own (old checkpoints) or another device go into further calls.
State starts as zero bytes: 8-bit state is codes whose scales are 0.  Entries of state[p]: docs/FORMAT.md, section 7.
Formulas: docs/NUMERICS.md, rules 20 and on.
Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization".
"""

import ast
import logging
import types
import warnings

import torch

from .. import _ops
from ..codebooks import default_map
from . import checkpoint
from .manager import GlobalOptimManager

__all__ = ["GlobalOptimManager", "Optimizer1State", "Optimizer2State", "Optimizer8bit"]

logger = logging.getLogger(__name__)
_ARGS = ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros")


class _Call:
    """The tensor lists of one operator call, one entry per parameter; see `_optimizer_step` in _ops.py."""

    __slots__ = ("absmax1", "absmax2", "g", "p", "qmaps", "settings", "state1", "state2", "states", "step")

    def __init__(self, settings):
        self.settings = settings
        self.p, self.g, self.state1, self.state2, self.absmax1, self.absmax2 = [], [], [], [], [], []
        self.qmaps, self.step, self.states = [], [], []


class Optimizer8bit(torch.optim.Optimizer):
    """What all optimizers here share: state that is never cast, and a checkpoint layout that hides it from sharding.

    params       parameters or group dicts, as for torch.optim.Optimizer
    defaults     values of a group: lr, betas, eps, weight_decay, ...
    optim_bits   32 or 8: bits of the state
    is_paged     keep large states in memory that the GPU pages; has no effect on CPU parameters but one warning
    """

    non_castable_tensor_keys = checkpoint.QUANT_STATE_KEYS
    _states = 0

    def __init__(self, params, defaults, optim_bits=32, is_paged=False):
        self.optim_bits = optim_bits
        self.is_paged = is_paged
        self._start()
        super().__init__(params, defaults)

    def _start(self):
        """What belongs to the running process and is neither copied nor saved."""
        self.mng = GlobalOptimManager.get_instance()
        self._seen = None  # the manager's version when _overrides was made
        self._overrides = {}
        self._move_state = False
        self._warned_paged = False

    def __getstate__(self):
        kept = ("optim_bits", "is_paged", "args", "optimizer_name", "_maps")
        own = {key: self.__dict__[key] for key in kept if key in self.__dict__}
        return {**own, **super().__getstate__()}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._start()
        self.mng.hold(p for group in self.param_groups for p in group["params"])

    def add_param_group(self, param_group):
        """As in torch. The group may also carry optim_bits, min_8bit_size, max_unorm and skip_zeros."""
        super().add_param_group(param_group)
        self.mng.hold(self.param_groups[-1]["params"])
        self._seen = None

    def state_dict(self):
        """torch's layout; what is not `step` lies in a nested dict, where sharding engines leave it alone."""
        return checkpoint.nest(super().state_dict())

    def load_state_dict(self, state_dict, move_to_device=True):
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
    def step(self, closure=None):
        """Update every parameter that has a gradient. closure: evaluates the model again; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._move_state:
            checkpoint.move_state(self.state)
            self._move_state = False
        if self._seen != self.mng.version:
            self._overrides = self.mng.resolve(self.param_groups)
            self._seen = self.mng.version
        for calls in [self._collect(group) for group in self.param_groups]:
            for call in calls:
                self._update(call)
        return loss

    def _collect(self, group):
        """The operator calls for one group; makes missing state."""
        raise NotImplementedError(f"{type(self).__name__}: a subclass must say how a group is updated")

    def _update(self, call):
        raise NotImplementedError(f"{type(self).__name__}: a subclass must say how parameters are updated")


class _BlockwiseOptimizer(Optimizer8bit):
    """Optimizers of the C table: one or two states per parameter, each 32-bit, or 8-bit in blocks of 256."""

    def __init__(self, name, params, defaults, args, optim_bits, is_paged):
        _check_values(defaults)
        self.args = args
        self.optimizer_name = name
        self._maps = {}  # device -> its maps, shared by all states there
        super().__init__(params, defaults, optim_bits, is_paged)

    def _collect(self, group):
        calls, overrides = {}, self._overrides
        settings = self._settings(group)
        common = _call_key(settings)
        for p in group["params"]:
            g = p.grad
            if g is None:
                continue
            if g.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__}: a gradient {tuple(p.shape)} is sparse, expected dense")
            own = overrides.get(p)
            used = settings if own is None else self._settings({**group, **own})
            state = self.state[p]
            if not state:
                self._new_state(p, state, used)
            maps = self._state_maps(p, state)
            key = (p.device, maps and tuple(map(id, maps)), common if own is None else _call_key(used))
            call = calls.get(key)
            if call is None:
                call = calls[key] = _Call(used)
            _append(call, p, g, state, maps)
        return calls.values()

    def _state_maps(self, p, state):
        """The maps of an 8-bit state if they are not the shared ones, else ()."""
        if "qmap1" not in state:
            return ()
        shared = self._maps.get(p.device)
        if shared is not None and state["qmap1"] is shared[0] and (self._states == 1 or state["qmap2"] is shared[1]):
            return ()
        return (state["qmap1"], state["qmap2"]) if self._states == 2 else (state["qmap1"],)

    def _settings(self, group):
        """What one operator call needs to know, from a group's values and the constructor's."""
        values = {key: group[key] if key in group else getattr(self.args, key) for key in _ARGS}
        betas = _betas(group["betas"])
        values |= {"lr": float(group["lr"]), "eps": float(group["eps"]), "weight_decay": float(group["weight_decay"])}
        values |= {"beta1": betas[0], "beta2": betas[1], "beta3": betas[2] if len(betas) > 2 else 0.0}
        values["alpha"] = float(group.get("alpha", 0.0))
        if values["optim_bits"] not in (8, 32):
            raise NotImplementedError(f"optim_bits is {values['optim_bits']!r}, expected 8 or 32")
        if values["max_unorm"] > 0:
            raise NotImplementedError(f"max_unorm is {values['max_unorm']}, {self.optimizer_name!r} supports 0 only")
        _check_percentile_clipping(group.get("percentile_clipping", 100))
        return values

    def _new_state(self, p, state, settings):
        """Fill the empty dict `state` with zero state for p."""
        if self.is_paged and p.device.type == "cpu" and not self._warned_paged:
            self._warned_paged = True
            logger.warning("%s: paged state needs a GPU; CPU parameters get ordinary state", type(self).__name__)
        eight = settings["optim_bits"] == 8 and p.numel() >= settings["min_8bit_size"]
        entries = {"step": 0}
        maps = self._shared_maps(p) if eight else ()
        for i in range(1, self._states + 1):
            dtype = torch.uint8 if eight else torch.float32
            entries[f"state{i}"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            if eight:
                entries[f"qmap{i}"] = maps[i - 1]
                entries[f"absmax{i}"] = checkpoint.new_absmax(p)
        state.update(entries)

    def _shared_maps(self, p):
        """The maps of all 8-bit states on p's device: the signed one for state1, the unsigned one for state2."""
        if p.device not in self._maps:
            names = ("dynamic", "udynamic")[: self._states]
            self._maps[p.device] = tuple(default_map(name, p).clone() for name in names)
        return self._maps[p.device]

    def _update(self, call):
        s = call.settings
        qmaps = call.qmaps or (list(self._maps[call.p[0].device]) if call.absmax1 else [])
        _ops.call(
            torch.ops.bitsandbytes._optimizer_step.default,
            *(self.optimizer_name, call.p, call.g, call.state1, call.state2, call.absmax1, call.absmax2, qmaps),
            *(call.step, s["lr"], s["beta1"], s["beta2"], s["beta3"], s["alpha"], s["eps"], s["weight_decay"]),
            *(1.0, bool(s["skip_zeros"])),
        )
        torch.autograd.graph.increment_version(call.p)  # as every in-place operation does; saved tensors notice
        for state, step in zip(call.states, call.step, strict=True):
            state["step"] = step


class Optimizer1State(_BlockwiseOptimizer):
    """An optimizer with one state per parameter. optimizer_name: a row of the optimizer table of the C library.

    betas, eps, lr, weight_decay as the row uses them; optim_bits, min_8bit_size (fewer elements: 32-bit state),
    max_unorm (trust clipping, 0: none) and skip_zeros (elements with a zero gradient stay as they are) may come from
    the object `args` instead.  ValueError: a negative value, or a beta outside [0, 1).
    """

    _states = 1

    def __init__(
        self,
        optimizer_name,
        params,
        lr=1e-3,
        betas=(0.9, 0.0),
        eps=1e-8,
        weight_decay=0.0,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        max_unorm=0.0,
        skip_zeros=False,
        is_paged=False,
        *,
        percentile_clipping=100,
        block_wise=True,
    ):
        _check_legacy(percentile_clipping, block_wise)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        args = args or _arguments(optim_bits, min_8bit_size, max_unorm, skip_zeros)
        super().__init__(optimizer_name, params, defaults, args, optim_bits, is_paged)


class Optimizer2State(_BlockwiseOptimizer):
    """An optimizer with two states per parameter; otherwise as Optimizer1State.

    betas: a tuple of two (three for rows with a third average), or a string such as "(0.9, 0.999)".
    alpha, t_alpha, t_beta3: used by rows that mix a third average.
    """

    _states = 2

    def __init__(
        self,
        optimizer_name,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        max_unorm=0.0,
        skip_zeros=False,
        is_paged=False,
        alpha=0.0,
        t_alpha=None,
        t_beta3=None,
        *,
        percentile_clipping=100,
        block_wise=True,
    ):
        _check_legacy(percentile_clipping, block_wise)
        betas = _betas(betas)
        if len(betas) < 2:
            raise ValueError(f"betas is {betas}, expected two numbers or more")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}
        args = args or _arguments(optim_bits, min_8bit_size, max_unorm, skip_zeros)
        super().__init__(optimizer_name, params, defaults, args, optim_bits, is_paged)


def _arguments(*values):
    """The values of _ARGS, as the attributes of an object."""
    return types.SimpleNamespace(**dict(zip(_ARGS, values, strict=True)))


def _call_key(settings):
    """Parameters with equal values of this may share a call; the bits of a state are each parameter's own."""
    return tuple(value for key, value in settings.items() if key not in ("optim_bits", "min_8bit_size"))


def _append(call, p, g, state, maps):
    """Put one parameter into the lists of a call; its step is written back when the call has succeeded."""
    call.p.append(p)
    call.g.append(g)
    call.states.append(state)
    call.step.append(state["step"] + 1)
    call.state1.append(state["state1"])
    if "state2" in state:
        call.state2.append(state["state2"])
    if "absmax1" in state:
        call.absmax1.append(state["absmax1"])
        if "absmax2" in state:
            call.absmax2.append(state["absmax2"])
        call.qmaps = list(maps)


def _betas(betas):
    """betas as a tuple of floats; a string "(b1, b2)" is read."""
    if isinstance(betas, str):
        try:
            betas = ast.literal_eval(betas)
        except (ValueError, SyntaxError):
            raise ValueError(f"betas is {betas!r}, expected two numbers") from None
    return tuple(float(beta) for beta in betas)


def _check_values(defaults):
    """Refuse values no optimizer can use. NaN fails as well."""
    for key in ("lr", "eps", "weight_decay"):
        if not defaults[key] >= 0:
            raise ValueError(f"{key} is {defaults[key]}, expected a value >= 0")
    for i, beta in enumerate(_betas(defaults["betas"])):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] is {beta}, expected 0 <= beta < 1")


def _check_legacy(percentile_clipping, block_wise):
    """The two options of releases before 0.50."""
    _check_percentile_clipping(percentile_clipping)
    if not block_wise:
        warnings.warn("block_wise=False is taken as True: all 8-bit state is block-wise", FutureWarning, stacklevel=4)


def _check_percentile_clipping(value):
    if value < 100:
        raise NotImplementedError(f"percentile_clipping is {value}, expected 100: clipping is not available")
