"""From trained blocks to fast ones: packed layers, and files that need none of our code."""

from gaudi_jax.deploy.harden import harden

__all__ = ["harden"]
