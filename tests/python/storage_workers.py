"""What the processes of test_fsdp2_storage.py do: quantised layers whose weights FSDP2 cuts and gathers."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from bitsandbytes.nn import Embedding8bit, EmbeddingNF4, Linear4bit, Linear8bitLt
from layer_samples import check_same_state, same_bytes

FULL = StateDictOptions(full_state_dict=True)
PACKED = ("embed", "up", "down")  # the layers of Net in 4 bits
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def integers():
    """True if this torch shards integer parameters at all; 2.10 does not."""
    try:
        fully_shard(Linear4bit(64, 2, bias=False).to("cpu"), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    except RuntimeError as error:
        if "floating point dtype can require gradients" not in str(error):
            raise
        return False
    return True


def storages(*dtypes):
    return (torch.uint8, *dtypes) if integers() else dtypes


def frozen():
    """The names of the quantised layers of Net."""
    return (*PACKED, "words", "mid") if integers() else PACKED


class Net(nn.Module):
    """A frozen base in 4 and 8 bits with an adapter that trains; 41 rows and an odd number of bytes in some."""

    def __init__(self, storage, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = EmbeddingNF4(11, 64, quant_storage=storage)
        self.words = Embedding8bit(11, 64) if integers() else nn.Embedding(11, 64)
        self.up = Linear4bit(64, 41, bias=False, quant_type="nf4", quant_storage=storage)
        self.a = nn.Linear(64, 4, bias=False)
        self.b = nn.Linear(4, 41, bias=False)
        options = {"has_fp16_weights": False, "threshold": 6.0}
        self.mid = Linear8bitLt(41, 33, bias=False, **options) if integers() else nn.Linear(41, 33, bias=False)
        self.down = Linear4bit(33, 7, bias=False, quant_type="fp4", compress_statistics=False, quant_storage=storage)
        self.to("cpu")

    def forward(self, ids):
        x = (self.embed(ids) + self.words(ids)).to(self.a.weight.dtype)
        return self.down(self.mid(self.up(x) + self.b(self.a(x))))


def packed_bytes(layer):
    return layer.weight.data.view(torch.uint8).view(-1)


def every_pattern(net):
    """Put all byte values into the codes, and in 16-bit storage NaN with many payloads, quiet and signalling."""
    for name in PACKED:
        layer = getattr(net, name)
        target = packed_bytes(layer)
        target.copy_(torch.arange(target.numel()).mul(40503).bitwise_right_shift(8).to(torch.uint8))
        bits = layer.weight.data.view(torch.int16) if layer.weight.element_size() == 2 else None
        if bits is not None:
            exponent = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[layer.weight.dtype]
            count = min(64, bits.numel())
            bits.view(-1)[:count] = (exponent + 1 + torch.arange(count)).to(torch.int16)
            assert layer.weight.data.view(-1)[:count].isnan().all()
    return net


def shard(net, param_dtype=None):
    """FSDP2 over all processes, one group for each layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    for layer in net.children():
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(net, mesh=mesh, mp_policy=policy)


def ids():
    return torch.arange(11).view(1, 11)


def gathered(rank, folder):
    """Bytes and results are those of one process, for every storage with and without mixed precision."""
    cases = [(storage, None) for storage in storages(*FLOATS)]
    cases += [(storage, torch.bfloat16) for storage in storages(torch.bfloat16)] + [(torch.float16, torch.float16)]
    for storage, param_dtype in cases:
        net, twin = (every_pattern(Net(storage)) for _ in range(2))
        if param_dtype is not None:
            for layer in twin.children():
                layer.to(param_dtype)
        shard(net, param_dtype)
        for _ in range(2):
            with torch.no_grad():
                assert same_bytes(net(ids()), twin(ids())), (storage, param_dtype)
        for name in frozen():
            layer, other = getattr(net, name), getattr(twin, name)
            assert isinstance(layer.weight, DTensor), name
            assert same_bytes(layer.weight.full_tensor(), other.weight.data), (name, storage, param_dtype)
            layer.unshard()
            assert same_bytes(layer.weight.data, other.weight.data), (name, storage, param_dtype)
            layer.reshard()


