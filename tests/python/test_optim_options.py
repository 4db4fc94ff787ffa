"""What every optimizer promises beyond its formula: zeros, non-finite gradients, empty and odd tensors, options, many
tensors in one call. NUMERICS rules 23, 25 and 26."""

import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bitsandbytes.functional as F
import bitsandbytes.optim as optim
import optim_cases as cases
import oracle
import oracle_optim as ref

FAMILIES = list(cases.FAMILY)
DECOUPLED = ("Adam", "AdamW", "AdEMAMix", "Lion", "LAMB")
BAD = {
    "nan": [np.nan],
    "inf": [np.inf],
    "-inf": [-np.inf],
    "square overflows": [3e38, -3e38],
    "all of them": [np.nan, np.inf, -np.inf],
}


def tensors_of(optimizer, p):
    return {key: value for key, value in optimizer.state[p].items() if isinstance(value, torch.Tensor)}


def assert_equal_states(a, p, b, q, what=""):
    assert torch.equal(p.data.nan_to_num(), q.data.nan_to_num()), what
    one, two = tensors_of(a, p), tensors_of(b, q)
    assert one.keys() == two.keys(), what
    for key in one:
        assert torch.equal(one[key], two[key]), (what, key)


# ---- zeros


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_skip_zeros(dtype, family, bits):
    """Elements whose raw gradient is 0 keep state and parameter, and are not decayed; the rest is as ever."""
    s = replace(cases.FAMILY[family], skip_zeros=True)
    make = cases.Gradients(3000, dtype, 2, zeros=0.3)
    cases.follow(family, bits, s, [1, 257, 3000], dtype, 5, make=make)


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_skip_zeros_leaves_the_parameter_alone(family, bits):
    p = cases.parameter(1000, "bf16", 1)
    s = replace(cases.FAMILY[family], skip_zeros=True, wd=0.5)
    optimizer = cases.build(family, [p], s, bits)
    for t in range(1, 5):
        before = p.data.clone()
        p.grad = oracle.to_torch(cases.gradient_values(1000, "bf16", t, zeros=0.5), "bf16")
        optimizer.step()
        zero = p.grad == 0
        assert torch.equal(p.data[zero], before[zero])
        assert (p.data != before).sum() > 0


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_zero_stays_zero(dtype, family, bits):
    """Elements that never get a gradient, without decay: p and state stay exactly as they are, for a hundred steps."""
    s = replace(cases.FAMILY[family], wd=0.0)
    start = cases.values(1000, dtype, 1)
    p = nn.Parameter(oracle.to_torch(start, dtype))
    optimizer = cases.build(family, [p], s, bits)
    silent = torch.arange(1000) % 3 == 0
    silent[256:512] = True  # a whole block
    for t in range(1, 101):
        g = oracle.to_torch(cases.gradient_values(1000, dtype, t), dtype)
        g[silent] = -0.0 if t % 2 else 0.0
        p.grad = g
        optimizer.step()
    assert torch.equal(p.data[silent], oracle.to_torch(start, dtype)[silent])
    assert (p.data[~silent] != oracle.to_torch(start, dtype)[~silent]).float().mean() > 0.5
    for value in cases.Snapshot(optimizer, p, s.row).values():
        assert np.all(value[silent.numpy()] == 0) and np.any(value != 0)


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_decay_of_silent_elements(family, bits):
    """Decoupled decay acts where there is no gradient; coupled decay is part of the gradient and acts there as well."""
    s = replace(cases.FAMILY[family], wd=0.5, lr=0.1)
    p = nn.Parameter(torch.ones(600))
    p.grad = torch.zeros(600)
    cases.build(family, [p], s, bits).step()
    if family in DECOUPLED:
        assert torch.all(p == np.float32(1 - 0.1 * 0.5))
    else:
        assert torch.all(p < 1)


