"""Exact quantiles on CUDA: the bits of the CPU and the order of sorting, for all dtypes, lengths, counts and data."""

import pytest
import torch

import bitsandbytes.functional as F
import oracle
from cuda_cases import DEVICE, check_same, needs_cuda, on_device, python

pytestmark = needs_cuda

COUNTS = (1, 2, 5, 16, 255, 256)
LENGTHS = (1, 2, 3, 255, 4097, 1000003)
INF = float("inf")
NAN = float("nan")


def clusters(n, g):
    """256 groups of neighbours, 1024 of them in each: what the last pass has most work with."""
    prefix = torch.randint(0x20000000 >> 10, 0x5F000000 >> 10, (256,), generator=g, dtype=torch.int32)
    which, low = torch.randint(256, (n,), generator=g), torch.randint(1024, (n,), generator=g, dtype=torch.int32)
    return (prefix[which] << 10 | low).view(torch.float32)


# Name -> f32 CPU tensor [n]: z normal, u uniform on [0, 1), g a generator.
KINDS = {
    "normal": lambda n, z, u, g: z,
    "uniform": lambda n, z, u, g: u,
    "all equal": lambda n, z, u, g: torch.full((n,), 1.2345),
    "all zero": lambda n, z, u, g: torch.zeros(n),
    "two values": lambda n, z, u, g: torch.where(u < 0.3, -2.5, 7.0),
    "two neighbours": lambda n, z, u, g: torch.where(u < 0.5, 1.0, 1.0 + 2.0**-23),
    "90% zeros": lambda n, z, u, g: torch.where(u < 0.9, 0.0, z),
    "sorted": lambda n, z, u, g: torch.arange(n) * 0.5,
    "reversed": lambda n, z, u, g: torch.arange(n) * -0.25,
    "subnormals": lambda n, z, u, g: z * 1e-41,
    "infinities": lambda n, z, u, g: torch.where(u < 0.3, INF, torch.where(u < 0.6, -INF, z)),
    "NaN mixed": lambda n, z, u, g: torch.where(u < 0.3, torch.where(z > 0, NAN, -NAN), z),
    "NaN alone": lambda n, z, u, g: torch.full((n,), NAN),
    "both zeros": lambda n, z, u, g: torch.where(u < 0.5, -0.0, 0.0),
    "integers": lambda n, z, u, g: (100 * z).round(),
    "near one": lambda n, z, u, g: 1 + 0.01 * z,
    "nearer one": lambda n, z, u, g: 1 + 1e-5 * z,
    "bf16 values": lambda n, z, u, g: z.bfloat16().float(),
    "clusters": lambda n, z, u, g: clusters(n, g),
    "any bits": lambda n, z, u, g: (
        torch.randint(-(2**31), 2**31, (n,), generator=g, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ),
}


def data(n, dtype, kind, seed=0):
    """CPU tensor [n] of the dtype."""
    g = torch.Generator().manual_seed(seed * 7919 + n)
    z, u = torch.randn(n, generator=g), torch.rand(n, generator=g)
    return KINDS[kind](n, z, u, g).to(oracle.TORCH[dtype])


def ranks_of(n, count, offset=None):
    """The ranks of the quantiles; offset None: the default."""
    if offset is None:
        offset = 1 / 512 if count == 256 else 1 / (2 * count)
    return [round(p * (n - 1)) for p in oracle.quantile_targets(offset, count)]


class Sorted:
    """A tensor sorted on its device: by value, and by the bits of its values, -0 below 0 and NaN on top."""

    def __init__(self, x):
        x = x.reshape(-1).float()
        bits = x.view(torch.int32)
        key = torch.where(x.isnan(), 2**31 - 1, torch.where(bits < 0, bits ^ (2**31 - 1), bits).int()).int()
        # torch sorts a NaN whose sign is set in front of everything on CUDA: they are made alike first.
        self.key, self.value = torch.sort(key).values, torch.sort(torch.where(x.isnan(), NAN, x)).values

    def check(self, got, ranks, what):
        """got [len(ranks)] holds the elements of these ranks."""
        at = torch.tensor(ranks, device=self.key.device)
        key, value = self.key[at], self.value[at]
        found = torch.where(key < 0, key ^ (2**31 - 1), key).int().view(torch.float32)
        check_same(got, torch.where(value.isnan(), NAN, found), what)
        assert bool(((got == value) | (got.isnan() & value.isnan())).all()), what


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_counts_and_kinds(dtype, kind, n):
    cpu = data(n, dtype, kind)
    x = on_device(cpu)
    order = Sorted(x)
    for count in COUNTS:
        what = f"{dtype} {kind} n {n} count {count}"
        got = F.estimate_quantiles(x, num_quantiles=count)
        assert got.device.type == "cuda" and got.dtype == torch.float32 and got.shape == (count,), what
        order.check(got, ranks_of(n, count), what)
        check_same(got, F.estimate_quantiles(cpu, num_quantiles=count), what)


@pytest.mark.large
@pytest.mark.parametrize("kind", ["normal", "near one", "clusters", "all equal", "bf16 values"])
def test_64_mi_elements(dtype, kind):
    g = torch.Generator(DEVICE).manual_seed(3)
    n = 1 << 26
    x = torch.randn(n, generator=g, device=DEVICE)
    if kind in ("near one", "bf16 values"):
        x = 1 + 0.01 * x if kind == "near one" else x.bfloat16().float()
    elif kind != "normal":
        x = data(1 << 20, "f32", kind).to(DEVICE).repeat(64)
    x = x.to(oracle.TORCH[dtype])
    got = F.estimate_quantiles(x)
    Sorted(x).check(got, ranks_of(n, 256), f"{dtype} {kind}")
    assert torch.equal(got, F.estimate_quantiles(x))


@pytest.mark.large
@pytest.mark.parametrize("n", [(1 << 32) + 12345, (1 << 33) + 7])
def test_more_elements_than_32_bits_count(n):
    """Two values alone, so that counters pass 2^32; the ends show that no element is left out."""
    if torch.cuda.mem_get_info()[0] < 2 * n + (1 << 28):
        pytest.skip(f"{2 * n >> 30} GiB of device memory are needed")
    x = torch.full((n,), -1.0, dtype=torch.bfloat16, device=DEVICE)
    x[n - n // 4 :] = 1.0
    x[17], x[n - 3] = -7.0, 5.0
    got = F.estimate_quantiles(x, offset=0.0).tolist()
    # In order: -7, then -1 in the first three quarters, then 1, and 5 at the end.
    ones = n - n // 4
    expected = [-7.0 if r == 0 else 5.0 if r == n - 1 else -1.0 if r < ones else 1.0 for r in ranks_of(n, 256, 0.0)]
    assert got == expected


def test_unaligned_views(dtype):
    cpu = data(70007, dtype, "normal")
    x = on_device(cpu)
    for offset in range(10):
        for n in (1, 2, 7, 8, 9, 15, 16, 17, 70007 - offset):
            got = F.estimate_quantiles(x[offset : offset + n])
            check_same(got, F.estimate_quantiles(cpu[offset : offset + n]), f"{dtype} offset {offset} n {n}")


def test_every_short_length(dtype):
    for n in range(1, 130):
        cpu = data(n, dtype, "normal")
        check_same(F.estimate_quantiles(on_device(cpu)), F.estimate_quantiles(cpu), f"{dtype} n {n}")


def test_offset_zero_is_minimum_and_maximum(dtype):
    x = on_device(data(123457, dtype, "normal"))
    got = F.estimate_quantiles(x, offset=0.0)
    assert got[0] == x.min() and got[-1] == x.max()
    Sorted(x).check(got, ranks_of(x.numel(), 256, 0.0), dtype)


def test_nan_sorts_above_every_number_whatever_its_bits(dtype):
    """Payloads that leave the upper bits of an infinity, and both signs."""
    infinity = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[dtype]
    kind, sign = (torch.int32, -(2**31)) if dtype == "f32" else (torch.int16, -(2**15))
    patterns = [infinity, infinity + 1, infinity + 3, sign + infinity, sign + infinity + 1, sign, 0, 1, sign + 1]
    cpu = torch.tensor(patterns * 9, dtype=kind).view(oracle.TORCH[dtype])
    got = F.estimate_quantiles(on_device(cpu), offset=0.0)
    assert got[0] == -INF and bool(got[-80:].isnan().all())
    check_same(got, F.estimate_quantiles(cpu, offset=0.0), dtype)


def test_results_that_are_nan_have_the_bits_of_the_cpu(dtype):
    cpu = data(4097, dtype, "NaN mixed")
    got = F.estimate_quantiles(on_device(cpu)).cpu()
    assert torch.equal(got.view(torch.int32), F.estimate_quantiles(cpu).view(torch.int32))


def test_views_out_and_input(dtype):
    cpu = data(50 * 40, dtype, "normal").view(50, 40)
    x = on_device(cpu)
    before = x.clone()
    expected = F.estimate_quantiles(cpu[:, ::2])
    check_same(F.estimate_quantiles(x[:, ::2]), expected)
    check_same(F.estimate_quantiles(x[:, ::2].t()), expected)
    out = torch.zeros(256, device=DEVICE)
    assert F.estimate_quantiles(x[:, ::2], out=out) is out
    check_same(out, expected)
    check_same(x, before)
    with pytest.raises(ValueError, match="device"):
        F.estimate_quantiles(x, out=torch.zeros(256))
    with pytest.raises(NotImplementedError, match="float64"):
        F.estimate_quantiles(x.double())


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_quantile_map(dtype, bits):
    cpu = data(100003, dtype, "normal")
    code = F.create_quantile_map(on_device(cpu), bits)
    check_same(code, F.create_quantile_map(cpu, bits))
    assert code.device.type == "cpu" and code.shape == (256,)


def test_quantile_map_quantises_on_the_device():
    x = on_device(data(1 << 16, "f32", "normal"))
    code = F.create_quantile_map(x).to(DEVICE)
    codes, state = F.quantize_blockwise(x, code=code)
    assert float((F.dequantize_blockwise(codes, state) - x).abs().mean()) < 0.02


def test_the_stream_of_the_caller(dtype):
    """x is still being written when the call returns."""
    n = 1 << 22
    source = on_device(data(n, dtype, "normal"))
    expected = F.estimate_quantiles(source)
    side, x = torch.cuda.Stream(), torch.zeros_like(source)
    a = torch.randn(2048, 2048, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(20):
            a = (a @ a).clamp(-1, 1)
        x.copy_(source)
        got = F.estimate_quantiles(x)
    side.synchronize()
    check_same(got, expected)


@pytest.mark.parametrize("count", [3, 256])
def test_a_graph(dtype, count):
    """Captured once, replayed on other data of every kind."""
    n = 300007
    x = on_device(data(n, dtype, "normal"))
    F.estimate_quantiles(x, num_quantiles=count)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        got = F.estimate_quantiles(x, num_quantiles=count)
    for kind in KINDS:
        cpu = data(n, dtype, kind, 1)
        x.copy_(cpu)
        graph.replay()
        check_same(got, F.estimate_quantiles(cpu, num_quantiles=count), f"{dtype} {kind}")


def test_a_graph_before_any_other_call():
    """The first call of a process is captured: nothing of it may need the stream."""
    program = """
import torch, bitsandbytes.functional as F
x = torch.arange(100001, device="cuda") * 0.5
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    got = F.estimate_quantiles(x, offset=0.0)
graph.replay()
print(got[0].item(), got[-1].item())
"""
    status, printed, errors = python("-c", program)
    assert status == 0 and printed.split() == ["0.0", "50000.0"], errors
