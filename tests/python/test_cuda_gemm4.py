"""4-bit products on CUDA, kernel by kernel: against float64 and cuBLAS, repeated, cut in every way, in graphs.

BNB_GEMM4 asks for a kernel, and bnb_gemm4_plan() tells that it was taken; what a card cannot do is skipped.
"""

import ctypes
import functools
import os

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from cuda_cases import check_same, needs_cuda
from gemm_cases import OPS
from test_gemm_ops import UNIT, close

os.environ.setdefault("BNB_GEMM4", "")  # before the first product: from then on it is read at each

pytestmark = needs_cuda
DEVICE = "cuda"
HALF = [torch.float16, torch.bfloat16]
every_half = pytest.mark.parametrize("dtype", HALF, ids=["f16", "bf16"])

# kernel: rows of activations
FORWARD = {
    "few8": [1, 2, 3, 5, 8],
    "few16": [1, 9, 13, 16],
    "few32": [4, 17, 27, 32],
    "few64": [7, 33, 50, 64],
    "wide32": [1, 20, 32, 33, 70],
    "wide64": [1, 33, 64, 65, 130],
    "wide128": [1, 64, 128, 129, 300],
    "wide256": [1, 129, 256, 257, 700],
    "meet128": [1, 64, 128, 129, 300],
    "meet256": [1, 129, 256, 257, 700],
    "tile": [1, 64, 128, 129, 300],
    "plain": [1, 4, 9, 70],
}
GRAD = {"grad128": [1, 64, 128, 129, 300], "grad256": [1, 200, 256, 257], "tile": [1, 100, 128, 129], "plain": [1, 70]}
# n, k, block of the weight: all of a tile, parts of one, rows that begin in mid-block, one step and many
WEIGHTS = [(256, 256, 64), (33, 64, 128), (520, 1088, 64), (17, 4096, 4096), (300, 320, 32), (1000, 192, 512)]
GRAD_WEIGHTS = [(256, 256, 64), (8, 32, 32), (1096, 520 - 8, 64), (72, 4096, 4096), (320, 96, 64), (200, 1120, 256)]


def plan():
    function = bnb.cextension.lib.bnb_gemm4_plan
    function.restype = ctypes.c_char_p
    return function().decode()


class Weight:
    """A random weight on the device, quantised on the CPU; w: what the codes stand for, in float64."""

    def __init__(self, *shape, block=64, kind="nf4", nested=False, seed=0):
        generator = torch.Generator().manual_seed(seed + sum(shape))
        # Scales that differ by orders of magnitude: a block that takes its neighbour's is far off.
        w = torch.randn(*shape, generator=generator) * torch.rand(*shape[:-1], 1, generator=generator).add(0.1) * 0.1
        packed, state = F.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=nested)
        self.w = F.dequantize_4bit(packed, state).double().to(DEVICE)
        self.packed = packed.to(DEVICE)
        state.to(DEVICE)
        self.state = state
        self.arguments = self.packed, *F.weight_arguments("test", state, len(shape))

    def forward(self, x, bias=None, exact=False):
        return OPS._linear_4bit(x, *self.arguments, bias, exact)

    def grad(self, x):
        return OPS._linear_4bit_grad(x, *self.arguments)


def normal(*shape, dtype, seed=1):
    generator = torch.Generator(device=DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)


def reference(x, w, bias=None):
    """x w^T + bias and the sum of the magnitudes, in float64."""
    y, magnitude = x.double() @ w.t(), x.double().abs() @ w.abs().t()
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return y, magnitude


def slack(dtype, terms):
    """Sums in f32; weights rounded to the dtype, from a table of f16."""
    return (terms + 3) * 2.0**-24 + UNIT[dtype] + 2.0**-11


@pytest.fixture
def ask(monkeypatch):
    """ask(kernel, splits, bands, depth): what the next products are to take."""
    return lambda *wish: monkeypatch.setenv("BNB_GEMM4", ",".join(map(str, wish)))


