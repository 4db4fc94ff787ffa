"""The error bounds that upstream's own tests use: quantisers, then Adam."""

import pytest
import torch

import bitsandbytes.functional as F
import bitsandbytes.optim as optim

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCKS4 = [32, 64, 128, 256, 512, 1024, 2048, 4096]
BOUNDS4 = {  # per block size: mean and standard deviation of the absolute, then of the relative error
    "fp4": (
        [0.088925, 0.096543, 0.102969, 0.108684, 0.114115, 0.119333, 0.124556, 0.129536],
        [0.000091, 0.000111, 0.000134, 0.000182, 0.000234, 0.000320, 0.000455, 0.000612],
        [0.242443, 0.260125, 0.275817, 0.289831, 0.302881, 0.315000, 0.326607, 0.337169],
        [0.000330, 0.000379, 0.000433, 0.000497, 0.000583, 0.000757, 0.000955, 0.001239],
    ),
    "nf4": (
        [0.067746, 0.072798, 0.076831, 0.080337, 0.083547, 0.086610, 0.089592, 0.092547],
        [0.000069, 0.000074, 0.000091, 0.000102, 0.000143, 0.000187, 0.000251, 0.000360],
        [0.189726, 0.203339, 0.215237, 0.226105, 0.236079, 0.245370, 0.254163, 0.262473],
        [0.000304, 0.000340, 0.000391, 0.000398, 0.000544, 0.000600, 0.000747, 0.000999],
    ),
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def errors(x, y):
    """Mean absolute error, and mean relative error as upstream's tests take it."""
    difference = torch.abs(x.float() - y.float())
    return difference.mean().item(), (difference / (torch.abs(x.float()) + 1e-8)).mean().item()


@pytest.mark.parametrize("torch_dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_8bit_normal_and_uniform(torch_dtype, blocksize, nested):
    x = torch.randn(512, 1024, generator=generator(1)).to(torch_dtype)
    q, s = F.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    y = F.dequantize_blockwise(q, s)
    absolute, relative = errors(x, y)
    assert y.dtype == torch_dtype and absolute < 0.011 and relative < 0.018
    u = torch.rand(512, 1024, generator=generator(2)).to(torch_dtype)
    for code, abs_bound, rel_bound in ((None, 0.0036, 0.015), (F.create_dynamic_map(signed=False), 0.0023, 0.012)):
        q, s = F.quantize_blockwise(u, code=code, blocksize=blocksize, nested=nested)
        absolute, relative = errors(u, F.dequantize_blockwise(q, s))
        assert absolute < abs_bound and relative < rel_bound


@pytest.mark.large
@pytest.mark.parametrize("blocksize", [4096, 16384])
def test_8bit_large(blocksize):
    x = torch.randn(1000, 3000, generator=generator(3))
    q, s = F.quantize_blockwise(x, blocksize=blocksize)
    assert errors(x, F.dequantize_blockwise(q, s))[0] < 0.011


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("method", ["linear", "fp8", "dynamic"])
def test_few_bit_maps(bits, method):
    """256 entries, 2^bits or one less of them different, and each entry's own value comes back."""
    code = {
        "linear": lambda: F.create_linear_map(True, bits),
        "fp8": lambda: F.create_fp8_map(True, bits - 2 if bits > 2 else 1, 1 if bits > 2 else 0, bits),
        "dynamic": lambda: F.create_dynamic_map(True, bits - 1, bits),
    }[method]()
    assert code.numel() == 256 and code.unique().numel() in (2**bits, 2**bits - 1)
    x = code.unique()
    x = torch.cat([x, torch.ones(1)])
    q, s = F.quantize_blockwise(x, code=code)
    assert torch.equal(F.dequantize_blockwise(q, s), x)


@pytest.mark.large
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", BLOCKS4)
def test_4bit(kind, blocksize):
    x = torch.randn(1024, 1024, generator=generator(4))
    at = BLOCKS4.index(blocksize)
    abs_mean, abs_std, rel_mean, rel_std = (row[at] for row in BOUNDS4[kind])
    for torch_dtype in DTYPES:
        a = x.to(torch_dtype)
        p, s = F.quantize_4bit(a, blocksize=blocksize, quant_type=kind)
        y = F.dequantize_4bit(p, s)
        absolute, relative = errors(a, y)
        assert y.shape == x.shape and absolute < abs_mean + 7 * abs_std and relative < rel_mean + 7 * rel_std
        if torch_dtype == torch.float32:
            assert absolute > abs_mean - 7 * abs_std, "better than the format allows: the data is not what it seems"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_4bit_double_quantised(kind, blocksize):
    x = torch.randn(1024, 1024, generator=generator(5)).half()
    p, s = F.quantize_4bit(x, blocksize=blocksize, compress_statistics=True, quant_type=kind)
    absolute, relative = errors(x, F.dequantize_4bit(p, s))
    assert absolute < 0.11 and relative < 0.28
    plain = errors(x, F.dequantize_4bit(*F.quantize_4bit(x, blocksize=blocksize, quant_type=kind)))[0]
    assert abs(absolute - plain) < 0.01 * plain, "nested statistics cost less than 1 % more error"


def test_serialised_size():
    x = torch.randn(300, 400, generator=generator(6)).half()
    for nested in (False, True):
        p, s = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
        size = p.numel() + sum(t.numel() * t.element_size() for t in s.as_dict(packed=True).values())
        assert size < 0.29 * 2 * x.numel()


@pytest.mark.parametrize("normal, bound", [(True, 0.0075), (False, 0.001)])
def test_quantile_codebook(normal, bound):
    """Removed upstream tests: quantise with the map of the data's own quantiles."""
    make = torch.randn if normal else torch.rand
    x = make(1024, 1024, generator=generator(7))
    code = F.create_quantile_map(x)
    scale = x.abs().max()
    q, s = F.quantize_blockwise(x, code=code, blocksize=x.numel())
    assert torch.equal(s.absmax[0], scale)
    estimate = F.create_quantile_map(x)
    assert torch.equal(estimate, code)
    # The map is scaled by the largest quantile, which lies inside the data: bring x to that unit.
    unit = F.estimate_quantiles(x, num_quantiles=255).abs().max()
    inside = x.clamp(-unit, unit)
    q, s = F.quantize_blockwise(inside, code=code, blocksize=x.numel())
    error = torch.abs(inside - F.dequantize_blockwise(q, s)) / (unit if normal else 1)
    assert error.mean() < bound


# ---- optimizers


def misses(a, b, atol, rtol):
    return int(torch.sum(torch.abs(a - b) > atol + rtol * torch.abs(b)))


BOUNDS32 = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-4, 1e-3), torch.bfloat16: (1e-3, 1e-2)}


