"""Blocks of one size at random places, fitted to a kernel: nothing is searched for."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from gaudi_jax.decomposition.axes import PlainAxis, WeightedAxis, num_anchors
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


def scatter(
    kernel: Float[Array, "in out"],
    budget: float,
    *,
    rank: int = 1,
    granularity: int | tuple[int, int] = 1,
    second_moment: Float[Array, "in in"] | None = None,
    key: Array | None = None,
) -> Factors:
    """Approximates a kernel by as many blocks of one size as there can be, at random places.

    Their factors are fitted by exact coordinate descent. The result is farther from the kernel than
    that of `gaudi_jax.decompose`; what it is worth once its factors are trained on is another
    matter (docs/learning.md).

    Args:
        kernel: dense kernel, shape (in, out).
        budget: multiplications as a fraction of in·out.
        rank: columns of each block.
        granularity: grid cell of the intervals in features: a number, or a pair (input, output).
            Each divides its axis.
        second_moment: E[x xᵀ] of the layer's inputs, shape (in, in), to fit outputs instead of the
            kernel. Intervals on the input axis then begin at one of at most 32 places; where those
            are farther apart than intervals are long, so that inputs would not be read, it is the
            kernel that is fitted.
        key: random key of the places; None for a fixed one.

    Returns:
        ⌊min(in, out) / rank⌋ blocks, of which those in use come first, in float32. Those are of one
        size but for one or two cells, which spend what is left of the budget.

    Raises:
        UserError: as `gaudi_jax.decompose`; or kernels are stacked.

    Example:
        >>> import jax
        >>> from gaudi_jax.decomposition import scatter
        >>> factors = scatter(jax.random.normal(jax.random.key(0), (16, 24)), 0.5)
        >>> factors.v.shape, int(factors.multiplications())
        ((16, 1, 16), 192)
    """
    kernel = kernel if hasattr(kernel, "shape") else jnp.asarray(kernel)
    shape = check_matrices("kernel", kernel)
    if len(shape) != 2:
        raise UserError(f"kernel of shape {shape} is no matrix; scatter one at a time")
    n, m = shape
    cell = check_structure(n, m, budget, rank, granularity)
    if second_moment is not None:
        found = check_matrices("second_moment", second_moment, symmetric=True)
        if found != (n, n):
            raise UserError(
                f"second_moment of shape {found} does not fit a kernel of shape {shape}; it must "
                f"have shape {(n, n)}"
            )
    lengths = _lengths((n, m), cell, affordable(budget, n * m), rank)
    # Weighted windows begin at anchors: short ones would leave the inputs between them unread.
    if n // cell[0] > num_anchors(n, n // cell[0]) * lengths[0][lengths[0] > 0].min():
        second_moment = None
    key = jax.random.key(0) if key is None else key
    return fitted(kernel, second_moment, jnp.asarray(lengths), key, rank=rank, cell=cell)


def _lengths(shape: tuple[int, int], cell: tuple[int, int], cost: int, rank: int) -> np.ndarray:
    """Cells of each block on both axes: of as many blocks as a cost buys."""
    slots, per_column = min(shape) // rank, cost // rank
    # Smaller blocks of these proportions have fewer entries than their factors.
    smallest = math.ceil(rank * sum(shape) ** 2 / math.prod(shape))
    blocks = max(1, min(slots, per_column // max(smallest, sum(cell))))
    each, share = per_column // blocks, shape[0] / sum(shape)
    first = max(cell[0], min(int(each * share), each - cell[1]) // cell[0] * cell[0])
    second = max(cell[1], (each - first) // cell[1] * cell[1])
    lengths = np.zeros((2, slots), np.int32)
    lengths[:, :blocks] = [[first], [second]]
    for axis in (1, 0, 1):  # on a grid, what is left may buy a second cell
        more = (per_column - int(lengths.sum())) // cell[axis]
        lengths[axis, : min(max(more, 0), blocks)] += cell[axis]
    return np.minimum(lengths, np.array(shape)[:, None]) // np.array(cell)[:, None]


@partial(jax.jit, static_argnames=("rank", "cell"))
def fitted(
    kernel: Float[Array, "in out"],
    moment: Float[Array, "in in"] | None,
    lengths: Int[Array, "2 B"],
    key: Array,
    *,
    rank: int,
    cell: tuple[int, int],
) -> Factors:
    """Blocks of given lengths at random places, fitted to a kernel.

    Args:
        kernel: dense kernel.
        moment: second moment of its inputs, or None.
        lengths: cells of each block on both axes; those in use first.
        key: random key of the places.
        rank: columns of each block.
        cell: features of a cell on both axes.
    """
    # Accelerators would multiply in fewer bits, and small differences of large numbers matter.
    with jax.default_matmul_precision("highest"):
        kernel, scale = scaled(kernel.astype(jnp.float32), jnp.abs(kernel).max())
        n, m = kernel.shape
        axes = Axes(PlainAxis(n // cell[0], cell[0]), PlainAxis(m // cell[1], cell[1]))
        if moment is not None:
            moment = regularise(scaled(moment.astype(jnp.float32), jnp.trace(moment) / n)[0])
            axes = axes._replace(input=WeightedAxis.of(moment, n // cell[0]))
        starts, factors = [], []
        for axis, length, part in zip(axes, lengths, jax.random.split(key), strict=True):
            place, values = jax.random.split(part)
            where = jax.random.uniform(place, length.shape)
            starts.append(axis.windows(where, where)[0])
            inside = window_mask(starts[-1], length, axis.cells, axis.cell)[:, None]
            size = axis.cells * axis.cell
            drawn = jax.random.normal(values, (len(length), rank, size))
            factors.append(jnp.where(inside, drawn, 0))
        blocks = Blocks(factors[0], factors[1], jnp.stack(starts), lengths)

        def refit(_: int, both: tuple[Array, Blocks]) -> tuple[Array, Blocks]:
            return sweep(*both, both[1].live.sum(), 0.0, axes, move_windows=False)

        begin = weighed_error(kernel, blocks, axes), blocks
        return as_factors(lax.fori_loop(0, SWEEPS, refit, begin)[1], axes, scale)
