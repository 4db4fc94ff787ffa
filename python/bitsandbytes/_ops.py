"""The operators of torch.ops.bitsandbytes: schemas, fakes, and call().  Those of the matrix products: _ops_gemm.py.

The kernels are C functions that the native library registers for the CPU and for CUDA (src/torch).  The functions here
are the fakes: they give shapes and dtypes to torch.compile, torch.export and meta tensors, and compute nothing.
Schemas without a leading underscore are a public contract; those with one may change.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import cextension

# The registrations live as long as this object.
library = torch.library.Library("bitsandbytes", "FRAGMENT")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_EXCEPTIONS = {1: ValueError, 2: ValueError, 4: torch.OutOfMemoryError, 6: NotImplementedError}  # by bnb_status

# torch.library's own functions, under the names that out-of-tree backends use.
register_fake = torch.library.register_fake
register_kernel = torch.library.register_kernel


def _own_error(error: Exception) -> Exception | None:
    """The exception that stands for a failure of the library; None if `error` comes from elsewhere."""
    if cextension.load_error is not None:
        return RuntimeError(cextension.load_error)
    detail = cextension.last_detail()
    if not detail or not str(error).startswith(detail):
        return None
    return _EXCEPTIONS.get(cextension.last_status(), RuntimeError)(detail)


def call(op: Callable[..., Any], *args: Any) -> Any:
    """Run the operator overload `op` on `args` and return its result.

    A refusal by the library becomes ValueError (bad argument or dtype), NotImplementedError, torch.OutOfMemoryError or
    RuntimeError (device), with the library's text.  RuntimeError with advice if there is no library.  An error that is
    not the library's passes through.  Inside torch.compile it is the bare operator.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        own = _own_error(error)
        if own is None:
            raise
        raise own from None


