"""Checkpoints of Linear4bit, quantised and float, into layers of every kind; and bad ones."""

import copy

import pytest
import torch
from torch import nn

from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from layer_samples import check_linked, check_same_state, make_4bit, same_bytes, with_, without


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_keys(nested, quant_type):
    layer = make_4bit(quant_type=quant_type, compress_statistics=nested)
    nests = ["weight.nested_absmax", "weight.nested_quant_map"] if nested else []
    expected = ["weight", "bias", "weight.absmax", "weight.quant_map", *nests]
    expected.append(f"weight.quant_state.bitsandbytes__{quant_type}")
    for _ in range(2):
        assert list(layer.state_dict()) == expected
        assert not any(value.requires_grad for value in layer.state_dict().values())
        layer(torch.zeros(1, 96))
    assert list(Linear4bit(64, 8).state_dict()) == ["weight", "bias"]
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight


def new_4bit(kind, **options):
    device = "meta" if kind == "meta" else "cpu"
    layer = Linear4bit(96, 40, **options, device=device)
    if kind in ("quantised", "used"):
        layer.to("cpu")
    if kind == "used":
        layer(torch.randn(2, 96))
    if kind == "plain":
        layer.to("cpu")
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    return layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["float", "quantised", "used", "meta", "plain"])
@pytest.mark.parametrize("saved", [{"quant_type": "nf4"}, {"quant_type": "fp4", "compress_statistics": False}])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_quantised_checkpoint_loads_into_every_layer(assign, kind, saved, storage):
    source = make_4bit(seed=1, quant_storage=storage, bias=False, **saved)
    target = new_4bit(kind, quant_type="nf4", bias=False)
    weight = target.weight
    model = nn.ModuleDict({"a": nn.Sequential(target), "b": nn.Linear(2, 2)})
    state = {f"a.0.{key}": value for key, value in source.state_dict().items()}
    state.update({"b.weight": torch.ones(2, 2), "b.bias": torch.ones(2)})
    given = {key: value.clone() for key, value in state.items()}
    result = model.load_state_dict(state, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    check_same_state(target, source)
    check_linked(target)
    stays = kind in ("float", "quantised", "used") and not assign
    assert (target.weight is weight) == stays
    x = torch.randn(3, 96)
    assert torch.equal(target(x), source(x))
    assert (target.weight.data_ptr() == state["a.0.weight"].data_ptr()) == assign
    assert all(same_bytes(state[key], given[key]) for key in state)
    assert (target.weight.blocksize, target.weight.quant_storage) == (64, storage)
    model.to("cpu")
    check_same_state(target, source)


@pytest.mark.parametrize(
    "kind, assign",
    [(kind, assign) for kind in ("float", "quantised", "used") for assign in (False, True)] + [("meta", True)],
)
def test_a_float_checkpoint(kind, assign):
    torch.manual_seed(2)
    source = nn.Linear(96, 40)
    target = new_4bit(kind, quant_type="nf4", compress_statistics=False)
    target.load_state_dict(source.state_dict(), strict=True, assign=assign)
    assert type(target.weight) is Params4bit
    if kind in ("float", "meta"):
        assert torch.equal(target.weight.data, source.weight.data)
        assert not target.weight.bnb_quantized
        target.to("cpu")
    packed, state = quantize_4bit(source.weight.data, quant_type="nf4")
    assert torch.equal(target.weight.data, packed)
    assert target.quant_state == state
    check_linked(target)
    assert torch.equal(target.bias.data, source.bias.data)
    assert source.weight.dtype == torch.float32


def test_load_hooks_of_clients_get_the_float_weight():
    class Client(Linear4bit):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._register_load_state_dict_pre_hook(self.take)

        def take(self, state_dict, prefix, *rest):
            self.taken = state_dict.pop(prefix + "weight")

    layer = Client(96, 40, quant_type="nf4", device="cpu").to("cpu")
    result = layer.load_state_dict(nn.Linear(96, 40).state_dict(), strict=False)
    assert result.missing_keys == ["weight"]
    assert layer.taken.shape == (40, 96)


@pytest.mark.parametrize(
    "spoil, text",
    [
        (without("weight"), "Missing key.*weight"),
        (without("bias"), "Missing key.*bias"),
        (without("weight.absmax"), "absmax"),
        (without("weight.quant_map"), "quant_map"),
        (without("weight.quant_state.bitsandbytes__nf4"), "quant_state|packed metadata"),
        (without("weight.nested_absmax"), "absmax.dtype is torch.uint8"),
        (with_("weight.other", torch.zeros(1)), "weight.other"),
        (with_("other", torch.zeros(1)), "Unexpected key.*other"),
        (with_("weight", torch.zeros(7, 1, dtype=torch.uint8)), "7 bytes, expected 1920"),
        (with_("weight.absmax", torch.zeros(3, dtype=torch.uint8)), "absmax"),
        (with_("bias", torch.zeros(3)), "size mismatch"),
    ],
)
@pytest.mark.parametrize("kind", ["float", "quantised", "meta"])
def test_bad_checkpoints(spoil, text, kind):
    state = make_4bit(seed=1).state_dict()
    spoil(state)
    target = new_4bit(kind, quant_type="nf4")
    with pytest.raises(RuntimeError, match=text):
        target.load_state_dict(state, assign=kind == "meta")


def test_checkpoint_of_another_shape_or_without_statistics():
    with pytest.raises(RuntimeError, match=r"size mismatch: the checkpoint has \(96, 40\), expected \(40, 96\)"):
        make_4bit().load_state_dict(make_4bit(40, 96).state_dict(), strict=False)
    layer = make_4bit(bias=False)
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="no statistics"):
        layer.load_state_dict({"weight": make_4bit(seed=3).weight.data}, strict=False)
    check_same_state(layer, before)
