"""From trained blocks to fast ones: packed layers."""

from gaudi_jax.deploy.harden import harden

__all__ = ["harden"]
