"""Every optimizer on CUDA beside the CPU: states, codes and scales bit for bit, parameters as NUMERICS rule 22 allows.

Both devices make the same steps with the same gradients; behind every step the device takes over the CPU's parameters,
so that one unit in the last place is not handed on.
"""

import io
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import bitsandbytes.optim as optim
import cuda_cases
import optim_cases as cases
import oracle
import oracle_optim as ref
from cuda_cases import check_parameter, check_same, needs_cuda, on_device, values

pytestmark = needs_cuda

SHAPES = [(3,), (64, 65), (4096,), (5000,), (100, 100), (17,), (1,), (0, 4), (257,), (30011,)]
STEPS = 10
# What a run changes: its settings, and the keyword options of the class.
OPTIONS = {
    "plain": ({}, {}),
    "no decay": ({"wd": 0.0}, {}),
    "skip zeros": ({"skip_zeros": True}, {}),
    "nesterov": ({"nesterov": True, "beta2": 0.0}, {}),
    "coupled decay": ({"adam_w_mode": False}, {}),
    "no bias correction": ({"bias_correction": False}, {}),
    "schedules": ({"t_alpha": 7.0, "t_beta3": 9.0}, {}),
    "trust": ({"max_unorm": 0.1, "lr": 0.1}, {}),
    "percentile": ({}, {"percentile_clipping": 30}),
    "stochastic": ({}, {"stochastic_rounding": True, "seed": 3}),
    "capturable": ({}, {"capturable": True}),
    "capturable, trust, percentile": ({"max_unorm": 0.1, "lr": 0.1}, {"capturable": True, "percentile_clipping": 30}),
    "lr tensor": ({}, {"capturable": True, "lr": "tensor"}),
}
ONLY = {  # the other options are for every family
    "nesterov": ("SGD", "LARS"),
    "coupled decay": ("Adam", "AdamW", "LAMB"),
    "no bias correction": ("Adam", "AdamW", "LAMB"),
    "schedules": ("AdEMAMix",),
}
RUNS = [
    (family, bits, name) for family, bits in cases.BOTH for name in OPTIONS if family in ONLY.get(name, cases.FAMILY)
]


class Pair:
    """One optimizer on the CPU and its twin on the device, over copies of the same parameters."""

    def __init__(self, family, bits, dtype, s, parameters, **options):
        self.dtype, self.bits = dtype, bits
        self.cpu = [torch.nn.Parameter(p) for p in parameters]
        self.cuda = [torch.nn.Parameter(on_device(p)) for p in parameters]
        self.optimizers = []
        for params in (self.cpu, self.cuda):
            own = dict(options)
            if own.get("lr") == "tensor":
                own["lr"] = torch.tensor(s.lr, device=params[0].device)
            self.optimizers.append(cases.build(family, params, s, bits, **own))

    def step(self, gradients, what=""):
        """gradients: one tensor or None per parameter."""
        before = [p.detach().clone() for p in self.cpu]
        for p, q, g in zip(self.cpu, self.cuda, gradients, strict=True):
            p.grad, q.grad = (None, None) if g is None else (g, on_device(g))
        for optimizer in self.optimizers:
            optimizer.step()
        for i, (p, q) in enumerate(zip(self.cpu, self.cuda, strict=True)):
            assert q.stride() == p.stride()
            check_parameter(q.data, p.data, before[i], self.dtype, f"{what} parameter {i}")
            q.data.copy_(p.data)

    def check_states(self, what=""):
        for i, (p, q) in enumerate(zip(self.cpu, self.cuda, strict=True)):
            one, two = (o.state[x] for o, x in zip(self.optimizers, (p, q), strict=True))
            check_states(two, one, f"{what} parameter {i}", exact_unorm=self.dtype == "f32")


