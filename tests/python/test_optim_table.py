"""Steps with a table: the same bits as the operator that takes lists, whatever happens between two steps.

Every case runs twice, once with tables and once without, from the same numbers.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from bitsandbytes import optim
from bitsandbytes.optim import calls
from table_cases import give, has_table, make, parameters, tables

CLASSES = ["Adam", "AdamW", "AdEMAMix", "Lion", "LAMB", "LARS", "SGD", "RMSprop", "Adagrad"]
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_every_device = pytest.mark.parametrize("device", DEVICES)
ops = torch.ops.bitsandbytes


@pytest.fixture(autouse=True)
def _no_settings():
    optim.GlobalOptimManager.get_instance().initialize()


def content(optimizer):
    """Every number of parameters and state."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            found += [p.detach(), *(state[key] for key in sorted(state))]
    return [torch.as_tensor(each).clone() for each in found]


def compare(script, monkeypatch):
    """script() gives a list of numbers: run it with tables and without. It says itself where it expects one."""
    got = script(True)
    monkeypatch.setattr(calls.Call, "_wants_table", lambda call: False)
    expected = script(False)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@on_every_device
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "options", [{}, {"capturable": True}, {"percentile_clipping": 5}, {"stochastic_rounding": True, "seed": 3}], ids=str
)
def test_twenty_steps(monkeypatch, name, bits, options, device):
    def script(with_table):
        params = parameters(device)
        optimizer = make(name, params, bits, **options)
        for t in range(20):
            give(params, t)
            optimizer.step()
            optimizer.zero_grad(set_to_none=t % 2 == 0)
        assert has_table(optimizer) == with_table
        return content(optimizer)

    compare(script, monkeypatch)


def test_the_first_step_makes_no_table_and_the_second_one_does():
    params = parameters()
    optimizer = make("AdamW", params)
    for t, expected in enumerate([False, True, True]):
        give(params, t)
        optimizer.step()
        assert has_table(optimizer) == expected
    first = tables(optimizer)[0]
    give(params, 3)
    optimizer.step()
    assert tables(optimizer) == [first]


def run(change, steps=9, at=4, name="AdamW", device="cpu", **options):
    """A script that calls change(optimizer, params) before step `at`; it may return what replaces both."""

    def script(with_table):
        params = parameters(device)
        optimizer = make(name, params, **options)
        for t in range(steps):
            if t == at:
                optimizer, params = change(optimizer, params) or (optimizer, params)
            give(params, t)
            optimizer.step()
        assert has_table(optimizer) == with_table
        return content(optimizer)

    return script


def _reassign(optimizer, params):
    for p in params:
        p.data = p.data.clone() + 1


def _reassign_state(optimizer, params):
    for p in params:
        optimizer.state[p]["state1"].data = optimizer.state[p]["state1"].data.clone()


def _replace_state(optimizer, params):
    state = optimizer.state[params[0]]
    last = "absmax2" if "absmax2" in state else "absmax1"
    state["state1"], state[last] = torch.zeros_like(state["state1"]), state[last] * 2


def _replace_dict(optimizer, params):
    optimizer.state[params[1]] = {key: copy.deepcopy(value) for key, value in optimizer.state[params[1]].items()}


def _count_anew(optimizer, params):
    optimizer.state[params[2]]["step"] = 0


def _load(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _add_group(optimizer, params):
    added = nn.Parameter(torch.ones(300, device=params[0].device))
    optimizer.add_param_group({"params": [added], "min_8bit_size": 256, "lr": 0.5})
    params.append(added)


def _another_dtype(optimizer, params):
    for p in params:
        p.grad = None
        p.data = p.data.to(torch.float16)


def _reinterpret(optimizer, params):
    """The same addresses, another dtype."""
    for p in params:
        if p.dtype == torch.bfloat16:
            p.grad = None
            p.data = p.data.view(torch.float16)


def _transpose(optimizer, params):
    """The same addresses and sizes, another order; the state stays as it is."""
    params[1].grad = None
    params[1].data = params[1].data[:, :9].clone()
    params[1].data = params[1].data.t().contiguous().t()


def _deepcopy(optimizer, params):
    copied = copy.deepcopy(optimizer)
    assert tables(copied) == []
    return copied, [p for group in copied.param_groups for p in group["params"]]


def _pickle(optimizer, params):
    copied = pickle.loads(pickle.dumps(optimizer))
    assert tables(copied) == []
    return copied, [p for group in copied.param_groups for p in group["params"]]


def _override(optimizer, params):
    optimizer.mng.override_config(params[1], "lr", 0.25)


def _more_options(optimizer, params):
    for group in optimizer.param_groups:
        group.update(max_unorm=0.5, percentile_clipping=50, weight_decay=0.5, lr=0.1)


CHANGES = [
    _reassign,
    _reassign_state,
    _replace_state,
    _replace_dict,
    _count_anew,
    _load,
    _add_group,
    _another_dtype,
    _reinterpret,
    _transpose,
    _deepcopy,
    _pickle,
    _override,
    _more_options,
]


@on_every_device
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["AdamW", "Adagrad"])
def test_what_happens_between_two_steps(monkeypatch, change, name, device):
    def script(with_table):
        expected = with_table and change is not _transpose  # such a layout has no table
        return run(change, name=name, device=device)(expected)

    compare(script, monkeypatch)


@on_cuda
@pytest.mark.parametrize("there", ["cpu", "cuda"])
def test_another_device(monkeypatch, there):
    def change(optimizer, params):
        for p in params:
            p.grad = None
            p.data = p.data.to(there)
        optim.checkpoint.move_state(optimizer)

    compare(run(change, device="cuda" if there == "cpu" else "cpu"), monkeypatch)


