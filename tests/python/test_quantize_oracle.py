"""Codes and absmax of the block quantisers, bit for bit against oracle.py: lengths, blocks, maps, ties, corners."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import oracle
import oracle_maps

LENGTHS = [0, 1, 2, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097]
MILLION = 1000003
BLOCKS8 = [1, 7, 64, 100, 256, 4096, 16384]
BLOCKS4 = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def make_map(name):
    """(torch map or None for the default, its numpy values)"""
    if name == "random":
        values = np.sort(np.random.default_rng(5).uniform(-1, 1, 256).astype(np.float32))
        return torch.from_numpy(values.copy()), values
    made = {
        "default": F.create_dynamic_map,
        "unsigned": lambda: F.create_dynamic_map(signed=False),
        "linear": F.create_linear_map,
        "linear-no-zero": lambda: F.create_linear_map(add_zero=False),
        "fp8": F.create_fp8_map,
        "dynamic4": lambda: F.create_dynamic_map(True, 3, 4),
        "dynamic5": lambda: F.create_dynamic_map(True, 2, 5),
        "linear3": lambda: F.create_linear_map(True, 3),
    }[name]()
    return (None if name == "default" else made), made.numpy().copy()


REPEATED = {"linear", "fp8", "dynamic4", "dynamic5", "linear3"}  # maps with runs of equal entries


def sample(n, dtype, seed):
    """Values over many magnitudes with zeros and whole zero stretches, rounded to dtype."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(n) * np.where(rng.random(n) < 0.2, 10.0 ** rng.uniform(-7, 3, n), 1.0)
    x[rng.random(n) < 0.02] = 0
    x[n // 3 : n // 3 + n // 8] = 0
    return oracle.rounded(x.astype(np.float32), dtype)


def run8(x, dtype, block, code=None):
    """quantize_blockwise of flat fp32 values -> (codes, absmax) as numpy."""
    q, state = F.quantize_blockwise(oracle.to_torch(x, dtype), code=code, blocksize=block)
    assert q.dtype == torch.uint8 and state.absmax.dtype == torch.float32 and q.shape == (x.size,)
    return q.numpy(), state.absmax.numpy()


def check8(x, dtype, block, name):
    code, values = make_map(name)
    got, absmax = run8(x, dtype, block, code)
    expected, expected_absmax = oracle.quantize8(x, values, block)
    what = f"{dtype} block {block} n {x.size} map {name}"
    assert oracle.same_bits(absmax, expected_absmax), (what, oracle.where_different(absmax, expected_absmax))
    if name in REPEATED:
        assert np.array_equal(values[got], values[expected]), (
            what,
            oracle.where_different(values[got], values[expected]),
        )
    else:
        assert np.array_equal(got, expected), (what, oracle.where_different(got, expected))


def run4(x, dtype, block, kind):
    packed, state = F.quantize_4bit(oracle.to_torch(x, dtype), blocksize=block, quant_type=kind)
    assert packed.dtype == torch.uint8 and packed.shape == ((x.size + 1) // 2, 1)
    return packed.numpy().reshape(-1), state.absmax.numpy()


def check4(x, dtype, block, kind):
    got, absmax = run4(x, dtype, block, kind)
    nibbles, expected_absmax = oracle.quantize4(x, kind, block)
    expected = oracle.pack(nibbles, kind)
    what = f"{dtype} block {block} n {x.size} {kind}"
    assert oracle.same_bits(absmax, expected_absmax), (what, oracle.where_different(absmax, expected_absmax))
    assert np.array_equal(got, expected), (what, oracle.where_different(got, expected))


@pytest.mark.parametrize("block", BLOCKS8)
@pytest.mark.parametrize("name", ["default", "unsigned"])
def test_8bit_every_length(dtype, block, name):
    for n in LENGTHS:
        check8(sample(n, dtype, n + block), dtype, block, name)


@pytest.mark.parametrize("name", ["linear", "linear-no-zero", "fp8", "random", *sorted(REPEATED)])
def test_8bit_other_maps(dtype, name):
    for block in BLOCKS8:
        for n in (1, 65, 257, 4097):
            check8(sample(n, dtype, n + block + 1), dtype, block, name)


@pytest.mark.large
@pytest.mark.parametrize(
    "block, name", [(256, "default"), (4096, "default"), (100, "unsigned"), (64, "random"), (16384, "fp8")]
)
def test_8bit_million(dtype, block, name):
    check8(sample(MILLION, dtype, block), dtype, block, name)


@pytest.mark.parametrize("block", BLOCKS4)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_every_length(dtype, block, kind):
    for n in LENGTHS:
        check4(sample(n, dtype, n + block), dtype, block, kind)


@pytest.mark.large
@pytest.mark.parametrize("block, kind", [(64, "nf4"), (64, "fp4"), (4096, "nf4"), (32, "fp4")])
def test_4bit_million(dtype, block, kind):
    check4(sample(MILLION, dtype, block), dtype, block, kind)


def test_every_16bit_pattern_in_one_block_each():
    """All finite f16 and bf16 values, each beside a 1.0 that sets the scale: small, subnormal, large."""
    for dtype in ("f16", "bf16"):
        bits = np.arange(65536, dtype=np.uint16)
        x = (
            bits.view(np.float16).astype(np.float32)
            if dtype == "f16"
            else (bits.astype(np.uint32) << 16).view(np.float32)
        )
        x = x[np.isfinite(x)]
        x = np.stack([x, np.ones_like(x)], axis=1).reshape(-1)
        check8(x, dtype, 2, "default")
        check8(np.abs(x), dtype, 2, "unsigned")
        wide = np.zeros((x.size // 2, 32), np.float32)
        wide[:, :2] = x.reshape(-1, 2)
        check4(wide[::17].reshape(-1), dtype, 32, "nf4")
        check4(wide[::17].reshape(-1), dtype, 32, "fp4")


def near(values):
    """Each value with its two fp32 neighbours."""
    return np.concatenate([np.nextafter(values, np.float32(-9)), values, np.nextafter(values, np.float32(9))])


@pytest.mark.parametrize("name", ["default", "unsigned", "linear-no-zero", "random"])
def test_8bit_ties_go_to_the_even_index(name):
    _, values = make_map(name)
    mid = near(oracle.midpoints(values))
    mid = mid[np.abs(mid) < 1]
    x = np.stack([mid, np.ones_like(mid)], axis=1).reshape(-1)  # absmax 1, so that u is x itself
    check8(x, "f32", 2, name)
    code, _ = make_map(name)
    plain = oracle.midpoints(values)
    keep = np.append(np.diff(values) > 0, False)[:255] & (np.abs(plain) < 1)
    tie, _ = run8(np.append(plain[keep], np.float32(1)), "f32", 1 << 20, code)
    unique = np.array([np.sum(plain == m) == 1 for m in plain[keep]])
    strictly = (values[:-1][keep] < plain[keep]) & (plain[keep] < values[1:][keep])
    assert np.all(tie[:-1][unique & strictly] % 2 == 0)


def test_8bit_default_map_on_a_dense_grid():
    """Every decade edge and 2^17 values per octave-rich range, one long block whose absmax is 1."""
    grid = np.concatenate([np.logspace(-9, 0, 200001), -np.logspace(-9, -0.0001, 200001)]).astype(np.float32)
    check8(np.append(grid, np.float32(1)), "f32", grid.size + 1, "default")
    check8(np.append(np.abs(grid), np.float32(1)), "f32", grid.size + 1, "unsigned")


@pytest.mark.parametrize("kind, thresholds", [("nf4", oracle.NF4_THRESHOLD), ("fp4", oracle.FP4_THRESHOLD)])
def test_4bit_ties(kind, thresholds):
    x = near(thresholds)
    x = np.concatenate([x, -x, near(oracle.TABLE4[kind]), np.array([0, -0.0, 1e-30, -1e-30], np.float32)])
    x = x[np.abs(x) <= 1]
    check4(np.append(x, np.float32(1)), "f32", 256, kind)
    on = np.append(thresholds, np.float32(1))
    got = oracle.unpack(run4(on, "f32", 256, kind)[0], on.size)[:-1]
    below = np.arange(15) if kind == "nf4" else oracle.FP4_ABOVE[:7]
    assert np.array_equal(got, below), "a value on a threshold takes the code below it"


def test_4bit_hand_example():
    """Typed by hand from the tables: no oracle involved."""
    x = torch.tensor([-1.0, 0.0, 1.0, 0.34, -0.0001])
    nf4, _ = F.quantize_4bit(x, quant_type="nf4")
    fp4, _ = F.quantize_4bit(x, quant_type="fp4")
    assert nf4.flatten().tolist() == [0x07, 0xFB, 0x77]
    assert fp4.flatten().tolist() == [0xB0, 0x34, 0x80]


CORNERS = {
    "zeros": [0.0] * 9,
    "minus zeros": [-0.0] * 9,
    "nan only": [np.nan] * 9,
    "nan and zeros": [np.nan, 0.0, -0.0] * 3,
    "nan and numbers": [np.nan, 1.0, -2.0, 0.5, np.nan, 0.0, 1e-9, -1.5, 2.0],
    "inf": [np.inf, 1.0, -2.0, 0.0, -0.0, 3e38, -1e-30, 5.0, 0.5],
    "both inf and nan": [np.inf, -np.inf, np.nan, 0.0, 1.0, -1.0, np.inf, 7.0, -0.0],
    "minus inf": [-np.inf, 1.0, -1.0, 0.0, 2.0, 0.5, 0.25, -0.25, 4.0],
    "subnormal, r infinite": [1e-40, -1e-40, 5e-41, 0.0, 1e-45, -1e-45, 0.0, 2e-39, -2.9e-39],
    "subnormal and nan": [1e-40, np.nan, 5e-41, 0.0, 1e-45, -1e-45, 0.0, 2e-39, -2.9e-39],
    "smallest finite r": [2.9387359e-39, -1e-39, 0.0, 1.5e-39, 2.9387359e-39, 1e-45, -2.9387359e-39, 0.0, 1e-40],
    "largest": [3.4028235e38, -3.4028235e38, 1e38, 0.0, 1.0, -1e30, 2e38, 1e-38, 1e37],
    "smallest normal": [1.1754944e-38, -5e-39, 0.0, 1e-45, 1e-38, -1.1754944e-38, 3e-39, 0.0, 1e-40],
}


@pytest.mark.parametrize("case", sorted(CORNERS))
@pytest.mark.parametrize("position", [0, 1, 2])
def test_degenerate_blocks_and_their_neighbours(dtype, case, position):
    """The block itself by the rules, and the blocks beside it as if it were not there."""
    corner = oracle.rounded(np.array(CORNERS[case], np.float32), dtype)
    for size in (9, 32, 64):
        rng = np.random.default_rng(size)
        x = oracle.rounded(rng.standard_normal(3 * size - (3 if position != 2 else 0)).astype(np.float32), dtype)
        block = np.resize(corner, min(size, x.size - position * size))
        x[position * size : position * size + block.size] = block
        for name in ("default", "unsigned", "fp8", "random"):
            check8(x, dtype, size, name)
        if size >= 32:
            check4(x, dtype, size, "nf4")
            check4(x, dtype, size, "fp4")


def test_degenerate_codes_by_hand():
    """The codes of the degenerate blocks as numbers, so that the oracle itself is held to the text."""
    nan, inf = float("nan"), float("inf")
    for x, expected in [
        ([0.0, -0.0, nan], [127, 127, 127]),
        ([1e-40, nan, 0.0], [127, 127, 127]),
        ([nan, 1.0, 0.0], [0, 255, 127]),
        ([inf, -inf, 3.0], [0, 0, 127]),
    ]:
        q, state = F.quantize_blockwise(torch.tensor(x), blocksize=3)
        assert q.tolist() == expected, x
    assert F.quantize_blockwise(torch.zeros(3), code=F.create_dynamic_map(False))[0].tolist() == [0, 0, 0]
    for x, nf4, fp4 in [
        ([0.0, nan], 0x77, 0x00),
        ([nan, 1.0], 0x0F, 0x03),
        ([inf, -1.0], 0x07, 0x00),
        ([-inf, 1e-41], 0x07, 0x00),
        ([1e-41, -1e-41], 0x77, 0x00),
    ]:
        assert F.quantize_4bit(torch.tensor(x), quant_type="nf4")[0].item() == nf4, x
        assert F.quantize_4bit(torch.tensor(x), quant_type="fp4")[0].item() == fp4, x


@pytest.mark.parametrize("n", [1, 65, 1000, 16385, 70001])
def test_nested_statistics_8bit(n):
    """quantize_blockwise(nested=True): the same block size for the statistics."""
    x = sample(n, "f32", n)
    q, state = F.quantize_blockwise(torch.from_numpy(x), blocksize=64, nested=True)
    codes, absmax = oracle.quantize8(x, make_map("default")[1], 64)
    assert np.array_equal(q.numpy(), codes) and state.nested and state.state2.blocksize == 64
    check_nested(state, absmax, 64)


def check_nested(state, absmax, block):
    offset = state.offset
    assert offset.dtype == torch.float32 and offset.shape == ()
    exact = oracle.mean(absmax)
    assert abs(offset.item() - exact) <= float(np.spacing(np.float32(exact))), (offset.item(), exact)
    values = make_map("default")[1]
    assert oracle.same_bits(state.state2.code.numpy(), values)
    codes, absmax2 = oracle.quantize_scales(absmax, np.float32(offset.item()), values, block)
    assert state.absmax.dtype == torch.uint8
    assert np.array_equal(state.absmax.numpy(), codes), oracle.where_different(state.absmax.numpy(), codes)
    assert oracle.same_bits(state.state2.absmax.numpy(), absmax2)


@pytest.mark.parametrize("n", [1, 31, 64, 65, 4097, 16384, 16385, 300001])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nested_statistics_4bit(dtype, n, kind):
    x = sample(n, dtype, n)
    packed, state = F.quantize_4bit(oracle.to_torch(x, dtype), blocksize=64, compress_statistics=True, quant_type=kind)
    nibbles, absmax = oracle.quantize4(x, kind, 64)
    assert np.array_equal(packed.numpy().reshape(-1), oracle.pack(nibbles, kind))
    assert state.state2.blocksize == 256 and state.state2.dtype == torch.float32
    check_nested(state, absmax, 256)


def test_shapes_views_and_storage():
    """Row-major flattening of any layout; a float storage dtype holds the same bytes."""
    x = torch.randn(12, 10, 8, generator=torch.Generator().manual_seed(3))
    for view in (x.transpose(0, 2), x[:, ::2], x[1:, 3:, 1::3], x.permute(1, 2, 0), x.expand(3, 12, 10, 8)):
        flat = view.contiguous()
        q, state = F.quantize_blockwise(view, blocksize=64)
        expected, expected_state = F.quantize_blockwise(flat, blocksize=64)
        assert q.shape == view.shape and torch.equal(q, expected) and torch.equal(state.absmax, expected_state.absmax)
        p, state = F.quantize_4bit(view, quant_type="nf4")
        expected, expected_state = F.quantize_4bit(flat, quant_type="nf4")
        assert torch.equal(p, expected) and torch.equal(state.absmax, expected_state.absmax)
        assert state.shape == view.shape
    for storage in (torch.float16, torch.bfloat16, torch.float32):
        p, _ = F.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
        u8, _ = F.quantize_4bit(x, quant_type="nf4")
        assert p.dtype == storage and p.shape == (x.numel() // 2 // storage.itemsize, 1)
        assert torch.equal(p.view(torch.uint8).flatten(), u8.flatten())


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 9, 10, 65])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_no_byte_is_lost_in_any_storage(n, storage):
    """Bytes that do not fill a storage element are padded, or refused; never cut off."""
    x = sample(n, "f32", 3)
    x[-1] = np.float32(2)
    try:
        p, state = F.quantize_4bit(torch.from_numpy(x), quant_type="nf4", quant_storage=storage)
    except ValueError:
        assert (n + 1) // 2 % storage.itemsize
        return
    assert p.dtype == storage and p.numel() * storage.itemsize >= (n + 1) // 2
    nibbles, absmax = oracle.quantize4(x, "nf4", 64)
    assert np.array_equal(p.view(torch.uint8).numpy().ravel()[: (n + 1) // 2], oracle.pack(nibbles, "nf4"))
    got = F.dequantize_4bit(p, state).numpy()
    assert oracle.same_bits(got, oracle.dequantize(nibbles, oracle.NF4, absmax, 64, "f32"))


def test_two_threads_and_one_agree(dtype):
    x = oracle.to_torch(sample(MILLION, dtype, 77), dtype)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            q, s = F.quantize_blockwise(x, blocksize=256)
            p, s4 = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        finally:
            torch.set_num_threads(before)
        results.append((q, s.absmax, p, s4.absmax, s4.offset, s4.state2.absmax))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_oracle_maps_and_library_maps_quantise_alike():
    """The maps above come from the library; this one is made here."""
    values = oracle_maps.dynamic()
    x = sample(4097, "f32", 8)
    got, _ = run8(x, "f32", 256, torch.from_numpy(values.copy()))
    assert np.array_equal(got, oracle.quantize8(x, values, 256)[0])
