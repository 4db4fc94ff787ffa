"""The optimizers in torch operations, PytorchLARS and _ReferenceAdEMAMix, against their equations in numpy doubles."""

import copy
import math

import numpy as np
import pytest
import torch

from bitsandbytes import optim
from bitsandbytes.optim.ademamix import _ReferenceAdEMAMix

TORCH = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# of the parameter: rounding of the dtype at every step, or of f32 arithmetic where that is coarser
CLOSE = {"f64": 1e-12, "f32": 2e-6, "f16": 2.0**-11, "bf16": 2.0**-8}


def gradients(dtype, count, n=257):
    g = torch.Generator().manual_seed(21)
    return [(torch.randn(n, generator=g, dtype=torch.float64) * 0.1).to(TORCH[dtype]) for _ in range(count)]


def run(optimizer, p, grads, expected_step):
    """Every step from the parameter as it is: the error of one rounding does not add up. `expected_step(x, g, t)`."""
    for t, g in enumerate(grads, 1):
        x = p.detach().double().numpy().copy()
        p.grad = g.clone()
        optimizer.step()
        expected = expected_step(x, g.double().numpy(), t)
        close = CLOSE["f64" if p.dtype == torch.float64 else str(p.dtype).replace("torch.", "").replace("float", "f")]
        np.testing.assert_allclose(p.detach().double().numpy(), expected, rtol=close, atol=close * 1e-2)
        assert torch.equal(p.grad, g), "a gradient is only read"


class Lars:
    """One tensor of LARS: g + wd p, momentum as in torch.optim.SGD, a step no longer than bound |p|."""

    def __init__(self, lr=0.01, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, max_unorm=0.02):
        self.lr, self.momentum, self.dampening, self.decay = lr, momentum, dampening, weight_decay
        self.nesterov, self.bound, self.m, self.shortened = nesterov, max_unorm, None, 0

    def __call__(self, x, g, t):
        g = g + self.decay * x
        u = g
        if self.momentum:
            self.m = g if t == 1 else self.momentum * self.m + (1 - self.dampening) * g
            u = g + self.momentum * self.m if self.nesterov else self.m
        length, limit = math.sqrt(np.sum(u * u)), self.bound * math.sqrt(np.sum(x * x))
        if 0 < limit < length:
            u = u * (limit / length)
            self.shortened += 1
        return x - self.lr * u


LARS = [
    ({}, 6),
    ({"momentum": 0.9, "lr": 0.1}, 6),
    ({"momentum": 0.9, "lr": 0.1, "dampening": 0.3, "weight_decay": 0.1}, 6),
    ({"momentum": 0.9, "lr": 0.1, "nesterov": True, "weight_decay": 0.1}, 6),
    ({"momentum": 0.9, "lr": 0.1, "max_unorm": 0.0}, 0),
    ({"momentum": 0.9, "lr": 0.1, "max_unorm": 1e3}, 0),
    ({"weight_decay": 0.1, "max_unorm": 0.0}, 0),
]


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("options", "shortened"), LARS)
def test_pytorch_lars(options, shortened, dtype):
    p = torch.nn.Parameter(gradients(dtype, 7)[6] * 4)
    optimizer, expected = optim.PytorchLARS([p], **options), Lars(**options)
    run(optimizer, p, gradients(dtype, 6), expected)
    assert expected.shortened == shortened, "the case must show what it is for"
    state = optimizer.state[p]
    if options.get("momentum"):
        assert state["momentum_buffer"].dtype == (torch.float64 if dtype == "f64" else torch.float32)
        np.testing.assert_allclose(state["momentum_buffer"].double().numpy(), expected.m, rtol=1e-4, atol=1e-6)
    else:
        assert not state


def test_pytorch_lars_moves_a_zero_parameter():
    """No bound where |p| is 0, and none where the step is not finite."""
    zero, wild = torch.nn.Parameter(torch.zeros(10)), torch.nn.Parameter(torch.ones(4))
    zero.grad, wild.grad = torch.ones(10), torch.tensor([1.0, float("inf"), 1.0, 1.0])
    optim.PytorchLARS([zero, wild], lr=0.5).step()
    assert torch.equal(zero.data, torch.full((10,), -0.5))
    assert torch.equal(wild.data, torch.tensor([0.5, -float("inf"), 0.5, 0.5]))


