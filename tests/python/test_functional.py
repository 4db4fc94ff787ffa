"""bitsandbytes.functional: names, shapes, out= and absmax=, nesting, layouts, compiling. No numbers: test_*_oracle."""

import ctypes

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bitsandbytes as bnb
import bitsandbytes.functional as F

TYPES = ("nf4", "fp4")


def sample(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------- codebooks


def test_maps_are_real_cpu_tensors_in_every_mode():
    expected = F.create_dynamic_map()
    assert (expected.shape, expected.dtype, expected.device.type) == ((256,), torch.float32, "cpu")
    with torch.device("meta"):
        moved = F.create_dynamic_map()
    with FakeTensorMode():
        faked = F.create_dynamic_map()
    with torch.inference_mode():
        inferred = F.create_dynamic_map()
    for made in (moved, faked, inferred):
        assert type(made) is torch.Tensor
        assert made.device.type == "cpu"
        assert torch.equal(made, expected)


def test_default_maps_are_not_captured_by_fake_or_meta_tensors(monkeypatch):
    monkeypatch.setattr(bnb.codebooks, "name2qmap", {})
    with FakeTensorMode() as mode:
        codes, state = F.quantize_blockwise(mode.from_tensor(sample(512)))
        packed, state4 = F.quantize_4bit(mode.from_tensor(sample(512)), compress_statistics=True)
    assert (codes.shape, state.code.shape, packed.shape, state4.code.shape) == ((512,), (256,), (256, 1), (16,))
    codes, _ = F.quantize_blockwise(sample(512).to("meta"))
    assert codes.device.type == "meta"
    for name, held in bnb.codebooks.name2qmap.items():
        assert type(held) is torch.Tensor, name
        assert held.device.type == "cpu", name
    back = F.dequantize_blockwise(*F.quantize_blockwise(sample(512)))
    assert (back - sample(512)).abs().max() < 0.03


def test_name2qmap_is_the_documented_cache():
    assert F.name2qmap is bnb.codebooks.name2qmap
    F.quantize_blockwise(sample(8))
    assert torch.equal(F.name2qmap["dynamic"], F.create_dynamic_map())


def test_a_state_never_shares_its_map():
    _, a = F.quantize_blockwise(sample(512))
    _, b = F.quantize_blockwise(sample(512))
    _, c = F.quantize_4bit(sample(512), compress_statistics=True)
    _, d = F.quantize_4bit(sample(512), compress_statistics=True)
    code = F.create_dynamic_map()
    _, e = F.quantize_blockwise(sample(512), code=code)
    maps = [a.code, b.code, c.code, d.code, c.state2.code, d.state2.code, code, e.code, F.name2qmap["dynamic"]]
    assert len({tensor.data_ptr() for tensor in maps}) == len(maps)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: F.create_dynamic_map(True, 9, 8), AssertionError),
        (lambda: F.create_dynamic_map(True, 0, 8), AssertionError),
        (lambda: F.create_dynamic_map(False, 8, 8), AssertionError),
        (lambda: F.create_dynamic_map(True, 7, 9), AssertionError),
        (lambda: F.create_dynamic_map(True, 2**32 + 7, 8), AssertionError),
        (lambda: F.create_dynamic_map(True, 7.0, 8), TypeError),
        (lambda: F.create_fp8_map(True, 5, 3, 8), AssertionError),
        (lambda: F.create_fp8_map(False, 5, 2, 8), AssertionError),
        (lambda: F.create_linear_map(True, 0), ValueError),
        (lambda: F.create_linear_map(True, 9), ValueError),
        (lambda: F.create_normal_map(0.5), ValueError),
        (lambda: F.create_normal_map(1.0), ValueError),
        (lambda: F.create_quantile_map(sample(300), 9), ValueError),
        (lambda: F.create_quantile_map(sample(300), 0), ValueError),
        (lambda: F.get_4bit_type("nf5", device="cpu"), NotImplementedError),
        (lambda: F.get_4bit_type("af4", device="cpu", blocksize=128), NotImplementedError),
    ],
)
def test_map_errors(make, error):
    with pytest.raises(error, match=r"\d|nf5"):
        make()


