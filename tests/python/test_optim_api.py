"""Optimizer classes: signatures, errors, settings, state, steps. Checkpoints, overrides: test_optim_*.py."""

import inspect
import logging
import types

import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import optim
from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State, Optimizer8bit

ADAMS = ("Adam", "Adam8bit", "Adam32bit", "PagedAdam", "PagedAdam8bit", "PagedAdam32bit")
ADAMWS = tuple(name.replace("Adam", "AdamW") for name in ADAMS)
CLASSES = ADAMS + ADAMWS
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


# ---------------------------------------------------------------- signatures and errors


def test_base_signatures_and_hierarchy():
    two = "optimizer_name params lr betas eps weight_decay optim_bits args min_8bit_size max_unorm skip_zeros is_paged"
    assert list(inspect.signature(Optimizer1State).parameters) == [*two.split(), "options"]
    names = [*two.split(), "alpha", "t_alpha", "t_beta3", "options"]
    assert list(inspect.signature(Optimizer2State).parameters) == names
    assert list(inspect.signature(Optimizer8bit).parameters) == ["params", "defaults", "optim_bits", "is_paged"]
    assert issubclass(optim.Adam, Optimizer2State)
    assert issubclass(Optimizer2State, Optimizer8bit)
    assert issubclass(Optimizer1State, Optimizer8bit)
    assert issubclass(Optimizer8bit, torch.optim.Optimizer)
    for name in CLASSES:
        assert "bitsandbytes" in str(getattr(optim, name))
        assert getattr(optim, name).__name__ == name
    assert optim.optimizer.GlobalOptimManager is optim.GlobalOptimManager
    assert bnb.optim is optim


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.tensor(-1.0)}, "lr is -1"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"betas": (1.0, 0.999)}, r"betas\[0\] is 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] is -0.1"),
        ({"betas": (0.9, float("nan"))}, r"betas\[1\] is nan"),
        ({"betas": (0.9,)}, "betas is"),
        ({"betas": "(0.9; 0.999)"}, "betas is"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
    ],
)
def test_constructor_refuses(name, options, text):
    with pytest.raises(ValueError, match=rf"{text}.*expected"):
        getattr(optim, name)([param()], **options)


@pytest.mark.parametrize("name", CLASSES)
def test_amsgrad_raises(name):
    error = ValueError if name.endswith("8bit") else NotImplementedError
    with pytest.raises(error, match=f"{name}: amsgrad is True"):
        getattr(optim, name)([param()], amsgrad=True)


@pytest.mark.parametrize("name", CLASSES)
def test_forced_bits(name):
    cls, p = getattr(optim, name), param()
    if name.endswith("8bit"):
        with pytest.raises(ValueError, match="optim_bits is 8"):
            cls([p], optim_bits=8)
        optimizer, expected = cls([p]), 8
    elif name.endswith("32bit"):
        optimizer, expected = cls([p], optim_bits=8), 32
    else:
        optimizer, expected = cls([p], optim_bits=8), 8
    assert optimizer.args.optim_bits == optimizer.optim_bits == expected
    optimizer.step()
    assert bits_of(optimizer, p) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_legacy_options(name):
    cls = getattr(optim, name)
    with pytest.raises(ValueError, match="percentile_clipping is 101"):
        cls([param()], percentile_clipping=101)
    with pytest.raises(ValueError, match=r"percentile_clipping is 2\.5"):
        cls([{"params": [param()], "percentile_clipping": 2.5}]).step()
    assert cls([param()], percentile_clipping=5).param_groups[0]["percentile_clipping"] == 5
    with pytest.warns(FutureWarning, match="block_wise=False") as caught:
        cls([param()], block_wise=False)
    assert caught[0].filename == __file__
    with pytest.raises(TypeError):
        cls([param()], fused=True)


def test_bits_other_than_8_and_32():
    optimizer = optim.Adam([param()], optim_bits=4)
    with pytest.raises(NotImplementedError, match="optim_bits is 4"):
        optimizer.step()


def test_betas_as_a_string():
    a, b = param(), param()
    optim_a, optim_b = Optimizer2State("adam", [a], betas="(0.8, 0.9)"), Optimizer2State("adam", [b], betas=(0.8, 0.9))
    optim_a.step()
    optim_b.step()
    assert torch.equal(optim_a.state[a]["state2"], optim_b.state[b]["state2"])


def test_unknown_row():
    with pytest.raises(ValueError, match="sgdx"):
        Optimizer2State("sgdx", [param()]).step()


# ---------------------------------------------------------------- settings


def test_args_replace_constructor_values():
    args = types.SimpleNamespace(optim_bits=8, min_8bit_size=0, max_unorm=0.0, skip_zeros=False)
    small = param(10)
    optimizer = optim.Adam32bit([small], args=args)
    optimizer.step()
    assert bits_of(optimizer, small) == 8
    assert optimizer.args is args
    incomplete = optim.Adam([param()], args=types.SimpleNamespace(optim_bits=8))
    with pytest.raises(AttributeError, match="min_8bit_size"):
        incomplete.step()


def test_group_values_of_bits_and_size():
    a, b, c, d = param(), param(), param(100), param(100)
    groups = [{"params": [a], "optim_bits": 32}, {"params": [b]}, {"params": [c], "min_8bit_size": 100}]
    optimizer = optim.AdamW(groups, optim_bits=8)
    optimizer.add_param_group({"params": [d], "min_8bit_size": 101})
    optimizer.step()
    assert [bits_of(optimizer, p) for p in (a, b, c, d)] == [32, 8, 8, 32]