@on_cuda
def test_a_captured_step_with_a_table(monkeypatch):
    """Gradients stay where they are, so a replay is a step; every count is on the device."""

    def script(with_table):
        params = parameters("cuda")
        optimizer = make("AdamW", params, capturable=True)
        give(params, 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        assert has_table(optimizer) == with_table
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(4):
            graph.replay()
        optimizer.step()
        assert optimizer.state[params[0]]["step"].item() == 8
        return content(optimizer)

    compare(script, monkeypatch)


@on_cuda
def test_another_stream():
    """The step runs on the stream of the caller, not on the one that the table was made on."""
    params = parameters("cuda")
    optimizer, side = make("AdamW", params), torch.cuda.Stream()
    expected = parameters("cuda")
    other = make("AdamW", expected)
    for t in range(6):
        for given, each in ((params, optimizer), (expected, other)):
            give(given, t)
            torch.cuda.synchronize()
            with torch.cuda.stream(side if each is optimizer and t > 2 else torch.cuda.current_stream()):
                each.step()
            torch.cuda.synchronize()
    assert has_table(optimizer)
    assert all(map(torch.equal, content(optimizer), content(other)))


def test_gradients_come_and_go(monkeypatch):
    def script(with_table):
        params = parameters()
        optimizer = make("AdamW", params)
        for t in range(24):
            give(params, t, skip=[(), (), (), (1, 2), (1, 2), (1, 2), (0,), ()][t % 8])
            optimizer.step()
        give(params, 99)
        optimizer.step()
        give(params, 100)
        optimizer.step()
        assert has_table(optimizer) == with_table
        return content(optimizer)

    compare(script, monkeypatch)


def test_gradients_are_found_in_usual_training(monkeypatch):
    """From the third step on Python need not collect them; in steps where one is missing, it does."""
    params = parameters()
    optimizer = make("AdamW", params)
    ready, collected = [], []
    is_ready, gradients = calls._Table.is_ready, calls.Call._gradients
    monkeypatch.setattr(calls._Table, "is_ready", lambda table: ready.append(is_ready(table)) or ready[-1])
    monkeypatch.setattr(calls.Call, "_gradients", lambda call, n=None: collected.append(n) or gradients(call, n))
    for t in range(6):
        give(params, t, skip=(3,) if t == 4 else ())
        optimizer.step()
    assert ready == [True, True, False]  # steps 2, 3 and 4; step 5 follows one with another plan
    assert collected == [1, 1]


@pytest.mark.parametrize("set_to_none", [False, True])
def test_training(monkeypatch, set_to_none):
    """Gradients as autograd makes them, accumulated in place or anew."""

    def script(with_table):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))
        optimizer = make("AdamW", model.parameters())
        for _ in range(12):
            for _ in range(2):
                model(torch.randn(4, 20)).pow(2).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        assert has_table(optimizer) == with_table
        return content(optimizer)

    compare(script, monkeypatch)


def test_gradients_of_another_layout(monkeypatch):
    """Not contiguous in one step: no table then, and one again later."""

    def script(with_table):
        params = parameters()
        optimizer = make("AdamW", params)
        for t in range(12):
            give(params, t)
            if t in (4, 5, 8):
                params[1].grad = params[1].grad.t().contiguous().t()
            optimizer.step()
        assert has_table(optimizer) == with_table
        return content(optimizer)

    compare(script, monkeypatch)


def test_lazy_copies_do_not_follow():
    """A copy that torch makes when one of two is written: of a parameter and of a state."""
    params = parameters()
    optimizer = make("AdamW", params)
    for t in range(3):
        give(params, t)
        optimizer.step()
    originals = [params[1].detach(), optimizer.state[params[1]]["state1"]]
    kept = [t.clone() for t in originals]
    lazy = [torch._lazy_clone(t) for t in originals]
    for t in (3, 4, 5):
        give(params, t)
        optimizer.step()
    assert all(map(torch.equal, lazy, kept))
    assert not any(map(torch.equal, [params[1].detach(), optimizer.state[params[1]]["state1"]], kept))


def test_two_optimizers_over_one_parameter(monkeypatch):
    def script(with_table):
        params = parameters()
        first, second = make("AdamW", params), make("Lion", params)
        for t in range(8):
            give(params, t)
            first.step()
            second.step()
        assert has_table(first) == has_table(second) == with_table
        return content(first) + content(second)

    compare(script, monkeypatch)


def test_a_parameter_that_always_moves_gets_no_table_any_more(monkeypatch):
    made = []
    original = calls._Table

    def spy(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(calls, "_Table", spy)
    params = parameters()
    optimizer = make("AdamW", params)
    for t in range(20):
        held = [p.data for p in params]  # keeps the addresses from being used again
        for p in params:
            p.data = p.data.clone()
        give(params, t)
        optimizer.step()
        del held
    assert len(made) == calls._CHANCES


def test_modes():
    """Inside inference mode and with gradients enabled, on ordinary parameters; and on a fresh thread's defaults."""
    results = []
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        params = parameters()
        optimizer = make("AdamW", params)
        for t in range(5):
            give(params, t)
            with mode() if t > 2 else torch.no_grad():
                optimizer.step()
        assert has_table(optimizer)
        results.append(content(optimizer))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_under_a_dispatch_mode_the_lists_travel():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    params = parameters()
    optimizer = make("AdamW", params)
    for t in range(4):
        give(params, t)
        optimizer.step()
    give(params, 4)
    with Mode():
        optimizer.step()
    assert "bitsandbytes._optimizer_step.default" in seen
    assert not any("_optimizer_run" in each or "_optimizer_table" in each for each in seen)
