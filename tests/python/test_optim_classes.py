"""The optimizer classes at work: many tensors equal one by one, layouts, long runs, each class beside a reference."""

import numpy as np
import pytest
import torch

import bitsandbytes.functional as F
import bitsandbytes.optim as optim
import oracle
import oracle_optim as ref


def tensors(dtype, seed=0, device_shapes=((5000,), (300, 20), (1,), (64, 64), (4095,), (4097,), (0,), (10007,))):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(*shape, generator=g) * 0.1).to(oracle.TORCH[dtype]) for shape in device_shapes]


def params_of(values):
    return [torch.nn.Parameter(v.clone()) for v in values]


def state_of(opt, p):
    return {k: v for k, v in opt.state[p].items() if isinstance(v, torch.Tensor)}


def assert_same(opt_a, ps_a, opt_b, ps_b, what=""):
    for i, (a, b) in enumerate(zip(ps_a, ps_b, strict=True)):
        assert torch.equal(a.data, b.data), (what, i)
        sa, sb = state_of(opt_a, a), state_of(opt_b, b)
        assert sa.keys() == sb.keys(), (what, i)
        for key in sa:
            assert torch.equal(sa[key], sb[key]), (what, i, key)


# a class of every row, with options under which all of its terms are at work
ROWS = {
    "AdamW": {"weight_decay": 0.1},
    "AdEMAMix": {"weight_decay": 0.1, "t_alpha": 4, "t_beta3": 4},
    "LAMB": {"weight_decay": 0.1, "max_unorm": 0.3},
    "LARS": {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True},
    "SGD": {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.5},
    "Lion": {"weight_decay": 0.1},
    "RMSprop": {"weight_decay": 0.1},
    "Adagrad": {"weight_decay": 0.1},
}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", ROWS)
def test_many_tensors_equal_one_by_one(name, dtype, bits):
    values = tensors(dtype)
    together, single = params_of(values), params_of(values)
    options = {**ROWS[name], "lr": 1e-2, "optim_bits": bits}
    opt = getattr(optim, name)(together, **options)
    opts = [getattr(optim, name)([p], **options) for p in single]
    for step in range(5):
        for i, grad in enumerate(tensors(dtype, 100 + step)):
            present = (i + step) % 4 != 3  # a parameter without a gradient is skipped and keeps its own count
            together[i].grad = grad.clone() if present else None
            single[i].grad = grad.clone() if present else None
        opt.step()
        for o in opts:
            o.step()
    for i, o in enumerate(opts):
        assert torch.equal(together[i].data, single[i].data), i
        assert values[i].numel() < 1000 or not torch.equal(together[i].data, values[i]), i
        a, b = opt.state[together[i]], o.state[single[i]]
        assert a.get("step") == b.get("step"), i
        assert a.keys() == b.keys(), i
        for key in b:
            if isinstance(b[key], torch.Tensor):
                assert torch.equal(a[key], b[key]), (i, key)


