"""Learning rates and steps as tensors, and stochastic rounding of 16-bit parameters."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import bitsandbytes.optim as optim
import optim_cases as cases
import oracle
import oracle_optim as ref

HALF = ["f16", "bf16"]


def steps_of(optimizer, p, dtype, count, first=1):
    for t in range(first, first + count):
        p.grad = cases.Gradients(p.numel(), dtype, 3)(p.numel(), t)
        optimizer.step()


def state_tensors(optimizer, p):
    return {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and k != "step"}


def assert_same(a, p, b, q):
    assert torch.equal(p.data, q.data)
    one, two = state_tensors(a, p), state_tensors(b, q)
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key], two[key]), key


# ---- learning rate and step


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_learning_rate_as_a_tensor(dtype, family, bits):
    """The same as its value, which is float32's, and it may change from step to step."""
    s = replace(cases.FAMILY[family], lr=2.0**-7)
    p, q = cases.parameter(1000, dtype, 1), cases.parameter(1000, dtype, 1)
    rate = torch.tensor(s.lr)
    a, b = cases.build(family, [p], s, bits), cases.build(family, [q], s, bits)
    b.param_groups[0]["lr"] = rate
    for t in (1, 2, 3):
        steps_of(a, p, dtype, 1, t)
        steps_of(b, q, dtype, 1, t)
        a.param_groups[0]["lr"] /= 2
        rate /= 2
    assert b.param_groups[0]["lr"] is rate
    assert_same(a, p, b, q)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_learning_rate_tensor_in_the_constructor(kind):
    p, q = cases.parameter(100, "f32", 1), cases.parameter(100, "f32", 1)
    rate = torch.tensor(0.001, dtype=kind)
    a, b = optim.AdamW8bit([p], lr=rate, min_8bit_size=0), optim.AdamW8bit([q], lr=rate.item(), min_8bit_size=0)
    steps_of(a, p, "f32", 3)
    steps_of(b, q, "f32", 3)
    assert_same(a, p, b, q)


def test_negative_learning_rate_tensor():
    p = cases.parameter(100, "f32", 1)
    optimizer = optim.Lion([p], lr=torch.tensor(0.1))
    optimizer.param_groups[0]["lr"].fill_(-1.0)
    p.grad = torch.ones(100)
    before = p.data.clone()
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert torch.equal(p.data, before)


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_capturable(dtype, family, bits):
    """step is a 0-dim float32 tensor; numbers are those of int steps."""
    s = cases.FAMILY[family]
    p, q = cases.parameter(1000, dtype, 1), cases.parameter(1000, dtype, 1)
    a, b = cases.build(family, [p], s, bits), cases.build(family, [q], s, bits, capturable=True)
    steps_of(a, p, dtype, 5)
    steps_of(b, q, dtype, 5)
    step = b.state[q]["step"]
    assert type(a.state[p]["step"]) is int and a.state[p]["step"] == 5
    assert isinstance(step, torch.Tensor) and step.shape == () and step.dtype == torch.float32 and step == 5
    assert_same(a, p, b, q)


@pytest.mark.parametrize("bits", [8, 32])
def test_capturable_keeps_one_step_tensor(bits):
    """The tensor is counted up in place, so that a captured graph sees it."""
    p = cases.parameter(500, "f32", 1)
    optimizer = cases.build("AdamW", [p], cases.FAMILY["AdamW"], bits, capturable=True)
    steps_of(optimizer, p, "f32", 1)
    step = optimizer.state[p]["step"]
    steps_of(optimizer, p, "f32", 2, 2)
    assert optimizer.state[p]["step"] is step and step == 3


@pytest.mark.parametrize("family", ["AdamW", "AdEMAMix", "Lion", "LAMB"])
@pytest.mark.parametrize("capturable", [False, True])
def test_schedulers(family, capturable):
    """Any torch scheduler drives a learning rate that is a number or a tensor, capturable or not."""
    s = replace(cases.FAMILY[family], lr=0.5)
    p, q = cases.parameter(700, "bf16", 1), cases.parameter(700, "bf16", 1)
    a, b = cases.build(family, [p], s, 8), cases.build(family, [q], s, 8, capturable=capturable)
    b.param_groups[0]["lr"] = torch.tensor(0.5)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 2, 0.25) for o in (a, b)]
    for t in range(1, 7):
        steps_of(a, p, "bf16", 1, t)
        steps_of(b, q, "bf16", 1, t)
        for scheduler in schedulers:
            scheduler.step()
    assert isinstance(b.param_groups[0]["lr"], torch.Tensor)
    assert float(b.param_groups[0]["lr"]) == a.param_groups[0]["lr"] == 0.5 * 0.25**3
    assert_same(a, p, b, q)


