"""Paged optimizers on CUDA: the bits of ordinary ones, bounded memory, no wait on the host, graphs, checkpoints."""

import copy
import gc
import io
import types
from dataclasses import replace

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
import optim_cases as cases
import oracle
from cuda_cases import check_same, needs_cuda, on_device

pytestmark = needs_cuda

SHAPES = [(300007,), (100000,), (64, 65), (3, 5), (512, 256), (99999,)]
LARGE = [True, True, False, False, True, False]
HELD = 200_000_000  # clock cycles: about a tenth of a second
PAGED = sorted(name for name in cases.class_names() if name.startswith("Paged"))
MODES = {
    "plain": ({}, {}),
    "capturable": ({}, {"capturable": True}),
    "trust": ({"max_unorm": 0.05}, {}),
    "percentile": ({}, {"percentile_clipping": 50}),
    "stochastic": ({}, {"stochastic_rounding": True, "seed": 7}),
    "everything": ({"max_unorm": 0.05}, {"capturable": True, "percentile_clipping": 50, "stochastic_rounding": True}),
}


def gradients(params, dtype, step):
    for i, p in enumerate(params):
        g = oracle.to_torch(cases.gradient_values(p.numel(), dtype, 7 * step + i), dtype)
        p.grad = on_device(g).view(p.shape)


def training(name, bits, dtype="bf16", mode="plain", pages=True, shapes=SHAPES, **more):
    changes, options = MODES[mode]
    s = replace(cases.FAMILY[cases.class_names()[name]], max_unorm=0.0)
    params = []
    for i, shape in enumerate(shapes):
        x = oracle.to_torch(cases.values(torch.Size(shape).numel(), dtype, i), dtype)
        params.append(torch.nn.Parameter(on_device(x).view(shape)))
    optimizer = cases.build(name, params, replace(s, **changes), bits, **(options | more))
    optimizer.is_paged = pages
    return optimizer, params


def check_equal(one, two, what=""):
    """Parameters and states of two (optimizer, params), bit for bit."""
    torch.cuda.synchronize()
    for i, (p, q) in enumerate(zip(one[1], two[1], strict=True)):
        check_same(p.data, q.data, f"{what} parameter {i}")
        a, b = one[0].state[p], two[0].state[q]
        assert a.keys() == b.keys()
        for key, value in b.items():
            if isinstance(value, torch.Tensor):
                check_same(a[key], value, f"{what} {key} of parameter {i}")


@pytest.mark.parametrize("pages", [0, 1, 1 << 20])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(("family", "bits"), cases.BOTH)
def test_every_family_steps_as_with_ordinary_state(family, bits, dtype, pages):
    one = training(family, bits, dtype, page_bytes=pages)
    two = training(family, bits, dtype, pages=False)
    for step in range(3):
        for optimizer, params in (one, two):
            gradients(params, dtype, step)
            optimizer.step()
    check_equal(one, two, family)
    assert [one[0].state[p]["state1"].device.type == "cpu" for p in one[1]] == LARGE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["AdamW", "AdEMAMix", "LAMB", "LARS", "Lion"])
def test_every_mode_steps_as_with_ordinary_state(family, mode):
    one = training(family, 8, "bf16", mode, page_bytes=1)
    two = training(family, 8, "bf16", mode, pages=False)
    for step in range(3):
        for optimizer, params in (one, two):
            gradients(params, "bf16", step)
            optimizer.step()
    check_equal(one, two, f"{family} {mode}")


@pytest.mark.parametrize("name", PAGED)
def test_the_states_of_paged_classes_are_page_locked(name):
    bits = 8 if name.endswith("8bit") else 32
    optimizer, params = training(name, bits)
    assert optimizer.is_paged
    gradients(params, "bf16", 0)
    optimizer.step()
    for p, large in zip(params, LARGE, strict=True):
        for key in ("state1", "state2"):
            state = optimizer.state[p].get(key)
            if state is not None:
                assert (getattr(state, "is_paged", False), state.is_pinned()) == (large, large)
                assert state.device.type == ("cpu" if large else "cuda")
        if large:
            assert optimizer.state[p]["state1"].page_deviceid == torch.cuda.current_device()
        assert all(t.is_cuda for k, t in optimizer.state[p].items() if k.startswith(("absmax", "qmap")))


