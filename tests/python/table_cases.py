"""Parameters, optimizers and gradients of the tests of tables."""

import torch
from torch import nn

from bitsandbytes import optim

SHAPES = [(700,), (64, 9), (5, 3, 2), (1,), (0, 4), (257,)]  # the larger ones get 8-bit state


def parameters(device="cpu", dtypes=(torch.float32, torch.bfloat16), shapes=SHAPES):
    noise = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=noise).to(device, dtypes[i % len(dtypes)]))
        for i, shape in enumerate(shapes)
    ]


def make(name, params, bits=8, **options):
    options = {"momentum": 0.9, **options} if name in ("LARS", "SGD") else options
    optimizer = getattr(optim, name)(params, lr=1e-2, optim_bits=bits, **options)
    for group in optimizer.param_groups:
        group["min_8bit_size"] = 256
    return optimizer


def give(params, t, skip=()):
    """Gradients that depend on step and place alone."""
    for i, p in enumerate(params):
        noise = torch.Generator().manual_seed(1000 * t + i)
        p.grad = None if i in skip else torch.randn(p.shape, generator=noise).to(p.device, p.dtype)


def tables(optimizer):
    return [call._table for plan in optimizer._plans.values() for call in plan.calls]


def has_table(optimizer):
    return bool(tables(optimizer)) and None not in tables(optimizer)
