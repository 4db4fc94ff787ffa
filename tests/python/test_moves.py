"""One table of moves and loads for everything that is quantised: both linears, all embeddings, a parametrised module.

What is particular to one class is tested beside it; here the same sequence must end in the same bytes for all.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from bitsandbytes.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    Params4bit,
)
from layer_samples import check_same_state, inputs, same_bytes
from parametrize_samples import Experts
from parametrize_samples import make as make_experts

KINDS = {
    "nf4": lambda **at: Linear4bit(96, 40, quant_type="nf4", **at),
    "fp4-plain-bf16": lambda **at: Linear4bit(
        33, 7, quant_type="fp4", compress_statistics=False, quant_storage=torch.bfloat16, **at
    ),
    "int8": lambda **at: Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0, **at),
    "master": lambda **at: Linear8bitLt(96, 40, has_fp16_weights=True, **at),
    "embedding8": lambda **at: Embedding8bit(23, 65, **at),
    "embedding4": lambda **at: Embedding4bit(23, 64, **at),
    "embeddingfp4": lambda **at: EmbeddingFP4(23, 65, quant_storage=torch.float32, **at),
    "embeddingnf4": lambda **at: EmbeddingNF4(23, 128, quant_storage=torch.float16, **at),
}
LAYERS = list(KINDS)
EVERY = [*LAYERS, "parametrised"]


def made(kind, seed=0):
    """A quantised module."""
    if kind == "parametrised":
        return make_experts(seed, compress_statistics=True)
    torch.manual_seed(seed)
    return KINDS[kind]().to("cpu")


def run(module):
    """The output for a fixed input."""
    with torch.no_grad():
        if isinstance(module, nn.Embedding):
            return module(torch.arange(module.num_embeddings))
        return module(inputs(3, 16 if isinstance(module, Experts) else module.in_features))


def check_equal(module, twin):
    """Same bytes, same result, and casts and moves change neither."""
    check_same_state(module, twin)
    assert torch.equal(run(module), run(twin))
    nn.Sequential(module).to("cpu").to(torch.float32)
    check_same_state(module, twin)
    assert torch.equal(run(module), run(twin))


# ---------------------------------------------------------------- moves of a parent


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_to_meta_to_empty_and_loaded_again(kind, assign, used):
    """The road of an engine that frees a model and fills it later."""
    module, twin = made(kind), made(kind)
    if used:
        run(module)
    saved = {f"0.{key}": value.clone() for key, value in twin.state_dict().items()}
    parent = nn.Sequential(module)
    parent.to("meta")
    assert all(parameter.is_meta for parameter in parent.parameters())
    parent.to_empty(device="cpu")
    assert not any(parameter.is_meta for parameter in parent.parameters())
    if kind in LAYERS:
        assert type(module.weight) is type(twin.weight)
        assert module.weight.dtype == twin.weight.dtype
    result = parent.load_state_dict(saved, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    check_equal(module, twin)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_skeleton_is_filled_by_a_quantised_checkpoint(kind, empty):
    """assign=True fills every skeleton; without it one that to_empty() gave memory counts as a float layer."""
    twin = made(kind, seed=1)
    module = KINDS[kind](device="meta")
    saved = copy.deepcopy(twin.state_dict())
    if empty:
        module.to_empty(device="cpu")
    module.load_state_dict(saved, strict=True, assign=True)
    check_equal(module, twin)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_float_skeleton_is_filled_and_quantised(kind):
    torch.manual_seed(3)
    source = KINDS[kind]()
    saved = copy.deepcopy(source.state_dict())
    module = KINDS[kind](device="meta").to_empty(device="cpu")
    if kind == "embedding8":
        # An int8 table is quantised by leaving the CPU, of which to_empty() is no part.
        assert module.weight.is_floating_point()
    module.load_state_dict(saved, strict=True)
    check_equal(module.to("cpu"), source.to("cpu"))


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("kind", ["master", "fp4-plain-bf16", "parametrised"])
def test_copies_of_a_parent(kind, way, quantised):
    module = made(kind) if quantised or kind == "parametrised" else KINDS[kind]()
    parent = nn.Sequential(module)
    if way == "deepcopy":
        other = copy.deepcopy(parent)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(parent))
    else:
        buffer = io.BytesIO()
        torch.save(parent, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    check_same_state(other[0], module)
    for one, two in zip(other.parameters(), parent.parameters(), strict=True):
        assert type(one) is type(two)
        assert one.requires_grad == two.requires_grad
        assert one.data_ptr() != two.data_ptr()
    check_equal(other.to("cpu")[0], parent.to("cpu")[0])


@pytest.mark.parametrize("cut", [torch.chunk, torch.split])
def test_pieces_of_an_int8_weight_are_plain_codes(cut):
    """Rows have scales of their own, so a piece needs no description to be joined again."""
    weight = made("int8").weight
    pieces = cut(weight, 3)
    assert all(type(piece) is torch.Tensor or not isinstance(piece, Params4bit) for piece in pieces)
    assert torch.equal(torch.cat(pieces), weight.data)


@pytest.mark.parametrize("quantised", [False, True])
def test_pieces_on_meta(quantised):
    weight = made("nf4").weight if quantised else KINDS["nf4"]().weight
    pieces = torch.chunk(weight.to("meta"), 2)
    assert all(type(piece) is Params4bit and piece.is_meta for piece in pieces)
    assert all(piece.quant_state is weight.quant_state for piece in pieces)


# ---------------------------------------------------------------- a weight that lost its class


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "type"])
@pytest.mark.parametrize("kind", ["nf4", "fp4-plain-bf16", "int8", "embedding8", "embeddingnf4"])
def test_casts_of_a_plain_parameter_leave_the_codes(kind, cast):
    """Sharding engines leave plain parameters behind; their bytes are codes all the same."""
    module = made(kind)
    if isinstance(module, nn.Linear):
        module.bias = None
    want, before = run(module), module.weight.data.clone()
    module.weight = nn.Parameter(module.weight.data, requires_grad=False)
    parent = nn.Sequential(module)
    parent.type(torch.float64) if cast == "type" else getattr(parent, cast)()
    assert same_bytes(module.weight.data, before)
    parent.float()
    assert torch.equal(run(module), want)


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16])
def test_bytes_that_were_cast_are_read_back(to):
    """Every byte is a number that the float types hold exactly."""
    layer = Linear4bit(96, 40, quant_type="nf4").to("cpu")
    packed = (torch.arange(1920) % 256).to(torch.uint8).view(-1, 1)
    layer.weight.data.copy_(packed)
    want = run(layer)
    layer.weight = nn.Parameter(packed.to(to), requires_grad=False)
    assert torch.equal(run(layer), want)
    assert type(layer.weight) is Params4bit
    assert torch.equal(layer.weight.data, packed)


@pytest.mark.parametrize(
    "storage, to",
    [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
@pytest.mark.parametrize("cls", [Linear4bit, EmbeddingNF4])
def test_items_that_were_cast_are_an_error(cls, storage, to):
    layer = cls(64, 64, quant_storage=storage).to("cpu")
    layer.weight = nn.Parameter(layer.weight.data.to(to), requires_grad=False)
    with pytest.raises(RuntimeError, match=rf"cast from {storage} to {to}.*expected quant_storage"):
        run(layer)


def test_the_storage_follows_what_was_loaded():
    layer = Linear4bit(96, 40, quant_type="nf4").to("cpu")
    source = Linear4bit(96, 40, quant_type="nf4", quant_storage=torch.float16).to("cpu")
    layer.load_state_dict(source.state_dict())
    assert layer.quant_storage == torch.float16
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(run(layer), run(source))


# ---------------------------------------------------------------- what must not be loaded silently


def client(cls, hook, *args, **options):
    layer = cls(*args, **options).to("cpu")
    layer._register_load_state_dict_pre_hook(hook)
    return layer


QUANTISED = [
    (Linear8bitLt, (96, 40), {"has_fp16_weights": False, "bias": False}),
    (Linear4bit, (96, 40), {"quant_type": "nf4", "bias": False}),
    (Embedding8bit, (40, 96), {}),
    (EmbeddingNF4, (40, 96), {}),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("cls, args, options", QUANTISED)
def test_a_float_weight_that_a_hook_leaves_is_quantised(cls, args, options, assign):
    """Hooks run first and may change the weight; none is cast to integers, whatever they do."""
    calls = []

    def double(state_dict, prefix, *rest):
        calls.append(prefix)
        state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2

    parent = nn.Sequential(client(cls, double, *args, **options))
    weight = inputs(40, 96)
    result = parent.load_state_dict({"0.weight": weight}, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert calls == ["0."]
    assert len(parent[0]._load_state_dict_pre_hooks) == 1
    twin = cls(*args, **options)
    twin.weight.data.copy_(weight * 2)
    check_same_state(parent[0], twin.to("cpu"))


@pytest.mark.parametrize("cls, args, options", QUANTISED)
def test_a_hook_may_take_the_weight_or_fail(cls, args, options):
    def take(state_dict, prefix, *rest):
        del state_dict[f"{prefix}weight"]

    layer = client(cls, take, *args, **options)
    before = copy.deepcopy(layer.state_dict())
    result = layer.load_state_dict({"weight": inputs(40, 96)}, strict=False)
    assert result.missing_keys == ["weight"]
    assert all(same_bytes(value, before[key]) for key, value in layer.state_dict().items())

    def fail(*args):
        raise KeyError("the client's own")

    layer = client(cls, fail, *args, **options)
    with pytest.raises(KeyError, match="the client's own"):
        layer.load_state_dict({"weight": inputs(40, 96)})
    assert len(layer._load_state_dict_pre_hooks) == 1


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4-plain-bf16", "embedding8", "embeddingnf4"])
def test_numbers_without_statistics_are_refused(kind, plain):
    """Codes of the right shape, integers of another kind, and floats where the layer cannot quantise them."""
    module = made(kind)
    shape, packed = module._table_shape, module.weight.data
    if plain:
        module.weight = nn.Parameter(packed, requires_grad=False)
    before = copy.deepcopy(module.state_dict())
    rest = {"bias": module.bias.data} if getattr(module, "bias", None) is not None else {}
    bad = [packed.clone(), torch.zeros(packed.shape), torch.zeros(shape, dtype=torch.int32), torch.zeros(3, 5)]
    for weight in bad:
        if weight.is_floating_point() and weight.shape == shape and not plain:
            continue  # a float weight that the layer quantises
        with pytest.raises(RuntimeError, match=r"statistics|SCB|size mismatch"):
            module.load_state_dict({"weight": weight, **rest})
        assert all(same_bytes(value, before[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "master"])
def test_a_quantised_checkpoint_into_a_float_module_of_torch(kind):
    module = made(kind)
    embedding = isinstance(module, nn.Embedding)
    plain = nn.Embedding(*module._table_shape) if embedding else nn.Linear(module.in_features, module.out_features)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*(SCB|absmax)"):
        plain.load_state_dict(module.state_dict())


def test_wrong_weights_of_a_master_layer():
    layer = made("master")
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weight": torch.zeros(40, 95), "bias": torch.zeros(40)})
    with pytest.raises(RuntimeError, match="SCB is missing"):
        layer.load_state_dict({"weight": torch.zeros(40, 96, dtype=torch.int8), "bias": torch.zeros(40)})
    assert isinstance(layer.weight, Int8Params) and layer.weight.is_floating_point()
