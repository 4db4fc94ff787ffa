"""32-bit fp32 optimizers over twenty steps: against torch.optim where it has the algorithm, else against a reference
that runs on its own in double. Nothing is synchronised between steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import bitsandbytes.optim as optim
import optim_cases as cases
import oracle_optim64 as exact

STEPS = 20


def problem(seed=1):
    """Start value and twenty gradients, float32 (300, 20)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(300, 20, generator=g) * 0.1, [torch.randn(300, 20, generator=g) * 0.01 for _ in range(STEPS)]


def run(make, double=False):
    """The parameter after the steps, by the optimizer make([p])."""
    start, gradients = problem()
    p = nn.Parameter(start.double() if double else start.clone())
    optimizer = make([p])
    for g in gradients:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p.detach().double()


def check(ours, theirs):
    got, expected = run(ours), run(theirs, double=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    start = problem()[0].double()
    assert torch.mean(torch.abs(expected - start)) > 1e-3, "the parameter must have moved"


@pytest.mark.parametrize("damping", [0.0, 0.25])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["SGD", "SGD32bit"])
def test_sgd(name, decay, damping):
    options = {"lr": 0.1, "momentum": 0.9, "dampening": damping, "weight_decay": decay}
    check(lambda p: getattr(optim, name)(p, **options), lambda p: torch.optim.SGD(p, **options))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_nesterov(decay):
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": decay}
    check(lambda p: optim.SGD(p, **options), lambda p: torch.optim.SGD(p, **options))
    plain = options | {"nesterov": False}
    assert not torch.equal(run(lambda p: optim.SGD(p, **options)), run(lambda p: optim.SGD(p, **plain)))


@pytest.mark.parametrize("options", [{"dampening": 0.25}, {"nesterov": True}])
@pytest.mark.parametrize("family", ["SGD", "LARS"])
@pytest.mark.parametrize("bits", [8, 32])
def test_momentum_options_by_the_oracle(dtype, family, options, bits):
    """Both options, 8-bit state as well, step by step."""
    s = replace(cases.FAMILY[family], beta2=options.get("dampening", 0.0), nesterov="nesterov" in options)
    cases.follow(family, bits, s, [1, 257, 2000], dtype, 5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["RMSprop", "RMSprop32bit"])
def test_rmsprop(name, decay):
    options = {"lr": 1e-3, "alpha": 0.95, "eps": 1e-6, "weight_decay": decay}
    check(lambda p: getattr(optim, name)(p, **options), lambda p: torch.optim.RMSprop(p, **options))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["Adagrad", "Adagrad32bit"])
def test_adagrad(name, decay):
    options = {"lr": 1e-2, "weight_decay": decay}
    check(lambda p: getattr(optim, name)(p, **options), lambda p: torch.optim.Adagrad(p, **options))


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adam32bit", "PagedAdamW32bit"])
def test_adam(name):
    options = {"lr": 1e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}
    check(lambda p: getattr(optim, name)(p, **options), lambda p: torch.optim.AdamW(p, **options))


def test_lamb_with_coupled_decay_is_adam():
    """adam_w_mode=False is Adam with L2 regularisation, where the trust ratio does not bite."""
    options = {"lr": 1e-3, "betas": (0.8, 0.99), "weight_decay": 0.1}
    check(
        lambda p: optim.LAMB(p, adam_w_mode=False, max_unorm=1e9, **options), lambda p: torch.optim.Adam(p, **options)
    )


class Reference:
    """A row in double, by its paper, with the interface of an optimizer."""

    def __init__(self, params, s):
        self.p, self.s, self.t = params[0], s, 0
        self.states = [np.zeros(self.p.numel()) for _ in range({"ademamix": 3, "adam": 2, "lamb": 2}.get(s.row, 1))]

    def step(self):
        self.t += 1
        p, g = self.p.data.numpy().ravel(), self.p.grad.numpy().ravel()
        new, states = exact.step(p, g, self.states, self.t, self.s)
        self.states = [x.value for x in states]
        self.p.data.copy_(torch.from_numpy(new.value).reshape(self.p.shape))


SETTINGS = {
    "AdEMAMix": [{}, {"t_alpha": 15.0, "t_beta3": 15.0}, {"t_alpha": 100.0}, {"t_beta3": 100.0}],
    "Lion": [{}, {"wd": 0.0}],
    "LAMB": [{}, {"bias_correction": False}, {"adam_w_mode": False}, {"max_unorm": 10.0}],
    "LARS": [{}, {"nesterov": True, "beta2": 0.0}, {"max_unorm": 10.0, "lr": 0.05}],
}


@pytest.mark.parametrize(
    "family, options", [(family, o) for family, all_of in SETTINGS.items() for o in all_of], ids=str
)
@pytest.mark.parametrize("form", ["", "32bit"])
def test_rows_that_torch_lacks(family, options, form):
    if form and options.get("max_unorm"):
        form = ""
    s = replace(cases.FAMILY[family], **options)
    check(lambda p: cases.build(family + form, p, s), lambda p: Reference(p, s))


@pytest.mark.parametrize("options", SETTINGS["AdEMAMix"] + [{"t_alpha": 5.0, "t_beta3": 8.0, "beta3": 0.99}], ids=str)
@pytest.mark.parametrize("bits", [8, 32])
def test_ademamix_schedules_by_the_oracle(dtype, bits, options):
    """Each parameter's own count decides."""
    s = replace(cases.FAMILY["AdEMAMix"], **options)
    cases.follow("AdEMAMix", bits, s, [257, 1500], dtype, 12)
    late, early = cases.parameter(300, dtype, 1), cases.parameter(300, dtype, 1)
    optimizer = cases.build("AdEMAMix", [early, late], s, bits)
    for t in range(1, 6):
        early.grad = cases.Gradients(300, dtype, 1)(300, t)
        late.grad = cases.Gradients(300, dtype, 1)(300, t - 2) if t > 2 else None
        optimizer.step()
        if t == 3:
            third = early.data.clone()
    assert optimizer.state[early]["step"] == 5 and optimizer.state[late]["step"] == 3
    again = cases.parameter(300, dtype, 1)
    alone = cases.build("AdEMAMix", [again], s, bits)
    for t in range(1, 4):
        again.grad = cases.Gradients(300, dtype, 1)(300, t)
        alone.step()
    assert torch.equal(again.data, third) and torch.equal(again.data, late.data)


@pytest.mark.parametrize("schedule", [{}, {"t_alpha": 15, "t_beta3": 15}])
def test_the_reference_class_of_ademamix(schedule):
    from bitsandbytes.optim.ademamix import _ReferenceAdEMAMix

    options = {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8, "weight_decay": 1e-2, **schedule}
    got = run(lambda p: _ReferenceAdEMAMix(p, **options))
    torch.testing.assert_close(run(lambda p: optim.AdEMAMix(p, **options)), got, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"dampening": 0.2}, {"nesterov": True}, {"max_unorm": 0.0}, {"max_unorm": 10.0}],
    ids=str,
)
def test_pytorch_lars_equals_lars(options):
    """The pure torch class and the row agree on parameters that are not zero."""
    options = {"lr": 0.1, "momentum": 0.9, "max_unorm": 0.02} | options
    got, expected = run(lambda p: optim.LARS(p, **options)), run(lambda p: optim.PytorchLARS(p, **options))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