def check_states(got, expected, what, exact_unorm=True):
    assert got.keys() == expected.keys(), what
    for key, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert got[key] == value, (what, key)
        elif key == "unorm_vec" and not exact_unorm:  # a sum of squares of what rule 22 leaves free
            torch.testing.assert_close(got[key].cpu(), value, rtol=1e-5, atol=0, equal_nan=True)
        else:
            check_same(got[key], value, f"{what} {key}")


def gradients(dtype, step, shapes=SHAPES, bad=()):
    """Gradients of several magnitudes with zeros of both signs; `bad` values here and there, from step 3 on."""
    found = []
    for i, shape in enumerate(shapes):
        n = int(np.prod(shape))
        g = oracle.to_torch(cases.gradient_values(n, dtype, 100 * step + i, 10.0 ** -(step % 4)), dtype)
        if n > 600:
            g[256:512] = 0
        if len(bad) and n and step % 3 == 0:
            at = torch.arange(n)[step % 7 :: 97]
            g[at] = torch.tensor(np.resize(bad, at.numel()), dtype=torch.float32).to(g.dtype)
        found.append(g.view(shape))
    return found


def start(dtype, shapes=SHAPES):
    return [oracle.to_torch(cases.values(int(np.prod(x)), dtype, i), dtype).view(x) for i, x in enumerate(shapes)]


@pytest.mark.parametrize("family, bits, name", RUNS)
def test_ten_steps(dtype, family, bits, name):
    changes, options = OPTIONS[name]
    pair = Pair(family, bits, dtype, replace(cases.FAMILY[family], **changes), start(dtype), **options)
    for step in range(1, STEPS + 1):
        pair.step(gradients(dtype, step), f"{family} {bits} bits {dtype} {name} step {step}")
    pair.check_states(f"{family} {bits} bits {dtype} {name}")
    assert all(p.numel() < 1000 or not torch.equal(p, q) for p, q in zip(pair.cpu, start(dtype), strict=True))


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_non_finite_gradients(dtype, family, bits):
    """8 bits: rule 23. 32 bits: NaN spreads, into the same elements on both devices."""
    s = replace(cases.FAMILY[family], max_unorm=0.0)
    pair = Pair(family, bits, dtype, s, start(dtype))
    for step in range(1, STEPS + 1):
        bad = (np.nan, np.inf, -np.inf, 3e38, 1e-40)
        pair.step(gradients(dtype, step, bad=bad), f"{family} {bits} bits {dtype} step {step}")
        pair.check_states(f"{family} {bits} bits {dtype} step {step}")


@pytest.mark.parametrize("family", cases.FAMILY)
def test_non_finite_gradients_and_trust(dtype, family):
    """Elements that rule 23 holds back do not count in the norm."""
    pair = Pair(family, 8, dtype, cases.with_trust(family, 0.05), start(dtype))
    for step in range(1, 6):
        pair.step(gradients(dtype, step, bad=(np.nan, np.inf)), f"{family} {dtype} step {step}")
    pair.check_states(f"{family} {dtype}")


@pytest.mark.parametrize("size", [1e-19, 3e-21, 1e-23, 1e-38, 1e-44])
@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_subnormal_states(family, bits, size):
    """Squares that vanish, and scales without a finite reciprocal."""
    pair = Pair(family, bits, "f32", cases.with_trust(family, 0.0), start("f32", [(3000,), (5,)]))
    for step in range(1, 4):
        made = [torch.from_numpy(cases.gradient_values(n, "f32", step, size)) for n in (3000, 5)]
        pair.step(made, f"{family} {bits} bits size {size} step {step}")
    pair.check_states(f"{family} {bits} bits size {size}")


# ---- against the double oracle


def snapshot(optimizer, p, row):
    """cases.Snapshot of a parameter on the device."""
    host = p.detach().cpu()
    entries = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
    return cases.Snapshot(types.SimpleNamespace(state={host: entries}), host, row)