def test_get_4bit_type_devices_and_names():
    for name in ("nf4", "fp4", "int4", "af4"):
        table = F.get_4bit_type(name, device="cpu")
        assert (table.shape, table.dtype, table.abs().max().item()) == ((16,), torch.float32, 1.0)
    assert F.get_4bit_type("nf4").device.type == "cpu"
    with torch.device("meta"):
        assert F.get_4bit_type("nf4").device.type == "meta"


# ---------------------------------------------------------------- quantiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 7, 255, 256])
def test_quantiles_are_order_statistics(dtype, count):
    x = sample(1001, dtype=dtype)
    got = F.estimate_quantiles(x, num_quantiles=count)
    assert (got.shape, got.dtype) == ((count,), torch.float32)
    assert torch.equal(got, got.sort().values)
    assert torch.isin(got, x.float()).all()
    offset = 1 / (2 * count)
    target = torch.tensor([offset if count == 1 else offset + i * (1 - 2 * offset) / (count - 1) for i in range(count)])
    # A chosen probability may be 1/255 away (the 256 targets are thinned out); ranks add half a place.
    low = torch.quantile(x.float(), (target - 1 / 255 - 1 / 1000).clamp(0, 1), interpolation="lower")
    high = torch.quantile(x.float(), (target + 1 / 255 + 1 / 1000).clamp(0, 1), interpolation="higher")
    assert ((got >= low) & (got <= high)).all()


def test_quantiles_of_one_value_and_out():
    assert F.estimate_quantiles(torch.tensor([3.0])).unique().tolist() == [3.0]
    out = torch.empty(256)
    assert F.estimate_quantiles(sample(999), out=out) is out
    assert torch.equal(out, F.estimate_quantiles(sample(999)))
    with pytest.raises(ValueError, match=r"out: shape is .*255.*256"):
        F.estimate_quantiles(sample(999), out=torch.empty(255))


@pytest.mark.parametrize(
    ("x", "options", "error"),
    [
        (torch.zeros(300, dtype=torch.float64), {}, NotImplementedError),
        (torch.zeros(300, dtype=torch.int32), {}, NotImplementedError),
        (torch.zeros(300), {"num_quantiles": 257}, NotImplementedError),
        (torch.zeros(300), {"num_quantiles": 0}, ValueError),
        (torch.zeros(300), {"num_quantiles": -1}, ValueError),
        (torch.zeros(300), {"offset": -0.1}, ValueError),
        (torch.zeros(0), {}, ValueError),
    ],
)
def test_quantile_errors(x, options, error):
    with pytest.raises(error):
        F.estimate_quantiles(x, **options)


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantile_map(bits):
    code = F.create_quantile_map(sample(5000), bits)
    assert (code.shape, code.dtype) == ((256,), torch.float32)
    assert torch.equal(code, code.sort().values)
    assert code.abs().max() == 1
    assert len(code.unique()) <= 2**bits
    codes, state = F.quantize_blockwise(sample(5000), code=code, blocksize=5000)
    if bits == 8:
        assert (F.dequantize_blockwise(codes, state) - sample(5000)).abs().mean() < 0.0075 * sample(5000).abs().max()


