"""nn.parametrize: state dicts of 4-bit parameters, strict symmetric loading, copies, pickles, casts and moves."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from layer_samples import check_same_state, inputs, same_bytes
from parametrize_samples import OPTIONS, Experts, make

# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("options", OPTIONS)
def test_keys_and_values_of_the_state_dict(options):
    module = nn.ModuleDict({"layer": make(**options)})
    state = module.state_dict()
    holder = module["layer"].parametrizations.w
    want = {"layer.w": holder.original}
    want |= {f"layer.w.{k}": v for k, v in holder[0].quant_state.as_dict(packed=True).items()}
    assert {key for key in state if key.startswith("layer.w")} == set(want)
    assert all(same_bytes(state[key], value) for key, value in want.items())
    assert not any("parametrizations" in key for key in state)
    assert module.state_dict(keep_vars=True)["layer.w"] is holder.original


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("start", ["quantised", "after-forward", "meta"])
def test_strict_symmetric_loading(start, assign, options):
    source = nn.Sequential(nn.Identity(), make(seed=1, **options))
    x = inputs(5, 16)
    want = source(x)
    if start == "meta":
        with torch.device("meta"):
            target = nn.Sequential(nn.Identity(), make(**options))
        assert target[1].w.is_meta
        if not assign:
            target[1].bias = nn.Parameter(torch.empty(8))
    else:
        target = nn.Sequential(nn.Identity(), make(seed=0, **options))
    if start == "after-forward":
        target(x)
    state = source.state_dict()
    given = dict(state)
    parameter = target[1].parametrizations.w.original
    result = target.load_state_dict(state, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert list(state) == list(given)
    check_same_state(target, source)
    assert torch.equal(target(x), want)
    if not assign:
        assert start == "meta" or target[1].parametrizations.w.original is parameter
        for tensor in state.values():
            tensor.zero_()
        assert torch.equal(target(x), want)


def test_loading_other_options_and_storage():
    source = make(seed=1, quant_type="fp4", blocksize=32, compress_statistics=True)
    target = make()
    target.load_state_dict(source.state_dict())
    check_same_state(target, source)
    codes, state = quantize_4bit(source.w.detach(), quant_type="nf4", quant_storage=torch.bfloat16)
    checkpoint_ = {f"w.{key}": value for key, value in state.as_dict(packed=True).items()}
    target.load_state_dict({"w": codes, **checkpoint_}, strict=False)
    assert target.parametrizations.w.original.dtype == torch.uint8
    assert torch.equal(target.w, dequantize_4bit(codes, state))
    target.load_state_dict({"w": codes, **checkpoint_}, strict=False, assign=True)
    assert target.parametrizations.w.original.dtype == torch.bfloat16
    assert torch.equal(target.w, dequantize_4bit(codes, state))


def test_loading_a_float_checkpoint_quantises_it():
    target, plain = make(blocksize=128, compress_statistics=True), Experts(seed=5)
    target.load_state_dict(plain.state_dict())
    check_same_state(target, make(seed=5, blocksize=128, compress_statistics=True))


def test_bad_checkpoints():
    module = make()
    good = module.state_dict()
    before = copy.deepcopy(good)
    other = nn.Module()
    other.w = nn.Parameter(torch.randn(2, 24, 16))
    replace_parameter_4bit(other, "w")
    cases = [
        ({k: v for k, v in good.items() if k != "w"}, "'w': the checkpoint has the statistics, but not the codes"),
        ({k: v for k, v in good.items() if not k.startswith("w.")}, "'w': torch.uint8 .* without statistics"),
        ({k: v for k, v in good.items() if k != "w.absmax"}, "'w': .*'absmax' is missing"),
        ({**good, "w": good["w"][:-1]}, "'w': the checkpoint has 767 bytes"),
        ({**good, **other.state_dict()}, "'w': size mismatch: .*\\(2, 24, 16\\), expected \\(4, 24, 16\\)"),
        ({**good, "w.more": torch.zeros(1)}, "'w': .*unknown key 'w.more'"),
        ({k: v for k, v in good.items() if not k.startswith("w")}, 'Missing key.*"w"'),
    ]
    for state, message in cases:
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(state)
        for key, value in module.state_dict().items():
            assert same_bytes(value, before[key]), (message, key)
    missing = module.load_state_dict(cases[-1][0], strict=False).missing_keys
    assert missing == ["w"]


# ---------------------------------------------------------------- copies, pickles, moves


@pytest.mark.parametrize("options", OPTIONS)
def test_deepcopy(options):
    module = nn.Sequential(make(**options))
    twin = copy.deepcopy(module)
    x = inputs(5, 16)
    want = module(x)
    check_same_state(twin, module)
    assert twin[0].parametrizations.w[0].quant_state is not module[0].parametrizations.w[0].quant_state
    twin.load_state_dict(nn.Sequential(make(seed=9, **options)).state_dict())
    with parametrize.cached():  # in which torch's own copies would read each other's values
        one, two = module(x), twin(x)
    assert torch.equal(one, want)
    assert not torch.equal(two, want)
    parametrize.remove_parametrizations(twin[0], "w", leave_parametrized=False)
    assert torch.equal(module(x), want)


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickle(protocol):
    module = nn.Sequential(make(compress_statistics=True))
    twin = pickle.loads(pickle.dumps(module, protocol))
    x = inputs(5, 16)
    assert isinstance(twin[0], Experts)
    check_same_state(twin, module)
    assert torch.equal(twin(x), module(x))
    twin.load_state_dict(nn.Sequential(make(seed=9)).state_dict())
    assert not torch.equal(twin(x), module(x))


def test_torch_save_of_module_and_state_dict():
    module = make()
    for value, options in ((module, {"weights_only": False}), (module.state_dict(), {"weights_only": True})):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        loaded = torch.load(file, **options)
        if isinstance(loaded, dict):
            twin = make(seed=3)
            twin.load_state_dict(loaded)
            loaded = twin
        check_same_state(loaded, module)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_casts_leave_the_codes_alone(storage):
    weight = torch.randn(3, 16, 24)
    codes, state = quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    module = nn.Module()
    module.weight = nn.Parameter(codes, requires_grad=False)
    replace_parameter_4bit_prequantized(module, "weight", state.as_dict(packed=True), "cpu")
    parent = nn.ModuleList([module, nn.Linear(2, 2)])
    want = module.weight.clone()
    for cast in (parent.half, parent.bfloat16, parent.float, lambda: parent.to(torch.float16)):
        cast()
        assert module.parametrizations.weight.original.dtype == storage
        assert torch.equal(module.weight, want)
    assert parent[1].weight.dtype == torch.float16


def test_moves_to_meta_and_back():
    module = make()
    state = copy.deepcopy(module.state_dict())
    module.to("meta")
    assert module.w.is_meta
    assert module.parametrizations.w.original.is_meta
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    check_same_state(module, make())


def test_a_skeleton_on_meta_is_filled():
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    state = make().state_dict()
    module.load_state_dict(state)
    check_same_state(module, make())


def test_remove_parametrizations_leaves_the_codes():
    module = make()
    codes = module.parametrizations.w.original
    parametrize.remove_parametrizations(module, "w", leave_parametrized=False)
    assert module.w is codes
    assert "w.absmax" not in module.state_dict()
    module.load_state_dict(module.state_dict())


def test_another_parametrisation_on_top():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = make()
    want = 2 * module.w
    parametrize.register_parametrization(module, "w", Twice())
    assert torch.equal(module.w, want)
    twin = copy.deepcopy(module)
    check_same_state(twin, module)
    assert torch.equal(twin.w, want)
    assert isinstance(module.parametrizations.w[0].quant_state, QuantState)
