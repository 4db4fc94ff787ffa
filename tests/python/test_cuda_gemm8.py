"""int8 layers on CUDA: every kernel and plan, shapes at the edges of their tiles, outliers from none to all, graphs.

BNB_GEMM8 names a plan: "narrow TOKENS SPLIT", "wide TOKENS 1 SHARE GROUP", "mma", "plain".  A card that cannot run it
takes its own, so that all of this passes on any card.
"""

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.nn import Linear8bitLt
from cuda_cases import DEVICE, check_same, needs_cuda, values
from gemm_cases import OPS

pytestmark = needs_cuda

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # of the final rounding
SHORT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
PLANS = [
    "plain",
    "mma",
    *(f"narrow {tokens} {split}" for tokens in (8, 16, 32, 64, 128) for split in (1, 2, 4, 8)),
    *(f"wide {tokens} 1 {share} {group}" for tokens in (128, 256) for share in (1, 2) for group in (1, 5)),
]
# m, n, k: one tile and less, edges of tiles of 128 rows and of steps of 128 bytes, rows that are no multiple of 8.
SHAPES = [(1, 8, 1024), (8, 136, 1040), (17, 257, 2064), (130, 384, 1024), (300, 1000, 1168), (515, 130, 1296)]
every_plan = pytest.mark.parametrize("plan", [None, *PLANS], ids=lambda plan: (plan or "own").replace(" ", "_"))
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def planned(plan, monkeypatch):
    if plan is None:
        monkeypatch.delenv("BNB_GEMM8", raising=False)
    else:
        monkeypatch.setenv("BNB_GEMM8", plan)


def source(seed=0):
    return torch.Generator(device=DEVICE).manual_seed(seed)


def codes(*shape, seed=0):
    """Any int8, -128 too."""
    return torch.randint(-128, 128, shape, generator=source(seed), dtype=torch.int8, device=DEVICE)


def scales(n, seed=1):
    return torch.rand(n, generator=source(seed), device=DEVICE) + 0.5


def normal(*shape, dtype=torch.float32, seed=2):
    return torch.randn(*shape, generator=source(seed), device=DEVICE).to(dtype)


def with_outliers(x, columns, seed=3):
    """Some elements of so many columns are large."""
    k = x.shape[-1]
    chosen = torch.randperm(k, generator=source(seed), device=DEVICE)[:columns]
    large = normal(*x.shape[:-1], columns, seed=seed).mul_(10)
    large = large + large.sign() * 10
    some = torch.rand(large.shape, generator=source(seed), device=DEVICE) < 0.6
    some.reshape(-1, columns)[0] = True
    x[..., chosen] = torch.where(some, large.to(x.dtype), x[..., chosen])
    return x


def exact(a, b):
    """a b^T of int8 matrices; float64 holds every sum."""
    return (a.double() @ b.double().t()).to(torch.int64).to(torch.int32)


def reference(x, weight, scale, bias, threshold):
    """The definition in float64, from the quantiser's codes, and the sum of magnitudes."""
    rows = x.reshape(-1, x.shape[-1])
    quantised, stats, columns = OPS.int8_vectorwise_quant(rows, threshold)
    a, w = quantised.double() * stats.double()[:, None] / 127, weight.double() * scale.double()[:, None] / 127
    if columns is not None:
        a[:, columns] = rows[:, columns].double()
    expected, magnitude = a @ w.t(), a.abs() @ w.abs().t()
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    return expected, magnitude


def close(got, expected, magnitude, slack=2.0**-18):
    """Within one rounding to the dtype, and a little of the magnitudes.  The message says where the first one is."""
    assert got.shape == expected.shape
    excess = (got.double() - expected).abs() - UNIT[got.dtype] * expected.abs() - slack * magnitude - 2.0**-24
    wrong = (~(excess <= 0)).nonzero()
    if wrong.numel():
        at = tuple(wrong[0].tolist())
        text = (
            f"{len(wrong)} of {got.numel()} wrong, the first at {at}: {got[at].item()}, expected {expected[at].item()}"
        )
        raise AssertionError(text)


# ---------------------------------------------------------------- every plan


