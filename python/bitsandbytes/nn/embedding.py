"""Embeddings for training with 8-bit optimizers.

Rows of an embedding get few and uneven gradients, so 8-bit state is least stable there: both classes ask the
GlobalOptimManager for 32-bit state of their weight.  StableEmbedding adds a layer norm.
Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization", section 2.3.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.types import Device

from ..optim.manager import GlobalOptimManager


class _Embedding32bit(nn.Embedding):
    """nn.Embedding with Xavier-uniform initialisation and a 32-bit optimizer state for its weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keep_32bit()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled module asks again: the setting belongs to the object."""
        super().__setstate__(state)
        self._keep_32bit()

    def _keep_32bit(self) -> None:
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        """Xavier-uniform weights; the padding row, if there is one, is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class Embedding(_Embedding32bit):
    """nn.Embedding, initialised Xavier-uniformly, with 32-bit optimizer state. Arguments: nn.Embedding.

    forward: integer indices [*] -> [*, embedding_dim] in the dtype of the weight.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )


class StableEmbedding(_Embedding32bit):
    """Embedding followed by a layer norm, for stable training in low precision. Arguments: nn.Embedding.

    weight  [num_embeddings, embedding_dim] in `dtype`;  norm  a LayerNorm, made in torch's default dtype
    forward: integer indices [*] -> [*, embedding_dim] in the dtype of the weight; the norm works in its own dtype.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """Look up, normalise. input: integer indices of any shape."""
        rows = super().forward(input)
        return self.norm(rows.to(self.norm.weight.dtype)).to(self.weight.dtype)
