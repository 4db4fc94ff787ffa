"""GlobalOptimManager: overrides of parameters, positions and modules; their order, life and reach."""

import gc
import logging

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import optim

LOGGER = "bitsandbytes.optim"


@pytest.fixture(autouse=True)
def fresh_manager():
    optim.GlobalOptimManager.get_instance().initialize()
    yield
    optim.GlobalOptimManager.get_instance().initialize()


def param(n=8192, value=1.0, grad=0.5):
    p = nn.Parameter(torch.full((n,), value))
    if grad is not None:
        p.grad = torch.full((n,), grad)
    return p


def bits_of(optimizer, p):
    return 8 if optimizer.state[p]["state1"].dtype == torch.uint8 else 32


def counted(monkeypatch):
    """Record the number of parameters of every operator call."""
    calls = []
    original = bnb._ops.call

    def spy(op, *args):
        if op is torch.ops.bitsandbytes._optimizer_step.default:
            calls.append(len(args[1]))
        return original(op, *args)

    monkeypatch.setattr(bnb._ops, "call", spy)
    return calls


def test_manager_is_a_singleton():
    manager = optim.GlobalOptimManager.get_instance()
    assert optim.GlobalOptimManager.get_instance() is manager
    assert optim.Adam([param()]).mng is manager
    with pytest.raises(RuntimeError, match="get_instance"):
        optim.GlobalOptimManager()


def test_manager_errors():
    manager = optim.GlobalOptimManager.get_instance()
    with pytest.raises(IndexError, match="empty"):
        manager.register_parameters([])
    with pytest.raises(AssertionError, match="key_value_dict"):
        manager.override_config(param(), "lr", 0.1, key_value_dict={"eps": 1.0})
    with pytest.raises(ValueError, match="'optim_bit'"):
        manager.override_config(param(), "optim_bit", 8)
    with pytest.raises(ValueError, match="'bits'"):
        manager.register_module_override(nn.Linear(2, 2), "weight", {"bits": 32})
    manager.override_config(param(), "lr", None)
    assert manager.pid2config == {}


@pytest.mark.parametrize("order", ["override first", "register first", "override only", "after the optimizer"])
@pytest.mark.parametrize("grouped", [False, True])
def test_override_order(order, grouped):
    manager = optim.GlobalOptimManager.get_instance()
    a, b = param(), param()
    params = [{"params": [a]}, {"params": [b]}] if grouped else [a, b]
    optimizer = optim.Adam(params) if order == "after the optimizer" else None
    if order == "register first":
        manager.register_parameters(params)
    manager.override_config(b, "optim_bits", 8)
    if order == "override first":
        manager.register_parameters(params)
    optimizer = optimizer or optim.Adam(params)
    optimizer.step()
    assert (bits_of(optimizer, a), bits_of(optimizer, b)) == (32, 8)


@pytest.mark.parametrize("order", ["override first", "register first"])
@pytest.mark.parametrize("alive", [False, True])
def test_position_survives_a_new_object(order, alive):
    """A cast stands for the move to a GPU: both make a new tensor of the same shape."""
    manager = optim.GlobalOptimManager.get_instance()
    old = [param(), param()]
    if order == "register first":
        manager.register_parameters(old)
    manager.override_config(old[1], "optim_bits", 8)
    if order == "override first":
        manager.register_parameters(old)
    new = [nn.Parameter(p.detach().bfloat16()) for p in old]
    for p in new:
        p.grad = torch.ones_like(p)
    if not alive:
        del old
        gc.collect()
    optimizer = optim.Adam(new)
    optimizer.step()
    assert [bits_of(optimizer, p) for p in new] == [32, 8]


