"""AdamW: Adam with a default weight decay of 0.01 (Loshchilov & Hutter 2019). The algorithm is that of adam.py."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import Adam


class AdamW(Adam):
    """AdamW with `optim_bits` bits of state. Arguments and errors: Adam."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class AdamW8bit(AdamW):
    """AdamW with 8-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 32


class PagedAdamW(AdamW):
    """AdamW with paged state. Arguments and errors: Adam, without is_paged."""

    _always_paged = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        options = self._options(options)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, **options)


class PagedAdamW8bit(PagedAdamW):
    """AdamW with paged 8-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 8


class PagedAdamW32bit(PagedAdamW):
    """AdamW with paged 32-bit state; optim_bits is a placeholder. Arguments and errors: Adam."""

    _forced_bits = 32
