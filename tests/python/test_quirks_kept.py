"""Odd habits of upstream's releases that clients and files rely on: one test or more for each, by number.

The numbers are those of section 9 of the description of the programming interface that this package was written from.
The tests use names of the public interface alone, and pass on upstream 0.50.1 too, except where the docstring says "not
on upstream's CPU": there they state what its GPU kernels do.
"""

import inspect
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.nn import Embedding8bit, EmbeddingNF4, Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantised(k=64, n=32, **options):
    torch.manual_seed(0)
    return Linear4bit(k, n, **{"quant_type": "nf4", **options}).to("cpu")


def test_quirk_01_the_first_move_quantises():
    """Also one to the CPU, where the weight is already; one to meta does not."""
    four, eight = Linear4bit(64, 32), Linear8bitLt(64, 32, has_fp16_weights=False)
    assert four.weight.dtype == eight.weight.dtype == torch.float32
    assert four.weight.quant_state is None
    assert eight.weight.SCB is None
    away = four.weight.to("meta"), eight.weight.to("meta")
    assert [(each.device.type, each.dtype, each.shape) for each in away] == [("meta", torch.float32, (32, 64))] * 2
    four, eight = four.to("cpu"), eight.to("cpu")
    assert four.weight.dtype == torch.uint8
    assert four.weight.shape == (1024, 1)
    assert eight.weight.dtype == torch.int8
    packed = four.weight.data.clone()
    four.to("cpu")
    assert torch.equal(four.weight.data, packed)
    assert EmbeddingNF4(10, 64).to("cpu").weight.dtype == torch.uint8
    assert Embedding8bit(10, 64).to("cpu").weight.dtype == torch.int8


def test_quirk_02_constructors_swallow_unknown_keywords():
    data = torch.randn(8, 64)
    assert Params4bit(data, _is_hf_initialized=True, whatever=3).quant_type == "fp4"
    assert not Int8Params(data, requires_grad=False, _is_hf_initialized=True).has_fp16_weights
    packed, state = F.quantize_4bit(data)
    made = Params4bit.from_prequantized(packed, state.as_dict(packed=True), device="cpu", whatever=3)
    assert torch.equal(made.data, packed)


def test_quirk_03_a_packed_row_is_a_transposed_weight():
    weight = torch.randn(32, 64)
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    assert packed.shape == (1024, 1)
    plain = F.dequantize_4bit(packed, state)
    assert torch.equal(F.dequantize_4bit(packed.t(), state), plain.t())
    x = torch.randn(3, 64)
    assert torch.equal(bnb.matmul_4bit(x, packed, quant_state=state), bnb.matmul_4bit(x, packed.t(), quant_state=state))


def test_quirk_04_a_state_can_be_indexed_and_nested_be_written():
    _, state = F.quantize_4bit(torch.randn(32, 64, dtype=torch.float16), quant_type="nf4", compress_statistics=True)
    assert state[0] is state.absmax
    assert (state[1], state[2], state[3], state[5]) == (torch.Size((32, 64)), torch.float16, 64, "nf4")
    assert state[4][0] is state.offset
    assert state[4][1] is state.state2
    state.nested = False
    assert not state.nested
    assert state[4] is None


def test_quirk_05_no_outlier_is_an_empty_tensor_with_a_threshold():
    x = torch.randn(4, 32).half()
    columns = F.int8_vectorwise_quant(x, threshold=100.0)[2]
    assert (columns.dtype, columns.shape) == (torch.int64, (0,))
    assert F.int8_vectorwise_quant(x)[2] is None
    assert F.int8_vectorwise_quant(x, threshold=float(x.abs().max()))[2].numel() == 1


