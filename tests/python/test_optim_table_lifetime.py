"""What steps with a table leave behind: version counters, and nothing once the optimizer is gone."""

import gc
import weakref

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import optim
from table_cases import give, has_table, make, parameters, tables


@pytest.fixture(autouse=True)
def _no_settings():
    optim.GlobalOptimManager.get_instance().initialize()


# ---------------------------------------------------------------- version counters


def _stepped(p):
    """An optimizer over p that has its table, and a gradient."""
    optimizer = make("AdamW", [p])
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert has_table(optimizer)
    p.grad = torch.ones_like(p)
    return optimizer


def test_saved_tensors_notice_the_step():
    p = nn.Parameter(torch.ones(16, 16))
    optimizer = _stepped(p)
    x = torch.ones(16, 16, requires_grad=True)
    y = (x @ p).sum()
    version = p._version
    optimizer.step()
    assert p._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_int8_codes_follow_the_step():
    weight, x, state = nn.Parameter(torch.randn(32, 64)), torch.randn(4, 64), bnb.MatmulLtState()
    optimizer = _stepped(weight)
    state.is_training = False
    bnb.matmul(x, weight, state=state)
    before = state.SCB.clone()
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    optimizer.step()
    assert has_table(optimizer)
    bnb.matmul(x, weight, state=state)
    assert not torch.equal(state.SCB, before)
    assert torch.equal(state.CB, bnb.functional.int8_vectorwise_quant(weight.detach().half())[0])


# ---------------------------------------------------------------- lifetime


def _holds(optimizer):
    """Does the library hold the parameters?"""
    return [table.params == [] for table in tables(optimizer)]


def _trained(params, **options):
    optimizer = make("AdamW", params, **options)
    for t in range(3):
        give(params, t)
        optimizer.step()
    assert has_table(optimizer)
    return optimizer


def test_parameters_that_lead_nowhere_are_held_until_a_full_collection():
    params = parameters()
    params[0]._is_hf_initialized = True
    optimizer = _trained(params)
    assert _holds(optimizer) == [True]
    gc.collect(0)
    assert has_table(optimizer)
    gc.collect()
    assert tables(optimizer) == [None]
    give(params, 3)
    optimizer.step()
    assert _holds(optimizer) == [True]


@pytest.mark.parametrize("lead", ["hook", "late", "post", "attribute"])
def test_parameters_that_lead_to_the_optimizer_are_freed(lead):
    params = parameters()
    optimizer = _trained(params)
    if lead in ("hook", "late"):
        params[0].register_hook(lambda grad, optimizer=optimizer: grad)
    elif lead == "post":
        params[0].register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: None)
    else:
        params[0].owner = optimizer
    if lead != "late":
        gc.collect()
        for t in range(3, 6):
            give(params, t)
            optimizer.step()
        assert _holds(optimizer) == [False]
    if lead == "post":
        return  # torch hides what such a hook refers to from the garbage collector, with any optimizer
    gone = [weakref.ref(optimizer), weakref.ref(params[0]), weakref.ref(tables(optimizer)[0])]
    del optimizer, params
    gc.collect()
    assert [each() for each in gone] == [None] * 3


def test_memory_goes_with_the_optimizer():
    """Also where a hook of the parameter refers to the optimizer, so that only the garbage collector can end both."""
    params = parameters()
    optimizer = make("AdamW", params)
    for t in range(3):
        give(params, t)
        optimizer.step()
    assert has_table(optimizer)
    forgotten = weakref.ref(tables(optimizer)[0])
    params[0].register_hook(lambda grad, optimizer=optimizer: grad)
    gone = [weakref.ref(optimizer), weakref.ref(params[0]), weakref.ref(optimizer.state[params[0]]["state1"])]
    del optimizer, params
    gc.collect()
    assert [each() for each in (*gone, forgotten)] == [None] * 4
