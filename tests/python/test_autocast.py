"""Autocast on the CPU, and the range and accuracy of LLM.int8() in every float type.

The products are operators of their own, which autocast leaves alone: a layer answers in the dtype of its input, with
the bits that it gives without autocast, forward and backward.
"""

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import functional as F
from bitsandbytes.nn import Embedding8bit, EmbeddingNF4, Linear4bit, Linear8bitLt
from layer_samples import inputs, make_4bit, make_8bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYERS = {
    "nf4": make_4bit,
    "nf4-compute": lambda: make_4bit(compute_dtype=torch.bfloat16),
    "int8": make_8bit,
    "int8-outliers": lambda: make_8bit(threshold=6.0),
    "master": lambda: make_8bit(has_fp16_weights=True),
    "master-outliers": lambda: make_8bit(has_fp16_weights=True, threshold=6.0),
}


def step(layer, dtype, inside, autocast):
    """[output, gradients of input, bias and a trained weight]; inside: where the backward runs."""
    x = inputs(3, 5, 96, dtype=dtype, outliers=True).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        y = layer(x)
        if inside:
            y.square().sum().backward()
    if not inside:
        y.square().sum().backward()
    return [y.detach(), x.grad, layer.bias.grad, *([layer.weight.grad] if layer.weight.requires_grad else [])]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_what_they_are_without(name, dtype, autocast, inside):
    got = step(LAYERS[name](), dtype, inside, autocast)
    want = step(LAYERS[name](), dtype, False, None)
    assert got[0].dtype == got[1].dtype == dtype
    for one, two in zip(got, want, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_and_foreign_weights(dtype, autocast):
    """matmul, matmul_4bit, a weight quantised as [in, out], float parameters in the weight's place, embeddings."""
    x, w = inputs(4, 96, dtype=dtype), inputs(40, 96, seed=1)
    packed, state = F.quantize_4bit(w, quant_type="nf4")
    turned, turned_state = F.quantize_4bit(w.t().contiguous(), quant_type="nf4")
    tied4, tied8 = make_4bit(), make_8bit()
    tied4.weight = tied8.weight = nn.Parameter(w.clone())
    with torch.autocast("cpu", dtype=autocast):
        result = bnb.matmul_4bit(x, packed.t(), state)
        assert result.dtype == dtype
        assert torch.equal(bnb.matmul_4bit(x, packed.t(), state, out=torch.empty_like(result)), result)
        product = bnb.matmul(x, w)
        assert product.dtype == dtype
        with pytest.warns(DeprecationWarning, match="Re-quantize"):
            assert bnb.matmul_4bit(x, turned, turned_state).dtype == dtype
        for layer in (tied4, tied8):
            assert layer(x).dtype == dtype
        for cls in (EmbeddingNF4, Embedding8bit):
            assert cls(8, 64, dtype=dtype).to("cpu")(torch.tensor([1])).dtype == dtype
    assert torch.equal(result, bnb.matmul_4bit(x, packed.t(), state))
    assert torch.equal(product, bnb.matmul(x, w))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "int8-outliers", "master"])
def test_between_layers_that_autocast(name, autocast):
    """The input of a quantised layer is then of 16 bits, and gradients reach the layer before it."""
    torch.manual_seed(0)
    first, last, middle = nn.Linear(24, 96), nn.Linear(40, 8), LAYERS[name]()
    seen = []
    middle.register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    x = inputs(6, 24)
    with torch.autocast("cpu", dtype=autocast):
        y = last(middle(first(x)))
    assert seen == [(autocast, autocast)]
    y.float().square().mean().backward()
    got = [first.weight.grad.clone(), last.weight.grad.clone(), y.detach().float()]
    first.zero_grad()
    last.zero_grad()
    y = last(middle(first(x)))
    y.square().mean().backward()
    for one, two in zip(got, [first.weight.grad, last.weight.grad, y.detach()], strict=True):
        # 8 bits of significand, three roundings in a row; int8 activations differ by one step where they round apart
        assert (one - two).norm() <= 0.03 * two.norm()


