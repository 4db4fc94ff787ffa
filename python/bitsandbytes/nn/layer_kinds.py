"""The layers that a layer map can speak of: finding them in a model, and quantising or restoring a single one.

A quantised layer is built on meta, without memory of its own, over the weight of the float layer; only then is that
weight quantised, so that one weight at a time exists in both forms.  For layer_map.py.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import functional
from .experts import expert_parameters
from .int8params import Int8Params
from .linear4bit import Linear4bit
from .linear8bit import Linear8bitLt
from .parametrize import _find, _list_of, packed_names
from .params4bit import Params4bit
from .quantized_embedding import Embedding4bit, Embedding8bit

_QUANTISED = (Linear4bit, Linear8bitLt, Embedding4bit, Embedding8bit)


class Layer(NamedTuple):
    """A layer that a map can speak of."""

    kind: str  # "linear", "embedding" or "experts", which is one 3-D parameter
    dtype: torch.dtype | None  # of the float weight; None: it is quantised
    settings: dict[str, Any] | None  # complete, of a quantised one; else None
    places: tuple[tuple[str, str], ...]  # (name of the parent, name there): each way to reach the module


def dtype_named(name: str | None) -> Any:
    """torch.<name>; None of None."""
    return None if name is None else getattr(torch, name)


def name_of(dtype: torch.dtype | None) -> str | None:
    """The inverse of dtype_named()."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- finding


def _conv1d() -> Any:
    """Transformers' Conv1D; () if there cannot be one in a model."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", ())


def find_layers(model: nn.Module) -> dict[str, Layer]:
    """{name: Layer} in the order of the modules. Subclasses of torch's layers, which may do otherwise, are none."""
    places: dict[int, list[tuple[str, str]]] = {}
    result: dict[str, Layer] = {}
    for path, parent in model.named_modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((path, key))
    for name, module in model.named_modules():
        settings = _settings_of(module)
        embedding = type(module) is nn.Embedding or isinstance(module, (Embedding4bit, Embedding8bit))
        plain = type(module) in (nn.Linear, nn.Embedding) or type(module) is _conv1d()
        if name and (settings is not None or plain):
            dtype = None if settings is not None else module.weight.dtype
            kind = "embedding" if embedding else "linear"
            result[name] = Layer(kind, dtype, settings, tuple(places[id(module)]))
        for key in packed_names(module):
            full = f"{name}.{key}" if name else key
            result[full] = Layer("experts", None, _settings_of_packed(module, key), ())
    for full, module, key in expert_parameters(model):
        result[full] = Layer("experts", getattr(module, key).dtype, None, ())
    return result


def shared_weights(model: nn.Module) -> dict[str, str]:
    """{parameter: another name of the same tensor}, by full names."""
    owners: dict[int, list[str]] = {}
    result: dict[str, str] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    for names in owners.values():
        if len(names) > 1:
            result.update({name: next(other for other in names if other != name) for name in names})
    # Transformers says what it will tie, before it does.
    for one, two in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        result.update({one: two, two: one})
    return result


def _settings_of(module: Any) -> dict[str, Any] | None:
    """Complete settings of a quantised layer, None of any other."""
    weight = module.weight if isinstance(module, _QUANTISED) else None
    kind = {"embeddings": True} if isinstance(module, (Embedding4bit, Embedding8bit)) else {}
    if isinstance(weight, Params4bit):
        own = {
            "blocksize": weight.blocksize,
            "nested": weight.compress_statistics,
            "compute_dtype": name_of(getattr(module, "compute_dtype", None)),
            "quant_storage": name_of(weight.quant_storage),
        }
        if kind:
            del own["compute_dtype"]
        return {"type": weight.quant_type, **kind, **own}
    if isinstance(weight, Int8Params) and not weight.has_fp16_weights:
        return {"type": "int8", **kind, **({} if kind else {"threshold": module.state.threshold})}
    return None


def _settings_of_packed(module: nn.Module, name: str) -> dict[str, Any]:
    state = _find(_list_of(module, name)).quant_state
    return {"type": state.quant_type, "blocksize": state.blocksize, "nested": state.nested}


# ---------------------------------------------------------------- one layer


def replace_layer(model: nn.Module, name: str, layer: Layer, settings: dict[str, Any]) -> nn.Module:
    """Put the quantised class in the place of a float layer, over the same weight, which is not quantised yet.

    layer, settings  of plan_layers()
    Returns the new module; its source_cls is the class of the old one.
    """
    old = model.get_submodule(name)
    new: Any = (_new_embedding if layer.kind == "embedding" else _new_linear)(old, settings)
    new.source_cls = type(old)
    _put(model, layer, old, new)
    return new


def _put(model: nn.Module, layer: Layer, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    for path, key in layer.places:
        model.get_submodule(path)._modules[key] = new


def _new_linear(old: Any, settings: dict[str, Any]) -> nn.Module:
    weight = old.weight.data
    if type(old) is not nn.Linear:
        weight = weight.T.contiguous()
    rows, columns = weight.shape
    if settings["type"] == "int8":
        options = {"has_fp16_weights": False, "threshold": settings["threshold"]}
        new = Linear8bitLt(columns, rows, bias=False, device="meta", **options)
    else:
        new = Linear4bit(columns, rows, False, dtype_named(settings["compute_dtype"]), device="meta")
    _take_weight(new, weight, settings)
    new.bias = old.bias
    return new


def _new_embedding(old: Any, settings: dict[str, Any]) -> nn.Module:
    weight = old.weight.data
    cls = Embedding8bit if settings["type"] == "int8" else Embedding4bit
    new = cls(old.num_embeddings, old.embedding_dim, dtype=weight.dtype, device="meta")
    new.padding_idx = old.padding_idx
    _take_weight(new, weight, settings)
    return new


def _take_weight(new: Any, weight: torch.Tensor, settings: dict[str, Any]) -> None:
    if settings["type"] == "int8":
        new.weight = Int8Params(weight, requires_grad=False)
        return
    new.quant_storage = dtype_named(settings["quant_storage"])
    new.weight = Params4bit(
        weight,
        blocksize=settings["blocksize"],
        compress_statistics=settings["nested"],
        quant_type=settings["type"],
        quant_storage=new.quant_storage,
        module=new,
    )


def quantise_weight(new: Any) -> None:
    """Quantise the weight where it is."""
    if isinstance(new.weight, Int8Params):
        new.weight.quantize()
        new._follow()
    else:
        new.weight.to(new.weight.device)


def dequantize_layer(model: nn.Module, name: str, layer: Layer, dtype: torch.dtype | None) -> None:
    """Put a float layer of torch's class in the place of a quantised one that is no parameter of experts."""
    old: Any = model.get_submodule(name)
    if isinstance(old.weight, Params4bit):
        weight = functional.dequantize_4bit(old.weight.data, old.weight.quant_state)
    else:
        weight = functional.int8_vectorwise_dequant(old.weight.data, old.weight.SCB)
    new: Any
    if layer.kind == "embedding":
        new = nn.Embedding(*weight.shape, padding_idx=old.padding_idx, device="meta")
    else:
        new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
        new.bias = old.bias
    new.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    _put(model, layer, old, new)
