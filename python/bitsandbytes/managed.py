"""Memory that GPU and CPU share ("paged"): the helpers that old clients import from functional.

This library allocates no managed memory: a helper that would need some says so.  On CPU tensors all of them work,
because the operating system pages CPU memory anyway.
"""

from typing import NoReturn

import torch
from torch import Tensor
from torch.types import Device

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)


class GlobalPageManager:
    """The list of all paged tensors; one object per process, from get_instance().

    paged_tensors  tensors that prefetch_all() moves, oldest first
    """

    _instance = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalPageManager has one object, expected a call of GlobalPageManager.get_instance()")

    def initialize(self) -> None:
        """Forget all tensors."""
        self.paged_tensors: list[Tensor] = []

    @classmethod
    def get_instance(cls) -> "GlobalPageManager":
        """The one object, made on the first call."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """prefetch_tensor() for every tensor, the newest first."""
        for tensor in reversed(self.paged_tensors):
            prefetch_tensor(tensor, to_cpu)


class CUBLAS_Context:
    """One object per process, from get_instance(). This library has no cuBLAS handle to give."""

    _instance = None

    def __init__(self) -> None:
        raise RuntimeError("CUBLAS_Context has one object, expected a call of CUBLAS_Context.get_instance()")

    def initialize(self) -> None:
        """Forget all handles."""
        self.context = {}

    @classmethod
    def get_instance(cls) -> "CUBLAS_Context":
        """The one object, made on the first call."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def get_context(self, device: Device) -> NoReturn:
        """RuntimeError, whatever the device."""
        raise RuntimeError(
            f"CUBLAS_Context: no handle for {device}, this library does not use cuBLAS; call its operators"
        )


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE) -> Tensor:
    """A zero tensor [*shape] in memory that can be paged.

    On a CPU device that is an ordinary tensor, without is_paged.  RuntimeError for any other device.
    """
    device = torch.device(device)
    if device.type != "cpu":
        raise RuntimeError(
            f"get_paged: device is {device}, and paged GPU memory is not available in this library, expected a CPU "
            "device; allocate with torch.zeros(..., pin_memory=True) what the GPU shall reach"
        )
    return torch.zeros(shape, dtype=dtype, device=device)


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Start moving a paged tensor to its GPU, or to the CPU.

    AssertionError: A is not paged, as no tensor of this library is.  RuntimeError: it is marked as paged.
    """
    if not getattr(A, "is_paged", False):
        raise AssertionError("prefetch_tensor: A is an ordinary tensor, expected a paged one (get_paged)")
    raise RuntimeError("prefetch_tensor: A is paged, and paged GPU memory is not available in this library")


def elementwise_func(func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True) -> None:
    """Change A in place: "fill" writes value, "arange" writes 0, 1, 2, ..., "_mul" multiplies by B, elementwise.

    A, B  float32 or uint8, one shape;  prefetch  move paged operands first.  NotImplementedError: anything else.
    """
    if A.dtype not in (torch.float32, torch.uint8) or func_name not in ("fill", "arange", "_mul"):
        raise NotImplementedError(
            f"elementwise_func: {func_name!r} of {A.dtype}, expected fill, arange or _mul of float32 or uint8"
        )
    for tensor in (A, B):
        if prefetch and getattr(tensor, "is_paged", False):
            prefetch_tensor(tensor)
    if func_name == "fill":
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), device=A.device).view(A.shape))
    else:
        A.mul_(B)


def fill(A: Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    """Fill A, float32 or uint8, with value. device is ignored. NotImplementedError: other dtypes."""
    elementwise_func("fill", A, None, value, prefetch)


def _mul(A: Tensor, B: Tensor, device: torch.device | None = None) -> None:
    """A *= B, both float32 or uint8 of one shape. device is ignored. NotImplementedError: other dtypes."""
    elementwise_func("_mul", A, B, 0)
