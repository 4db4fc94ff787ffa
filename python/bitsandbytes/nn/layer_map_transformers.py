"""Layer maps in Transformers: importing this module is all that from_pretrained() needs.

    from bitsandbytes.nn.layer_map_transformers import LayerMapConfig

    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=LayerMapConfig({...}))
    model.save_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(other)

The import registers a quantisation method of its own, by the calls that Transformers offers for that.  Each weight is
quantised as it is read; the map is saved in config.json and decides again when the checkpoint is loaded, where the
import has been made.  See docs/LAYERS.md.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.bitsandbytes import (
    Bnb4bitDeserialize,
    Bnb4bitQuantize,
    Bnb8bitDeserialize,
    Bnb8bitQuantize,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..functional import quantize_4bit
from .experts_transformers import ExpertsQuantizer, _keep
from .layer_kinds import dtype_named, replace_layer
from .layer_map import check_layer_map, dequantize_layers, plan_layers, quantize_layers
from .linear4bit import Linear4bit
from .linear8bit import Linear8bitLt
from .quantized_embedding import Embedding4bit, Embedding8bit

__all__ = ["METHOD", "LayerMapConfig", "LayerMapQuantizer", "quantize_pretrained"]

METHOD = "bitsandbytes_layers"

_4BIT = (Linear4bit, Embedding4bit)
_8BIT = (Linear8bitLt, Embedding8bit)

# The entries of a checkpoint that belong to a weight, of either kind.
_NAMES = {
    kind: list(dict.fromkeys(names + Bnb8BitHfQuantizer.serialized_names[kind]))
    for kind, names in Bnb4BitHfQuantizer.serialized_names.items()
}


@register_quantization_config(METHOD)
class LayerMapConfig(QuantizationConfigMixin):
    """A layer map as a quantization_config.

    layers  the map, see quantize_layers(); kept as a list of pairs, because JSON files of Transformers sort the keys
            of objects and the order of the entries counts
    ValueError: the map is not valid in itself, or an argument is not one of these.
    """

    def __init__(self, layers: Any, quant_method: str = METHOD, **others: Any) -> None:
        if quant_method != METHOD:
            raise ValueError(f"LayerMapConfig: quant_method is {quant_method!r}, expected {METHOD!r}")
        if others:
            raise ValueError(f"LayerMapConfig: unexpected {', '.join(sorted(others))}, expected layers alone")
        self.quant_method = METHOD
        self.layers = [[entry.pattern, entry.settings] for entry in check_layer_map(layers)]


class _Quantize(ConversionOps):
    """Quantise a weight that has been read, as its layer says."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in input_dict.items():
            if name in self.hf_quantizer.experts:
                settings = self.hf_quantizer.experts[name]
                packed, state = quantize_4bit(
                    value[0] if isinstance(value, list) else value,
                    blocksize=settings["blocksize"],
                    compress_statistics=settings["nested"],
                    quant_type=settings["type"],
                )
                _keep(model, name, packed, state.as_dict(packed=True), result, name)
                continue
            module, _ = get_module_from_name(model, name)
            operation = Bnb8bitQuantize if isinstance(module, _8BIT) else Bnb4bitQuantize
            result.update(operation(self.hf_quantizer).convert({name: value}, model=model, **kwargs))
        return result