def took(kernel):
    """The last product took the kernel, or the test cannot be on this card."""
    if not plan().startswith(f"{kernel} "):
        pytest.skip(f"{kernel} cannot take this here: {plan()}")


# ---------------------------------------------------------------- each kernel


@every_half
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
@pytest.mark.parametrize("kernel", FORWARD)
def test_forward(ask, kernel, dtype, shape):
    n, k, block = shape
    ask(kernel)
    for i, m in enumerate(FORWARD[kernel]):
        weight = Weight(n, k, block=block, kind=("nf4", "fp4")[i % 2], nested=i % 3 != 0)
        x, bias = normal(m, k, dtype=dtype), normal(n, dtype=dtype) if i % 2 == 0 else None
        got = weight.forward(x, bias)
        took(kernel)
        close(got, *reference(x, weight.w, bias), slack(dtype, k))
        check_same(weight.forward(x, bias), got, "the same call")


@every_half
@pytest.mark.parametrize("shape", GRAD_WEIGHTS, ids=str)
@pytest.mark.parametrize("kernel", GRAD)
def test_grad(ask, kernel, dtype, shape):
    n, k, block = shape
    ask(kernel)
    for i, m in enumerate(GRAD[kernel]):
        weight = Weight(n, k, block=block, kind=("fp4", "nf4")[i % 2], nested=i % 3 != 0)
        x = normal(m, n, dtype=dtype)
        got = weight.grad(x)
        took(kernel)
        close(got, *reference(x, weight.w.t()), slack(dtype, n))
        check_same(weight.grad(x), got, "the same call")


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("kernel", [*FORWARD, "grad128", "grad256"])
def test_blocks(ask, kernel, block):
    """Of every size, in rows that are no multiple of them; plain and nested scales, both types."""
    ask(kernel)
    grad = kernel.startswith("grad")
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            weight = Weight(72, 448, block=block, kind=kind, nested=nested)
            x = normal(6, 72 if grad else 448, dtype=torch.bfloat16)
            got = weight.grad(x) if grad else weight.forward(x)
            took(kernel)
            close(got, *reference(x, weight.w.t() if grad else weight.w), slack(torch.bfloat16, 448))


@pytest.mark.parametrize("bands", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("splits", [0, 1, 2, 5])
@pytest.mark.parametrize("kernel", [name for name in [*FORWARD, *GRAD] if name[0] in "fwmg"])
def test_cuts(ask, kernel, splits, bands):
    """The same numbers, within rounding, however the work is cut; and the same bits for the same cut."""
    if bands > 0 and not kernel.startswith("few"):
        pytest.skip("bands are those of few rows")
    grad = kernel.startswith("grad")
    weight = Weight(328, 1600, nested=True)
    x = normal({**FORWARD, **GRAD}[kernel][-1], 328 if grad else 1600, dtype=torch.bfloat16)
    bias = None if grad else normal(328, dtype=torch.bfloat16)
    run = (lambda: weight.grad(x)) if grad else (lambda: weight.forward(x, bias))
    for depth in (0, 2, 3):
        ask(kernel, splits, bands, depth)
        got = run()
        took(kernel)
        assert splits == 0 or not kernel.startswith("wide") or f" splits {splits} " in plan(), plan()
        close(got, *reference(x, weight.w.t() if grad else weight.w, bias), slack(torch.bfloat16, 1600))
        check_same(run(), got)


# ---------------------------------------------------------------- whatever is chosen

ANY = [(1, 1, 32), (1, 64, 32), (64, 1, 32), (3, 129, 64), (67, 65, 64), (67, 96, 64), (129, 160, 4096), (64, 4100, 64)]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=["f16", "bf16", "f32"])
@pytest.mark.parametrize("shape", ANY, ids=str)
def test_any_shape(dtype, shape):
    n, k, block = shape
    weight = Weight(n, k, block=block, nested=n % 2 == 0)
    bound = slack(dtype, n + k) if dtype != torch.float32 else (n + k + 3) * 2.0**-24
    for m in (1, 2, 7, 16, 40, 64, 65, 200):
        x, grad, bias = normal(m, k, dtype=dtype), normal(m, n, dtype=dtype), normal(n, dtype=dtype)
        close(weight.forward(x, bias), *reference(x, weight.w, bias), bound)
        close(weight.grad(grad), *reference(grad, weight.w.t()), bound)
        close(weight.forward(x, exact=True), *reference(x, weight.w), (k + 3) * 2.0**-24)


