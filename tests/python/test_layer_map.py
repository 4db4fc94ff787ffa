"""quantize_layers(): which entry decides, what the layers become, checkpoints of plain PyTorch, memory, bad maps."""

import json
import weakref

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.nn import (
    Embedding4bit,
    Embedding8bit,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    Params4bit,
    dequantize_layers,
    layer_map_of,
    quantize_layers,
)
from layer_samples import check_linked, check_same_state, inputs, same_bytes

SKIP = {"type": "skip"}
NF4 = {"type": "nf4", "nested": True, "blocksize": 128, "compute_dtype": "bfloat16"}
FP4 = {"type": "fp4", "blocksize": 32}
INT8 = {"type": "int8", "threshold": 6.0}
MIXED = {"head": SKIP, r"blocks\.\d\.attention\..*": NF4, r".*\.down": INT8, ".*": FP4}


class Experts(nn.Module):
    """Two fused experts."""

    num_experts = 2

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 16, 64))
        self.down_proj = nn.Parameter(torch.randn(2, 64, 16))


class Block(nn.Module):
    """Residual: attention-like, then a network."""

    def __init__(self):
        super().__init__()
        self.attention = nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(64, 64, bias=False)})
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x):
        x = x + self.attention["q"](x) * self.attention["k"](x)
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Embedding, two blocks, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64, padding_idx=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, ids):
        return self.head(self.norm(self.blocks(self.embed(ids))))


def make(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Model().to(dtype).eval()


IDS = torch.arange(3, 15).reshape(2, 6)


def one_by_one(model):
    """MIXED, written out with the constructors."""
    for block in model.blocks:
        for key, old in block.attention.items():
            new = Linear4bit(64, 64, old.bias is not None, torch.bfloat16, True, "nf4")
            block.attention[key] = put(new, old, blocksize=128)
        block.up = put(Linear4bit(64, 96, True, None, False, "fp4"), block.up, blocksize=32)
        new = Linear8bitLt(96, 64, has_fp16_weights=False, threshold=6.0)
        new.load_state_dict(block.down.state_dict())
        block.down = new.to("cpu")
    return model


def put(new, old, blocksize):
    new.weight.data, new.weight.blocksize = old.weight.data, blocksize
    new.bias = old.bias
    return new.to("cpu")


# ---------------------------------------------------------------- what it does


def test_mixed_model_equals_layers_converted_one_by_one():
    model = make()
    plain = model(IDS)
    assert quantize_layers(model, MIXED) is model
    want = one_by_one(make())
    check_same_state(model, want)
    assert torch.equal(model(IDS), want(IDS))
    assert not torch.equal(model(IDS), plain)
    for block in model.blocks:
        for layer in (block.attention.q, block.attention.k, block.up):
            assert type(layer) is Linear4bit
            check_linked(layer)
            assert not layer.training
        assert type(block.down) is Linear8bitLt
        assert block.down.state.threshold == 6.0
        assert block.attention.q.compute_dtype == torch.bfloat16
    assert type(model.head) is nn.Linear
    assert type(model.embed) is nn.Embedding


def test_bytes():
    model = make(dtype=torch.bfloat16)
    quantize_layers(model, MIXED)
    weights = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if "weight" in name}
    assert weights["blocks.0.attention.q.weight"] == 64 * 64 // 2
    assert weights["blocks.0.up.weight"] == 64 * 96 // 2
    assert weights["blocks.0.down.weight"] == 96 * 64
    assert weights["head.weight"] == 50 * 64 * 2
    state = model.state_dict()
    assert state["blocks.0.attention.q.weight.absmax"].numel() == 64 * 64 // 128
    assert state["blocks.0.attention.q.weight.absmax"].dtype == torch.uint8
    assert state["blocks.0.up.weight.absmax"].numel() == 64 * 96 // 32
    assert state["blocks.0.up.weight.absmax"].dtype == torch.float32


