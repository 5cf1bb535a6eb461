"""Blocks of one size, spread evenly over a kernel and fitted to it: nothing is searched for."""

import itertools
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

#: Steps on both axes that leave the most even gaps in the plane: 1/g and 1/g², g³ = g + 1.
STEPS = 0.7548776662466927, 0.5698402909980532
#: Of what is spent at most, what is enough: more blocks are worth more than the rest.
ENOUGH = 0.98


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
    little longer, in proportion to the axes. Factors are fitted by exact coordinate descent.

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
        sweeps: refits of all factors.

    Returns:
        ⌊min(in, out) / rank⌋ blocks, of which those in use come first, in float32. Parts differ by
        a cell where their number does not divide the axis.

    Raises:
        UserError: as `gaudi_jax.decompose`; or kernels are stacked, `parts` is below 1, or the
            budget buys no block.

    Source:
        M. Roberts, "The unreasonable effectiveness of quasirandom sequences" (2018), for R2.

    Example:
        >>> import jax
        >>> from gaudi_jax.decomposition import spread
        >>> factors = spread(jax.random.normal(jax.random.key(0), (16, 24)), 0.5)
        >>> factors.v.shape, int(factors.multiplications())
        ((16, 1, 16), 180)
    """
    kernel = kernel if hasattr(kernel, "shape") else jnp.asarray(kernel)
    shape = check_matrices("kernel", kernel)
    if len(shape) != 2:
        raise UserError(f"kernel of shape {shape} is no matrix; spread blocks over one at a time")
    n, m = shape
    cell = check_structure(n, m, budget, rank, granularity)
    if parts is not None and parts < 1:
        raise UserError(f"parts={parts} must be at least 1; leave it out for as many as can be")
    cost, least = affordable(budget, n * m), least_cost(shape, cell, rank, parts)
    if cost < least:
        raise UserError(
            f"budget={budget} buys no block of a {n}x{m} kernel; the least is {least / (n * m):.4g}"
        )
    if second_moment is not None:
        found = check_matrices("second_moment", second_moment, symmetric=True)
        if found != (n, n):
            raise UserError(
                f"second_moment of shape {found} does not fit a kernel of shape {shape}; it must "
                f"have shape {(n, n)}"
            )
    windows = spread_windows(shape, cell, cost, rank, parts)
    start, length = jnp.asarray(windows.start), jnp.asarray(windows.length)
    part = jnp.asarray(np.repeat(windows.part, cell[0]))
    return _spread(kernel, second_moment, start, length, part, sweeps, rank=rank, cell=cell)


def least_cost(shape: tuple[int, int], cell: tuple[int, int], rank: int, parts: int | None) -> int:
    """Multiplications of the smallest block that there can be.

    Args:
        shape: (in, out) of the kernel.
        cell: features of a grid cell on both axes.
        rank: columns of a block.
        parts: the most that each axis is cut into; None for no limit.
    """
    a, b = (
        math.ceil(size // c / min(size // c, parts or size)) * c
        for size, c in zip(shape, cell, strict=True)
    )
    return min(rank * (a + b), a * b)


class Windows(NamedTuple):
    """Where blocks lie, in cells.

    Attributes:
        start: first cells, shape (2, S); row 0 input, row 1 output.
        length: cells, shape (2, S); 0 for slots that are free.
        part: the part that each cell of the input axis belongs to.
        cost: multiplications of all blocks.
    """

    start: np.ndarray
    length: np.ndarray
    part: np.ndarray
    cost: int


def spread_windows(
    shape: tuple[int, int], cell: tuple[int, int], cost: int, rank: int, parts: int | None
) -> Windows:
    """The windows of `spread`: as many as a cost buys, on parts of both axes.

    Args:
        shape: (in, out) of the kernel.
        cell: features of a grid cell on both axes.
        cost: multiplications that they may cost, no fewer than `least_cost`.
        rank: columns of a block.
        parts: the most that each axis is cut into; None for no limit.
    """
    slots = min(shape) // rank
    most = [min(size // c, parts or size) for size, c in zip(shape, cell, strict=True)]
    # Smaller blocks of these proportions have fewer entries than their factors.
    smallest = rank * sum(shape) ** 2 / math.prod(shape)
    both = min(max(cost / rank / slots, smallest), cost / rank)
    second = max(both * shape[1] / sum(shape), cell[1])
    first = max(both - second, cell[0])
    lengths = first, max(both - first, cell[1])
    choices = [
        sorted({min(max(f(size / length), 1), limit) for f in (math.floor, math.ceil)})
        for size, length, limit in zip(shape, lengths, most, strict=True)
    ]
    every = [_on_parts(pair, shape, cell, cost, rank) for pair in itertools.product(*choices)]
    every = [found for found in every if found.cost]
    if not every:  # the smallest there are
        return _on_parts((most[0], most[1]), shape, cell, cost, rank)
    enough = ENOUGH * max(found.cost for found in every)
    return max(
        (found for found in every if found.cost >= enough),
        key=lambda found: (np.count_nonzero(found.length[0]), found.cost),
    )


def _on_parts(
    parts: tuple[int, ...], shape: tuple[int, int], cell: tuple[int, int], cost: int, rank: int
) -> Windows:
    """As many windows as a cost buys on so many parts of each axis; none if it buys none."""
    slots = min(shape) // rank
    cells = [size // c for size, c in zip(shape, cell, strict=True)]
    edges = [np.arange(p + 1) * size // p for p, size in zip(parts, cells, strict=True)]
    a, b = (size / p for size, p in zip(shape, parts, strict=True))
    start, length = np.zeros((2, 2, slots), np.int32)
    spent, count = 0, min(slots, int(cost // min(rank * (a + b), a * b)) + 1)
    while count:
        number = np.arange(count)
        for axis, (step, edge) in enumerate(zip(STEPS, edges, strict=True)):
            # By their order instead of their place: equally many blocks for each part.
            order = np.argsort(np.argsort((0.5 + step * number) % 1)) * parts[axis] // count
            start[axis, :count], length[axis, :count] = edge[order], np.diff(edge)[order]
        sizes = length[:, :count] * np.array(cell)[:, None]
        spent = int(np.minimum(rank * sizes.sum(axis=0), sizes.prod(axis=0)).sum())
        if spent <= cost:
            break
        count -= 1
        start[:, count], length[:, count] = 0, 0
    part = np.repeat(np.arange(parts[0]), np.diff(edges[0]))
    return Windows(start, length, part, spent if count else 0)


def fit_windows(
    kernel: Float[Array, "in out"],
    axes: Axes,
    start: Int[Array, "2 S"],
    length: Int[Array, "2 S"],
    *,
    rank: int,
    sweeps: int | Array,
    key: Array,
) -> Blocks:
    """Blocks on given windows, fitted to a kernel by sweeps from random factors.

    Args:
        kernel: dense kernel.
        axes: both axes.
        start: first cells of the windows; those in use first.
        length: cells of the windows, 0 in free slots.
        rank: columns of each block.
        sweeps: refits of all factors.
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
    return lax.fori_loop(0, sweeps, refit, begin)[1]


@partial(jax.jit, static_argnames=("rank", "cell"))
def _spread(
    kernel: Float[Array, "in out"],
    moment: Float[Array, "in in"] | None,
    start: Int[Array, "2 S"],
    length: Int[Array, "2 S"],
    part: Int[Array, " in"],
    sweeps: int | Array,
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
        key = jax.random.key(0)
        blocks = fit_windows(kernel, axes, start, length, rank=rank, sweeps=sweeps, key=key)
        return as_factors(blocks, axes, scale)