def test_device_memory_is_bounded():
    """Neither between steps nor within one is more than the buffer, a quarter of the state, on the card."""
    shapes = [(4096, 4096), (1024, 4096), (4096, 1024)]
    states = 2 * 4 * sum(torch.Size(shape).numel() for shape in shapes)
    for pages, allowed in ((0, states // 4), (8 << 20, 8 << 20)):
        optimizer, params = training("AdamW", 32, shapes=shapes, page_bytes=pages)
        gradients(params, "bf16", 0)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before < 1 << 20
        assert torch.cuda.max_memory_allocated() - before < allowed + (1 << 20)
        del optimizer, params


def test_the_memory_is_freed_with_the_optimizer(monkeypatch):
    gc.collect()  # what tests before this one left
    freed = []
    free = bnb.cextension.lib.bnb_pages_free

    def count(ordinal, address):
        freed.append(address.value)
        return free(ordinal, address)

    monkeypatch.setattr(bnb.cextension.lib, "bnb_pages_free", count)
    optimizer, params = training("PagedAdamW8bit", 8)
    gradients(params, "bf16", 0)
    optimizer.step()
    held = optimizer.state[params[0]]["state1"]
    torch.cuda.synchronize()  # or it would be read before the step has written it
    expected = held.clone()
    del optimizer
    gc.collect()
    assert len(freed) == 5  # three parameters with two states each, but for the one in hand
    torch.cuda.synchronize()
    assert torch.equal(held, expected)
    del held
    gc.collect()
    assert len(freed) == 6
    assert None not in freed


def test_the_host_never_waits():
    optimizer, params = training("PagedAdamW8bit", 8, page_bytes=1)
    for step in range(3):
        gradients(params, "bf16", step)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(HELD)
    released = torch.cuda.Event()
    released.record()
    optimizer.step()
    early = not released.query()
    torch.cuda.synchronize()
    assert early


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdEMAMix8bit", "PagedLion32bit"])
def test_a_captured_step_equals_an_eager_one(name):
    bits = 8 if name.endswith("8bit") else 32
    one, two = (training(name, bits, mode="capturable", page_bytes=1) for _ in range(2))
    for optimizer, params in (one, two):
        gradients(params, "bf16", 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    kept = [p.grad for p in one[1]]
    with torch.cuda.graph(graph):
        one[0].step()
    for step in range(1, 4):
        gradients(two[1], "bf16", step)
        for g, p in zip(kept, two[1], strict=True):
            g.copy_(p.grad)
        graph.replay()
        two[0].step()
    check_equal(one, two, name)


def test_a_stream_of_its_own():
    one, two = training("PagedAdamW8bit", 8, page_bytes=1), training("AdamW8bit", 8, pages=False)
    stream = torch.cuda.Stream()
    for step in range(3):
        for optimizer, params in (one, two):
            gradients(params, "bf16", step)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(HELD // 20)
                optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
    check_equal(one, two)


@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdam32bit", "PagedAdEMAMix8bit"])
@pytest.mark.parametrize("move", [True, False])
def test_checkpoints_are_restored_as_paged(name, move):
    bits = 8 if name.endswith("8bit") else 32
    one, two = training(name, bits), training(name, bits)
    plain = training(name.removeprefix("Paged"), bits, pages=False)
    gradients(one[1], "bf16", 0)
    one[0].step()
    file = io.BytesIO()
    torch.save(one[0].state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for other in (two, plain):
        for p, q in zip(one[1], other[1], strict=True):
            q.data.copy_(p.data)
        other[0].load_state_dict(copy.deepcopy(saved), move_to_device=move)
    for step in range(1, 3):
        for optimizer, params in (one, two, plain):
            gradients(params, "bf16", step)
            optimizer.step()
    check_equal(two, one, name)
    check_equal(plain, one, name)
    assert [two[0].state[p]["state1"].is_pinned() for p in two[1]] == LARGE
    assert all(plain[0].state[p]["state1"].is_cuda for p in plain[1])


def test_a_deep_copy_pages_its_own_state():
    one = training("PagedAdamW8bit", 8)
    gradients(one[1], "bf16", 0)
    one[0].step()
    optimizer = copy.deepcopy(one[0])
    two = optimizer, optimizer.param_groups[0]["params"]
    for step in range(1, 3):
        for each, params in (one, two):
            gradients(params, "bf16", step)
            each.step()
    check_equal(two, one)
    assert [optimizer.state[p]["state1"].is_pinned() for p in two[1]] == LARGE


def test_clipping_and_schedulers_work_as_with_any_optimizer():
    one, two = training("PagedAdamW8bit", 8), training("AdamW8bit", 8, pages=False)
    schedules = [torch.optim.lr_scheduler.StepLR(each[0], 1, gamma=0.5) for each in (one, two)]
    for step in range(4):
        for (optimizer, params), schedule in zip((one, two), schedules, strict=True):
            gradients(params, "bf16", step)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    check_equal(one, two)


def test_the_public_operator_takes_paged_state():
    p, g = torch.randn(100001, device="cuda"), torch.randn(100001, device="cuda")
    q = p.clone()
    states = [F.get_paged(100001) for _ in range(2)]
    others = [torch.zeros(100001, device="cuda") for _ in range(2)]
    F.is_on_gpu([p, g, *states])
    for step in (1, 2):
        F.optimizer_update_32bit("adam", g, p, states[0], 0.9, 1e-8, step, 1e-2, states[1], 0.99)
        F.optimizer_update_32bit("adam", g, q, others[0], 0.9, 1e-8, step, 1e-2, others[1], 0.99)
    torch.cuda.synchronize()
    check_same(p, q)
    for a, b in zip(states, others, strict=True):
        check_same(a, b.cpu())


def test_ordinary_memory_of_the_host_is_refused():
    p, g = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    before = p.clone()
    m, v = torch.zeros(1000), torch.zeros(1000, device="cuda")
    with pytest.raises((RuntimeError, ValueError), match="state1 and state2 are one on the device"):
        F.optimizer_update_32bit("adam", g, p, m, 0.9, 1e-8, 1, 1e-2, v, 0.99)
    with pytest.raises((RuntimeError, ValueError), match="ordinary memory of the host"):
        F.optimizer_update_32bit("adam", g, p, m, 0.9, 1e-8, 1, 1e-2, torch.zeros(1000), 0.99)
    assert torch.equal(p, before)


def test_helpers_of_old_clients():
    A = F.get_paged(3, 5, dtype=torch.uint8, device=torch.device("cuda", 0))
    assert (A.shape, A.dtype, A.is_paged, A.page_deviceid, A.is_pinned()) == ((3, 5), torch.uint8, True, 0, True)
    assert not A.any()
    F.fill(A, 7)
    F.prefetch_tensor(A)
    assert A.unique().tolist() == [7]
    assert F.get_paged(0).numel() == 0
    view = types.SimpleNamespace(found=A[1])
    assert not hasattr(view.found, "is_paged")
