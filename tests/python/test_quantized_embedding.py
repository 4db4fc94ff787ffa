"""Embedding8bit, Embedding4bit: lookups against decoded tables, moves, copies, checkpoints."""

import copy
import inspect
import io
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bitsandbytes as bnb
import oracle
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
from layer_samples import check_linked, check_same_state, same_bytes, with_, without

STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
# Every kind of table: one int8; 4-bit ones of both types, with plain or nested scales.
KINDS = ("int8", "nf4", "fp4", "nf4 nested", "fp4 nested")
ROWS = 23
# Whole blocks of 64, and not: even, odd, less than a block.
DIMS = (64, 192, 96, 65, 30, 1)


def new(kind, dim=64, rows=ROWS, blocksize=64, storage=torch.uint8, **options):
    """An unquantised embedding."""
    if kind == "int8":
        return Embedding8bit(rows, dim, **options)
    layer = Embedding4bit(rows, dim, quant_type=kind[:3], quant_storage=storage, **options)
    layer.weight.blocksize = blocksize
    layer.weight.compress_statistics = kind.endswith("nested")
    return layer


def make(kind, *args, seed=0, **options):
    """A quantised embedding."""
    torch.manual_seed(seed)
    return new(kind, *args, **options).to("cpu")


def decoded(layer, dtype):
    """The table that the bytes of a layer stand for, by the definitions: values of dtype, [rows, dim]."""
    shape = layer.num_embeddings, layer.embedding_dim
    if isinstance(layer, Embedding8bit):
        exact = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
        return exact.to(torch.float32).to(oracle.TORCH[dtype])
    state = layer.weight.quant_state
    scales = state.absmax.numpy()
    if state.nested:
        inner = state.state2
        scales = oracle.dequantize_scales(scales, inner.code.numpy(), inner.absmax.numpy(), float(state.offset))
    codes = oracle.unpack(layer.weight.data.view(torch.uint8).numpy().reshape(-1), shape[0] * shape[1])
    values = oracle.dequantize(codes, oracle.TABLE4[state.quant_type], scales, state.blocksize, dtype)
    return oracle.to_torch(values.reshape(shape), dtype)


def check_lookup(layer, ids, dtype):
    got = layer(ids)
    want = nn.functional.embedding(ids, decoded(layer, dtype))
    assert (got.dtype, got.shape) == (want.dtype, (*ids.shape, layer.embedding_dim))
    assert not got.requires_grad
    if isinstance(layer, Embedding4bit):
        assert torch.equal(got, want)
    else:  # two roundings of float32, and of those one to dtype
        unit = {"f32": 2**-22, "f16": 2**-10, "bf16": 2**-7}[dtype]
        assert ((got.double() - want.double()).abs() <= unit * want.double().abs() + 1e-7).all()


# ---------------------------------------------------------------- construction


