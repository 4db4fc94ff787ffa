"""Optimizer state dicts: the layout written, every layout read, what is refused; copies and pickles of optimizers."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bitsandbytes.functional as F
from bitsandbytes import optim

NESTED = "__bnb_optimizer_quant_state__"
SHAPES = ((5000,), (100,), (64, 80), (20, 8, 3, 20))


def model(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)


def train(optimizer, steps, seed=0):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        set_gradients(params, seed + step)
        optimizer.step()
    return params


def trained(cls=optim.AdamW8bit, dtype=torch.float32, steps=3):
    optimizer = cls(model(dtype), lr=1e-2)
    train(optimizer, steps)
    return optimizer


def clone_of(optimizer):
    """A new optimizer of the same class over copies of the parameters, without state."""
    params = [nn.Parameter(p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    return type(optimizer)(params, lr=1e-2)


def flat(state_dict):
    """The layout of releases before 0.49.2."""
    state = {
        key: {**{k: v for k, v in entries.items() if k != NESTED}, **entries[NESTED]}
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def assert_goes_on_alike(a, b):
    for p, q in zip(train(a, 3, seed=50), train(b, 3, seed=50), strict=True):
        assert torch.equal(p.data, q.data)
        for key, value in a.state[p].items():
            same = torch.equal(value, b.state[q][key]) if isinstance(value, torch.Tensor) else value == b.state[q][key]
            assert same, key


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.Adam32bit])
def test_written_layout(cls):
    optimizer = trained(cls)
    written = optimizer.state_dict()
    assert list(written) == ["state", "param_groups"]
    assert list(written["state"]) == [0, 1, 2, 3]
    eight, small = written["state"][0], written["state"][1]
    assert list(eight) == list(small) == ["step", NESTED]
    assert type(eight["step"]) is int
    assert eight["step"] == 3
    names = {"state1", "state2"}
    assert set(small[NESTED]) == names
    if cls is optim.AdamW8bit:
        names |= {"qmap1", "qmap2", "absmax1", "absmax2"}
    assert set(eight[NESTED]) == names
    group = dict(written["param_groups"][0])
    assert group.pop("params") == [0, 1, 2, 3]
    assert set(group) == {"lr", "betas", "eps", "weight_decay", "alpha", "t_alpha", "t_beta3"}
    assert NESTED not in optimizer.state[optimizer.param_groups[0]["params"][0]]


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.Adam32bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["nested", "flat", "through a file", "tensor step", "not moved"])
def test_resume_is_exact(cls, dtype, layout):
    optimizer = trained(cls, dtype)
    saved, options = optimizer.state_dict(), {}
    if layout == "flat":
        saved = flat(saved)
    elif layout == "through a file":
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer)
    elif layout == "tensor step":
        saved = copy.deepcopy(saved)
        for entries in saved["state"].values():
            entries["step"] = torch.tensor(float(entries["step"]))
    elif layout == "not moved":
        options = {"move_to_device": False}
    resumed = clone_of(optimizer)
    resumed.load_state_dict(saved, **options)
    for p in resumed.param_groups[0]["params"]:
        assert type(resumed.state[p]["step"]) is int
        assert resumed.state[p]["state1"].dtype in (torch.float32, torch.uint8)
    assert_goes_on_alike(optimizer, resumed)


def test_loading_copies_and_leaves_the_dict_alone():
    optimizer = trained()
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    resumed = clone_of(optimizer)
    resumed.load_state_dict(saved)
    train(resumed, 2)
    for key, entries in before["state"].items():
        assert list(saved["state"][key]) == list(entries)
        for name, value in entries[NESTED].items():
            assert torch.equal(saved["state"][key][NESTED][name], value), name


def test_equal_maps_become_the_shared_ones():
    saved = copy.deepcopy(trained().state_dict())
    for entries in saved["state"].values():
        for name in ("qmap1", "qmap2"):
            if name in entries[NESTED]:
                entries[NESTED][name] = entries[NESTED][name].clone()
    resumed = optim.AdamW8bit(model())
    resumed.load_state_dict(saved)
    params = resumed.param_groups[0]["params"]
    fresh = nn.Parameter(torch.ones(5000))
    fresh.grad = torch.ones(5000)
    resumed.add_param_group({"params": [fresh]})
    resumed.step()
    for name in ("qmap1", "qmap2"):
        assert resumed.state[params[0]][name] is resumed.state[params[2]][name]
        assert resumed.state[params[0]][name] is resumed.state[fresh][name]


def test_foreign_maps_are_honoured():
    """A checkpoint's own map decodes its codes; parameters with it are updated apart from the others."""
    optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    inner = saved["state"][0][NESTED]
    values = F.dequantize_blockwise(inner["state1"], absmax=inner["absmax1"], code=inner["qmap1"], blocksize=256)
    linear = F.create_linear_map()
    inner["state1"], state = F.quantize_blockwise(values, code=linear, blocksize=256)
    inner["absmax1"], inner["qmap1"] = state.absmax, linear
    resumed = clone_of(optimizer)
    resumed.load_state_dict(saved)
    p, q = (each.param_groups[0]["params"] for each in (optimizer, resumed))
    assert torch.equal(resumed.state[q[0]]["qmap1"], linear)
    train(optimizer, 1)
    train(resumed, 1)
    assert torch.equal(resumed.state[q[0]]["qmap1"], linear)
    assert torch.allclose(p[0], q[0], atol=2e-3)
    assert not torch.equal(p[0], q[0])
    for i in (1, 2, 3):
        assert torch.equal(p[i], q[i])


