"""A trained model as one file that needs only JAX and flatbuffers."""

from gaudi_jax.export.artifact import export_model
from gaudi_jax.export.loader import load_exported

__all__ = ["export_model", "load_exported"]
