"""``main.py`` with a control: blocks that the search has found are moved to random places.

    python benchmarks/random_places.py --config=configs/docs_gpt_gaudi.py:budget=0.125 ...

Their number, sizes and costs stay, layer by layer, and so do the dense start and the calibration.
At the new places factors are fitted as the search fits them where its windows no longer move.
"""

import sys
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array

from gaudi_jax.compression import layer
from gaudi_jax.decomposition import Factors, decompose
from gaudi_jax.decomposition.scatter import fitted

sys.path.insert(0, str(Path(__file__).parents[1]))

from main import main


def elsewhere(
    kernel: Array, budget: Any, *, key: Array, second_moment: Array | None = None, **options: Any
) -> Factors:
    """Blocks of the numbers and sizes that `decompose` finds, at random places."""
    if kernel.ndim > 2:  # layers that are searched together
        moments = [None] * len(kernel) if second_moment is None else second_moment
        each = [
            elsewhere(one, goal, key=key, second_moment=moment, **options)
            for one, goal, moment in zip(kernel, budget, moments, strict=True)
        ]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *each)
    found = decompose(kernel, budget, second_moment=second_moment, key=key, **options)
    # Layers of one model differ in what they cost.
    place = jax.random.fold_in(key, int(found.multiplications()))
    cell = tuple(options["granularity"])
    cells = jnp.array([[size // c] for size, c in zip(kernel.shape, cell, strict=True)])
    lengths = jnp.round(found.widths * cells).astype(jnp.int32)
    return fitted(kernel, second_moment, lengths, place, rank=options.get("rank", 1), cell=cell)


if __name__ == "__main__":
    layer.decompose = cast(Any, elsewhere)
    sys.exit(main(sys.argv))
