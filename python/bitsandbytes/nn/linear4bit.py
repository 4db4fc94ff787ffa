"""Linear4bit, LinearNF4, LinearFP4: linear layers over a 4-bit weight.

A forward is one operator: the packed weight and its statistics are read as they are, nothing is repacked, cached or
changed on the layer.  The layer also knows quant_state, because sharding engines return a weight that has lost its
attributes.  Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.types import Device

from ..autograd._functions import matmul_4bit
from ..optim.sharding import is_dtensor
from ..quant_state import QuantState
from .params4bit import Params4bit, bytes_of, is_packed
from .quantized_linear import QuantizedLinear, warn_once

_NOT_QUANTISED = (
    "the weight is not quantised yet: move the layer to the device it shall run on, layer.to('cpu') or "
    "layer.to('cuda'), or load a quantised checkpoint"
)


def fix_4bit_weight_quant_state_from_module(module: nn.Module) -> None:
    """Give module.weight its class and quant_state back, from the module, if it has lost them.

    RuntimeError: neither has a quant_state, or the weight is not what module.quant_state describes, or its packed bytes
    went through a cast that destroys them.
    """
    weight: Any = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    state = getattr(module, "quant_state", None)
    if state is None:
        raise RuntimeError(f"{type(module).__name__}: {_NOT_QUANTISED}")
    if not isinstance(weight, Params4bit):
        packed = _before_a_cast(module, weight.data, state)
        weight = Params4bit(packed, **Params4bit._options(packed, state), module=module)
    if not is_packed(weight, state):
        raise RuntimeError(f"{type(module).__name__}: {_NOT_QUANTISED}")
    module.weight = weight
    weight.quant_state = state
    weight.bnb_quantized = True


def _before_a_cast(module: nn.Module, packed: Tensor, state: QuantState) -> Tensor:
    """The packed codes as they were before a sharding engine cast them, like any parameter, to another dtype.

    Bytes are whole numbers below 256, which every float dtype holds exactly.  RuntimeError: items of more bytes, lost.
    """
    storage = getattr(module, "quant_storage", packed.dtype)
    if packed.dtype == storage or packed.numel() != -(-bytes_of(state) // storage.itemsize):
        return packed
    if storage == torch.uint8:
        return packed.to(storage)
    raise RuntimeError(
        f"{type(module).__name__}: the packed weight was cast from {storage} to {packed.dtype}, which destroys its "
        "bytes: expected quant_storage torch.uint8, or the dtype that parameters are cast to (param_dtype of FSDP)"
    )


class Linear4bit(QuantizedLinear):
    """nn.Linear with a 4-bit weight: y = x W^T + bias.

    input_features, output_features, bias, device  as nn.Linear's
    compute_dtype        dtype of the product; None: that of the input
    compress_statistics  quantise the scales too
    quant_type           "fp4" or "nf4"
    quant_storage        dtype that carries the packed bytes: uint8, float16, bfloat16 or float32
    The weight is quantised by the first move to a device, the CPU included.
    forward: [..., input_features] -> [..., output_features] in the dtype of the input; RuntimeError before that move.
    state_dict() holds weight [items, 1], bias and the statistics as weight.*; load_state_dict() takes it, or a float
    weight, into any Linear4bit, quantised or not; a float weight is quantised if the layer was.
    ValueError, at the first move: options outside these lists.  Dettmers et al. 2023, "QLoRA", section 3.
    """

    weight: Params4bit
    quant_state: QuantState | None
    compute_dtype: torch.dtype | None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state = None
        self.quant_storage = quant_storage
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + bias. x: [..., input_features], any float dtype."""
        weight = self.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            if not isinstance(weight, Params4bit) and self._fits(weight):
                bias = None if self.bias is None else self.bias.to(x.dtype)
                return F.linear(x, weight.to(x.dtype), bias).to(x.dtype)
            # torch.export puts fake tensors in the place of parameters, which cannot be given a class.
            state = self._state() if torch.compiler.is_compiling() else None
            if state is None:
                fix_4bit_weight_quant_state_from_module(self)
                weight, state = self.weight, self.weight.quant_state
        given, dtype, bias = x.dtype, self.compute_dtype, self.bias
        if dtype is None and given == torch.float16 and not torch.compiler.is_compiling():
            _warn_of_float16(x)
        # Params4bit.__torch_function__ would only pass this on, in Python: half of the time of a small product.
        with torch._C.DisableTorchFunctionSubclass():
            if dtype is None or dtype == given:
                return matmul_4bit(x, weight, state, bias=bias)
            return matmul_4bit(x.to(dtype), weight, state, bias=bias).to(given)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's, which an assignment calls too. A new weight and the layer know each other from there on."""
        super().register_parameter(name, param)
        if name == "weight":
            _link(self)

    def _follow(self) -> None:
        weight = self.weight
        _link(self)
        state = self.quant_state
        if state is not None and weight.device.type != "meta" and state.absmax.device != weight.device:
            state.to(weight.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()

    # ---------------------------------------------------------------- checkpoints

    def _state(self) -> QuantState | None:
        """What describes the weight, also after it has lost its class; None if it is not quantised."""
        weight, state = self.weight, self.quant_state
        if isinstance(weight, Params4bit) and weight.quant_state is not None:
            return weight.quant_state
        return state if state is not None and is_packed(weight, state) else None

    def _holds_codes(self) -> bool:
        return self._state() is not None

    def _statistics(self) -> dict[str, Tensor]:
        state = self._state()
        if state is None:
            return {}
        entries = state.as_dict(packed=True)
        if is_dtensor(self.weight):
            # torch.distributed.checkpoint looks the keys of a checkpoint up as attributes.
            self.weight.__dict__.update(entries, quant_state=state)
        return {f"weight.{key}": value for key, value in entries.items()}

    def _owns(self, name: str, prefix: str) -> bool:
        return name == f"{prefix}weight" or name.startswith(f"{prefix}weight.")

    def _take(self, weight: Tensor | None, state_dict: dict[str, Any], prefix: str, assign: bool) -> tuple[str, ...]:
        statistics = {k: v for k, v in state_dict.items() if k.startswith(f"{prefix}weight.")}
        if weight is None:
            return ()
        current = self.weight
        quantised = self._state() is not None
        if is_dtensor(current) and quantised:
            self._load_sharded(weight, statistics)
            return tuple(statistics)
        if statistics:
            self._load_packed(weight, statistics, assign)
            return (f"{prefix}weight", *statistics)
        if quantised and (not weight.is_floating_point() or weight.shape == current.shape != self._table_shape):
            raise ValueError(f"the codes have no statistics beside them, expected {prefix}weight.absmax and others")
        if not (isinstance(current, Params4bit) and self._takes_float(weight, quantised, assign)):
            return ()
        self._load_float(weight, quantised, assign)
        return (f"{prefix}weight",)

    def _load_packed(self, weight: Tensor, statistics: dict[str, Any], assign: bool) -> None:
        """Take packed codes and their statistics. The parameter stays the same object, unless it is on meta."""
        current = self.weight
        stays = isinstance(current, Params4bit) and not assign and current.device.type != "meta"
        device = weight.device if assign or current.device.type == "meta" else current.device
        if not assign:
            weight = weight.clone()
            statistics = {key: value.clone() for key, value in statistics.items()}
        loaded = Params4bit.from_prequantized(weight, statistics, device=device)
        self._check_shape(loaded.quant_state)
        if stays:
            current.data = loaded.data
            current.__dict__.update(loaded.__dict__, module=current.module)
        else:
            loaded.module = self
            self.weight = loaded
        self.quant_state, self.quant_storage = self.weight.quant_state, self.weight.dtype

    def _load_sharded(self, weight: Tensor, statistics: dict[str, Any]) -> None:
        """Take the statistics of packed codes that torch loads into the shards."""
        if not statistics:
            raise ValueError("the codes have no statistics beside them, expected all of them in every process")
        statistics = {key: value.clone() for key, value in statistics.items()}
        state = QuantState.from_dict(statistics, device=self.weight.device)
        self._check_shape(state)
        if weight.dtype != self.weight.dtype:
            raise ValueError(f"the codes have dtype {weight.dtype}, expected {self.weight.dtype}, that of the shards")
        self.quant_state = state

    def _check_shape(self, state: QuantState) -> None:
        shape, expected = tuple(state.shape), self._table_shape
        if shape != expected:
            raise ValueError(f"size mismatch: the checkpoint has {shape}, expected {expected}")

    def _load_float(self, weight: Tensor, quantised: bool, assign: bool) -> None:
        """Take a float weight [out, in]; quantise it, where the layer is, if the layer's was quantised."""
        current = self.weight
        replace = assign or current.device.type == "meta"
        options = {**current.__dict__, "module": self, "quant_state": None, "bnb_quantized": False}
        fresh = Params4bit(weight if assign else weight.clone(), **options)
        if quantised:
            fresh = fresh.to(weight.device if replace else current.device)
        if replace:
            self.weight = fresh
        else:
            current.data = fresh.data
            current.__dict__.update(fresh.__dict__, module=current.module)


def _link(module: Any) -> None:
    """Tell the weight its layer, if it has none, and the layer what the weight knows of its codes."""
    weight = module.weight
    if isinstance(weight, Params4bit):
        if weight.quant_state is not None:
            module.quant_state, module.quant_storage = weight.quant_state, weight.dtype
        if weight.module is None:
            weight.module = module


def _warn_of_float16(x: Tensor) -> None:
    purpose = "inference." if x.numel() == x.shape[-1] else "inference or training."
    warn_once(
        "Linear4bit: the input is float16 and no compute_dtype is set; results beyond 65504 become infinite. "
        f"compute_dtype=torch.bfloat16 or torch.float32 has the range for {purpose}"
    )


class LinearFP4(Linear4bit):
    """Linear4bit with quant_type "fp4". Arguments: Linear4bit, without quant_type."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """Linear4bit with quant_type "nf4": quantiles of the normal distribution, for normally distributed weights.

    Arguments: Linear4bit, without quant_type.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Device = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )
