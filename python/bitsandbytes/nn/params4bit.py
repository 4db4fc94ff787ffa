"""Params4bit: a parameter that becomes 4-bit on its first move to a device.

A plain tensor subclass.  Before the first move it holds the weight in its own dtype; afterwards the packed codes
[bytes / item size, 1], with everything needed to read them in quant_state.  Packed bytes are never converted by a cast
and never quantised a second time.
Its __dict__ holds the constructor's arguments and nothing else: clients rebuild parameters by
Params4bit(tensor, requires_grad=..., **old.__dict__), after adding keys of their own or editing ours.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.types import Device

from .. import functional
from ..quant_state import QuantState

_PIECES = (torch.chunk, torch.split)


def bytes_of(state: QuantState) -> int:
    """Bytes of the packed codes that state describes: two codes each."""
    return -(-math.prod(state.shape) // 2)


def is_packed(data: Tensor, state: QuantState) -> bool:
    """True if data has exactly the bytes that state describes: two codes each, padded to whole items."""
    return data.numel() == -(-bytes_of(state) // data.element_size())


def _of_state(name: str, *, nested: bool = False) -> property:
    """A property that reads `name` from quant_state, or from its state2; AttributeError where there is none."""

    def get(self: Any) -> Any:
        state = self.quant_state
        if state is not None and nested:
            state = state.state2
        if state is None:
            reason = "its scales are not quantised" if self.quant_state is not None else "it is not quantised yet"
            raise AttributeError(f"Params4bit has no attribute {get.public_name!r}: {reason}")
        return getattr(state, name)

    get.public_name = name
    return property(get, doc=f"{name} of quant_state{'.state2' if nested else ''}")


def _named(name: str, attribute: property) -> property:
    attribute.fget.public_name = name
    return attribute


class Params4bit(nn.Parameter):
    """A weight stored in 4 bits.

    data                 float32, float16 or bfloat16, any shape; or, with bnb_quantized, packed codes [items, 1]
    quant_state          QuantState of the packed codes; None before
    blocksize            elements per scale: a power of two, 32..4096; None: 64
    compress_statistics  quantise the scales too
    quant_type           "fp4" or "nf4"
    quant_storage        dtype that carries the bytes: uint8, float16, bfloat16 or float32
    module               the layer that owns the weight: its quant_state is set as well when the weight is quantised
    bnb_quantized        True if data is packed; set to False, the next move quantises (again)
    Other keywords are accepted and dropped.  ValueError, at the first move: options outside these lists.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | Any  # None before quantisation
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: nn.Module | Any  # None without an owner

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: nn.Module | None = None,
        bnb_quantized: bool = False,
        **ignored: Any,
    ) -> "Params4bit":
        """Wrap data; nothing is quantised yet."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize = functional.DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: Device = "cuda",
        module: nn.Module | None = None,
        **ignored: Any,
    ) -> "Params4bit":
        """A parameter from a checkpoint.

        data             packed codes, any storage dtype
        quantized_stats  the entries beside it, either form of QuantState.as_dict(), with any prefix
        module           its quant_state is set
        KeyError, ValueError: see QuantState.from_dict; ValueError: data has not the bytes that the shape needs.
        """
        state = QuantState.from_dict(quantized_stats, device=device)
        if not is_packed(data, state):
            given, shape = data.numel() * data.element_size(), tuple(state.shape)
            raise ValueError(f"data has {given} bytes, expected {bytes_of(state)} for shape {shape}")
        self = cls(data.to(device), requires_grad, **cls._options(data, state), module=module)
        if module is not None:
            module.quant_state, module.quant_storage = state, self.dtype
        return self

    @staticmethod
    def _options(data: Tensor, state: QuantState) -> dict[str, Any]:
        """The constructor's arguments that belong to packed data and its state."""
        return {
            "quant_state": state,
            "blocksize": state.blocksize,
            "compress_statistics": state.nested,
            "quant_type": state.quant_type,
            "quant_storage": data.dtype,
            "bnb_quantized": True,
        }

    # ---------------------------------------------------------------- statistics, by the names of a checkpoint

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = _named("quant_map", _of_state("code"))
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _named("nested_absmax", _of_state("absmax", nested=True))
    nested_blocksize = _named("nested_blocksize", _of_state("blocksize", nested=True))
    nested_quant_map = _named("nested_quant_map", _of_state("code", nested=True))
    nested_dtype = _named("nested_dtype", _of_state("dtype", nested=True))
    nested_offset = _named("nested_offset", _of_state("offset"))

    # ---------------------------------------------------------------- moves

    def _quantize(self, device: Device) -> "Params4bit":
        """Replace the weight by its codes on device, in place. Returns self."""
        packed, state = functional.quantize_4bit(
            self.data.to(device),
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.requires_grad = False
        self.data = packed
        self.quant_state = state
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state
        return self

    def _like(self, data: Tensor) -> "Params4bit":
        """A parameter of other data with the same description, owned by nobody."""
        result = type(self)(data, self.requires_grad)
        result.__dict__.update(self.__dict__, module=None)
        return result

    def to(self, *args: Any, **kwargs: Any) -> "Params4bit":
        """Tensor.to(). Quantises, in place, on the first move to a device other than meta; the CPU is one too.

        Packed codes move together with their quant_state (the same object) and keep their dtype; a move to meta leaves
        the quant_state where it is.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        meta = device is not None and device.type == "meta"
        if not self.bnb_quantized:
            if device is not None and not meta:
                return self._quantize(device)
            return self._like(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))
        if device is None:
            return self
        if self.quant_state is not None and not meta:
            self.quant_state.to(device)
        return self._like(self.data.to(device=device, non_blocking=non_blocking))

    def cpu(self) -> "Params4bit":  # type: ignore[override]
        """to("cpu")"""
        return self.to("cpu")

    def cuda(self, device: Device = None, non_blocking: bool = False) -> "Params4bit":  # type: ignore[override]
        """to() a CUDA device, the current one by default."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Device = None, non_blocking: bool = False) -> "Params4bit":  # type: ignore[override]
        """to() an XPU device, the current one by default."""
        device = f"xpu:{device}" if isinstance(device, int) else device
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def type(self, dtype: torch.dtype | str | None = None, non_blocking: bool = False) -> Any:
        """Tensor.type(), except that packed codes keep their dtype."""
        if dtype is not None and self.bnb_quantized:
            return self
        return self.data.type() if dtype is None else self._like(self.data.type(dtype, non_blocking))

    def half(self) -> "Params4bit":
        """to(torch.float16)"""
        return self.to(torch.float16)

    def bfloat16(self) -> "Params4bit":
        """to(torch.bfloat16)"""
        return self.to(torch.bfloat16)

    def float(self) -> "Params4bit":
        """to(torch.float32)"""
        return self.to(torch.float32)

    def double(self) -> "Params4bit":
        """to(torch.float64)"""
        return self.to(torch.float64)

    # ---------------------------------------------------------------- copies

    def __copy__(self) -> "Params4bit":
        result = type(self)(self.data, self.requires_grad)
        result.__dict__.update(self.__dict__)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "Params4bit":
        """New data and new statistics. The owner is the copied one if it is being copied too, else the same."""
        if id(self) in memo:
            return memo[id(self)]
        result = type(self)(self.data.clone(), self.requires_grad)
        memo[id(self)] = result
        owner = memo.get(id(self.module), self.module)
        rest = {name: value for name, value in self.__dict__.items() if name != "module"}
        result.__dict__.update(copy.deepcopy(rest, memo), module=owner)
        return result

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # The owner holds the parameter, and links itself again (Linear4bit.__setstate__).
        return _rebuild, (type(self), self.data, self.requires_grad, {**self.__dict__, "module": None})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "data": self.data, "requires_grad": self.requires_grad}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.data = state.pop("data")
        self.requires_grad = state.pop("requires_grad")
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch.chunk and torch.split give Params4bit with the whole quant_state; all else gives plain tensors.

        Sharding engines cut parameters by these two functions and rejoin the pieces.
        """
        kwargs = {} if kwargs is None else kwargs
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _PIECES:
            source = args[0] if args else kwargs.get("input", kwargs.get("tensor"))
            return tuple(source._piece(piece) for piece in result)
        return result

    def _piece(self, data: Tensor) -> "Params4bit":
        result = type(self)(data.detach(), self.requires_grad)
        result.__dict__.update(self.__dict__)
        return result


def _rebuild(cls: type[Params4bit], data: Tensor, requires_grad: bool, attributes: dict[str, Any]) -> Params4bit:
    result = cls(data, requires_grad)
    result.__dict__.update(attributes)
    return result