def test_group_values_of_skip_zeros_and_max_unorm():
    frozen, moved = param(300, grad=0.0), param(300, grad=0.0)
    groups = [{"params": [frozen], "skip_zeros": True}, {"params": [moved]}]
    optim.AdamW(groups, lr=0.1, weight_decay=0.5).step()
    assert torch.equal(frozen.data, torch.ones(300))
    assert torch.allclose(moved.data, torch.full((300,), 0.95))
    bounded, free = param(), param()
    optim.AdamW([{"params": [bounded], "max_unorm": 0.5}, {"params": [free]}], lr=0.1, weight_decay=0.0).step()
    assert torch.allclose(bounded.data, torch.full_like(bounded, 0.95))
    assert torch.allclose(free.data, torch.full_like(free, 0.9))


@pytest.mark.parametrize("bits", [8, 32])
def test_learning_rates_as_numbers_tensors_and_schedules(bits):
    a, b, c = param(), param(), param()
    first, second = optim.Adam([a], 0.125, optim_bits=bits), optim.Adam([b], torch.tensor(0.125), optim_bits=bits)
    first.step()
    second.step()
    assert torch.equal(a.data, b.data)
    scheduled = optim.Adam([c], 0.125, optim_bits=bits)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda epoch: 0.0 if epoch else 1.0)
    scheduled.step()
    assert torch.equal(a.data, c.data)
    scheduler.step()
    c.grad.fill_(0.25)
    scheduled.step()
    assert torch.equal(a.data, c.data)
    assert scheduled.state[c]["step"] == 2
    scheduled.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr is -1"):
        scheduled.step()
    assert scheduled.state[c]["step"] == 2


# ---------------------------------------------------------------- state and step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_state_layout(dtype):
    p, small, shaped = (nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((8193,), (4095,), (64, 65)))
    for each in (p, small, shaped):
        each.grad = torch.ones_like(each)
    optimizer = optim.AdamW8bit([p, small, shaped])
    optimizer.step()
    state = optimizer.state[p]
    assert list(state) == ["step", "state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"]
    assert type(state["step"]) is int
    assert state["step"] == 1
    for i in "12":
        assert (state["state" + i].dtype, state["state" + i].shape) == (torch.uint8, p.shape)
        assert (state["absmax" + i].dtype, state["absmax" + i].shape) == (torch.float32, (33,))
        assert state["qmap" + i] is optimizer.state[shaped]["qmap" + i]
    assert torch.equal(state["qmap1"], bnb.functional.create_dynamic_map(signed=True))
    assert torch.equal(state["qmap2"], bnb.functional.create_dynamic_map(signed=False))
    assert list(optimizer.state[small]) == ["step", "state1", "state2"]
    assert (optimizer.state[small]["state1"].dtype, bits_of(optimizer, small)) == (torch.float32, 32)
    assert optimizer.state[shaped]["state1"].shape == (64, 65)


def test_one_call_per_group(monkeypatch):
    calls = counted(monkeypatch)
    first, second = [param(), param(10), param()], [param(), param(grad=None)]
    optimizer = optim.AdamW8bit([{"params": first}, {"params": second}])
    optimizer.step()
    assert calls == [3, 1]


def test_steps_count_only_gradients():
    a, b = param(), param(grad=None)
    optimizer = optim.Adam8bit([a, b])
    optimizer.step()
    assert b not in optimizer.state or not optimizer.state[b]
    b.grad = torch.ones_like(b)
    optimizer.step()
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (2, 1)


def test_nothing_to_do():
    optimizer = optim.Adam8bit([param(grad=None), nn.Parameter(torch.empty(0))])
    assert optimizer.step() is None
    optimizer.param_groups[0]["params"][1].grad = torch.empty(0)
    optimizer.step()


def test_closure_runs_with_gradients_and_its_value_is_returned():
    p = param(grad=None)
    optimizer = optim.Adam8bit([p], lr=0.1)
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert seen == [True]
    assert loss.item() == 8192
    assert torch.allclose(p.data, torch.full((8192,), 0.9))


def test_a_failed_call_changes_nothing():
    a, b = param(), param()
    optimizer = optim.Adam8bit([a, b])
    optimizer.step()
    before = a.data.clone()
    optimizer.state[b]["absmax1"] = torch.zeros(5)
    with pytest.raises(ValueError, match="absmax1"):
        optimizer.step()
    assert torch.equal(a.data, before)
    assert (optimizer.state[a]["step"], optimizer.state[b]["step"]) == (1, 1)


@pytest.mark.parametrize("bits", [8, 32])
def test_sparse_gradients_raise(bits):
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optim.Adam([embedding.weight], optim_bits=bits).step()
    assert torch.equal(embedding.weight, before)


def test_gradient_clipping_scaler_and_hooks_see_an_ordinary_optimizer():
    p = param()
    optimizer = optim.AdamW8bit([p])
    events = []
    optimizer.register_step_pre_hook(lambda *_: events.append("before"))
    optimizer.register_step_post_hook(lambda *_: events.append("after"))
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    optimizer.step()
    assert events == ["before", "after"]


@pytest.mark.parametrize("name", [name for name in CLASSES if "Paged" in name] + ["Adam", "AdamW8bit"])
def test_paged_names_warn_once_on_the_cpu(name, caplog):
    options = {} if "Paged" in name else {"is_paged": True}
    a, b, plain = param(200_000), param(), param(200_000)
    optimizer = getattr(optim, name)([a, b], **options)
    reference = getattr(optim, name.replace("Paged", ""))([plain])
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(2):
            optimizer.step()
    assert [record.name for record in caplog.records] == ["bitsandbytes.optim.optimizer"]
    assert "paged" in caplog.text
    assert optimizer.is_paged
    for _ in range(2):
        reference.step()
    assert torch.equal(a.data, plain.data)
