"""Replacing the dense layers of a trained network by structured ones."""

from gaudi_jax.compression.compress import Compressed, compress
from gaudi_jax.compression.densify import densify
from gaudi_jax.compression.plan import plan_table, rebuild
from gaudi_jax.compression.rules import Rule

__all__ = ["Compressed", "Rule", "compress", "densify", "plan_table", "rebuild"]
