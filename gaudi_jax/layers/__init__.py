"""Structured linear layers on one contract (`base.py`)."""

from gaudi_jax.layers.base import Location, Sigma, Structural, StructuredLinear, Width
from gaudi_jax.layers.blast import BlastLinear
from gaudi_jax.layers.block_sparse import BlockSparseLinear
from gaudi_jax.layers.gaudi import GaudiLinear
from gaudi_jax.layers.general import GeneralLinear
from gaudi_jax.layers.grid import GridLinear
from gaudi_jax.layers.low_rank import LowRankLinear
from gaudi_jax.layers.monarch import MonarchLinear
from gaudi_jax.layers.packed import PackedLinear

__all__ = [
    "BlastLinear",
    "BlockSparseLinear",
    "GaudiLinear",
    "GeneralLinear",
    "GridLinear",
    "Location",
    "LowRankLinear",
    "MonarchLinear",
    "PackedLinear",
    "Sigma",
    "Structural",
    "StructuredLinear",
    "Width",
]
