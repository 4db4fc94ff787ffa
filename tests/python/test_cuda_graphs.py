"""CUDA as PyTorch drives it: no synchronisation, few launches, steady memory; graphs, streams, threads, cards."""

import threading
from dataclasses import replace

import pytest
import torch

import bitsandbytes.functional as F
import cuda_cases
import optim_cases as cases
import oracle
from cuda_cases import check_same, digest, needs_cuda, on_device, values

pytestmark = needs_cuda

ops = torch.ops.bitsandbytes
SHAPES = [(5000,), (64, 65), (17,), (4096,), (30011,)]
SMALL = [(256,)] * 1000  # a table that no launch can carry in its arguments
HELD = 200_000_000  # clock cycles for which a stream is held up: about a tenth of a second
CLASSES = sorted(cases.class_bits())
MODES = {
    "plain": ({}, {}),
    "capturable": ({}, {"capturable": True}),
    "trust": ({"max_unorm": 0.05}, {}),
    "percentile": ({}, {"percentile_clipping": 50}),
    "everything": ({"max_unorm": 0.05}, {"capturable": True, "percentile_clipping": 50}),
}
# Launches and copies of a step of one group, whatever the number of tensors.
MOST = {"plain": 2, "capturable": 3, "trust": 6, "percentile": 9, "everything": 14}


def training(name, bits, mode="plain", shapes=SHAPES, dtype="bf16", steps=2, **more):
    """An optimizer over parameters with gradients, some steps old."""
    changes, options = MODES[mode]
    s = replace(cases.FAMILY[cases.class_names()[name]], max_unorm=0.0)
    params = []
    for i, shape in enumerate(shapes):
        n = torch.Size(shape).numel()
        p = torch.nn.Parameter(on_device(oracle.to_torch(cases.values(n, dtype, i % 10), dtype)).view(shape))
        p.grad = on_device(oracle.to_torch(cases.gradient_values(n, dtype, i % 10), dtype)).view(shape)
        params.append(p)
    optimizer = cases.build(name, params, replace(s, **changes), bits, **(options | more))
    for _ in range(steps):
        optimizer.step()
    torch.cuda.synchronize()
    return optimizer, params


# ---- the host never waits


def returns_early(run):
    """Does run() come back while the stream, held up before it, still is?"""
    torch.cuda.synchronize()
    torch.cuda._sleep(HELD)
    released = torch.cuda.Event()
    released.record()
    run()
    early = not released.query()
    torch.cuda.synchronize()
    return early


def test_the_detector_sees_a_wait():
    assert returns_early(lambda: None)
    assert not returns_early(torch.cuda.current_stream().synchronize)
    assert not returns_early(lambda: torch.ones(3, device=cuda_cases.DEVICE).sum().item())


@pytest.mark.parametrize("name, bits", CLASSES)
def test_a_step_does_not_synchronise(name, bits):
    optimizer, _ = training(name, bits)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert returns_early(optimizer.step), "the host waited for the device"


@pytest.mark.parametrize("mode", [m for m in MODES if m != "plain"])
@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_no_option_synchronises(family, bits, mode):
    optimizer, _ = training(family, bits, mode)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert returns_early(optimizer.step), "the host waited for the device"


@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_tensors_do_not_synchronise(mode):
    """Their table is too large for the arguments of a launch, and must not wait for its turn either. Many steps: no
    buffer of the host may run out."""
    optimizer, _ = training("AdamW", 8, mode, SMALL)
    assert returns_early(optimizer.step), "the host waited for the device"
    assert returns_early(lambda: [optimizer.step() for _ in range(5)]), "the host waited in one of five steps"


def test_quantisers_do_not_synchronise():
    x, code = on_device(values(100003, "bf16")), F.create_dynamic_map().to(cuda_cases.DEVICE)

    def run():
        codes, absmax = ops.quantize_blockwise(x, code, 256)
        ops.dequantize_blockwise(codes, absmax, code, 256, torch.bfloat16)
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        F.dequantize_4bit(packed, state)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert returns_early(run)


