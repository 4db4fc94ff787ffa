"""Fused experts through Transformers' load_in_4bit: one call before from_pretrained().

    bitsandbytes.nn.experts_transformers.enable()

Transformers' 4-bit quantizer asks for each parameter whether its module is a Linear4bit, and so passes fused experts
by.  enable() registers a quantizer in its place that takes them too: each is quantised as soon as it is loaded, saved
with its statistics beside it, and found again by from_pretrained() (after enable()).  See docs/MOE.md.
"""

from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ..functional import quantize_4bit
from .experts import dequantize_experts, expert_parameters
from .parametrize import replace_parameter_4bit_prequantized

__all__ = ["enable"]

_KEY = "bitsandbytes_4bit"
_STATISTICS = "_bitsandbytes_statistics"  # of a model while it is loaded: {full name: statistics}


class _Quantize(Bnb4bitQuantize):
    """Quantise what has been read: experts here, the weights of linear layers as ever."""

    def convert(self, input_dict, model=None, **kwargs):
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

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, full_layer_name=None, model=None, target_patterns=(), **kwargs):
        if len(input_dict) == 1:
            return input_dict
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        packed = tensors.pop(next(key for key in tensors if key.endswith("$")))
        result = {}
        statistics = {key.replace("\\", ""): value for key, value in tensors.items()}
        _keep(model, full_layer_name, packed, statistics, result, target_patterns[0])
        return result


def _keep(model, name, packed, statistics, result, key):
    model.__dict__.setdefault(_STATISTICS, {})[name] = statistics
    result[key] = nn.Parameter(packed, requires_grad=False)


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Transformers' 4-bit quantizer, for fused experts too."""

    experts = ()

    def _process_model_before_weight_loading(self, model, **kwargs):
        super()._process_model_before_weight_loading(model, **kwargs)
        names = (full for full, _, _ in expert_parameters(model))
        self.experts = {name for name in names if should_convert_module(name, self.modules_to_not_convert)}

    def param_needs_quantization(self, model, param_name, **kwargs):
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self):
        return _Quantize(self)

    def get_weight_conversions(self):
        """One conversion for each name that expert weights have, before those of the linear layers."""
        own = []
        endings = [name.removeprefix("weight") for name in self.serialized_names["weight"]]
        for leaf in sorted({".".join(name.split(".")[-2:]) for name in self.experts} if self.pre_quantized else ()):
            target = leaf.replace(".", r"\.")
            sources = [target + (ending.replace(".", r"\.") or "$") for ending in endings]
            own.append(WeightConverter(sources, leaf, [_Deserialize(self)]))
        return own + super().get_weight_conversions()

    def _process_model_after_weight_loading(self, model, **kwargs):
        for full, statistics in model.__dict__.pop(_STATISTICS, {}).items():
            path, _, name = full.rpartition(".")
            module = model.get_submodule(path)
            replace_parameter_4bit_prequantized(module, name, statistics, getattr(module, name).device)
        # Saving would undo the conversions of loading, and cut fused codes into experts as if they were floats.
        model._weight_conversions = []
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model, dtype=None):
        dequantize_experts(model, dtype)
        return super()._dequantize(model, dtype)


def enable(on=True):
    """Let from_pretrained(quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...)) quantise fused experts.

    on  False restores Transformers' own quantizer
    Holds for the process.  Names in llm_int8_skip_modules are passed over; the block size is 64.
    """
    auto.AUTO_QUANTIZER_MAPPING[_KEY] = ExpertsQuantizer if on else Bnb4BitHfQuantizer
