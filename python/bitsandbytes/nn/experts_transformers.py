"""Fused experts through Transformers' load_in_4bit: one call before from_pretrained().

    bitsandbytes.nn.experts_transformers.enable()

Transformers' 4-bit quantizer asks for each parameter whether its module is a Linear4bit, and so passes fused experts
by.  enable() registers a quantizer in its place that takes them too: each is quantised as soon as it is loaded, saved
with its statistics beside it, and found again by from_pretrained() (after enable()).  See docs/MOE.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..functional import quantize_4bit
from .experts import dequantize_experts, expert_parameters
from .experts_forward import use_codes
from .parametrize import replace_parameter_4bit_prequantized

__all__ = ["enable"]

_KEY = "bitsandbytes_4bit"
# What a saved weight's name is followed by: nothing, or its statistics' names (docs/FORMAT.md).
_ENDINGS = [
    "",
    *(f".{name}" for name in ("absmax", "nested_absmax", "nested_quant_map", "quant_map")),
    *(f".quant_state.bitsandbytes__{name}" for name in ("fp4", "nf4")),
]
_STATISTICS = "_bitsandbytes_statistics"  # of a model while it is loaded: {full name: statistics}


class _Quantize(Bnb4bitQuantize):
    """Quantise what has been read: experts here, the weights of linear layers as ever."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        result = {}
        config = self.hf_quantizer.quantization_config
        for name, value in input_dict.items():
            if name not in self.hf_quantizer.experts:
                result.update(super().convert({name: value}, model=model, **kwargs))
                continue
            packed, state = quantize_4bit(
                value[0] if isinstance(value, list) else value,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
            )
            _keep(model, name, packed, state.as_dict(packed=True), result, name)
        return result


class _Deserialize(ConversionOps):
    """Bring the codes and the statistics of one parameter together. They come under their patterns, codes first."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: Any = None,
        target_patterns: Sequence[str] = (),
        **kwargs: Any,
    ) -> dict[str, Any]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if len(tensors) == 1:  # a float weight: this one was passed over, its namesake in another layer was not
            return {target_patterns[0]: next(iter(tensors.values()))}
        packed = tensors.pop(next(key for key in tensors if key.endswith("$")))
        result = {}
        statistics = {key.replace("\\", ""): value for key, value in tensors.items()}
        _keep(model, full_layer_name, packed, statistics, result, target_patterns[0])
        return result


def _keep(model: Any, name: str, packed: Tensor, statistics: dict[str, Any], result: dict[str, Any], key: str) -> None:
    model.__dict__.setdefault(_STATISTICS, {})[name] = statistics
    result[key] = nn.Parameter(packed, requires_grad=False)


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Transformers' 4-bit quantizer, for fused experts too."""

    experts = ()

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        taken = (full for full, _, name in expert_parameters(model) if self._takes(full, name))
        self.experts = dict.fromkeys(taken)  # a set that keeps the order of the model

    def _takes(self, full: str, name: str) -> bool:
        """Neither the parameter nor its module is in the list of what is to stay."""
        both = full, full.removesuffix(f".{name}")
        return all(should_convert_module(each, self.modules_to_not_convert) for each in both)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """True for expert weights too."""
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        """What quantises a parameter that has been read."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[Any]:
        """One conversion for each name that expert weights have, before those of the linear layers."""
        own = []
        for leaf in sorted({".".join(name.split(".")[-2:]) for name in self.experts} if self.pre_quantized else ()):
            target = leaf.replace(".", r"\.")
            sources = [target + (ending.replace(".", r"\.") or "$") for ending in _ENDINGS]
            own.append(WeightConverter(sources, leaf, [_Deserialize(self)]))
        return own + super().get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        loaded = model.__dict__.pop(_STATISTICS, {})
        for full in filter(loaded.__contains__, self.experts):
            path, _, name = full.rpartition(".")
            module = model.get_submodule(path)
            replace_parameter_4bit_prequantized(module, name, loaded[full], getattr(module, name).device)
        if loaded:
            use_codes(model)
        # Saving undoes the conversions of loading.  It would cut fused codes into experts as if they were floats, and
        # cannot undo that of a 4-bit layer, which is saved as it is.
        kept = () if loaded else model._weight_conversions
        model._weight_conversions = [each for each in kept if not _of_this_quantizer(each)]
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_experts(model, dtype)
        return super()._dequantize(model, dtype)


def _of_this_quantizer(conversion: Any) -> bool:
    return any(getattr(each, "hf_quantizer", None) is not None for each in getattr(conversion, "operations", ()))


def enable(on: bool = True) -> None:
    """Let from_pretrained(quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...)) quantise fused experts.

    on  False restores Transformers' own quantizer
    Holds for the process.  Weights that llm_int8_skip_modules names, or whose module it names, are passed over;
    the block size is 64.
    """
    auto.AUTO_QUANTIZER_MAPPING[_KEY] = ExpertsQuantizer if on else Bnb4BitHfQuantizer
