"""Blocks of one size, spread evenly over a kernel and fitted to it: nothing is searched for."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gaudi_jax.decomposition.axes import PartedAxis, PlainAxis
from gaudi_jax.decomposition.decompose import (
    Factors,
    affordable,
    as_factors,
    check_matrices,
    check_structure,
    scaled,
)
from gaudi_jax.decomposition.low_rank import regularise
from gaudi_jax.decomposition.search import weighed_error
from gaudi_jax.decomposition.sweeps import Axes, Blocks, sweep
from gaudi_jax.decomposition.windows import window_mask
from gaudi_jax.errors import UserError

#: Refits of all factors.
SWEEPS = 60
#: Steps on both axes that leave the most even gaps in the plane: 1/p and 1/p², p³ = p + 1.
STEPS = 0.7548776662466927, 0.5698402909980532


def spread(
    kernel: Float[Array, "in out"],
    budget: float,
    *,
    rank: int = 1,
    granularity: int | tuple[int, int] = 1,
    parts: int | None = None,
    second_moment: Float[Array, "in in"] | None = None,
) -> Factors:
    """Approximates a kernel by as many blocks of one size as there can be, evenly spread.

    Each axis is cut into equal parts, and a block lies on one part of each: which ones follows the
    R2 sequence, whose points fill a square evenly however many there are. Factors are fitted by
    exact coordinate descent. The result is farther from the kernel than that of
    `gaudi_jax.decompose`, and the better one once its factors are trained on (docs/learning.md).

    Args:
        kernel: dense kernel, shape (in, out).
        budget: multiplications as a fraction of in·out.
        rank: columns of each block.
        granularity: grid cell of the parts in features: a number, or a pair (input, output). Each
            divides its axis.
        parts: the most that each axis is cut into, at least 1; None for as many as there can be.
            Fewer parts make fewer and larger blocks, which are faster once packed; 1 is low rank.
        second_moment: E[x xᵀ] of the layer's inputs, shape (in, in), to fit outputs instead of the
            kernel.

    Returns:
        ⌊min(in, out) / rank⌋ blocks, of which those in use come first, in float32. Parts differ by
        a cell where their number does not divide the axis.

    Raises:
        UserError: as `gaudi_jax.decompose`; or kernels are stacked, or `parts` is below 1.

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
    if parts is not None and parts < 1:
        raise UserError(f"parts={parts} must be at least 1; leave it out for as many as can be")
    if second_moment is not None:
        found = check_matrices("second_moment", second_moment, symmetric=True)
        if found != (n, n):
            raise UserError(
                f"second_moment of shape {found} does not fit a kernel of shape {shape}; it must "
                f"have shape {(n, n)}"
            )
    windows = _windows((n, m), cell, affordable(budget, n * m), rank, parts or max(n, m))
    start, length = jnp.asarray(windows.start), jnp.asarray(windows.length)
    part = jnp.asarray(np.repeat(windows.part, cell[0]))
    return _spread(kernel, second_moment, start, length, part, rank=rank, cell=cell)


class Windows(NamedTuple):
    """Where blocks lie, in cells.

    Attributes:
        start: first cells, shape (2, S); row 0 input, row 1 output.
        length: cells, shape (2, S); 0 for slots that are free.
        part: the part that each cell of the input axis belongs to.
    """

    start: np.ndarray
    length: np.ndarray
    part: np.ndarray


def _windows(
    shape: tuple[int, int], cell: tuple[int, int], cost: int, rank: int, most: int
) -> Windows:
    """As many windows as a cost buys, on parts of both axes."""
    slots, per_column = min(shape) // rank, cost // rank
    cells = [size // c for size, c in zip(shape, cell, strict=True)]
    number = np.arange(slots)

    def on(parts: tuple[int, int]) -> Windows:
        edges = [np.arange(p + 1) * size // p for p, size in zip(parts, cells, strict=True)]
        chosen = [
            (((0.5 + step * number) % 1) * p).astype(int)
            for p, step in zip(parts, STEPS, strict=True)
        ]
        start = np.stack([e[i] for e, i in zip(edges, chosen, strict=True)])
        length = np.stack([np.diff(e)[i] for e, i in zip(edges, chosen, strict=True)])
        affordable = np.cumsum(np.array(cell) @ length) <= per_column
        part = np.repeat(np.arange(parts[0]), np.diff(edges[0]))
        return Windows(np.where(affordable, start, 0), np.where(affordable, length, 0), part)

    # Smaller blocks of these proportions have fewer entries than their factors.
    smallest = rank * sum(shape) ** 2 / math.prod(shape)
    each = min(max(per_column / slots, smallest), per_column)

    def counts(axis: int, length: float) -> list[int]:
        """Counts of parts that come next to a length in features."""
        wanted = shape[axis] / max(length, cell[axis])
        return sorted({min(max(f(wanted), 1), cells[axis], most) for f in (math.floor, math.ceil)})

    # In proportion to the axes, but at least a cell on each; those that leave the least unspent.
    first = counts(0, each - max(each * shape[1] / sum(shape), cell[1]))
    pairs = [(p, q) for p in first for q in counts(1, each - shape[0] / p)]
    every = [on(pair) for pair in pairs]
    return max(every, key=lambda windows: int((np.array(cell) @ windows.length).sum()))


def fit_windows(
    kernel: Float[Array, "in out"],
    axes: Axes,
    start: Int[Array, "2 S"],
    length: Int[Array, "2 S"],
    *,
    rank: int,
    key: Array,
) -> Blocks:
    """Blocks on given windows, fitted to a kernel by sweeps from random factors.

    Args:
        kernel: dense kernel.
        axes: both axes.
        start: first cells of the windows; those in use first.
        length: cells of the windows, 0 in free slots.
        rank: columns of each block.
        key: random key of the first factors.
    """
    factors = []
    for axis, first, cells, part in zip(axes, start, length, jax.random.split(key), strict=True):
        inside = window_mask(first, cells, axis.cells, axis.cell)[:, None]
        drawn = jax.random.normal(part, (len(first), rank, axis.cells * axis.cell))
        factors.append(jnp.where(inside, drawn, 0))
    blocks = Blocks(factors[0], factors[1], start, length)

    def refit(_: int, both: tuple[Array, Blocks]) -> tuple[Array, Blocks]:
        return sweep(*both, both[1].live.sum(), 0.0, axes, move_windows=False)

    begin = weighed_error(kernel, blocks, axes), blocks
    return lax.fori_loop(0, SWEEPS, refit, begin)[1]


@partial(jax.jit, static_argnames=("rank", "cell"))
def _spread(
    kernel: Float[Array, "in out"],
    moment: Float[Array, "in in"] | None,
    start: Int[Array, "2 S"],
    length: Int[Array, "2 S"],
    part: Int[Array, " in"],
    *,
    rank: int,
    cell: tuple[int, int],
) -> Factors:
    # Accelerators would multiply in fewer bits, and small differences of large numbers matter.
    with jax.default_matmul_precision("highest"):
        kernel, scale = scaled(kernel.astype(jnp.float32), jnp.abs(kernel).max())
        n, m = kernel.shape
        axes = Axes(PlainAxis(n // cell[0], cell[0]), PlainAxis(m // cell[1], cell[1]))
        if moment is not None:
            moment = regularise(scaled(moment.astype(jnp.float32), jnp.trace(moment) / n)[0])
            axes = axes._replace(input=PartedAxis.of(moment, part, n // cell[0]))
        blocks = fit_windows(kernel, axes, start, length, rank=rank, key=jax.random.key(0))
        return as_factors(blocks, axes, scale)