@every_half
def test_no_rows_and_many(dtype):
    weight = Weight(64, 128)
    for lead in [(0,), (2, 0), (3, 0, 4)]:
        assert weight.forward(normal(*lead, 128, dtype=dtype)).shape == (*lead, 64)
        assert weight.grad(normal(*lead, 64, dtype=dtype)).shape == (*lead, 128)
    x = normal(100_000, 128, dtype=dtype)
    got, (expected, magnitude) = weight.forward(x), reference(x, weight.w)
    close(got, expected, magnitude, slack(dtype, 128))
    close(weight.grad(got), *reference(got, weight.w.t()), slack(dtype, 64))
    check_same(weight.forward(x.view(50, 2, 1000, 128)), got.view(50, 2, 1000, 64))


@functools.lru_cache(maxsize=2)
def large_weight(n, k, kind):
    return Weight(n, k, kind=kind, nested=True)


@pytest.mark.parametrize("m", [1, 8, 16, 32, 64, 128, 256, 1024])
@every_half
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (14336, 1024)], ids=str)
def test_no_worse_than_cublas(dtype, shape, m):
    """The error of a product with the weight that dequantising gives, rounded to the dtype as cuBLAS needs it."""
    n, k = shape
    bound = 1.15 if m <= 8 else 1.05  # few results: their rounding does not average out
    for kind in ("nf4", "fp4"):
        weight = large_weight(n, k, kind)
        rounded = weight.w.to(dtype)
        for grad in (False, True):
            x = normal(m, n if grad else k, dtype=dtype)
            expected = x.double() @ (weight.w if grad else weight.w.t())
            theirs = (x @ (rounded if grad else rounded.t())).double() - expected
            got = weight.grad(x) if grad else weight.forward(x)
            assert (got.double() - expected).norm() <= bound * theirs.norm(), (kind, grad, plan())


@pytest.mark.parametrize("m", [1, 5, 24, 100])
def test_operands_of_any_form(m):
    weight = Weight(96, 256)
    x = normal(m, 256, dtype=torch.bfloat16)
    expected = weight.forward(x)
    wide = torch.empty(m, 512, dtype=x.dtype, device=DEVICE)
    wide[:, ::2] = x
    for form in (wide[:, ::2], x.t().contiguous().t(), torch.cat([x, x], 1)[:, 256:], x.view(1, m, 256)):
        check_same(weight.forward(form).view(m, 96), expected)
    check_same(weight.forward(x[:1].expand(m, 256)), weight.forward(x[:1].repeat(m, 1)))
    absmax = weight.arguments[1:]
    flat = weight.packed.flatten()
    for packed in (weight.packed.t(), flat.view(torch.bfloat16), flat.view(torch.float32).view(1, -1)):
        check_same(OPS._linear_4bit(x, packed, *absmax, None, False), expected)
    room = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
    room.copy_(flat)
    got = OPS._linear_4bit(x, room, *absmax, None, False)  # codes at an odd address
    close(got, *reference(x, weight.w), slack(x.dtype, 256))


@pytest.mark.parametrize("m", [1, 12, 50, 300])
def test_slices_of_a_sharded_weight(m):
    """Rows a to b of a weight, as inference engines cut it: views of the codes and of the scales."""
    weight = Weight(192, 256)
    x = normal(m, 256, dtype=torch.bfloat16)
    for a, b in [(0, 64), (64, 192), (31, 33), (190, 192)]:
        packed = weight.packed[a * 128 : b * 128]
        absmax = weight.state.absmax[a * 4 : b * 4]
        got = OPS._linear_4bit(x, packed, absmax, None, None, None, 0, 64, "nf4", b - a, 256, None, False)
        close(got, *reference(x, weight.w[a:b]), slack(x.dtype, 256))


