"""Best cyclic windows on a grid of cells."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def best_windows(
    gains: Float[Array, "*batch cells"],
) -> tuple[Float[Array, "*batch"], Int[Array, "*batch"], Int[Array, "*batch"]]:
    """The cyclic window with the greatest sum, in time linear in the number of cells.

    The best window is either the best one that does not cross the end, or the complement of the
    worst one. Both come from prefix sums and their running extremes.

    Args:
        gains: what each cell adds to a window that holds it; of any sign.

    Returns:
        Sum, first cell and number of cells of the best window, each of shape (*batch).

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.windows import best_windows
        >>> [int(x) for x in best_windows(jnp.array([3.0, -1.0, -2.0, 4.0]))]
        [7, 3, 2]
    """
    cells = gains.shape[-1]
    prefix = jnp.cumsum(gains, axis=-1)
    prefix = jnp.concatenate([jnp.zeros_like(prefix[..., :1]), prefix], axis=-1)
    value, start, length = _best_plain_window(prefix)
    rest, rest_start, rest_length = _best_plain_window(-prefix)
    around = prefix[..., -1] + rest
    wraps = around > value
    return (
        jnp.where(wraps, around, value),
        jnp.where(wraps, (rest_start + rest_length) % cells, start % cells),
        jnp.where(wraps, cells - rest_length, length),
    )


def _best_plain_window(prefix: Array) -> tuple[Array, Array, Array]:
    """Greatest rise of a prefix sum: value, place of its foot, and length."""
    rise = prefix - lax.cummin(prefix, axis=prefix.ndim - 1)
    end = jnp.argmax(rise, axis=-1).astype(jnp.int32)
    places = jnp.arange(prefix.shape[-1])
    before = jnp.where(places <= end[..., None], prefix, jnp.inf)
    start = jnp.argmin(before, axis=-1).astype(jnp.int32)
    return rise.max(axis=-1), start, end - start


def best_prefixes(
    gains: Float[Array, "*batch cells"],
) -> tuple[Float[Array, "*batch"], Int[Array, "*batch"]]:
    """Sum and length, at least 1, of the beginning with the greatest sum.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.windows import best_prefixes
        >>> [int(x) for x in best_prefixes(jnp.array([3.0, -1.0, 2.0, -4.0]))]
        [4, 3]
    """
    sums = jnp.cumsum(gains, axis=-1)
    return sums.max(axis=-1), jnp.argmax(sums, axis=-1).astype(jnp.int32) + 1


def window_mask(
    start: Int[Array, "*batch"], length: Int[Array, "*batch"], cells: int, cell: int
) -> Bool[Array, "*batch n"]:
    """True on the features of cyclic windows given in cells of `cell` features.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.windows import window_mask
        >>> window_mask(jnp.array(2), jnp.array(2), 3, 2).astype(int)
        Array([1, 1, 0, 0, 1, 1], dtype=int32)
    """
    inside = (jnp.arange(cells) - start[..., None]) % cells < length[..., None]
    return jnp.repeat(inside, cell, axis=-1)


def cell_energies(
    values: Float[Array, "*batch rank n"], cells: int
) -> Float[Array, "*batch cells"]:
    """Sum of squares over the rank and over each cell.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.windows import cell_energies
        >>> cell_energies(jnp.array([[1.0, 2.0, 3.0, 0.0]]), 2)
        Array([5., 9.], dtype=float32)
    """
    squares = jnp.square(values).sum(axis=-2)
    return squares.reshape(*squares.shape[:-1], cells, -1).sum(axis=-1)