# ---- non-finite gradients


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("family", FAMILIES)
def test_non_finite_8bit(dtype, family, case):
    """That element keeps p and loses its state; neighbours are as if its gradient were another; then it goes on."""
    s, n = replace(cases.FAMILY[family], max_unorm=0.0), 1500  # clipping would tie the neighbours to that element
    if case == "square overflows" and (dtype == "f16" or family in ("SGD", "LARS", "Lion")):
        return  # no f16 value, and no square
    bad = torch.zeros(n, dtype=torch.bool)
    bad[[0, 3, 255, 256, 700, 1499]] = True
    p, q = cases.parameter(n, dtype, 1), cases.parameter(n, dtype, 1)
    a, b = cases.build(family, [p], s, 8), cases.build(family, [q], s, 8)
    for t in range(1, 7):
        g = cases.Gradients(n, dtype, 4)(n, t).clone()
        if t in (2, 3, 5):
            before = p.data.clone()
            clean = g.clone()
            g[bad] = torch.tensor(np.resize(BAD[case], int(bad.sum())), dtype=torch.float32).to(g.dtype)
            p.grad, q.grad = g, clean
            a.step()
            b.step()
            assert torch.equal(p.data[bad], before[bad])
            for value in cases.Snapshot(a, p, s.row).values():
                assert np.all(value[bad.numpy()] == 0)
            if t == 2:  # from the same state: only blocks whose largest element was the bad one may differ
                assert torch.equal(p.data[~bad], q.data[~bad])
        else:
            p.grad = q.grad = g
            a.step()
            b.step()
        assert torch.isfinite(p).all()
        for key, value in tensors_of(a, p).items():
            if key.startswith("absmax"):
                assert torch.isfinite(value).all(), key
    snapshot = cases.Snapshot(a, p, s.row)
    assert all(np.any(value[bad.numpy()] != 0) for value in snapshot.values()), "the element takes part again"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_of_nan_8bit(family):
    """All gradients NaN: nothing moves, all state is zero, the step counts."""
    p = cases.parameter(700, "f32", 2)
    optimizer = cases.build(family, [p], cases.FAMILY[family], 8)
    p.grad = torch.ones(700)
    optimizer.step()
    before = p.data.clone()
    p.grad = torch.full((700,), torch.nan)
    optimizer.step()
    assert torch.equal(p.data, before)
    assert all(np.all(value == 0) for value in cases.Snapshot(optimizer, p, cases.FAMILY[family].row).values())
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_spreads_in_32_bits(dtype, family):
    """As in PyTorch: into its own element only."""
    s = replace(cases.FAMILY[family], max_unorm=0.0)
    p = cases.parameter(600, dtype, 2)
    optimizer = cases.build(family, [p], s, 32)
    p.grad = cases.Gradients(600, dtype, 4)(600, 1).clone()
    p.grad[33] = torch.nan
    optimizer.step()
    state = optimizer.state[p]["state1"].reshape(-1, 600)[0]
    assert torch.isnan(state).nonzero().flatten().tolist() == [33]
    assert torch.isnan(p).nonzero().flatten().tolist() == ([] if family == "Lion" else [33])


# ---- shapes, layouts, refusals


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_no_elements(family, bits):
    empty, other = nn.Parameter(torch.empty(0, 3)), cases.parameter(300, "f32", 1)
    optimizer = cases.build(family, [empty, other], cases.FAMILY[family], bits)
    empty.grad, other.grad = torch.empty(0, 3), torch.ones(300)
    before = other.data.clone()
    optimizer.step()
    optimizer.step()
    assert empty.shape == (0, 3)
    assert not torch.equal(other.data, before)
    alone = cases.build(family, [empty], cases.FAMILY[family], bits)
    alone.step()


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_sparse_gradient(family, bits):
    embedding = nn.Embedding(100, 64, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        cases.build(family, [embedding.weight], cases.FAMILY[family], bits).step()
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_dtypes_of_gradient_and_parameter_must_agree(family, bits):
    s = cases.with_trust(family, 0.0)
    shapes = [(2, 64) if s.row == "ademamix" else (64,)] + [(64,)] * (s.row in ("adam", "lamb", "ademamix"))
    states = [torch.zeros(shape, dtype=torch.uint8 if bits == 8 else torch.float32) for shape in shapes]
    absmax = [torch.zeros(*shape[:-1], 1) for shape in shapes] if bits == 8 else ()
    maps = [F.create_dynamic_map(), F.create_dynamic_map(signed=False)]
    for p, g in ((torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.float16, torch.float32)):
        parameter = torch.ones(64, dtype=p)
        with pytest.raises(ValueError, match="dtype"):
            cases.functional_step(s, parameter, torch.ones(64, dtype=g), states, 1, absmax, maps)
        assert torch.equal(parameter, torch.ones(64, dtype=p))


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["AdamW", "AdEMAMix", "Lion", "LAMB"])
def test_overlapping_parameters(family, bits):
    """Two parameters of one step that share elements: a clear error, and nothing is changed."""
    memory = torch.ones(8192)
    for first, second in ((memory[:5000], memory[4999:]), (memory[:64], memory[32:33]), (memory, memory)):
        a, b = nn.Parameter(first), nn.Parameter(second)
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
        with pytest.raises(ValueError, match=r"overlap|share|alias"):
            cases.build(family, [a, b], cases.FAMILY[family], bits).step()
        assert torch.all(memory == 1)


