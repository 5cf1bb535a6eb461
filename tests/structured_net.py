"""A network of structured and ordinary layers, for the tests of controllers and optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gaudi_jax import GaudiLinear
from gaudi_jax.training.step import split_model


class Net(nnx.Module):
    """Structured layers of different sizes, ranks and grids, beside ordinary ones."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 24, rngs=rngs)
        self.first = GaudiLinear(24, 16, backward_smoothing=1.0, rngs=rngs)
        self.second = GaudiLinear(16, 48, rank=2, granularity=(4, 8), rngs=rngs)
        self.norm = nnx.LayerNorm(48, rngs=rngs)
        self.head = nnx.Linear(48, 4, rngs=rngs)

    def __call__(self, tokens):
        x = nnx.gelu(self.first(self.embed(tokens)))
        return self.head(self.norm(self.second(x)))


_built = functools.cache(lambda: Net(nnx.Rngs(0)))
TOKENS = jnp.arange(5)


def fresh_net():
    return nnx.clone(_built())


def loss(model):
    return (model(TOKENS) ** 2).sum()


def set_random_widths(model, seed=0):
    rng = np.random.default_rng(seed)
    for layer in (model.first, model.second):
        widths = rng.uniform(0, 1, layer.widths.shape).astype(np.float32)
        widths[0, ::4] = 0
        layer.widths[...] = jnp.asarray(widths)


def step_with_zero_gradients(model, tx):
    """Applies one step and returns the new parameters; the model is left as it is."""
    _, params, _ = split_model(model)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params):
        updates, _ = tx.update(zeros, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step(params)
