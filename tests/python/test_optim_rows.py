"""Every optimizer class against the double oracle, and bit for bit against the fp32 one, with weight decay.

At each checked step both oracles start from what the library had before it, so that nothing accumulates: parameters
agree within the rounding of their dtype, dequantised states within absmax times half the gap of the map.
"""

import pytest
import torch

import bitsandbytes.functional as F
import bitsandbytes.optim as optim
import optim_cases as cases
import oracle

CHECKED = (1, 2, 10, 100)
LENGTHS = (1, 255, 256, 257, 4095, 4096, 4097)
MILLION = 10**6 + 3


@pytest.fixture(scope="module", params=["f32", "f16", "bf16"])
def shared(request):
    """(dtype, gradients for all lengths), made once."""
    return request.param, cases.Gradients(MILLION, request.param, 1)


def test_every_class_is_here():
    """The list is complete: whatever bitsandbytes.optim exports over the table is run below."""
    classes = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)}
    assert classes - {"GlobalOptimManager", "PytorchLARS"} == set(cases.class_names())


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_every_length(shared, family, bits):
    dtype, gradients = shared
    cases.follow(family, bits, cases.FAMILY[family], LENGTHS, dtype, 100, CHECKED, make=gradients)


@pytest.mark.large
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", cases.FAMILY)
def test_million(shared, family, bits):
    dtype, gradients = shared
    cases.follow(family, bits, cases.FAMILY[family], [MILLION], dtype, 100, CHECKED, make=gradients, twice=False)


@pytest.mark.parametrize("name, bits", [pair for pair in cases.class_bits() if pair[0] not in cases.FAMILY])
def test_other_forms(shared, name, bits):
    """*8bit, *32bit and Paged*: the row of their family, with the bits that their name says."""
    dtype, gradients = shared
    cases.follow(name, bits, cases.FAMILY[cases.class_names()[name]], LENGTHS, dtype, 100, CHECKED, make=gradients)


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_functional_equals_the_class(dtype, family, bits):
    """The public operators take every row; state1 of AdEMAMix is (2, n)."""
    s, n = cases.with_trust(family, 0.0), 1000
    p = cases.parameter(n, dtype, 3)
    mine = p.data.clone()
    optimizer = cases.build(family, [p], s, bits)
    shapes = [(2, n) if s.row == "ademamix" else (n,)] + [(n,)] * (s.row in ("adam", "lamb", "ademamix"))
    kind = torch.uint8 if bits == 8 else torch.float32
    states = [torch.zeros(shape, dtype=kind) for shape in shapes]
    absmax = [torch.zeros((*shape[:-1], 4)) for shape in shapes] if bits == 8 else []
    maps = [F.create_dynamic_map(), F.create_dynamic_map(signed=False)]
    if s.row in ("rmsprop", "adagrad"):
        maps.reverse()
    for t in range(1, 6):
        p.grad = oracle.to_torch(cases.gradient_values(n, dtype, t), dtype)
        optimizer.step()
        cases.functional_step(s, mine, p.grad, states, t, absmax, maps)
    assert torch.equal(p.data, mine)
    for i, state in enumerate(states, 1):
        assert torch.equal(optimizer.state[p][f"state{i}"], state)
        if bits == 8:
            assert torch.equal(optimizer.state[p][f"absmax{i}"], absmax[i - 1])


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_state_layout(family, bits):
    """Names, shapes, dtypes and maps of the state, and that nothing else is kept."""
    s = cases.with_trust(family, 0.0)
    p = torch.nn.Parameter(torch.ones(20, 30))
    p.grad = torch.ones(20, 30)
    optimizer = cases.build(family, [p], s, bits)
    optimizer.step()
    state, mixed, two = optimizer.state[p], s.row == "ademamix", s.row in ("adam", "lamb", "ademamix")
    names = ["state1", "qmap1", "absmax1"] + ["state2", "qmap2", "absmax2"] * two
    assert set(state) == {"step", *(name for name in names if bits == 8 or name.startswith("state"))}
    assert state["step"] == 1 and type(state["step"]) is int
    for i in range(1, 2 + two):
        first_of_mixed = mixed and i == 1
        assert state[f"state{i}"].shape == ((2, 20, 30) if first_of_mixed else (20, 30))
        assert state[f"state{i}"].dtype == (torch.uint8 if bits == 8 else torch.float32)
        if bits == 8:
            assert state[f"absmax{i}"].shape == ((2, 3) if first_of_mixed else (3,))
            signed = i == 1 and s.row not in ("rmsprop", "adagrad")
            assert torch.equal(state[f"qmap{i}"], F.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("family", ["RMSprop", "Adagrad"])
def test_signed_map_of_a_checkpoint(dtype, family):
    """A checkpoint may keep these non-negative states on the signed map: it is honoured."""
    s, n = cases.FAMILY[family], 1000
    p = cases.parameter(n, dtype, 4)
    optimizer = cases.build(family, [p], s, 8)
    p.grad = oracle.to_torch(cases.gradient_values(n, dtype, 1), dtype)
    optimizer.step()
    state = optimizer.state[p]
    state["qmap1"] = F.create_dynamic_map()
    state["state1"] = (state["state1"].int() // 2 + 127).to(torch.uint8)  # some non-negative values
    for t in (2, 3):
        before = cases.Snapshot(optimizer, p, s.row)
        p.grad = oracle.to_torch(cases.gradient_values(n, dtype, t), dtype)
        optimizer.step()
        after, g = cases.Snapshot(optimizer, p, s.row), oracle.from_torch(p.grad)
        cases.check_bits(before, after, g, t, s, dtype, f"{family} step {t}")
        assert int(state["state1"].min()) >= 127
