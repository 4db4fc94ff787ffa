"""Adam: two states per parameter, decoupled weight decay, 32-bit or 8-bit block-wise state.

    m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p (1 - lr weight_decay) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Kingma & Ba 2015, with the decay of Loshchilov & Hutter 2019: with weight_decay > 0 this is AdamW, not torch's Adam.
Classes differ in what they force: the name ends in the bits of the state, "Paged" in front asks for paged state.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer2State
from .variants import Variant, expect, expect_no_amsgrad


class Adam(Variant, Optimizer2State):
    """Adam with `optim_bits` bits of state.

    params         parameters or group dicts
    lr             float or 0-dim tensor;  betas  two floats in [0, 1);  eps  added to the square root
    weight_decay   decoupled: p shrinks by lr * weight_decay
    amsgrad        not available: raises
    optim_bits     32 or 8; 8 gives parameters of min_8bit_size elements or more 8-bit state
    args           an object with optim_bits, min_8bit_size, max_unorm, skip_zeros that replaces those arguments
    is_paged       paged state on a GPU
    options        keyword options of every optimizer here: see Optimizer2State
    Raises ValueError for negative values and betas outside [0, 1); NotImplementedError for amsgrad (ValueError in the
    8-bit classes); TypeError for an unknown name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        eight = self._forced_bits == 8
        expect_no_amsgrad(self, amsgrad, ValueError if eight else NotImplementedError)
        expect(not eight or optim_bits == 32, self, "optim_bits", optim_bits, "to be left alone: the class means 8")
        super().__init__(
            "adam",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            self._bits(optim_bits),
            args,
            min_8bit_size,
            is_paged=is_paged or self._always_paged,
            **self._options(options),
        )


class Adam8bit(Adam):
    """Adam with 8-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 8


class Adam32bit(Adam):
    """Adam with 32-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 32


class PagedAdam(Adam):
    """Adam with paged state, whatever is_paged says. Arguments and errors: Adam."""

    _always_paged = True


class PagedAdam8bit(PagedAdam):
    """Adam with paged 8-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 8


class PagedAdam32bit(PagedAdam):
    """Adam with paged 32-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 32