def test_signatures():
    def names(cls):
        return list(inspect.signature(cls).parameters)

    assert names(Embedding8bit) == ["num_embeddings", "embedding_dim", "device", "dtype"]
    common = ["num_embeddings", "embedding_dim", "dtype"]
    assert names(Embedding4bit) == [*common, "quant_type", "quant_storage", "device"]
    for cls, kind in ((EmbeddingFP4, "fp4"), (EmbeddingNF4, "nf4")):
        assert names(cls) == [*common, "quant_storage", "device"]
        layer = cls(8, 64, torch.bfloat16, torch.float16, "meta")
        assert layer.weight.is_meta
        assert (layer.weight.quant_type, layer.quant_storage, layer.dtype) == (kind, torch.float16, torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16
    assert Embedding4bit(8, 64).weight.quant_type == "fp4"
    for cls in (Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4):
        assert getattr(bnb.nn.modules, cls.__name__) is cls
        assert issubclass(cls, nn.Embedding)
        for option in ({"padding_idx": 0}, {"max_norm": 1.0}, {"sparse": True}):
            with pytest.raises(TypeError, match=next(iter(option))):
                cls(8, 64, **option)


def test_attributes_of_a_new_layer():
    layer = Embedding4bit(8, 64)
    assert type(layer.weight) is Params4bit
    assert layer.weight.module is layer
    assert layer.quant_state is None
    assert (layer.weight.blocksize, layer.weight.compress_statistics) == (64, False)
    assert type(Embedding8bit(8, 64).weight) is Int8Params
    for layer in (Embedding4bit(8, 64), Embedding8bit(8, 64)):
        assert not layer.weight.requires_grad
        assert not isinstance(layer, nn.Linear)
        assert layer.weight.shape == (8, 64)


@pytest.mark.parametrize("dim, warns", [(64, False), (128, False), (65, True), (32, True), (96, True)])
def test_a_warning_of_rows_that_are_not_whole_blocks(dim, warns, caplog):
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            layer = EmbeddingNF4(8, dim)
            Embedding8bit(8, dim).to("cpu")(torch.tensor([1]))
        assert ["inference." in record.getMessage() for record in caplog.records] == [True] * warns
        assert all(record.name == "bitsandbytes.nn.modules" for record in caplog.records)
        caplog.clear()
        layer.to("cpu")(torch.tensor([1]))
        assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_use_before_quantising(kind, device):
    layer = new(kind, device=device)
    with pytest.raises(
        RuntimeError, match=r"Embedding[48]bit: the \w+ is not quantised yet: move the layer.*to\('cpu'\)"
    ):
        layer(torch.tensor([1], device=device))


# ---------------------------------------------------------------- lookups


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (2, 3), (2, 0, 3), (3, 2, 1, 4)])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("dim", [64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_shape(kind, dim, ids_dtype, shape):
    check_lookup(make(kind, dim), torch.randint(0, ROWS, shape, dtype=ids_dtype), "f32")


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_row(kind, dim, dtype):
    layer = make(kind, dim, dtype=oracle.TORCH[dtype])
    check_lookup(layer, torch.arange(ROWS), dtype)
    check_lookup(layer, torch.tensor([[ROWS - 1, 0], [0, ROWS - 1]]), dtype)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 4096])
@pytest.mark.parametrize("dim", [128, 256, 160])
@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_block_size(kind, dim, blocksize, dtype):
    layer = make(kind, dim, blocksize=blocksize, dtype=oracle.TORCH[dtype])
    assert layer.quant_state.blocksize == blocksize
    check_lookup(layer, torch.tensor([5, 5, ROWS - 1, 0, 12]), dtype)


@pytest.mark.parametrize("kind", ["nf4 nested", "fp4 nested"])
@pytest.mark.parametrize("dim", [64, 192, 320])
def test_rows_across_nested_blocks(kind, dim):
    """256 scales share one: here a row begins in one nested block and ends in the next."""
    layer = make(kind, dim, 1200)
    assert layer.quant_state.state2.absmax.numel() > 4
    check_lookup(layer, torch.randperm(1200), "f32")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dim", [64, 65])
def test_every_storage_dtype_has_the_same_rows(storage, dim):
    layer, ids = make("nf4", dim, storage=storage), torch.arange(ROWS)
    assert layer.weight.dtype == storage
    check_lookup(layer, ids, "f32")
    assert torch.equal(layer.half()(ids), make("nf4", dim)(ids))
    assert layer.weight.dtype == storage