# ---------------------------------------------------------------- 8-bit


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (1,), (255,), (3, 7, 129), ()])
def test_blockwise_shapes_and_state(shape, dtype, nested):
    x = sample(*shape, dtype=dtype)
    codes, state = F.quantize_blockwise(x, blocksize=64, nested=nested)
    blocks = -(-x.numel() // 64)
    assert (codes.shape, codes.dtype) == (x.shape, torch.uint8)
    assert (state.shape, state.quant_type, state.dtype, state.blocksize) == (None, None, dtype, 64)
    assert (state.absmax.shape, state.absmax.dtype) == ((blocks,), torch.uint8 if nested else torch.float32)
    assert (state.nested, state.state2 is not None, state.offset is not None) == (nested,) * 3
    if nested:
        assert (state.offset.shape, state.offset.dtype) == ((), torch.float32)
        assert (state.state2.blocksize, state.state2.dtype) == (64, torch.float32)
        assert state.state2.absmax.shape == (-(-blocks // 64),)
    back = F.dequantize_blockwise(codes, state)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    assert torch.allclose(back.float(), x.float(), atol=0.05)


def test_blockwise_default_block_is_4096_and_bare_absmax_gives_float32():
    x = sample(5000, dtype=torch.float16)
    codes, state = F.quantize_blockwise(x)
    assert (state.blocksize, state.absmax.numel()) == (4096, 2)
    bare = F.dequantize_blockwise(codes, absmax=state.absmax)
    assert bare.dtype == torch.float32
    assert torch.equal(bare.half(), F.dequantize_blockwise(codes, state))
    assert torch.equal(bare, F.dequantize_blockwise(codes, absmax=state.absmax, code=state.code, blocksize=4096))


def test_blockwise_out_and_absmax_are_filled_and_returned():
    x = sample(3, 200)
    codes, state = F.quantize_blockwise(x, blocksize=128)
    out, absmax = torch.empty(3, 200, dtype=torch.uint8), torch.empty(5)
    got, got_state = F.quantize_blockwise(x, blocksize=128, out=out, absmax=absmax)
    assert got is out
    assert got_state.absmax is absmax
    assert torch.equal(out, codes)
    assert torch.equal(absmax, state.absmax)
    back = torch.full((3, 200), 7.0)
    assert F.dequantize_blockwise(codes, state, out=back) is back
    assert torch.equal(back, F.dequantize_blockwise(codes, state))
    strided = torch.full((200, 3), 7.0).t()
    assert F.dequantize_blockwise(codes, state, out=strided) is strided
    assert torch.equal(strided, back)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out", {"out": torch.empty(3, 201, dtype=torch.uint8)}),
        ("out", {"out": torch.empty(3, 200, dtype=torch.int8)}),
        ("absmax", {"absmax": torch.empty(4)}),
        ("absmax", {"absmax": torch.empty(5, dtype=torch.float16)}),
        ("absmax", {"absmax": torch.empty(5), "nested": True}),
    ],
)
def test_blockwise_refuses_unfit_targets(name, options):
    with pytest.raises(ValueError, match=rf"{name}: .* expected"):
        F.quantize_blockwise(sample(3, 200), blocksize=128, **options)


def test_blockwise_needs_statistics():
    with pytest.raises(ValueError, match=r"quant_state and absmax are None"):
        F.dequantize_blockwise(torch.zeros(4, dtype=torch.uint8))


def test_blockwise_views_count_in_row_major_order():
    x = sample(64, 48)
    for view in (x.t(), x[::2], x[:, 5:17], x.expand(2, 64, 48)):
        codes, state = F.quantize_blockwise(view, blocksize=64)
        want, want_state = F.quantize_blockwise(view.contiguous(), blocksize=64)
        assert torch.equal(codes, want)
        assert torch.equal(state.absmax, want_state.absmax)
        assert torch.equal(
            F.dequantize_blockwise(codes.t().contiguous().t() if codes.dim() == 2 else codes, state),
            F.dequantize_blockwise(want, want_state),
        )


def test_expanded_statistics_of_a_nested_state():
    """What vLLM does: expand, then write the fields back."""
    packed, state = F.quantize_4bit(sample(512, 64), compress_statistics=True, quant_type="nf4")
    before = F.dequantize_4bit(packed, state)
    absmax = F.dequantize_blockwise(state.absmax, state.state2)
    absmax += state.offset
    state.absmax, state.nested, state.offset, state.state2 = absmax, False, None, None
    assert torch.allclose(F.dequantize_4bit(packed, state), before, atol=1e-6)
    assert "nested_absmax" not in state.as_dict()


# ---------------------------------------------------------------- 4-bit


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_4bit_storage_is_the_same_bytes(quant_type, nested, storage):
    x = sample(40, 64, dtype=torch.bfloat16)
    plain, _ = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=nested, quant_storage=storage)
    assert (packed.dtype, packed.shape) == (storage, (x.numel() // (2 * storage.itemsize), 1))
    assert torch.equal(packed.view(torch.uint8).flatten(), plain.flatten())
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (x.shape, x.dtype, 64, quant_type)
    assert torch.equal(state.code, F.get_4bit_type(quant_type, device="cpu"))
    back = F.dequantize_4bit(packed, state)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), back.t())
    if nested:
        assert (state.state2.blocksize, state.state2.dtype, state.absmax.dtype) == (256, torch.float32, torch.uint8)


