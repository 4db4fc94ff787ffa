"""RMSprop: one state per parameter, a running mean of squared gradients.

    g = g + weight_decay p;  v = alpha v + (1 - alpha) g^2;  p = p - lr g / (sqrt(v) + eps)

Tieleman & Hinton 2012, "Lecture 6.5 - rmsprop", in the form of torch.optim.RMSprop.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer1State
from .variants import Variant, expect


class RMSprop(Variant, Optimizer1State):
    """RMSprop with `optim_bits` bits of state.

    params         parameters or group dicts
    lr             float or 0-dim tensor;  alpha  in (0, 1);  eps  added to the square root
    weight_decay   coupled: part of the gradient
    momentum       not available unless 0;  centered  not available: both would need another state
    optim_bits     32 or 8; 8 gives parameters of min_8bit_size elements or more 8-bit state
    args           an object with optim_bits, min_8bit_size, max_unorm, skip_zeros that replaces those arguments
    options        keyword options of every optimizer here: see Optimizer1State
    A group holds betas = (alpha, momentum).
    Raises NotImplementedError for alpha 0, centered, and momentum other than 0; ValueError for negative values and
    alpha outside [0, 1); TypeError for an unknown name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        expect(alpha != 0, self, "alpha", alpha, "0 < alpha < 1", NotImplementedError)
        expect(not centered, self, "centered", centered, "False: there is no state for the mean", NotImplementedError)
        expect(0 <= alpha < 1, self, "alpha", alpha, "0 < alpha < 1")
        expect(momentum >= 0, self, "momentum", momentum, "0")
        expect(momentum == 0, self, "momentum", momentum, "0: there is no state for it", NotImplementedError)
        super().__init__(
            "rmsprop",
            params,
            lr,
            (alpha, momentum),
            eps,
            weight_decay,
            self._bits(optim_bits),
            args,
            min_8bit_size,
            **self._options(options),
        )


class _FixedRMSprop(RMSprop):
    """The signature of the classes whose name says the bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            self._forced_bits,
            args,
            min_8bit_size,
            **self._options(options),
        )


class RMSprop8bit(_FixedRMSprop):
    """RMSprop with 8-bit state. Arguments and errors: RMSprop, without optim_bits."""

    _forced_bits = 8


class RMSprop32bit(_FixedRMSprop):
    """RMSprop with 32-bit state. Arguments and errors: RMSprop, without optim_bits."""

    _forced_bits = 32
