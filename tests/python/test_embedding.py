"""nn.Embedding and nn.StableEmbedding: arguments, initialisation, forward, 32-bit optimizer state."""

import copy
import gc
import inspect
import io

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

CLASSES = (bnb.nn.Embedding, bnb.nn.StableEmbedding)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def fresh_manager():
    GlobalOptimManager.get_instance().initialize()
    yield
    GlobalOptimManager.get_instance().initialize()


def overrides():
    return GlobalOptimManager.get_instance().module_weight_config_triple


@pytest.mark.parametrize("cls", CLASSES)
def test_arguments_are_those_of_torch(cls):
    ours = inspect.signature(cls).parameters
    theirs = {name: value for name, value in inspect.signature(nn.Embedding).parameters.items() if name != "_freeze"}
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.default == theirs[name].default, name
    assert issubclass(cls, nn.Embedding)
    assert getattr(bnb.nn.modules, cls.__name__) is cls


@pytest.mark.parametrize("cls", CLASSES)
def test_initialisation_is_xavier_uniform_with_a_zero_padding_row(cls):
    torch.manual_seed(0)
    layer = cls(1000, 64, padding_idx=3)
    bound = (6 / 1064) ** 0.5
    assert (layer.weight[3] == 0).all()
    assert layer.weight.abs().max() <= bound
    assert layer.weight.abs().max() > 0.99 * bound
    assert abs(layer.weight.mean().item()) < 0.01 * bound
    given = torch.arange(12.0).reshape(4, 3)
    assert torch.equal(cls(4, 3, _weight=given).weight, given)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,)])
def test_forward(cls, dtype, shape):
    layer = cls(20, 16, dtype=dtype)
    indices = torch.randint(0, 20, shape)
    got = layer(indices)
    assert (got.shape, got.dtype) == ((*shape, 16), dtype)
    want = nn.functional.embedding(indices, layer.weight)
    if cls is bnb.nn.StableEmbedding:
        assert layer.norm.weight.dtype == torch.get_default_dtype()
        with torch.no_grad():
            layer.norm.weight.uniform_(0.5, 2)
            layer.norm.bias.uniform_(-1, 1)
        want = layer.norm(want.float()).to(dtype)
        got = layer(indices)
    assert torch.equal(got, want)


def test_stable_embedding_normalises_in_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        layer = bnb.nn.StableEmbedding(20, 16, dtype=torch.bfloat16)
        assert layer.norm.weight.dtype == torch.float64
        assert layer(torch.tensor([1])).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("cls", CLASSES)
def test_options_of_torch_work(cls):
    limited = cls(10, 8, max_norm=1e-3, norm_type=2.0)
    limited(torch.tensor([1, 2]))
    assert limited.weight[1:3].norm(dim=1).max() <= 1.001e-3
    sparse = cls(10, 8, sparse=True)
    sparse(torch.tensor([1, 2])).sum().backward()
    assert sparse.weight.grad.is_sparse
    padded = cls(10, 8, padding_idx=1)
    padded(torch.tensor([1, 2])).square().sum().backward()
    assert (padded.weight.grad[1] == 0).all()
    scaled = cls(10, 8, scale_grad_by_freq=True)
    assert scaled.scale_grad_by_freq
    assert cls(10, 8, device="meta").weight.device.type == "meta"


@pytest.mark.parametrize("cls", CLASSES)
def test_registers_a_32_bit_override(cls):
    layer = cls(10, 8)
    assert overrides() == [(layer, "weight", {"optim_bits": 32})]
    del layer
    gc.collect()
    assert overrides() == []


def through_a_file(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("origin", [lambda layer: layer, copy.deepcopy, through_a_file, lambda layer: layer.bfloat16()])
def test_optimizer_state_of_the_weight_is_32_bit(cls, origin):
    model = nn.Sequential(origin(cls(128, 64)), nn.Linear(64, 128))
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    indices = torch.randint(0, 128, (32,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model[1](model[0](indices).float()), indices)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["state1"].dtype == torch.uint8
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_has_the_keys_of_upstream(cls):
    layer = cls(10, 8)
    keys = ["weight", "norm.weight", "norm.bias"] if cls is bnb.nn.StableEmbedding else ["weight"]
    assert list(layer.state_dict()) == keys
    other = cls(10, 8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(torch.tensor([3])), layer(torch.tensor([3])))