@every_plan
def test_sums_are_exact(plan, planned):
    for m, n, k in SHAPES:
        a, b = codes(m, k, seed=m), codes(n, k, seed=n)
        check_same(F.int8_linear_matmul(a, b), exact(a, b), (m, n, k))


@every_plan
@every_dtype
def test_scales_and_bias_round_once_each(plan, planned, dtype):
    """NUMERICS rule 34: sum * (row * (col / 16129)) + bias, with the bits of any other device."""
    for i, (m, n, k) in enumerate(SHAPES):
        a, b, rows, columns = codes(m, k), codes(n, k, seed=1), scales(m), scales(n, seed=4)
        bias = None if i % 3 == 2 else normal(n, dtype=DTYPES[i % 3]) * 100
        got = OPS.int8_scaled_mm(a, b, rows, columns, bias, dtype)
        # Tensor by tensor: by a number, PyTorch multiplies by its reciprocal on the card.
        expected = exact(a, b).float() * (rows[:, None] * (columns / torch.full_like(columns, 16129)))
        expected = expected if bias is None else expected + bias.float()
        check_same(got, expected.to(dtype), (m, n, k))


@every_plan
@every_dtype
@pytest.mark.parametrize("outliers", ["none", "few", "many", "all", "no threshold"])
def test_layers_product(plan, planned, dtype, outliers):
    threshold = {"no threshold": 0.0, "all": 1e-6}.get(outliers, 6.0)
    for i, (m, n, k) in enumerate(SHAPES):
        x = normal(m, k, dtype=dtype, seed=i)
        if outliers in ("few", "many"):
            x = with_outliers(x, 5 if outliers == "few" else 100)
        weight, scale = codes(n, k, seed=1), scales(n)
        bias = None if i % 3 == 2 else normal(n, dtype=DTYPES[i % 3]) * 100
        got, flags = OPS._linear_int8(x, weight, scale, bias, threshold)
        if threshold > 0:
            check_same(flags, (x.abs() >= threshold).any(0).to(torch.uint8), (m, n, k))
        assert outliers not in ("few", "many", "all") or flags.any()
        close(got, *reference(x, weight, scale, bias, threshold))
        check_same(OPS._linear_int8(x, weight, scale, bias, threshold)[0], got, "the same call")


@every_plan
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_counts_of_outlier_columns(plan, planned, dtype):
    """Around what is multiplied at a time, 16, and what is brought before the sum is done, 32 or 64."""
    m, n, k = 70, 200, 2064
    weight, scale = codes(n, k, seed=1), scales(n)
    for columns in (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 300):
        x = normal(m, k, dtype=dtype, seed=columns)
        x = with_outliers(x, columns, columns) if columns else x
        got, flags = OPS._linear_int8(x, weight, scale, None, 6.0)
        assert int(flags.sum()) == columns
        close(got, *reference(x, weight, scale, None, 6.0))
        check_same(OPS._linear_int8(x, weight, scale, None, 6.0)[0], got, columns)


@every_plan
def test_outliers_at_the_edges_of_steps(plan, planned):
    """The first and the last column of each block's part of the sum, and all of one step."""
    m, n, k = 9, 136, 2048
    weight, scale = codes(n, k, seed=1), scales(n)
    for columns in ([0, 127, 128, 255, 256, 1023, 1024, 2047], list(range(896, 1024)), list(range(1984, 2048))):
        x = normal(m, k, dtype=torch.bfloat16)
        x[:, columns] = normal(m, len(columns), dtype=torch.bfloat16, seed=4) + 20
        got, _ = OPS._linear_int8(x, weight, scale, None, 6.0)
        close(got, *reference(x, weight, scale, None, 6.0))


@every_plan
def test_a_list_of_columns(plan, planned):
    """The public operator takes the list that the quantiser gave."""
    for m, n, k in SHAPES:
        x, weight, scale = with_outliers(normal(m, k, dtype=torch.float16), 40), codes(n, k, seed=1), scales(n)
        quantised, stats, columns = F.int8_vectorwise_quant(x, 6.0)
        assert len(columns) > 16
        got, sub = OPS.int8_mixed_scaled_mm(x, quantised, weight, stats, scale, columns, None)
        close(got, *reference(x, weight, scale, None, 6.0))
        check_same(sub, x[:, columns])


