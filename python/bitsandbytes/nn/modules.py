"""All modules of this package under one name, where clients look for them."""

from typing import Any

from .. import gone
from .embedding import Embedding, StableEmbedding
from .int8params import Int8Params
from .linear4bit import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from .linear8bit import Linear8bitLt, maybe_rearrange_weight
from .outlier_linear import OutlierAwareLinear
from .params4bit import Params4bit
from .quantized_embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "fix_4bit_weight_quant_state_from_module",
    "maybe_rearrange_weight",
]


def __getattr__(name: str) -> Any:
    return gone.find(__name__, name)