@pytest.mark.parametrize("kernel", [*FORWARD, "grad128", "grad256"])
def test_what_is_not_finite_stays_where_it_is(ask, kernel):
    """NaN and infinity in a token or in the scale of one block: in no other row and column of the result."""
    ask(kernel)
    grad = kernel.startswith("grad")
    for n, k, block in [(72, 448, 64), (200, 96, 32), (64, 4096, 128)]:
        weight = Weight(n, k, block=block)
        x = normal(6, n if grad else k, dtype=torch.bfloat16)
        run = weight.grad if grad else weight.forward
        clean = run(x)
        for bad in (float("nan"), float("inf")):
            dirty = x.clone()
            dirty[4, -1] = bad
            got = run(dirty)
            check_same(got[[0, 1, 2, 3, 5]], clean[[0, 1, 2, 3, 5]], (kernel, n))
            assert not torch.isfinite(got[4]).any()
            for at in (0, n * k // block - 1):  # the first block and the last
                keep = weight.state.absmax[at].item()
                weight.state.absmax[at] = bad
                got = run(x)
                weight.state.absmax[at] = keep
                first, last = at * block, (at + 1) * block - 1
                rows = range(first // k, last // k + 1)
                if not grad:
                    touched = torch.isin(torch.arange(n), torch.tensor(list(rows))).to(DEVICE)
                elif len(rows) > 1:
                    touched = torch.ones(k, dtype=torch.bool, device=DEVICE)
                else:
                    columns = torch.arange(k, device=DEVICE)
                    touched = (columns >= first % k) & (columns <= last % k)
                check_same(got[:, ~touched], clean[:, ~touched], (kernel, n, at))
                assert not torch.isfinite(got[:, touched]).all()


# ---------------------------------------------------------------- streams and graphs


@pytest.mark.parametrize("kernel", [*FORWARD, "grad128", "grad256"])
def test_in_a_graph(ask, kernel):
    ask(kernel)
    grad = kernel.startswith("grad")
    weight = Weight(520, 1088, nested=True)
    x = normal(8, 520 if grad else 1088, dtype=torch.bfloat16)
    run = weight.grad if grad else weight.forward
    for splits in (0, 2):
        ask(kernel, splits)
        run(x)
        took(kernel)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(x)
        for seed in (5, 6, 7):
            x.copy_(normal(*x.shape, dtype=x.dtype, seed=seed))
            graph.replay()
            check_same(captured.clone(), run(x), seed)


@pytest.mark.parametrize("m", [1, 16, 64, 400])
def test_on_another_stream(m):
    weight = Weight(520, 1088)
    x = normal(m, 1088, dtype=torch.bfloat16)
    expected = weight.forward(x), weight.grad(weight.forward(x))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late = x.clone()
        got = weight.forward(late), weight.grad(weight.forward(late))
    side.synchronize()
    for a, b in zip(got, expected, strict=True):
        check_same(a, b)


def test_many_streams_at_once():
    """Each with workspace of its own: none gets another's sums."""
    weight = Weight(256, 4096)
    xs = [normal(40, 4096, dtype=torch.bfloat16, seed=i) for i in range(8)]
    expected = [weight.forward(x) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    got = []
    for _ in range(5):
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                got.append(weight.forward(x))
    torch.cuda.synchronize()
    for i, y in enumerate(got):
        check_same(y, expected[i % 8], i)


def test_on_the_second_card():
    if torch.cuda.device_count() < 2:
        pytest.skip("one card")
    weight = Weight(256, 512)
    x = normal(9, 512, dtype=torch.bfloat16)
    expected = weight.forward(x)
    there = [a.to("cuda:1") if isinstance(a, torch.Tensor) else a for a in weight.arguments]
    check_same(OPS._linear_4bit(x.to("cuda:1"), *there, None, False).cpu(), expected.cpu())
