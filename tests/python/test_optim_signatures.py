"""Every optimizer class: signature, row, bits, paging, refusals and the layout of a group, typed from the contract."""

import copy
import inspect
import pickle
import types

import pytest
import torch

from bitsandbytes import optim
from bitsandbytes.optim.optimizer import Optimizer1State, Optimizer2State


# ---------------------------------------------------------------- the contract
# fmt: off
def adam(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, optim_bits=32, args=None,
         min_8bit_size=4096, is_paged=False, **options): ...
def adamw(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, optim_bits=32, args=None,
          min_8bit_size=4096, is_paged=False, **options): ...
def ademamix(params, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=None, t_beta3=None, eps=1e-8,
             weight_decay=1e-2, optim_bits=32, min_8bit_size=4096, is_paged=False, **options): ...
def lion(params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0, optim_bits=32, args=None, min_8bit_size=4096,
         is_paged=False, **options): ...
def lamb(params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False,
         adam_w_mode=True, optim_bits=32, args=None, min_8bit_size=4096, max_unorm=1.0, **options): ...
def lars(params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, optim_bits=32, args=None,
         min_8bit_size=4096, max_unorm=0.02, **options): ...
def sgd(params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, optim_bits=32, args=None,
        min_8bit_size=4096, **options): ...
def rmsprop(params, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, optim_bits=32,
            args=None, min_8bit_size=4096, **options): ...
def adagrad(params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, optim_bits=32,
            args=None, min_8bit_size=4096, **options): ...
def adagrad8(params, lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, optim_bits=8,
             args=None, min_8bit_size=4096, **options): ...
def pytorch_lars(params, lr=0.01, momentum=0, dampening=0, weight_decay=0, nesterov=False, max_unorm=0.02): ...
def reference(params, lr=1e-3, betas=(0.9, 0.999, 0.9999), alpha=5.0, eps=1e-8, weight_decay=1e-2, t_beta3=None,
              t_alpha=None): ...

# name: (signature, its arguments that are missing, row, bits that the name says or None)
CLASSES = {
    "Adam": (adam, "", "adam", None),          "PagedAdam": (adam, "", "adam", None),
    "Adam8bit": (adam, "", "adam", 8),         "PagedAdam8bit": (adam, "", "adam", 8),
    "Adam32bit": (adam, "", "adam", 32),       "PagedAdam32bit": (adam, "", "adam", 32),
    "AdamW": (adamw, "", "adam", None),        "PagedAdamW": (adamw, "is_paged", "adam", None),
    "AdamW8bit": (adamw, "", "adam", 8),       "PagedAdamW8bit": (adamw, "is_paged", "adam", 8),
    "AdamW32bit": (adamw, "", "adam", 32),     "PagedAdamW32bit": (adamw, "is_paged", "adam", 32),
    "AdEMAMix": (ademamix, "", "ademamix", None),
    "AdEMAMix8bit": (ademamix, "optim_bits", "ademamix", 8),
    "AdEMAMix32bit": (ademamix, "optim_bits", "ademamix", 32),
    "PagedAdEMAMix": (ademamix, "is_paged", "ademamix", None),
    "PagedAdEMAMix8bit": (ademamix, "is_paged optim_bits", "ademamix", 8),
    "PagedAdEMAMix32bit": (ademamix, "is_paged optim_bits", "ademamix", 32),
    "Lion": (lion, "", "lion", None),          "PagedLion": (lion, "is_paged", "lion", None),
    "Lion8bit": (lion, "optim_bits", "lion", 8),
    "Lion32bit": (lion, "optim_bits", "lion", 32),
    "PagedLion8bit": (lion, "is_paged optim_bits", "lion", 8),
    "PagedLion32bit": (lion, "is_paged optim_bits", "lion", 32),
    "LAMB": (lamb, "", "lamb", None),
    "LAMB8bit": (lamb, "optim_bits", "lamb", 8),
    "LAMB32bit": (lamb, "optim_bits", "lamb", 32),
    "LARS": (lars, "", "lars", None),
    "LARS8bit": (lars, "optim_bits", "lars", 8),
    "LARS32bit": (lars, "optim_bits", "lars", 32),
    "SGD": (sgd, "", "momentum", None),
    "SGD8bit": (sgd, "optim_bits", "momentum", 8),
    "SGD32bit": (sgd, "optim_bits", "momentum", 32),
    "RMSprop": (rmsprop, "", "rmsprop", None),
    "RMSprop8bit": (rmsprop, "optim_bits", "rmsprop", 8),
    "RMSprop32bit": (rmsprop, "optim_bits", "rmsprop", 32),
    "Adagrad": (adagrad, "", "adagrad", None),
    "Adagrad8bit": (adagrad8, "", "adagrad", 8),
    "Adagrad32bit": (adagrad, "", "adagrad", 32),
}
# the smallest call that is accepted, and betas, eps and weight_decay of its group
GROUPS = {
    adam: ({}, (0.9, 0.999), 1e-8, 0), adamw: ({}, (0.9, 0.999), 1e-8, 1e-2),
    ademamix: ({}, (0.9, 0.999, 0.9999), 1e-8, 1e-2), lion: ({}, (0.9, 0.99), 0.0, 0),
    lamb: ({}, (0.9, 0.999), 1e-8, 0), lars: ({"lr": 0.1, "momentum": 0.9, "dampening": 0.1}, (0.9, 0.1), 0.0, 0),
    sgd: ({"lr": 0.1, "momentum": 0.9, "dampening": 0.1}, (0.9, 0.1), 0.0, 0), rmsprop: ({}, (0.99, 0), 1e-8, 0),
    adagrad: ({}, (0.0, 0.0), 1e-10, 0), adagrad8: ({}, (0.0, 0.0), 1e-10, 0),
}
# fmt: on
TWO_STATES = ("adam", "lamb", "ademamix")
MAX_UNORM = {"lamb": 1.0, "lars": 0.02}


