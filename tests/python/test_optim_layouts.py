"""State dicts of sharded runs, and further checks of what is read, in one process."""

import copy

import pytest
import torch
from torch import nn

from bitsandbytes import optim
from bitsandbytes.optim import checkpoint, layouts, scales, sharding

NESTED = "__bnb_optimizer_quant_state__"


def trained(shape=(40, 120), steps=3, memory_format=torch.contiguous_format, cls=optim.AdamW8bit):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator).to(memory_format=memory_format))
    optimizer = cls([p], lr=1e-2)
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=generator).to(memory_format=memory_format)
        optimizer.step()
    return p, optimizer


def fresh(p, rows=0):
    q = nn.Parameter(p.detach().clone())
    optimizer = (optim.AdEMAMix8bit if rows else optim.AdamW8bit)([q], lr=1e-2)
    return q, optimizer


def load(optimizer, entries, **group):
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {0: entries}, "param_groups": [{**groups[0], **group}]})
    return optimizer.state[optimizer.param_groups[0]["params"][0]]


def assert_equal(got, want):
    assert set(got) == set(want)
    for key, value in want.items():
        assert torch.equal(got[key], value) if isinstance(value, torch.Tensor) else got[key] == value, key


# ---------------------------------------------------------------- scales by runs


@pytest.mark.parametrize("shape", [(40, 120), (5003,), (20, 256), (3, 5, 384), (7, 1000), (1, 4096), (16, 2, 3, 64)])
def test_scales_by_runs_and_back(shape):
    """Every element finds its own scale, along whichever dimension the state may be cut."""
    n = torch.Size(shape).numel()
    absmax = torch.arange(1.0, 1 + scales.blocks(n))
    per_element = absmax.repeat_interleave(256)[:n].reshape(shape)
    for depth in range(len(shape)):
        runs = scales.to_runs(absmax, shape, depth)
        assert scales.is_runs(runs.shape, shape)
        assert runs.shape[: depth + 1] == shape[: depth + 1]
        assert torch.equal(scales.from_runs(runs, shape), per_element)
        start = shape[0] // 3
        assert torch.equal(scales.from_runs(runs[start:], (shape[0] - start, *shape[1:])), per_element[start:])


def test_runs_of_nothing():
    for shape, depth in (((0, 300), 0), ((4, 0), 1), ((0,), 0)):
        runs = scales.to_runs(torch.zeros(0), shape, depth)
        assert runs.numel() == 0
        assert scales.from_runs(runs, shape).shape == shape