def test_class_equals_the_functional_form(dtype):
    p = torch.nn.Parameter(tensors(dtype)[0])
    opt = optim.AdamW8bit([p], lr=1e-2, weight_decay=0.1)
    mine = p.data.clone()
    n = mine.numel()
    q1, q2 = torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    a1, a2 = torch.zeros(-(-n // 256)), torch.zeros(-(-n // 256))
    for step in range(1, 6):
        p.grad = tensors(dtype, step)[0]
        opt.step()
        F.optimizer_update_8bit_blockwise(
            "adam", p.grad, mine, q1, q2, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
            F.create_dynamic_map(), F.create_dynamic_map(signed=False), a1, a2, weight_decay=0.1,
        )  # fmt: skip
    state = opt.state[p]
    assert torch.equal(p.data, mine) and torch.equal(state["state1"], q1) and torch.equal(state["state2"], q2)
    assert torch.equal(state["absmax1"], a1) and torch.equal(state["absmax2"], a2) and state["step"] == 5
    assert state["state1"].dtype == torch.uint8 and state["absmax1"].shape == (-(-n // 256),)


def test_min_8bit_size_is_strict():
    small, large = torch.nn.Parameter(torch.ones(4095)), torch.nn.Parameter(torch.ones(4096))
    opt = optim.Adam8bit([small, large])
    small.grad, large.grad = torch.ones(4095), torch.ones(4096)
    opt.step()
    assert opt.state[small]["state1"].dtype == torch.float32 and opt.state[large]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("bits", [8, 32])
def test_channels_last_is_kept(dtype, bits):
    """Strides stay, and every element is updated by its own gradient. 32 bits: equal to the contiguous run."""
    g = torch.Generator().manual_seed(3)
    x = (torch.randn(16, 32, 4, 4, generator=g) * 0.1).to(oracle.TORCH[dtype])
    flat = torch.nn.Parameter(x.clone())
    last = torch.nn.Parameter(x.clone().to(memory_format=torch.channels_last))
    stride, pointer = last.stride(), last.data_ptr()
    a = optim.AdamW([flat], lr=1e-2, weight_decay=0.1, optim_bits=bits)
    b = optim.AdamW([last], lr=1e-2, weight_decay=0.1, optim_bits=bits)
    for step in range(6):
        grad = (torch.randn(x.shape, generator=g) * 0.01).to(x.dtype)
        flat.grad = grad.clone()
        last.grad = grad.clone().to(memory_format=torch.channels_last) if step % 2 == 0 else grad.clone()
        a.step()
        b.step()
        assert last.stride() == stride and last.data_ptr() == pointer
    if bits == 32:
        assert torch.equal(flat.data, last.data)
        assert torch.equal(a.state[flat]["state1"], b.state[last]["state1"])
    else:
        torch.testing.assert_close(flat.float(), last.float(), atol=2e-2, rtol=1e-2)
        assert torch.mean(torch.abs(flat.float() - last.float())) < 2e-3


def test_channels_last_8bit_is_storage_order():
    """p, g and state with one dense layout: the blocks run over the storage."""
    g = torch.Generator().manual_seed(4)
    x = torch.randn(8, 64, 4, 4, generator=g) * 0.1
    last = torch.nn.Parameter(x.to(memory_format=torch.channels_last))
    flat = torch.nn.Parameter(x.permute(0, 2, 3, 1).contiguous())
    a, b = optim.Adam8bit([last], lr=1e-2), optim.Adam8bit([flat], lr=1e-2)
    for _ in range(4):
        grad = torch.randn(8, 64, 4, 4, generator=g) * 0.01
        last.grad = grad.to(memory_format=torch.channels_last)
        flat.grad = grad.permute(0, 2, 3, 1).contiguous()
        a.step()
        b.step()
    assert torch.equal(last.data.permute(0, 2, 3, 1), flat.data)
    assert torch.equal(a.state[last]["absmax1"], b.state[flat]["absmax1"])


@pytest.mark.parametrize("bits", [8, 32])
def test_strided_parameter_and_gradient(bits):
    """A view with gaps is updated in place, and the gaps are left alone."""
    g = torch.Generator().manual_seed(5)
    base = torch.randn(80, 128, generator=g)
    before = base.clone()
    view = base[:, ::2]
    plain = view.contiguous()
    grads = [torch.randn(64, 80, generator=g).t() for _ in range(3)]
    blocks = 20
    one = [torch.zeros(80, 64, dtype=torch.uint8 if bits == 8 else torch.float32) for _ in range(2)]
    two = [t.clone() for t in one]
    scale_one, scale_two = [torch.zeros(blocks) for _ in range(2)], [torch.zeros(blocks) for _ in range(2)]
    for p, s, a in ((view, one, scale_one), (plain, two, scale_two)):
        for step, grad in enumerate(grads, 1):
            grad = grad if p is view else grad.contiguous()
            if bits == 8:
                F.optimizer_update_8bit_blockwise(
                    "adam", grad, p, *s, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 1e-2,
                    F.create_dynamic_map(), F.create_dynamic_map(signed=False), *a, weight_decay=0.1,
                )  # fmt: skip
            else:
                F.optimizer_update_32bit("adam", grad, p, s[0], 0.9, 1e-8, step, 1e-2, s[1], 0.999, weight_decay=0.1)
    assert torch.equal(view, plain) and all(
        torch.equal(x, y) for x, y in zip(one + scale_one, two + scale_two, strict=True)
    )
    assert torch.equal(base[:, 1::2], before[:, 1::2])


def test_threads_do_not_matter(dtype):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        p = torch.nn.Parameter(tensors(dtype, 1, ((300007,),))[0])
        opt = optim.AdamW8bit([p], lr=1e-2)
        for step in range(3):
            p.grad = tensors(dtype, 2 + step, ((300007,),))[0]
            opt.step()
        results.append((p.data, opt.state[p]["state1"], opt.state[p]["state2"], opt.state[p]["absmax1"]))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_group_mixes_bits_and_steps():
    """8-bit and 32-bit parameters that stand at steps 1, 5 and 9 in one group, each against the reference."""
    g = torch.Generator().manual_seed(6)
    sizes, bits, first = [1000, 300, 257], [8, 32, 8], [8, 4, 0]  # first: the round in which gradients begin
    ps = params_of([torch.randn(n, generator=g) for n in sizes])
    opt = optim.AdamW(ps, lr=1e-2, weight_decay=0.1, optim_bits=8, min_8bit_size=0)
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    manager.override_config(ps[1], "optim_bits", 32)
    s = ref.Settings(lr=1e-2, wd=0.1)
    m1, m2 = F.create_dynamic_map().numpy(), F.create_dynamic_map(signed=False).numpy()
    eights = [ref.State8(n, m1, m2) for n in sizes]
    plain = [np.zeros(300, np.float32), np.zeros(300, np.float32)]
    for turn in range(9):
        start = [p.detach().numpy().copy() for p in ps]
        for p, begin in zip(ps, first, strict=True):
            p.grad = torch.randn(p.shape, generator=g) if turn >= begin else None
        opt.step()
        for i, p in enumerate(ps):
            if p.grad is None:
                assert p not in opt.state or not opt.state[p]
                continue
            state, step, grad = opt.state[p], turn - first[i] + 1, p.grad.numpy()
            assert state["step"] == step
            if bits[i] == 8:
                expected, _, _ = ref.step8(start[i], grad, eights[i], step, s, "f32")
                for k, (codes, scales) in enumerate(((eights[i].q1, eights[i].a1), (eights[i].q2, eights[i].a2)), 1):
                    assert np.array_equal(state[f"state{k}"].numpy(), codes), (turn, i, k)
                    assert oracle.same_bits(state[f"absmax{k}"].numpy(), scales), (turn, i, k)
            else:
                expected, *plain = ref.step32(start[i], grad, *plain, step, s, "f32")
                assert oracle.same_bits(state["state1"].numpy(), plain[0])
                assert oracle.same_bits(state["state2"].numpy(), plain[1])
            assert np.max(ref.ulps(p.detach().numpy(), expected, "f32")) <= 1
    manager.initialize()
    assert [opt.state[p]["step"] for p in ps] == [1, 5, 9]


def test_gradients_are_not_changed(dtype):
    p = torch.nn.Parameter(tensors(dtype)[0])
    p.grad = tensors(dtype, 9)[0]
    before = p.grad.clone()
    optim.Adam8bit([p], lr=1.0).step()
    assert torch.equal(p.grad, before)


def test_thousand_steps_beside_fp32_adam():
    """Drift: a noisy quadratic, 8-bit and fp32 Adam from the same start and the same noise."""
    g = torch.Generator().manual_seed(10)
    n = 8192
    target = torch.randn(n, generator=g)
    curve = 10.0 ** (torch.rand(n, generator=g) * 2 - 1)
    start = torch.randn(n, generator=g)
    eight, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    opt8 = optim.AdamW8bit([eight], lr=5e-3, weight_decay=1e-2)
    opt32 = torch.optim.AdamW([plain], lr=5e-3, weight_decay=1e-2)
    for _ in range(1000):
        noise = torch.randn(n, generator=g) * 0.1
        for p, opt in ((eight, opt8), (plain, opt32)):
            p.grad = curve * (p.data - target) + noise
            opt.step()

    def loss(p):
        return (curve * (p.data - target) ** 2).mean().item()

    first = (curve * (start - target) ** 2).mean().item()
    assert loss(plain) < 0.02 * first, "the reference itself must have converged"
    assert loss(eight) < 0.02 * first
    assert torch.mean(torch.abs(eight.data - plain.data)) < 0.03
    state = opt8.state[eight]
    m = F.dequantize_blockwise(state["state1"], absmax=state["absmax1"], code=state["qmap1"], blocksize=256)
    exact = opt32.state[plain]["exp_avg"]
    assert torch.mean(torch.abs(m - exact)) < 0.1 * torch.mean(torch.abs(exact)) + 0.02


# ---------------------------------------------------------------- each class beside a reference of its own


def run_beside(make_mine, make_reference, steps=20, n=4097, scale=0.01):
    """f32, 32-bit state: parameters of both optimizers after the same gradients."""
    g = torch.Generator().manual_seed(12)
    start = torch.randn(n, generator=g) * 0.1
    mine, theirs = params_of([start, start])
    a, b = make_mine([mine]), make_reference([theirs])
    for _ in range(steps):
        mine.grad = torch.randn(n, generator=g) * scale
        theirs.grad = mine.grad.clone()
        a.step()
        b.step()
    assert torch.max(torch.abs(mine.data - start)) > 1e-4, "the parameter must have moved"
    return mine.data, theirs.data


MOMENTUM = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
BESIDE_TORCH = [
    (optim.AdamW, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, {}),
    (optim.LAMB, torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.1}, {"max_unorm": 0.0}),
    (optim.LAMB, torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.1}, {"max_unorm": 0.0, "adam_w_mode": False}),
    (optim.SGD, torch.optim.SGD, MOMENTUM, {}),
    (optim.SGD, torch.optim.SGD, {**MOMENTUM, "dampening": 0.5}, {}),
    (optim.SGD, torch.optim.SGD, {**MOMENTUM, "nesterov": True}, {}),
    (optim.LARS, torch.optim.SGD, {**MOMENTUM, "nesterov": True}, {"max_unorm": 0.0}),
    (optim.LARS, torch.optim.SGD, {**MOMENTUM, "dampening": 0.5}, {"max_unorm": 1e9}),
    (optim.RMSprop, torch.optim.RMSprop, {"lr": 1e-3, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1}, {}),
    (optim.Adagrad, torch.optim.Adagrad, {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.1}, {}),
]


@pytest.mark.parametrize(("mine", "theirs", "common", "own"), BESIDE_TORCH)
def test_beside_torch(mine, theirs, common, own):
    a, b = run_beside(lambda ps: mine(ps, **common, **own), lambda ps: theirs(ps, **common))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}, {"max_unorm": 0.5}])
