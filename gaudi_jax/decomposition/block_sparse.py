"""Blocks on a fixed butterfly pattern plus low rank (Pixelated Butterfly, Chen et al., 2021)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from gaudi_jax.decomposition.low_rank import preconditioned, regularise, svd_factors

#: Rounds of refitting the factors and the blocks in turn.
SWEEPS = 100

Parts = tuple[Float[Array, "rank in"], Float[Array, "rank out"], Float[Array, "g d m o"]]


def butterfly_pattern(groups: int, diagonals: int) -> np.ndarray:
    """Which groups of inputs each group of outputs reads: the flat butterfly.

    Group j reads group j itself, and those whose number differs from j in one bit: the lowest bit
    first.

    Args:
        groups: of inputs, and of outputs; a power of two.
        diagonals: groups that each one reads, at most log2(groups) + 1.

    Returns:
        Numbers of groups of inputs, shape (groups, diagonals).

    Example:
        >>> from gaudi_jax.decomposition.block_sparse import butterfly_pattern
        >>> butterfly_pattern(4, 3)
        array([[0, 1, 2],
               [1, 0, 3],
               [2, 3, 0],
               [3, 2, 1]])
    """
    distances = [0, *(2**bit for bit in range(diagonals - 1))]
    return np.arange(groups)[:, None] ^ np.array(distances)


@partial(jax.jit, static_argnames=("blocks", "diagonals", "rank"))
def block_sparse_factors(
    kernel: Float[Array, "in out"],
    blocks: int,
    diagonals: int,
    rank: int,
    second_moment: Float[Array, "in in"] | None = None,
    *,
    sweeps: int | Array = SWEEPS,
) -> Parts:
    """Low-rank factors and blocks (v, u, sparse), each in turn the best for the others.

    The low-rank part starts as the truncated SVD (with a second moment: the whitened SVD), and its
    two factors are then refitted to what the blocks leave, by least squares. The blocks are what
    the low-rank part leaves in their places (with a second moment: the regression of the outputs
    on the inputs that they read). So the error never rises.

    Args:
        kernel: dense kernel W, shape (in, out).
        blocks: parts of each axis; a power of two that divides both.
        diagonals: blocks that each group of outputs has (`butterfly_pattern`).
        rank: of the low-rank part, at most min(in, out).
        second_moment: C = E[x xᵀ] of the inputs, shape (in, in), to make ``E|x (W - kernel)|²``
            small; None for ``|W - kernel|²``.
        sweeps: how often all are refitted after the start.

    Returns:
        v of shape (rank, in), u of shape (rank, out), and the blocks, shape
        (blocks, diagonals, in / blocks, out / blocks), in the order of the pattern.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.block_sparse import (
        ...     block_sparse_factors, block_sparse_kernel)
        >>> kernel = jnp.eye(8) + 1
        >>> parts = block_sparse_factors(kernel, blocks=4, diagonals=1, rank=1)
        >>> bool(jnp.allclose(block_sparse_kernel(*parts), kernel, atol=1e-3))
        True
    """
    kernel = kernel.astype(jnp.float32)
    moment = None if second_moment is None else regularise(second_moment.astype(jnp.float32))
    pattern = butterfly_pattern(blocks, diagonals)
    blocks_of = _taking(pattern) if moment is None else _fitting(pattern, moment)

    def sweep(_: int, parts: Parts) -> Parts:
        v, u, sparse = parts
        target = kernel - _scattered(sparse)
        # Of v the second moment is a factor on both sides of the least squares, and cancels.
        v = v + preconditioned(u @ u.T, u @ (target - v.T @ u).T)
        weighed = v if moment is None else v @ moment
        u = u + preconditioned(weighed @ v.T, weighed @ (target - v.T @ u))
        return v, u, blocks_of(kernel - v.T @ u)

    v, u = svd_factors(kernel, rank, second_moment=second_moment)
    return lax.fori_loop(0, sweeps, sweep, (v, u, blocks_of(kernel - v.T @ u)))


def block_sparse_kernel(
    v: Float[Array, "rank in"], u: Float[Array, "rank out"], sparse: Float[Array, "g d m o"]
) -> Float[Array, "in out"]:
    """The sum of ``v.T @ u`` and of the blocks in their places.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.block_sparse import block_sparse_kernel
        >>> block_sparse_kernel(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((2, 1, 1, 1)))
        Array([[1., 0.],
               [0., 1.]], dtype=float32)
    """
    return v.T @ u + _scattered(sparse)


def _scattered(sparse: Float[Array, "g d m o"]) -> Float[Array, "in out"]:
    """The blocks in their places, zero elsewhere."""
    blocks, diagonals, n, m = sparse.shape
    dense = jnp.zeros((blocks, blocks, n, m), sparse.dtype)
    columns = np.arange(blocks)[:, None]
    dense = dense.at[butterfly_pattern(blocks, diagonals), columns].set(sparse)
    return dense.swapaxes(1, 2).reshape(blocks * n, blocks * m)


def _taking(pattern: np.ndarray) -> Callable[[Array], Array]:
    """Gives the parts of a matrix that lie on the pattern."""
    blocks = len(pattern)

    def taken(matrix: Float[Array, "in out"]) -> Float[Array, "g d m o"]:
        grid = matrix.reshape(blocks, matrix.shape[0] // blocks, blocks, -1).swapaxes(1, 2)
        return grid[pattern, np.arange(blocks)[:, None]]

    return taken


def _fitting(pattern: np.ndarray, moment: Float[Array, "in in"]) -> Callable[[Array], Array]:
    """Gives the blocks on the pattern whose outputs come closest to those of a matrix."""
    blocks, diagonals = pattern.shape
    n = len(moment) // blocks
    read = (pattern[:, :, None] * n + np.arange(n)).reshape(blocks, -1)
    roots = jnp.linalg.cholesky(moment[read[:, :, None], read[:, None, :]])

    def fitted(matrix: Float[Array, "in out"]) -> Float[Array, "g d m o"]:
        targets = (moment @ matrix).reshape(len(moment), blocks, -1).swapaxes(0, 1)
        targets = targets[np.arange(blocks)[:, None], read]
        return jax.scipy.linalg.cho_solve((roots, True), targets).reshape(blocks, diagonals, n, -1)

    return fitted