def test_first_match_of_the_whole_name_decides():
    model = make()
    layer_map = [[r"blocks\.0\..*", SKIP], ["up", SKIP], [".*up", {"type": "int8"}]]
    with pytest.raises(ValueError, match=r"entry 'up': matches no layer.*whole name"):
        quantize_layers(model, layer_map)
    quantize_layers(model, [layer_map[0], layer_map[2]])
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["blocks.0.up"] is nn.Linear
    assert kinds["blocks.1.up"] is Linear8bitLt
    assert kinds["blocks.1.down"] is nn.Linear


def test_twice_is_once_and_another_map_is_refused():
    model = quantize_layers(make(), MIXED)
    layers = dict(model.named_modules())
    packed = {name: value.clone() for name, value in model.state_dict().items()}
    quantize_layers(model, MIXED)
    quantize_layers(model, layer_map_of(model))
    quantize_layers(model, {"blocks.*": SKIP})
    assert dict(model.named_modules()) == layers
    assert all(same_bytes(value, packed[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"'blocks\.0\.up' is quantised already, as .*fp4.*expected.*nf4"):
        quantize_layers(model, {"head": {"type": "int8"}, ".*up": {"type": "nf4"}})
    assert type(model.head) is nn.Linear
    quantize_layers(model, {"head": {"type": "int8"}})
    assert type(model.head) is Linear8bitLt


def test_embeddings_only_where_an_entry_says_so():
    for settings, kind in (({"type": "nf4", "blocksize": 32}, Embedding4bit), ({"type": "int8"}, Embedding8bit)):
        model = quantize_layers(make(dtype=torch.bfloat16), {".*": settings})
        assert type(model.embed) is nn.Embedding
        model = make(dtype=torch.bfloat16)
        table = model.embed.weight.data.clone()
        quantize_layers(model, {"embed": {**settings, "embeddings": True}})
        assert type(model.embed) is kind
        assert model.embed.padding_idx == 1
        rows = model.embed(IDS)
        assert rows.dtype == torch.bfloat16
        assert (rows - table[IDS]).abs().max() < 0.6
        skeleton = quantize_layers(make(seed=1, dtype=torch.bfloat16), layer_map_of(model))
        skeleton.load_state_dict(model.state_dict())
        assert torch.equal(skeleton.embed(IDS), rows)


def test_experts_go_by_the_names_of_their_parameters():
    model = nn.ModuleDict({"experts": Experts(), "router": nn.Linear(64, 2)})
    with pytest.raises(ValueError, match=r"'experts\.up_proj' is a weight of experts and the type is int8"):
        quantize_layers(model, {".*": {"type": "int8"}})
    assert type(model.router) is nn.Linear
    layer_map = {"router": SKIP, r"experts\.up.*": {"type": "fp4", "blocksize": 32}, ".*": {"type": "nf4"}}
    quantize_layers(model, layer_map)
    settings = layer_map_of(model)
    assert settings == {
        r"experts\.up_proj": {"type": "fp4", "blocksize": 32, "nested": False},
        r"experts\.down_proj": {"type": "nf4", "blocksize": 64, "nested": False},
    }
    quantize_layers(model, layer_map)
    again = quantize_layers(nn.ModuleDict({"experts": Experts(), "router": nn.Linear(64, 2)}), settings)
    again.load_state_dict(model.state_dict())
    check_same_state(again, model)


def test_a_module_under_two_names_is_replaced_under_both():
    model = nn.Module()
    model.one = model.two = nn.Linear(64, 8)
    quantize_layers(model, {"one": {"type": "nf4"}})
    assert model.one is model.two
    assert type(model.two) is Linear4bit


def test_subclasses_that_may_do_otherwise_stay():
    attention = nn.MultiheadAttention(64, 2)
    x = inputs(3, 1, 64)
    want = attention(x, x, x)[0]
    quantize_layers(attention, {".*": {"type": "int8"}})
    assert torch.equal(attention(x, x, x)[0], want)


def test_weights_are_quantised_one_by_one(monkeypatch):
    """Each float weight is gone before the next is quantised."""
    model = make()
    floats = [weakref.ref(module.weight) for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    alive = []
    for cls, method in ((Params4bit, "_quantize"), (Int8Params, "quantize")):
        plain = getattr(cls, method)

        def counted(self, *args, plain=plain):
            result = plain(self, *args)
            alive.append(sum(ref() is not None for ref in floats))
            return result

        monkeypatch.setattr(cls, method, counted)
    quantize_layers(model, MIXED)
    assert alive == [7, 6, 5, 4, 3, 2, 1, 0]


def test_training_reaches_the_inputs_and_the_biases():
    model = quantize_layers(make(), MIXED)
    model(IDS).sum().backward()
    assert model.embed.weight.grad.abs().max() > 0
    assert model.blocks[0].up.bias.grad.abs().max() > 0
    assert model.blocks[0].up.weight.requires_grad is False


# ---------------------------------------------------------------- checkpoints of plain PyTorch


@pytest.mark.parametrize("device, assign", [("cpu", False), ("cpu", True), ("meta", True)])
def test_description_and_checkpoint_rebuild_the_model(device, assign, tmp_path):
    model = quantize_layers(make(dtype=torch.bfloat16), MIXED)
    (tmp_path / "layers.json").write_text(json.dumps(layer_map_of(model), sort_keys=True))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with torch.device(device):
        again = make(seed=1, dtype=torch.bfloat16)
        quantize_layers(again, json.loads((tmp_path / "layers.json").read_text()))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    again.load_state_dict(state, assign=assign)
    check_same_state(again, model)
    assert torch.equal(again(IDS), model(IDS))
    assert layer_map_of(again) == layer_map_of(model)


def test_float_checkpoint_into_a_skeleton_is_quantised_by_the_move():
    with torch.device("meta"):
        skeleton = quantize_layers(make(), MIXED)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    skeleton.load_state_dict(make().state_dict(), assign=True)
    skeleton.to("cpu")
    check_same_state(skeleton, quantize_layers(make(), MIXED))


def test_description_has_complete_settings():
    model = quantize_layers(
        make(), {"head": {"type": "int8"}, ".*k": {"type": "nf4"}, ".*up": {**FP4, "quant_storage": torch.bfloat16}}
    )
    got = layer_map_of(model)
    nf4 = {"type": "nf4", "blocksize": 64, "nested": False, "compute_dtype": None, "quant_storage": "uint8"}
    fp4 = {"type": "fp4", "blocksize": 32, "nested": False, "compute_dtype": None, "quant_storage": "bfloat16"}
    assert got == {
        r"blocks\.0\.attention\.k": nf4,
        r"blocks\.0\.up": fp4,
        r"blocks\.1\.attention\.k": nf4,
        r"blocks\.1\.up": fp4,
        "head": {"type": "int8", "threshold": 0.0},
    }
    assert model.blocks[0].up.weight.dtype == torch.bfloat16
    assert json.loads(json.dumps(got)) == got
    assert layer_map_of(make()) == {}


def test_dequantize_layers():
    model = quantize_layers(make(), {**MIXED, ".*": {**FP4, "embeddings": True}})
    want = model(IDS)
    assert dequantize_layers(model, torch.float32) is model
    assert layer_map_of(model) == {}
    assert {type(model.embed), type(model.blocks[0].down)} == {nn.Embedding, nn.Linear}
    assert (model(IDS) - want).abs().max() < 0.05


# ---------------------------------------------------------------- bad maps


BAD = {
    "no dict": ("nf4", "it is 'nf4', expected a dict or a list of pairs"),
    "empty": ({}, "is empty"),
    "no pair": ([["head"]], r"\['head'\] is not a pair"),
    "name": ({3: SKIP}, "entry 3: the name is not a string"),
    "regex": ({"head(": SKIP}, r"entry 'head\(': not a regular expression \(missing \)"),
    "settings": ({"head": "nf4"}, "entry 'head': settings are 'nf4', expected a dict"),
    "type": ({"head": {"type": "nf5"}}, "entry 'head': type is 'nf5', expected one of nf4, fp4, int8, skip"),
    "no type": ({"head": {"blocksize": 64}}, "type is None, expected one of"),
    "list type": ({"head": {"type": ["nf4"]}}, r"type is \['nf4'\], expected one of"),
    "key": (
        {"head": {"type": "nf4", "block_size": 64}},
        "'block_size' is no setting of type nf4, expected type, blocks",
    ),
    "key of another": ({"head": {"type": "int8", "blocksize": 64}}, "'blocksize' is no setting of type int8"),
    "skip": ({"head": {"type": "skip", "nested": True}}, "'nested' is no setting of type skip, expected type$"),
    "blocksize": ({"head": {"type": "nf4", "blocksize": 48}}, "'head': blocksize is 48, expected a power of two"),
    "blocksize type": ({"head": {"type": "nf4", "blocksize": "64"}}, "blocksize is '64', expected an int"),
    "nested": ({"head": {"type": "nf4", "nested": 1}}, "nested is 1, expected True or False"),
    "embeddings": ({"head": {"type": "nf4", "embeddings": None}}, "embeddings is None, expected True or False"),
    "threshold": ({"head": {"type": "int8", "threshold": -1}}, "threshold is -1, expected a number"),
    "threshold nan": ({"head": {"type": "int8", "threshold": float("nan")}}, "threshold is nan"),
    "compute_dtype": ({"head": {"type": "nf4", "compute_dtype": "bf16"}}, "compute_dtype is 'bf16', expected the name"),
    "compute_dtype int": (
        {"head": {"type": "nf4", "compute_dtype": "int8"}},
        "compute_dtype is int8, expected float32",
    ),
    "storage": ({"head": {"type": "nf4", "quant_storage": "int32"}}, "quant_storage is int32, expected uint8"),
    "storage none": ({"head": {"type": "nf4", "quant_storage": None}}, "quant_storage is None, expected the name"),
    "no layer": ({"haed": SKIP}, "entry 'haed': matches no layer, expected at least one"),
    "a part": ({r"attention\.q": SKIP}, "matches no layer.*whole name"),
    "shadowed": ({".*": {"type": "nf4"}, "head": SKIP}, "entry 'head': decides for no layer: earlier.*'head'"),
    "embedding": (
        {"embed": {"type": "nf4"}},
        "matches embeddings only, such as 'embed', expected \"embeddings\": true",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_maps_change_nothing(name):
    layer_map, message = BAD[name]
    model = make()
    before = {key: id(module) for key, module in model.named_modules()}
    good = [["blocks.*", {"type": "int8"}]]  # would be the first to be done
    pairs = list(layer_map.items()) if isinstance(layer_map, dict) else layer_map
    whole = layer_map if name in ("no dict", "empty") else [*good, *pairs]
    with pytest.raises(ValueError, match=message):
        quantize_layers(model, whole)
    assert {key: id(module) for key, module in model.named_modules()} == before


def test_tied_weights_are_refused():
    model = make()
    model.head.weight = model.embed.weight
    with pytest.raises(ValueError, match=r"entry '\.\*': head\.weight and embed\.weight are one tensor.*skip.*'head'"):
        quantize_layers(model, {".*": {"type": "nf4"}})
    with pytest.raises(ValueError, match=r"embed\.weight and head\.weight are one tensor"):
        quantize_layers(model, {"embed": {"type": "int8", "embeddings": True}})
    assert layer_map_of(model) == {}
    quantize_layers(model, {"head": SKIP, ".*": {"type": "nf4"}})
    assert model.head.weight is model.embed.weight
    assert len(layer_map_of(model)) == 8


def test_weights_and_embeddings_that_cannot_be_quantised():
    model = make()
    model.head.double()
    with pytest.raises(ValueError, match=r"entry '\.\*': the dtype of a weight is float64, expected float32"):
        quantize_layers(model, {".*": {"type": "nf4"}})
    assert layer_map_of(model) == {}
    model = nn.ModuleDict({"table": nn.Embedding(10, 64, max_norm=1.0)})
    with pytest.raises(ValueError, match="embedding 'table' has max_norm, expected none"):
        quantize_layers(model, {"table": {"type": "nf4", "embeddings": True}})


def test_public_names():
    assert bnb.nn.quantize_layers is quantize_layers
    assert {"quantize_layers", "layer_map_of", "dequantize_layers"} <= set(bnb.nn.__all__)
