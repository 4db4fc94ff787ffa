"""What an optimizer is told: constructor arguments, options, and the values of a group as one operator call needs them.

Values of a group count at every step, so that schedulers and per-group settings work; a group may carry any of ARGS
and OPTIONS, and then beats the constructor.
"""

import ast
import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Constructor arguments that an object `args` may replace as a whole.
ARGS = ("optim_bits", "min_8bit_size", "max_unorm", "skip_zeros")

# Keyword options of every class, with their defaults; a group has a key only where the value differs.
OPTIONS = {
    "percentile_clipping": 100,
    "capturable": False,
    "stochastic_rounding": False,
    "seed": 0,
    "nesterov": False,
    "bias_correction": True,
    "adam_w_mode": True,
    "page_bytes": 0,
}


def arguments(*values: Any) -> types.SimpleNamespace:
    """The values of ARGS, as the attributes of an object."""
    return types.SimpleNamespace(**dict(zip(ARGS, values, strict=True)))


def options(owner: object, given: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from their defaults. TypeError: unknown name. ValueError: percentile_clipping."""
    given = dict(given)
    if not given.pop("block_wise", True):
        text = "block_wise=False is taken as True: all 8-bit state is block-wise"
        warnings.warn(text, FutureWarning, stacklevel=_caller_depth())
    for name in given:
        if name not in OPTIONS:
            raise TypeError(f"{type(owner).__name__}: unexpected keyword argument {name!r}")
    _check_percentile(given.get("percentile_clipping", 100))
    if given.get("page_bytes", 0) < 0:
        raise ValueError(f"page_bytes is {given['page_bytes']}, expected a number of bytes, or 0 for the default")
    return {name: value for name, value in given.items() if value != OPTIONS[name]}


def betas(value: Sequence[float] | str) -> tuple[float, ...]:
    """betas as a tuple of floats; a string "(b1, b2)" is read."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"betas is {value!r}, expected two numbers") from None
    return tuple(float(beta) for beta in value)


def check(defaults: dict[str, Any]) -> None:
    """Refuse values no optimizer can use. NaN fails as well."""
    for key in ("lr", "eps", "weight_decay"):
        if not defaults[key] >= 0:
            raise ValueError(f"{key} is {defaults[key]}, expected a value >= 0")
    for i, beta in enumerate(betas(defaults["betas"])):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{i}] is {beta}, expected 0 <= beta < 1")


class Settings:
    """The values of one group, over the constructor's `args`, as one operator call needs them.

    scalars   the numbers and flags that end the arguments of the operators of a group, in their order
    lr        the learning rate as a tensor, where the group is capturable and has one; else None
    """

    __slots__ = ("capturable", "lr", "max_unorm", "min_8bit_size", "optim_bits", "percentile", "scalars", "seed")

    def __init__(self, group: dict[str, Any], args: Any) -> None:
        def arg(name: str) -> Any:
            return group[name] if name in group else getattr(args, name)

        def option(name: str) -> Any:
            return group.get(name, OPTIONS[name])

        self.optim_bits, self.min_8bit_size = arg("optim_bits"), arg("min_8bit_size")
        if self.optim_bits not in (8, 32):
            raise NotImplementedError(f"optim_bits is {self.optim_bits!r}, expected 8 or 32")
        self.max_unorm = float(arg("max_unorm"))
        self.percentile = _check_percentile(option("percentile_clipping"))
        self.capturable = bool(option("capturable"))
        self.seed = int(option("seed")) if option("stochastic_rounding") else None
        on_device = self.capturable and isinstance(group["lr"], torch.Tensor)
        self.lr = group["lr"].float() if on_device else None
        beta1, beta2, beta3 = (*betas(group["betas"]), 0.0)[:3]
        self.scalars = (
            *(0.0 if on_device else float(group["lr"]), beta1, beta2, beta3),
            *(float(group.get(key) or 0.0) for key in ("alpha", "t_alpha", "t_beta3", "eps", "weight_decay")),
            *(self.max_unorm, bool(arg("skip_zeros"))),
            *(bool(option(key)) for key in ("nesterov", "bias_correction", "adam_w_mode", "stochastic_rounding")),
            int(option("page_bytes")),
        )


def _check_percentile(value: float) -> int:
    if not 0 <= value <= 100 or value != int(value):
        raise ValueError(f"percentile_clipping is {value}, expected an integer from 0 to 99, or 100 for none")
    return int(value)


def _caller_depth() -> int:
    """The stack level of the first frame outside of this package, for a warning."""
    own, depth, frame = str(Path(__file__).parent), 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        depth, frame = depth + 1, frame.f_back
    return depth
