"""``main.py`` with a control: spread blocks that are not even, but where the error is.

    python benchmarks/ranks_by_error.py --config=configs/docs_gpt_gaudi.py:recipe=spread ...

Parts, costs, calibration and fit are those of ``recipe=spread``, but how many blocks lie on each
pair of parts follows the singular values of the kernel there, whitened by the activations: those
that are largest for what they cost. So the structure is learned from what the kernel needs.
"""

import itertools
import sys
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import Array

from gaudi_jax.compression import layer
from gaudi_jax.decomposition import Factors
from gaudi_jax.decomposition.decompose import affordable
from gaudi_jax.decomposition.low_rank import regularise
from gaudi_jax.decomposition.parts import Windows, spread_windows
from gaudi_jax.decomposition.spread import fit_windows

sys.path.insert(0, str(Path(__file__).parents[1]))

from main import main


def by_error(
    kernel: Array,
    budget: float,
    *,
    rank: int,
    granularity: tuple[int, int],
    parts: int | None,
    second_moment: Array | None,
    sweeps: int,
) -> Factors:
    """What `gaudi_jax.decomposition.spread` takes and gives, with blocks where the error is."""
    n, m = kernel.shape
    even = spread_windows((n, m), granularity, affordable(budget, n * m), rank, parts)
    moment = jnp.eye(n) if second_moment is None else regularise(second_moment)
    windows = where_the_error_is(np.asarray(kernel), np.asarray(moment), even, granularity, rank)
    return fit_windows(kernel, second_moment, windows, granularity, rank, sweeps)


def where_the_error_is(
    kernel: np.ndarray, moment: np.ndarray, even: Windows, cell: tuple[int, int], rank: int
) -> Windows:
    """The largest blocks for what they cost on all pairs of the parts that even windows lie on."""
    pairs = zip(even.start.tolist(), even.length.tolist(), strict=True)
    # Free slots come last and have no length.
    on_axes = [sorted({part for part in zip(*pair, strict=True) if part[1]}) for pair in pairs]
    candidates = []
    for places in itertools.product(*on_axes):
        inputs, outputs = (
            slice(start * size, (start + length) * size)
            for (start, length), size in zip(places, cell, strict=True)
        )
        tile = np.linalg.cholesky(moment[inputs, inputs]).T @ kernel[inputs, outputs]
        values = np.square(np.linalg.svd(tile, compute_uv=False))
        blocks = values[: len(values) // rank * rank].reshape(-1, rank).sum(axis=1)
        cost = min(rank * sum(tile.shape), tile.size)
        candidates += [(value / cost, cost, places) for value in blocks]
    chosen: list[tuple[tuple[int, int], ...]] = []
    left = even.cost
    for _, cost, places in sorted(candidates, reverse=True):
        if cost <= left and len(chosen) < even.start.shape[1]:
            chosen.append(places)
            left -= cost
    start, length = np.zeros_like(even.start), np.zeros_like(even.length)
    start[:, : len(chosen)], length[:, : len(chosen)] = np.array(chosen).transpose(2, 1, 0)
    return Windows(start, length, even.cost - left)


if __name__ == "__main__":
    layer.spread = cast(Any, by_error)
    sys.exit(main(sys.argv))