def param(n=8192):
    p = torch.nn.Parameter(torch.ones(n))
    p.grad = torch.full((n,), 0.5)
    return p


def make(name, **options):
    required = GROUPS[CLASSES[name][0]][0] if name in CLASSES else {}
    return getattr(optim, name)([param()], **{**required, **options})


def every(*rows):
    return [name for name, entry in CLASSES.items() if entry[0] in rows]


# ---------------------------------------------------------------- what every class is


def test_all_is_complete():
    assert set(optim.__all__) == {*CLASSES, "PytorchLARS", "GlobalOptimManager"}
    assert len(set(optim.__all__)) == len(optim.__all__)
    assert all(getattr(optim, name).__name__ == name for name in optim.__all__)


def bare(owner):
    """The signature of a class or function: names, kinds and defaults, without types."""
    signature = inspect.signature(owner)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return signature.replace(parameters=parameters, return_annotation=signature.empty)


@pytest.mark.parametrize("name", CLASSES)
def test_signature(name):
    contract, missing, _, _ = CLASSES[name]
    whole = inspect.signature(contract)
    kept = [p for p in whole.parameters.values() if p.name not in missing.split()]
    assert bare(getattr(optim, name)) == whole.replace(parameters=kept)


def test_signatures_of_the_references():
    assert bare(optim.PytorchLARS) == inspect.signature(pytorch_lars)
    assert bare(optim.ademamix._ReferenceAdEMAMix) == inspect.signature(reference)


@pytest.mark.parametrize("name", CLASSES)
def test_row_bits_and_paging(name):
    contract, missing, row, forced = CLASSES[name]
    optimizer = make(name)
    assert optimizer.optimizer_name == row
    assert isinstance(optimizer, Optimizer2State if row in TWO_STATES else Optimizer1State)
    assert optimizer.optim_bits == optimizer.args.optim_bits == (forced or 32)
    assert optimizer.args.max_unorm == MAX_UNORM.get(row, 0.0)
    assert optimizer.args.min_8bit_size == 4096 and not optimizer.args.skip_zeros
    assert optimizer.is_paged == name.startswith("Paged")
    assert "bitsandbytes" in type(optimizer).__module__
    if forced is None:
        eight = make(name, optim_bits=8)
        assert eight.optim_bits == eight.args.optim_bits == 8
    if "is_paged" in inspect.signature(contract).parameters and "is_paged" not in missing:
        assert make(name, is_paged=True).is_paged
        assert make(name, is_paged=False).is_paged == name.startswith("Paged")