@pytest.mark.parametrize("bits", [8, 32])
def test_int_steps_may_be_tensors(bits):
    """A state loaded with a tensor step goes on as one with an int does."""
    p, q = cases.parameter(700, "f32", 1), cases.parameter(700, "f32", 1)
    a, b = (cases.build("AdEMAMix", [x], cases.FAMILY["AdEMAMix"], bits) for x in (p, q))
    steps_of(a, p, "f32", 2)
    steps_of(b, q, "f32", 2)
    saved = b.state_dict()
    saved["state"][0]["step"] = torch.tensor(2.0)
    b.load_state_dict(saved)
    steps_of(a, p, "f32", 2, 3)
    steps_of(b, q, "f32", 2, 3)
    assert a.state[p]["step"] == b.state[q]["step"] == 4
    assert_same(a, p, b, q)


# ---- stochastic rounding


def one_step(family, bits, dtype, n=40_000, t=1, **options):
    """p before and after one step, and the fp32 value that was rounded: three float32 arrays."""
    s = cases.FAMILY[family]
    p = cases.parameter(n, dtype, 1)
    optimizer = cases.build(family, [p], s, bits, stochastic_rounding=True, **options)
    for i in range(1, t + 1):
        before = cases.Snapshot(optimizer, p, s.row)
        p.grad = cases.Gradients(n, dtype, 3)(n, i)
        optimizer.step()
    g = oracle.from_torch(p.grad)
    states = before.packed().values() if before.bits == 8 else before.states
    exact, _, _ = ref.update(before.p, g, states, t, s, "f32", bits)
    return before.p, oracle.from_torch(p.data), exact


def neighbours(x, dtype):
    """The values of dtype at and below x, and at and above."""
    near = oracle.rounded(x, dtype)
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    tensor = torch.from_numpy(near.copy()).to(kind)
    down = oracle.from_torch(torch.nextafter(tensor, torch.full_like(tensor, -torch.inf)))
    up = oracle.from_torch(torch.nextafter(tensor, torch.full_like(tensor, torch.inf)))
    return np.where(near <= x, near, down), np.where(near >= x, near, up)


@pytest.mark.parametrize("family, bits", cases.BOTH)
@pytest.mark.parametrize("dtype", HALF)
def test_rounds_to_a_neighbour_without_bias(dtype, family, bits):
    _, got, exact = one_step(family, bits, dtype)
    low, high = (x.astype(np.float64) for x in neighbours(exact, dtype))
    got, exact = got.astype(np.float64), exact.astype(np.float64)
    between = high > low
    slack = np.where(between, 2.0**-22 * np.abs(exact), 0)  # the value itself may be an ulp of fp32 off
    beside = (got == low) | (got == high) | (np.minimum(exact - low, high - exact) <= slack)
    assert np.all(beside), np.flatnonzero(~beside)[:5]
    assert between.mean() > 0.9
    share = (exact - low)[between] / (high - low)[between]  # the probability of rounding up
    up = (got == high)[between]
    sigma = np.sqrt(np.sum(share * (1 - share)))
    assert sigma > 20
    assert abs(np.sum(up - share)) < 5 * sigma
    for low_share in np.linspace(0, 0.9, 10):  # and in every tenth of the way
        part = (share >= low_share) & (share < low_share + 0.1)
        sigma = np.sqrt(np.sum((share * (1 - share))[part])) + 1
        assert abs(np.sum((up - share)[part])) < 5 * sigma, low_share


