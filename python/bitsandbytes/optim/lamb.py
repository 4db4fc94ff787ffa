"""LAMB: Adam whose step is bounded by the norm of the parameter it moves.

    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), m and v as in adam.py
    s = min(1, max_unorm |p| / |u|), 1 where |p| is 0;   p = p (1 - lr weight_decay) - lr s u

You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes". Their ratio |p| / |u| also
lengthens a step, and their u holds the weight decay; here s only shortens, and decay stays outside of it.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer2State
from .variants import Variant, expect, expect_no_amsgrad


class LAMB(Variant, Optimizer2State):
    """LAMB with `optim_bits` bits of state; the bound works on 8-bit state as well.

    params            parameters or group dicts
    lr                float or 0-dim tensor
    bias_correction   False: the divisors 1 - b^t are 1
    betas             two floats in [0, 1);  eps  added to the square root
    weight_decay      decoupled: p shrinks by lr * weight_decay
    amsgrad           not available: raises
    adam_w_mode       False: weight decay is coupled, g + weight_decay * p takes the place of g
    optim_bits        32 or 8; 8 gives parameters of min_8bit_size elements or more 8-bit state
    args              an object with optim_bits, min_8bit_size, max_unorm, skip_zeros that replaces those arguments
    max_unorm         bound of |u| in units of |p|; 0: none
    options           keyword options of every optimizer here: see Optimizer2State
    Raises ValueError for negative values and betas outside [0, 1); NotImplementedError for amsgrad (ValueError in
    LAMB8bit); TypeError for an unknown name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Any,
    ) -> None:
        eight = self._forced_bits == 8
        expect_no_amsgrad(self, amsgrad, ValueError if eight else NotImplementedError)
        expect(not eight or max_unorm == 1.0, self, "max_unorm", max_unorm, "1.0, the only bound of this class")
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            self._bits(optim_bits),
            args,
            min_8bit_size,
            max_unorm,
            bias_correction=bias_correction,
            adam_w_mode=adam_w_mode,
            **self._options(options),
        )


class _FixedLAMB(LAMB):
    """The signature of the classes whose name says the bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            self._forced_bits,
            args,
            min_8bit_size,
            max_unorm,
            **self._options(options),
        )


class LAMB8bit(_FixedLAMB):
    """LAMB with 8-bit state. Arguments: LAMB, without optim_bits. ValueError: amsgrad, or max_unorm other than 1.0."""

    _forced_bits = 8


class LAMB32bit(_FixedLAMB):
    """LAMB with 32-bit state. Arguments and errors: LAMB, without optim_bits."""

    _forced_bits = 32
