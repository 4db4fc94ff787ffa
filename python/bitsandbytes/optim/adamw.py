"""AdamW: Adam with a default weight decay of 0.01 (Loshchilov & Hutter 2019). The algorithm is that of adam.py."""

from .adam import Adam


class AdamW(Adam):
    """AdamW with `optim_bits` bits of state. Arguments and errors: Adam."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        amsgrad=False,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        is_paged=False,
        **options,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged, **options
        )


class AdamW8bit(AdamW):
    """AdamW with 8-bit state; optim_bits is a placeholder."""

    _forced_bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit state; optim_bits is a placeholder."""

    _forced_bits = 32


class PagedAdamW(AdamW):
    """AdamW with paged state. Arguments and errors: Adam, without is_paged."""

    _always_paged = True

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        amsgrad=False,
        optim_bits=32,
        args=None,
        min_8bit_size=4096,
        **options,
    ):
        options = self._options(options)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, **options)


class PagedAdamW8bit(PagedAdamW):
    """AdamW with paged 8-bit state; optim_bits is a placeholder."""

    _forced_bits = 8


class PagedAdamW32bit(PagedAdamW):
    """AdamW with paged 32-bit state; optim_bits is a placeholder."""

    _forced_bits = 32
