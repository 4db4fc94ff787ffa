"""Codebooks ("maps") and quantiles, as the C library computes them.

A map is a float32 CPU tensor of 256 entries in ascending order; an 8-bit code is an index into it.  Types with fewer
than 256 values are filled up with zeros.  4-bit types have 16 entries in code order.  No number of any map is written
here.  Definitions: docs/FORMAT.md, sections 1 and 2, and bitsandbytes.h.
"""

import ctypes
import operator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.types import Device

from . import _ops, cextension

_bool, _int = ctypes.c_bool, ctypes.c_int
_TYPES_4BIT = {"fp4": 1, "nf4": 2, "int4": 3, "af4": 4}  # enum bnb_type4

# Maps that the quantisers use when none is given: "dynamic", "udynamic" (unsigned), "nf4", "fp4".  Always CPU tensors.
name2qmap: dict[str, Tensor] = {}
# (name, device) -> (the CPU map, its copy on the device)
_copies: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}


def _call(name: str, argtypes: list[Any], *args: Any) -> None:
    """Call the C function `name`, which returns a bnb_status. Raises ValueError with the library's text."""
    function = getattr(cextension.lib, name)
    function.argtypes, function.restype = argtypes, _int
    if function(*args) != 0:
        raise ValueError(cextension.last_detail())


def _build(name: str, argtypes: list[Any], *args: Any, entries: int = 256) -> Tensor:
    """Let the C function `name` fill a new float32 CPU tensor [entries], its last argument.

    frombuffer() is neither seen by tensor modes nor moved by a default device: the result is always a real CPU tensor.
    """
    values = (ctypes.c_float * entries)()
    _call(name, [*argtypes, ctypes.c_void_p], *args, values)
    return torch.frombuffer(values, dtype=torch.float32)


def _index(name: str, value: object) -> int:
    """An int that fits C's int. Raises TypeError for what is no integer, ValueError for what does not fit."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None
    if not -(2**31) <= value < 2**31:
        raise ValueError(f"{name} is {value}, expected a small integer")
    return value


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Dynamic tree map (Dettmers 2015, 2021). Returns float32 [256]. Raises AssertionError on illegal bit counts."""
    try:
        bits = _index("max_exponent_bits", max_exponent_bits), _index("total_bits", total_bits)
        return _build("bnb_create_dynamic_map", [_bool, _int, _int], bool(signed), *bits)
    except ValueError as error:
        raise AssertionError(str(error)) from None


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values on [-1, 1], or [0, 1] if not signed. Returns float32 [256]. ValueError: total_bits."""
    bits = _index("total_bits", total_bits)
    return _build("bnb_create_linear_map", [_bool, _int, _bool], bool(signed), bits, bool(add_zero))


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """A small float format divided by its maximum. Returns float32 [256].

    Raises AssertionError unless signed + exponent_bits + precision_bits == total_bits.
    """
    names = ("exponent_bits", "precision_bits", "total_bits")
    values = exponent_bits, precision_bits, total_bits
    try:
        bits = [_index(name, value) for name, value in zip(names, values, strict=True)]
        return _build("bnb_create_fp8_map", [_bool, _int, _int, _int], bool(signed), *bits)
    except ValueError as error:
        raise AssertionError(str(error)) from None


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution; the default is NF4 (QLoRA, section 3). Returns float32 [256].

    Raises ValueError unless 0.5 < offset < 1.
    """
    return _build("bnb_create_normal_map", [ctypes.c_double, _bool], float(offset), bool(use_extra_value))


def create_quantile_map(A: Tensor, total_bits: int = 8) -> Tensor:
    """A map whose values are the quantiles of A. Returns float32 [256] on the CPU.

    A: float32, float16 or bfloat16, at least one element, finite.  ValueError: total_bits outside 1..8, or A.
    """
    bits = _index("total_bits", total_bits)
    if not 1 <= bits <= 8:
        raise ValueError(f"create_quantile_map: total_bits is {bits}, expected 1..8")
    quantiles = estimate_quantiles(A, num_quantiles=2**bits - 1).cpu()
    pointer = ctypes.c_void_p(quantiles.data_ptr())
    return _build("bnb_create_quantile_map", [ctypes.c_void_p, _int], pointer, quantiles.numel())


def estimate_quantiles(
    A: Tensor, out: Tensor | None = None, offset: float = 1 / 512, num_quantiles: int = 256
) -> Tensor:
    """Exact order statistics of A at evenly spaced probabilities from offset to 1 - offset.

    A: float32, float16 or bfloat16, n >= 1 elements.  Returns float32 [num_quantiles], or `out` filled.
    With fewer than 256 quantiles the default offset stands for 1 / (2 num_quantiles).
    Raises NotImplementedError for other dtypes and more than 256 quantiles, ValueError for n = 0 or a bad offset.
    """
    if 0 < num_quantiles < 256 and offset == 1 / 512:
        offset = 1 / (2 * num_quantiles)
    quantiles = _ops.call(torch.ops.bitsandbytes._estimate_quantiles.default, A, offset, num_quantiles)
    return quantiles if out is None else fill("out", out, quantiles)


def get_4bit_type(typename: str, device: Device = None, blocksize: int = 64) -> Tensor:
    """The 16 values of a 4-bit type, in code order, divided by their largest magnitude. Returns float32 [16].

    typename: "nf4", "fp4", "int4" or "af4"; the last two are tables only.  device None: torch's default device.
    Raises NotImplementedError for other names, and for "af4" with a blocksize other than 64.
    """
    if typename not in _TYPES_4BIT:
        raise NotImplementedError(f"get_4bit_type: typename is {typename!r}, expected one of {', '.join(_TYPES_4BIT)}")
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"get_4bit_type: blocksize is {blocksize}, af4 is defined for 64 only")
    table = _build("bnb_get_4bit_map", [_int], _TYPES_4BIT[typename], entries=16)
    return table.to(torch.get_default_device() if device is None else device)


_MAKERS = {
    "dynamic": lambda: create_dynamic_map(signed=True),
    "udynamic": lambda: create_dynamic_map(signed=False),
    "nf4": lambda: get_4bit_type("nf4", device="cpu"),
    "fp4": lambda: get_4bit_type("fp4", device="cpu"),
}


def default_map(name: str, like: Tensor) -> Tensor:
    """The map `name` of name2qmap on the device of tensor `like`, to be read only; one copy per device is kept."""
    if name not in name2qmap:
        name2qmap[name] = _MAKERS[name]()
    source = name2qmap[name]
    if isinstance(like, FakeTensor):  # values do not matter, and must not enter the cache
        return like.new_empty(source.shape, dtype=source.dtype)
    if like.device.type == "cpu":
        return source
    if torch.compiler.is_compiling():
        return source.to(like.device)
    held = _copies.get((name, like.device))
    if held is None or held[0] is not source:
        held = _copies[name, like.device] = (source, source.to(like.device))
    return held[1]


def fill(name: str, target: Tensor, result: Tensor) -> Tensor:
    """Copy a result into the tensor a caller gave for it. ValueError unless shape, dtype and device are the same."""
    for what in ("shape", "dtype", "device"):
        got, want = getattr(target, what), getattr(result, what)
        if got != want:
            raise ValueError(f"{name}: {what} is {got}, expected {want}")
    return target.copy_(result)


def _prepare() -> None:
    """Fill name2qmap while importing, so that compiled code finds constants. Without the library: on first use."""
    try:
        for name, make in _MAKERS.items():
            name2qmap[name] = make()
    except RuntimeError:
        name2qmap.clear()


_prepare()
