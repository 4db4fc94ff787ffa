"""Which input features of the linear layers of a model are outliers, found while the model runs once.

A few features of a transformer's hidden states are far larger than the others, and quantising them costs most of the
accuracy.  A later layer shows them in its weight, where their columns vary more than the others do; the first layer
follows no other, so its input is looked at instead.
Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", sections 3 and 4.
"""

import logging
from typing import Any

import torch
from torch import Tensor

# Where clients find these names, and their log messages.
_logger = logging.getLogger("bitsandbytes.utils")

_MAGNITUDE = 6.0  # an input at least this far from zero makes its feature an outlier: the paper's criterion
_INPUT_ZSCORE = 3.0


def _spread(values: Tensor, dim: int) -> Tensor:
    """The standard deviation over dim, with Bessel's correction where there is more than one value; else 0."""
    return values.std(dim, correction=1 if values.shape[dim] > 1 else 0)


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """The rows or columns of a matrix whose values vary most.

    weight         any float dtype [rows, columns]; of a linear layer [out, in]
    reduction_dim  the dimension that the standard deviations are taken over: 0 compares columns, 1 rows
    zscore         more than so many standard deviations of these deviations above their mean is an outlier
    topk           instead: so many of the largest deviations, largest first
    rdm            instead: topk different ones at random
    Returns int64 [count] on the device of weight.  ValueError: no float matrix, topk missing or out of range.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        given = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"find_outlier_dims: weight is {given}, expected a float matrix")
    count = weight.shape[1 - reduction_dim]
    if (rdm and topk is None) or (topk is not None and not 0 <= topk <= count):
        raise ValueError(f"find_outlier_dims: topk is {topk}, expected 0 to {count}")
    if rdm:
        return torch.randperm(count, device=weight.device)[:topk]
    with torch.no_grad():
        spread = _spread(weight.detach().float(), reduction_dim)
        if topk is not None:
            return torch.topk(spread, topk).indices
        # No division: where all deviations are equal there is no outlier.
        return torch.where(spread - spread.mean() > zscore * _spread(spread, 0))[0]


def _find_input_outliers(x: Tensor) -> Tensor:
    """Features of x [..., features] that vary much more than the others or hold a large value; ascending int64."""
    tokens = x.detach().reshape(-1, x.shape[-1])
    if tokens.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    varying = find_outlier_dims(tokens, reduction_dim=0, zscore=_INPUT_ZSCORE)
    large = torch.where((tokens.abs() > _MAGNITUDE).any(0))[0]
    return torch.cat([varying, large]).unique()


def outlier_hook(module: torch.nn.Linear, input: tuple[Any, ...]) -> None:
    """A forward pre-hook of nn.Linear: note the outliers of its input features in the OutlierTracer.

    The first layer that runs is judged by its input, if that is a positional argument, all others by their weights.
    A weight that comes round again belongs to a second pass: all hooks are removed.  ValueError: the weight is not a
    float matrix.
    """
    tracer = OutlierTracer.get_instance()
    found = tracer.hvalue2outlier_idx
    hvalue = tracer.get_hvalue(module.weight)
    if hvalue in found:
        tracer.remove_hooks()
    elif found or not input:
        found[hvalue] = find_outlier_dims(module.weight)
    else:
        found[hvalue] = _find_input_outliers(input[0])


class OutlierTracer:
    """The outlier features of a model's linear layers. One per process: get_instance().

    hvalue2outlier_idx  {get_hvalue(weight): int64 indices of input features}
    hooks               handles of the hooks that are still in place
    """

    _instance: "OutlierTracer | None" = None
    initialized: bool
    hooks: list[Any]
    hvalue2outlier_idx: dict[int, Tensor]

    def __init__(self) -> None:
        raise RuntimeError("OutlierTracer: call get_instance()")

    @classmethod
    def get_instance(cls) -> "OutlierTracer":
        """The one tracer."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialized = False
            cls._instance.hooks = []
            cls._instance.hvalue2outlier_idx = {}
        return cls._instance

    def initialize(self, model: torch.nn.Module) -> None:
        """Forget everything, and watch each nn.Linear of model during its next forward."""
        self.remove_hooks()
        self.hvalue2outlier_idx = {}
        linears = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
        self.hooks = [linear.register_forward_pre_hook(outlier_hook) for linear in linears]
        self.initialized = True

    def is_initialized(self) -> bool:
        """True after initialize()."""
        return self.initialized

    def remove_hooks(self) -> None:
        """Stop watching; what was found stays."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def get_hvalue(self, weight: Tensor) -> int:
        """What a weight is known by: the address of its storage."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """int64 indices of the outlier features of weight [out, in]; None if it has not been seen.

        Before initialize() that is None too, with a warning.
        """
        if not self.initialized:
            _logger.warning(
                "OutlierTracer: not initialised, so there are no outliers: call "
                "OutlierTracer.get_instance().initialize(model) before the first forward of the model"
            )
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))
