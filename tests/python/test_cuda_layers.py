"""Linear4bit and Linear8bitLt on CUDA against float64: values, gradients, streams, graphs, and no synchronisation."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F
import cuda_cases
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from cuda_cases import check_same, f32_slack, host, needs_cuda, on_device
from gemm_cases import OPS, normal
from test_gemm_ops import DTYPES, close, int8_reference, product

pytestmark = needs_cuda

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
HELD = 200_000_000  # clock cycles for which a stream is held up
LAYERS = ["4bit", "4bit nested", "8bit", "8bit outliers"]
every_layer = pytest.mark.parametrize("kind", LAYERS)
N, K = 72, 136


def layer_of(kind, dtype=torch.float16, bias=True, n=N, k=K):
    """On the device, quantised there; few of its outputs are alike."""
    torch.manual_seed(7)
    if kind.startswith("4bit"):
        nested = "nested" in kind
        layer = Linear4bit(k, n, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type="nf4")
    else:
        threshold = 6.0 if "outliers" in kind else 0.0
        layer = Linear8bitLt(k, n, bias=bias, has_fp16_weights=False, threshold=threshold)
    with torch.no_grad():
        layer.weight.data.mul_(3)
    return layer.to(dtype).to(cuda_cases.DEVICE)


def inputs(kind, seed, *lead, dtype=torch.float16, k=K):
    """On the device; with outliers, in columns that depend on the seed."""
    x = normal(*lead, k, dtype=dtype, seed=seed)
    if "outliers" in kind:
        x[..., torch.randperm(k, generator=torch.Generator().manual_seed(seed))[: seed % 5]] = 8.0 + seed
    return on_device(x)


def reference(layer, x):
    """Output and magnitudes in float64 from what the layer holds, on the CPU; and its weight."""
    bias = host(layer.bias)
    bias = None if bias is None else bias.detach().to(x.dtype if isinstance(layer, Linear4bit) else bias.dtype)
    if isinstance(layer, Linear8bitLt):
        codes, scales = layer.state.CB.cpu(), layer.state.SCB.cpu()
        expected = int8_reference(x.detach().cpu(), codes, scales, bias, layer.state.threshold)
        return *expected, codes.double() * scales.double()[:, None] / 127
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    weight = F.dequantize_4bit(layer.weight.data, state).cpu().double()
    expected, magnitude = product(x.detach().cpu(), weight)
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    return expected, magnitude, weight


@every_layer
@every_dtype
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (3, 40), (0,)], ids=str)
def test_layer(kind, dtype, lead):
    layer = layer_of(kind, dtype)
    x = inputs(kind, 4, *lead, dtype=dtype).requires_grad_()
    y = layer(x)
    expected, magnitude, weight = reference(layer, x)
    assert y.dtype == dtype and y.device.type == cuda_cases.DEVICE.type
    close(y.detach().cpu(), expected, magnitude, f32_slack(K))
    with torch.no_grad():
        check_same(layer(x), y, "without autograd")
    if "outliers" in kind and x.numel() > 0:
        assert layer.state.idx.tolist() == (x.detach().reshape(-1, K).abs() >= 6).any(0).nonzero()[:, 0].tolist()
        assert len(layer.state.idx) > 0
    grad = normal(*lead, N, dtype=dtype, seed=11)
    y.backward(on_device(grad))
    close(x.grad.cpu(), *product(grad, weight.t()), f32_slack(N + 3))
    want = grad.reshape(-1, N).double().sum(0)
    close(layer.bias.grad.cpu(), want, grad.reshape(-1, N).double().abs().sum(0), 1e-5)


def test_a_trained_int8_layer_quantises_again():
    layer = Linear8bitLt(K, N, has_fp16_weights=True, threshold=6.0).to(cuda_cases.DEVICE)
    x = inputs("outliers", 4, 6, dtype=torch.float32).requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (N, K) and torch.isfinite(layer.weight.grad).all()
    with torch.no_grad():
        before = layer(x)
        layer.weight.mul_(2)
        close(layer(x).cpu(), 2 * before.double().cpu() - layer.bias.double().cpu(), before.double().abs().cpu(), 1e-2)


def returns_early(run):
    """Does run() come back while the stream, held up before it, still is?"""
    torch.cuda.synchronize()
    torch.cuda._sleep(HELD)
    released = torch.cuda.Event()
    released.record()
    run()
    early = not released.query()
    torch.cuda.synchronize()
    return early


@every_layer
@pytest.mark.parametrize("rows", [1, 40])
def test_layers_do_not_synchronise(kind, rows):
    layer, x = layer_of(kind), inputs(kind, 4, rows).requires_grad_()
    grad = torch.ones(rows, N, dtype=x.dtype, device=x.device)

    def step():
        layer(x).backward(grad)
        with torch.no_grad():
            layer(x)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert returns_early(step), "the host waited for the device"


@every_layer
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_layers_in_a_graph(kind, rows):
    """Captured once, replayed with other inputs, whose outliers lie elsewhere or are none."""
    layer, x = layer_of(kind), inputs(kind, 4, rows).requires_grad_()
    grad = on_device(normal(rows, N, dtype=x.dtype, seed=12))

    def forward():
        y = layer(x)
        return y, torch.autograd.grad(y, x, grad)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward()
    flags = layer.state.outlier_flags if "outliers" in kind else None
    for seed in (4, 8, 5, 21):
        with torch.no_grad():
            x.copy_(inputs(kind, seed, rows))
        graph.replay()
        got = [t.detach().clone() for t in captured]
        for a, b in zip(got, forward(), strict=True):
            check_same(a, b, seed)
        if flags is not None:
            check_same(OPS._int8_outlier_columns(flags), layer.state.idx, seed)


@every_layer
def test_layers_on_another_stream(kind):
    layer, x = layer_of(kind), inputs(kind, 4, 40)
    with torch.no_grad():
        expected = layer(x)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(HELD // 10)
            late = x.clone()
            got = layer(late)
        side.synchronize()
    check_same(got, expected)


def test_a_model_moved_to_the_cpu_gives_what_the_device_gave():
    torch.manual_seed(3)
    model = nn.Sequential(
        Linear8bitLt(K, N, has_fp16_weights=False, threshold=6.0),
        nn.ReLU(),
        Linear4bit(N, 32, compute_dtype=torch.float32, quant_type="nf4"),
    ).to(cuda_cases.DEVICE)
    x = inputs("outliers", 4, 10, dtype=torch.float32).cpu()
    with torch.no_grad():
        got = model(on_device(x))
        expected = model.to("cpu")(x)
    np.testing.assert_allclose(got.cpu().numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
    assert isinstance(model[0].state, bnb.MatmulLtState)