def profile(run):
    """(names of kernels and copies, names of host calls that wait) of run(), as the profiler saw them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function("profiled"):
            run()
        torch.cuda.synchronize()
    events = profiler.events()
    on_card = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    work = [name for name in on_card if name.startswith(("bnb_k_", "void ", "Memcpy", "Memset"))]
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    frame = next(e.time_range for e in host if e.name == "profiled")
    inside = [e.name for e in host if frame.start <= e.time_range.start <= frame.end]
    return work, [name for name in inside if "Synchronize" in name or "MemcpyDtoH" in name or "EventQuery" in name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 32])
def test_launches_of_a_step(mode, bits):
    """At most MOST of them for every family, for few tensors and for a thousand; no copy to the host, nobody waits."""
    work, _ = profile(lambda: on_device(torch.ones(3)).add_(1))
    if not any(name.startswith("void ") for name in work):
        pytest.skip("the profiler sees no kernels here")
    for family in cases.FAMILY:
        for shapes in (SHAPES, SMALL) if family in ("AdamW", "SGD") else (SHAPES,):
            optimizer, _ = training(family, bits, mode, shapes)
            work, waits = profile(optimizer.step)
            what = f"{family} {bits} bits, {len(shapes)} tensors: {work} {waits}"
            assert not waits, what
            assert any(name.startswith("bnb_k_") for name in work), what
            assert not any("DtoH" in name or "Device -> Pageable" in name for name in work), what
            assert len(work) <= MOST[mode], what


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_no_memory_after_the_first_steps(family, bits, mode):
    optimizer, _ = training(family, bits, mode, steps=3)
    keys = ("segment.all.allocated", "segment.all.current", "allocated_bytes.all.current", "reserved_bytes.all.current")
    before = torch.cuda.memory_stats()
    for _ in range(10):
        optimizer.step()
    after = torch.cuda.memory_stats()
    assert {key: after[key] for key in keys} == {key: before[key] for key in keys}


# ---- graphs


def capture(run):
    """A graph of run(), and what it returned while it was captured."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def test_captured_quantisers(dtype):
    x, code = on_device(values(50001, dtype)), F.create_dynamic_map().to(cuda_cases.DEVICE)

    def run():
        codes, absmax = ops.quantize_blockwise(x, code, 256)
        back = ops.dequantize_blockwise(codes, absmax, code, 256, x.dtype)
        packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        fp4, scales = ops.quantize_4bit(x, 64, "fp4", torch.uint8)
        again = ops.dequantize_4bit(fp4, scales, 64, "fp4", [50001], x.dtype)
        nested = F.dequantize_4bit(packed, state)
        return codes, absmax, back, packed, state.absmax, state.offset, state.state2.absmax, nested, fp4, scales, again

    run()
    graph, results = capture(run)
    for seed in range(3):
        x.copy_(values(50001, dtype, "wide", seed + 1))
        graph.replay()
        for got, expected in zip(results, run(), strict=True):
            check_same(got, expected, f"replay {seed}")


@pytest.mark.parametrize("shapes", [SHAPES, SMALL[:100]], ids=["few", "many"])
@pytest.mark.parametrize("mode", ["capturable", "everything"])
@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_a_captured_step(family, bits, mode, shapes):
    """Replays with other gradients and learning rates equal eager steps bit for bit, step count and all."""
    rates = [torch.tensor(1e-3, device=cuda_cases.DEVICE) for _ in range(2)]
    optimizer, params = training(family, bits, mode, shapes, lr=rates[0])
    other, twins = training(family, bits, mode, shapes, lr=rates[1])
    graph, _ = capture(optimizer.step)
    for step in range(4):
        for rate in rates:
            rate.fill_(10.0 ** -(2 + step))
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            g = oracle.to_torch(cases.gradient_values(p.numel(), "bf16", 100 * step + i % 10), "bf16").view(p.shape)
            p.grad.copy_(g)
            q.grad.copy_(g)
        graph.replay()
        other.step()
    for i, (p, q) in enumerate(zip(params, twins, strict=True)):
        check_same(p.data, q.data, f"parameter {i}")
        one, two = optimizer.state[p], other.state[q]
        assert one.keys() == two.keys()
        assert one["step"].item() == 6
        for key, value in two.items():
            check_same(one[key], value, f"{key} of parameter {i}")


def test_captured_random_rounding():
    """The random numbers of a replay are those of its step."""
    made = [training("AdamW", 8, "capturable", stochastic_rounding=True, seed=5) for _ in range(2)]
    graph, _ = capture(made[0][0].step)
    for _ in range(3):
        graph.replay()
        made[1][0].step()
    for p, q in zip(made[0][1], made[1][1], strict=True):
        check_same(p.data, q.data)


FIRST = """
import torch, bitsandbytes as bnb
x = torch.randn(10007, generator=torch.Generator().manual_seed(0)).cuda()
code = bnb.functional.create_dynamic_map().cuda()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, 256)
graph.replay()
expected = torch.ops.bitsandbytes.quantize_blockwise(x, code, 256)
print(torch.equal(codes, expected[0]), torch.equal(absmax, expected[1]))
"""


