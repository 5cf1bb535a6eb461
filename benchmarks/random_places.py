"""``main.py`` with a control: instead of the blocks that the search finds, blocks at random places.

    python benchmarks/random_places.py found --config=configs/docs_gpt_gaudi.py:budget=0.125 ...

They have the sizes that the search has *found*; or one size but for a cell, *even*, and are as many
as there can be. What they cost stays (but for less than a cell), layer by layer, and so do the
dense start and the calibration. Their factors are fitted as the search fits them where its windows
no longer move.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gaudi_jax.compression import layer
from gaudi_jax.decomposition import Factors, decompose
from gaudi_jax.decomposition.axes import PlainAxis, WeightedAxis
from gaudi_jax.decomposition.decompose import _factors, _scaled
from gaudi_jax.decomposition.low_rank import regularise
from gaudi_jax.decomposition.search import weighed_error
from gaudi_jax.decomposition.sweeps import Axes, Blocks, sweep
from gaudi_jax.decomposition.windows import window_mask

sys.path.insert(0, str(Path(__file__).parents[1]))

from main import main

SWEEPS = 60


def elsewhere(
    kernel: Array,
    budget: Any,
    *,
    sizes: str,
    key: Array,
    second_moment: Array | None = None,
    **options: Any,
) -> Factors:
    """Blocks at random places, of the sizes that `decompose` finds or of one size."""
    if kernel.ndim > 2:  # layers that are searched together
        moments = [None] * len(kernel) if second_moment is None else second_moment
        each = [
            elsewhere(one, goal, sizes=sizes, key=key, second_moment=moment, **options)
            for one, goal, moment in zip(kernel, budget, moments, strict=True)
        ]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    found = decompose(kernel, budget, second_moment=second_moment, key=key, **options)
    # Layers of one model differ in what they cost.
    place = jax.random.fold_in(key, int(found.multiplications()))
    cell = tuple(options["granularity"])
    if sizes == "even":
        cost = int(found.multiplications())
        found = found._replace(widths=even_widths(kernel.shape, cell, cost, len(found.v)))
    return fitted(kernel, second_moment, found, place, cell)


def even_widths(shape: tuple[int, ...], cell: tuple[int, int], cost: int, most: int) -> Array:
    """Widths of one size but for a cell, of as many blocks of rank 1 as a cost buys."""
    blocks = min(most, cost // sum(cell))
    each, share = cost // blocks, shape[0] / sum(shape)
    first = np.clip(int(each * share), cell[0], each - cell[1]) // cell[0] * cell[0]
    lengths = np.zeros((2, most), int)
    lengths[:, :blocks] = [[first], [(each - first) // cell[1] * cell[1]]]
    for axis in (1, 0, 1):  # on a grid, what is left may buy a second cell
        more = min((cost - lengths.sum()) // cell[axis], blocks)
        lengths[axis, :more] += cell[axis]
    return jnp.asarray(lengths / np.array(shape)[:, None], jnp.float32)


@partial(jax.jit, static_argnums=4)
def fitted(
    kernel: Array, moment: Array | None, found: Factors, key: Array, cell: tuple[int, int]
) -> Factors:
    with jax.default_matmul_precision("highest"):
        kernel, scale = _scaled(kernel.astype(jnp.float32), jnp.abs(kernel).max())
        n, m = kernel.shape
        axes = Axes(PlainAxis(n // cell[0], cell[0]), PlainAxis(m // cell[1], cell[1]))
        if moment is not None:
            moment = regularise(_scaled(moment.astype(jnp.float32), jnp.trace(moment) / n)[0])
            axes = axes._replace(input=WeightedAxis.of(moment, n // cell[0]))
        keys = jax.random.split(key, 4)
        start, length, factors = [], [], []
        for axis, width, place, values in zip(axes, found.widths, keys[:2], keys[2:], strict=True):
            where = jax.random.uniform(place, width.shape)
            start.append(axis.windows(where, where)[0])
            length.append(jnp.round(width * axis.cells).astype(jnp.int32))
            inside = window_mask(start[-1], length[-1], axis.cells, axis.cell)[:, None]
            shape = found.v.shape[:2] + inside.shape[2:]
            factors.append(jnp.where(inside, jax.random.normal(values, shape), 0))
        blocks = Blocks(factors[0], factors[1], jnp.stack(start), jnp.stack(length)).live_first()
        begin = weighed_error(kernel, blocks, axes), blocks

        def refit(_: Any, both: tuple[Array, Blocks]) -> tuple[Array, Blocks]:
            return sweep(*both, both[1].live.sum(), 0.0, axes, move_windows=False)

        return _factors(lax.fori_loop(0, SWEEPS, refit, begin)[1], axes, scale)


if __name__ == "__main__":
    layer.decompose = cast(Any, partial(elsewhere, sizes=sys.argv.pop(1)))
    sys.exit(main(sys.argv))
