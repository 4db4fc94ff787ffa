"""A module with 3-D weights in 4 bits, for the tests of nn.parametrize."""

import torch
from torch import nn
from torch.nn.functional import linear

from bitsandbytes.nn.parametrize import replace_parameter_4bit

OPTIONS = [{}, {"quant_type": "fp4", "blocksize": 32}, {"compress_statistics": True, "blocksize": 128}]


class Experts(nn.Module):
    """Reads each of its parameters twice; w is [experts, out, in]."""

    def __init__(self, dtype=torch.float32, experts=4, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(experts, 24, 16, generator=generator).to(dtype))
        self.v = nn.Parameter(torch.randn(experts, 8, 24, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.zeros(8, dtype=dtype))

    def forward(self, x):
        return sum(linear(torch.tanh(linear(x, self.w[e])), self.v[e]) for e in (0, 2)) + self.bias


def make(seed=0, dtype=torch.float32, **options):
    module = Experts(dtype, seed=seed)
    for name in ("w", "v"):
        replace_parameter_4bit(module, name, **options)
    return module


def reference(module):
    """A plain module with the dequantised weights."""
    twin = Experts(module.w.dtype)
    with torch.no_grad():
        for name in ("w", "v", "bias"):
            getattr(twin, name).copy_(getattr(module, name))
    return twin.requires_grad_(False)
