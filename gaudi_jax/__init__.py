"""Linear layers that learn their own block-low-rank structure, in JAX and Flax NNX."""

from gaudi_jax import masks, models
from gaudi_jax.compression import Rule, compress, rebuild
from gaudi_jax.cost import cost
from gaudi_jax.decomposition import decompose
from gaudi_jax.deploy import harden
from gaudi_jax.layers import (
    BlastLinear,
    BlockSparseLinear,
    GaudiLinear,
    LowRankLinear,
    MonarchLinear,
    Structural,
)
from gaudi_jax.training.load import load, save
from gaudi_jax.training.optim import gaudi_adamw

__all__ = [
    "BlastLinear",
    "BlockSparseLinear",
    "GaudiLinear",
    "LowRankLinear",
    "MonarchLinear",
    "Rule",
    "Structural",
    "compress",
    "cost",
    "decompose",
    "gaudi_adamw",
    "harden",
    "load",
    "masks",
    "models",
    "rebuild",
    "save",
]
