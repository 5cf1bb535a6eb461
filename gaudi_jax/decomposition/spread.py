"""Blocks of one size, spread evenly over a kernel and fitted to it: nothing is searched for."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gaudi_jax.decomposition.decompose import (
    Factors,
    affordable,
    check_matrices,
    check_structure,
    scaled,
)
from gaudi_jax.decomposition.low_rank import regularise
from gaudi_jax.decomposition.parts import Windows, least_cost, spread_windows
from gaudi_jax.errors import UserError

#: The fit ends when a sweep takes less than this share off the squared error.
SLOW = 1e-3


def spread(
    kernel: Float[Array, "in out"],
    budget: float,
    *,
    rank: int = 1,
    granularity: int | tuple[int, int] = 1,
    parts: int | None = None,
    second_moment: Float[Array, "in in"] | None = None,
    sweeps: int = 60,
) -> Factors:
    """Approximates a kernel by blocks of one size that are spread evenly over it.

    Each axis is cut into equal parts, and a block lies on one part of each. All parts of an axis
    hold the same number of blocks, to within one; which parts meet follows the R2 sequence, whose
    points fill a square evenly. Parts are as long as ⌊min(in, out) / rank⌋ blocks can be, or a
    little longer, in proportion to the axes. All blocks on a pair of parts are fitted at once,
    exactly, and their columns are orthogonal to each other; with a second moment pairs depend on
    each other, and are fitted in turn.

    The result is farther from the kernel than that of `gaudi_jax.decompose`. Once its factors are
    trained on it may be the better one, as on texts (docs/learning.md).

    Args:
        kernel: dense kernel, shape (in, out).
        budget: multiplications as a fraction of in·out.
        rank: columns of each block.
        granularity: grid cell of the parts in features: a number, or a pair (input, output). Each
            divides its axis.
        parts: the most that each axis is cut into, at least 1; None for as many as the budget asks
            for. Fewer parts make fewer and larger blocks, which are faster once packed; 1 is low
            rank.
        second_moment: E[x xᵀ] of the layer's inputs, shape (in, in), to fit outputs instead of the
            kernel.
        sweeps: most refits of all blocks to the second moment. It ends earlier where one takes less
            than a thousandth off the squared error.

    Returns:
        ⌊min(in, out) / rank⌋ blocks, of which those in use come first, in float32. Parts differ by
        a cell where their number does not divide the axis.

    Raises:
        UserError: as `gaudi_jax.decompose`; or kernels are stacked, `parts` or `sweeps` is no whole
            number from 1 on, or the budget does not buy a block on each part.

    Source:
        M. Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018), for R2.

    Example:
        >>> import jax
        >>> from gaudi_jax.decomposition import spread
        >>> factors = spread(jax.random.normal(jax.random.key(0), (16, 24)), 0.5)
        >>> factors.v.shape, int(factors.multiplications())
        ((16, 1, 16), 192)
    """
    kernel = kernel if hasattr(kernel, "shape") else jnp.asarray(kernel)
    shape = check_matrices("kernel", kernel)
    if len(shape) != 2:
        raise UserError(f"kernel of shape {shape} is no matrix; spread blocks over one at a time")
    n, m = shape
    cell = check_structure(n, m, budget, rank, granularity)
    for name, number in (("parts", 1 if parts is None else parts), ("sweeps", sweeps)):
        if not isinstance(number, int | np.integer) or number < 1:
            raise UserError(f"{name}={number} must be a whole number, at least 1")
    cost, least = affordable(budget, n * m), least_cost(shape, cell, rank, parts)
    if cost < least:
        raise UserError(
            f"budget={budget} is less than {least / (n * m):.4g}, the least that blocks cost that "
            f"read and write all of a {n}x{m} kernel; give a larger one"
        )
    if second_moment is not None:
        found = check_matrices("second_moment", second_moment, symmetric=True)
        if found != (n, n):
            raise UserError(
                f"second_moment of shape {found} does not fit a kernel of shape {shape}; it must "
                f"have shape {(n, n)}"
            )
    windows = spread_windows(shape, cell, cost, rank, parts)
    return fit_windows(kernel, second_moment, windows, cell, rank, sweeps)


class _Tile(NamedTuple):
    """A pair of parts, and the blocks on it."""

    inputs: slice
    outputs: slice
    blocks: list[int]


def fit_windows(
    kernel: Float[Array, "in out"],
    second_moment: Float[Array, "in in"] | None,
    windows: Windows,
    cell: tuple[int, int],
    rank: int,
    sweeps: int,
) -> Factors:
    """Blocks on given windows, fitted to a kernel.

    Args:
        kernel: dense kernel.
        second_moment: as that of `spread`.
        windows: of all blocks; two of them that meet on an axis coincide there.
        cell: features of a grid cell on both axes.
        rank: columns of a block.
        sweeps: most refits of all blocks.

    Example:
        >>> import jax
        >>> from gaudi_jax.decomposition.parts import spread_windows
        >>> from gaudi_jax.decomposition.spread import fit_windows
        >>> windows = spread_windows((16, 24), (1, 1), cost=192, rank=1, parts=None)
        >>> kernel = jax.random.normal(jax.random.key(0), (16, 24))
        >>> fit_windows(kernel, None, windows, (1, 1), rank=1, sweeps=1).u.shape
        (16, 1, 24)
    """
    # On the host, where no number of blocks has to be compiled for, and in double precision.
    dense = np.asarray(kernel, np.float64)
    tiles = _tiles(windows, cell)
    if second_moment is None:
        content = [_truncated(dense[s, t], rank * len(blocks)) for s, t, blocks in tiles]
    else:
        content = _swept(dense, _weights(second_moment), tiles, rank, sweeps)
    v, u = (np.zeros((windows.length.shape[1], rank, size)) for size in dense.shape)
    for (inputs, outputs, blocks), kept in zip(tiles, content, strict=True):
        left, right = _columns(kept, rank * len(blocks))
        v[blocks, :, inputs] = left.reshape(len(blocks), rank, -1)
        u[blocks, :, outputs] = right.reshape(len(blocks), rank, -1)
    cells = np.array(dense.shape)[:, None] / np.array(cell)[:, None]
    found = v, u, windows.length / cells, windows.start / cells
    return Factors(*(jnp.asarray(x, jnp.float32) for x in found))


def _swept(
    kernel: np.ndarray, weights: np.ndarray, tiles: Sequence[_Tile], rank: int, sweeps: int
) -> list[np.ndarray]:
    """What tiles hold, fitted one after the other, in sweeps over the kernel.

    With C the weights, C_SS = L Lᵀ inside a tile's inputs S, and R what all other tiles leave of
    the kernel, the best tile of a rank is ``L⁻ᵀ`` times the truncated SVD of ``L⁻¹ (C R)``.
    """
    roots = {tile.inputs.start: _root(weights, tile.inputs) for tile in tiles}
    rest, error, content = kernel.copy(), np.inf, []
    for inputs, outputs, blocks in tiles:
        root, inverse = roots[inputs.start]
        content.append(inverse.T @ _truncated(root.T @ kernel[inputs, outputs], rank * len(blocks)))
        rest[inputs, outputs] -= content[-1]
    for _ in range(sweeps):
        for i, (inputs, outputs, blocks) in enumerate(tiles):
            root, inverse = roots[inputs.start]
            best = root.T @ content[i] + inverse @ (weights[inputs] @ rest[:, outputs])
            old, content[i] = content[i], inverse.T @ _truncated(best, rank * len(blocks))
            rest[inputs, outputs] += old - content[i]
        before, error = error, float(np.vdot(rest, weights @ rest))
        if error >= (1 - SLOW) * before:
            break
    return content


def _weights(second_moment: Float[Array, "in in"]) -> np.ndarray:
    size = jnp.trace(second_moment) / len(second_moment)
    return np.asarray(regularise(scaled(second_moment.astype(jnp.float32), size)[0]), np.float64)


def _tiles(windows: Windows, cell: tuple[int, int]) -> list[_Tile]:
    tiles: dict[tuple[int, ...], _Tile] = {}
    for block in range(windows.blocks):
        start = windows.start[:, block] * cell
        inputs, outputs = map(slice, start, start + windows.length[:, block] * cell)
        tiles.setdefault(tuple(start.tolist()), _Tile(inputs, outputs, [])).blocks.append(block)
    return list(tiles.values())


def _root(weights: np.ndarray, inputs: slice) -> tuple[np.ndarray, np.ndarray]:
    """The Cholesky factor of a part's weights, and its inverse."""
    try:
        root = np.linalg.cholesky(weights[inputs, inputs])
    except np.linalg.LinAlgError:
        raise UserError(
            f"second_moment of shape {weights.shape} is no E[x xᵀ]: it has negative eigenvalues"
        ) from None
    return root, np.linalg.inv(root)


def _truncated(x: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix of a rank."""
    if x.shape[0] < x.shape[1]:
        return _truncated(x.T, rank).T
    top = np.linalg.eigh(x.T @ x)[1][:, -rank:]
    return x @ top @ top.T


def _columns(x: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns (left, right), shape (rank, ...), of a matrix of no higher rank.

    They are orthogonal and of equal norms. Columns that nearly cancel each other make the same
    kernel, on which training goes wrong: at half of the cost a small GPT lost more so than by low
    rank.
    """
    left, values, right = np.linalg.svd(x, full_matrices=False)
    most = min(rank, len(values))
    roots = np.sqrt(values[:most])[:, None]
    columns = np.zeros((rank, x.shape[0])), np.zeros((rank, x.shape[1]))
    columns[0][:most], columns[1][:most] = roots * left.T[:most], roots * right[:most]
    return columns
