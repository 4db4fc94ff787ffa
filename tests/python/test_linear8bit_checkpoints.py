"""Checkpoints of Linear8bitLt, quantised and float, into layers of every kind; and bad ones."""

import pytest
import torch
from torch import nn

from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn import Int8Params, Linear8bitLt
from bitsandbytes.nn.modules import maybe_rearrange_weight
from layer_samples import check_same_state, inputs, make_8bit, with_, without


def test_keys():
    layer = make_8bit()
    for _ in range(2):
        state = layer.state_dict()
        assert list(state) == ["weight", "bias", "SCB", "weight_format"]
        assert (state["weight_format"].dtype, state["weight_format"].shape) == (torch.uint8, ())
        assert state["weight_format"] == 0
        layer(inputs(1, 96))
    assert list(Linear8bitLt(4, 4, has_fp16_weights=False).state_dict()) == ["weight", "bias"]


def new_8bit(kind):
    device = "meta" if kind == "meta" else "cpu"
    layer = Linear8bitLt(96, 40, has_fp16_weights=False, bias=False, device=device)
    if kind in ("quantised", "used"):
        layer.to("cpu")
    if kind == "used":
        layer(inputs(2, 96))
    if kind == "meta":
        layer.weight.data = layer.weight.data.to(torch.int8)
    return layer


@pytest.mark.parametrize("weight_format", [None, "row", 0, torch.tensor(0, dtype=torch.uint8)])
@pytest.mark.parametrize("kind", ["quantised", "used", "meta"])
def test_an_int8_checkpoint_of_any_age(kind, weight_format):
    check_int8_checkpoint(kind, False, weight_format)


@pytest.mark.parametrize("kind", ["float", "quantised", "used", "meta"])
def test_an_int8_checkpoint_is_assigned_to_every_layer(kind):
    check_int8_checkpoint(kind, True, 0)


def check_int8_checkpoint(kind, assign, weight_format):
    source = make_8bit(seed=1, bias=False)
    target = new_8bit(kind)
    weight = target.weight
    model = nn.ModuleDict({"a": nn.Sequential(target), "b": nn.Linear(2, 2)})
    state = {f"a.0.{key}": value for key, value in source.state_dict().items()}
    del state["a.0.weight_format"]
    if weight_format is not None:
        state["a.0.weight_format"] = weight_format
    state.update({"b.weight": torch.ones(2, 2), "b.bias": torch.ones(2)})
    result = model.load_state_dict(state, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert type(target.weight) is Int8Params
    assert (target.weight is weight) == (kind != "meta" and not assign)
    assert (target.weight.data_ptr() == state["a.0.weight"].data_ptr()) == assign
    assert target.weight.CB.data_ptr() == target.weight.data_ptr()
    for _ in range(2):
        check_same_state(target, source)
        assert torch.equal(target(inputs(3, 96)), source(inputs(3, 96)))
        model.to("cpu")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["float", "quantised", "used"])
def test_a_float_checkpoint(kind, assign):
    """A float weight is requantised by a quantised layer, never cast to int8."""
    torch.manual_seed(2)
    source = nn.Linear(96, 40, bias=False)
    target = new_8bit(kind)
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert type(target.weight) is Int8Params
    if kind == "float":
        assert torch.equal(target.weight.data, source.weight.data)
        target.to("cpu")
    codes, scales, _ = int8_vectorwise_quant(source.weight.data.half())
    assert torch.equal(target.weight.data, codes)
    assert torch.equal(target.weight.SCB, scales)
    twin = new_8bit("float")
    twin.weight = Int8Params(codes, requires_grad=False, SCB=scales)
    assert torch.equal(target(inputs(3, 96)), twin(inputs(3, 96)))
    assert source.weight.dtype == torch.float32


def test_master_weights_load_as_they_are():
    source, target = nn.Linear(96, 40), Linear8bitLt(96, 40).to("cpu")
    target(inputs(2, 96))
    for assign in (False, True):
        target.load_state_dict(source.state_dict(), assign=assign)
        assert type(target.weight) is Int8Params
        assert target.weight.requires_grad
        assert torch.equal(target.weight.data, source.weight.data)
        assert (target(inputs(2, 96)) - source(inputs(2, 96))).abs().max() < 0.03
        source = nn.Linear(96, 40)


def test_an_int8_checkpoint_into_a_float_layer():
    for layer in (Linear8bitLt(96, 40, has_fp16_weights=False), Linear8bitLt(96, 40)):
        before = layer.weight.data.clone()
        with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
            layer.load_state_dict(make_8bit().state_dict())
        assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize(
    "spoil, text",
    [
        (without("weight"), "Missing key.*weight"),
        (without("bias"), "Missing key.*bias"),
        (without("SCB"), "int8 and SCB is missing"),
        (with_("SCB", torch.ones(39)), "size mismatch"),
        (with_("weight", torch.zeros(40, 95, dtype=torch.int8)), "size mismatch"),
        (with_("weight", torch.zeros(40, 96)), "float32, expected torch.int8"),
        (with_("other", torch.zeros(1)), "Unexpected key.*other"),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_bad_checkpoints(spoil, text, used):
    layer = make_8bit()
    if used:
        layer(inputs(2, 96))
    before = layer.weight.data.clone()
    state = make_8bit(seed=1).state_dict()
    spoil(state)
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state)
    if "weight" in text or "SCB" in text or "int8" in text:
        assert torch.equal(layer.weight.data, before)


@pytest.mark.parametrize("value", [1, 2, 3, 17, -1, "col_turing", "col_ampere", "", torch.tensor(3)])
def test_unknown_weight_format(value):
    state = {**make_8bit().state_dict(), "weight_format": value}
    with pytest.raises(ValueError, match="weight_format"):
        make_8bit().load_state_dict(state)
    with pytest.raises(ValueError, match="weight_format"):
        maybe_rearrange_weight(state, "", {}, True, [], [], [])


def test_the_hook_drops_the_format():
    state = {"a.weight": torch.zeros(1), "a.weight_format": "row", "weight_format": 3}
    maybe_rearrange_weight(state, "a.", {}, True, [], [], [])
    assert list(state) == ["a.weight", "weight_format"]
