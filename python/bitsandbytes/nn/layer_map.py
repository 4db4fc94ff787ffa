"""A type for each layer: regular expressions over the names of a model's layers, to NF4, FP4, int8 or "skip".

    quantize_layers(model, {"lm_head": {"type": "skip"}, r".*\\.down_proj": {"type": "int8"}, ".*": {"type": "nf4"}})

The map is plain JSON.  It is checked as a whole, against the model too, before the first layer is touched; then layer
after layer is replaced by the class that the library has for it.  layer_map_of() reads a map off a quantised model.
See docs/LAYERS.md.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from .. import functional
from .experts import dequantize_experts
from .layer_kinds import (
    Layer,
    dequantize_layer,
    dtype_named,
    find_layers,
    name_of,
    quantise_weight,
    replace_layer,
    shared_weights,
)
from .parametrize import replace_parameter_4bit

__all__ = ["dequantize_layers", "layer_map_of", "quantize_layers"]

# The settings of each type, with what they are if an entry does not say.
_OF_4_BITS = {
    "blocksize": functional.DEFAULT_BLOCKSIZE_4BIT,
    "nested": False,
    "compute_dtype": None,
    "quant_storage": "uint8",
}
_SETTINGS: dict[str, dict[str, Any]] = {"nf4": _OF_4_BITS, "fp4": _OF_4_BITS, "int8": {"threshold": 0.0}, "skip": {}}

# Settings that a kind of layer has no use for, of those above.
_WITHOUT = {"linear": (), "embedding": ("compute_dtype", "threshold"), "experts": ("compute_dtype", "quant_storage")}

_Map = dict[str, dict[str, Any]] | Sequence[Sequence[Any]]


class Entry(NamedTuple):
    """One line of a checked map."""

    pattern: str
    regex: re.Pattern[str]
    settings: dict[str, Any]  # as given, JSON values


# ---------------------------------------------------------------- the map alone


def check_layer_map(layer_map: _Map) -> list[Entry]:
    """Check a map without a model. Returns a list of Entry.

    layer_map  {regular expression: settings}, or a list of such pairs; see quantize_layers()
    ValueError: names the entry, the value and what was expected.
    """
    pairs = list(layer_map.items()) if isinstance(layer_map, dict) else layer_map
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"layer map: it is {layer_map!r}, expected a dict or a list of pairs")
    if not pairs:
        raise ValueError("layer map: it is empty, expected {regular expression: settings}")
    entries, probed = [], set()
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(f"layer map: {pair!r} is not a pair, expected (regular expression, settings)")
        pattern, given = pair
        entry = Entry(pattern, _compiled(pattern), _checked(pattern, given))
        key = json.dumps(entry.settings)
        if key not in probed:
            _probe(entry, torch.float32)
            probed.add(key)
        entries.append(entry)
    return entries


def _fail(pattern: Any, text: str) -> NoReturn:
    raise ValueError(f"layer map, entry {pattern!r}: {text}")


def _compiled(pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        _fail(pattern, "the name is not a string, expected a regular expression")
    try:
        return re.compile(pattern)
    except re.error as error:
        _fail(pattern, f"not a regular expression ({error})")


def _checked(pattern: str, given: Any) -> dict[str, Any]:
    """The settings of an entry as JSON values: types checked, values left to the library (_probe)."""
    if not isinstance(given, dict):
        _fail(pattern, f'settings are {given!r}, expected a dict such as {{"type": "nf4"}}')
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _SETTINGS:
        _fail(pattern, f"type is {kind!r}, expected one of {', '.join(_SETTINGS)}")
    allowed = ["type", *_SETTINGS[kind]] + (["embeddings"] if kind != "skip" else [])
    result = {}
    for key, value in given.items():
        if key not in allowed:
            _fail(pattern, f"{key!r} is no setting of type {kind}, expected {', '.join(allowed)}")
        if key in ("nested", "embeddings") and not isinstance(value, bool):
            _fail(pattern, f"{key} is {value!r}, expected True or False")
        if key == "blocksize" and type(value) is not int:
            _fail(pattern, f"blocksize is {value!r}, expected an int")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key == "threshold" and not (number and math.isfinite(value) and value >= 0):
            _fail(pattern, f"threshold is {value!r}, expected a number, 0 or more")
        if key.endswith(("dtype", "storage")):
            value = _dtype_name(pattern, key, value)
        result[key] = value
    return result


def _dtype_name(pattern: str, key: str, value: Any) -> str | None:
    if value is None and key == "compute_dtype":
        return None
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        _fail(pattern, f'{key} is {value!r}, expected the name of a dtype, such as "bfloat16"')
    return name_of(dtype)


def _probe(entry: Entry, dtype: torch.dtype) -> None:
    """Let the library judge the settings, and the dtype of a weight, on one element."""
    settings = _complete(entry.settings, "linear")
    if settings["type"] in ("skip", "int8"):
        return
    try:
        packed, state = functional.quantize_4bit(
            torch.zeros(1, dtype=dtype, device="cpu"),
            blocksize=settings["blocksize"],
            quant_type=settings["type"],
            quant_storage=dtype_named(settings["quant_storage"]),
        )
        if settings["compute_dtype"] is not None:
            state.dtype = dtype_named(settings["compute_dtype"])
            functional.dequantize_4bit(packed, state)
    except ValueError as error:
        reason = str(error).replace("dequantize_4bit: dtype", "compute_dtype").replace("quantize_4bit: ", "")
        _fail(entry.pattern, reason.replace("dtype of A", "dtype of a weight"))


def _complete(settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """The settings that a layer of that kind has after it was quantised."""
    name = settings["type"]
    extra = {"embeddings": True} if kind == "embedding" else {}
    own = {key: settings.get(key, value) for key, value in _SETTINGS[name].items() if key not in _WITHOUT[kind]}
    return {"type": name, **extra, **own}


# ---------------------------------------------------------------- the map and a model


def quantize_layers(model: nn.Module, layer_map: _Map) -> nn.Module:
    """Quantise the layers of a model, each as the map says, in place. Returns model.

    model      any module below which there are layers: nn.Linear, Transformers' Conv1D, nn.Embedding, and the fused
               3-D weights of experts (docs/MOE.md), which go by the name of the parameter.  Float weights are
               quantised on their device; a model on meta becomes a skeleton that load_state_dict() fills
    layer_map  {regular expression: settings} or a list of such pairs.  The first expression that matches the whole name
               of a layer decides.  A layer that none matches stays, as one of type "skip" does; one that is quantised
               already stays if the settings are its own.
        type           "nf4", "fp4", "int8" or "skip"
        embeddings     the entry is for embeddings too; without it they are passed over.  False
        blocksize      4 bits: elements per scale, a power of two, 32..4096.  64
        nested         4 bits: quantise the scales too.  False
        compute_dtype  4 bits: dtype of the product, by name or as torch.dtype; None: that of the input.  None
        quant_storage  4 bits: dtype that carries the packed bytes.  "uint8"
        threshold      int8: inputs of at least this magnitude are multiplied unquantised; 0: none (Linear8bitLt).  0.0
    ValueError, before anything is changed: a setting that is not one of these; an expression that decides for no layer,
    except ".*"; a weight that is shared with another layer; a layer that is quantised otherwise; experts in int8; an
    embedding with max_norm.
    """
    for name, (layer, settings) in plan_layers(model, check_layer_map(layer_map)).items():
        if layer.kind == "experts":
            path, _, parameter = name.rpartition(".")
            options = settings["nested"], settings["type"], settings["blocksize"]
            replace_parameter_4bit(model.get_submodule(path), parameter, *options)
        else:
            new = replace_layer(model, name, layer, settings)
            if not new.weight.is_meta:
                quantise_weight(new)
    return model


def plan_layers(
    model: nn.Module,
    entries: list[Entry],
    strict: bool = True,
    names_of: Callable[[str], tuple[str, ...]] | None = None,
) -> dict[str, tuple[Layer, dict[str, Any]]]:
    """Decide what becomes of each layer. Returns {name: (Layer, complete settings)} of those to quantise.

    strict    an entry that decides for no layer is an error
    names_of  the names that a layer goes by, from its name here; None: that one
    ValueError: see quantize_layers(); nothing is changed.
    """
    layers = find_layers(model)
    shared = shared_weights(model)
    chosen = _choose(entries, layers, names_of or (lambda name: (name,)), strict)
    result, probed = {}, set()
    for name, entry in chosen.items():
        layer = layers[name]
        if entry.settings["type"] == "skip":
            continue
        wanted = _complete(entry.settings, layer.kind)
        if layer.dtype is None:
            if wanted != layer.settings:
                _fail(entry.pattern, f"layer {name!r} is quantised already, as {layer.settings}, expected {wanted}")
            continue
        _check_layer(model, name, layer, entry, shared)
        if (entry.pattern, layer.dtype) not in probed:
            _probe(entry, layer.dtype)
            probed.add((entry.pattern, layer.dtype))
        result[name] = (layer, wanted)
    return result


def _check_layer(model: nn.Module, name: str, layer: Layer, entry: Entry, shared: dict[str, str]) -> None:
    weight = name if layer.kind == "experts" else f"{name}.weight"
    if weight in shared:
        _fail(
            entry.pattern,
            f"{weight} and {shared[weight]} are one tensor, expected a weight of the layer's own; put "
            f'{{"type": "skip"}} for {name!r} before this entry',
        )
    if layer.kind == "experts" and entry.settings["type"] == "int8":
        _fail(entry.pattern, f"{name!r} is a weight of experts and the type is int8, expected nf4, fp4 or skip")
    if layer.kind == "embedding" and model.get_submodule(name).max_norm is not None:
        _fail(entry.pattern, f"embedding {name!r} has max_norm, expected none; put a skip before this entry")


def _choose(
    entries: list[Entry], layers: dict[str, Layer], names_of: Callable[[str], tuple[str, ...]], strict: bool
) -> dict[str, Entry]:
    """{name: Entry}: the first that matches."""
    exact = {}  # names spelt out, as layer_map_of() does: found at once, however many
    patterns = []
    for index, entry in enumerate(entries):
        name = re.sub(r"\\(.)", r"\1", entry.pattern)
        if re.escape(name) == entry.pattern:
            exact.setdefault(name, index)
        else:
            patterns.append(index)
    result: dict[str, Entry] = {}
    used: set[int] = set()
    for name, layer in layers.items():
        names = names_of(name)
        found = [exact[each] for each in names if each in exact and _is_for(entries[exact[each]], layer)]
        last = min(found, default=len(entries))
        for index in patterns:
            if index > last:
                break
            if _is_for(entries[index], layer) and any(entries[index].regex.fullmatch(each) for each in names):
                last = index
                break
        if last < len(entries):
            result[name] = entries[last]
            used.add(last)
    if strict:
        _check_used(entries, used, layers)
    return result


def _is_for(entry: Entry, layer: Layer) -> bool:
    return layer.kind != "embedding" or entry.settings["type"] == "skip" or entry.settings.get("embeddings", False)


def _check_used(entries: list[Entry], used: set[int], layers: dict[str, Layer]) -> None:
    for index, entry in enumerate(entries):
        if index in used or entry.pattern == ".*":
            continue
        names = [name for name in layers if entry.regex.fullmatch(name)]
        if not names:
            _fail(entry.pattern, "matches no layer, expected at least one; the whole name has to match")
        if not any(_is_for(entry, layers[name]) for name in names):
            _fail(entry.pattern, f'matches embeddings only, such as {names[0]!r}, expected "embeddings": true for them')
        _fail(
            entry.pattern, f"decides for no layer: earlier entries match {names[0]!r} and all others, expected it first"
        )


# ---------------------------------------------------------------- back from a model


def layer_map_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The map of a quantised model: {name, escaped as an expression: complete settings}, plain JSON.

    quantize_layers(another model of the same layers, layer_map_of(model)) gives a model that loads the state_dict() of
    the first.  {} if nothing is quantised.
    """
    layers = find_layers(model)
    return {re.escape(name): layer.settings for name, layer in layers.items() if layer.settings is not None}


def dequantize_layers(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turn every layer that a map can quantise into a float one of torch's classes, in place. Returns model.

    dtype  of the new weights; None: that of a 4-bit weight before it was quantised, float32 for int8
    """
    for name, layer in find_layers(model).items():
        if layer.settings is not None and layer.kind != "experts":
            dequantize_layer(model, name, layer, dtype)
    dequantize_experts(model, dtype)
    return model
