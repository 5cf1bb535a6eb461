"""``main.py`` with a control: blocks are moved to random places once they are found, or spread.

    python benchmarks/random_places.py --config=configs/docs_gpt_gaudi.py:recipe=search ...

Their number, sizes and costs stay, layer by layer, and so do the dense start and the calibration:
those of blocks by search with ``recipe=search``, those of blocks of one size otherwise. At the new
places factors are fitted by sweeps; with a calibration windows begin at one of 16 or 32 places on
the input axis, or, where most are shorter than the gaps, anywhere, and the fit is then that of the
kernel.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax

from gaudi_jax.compression import layer
from gaudi_jax.decomposition import Factors
from gaudi_jax.decomposition.axes import PlainAxis, WeightedAxis, num_anchors
from gaudi_jax.decomposition.decompose import as_factors, scaled
from gaudi_jax.decomposition.low_rank import regularise
from gaudi_jax.decomposition.search import weighed_error
from gaudi_jax.decomposition.sweeps import Axes, Blocks, sweep
from gaudi_jax.decomposition.windows import window_mask

sys.path.insert(0, str(Path(__file__).parents[1]))

from main import main


def elsewhere(
    find: Callable[..., Factors],
    kernel: Array,
    budget: Any,
    *,
    second_moment: Array | None = None,
    **options: Any,
) -> Factors:
    """Blocks of the numbers and sizes that a function finds, at random places."""
    if kernel.ndim > 2:  # layers that are searched together
        moments = [None] * len(kernel) if second_moment is None else second_moment
        each = [
            elsewhere(find, one, goal, second_moment=moment, **options)
            for one, goal, moment in zip(kernel, budget, moments, strict=True)
        ]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    found = find(kernel, budget, second_moment=second_moment, **options)
    # Each layer of each run has places of its own.
    key = jax.random.key(jnp.abs(kernel).sum().view(jnp.uint32))
    cell, rank = tuple(options["granularity"]), options["rank"]
    cells = jnp.array([[size // c] for size, c in zip(kernel.shape, cell, strict=True)])
    lengths = jnp.round(found.widths * cells).astype(jnp.int32)
    usual = float(jnp.median(lengths[0][lengths[0] > 0]))
    readable = num_anchors(kernel.shape[0], int(cells[0, 0])) * usual >= cells[0, 0]
    options = {"cell": cell, "rank": rank, "readable": bool(readable)}
    # Accelerators would multiply in fewer bits, and small differences of large numbers matter.
    with jax.default_matmul_precision("highest"):
        return _moved(kernel, second_moment, lengths, key, **options)


def fit_windows(
    kernel: Array,
    axes: Axes,
    start: Array,
    length: Array,
    *,
    rank: int,
    sweeps: int,
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


@partial(jax.jit, static_argnames=("cell", "rank", "readable"))
def _moved(
    kernel: Array,
    moment: Array | None,
    lengths: Array,
    key: Array,
    *,
    cell: tuple[int, int],
    rank: int,
    readable: bool,
) -> Factors:
    """At the places that a key draws: fits the kernel, where inputs would not be readable."""
    n, m = kernel.shape
    kernel, scale = scaled(kernel, jnp.abs(kernel).max())
    axes = Axes(PlainAxis(n // cell[0], cell[0]), PlainAxis(m // cell[1], cell[1]))
    # Weighted windows begin at anchors: short ones would leave the inputs between them unread.
    if moment is not None and readable:
        moment = regularise(scaled(moment, jnp.trace(moment) / n)[0])
        axes = axes._replace(input=WeightedAxis.of(moment, n // cell[0]))
    *places, values = jax.random.split(key, 3)
    starts = []
    for axis, place in zip(axes, places, strict=True):
        where = jax.random.uniform(place, lengths.shape[1:])
        starts.append(axis.windows(where, where)[0])
    blocks = fit_windows(kernel, axes, jnp.stack(starts), lengths, rank=rank, sweeps=60, key=values)
    return as_factors(blocks, axes, scale)


if __name__ == "__main__":
    layer.decompose = cast(Any, partial(elsewhere, layer.decompose))
    layer.spread = cast(Any, partial(elsewhere, layer.spread))
    sys.exit(main(sys.argv))