def test_lars_beside_pytorch_lars(options):
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options}
    a, b = run_beside(lambda ps: optim.LARS(ps, **options), lambda ps: optim.PytorchLARS(ps, **options))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", [{}, {"t_alpha": 10}, {"t_beta3": 10}, {"t_alpha": 30, "t_beta3": 10}])
@pytest.mark.parametrize("name", ["AdEMAMix", "AdEMAMix32bit", "PagedAdEMAMix32bit"])
def test_ademamix_beside_its_reference(name, schedule):
    reference = optim.ademamix._ReferenceAdEMAMix
    a, b = run_beside(lambda ps: getattr(optim, name)(ps, **schedule), lambda ps: reference(ps, **schedule))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


class Formula(torch.optim.Optimizer):
    """Lion and LAMB as their papers' update would be typed, in double."""

    def __init__(self, params, kind, **values):
        super().__init__(params, {"lr": 1e-3, "wd": 0.0, "bound": 0.0, "correct": True, **values})
        self.kind, self.t, self.m, self.v = kind, 0, 0.0, 0.0

    @torch.no_grad()
    def step(self):
        self.t += 1
        (group,) = self.param_groups
        (p,) = group["params"]
        x, g = p.double(), p.grad.double()
        if self.kind == "lion":
            u = torch.sign(0.9 * self.m + 0.1 * g)
            self.m = 0.99 * self.m + 0.01 * g
        else:
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
            c1, c2 = (1 - 0.9**self.t, 1 - 0.999**self.t) if group["correct"] else (1.0, 1.0)
            u = (self.m / c1) / (torch.sqrt(self.v / c2) + 1e-8)
        if group["bound"] > 0:
            u = u * min(1.0, group["bound"] * x.norm().item() / u.norm().item())
        p.copy_(x * (1 - group["lr"] * group["wd"]) - group["lr"] * u)


FORMULAS = [
    (optim.Lion, {"weight_decay": 0.1, "lr": 1e-4}, ("lion", {"wd": 0.1, "lr": 1e-4})),
    (optim.LAMB, {"weight_decay": 0.1}, ("lamb", {"wd": 0.1, "bound": 1.0})),
    (optim.LAMB, {"max_unorm": 0.1}, ("lamb", {"bound": 0.1})),
    (optim.LAMB, {"max_unorm": 0.0, "bias_correction": False}, ("lamb", {"correct": False})),
    (optim.LAMB32bit, {"max_unorm": 0.1, "bias_correction": False}, ("lamb", {"bound": 0.1, "correct": False})),
]


@pytest.mark.parametrize(("mine", "options", "formula"), FORMULAS)
def test_beside_formula(mine, options, formula):
    kind, values = formula
    a, b = run_beside(lambda ps: mine(ps, **options), lambda ps: Formula(ps, kind, **values))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
