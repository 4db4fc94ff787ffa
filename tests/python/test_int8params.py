"""Int8Params: quantising when a float weight leaves the CPU, never again; __dict__ round trips, copies, pickles."""

import copy
import inspect
import io
import pickle

import pytest
import torch

import bitsandbytes as bnb
from bitsandbytes.nn import Int8Params

NAMES = {"has_fp16_weights", "CB", "SCB"}


def make(seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    return Int8Params(torch.randn(12, 40, dtype=dtype), **{"requires_grad": False, **options})


def definition(weight):
    """Codes and scales as LLM.int8() defines them, in double precision; the weight is taken as float16."""
    weight = weight.half().double()
    scales = weight.abs().amax(1)
    return torch.round(weight * 127 / scales[:, None]).to(torch.int8), scales.float()


def check_same(a, b):
    assert type(a) is type(b) is Int8Params
    assert (a.dtype, a.requires_grad, a.has_fp16_weights) == (b.dtype, b.requires_grad, b.has_fp16_weights)
    assert torch.equal(a.data, b.data)
    assert set(a.__dict__) == set(b.__dict__)
    for name in ("CB", "SCB"):
        one, two = getattr(a, name), getattr(b, name)
        assert (one is None) == (two is None)
        assert one is None or torch.equal(one, two)


def check_quantised(parameter, weight):
    codes, scales = definition(weight)
    assert parameter.dtype == torch.int8
    assert torch.equal(parameter.data, codes)
    assert torch.equal(parameter.CB, codes)
    assert parameter.CB.data_ptr() == parameter.data_ptr()
    assert parameter.SCB.dtype == torch.float32
    assert torch.equal(parameter.SCB, scales)


def test_signature_and_defaults():
    parameters = inspect.signature(Int8Params.__new__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {"data": None, "requires_grad": True, "has_fp16_weights": False, "CB": None, "SCB": None}
    assert Int8Params.__name__ == "Int8Params"
    assert bnb.nn.modules.Int8Params is Int8Params
    assert set(Int8Params().__dict__) == NAMES
    assert set(make(_is_hf_initialized=True, anything=3).__dict__) == NAMES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "move",
    [lambda p: p.to("cpu"), lambda p: p.cpu(), lambda p: p.to("cpu", torch.float32), lambda p: p.to(device="cpu")],
)
def test_the_first_move_quantises_in_place(dtype, move):
    parameter = make(dtype=dtype)
    weight = parameter.data.clone()
    assert move(parameter) is parameter
    check_quantised(parameter, weight)


def test_float_weights_that_are_not_to_be_quantised():
    for moved in (make().to("meta"), make().to(torch.float16), make(has_fp16_weights=True).to("cpu")):
        assert type(moved) is Int8Params
        assert moved.is_floating_point()
        assert moved.CB is moved.SCB is None
    assert make().to(torch.float16).dtype == torch.float16
    assert make(has_fp16_weights=True, requires_grad=True).to("cpu").requires_grad


def test_not_contiguous_zero_rows_and_requiring_a_gradient():
    weight = torch.randn(40, 12).t()
    parameter = Int8Params(weight, requires_grad=True).to("cpu")
    check_quantised(parameter, weight)
    assert not parameter.requires_grad
    zero = Int8Params(torch.zeros(3, 8), requires_grad=False).to("cpu")
    assert (zero.data == 0).all()
    assert (zero.SCB == 0).all()


@pytest.mark.parametrize(
    "move",
    [
        lambda p: p.to("cpu"),
        lambda p: p.cpu().to("cpu"),
        lambda p: p.to(torch.float16),
        lambda p: p.to("cpu", torch.float32),
        lambda p: p.type(torch.float16),
    ],
)
def test_int8_is_never_quantised_again_nor_converted(move):
    parameter = make().to("cpu")
    again = move(parameter)
    check_same(again, parameter)
    assert again.CB.data_ptr() == again.data_ptr()


def test_int8_data_with_scales_is_quantised_whoever_made_it():
    codes, scales = definition(make().data)
    parameter = Int8Params(codes, requires_grad=False, SCB=scales).to("cpu")
    assert torch.equal(parameter.data, codes)
    assert torch.equal(parameter.CB, codes)
    assert torch.equal(parameter.SCB, scales)
    assert not Int8Params(codes).requires_grad


def test_meta_and_back():
    parameter = make().to("cpu")
    moved = parameter.to("meta")
    assert moved.is_meta
    assert moved.CB.is_meta
    assert torch.equal(moved.SCB, parameter.SCB)
    back = Int8Params(parameter.data, requires_grad=False, **moved.__dict__).to("cpu")
    check_same(back, parameter)
    meta = Int8Params(torch.empty(2, 2, device="meta", dtype=torch.int8), SCB=torch.empty(2, device="meta"))
    fresh = Int8Params(torch.ones(2, 2, dtype=torch.int8), requires_grad=False, **meta.__dict__).to("cpu")
    assert fresh.SCB is None


@pytest.mark.parametrize("quantised", [False, True])
def test_dict_round_trip_with_foreign_and_edited_keys(quantised):
    parameter = make()
    parameter = parameter.to("cpu") if quantised else parameter
    parameter._is_hf_initialized = True
    again = Int8Params(parameter.data, requires_grad=False, **parameter.__dict__)
    assert set(again.__dict__) == NAMES
    assert all(getattr(again, name) is getattr(parameter, name) for name in NAMES)
    options = parameter.__dict__
    options.pop("SCB")
    weight = torch.randn(12, 40)
    check_quantised(Int8Params(weight.clone(), requires_grad=False, **options).to("cpu"), weight)
    options["SCB"] = torch.ones(12)
    assert parameter.SCB is options["SCB"]


@pytest.mark.parametrize("quantised", [False, True])
def test_copies(quantised):
    parameter = make()
    parameter = parameter.to("cpu") if quantised else parameter
    parameter.tag = [1]
    shallow, deep = copy.copy(parameter), copy.deepcopy(parameter)
    check_same(shallow, parameter)
    check_same(deep, parameter)
    assert shallow.data_ptr() == parameter.data_ptr()
    assert shallow.SCB is parameter.SCB
    assert deep.data_ptr() != parameter.data_ptr()
    assert deep.tag is not parameter.tag
    if quantised:
        assert deep.CB.data_ptr() == deep.data_ptr()
        assert deep.SCB.data_ptr() != parameter.SCB.data_ptr()


def test_copies_with_codes_of_their_own():
    parameter = make().to("cpu")
    parameter.CB = parameter.CB.clone()
    for other in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        check_same(other, parameter)
        assert other.CB.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("quantised", [False, True])
def test_pickle_and_save_keep_the_class(quantised):
    parameter = make()
    parameter = parameter.to("cpu") if quantised else parameter
    parameter._is_hf_initialized = True
    buffer = io.BytesIO()
    torch.save(parameter, buffer)
    buffer.seek(0)
    for other in (pickle.loads(pickle.dumps(parameter)), torch.load(buffer, weights_only=False)):
        check_same(other, parameter)
        if quantised:
            assert other.CB.data_ptr() == other.data_ptr()
