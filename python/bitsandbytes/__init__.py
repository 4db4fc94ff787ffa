"""k-bit quantisation and 8-bit optimizers for PyTorch, over a core written in C.

    import bitsandbytes as bnb

    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-3)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")

Importing needs torch >= 2.10 (ImportError otherwise), but neither a GPU nor the native library: without the library,
the first call that needs it raises RuntimeError with the reason.
"""

from typing import Any

from . import cextension, _ops, _ops_gemm  # isort: skip  (checks torch, defines the operators before they are used)
from . import backends, consts, cuda_specs, functional, gone, nn, optim, utils
from .autograd._functions import MatmulLtState as MatmulLtState
from .autograd._functions import matmul as matmul
from .autograd._functions import matmul_4bit as matmul_4bit
from .nn import modules as modules
from .optim import adam as adam


def _find_version() -> str:
    """The version of this package; in a source tree, that of the library in use."""
    try:
        from ._version import __version__ as version

        return version
    except ImportError:
        pass
    if cextension.load_error is None:
        return cextension.library_version()
    from importlib import metadata

    try:
        return metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = _find_version()

# Clients probe these two: use without CUDA is allowed, and on which devices.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"}

# For pdoc: names that its pages leave out.
__pdoc__ = {"libbitsandbytes": False, "optim.optimizer.MockArgs": False}


def __getattr__(name: str) -> Any:
    """Names of old releases: where they live now (legacy.py), or AttributeError with the alternative."""
    return gone.find(__name__, name)


backends.load()
