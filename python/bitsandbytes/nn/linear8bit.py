"""Linear8bitLt: a linear layer over an int8 weight, or with an int8 product over a float weight: LLM.int8().

The weight (Int8Params) has the codes and their scales; `state`, which matmul() reads, points at the same tensors and is
pointed there again by each forward, so a client may clear or replace either.  Dettmers et al. 2022, "LLM.int8()".
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.types import Device

from ..autograd._functions import MatmulLtState, matmul
from ..optim.sharding import is_dtensor
from .int8params import Int8Params
from .quantized_linear import ROW, QuantizedLinear, check_format

_INTO_FLOAT = (
    "Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported. Move the layer to its device "
    "first, layer.to('cpu') or layer.to('cuda'), construct it on meta, or call load_state_dict(..., assign=True)"
)


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A load hook: drop prefix + "weight_format", which older releases wrote as a string or left out.

    ValueError: the weight is not stored row by row.
    """
    if prefix + "weight" in state_dict:
        check_format(state_dict.pop(prefix + "weight_format", "row"))


class Linear8bitLt(QuantizedLinear):
    """nn.Linear with an int8 product: y = x W^T + bias.

    input_features, output_features, bias, device  as nn.Linear's
    has_fp16_weights  True: the weight stays float and trainable, and is quantised for the product; False: it is
                      quantised for good by the first move from or to the CPU, or by the first forward
    threshold         inputs of at least this magnitude are multiplied unquantised (6.0 is usual); 0: none.  Their
                      columns are state.idx after a forward, unless that was compiled
    index             kept as an attribute
    memory_efficient_backward  of old releases; False
    forward: [..., input_features] -> [..., output_features] in the dtype of the input.
    state_dict() of a quantised layer holds weight, bias, SCB (float32 [out]) and weight_format;  load_state_dict()
    takes it into a layer that is quantised or on meta, or any with assign=True (RuntimeError otherwise), and a float
    weight into any; a float weight is quantised if the layer was.
    """

    weight: Int8Params
    state: MatmulLtState

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Tensor | None = None,
        device: Device = None,
        memory_efficient_backward: bool = False,
    ) -> None:
        if memory_efficient_backward:
            raise ValueError("Linear8bitLt: memory_efficient_backward is True, expected False: the option is gone")
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.index = index
        self.weight = Int8Params(self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias. x: [..., input_features], float32, float16 or bfloat16."""
        weight, state = self.weight, self.state
        quantised = weight.dtype == torch.int8
        if not (quantised or state.has_fp16_weights or isinstance(weight, Int8Params)):
            # Tied to a float weight: nothing to quantise.
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.linear(x, weight.to(x.dtype), bias).to(x.dtype)
        if torch.compiler.is_compiling():
            return matmul(x, weight, state=self._state_of_one_call(), bias=self.bias)
        state.is_training = self.training
        if quantised or not state.has_fp16_weights:
            if not quantised:
                weight.quantize()
            self.init_8bit_state()
        return matmul(x, weight, state=state, bias=self.bias)

    def _state_of_one_call(self) -> MatmulLtState:
        """A copy of the state for a compiled graph, which cannot write to objects outside itself when checkpointed."""
        state = MatmulLtState()
        state.threshold = self.state.threshold
        # A float weight is quantised inside the graph.
        state.has_fp16_weights = self.weight.dtype != torch.int8
        if not state.has_fp16_weights:
            state.CB, state.SCB = self.weight.detach(), self._scales()
        return state

    def init_8bit_state(self) -> None:
        """Point the state at the int8 weight and its scales. RuntimeError: there are no scales."""
        weight, state = self.weight, self.state
        codes, scales = getattr(weight, "CB", None), getattr(weight, "SCB", None)
        if codes is None:
            codes = weight.data
            if isinstance(weight, Int8Params):
                weight.CB = codes
        if state.CB is not codes:
            state.CB = codes
        if scales is not None and state.SCB is not scales:
            state.SCB = scales
        if state.SCB is None:
            state.SCB = self._kept
        if state.SCB is None:
            raise RuntimeError("Linear8bitLt: the weight is int8 and has no SCB: load a checkpoint that holds both")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's, which an assignment calls too. The state lets go of the old weight if the new one has SCB."""
        super().register_parameter(name, param)
        if name == "weight" and getattr(self.weight, "SCB", None) is not None:
            self.state.reset_grads()

    def _follow(self) -> None:
        weight, state = self.weight, self.state
        if weight.dtype != torch.int8:
            state.reset_grads()
            return
        if isinstance(weight, Int8Params):
            weight.follow()
        if weight.device.type == "meta":
            state.CB = None
            return
        mirrored = getattr(weight, "SCB", None)
        if state.SCB is not None:
            state.SCB = state.SCB.to(weight.device) if mirrored is None else mirrored
        self._keep_scales()
        if state.CB is not None:
            state.CB = weight.CB if isinstance(weight, Int8Params) else weight.data

    # ---------------------------------------------------------------- checkpoints

    def _scales(self) -> Tensor | None:
        """float32 [out] of the int8 weight, None if it is not quantised."""
        if self.weight.dtype != torch.int8:
            return None
        places = (getattr(self.weight, "SCB", None), self.state.SCB, self._kept)
        return next((scales for scales in places if scales is not None), None)

    _kept: Tensor | None = None

    def _keep_scales(self) -> None:
        """Remember the scales: the weight that a sharding engine gives back has lost them."""
        scales = getattr(self.weight, "SCB", None)
        scales = self._kept if scales is None else scales
        self._kept = scales if scales is None or self.weight.is_meta else scales.to(self.weight.device)

    # torch.distributed.checkpoint looks the keys of a checkpoint up as attributes.
    SCB = property(lambda self: self._scales(), doc="float32 [out], one per row of the weight; None if that is float")
    weight_format = property(lambda self: torch.tensor(ROW, dtype=torch.uint8), doc="uint8 0: row-major")

    def _holds_codes(self) -> bool:
        return self.weight.dtype == torch.int8

    def _statistics(self) -> dict[str, Tensor]:
        scales = self.SCB
        return {} if scales is None else {"SCB": scales, "weight_format": self.weight_format}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if prefix + "weight" in state_dict:
            check_format(state_dict.get(prefix + "weight_format", "row"))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _owns(self, name: str, prefix: str) -> bool:
        return name in (f"{prefix}weight", f"{prefix}SCB", f"{prefix}weight_format")

    def _take(self, weight: Tensor | None, state_dict: dict[str, Any], prefix: str, assign: bool) -> tuple[str, ...]:
        if weight is None:
            return ()
        keys = tuple(name for name in state_dict if self._owns(name, prefix))
        scales = state_dict.get(f"{prefix}SCB")
        quantised = self.weight.dtype == torch.int8
        if scales is not None:
            loaded = self._load_int8(weight, scales, quantised, assign)
            return keys if loaded else tuple(name for name in keys if name != f"{prefix}weight")
        if weight.dtype == torch.int8:
            raise ValueError(f"the weight is int8 and {prefix}SCB is missing, expected both or neither")
        if quantised and not isinstance(self.weight, Int8Params):
            raise ValueError(f"the weight has dtype {weight.dtype}, expected torch.int8 and {prefix}SCB")
        if not (isinstance(self.weight, Int8Params) and self._takes_float(weight, quantised, assign)):
            return tuple(name for name in keys if name.endswith("weight_format"))
        self._load_float(weight, quantised, assign)
        return keys

    def _load_int8(self, weight: Tensor, scales: Tensor, quantised: bool, assign: bool) -> bool:
        """Take int8 codes and their scales. False: the scales alone, because torch loads the codes of a shard."""
        current = self.weight
        meta = current.device.type == "meta"
        sharded = quantised and is_dtensor(current)
        if not (sharded or isinstance(current, Int8Params)) or self.state.has_fp16_weights:
            raise ValueError(_INTO_FLOAT)
        if not (quantised or assign or meta):
            raise ValueError(_INTO_FLOAT)
        if weight.dtype != torch.int8:
            raise ValueError(f"the weight beside SCB has dtype {weight.dtype}, expected torch.int8")
        if weight.shape != (self.out_features, self.in_features) or scales.shape != (self.out_features,):
            given = tuple(weight.shape), tuple(scales.shape)
            expected = (self.out_features, self.in_features), (self.out_features,)
            raise ValueError(f"size mismatch: weight and SCB have shapes {given}, expected {expected}")
        if sharded:
            self.state.reset_grads()
            self._kept = self.state.SCB = scales.to(current.device, torch.float32, copy=True)
            return False
        if assign or meta:
            if not assign:
                weight, scales = weight.clone(), scales.clone()
            self.weight = Int8Params(weight, requires_grad=False, SCB=scales.to(weight.device, torch.float32))
        else:
            current.data.copy_(weight)
            current.SCB = scales.to(current.device, torch.float32, copy=True)
        self._point_state()
        return True

    def _load_float(self, weight: Tensor, quantised: bool, assign: bool) -> None:
        """Take a float weight [out, in]; quantise it, where the layer is, if the layer's was quantised."""
        current = self.weight
        replace = assign or current.device.type == "meta"
        trains = self.state.has_fp16_weights
        fresh = Int8Params(weight, requires_grad=trains and current.requires_grad, has_fp16_weights=trains)
        if quantised:
            fresh.quantize(weight.device if replace else current.device)
        if replace:
            self.weight = fresh
        else:
            current.data.copy_(fresh.data)
            current.SCB = fresh.SCB
        self._point_state()

    def _point_state(self) -> None:
        """After loading: a state in use is pointed at what was loaded."""
        self.state.reset_grads()
        if isinstance(self.weight, Int8Params) and self.weight.dtype == torch.int8:
            self.weight.follow()
            self._keep_scales()