@pytest.mark.parametrize("dtype", HALF)
def test_no_correlation_between_elements(dtype):
    """Deviations of neighbours, and of elements a block or a vector apart, are independent."""
    _, got, exact = one_step("SGD", 32, dtype)
    low, high = neighbours(exact, dtype)
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.where(high > low, (got - exact) / (high - low), 0).astype(np.float64)
    variance = np.mean(deviation**2)
    for distance in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 4096):
        product = deviation[distance:] * deviation[:-distance]
        assert abs(np.mean(product)) < 5 * variance / np.sqrt(product.size), distance


@pytest.mark.parametrize("family, bits", cases.BOTH)
@pytest.mark.parametrize("dtype", HALF)
def test_reproducible(dtype, family, bits):
    """From seed and step: equal for equal, different for another seed; independent of threads and of company."""
    one, again = one_step(family, bits, dtype, 5000, 2)[1], one_step(family, bits, dtype, 5000, 2)[1]
    assert np.array_equal(one, again)
    other = one_step(family, bits, dtype, 5000, 2, seed=1)[1]
    assert np.mean(one != other) > 0.05
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    assert np.array_equal(one_step(family, bits, dtype, 5000, 2)[1], one)
    torch.set_num_threads(before)


def lion_pattern(count, seed=0, steps=1, n=20_000):
    """Which elements were rounded up, per step and parameter: p is put back before each step."""
    params = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for _ in range(count)]
    optimizer = optim.Lion(params, lr=2.0**-10, weight_decay=0.0, stochastic_rounding=True, seed=seed)
    found = []
    for _ in range(steps):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append([(p.data == 1).numpy() for p in params])
    return found  # 1 - 2^-10 lies a quarter of the way from 1 down to 1 - 2^-8


def test_steps_parameters_and_seeds_differ():
    patterns = [pattern for step in lion_pattern(2, steps=3) for pattern in step] + lion_pattern(1, seed=5)[0]
    for i, one in enumerate(patterns):
        assert abs(one.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / one.size)
        for other in patterns[:i]:
            same = np.mean(one == other)  # 0.75^2 + 0.25^2 of independent ones
            assert abs(same - 0.625) < 5 * np.sqrt(0.625 * 0.375 / one.size)


@pytest.mark.parametrize("dtype", HALF)
def test_values_of_the_dtype_stay(dtype):
    """What needs no rounding is not moved: every finite value, with a learning rate of 0; non-finite ones as well."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view({"f16": torch.float16, "bf16": torch.bfloat16}[dtype])
    p = torch.nn.Parameter(every.clone())
    optimizer = optim.SGD([p], lr=0.0, momentum=0.9, stochastic_rounding=True)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(torch.isnan(p), torch.isnan(every))
    assert torch.equal(p.data.nan_to_num(), every.nan_to_num())


@pytest.mark.parametrize("bits", [8, 32])
def test_small_steps_add_up(bits):
    """bf16: a step of a sixteenth of the spacing is lost by rounding to nearest, and is not by this."""
    ends = {}
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        options = {"lr": 2.0**-12, "weight_decay": 0.0, "min_8bit_size": 0, "optim_bits": bits}
        optimizer = optim.Lion([p], **options, stochastic_rounding=stochastic)
        for _ in range(64):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[stochastic] = p.data.double().mean().item()
    assert ends[False] == 1.0
    assert abs(ends[True] - (1 - 64 * 2.0**-12)) < 1e-4


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_off_by_default_and_without_effect_on_f32(dtype, family, bits):
    s = cases.FAMILY[family]
    p, q = cases.parameter(3000, dtype, 1), cases.parameter(3000, dtype, 1)
    a, b = cases.build(family, [p], s, bits), cases.build(family, [q], s, bits, stochastic_rounding=True)
    steps_of(a, p, dtype, 1)
    steps_of(b, q, dtype, 1)
    assert torch.equal(p.data, q.data) == (dtype == "f32")
    one, two = state_tensors(a, p), state_tensors(b, q)
    assert all(torch.equal(one[key], two[key]) for key in one), "states do not depend on how p is rounded"
    again = cases.parameter(3000, dtype, 1)
    off = cases.build(family, [again], s, bits, stochastic_rounding=False)
    steps_of(off, again, dtype, 1)
    assert torch.equal(again.data, p.data)
    assert "stochastic_rounding" not in a.param_groups[0]
