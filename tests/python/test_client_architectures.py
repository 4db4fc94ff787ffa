"""Transformers' load_in_4bit and load_in_8bit on five architectures: what is replaced, computed, decoded and saved.

Tiny random models, see client_models.py; float32, on the CPU.  What a Llama has shown in test_transformers.py (other
dtypes, storage types, casts, copies) is not repeated.  Fused experts in 4 bits: test_client_moe.py.
"""

import copy
import importlib.metadata
import json
import math
import os

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the import: nothing here needs the network
pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="5")
try:
    importlib.metadata.version("bitsandbytes")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("clients look for an installed distribution, this is a source tree", allow_module_level=True)

import client_models
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from client_checks import (
    IDS,
    NEW_TOKENS,
    SHARD,
    check_reload,
    dequantised,
    float_layers,
    greedy,
    least_gap,
    load,
    logits,
    out_in,
    quantised_layers,
    relative,
    twin_of,
)
from layer_samples import check_same_state, same_bytes

# Builder: (layers that are quantised, endings of the layers that stay as they are)
ARCHITECTURES = {
    "llama": (14, ("lm_head",)),
    "gpt2": (8, ("lm_head",)),
    "opt": (12, ("lm_head",)),
    "t5": (32, ("lm_head", ".wo")),
    "qwen3_moe": (8, ("lm_head",)),
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CONFIGS = {
    "nf4-nested": NF4,
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "int8-threshold-0": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
CASES = [(name, config) for name in ARCHITECTURES for config in CONFIGS]
FOUR_BITS = [case for case in CASES if "int8" not in case[1]]
EIGHT_BITS = [case for case in CASES if "int8" in case[1]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function of (architecture, config) -> (float model, quantised model), which no test may change."""
    plain, done = {}, {}

    def get(name, config):
        if name not in plain:
            model = getattr(client_models, name)()
            plain[name] = model, client_models.save(model, tmp_path_factory.mktemp(name))
        model, folder = plain[name]
        if (name, config) not in done:
            done[name, config] = load(folder, CONFIGS[config])
        return model, done[name, config]

    return get


def quantise(weight, options):
    """What a weight [out, in] has to become: (bytes, dequantised)."""
    if "load_in_8bit" in options:
        return int8_vectorwise_quant(weight.half().contiguous())[:2]
    nested = options.get("bnb_4bit_use_double_quant", False)
    return quantize_4bit(weight, compress_statistics=nested, quant_type=options["bnb_4bit_quant_type"])


def inputs_and_outputs(model, run=logits):
    """[(name, input, output)] of the quantised layers in one run."""
    seen = []
    handles = [
        layer.register_forward_hook(lambda _, x, y, name=name: seen.append((name, x[0], y)))
        for name, layer in quantised_layers(model).items()
    ]
    run(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_linear_layer_is_replaced_and_holds_the_quantised_float_weight(name, config, models):
    plain, model = models(name, config)
    options, (count, stay) = CONFIGS[config], ARCHITECTURES[name]
    layers = quantised_layers(model)
    floats = float_layers(plain)
    assert set(layers) == {key for key in floats if not key.endswith(stay)}
    assert len(layers) == count
    eight = "load_in_8bit" in options
    kinds = (Linear8bitLt, Int8Params) if eight else (Linear4bit, Params4bit)
    assert {(type(layer), type(layer.weight)) for layer in layers.values()} == {kinds}
    for key, layer in layers.items():
        source = floats[key]
        assert (layer.out_features, layer.in_features) == out_in(source).shape, key
        want, statistics = quantise(out_in(source), options)
        assert same_bytes(layer.weight.data, want), key
        if eight:
            assert torch.equal(layer.weight.SCB, statistics), key
        else:
            ours, theirs = layer.weight.quant_state.as_dict(packed=True), statistics.as_dict(packed=True)
            assert list(ours) == list(theirs)
            assert all(same_bytes(ours[each], theirs[each]) for each in ours), key
        assert (layer.bias is None) == (source.bias is None), key
        assert layer.bias is None or torch.equal(layer.bias, source.bias), key
    # What is no linear layer came through as it was
    state, before = model.state_dict(), plain.state_dict()
    for key, value in before.items():
        if key.rpartition(".")[0] not in layers:
            assert torch.equal(state[key], value), key
    given = model.config.quantization_config.to_dict()
    assert all(given[key] == value for key, value in options.items())


# Largest |error| / |output| of one layer at its own inputs, against the float layer: measured over the five models
# 0.105, 0.141, 0.0127 and 0.0169.  The weights alone make 0.095, 0.126 and 0.007.
EACH = {"nf4-nested": 0.12, "fp4": 0.16, "int8": 0.015, "int8-threshold-0": 0.02}


def errors(model, plain):
    """[relative error] of each call of a quantised layer"""
    floats = float_layers(plain)
    with torch.no_grad():
        return [relative(y, floats[key](x)) for key, x, y in inputs_and_outputs(model)]


@pytest.mark.parametrize(("name", "config"), CASES)
def test_logits_are_near_the_float_models(name, config, models):
    """Errors of n layers that do not know each other add up to sqrt(n) times theirs."""
    plain, model = models(name, config)
    each = errors(model, plain)
    assert max(each) < EACH[config]
    bound = math.sqrt(sum(error**2 for error in each))
    got = relative(logits(model), logits(plain))
    assert bound / 4 < got < 1.3 * bound


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_those_bounds_notice_an_exchanged_layer(name, models):
    plain, model = models(name, "int8")
    model = copy.deepcopy(model)
    layers = list(quantised_layers(model).values())
    first = layers[0]
    other = next(layer for layer in layers[1:] if layer.weight.shape == first.weight.shape)
    first.weight, other.weight = other.weight, first.weight
    first.init_8bit_state(), other.init_8bit_state()
    each = errors(model, plain)
    assert max(each) > 1
    assert relative(logits(model), logits(plain)) > 0.2


@pytest.mark.parametrize(("name", "config"), FOUR_BITS)
def test_4_bits_run_and_decode_as_the_dequantised_float_model(name, config, models):
    plain, model = models(name, config)
    twin = twin_of(model, plain)
    want = logits(twin)
    # The same products, summed in float32 in another order
    assert relative(logits(model), want) < 3e-6
    tokens, scores = greedy(model)
    want_tokens, want_scores = greedy(twin)
    error = (scores - want_scores).abs().max().item()
    assert error < 1e-5 * want_scores.abs().max()
    assert least_gap(want_scores) > 10 * error
    assert torch.equal(tokens, want_tokens)
    assert torch.equal(greedy(model, use_cache=False)[0], tokens)
    assert len(tokens.unique()) > (1 if name == "t5" else 10)


def llm_int8(layer, x, threshold):
    """The outliers' columns in float64 with the dequantised weight, the others as int8 codes by rows (section 2)."""
    rows = x.reshape(-1, x.shape[-1])
    outlier = rows.abs() >= threshold if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    statistics = rows.masked_fill(outlier, 0).abs().amax(1, keepdim=True)
    codes = (rows * (127 / statistics)).round().masked_fill(outlier, 0)
    columns = outlier.any(0)
    codes[:, columns] = 0
    weight, scales = layer.weight.data.double(), layer.weight.SCB.double()
    y = codes.double() @ weight.T * statistics.double() * scales / 127**2
    y += rows[:, columns].double() @ (weight[:, columns] * scales[:, None] / 127).T
    if layer.bias is not None:
        y += layer.bias.double()
    return y.reshape(*x.shape[:-1], -1), columns


@pytest.mark.parametrize(("name", "config"), EIGHT_BITS)
def test_8_bits_run_by_the_method_and_decode(name, config, models):
    plain, model = models(name, config)
    threshold = CONFIGS[config].get("llm_int8_threshold", 6.0)
    found = []
    for key, x, y in inputs_and_outputs(model):
        want, columns = llm_int8(model.get_submodule(key), x, threshold)
        assert relative(y, want) < 1e-6, key
        found.append(columns)
    outliers = sum(columns.sum().item() for columns in found)
    assert (outliers > 0) == (threshold > 0)
    assert outliers < sum(map(len, found)) / 4
    tokens, scores = greedy(model)
    assert tokens.shape[1] == NEW_TOKENS + (1 if name == "t5" else IDS.shape[1])
    assert torch.equal(tokens[:, -NEW_TOKENS:].T, scores.argmax(-1))
    if threshold == 0:  # else the columns that are outliers depend on how many tokens one call has
        again, same = greedy(model, use_cache=False)
        assert (scores - same).abs().max() < 1e-5 * scores.abs().max()
        assert torch.equal(again, tokens)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_threshold_keeps_what_one_outlier_would_cost(name, models):
    plain, model = models(name, "int8")
    _, without = models(name, "int8-threshold-0")
    kept, lost = (math.sqrt(sum(e**2 for e in errors(each, plain))) for each in (model, without))
    assert kept < 0.9 * lost


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize(("name", "config"), CASES)
def test_saved_and_reloaded(name, config, sharded, models, tmp_path):
    _, model = models(name, config)
    again = check_reload(model, tmp_path, sharded)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "bitsandbytes"
    assert all(saved[key] == value for key, value in CONFIGS[config].items())
    assert torch.equal(greedy(again)[0], greedy(model)[0])


@pytest.mark.parametrize(("name", "config"), CASES)
def test_dequantize_gives_float_layers_of_exactly_the_dequantised_weights(name, config, models):
    plain, model = models(name, config)
    want = {key: (dequantised(layer), layer.bias) for key, layer in quantised_layers(model).items()}
    twin = twin_of(model, plain)
    result = copy.deepcopy(model).dequantize(torch.float32)
    assert quantised_layers(result) == {}
    for key, (weight, bias) in want.items():
        layer = result.get_submodule(key)
        assert type(layer) is nn.Linear
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, weight), key
        assert (layer.bias is None) == (bias is None)
        assert bias is None or torch.equal(layer.bias, bias), key
    assert relative(logits(result), logits(twin)) < 1e-6
    assert not hasattr(result.config, "quantization_config")
    assert torch.equal(greedy(result)[0], greedy(twin)[0])


# ---------------------------------------------------------------- what an architecture has of its own


@pytest.mark.parametrize("config", CONFIGS)
def test_tied_embeddings_stay_tied(config, models, tmp_path):
    for name in ("gpt2", "opt", "t5"):
        _, model = models(name, config)
        model.save_pretrained(tmp_path / name)
        for each in (model, load(tmp_path / name)):
            assert type(each.lm_head) is nn.Linear
            assert each.lm_head.weight is each.get_input_embeddings().weight
            assert each.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t5_keeps_wo_in_float32_beside_float16(dtype, config, tmp_path):
    plain = client_models.t5()
    model = load(client_models.save(plain, tmp_path / "float"), CONFIGS[config], dtype=dtype)
    kept = torch.float32 if dtype == torch.float16 else dtype
    names = [key for key in float_layers(plain) if key.endswith(".wo")]
    assert len(names) == 4
    want = logits(model)
    assert want.isfinite().all()
    tokens, _ = greedy(model)
    model.save_pretrained(tmp_path / "again", max_shard_size=SHARD)
    again = load(tmp_path / "again", dtype=dtype)
    check_same_state(again, model)
    for each in (model, again):
        assert each.shared.weight.dtype == dtype
        for key in names:
            layer = each.get_submodule(key)
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, plain.get_submodule(key).weight.to(kept)), key
            assert layer.weight.dtype == kept
        assert torch.equal(logits(each), want)
        assert torch.equal(greedy(each)[0], tokens)
