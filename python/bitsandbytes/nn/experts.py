"""The fused experts of mixture-of-experts models, in 4 bits: one call, quantize_experts().

Since version 5, Transformers keeps the experts of a layer as 3-D parameters [experts, ., .] of one module.  They are
most of the model, and no linear layer: replacing nn.Linear by Linear4bit passes them by.  See docs/MOE.md.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from .experts_forward import use_codes
from .parametrize import packed_names, replace_parameter_4bit

__all__ = ["dequantize_experts", "expert_parameters", "quantize_experts"]

# How expert modules call the number of their experts.
_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",  # LongCat-Flash, whose up projection also has rows for experts that compute nothing:
    "total_experts",
    "n_shared_experts",
)


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Find fused expert weights. Yields (full name, module, name in the module), in the order of the modules.

    That is each float parameter [experts, ., .] whose module gives the same number of experts in one of the attributes
    _COUNTS.  Parameters that are in 4 bits already are not among them.
    """
    for path, module in model.named_modules():
        counts = [getattr(module, name, None) for name in _COUNTS]
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.is_floating_point() and parameter.shape[0] in counts:
                yield f"{path}.{name}" if path else name, module, name


def quantize_experts(
    model: nn.Module,
    quant_type: str = "nf4",
    blocksize: int = 64,
    compress_statistics: bool = False,
    skip: Iterable[str] = (),
) -> list[str]:
    """Store the fused expert weights of a model in 4 bits, in place, each where it is.

    model                any module; its 3-D expert weights: see expert_parameters()
    quant_type           "nf4" or "fp4"
    blocksize            elements per scale, a power of two, 32..4096
    compress_statistics  quantise the scales too
    skip                 regular expressions; a parameter in whose full name one of them is found stays as it is
    Returns the full names of the quantised parameters, [] if the model has none.
    ValueError: an option outside these lists, or a parameter that is not float32, float16 or bfloat16.
    """
    if isinstance(skip, str):
        raise ValueError(f"quantize_experts: skip is {skip!r}, expected a list of regular expressions")
    done = []
    for full, module, name in list(expert_parameters(model)):
        if not any(re.search(pattern, full) for pattern in skip):
            replace_parameter_4bit(module, name, compress_statistics, quant_type, blocksize)
            done.append(full)
    if done:
        use_codes(model)
    return done


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> list[str]:
    """Turn every parameter that replace_parameter_4bit() or quantize_experts() made 4-bit into a float one, in place.

    dtype  of the new parameters; None: that of the parameters before they were quantised
    Returns the full names of the parameters, which do not require gradients.
    """
    done = []
    for path, module in list(model.named_modules()):
        for name in list(packed_names(module)):
            value = getattr(module, name).detach().to(dtype)
            remove_parametrizations(module, name, leave_parametrized=False)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
            done.append(f"{path}.{name}" if path else name)
    return done
