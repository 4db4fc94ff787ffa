"""Checkpoints that upstream's release 0.50.1 wrote: they load into ours byte for byte, and are written back the same.

The files, and how they were made: tests/upstream/checkpoints/README.md.  Each holds what upstream made of it: the
dequantised weight, which ours must equal bit for bit, and the output of the layer, which it must equal within rounding.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from layer_samples import check_linked, same_bytes

FOLDER = Path(__file__).parents[1] / "upstream" / "checkpoints"
LAYERS_4BIT = sorted(path.stem for path in FOLDER.glob("linear4bit-*.safetensors"))
LAYERS_8BIT = sorted(path.stem for path in FOLDER.glob("linear8bit-*.safetensors"))
OPTIMIZERS = sorted(path.stem for path in FOLDER.glob("optimizer-*.pt"))


def test_the_samples_are_there():
    assert (len(LAYERS_4BIT), len(LAYERS_8BIT), len(OPTIMIZERS)) == (25, 12, 8)


class Sample:
    """A file of a layer: `state` is its state dict; x, y, w what upstream made of it; options the constructor's."""

    def __init__(self, name):
        safetensors = pytest.importorskip("safetensors")
        with safetensors.safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            about = json.loads(file.metadata()["sample"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no iterator)
        assert about["bitsandbytes"] == "0.50.1"
        self.options = about["options"]
        self.state = {k.removeprefix("layer."): v for k, v in tensors.items() if k.startswith("layer.")}
        self.x, self.y, self.w = tensors["x"], tensors["y"], tensors.get("w")
        self.statistics = {key: value for key, value in self.state.items() if key.startswith("weight.")}


def read(name):
    return torch.load(FOLDER / f"{name}.pt", weights_only=True)


def check_same(given, expected):
    """Two state dicts have the same names, dtypes, shapes and bytes."""
    assert sorted(given) == sorted(expected)
    for key, value in expected.items():
        assert given[key].dtype == value.dtype, key
        assert same_bytes(given[key], value), key


def check_weight(given, expected):
    """Equal in every bit, but for the sign of zero: upstream decodes FP4 code 8 to -0.0 in some shapes."""
    assert given.dtype == expected.dtype
    assert torch.equal(given, expected)


def loaded_state(sample, assign):
    """The state dict after loading: a copy takes the bias into the layer's own, of float32."""
    if assign or "bias" not in sample.state:
        return sample.state
    return {**sample.state, "bias": sample.state["bias"].float()}


def check_product(given, y, x, w, bias):
    """y = x W^T + bias within rounding: two results rounded to their dtype, sums of K products in float32.

    16-bit: upstream may round the sum once more before it adds the bias.
    """
    assert given.dtype == y.dtype
    size = x.float().abs() @ w.float().abs().t() + (0 if bias is None else bias.float().abs())
    half, sums = torch.finfo(y.dtype).eps / 2, x.shape[-1] * torch.finfo(torch.float32).eps
    assert ((given.float() - y.float()).abs() <= (3 * half + sums) * size).all()


# -------------------------------------------------------------------------------------------------- Linear4bit


def new_4bit(sample, kind):
    other = {"nf4": "fp4", "fp4": "nf4"}[sample.options["quant_type"]]
    options = {**sample.options, "quant_type": other} if kind == "quantised" else sample.options
    layer = Linear4bit(**options, device="meta" if kind == "meta" else "cpu")
    return layer.to("cpu") if kind == "quantised" else layer


@pytest.mark.parametrize("name", LAYERS_4BIT)
@pytest.mark.parametrize("kind, assign", [("float", False), ("quantised", False), ("quantised", True), ("meta", True)])
def test_linear4bit_loads_strictly(name, kind, assign):
    sample = Sample(name)
    layer = new_4bit(sample, kind)
    result = layer.load_state_dict(dict(sample.state), strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    check_linked(layer)
    check_4bit(sample, layer, assign)


@pytest.mark.parametrize("name", LAYERS_4BIT)
def test_linear4bit_from_prequantized(name):
    """The way of Transformers: a skeleton on meta, whose weight is replaced."""
    sample = Sample(name)
    layer = Linear4bit(**sample.options, device="meta")
    packed = sample.state["weight"]
    layer.weight = Params4bit.from_prequantized(packed, dict(sample.statistics), device="cpu", module=layer)
    if sample.options["bias"]:
        layer.bias = nn.Parameter(sample.state["bias"])
    check_4bit(sample, layer)


def check_4bit(sample, layer, assign=True):
    check_same(layer.state_dict(), loaded_state(sample, assign))
    check_weight(F.dequantize_4bit(layer.weight.data, layer.weight.quant_state), sample.w)
    check_product(layer(sample.x), sample.y, sample.x, sample.w, layer.bias)


@pytest.mark.parametrize("name", LAYERS_4BIT)
def test_linear4bit_round_trip_by_file(name, tmp_path):
    """What is saved again has the same keys and bytes, the JSON of the metadata included."""
    sample = Sample(name)
    layer = new_4bit(sample, "meta")
    layer.load_state_dict(sample.state, assign=True)
    files = pytest.importorskip("safetensors.torch")
    files.save_file(layer.state_dict(), tmp_path / "again.safetensors")
    check_same(files.load_file(tmp_path / "again.safetensors"), sample.state)


@pytest.mark.parametrize("name", LAYERS_4BIT)
def test_quant_state_from_dict(name):
    sample = Sample(name)
    before = {key: value.clone() for key, value in sample.statistics.items()}
    state = QuantState.from_dict(sample.statistics, device="cpu")
    check_same({f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}, before)
    check_same(sample.statistics, before)
    assert QuantState.from_dict(state.as_dict(packed=False), device="cpu") == state
    check_weight(F.dequantize_4bit(sample.state["weight"], state), sample.w)


def test_saved_after_inference_nested():
    """On AVX512-BF16 upstream repacks a layer for its first forward; to save it, it undoes that, from bfloat16 scales.

    The codes are whole. A scale moves by its rounding to bfloat16 and by its second quantisation, at most half of the
    widest gap of the dynamic map (0.0070, docs/FORMAT.md) times the largest scale, or by upstream's grid of 2^-15.
    """
    sample = Sample("used4bit-nested")
    layer = Linear4bit(**sample.options, device="meta")
    layer.load_state_dict(sample.state, assign=True)
    check_same(layer.state_dict(), sample.state)
    weight = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    scales = F.dequantize_blockwise(layer.weight.absmax, layer.weight.state2) + layer.weight.offset
    error = 2.0**-9 * scales.max() + (0.0071 + 2.0**-15) * layer.weight.nested_absmax.max()
    assert ((weight - sample.w.float()).abs() <= error + 2.0**-8 * sample.w.float().abs()).all()


def test_saved_after_inference_plain_is_refused():
    """Without nested statistics upstream saves its repacked scales, bfloat16 and transposed: no layer can use them."""
    sample = Sample("used4bit-plain")
    assert sample.statistics["weight.absmax"].dtype == torch.bfloat16
    layer = Linear4bit(**sample.options, device="meta")
    with pytest.raises(RuntimeError, match=r"absmax\.dtype is torch\.bfloat16, expected torch\.float32"):
        layer.load_state_dict(sample.state, assign=True)


@pytest.mark.parametrize("name", ["parametrized-nested", "parametrized-plain"])
@pytest.mark.parametrize("route", ["state dict", "prequantized"])
def test_parametrized(name, route):
    sample = Sample(name)
    module = nn.Module()
    if route == "prequantized":
        module.experts = nn.Parameter(sample.state["experts"].clone(), requires_grad=False)
        statistics = {key: value for key, value in sample.state.items() if key != "experts"}
        replace_parameter_4bit_prequantized(module, "experts", statistics, device="cpu")
    else:
        module.experts = nn.Parameter(torch.zeros(sample.w.shape, dtype=sample.w.dtype))
        replace_parameter_4bit(module, "experts", **sample.options)
        module.load_state_dict(dict(sample.state), strict=True)
    check_same(module.state_dict(), sample.state)
    assert same_bytes(module.experts, sample.w)
    check_product(sample.x @ module.experts[1].t(), sample.y, sample.x, sample.w[1], None)


# -------------------------------------------------------------------------------------------------- Linear8bitLt


def new_8bit(sample, kind):
    device = "meta" if kind == "meta" else "cpu"
    layer = Linear8bitLt(**sample.options, has_fp16_weights=False, device=device).eval()
    if kind in ("quantised", "used"):
        layer.to("cpu")
    if kind == "used":
        layer(sample.x)
    return layer


@pytest.mark.parametrize("name", LAYERS_8BIT)
@pytest.mark.parametrize(
    "kind, assign", [("float", True), ("quantised", False), ("quantised", True), ("used", False), ("meta", True)]
)
def test_linear8bit_loads_strictly(name, kind, assign):
    sample = Sample(name)
    layer = new_8bit(sample, kind)
    result = layer.load_state_dict(dict(sample.state), strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert type(layer.weight) is Int8Params
    expected = loaded_state(sample, assign)
    for _ in range(2):
        check_same(layer.state_dict(), expected)
        weight = F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        assert same_bytes(weight, sample.w)
        check_int8_product(layer(sample.x), sample)


def check_int8_product(given, sample):
    """Both outputs are the quantised product within rounding; upstream's, of an input that was rounded to float16.

    Its output is rounded to float16 as well, and its 1 / 127^2 is wrong by 1.8e-5.
    """
    assert given.dtype == sample.y.dtype
    expected, error = int8_product(sample, sample.x)
    eps = torch.finfo(sample.x.dtype).eps
    assert ((given.double() - expected).abs() <= 2 * eps * error).all()
    expected, error = int8_product(sample, sample.x.half())
    assert ((sample.y.double() - expected).abs() <= (2 * eps + 2.0**-10 + 2e-5) * error).all()


def int8_product(sample, x):
    """The product of the quantised x in float64, and the sum of the magnitudes of its terms.

    Outliers, and all else in their columns, meet the dequantised weight unquantised. No input of the samples has a
    code within 1e-4 of a tie, which two ways to divide might round apart.
    """
    x, scales, threshold = x.double(), sample.state["SCB"].double(), sample.options["threshold"]
    outlier = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    columns = outlier.any(0)
    stat = torch.where(outlier, 0.0, x).abs().amax(1, keepdim=True)
    scaled = torch.where(columns, 0.0, x * 127 / stat)
    assert ((scaled % 1 - 0.5).abs() > 1e-4).all()
    whole = torch.where(columns, x, torch.round(scaled) * stat / 127)
    w = sample.state["weight"].double() * scales[:, None] / 127
    bias = sample.state["bias"].double() if "bias" in sample.state else torch.zeros(1, dtype=torch.float64)
    return whole @ w.t() + bias, whole.abs() @ w.abs().t() + bias.abs()


@pytest.mark.parametrize("name", LAYERS_8BIT)
def test_linear8bit_round_trip_by_file(name, tmp_path):
    sample = Sample(name)
    layer = new_8bit(sample, "meta")
    layer.load_state_dict(sample.state, assign=True)
    files = pytest.importorskip("safetensors.torch")
    files.save_file(layer.state_dict(), tmp_path / "again.safetensors")
    check_same(files.load_file(tmp_path / "again.safetensors"), sample.state)


def test_stable_embedding():
    sample = Sample("stable-embedding")
    layer = bnb.nn.StableEmbedding(**sample.options)
    layer.load_state_dict(sample.state, strict=True)
    check_same(layer.state_dict(), sample.state)
    torch.testing.assert_close(layer(sample.x), sample.y, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------- states, pickles


@pytest.mark.parametrize("form", ["packed", "unpacked"])
@pytest.mark.parametrize("nested", [False, True])
def test_4bit_states_as_dicts(form, nested):
    entry = read("states")[f"4bit-{nested}"]
    state = QuantState.from_dict(entry[form], device="cpu")
    check_same(state.as_dict(packed=True), entry["packed"])
    check_values(state.as_dict(), entry["unpacked"])
    check_weight(F.dequantize_4bit(entry["codes"], state), entry["w"])


def check_values(given, expected):
    assert list(given) == list(expected)
    for key, value in expected.items():
        assert same_bytes(given[key], value) if isinstance(value, torch.Tensor) else given[key] == value, key


@pytest.mark.parametrize("name", ["False-f16", "False-f32", "True-bf16"])
def test_8bit_states_as_dicts(name):
    entry = read("states")[f"8bit-{name}"]
    state = QuantState.from_dict(entry["unpacked"], device="cpu")
    check_values(state.as_dict(packed=True), entry["unpacked"])
    assert same_bytes(F.dequantize_blockwise(entry["codes"], state), entry["w"])


def unpickled(name):
    """A file with upstream's objects in it: classes are found by name, and are ours."""
    return torch.load(FOLDER / f"{name}.pt", weights_only=False)


def test_a_pickled_state():
    entry = unpickled("state-object")
    assert type(entry["state"]) is QuantState
    check_weight(F.dequantize_4bit(entry["codes"], entry["state"]), entry["w"])
    assert QuantState.from_dict(entry["state"].as_dict(packed=True), device="cpu") == entry["state"]


def test_a_pickled_linear4bit():
    entry = unpickled("module-4bit")
    layer = entry["layer"]
    assert type(layer) is Linear4bit
    assert same_bytes(layer.weight.data, entry["codes"])
    check_weight(F.dequantize_4bit(layer.weight.data, layer.quant_state), entry["w"])
    for _ in range(2):
        check_product(layer(entry["x"]), entry["y"], entry["x"], entry["w"], layer.bias)
        state = layer.state_dict()
        fresh = Linear4bit(64, 8, quant_type="nf4", device="meta")
        fresh.load_state_dict(state, assign=True)
        check_same(fresh.state_dict(), state)
        layer.to("cpu")


def test_a_pickled_parameter():
    """Upstream's pickles lose the class of the parameter; what it knows stays with it, enough to make it anew."""
    entry = unpickled("parameter-4bit")
    weight = Params4bit(entry["weight"].data, **entry["weight"].__dict__)
    assert same_bytes(weight.data, entry["codes"])
    check_weight(F.dequantize_4bit(weight.data, weight.quant_state), entry["w"])


def test_a_pickled_linear8bit():
    entry = unpickled("module-8bit")
    layer = entry["layer"]
    assert type(layer) is Linear8bitLt
    for _ in range(2):
        assert torch.allclose(layer(entry["x"]), entry["y"], rtol=0.005, atol=0.005)
        state = layer.state_dict()
        assert same_bytes(state["weight"], entry["codes"])
        assert same_bytes(F.int8_vectorwise_dequant(state["weight"], state["SCB"]), entry["w"])
        layer.to("cpu")


# -------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_load_and_continue(name):
    """States equal byte for byte after loading; the next step moves the parameters as upstream's did."""
    entry = read(name)
    params = [nn.Parameter(p.clone()) for p in entry["params"]]
    optimizer = getattr(bnb.optim, entry["class"])(params, lr=0.5, **entry["options"], **entry["extra"])
    optimizer.load_state_dict(entry["state_dict"])
    saved, again = entry["state_dict"], optimizer.state_dict()
    assert sorted(again["state"]) == sorted(saved["state"]) == [0, 1]
    for i in (0, 1):
        check_entries(again["state"][i], saved["state"][i])
    for group, expected in zip(again["param_groups"], saved["param_groups"], strict=True):
        assert {key: group[key] for key in expected} == expected
    for p, grad in zip(params, entry["grads"], strict=True):
        p.grad = grad
    optimizer.step()
    for p, old, expected in zip(params, entry["params"], entry["next_params"], strict=True):
        moved = (expected.float() - old.float()).abs().max()
        eps = torch.finfo(p.dtype).eps
        assert ((p.detach().float() - expected.float()).abs() <= eps * expected.float().abs() + 1e-5 * moved).all()


def check_entries(given, expected):
    assert sorted(given) == sorted(expected)
    for key, value in expected.items():
        if isinstance(value, dict):
            check_entries(given[key], value)
        elif isinstance(value, torch.Tensor):
            assert given[key].dtype == value.dtype
            assert same_bytes(given[key], value), key
        else:
            assert given[key] == value, key
