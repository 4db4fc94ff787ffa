"""The operators behind a table: _optimizer_table and _optimizer_run, and bnb_torch_forget() that ends one."""

import ctypes
import gc
import weakref

import pytest
import torch

import bitsandbytes as bnb

ops = torch.ops.bitsandbytes
SCALARS = (1e-2, 0.9, 0.999, 0.0, 0.0, 0.0, 0.0, 1e-8, 0.1, 0.0, False, False, True, True, False, 0)


def _lists(n=300):
    p, g, state1, state2 = (torch.ones(n) for _ in range(4))
    return ("adam", [p], [g], [state1], [state2], [], [], [], [], [])


NAMES = ("name", "p", "g", "state1", "state2", "absmax1", "absmax2", "qmaps", "steps", "unorm")


def _table(with_params=False, **changes):
    lists = dict(zip(NAMES, _lists(), strict=True)) | changes
    return lists, ops._optimizer_table(
        with_params, *lists.values(), None, None, None, [1] * len(lists["p"]), [], *SCALARS
    )


def _forget(number):
    bnb.cextension.lib.bnb_torch_forget(ctypes.c_int64(number))


def _run(number, p, g, step=(2,), seeds=()):
    return bnb._ops.call(ops._optimizer_run.default, number, p, g, None, None, None, list(step), list(seeds), *SCALARS)


def test_a_table_that_is_gone_is_refused():
    lists, number = _table()
    p, g = lists["p"], lists["g"]
    assert _run(number, p, g)
    _forget(number)
    for gone in (number, 0, -1, number + 1, number + (1 << 40), 2**63 - 1):
        before = p[0].clone()
        with pytest.raises(ValueError, match=f"table is {gone}, expected the number of one"):
            _run(gone, p, g)
        assert torch.equal(p[0], before)
    _forget(number)
    other = _table()[1]
    assert other != number
    _forget(other)


def _ready(number):
    return bnb.cextension.lib.bnb_torch_ready(ctypes.c_int64(number))


def _two(**changes):
    """A table of two parameters that it holds; they have gradients."""
    p = [torch.nn.Parameter(torch.ones(n)) for n in (300, 5)]
    for each in p:
        each.grad = torch.full_like(each, 0.5)
    lists = {"p": p, "g": [each.grad for each in p]}
    lists |= {key: [torch.zeros(300), torch.zeros(5)] for key in ("state1", "state2")}
    return p, *_table(True, **(lists | changes))


def test_gradients_that_the_parameters_have():
    """After bnb_torch_ready() one run does with the first gradient; it takes those of that moment."""
    p, lists, number = _two()
    before = [each.detach().clone() for each in p]
    assert not _run(number, [], [p[0].grad])  # nobody has asked
    assert _ready(number) == 1
    p[1].grad = None
    assert _ready(number) == 0
    assert not _run(number, [], [p[0].grad])
    assert all(map(torch.equal, before, p))
    p[1].grad = torch.full((5,), -2.0)
    assert _ready(number) == 1
    assert _run(number, [], [p[0].grad])
    assert torch.all(p[0] < 1) and torch.all(p[1] > 0.998)  # decayed, then up
    assert torch.allclose(lists["state1"][1], torch.tensor(-0.2), rtol=1e-6)
    assert not _run(number, [], [p[0].grad])  # once
    _forget(number)


@pytest.mark.parametrize(
    "gradient", [torch.ones(4), torch.ones(5).double(), torch.ones(10)[::2], torch.ones(5).to_sparse()], ids=str
)
def test_gradients_that_a_table_cannot_take(gradient):
    p, lists, number = _two()
    if gradient.shape == p[1].shape and gradient.dtype == p[1].dtype:
        p[1].grad = gradient
    else:
        p[1].data = torch.ones_like(gradient)
        p[1].grad = gradient
    assert _ready(number) == 0
    state = lists["state2"][0]
    assert not torch.any(state)
    _forget(number)


