"""Transformers as plain NNX modules whose linear layers are chosen by the config."""

from gaudi_jax.models.gpt2 import GPT2, GPT2Config
from gaudi_jax.models.vit import ViT, ViTConfig

__all__ = ["GPT2", "GPT2Config", "ViT", "ViTConfig"]
