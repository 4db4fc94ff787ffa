"""The native library: finding it, opening it, and what it said last.

Everything that runs per step goes through torch operators (_ops.py); ctypes serves loading, registration, codebooks and
the text of failures.  Importing this module never fails for want of the library: the reason is kept in `load_error`,
and the first call that needs the library raises it.

lib             the library; a function that it lacks is a callable that raises RuntimeError when called
library_path    pathlib.Path that was or would be opened: the environment variable BNB_LIBRARY, else beside this file
load_error      why there is no library, with advice; None when there is one
"""

import ctypes
import os
import pathlib
from types import ModuleType
from typing import Any

_OLDEST_TORCH = (2, 10)


def _require_torch() -> ModuleType:
    """Raise ImportError, naming the versions found and needed, unless a torch that is new enough can be imported."""
    needed = ".".join(map(str, _OLDEST_TORCH))
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"bitsandbytes needs torch >= {needed}, but torch cannot be imported: {error}") from error
    found = tuple(int(part) for part in str(torch.__version__).split("+")[0].split(".")[:2])
    if found < _OLDEST_TORCH:
        raise ImportError(f"bitsandbytes needs torch >= {needed}, found torch {torch.__version__}")
    return torch


torch = _require_torch()

library_path = pathlib.Path(os.environ.get("BNB_LIBRARY") or pathlib.Path(__file__).with_name("libbitsandbytes.so"))
load_error = None


def _raise_failure(status: int | None, function: Any, arguments: tuple) -> int | None:
    """What ctypes calls with the result of a client's function: RuntimeError with the library's text, for a failure."""
    if status:
        raise RuntimeError(f"{function.__name__}: {last_detail()}")
    return status


class _Library:
    """The functions of libbitsandbytes.so as attributes (ctypes functions).

    Attribute access never fails; calling a function that the library lacks, or any function when there is no library,
    raises RuntimeError.
    """

    def __init__(self, handle: ctypes.CDLL | None) -> None:
        self._handle = handle
        self.compiled_with_cuda = handle is not None and hasattr(handle, "bnb_cuda_card_text")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = getattr(self._handle, name, None) if self._handle is not None else None
        if function is None:

            def function(*args: object, **kwargs: object) -> None:
                raise RuntimeError(load_error or f"{name} is not available in {library_path}")

        elif not name.startswith("bnb_"):  # one of those that clients bind past this package
            function.errcheck = _raise_failure
        setattr(self, name, function)
        return function


def _give_up(reason: object) -> None:
    """Note why the library cannot be used; later calls raise this text."""
    global load_error
    load_error = (
        f"bitsandbytes cannot use its native library {library_path}: {reason}. Reinstall the package (pip install "
        "--force-reinstall bitsandbytes), or build the library from its sources and set the environment variable "
        "BNB_LIBRARY to the path of libbitsandbytes.so."
    )


def _open() -> _Library:
    try:
        handle = ctypes.CDLL(str(library_path))
    except OSError as error:
        _give_up(error)
        return _Library(None)
    for name in ("bnb_version", "bnb_detail", "bnb_optim_name"):
        if hasattr(handle, name):
            getattr(handle, name).restype = ctypes.c_char_p
    if hasattr(handle, "bnb_optim_is_signed"):
        handle.bnb_optim_is_signed.restype = ctypes.c_bool
    if hasattr(handle, "bnb_pages_least"):
        handle.bnb_pages_least.restype = ctypes.c_int64
    return _Library(handle)


lib = _open()

# What clients and tests ask about the build.  There is no build for ROCm.
HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = "unknown"
ROCM_WARP_SIZE_64 = False
BNB_BACKEND = "CUDA" if lib.compiled_with_cuda and torch.cuda.is_available() else "CPU"


def get_cuda_bnb_library_path(cuda_specs: object = None) -> pathlib.Path:
    """`library_path`: one file serves every CUDA version, so cuda_specs (cuda_specs.CUDASpecs) decides nothing."""
    return library_path


def _find_cuda_libs() -> list[pathlib.Path]:
    """The native libraries that could be chosen: [library_path], or [] if the file is missing."""
    return [library_path] if library_path.is_file() else []


def last_status() -> int:
    """The bnb_status (int) of the last failing call on this thread; 0 before the first failure."""
    return lib.bnb_last_status()


def last_detail() -> str:
    """What the last failing call on this thread said (str); "" before the first failure."""
    return lib.bnb_detail().decode(errors="replace")


def library_version() -> str:
    """The version of the loaded library (str). RuntimeError when there is none."""
    return lib.bnb_version().decode()


def card_text(ordinal: int) -> str:
    """Which code would run on that CUDA device, or why none (str). Never fails."""
    text = ctypes.create_string_buffer(512)
    try:
        status = lib.bnb_cuda_card_text(ctypes.c_int(ordinal), text, ctypes.c_size_t(len(text)))
    except RuntimeError as error:  # no library
        return str(error)
    return last_detail().partition(": ")[2] if status else text.value.decode(errors="replace")


def register_operators() -> None:
    """Give the library's kernels to torch's dispatcher. Once, after the schemas are defined; failure: `load_error`."""
    if load_error is not None:
        return
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    try:
        failed = lib.bnb_torch_register(os.fsencode(folder))
    except RuntimeError as error:
        _give_up(error)
        return
    if failed:
        _give_up(last_detail())


def optimizer_row(name: str) -> int:
    """The row of the optimizer table that has this name (int). ValueError if none has."""
    row = 0
    while (found := lib.bnb_optim_name(row)) is not None:
        if found.decode() == name:
            return row
        row += 1
    raise ValueError(f"optimizer_name is {name!r}, which the library does not know")