@pytest.mark.parametrize("name, bits", sorted(cases.class_bits()))
def test_against_the_double_oracle(dtype, name, bits):
    family = cases.class_names()[name]
    s, lengths = cases.FAMILY[family], [1, 255, 257, 4097]
    make = cases.Gradients(max(lengths), dtype, 7)
    params = [torch.nn.Parameter(on_device(oracle.to_torch(cases.values(n, dtype, n), dtype))) for n in lengths]
    optimizer = cases.build(name, params, s, bits)
    for t in range(1, STEPS + 1):
        before = [snapshot(optimizer, p, s.row) for p in params]
        given = [make(p.numel(), t, i) for i, p in enumerate(params)]
        for p, g in zip(params, given, strict=True):
            p.grad = on_device(g)
        optimizer.step()
        for p, old, g in zip(params, before, given, strict=True):
            new, raw, what = snapshot(optimizer, p, s.row), oracle.from_torch(g), f"{name} {dtype} n {old.n} step {t}"
            assert new.bits == bits, what
            cases.check_exact(old, new, raw, t, s, dtype, what, 0.0 if dtype == "f32" else 2.0**-20)
            if dtype == "f32":
                cases.check_bits(old, new, raw, t, s, dtype, what)


# ---- many tensors


@pytest.mark.parametrize("count", [1, 40, 300])
@pytest.mark.parametrize("family", cases.FAMILY)
def test_many_tensors_equal_one_call_each(family, count):
    """Rule 26, on the device: mixed lengths, dtypes and bits, some without elements or without a gradient."""
    lengths = [(i * 577) % 5003 if i % 20 else 9000 + i for i in range(count)]
    dtypes = [("f32", "bf16", "f16")[i % 3] for i in range(count)]
    made = [values(n, dtypes[i], "normal", i) for i, n in enumerate(lengths)]
    together = [torch.nn.Parameter(on_device(p)) for p in made]
    single = [torch.nn.Parameter(on_device(p)) for p in made]
    build = lambda params: cases.build(family, params, cases.FAMILY[family], 8, min_8bit_size=1000)  # noqa: E731
    optimizer, others = build(together), [build([p]) for p in single]
    for step in range(1, 4):
        for i, n in enumerate(lengths):
            g = on_device(oracle.to_torch(cases.gradient_values(n, dtypes[i], 10 * i + step), dtypes[i]))
            together[i].grad = single[i].grad = None if (i + step) % 7 == 6 else g
        optimizer.step()
        for other in others:
            other.step()
    for i, (p, q) in enumerate(zip(together, single, strict=True)):
        check_same(p.data, q.data, f"{family} tensor {i}")
        check_states(optimizer.state[p], others[i].state[q], f"{family} tensor {i}")


def test_the_cpu_and_the_device_in_one_group(dtype):
    """Parameters of both devices, in any order: one call for each device."""
    shapes = [(5000,), (300,), (4097,), (64, 64)]
    params = [torch.nn.Parameter(p if i % 2 else on_device(p)) for i, p in enumerate(start(dtype, shapes))]
    twins = [torch.nn.Parameter(p.clone()) for p in start(dtype, shapes)]
    optimizer, other = (cases.build("AdamW", x, cases.FAMILY["AdamW"], 8) for x in (params, twins))
    before = [p.detach().clone() for p in twins]
    for p, q, g in zip(params, twins, gradients(dtype, 1, shapes), strict=True):
        p.grad, q.grad = g.to(p.device), g
    optimizer.step()
    other.step()
    for p, q, old in zip(params, twins, before, strict=True):
        check_parameter(p.data, q.data, old, dtype)
        check_states(optimizer.state[p], other.state[q], "a group over two devices")


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_without_any_gradient_or_element(family, bits):
    p, empty = torch.nn.Parameter(on_device(torch.ones(300))), torch.nn.Parameter(on_device(torch.ones(0, 3)))
    optimizer = cases.build(family, [p, empty], cases.FAMILY[family], bits)
    optimizer.step()
    empty.grad = torch.zeros_like(empty)
    optimizer.step()
    assert bool((p == 1).all()) and not optimizer.state.get(p)


