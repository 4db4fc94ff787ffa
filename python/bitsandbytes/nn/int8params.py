"""Int8Params: a parameter that becomes row-wise int8 on its first move from the CPU.

A plain tensor subclass.  Before, it holds the weight in its own dtype; afterwards int8 codes of the same shape, the
same codes under the name CB, and one scale per row in SCB.  int8 data is never converted and never quantised again.
Its __dict__ holds has_fp16_weights, CB and SCB and nothing else: clients rebuild parameters by
Int8Params(tensor, requires_grad=..., **old.__dict__).
Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale".
"""

import copy
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.types import Device

from .. import functional


class Int8Params(nn.Parameter):
    """A weight stored in 8 bits.

    data              float32, float16 or bfloat16 [out, in]; or int8 codes
    has_fp16_weights  True: stays a float weight, codes are made anew while training
    CB                the codes, int8 [out, in]; shares the memory of data
    SCB               float32 [out]: largest |w| of each row; w = code * SCB / 127.  None before quantisation
    Other keywords are accepted and dropped.
    """

    has_fp16_weights: bool
    CB: Tensor | Any  # None before quantisation, as SCB
    SCB: Tensor | Any

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **ignored: Any,
    ) -> "Int8Params":
        """Wrap data; nothing is quantised yet."""
        data = torch.empty(0) if data is None else data
        self = torch.Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        self.has_fp16_weights = has_fp16_weights
        self.CB = CB
        self.SCB = SCB
        return self

    # ---------------------------------------------------------------- moves

    def quantize(self, device: Device = None) -> "Int8Params":
        """Replace the float weight by its int8 codes on device, in place. Returns self."""
        weight = self.data.to(device=device, dtype=torch.float16)
        codes, scales, _ = functional.int8_vectorwise_quant(weight)
        self.requires_grad = False
        self.data = codes
        self.CB = self.data
        self.SCB = scales
        return self

    def follow(self) -> None:
        """Point CB at data, and bring SCB to its device, after something replaced the data of int8 codes."""
        self.CB = self.data
        if self.SCB is not None and self.device.type != "meta":
            self.SCB = None if self.SCB.device.type == "meta" else self.SCB.to(self.device)

    def to(self, *args: Any, **kwargs: Any) -> "Int8Params":
        """Tensor.to(). Quantises, in place, when a float weight leaves the CPU or is sent there (not to meta).

        A weight that is float on an accelerator is moved as it is, and quantised by the first forward of its layer.
        int8 codes move together with SCB and keep their dtype; a move to meta leaves SCB where it is.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if self.dtype == torch.int8:
            result = self._like(self.data.to(device=device, non_blocking=non_blocking))
            result.follow()
            return result
        leaves = device is not None and device.type != "meta" and self.device.type == "cpu"
        if leaves and not self.has_fp16_weights:
            return self.quantize(device)
        return self._like(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking), CB=None, SCB=None)

    def _like(self, data: Tensor, **changes: Any) -> "Int8Params":
        result = type(self)(data, self.requires_grad)
        result.__dict__.update(self.__dict__, **changes)
        return result

    def cpu(self) -> "Int8Params":  # type: ignore[override]
        """to("cpu")"""
        return self.to("cpu")

    def cuda(self, device: Device = None, non_blocking: bool = False) -> "Int8Params":  # type: ignore[override]
        """to() a CUDA device, the current one by default."""
        return self.to("cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Device = None, non_blocking: bool = False) -> "Int8Params":  # type: ignore[override]
        """to() an XPU device, the current one by default."""
        device = f"xpu:{device}" if isinstance(device, int) else device
        return self.to("xpu" if device is None else device, non_blocking=non_blocking)

    def type(self, dtype: torch.dtype | str | None = None, non_blocking: bool = False) -> Any:
        """Tensor.type(), except that int8 codes keep their dtype."""
        if dtype is not None and self.dtype == torch.int8:
            return self
        return super().type() if dtype is None else super().type(dtype, non_blocking)

    # ---------------------------------------------------------------- copies

    def _codes(self) -> tuple[Tensor, bool]:
        """CB where it is the same memory as data, so that a copy of both is made once; else data."""
        shared = self.CB is not None and self.CB.dtype == self.dtype and self.CB.data_ptr() == self.data_ptr()
        return (self.CB, True) if shared else (self.data, False)

    def __copy__(self) -> "Int8Params":
        return self._like(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Params":
        if id(self) in memo:
            return memo[id(self)]
        data, shared = self._codes()
        result = _rebuild(type(self), copy.deepcopy(data, memo), self.requires_grad, {}, shared)
        memo[id(self)] = result
        names = [name for name in self.__dict__ if not (shared and name == "CB")]
        result.__dict__.update({name: copy.deepcopy(self.__dict__[name], memo) for name in names})
        return result

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        data, shared = self._codes()
        attributes = {name: value for name, value in self.__dict__.items() if not (shared and name == "CB")}
        return _rebuild, (type(self), data, self.requires_grad, attributes, shared)


def _rebuild(
    cls: type[Int8Params], data: Tensor, requires_grad: bool, attributes: dict[str, Any], shared: bool
) -> Int8Params:
    """A parameter from its parts. shared: data is also CB."""
    result = cls(data, requires_grad)
    result.__dict__.update(attributes)
    if shared:
        result.CB = data
    return result
