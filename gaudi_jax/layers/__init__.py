"""Structured linear layers on one contract (`base.py`)."""

from gaudi_jax.layers.base import Location, Sigma, Structural, StructuredLinear, Width
from gaudi_jax.layers.gaudi import GaudiLinear
from gaudi_jax.layers.general import GeneralLinear
from gaudi_jax.layers.low_rank import LowRankLinear
from gaudi_jax.layers.packed import PackedLinear

__all__ = [
    "GaudiLinear",
    "GeneralLinear",
    "Location",
    "LowRankLinear",
    "PackedLinear",
    "Sigma",
    "Structural",
    "StructuredLinear",
    "Width",
]