def defaults(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_quirk_06_defaults_differ_by_name():
    assert defaults(Linear4bit)["quant_type"] == defaults(F.quantize_4bit)["quant_type"] == "fp4"
    replace = defaults(replace_parameter_4bit)
    assert (replace["quant_type"], replace["compress_statistics"]) == ("nf4", False)
    assert defaults(Linear4bit)["compress_statistics"] is True
    assert defaults(F.quantize_4bit)["compress_statistics"] is False
    assert defaults(F.quantize_blockwise)["blocksize"] == 4096
    assert defaults(Linear8bitLt)["has_fp16_weights"] is True
    assert defaults(Linear8bitLt)["threshold"] == 0.0
    _, state = F.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
    assert (state.blocksize, state.state2.blocksize) == (64, 256)


def test_quirk_06_the_default_type_differs_in_a_call():
    """Where it shows: the types of a Linear4bit and of a parametrised parameter, made without naming one."""
    module = torch.nn.Linear(64, 8)
    replace_parameter_4bit(module, "weight")
    names = [key for key in module.state_dict() if "quant_state" in key]
    assert names == ["weight.quant_state.bitsandbytes__nf4"]
    assert "weight.quant_state.bitsandbytes__fp4" in Linear4bit(64, 8).to("cpu").state_dict()


def test_quirk_07_zero_is_index_127_of_the_signed_map():
    code = F.create_dynamic_map()
    assert (code[127], code[255]) == (0.0, 1.0)
    assert code[0] == pytest.approx(-0.99296874)


def test_quirk_07_nf4_ties_take_the_lower_index():
    code = F.get_4bit_type("nf4", device="cpu")
    between = (code[:-1] + code[1:]) / 2
    row = torch.ones(16)
    row[:15] = between
    codes = unpack(F.quantize_4bit(row, quant_type="nf4", blocksize=64)[0])
    assert codes.tolist() == [*range(15), 15]
    row[:15] = torch.nextafter(between, torch.tensor(2.0))
    assert unpack(F.quantize_4bit(row, quant_type="nf4", blocksize=64)[0]).tolist() == [*range(1, 16), 15]


def unpack(packed):
    codes = packed.view(torch.uint8).reshape(-1)
    return torch.stack([codes >> 4, codes & 15], 1).reshape(-1)


def test_quirk_07_fp4_codes():
    """Not on upstream's CPU: the sign bit is that of the value, also of one that becomes zero; listed thresholds."""
    above = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
    row = torch.zeros(32)
    row[0], row[1], row[2], row[3] = 1.0, -1.0, 0.002, -0.002
    row[4:11] = torch.tensor(above)
    row[11:18] = torch.nextafter(torch.tensor(above), torch.tensor(2.0))
    row[18:25] = -torch.tensor(above)
    codes = unpack(F.quantize_4bit(row, quant_type="fp4", blocksize=64)[0]).tolist()
    assert codes[:4] == [3, 11, 0, 8]
    assert codes[4:11] == [0, 1, 6, 7, 4, 5, 2]
    assert codes[11:18] == [1, 6, 7, 4, 5, 2, 3]
    assert codes[18:25] == [8, 9, 14, 15, 12, 13, 10]
    assert codes[25:] == [0] * 7


def test_quirk_07_8bit_ties_take_the_even_index():
    """Not on upstream's CPU, which rounds to a grid first."""
    code = F.create_dynamic_map()
    middle = (code[:-1] + code[1:]) * 0.5
    codes, _ = F.quantize_blockwise(torch.cat([torch.ones(1), middle]), blocksize=256)
    lower = torch.arange(255)
    assert torch.equal(codes[1:].long(), lower + lower % 2)


def test_quirk_08_weights_of_the_other_orientation():
    weight = torch.randn(64, 32)  # [K, N]
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    x = torch.randn(3, 64)
    with pytest.warns(DeprecationWarning, match="Re-quantize"):
        y = bnb.matmul_4bit(x, packed.t(), quant_state=state)
    torch.testing.assert_close(y, x @ F.dequantize_4bit(packed, state), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["CxB", "CxBt", "formatB", "_tile_indices"])
def test_quirk_09_old_fields_of_the_state_answer_none(name):
    state = bnb.MatmulLtState()
    with pytest.warns(FutureWarning):
        assert getattr(state, name) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AttributeError):
            state.no_such_field  # noqa: B018


def test_quirk_10_a_missing_native_function_fails_when_called():
    function = bnb.cextension.lib.cno_such_function
    assert callable(function)
    with pytest.raises(RuntimeError):
        function()


def test_quirk_10_the_import_needs_no_gpu():
    code = "import bitsandbytes, torch; print(torch.cuda.is_available(), bitsandbytes.nn.Linear4bit.__name__)"
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, check=False, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "Linear4bit"], done.stderr


def test_quirk_11_the_function_returns_float16_and_the_operator_any_dtype():
    products, ones = torch.full((2, 3), 16129, dtype=torch.int32), torch.ones(3)
    assert F.int8_mm_dequant(products, ones[:2], ones).dtype == torch.float16
    op = torch.ops.bitsandbytes.int8_mm_dequant
    assert op(products, ones[:2], ones).dtype == torch.float16
    assert op(products, ones[:2], ones, dtype=torch.float32).dtype == torch.float32


def test_quirk_12_the_code_is_called_quant_map_in_files():
    layer = quantised(compress_statistics=False)
    state = layer.weight.quant_state
    assert state.as_dict()["quant_map"] is state.code
    assert "code" not in state.as_dict()
    assert torch.equal(layer.state_dict()["weight.quant_map"], state.code)
    payload = bytes(layer.state_dict()["weight.quant_state.bitsandbytes__nf4"].tolist())
    assert list(json.loads(payload)) == ["quant_type", "blocksize", "dtype", "shape"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_quirk_13_the_output_has_the_dtype_of_the_input(dtype):
    x = torch.randn(3, 64).to(dtype)
    for layer in (
        quantised(),
        quantised(compute_dtype=torch.bfloat16),
        quantised(compute_dtype=torch.float32),
        Linear8bitLt(64, 32, has_fp16_weights=False).to("cpu"),
        Linear8bitLt(64, 32, has_fp16_weights=False, threshold=2.0).to("cpu").eval(),
    ):
        assert layer(x).dtype == dtype
