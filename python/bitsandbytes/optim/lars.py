"""LARS: SGD with momentum whose step is bounded by the norm of the parameter it moves.

    g, m as in sgd.py;  u = m, with nesterov u = g + momentum m
    s = min(1, max_unorm |p| / |u|), 1 where |p| is 0;   p = p - lr s u

You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks". Their ratio scales every gradient before
it enters m; here s bounds the step, only shortens it, and leaves m alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer1State
from .sgd import check_momentum
from .variants import Variant, WideState, expect, expect_nesterov_fits, wide_dtype


class LARS(Variant, Optimizer1State):
    """LARS with `optim_bits` bits of momentum; the bound works on 8-bit state as well.

    max_unorm      bound of |u| in units of |p|; 0: none
    Other arguments and errors: SGD.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        **options: Any,
    ) -> None:
        check_momentum(self, momentum, dampening, nesterov)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            self._bits(optim_bits),
            args,
            min_8bit_size,
            max_unorm,
            nesterov=nesterov,
            **self._options(options),
        )


class _FixedLARS(LARS):
    """The signature of the classes whose name says the bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            self._forced_bits,
            args,
            min_8bit_size,
            max_unorm,
            **self._options(options),
        )


class LARS8bit(_FixedLARS):
    """LARS with 8-bit momentum. Arguments and errors: LARS, without optim_bits."""

    _forced_bits = 8


class LARS32bit(_FixedLARS):
    """LARS with 32-bit momentum. Arguments and errors: LARS, without optim_bits."""

    _forced_bits = 32


class PytorchLARS(WideState, torch.optim.Optimizer):
    """LARS in torch operations, on any device and for any float dtype; what LARS is compared with.

    lr, weight_decay   >= 0;  momentum  >= 0: 0 keeps no state and steps along g
    dampening, nesterov, max_unorm   as in LARS; nesterov needs momentum > 0 and dampening 0
    state["momentum_buffer"] is f32 and so is the arithmetic (f64 for f64 parameters); p is rounded once.
    Raises ValueError for a negative lr, momentum or weight_decay, and for a nesterov that does not fit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            expect(value >= 0, self, name, value, "a value >= 0")
        expect_nesterov_fits(self, nesterov, momentum, dampening)
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov, "max_unorm": max_unorm})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: evaluates the model again; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self.state[p], group)
        return loss

    def _update(self, p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        wide = wide_dtype(p)
        value = p.to(wide)
        g = p.grad.to(wide) + group["weight_decay"] * value
        u, momentum = g, group["momentum"]
        if momentum != 0:
            if "momentum_buffer" in state:
                m = state["momentum_buffer"].mul_(momentum).add_((1 - group["dampening"]) * g)
            else:
                m = state["momentum_buffer"] = g.clone()
            u = g + momentum * m if group["nesterov"] else m
        if group["max_unorm"] > 0:
            u = u * _trust(value, u, group["max_unorm"])
        p.copy_(value - group["lr"] * u)


def _trust(value: Tensor, u: Tensor, max_unorm: float) -> Tensor:
    """The factor s of a step u, a 0-dim tensor: no norm is read by the host."""
    norm, bound = torch.linalg.vector_norm(u), max_unorm * torch.linalg.vector_norm(value)
    shorten = (norm > bound) & (bound > 0) & torch.isfinite(norm)
    return torch.where(shorten, bound / norm, 1.0)
