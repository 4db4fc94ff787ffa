"""AdEMAMix: Adam with a second, slow average of the gradient.

    m1 = b1 m1 + (1 - b1) g;  m2 = b3 m2 + (1 - b3) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr weight_decay) - lr (m1 / (1 - b1^t) + alpha m2) / (sqrt(v / (1 - b2^t)) + eps)

With t_alpha, alpha grows linearly from 0 in t_alpha steps; with t_beta3, b3 grows from b1 in t_beta3 steps so that the
half-life of m2 grows linearly.  state1 is (2, *p.shape): m1, then m2; state2 is v.
Pagliardini, Ablin & Grangier 2024, "The AdEMAMix Optimizer: Better, Faster, Older", algorithm 1 and appendix A.1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer2State
from .variants import Variant, WideState, wide_dtype


class AdEMAMix(Variant, Optimizer2State):
    """AdEMAMix with `optim_bits` bits of state.

    params         parameters or group dicts
    lr             float or 0-dim tensor;  betas  (b1, b2, b3), each in [0, 1);  eps  added to the square root
    alpha          weight of the slow average
    t_alpha        steps in which alpha grows to its value, None or 0: no growth;  t_beta3  the same for b3
    weight_decay   decoupled: p shrinks by lr * weight_decay
    optim_bits     32 or 8; 8 gives parameters of min_8bit_size elements or more 8-bit state
    is_paged       paged state on a GPU
    options        keyword options of every optimizer here: see Optimizer2State
    Raises ValueError for negative values and betas outside [0, 1); TypeError for an unknown name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            "ademamix",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            self._bits(optim_bits),
            None,
            min_8bit_size,
            is_paged=is_paged or self._always_paged,
            alpha=alpha,
            t_alpha=t_alpha,
            t_beta3=t_beta3,
            **self._options(options),
        )


class _FixedAdEMAMix(AdEMAMix):
    """The signature of the classes whose name says the bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            self._forced_bits,
            min_8bit_size,
            is_paged,
            **self._options(options),
        )


class AdEMAMix8bit(_FixedAdEMAMix):
    """AdEMAMix with 8-bit state. Arguments and errors: AdEMAMix, without optim_bits."""

    _forced_bits = 8


class AdEMAMix32bit(_FixedAdEMAMix):
    """AdEMAMix with 32-bit state. Arguments and errors: AdEMAMix, without optim_bits."""

    _forced_bits = 32


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with paged state. Arguments and errors: AdEMAMix, without is_paged."""

    _always_paged = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            alpha,
            t_alpha,
            t_beta3,
            eps,
            weight_decay,
            optim_bits,
            min_8bit_size,
            **self._options(options),
        )


class _FixedPagedAdEMAMix(PagedAdEMAMix):
    """The signature of the paged classes whose name says the bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        bits, options = self._forced_bits, self._options(options)
        super().__init__(params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay, bits, min_8bit_size, **options)


class PagedAdEMAMix8bit(_FixedPagedAdEMAMix):
    """AdEMAMix with paged 8-bit state. Arguments and errors: AdEMAMix, without optim_bits and is_paged."""

    _forced_bits = 8


class PagedAdEMAMix32bit(_FixedPagedAdEMAMix):
    """AdEMAMix with paged 32-bit state. Arguments and errors: AdEMAMix, without optim_bits and is_paged."""

    _forced_bits = 32


class _ReferenceAdEMAMix(WideState, torch.optim.Optimizer):
    """AdEMAMix in torch operations, f32 (f64 for f64 parameters): what the classes above are compared with.

    Arguments as in AdEMAMix.  The step is counted per group, in group["step"].
    state["m1_m2"] is (2, *p.shape), m1 then m2; state["nu"] is v, of p's shape.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "t_beta3": t_beta3, "t_alpha": t_alpha})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. closure: evaluates the model again; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            alpha, beta3 = _scheduled(group)
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group, alpha, beta3)
        return loss

    def _update(self, p: Tensor, group: dict[str, Any], alpha: float, beta3: float) -> None:
        beta1, beta2, _ = group["betas"]
        wide, state = wide_dtype(p), self.state[p]
        if not state:
            state["m1_m2"] = torch.zeros((2, *p.shape), dtype=wide, device=p.device)
            state["nu"] = torch.zeros(p.shape, dtype=wide, device=p.device)
        g, nu = p.grad.to(wide), state["nu"]
        for m, beta in zip(state["m1_m2"], (beta1, beta3), strict=True):
            m.lerp_(g, 1 - beta)
        nu.lerp_(g * g, 1 - beta2)
        m1, m2 = state["m1_m2"]
        mixed = m1 / (1 - beta1 ** group["step"]) + alpha * m2
        u = mixed / ((nu / (1 - beta2 ** group["step"])).sqrt() + group["eps"])
        p.copy_(p.to(wide) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * u)


def _scheduled(group: dict[str, Any]) -> tuple[float, float]:
    """alpha and b3 of the group's present step."""
    step, alpha, (beta1, _, beta3) = group["step"], group["alpha"], group["betas"]
    if group["t_alpha"]:
        alpha = min(1.0, step / group["t_alpha"]) * alpha
    if group["t_beta3"] and step < group["t_beta3"]:
        # 1 / ln b, which the half-life is proportional to, goes in a straight line from b1 to b3
        share = step / group["t_beta3"]
        beta3 = min(math.exp(1 / ((1 - share) / math.log(beta1) + share / math.log(beta3))), beta3)
    return alpha, beta3