def refused(rank, folder):
    """A cast that destroys the bytes is an error, never another result."""
    for storage, param_dtype in (
        (torch.float16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ):
        torch.manual_seed(0)
        layer = Linear4bit(64, 40, quant_type="nf4", quant_storage=storage).to("cpu")
        shard(nn.Sequential(layer), param_dtype)
        with pytest.raises(RuntimeError, match=rf"cast from {storage} to {param_dtype}.*expected quant_storage"):
            layer(torch.ones(1, 64))


def training(rank, folder):
    """Steps of an adapter beside the frozen base are those of one process."""
    for storage in storages(torch.bfloat16):
        net, twin = (every_pattern(Net(storage)) for _ in range(2))
        for model in (net, twin):
            for name in ("words", "mid"):
                getattr(model, name).requires_grad_(False)
            for name in frozen():
                assert not getattr(model, name).weight.requires_grad
        before = copy.deepcopy(twin)
        shard(net)
        losses = []
        for model in (net, twin):
            optimizer = torch.optim.SGD([model.a.weight, model.b.weight], lr=1e-3)
            for _ in range(3):
                loss = model(ids()).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert losses[:3] == losses[3:]
        assert losses[0] != losses[2]
        assert torch.equal(net.a.weight.full_tensor(), twin.a.weight.data)
        for name in frozen():
            assert same_bytes(getattr(net, name).weight.full_tensor(), getattr(before, name).weight.data), name


def casts(rank, folder):
    """module.to(dtype) and its like leave the shards alone."""
    for storage in storages(torch.float16, torch.bfloat16):
        net, twin = (every_pattern(Net(storage)) for _ in range(2))
        shard(net)
        with torch.no_grad():
            want = twin.bfloat16().float()(ids())
            net.bfloat16()
            net.to(torch.float64)
            net.float()
            for name in PACKED:
                assert same_bytes(getattr(net, name).weight.full_tensor(), getattr(twin, name).weight.data), name
            assert same_bytes(net(ids()), want)


def checkpoints(rank, folder):
    """Full and sharded state dicts hold the bytes, and load into sharded and whole models."""
    for storage in storages(torch.bfloat16):
        net, twin = (every_pattern(Net(storage)) for _ in range(2))
        shard(net)
        full = get_model_state_dict(net, options=FULL)
        expected = twin.state_dict()
        assert set(full) == set(expected)
        for key, value in expected.items():
            assert same_bytes(full[key], value), key
        whole = Net(storage, seed=1)
        whole.load_state_dict(full, strict=True)
        check_same_state(whole, twin)

        path = f"{folder}/{storage}"
        dcp.save({"model": get_model_state_dict(net)}, checkpoint_id=path)
        for way in (from_full, from_shards, from_dcp):
            other = shard(Net(storage, seed=2))
            way(other, net, path)
            with torch.no_grad():
                assert same_bytes(other(ids()), twin(ids()))
            again = get_model_state_dict(other, options=FULL)
            for key, value in expected.items():
                assert same_bytes(again[key], value), key

    other = shard(Net(torch.bfloat16))
    for spoil, text in (("up.weight.absmax", "absmax"), ("mid.SCB", "SCB"))[: 1 + integers()]:
        spoilt = other.state_dict()
        del spoilt[spoil]
        with pytest.raises(RuntimeError, match=text):
            other.load_state_dict(spoilt)
    spoilt = {key: value for key, value in other.state_dict().items() if not key.startswith("up.weight.")}
    with pytest.raises(RuntimeError, match="no statistics beside them"):
        other.load_state_dict(spoilt)


def from_full(model, source, path):
    set_model_state_dict(model, get_model_state_dict(source, options=FULL), options=FULL)


def from_shards(model, source, path):
    model.load_state_dict(source.state_dict(), strict=True)


def from_dcp(model, source, path):
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])


def several(rank, folder, *functions):
    for function in functions:
        function(rank, folder)