@pytest.mark.parametrize("shape", [(0,), (1,), (2,), (1, 1), (2, 1), (1, 2), (1, 3), (3, 1), (3, 5, 7), (1, 1, 2), ()])
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_round_trip_keeps_any_shape(shape, nested):
    x = sample(*shape)
    packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
    assert packed.shape == (-(-x.numel() // 2), 1)
    assert F.dequantize_4bit(packed, state).shape == x.shape


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 9, 10, 1023])
def test_4bit_storage_is_padded_to_whole_items(storage, n):
    x = sample(n)
    plain, state = F.quantize_4bit(x)
    packed, _ = F.quantize_4bit(x, quant_storage=storage)
    bytes_needed = -(-n // 2)
    assert packed.shape == (-(-bytes_needed // storage.itemsize), 1)
    raw = packed.view(torch.uint8).flatten()
    assert torch.equal(raw[:bytes_needed], plain.flatten())
    assert (raw[bytes_needed:] == 0).all()
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, state))


def test_4bit_transposed_codes_of_three_dimensions():
    packed, state = F.quantize_4bit(sample(3, 5, 7))
    with pytest.raises(ValueError, match=r"\[1, 53\].*\[3, 5, 7\]"):
        F.dequantize_4bit(packed.t(), state)


def test_4bit_named_forms_and_defaults():
    x = sample(128, 64)
    for quantize, dequantize, name in (
        (F.quantize_fp4, F.dequantize_fp4, "fp4"),
        (F.quantize_nf4, F.dequantize_nf4, "nf4"),
    ):
        packed, state = quantize(x)
        want, want_state = F.quantize_4bit(x, quant_type=name, blocksize=64)
        assert state == want_state
        assert torch.equal(packed, want)
        assert torch.equal(dequantize(packed, state), F.dequantize_4bit(want, want_state))
        out = torch.empty(128, 64)
        assert torch.equal(dequantize(packed, absmax=state.absmax, out=out), dequantize(packed, state))
    assert F.quantize_4bit(x)[1].quant_type == "fp4"


@pytest.mark.parametrize("nested", [False, True])
def test_4bit_out_and_absmax_are_filled_and_returned(nested):
    x = sample(64, 64, dtype=torch.float16)
    packed, state = F.quantize_4bit(x, compress_statistics=nested)
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    got, got_state = F.quantize_4bit(x, out=out, absmax=absmax, compress_statistics=nested)
    assert got is out
    assert got_state.absmax is absmax
    assert got_state == state
    back = torch.empty(64, 64, dtype=torch.float16)
    assert F.dequantize_4bit(packed, state, out=back) is back
    assert torch.equal(back, F.dequantize_4bit(packed, state))
    turned = F.dequantize_4bit(packed.t(), state, out=torch.empty(64, 64, dtype=torch.float16))
    assert torch.equal(turned, back.t())


@pytest.mark.parametrize("missing", [{}, {"absmax": torch.ones(1)}, {"out": torch.empty(4)}])
def test_4bit_needs_statistics_and_target(missing):
    with pytest.raises(ValueError, match="both absmax and out"):
        F.dequantize_4bit(torch.zeros(2, 1, dtype=torch.uint8), **missing)


def test_functional_calls_are_not_recorded_by_autograd():
    x = sample(64, 64).requires_grad_()
    with torch.no_grad():
        packed, state = F.quantize_4bit(x)
    assert not F.dequantize_4bit(packed, state).requires_grad


# ---------------------------------------------------------------- other


@pytest.mark.parametrize("nested", [False, True])
def test_full_graph_compilation(nested):
    def both(x):
        codes, state = F.quantize_blockwise(x, blocksize=256, nested=nested)
        packed, state4 = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
        return F.dequantize_blockwise(codes, state), F.dequantize_4bit(packed, state4)

    x = sample(96, 64)
    for got, want in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True):
        assert torch.equal(got, want)