@pytest.mark.parametrize("dim", [64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_the_table_is_close_to_what_was_quantised(kind, dim):
    layer = new(kind, dim)
    table = layer.weight.data.clone()
    got = layer.to("cpu")(torch.arange(ROWS))
    # Half a step: of 254 in a row; of the widest gap between codes. Nested scales are off by a few percent.
    bound = {"int8": 1 / 250, "nf4": 0.153, "fp4": 0.168}[kind[:4].strip()] * table.abs().max() * 1.05
    assert (got - table).abs().max() <= bound
    signs = torch.randint(0, 2, (ROWS, dim)) * 2.0 - 1
    exact = new(kind.split()[0], dim)
    exact.weight.data.copy_(signs)
    assert torch.equal(exact.to("cpu")(torch.arange(ROWS)), signs)


@pytest.mark.parametrize("dim", [64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_has_the_dtype_of_construction(kind, dim):
    layer = new(kind, dim, dtype=torch.bfloat16)
    layer.float().to("cpu")
    check_lookup(layer, torch.arange(ROWS), "bf16")
    layer.half().double()
    check_lookup(layer, torch.arange(ROWS), "bf16")


class Largest(TorchDispatchMode):
    """Records the most float elements that any result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("kind, dim", [("int8", 64), ("int8", 65), *((kind, 128) for kind in KINDS[1:])])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_only_the_rows_asked_for_are_decoded(kind, dim, storage):
    layer = make(kind, dim, 1000, storage=storage)
    stored = [t.numel() for t in layer.state_dict().values() if t.is_floating_point()]  # views of them are no copies
    with Largest() as seen:
        layer(torch.tensor([[1, 999], [500, 1]]))
    assert 4 * dim <= seen.elements <= max(4 * dim, *stored) < 1000 * dim


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 65])
def test_bad_ids(kind, dim):
    layer = make(kind, dim)
    for ids in (torch.tensor([ROWS]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            layer(ids)
    with pytest.raises(RuntimeError, match="indices"):
        layer(torch.tensor([1.0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 65])
def test_compiled_whole(kind, dim):
    torch.compiler.reset()
    layer = make(kind, dim)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((3,), (2, 5), (4, 4)):
        ids = torch.randint(0, ROWS, shape)
        assert torch.equal(compiled(ids), layer(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_float_table_in_its_place(kind):
    """Tied to a layer that is not quantised."""
    layer = make(kind)
    tied = nn.Parameter(torch.randn(ROWS, 64))
    layer.weight = tied
    ids = torch.tensor([[3, 4], [0, 22]])
    assert torch.equal(layer(ids), tied[ids])
    assert list(layer.state_dict()) == ["weight"]
    layer.to("cpu").bfloat16()
    assert layer(ids).dtype == torch.float32


@pytest.mark.parametrize("storage", STORAGES)
def test_a_packed_weight_that_lost_its_attributes(storage):
    layer = make("nf4", storage=storage)
    want = layer(torch.arange(ROWS))
    layer.weight = nn.Parameter(layer.weight.data.clone(), requires_grad=False)
    assert "weight.absmax" in layer.state_dict()
    assert torch.equal(layer(torch.arange(ROWS)), want)
    check_linked(layer)


# ---------------------------------------------------------------- moves and copies


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_by_the_first_move_of_a_parent_and_never_again(kind):
    layer = new(kind)
    model = nn.Sequential(layer)
    model.half().float()
    assert layer.weight.dtype == torch.float32
    weight = layer.weight
    model.to("cpu")
    assert layer.weight is weight
    before = copy.deepcopy(layer)
    for move in (lambda m: m.to("cpu"), lambda m: m.cpu(), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)):
        move(model)
        check_same_state(layer, before)
        assert torch.equal(layer(torch.arange(ROWS)), before(torch.arange(ROWS)))


@pytest.mark.parametrize("kind", KINDS)
def test_to_meta_and_back_by_loading(kind):
    source = make(kind, seed=1)
    layer = copy.deepcopy(source)
    nn.Sequential(layer).to("meta")
    assert layer.weight.is_meta
    assert type(layer.weight) is type(source.weight)
    layer.load_state_dict(source.state_dict(), strict=True)
    check_same_state(layer, source)
    assert torch.equal(layer(torch.arange(ROWS)), source(torch.arange(ROWS)))


def by_torch(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "torch": by_torch}


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, way, quantised):
    layer = make(kind, 65) if quantised else new(kind, 65)
    other = COPIES[way](nn.Sequential(layer))[0]
    check_same_state(layer, other)
    assert type(other.weight) is type(layer.weight)
    assert other.weight.data_ptr() != layer.weight.data_ptr()
    if isinstance(other, Embedding4bit):
        check_linked(other)
        check_linked(layer)
    elif quantised:
        assert other.weight.CB.data_ptr() == other.weight.data_ptr()
        assert other.weight.SCB.data_ptr() != layer.weight.SCB.data_ptr()
    other.to("cpu")
    ids = torch.arange(ROWS)
    assert torch.equal(other(ids), layer.to("cpu")(ids))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_those_of_the_linear_layers(kind):
    if kind == "int8":
        linear = Linear8bitLt(64, ROWS, bias=False, has_fp16_weights=False)
    else:
        nested = kind.endswith("nested")
        linear = Linear4bit(64, ROWS, bias=False, quant_type=kind[:3], compress_statistics=nested)
    layer = new(kind)
    assert list(layer.state_dict()) == ["weight"]
    linear.weight.data.copy_(layer.weight.data)
    layer.to("cpu")
    linear.to("cpu")
    for _ in range(2):
        check_same_state(layer, linear)
        assert layer.state_dict(keep_vars=True)["weight"] is layer.weight
        layer(torch.tensor([1]))
    other = make(kind, seed=5)
    other.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(other(torch.arange(ROWS)), layer(torch.arange(ROWS)))


def target(state, kind):
    """A layer to load into: "float", "quantised", "used", on "meta", or with a "plain" parameter of the packed data."""
    layer = new(kind, 65, device="meta" if state == "meta" else "cpu")
    if state in ("quantised", "used", "plain"):
        layer.to("cpu")
    if state == "used":
        layer(torch.tensor([1]))
    if state == "plain":
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    return layer


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("state", ["float", "quantised", "used", "meta", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_loads_into_every_layer(kind, state, assign):
    source, layer = make(kind, 65, seed=1), target(state, kind)
    weight = layer.weight
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Linear(2, 2)})
    saved = {f"a.0.{key}": value for key, value in source.state_dict().items()}
    saved.update({"b.weight": torch.ones(2, 2), "b.bias": torch.ones(2)})
    given = {key: value.clone() for key, value in saved.items()}
    result = model.load_state_dict(saved, strict=True, assign=assign)
    assert result.missing_keys == result.unexpected_keys == []
    assert type(layer.weight) is type(source.weight)
    assert (layer.weight is weight) == (state in ("float", "quantised", "used") and not assign)
    assert (layer.weight.data_ptr() == saved["a.0.weight"].data_ptr()) == assign
    assert not layer.weight.requires_grad
    for _ in range(2):
        check_same_state(layer, source)
        assert torch.equal(layer(torch.arange(ROWS)), source(torch.arange(ROWS)))
        model.to("cpu")
    with torch.no_grad():
        for parameter in () if assign else layer.parameters():
            parameter.data.zero_()
    assert all(same_bytes(saved[key], given[key]) for key in saved)


@pytest.mark.parametrize("state, assign", [(s, a) for s in ("float", "used") for a in (False, True)] + [("meta", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_float_checkpoint_loads_into_every_layer(kind, state, assign):
    """A quantised layer quantises it, and never casts it to integers."""
    torch.manual_seed(2)
    source, layer = nn.Embedding(ROWS, 65), target(state, kind)
    layer.load_state_dict(source.state_dict(), strict=True, assign=assign)
    if state != "used":
        assert torch.equal(layer.weight.data, source.weight.data)
    twin = new(kind, 65)
    twin.weight.data.copy_(source.weight.data)
    check_same_state(layer.to("cpu"), twin.to("cpu"))
    assert type(layer.weight) is type(twin.weight)
    assert source.weight.dtype == torch.float32


SPOILT = [
    ("int8", without("weight"), "Missing key.*weight"),
    ("int8", without("SCB"), "int8 and SCB is missing"),
    ("int8", with_("SCB", torch.ones(ROWS + 1)), "size mismatch"),
    ("int8", with_("weight", torch.zeros(ROWS, 63, dtype=torch.int8)), "size mismatch"),
    ("int8", with_("weight", torch.zeros(ROWS, 64)), "float32, expected torch.int8"),
    ("int8", with_("other", torch.zeros(1)), "Unexpected key.*other"),
    ("nf4", without("weight"), "Missing key.*weight"),
    ("nf4", without("weight.absmax"), "absmax"),
    ("nf4", without("weight.quant_state.bitsandbytes__nf4"), "packed metadata"),
    ("nf4", with_("weight", torch.zeros(7, 1, dtype=torch.uint8)), "7 bytes, expected 736"),
    ("nf4", with_("weight.other", torch.zeros(1)), "weight.other"),
    ("nf4", with_("other", torch.zeros(1)), "Unexpected key.*other"),
]


@pytest.mark.parametrize("kind, spoil, text", SPOILT)
@pytest.mark.parametrize("quantised", [False, True])
def test_bad_checkpoints(kind, spoil, text, quantised):
    layer = make(kind) if quantised else new(kind)
    before = copy.deepcopy(layer)
    saved = make(kind, seed=1).state_dict()
    spoil(saved)
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(saved)
    if "Unexpected" not in text:
        check_same_state(layer, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_shape(kind):
    layer = make(kind)
    before = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(make(kind, ROWS, 64).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(nn.Embedding(ROWS, 63).state_dict())
    check_same_state(layer, before)


def test_other_layouts_of_int8():
    saved = make("int8", seed=1).state_dict()
    for value in (1, "col_turing", torch.tensor(3)):
        with pytest.raises(ValueError, match="weight_format"):
            make("int8").load_state_dict({**saved, "weight_format": value})
    del saved["weight_format"]
    make("int8").load_state_dict(saved, strict=True)
