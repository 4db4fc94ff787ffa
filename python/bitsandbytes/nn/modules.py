"""All modules of this package under one name, where clients look for them."""

from .embedding import Embedding, StableEmbedding

__all__ = ["Embedding", "StableEmbedding"]
