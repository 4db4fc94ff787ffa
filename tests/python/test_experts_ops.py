"""Products of all experts in one call: against float64, on the CPU and on CUDA; blocks that cross experts; refusals."""

import itertools

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes import _ops
from bitsandbytes.autograd._functions import experts_matmul_4bit
from gemm_cases import OPS, normal
from test_gemm_ops import DTYPES, UNIT, close, every_dtype, product

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])

# experts, n, k, block: rows of whole vectors; odd ones, so that blocks and bytes cross experts; one row, one column
SHAPES = [(4, 64, 128, 64), (3, 5, 7, 32), (3, 33, 67, 64), (5, 48, 96, 4096), (2, 1, 64, 32), (2, 64, 1, 64)]
COUNTS = [[0, 0], [1, 0, 3], [0, 5, 1, 70], [2, 2, 0, 0, 9]]


def weight(experts, n, k, block, nested=False, kind="nf4"):
    """(packed, state of [experts, n, k], float64 [experts, n, k]) on the CPU."""
    w = torch.randn(experts, n, k, generator=torch.Generator().manual_seed(n + k))
    packed, state = F.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=nested)
    return packed, state, F.dequantize_4bit(packed, state).double()


def first_of(counts, experts):
    """int64 [experts + 1] from the rows of the first experts."""
    counts = (counts + [4] * experts)[:experts]
    return torch.tensor([0, *counts]).cumsum(0)


def reference(x, w, first, bias=None):
    """x W_e^T + bias_e and the sum of magnitudes, in float64."""
    parts = [product(x[a:b], w[e]) for e, (a, b) in enumerate(itertools.pairwise(first))]
    if bias is not None:
        parts = [(y + b.double(), m + b.double().abs()) for (y, m), b in zip(parts, bias, strict=True)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def moved(values, device):
    return tuple(v.to(device) if isinstance(v, torch.Tensor) else v for v in values)


@every_device
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_both_ways(device, dtype, shape, nested):
    experts, n, k, block = shape
    packed, state, w = weight(*shape, nested, ("nf4", "fp4")[n % 2])
    arguments = moved((packed, *F.weight_arguments("test", state, 3)), device)
    # 16-bit products may round weights to the dtype (CUDA), or multiply in 16-bit integers (the CPU).
    slack = (n + k) * 2.0**-24 + (0 if dtype == torch.float32 else UNIT[dtype] + 2e-4)
    for counts in COUNTS:
        first = first_of(counts, experts)
        rows = int(first[-1])
        x, grad, bias = normal(rows, k, dtype=dtype), normal(rows, n, dtype=dtype), normal(experts, n, dtype=dtype)
        there = first.to(device)
        for b in (None, bias):
            got = OPS._experts_4bit(x.to(device), *arguments, there, None if b is None else b.to(device))
            close(got.cpu(), *reference(x, w, first, b), slack)
        got = OPS._experts_4bit_grad(grad.to(device), *arguments, there)
        close(got.cpu(), *reference(grad, w.transpose(1, 2), first), slack)


@every_device
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient(device, transposed):
    packed, state, w = weight(3, 24, 40, 32)
    state.to(device)
    first = first_of([3, 0, 5], 3)
    x = normal(8, 24 if transposed else 40).to(device).requires_grad_()
    w = w.transpose(1, 2) if transposed else w
    y = experts_matmul_4bit(x, packed.to(device), state, first.to(device), transposed)
    close(y.detach().cpu(), *reference(x.detach().cpu(), w, first), 1e-5)
    grad = normal(*y.shape, seed=8)
    y.backward(grad.to(device))
    close(x.grad.cpu(), *reference(grad, w.transpose(1, 2), first), 1e-5)


def test_rows_of_no_expert_are_not_read():
    packed, state, w = weight(2, 5, 7, 32)
    x = normal(9, 7)
    x[6:] = float("nan")
    first = torch.tensor([0, 2, 6])
    got = OPS._experts_4bit(x, packed, *F.weight_arguments("test", state, 3), first, None)
    close(got[:6], *reference(x[:6], w, first), 1e-5)


@pytest.mark.parametrize(
    "first, words",
    [
        (torch.tensor([0, 3, 2]), "first[2] is 2"),
        (torch.tensor([0, 3, 9]), "first[2] is 9"),
        (torch.tensor([-1, 3, 8]), "first[0] is -1"),
        (torch.tensor([0]), "first has 1 elements"),
        (torch.tensor([0, 3, 8], dtype=torch.int32), "first has dtype int32"),
        (torch.tensor([0, 3, 5, 8]), "weight"),
    ],
    ids=str,
)
def test_refusal(first, words):
    packed, state, _ = weight(2, 5, 7, 32)
    with pytest.raises(ValueError) as caught:
        _ops.call(
            *(OPS._experts_4bit.default, normal(8, 7), packed, *F.weight_arguments("test", state, 3), first, None)
        )
    assert words in str(caught.value)


def test_the_state_must_have_three_dimensions():
    packed, state, _ = weight(2, 5, 7, 32)
    state.shape = torch.Size([10, 7])
    with pytest.raises(ValueError, match="expected 3 dimensions"):
        experts_matmul_4bit(normal(8, 7), packed, state, torch.tensor([0, 3, 8]))


def test_every_dtype_is_tested():
    assert set(DTYPES) == set(UNIT)