# ---------------------------------------------------------------- LLM.int8() without a detour through float16


def exact(layer, x):
    """The definition, in double precision: rows of x as int8 codes, outliers apart."""
    w = layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127
    x = x.double()
    outlier = x.abs() >= layer.state.threshold if layer.state.threshold else torch.zeros_like(x, dtype=torch.bool)
    regular = x.masked_fill(outlier.any(0), 0)
    scale = x.masked_fill(outlier, 0).abs().amax(1, keepdim=True)
    codes = torch.where(scale > 0, regular * (127 / scale), 0).round()
    return codes * scale / 127 @ w.t() + x.masked_fill(~outlier.any(0), 0) @ w.t() + layer.bias.double()


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-20, 2.0**20, 2.0**100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_outside_the_range_of_float16(dtype, scale):
    """Neither infinite nor zero; a power of two only moves the result."""
    layer = make_8bit(bias=False)
    x = inputs(5, 96, dtype=dtype)
    y = layer(x * scale)
    assert y.dtype == dtype
    assert torch.equal(y, layer(x) * scale)
    assert y.isfinite().all() and (y != 0).all()
    x = (x * scale).requires_grad_()
    grad = inputs(5, 40, dtype=dtype)
    layer(x).backward(grad * scale)
    want = grad.double() @ (layer.weight.CB.double() * layer.weight.SCB.double()[:, None] / 127) * scale
    assert (x.grad.double() - want).norm() <= want.norm() * 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_outliers_outside_the_range_of_float16(threshold):
    layer = make_8bit(threshold=threshold)
    x = inputs(5, 96, dtype=torch.bfloat16)
    x[:, 17] *= 1e30
    y = layer(x)
    assert y.isfinite().all()
    want = exact(layer, x)
    assert ((y.double() - want).abs() <= want.abs() * 2 * torch.finfo(torch.bfloat16).eps).all()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_float32_has_the_accuracy_of_float32(threshold):
    layer = make_8bit(k=512, n=33, threshold=threshold)
    x = inputs(7, 512, outliers=True)
    y, want = layer(x).double(), exact(layer, x)
    error = (y - want).abs().max() / want.abs().max()
    assert error < 2e-6
    assert (y.half().double() - want).abs().max() / want.abs().max() > 10 * error, "what float16 would leave"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_weight_gradients_of_any_rank_and_layout(dtype, threshold):
    """Against the product in double precision; inputs transposed, strided, expanded, of no token, of one dimension."""
    layer = make_8bit(has_fp16_weights=True, threshold=threshold)
    views = [
        inputs(96, 5, dtype=dtype).t(),
        inputs(4, 7, 192, dtype=dtype)[:, ::2, ::2],
        inputs(1, 96, dtype=dtype).expand(3, 2, 2, 96),
        inputs(96, dtype=dtype),
        inputs(2, 0, 96, dtype=dtype),
    ]
    for view in views:
        layer.zero_grad()
        x = view.detach().requires_grad_()
        y = layer(x)
        assert y.shape == (*x.shape[:-1], 40)
        grad = inputs(*y.shape, dtype=dtype, seed=9)
        y.backward(grad)
        want = grad.double().reshape(-1, 40).t() @ x.detach().double().reshape(-1, 96)
        assert layer.weight.grad.dtype == torch.float32
        assert (layer.weight.grad.double() - want).norm() <= want.norm() * 4 * torch.finfo(dtype).eps
        assert torch.equal(layer(x.detach().contiguous()), y.detach())


def test_zero_rows_and_zero_tokens():
    for layer in (make_8bit(threshold=6.0), make_4bit()):
        assert isinstance(layer, (Linear8bitLt, Linear4bit))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(torch.zeros(0, 96)).shape == (0, 40)
            assert torch.equal(layer(torch.zeros(2, 96)), layer.bias.detach().expand(2, 40))
