"""Adagrad: one state per parameter, the sum of squared gradients.

    g = g + weight_decay p;  v = v + g^2;  p = p - lr g / (sqrt(v) + eps)

Duchi, Hazan & Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer1State
from .variants import Variant, expect


class Adagrad(Variant, Optimizer1State):
    """Adagrad with `optim_bits` bits of state.

    params         parameters or group dicts
    lr             float or 0-dim tensor;  eps  added to the square root
    lr_decay, initial_accumulator_value   not available unless 0
    weight_decay   coupled: part of the gradient
    optim_bits     32 or 8; 8 gives parameters of min_8bit_size elements or more 8-bit state
    args           an object with optim_bits, min_8bit_size, max_unorm, skip_zeros that replaces those arguments
    options        keyword options of every optimizer here: see Optimizer1State
    Raises ValueError for negative values, lr_decay or initial_accumulator_value other than 0; TypeError for an unknown
    name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            expect(value >= 0, self, name, value, "a value >= 0")
        start = initial_accumulator_value
        expect(start == 0, self, "initial_accumulator_value", start, "0: state starts as zero")
        expect(lr_decay == 0, self, "lr_decay", lr_decay, "0: use a scheduler for the learning rate")
        eight = self._forced_bits == 8
        expect(not eight or optim_bits == 8, self, "optim_bits", optim_bits, "8, which the class means")
        super().__init__(
            "adagrad",
            params,
            lr,
            (0.0, 0.0),
            eps,
            weight_decay,
            self._bits(optim_bits),
            args,
            min_8bit_size,
            **self._options(options),
        )


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit state. Arguments and errors: Adagrad; ValueError also for optim_bits other than 8."""

    _forced_bits = 8

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        start = initial_accumulator_value
        super().__init__(params, lr, lr_decay, weight_decay, start, eps, optim_bits, args, min_8bit_size, **options)


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit state; optim_bits is a placeholder. Arguments and errors: Adagrad."""

    _forced_bits = 32