@pytest.mark.parametrize("torch_dtype", DTYPES)
@pytest.mark.parametrize(
    "make, dim",
    [(optim.Adam, 1024), (optim.AdamW, 32), (optim.AdamW, 1), (optim.PagedAdam, 32), (optim.PagedAdamW, 32)],
)
def test_32bit_adam(torch_dtype, make, dim, tmp_path):
    """20 steps beside torch's optimizer in fp32, through a file every fourth step."""
    g = generator(8)
    p = torch.nn.Parameter((torch.randn(1024, dim, generator=g) * 0.1).to(torch_dtype))
    exact = torch.nn.Parameter(p.data.float().clone())
    decay = 0.0 if make in (optim.Adam, optim.PagedAdam) else 1e-2
    mine, reference = make([p]), torch.optim.AdamW([exact], weight_decay=decay)
    atol, rtol = BOUNDS32[torch_dtype]
    for step in range(20):
        grad = (torch.randn(p.shape, generator=g) * 0.01).to(torch_dtype)
        p.grad, exact.grad = grad.clone(), grad.float()
        mine.step()
        reference.step()
        for ours, theirs in (("state1", "exp_avg"), ("state2", "exp_avg_sq")):
            assert misses(mine.state[p][ours], reference.state[exact][theirs], atol, rtol) == 0
        assert misses(p.data.float(), exact.data, atol, rtol) <= 15
        if step % 4 == 3:
            torch.save(mine.state_dict(), tmp_path / "optimizer.pt")
            mine = make([p])
            mine.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
            assert mine.state[p]["state1"].dtype == torch.float32
        exact.data.copy_(p.data)  # 16-bit parameters drift: the states are what is compared over many steps


BOUNDS8 = {  # mean absolute and relative parameter error; then tolerances of every element at each tenth step
    torch.float32: (6e-5, 6e-4, 1e-5, 1e-3),
    torch.float16: (6e-5, 6e-4, 1e-5, 1e-3),
    torch.bfloat16: (1.7e-4, 1.6e-3, 1e-4, 1e-2),
}


@pytest.mark.parametrize("torch_dtype", DTYPES)
@pytest.mark.parametrize("dim, steps", [(32, 50), (1024, 10), (4097, 2)])
def test_8bit_adam(torch_dtype, dim, steps, tmp_path):
    """Beside torch's Adam, whose state and parameter are set to ours after each step."""
    g = generator(9)
    p = torch.nn.Parameter((torch.randn(1024, dim, generator=g) * 0.1).to(torch_dtype))
    exact = torch.nn.Parameter(p.data.float().clone())
    mine, reference = optim.Adam8bit([p]), torch.optim.Adam([exact])
    abs_bound, rel_bound, atol, rtol = BOUNDS8[torch_dtype]
    absolute, relative = [], []
    for step in range(steps):
        grad = (torch.randn(p.shape, generator=g) * 0.01).to(torch_dtype)
        p.grad, exact.grad = grad.clone(), grad.float()
        mine.step()
        reference.step()
        difference = torch.abs(p.data.float() - exact.data)
        absolute.append(difference.mean().item())
        relative.append((difference / (torch.abs(exact.data) + 1e-9)).mean().item())
        state = mine.state[p]
        for n, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
            theirs = reference.state[exact][name]
            scale, code = state[f"absmax{n}"], state[f"qmap{n}"]
            ours = F.dequantize_blockwise(state[f"state{n}"], absmax=scale, code=code, blocksize=256).view_as(theirs)
            assert misses(ours, theirs, 3e-3, 1e-3) < 20
            half = torch.max(torch.diff(code)) / 2  # as far as -1.0 is from the signed map's first entry
            limit = (half + 1e-6) * scale.repeat_interleave(256)[: theirs.numel()].view_as(theirs)
            assert torch.all(torch.abs(ours - theirs) <= limit + 1e-5 * torch.abs(theirs)), "half a gap of the map"
            theirs.copy_(ours)
        if step % 10 == 9:
            assert torch.all(difference <= atol + rtol * torch.abs(exact.data))
            torch.save(mine.state_dict(), tmp_path / "optimizer.pt")
            before = {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
            mine = optim.Adam8bit([p])
            mine.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
            after = mine.state[p]
            assert all(torch.equal(after[k], v) for k, v in before.items()) and after["step"] == step + 1
        exact.data.copy_(p.data)
    assert sum(absolute) / steps < abs_bound and sum(relative) / steps < rel_bound
