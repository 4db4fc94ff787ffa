"""QuantState: what is needed, beside the codes, to turn a quantised tensor back into numbers; and its two dict forms.

A plain, mutable record.  Nothing is derived from it and kept: whoever edits a field (clients expand nested statistics
and then write nested=False, state2=None, offset=None) finds the edit obeyed by the next call.
The dict forms are a file format: docs/FORMAT.md, section 6.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from .utils import pack_dict_to_tensor, unpack_tensor_to_dict

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_JSON_KEYS = ("quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset")
_NESTED_KEYS = ("nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset")


class QuantState:
    """Statistics and description of one quantised tensor.

    absmax      float32 [blocks], or uint8 [blocks] when nested: the largest magnitude of each block
    shape       torch.Size of the original tensor; None for 8-bit states
    code        float32 [16] or [256], the codebook
    blocksize   elements per block
    quant_type  "nf4", "fp4", or None for 8-bit states
    dtype       dtype of the original tensor, and of the dequantised one
    offset      float32 0-dim, nested only: what was subtracted from the scales before they were quantised
    state2      QuantState of the quantised scales, nested only
    nested      True if absmax itself is quantised; set from state2, writable
    """

    # X | Any: None in the cases named above; a type checker asks for no proof of which case it is.
    absmax: Tensor
    shape: torch.Size | Any
    code: Tensor | Any
    blocksize: int | Any
    quant_type: str | Any
    dtype: torch.dtype | Any
    offset: Tensor | Any
    state2: "QuantState | Any"
    nested: bool

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = tuple(f"bitsandbytes__{name}" for name in valid_quant_types)
    valid_qs_keys = (*_TENSOR_KEYS, *_JSON_KEYS, "quant_state")

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: "QuantState | None" = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __getattr__(self, name: str) -> Any:
        """The packed metadata as an attribute, "bitsandbytes__<quant_type>": FSDP reaches checkpoint keys by name."""
        if name.startswith("bitsandbytes__") and name == f"bitsandbytes__{self.quant_type}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, index: Any) -> Any:
        """The list form of old releases: [absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            _close(self.absmax, other.absmax)
            and self.shape == other.shape
            and _close(self.code, other.code)
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and _same(self.offset, other.offset)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shape = None if self.shape is None else tuple(self.shape)
        parts = [f"quant_type={self.quant_type!r}", f"shape={shape}", f"dtype={self.dtype}"]
        parts += [f"blocksize={self.blocksize}", f"absmax={_describe(self.absmax)}", f"nested={self.nested}"]
        return f"{type(self).__name__}({', '.join(parts)})"

    def to(self, device: Device) -> "QuantState":
        """Move every tensor to device, in place. Returns self."""
        self.absmax = _move(self.absmax, device)
        self.code = _move(self.code, device)
        if self.nested:
            self.offset = _move(self.offset, device)
            self.state2.absmax = _move(self.state2.absmax, device)
            self.state2.code = _move(self.state2.code, device)
        return self

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a dict. packed: tensors only, the rest as JSON in "quant_state.bitsandbytes__<quant_type>".

        8-bit states (quant_type None) have no packed form: their unpacked dict is returned.
        """
        state = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            state["nested_absmax"] = self.state2.absmax
            state["nested_blocksize"] = self.state2.blocksize
            # One map serves every tensor; a copy keeps savers that drop shared tensors from dropping it.
            state["nested_quant_map"] = self.state2.code.clone()
            state["nested_dtype"] = _dtype_name(self.state2.dtype)
            state["nested_offset"] = float(self.offset)
        if not packed or not self.quant_type:
            return state
        result = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        rest = {key: value for key, value in state.items() if key not in result}
        result[f"quant_state.bitsandbytes__{self.quant_type}"] = pack_dict_to_tensor(rest)
        return result

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: Device) -> "QuantState":
        """Read either dict form; keys may carry a prefix that ends in a dot. Tensors are moved to device.

        qs_dict is not changed.  KeyError: a key is missing.  ValueError: an unknown key, metadata that cannot be
        decoded, a value of the wrong type, or statistics whose lengths contradict shape and block size.
        """
        fields = _fields(cls, qs_dict)
        _check(cls, fields)
        nested = {}
        if "nested_absmax" in fields:
            offset = torch.tensor(float(fields["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=fields["nested_absmax"].to(device),
                code=fields["nested_quant_map"].to(device),
                blocksize=fields["nested_blocksize"],
                dtype=_DTYPES[fields["nested_dtype"]],
            )
            nested = {"offset": offset, "state2": state2}
        return cls(
            absmax=fields["absmax"].to(device),
            shape=None if fields["shape"] is None else torch.Size(fields["shape"]),
            code=fields["quant_map"].to(device),
            blocksize=fields["blocksize"],
            quant_type=fields["quant_type"],
            dtype=_DTYPES[fields["dtype"]],
            **nested,
        )


def _fields(cls: type[QuantState], qs_dict: dict[str, Any]) -> dict[str, Any]:
    """Flatten either dict form to {short key: value}, without judging the values."""
    packed = [key for key, value in qs_dict.items() if "quant_state" in key and isinstance(value, torch.Tensor)]
    fields = {}
    for key, value in qs_dict.items():
        short = key.rsplit(".", 1)[-1]
        if key in packed or short == "quant_state":
            continue
        if short not in cls.valid_qs_keys:
            raise ValueError(f"quant state: unknown key {key!r}, expected one of {', '.join(cls.valid_qs_keys)}")
        if short in fields:
            raise ValueError(f"quant state: key {key!r} names {short!r} for the second time")
        fields[short] = value
    expected = f"one key ending in {' or '.join(cls.valid_qs_type_keys)}"
    if "quant_type" not in fields and not packed:
        raise ValueError(f"quant state: no packed metadata among the keys {sorted(qs_dict)}, expected {expected}")
    if len(packed) > 1:
        raise ValueError(f"quant state: packed metadata in {', '.join(packed)}, expected {expected}")
    for key in packed:
        kind = key.rsplit(".", 1)[-1]
        if kind not in cls.valid_qs_type_keys:
            raise ValueError(f"quant state: packed metadata in {key!r}, expected {expected}")
        _add_packed(fields, key, kind.removeprefix("bitsandbytes__"), qs_dict[key])
    return fields


def _add_packed(fields: dict[str, Any], key: str, quant_type: str, payload: Tensor) -> None:
    """Decode the JSON payload found under `key` and add its entries to fields."""
    try:
        metadata = unpack_tensor_to_dict(payload)
    except ValueError as error:
        raise ValueError(f"quant state: {key}: {error}") from None
    for name, value in metadata.items():
        if name not in _JSON_KEYS:
            raise ValueError(f"quant state: {key}: unknown key {name!r}, expected one of {', '.join(_JSON_KEYS)}")
        fields[name] = value
    if fields.get("quant_type", quant_type) != quant_type:
        raise ValueError(f"quant state: {key}: quant_type is {fields['quant_type']!r}, expected {quant_type!r}")
    fields.setdefault("quant_type", quant_type)


def _check(cls: type[QuantState], fields: dict[str, Any]) -> None:
    """Refuse values of wrong type and statistics that do not fit the described tensor."""
    for key in ("absmax", "quant_map", "blocksize", "dtype", "shape"):
        if key not in fields:
            raise KeyError(f"quant state: key {key!r} is missing")
    quant_type, shape = fields["quant_type"], fields["shape"]
    _expect("quant_type", quant_type, quant_type is None or quant_type in cls.valid_quant_types, '"nf4" or "fp4"')
    _expect("dtype", fields["dtype"], _is_name(fields["dtype"]), " or ".join(_DTYPES))
    _expect_count("blocksize", fields["blocksize"])
    sized = isinstance(shape, (list, tuple)) and all(_is_int(size) and size >= 0 for size in shape)
    _expect("shape", shape, sized or (shape is None and quant_type is None), "a list of sizes >= 0")
    nested = "nested_absmax" in fields
    blocks = None if shape is None else -(-math.prod(shape) // fields["blocksize"])
    _expect_tensor("absmax", fields["absmax"], torch.uint8 if nested else torch.float32, blocks)
    _expect_tensor("quant_map", fields["quant_map"], torch.float32, 16 if quant_type else None)
    if nested:
        _check_nested(fields)
    else:
        for key in _NESTED_KEYS:
            if key in fields:
                raise ValueError(f"quant state: key {key!r} without 'nested_absmax', expected both or neither")


def _check_nested(fields: dict[str, Any]) -> None:
    for key in _NESTED_KEYS:
        if key not in fields:
            raise KeyError(f"quant state: key {key!r} is missing, but 'nested_absmax' is there")
    offset = fields["nested_offset"]
    _expect("nested_offset", offset, isinstance(offset, float) or _is_int(offset), "a number")
    _expect("nested_dtype", fields["nested_dtype"], _is_name(fields["nested_dtype"]), " or ".join(_DTYPES))
    _expect_count("nested_blocksize", fields["nested_blocksize"])
    blocks = -(-fields["absmax"].numel() // fields["nested_blocksize"])
    _expect_tensor("nested_absmax", fields["nested_absmax"], torch.float32, blocks)
    _expect_tensor("nested_quant_map", fields["nested_quant_map"], torch.float32, 256)


def _expect(key: str, value: Any, holds: bool, expected: object) -> None:
    if not holds:
        raise ValueError(f"quant state: {key} is {value!r}, expected {expected}")


def _expect_count(key: str, value: Any) -> None:
    _expect(key, value, _is_int(value) and value > 0, "an integer > 0")


def _expect_tensor(key: str, value: Any, dtype: torch.dtype, entries: int | None) -> None:
    _expect(key, type(value).__name__, isinstance(value, torch.Tensor), "a tensor")
    _expect(f"{key}.dtype", value.dtype, value.dtype == dtype, dtype)
    _expect(f"{key}.numel()", value.numel(), entries in (None, value.numel()), f"{entries} by shape and block size")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _move(value: Any, device: Device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _same(a: Any, b: Any) -> bool:
    """Equality of two offsets: None, numbers or 0-dim tensors."""
    if a is None or b is None:
        return a is b
    return float(a) == float(b)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    """Equality of two statistics tensors, absolute tolerance 1e-6; None equals None."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-6)


def _describe(tensor: object) -> str:
    if not isinstance(tensor, torch.Tensor):
        return repr(tensor)
    return f"{_dtype_name(tensor.dtype)}{list(tensor.shape)} on {tensor.device}"
