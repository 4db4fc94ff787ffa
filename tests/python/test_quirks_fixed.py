"""Defects of upstream's releases that this package does not have, numbers 1 to 15: one test or more for each.

The numbers are those of section 10 of the description of the programming interface that this package was written from;
16 to 29 are in test_quirks_fixed_16_to_29.py.  The tests use names of the public interface alone, and fail on upstream
0.50.1, except where the docstring says why they cannot fail on its CPU.
Number 12, CUDA kernels that run on the default stream, has no test on the CPU.
"""

import logging

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantised(k=64, n=32, **options):
    torch.manual_seed(0)
    return Linear4bit(k, n, **{"quant_type": "nf4", **options}).to("cpu")


def new_8bit(k=64, n=32, **options):
    torch.manual_seed(0)
    return Linear8bitLt(k, n, **{"has_fp16_weights": False, **options}).to("cpu")


def plain_4bit(packed, state):
    """Decode by the definition: code times the scale of the flat block, in float32, then one rounding."""
    codes = packed.view(torch.uint8).reshape(-1)
    codes = torch.stack([codes >> 4, codes & 15], 1).reshape(-1)[: state.shape.numel()]
    scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes.long()] * scales).reshape(state.shape).to(state.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quirk_01_zero_stays_zero(dtype):
    x = torch.zeros(256, dtype=dtype)
    x[3] = 1.0
    codes, state = F.quantize_blockwise(x, blocksize=256)
    assert (codes == 127).sum() == 255
    assert torch.equal(F.dequantize_blockwise(codes, state), x)
    unsigned = F.create_dynamic_map(signed=False)
    assert F.quantize_blockwise(x, code=unsigned, blocksize=256)[0].eq(0).sum() == 255


@pytest.mark.parametrize("signed", [True, False])
def test_quirk_01_the_nearest_code_is_exact(signed):
    """Also of values far below a step of a uniform grid, which upstream merges."""
    code = F.create_dynamic_map(signed=signed)
    x = torch.cat([torch.ones(1), torch.logspace(-8, 0, 2000)])
    codes, _ = F.quantize_blockwise(torch.cat([x, -x]) if signed else x, code=code, blocksize=4096)
    x = torch.cat([x, -x]) if signed else x
    distance = (x.double()[:, None] - code.double()[None]).abs()
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    assert (chosen <= distance.min(1).values * (1 + 1e-6)).all()
    assert codes.unique().numel() > 200


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quirk_02_blocks_are_those_of_the_flat_tensor(quant_type):
    """On upstream with AVX-512 rows that are no whole blocks get the scales of others."""
    torch.manual_seed(0)
    weight = torch.randn(20, 96) * torch.logspace(-3, 3, 20)[:, None]
    packed, state = F.quantize_4bit(weight, quant_type=quant_type, blocksize=64)
    assert torch.equal(F.dequantize_4bit(packed, state), plain_4bit(packed, state))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_quirk_03_no_byte_is_lost_in_float_storage(storage):
    x = torch.randn(10)  # 5 bytes
    packed, state = F.quantize_4bit(x, quant_storage=storage, quant_type="nf4")
    plain, plain_state = F.quantize_4bit(x, quant_type="nf4")
    assert packed.dtype == storage
    assert torch.equal(packed.view(torch.uint8).reshape(-1)[:5], plain.reshape(-1))
    assert torch.equal(F.dequantize_4bit(packed, state), F.dequantize_4bit(plain, plain_state))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_quirk_04_a_cast_leaves_packed_bytes_alone(storage):
    layer = quantised(quant_storage=storage)
    before = layer.weight.data.clone().view(torch.uint8)
    for cast in (layer.half, layer.float, layer.bfloat16, lambda: layer.to(torch.float64)):
        cast()
        assert layer.weight.dtype == storage
        assert torch.equal(layer.weight.data.view(torch.uint8), before)


@pytest.mark.parametrize("training, shape", [(True, (2, 5, 64)), (False, (5, 64)), (False, (2, 5, 64))])
def test_quirk_05_the_weight_gradient_of_an_int8_product(training, shape):
    """Upstream: wrong on the GPU; on the CPU it raises, in training mode for 3-D inputs, in eval mode for all."""
    torch.manual_seed(0)
    layer = Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu").train(training)
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 32)
    layer(x).backward(grad)
    expected = grad.reshape(-1, 32).t() @ x.reshape(-1, 64)
    assert (layer.weight.grad - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("mode", ["eval", "zeroed"])
def test_quirk_06_codes_follow_the_master_weight(mode):
    """After a step of the optimizer: in eval mode, or with gradients that are zeroed and not dropped."""
    torch.manual_seed(0)
    layer = Linear8bitLt(64, 32, has_fp16_weights=True).to("cpu")
    optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    x = torch.randn(4, 64)
    layer(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    if mode == "eval":
        layer.eval().requires_grad_(False)
    with torch.no_grad():
        y, expected = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
    assert (y - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("used", [False, True])
def test_quirk_07_the_int8_state_moves_with_the_parent(used):
    """A move that a machine without a GPU can make: all tensors of the parent get new memory."""
    layer = new_8bit()
    model = nn.Sequential(nn.Sequential(layer))
    if used:
        model(torch.randn(2, 64))
    model._apply(lambda tensor: tensor.clone())
    codes = layer.state.CB if used else layer.weight.CB
    assert codes.data_ptr() == layer.weight.data_ptr()
    model(torch.randn(2, 64))
    assert layer.state.CB.data_ptr() == layer.weight.data_ptr()


def test_quirk_08_an_int8_checkpoint_loads_after_a_forward():
    source, target = new_8bit(), new_8bit()
    source.weight.data.neg_()
    target(torch.randn(2, 64))
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.weight.data, source.weight.data)
    x = torch.randn(2, 64)
    assert torch.equal(target(x), source(x))


def test_quirk_08_a_float_checkpoint_is_not_cast_to_int8():
    source, target = nn.Linear(64, 32), new_8bit()
    target.load_state_dict(source.state_dict(), strict=False)
    x = torch.randn(4, 64)
    assert (target(x) - source(x)).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quirk_09_outputs_beyond_the_range_of_float16(dtype):
    """A defect of upstream's GPU path, not of its CPU path."""
    layer = new_8bit(bias=False).eval()
    layer.weight.data.fill_(127)
    layer.load_state_dict({**layer.state_dict(), "SCB": torch.full((32,), 1000.0)})
    y = layer(torch.full((2, 64), 10.0, dtype=dtype))
    assert torch.isfinite(y).all()
    assert torch.allclose(y.float(), torch.tensor(640000.0), rtol=0.01)


def test_quirk_09_at_most_one_message_about_the_dtype(caplog):
    layer = new_8bit().eval()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            layer(torch.randn(2, 64))
    assert len([record for record in caplog.records if "cast" in record.getMessage()]) <= 1


@pytest.mark.parametrize("shape", [(64,), (2, 3, 4, 64), (1, 2, 1, 2, 64)])
def test_quirk_10_activations_of_any_rank(shape):
    layer, x = new_8bit().eval(), torch.randn(shape)
    assert torch.equal(layer(x), layer(x.reshape(-1, 64)).reshape(*shape[:-1], 32))


def test_quirk_10_rows_of_gemv_and_strides():
    """Both are defects of upstream's CUDA kernels only; here: rows are all computed, strides obeyed."""
    packed, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    x = torch.randn(5, 64)
    together = F.gemv_4bit(x, packed, state=state)
    one_by_one = torch.cat([F.gemv_4bit(row[None], packed, state=state) for row in x])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
    wide = torch.randn(64, 6).half()
    for given, expected in zip(
        F.int8_vectorwise_quant(wide.t()), F.int8_vectorwise_quant(wide.t().contiguous()), strict=True
    ):
        assert given is expected is None or torch.equal(given, expected)


def test_quirk_11_out_of_the_4bit_functions():
    packed, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    out = torch.empty(32, 64)
    assert F.dequantize_4bit(packed, state, out=out) is out
    assert torch.equal(out, F.dequantize_4bit(packed, state))


def test_quirk_11_out_of_gemv():
    packed, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    x, out = torch.randn(1, 64), torch.empty(1, 32)
    assert F.gemv_4bit(x, packed, state=state, out=out) is out
    assert torch.equal(out, F.gemv_4bit(x, packed, state=state))


def test_quirk_11_out_of_dequantize_blockwise():
    codes, state = F.quantize_blockwise(torch.randn(300))
    out = torch.empty(300)
    assert F.dequantize_blockwise(codes, state, out=out) is out
    assert torch.equal(out, F.dequantize_blockwise(codes, state))


def test_quirk_11_double_quant():
    x = torch.randn(6, 40).half()
    rows, columns, row_stats, column_stats, outliers = F.int8_double_quant(x)
    assert torch.equal(rows, F.int8_vectorwise_quant(x)[0])
    assert torch.equal(column_stats, x.float().abs().amax(0))
    assert torch.equal(row_stats, x.float().abs().amax(1))
    assert torch.equal(columns, torch.round(x.float() * (127 / column_stats)).to(torch.int8))
    assert outliers is None


@pytest.mark.parametrize("exponents", range(1, 7))
def test_quirk_13_unsigned_dynamic_maps(exponents):
    code = F.create_dynamic_map(signed=False, max_exponent_bits=exponents)
    assert code.shape == (256,)
    assert torch.equal(code, code.sort().values)
    assert (code[0], code[255]) == (0.0, 1.0)


@pytest.mark.parametrize("bits", range(2, 8))
def test_quirk_13_unsigned_linear_maps(bits):
    code = F.create_linear_map(signed=False, total_bits=bits)
    assert torch.equal(code, code.sort().values)
    assert torch.allclose(code.unique(), torch.linspace(0, 1, 2**bits))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quirk_14_the_scale_of_a_tail_of_zeros_is_zero(quant_type):
    x = torch.cat([torch.ones(64), torch.zeros(10)])
    _, state = F.quantize_4bit(x, quant_type=quant_type, blocksize=64)
    assert state.absmax.tolist() == [1.0, 0.0]


def test_quirk_15_the_scale_of_an_int8_product():
    products, ones = torch.full((1, 1), 16129, dtype=torch.int32), torch.ones(1)
    result = torch.ops.bitsandbytes.int8_mm_dequant(products, ones, ones, dtype=torch.float32)
    assert abs(result.item() - 1.0) <= 2.0**-23
    assert bnb.functional.int8_mm_dequant(products, ones, ones).item() == 1.0
