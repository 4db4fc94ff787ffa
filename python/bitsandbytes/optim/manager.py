"""GlobalOptimManager: settings of single parameters that differ from their optimizer's.

A setting may be given for a parameter object (`override_config`), for a place in the list handed to
`register_parameters` (so that it survives `.to()` making a new object), or for an attribute of a module
(`register_module_override`).  Optimizers ask resolve() when `version` has changed.

Everything is held weakly: the manager lives as long as the process, and must neither keep a model alive nor let the
settings of a dead parameter fall on a new one that got the same id.
"""

import logging
import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import sharding

logger = logging.getLogger(__name__)

# Keys of a setting that change something, and some that old releases knew and that are accepted without effect.
_KEYS = {"lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3"}
_KEYS |= {"optim_bits", "min_8bit_size", "max_unorm", "skip_zeros", "percentile_clipping"}
_INERT_KEYS = {"is_sparse", "block_wise"}


class _ByIdentity:
    """A mapping from tensors, by identity, to values; an entry goes away with its tensor."""

    def __init__(self) -> None:
        self._items: dict[int, tuple[weakref.ref, Any]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._items

    def get(self, tensor: Any, default: Any = None) -> Any:
        return self._items[id(tensor)][1] if id(tensor) in self._items else default

    def set(self, tensor: Tensor, value: Any) -> None:
        key = id(tensor)
        self._items[key] = (weakref.ref(tensor, partial(self._drop, key)), value)

    def _drop(self, key: int, _: object) -> None:
        self._items.pop(key, None)

    def items(self) -> list[tuple[Tensor, Any]]:
        """[(tensor, value)] of the tensors that are alive."""
        alive = [(ref(), value) for ref, value in list(self._items.values())]
        return [(tensor, value) for tensor, value in alive if tensor is not None]

    def by_id(self) -> dict[int, Any]:
        return {id(tensor): value for tensor, value in self.items()}


class _Place:
    """One position of register_parameters(): the tensor found there, and who may inherit its setting."""

    def __init__(self, tensor: Tensor) -> None:
        self.owner = weakref.ref(tensor)
        self.shape, self.device, self.dtype = tensor.shape, tensor.device, tensor.dtype
        self.claimed = False  # an optimizer holds the owner: no other parameter inherits
        self.config: dict[str, Any] = {}

    def accepts(self, p: Tensor) -> bool:
        """Is p the registered tensor, or the object that took its place when the model was moved or cast?"""
        owner = self.owner()
        if owner is p:
            return True
        if self.claimed or p.shape != self.shape:
            return False
        return owner is None or (p.device, p.dtype) != (self.device, self.dtype)

    def claim(self, p: Tensor) -> None:
        self.owner, self.claimed = weakref.ref(p), True


class _ModuleOverride:
    """A setting for the parameter that a module holds under a name."""

    def __init__(self, module: torch.nn.Module, name: str, config: dict[str, Any]) -> None:
        self.module, self.name, self.config = weakref.ref(module), name, dict(config)
        self.applied_to: weakref.ref | None = None  # weak reference to the parameter that has got the setting
        self.warned = False

    def target(self) -> Tensor | None:
        module = self.module()
        target = None if module is None else getattr(module, self.name, None)
        return target if isinstance(target, torch.Tensor) else None

    def label(self) -> str:
        return f"{type(self.module()).__name__}.{self.name}"


class _Heir:
    """A setting of a parameter, kept for the sharded parameter that may take its place in a module."""

    def __init__(self, p: Tensor, module: torch.nn.Module, name: str, config: dict[str, Any]) -> None:
        self.owner, self.module, self.name, self.config = weakref.ref(p), module, name, dict(config)
        self.shape = p.shape

    def target(self) -> Any:
        """The parameter that has replaced the owner, or None."""
        target = getattr(self.module(), self.name, None)
        replaced = target is not self.owner() and sharding.replaces(target, self.shape)
        return target if replaced else None


class GlobalOptimManager:
    """The one manager of the process; get it with GlobalOptimManager.get_instance()."""

    _instance: "GlobalOptimManager | None" = None
    version: int  # counts the changes; optimizers compare

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager: call GlobalOptimManager.get_instance() instead")

    @classmethod
    def get_instance(cls) -> "GlobalOptimManager":
        """The manager; the first call makes it."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.version = 0
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every setting and registration."""
        self._settings = _ByIdentity()
        self._places: dict[tuple[int, int], _Place] = {}  # (group index, position) -> _Place
        self._locations = _ByIdentity()  # tensor -> its (group index, position)
        self._module_overrides: list[_ModuleOverride] = []
        self._heirs: dict[tuple[int, str], _Heir] = {}  # (id of a module, parameter name) -> _Heir
        self._held = _ByIdentity()  # parameters of the optimizers that exist
        self._warned = _ByIdentity()
        self.optimizer = None
        self.uses_config_override = False
        self.version += 1

    @property
    def pid2config(self) -> dict[int, dict[str, Any]]:
        """{id(parameter): setting} of living parameters; a snapshot."""
        return self._settings.by_id()

    @property
    def index2config(self) -> dict[tuple[int, int], dict[str, Any]]:
        """{(group index, position): setting} of registered parameters that have one; a snapshot."""
        return {key: place.config for key, place in self._places.items() if place.config}

    @property
    def module_weight_config_triple(self) -> list[tuple[torch.nn.Module, str, dict[str, Any]]]:
        """[(module, parameter name, setting)] of living modules; a snapshot."""
        overrides = [(each.module(), each.name, each.config) for each in self._module_overrides]
        return [triple for triple in overrides if triple[0] is not None]

    def register_parameters(self, params: ParamsT) -> None:
        """Note the position of every parameter. params: an iterable of tensors, or of dicts {"params": [...]}.

        Settings given before or after follow the position, should the tensor be replaced before an optimizer sees it.
        Raises IndexError if there is nothing to register.
        """
        groups = list(params)
        if not groups:
            raise IndexError("register_parameters: params is empty, expected at least one parameter or group")
        if not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for group_index, group in enumerate(groups):
            members = group["params"]
            for position, p in enumerate([members] if isinstance(members, torch.Tensor) else members):
                place = self._places[group_index, position] = _Place(p)
                place.config = dict(self._settings.get(p, {}))
                self._locations.set(p, (group_index, position))
        self.version += 1

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Give one parameter, or each of a list, a setting of its own: `key` and `value`, or a dict of several.

        Keys: lr, betas, eps, weight_decay, alpha, t_alpha, t_beta3, optim_bits, min_8bit_size, max_unorm, skip_zeros,
        percentile_clipping.
        optim_bits and min_8bit_size act when the state is made, before the parameter's first step; the others from
        the next step on, and they defeat a learning-rate scheduler.  A value of None is ignored.
        Raises AssertionError if both forms are used, ValueError for an unknown key.
        """
        if key is not None and value is not None:
            if key_value_dict is not None:
                raise AssertionError("override_config: key_value_dict is given beside key and value, expected one form")
            key_value_dict = {key: value}
        if key_value_dict is None:
            return
        _check_keys("override_config", key_value_dict)
        self.uses_config_override = True
        for p in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            self._set(p, {**self._settings.get(p, {}), **key_value_dict})
        self.version += 1

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """Give the parameter that `module` holds as `param_name` a setting when an optimizer takes its next step.

        It replaces what override_config() said of that parameter before.  Keys as there; ValueError for others.
        """
        _check_keys("register_module_override", config)
        self._module_overrides.append(_ModuleOverride(module, param_name, config))
        self.version += 1

    def hold(self, params: Iterable[Tensor]) -> None:
        """An optimizer tells which parameters it has."""
        for p in params:
            self._held.set(p, True)

    def resolve(self, param_groups: list[dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """What is special about the parameters of one optimizer: {parameter: setting}, without those that have none.

        Precedence: the position's setting, then the parameter's own.
        """
        members = [(group, i, p) for group, g in enumerate(param_groups) for i, p in enumerate(g["params"])]
        self._apply_module_overrides({id(p) for _, _, p in members})
        self._inherit({id(p) for _, _, p in members})
        self._claim(members)
        result = {}
        for group_index, position, p in members:
            place = self._places.get((group_index, position))
            config = dict(place.config) if place is not None and place.accepts(p) else {}
            if config:
                place.claim(p)
            config.update(self._settings.get(p, {}))
            if config:
                result[p] = config
        self._warn_of_absent()
        return result

    def _set(self, p: Tensor, config: dict[str, Any]) -> None:
        self._settings.set(p, config)
        place = self._places.get(self._locations.get(p))
        if place is not None and place.owner() is p:
            place.config = dict(config)
        found = sharding.holder(p)
        if found is not None:
            module, name = found
            self._heirs[id(module()), name] = _Heir(p, module, name, config)

    def _inherit(self, members: set[int]) -> None:
        """Sharding (FSDP2) puts new parameters into a module: they get the settings of those they replace."""
        self._heirs = {key: heir for key, heir in self._heirs.items() if heir.module() is not None}
        for heir in list(self._heirs.values()):
            target = heir.target()
            if id(target) in members and target not in self._settings:
                self._set(target, heir.config)

    def _claim(self, members: list[tuple[int, int, Tensor]]) -> None:
        """Registered tensors that an optimizer holds keep their position's setting to themselves."""
        for _, _, p in members:
            place = self._places.get(self._locations.get(p))
            if place is not None and place.owner() is p:
                place.claimed = True

    def _apply_module_overrides(self, members: set[int]) -> None:
        self._module_overrides = [each for each in self._module_overrides if each.module() is not None]
        for each in self._module_overrides:
            target = each.target()
            done = each.applied_to is not None and each.applied_to() is target
            if id(target) in members and not done:
                self._set(target, dict(each.config))
                each.applied_to = weakref.ref(target)

    def _warn_of_absent(self) -> None:
        """Say once of a setting that it reaches nothing: what it names would be trained, but by no optimizer here."""
        for each in self._module_overrides:
            target = each.target()
            absent = target is None or (target.requires_grad and target not in self._held)
            if absent and not each.warned:
                each.warned = True
                logger.warning("the override %s of %s reaches no parameter of an optimizer", each.config, each.label())
        for p, config in self._settings.items():
            moved = self._locations.get(p) is not None
            if p.requires_grad and p not in self._held and not moved and p not in self._warned:
                self._warned.set(p, True)
                shape = tuple(p.shape)
                logger.warning("the override %s of a parameter %s reaches no parameter of an optimizer", config, shape)


def _check_keys(function: str, config: dict[str, Any]) -> None:
    for key in config:
        if key not in _KEYS and key not in _INERT_KEYS:
            raise ValueError(f"{function}: unknown key {key!r}, expected one of {', '.join(sorted(_KEYS))}")
