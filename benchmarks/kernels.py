"""Relative errors of one kernel after another as each kind of structured layer, at one cost.

    python benchmarks/kernels.py tests/data/golden/olb_*.npz [--budget 0.25]

A file holds a kernel as ``M``, of shape (out, in), and a ``budget`` in multiplications, which
``--budget``, a fraction of in·out, takes the place of. Behind the names of layers on a grid stand
the parts of each axis; Gaudi's blocks have rank 1, and lie anywhere or on a grid that cuts each
axis in eight. In brackets: the share of the budget that a layer uses, where it is not all of it. A
dash: there is no such layer.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from gaudi_jax import BlastLinear, BlockSparseLinear, LowRankLinear, MonarchLinear, decompose
from gaudi_jax.decomposition import relative_error
from gaudi_jax.decomposition.decompose import affordable
from gaudi_jax.errors import UserError

#: Makes of a kernel and a number of multiplications what has `kernel` and `multiplications`.
Method = Callable[[jax.Array, int], Any]
#: Cells of each axis of the coarse grid.
CELLS = 8


def low_rank(kernel: jax.Array, cost: int) -> Any:
    return LowRankLinear.from_kernel(kernel, rank=min(cost // sum(kernel.shape), *kernel.shape))


def on_grid(cls: Any, blocks: int) -> Method:
    def fitted(kernel: jax.Array, cost: int) -> Any:
        return cls.from_kernel(kernel, **cls.affordable(*kernel.shape, blocks, cost))

    return fitted


def gaudi(kernel: jax.Array, cost: int, cells: int | None = None) -> Any:
    n, m = kernel.shape
    granularity = (max(n // cells, 1), max(m // cells, 1)) if cells else 1
    return decompose(kernel, cost / kernel.size, granularity=granularity)


METHODS: dict[str, Method] = {
    "low-rank": low_rank,
    **{f"Monarch, {blocks}": on_grid(MonarchLinear, blocks) for blocks in (2, 4)},
    **{f"BLAST, {blocks}": on_grid(BlastLinear, blocks) for blocks in (4, 8)},
    **{f"block-sparse, {blocks}": on_grid(BlockSparseLinear, blocks) for blocks in (16, 32)},
    "Gaudi": gaudi,
    "Gaudi, grid": lambda kernel, cost: gaudi(kernel, cost, CELLS),
}


def cell(kernel: jax.Array, cost: int, method: Method) -> str:
    """The error, and the share of the multiplications that is used."""
    try:
        found = method(kernel, cost)
    except UserError:
        return "–"
    share = int(found.multiplications()) / cost
    used = f" ({share:.2f})" if share < 0.995 else ""
    return f"{float(relative_error(kernel, found.kernel())):.3f}{used}"


def read(path: Path, budget: float | None) -> tuple[jax.Array, int]:
    """The kernel of a file, and the multiplications that are allowed."""
    with np.load(path) as file:
        for name in ("M", "budget") if budget is None else ("M",):
            if name not in file:
                raise UserError(f"{path} has no {name}; it has {', '.join(file)}")
        kernel = jnp.asarray(file["M"].T, jnp.float32)
        if kernel.ndim != 2 or not kernel.size or not jnp.isfinite(kernel).all():
            raise UserError(
                f"M of {path}, of shape {kernel.T.shape}, is no matrix of finite numbers"
            )
        if budget is not None and not 0 < budget <= 1:
            raise UserError(f"--budget {budget} is outside (0, 1]")
        return kernel, int(file["budget"]) if budget is None else affordable(budget, kernel.size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.npz")
    parser.add_argument("--budget", type=float, help="of the dense multiplications")
    args = parser.parse_args()
    try:
        kernels = [read(path, args.budget) for path in args.files]
    except (OSError, TypeError, ValueError, BadZipFile, UserError) as error:  # no npz file
        parser.error(str(error))
    rows = []
    for path, (kernel, cost) in zip(args.files, tqdm(kernels, unit="kernel"), strict=True):
        cells = [cell(kernel, cost, method) for method in METHODS.values()]
        rows.append((path.stem, f"{cost / kernel.size:.3f}", *cells))
    headers = ("kernel", "cost", *METHODS)
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
