"""Paged memory: page-locked memory of the CPU that optimizer state of CUDA parameters stays in.

A step moves such state through the GPU piece by piece (docs/OPTIMIZERS.md, "Paged state").  The CPU pages nothing in
or out by itself, so that helpers of old clients which would prefetch have nothing to do.
"""

import ctypes
import math
import weakref
from typing import NoReturn

import torch
from torch import Tensor
from torch.types import Device

from . import cextension

FIRST_CUDA_DEVICE = torch.device("cuda", index=0)


class GlobalPageManager:
    """A list of paged tensors; one object per process, from get_instance().

    paged_tensors  what prefetch_all() is for, oldest first.  No optimizer enters its state, which would never be freed.
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
    """A zero tensor [*shape] in page-locked memory of the CPU, which optimizer steps on a CUDA device can use as state.

    The tensor is one of the CPU, with the attributes is_paged (True) and page_deviceid (the index of `device`), which
    copies and views lack.  Its memory is freed with the last tensor that shares it.  A step on the GPU reads and writes
    it in stream order: torch.cuda.synchronize() before the CPU does.
    On a CPU device it is an ordinary tensor, without is_paged.  RuntimeError: no such device, out of memory.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    if device.type != "cuda":
        raise RuntimeError(f"get_paged: device is {device}, expected a CUDA or CPU device")
    index = torch.cuda.current_device() if device.index is None else device.index
    size = math.prod(shape) * dtype.itemsize
    flat = torch.zeros(0, dtype=torch.uint8) if size == 0 else _page_locked(size, index).zero_()
    return mark_paged(flat.view(dtype).view(shape), index)


def paged_like(p: Tensor, dtype: torch.dtype, rows: int = 0) -> Tensor:
    """Zeros in the shape of p, or [rows, *p.shape], with its memory format, paged for p's device (get_paged)."""
    strides = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, device="meta").stride()
    flat = get_paged((rows or 1) * p.numel(), dtype=dtype, device=p.device)
    shape, strides = ((rows, *p.shape), (p.numel(), *strides)) if rows else (p.shape, strides)
    return mark_paged(flat.as_strided(shape, strides), flat.page_deviceid)


def mark_paged(A: Tensor, index: int) -> Tensor:
    """Give A, a view of paged memory, the attributes of get_paged(). Returns A."""
    A.is_paged, A.page_deviceid = True, index
    return A


def is_paged(A: object) -> bool:
    """Is A a tensor in page-locked memory? Pickling and deepcopy keep its attributes, but not where it lies."""
    return isinstance(A, torch.Tensor) and getattr(A, "is_paged", False) and A.is_pinned()


def _page_locked(size: int, index: int) -> Tensor:
    """uint8 [size], not initialised, in page-locked memory that is freed with the tensor's storage."""
    address = ctypes.c_void_p()
    if cextension.lib.bnb_pages_alloc(ctypes.c_int(index), ctypes.c_size_t(size), ctypes.byref(address)):
        raise RuntimeError(f"get_paged: {size} bytes for cuda:{index}: {cextension.last_detail()}")
    memory = (ctypes.c_char * size).from_address(address.value)
    # At exit the driver may be gone before the tensors are.
    weakref.finalize(memory, cextension.lib.bnb_pages_free, ctypes.c_int(index), address).atexit = False
    return torch.frombuffer(memory, dtype=torch.uint8)


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Nothing, for a paged tensor: its memory stays where CPU and GPU both reach it. AssertionError: A is not paged."""
    if not getattr(A, "is_paged", False):
        raise AssertionError("prefetch_tensor: A is an ordinary tensor, expected a paged one (get_paged)")


def elementwise_func(func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True) -> None:
    """Change A in place: "fill" writes value, "arange" writes 0, 1, 2, ..., "_mul" multiplies by B, elementwise.

    A, B  float32 or uint8, one shape;  prefetch  ignored.  Waits for the GPU of a paged operand.
    NotImplementedError: anything else.
    """
    if A.dtype not in (torch.float32, torch.uint8) or func_name not in ("fill", "arange", "_mul"):
        raise NotImplementedError(
            f"elementwise_func: {func_name!r} of {A.dtype}, expected fill, arange or _mul of float32 or uint8"
        )
    for tensor in (A, B):
        if is_paged(tensor):
            torch.cuda.synchronize(tensor.page_deviceid)
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
