"""Initial widths and locations of the blocks of a GaudiLinear.

An initializer is a function ``(key, in_features, out_features, num_blocks, rank) -> (2, B)``: row 0
is the input axis, row 1 the output axis. All are traceable.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gaudi_jax.errors import UserError

StructureInit = Callable[[Array, int, int, int, int], Float[Array, "2 B"]]


def split_widths(density: float | None = None) -> StructureInit:
    """Half of the cost in full-width blocks, half in many narrow ones.

    With k full-size blocks affordable, the first ⌊k/2⌋ blocks get width 1 and the others
    (k/2) / (B - k/2), so that the start costs about ``rank k (in + out)`` multiplications.

    Args:
        density: k as a fraction of the blocks, in (0, 1]; None takes
            ``k = in·out / (rank (in + out))``, which costs about as much as the dense layer.

    Example:
        >>> from gaudi_jax.layers.initializers import split_widths
        >>> split_widths(0.5)(None, 8, 8, 8, 1)[0].round(3)
        Array([1.   , 1.   , 0.333, 0.333, 0.333, 0.333, 0.333, 0.333], dtype=float32)
    """
    _check_density(density)

    def init(key, in_features, out_features, num_blocks, rank):
        half = _full_blocks(density, in_features, out_features, num_blocks, rank) / 2
        narrow = half / (num_blocks - half)
        widths = jnp.where(jnp.arange(num_blocks) < int(half), 1.0, narrow)
        return jnp.tile(widths.astype(jnp.float32), (2, 1))

    return init


def leading_widths(density: float | None = None) -> StructureInit:
    """The first ``density * B`` blocks at width 1, the others dead: a truncated SVD.

    Args:
        density: active fraction of the blocks, in (0, 1], rounded to at least one block; None
            takes as many as cost no more than the dense layer.

    Example:
        >>> from gaudi_jax.layers.initializers import leading_widths
        >>> leading_widths(0.5)(None, 8, 8, 4, 1)[1]
        Array([1., 1., 0., 0.], dtype=float32)
    """
    _check_density(density)

    def init(key, in_features, out_features, num_blocks, rank):
        full = _full_blocks(density, in_features, out_features, num_blocks, rank)
        count = int(full) if density is None else round(full)
        active = jnp.arange(num_blocks) < max(1, count)
        return jnp.tile(active.astype(jnp.float32), (2, 1))

    return init


def random_widths(density: float | None = None) -> StructureInit:
    """Uniform between 0 and twice the mean, at a cost of about `split_widths`.

    Args:
        density: see there.

    Example:
        >>> import jax
        >>> from gaudi_jax.layers.initializers import random_widths
        >>> widths = random_widths(0.25)(jax.random.key(0), 64, 64, 64, 1)
        >>> bool(widths.max() <= 0.5), bool(abs(widths.mean() - 0.25) < 0.05)
        (True, True)
    """
    _check_density(density)

    def init(key, in_features, out_features, num_blocks, rank):
        mean = _full_blocks(density, in_features, out_features, num_blocks, rank) / num_blocks
        return jax.random.uniform(key, (2, num_blocks), maxval=min(2 * mean, 1.0))

    return init


def zero_locations() -> StructureInit:
    """All intervals start at place 0.

    Example:
        >>> from gaudi_jax.layers.initializers import zero_locations
        >>> zero_locations()(None, 8, 8, 2, 1)
        Array([[0., 0.],
               [0., 0.]], dtype=float32)
    """
    return lambda key, in_features, out_features, num_blocks, rank: jnp.zeros((2, num_blocks))


def spaced_locations() -> StructureInit:
    """Block b starts at b / B on both axes.

    Example:
        >>> from gaudi_jax.layers.initializers import spaced_locations
        >>> spaced_locations()(None, 8, 8, 4, 1)[0]
        Array([0.  , 0.25, 0.5 , 0.75], dtype=float32)
    """
    return lambda key, in_features, out_features, num_blocks, rank: jnp.tile(
        jnp.arange(num_blocks, dtype=jnp.float32) / num_blocks, (2, 1)
    )


def random_locations() -> StructureInit:
    """Intervals start anywhere.

    Example:
        >>> import jax
        >>> from gaudi_jax.layers.initializers import random_locations
        >>> random_locations()(jax.random.key(0), 8, 8, 4, 1).shape
        (2, 4)
    """
    return lambda key, in_features, out_features, num_blocks, rank: jax.random.uniform(
        key, (2, num_blocks)
    )


def _full_blocks(
    density: float | None, in_features: int, out_features: int, num_blocks: int, rank: int
) -> float:
    """Full-size blocks that the density affords, or that cost as much as the dense layer."""
    if density is not None:
        return density * num_blocks
    return min(in_features * out_features / (rank * (in_features + out_features)), num_blocks)


def _check_density(density: float | None) -> None:
    if density is not None and not 0 < density <= 1:
        raise UserError(f"density={density} is outside (0, 1]; give a fraction of the blocks")
