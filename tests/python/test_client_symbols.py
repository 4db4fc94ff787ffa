"""The C functions that unsloth and axolotl bind by hand, called as they call them (src/clients/ctypes.h).

Addresses come from functional.get_ptr, sizes are ctypes integers, argument types are never declared, and the stream is
an address, None, or an object that carries one.
"""

import ctypes
from ctypes import c_int, c_int32, c_void_p

import pytest
import torch

from bitsandbytes import functional as F
from bitsandbytes.functional import get_ptr, lib

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class Stream:
    """As torch.cuda.Stream: ctypes passes what `_as_parameter_` holds."""

    _as_parameter_ = c_void_p(None)


@pytest.fixture(params=[None, c_void_p(None), Stream()], ids=["None", "address", "object"])
def stream(request):
    return request.param


def test_all_are_ctypes_functions():
    """Unsloth gives up 4-bit and 8-bit alike if one has no restype."""
    for dtype in NAMES.values():
        for name in (f"cdequantize_blockwise_{dtype}", f"cgemm_4bit_inference_naive_{dtype}"):
            assert getattr(lib, name).restype is ctypes.c_int
        for kind in ("nf4", "fp4"):
            assert getattr(lib, f"cdequantize_blockwise_{dtype}_{kind}").restype is ctypes.c_int


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("n", [1, 63, 64 * 7, 64 * 7 + 5])
def test_dequantize_4bit(dtype, kind, n, stream):
    packed, state = F.quantize_4bit(torch.randn(n, dtype=dtype), quant_type=kind)
    out = torch.full((n,), float("nan"), dtype=dtype)
    function = getattr(lib, f"cdequantize_blockwise_{NAMES[dtype]}_{kind}")
    function(None, get_ptr(packed), get_ptr(state.absmax), get_ptr(out), c_int(64), c_int(n), stream)
    assert torch.equal(out, F.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("blocksize", [64, 256, 100])
def test_dequantize_8bit(dtype, blocksize, stream):
    codes, state = F.quantize_blockwise(torch.randn(1003, dtype=dtype), blocksize=blocksize)
    out = torch.full((1003,), float("nan"), dtype=dtype)
    getattr(lib, f"cdequantize_blockwise_{NAMES[dtype]}")(
        get_ptr(state.code), get_ptr(codes), get_ptr(state.absmax), get_ptr(out), c_int(blocksize), c_int(1003), stream
    )
    assert torch.equal(out, F.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_gemm_4bit(dtype, kind, rows, stream):
    m, k = 40, 192
    weight = torch.randn(m, k, dtype=dtype)
    packed, state = F.quantize_4bit(weight, quant_type=kind)
    x = torch.randn(rows, k, dtype=dtype)
    out = torch.full((rows, m), float("nan"), dtype=dtype)
    sizes = c_int32(m), c_int32(rows), c_int32(k)
    strides = c_int32(m), c_int32((k + 1) // 2), c_int32(m)
    getattr(lib, f"cgemm_4bit_inference_naive_{NAMES[dtype]}")(
        *sizes, get_ptr(x), get_ptr(packed), get_ptr(state.absmax), get_ptr(state.code), get_ptr(out), *strides,
        c_int32(64), stream,
    )  # fmt: skip
    state.dtype = torch.float32
    exact = x.double() @ F.dequantize_4bit(packed, state).double().t()
    error = (out.double() - exact).abs().max() / exact.abs().max()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_nested_statistics_as_a_client_expands_them():
    """Unsloth decodes the nested scales with the 8-bit function, adds the offset, then decodes the weight."""
    packed, state = F.quantize_4bit(torch.randn(64, 96), quant_type="nf4", compress_statistics=True)
    inner = state.state2
    absmax = torch.empty(state.absmax.shape)
    lib.cdequantize_blockwise_fp32(
        get_ptr(inner.code), get_ptr(state.absmax), get_ptr(inner.absmax), get_ptr(absmax), c_int(inner.blocksize),
        c_int(absmax.numel()), None,
    )  # fmt: skip
    absmax += state.offset
    out = torch.empty(64, 96)
    lib.cdequantize_blockwise_fp32_nf4(
        None, get_ptr(packed), get_ptr(absmax), get_ptr(out), c_int(64), c_int(out.numel()), None
    )
    assert torch.equal(out, F.dequantize_4bit(packed, state))


def test_failures_raise_and_write_nothing():
    packed, state = F.quantize_4bit(torch.randn(128), quant_type="nf4")
    out = torch.full((128,), 7.0)
    with pytest.raises(RuntimeError, match=r"cdequantize_blockwise_fp32_nf4: .*block is 48"):
        lib.cdequantize_blockwise_fp32_nf4(
            None, get_ptr(packed), get_ptr(state.absmax), get_ptr(out), c_int(48), c_int(128), None
        )
    with pytest.raises(RuntimeError, match="absmax is NULL"):
        lib.cdequantize_blockwise_fp32_nf4(None, get_ptr(packed), None, get_ptr(out), c_int(64), c_int(128), None)
    with pytest.raises(RuntimeError, match="ptr is NULL"):
        lib.cdequantize_blockwise_fp32_nf4(
            None, get_ptr(packed), get_ptr(state.absmax), None, c_int(64), c_int(128), None
        )
    with pytest.raises(RuntimeError, match="expected those of NF4 or FP4"):
        lib.cgemm_4bit_inference_naive_fp32(
            c_int(2), c_int(1), c_int(64), get_ptr(out), get_ptr(packed), get_ptr(state.absmax),
            get_ptr(torch.zeros(16)), get_ptr(out), c_int(2), c_int(32), c_int(2), c_int(64), None,
        )  # fmt: skip
    assert (out == 7.0).all()