def test_get_ptr():
    x = sample(4)
    assert F.get_ptr(None) is None
    assert isinstance(F.get_ptr(x), ctypes.c_void_p)
    assert F.get_ptr(x).value == x.data_ptr()


def test_is_on_gpu():
    x, paged = sample(2), sample(2)
    assert F.is_on_gpu([x, None, x.clone()])
    assert F.is_on_gpu([])
    with pytest.raises(RuntimeError, match=r"cpu.*meta"):
        F.is_on_gpu([x, x.to("meta")])
    paged.is_paged = True
    assert F.is_on_gpu([x.to("meta"), paged])


def test_optimizer_updates_work_in_place_and_return_none():
    g, p, m, v = sample(300), sample(300, seed=1), torch.zeros(300), torch.zeros(300)
    want = torch.nn.Parameter(p.clone())
    want.grad = g.clone()
    torch.optim.AdamW([want], lr=1e-2, weight_decay=0.1).step()
    done = F.optimizer_update_32bit("adam", g, p, m, 0.9, 1e-8, 1, 1e-2, v, 0.999, weight_decay=0.1)
    assert done is None
    assert torch.allclose(p, want.data, atol=1e-6)
    assert torch.allclose(m, 0.1 * g)
    p8, q1, q2 = sample(300, seed=1), *(torch.zeros(300, dtype=torch.uint8) for _ in range(2))
    a1, a2 = torch.zeros(2), torch.zeros(2)
    maps = F.create_dynamic_map(), F.create_dynamic_map(signed=False)
    done = F.optimizer_update_8bit_blockwise(
        "adam", g, p8, q1, q2, 0.9, 0.999, 0.0, 0.0, 1e-8, 1, 1e-2, *maps, a1, a2, weight_decay=0.1
    )
    assert done is None
    assert torch.allclose(p8, want.data, atol=1e-6)
    assert torch.allclose(a1, torch.stack([m[:256].abs().max(), m[256:].abs().max()]))


def test_trust_clipping():
    """The step is bounded by the norm of p, and unorm_vec receives the sum of squares of the update."""
    p, g, unorm = torch.full((4,), 3.0), torch.full((4,), 0.5), torch.zeros(1)
    states = torch.zeros(4), torch.zeros(4)
    F.optimizer_update_32bit(
        *("adam", g, p, states[0], 0.9, 0.0, 1, 0.5, states[1], 0.9), max_unorm=0.1, unorm_vec=unorm
    )
    assert torch.allclose(unorm, torch.tensor(4.0))  # u is 1 everywhere
    assert torch.allclose(p, torch.full((4,), 3.0 - 0.5 * 0.1 * 6.0 / 2.0))


def test_percentile_clipping():
    history = torch.zeros(100)
    for step, size in enumerate((2.0, 2.0, 20.0), 1):
        norm, limit, scale = F.percentile_clipping(torch.full((4,), size / 2), history, step, percentile=50)
        assert norm == size
        assert limit == 2.0
        assert torch.allclose(scale, torch.tensor(2.0 / size))
    assert history[3] == 400.0
    assert history[:3].eq(4.0).all()
    assert history[4:].eq(4.0).all()
    for bad in ({"percentile": 100}, {"percentile": -1}, {"step": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            F.percentile_clipping(**({"grad": torch.ones(4), "gnorm_vec": history, "step": 4} | bad))


def test_everything_public_exists():
    for name in F.__all__:
        assert hasattr(F, name), name
    assert bnb.functional is F
    assert bnb.utils.sync_gpu(sample(1)) is None
    assert bnb.utils.execute_and_return("printf one") == ("one", "")