def test_position_is_not_inherited_by_a_second_optimizer():
    manager = optim.GlobalOptimManager.get_instance()
    a, b = param(), param()
    manager.override_config(a, "optim_bits", 8)
    manager.register_parameters([a])
    first, second = optim.Adam([a]), optim.Adam([b])
    second.step()
    first.step()
    assert (bits_of(first, a), bits_of(second, b)) == (8, 32)
    half = nn.Parameter(torch.ones(8192, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    third = optim.Adam([half])
    third.step()
    assert bits_of(third, half) == 32


def test_dead_parameters_leave_nothing_behind():
    manager = optim.GlobalOptimManager.get_instance()
    p = param()
    manager.override_config(p, "lr", 0.5)
    assert manager.pid2config == {id(p): {"lr": 0.5}}
    del p
    gc.collect()
    assert manager.pid2config == {}
    module = nn.Linear(2, 2)
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    assert manager.module_weight_config_triple == [(module, "weight", {"optim_bits": 32})]
    del module
    gc.collect()
    assert manager.module_weight_config_triple == []


def test_overrides_of_a_list_are_independent():
    manager = optim.GlobalOptimManager.get_instance()
    a, b = param(), param()
    shared = {"lr": 0.5}
    manager.override_config([a, b], key_value_dict=shared)
    manager.override_config(a, "lr", 0.25)
    shared["lr"] = 1.0
    assert manager.pid2config == {id(a): {"lr": 0.25}, id(b): {"lr": 0.5}}


def test_numeric_overrides_act_at_once_and_share_calls(monkeypatch):
    calls = counted(monkeypatch)
    manager = optim.GlobalOptimManager.get_instance()
    a, b, c = param(), param(), param()
    optimizer = optim.Adam([a, b, c], lr=0.1, eps=0.0)
    optimizer.step()
    manager.override_config([b, c], key_value_dict={"lr": 0.0, "betas": (0.8, 0.9)})
    optimizer.step()
    assert calls == [3, 1, 2]
    assert torch.allclose(a.data, torch.full((8192,), 0.8))
    assert torch.allclose(b.data, torch.full((8192,), 0.9))
    assert torch.allclose(optimizer.state[b]["state1"], torch.full((8192,), 0.8 * 0.05 + 0.2 * 0.5))
    manager.override_config(b, "betas", [0.8, 0.9])
    optimizer.step()
    manager.override_config(c, key_value_dict={"weight_decay": 0.0})
    optimizer.step()
    assert calls[3:] == [1, 2, 1, 1, 1]


def test_bits_overrides_stay_in_the_call_of_their_group(monkeypatch):
    calls = counted(monkeypatch)
    embedding = bnb.nn.Embedding(100, 64)
    embedding.weight.grad = torch.ones(100, 64)
    p = param()
    optimizer = optim.Adam8bit([embedding.weight, p])
    optimizer.step()
    assert calls == [2]
    assert (bits_of(optimizer, embedding.weight), bits_of(optimizer, p)) == (32, 8)


def test_a_parameter_override_beats_its_position():
    manager = optim.GlobalOptimManager.get_instance()
    a = param()
    manager.override_config(a, "optim_bits", 8)
    manager.register_parameters([a])
    manager.override_config(a, "optim_bits", 32)
    optimizer = optim.Adam([a], optim_bits=8)
    optimizer.step()
    assert bits_of(optimizer, a) == 32


@pytest.mark.parametrize("when", ["before", "late"])
def test_module_override_replaces_a_parameter_override(when):
    manager = optim.GlobalOptimManager.get_instance()
    module = nn.Linear(128, 64, bias=False)
    module.weight.grad = torch.ones(64, 128)
    optimizer = optim.Adam8bit(module.parameters(), lr=0.1) if when == "late" else None
    manager.override_config(module.weight, key_value_dict={"optim_bits": 8, "lr": 0.0})
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    optimizer = optimizer or optim.Adam8bit(module.parameters(), lr=0.1)
    before = module.weight.detach().clone()
    optimizer.step()
    assert bits_of(optimizer, module.weight) == 32
    assert torch.allclose(module.weight.data, before - 0.1)
    manager.override_config(module.weight, "lr", 0.0)
    optimizer.step()
    assert torch.allclose(module.weight.data, before - 0.1)


def test_overrides_that_reach_nothing_warn_once(caplog):
    manager = optim.GlobalOptimManager.get_instance()
    module, stray, frozen = nn.Linear(2, 2), param(), nn.Embedding(3, 4)
    frozen.weight.requires_grad_(False)
    manager.register_module_override(module, "wieght", {"optim_bits": 32})
    manager.register_module_override(frozen, "weight", {"optim_bits": 32})
    manager.override_config(stray, "lr", 0.5)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(2):
            optim.Adam([param()]).step()
    assert [record.name for record in caplog.records] == ["bitsandbytes.optim.manager"] * 2
    assert "Linear.wieght" in caplog.text
    assert "(8192,)" in caplog.text
    assert "Embedding" not in caplog.text


def test_ordinary_use_logs_nothing(caplog):
    manager = optim.GlobalOptimManager.get_instance()
    with caplog.at_level(logging.DEBUG, "bitsandbytes"):
        model = nn.Sequential(bnb.nn.StableEmbedding(50, 128), nn.Linear(128, 8))
        manager.register_parameters(model.parameters())
        manager.override_config(model[1].weight, "optim_bits", 32)
        optimizers = [optim.AdamW8bit(layer.parameters()) for layer in model]
        model(torch.tensor([1, 2])).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert caplog.records == []
    manager.initialize()
    assert (manager.pid2config, manager.index2config, manager.module_weight_config_triple) == ({}, {}, [])
    assert manager.uses_config_override is False
    assert manager.optimizer is None
