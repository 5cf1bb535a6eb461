"""Transformers as plain NNX modules whose linear layers are chosen by the config."""

from gaudi_jax.models.vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig"]