@every_plan
@every_dtype
def test_infinities_and_nan_stay_in_their_rows(plan, planned, dtype):
    m, n, k = 20, 130, 1024
    weight, scale = codes(n, k, seed=1).clamp(1, 127), scales(n)
    x = normal(m, k, dtype=dtype)
    expected, _ = OPS._linear_int8(x, weight, scale, None, 6.0)
    x[3, 7], x[5, 900] = float("inf"), float("nan")
    got, flags = OPS._linear_int8(x, weight, scale, None, 6.0)
    assert flags[7] == 1 and flags.sum() == 1
    assert torch.isnan(got[5]).all() and torch.isposinf(got[3]).all()
    rest = [i for i in range(m) if i not in (3, 5)]
    close(got[rest], *reference(x[rest], weight, scale, None, 6.0), slack=2.0**-8)
    assert torch.isfinite(got[rest]).all() and torch.isfinite(expected).all()


# ---------------------------------------------------------------- the quantiser


@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("cols", [1, 63, 1024, 1025, 2048, 4096, 4100, 8192, 14336, 16384, 16400, 40000])
def test_quantiser_of_long_rows(dtype, threshold, cols):
    for rows in (1, 2, 9, 16, 17, 300):
        if rows * cols > 3_000_000:
            continue
        x = values(rows * cols, SHORT[dtype], seed=rows).view(rows, cols)
        expected = OPS.int8_vectorwise_quant(x, threshold)
        for got, want in zip(OPS.int8_vectorwise_quant(x.to(DEVICE), threshold), expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                check_same(got, want, (rows, cols))
        if threshold:
            flags = torch.zeros(cols, dtype=torch.uint8).index_fill_(0, expected[2], 1)
            weight = torch.ones(8, cols, dtype=torch.int8, device=DEVICE)
            _, got = OPS._linear_int8(x.to(DEVICE), weight, torch.ones(8, device=DEVICE), None, threshold)
            check_same(got, flags, (rows, cols))


@pytest.mark.large
@pytest.mark.parametrize("threshold", [0.0, 4.0])
def test_a_million_rows(threshold):
    x = normal(1_000_003, 64, dtype=torch.float16)
    got, stats, columns = F.int8_vectorwise_quant(x, threshold)
    outlier = x.abs() >= (threshold or float("inf"))
    largest = x.abs().masked_fill(outlier, 0).amax(1).float()
    check_same(stats, largest)
    expected = torch.round(x.float() * (torch.full_like(largest, 127) / largest)[:, None])
    if threshold:
        expected[:, outlier.any(0)] = 0
        check_same(columns, outlier.any(0).nonzero()[:, 0])
    check_same(got, expected.to(torch.int8))
    weight, scale = codes(24, 64), scales(24)
    out, _ = OPS._linear_int8(x, weight, scale, None, threshold)
    some = slice(0, None, 9973)
    close(out[some], *reference_rows(x, some, weight, scale, got, stats, columns))


def reference_rows(x, some, weight, scale, quantised, stats, columns):
    a, w = (
        quantised[some].double() * stats[some].double()[:, None] / 127,
        weight.double() * scale.double()[:, None] / 127,
    )
    if columns is not None:
        a[:, columns] = x[some][:, columns].double()
    return a @ w.t(), a.abs() @ w.abs().t()


# ---------------------------------------------------------------- any shape


@every_dtype
@pytest.mark.parametrize("k", [1, 15, 17, 100, 1000, 4104, 16392])
@pytest.mark.parametrize("n", [1, 7, 130])
def test_any_shape(dtype, n, k):
    for m in (1, 8, 9, 65, 200):
        for threshold, outliers in ((0.0, 0), (6.0, 0), (6.0, min(k, 20))):
            x = normal(m, k, dtype=dtype, seed=m)
            x = with_outliers(x, outliers) if outliers else x
            weight, scale, bias = codes(n, k, seed=1), scales(n), normal(n)
            got, _ = OPS._linear_int8(x, weight, scale, bias, threshold)
            close(got, *reference(x, weight, scale, bias, threshold))
        a = codes(m, k, seed=5)
        check_same(F.int8_linear_matmul(a, weight), exact(a, weight), (m, n, k))


@pytest.mark.parametrize("seed", range(8))
def test_random_shapes(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(most):
        return int(torch.randint(1, most, (1,), generator=draw))

    for _ in range(12):
        m, n, k, dtype = number(900), number(1500), 16 * number(300), DTYPES[number(4) - 1]
        outliers = number(60) if number(3) > 1 else 0
        x = normal(m, k, dtype=dtype, seed=seed)
        x = with_outliers(x, min(outliers, k), seed) if outliers else x
        weight, scale = codes(n, k, seed=seed), scales(n)
        got, _ = OPS._linear_int8(x, weight, scale, None, 6.0)
        close(got, *reference(x, weight, scale, None, 6.0))


@pytest.mark.parametrize("m", [1, 8, 32, 128, 512, 2048])
@pytest.mark.parametrize("n, k", [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)])
def test_shapes_of_models(m, n, k):
    for dtype, threshold, outliers in ((torch.float16, 0.0, 0), (torch.bfloat16, 6.0, k // 500)):
        x = normal(m, k, dtype=dtype)
        x = with_outliers(x, outliers) if outliers else x
        weight, scale, bias = codes(n, k, seed=1), scales(n), normal(n, dtype=dtype)
        got, _ = OPS._linear_int8(x, weight, scale, bias, threshold)
        rows = torch.randint(0, m, (min(m, 40),), generator=source(1), device=DEVICE)
        some = torch.cat([torch.arange(0, n, 97, device=DEVICE), torch.arange(n - 64, n, device=DEVICE)])
        quantised, stats, columns = OPS.int8_vectorwise_quant(x, threshold)
        expected = reference_rows(x, rows, weight[some], scale[some], quantised, stats, columns)
        bias = bias[some].double()
        close(got[rows][:, some], expected[0] + bias, expected[1] + bias.abs())


# ---------------------------------------------------------------- gradients


@every_dtype
@pytest.mark.parametrize(
    "m, n, k", [(1, 16, 32), (7, 130, 256), (64, 128, 128), (130, 264, 400), (300, 1000, 1168), (33, 70, 67)]
)
def test_gradient_of_the_input(dtype, m, n, k):
    grad, weight, scale = normal(m, n, dtype=dtype), codes(n, k, seed=1), scales(n)
    w = weight.double() * scale.double()[:, None] / 127
    got = OPS._linear_int8_grad(grad, weight, scale)
    expected, magnitude = grad.double() @ w, grad.double().abs() @ w.abs()
    # A 16-bit product may round the weight, as that of a 16-bit layer does.
    close(got, expected, magnitude, UNIT[dtype] if dtype != torch.float32 else n * 2.0**-23)
    check_same(OPS._linear_int8_grad(grad, weight, scale), got, "the same call")


@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [(3,), (2, 70)], ids=str)
def test_training(dtype, threshold, rows):
    torch.manual_seed(1)
    layer = Linear8bitLt(256, 136, has_fp16_weights=True, threshold=threshold).to(DEVICE, dtype)
    x = with_outliers(normal(*rows, 256, dtype=dtype), 4).requires_grad_()
    grad = normal(*rows, 136, dtype=dtype, seed=5)
    layer(x).backward(grad)
    g, a = grad.reshape(-1, 136).double(), x.detach().reshape(-1, 256).double()
    w = layer.state.CB.double() * layer.state.SCB.double()[:, None] / 127
    flat = x.grad.reshape(-1, 256)
    close(flat, g @ w, g.abs() @ w.abs(), max(UNIT[dtype], 2.0**-18))
    close(layer.weight.grad, g.t() @ a, g.abs().t() @ a.abs(), max(UNIT[dtype], 2.0**-12))
    close(layer.bias.grad, g.sum(0), g.abs().sum(0), max(UNIT[dtype], 2.0**-18))
    before = layer.state.CB.clone()
    with torch.no_grad():
        layer.weight.mul_(-1)
    layer(x)
    assert not torch.equal(layer.state.CB, before), "the weight was written and not quantised again"


# ---------------------------------------------------------------- layers: graphs, streams, waiting, accuracy


def layer_of(k, n, threshold, dtype=torch.float16, bias=True):
    torch.manual_seed(7)
    layer = Linear8bitLt(k, n, bias=bias, has_fp16_weights=False, threshold=threshold)
    return layer.to(dtype).to(DEVICE)


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 64, 130, 700])
@pytest.mark.parametrize("k", [256, 4096])
def test_graph_with_other_outliers(rows, k):
    """Captured with one set of outliers, replayed with others: none, few, more than a chunk, all."""
    layer, static = layer_of(k, 264, 6.0), torch.zeros(rows, k, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            layer(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(static)
        flags = layer.state.outlier_flags
        for seed, outliers in enumerate((3, 0, 40, k, 1, 0)):
            x = normal(rows, k, dtype=torch.float16, seed=seed)
            static.copy_(with_outliers(x, outliers, seed) if outliers else x)
            captured.fill_(float("nan"))
            graph.replay()
            got, marked = captured.clone(), flags.clone()
            check_same(got, layer(static), (rows, k, outliers))
            check_same(marked, (static.abs() >= 6).any(0).to(torch.uint8))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_nothing_waits(threshold, rows):
    layer = layer_of(512, 264, threshold)
    x = with_outliers(normal(rows, 512, dtype=torch.float16), 3).requires_grad_()
    grad = normal(rows, 264, dtype=torch.float16)

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
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    waits = [event.name for event in profile.events() if "ynchronize" in event.name]
    assert not waits


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_side_streams(threshold, rows):
    """Each call sees the input that its own stream has written before it, and nobody overtakes anybody."""
    layer = layer_of(2048, 520, threshold)
    inputs = [with_outliers(normal(rows, 2048, dtype=torch.float16, seed=i), 3, i) for i in range(6)]
    with torch.no_grad():
        expected = [layer(x) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(3)]
        found = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 3]):
                torch.cuda._sleep(1_000_000)
                late = x.clone()
                found.append(layer(late))
                late.fill_(float("nan"))
        torch.cuda.synchronize()
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        check_same(got, want, i)