def test_a_kernel_is_loaded_while_a_stream_is_captured():
    """In a fresh process, where the first launch of all is one of a graph."""
    status, out, err = cuda_cases.python("-c", FIRST)
    assert (status, out) == (0, "True True\n"), err


# ---- streams, threads, cards, modes


def work_of(x, code):
    codes, absmax = ops.quantize_blockwise(x, code, 256)
    packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    decoded = ops.dequantize_blockwise(codes, absmax, code, 256, x.dtype)
    return codes, absmax, decoded, packed, state.absmax, state.offset, F.dequantize_4bit(packed, state)


def test_a_side_stream_is_used():
    """Work on a side stream ends while the main stream is held up."""
    x, code, side = on_device(values(10007, "bf16")), F.create_dynamic_map().to(cuda_cases.DEVICE), torch.cuda.Stream()
    optimizer, _ = training("AdamW", 8)
    expected = [t.clone() for t in work_of(x, code)]
    with torch.cuda.stream(side):  # its memory is there then: asking the driver for more may wait
        work_of(x, code)
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(HELD)
    released = torch.cuda.Event()
    released.record()
    with torch.cuda.stream(side):
        results = work_of(x, code)
        optimizer.step()
    side.synchronize()
    assert not released.query()
    torch.cuda.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        check_same(got, wanted)


def test_a_side_stream_orders_its_work():
    """What is enqueued before on the same stream, and late, is seen."""
    x, code, side = on_device(values(10007, "bf16")), F.create_dynamic_map().to(cuda_cases.DEVICE), torch.cuda.Stream()
    new = on_device(values(10007, "bf16", "wide", 5))
    expected = [t.clone() for t in work_of(new, code)]
    (optimizer, params), (other, twins) = (training("AdamW", 8) for _ in range(2))
    late = [on_device(oracle.to_torch(cases.gradient_values(p.numel(), "bf16", 77), "bf16")) for p in params]
    for q, g in zip(twins, late, strict=True):
        q.grad.copy_(g.view(q.shape))
    other.step()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(HELD)
        x.copy_(new)
        for p, g in zip(params, late, strict=True):
            p.grad.copy_(g.view(p.shape))
        results = work_of(x, code)
        optimizer.step()
    side.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        check_same(got, wanted)
    for p, q in zip(params, twins, strict=True):
        check_same(p.data, q.data)


def test_threads():
    """A thread that never called CUDA; then several at once, each on a stream of its own."""
    code = F.create_dynamic_map().to(cuda_cases.DEVICE)
    inputs = [on_device(values(20011, "bf16", "normal", i)) for i in range(6)]
    expected = [digest(*work_of(x, code)) for x in inputs]
    found: dict[int, set] = {i: set() for i in range(6)}
    torch.cuda.synchronize()

    def run(i, rounds):
        stream = torch.cuda.Stream()
        for _ in range(rounds):
            with torch.cuda.stream(stream):
                results = work_of(inputs[i], code)
            stream.synchronize()
            found[i].add(digest(*results))

    for first, rounds in ((1, 1), (6, 20)):
        threads = [threading.Thread(target=run, args=(i, rounds)) for i in range(first)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[i] for i in range(6)] == [{each} for each in expected]


def test_a_second_card():
    """Tensors of another card than the current one; and one group over both."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    x, code = values(20011, "bf16"), F.create_dynamic_map()
    torch.cuda.set_device(0)
    results = work_of(x.to(second), code.to(second))
    assert torch.cuda.current_device() == 0
    assert all(t.device == second for t in results)
    for got, wanted in zip(results, work_of(x.to(first), code.to(first)), strict=True):
        check_same(got, wanted)
    s, made = cases.FAMILY["AdamW"], [oracle.to_torch(cases.values(5000, "bf16", i), "bf16") for i in range(4)]
    params = [torch.nn.Parameter(p.to((first, second)[i % 2])) for i, p in enumerate(made)]
    twins = [torch.nn.Parameter(p.to(first)) for p in made]
    optimizer, other = cases.build("AdamW", params, s, 8), cases.build("AdamW", twins, s, 8)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad, q.grad = p.detach() * 0.1, q.detach() * 0.1
        optimizer.step()
        other.step()
    assert torch.cuda.current_device() == 0
    for p, q in zip(params, twins, strict=True):
        check_same(p.data, q.data)
        check_same(optimizer.state[p]["state1"], other.state[q]["state1"])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_of_autograd(mode):
    x, code = on_device(values(10007, "bf16")), F.create_dynamic_map().to(cuda_cases.DEVICE)
    expected = work_of(x, code)
    with mode():
        for got, wanted in zip(work_of(x.clone(), code), expected, strict=True):
            check_same(got, wanted)
