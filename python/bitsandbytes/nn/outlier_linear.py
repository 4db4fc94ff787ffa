"""OutlierAwareLinear: the frame of a linear layer that treats the outlier features of its input specially."""

import torch
from torch import Tensor, nn
from torch.types import Device

from ..outliers import OutlierTracer


class OutlierAwareLinear(nn.Linear):
    """nn.Linear for subclasses that quantise their weight knowing the outlier features; abstract.

    input_features, output_features, bias, device  as nn.Linear's
    outlier_dim   int64 indices of input features, from the OutlierTracer unless set before; None: it knows none
    is_quantized  True after the first forward
    The first forward asks the tracer, which OutlierTracer.initialize(model) must have prepared (a warning otherwise),
    and replaces the values of the weight by what quantize_weight() returns.
    """

    def __init__(self, input_features: int, output_features: int, bias: bool = True, device: Device = None) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """The output [..., out] for x [..., in]. For subclasses."""
        raise NotImplementedError(f"{type(self).__name__}: define forward_with_outliers(self, x, outlier_idx)")

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        """The values [out, in] that replace those of w. For subclasses."""
        raise NotImplementedError(f"{type(self).__name__}: define quantize_weight(self, w, outlier_idx)")

    def forward(self, x: Tensor) -> Tensor:
        """forward_with_outliers(x, outlier_dim); quantises first if that is still to be done."""
        if not self.is_quantized:
            if self.outlier_dim is None:
                self.outlier_dim = OutlierTracer.get_instance().get_outliers(self.weight)
            with torch.no_grad():
                self.weight.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)