# ---- layouts


LAYOUTS = {
    "channels last": ((8, 16, 5, 5), lambda t: t.contiguous(memory_format=torch.channels_last)),
    "transposed": ((70, 90), lambda t: t.t()),
    "gaps": ((80, 128), lambda t: t[:, ::2]),
    "one element off": ((4099,), lambda t: t[1:]),
    "three elements off": ((5001,), lambda t: t[3:]),
}


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_layouts(dtype, family, bits, layout):
    """Strides stay, elements between them are left alone, and gradients may have other strides."""
    shape, view = LAYOUTS[layout]
    base = start(dtype, [shape])[0]
    bases = base.clone(), on_device(base)
    params = [torch.nn.Parameter(view(b)) for b in bases]
    optimizers = [cases.build(family, [p], cases.FAMILY[family], bits) for p in params]
    stride = params[0].stride()
    for step in range(1, 5):
        g = gradients(dtype, step, [shape])[0]
        before = params[0].detach().clone()
        for p, optimizer in zip(params, optimizers, strict=True):
            given = view(g if p.device.type == "cpu" else on_device(g))
            p.grad = given if step % 2 else given.contiguous()
            optimizer.step()
            assert p.stride() == stride
        check_parameter(params[1].data, params[0].data, before, dtype, f"{family} {bits} bits {layout} step {step}")
        params[1].data.copy_(params[0].data)
    check_states(*(o.state[p] for o, p in zip(optimizers[::-1], params[::-1], strict=True)), layout, dtype == "f32")
    if layout != "channels last":  # a view of the base: what is beside the view has its first values
        check_same(bases[1], bases[0], f"{layout}: the whole base")