@pytest.mark.parametrize("name", ["Adam32bit", "PagedAdam32bit", "AdamW32bit", "PagedAdamW32bit", "Adagrad32bit"])
def test_bits_are_a_placeholder(name):
    assert make(name, optim_bits=8).args.optim_bits == 32


@pytest.mark.parametrize("name", CLASSES)
def test_group_layout(name):
    contract, _, row, _ = CLASSES[name]
    optimizer = make(name)
    _, betas, eps, decay = GROUPS[contract]
    (group,) = optimizer.param_groups
    expected = {"params", "lr", "betas", "eps", "weight_decay"}
    if row in TWO_STATES:
        expected |= {"alpha", "t_alpha", "t_beta3"}
        alpha = 5.0 if row == "ademamix" else 0.0
        assert (group["alpha"], group["t_alpha"], group["t_beta3"]) == (alpha, None, None)
    assert group.keys() == expected
    assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == (betas, eps, decay)
    lr = inspect.signature(contract).parameters["lr"].default
    assert group["lr"] == (0.1 if lr is inspect.Parameter.empty else lr)


def test_positional_arguments():
    """Callers pass by position: each value must reach its place."""
    args = types.SimpleNamespace(optim_bits=8, min_8bit_size=7, max_unorm=0.5, skip_zeros=True)
    ps = [param()]
    mix = optim.AdEMAMix(ps, 1.0, (0.1, 0.2, 0.3), 4.0, 5, 6, 7.0, 8.0, 8, 10, True)
    group = mix.param_groups[0]
    keys = ("lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")
    assert [group[key] for key in keys] == [1.0, (0.1, 0.2, 0.3), 4.0, 5, 6, 7.0, 8.0]
    assert (mix.args.optim_bits, mix.args.min_8bit_size, mix.is_paged) == (8, 10, True)
    for cls in (optim.PagedAdEMAMix8bit, optim.PagedAdEMAMix32bit):
        fixed = cls(ps, 1.0, (0.1, 0.2, 0.3), 4.0, 5, 6, 7.0, 8.0, 10)
        assert [fixed.param_groups[0][key] for key in keys] == [1.0, (0.1, 0.2, 0.3), 4.0, 5, 6, 7.0, 8.0]
        assert fixed.args.min_8bit_size == 10 and fixed.is_paged
    assert optim.Lion(ps, 1.0, (0.1, 0.2), 0.3, 8, args, 5, True).args is args
    assert optim.Lion8bit(ps, 1.0, (0.1, 0.2), 0.3, None, 5, True).args.min_8bit_size == 5
    assert optim.PagedLion(ps, 1.0, (0.1, 0.2), 0.3, 8, None, 5).args.min_8bit_size == 5
    assert optim.PagedLion8bit(ps, 1.0, (0.1, 0.2), 0.3, args, 5).args is args
    lamb8 = optim.LAMB8bit(ps, 1.0, False, (0.1, 0.2), 0.3, 0.4, False, False, None, 5, 1.0)
    assert (lamb8.args.optim_bits, lamb8.args.min_8bit_size, lamb8.args.max_unorm) == (8, 5, 1.0)
    assert lamb8.param_groups[0]["bias_correction"] is False and lamb8.param_groups[0]["adam_w_mode"] is False
    assert optim.LAMB(ps, 1.0, True, (0.1, 0.2), 0.3, 0.4, False, True, 8, None, 5, 3.0).args.max_unorm == 3.0
    lars32 = optim.LARS32bit(ps, 1.0, 0.5, 0, 0.4, True, None, 5, 0.25)
    assert (lars32.args.optim_bits, lars32.args.min_8bit_size, lars32.args.max_unorm) == (32, 5, 0.25)
    assert lars32.param_groups[0]["betas"] == (0.5, 0) and lars32.param_groups[0]["nesterov"] is True
    assert optim.LARS(ps, 1.0, 0.5, 0, 0.4, True, 8, None, 5, 0.25).args.max_unorm == 0.25
    assert optim.SGD(ps, 1.0, 0.5, 0.25, 0.4, False, 8, None, 5).args.optim_bits == 8
    assert optim.SGD32bit(ps, 1.0, 0.5, 0.25, 0.4, False, None, 5).param_groups[0]["betas"] == (0.5, 0.25)
    rms = optim.RMSprop8bit(ps, 1.0, 0.5, 0.25, 0.125, 0, False, None, 5)
    assert [rms.param_groups[0][key] for key in ("lr", "betas", "eps", "weight_decay")] == [1.0, (0.5, 0), 0.25, 0.125]
    grad = optim.Adagrad8bit(ps, 1.0, 0, 0.5, 0, 0.25, 8, None, 5)
    assert [grad.param_groups[0][key] for key in ("lr", "eps", "weight_decay")] == [1.0, 0.25, 0.5]
    assert grad.args.min_8bit_size == 5


