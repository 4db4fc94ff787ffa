"""Classes that fix the bits or the paging of another one: the same bits as the plain class, over a million elements.

The plain classes are compared with the double-precision oracle at this size in test_optim_rows.py.
"""

import pytest
import torch

from bitsandbytes import optim

N, STEPS = 10**6 + 3, 100
FAMILIES = ("Adagrad", "AdamW", "Adam", "AdEMAMix", "LAMB", "LARS", "Lion", "RMSprop", "SGD")
PAGED = ("AdamW", "Adam", "AdEMAMix", "Lion")
NEEDED = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "LARS": {"lr": 1e-3, "momentum": 0.9}}
ALIASES = [(f"{family}{bits}bit", family, bits) for family in FAMILIES for bits in (8, 32)]
ALIASES += [(f"Paged{family}{bits}bit", family, bits) for family in PAGED for bits in (8, 32)]
ALIASES += [(f"Paged{family}", family, bits) for family in PAGED for bits in (8, 32)]


def trained(cls, dtype, **options):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter((0.1 * torch.randn(N, generator=generator)).to(dtype))
    gradients = [(0.01 * torch.randn(N, generator=generator)).to(dtype) for _ in range(2)]
    optimizer = cls([p], weight_decay=0.1, **options)
    for step in range(STEPS):
        p.grad = gradients[step % 2]
        optimizer.step()
    return p, optimizer.state[p]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "family", "bits"), ALIASES)
def test_same_bits_as_the_plain_class(name, family, bits, dtype):
    needed = NEEDED.get(family, {})
    choice = {} if name.endswith("bit") else {"optim_bits": bits}
    p, state = trained(getattr(optim, name), dtype, **needed, **choice)
    q, expected = trained(getattr(optim, family), dtype, **needed, optim_bits=bits)
    assert state["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)
    assert torch.equal(p, q)
    assert p.isfinite().all()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value, key
