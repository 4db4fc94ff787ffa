"""Quantised layers and inputs for the tests of the layers, and comparisons of their checkpoints."""

import torch

from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit


def make_4bit(k=96, n=40, seed=0, device="cpu", **options):
    """A quantised Linear4bit, NF4 with nested statistics unless `options` say otherwise."""
    torch.manual_seed(seed)
    return Linear4bit(k, n, **{"quant_type": "nf4", **options}).to(device)


def make_8bit(k=96, n=40, seed=0, device="cpu", **options):
    """A Linear8bitLt with an int8 weight."""
    torch.manual_seed(seed)
    return Linear8bitLt(k, n, **{"has_fp16_weights": False, **options}).to(device)


def inputs(*shape, dtype=torch.float32, outliers=False, seed=3):
    """Normal values; outliers: column 5 is 9, and column 17 twelve times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    if outliers:
        x[..., 5] = 9.0
        x[..., 17] *= 12
    return x.to(dtype)


def same_bytes(a, b):
    """Equality of tensors that may hold packed codes, which as floats may be NaN."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_same_state(a, b):
    """The state dicts of two modules are equal in names, order, dtypes, shapes and bytes."""
    one, two = a.state_dict(), b.state_dict()
    assert list(one) == list(two)
    for key in one:
        assert one[key].dtype == two[key].dtype, key
        assert same_bytes(one[key], two[key]), key


def check_linked(layer):
    """A Linear4bit and its weight know each other and share one quant_state."""
    assert type(layer.weight) is Params4bit
    assert layer.weight.module is layer
    assert layer.quant_state is layer.weight.quant_state


def without(key):
    """A function that removes an entry of a state dict."""
    return lambda state: state.pop(key)


def with_(key, value):
    """A function that sets an entry of a state dict."""
    return lambda state: state.update({key: value})