@pytest.mark.parametrize("name", CLASSES)
def test_common_options(name):
    """Accepted by every class; at their defaults they leave no trace in a group."""
    plain = make(name).param_groups[0].keys()
    options = {"percentile_clipping": 100, "block_wise": True, "capturable": False, "stochastic_rounding": False}
    assert make(name, **options, seed=0).param_groups[0].keys() == plain
    with pytest.warns(FutureWarning, match="block_wise"):
        make(name, block_wise=False)
    assert make(name, percentile_clipping=5).param_groups[0]["percentile_clipping"] == 5


@pytest.mark.parametrize("name", CLASSES)
def test_unknown_names(name):
    known = inspect.signature(getattr(optim, name)).parameters
    others = {"foreach", "maximize", "skip_zeros", "is_paged", "optim_bits", "max_unorm", "optimizer_name", "t_beta3"}
    for other in others - set(known):
        with pytest.raises(TypeError, match=other):
            make(name, **{other: 8})


@pytest.mark.parametrize("name", CLASSES)
def test_copies(name):
    optimizer = make(name)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(twin) is type(optimizer) and twin.optimizer_name == optimizer.optimizer_name
        assert twin.optim_bits == optimizer.optim_bits and vars(twin.args) == vars(optimizer.args)


# ---------------------------------------------------------------- refusals, a row each

