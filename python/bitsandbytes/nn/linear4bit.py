"""Linear4bit, LinearNF4, LinearFP4: linear layers over a 4-bit weight.

A forward is one operator: the packed weight and its statistics are read as they are, nothing is repacked, cached or
changed on the layer.  The layer also knows quant_state, because sharding engines return a weight that has lost its
attributes.  Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs".
"""

import torch
from torch.nn import functional as F

from ..autograd._functions import matmul_4bit
from .params4bit import Params4bit, is_packed
from .quantized_linear import QuantizedLinear, warn_once

_NOT_QUANTISED = (
    "the weight is not quantised yet: move the layer to the device it shall run on, layer.to('cpu') or "
    "layer.to('cuda'), or load a quantised checkpoint"
)


def fix_4bit_weight_quant_state_from_module(module):
    """Give module.weight its class and quant_state back, from the module, if it has lost them.

    RuntimeError: neither has a quant_state, or the weight is not what module.quant_state describes.
    """
    weight = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    state = getattr(module, "quant_state", None)
    if state is None or not is_packed(weight, state):
        raise RuntimeError(f"{type(module).__name__}: {_NOT_QUANTISED}")
    if not isinstance(weight, Params4bit):
        weight = Params4bit(weight.data, **Params4bit._options(weight, state), module=module)
        module.weight = weight
    weight.quant_state = state
    weight.bnb_quantized = True


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
    """

    def __init__(
        self,
        input_features,
        output_features,
        bias=True,
        compute_dtype=None,
        compress_statistics=True,
        quant_type="fp4",
        quant_storage=torch.uint8,
        device=None,
    ):
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

    def forward(self, x):
        """x W^T + bias. x: [..., input_features], any float dtype."""
        weight = self.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            if not isinstance(weight, Params4bit) and self._fits(weight):
                return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
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

    def _follow(self):
        weight = self.weight
        if isinstance(weight, Params4bit):
            if weight.quant_state is not None:
                self.quant_state = weight.quant_state
            if weight.module is None:
                weight.module = self
        state = self.quant_state
        if state is not None and weight.device.type != "meta" and state.absmax.device != weight.device:
            state.to(weight.device)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._follow()

    # ---------------------------------------------------------------- checkpoints

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is None and self.quant_state is not None and is_packed(self.weight, self.quant_state):
            state = self.quant_state
        if state is not None:
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _owns(self, name, prefix):
        return name == f"{prefix}weight" or name.startswith(f"{prefix}weight.")

    def _take(self, weight, state_dict, prefix, assign):
        statistics = {k: v for k, v in state_dict.items() if k.startswith(f"{prefix}weight.")}
        if weight is None:
            return ()
        current = self.weight
        quantised = getattr(current, "quant_state", None) is not None
        if statistics:
            self._load_packed(weight, statistics, assign)
            return (f"{prefix}weight", *statistics)
        if quantised and not weight.is_floating_point():
            raise ValueError(f"the codes have no statistics beside them, expected {prefix}weight.absmax and others")
        if not (isinstance(current, Params4bit) and self._takes_float(weight, quantised, assign)):
            return ()
        self._load_float(weight, quantised, assign)
        return (f"{prefix}weight",)

    def _load_packed(self, weight, statistics, assign):
        """Take packed codes and their statistics. The parameter stays the same object, unless it is on meta."""
        current = self.weight
        stays = isinstance(current, Params4bit) and not assign and current.device.type != "meta"
        device = weight.device if assign or current.device.type == "meta" else current.device
        if not assign:
            weight = weight.clone()
            statistics = {key: value.clone() for key, value in statistics.items()}
        loaded = Params4bit.from_prequantized(weight, statistics, device=device)
        shape = tuple(loaded.quant_state.shape)
        expected = self._table_shape
        if shape != expected:
            raise ValueError(f"size mismatch: the checkpoint has {shape}, expected {expected}")
        if stays:
            current.data = loaded.data
            current.__dict__.update(loaded.__dict__, module=current.module)
        else:
            loaded.module = self
            self.weight = loaded
        self.quant_state = self.weight.quant_state

    def _load_float(self, weight, quantised, assign):
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


def _warn_of_float16(x):
    purpose = "inference." if x.numel() == x.shape[-1] else "inference or training."
    warn_once(
        "Linear4bit: the input is float16 and no compute_dtype is set; results beyond 65504 become infinite. "
        f"compute_dtype=torch.bfloat16 or torch.float32 has the range for {purpose}"
    )


class LinearFP4(Linear4bit):
    """Linear4bit with quant_type "fp4"."""

    def __init__(
        self,
        input_features,
        output_features,
        bias=True,
        compute_dtype=None,
        compress_statistics=True,
        quant_storage=torch.uint8,
        device=None,
    ):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )


class LinearNF4(Linear4bit):
    """Linear4bit with quant_type "nf4": quantiles of the normal distribution, for normally distributed weights."""

    def __init__(
        self,
        input_features,
        output_features,
        bias=True,
        compute_dtype=None,
        compress_statistics=True,
        quant_storage=torch.uint8,
        device=None,
    ):
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )
