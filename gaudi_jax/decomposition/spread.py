"""Blocks of one size, spread evenly over a kernel and fitted to it: nothing is searched for."""

import itertools
import math
from collections.abc import Iterable
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
    little longer, in proportion to the axes. Factors are fitted by exact coordinate descent,
    and those on the same two parts made orthogonal to each other.

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
    start, length = jnp.asarray(windows.start), jnp.asarray(windows.length)
    part = jnp.asarray(np.repeat(windows.part, cell[0]))
    found = _spread(kernel, second_moment, start, length, part, sweeps, rank=rank, cell=cell)
    return _orthogonal(found, windows)


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

    @property
    def blocks(self) -> int:
        """Slots in use."""
        return int(np.count_nonzero(self.length[0]))


def least_cost(shape: tuple[int, int], cell: tuple[int, int], rank: int, parts: int | None) -> int:
    """The fewest multiplications of blocks that read all inputs and write all outputs.

    Args:
        shape: (in, out) of the kernel.
        cell: features of a grid cell on both axes.
        rank: columns of a block.
        parts: the most that each axis is cut into; None for no limit.
    """
    return min(
        _on_parts(pair, max(pair), shape, cell, rank).cost
        for pair in _sparsest(shape, cell, rank, parts)
    )


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
    n, m = shape
    slots, most = min(shape) // rank, _most_parts(shape, cell, parts)
    if cost >= n * m and most[n > m] >= slots:  # strips of the kernel itself
        pair = (1, slots) if n > m else (slots, 1)
        return _on_parts(pair, slots, shape, cell, rank)
    # Smaller blocks of these proportions have fewer entries than their factors.
    smallest = rank * (n + m) ** 2 / (n * m)
    both = min(max(cost / rank / slots, smallest), cost / rank)
    second = max(both * m / (n + m), cell[1])
    first = max(both - second, cell[0])
    lengths = first, max(both - first, cell[1])
    choices = [
        sorted({min(max(f(size / length), 1), limit) for f in (math.floor, math.ceil)})
        for size, length, limit in zip(shape, lengths, most, strict=True)
    ]
    every = _covering(itertools.product(*choices), shape, cell, cost, rank)
    if not every:  # each block is as dear as its entries: one on each part
        number = min(*most, slots, math.ceil(n * m / cost))
        pairs = [(number, number), *_sparsest(shape, cell, rank, parts)]
        return max(_covering(pairs, shape, cell, cost, rank), key=lambda found: found.cost)
    enough = ENOUGH * max(found.cost for found in every)
    return max(
        (found for found in every if found.cost >= enough),
        key=lambda found: (found.blocks, found.cost),
    )


def _most_parts(
    shape: tuple[int, int], cell: tuple[int, int], parts: int | None
) -> tuple[int, int]:
    n, m = (min(size // c, parts or size) for size, c in zip(shape, cell, strict=True))
    return n, m


def _sparsest(
    shape: tuple[int, int], cell: tuple[int, int], rank: int, parts: int | None
) -> list[tuple[int, int]]:
    """Counts of parts of which one has the cheapest blocks that cover both axes."""
    slots, most = min(shape) // rank, _most_parts(shape, cell, parts)
    return [(1, 1), (min(*most, slots),) * 2, (min(most[0], slots), min(most[1], slots))]


def _covering(
    pairs: Iterable[tuple[int, ...]],
    shape: tuple[int, int],
    cell: tuple[int, int],
    cost: int,
    rank: int,
) -> list[Windows]:
    """For each pair of counts of parts as many blocks as a cost buys; if each part gets one."""
    slots, found = min(shape) // rank, []
    for pair in pairs:
        a, b = (size / p for size, p in zip(shape, pair, strict=True))
        count = min(slots, int(cost // min(rank * (a + b), a * b)) + 1)
        while count >= max(pair):
            windows = _on_parts(pair, count, shape, cell, rank)
            if windows.cost <= cost:
                found.append(windows)
                break
            count -= 1
    return found


def _on_parts(
    parts: tuple[int, ...], count: int, shape: tuple[int, int], cell: tuple[int, int], rank: int
) -> Windows:
    """Windows of a number of blocks on so many parts of each axis."""
    edges = [
        np.arange(p + 1) * (size // c) // p for p, size, c in zip(parts, shape, cell, strict=True)
    ]
    start, length = np.zeros((2, 2, min(shape) // rank), np.int32)
    for axis, (step, edge) in enumerate(zip(STEPS, edges, strict=True)):
        # By their order instead of their place: equally many blocks for each part.
        place = (0.5 + step * np.arange(count)) % 1
        chosen = np.argsort(np.argsort(place)) * parts[axis] // count
        start[axis, :count], length[axis, :count] = edge[chosen], np.diff(edge)[chosen]
    sizes = length[:, :count] * np.array(cell)[:, None]
    cost = int(np.minimum(rank * sizes.sum(axis=0), sizes.prod(axis=0)).sum())
    return Windows(start, length, np.repeat(np.arange(parts[0]), np.diff(edges[0])), cost)


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


def _orthogonal(factors: Factors, windows: Windows) -> Factors:
    """The same kernel by columns that are orthogonal to all others on the same pair of parts.

    The sweeps leave columns that nearly cancel each other, on which training goes wrong: at half of
    the cost, where 32 share a pair, a small GPT lost more so than by low rank.
    """
    # On the host, where no number of columns has to be compiled for.
    v, u = (np.array(x) for x in (factors.v, factors.u))
    pairs: dict[tuple[int, ...], list[int]] = {}
    for block, pair in enumerate(windows.start[:, : windows.blocks].T.tolist()):
        pairs.setdefault(tuple(pair), []).append(block)
    for blocks in pairs.values():
        (q_v, r_v), (q_u, r_u) = (
            np.linalg.qr(x[blocks].reshape(-1, x.shape[-1]).T) for x in (v, u)
        )
        left, values, right = np.linalg.svd(r_v @ r_u.T)
        roots = np.sqrt(values)
        for x, columns in ((v, q_v @ left), (u, q_u @ right.T)):
            inside = x[blocks].any(axis=(0, 1))  # rounding must not leave the windows
            x[blocks] = np.where(inside, (columns * roots).T.reshape(x[blocks].shape), 0)
    return factors._replace(v=jnp.asarray(v), u=jnp.asarray(u))


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