def test_pytorch_lars_groups_and_closure():
    one, two, idle = (torch.nn.Parameter(torch.ones(4)) for _ in range(3))
    optimizer = optim.PytorchLARS([{"params": [one]}, {"params": [two, idle], "lr": 0.5}], lr=0.25, max_unorm=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (one + two).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8.0
    assert torch.equal(one.data, torch.full((4,), 0.75)) and torch.equal(two.data, torch.full((4,), 0.5))
    assert torch.equal(idle.data, torch.ones(4)) and idle not in optimizer.state
    assert optimizer.param_groups[0].keys() == {
        "params", "lr", "momentum", "dampening", "weight_decay", "nesterov", "max_unorm",
    }  # fmt: skip


@pytest.mark.parametrize("cls", [optim.PytorchLARS, _ReferenceAdEMAMix])
@pytest.mark.parametrize("dtype", TORCH)
def test_resume(cls, dtype):
    """A run continued from a state dict equals the run that went on, also where the state is wider than p."""
    options = {"momentum": 0.9} if cls is optim.PytorchLARS else {"t_alpha": 8, "t_beta3": 8}
    p = torch.nn.Parameter(gradients(dtype, 9)[8])
    first = cls([p], **options)
    for g in gradients(dtype, 4):
        p.grad = g
        first.step()
    q = torch.nn.Parameter(p.detach().clone())
    second = cls([q], **options)
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    for g in gradients(dtype, 8)[4:]:
        p.grad, q.grad = g, g
        first.step()
        second.step()
    assert torch.equal(p.data, q.data)
    for key, value in first.state[p].items():
        assert torch.equal(value, second.state[q][key]) and value.dtype == second.state[q][key].dtype
        assert not torch.equal(value, saved["state"][0][key])


class Mix:
    """One tensor of AdEMAMix: Pagliardini et al. 2024, algorithm 1 with the schedules of its appendix."""

    def __init__(self, lr=1e-3, alpha=5.0, weight_decay=1e-2, t_alpha=None, t_beta3=None):
        self.lr, self.alpha, self.decay, self.t_alpha, self.t_beta3 = lr, alpha, weight_decay, t_alpha, t_beta3
        self.m1 = self.m2 = self.v = 0.0

    def __call__(self, x, g, t):
        b1, b2, b3, alpha = 0.9, 0.999, 0.9999, self.alpha
        if self.t_alpha:
            alpha = min(t * alpha / self.t_alpha, alpha)
        if self.t_beta3:
            share, l1, l3 = t / self.t_beta3, math.log(b1), math.log(b3)
            b3 = min(math.exp(l1 * l3 / ((1 - share) * l3 + share * l1)), b3) if share < 1 else b3
        self.m1 = b1 * self.m1 + (1 - b1) * g
        self.m2 = b3 * self.m2 + (1 - b3) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        u = (self.m1 / (1 - b1**t) + alpha * self.m2) / (np.sqrt(self.v / (1 - b2**t)) + 1e-8)
        return x - self.lr * (u + self.decay * x)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("options", [{}, {"t_alpha": 4}, {"t_beta3": 4}, {"t_alpha": 10, "t_beta3": 20, "alpha": 2.0}])
def test_reference_ademamix(options, dtype):
    p = torch.nn.Parameter(gradients(dtype, 7)[6])
    optimizer, expected = _ReferenceAdEMAMix([p], **options), Mix(**options)
    run(optimizer, p, gradients(dtype, 6), expected)
    state = optimizer.state[p]
    assert optimizer.param_groups[0]["step"] == 6 and state.keys() == {"m1_m2", "nu"}
    assert state["m1_m2"].shape == (2, 257) and state["nu"].shape == (257,)
    for value, exact in ((state["m1_m2"][0], expected.m1), (state["m1_m2"][1], expected.m2), (state["nu"], expected.v)):
        assert value.dtype == (torch.float64 if dtype == "f64" else torch.float32)
        np.testing.assert_allclose(value.double().numpy(), exact, rtol=1e-4, atol=1e-8)


def test_schedule_of_beta3():
    """The values that the specification of the schedule lists for b1 = 0.9, b3 = 0.9999 and 100 steps."""
    group = {"alpha": 5.0, "betas": (0.9, 0.999, 0.9999), "t_alpha": 100, "t_beta3": 100}
    listed = {1: 0.9909002, 10: 0.9990089, 50: 0.9998002, 100: 0.9999, 150: 0.9999}
    for step, beta in listed.items():
        alpha, beta3 = optim.ademamix._scheduled({**group, "step": step})
        assert beta3 == pytest.approx(beta, abs=5e-8) and alpha == pytest.approx(min(step, 100) * 0.05)


def test_parameters_of_one_group_share_its_schedule():
    """Every parameter of a group sees the same alpha, however many stand before it."""
    ps = [torch.nn.Parameter(torch.ones(8, dtype=torch.float64)) for _ in range(3)]
    optimizer = _ReferenceAdEMAMix(ps, t_alpha=10, t_beta3=10)
    for g in gradients("f64", 3, n=8):
        for p in ps:
            p.grad = g
        optimizer.step()
    assert torch.equal(ps[0].data, ps[1].data) and torch.equal(ps[0].data, ps[2].data)