def test_tables_that_do_not_find_gradients():
    """The caller gave others than the parameters have; the table does not hold the parameters; there is none."""
    p, _, number = _two(g=[torch.ones(300), torch.ones(5)])
    assert _ready(number) == -1
    lists, other = _table(False)
    assert _ready(other) == -1
    for each in (number, other):
        _forget(each)
        assert _ready(each) == -1
    assert _ready(0) == -1


def test_a_moved_state_is_not_ready():
    _, lists, number = _two()
    lists["state1"][1].data = torch.zeros(5)
    assert _ready(number) == 0
    _forget(number)


def test_tensors_that_are_not_those_of_the_table():
    lists, number = _table()
    p, g = lists["p"], lists["g"]
    before = [t.clone() for t in (p[0], lists["state1"][0], lists["state2"][0])]
    bad_p = [p * 2, [p[0].clone()], [p[0][:299]], [p[0].view(torch.int32)]]
    bad_g = [[], g * 2, [torch.ones(299)], [torch.ones(300).half()], [torch.ones(600)[::2]]]
    for each in bad_p:
        assert not _run(number, each, g * len(each))
    for each in bad_g:
        assert not _run(number, p, each)
    state = lists["state1"][0]
    data = state.data
    for change in (data.clone(), data[:299], data.view(torch.int32)):
        state.data = change
        assert not _run(number, p, g)
    state.data = data
    assert all(map(torch.equal, before, (p[0], state, lists["state2"][0])))
    assert _run(number, p, g)
    _forget(number)


def test_bad_options_of_a_run():
    lists, number = _table()
    for options in ({"step": ()}, {"step": (1, 2)}, {"seeds": (1, 2)}):
        with pytest.raises(ValueError, match=r"has . entries, expected"):
            _run(number, lists["p"], lists["g"], **options)
    with pytest.raises(ValueError, match="step is 0, expected 1"):
        _run(number, lists["p"], lists["g"], step=(0,))
    assert torch.equal(lists["p"][0], torch.ones(300))
    _forget(number)


def test_lists_that_make_no_table():
    assert _table(state1=[torch.ones(600)[::2]])[1] == 0
    assert _table(p=[torch.ones(600)[::2]])[1] == 0
    with pytest.raises(RuntimeError, match=r"state1\[0\] has 299 elements"):
        _table(state1=[torch.ones(299)])
    twice = {
        name: [t, t] if name == "p" else [t, t.clone()] for name, (t, *_) in zip(NAMES[1:5], _lists()[1:5], strict=True)
    }
    with pytest.raises(RuntimeError, match="shares memory"):
        _table(**twice)
    with pytest.raises(RuntimeError, match="expected None"):
        ops._optimizer_table(False, *_lists(), torch.ones(1), None, None, [1], [], *SCALARS)


def test_a_table_holds_the_states_and_lets_them_go():
    lists, number = _table()
    tracked = weakref.ref(lists["state1"][0].untyped_storage())
    p, g = lists["p"], lists["g"]
    held = weakref.ref(p[0])
    lists.clear()
    gc.collect()
    assert _run(number, p, g), "the library keeps the states alive"
    p.clear()
    gc.collect()
    assert held() is None, "but not the parameters"
    _forget(number)
    assert tracked() is None


def test_a_table_that_holds_the_parameters():
    lists, number = _table(with_params=True)
    p, g = lists["p"], lists["g"]
    before = p[0].clone()
    for bad_p, bad_g in ((p, g), ([], g * 2), ([], [torch.ones(299)]), ([], [torch.ones(300).half()])):
        assert not _run(number, bad_p, bad_g)
    data = p[0].data
    for change in (data.clone(), data[:299], data.view(torch.int32)):
        p[0].data = change
        assert not _run(number, [], g)
    p[0].data = data
    assert torch.equal(p[0], before)
    assert _run(number, [], g)
    other, lists = lists, None
    expected, reference = _table()
    assert _run(reference, expected["p"], expected["g"])
    assert torch.equal(p[0], expected["p"][0])
    held = weakref.ref(p[0])
    p.clear()
    other.clear()
    gc.collect()
    assert held() is not None
    _forget(number)
    _forget(reference)
    gc.collect()
    assert held() is None