@pytest.mark.parametrize("bits", [8, 32])
def test_neighbours_in_one_memory(bits):
    """Views that only touch are fine: flat parameters are built so."""
    memory, plain = torch.ones(8192), torch.ones(8192)
    views = [nn.Parameter(memory[:5000]), nn.Parameter(memory[5000:])]
    apart = [nn.Parameter(plain[:5000].clone()), nn.Parameter(plain[5000:].clone())]
    for params in (views, apart):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        optim.AdamW(params, lr=0.1, optim_bits=bits).step()
    assert torch.equal(memory, torch.cat([p.data for p in apart]))


@pytest.mark.parametrize("bits", [8, 32])
def test_interleaved_views_of_one_memory(bits):
    """Views whose memory overlaps, but not their elements, as columns of one matrix; and one element too many."""
    for start in (64, 63):
        memory = torch.ones(128, 128)
        a, b = nn.Parameter(memory[:, :64]), nn.Parameter(memory[:, start:])
        a.grad, b.grad = torch.full_like(a, 0.5), torch.full_like(b, -0.5)
        optimizer = optim.AdamW([a, b], lr=0.1, weight_decay=0.0, optim_bits=bits)
        if start == 63:
            with pytest.raises(ValueError, match="shares memory"):
                optimizer.step()
            assert torch.all(memory == 1)
        else:
            optimizer.step()
            assert torch.allclose(memory[:, :64], torch.full((), 0.9))
            assert torch.allclose(memory[:, 64:], torch.full((), 1.1))


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_channels_last(dtype, family, bits):
    """Strides and memory stay; with gradient and state of the same layout, blocks run over the storage."""
    x = oracle.to_torch(cases.values(16 * 40 * 9, dtype, 1), dtype).reshape(16, 40, 3, 3)
    last = nn.Parameter(x.clone(memory_format=torch.channels_last))
    flat = nn.Parameter(last.detach().permute(0, 2, 3, 1).contiguous())
    assert not last.is_contiguous()
    stride, pointer, s = last.stride(), last.data_ptr(), cases.FAMILY[family]
    a, b = cases.build(family, [last], s, bits), cases.build(family, [flat], s, bits)
    for t in range(1, 4):
        g = cases.Gradients(x.numel(), dtype, 5)(x.numel(), t).reshape(x.shape)
        last.grad = g.clone(memory_format=torch.channels_last)
        flat.grad = last.grad.permute(0, 2, 3, 1).contiguous()
        a.step()
        b.step()
    assert last.stride() == stride and last.data_ptr() == pointer
    assert torch.equal(last.detach().permute(0, 2, 3, 1), flat.data)