@pytest.mark.parametrize("cut", [256 * 4, 256 * 4 + 100])
def test_blocks_that_keep_their_scale_keep_their_codes(cut):
    p, optimizer = trained((4800,))
    state = optimizer.state[p]
    qmap, absmax, codes = state["qmap1"], state["absmax1"], state["state1"]
    per_element = scales.spread(absmax, codes)
    values = qmap[codes.long()] * per_element
    part, found = scales.regroup(codes[cut:].clone(), per_element[cut:].contiguous(), qmap, qmap)
    got = qmap[part.long()] * found.repeat_interleave(256)[: part.numel()]
    if cut % 256 == 0:
        assert torch.equal(part, codes[cut:])
        assert torch.equal(found, absmax[cut // 256 :])
    else:
        bound = found.repeat_interleave(256)[: part.numel()] * 0.0071  # half of the map's widest gap
        assert ((got - values[cut:]).abs() <= bound).all()
        assert not torch.equal(got, values[cut:])


def test_blocks_beside_a_cut_one_are_not_touched():
    """Codes that do not reach their scale would change if they were quantised again."""
    qmap = fresh(torch.ones(1))[1]._shared_maps(torch.ones(1))[0]
    codes = torch.randint(40, 200, (1000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    per_element = torch.ones(1000)
    per_element[256 + 100 :] = 0.5
    got, absmax = scales.regroup(codes.clone(), per_element, qmap, qmap)
    for block in (slice(0, 256), slice(512, 1000)):
        assert torch.equal(got[block], codes[block])
    assert torch.equal(absmax[[0, 2, 3]], torch.tensor([1, 0.5, 0.5]))
    cut = slice(256, 512)
    values, want = qmap[got[cut].long()] * absmax[1], qmap[codes[cut].long()] * per_element[cut]
    assert absmax[1] == want.abs().max()
    assert ((values - want).abs() <= 0.0071 * absmax[1]).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_runs_are_read_into_plain_parameters(memory_format):
    """Gathered state of a sharded run; where memory order differs, blocks are made anew in that of the parameter."""
    p, optimizer = trained((16, 32, 3, 4))
    state = dict(optimizer.state[p])
    for i in (1, 2):
        state[f"absmax{i}"] = scales.to_runs(state[f"absmax{i}"], p.shape, 0)
    q, resumed = fresh(p.detach().to(memory_format=memory_format))
    got = load(resumed, state)
    if memory_format == torch.contiguous_format:
        assert_equal(got, optimizer.state[p])
        return
    assert got["state1"].stride() == q.stride() != p.stride()
    for i in (1, 2):
        want = optimizer.state[p]
        want = want[f"qmap{i}"][want[f"state{i}"].long()] * scales.spread(want[f"absmax{i}"], want[f"state{i}"])
        per_element = scales.spread(got[f"absmax{i}"], got[f"state{i}"])
        values = got[f"qmap{i}"][got[f"state{i}"].long()] * per_element
        assert ((values - want).abs() <= 0.0071 * per_element).all()


@pytest.mark.parametrize("bad", [(40, 8), (40, 120, 2), (41, 15), (2, 19), (40,)])
def test_unfit_runs_are_refused(bad):
    p, optimizer = trained()
    state = {**optimizer.state[p], "absmax1": torch.ones(bad)}
    with pytest.raises(ValueError, match=r"state 0: absmax1 has shape .* expected \[19\]"):
        load(fresh(p)[1], state)


# ---------------------------------------------------------------- the layout for FSDP1


def flattened(p):
    p._fsdp_flattened = True  # as FSDP1 marks what it manages
    return p


@pytest.mark.parametrize("cls", [optim.AdamW8bit, optim.AdamW32bit])
def test_layout_for_fsdp1(cls):
    p, optimizer = trained((5003,), cls=cls)
    flattened(p)
    entries = optimizer.state_dict()["state"][0]
    tensors = {key: value for key, value in entries.items() if isinstance(value, torch.Tensor)}
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert {value.shape for value in tensors.values()} == {p.shape}
    if cls is optim.AdamW8bit:
        assert set(entries) == {"step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"}
        assert (entries["qmap1"], entries["qmap2"]) == (0, 1)
    else:
        assert set(entries) == {"step", "state1", "state2"}
    assert_equal(load(fresh(p)[1], entries), optimizer.state[p])
    assert_equal(load(fresh(flattened(nn.Parameter(p.detach())))[1], entries), optimizer.state[p])


def test_a_flattened_parameter_of_unknown_origin_counts_its_own_elements(caplog):
    p = flattened(nn.Parameter(torch.ones(5000)))
    assert sharding.whole_numel(p) == sharding.whole_numel(p) == 5000
    assert [record.getMessage()[:30] for record in caplog.records] == ["what FSDP flattened into a par"]


def test_small_state_beside_8_bit_state_has_scales_of_one():
    p, optimizer = trained((100,))
    entries = flattened(p) is p and optimizer.state_dict()["state"][0]
    assert set(entries) == {"step", "state1", "state2", "absmax1", "absmax2"}
    assert torch.equal(entries["absmax1"], torch.ones(100))
    assert_equal(load(fresh(p)[1], entries), optimizer.state[p])


def test_8_bit_state_of_a_32_bit_optimizer_is_written_decoded():
    p, optimizer = trained((5000,))
    resumed_p, resumed = fresh(p)
    resumed.args.optim_bits = 32
    state = load(resumed, optimizer.state_dict()["state"][0])
    flattened(resumed_p)
    entries = resumed.state_dict()["state"][0]
    assert set(entries) == {"step", "state1", "state2"}
    assert torch.equal(entries["state1"], state["qmap1"][state["state1"].long()] * scales.spread(state["absmax1"], p))


def test_foreign_maps_and_numbers_that_are_no_codes():
    p, optimizer = trained((5000,))
    optimizer.state[p]["qmap1"] = torch.linspace(-1, 1, 256)
    flattened(p)
    entries = optimizer.state_dict()["state"][0]
    assert len(entries["qmap1"]) == 256
    assert_equal(load(fresh(p)[1], entries), optimizer.state[p])
    for value in (0.5, -1.0, 256.0, float("nan")):
        spoilt = {**entries, "state1": entries["state1"].clone()}
        spoilt["state1"][7] = value
        with pytest.raises(ValueError, match=r"state 0: state1 .* expected integers in 0\.\.255"):
            load(fresh(p)[1], spoilt)


# ---------------------------------------------------------------- states of two rows


def two_rows(n, seed=0):
    """Entries as AdEMAMix has them: state1 [2, n] with absmax1 [2, B], state2 [n]."""
    generator = torch.Generator().manual_seed(seed)
    _, optimizer = fresh(torch.ones(n))
    maps, count = optimizer._shared_maps(torch.ones(1)), scales.blocks(n)
    return {
        "step": 4,
        "state1": torch.randint(0, 256, (2, n), generator=generator).to(torch.uint8),
        "qmap1": maps[0],
        "absmax1": torch.rand(2, count, generator=generator) + 0.1,
        "state2": torch.randint(0, 256, (n,), generator=generator).to(torch.uint8),
        "qmap2": maps[1],
        "absmax2": torch.rand(count, generator=generator) + 0.1,
    }


@pytest.mark.parametrize("layout", ["nested", "flat", "for FSDP1", "32-bit for FSDP1"])
def test_two_rows(layout):
    p = nn.Parameter(torch.ones(5000))
    entries = two_rows(5000)
    _, optimizer = fresh(p, rows=2)
    if layout.startswith("32"):
        optimizer.args.optim_bits = 32
        entries = {"step": 4, "state1": torch.randn(2, 5000), "state2": torch.rand(5000)}
    state = load(optimizer, entries)
    assert_equal(state, entries)
    if "FSDP1" in layout:
        flattened(optimizer.param_groups[0]["params"][0])
    written = optimizer.state_dict()["state"][0]
    if layout == "flat":
        written = {"step": written["step"], **written[NESTED]}
    elif "FSDP1" in layout:
        assert all(value.shape == p.shape for value in written.values() if isinstance(value, torch.Tensor))
        with pytest.raises(ValueError, match="state1_row1"):
            load(fresh(p, rows=2)[1], {**written, "state1_row1": written["state1_row1"][1:]})
        lacking = {key: value for key, value in written.items() if key != "state1_row1"}
        with pytest.raises(ValueError, match="state 0: state1 has shape"):
            load(fresh(p, rows=2)[1], lacking)
    assert_equal(load(fresh(p, rows=2)[1], written), entries)


def test_two_rows_keep_the_memory_format():
    p = torch.ones(4, 6, 5, 7).to(memory_format=torch.channels_last)
    state = sharding.new_state(p, torch.uint8, rows=2)
    assert state.shape == (2, *p.shape)
    assert state[0].stride() == state[1].stride() == p.stride()
    assert not state.any()
    assert state[1].data_ptr() - state[0].data_ptr() == p.numel()
    assert checkpoint.new_absmax(p, rows=2).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "change"),
    [("state1", lambda t: t[0]), ("state1", lambda t: t[:, 1:]), ("absmax1", lambda t: t.reshape(-1)),
     ("absmax1", lambda t: t[:1]), ("absmax1", lambda t: t[:, 1:])],
)  # fmt: skip
def test_unfit_rows(name, change):
    entries = two_rows(5000)
    with pytest.raises(ValueError, match=rf"state 0: {name} .*expected"):
        load(fresh(torch.ones(5000), rows=2)[1], {**entries, name: change(entries[name])})


@pytest.mark.parametrize("n", [5000, 4097, 5120])
@pytest.mark.parametrize("case", ["CUDA", "own", "own with a block of zeros"])
def test_scales_that_cuda_stored_one_slot_early(n, case):
    """The slow average's scales began in the last slot of the fast one's, and the last slot stayed 0."""
    entries = two_rows(n)
    count, true = scales.blocks(n), entries["absmax1"].clone()
    if case == "CUDA" and n % 256:
        slots = torch.zeros(2 * count)
        slots[:count], slots[count - 1 : -1] = true[0], true[1]
        entries["absmax1"] = slots.reshape(2, count)
        true[0, -1] = true[1, 0]  # one slot held both
    elif case.endswith("zeros"):
        true[:, -1] = 0
        entries["state1"][:, (count - 1) * 256 :] = 127
        entries["absmax1"] = true.clone()
    assert torch.equal(load(fresh(torch.ones(n), rows=2)[1], entries)["absmax1"], true)


# ---------------------------------------------------------------- norms, steps, groups


@pytest.mark.parametrize(("name", "length"), [("gnorm_vec", 100), ("unorm_vec", 1)])
def test_norms_are_kept_and_checked(name, length):
    p, optimizer = trained()
    entries = {"step": 3, **optimizer.state_dict()["state"][0][NESTED]}
    assert torch.equal(load(fresh(p)[1], {**entries, name: torch.ones(length)})[name], torch.ones(length))
    for bad in (torch.ones(length + 1), torch.ones(length).double(), torch.ones(1, length)):
        with pytest.raises(ValueError, match=rf"state 0: {name} .*expected torch.float32 \[{length}\]"):
            load(fresh(p)[1], {**entries, name: bad})


@pytest.mark.parametrize("step", [3, torch.tensor(3), torch.tensor(3.0), torch.tensor([3])])
def test_step_is_a_tensor_where_the_group_is_capturable(step):
    p, optimizer = trained()
    entries = {"step": step, **optimizer.state_dict()["state"][0][NESTED]}
    assert type(load(fresh(p)[1], entries)["step"]) is int
    got = load(fresh(p)[1], entries, capturable=True)["step"]
    assert got.dtype == torch.float32
    assert got.shape == ()
    assert got == 3
    _, own = fresh(p)
    own.param_groups[0]["capturable"] = True
    groups = optimizer.state_dict()["param_groups"]
    own.load_state_dict({"state": {0: entries}, "param_groups": groups})
    assert own.state[own.param_groups[0]["params"][0]]["step"].dtype == torch.float32


def test_options_that_the_checkpoint_lacks_stay():
    p, optimizer = trained()
    _, resumed = fresh(p)
    resumed.param_groups[0]["nesterov"] = True
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(lr=0.5, betas=[0.5, 0.75])  # lists: torch's state dict functions make them
    resumed.load_state_dict(saved)
    group = resumed.param_groups[0]
    assert (group["nesterov"], group["lr"], group["betas"]) == (True, 0.5, (0.5, 0.75))


def test_step_that_a_checkpoint_loaded_under_a_string():
    """torch.distributed.checkpoint fills tensors of state[0] in place and puts the number beside them, under "0"."""
    p, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"]["0"] = {"step": 77}
    _, resumed = fresh(p)
    resumed.load_state_dict(saved)
    assert [state["step"] for state in resumed.state.values()] == [77]


# ---------------------------------------------------------------- without torch.distributed


def test_plain_parameters_pass_through():
    p, g = nn.Parameter(torch.ones(4, 5)), torch.ones(4, 5)
    assert sharding.local(p) is p
    assert sharding.gradient(p, g) is g
    assert sharding.whole_numel(p) == 20
    assert sharding.piece(p) is None
    assert sharding.holder(p) is None
    assert not sharding.is_dtensor(p)
    sums = torch.ones(1, 2, dtype=torch.float64)
    assert sharding.reduce_sums([p], sums) is sums
    assert torch.equal(sums, torch.ones(1, 2, dtype=torch.float64))
    assert layouts.written(None, p, {"step": 1, "state1": g}) == {"step": 1, NESTED: {"state1": g}}