def test_saved_state_decides_the_precision():
    saved = trained(optim.AdamW8bit).state_dict()
    resumed = optim.AdamW32bit(model(), lr=1e-2)
    resumed.load_state_dict(saved)
    params = train(resumed, 1)
    assert resumed.state[params[0]]["state1"].dtype == torch.uint8
    assert resumed.state[params[1]]["state1"].dtype == torch.float32


def test_groups_are_replaced_and_hooks_run():
    optimizer = trained()
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(lr=0.125, betas=(0.5, 0.75), optim_bits=32)
    resumed, events = clone_of(optimizer), []
    resumed.register_load_state_dict_pre_hook(lambda *_: events.append("before"))
    resumed.register_load_state_dict_post_hook(lambda *_: events.append("after"))
    params = resumed.param_groups[0]["params"]
    resumed.load_state_dict(saved)
    group = resumed.param_groups[0]
    assert (group["lr"], group["betas"], group["optim_bits"]) == (0.125, (0.5, 0.75), 32)
    assert all(a is b for a, b in zip(group["params"], params, strict=True))
    assert events == ["before", "after"]


def test_a_fresh_optimizer_has_an_empty_state_dict():
    saved = optim.AdamW8bit(model()).state_dict()
    assert saved["state"] == {}
    resumed = trained()
    resumed.load_state_dict(saved)
    assert not resumed.state
    train(resumed, 1)


# ---------------------------------------------------------------- older scales


def test_blocks_of_2048_become_blocks_of_256():
    optimizer = optim.AdamW8bit([nn.Parameter(torch.ones(5000))], lr=1e-2)
    train(optimizer, 3)
    saved = flat(optimizer.state_dict())
    entries = saved["state"][0]
    values = {}
    for i in "12":
        code, scales = entries["qmap" + i], entries["absmax" + i]
        values[i] = F.dequantize_blockwise(entries["state" + i], absmax=scales, code=code, blocksize=256)
        entries["state" + i], state = F.quantize_blockwise(values[i], code=code, blocksize=2048)
        entries["absmax" + i] = state.absmax
        values[i] = F.dequantize_blockwise(entries["state" + i], state)
        assert state.absmax.numel() == 3
    resumed = clone_of(optimizer)
    resumed.load_state_dict(saved)
    state = resumed.state[resumed.param_groups[0]["params"][0]]
    for i in "12":
        assert state["absmax" + i].shape == (20,)
        code, scales = state["qmap" + i], state["absmax" + i]
        got = F.dequantize_blockwise(state["state" + i], absmax=scales, code=code, blocksize=256)
        bound = scales.repeat_interleave(256)[:5000] * 0.0072  # half of the map's widest gap is 0.00703
        assert ((got - values[i]).abs() <= bound).all()
    train(resumed, 1)