# ---- many tensors


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_one_call_equals_one_call_each(dtype, family, bits):
    """Rule 26, bit for bit: shapes, counts of steps and absent gradients of all sorts."""
    shapes = ((5000,), (300, 20), (1,), (64, 64), (4095,), (4097,), (0,), (257, 3))
    s = cases.FAMILY[family]

    def params():
        made = [cases.parameter(int(np.prod(shape)), dtype, i) for i, shape in enumerate(shapes)]
        return [nn.Parameter(p.data.reshape(shape)) for p, shape in zip(made, shapes, strict=True)]

    together, single = params(), params()
    one, each = cases.build(family, together, s, bits), [cases.build(family, [p], s, bits) for p in single]
    for t in range(1, 6):
        for i, shape in enumerate(shapes):
            g = cases.Gradients(6000, dtype, t)(int(np.prod(shape)), t, i).reshape(shape)
            present = (i + t) % 4 != 3  # a parameter without a gradient is left out and keeps its own count
            together[i].grad = g if present else None
            single[i].grad = g if present else None
        one.step()
        for optimizer in each:
            optimizer.step()
    for i, optimizer in enumerate(each):
        assert one.state[together[i]].get("step") == optimizer.state[single[i]].get("step")
        assert_equal_states(one, together[i], optimizer, single[i], (family, bits, i))


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_dtypes_in_one_call(family, bits):
    """float32, float16 and bfloat16 parameters side by side."""
    s, kinds = cases.FAMILY[family], ("f32", "f16", "bf16")
    together, single = ([cases.parameter(3000, kind, 1) for kind in kinds] for _ in range(2))
    one, each = cases.build(family, together, s, bits), [cases.build(family, [p], s, bits) for p in single]
    for t in range(1, 4):
        for p, q, kind in zip(together, single, kinds, strict=True):
            p.grad = q.grad = cases.Gradients(3000, kind, 2)(3000, t)
        one.step()
        for optimizer in each:
            optimizer.step()
    for p, optimizer, q in zip(together, each, single, strict=True):
        assert_equal_states(one, p, optimizer, q, p.dtype)


def test_a_parameter_that_repeats_one_element():
    """An expanded tensor cannot be updated element by element."""
    p = nn.Parameter(torch.ones(1).expand(300))
    p.grad = torch.ones(300)
    with pytest.raises(ValueError, match="overlap"):
        optim.Lion([p]).step()


@pytest.mark.parametrize("bits", [8, 32])
def test_a_single_number(bits):
    p = nn.Parameter(torch.tensor(1.0))
    p.grad = torch.tensor(1.0)
    optimizer = optim.Lion([p], lr=0.5, optim_bits=bits, min_8bit_size=0)
    optimizer.step()
    assert p.shape == () and p.item() == 0.5 and optimizer.state[p]["state1"].shape == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_small_parameters_keep_32_bits(family):
    """min_8bit_size is strict; both kinds of state take part in one call."""
    small, large = cases.parameter(4095, "bf16", 1), cases.parameter(4096, "bf16", 2)
    optimizer = cases.build(family, [small, large], cases.FAMILY[family], 8, min_8bit_size=4096)
    for p in (small, large):
        p.grad = cases.Gradients(4096, "bf16", 3)(p.numel(), 1)
    optimizer.step()
    assert optimizer.state[small]["state1"].dtype == torch.float32
    assert optimizer.state[large]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("name", [name for name, family in cases.class_names().items() if family != "AdEMAMix"])
def test_args_replace_the_options(name):
    """optim_bits, min_8bit_size, max_unorm and skip_zeros of the object args, whatever the class says."""
    s = replace(cases.FAMILY[cases.class_names()[name]], max_unorm=0.01, skip_zeros=True)
    args = types.SimpleNamespace(optim_bits=8, min_8bit_size=100, max_unorm=0.01, skip_zeros=True)
    p = cases.parameter(500, "f32", 1)
    p.grad = torch.from_numpy(cases.gradient_values(500, "f32", 1, zeros=0.3))
    optimizer = cases.build(name, [p], replace(s, skip_zeros=False), 32, args=args, min_8bit_size=4096)
    optimizer.param_groups[0].pop("max_unorm", None)
    before = cases.Snapshot(optimizer, p, s.row)
    optimizer.step()
    after = cases.Snapshot(optimizer, p, s.row)
    assert after.bits == 8
    cases.check_bits(before, after, p.grad.numpy(), 1, s, "f32", name)
    assert optimizer.state[p]["unorm_vec"].item() > 0


def test_the_rows_of_the_library():
    """Every row of the oracle is a row of the library, with one state per tensor that the class keeps."""
    for row in ref.ROWS:
        p = torch.ones(300)
        states = [torch.zeros(2, 300) if row == "ademamix" else torch.zeros(300)]
        states += [torch.zeros(300)] * (row in ("adam", "lamb", "ademamix"))
        cases.functional_step(replace(ref.Settings(row=row), beta2=0.0, lr=0.1), p, torch.ones(300), states, 1)
        assert torch.all(p < 1), row
