"""Modules: embeddings whose optimizer state stays 32-bit."""

from .modules import Embedding, StableEmbedding

__all__ = ["Embedding", "StableEmbedding"]