def test_one_scale_per_tensor_becomes_one_per_block():
    p = nn.Parameter(torch.ones(5000))
    codes = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    signed, unsigned = F.create_dynamic_map(), F.create_dynamic_map(signed=False)
    entries = {"step": 7, "state1": codes, "state2": codes.flip(0), "qmap1": signed, "qmap2": unsigned}
    for name, value in (("max1", 0.5), ("max2", 0.25), ("new_max1", 0.0), ("new_max2", 0.0)):
        entries[name] = torch.tensor([value])
    optimizer = optim.AdamW8bit([p])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: entries}, "param_groups": groups})
    state = optimizer.state[p]
    assert set(state) == {"step", "state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}
    assert torch.equal(state["absmax1"], torch.full((20,), 0.5))
    assert torch.equal(state["absmax2"], torch.full((20,), 0.25))
    assert torch.equal(state["state1"], codes)
    train(optimizer, 1)
    assert state["step"] == 8


def test_wide_unsigned_map_is_decoded_with_its_first_256_entries():
    optimizer = optim.AdamW8bit([nn.Parameter(torch.ones(5000))], lr=1e-2)
    train(optimizer, 3)
    saved = optimizer.state_dict()
    inner = saved["state"][0][NESTED]
    old = torch.linspace(0, 0.0933, 256)
    inner["qmap2"] = torch.cat([old, torch.linspace(0.0934, 1, 268)])
    values = F.dequantize_blockwise(inner["state2"], absmax=inner["absmax2"], code=old, blocksize=256)
    resumed = clone_of(optimizer)
    resumed.load_state_dict(saved)
    state = resumed.state[resumed.param_groups[0]["params"][0]]
    assert torch.equal(state["qmap2"], F.create_dynamic_map(signed=False))
    got = F.dequantize_blockwise(state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
    assert torch.allclose(got, values, rtol=0.06, atol=1e-7)
    train(resumed, 1)


# ---------------------------------------------------------------- what does not fit

INNER_ERRORS = [
    ("state1", lambda t: t[:-1]), ("state1", lambda t: t.half()), ("state1", lambda t: None),
    ("state1", lambda t: t.tolist()), ("state2", lambda t: t[1:]), ("state2", lambda t: None),
    ("state2", lambda t: t.float()), ("absmax1", lambda t: t[:-1]), ("absmax1", lambda t: None),
    ("absmax1", lambda t: t.double()), ("absmax2", lambda t: t.reshape(1, -1)), ("absmax2", lambda t: t.repeat(2)),
    ("qmap1", lambda t: None), ("qmap1", lambda t: t[:128]), ("qmap1", lambda t: t.repeat(2)),
    ("qmap2", lambda t: t[:255]), ("qmap2", lambda t: t.half()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), INNER_ERRORS)
def test_unfit_state_is_refused_and_changes_nothing(name, change):
    optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2][NESTED][name] = change(saved["state"][2][NESTED][name])
    resumed = trained(steps=1)
    before = copy.deepcopy(resumed.state_dict())
    with pytest.raises(ValueError, match=rf"state 2: .*({name}|states differ).*expected"):
        resumed.load_state_dict(saved)
    for key, entries in before["state"].items():
        for inner, value in entries[NESTED].items():
            assert torch.equal(resumed.state_dict()["state"][key][NESTED][inner], value)


@pytest.mark.parametrize("step", [None, -1, 1.5, "3", True, torch.tensor([1, 2]), torch.tensor(-1), float("nan")])
def test_unfit_steps(step):
    saved = trained().state_dict()
    saved["state"][1]["step"] = step
    with pytest.raises(ValueError, match=r"state 1: step is .* expected an integer"):
        trained().load_state_dict(saved)


def test_unfit_groups():
    saved = trained().state_dict()
    with pytest.raises(ValueError, match=r"2 parameter groups, expected 1"):
        trained().load_state_dict({**saved, "param_groups": saved["param_groups"] * 2})
    with pytest.raises(ValueError, match=r"group 0 has 4 parameters, expected 3"):
        optim.AdamW8bit(model()[:3]).load_state_dict(saved)
    for key in ("state", "param_groups"):
        with pytest.raises(ValueError, match=f"no key '{key}'"):
            trained().load_state_dict({name: value for name, value in saved.items() if name != key})


def test_state_of_another_optimizer():
    other = torch.optim.AdamW(model())
    train(other, 1)
    with pytest.raises(ValueError, match="state1"):
        trained().load_state_dict(other.state_dict())


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.PagedAdam8bit, optim.Adam32bit])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("scheduled", [False, True])
def test_copies_and_pickles_go_on_alike(cls, how, scheduled):
    optimizer = trained(cls)
    if scheduled:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    twin = how(optimizer)
    assert type(twin) is cls
    assert vars(twin.args) == vars(optimizer.args)
    assert (twin.optimizer_name, twin.is_paged, twin.optim_bits) == ("adam", optimizer.is_paged, optimizer.optim_bits)
    assert twin.mng is optimizer.mng
    a, b = optimizer.param_groups[0]["params"][0], twin.param_groups[0]["params"][0]
    assert a is not b
    assert_goes_on_alike(optimizer, twin)


def test_a_copy_gives_new_parameters_its_maps():
    twin = copy.deepcopy(trained())
    fresh = nn.Parameter(torch.ones(5000))
    fresh.grad = torch.ones(5000)
    twin.add_param_group({"params": [fresh]})
    twin.step()
    assert twin.state[fresh]["qmap1"] is twin.state[twin.param_groups[0]["params"][0]]["qmap1"]


def test_channels_last_state_keeps_its_order():
    """Blocks of 8-bit state follow the order in memory, so a copy must keep the strides."""
    p = nn.Parameter(torch.randn(16, 32, 3, 5).to(memory_format=torch.channels_last))
    optimizer = optim.AdamW8bit([p], lr=1e-2)
    train(optimizer, 2)
    resumed = optim.AdamW8bit([nn.Parameter(p.detach().clone())], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    state = resumed.state[resumed.param_groups[0]["params"][0]]
    assert state["state1"].stride() == optimizer.state[p]["state1"].stride() == p.stride()
    assert_goes_on_alike(optimizer, resumed)
