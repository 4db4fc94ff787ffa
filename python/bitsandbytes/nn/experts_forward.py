"""The forward of fused experts in 4 bits: products with the codes themselves, all experts in one call.

Transformers asks a table for the forward of its expert modules, by the name in config._experts_implementation.
use_codes() enters one there, "bitsandbytes_4bit", and puts its name where the default stood.  It sorts the tokens by
expert, as Transformers' grouped_mm does, and so gives equal results; where a weight is not in 4 bits, and on the CPU,
it is grouped_mm.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd._functions import experts_matmul_4bit
from .parametrize import packed_parameter

__all__ = ["use_codes"]

NAME = "bitsandbytes_4bit"
_REPLACED = "grouped_mm"


def use_codes(model: nn.Module) -> None:
    """Let the expert modules of a Transformers model multiply by their codes, unless another forward was asked for."""
    table = sys.modules.get("transformers.integrations.moe")
    if table is None:  # then no module of the model is Transformers'
        return
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "is_transposed") and getattr(config, "_experts_implementation", None) == _REPLACED:
            table.ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
            config._experts_implementation = NAME


def _worth_it(x: Tensor) -> bool:
    """On the CPU, weights are dequantised, as before: results have the bits of a dequantised model's there."""
    return x.is_cuda


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens [tokens, hidden], their experts and weights [tokens, k] -> [tokens, hidden]."""
    up = packed_parameter(module, "gate_up_proj" if module.has_gate else "up_proj")
    down = packed_parameter(module, "down_proj")
    if up is None or down is None or not _worth_it(hidden_states):
        table = sys.modules["transformers.integrations.moe"]
        return table.ALL_EXPERTS_FUNCTIONS[_REPLACED](module, hidden_states, top_k_index, top_k_weights)
    experts, order = torch.sort(top_k_index.reshape(-1))
    first = torch.searchsorted(experts, torch.arange(module.num_experts + 1, device=experts.device))
    # Tokens that another process computes come with larger numbers, and last; their rows are not computed here.
    # Transformers before 5.24 do not say whether there are some.
    shared = getattr(module, "_is_expert_parallel", True)
    foreign = (experts >= module.num_experts).unsqueeze(-1) if shared else None
    if foreign is not None:
        experts = experts.clamp(max=module.num_experts - 1)
    x = _without(hidden_states[order // top_k_index.shape[-1]], foreign)
    x = _product(module, "gate_up_proj" if module.has_gate else "up_proj", up, x, first, experts)
    x = _without(x, foreign)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _without(_product(module, "down_proj", down, x, first, experts), foreign)
    if getattr(module, "has_post_expert_norm", False):
        x = module.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return x[back].view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _product(module: Any, name: str, weight: Any, x: Tensor, first: Tensor, experts: Tensor) -> Tensor:
    packed, state = weight
    x = experts_matmul_4bit(x.to(state.dtype), packed, state, first, transposed=module.is_transposed)
    return x + getattr(module, f"{name}_bias")[experts] if module.has_bias else x


def _without(x: Tensor, foreign: Tensor | None) -> Tensor:
    return x if foreign is None else x.masked_fill(foreign, 0.0)
