"""Models as other people write them, for the tests of compression."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 16


class Encoder(nnx.Module):
    """A pre-norm transformer encoder on flax's own attention, with dropout."""

    def __init__(self, rngs: nnx.Rngs, *, depth: int = 1, **options):
        self.layers = nnx.List([EncoderLayer(rngs, **options) for _ in range(depth)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(self.norm(x).mean(axis=-2))


class EncoderLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **options):
        self.attn_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.self_attn = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs, **options)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, WIDTH, rngs=rngs),
            nnx.gelu,
            nnx.Dropout(0.1, rngs=rngs),
            nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs),
        )

    def __call__(self, x, mask=None):
        x = x + self.self_attn(self.attn_norm(x), mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class Recurrent(nnx.Module):
    """One block held in several places, and a head whose kernel is that of a projection."""

    def __init__(self, rngs: nnx.Rngs):
        block = nnx.Sequential(
            nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.tanh, nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        )
        self.body = nnx.Sequential(block, block)
        self.first = block
        self.pair = nnx.data((block.layers[0], [block.layers[2]]))
        self.embed = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head.kernel = self.embed.kernel
        self.itself = nnx.data(self)

    def __call__(self, x):
        return self.head(self.body(self.first(self.embed(x))))


def tokens(seed: int = 0, *shape: int, mean: float = 0.0):
    """Inputs with few strong directions, as real ones have."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(WIDTH, WIDTH)) * np.exp(-np.arange(WIDTH) / 4)
    x = generator.normal(size=(*(shape or (4, 10)), WIDTH)) @ mixing.T
    return jnp.asarray(x + mean, jnp.float32)
