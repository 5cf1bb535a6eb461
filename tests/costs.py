"""What the tests of costs share: layers, a small language model, and how rows are read."""

import jax
import jax.numpy as jnp
from flax import nnx

from gaudi_jax.cost import Cost
from gaudi_jax.layers import GaudiLinear, LowRankLinear


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def linear(n_in, n_out, **options):
    return nnx.Linear(n_in, n_out, rngs=nnx.Rngs(0), **options)


def gaudi(n_in, n_out):
    return GaudiLinear(n_in, n_out, rngs=nnx.Rngs(0))


def by_path(result: Cost):
    return {row.path: row for row in result.layers}


def applications(result: Cost):
    return {row.path: row.applications for row in result.layers}


def products(result: Cost):
    """Multiplications of the inner products outside the layers."""
    return sum(row.multiplications for row in result.others if row.kind == "other products")


class Language(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(50, 8, rngs=nnx.Rngs(0))
        self.layer = LowRankLinear(8, 8, rank=2, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return self.embed.attend(self.layer(self.embed(tokens)))
