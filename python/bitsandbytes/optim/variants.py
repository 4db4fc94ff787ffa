"""What the classes of one algorithm share: the bits and paging that a class name means, refusals, wide state.

A class tree has one constructor per distinct signature.  The class at its root names the row of the C table; those
below set `_forced_bits` or `_always_paged`; a private class between them drops the arguments that their names decide.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from .optimizer import Optimizer2State

_BASE_ARGUMENTS = frozenset(
    name for name, p in inspect.signature(Optimizer2State).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
)


class Variant:
    """Stands before Optimizer1State or Optimizer2State in the bases of the root class of an algorithm."""

    _forced_bits: int | Any = None  # bits of the state where the class name says them
    _always_paged = False

    def _bits(self, optim_bits: int) -> int:
        """The bits of the state: those of the class, else the argument."""
        return self._forced_bits or optim_bits

    def _options(self, options: dict[str, Any]) -> dict[str, Any]:
        """`options`, for the base class, which knows their names.

        TypeError: the name of a positional argument of the base, whose value this class decides.
        """
        for name in options:
            if name in _BASE_ARGUMENTS:
                raise TypeError(f"{type(self).__name__}: {name!r} is no argument of this class")
        return options


class WideState:
    """Stands before torch.optim.Optimizer in the bases of a class whose state is wider than its parameters."""

    param_groups: list[dict[str, Any]]
    state: Any

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but state keeps the precision it was saved with."""
        super().load_state_dict(state_dict)
        names = (name for group in state_dict["param_groups"] for name in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for name, p in zip(names, params, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                self.state[p][key] = value.to(p.device, wide_dtype(p), copy=True)


def wide_dtype(p: Tensor) -> torch.dtype:
    """The dtype of state and arithmetic for p: f32, or p's own where that is wider."""
    return torch.promote_types(p.dtype, torch.float32)


def expect(
    holds: bool, owner: object, argument: str, value: object, expected: str, error: type[Exception] = ValueError
) -> None:
    """Raise `error`, with a text that names the class of `owner`, the argument, its value and what was expected."""
    if not holds:
        raise error(f"{type(owner).__name__}: {argument} is {value}, expected {expected}")


def expect_no_amsgrad(owner: object, amsgrad: bool, error: type[Exception]) -> None:
    """`amsgrad` would need a third state, which no class has."""
    expect(not amsgrad, owner, "amsgrad", amsgrad, "False: there is no state for a running maximum", error)


def expect_nesterov_fits(owner: object, nesterov: bool, momentum: float, dampening: float) -> None:
    """Nesterov's form is defined for momentum > 0 without dampening; ValueError otherwise."""
    fits = not nesterov or (momentum > 0 and dampening == 0)
    values = f"{nesterov} with momentum {momentum} and dampening {dampening}"
    expect(fits, owner, "nesterov", values, "momentum > 0 and dampening 0")