def test_call_after_call():
    """The next call may come to the card while this one runs: workspace and inputs are used again at once."""
    layers = [layer_of(1024, 1024, threshold, bias=False) for threshold in (6.0, 0.0, 6.0)]
    with torch.no_grad():
        for rows in (1, 16, 40, 129, 600):
            first = with_outliers(normal(rows, 1024, dtype=torch.float16), 5)
            torch.cuda.synchronize()
            slow = first
            for layer in layers:
                slow = layer(slow)
                torch.cuda.synchronize()
            for _ in range(20):
                fast = first
                for layer in layers:
                    fast = layer(fast)
            check_same(fast, slow, rows)


@pytest.mark.parametrize("tail", ["gaussian", "heavy"])
@pytest.mark.parametrize("rows", [1, 64, 512])
def test_accuracy(tail, rows):
    """Not further from float64 than upstream's steps: sums and outlier products rounded to float16, then added."""
    k, n, threshold = 2048, 1024, 6.0
    x = normal(rows, k, dtype=torch.float16)
    if tail == "heavy":
        x = (x.float() ** 3).clamp(-100, 100).half()
        x = with_outliers(x, 6)
    w = normal(n, k, seed=9, dtype=torch.float16) / 40
    layer = Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
    with torch.no_grad():
        layer.weight.data.copy_(w.float().cpu())
        layer = layer.half().to(DEVICE)
        got = layer(x)
    truth = x.double() @ w.double().t()
    quantised, stats, columns = F.int8_vectorwise_quant(x, threshold)
    CB, SCB = layer.state.CB, layer.state.SCB
    theirs = (exact(quantised, CB).double() * stats.double()[:, None] * SCB.double() / 127**2).half()
    sub = (CB[:, columns].double() * SCB.double()[:, None] / 127).half()
    theirs = (theirs.double() + x[:, columns].double() @ sub.double().t()).half()
    ours, others = (float((y.double() - truth).norm() / truth.norm()) for y in (got, theirs))
    assert ours <= 1.02 * others, (ours, others)
    assert ours < 0.03, ours
