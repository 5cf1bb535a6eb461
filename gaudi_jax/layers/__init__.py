"""Structured linear layers on one contract (`base.py`)."""

from gaudi_jax.layers.base import Location, Sigma, Structural, StructuredLinear, Width
from gaudi_jax.layers.gaudi import GaudiLinear
from gaudi_jax.layers.general import GeneralLinear
from gaudi_jax.layers.low_rank import LowRankLinear

__all__ = [
    "GaudiLinear",
    "GeneralLinear",
    "Location",
    "LowRankLinear",
    "Sigma",
    "Structural",
    "StructuredLinear",
    "Width",
]
