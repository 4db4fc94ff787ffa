"""SGD with momentum: one state per parameter.

    g = g + weight_decay p
    m = g at the first step, else momentum m + (1 - dampening) g
    p = p - lr m;  with nesterov  p = p - lr (g + momentum m)

The formulas of torch.optim.SGD. Polyak 1964; Nesterov's form after Sutskever et al. 2013.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer1State
from .variants import Variant, expect, expect_nesterov_fits


def check_momentum(owner: object, momentum: float, dampening: float, nesterov: bool) -> None:
    """Refuse what the momentum row cannot use: NotImplementedError for momentum 0, ValueError for the rest."""
    expect(momentum != 0, owner, "momentum", momentum, "0 < momentum < 1", NotImplementedError)
    expect(0 <= momentum < 1, owner, "momentum", momentum, "0 < momentum < 1")
    expect(0 <= dampening < 1, owner, "dampening", dampening, "0 <= dampening < 1")
    expect_nesterov_fits(owner, nesterov, momentum, dampening)


class SGD(Variant, Optimizer1State):
    """SGD with `optim_bits` bits of momentum.

    params         parameters or group dicts
    lr             float or 0-dim tensor, required
    momentum       in (0, 1);  dampening  in [0, 1). A group holds both, as betas = (momentum, dampening)
    weight_decay   coupled: part of the gradient
    nesterov       step along g + momentum * m
    optim_bits     32 or 8; 8 gives parameters of min_8bit_size elements or more 8-bit state
    args           an object with optim_bits, min_8bit_size, max_unorm, skip_zeros that replaces those arguments
    options        keyword options of every optimizer here: see Optimizer1State
    Raises NotImplementedError for momentum 0; ValueError for negative values, momentum or dampening outside [0, 1), and
    nesterov with dampening; TypeError for an unknown name.
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
        **options: Any,
    ) -> None:
        check_momentum(self, momentum, dampening, nesterov)
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, dampening),
            0.0,
            weight_decay,
            self._bits(optim_bits),
            args,
            min_8bit_size,
            nesterov=nesterov,
            **self._options(options),
        )


class _FixedSGD(SGD):
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
        **options: Any,
    ) -> None:
        bits, options = self._forced_bits, self._options(options)
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, bits, args, min_8bit_size, **options)


class SGD8bit(_FixedSGD):
    """SGD with 8-bit momentum. Arguments and errors: SGD, without optim_bits."""

    _forced_bits = 8


class SGD32bit(_FixedSGD):
    """SGD with 32-bit momentum. Arguments and errors: SGD, without optim_bits."""

    _forced_bits = 32
