"""The quantisers on CUDA give the CPU's bits and the oracle's: lengths, blocks, maps, layouts, statistics, sizes."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import cuda_cases
import oracle
from cuda_cases import KINDS, check_same, needs_cuda, on_device, values

pytestmark = needs_cuda

BLOCKS8 = [1, 3, 32, 64, 100, 128, 256, 512, 1024, 2048, 4096, 5000, 8192, 1 << 20]
BLOCKS4 = [32, 64, 128, 256, 512, 1024, 2048, 4096]
EVERY = range(301)
EDGES = [unit * times + off for unit in (2048, 4096) for times in (1, 3) for off in (-1, 0, 1)] + [16391, 40001]
MILLION = 1000003
MAPS = {
    "signed": F.create_dynamic_map,
    "unsigned": lambda: F.create_dynamic_map(signed=False),
    "linear": F.create_linear_map,
    "linear without zero": lambda: F.create_linear_map(add_zero=False),
    "fp8": F.create_fp8_map,
    "4-bit dynamic": lambda: F.create_dynamic_map(True, 3, 4),
    "random": lambda: torch.rand(256, generator=torch.Generator().manual_seed(5)).mul(2).sub(1).sort().values,
}
ops = torch.ops.bitsandbytes


def round8(x, code, block, dtype):
    """Codes, absmax and the decoded values."""
    codes, absmax = ops.quantize_blockwise(x, code, block)
    return codes, absmax, ops.dequantize_blockwise(codes, absmax, code, block, oracle.TORCH[dtype])


def round4(x, kind, block, dtype):
    codes, absmax = ops.quantize_4bit(x, block, kind, torch.uint8)
    return codes, absmax, ops.dequantize_4bit(codes, absmax, block, kind, list(x.shape), oracle.TORCH[dtype])


def check_all(got, expected, what):
    for name, one, two in zip(("codes", "absmax", "values"), got, expected, strict=True):
        check_same(one, two, f"{name} of {what}")


def check8(x, code, block, dtype, what):
    check_all(round8(on_device(x), code[1], block, dtype), round8(x, code[0], block, dtype), what)


def check4(x, kind, block, dtype, what):
    check_all(round4(on_device(x), kind, block, dtype), round4(x, kind, block, dtype), what)


def both(name):
    """A map on the CPU and on the device."""
    code = MAPS[name]()
    return code, code.to(cuda_cases.DEVICE)


# ---- against the CPU


@pytest.mark.parametrize("block", [1, 3, 64, 256, 4096, 5000])
@pytest.mark.parametrize("name", ["signed", "unsigned"])
def test_8bit_every_length(dtype, name, block):
    code = both(name)
    for n in EVERY:
        kind = KINDS[n % len(KINDS)]
        check8(values(n, dtype, kind, block), code, block, dtype, f"{dtype} {kind} n {n} block {block} {name}")


@pytest.mark.parametrize("block", BLOCKS8)
@pytest.mark.parametrize("name", sorted(MAPS))
def test_8bit_edges_of_tiles(dtype, name, block):
    code, kinds = both(name), KINDS if name in ("signed", "unsigned") else ("wide", "special")
    for n in EDGES if name in ("signed", "unsigned") else EDGES[::3]:
        for kind in kinds:
            check8(values(n, dtype, kind, block), code, block, dtype, f"{dtype} {kind} n {n} block {block} {name}")


@pytest.mark.parametrize("block", [32, 64, 1024, 4096])
@pytest.mark.parametrize("kind4", ["nf4", "fp4"])
def test_4bit_every_length(dtype, kind4, block):
    for n in EVERY:
        kind = KINDS[n % len(KINDS)]
        check4(values(n, dtype, kind, block), kind4, block, dtype, f"{dtype} {kind} n {n} block {block} {kind4}")


@pytest.mark.parametrize("block", BLOCKS4)
@pytest.mark.parametrize("kind4", ["nf4", "fp4"])
def test_4bit_edges_of_tiles(dtype, kind4, block):
    for n in EDGES:
        for kind in KINDS:
            check4(values(n, dtype, kind, block), kind4, block, dtype, f"{dtype} {kind} n {n} block {block} {kind4}")


@pytest.mark.large
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_and_three(dtype, kind):
    x = values(MILLION, dtype, kind, 3)
    for block, name in ((256, "signed"), (4096, "unsigned"), (100, "signed"), (64, "random"), (MILLION, "fp8")):
        check8(x, both(name), block, dtype, f"{dtype} {kind} block {block} {name}")
    for block, kind4 in ((64, "nf4"), (64, "fp4"), (4096, "nf4"), (32, "fp4")):
        check4(x, kind4, block, dtype, f"{dtype} {kind} block {block} {kind4}")


def test_every_16bit_pattern():
    """All f16 and bf16 bit patterns, NaN and infinities too, in blocks of many lengths."""
    for torch_dtype, dtype in ((torch.float16, "f16"), (torch.bfloat16, "bf16")):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch_dtype)
        x = x[torch.randperm(65536, generator=torch.Generator().manual_seed(1))]
        for block in (1, 2, 32, 256):
            check8(x, both("signed"), block, dtype, f"{dtype} patterns, block {block}")
        check4(x, "nf4", 32, dtype, f"{dtype} patterns")
        check4(x, "fp4", 32, dtype, f"{dtype} patterns")


@pytest.mark.parametrize("name", ["signed", "unsigned", "linear without zero", "random"])
def test_8bit_ties_and_their_neighbours(name):
    """Midpoints of the map and the f32 numbers beside them, where absmax is 1: the search decides at its edge."""
    code = both(name)
    mid = oracle.midpoints(code[0].numpy())
    near = np.concatenate([np.nextafter(mid, np.float32(-9)), mid, np.nextafter(mid, np.float32(9))])
    near = near[np.abs(near) < 1]
    x = torch.from_numpy(np.stack([near, np.ones_like(near)], axis=1).reshape(-1))
    for block in (2, 32, 256):
        check8(x, code, block, "f32", f"ties of {name}, block {block}")


# ---- against the oracle


@pytest.mark.parametrize("kind", KINDS)
def test_8bit_against_the_oracle(dtype, kind):
    for name, block, n in (("signed", 256, 10007), ("unsigned", 64, 4097), ("random", 100, 5000), ("signed", 1, 77)):
        x, code = values(n, dtype, kind, 11), both(name)
        codes, absmax, decoded = round8(on_device(x), code[1], block, dtype)
        expected, scales = oracle.quantize8(oracle.from_torch(x), code[0].numpy(), block)
        what = f"{dtype} {kind} {name} block {block}"
        check_same(codes, torch.from_numpy(expected), what)
        check_same(absmax, torch.from_numpy(scales), what)
        back = oracle.dequantize(expected, code[0].numpy(), scales, block, dtype)
        check_same(decoded, oracle.to_torch(back, dtype), what)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kind4", ["nf4", "fp4"])
def test_4bit_against_the_oracle(dtype, kind4, kind):
    for block, n in ((64, 10007), (32, 333), (4096, 4097)):
        x = values(n, dtype, kind, 12)
        codes, absmax, decoded = round4(on_device(x), kind4, block, dtype)
        nibbles, scales = oracle.quantize4(oracle.from_torch(x), kind4, block)
        what = f"{dtype} {kind} {kind4} block {block}"
        check_same(codes.flatten(), torch.from_numpy(oracle.pack(nibbles, kind4)), what)
        check_same(absmax, torch.from_numpy(scales), what)
        back = oracle.dequantize(nibbles, oracle.TABLE4[kind4], scales, block, dtype)
        check_same(decoded, oracle.to_torch(back, dtype), what)


def test_decoding_to_another_dtype(dtype):
    """Codes of any value, scales of any magnitude, every output dtype."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 256, (5003,), dtype=torch.uint8, generator=generator)
    absmax = values(-(-5003 // 64), "f32", "wide", 4).abs()
    absmax[:4] = torch.tensor([0.0, torch.inf, 1e-42, 3e38])
    for block in (64, 100):
        scales, code = absmax[: -(-5003 // block)], both("signed")
        got = ops.dequantize_blockwise(on_device(codes), on_device(scales), code[1], block, oracle.TORCH[dtype])
        check_same(got, ops.dequantize_blockwise(codes, scales, code[0], block, oracle.TORCH[dtype]), block)
    for kind4 in ("nf4", "fp4"):
        scales = values(-(-10006 // 64), "f32", "wide", 4)
        got = ops.dequantize_4bit(on_device(codes), on_device(scales), 64, kind4, [10006], oracle.TORCH[dtype])
        check_same(got, ops.dequantize_4bit(codes, scales, 64, kind4, [10006], oracle.TORCH[dtype]), kind4)


# ---- layouts and output arguments


@pytest.mark.parametrize("shift", range(1, 9))
def test_unaligned_views(dtype, shift):
    """Input, codes and output off any alignment; nothing beside them is written."""
    n = 9001
    base, code = values(n + 16, dtype, "wide", shift), both("signed")
    x, g = base[shift : shift + n], on_device(base)[shift : shift + n]
    check_all(round8(g, code[1], 256, dtype), round8(x, code[0], 256, dtype), f"shift {shift}")
    check_all(round4(g, "nf4", 64, dtype), round4(x, "nf4", 64, dtype), f"shift {shift}")
    codes, absmax, decoded = round8(x, code[0], 64, dtype)
    room = torch.full((n + 32,), 77, dtype=torch.uint8, device=cuda_cases.DEVICE)
    room[shift : shift + n] = on_device(codes)
    out = torch.full((n + 32,), 5.0, dtype=decoded.dtype, device=cuda_cases.DEVICE)
    for start in (shift, 2 * shift):
        target = out[start : start + n]
        ops.dequantize_blockwise.out(room[shift : shift + n], on_device(absmax), code[1], 64, decoded.dtype, out=target)
        check_same(target, decoded, f"codes at {shift}, values at {start}")
        assert bool((out[:start] == 5).all()) and bool((out[start + n :] == 5).all())
        out.fill_(5.0)


@pytest.mark.parametrize("shift", [1, 2, 3, 5])
def test_unaligned_codes_of_4_bits(dtype, shift):
    n = 9001
    codes, absmax, decoded = round4(values(n, dtype, "wide", shift), "fp4", 64, dtype)
    room = torch.full((codes.numel() + 16,), 77, dtype=torch.uint8, device=cuda_cases.DEVICE)
    room[shift : shift + codes.numel()] = on_device(codes).flatten()
    view = room[shift : shift + codes.numel()].view(-1, 1)
    check_same(ops.dequantize_4bit(view, on_device(absmax), 64, "fp4", [n], decoded.dtype), decoded, shift)
    out = torch.full((n + 16,), 5.0, dtype=decoded.dtype, device=cuda_cases.DEVICE)
    target = out[shift : shift + n]
    ops.dequantize_4bit.out(view, on_device(absmax), 64, "fp4", [n], decoded.dtype, out=target)
    check_same(target, decoded, shift)
    assert bool((out[:shift] == 5).all()) and bool((out[shift + n :] == 5).all())


def test_views_with_gaps(dtype):
    x = values(12 * 10 * 8, dtype, "wide", 1).view(12, 10, 8)
    views = {
        "transposed": lambda t: t.transpose(0, 2),
        "every other": lambda t: t[:, ::2],
        "corner": lambda t: t[1:, 3:, 1::3],
        "permuted": lambda t: t.permute(1, 2, 0),
        "expanded": lambda t: t.expand(3, 12, 10, 8),
    }
    g = on_device(x)
    for name, view in views.items():
        q, state = F.quantize_blockwise(view(g), blocksize=64)
        expected, expected_state = F.quantize_blockwise(view(x), blocksize=64)
        check_same(q, expected, name)
        check_same(state.absmax, expected_state.absmax, name)
        check_same(F.dequantize_blockwise(q, state), F.dequantize_blockwise(expected, expected_state), name)
        q, state = F.quantize_4bit(view(g), quant_type="nf4")
        expected, expected_state = F.quantize_4bit(view(x), quant_type="nf4")
        check_same(q, expected, name)
        check_same(F.dequantize_4bit(q, state), F.dequantize_4bit(expected, expected_state), name)


def test_codes_with_gaps(dtype):
    """Non-contiguous codes and scales are read as what they are."""
    x = values(5000, dtype, "normal", 2)
    code = both("signed")
    codes, absmax, decoded = round8(x, code[0], 256, dtype)
    apart = on_device(torch.stack([codes, codes + 1], dim=1))[:, 0]
    scales = on_device(torch.stack([absmax, absmax * 0], dim=1))[:, 0]
    assert not apart.is_contiguous() and not scales.is_contiguous()
    check_same(ops.dequantize_blockwise(apart, scales, code[1], 256, decoded.dtype), decoded)


def test_output_arguments(dtype):
    x = values(3001, dtype, "normal", 6)
    g = on_device(x)
    codes, absmax = torch.zeros(3001, dtype=torch.uint8, device=g.device), torch.zeros(12, device=g.device)
    q, state = F.quantize_blockwise(g, absmax=absmax, out=codes, blocksize=256)
    expected, expected_state = F.quantize_blockwise(x, blocksize=256)
    assert q.data_ptr() == codes.data_ptr() and state.absmax.data_ptr() == absmax.data_ptr()
    check_same(codes, expected)
    check_same(absmax, expected_state.absmax)
    out = torch.empty_like(g)
    assert F.dequantize_blockwise(q, state, out=out).data_ptr() == out.data_ptr()
    check_same(out, F.dequantize_blockwise(expected, expected_state))
    q, state = F.quantize_4bit(g, quant_type="fp4")
    expected, expected_state = F.quantize_4bit(x, quant_type="fp4")
    assert F.dequantize_4bit(q, state, out=out).data_ptr() == out.data_ptr()
    check_same(out, F.dequantize_4bit(expected, expected_state))


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_storage_dtypes(storage):
    x = values(4096, "bf16", "normal", 7)
    q, state = F.quantize_4bit(on_device(x), quant_type="nf4", quant_storage=storage)
    expected, expected_state = F.quantize_4bit(x, quant_type="nf4", quant_storage=storage)
    check_same(q.view(torch.uint8), expected.view(torch.uint8))
    check_same(F.dequantize_4bit(q, state), F.dequantize_4bit(expected, expected_state))


def test_tensors_on_two_devices_are_refused():
    x, code = on_device(values(512, "f32")), F.create_dynamic_map()
    with pytest.raises((RuntimeError, ValueError), match=r"code.*expected cuda"):
        ops.quantize_blockwise(x, code, 256)
    codes, absmax = ops.quantize_blockwise(x, code.to(x.device), 256)
    with pytest.raises((RuntimeError, ValueError), match=r"absmax.*expected cuda"):
        ops.dequantize_blockwise(codes, absmax.cpu(), code.to(x.device), 256, torch.float32)


# ---- nested statistics


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 16384, 16385, 300001, 1 << 22])
@pytest.mark.parametrize("kind4", ["nf4", "fp4"])
def test_nested_statistics(dtype, kind4, n):
    x = values(n, dtype, "normal", 9)
    q, state = F.quantize_4bit(on_device(x), blocksize=64, quant_type=kind4, compress_statistics=True)
    expected, other = F.quantize_4bit(x, blocksize=64, quant_type=kind4, compress_statistics=True)
    check_same(q, expected)
    check_same(state.offset, other.offset, "offset")
    check_same(state.absmax, other.absmax, "codes of the statistics")
    check_same(state.state2.absmax, other.state2.absmax, "absmax of the statistics")
    check_same(F.dequantize_4bit(q, state), F.dequantize_4bit(expected, other), "values")
    found = [
        ops._dequantize_scales(s.absmax, s.state2.code, s.state2.absmax, s.offset, s.state2.blocksize)
        for s in (state, other)
    ]
    check_same(*found, "scales")
    plain = ops.quantize_4bit(on_device(x), 64, kind4, torch.uint8)[1].cpu().numpy()
    assert state.offset.item() == oracle.tree_mean(plain).item()


@pytest.mark.parametrize("n", [0, 1, 31, 1023, 1024, 1025, 33000, (1 << 20) + 5])
def test_statistics_of_any_length(n):
    """The mean runs over a tree of 1024s: one, two and three levels of it, and none."""
    absmax, code = values(n, "f32", "wide", 10).abs(), both("signed")
    for block in (256, 100):
        got = ops._quantize_scales(on_device(absmax), code[1], block)
        for one, two in zip(got, ops._quantize_scales(absmax, code[0], block), strict=True):
            check_same(one, two, f"n {n} block {block}")


def test_nested_8bit(dtype):
    x = values(70001, dtype, "normal", 8)
    q, state = F.quantize_blockwise(on_device(x), blocksize=64, nested=True)
    expected, other = F.quantize_blockwise(x, blocksize=64, nested=True)
    check_same(q, expected)
    check_same(state.absmax, other.absmax)
    check_same(state.offset, other.offset)
    check_same(F.dequantize_blockwise(q, state), F.dequantize_blockwise(expected, other))


# ---- repeats and size


def test_the_same_bits_every_time():
    x, code = on_device(values(MILLION, "bf16", "special", 4)), both("signed")[1]
    first = [*round8(x, code, 256, "bf16"), *round4(x, "nf4", 64, "bf16")]
    nested = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)[1]
    for _ in range(20):
        again = [*round8(x, code, 256, "bf16"), *round4(x, "nf4", 64, "bf16")]
        for one, two in zip(again, first, strict=True):
            assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)[1]
        assert torch.equal(state.offset.view(torch.int32), nested.offset.view(torch.int32))
        assert torch.equal(state.absmax, nested.absmax)


def check_repeated(got, pattern, rows, what):
    """`got` is `rows` repetitions of the pattern and a piece of it; compared in slices, not to need its size again."""
    pattern, length = pattern.to(got.device), pattern.numel()
    for row in range(0, rows, 256):
        count = min(256, rows - row)
        part = got[row * length : (row + count) * length].view(count, length)
        assert bool((part == pattern).all()), f"{what}: in repetitions {row} to {row + count}"
    tail = got[rows * length :]
    assert torch.equal(tail, pattern[: tail.numel()]), f"{what}: behind the last repetition"


@pytest.mark.large
def test_beyond_two_to_the_31():
    """More elements than an int counts: a pattern over and over, whose codes are known from the CPU."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("less than 20 GiB of device memory are free")
    length, rows, rest = 1 << 20, 2049, 4099
    n, pattern = rows * length + rest, values(length, "bf16", "normal", 5)
    piece, x = on_device(pattern), torch.empty(n, dtype=torch.bfloat16, device=cuda_cases.DEVICE)
    x[: rows * length].view(rows, length).copy_(piece)
    x[rows * length :] = piece[:rest]
    code = both("signed")
    expected = round8(pattern, code[0], 64, "bf16")  # in blocks of 64, the short one in the rest of 4099 ends in 3
    got = ops.quantize_blockwise(x, code[1], 64)
    check_repeated(got[0][: n - 3], expected[0], rows, "8-bit codes")
    check_repeated(got[1][:-1], expected[1], rows, "8-bit absmax")
    last = round8(pattern[rest - 3 : rest], code[0], 64, "bf16")
    check_same(got[0][-3:], last[0], "8-bit codes of the last block")
    back = ops.dequantize_blockwise(*got, code[1], 64, torch.bfloat16)
    check_repeated(back[: n - 3], expected[2], rows, "8-bit values")
    check_same(back[-3:], last[2], "8-bit values of the last block")
    del got, back
    expected = round4(pattern, "nf4", 64, "bf16")
    got = ops.quantize_4bit(x, 64, "nf4", torch.uint8)
    check_repeated(got[0].flatten()[: (n - 3) // 2], expected[0].flatten(), rows, "4-bit codes")
    check_repeated(got[1][:-1], expected[1], rows, "4-bit absmax")
    last = round4(pattern[rest - 3 : rest], "nf4", 64, "bf16")
    check_same(got[0].flatten()[-2:], last[0].flatten(), "4-bit codes of the last block")
    back = ops.dequantize_4bit(*got, 64, "nf4", [n], torch.bfloat16)
    check_repeated(back[: n - 3], expected[2], rows, "4-bit values")
    check_same(back[-3:], last[2], "4-bit values of the last block")
