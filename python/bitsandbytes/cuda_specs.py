"""What PyTorch says about CUDA and the GPUs, in the record that clients expect. Nothing here chooses a library."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class CUDASpecs:
    """CUDA as this PyTorch was built with it, and the newest GPU.

    highest_compute_capability  (major, minor)
    cuda_version_string         both numbers without a dot: "128" for 12.8
    cuda_version_tuple          (major, minor)
    """

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the GPU multiplies int8 matrices in hardware: compute capability 7.5 and later, and HIP."""
        return torch.version.hip is not None or self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """(major, minor) of every GPU, ascending; empty without one."""
    return sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def get_cuda_version_tuple() -> tuple[int, int] | None:
    """(major, minor) of the CUDA, or HIP, that PyTorch was built with; None: neither."""
    version = torch.version.cuda or torch.version.hip
    if version is None:
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def get_cuda_version_string() -> str | None:
    """The numbers of get_cuda_version_tuple() without a dot; None: no CUDA."""
    version = get_cuda_version_tuple()
    return None if version is None else "{}{}".format(*version)


def get_cuda_specs() -> CUDASpecs | None:
    """The record for this machine; None where PyTorch has no CUDA or finds no GPU."""
    version = get_cuda_version_tuple()
    if version is None or not torch.cuda.is_available():
        return None
    return CUDASpecs(get_compute_capabilities()[-1], get_cuda_version_string(), version)