@pytest.mark.parametrize("kind", ["linear", "mixed"])
@pytest.mark.parametrize("row", ref.ROWS)
def test_other_maps(dtype, row, kind):
    """Maps of a checkpoint, through the functional form: no zero in the first, or an fp8 map for the second."""
    first = F.create_linear_map(add_zero=False) if kind == "linear" else F.create_dynamic_map()
    second = F.create_linear_map(signed=False) if kind == "linear" else F.create_fp8_map(False, 4, 4, 8)
    maps = [first, second] if ref.SIGNED[row][0] else [second, first]
    s = replace(cases.FAMILY[next(f for f in cases.FAMILY if cases.FAMILY[f].row == row)], max_unorm=0.0)
    n, sides = 5003, []
    for place in (torch.device("cpu"), cuda_cases.DEVICE):
        shapes = [(2, n) if row == "ademamix" else (n,)] + [(n,)] * (len(ref.SIGNED[row]) > 1)
        states = [torch.zeros(shape, dtype=torch.uint8, device=place) for shape in shapes]
        absmax = [torch.zeros(*shape[:-1], -(-n // 256), device=place) for shape in shapes]
        sides.append((values(n, dtype, "normal", 2).to(place), states, absmax, [m.to(place) for m in maps]))
    for t in range(1, 6):
        g, before = gradients(dtype, t, [(n,)])[0], sides[0][0].clone()
        for p, states, absmax, own in sides:
            cases.functional_step(s, p, g.to(p.device), states, t, absmax, own)
        check_parameter(sides[1][0], sides[0][0], before, dtype, f"{row} {kind} step {t}")
        sides[1][0].copy_(sides[0][0])
    for one, two in zip(sides[1][1] + sides[1][2], sides[0][1] + sides[0][2], strict=True):
        check_same(one, two, f"{row} {kind}")


# ---- checkpoints


def through_a_file(state_dict, place):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, map_location=place, weights_only=False)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_a_checkpoint_changes_devices(family, bits, mapped):
    """Device to CPU and back: the run goes on as the one that stayed on the CPU."""
    shapes, s, dtype = [(5000,), (64, 65), (17,)], cases.FAMILY[family], "f32"
    options = {"percentile_clipping": 50}
    place = [torch.nn.Parameter(p.clone()) for p in start(dtype, shapes)]
    stay = [torch.nn.Parameter(p.clone()) for p in start(dtype, shapes)]
    reference = cases.build(family, stay, s, bits, **options)
    optimizer = None
    for move, where in enumerate((cuda_cases.DEVICE, torch.device("cpu"), cuda_cases.DEVICE)):
        place = [torch.nn.Parameter(p.detach().to(where)) for p in place]
        saved, optimizer = optimizer, cases.build(family, place, s, bits, **options)
        if saved is not None:
            optimizer.load_state_dict(through_a_file(saved.state_dict(), where if mapped else None))
        for step in range(3 * move + 1, 3 * move + 4):
            for p, q, g in zip(place, stay, gradients(dtype, step, shapes), strict=True):
                p.grad, q.grad = g.to(where), g
            optimizer.step()
            reference.step()
        for p, q in zip(place, stay, strict=True):
            check_same(p.data, q.data, f"{family} {bits} bits on {where}")
            check_states(optimizer.state[p], reference.state[q], f"{family} {bits} bits on {where}")
            assert all(v.device == p.device for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))


# ---- repeats and size


@pytest.mark.parametrize("family, bits", cases.BOTH)
def test_the_same_bits_every_time(family, bits):
    found = []
    for _ in range(3):
        params = [torch.nn.Parameter(on_device(p)) for p in start("bf16")]
        s = cases.with_trust(family, 0.02)
        optimizer = cases.build(family, params, s, bits, percentile_clipping=50, stochastic_rounding=True)
        for step in range(1, 4):
            for p, g in zip(params, gradients("bf16", step), strict=True):
                p.grad = on_device(g)
            optimizer.step()
        tensors = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
        found.append(cuda_cases.digest(*(p.data for p in params), *tensors))
    assert len(set(found)) == 1


@pytest.mark.large
def test_beyond_two_to_the_31():
    """One parameter of more elements than an int counts: all repetitions of a pattern end alike, and as on the CPU."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("less than 20 GiB of device memory are free")
    length, rows, rest = 1 << 20, 2049, 4096 + 256  # whole blocks of state
    n, pattern = rows * length + rest, start("bf16", [(length,)])[0]
    big = torch.empty(n, dtype=torch.bfloat16, device=cuda_cases.DEVICE)
    grad = torch.empty_like(big)
    params = [torch.nn.Parameter(pattern.clone()), torch.nn.Parameter(big)]
    fill(big, pattern, rows)
    optimizers = [optim.AdamW8bit([p], lr=1e-2, weight_decay=0.1) for p in params]
    for step in (1, 2):
        g, before = gradients("bf16", step, [(length,)])[0], params[0].detach().clone()
        fill(grad, g, rows)
        params[0].grad, params[1].grad = g, grad
        for optimizer in optimizers:
            optimizer.step()
        first = params[1].data[:length]
        check_parameter(first, params[0].data, before, "bf16", f"step {step}")
        check_repetitions(params[1].data, first, rows)
        fill(params[1].data, params[0].data, rows)
    one, two = (o.state[p] for o, p in zip(optimizers, params, strict=True))
    for key in ("state1", "state2", "absmax1", "absmax2"):
        check_same(two[key][: one[key].numel()], one[key], key)
        check_repetitions(two[key], two[key][: one[key].numel()], rows)


def fill(big, pattern, rows):
    piece = pattern.to(big.device)
    whole = rows * piece.numel()
    big[:whole].view(rows, -1).copy_(piece)
    big[whole:] = piece[: big.numel() - whole]


def check_repetitions(big, piece, rows):
    whole = rows * piece.numel()
    for row in range(0, rows, 256):
        part = big[row * piece.numel() : min(row + 256, rows) * piece.numel()].view(-1, piece.numel())
        assert bool((part == piece).all()), f"repetitions from {row} on differ"
    assert torch.equal(big[whole:], piece[: big.numel() - whole])
