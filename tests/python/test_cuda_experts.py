"""Experts in one launch on CUDA, kernel by kernel: token counts that live on the device, and change between replays."""

import pytest
import torch

from bitsandbytes.autograd._functions import experts_matmul_4bit
from cuda_cases import check_same, needs_cuda
from gemm_cases import OPS
from test_cuda_gemm4 import DEVICE, Weight, ask, every_half, normal, slack, took  # noqa: F401  (ask is a fixture)
from test_experts_ops import first_of, reference
from test_gemm_ops import close

pytestmark = needs_cuda

FORWARD = ["wide32", "wide64", "wide128", "wide256", "tile", "plain"]
GRAD = ["grad128", "grad256", "tile", "plain"]
SHAPES = [(4, 256, 256, 64), (3, 72, 320, 4096), (5, 520, 64, 64), (2, 40, 1088, 128)]
COUNTS = [[0, 0], [1, 1, 1, 1, 1], [0, 70, 1, 300], [33, 0, 129], [257, 256, 255]]


@every_half
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", FORWARD)
def test_forward(ask, kernel, dtype, shape):  # noqa: F811
    experts, n, k, block = shape
    ask(kernel)
    weight = Weight(experts, n, k, block=block, nested=n % 16 == 0)
    for i, counts in enumerate(COUNTS):
        first = first_of(counts, experts)
        x, bias = normal(int(first[-1]), k, dtype=dtype), normal(experts, n, dtype=dtype) if i % 2 else None
        got = OPS._experts_4bit(x, *weight.arguments, first.to(DEVICE), bias)
        took(kernel)
        close(got, *reference(x, weight.w, first, bias), slack(dtype, k))
        check_same(OPS._experts_4bit(x, *weight.arguments, first.to(DEVICE), bias), got, "the same call")


@every_half
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", GRAD)
def test_grad(ask, kernel, dtype, shape):  # noqa: F811
    experts, n, k, block = shape
    ask(kernel)
    weight = Weight(experts, n, k, block=block, nested=n % 16 == 0)
    for counts in COUNTS:
        first = first_of(counts, experts)
        grad = normal(int(first[-1]), n, dtype=dtype)
        got = OPS._experts_4bit_grad(grad, *weight.arguments, first.to(DEVICE))
        took(kernel)
        close(got, *reference(grad, weight.w.transpose(1, 2), first), slack(dtype, n))


@pytest.mark.parametrize("kernel", [*FORWARD, "grad128", "grad256"])
def test_counts_that_change_in_a_graph(ask, kernel):  # noqa: F811
    """Captured once; then other tokens, of other experts, and rows at the end that are nobody's."""
    ask(kernel)
    weight = Weight(6, 264, 320, nested=True)
    grad = kernel.startswith("grad")
    x = normal(500, 264 if grad else 320, dtype=torch.bfloat16)
    first = first_of([500], 6).clamp(max=500).to(DEVICE)

    def run():
        if grad:
            return OPS._experts_4bit_grad(x, *weight.arguments, first)
        return OPS._experts_4bit(x, *weight.arguments, first, None)

    run()
    took(kernel)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    w = weight.w.transpose(1, 2) if grad else weight.w
    for i, counts in enumerate(
        [[0, 0, 500, 0, 0, 0], [1, 2, 3, 4, 5, 6], [130, 0, 64, 200, 1, 100], [0, 0, 0, 0, 0, 7]]
    ):
        x.copy_(normal(*x.shape, dtype=x.dtype, seed=i))
        first.copy_(first_of(counts, 6))
        captured.fill_(7.0)
        graph.replay()
        rows = sum(counts)
        close(captured[:rows], *reference(x[:rows], w, first.cpu()), slack(x.dtype, 320))
        assert torch.all(captured[rows:] == 7.0), "rows of no expert were written"
        if rows > 0:
            check_same(captured[:rows].clone(), run()[:rows], counts)


def test_nothing_waits():
    weight = Weight(4, 64, 128)
    x = normal(20, 128, dtype=torch.bfloat16).requires_grad_()
    first = first_of([5, 5, 5, 5], 4).to(DEVICE)
    experts_matmul_4bit(x, weight.packed, weight.state, first).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = experts_matmul_4bit(x, weight.packed, weight.state, first)
        y.backward(torch.ones_like(y))
    finally:
        torch.cuda.set_sync_debug_mode("default")
