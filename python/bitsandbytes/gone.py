"""Names that are no part of this package any more, and names that moved to a module loaded only when asked for.

A module offers both through its __getattr__: `return gone.find(__name__, name)`.
"""

import importlib
from typing import Any

_LEGACY = "bitsandbytes.legacy"
_LAYOUT = "bitsandbytes.cpu_layout"
_PRODUCTS = ("matmul_cublas", "mm_cublas", "bmm_cublas")
_QUANTISERS = ("quantize", "dequantize", "quantize_no_absmax", "dequantize_no_absmax")
_VECTORWISE = ("vectorwise_quant", "vectorwise_dequant", "vectorwise_mm_dequant", "double_quant")
_REPACKERS = ("_convert_weight_packed_for_cpu", "_convert_weight_packed_for_cpu_inverse", "has_avx512bf16")

# module -> name -> where it lives now
_MOVED = {
    "bitsandbytes": {
        **dict.fromkeys(_PRODUCTS, _LEGACY),
        "PACKAGE_GITHUB_URL": "bitsandbytes.consts",
    },
    "bitsandbytes.functional": {
        **dict.fromkeys((*_QUANTISERS, *_VECTORWISE), _LEGACY),
        **dict.fromkeys(_REPACKERS, _LAYOUT),
    },
    "bitsandbytes.autograd._functions": {**dict.fromkeys(_PRODUCTS, _LEGACY), "MatMul8bit": _LEGACY},
}

_SUBMODULES = ("legacy", "cpu_layout")

_SPARSE = "use int8_vectorwise_quant with a threshold, which returns the outlier columns, and torch.sparse"
_TILED = "int8 weights have one layout, row-major, so nothing needs to be transformed"
_KERNELS = "every kernel is in the native library, use torch.ops.bitsandbytes"
_SWITCHBACK = "use nn.Linear8bitLt, or nn.Linear with a bitsandbytes optimizer for training"
_FP8 = "use functional.create_fp8_map with functional.quantize_blockwise"

_GONE_NN = {
    **dict.fromkeys(("SwitchBackLinear", "SwitchBackLinearBnb", "SwitchBackLinearGlobal"), _SWITCHBACK),
    **dict.fromkeys(("SwitchBackLinearGlobalMemEfficient", "SwitchBackLinearVectorwise"), _SWITCHBACK),
    "StandardLinear": "use torch.nn.Linear",
    "triton_based_modules": _SWITCHBACK,
}

# module -> name -> what to do instead
_GONE = {
    "bitsandbytes": {
        "research": f"{_FP8}, or nn.Linear8bitLt for int8",
        "triton": "the kernels need no Triton, use torch.ops.bitsandbytes",
        "COMPILED_WITH_CUDA": "use bitsandbytes.cextension.lib.compiled_with_cuda",
        **dict.fromkeys(("cpu_ops", "default_ops", "cuda_ops", "xpu_ops", "mps_ops", "hpu_ops"), _KERNELS),
    },
    "bitsandbytes.functional": {
        **dict.fromkeys(("COOSparseTensor", "CSRSparseTensor", "CSCSparseTensor"), _SPARSE),
        **dict.fromkeys(("coo2csr", "coo2csc", "coo_zeros", "spmm_coo", "spmm_coo_very_sparse"), _SPARSE),
        **dict.fromkeys(("transform", "nvidia_transform", "get_transform_buffer", "get_transform_func"), _TILED),
        "get_special_format_str": _TILED,
        "igemmlt": "use int8_linear_matmul",
        "mm_dequant": "use int8_mm_dequant, or int8_vectorwise_dequant to restore a weight",
        "extract_outliers": "index the row-major int8 weight with the outlier columns",
        "get_colrow_absmax": "use int8_double_quant, whose third and fourth results these are",
        "histogram_scatter_add_2d": "use histogram.index_put_((index1, index2), source, accumulate=True)",
        "optimizer_update_8bit": "use optimizer_update_8bit_blockwise",
        "arange": "use torch.arange",
        "prod": "use math.prod",
        "dtype2bytes": "use torch.dtype.itemsize",
        **dict.fromkeys(("pre_call", "post_call"), "the library sets the device of a call itself, use nothing"),
    },
    "bitsandbytes.nn": _GONE_NN,
    "bitsandbytes.nn.modules": _GONE_NN,
}


def text(module: str, name: str) -> str:
    """What to say about a name that is gone. KeyError: it never was there."""
    return f"{module}.{name} is gone: {_GONE[module][name]} (docs/MIGRATION.md)"


def find(module: str, name: str) -> Any:
    """The value of module.name where it moved.

    AttributeError otherwise: with advice if the name is gone, like Python's own if it never was.
    """
    if module == "bitsandbytes" and name in _SUBMODULES:
        return importlib.import_module(f"{module}.{name}")
    home = _MOVED.get(module, {}).get(name)
    if home is not None:
        return getattr(importlib.import_module(home), name)
    if name in _GONE.get(module, {}):
        raise AttributeError(text(module, name))
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