def _operator(
    schema: str, *, autograd: bool = True, traceable: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operator; the decorated function becomes its fake.

    autograd=False: no stop at the Autograd key, for operators that nobody differentiates and that run per step.
    traceable=False: the operator has no place in a graph, because it touches more than its arguments.
    """
    name = schema[: schema.index("(")]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,) if traceable else ())
    if not autograd:
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"bitsandbytes::{name}", fake, lib=library)
        return fake

    return register


# ---------------------------------------------------------------- checks of the fakes


def _expect(condition: bool, text: str) -> None:
    torch._check_value(condition, lambda: text)


def _one_device(op: str, one: Tensor, /, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None:
            _expect(tensor.device == one.device, f"{op}: {name} is on {tensor.device}, expected {one.device}")


def _float(op: str, name: str, dtype: torch.dtype) -> None:
    _expect(dtype in _FLOATS, f"{op}: {name} is {dtype}, expected float32, float16 or bfloat16")


def _dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    _expect(tensor.dtype == dtype, f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}")


def _block(op: str, blocksize: int) -> None:
    _expect(blocksize > 0, f"{op}: blocksize is {blocksize}, expected a number above 0")


def _format_4bit(op: str, blocksize: int, quant_type: str) -> None:
    _expect(
        32 <= blocksize <= 4096 and blocksize & (blocksize - 1) == 0,
        f"{op}: blocksize is {blocksize}, expected a power of two from 32 to 4096",
    )
    _expect(quant_type in ("nf4", "fp4"), f'{op}: quant_type is "{quant_type}", expected "nf4" or "fp4"')


def _out(op: str, out: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    _dtype(op, "out", out, dtype)
    _expect(tuple(out.shape) == tuple(shape), f"{op}: out has shape {tuple(out.shape)}, expected {tuple(shape)}")


def _ceil_div(n: int, d: int) -> int:
    return (n + d - 1) // d


# ---------------------------------------------------------------- 8-bit quantisation


@_operator("quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)")
def _(A, code, blocksize):
    op = "quantize_blockwise"
    _one_device(op, A, code=code)
    _float(op, "the dtype of A", A.dtype)
    _block(op, blocksize)
    absmax = torch.empty((_ceil_div(A.numel(), blocksize),), device=A.device, dtype=torch.float32)
    return torch.empty(A.shape, device=A.device, dtype=torch.uint8), absmax


def _check_dequantize_blockwise(
    op: str, A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> None:
    _one_device(op, A, absmax=absmax, code=code)
    _float(op, "dtype", dtype)
    _dtype(op, "A", A, torch.uint8)
    _block(op, blocksize)
    _dtype(op, "absmax", absmax, torch.float32)


@_operator("dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor")
def _(A, absmax, code, blocksize, dtype):
    _check_dequantize_blockwise("dequantize_blockwise", A, absmax, code, blocksize, dtype)
    return torch.empty(A.shape, device=A.device, dtype=dtype)


@_operator(
    "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor! out) -> ()"
)
def _(A, absmax, code, blocksize, dtype, out):
    op = "dequantize_blockwise.out"
    _check_dequantize_blockwise(op, A, absmax, code, blocksize, dtype)
    _one_device(op, A, out=out)
    _out(op, out, A.shape, dtype)


# ---------------------------------------------------------------- 4-bit quantisation


@_operator("quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)")
def _(A, blocksize, quant_type, quant_storage):
    op = "quantize_4bit"
    _float(op, "the dtype of A", A.dtype)
    _format_4bit(op, blocksize, quant_type)
    _expect(
        quant_storage in _STORAGES,
        f"{op}: quant_storage is {quant_storage}, expected uint8, float16, bfloat16 or float32",
    )
    elements = _ceil_div(_ceil_div(A.numel(), 2), quant_storage.itemsize)
    absmax = torch.empty((_ceil_div(A.numel(), blocksize),), device=A.device, dtype=torch.float32)
    return torch.empty((elements, 1), device=A.device, dtype=quant_storage), absmax


def _check_dequantize_4bit(
    op: str, A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, dtype: torch.dtype
) -> None:
    _one_device(op, A, absmax=absmax)
    _float(op, "dtype", dtype)
    _format_4bit(op, blocksize, quant_type)


@_operator(
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor"
)
def _(A, absmax, blocksize, quant_type, shape, dtype):
    op = "dequantize_4bit"
    _check_dequantize_4bit(op, A, absmax, blocksize, quant_type, dtype)
    _dtype(op, "absmax", absmax, torch.float32)
    return torch.empty(shape, device=A.device, dtype=dtype)


@_operator(
    "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, "
    "Tensor! out) -> ()"
)
def _(A, absmax, blocksize, quant_type, shape, dtype, out):
    op = "dequantize_4bit.out"
    _check_dequantize_4bit(op, A, absmax, blocksize, quant_type, dtype)
    _dtype(op, "absmax", absmax, torch.float32)
    _one_device(op, A, out=out)
    _out(op, out, shape, dtype)


@_operator(
    "_dequantize_4bit_nested(Tensor A, Tensor absmax, Tensor absmax_code, Tensor absmax2, Tensor offset, "
    "int blocksize2, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    autograd=False,
)
def _(A, absmax, absmax_code, absmax2, offset, blocksize2, blocksize, quant_type, shape, dtype):
    op = "_dequantize_4bit_nested"
    _check_dequantize_4bit(op, A, absmax, blocksize, quant_type, dtype)
    _dtype(op, "absmax", absmax, torch.uint8)
    _one_device(op, A, absmax_code=absmax_code, absmax2=absmax2, offset=offset)
    return torch.empty(shape, device=A.device, dtype=dtype)


# ---------------------------------------------------------------- scales and quantiles


@_operator("_quantize_scales(Tensor absmax, Tensor code, int blocksize) -> (Tensor, Tensor, Tensor)")
def _(absmax, code, blocksize):
    op = "_quantize_scales"
    _one_device(op, absmax, code=code)
    _dtype(op, "absmax", absmax, torch.float32)
    _block(op, blocksize)
    codes = torch.empty(absmax.shape, device=absmax.device, dtype=torch.uint8)
    absmax2 = torch.empty((_ceil_div(absmax.numel(), blocksize),), device=absmax.device, dtype=torch.float32)
    return codes, absmax2, torch.empty((), device=absmax.device, dtype=torch.float32)


@_operator("_dequantize_scales(Tensor absmax, Tensor code, Tensor absmax2, Tensor offset, int blocksize) -> Tensor")
def _(absmax, code, absmax2, offset, blocksize):
    op = "_dequantize_scales"
    _one_device(op, absmax, code=code, absmax2=absmax2, offset=offset)
    _dtype(op, "absmax", absmax, torch.uint8)
    _block(op, blocksize)
    return torch.empty(absmax.shape, device=absmax.device, dtype=torch.float32)


@_operator("_estimate_quantiles(Tensor A, float offset, int num_quantiles) -> Tensor")
def _(A, offset, num_quantiles):
    _expect(num_quantiles >= 1, f"_estimate_quantiles: num_quantiles is {num_quantiles}, expected 1 to 256")
    return torch.empty((num_quantiles,), device=A.device, dtype=torch.float32)


# ---------------------------------------------------------------- optimizers


def _check_update(
    op: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, state_dtype: torch.dtype
) -> None:
    _one_device(op, p, g=g)
    for name, state in (("state1", state1), ("state2", state2)):
        if state is not None and state.device.type != "cpu":  # paged state is on the CPU
            _one_device(op, p, **{name: state})
    _float(op, "the dtype of p", p.dtype)
    _dtype(op, "g", g, p.dtype)
    _expect(g.numel() == p.numel(), f"{op}: g has {g.numel()} elements, expected {p.numel()}")
    _dtype(op, "state1", state1, state_dtype)
    if state2 is not None:
        _dtype(op, "state2", state2, state_dtype)


@_operator(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, "
    "float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, "
    "bool skip_zeros=False) -> ()"
)
def _(optimizer_name, g, p, state1, state2, *rest):
    _check_update("optimizer_update_32bit", g, p, state1, state2, torch.float32)


@_operator(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()"
)
def _(optimizer_name, g, p, state1, state2, *rest):
    op = "optimizer_update_8bit_blockwise"
    qmap1, qmap2, absmax1, absmax2 = rest[7:11]
    _check_update(op, g, p, state1, state2, torch.uint8)
    _one_device(op, p, qmap1=qmap1, qmap2=qmap2, absmax1=absmax1, absmax2=absmax2)
    for name, tensor in (("qmap1", qmap1), ("qmap2", qmap2), ("absmax1", absmax1), ("absmax2", absmax2)):
        if tensor is not None:
            _dtype(op, name, tensor, torch.float32)


# What the operators of a group share behind their lists of tensors.
_GROUP = (
    "Tensor? gnorm_scale, Tensor? norms, Tensor? lr_tensor, int[] step, int[] seed, float lr, float beta1, "
    "float beta2, float beta3, float alpha, float t_alpha, float t_beta3, float eps, float weight_decay, "
    "float max_unorm, bool skip_zeros, bool nesterov, bool bias_correction, bool adam_w_mode, "
    "bool stochastic_rounding, int page_bytes"
)


def _check_group(op: str, p: list[Tensor], g: list[Tensor], state1: list[Tensor]) -> None:
    for field, values in (("g", g), ("state1", state1)):
        _expect(len(values) == len(p), f"{op}: {field} has {len(values)} entries, expected {len(p)}")


@_operator(
    "_optimizer_step(str name, Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] state1, Tensor(c!)[] state2, "
    "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor[] qmaps, Tensor(f!)[] steps, Tensor(h!)[] unorm, "
    f"{_GROUP}) -> ()",
    autograd=False,
)
def _(name, p, g, state1, *rest):
    _check_group("_optimizer_step", p, g, state1)


@_operator(
    "_optimizer_norms(str name, Tensor[] p, Tensor[] g, Tensor[] state1, Tensor[] state2, Tensor[] absmax1, "
    f"Tensor[] absmax2, Tensor[] qmaps, Tensor[] steps, Tensor[] unorm, {_GROUP}) -> Tensor",
    autograd=False,
)
def _(name, p, g, state1, *rest):
    _check_group("_optimizer_norms", p, g, state1)
    return _on_device_of(p, (len(p), 2), torch.float64)


# The table holds all but g of a step, and p if asked, out of the dispatcher's sight: both are for eager mode alone, and
# the fakes say that there is no table.  optim/calls.py has the ways to use them; bnb_torch_forget() ends a table.
@_operator(
    "_optimizer_table(bool with_params, str name, Tensor[] p, Tensor[] g, Tensor[] state1, Tensor[] state2, "
    f"Tensor[] absmax1, Tensor[] absmax2, Tensor[] qmaps, Tensor[] steps, Tensor[] unorm, {_GROUP}) -> int",
    autograd=False,
    traceable=False,
)
def _(*args):
    return 0


@_operator(
    f"_optimizer_run(int table, Tensor(a!)[] p, Tensor[] g, {_GROUP}) -> bool",
    autograd=False,
    traceable=False,
)
def _(*args):
    return False


@_operator("_gradient_norms(Tensor[] g) -> Tensor", autograd=False)
def _(g):
    return _on_device_of(g, (len(g),), torch.float64)


@_operator(
    "_percentile_clip(Tensor(a!)[] gnorm_vec, Tensor norms, Tensor[] steps, int[] step, int percentile) -> Tensor",
    autograd=False,
)
def _(gnorm_vec, norms, steps, step, percentile):
    return _on_device_of(gnorm_vec, (len(gnorm_vec), 3), torch.float32)


def _on_device_of(tensors: list[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=tensors[0].device if tensors else "cpu")