NAN = float("nan")
EIGHT_BIT_ADAMS = ["Adam8bit", "PagedAdam8bit", "AdamW8bit", "PagedAdamW8bit"]
OTHER_ADAMS = [name for name in every(adam, adamw) if name not in EIGHT_BIT_ADAMS]
MOMENTUM = every(sgd, lars)
ADAGRAD = every(adagrad, adagrad8)
REFUSED = [
    (list(CLASSES), {"lr": -1.0}, ValueError, "lr is -1.0"),
    (list(CLASSES), {"lr": NAN}, ValueError, "lr is nan"),
    (list(CLASSES), {"weight_decay": -0.1}, ValueError, "weight_decay is -0.1"),
    (list(CLASSES), {"weight_decay": NAN}, ValueError, "weight_decay is nan"),
    ([n for n in CLASSES if n not in MOMENTUM + every(lion)], {"eps": -1e-8}, ValueError, "eps is -1e-08"),
    ([n for n in CLASSES if n not in MOMENTUM + every(lion)], {"eps": NAN}, ValueError, "eps is nan"),
    (every(adam, adamw, lion, lamb), {"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] is 1.0"),
    (every(adam, adamw, lion, lamb), {"betas": (0.9, NAN)}, ValueError, r"betas\[1\] is nan"),
    (every(ademamix), {"betas": (0.9, 0.9, 1.0)}, ValueError, r"betas\[2\] is 1.0"),
    (EIGHT_BIT_ADAMS, {"amsgrad": True, "optim_bits": 8}, ValueError, "amsgrad is True"),
    (EIGHT_BIT_ADAMS, {"optim_bits": 8, "lr": -1.0}, ValueError, "optim_bits is 8"),
    (OTHER_ADAMS, {"amsgrad": True}, NotImplementedError, "amsgrad is True"),
    (["LAMB8bit"], {"amsgrad": True, "max_unorm": 2.0}, ValueError, "amsgrad is True"),
    (["LAMB8bit"], {"max_unorm": 2.0, "lr": -1.0}, ValueError, "max_unorm is 2.0"),
    (["LAMB", "LAMB32bit"], {"amsgrad": True}, NotImplementedError, "amsgrad is True"),
    (ADAGRAD, {"lr": -1.0, "weight_decay": -1.0, "eps": -1.0, "lr_decay": 1}, ValueError, "lr is -1.0"),
    (ADAGRAD, {"weight_decay": -1.0, "eps": -1.0, "lr_decay": 1}, ValueError, "weight_decay is -1.0"),
    (ADAGRAD, {"eps": -1.0, "initial_accumulator_value": 1, "lr_decay": 1}, ValueError, "eps is -1.0"),
    (ADAGRAD, {"initial_accumulator_value": 0.5, "lr_decay": 1}, ValueError, "initial_accumulator_value is 0.5"),
    (ADAGRAD, {"lr_decay": 0.1}, ValueError, "lr_decay is 0.1"),
    (["Adagrad8bit"], {"lr_decay": 0.1, "optim_bits": 32}, ValueError, "lr_decay is 0.1"),
    (["Adagrad8bit"], {"optim_bits": 32}, ValueError, "optim_bits is 32"),
    (MOMENTUM, {"momentum": 0, "lr": -1.0, "nesterov": True}, NotImplementedError, "momentum is 0"),
    (MOMENTUM, {"momentum": -0.5}, ValueError, "momentum is -0.5"),
    (MOMENTUM, {"momentum": 1.0}, ValueError, "momentum is 1.0"),
    (MOMENTUM, {"momentum": NAN}, ValueError, "momentum is nan"),
    (MOMENTUM, {"dampening": 1.0}, ValueError, "dampening is 1.0"),
    (MOMENTUM, {"dampening": NAN}, ValueError, "dampening is nan"),
    (MOMENTUM, {"nesterov": True}, ValueError, "nesterov is True with momentum 0.9 and dampening 0.1"),
    (every(rmsprop), {"alpha": 0, "centered": True, "lr": -1.0}, NotImplementedError, "alpha is 0"),
    (every(rmsprop), {"centered": True, "lr": -1.0}, NotImplementedError, "centered is True"),
    (every(rmsprop), {"momentum": 0.9}, NotImplementedError, "momentum is 0.9"),
    (every(rmsprop), {"momentum": -0.9}, ValueError, "momentum is -0.9"),
    (every(rmsprop), {"alpha": 1.0}, ValueError, "alpha is 1.0"),
    (every(rmsprop), {"alpha": NAN}, ValueError, "alpha is nan"),
    (["PytorchLARS"], {"lr": -1.0}, ValueError, "lr is -1.0"),
    (["PytorchLARS"], {"momentum": -0.5}, ValueError, "momentum is -0.5"),
    (["PytorchLARS"], {"weight_decay": NAN}, ValueError, "weight_decay is nan"),
    (["PytorchLARS"], {"nesterov": True}, ValueError, "nesterov is True with momentum 0"),
    (["PytorchLARS"], {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, ValueError, "dampening 0.5"),
]


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [pytest.param(n, *row, id=f"{n}-{row[2]}") for names, *row in REFUSED for n in names],
)
def test_refused(name, options, error, text):
    with pytest.raises(error, match=rf"{text}.*expected") as caught:
        make(name, **options)
    assert type(caught.value) is error


@pytest.mark.parametrize("name", CLASSES)
def test_values_are_checked_before_the_parameter_list(name):
    with pytest.raises(ValueError, match="weight_decay is -1"):
        getattr(optim, name)([], **{**GROUPS[CLASSES[name][0]][0], "weight_decay": -1.0})


@pytest.mark.parametrize("name", MOMENTUM)
def test_learning_rate_is_required(name):
    with pytest.raises(TypeError, match="lr"):
        getattr(optim, name)([param()], momentum=0.9)


@pytest.mark.parametrize("name", [name for name, entry in CLASSES.items() if entry[3] is None])
def test_other_bits_fail_at_the_first_step(name):
    optimizer = make(name, optim_bits=16)
    with pytest.raises(NotImplementedError, match="optim_bits is 16"):
        optimizer.step()
