"""Params4bit: quantising on the first move and never again, __dict__ round trips, copies, pickles, pieces."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

NAMES = {
    "blocksize",
    "compress_statistics",
    "quant_type",
    "quant_state",
    "quant_storage",
    "bnb_quantized",
    "module",
}
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


def make(shape=(16, 64), seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return Params4bit(torch.randn(shape, dtype=dtype), **{"quant_type": "nf4", **options})


def raw(parameter):
    """The bytes of a parameter, whatever its dtype."""
    return bytes(parameter.data.contiguous().view(torch.uint8).flatten().tolist())


def check_same(a, b):
    assert type(a) is type(b) is Params4bit
    assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad)
    assert raw(a) == raw(b)
    assert a.quant_state == b.quant_state
    assert {k: v for k, v in a.__dict__.items() if k not in ("quant_state", "module")} == {
        k: v for k, v in b.__dict__.items() if k not in ("quant_state", "module")
    }


# ---------------------------------------------------------------- construction


def test_signature_and_defaults():
    parameters = inspect.signature(Params4bit.__new__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {
        "data": None,
        "requires_grad": False,
        "quant_state": None,
        "blocksize": None,
        "compress_statistics": True,
        "quant_type": "fp4",
        "quant_storage": torch.uint8,
        "module": None,
        "bnb_quantized": False,
    }
    assert Params4bit.__name__ == "Params4bit"
    assert bnb.nn.modules.Params4bit is Params4bit
    assert "class Params4bit" in inspect.getsource(Params4bit)


def test_attributes_are_the_constructors_arguments():
    parameter = Params4bit()
    assert isinstance(parameter, nn.Parameter)
    assert parameter.shape == (0,)
    assert set(parameter.__dict__) == NAMES
    assert (parameter.blocksize, parameter.quant_type, parameter.quant_state) == (64, "fp4", None)
    assert set(make().to("cpu").__dict__) == NAMES
    assert set(make(device_map="auto", _is_hf_initialized=True).__dict__) == NAMES


def test_attributes_are_readable_on_meta():
    parameter = Params4bit(torch.empty(4, 4, device="meta"), blocksize=128, quant_type="nf4")
    assert (parameter.blocksize, parameter.quant_type, parameter.bnb_quantized) == (128, "nf4", False)


@pytest.mark.parametrize("quantised", [False, True])
def test_dict_round_trip_with_foreign_private_and_edited_keys(quantised):
    parameter = make(compress_statistics=True)
    parameter = parameter.to("cpu") if quantised else parameter
    parameter._is_hf_initialized = True
    parameter.__dict__["foreign"] = object()
    again = Params4bit(parameter.data, requires_grad=False, **parameter.__dict__)
    assert set(again.__dict__) == NAMES
    assert all(getattr(again, name) is getattr(parameter, name) for name in NAMES)
    assert again.to("cpu").bnb_quantized
    # A client that adds what the constructor names itself
    parameter.__dict__["requires_grad"] = False
    assert set(Params4bit(parameter.data, **parameter.__dict__).__dict__) == NAMES


# ---------------------------------------------------------------- quantising


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to("cpu"),
        lambda p: p.cpu(),
        lambda p: p.to(torch.device("cpu")),
        lambda p: p.to(device="cpu", dtype=torch.float16),
        lambda p: p.to(torch.zeros(1)),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_first_move_quantises_in_place(move, nested):
    parameter = make(compress_statistics=nested, blocksize=32)
    weight = parameter.data.clone()
    owner = nn.Module()
    parameter.module = owner
    assert move(parameter) is parameter
    packed, state = quantize_4bit(weight, blocksize=32, compress_statistics=nested, quant_type="nf4")
    assert torch.equal(parameter.data, packed)
    assert parameter.shape == (512, 1)
    assert parameter.quant_state == state
    assert parameter.quant_state.dtype == torch.float32
    assert parameter.bnb_quantized
    assert owner.quant_state is parameter.quant_state


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_storage_and_dtype(storage, dtype):
    parameter = make((7, 33), dtype=dtype, quant_storage=storage).to("cpu")
    packed, state = quantize_4bit(make((7, 33), dtype=dtype).data, compress_statistics=True, quant_type="nf4")
    assert parameter.dtype == storage
    assert parameter.quant_state.dtype == dtype
    assert raw(parameter)[:116] == raw(packed)
    assert torch.equal(dequantize_4bit(parameter.data, parameter.quant_state), dequantize_4bit(packed, state))


def test_not_contiguous_and_requiring_a_gradient():
    weight = torch.randn(48, 32).t()
    parameter = Params4bit(weight, requires_grad=True, quant_type="nf4").to("cpu")
    assert raw(parameter) == raw(Params4bit(weight.contiguous(), quant_type="nf4").to("cpu"))
    assert not parameter.requires_grad


def test_meta_and_dtype_moves_do_not_quantise():
    parameter = make()
    for moved in (parameter.to("meta"), parameter.to(torch.float16), parameter.half(), parameter.double()):
        assert type(moved) is Params4bit
        assert moved is not parameter
        assert not moved.bnb_quantized
        assert moved.shape == (16, 64)
    assert parameter.to("meta").is_meta
    assert parameter.half().dtype == torch.float16
    assert not parameter.bnb_quantized
    with pytest.raises(NotImplementedError, match="meta"):
        parameter.to("meta").to("cpu")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "cast",
    [
        lambda p: p.to(torch.float16),
        lambda p: p.to("cpu", torch.float32),
        lambda p: p.to(dtype=torch.float64),
        lambda p: p.half(),
        lambda p: p.bfloat16(),
        lambda p: p.float(),
        lambda p: p.double(),
        lambda p: p.type(torch.float16),
        lambda p: p.cpu().to("cpu"),
    ],
)
def test_packed_bytes_survive_every_cast(storage, cast):
    parameter = make(quant_storage=storage).to("cpu")
    before, state = raw(parameter), parameter.quant_state
    after = cast(parameter)
    assert type(after) is Params4bit
    assert after.dtype == storage
    assert raw(after) == raw(parameter) == before
    assert after.quant_state is state
    assert after.bnb_quantized


def test_a_move_to_meta_leaves_the_statistics():
    parameter = make().to("cpu")
    moved = parameter.to("meta")
    assert moved.is_meta
    assert moved.module is None
    assert moved.quant_state is parameter.quant_state
    assert parameter.absmax.device.type == "cpu"
    back = Params4bit(parameter.data, requires_grad=False, **moved.__dict__).to("cpu")
    check_same(back, parameter)


def test_bnb_quantized_false_quantises_again():
    owner = nn.Module()
    parameter = make(module=owner).to("cpu")
    old = parameter.quant_state
    options = parameter.__dict__
    options["bnb_quantized"] = False
    options["requires_grad"] = False
    options["_private"] = 1
    weight = 3 * torch.randn(16, 64)
    again = Params4bit(weight, **options)
    assert again.quant_state is old
    assert again.to("cpu") is again
    assert again.quant_state is owner.quant_state is not old
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(again.data, packed)
    assert again.quant_state == state


def test_clients_may_write_everything():
    parameter = make((4, 64))
    packed, state = quantize_4bit(parameter.data, quant_type="nf4")
    parameter.data = packed
    parameter.quant_state = state
    parameter.bnb_quantized = True
    assert parameter.to("cpu").data_ptr() == packed.data_ptr()
    parameter.quant_state.nested = False
    assert not parameter.quant_state.nested


@pytest.mark.parametrize(
    "options, text",
    [
        ({"blocksize": 48}, "blocksize is 48"),
        ({"blocksize": 16}, "blocksize is 16"),
        ({"quant_type": "int4"}, "int4"),
        ({"quant_storage": torch.int32}, "quant_storage"),
        ({"dtype": torch.float64}, "dtype"),
    ],
)
def test_options_are_refused_when_they_are_used(options, text):
    parameter = make(**options)
    with pytest.raises(ValueError, match=text):
        parameter.to("cpu")
    assert not parameter.bnb_quantized
    assert parameter.shape == (16, 64)


# ---------------------------------------------------------------- statistics by name


def test_names_of_the_statistics():
    parameter = make().to("cpu")
    state = parameter.quant_state
    assert parameter.absmax is state.absmax
    assert parameter.code is parameter.quant_map is state.code
    assert parameter.offset is parameter.nested_offset is state.offset
    assert parameter.state2 is state.state2
    assert parameter.nested_absmax is state.state2.absmax
    assert parameter.nested_blocksize == 256
    assert parameter.nested_quant_map is state.state2.code
    assert parameter.nested_dtype == torch.float32
    for key in state.as_dict(packed=True):
        value = parameter
        for part in key.split("."):
            value = getattr(value, part)
        assert isinstance(value, torch.Tensor), key
    assert not hasattr(Params4bit, "__getattr__")


@pytest.mark.parametrize("name", ["absmax", "code", "quant_map", "offset", "state2", "nested_absmax", "nested_offset"])
def test_statistics_of_an_unquantised_parameter(name):
    with pytest.raises(AttributeError, match=name):
        getattr(make(), name)


def test_statistics_that_are_not_nested():
    parameter = make(compress_statistics=False).to("cpu")
    assert parameter.nested_offset is None
    for name in ("nested_absmax", "nested_blocksize", "nested_quant_map", "nested_dtype"):
        with pytest.raises(AttributeError, match=name):
            getattr(parameter, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        parameter.no_such_thing  # noqa: B018


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("quantised", [False, True])
def test_copies(quantised):
    parameter = make()
    parameter = parameter.to("cpu") if quantised else parameter
    parameter.tag = [1]
    shallow, deep = copy.copy(parameter), copy.deepcopy(parameter)
    check_same(shallow, parameter)
    check_same(deep, parameter)
    assert shallow.data_ptr() == parameter.data_ptr()
    assert shallow.quant_state is parameter.quant_state
    assert shallow.tag is parameter.tag
    assert deep.data_ptr() != parameter.data_ptr()
    assert deep.tag is not parameter.tag
    if quantised:
        assert deep.quant_state is not parameter.quant_state
        assert deep.absmax.data_ptr() != parameter.absmax.data_ptr()


def test_deepcopy_keeps_the_owner_or_takes_the_copied_one():
    layer = Linear4bit(64, 16, quant_type="nf4")
    assert copy.deepcopy(layer.weight).module is layer
    twin = copy.deepcopy(layer)
    assert twin.weight.module is twin
    twin.to("cpu")
    assert twin.quant_state is twin.weight.quant_state is not None
    assert layer.quant_state is None
    pair = nn.ModuleList([layer, nn.Linear(2, 2)])
    pair[1].extra = layer.weight
    twins = copy.deepcopy(pair)
    assert twins[1].extra is twins[0].weight


def test_getstate_and_setstate():
    parameter = make().to("cpu")
    before = dict(parameter.__dict__)
    state = parameter.__getstate__()
    assert parameter.__dict__ == before
    assert set(state) == NAMES | {"data", "requires_grad"}
    other = Params4bit()
    other.__setstate__(state)
    check_same(other, parameter)
    assert set(state) == NAMES | {"data", "requires_grad"}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_pickle_and_save_keep_the_class(nested, quantised):
    parameter = make(compress_statistics=nested)
    parameter = parameter.to("cpu") if quantised else parameter
    parameter._is_hf_initialized = True
    check_same(pickle.loads(pickle.dumps(parameter)), parameter)
    buffer = io.BytesIO()
    torch.save(parameter, buffer)
    buffer.seek(0)
    check_same(torch.load(buffer, weights_only=False), parameter)


# ---------------------------------------------------------------- torch functions


@pytest.mark.parametrize(
    "cut", [lambda p: torch.chunk(p, 3), lambda p: torch.split(p, 100), lambda p: torch.chunk(input=p, chunks=2, dim=0)]
)
def test_chunk_and_split_give_parameters(cut):
    parameter = make().to("cpu")
    parameter.tag = "kept"
    pieces = cut(parameter)
    assert isinstance(pieces, tuple)
    assert len(pieces) > 1
    for piece in pieces:
        assert type(piece) is Params4bit
        assert piece.__dict__ == parameter.__dict__
        assert piece.quant_state is parameter.quant_state
    joined = torch.cat([piece.data for piece in pieces]).reshape(-1, 1)
    assert torch.equal(joined, parameter.data)


@pytest.mark.parametrize("quantised", [False, True])
def test_other_functions_give_plain_tensors(quantised):
    parameter = make()
    parameter = parameter.to("cpu") if quantised else parameter
    plain = [parameter.data, parameter.detach(), parameter.t(), parameter.view(-1), parameter.clone(), parameter + 1]
    plain += [torch.cat([parameter, parameter]), parameter.chunk(2)[0], parameter.split(4)[0], torch.t(parameter)]
    assert {type(tensor) for tensor in plain} == {torch.Tensor}


# ---------------------------------------------------------------- from checkpoints


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "weight.", "model.layers.0.q_proj.weight."])
@pytest.mark.parametrize("packed_form", [False, True])
def test_from_prequantized(nested, prefix, packed_form):
    parameter = make(compress_statistics=nested, quant_storage=torch.bfloat16, blocksize=128).to("cpu")
    statistics = {prefix + key: value for key, value in parameter.quant_state.as_dict(packed=packed_form).items()}
    owner = nn.Module()
    again = Params4bit.from_prequantized(parameter.data, statistics, device="cpu", module=owner, unknown=1)
    check_same(again, parameter)
    assert owner.quant_state is again.quant_state
    assert again.module is owner
    assert again.to("cpu").data_ptr() == again.data_ptr()


def test_from_prequantized_refuses():
    parameter = make().to("cpu")
    statistics = parameter.quant_state.as_dict(packed=True)
    for wrong in (parameter.data[:-1], torch.cat([parameter.data, parameter.data]), parameter.data.view(-1).float()):
        with pytest.raises(ValueError, match="bytes"):
            Params4bit.from_prequantized(wrong, dict(statistics), device="cpu")
    del statistics["absmax"]
    with pytest.raises(KeyError, match="absmax"):
        Params4bit.from_prequantized(parameter.data, statistics, device="cpu")


def test_two_layers_may_share_a_parameter():
    first, second = Linear4bit(64, 16, bias=False, quant_type="nf4"), Linear4bit(64, 16, bias=False, quant_type="nf4")
    second.weight = first.weight
    model = nn.Sequential(nn.ModuleDict({"a": first, "b": second})).to("cpu")
    assert first.weight is second.weight
    assert first.weight.module is first
    x = torch.randn(3, 64)
    assert torch.equal(first(x), second(x))
    before = raw(first.weight)
    model.to("cpu")
    assert raw(first.weight) == before


def test_edited_state_is_obeyed():
    layer = Linear4bit(64, 16, bias=False, quant_type="nf4").to("cpu")
    x, state = torch.randn(3, 64), layer.weight.quant_state
    want = layer(x)
    state.absmax = torch.ops.bitsandbytes._dequantize_scales.default(
        state.absmax, state.state2.code, state.state2.absmax, state.offset, 256
    )
    state.nested, state.offset, state.state2 = False, None, None
    assert isinstance(state, QuantState)
    assert torch.equal(layer(x), want)
    state.absmax = 2 * state.absmax
    torch.testing.assert_close(layer(x), 2 * want)
