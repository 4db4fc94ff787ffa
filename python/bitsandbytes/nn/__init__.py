"""Modules: linear layers and embeddings over 4-bit and int8 weights, and embeddings for training."""

from typing import Any

from .. import gone
from . import experts, parametrize
from .experts import quantize_experts
from .layer_map import dequantize_layers, layer_map_of, quantize_layers
from .modules import (
    Embedding,
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    OutlierAwareLinear,
    Params4bit,
    StableEmbedding,
)

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
    "dequantize_layers",
    "experts",
    "layer_map_of",
    "parametrize",
    "quantize_experts",
    "quantize_layers",
]


def __getattr__(name: str) -> Any:
    return gone.find(__name__, name)
