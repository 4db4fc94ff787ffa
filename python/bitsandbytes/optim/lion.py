"""Lion: one state per parameter; every element moves by the same amount.

    d = b1 m + (1 - b1) g;  p = p (1 - lr weight_decay) - lr sign(d);  m = b2 m + (1 - b2) g

Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms". Weight decay is decoupled, as there.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import Optimizer1State
from .variants import Variant


class Lion(Variant, Optimizer1State):
    """Lion with `optim_bits` bits of state.

    params         parameters or group dicts
    lr             float or 0-dim tensor: the size of a step;  betas  two floats in [0, 1)
    weight_decay   decoupled: p shrinks by lr * weight_decay
    optim_bits     32 or 8; 8 gives parameters of min_8bit_size elements or more 8-bit state
    args           an object with optim_bits, min_8bit_size, max_unorm, skip_zeros that replaces those arguments
    is_paged       paged state on a GPU
    options        keyword options of every optimizer here: see Optimizer1State
    Raises ValueError for negative values and betas outside [0, 1); TypeError for an unknown name.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            "lion",
            params,
            lr,
            betas,
            0.0,
            weight_decay,
            self._bits(optim_bits),
            args,
            min_8bit_size,
            is_paged=is_paged or self._always_paged,
            **self._options(options),
        )


class _FixedLion(Lion):
    """The signature of the classes whose name says the bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        options = self._options(options)
        super().__init__(params, lr, betas, weight_decay, self._forced_bits, args, min_8bit_size, is_paged, **options)


class Lion8bit(_FixedLion):
    """Lion with 8-bit state. Arguments and errors: Lion, without optim_bits."""

    _forced_bits = 8


class Lion32bit(_FixedLion):
    """Lion with 32-bit state. Arguments and errors: Lion, without optim_bits."""

    _forced_bits = 32


class PagedLion(Lion):
    """Lion with paged state. Arguments and errors: Lion, without is_paged."""

    _always_paged = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, optim_bits, args, min_8bit_size, **self._options(options))


class _FixedPagedLion(PagedLion):
    """The signature of the paged classes whose name says the bits."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        options = self._options(options)
        super().__init__(params, lr, betas, weight_decay, self._forced_bits, args, min_8bit_size, **options)


class PagedLion8bit(_FixedPagedLion):
    """Lion with paged 8-bit state. Arguments and errors: Lion, without optim_bits and is_paged."""

    _forced_bits = 8


class PagedLion32bit(_FixedPagedLion):
    """Lion with paged 32-bit state. Arguments and errors: Lion, without optim_bits and is_paged."""

    _forced_bits = 32