class _Deserialize(ConversionOps):
    """Bring a weight and its statistics together. Weights of layers that are not quantised come here too, alone."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        module, name = get_module_from_name(model, full_layer_name)
        int8 = "SCB" in input_dict
        wanted = isinstance(module, _8BIT) if int8 else isinstance(module, _4BIT)
        ours = isinstance(module, _4BIT + _8BIT) and name == "weight"
        if (len(input_dict) > 1 or ours) and not (wanted and len(input_dict) > 1):
            kind = "an int8 weight" if int8 else "a 4-bit weight" if len(input_dict) > 1 else "no statistics"
            raise ValueError(
                f"{full_layer_name}: the checkpoint has {kind}, expected that of a {type(module).__name__}"
            )
        operation = Bnb8bitDeserialize if int8 else Bnb4bitDeserialize
        return operation(self.hf_quantizer).convert(input_dict, model=model, full_layer_name=full_layer_name, **kwargs)


@register_quantizer(METHOD)
class LayerMapQuantizer(ExpertsQuantizer):
    """Transformers' 4-bit quantizer, for layers of any type of a map."""

    serialized_names = _NAMES

    def __init__(self, quantization_config: LayerMapConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.experts: dict[str, dict[str, Any]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """ValueError: device_map would keep a layer on the disk, or on the CPU beside others on an accelerator."""
        device_map = kwargs.get("device_map")
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if devices != {"cpu"} and devices & {"cpu", "disk"}:
            raise ValueError(
                f"device_map has {', '.join(sorted(devices))}, expected all layers on accelerators or all on the CPU"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        entries = check_layer_map(self.quantization_config.layers)
        saved = self.pre_quantized
        plan = plan_layers(model, entries, strict=not saved, names_of=_names_in_checkpoints(model) if saved else None)
        if saved:
            for name in _new_heads(model, plan, kwargs.get("checkpoint_files")):
                del plan[name]
        self.experts = {name: settings for name, (layer, settings) in plan.items() if layer.kind == "experts"}
        for name, (layer, settings) in plan.items():
            if layer.kind == "experts":
                continue
            new: Any = replace_layer(model, name, layer, settings)
            new.requires_grad_(False)
            if saved:
                # Loading casts what it reads to the dtype of the skeleton's weight.
                dtype = torch.int8 if settings["type"] == "int8" else new.quant_storage
                new.weight.data = new.weight.data.to(dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """True for the weights of layers and experts that the map quantises."""
        module, name = get_module_from_name(model, param_name)
        return param_name in self.experts or (isinstance(module, _4BIT + _8BIT) and name == "weight")

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element once loaded, for the planning of devices."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, _8BIT) and name == "weight":
            return 1
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        """What is done to a weight of a float checkpoint."""
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, Any]:
        """What is done to a weight of a quantised checkpoint."""
        return {"deserialize": _Deserialize}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        conversions = [each for each in getattr(model, "_weight_conversions", None) or [] if not _is_own(each)]
        super()._process_model_after_weight_loading(model, **kwargs)
        if not self.experts:
            # Saving undoes what loading did to the names and to float experts, but not the quantisation.
            model._weight_conversions = conversions
        _mark(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # Saving a model turns the dtype of its config into a name.
        return dequantize_layers(model, dtype_named(dtype) if isinstance(dtype, str) else dtype)


def _is_own(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        getattr(operation, "hf_quantizer", None) is not None for operation in conversion.operations
    )


def _names_in_checkpoints(model: Any) -> Any:
    """A function from the name of a layer to the names that it may have had in the model that was saved.

    That may have been the same network with a head, or without: under one name more, or one less.
    """
    prefix = f"{model.base_model_prefix}."

    def names(name: str) -> tuple[str, ...]:
        return (name, name.removeprefix(prefix), prefix + name)

    return names


def _new_heads(model: Any, names: Iterable[str], files: Sequence[str] | None) -> list[str]:
    """The layers outside the base model of which a quantised checkpoint has nothing: new ones, to be trained."""
    files = [file for file in files or () if str(file).endswith(".safetensors")]
    if not files:
        return []
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            stored.update(opened.keys())
    heads = [
        name for name in names if not name.startswith(f"{model.base_model_prefix}.") and model.base_model is not model
    ]
    return [name for name in heads if f"{name}.weight" not in stored and name not in stored]


def _mark(model: Any) -> None:
    """Say what Transformers and PEFT ask of a model: which kinds of quantised layers it has."""
    kinds = {type(module) for module in model.modules()}
    model.is_loaded_in_4bit = any(issubclass(kind, _4BIT) for kind in kinds)
    model.is_loaded_in_8bit = any(issubclass(kind, _8BIT) for kind in kinds)


def quantize_pretrained(model: nn.Module, layer_map: Any) -> nn.Module:
    """quantize_layers() for a Transformers model in memory, so that save_pretrained() stores the map. Returns model.

    ValueError: see quantize_layers(); the model was loaded with another quantisation.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        method = model.hf_quantizer.quantization_config.quant_method
        method = getattr(method, "value", method)
        raise ValueError(f"quantize_pretrained: the model is quantised by {method}, expected a float one")
    config = LayerMapConfig(layer_map)
    quantize_layers(model, layer_map)
    quantizer = LayerMapQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config
    model.config._is_quantized = True
    _mark(model)
    return model
