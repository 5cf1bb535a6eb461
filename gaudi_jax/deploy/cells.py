"""The cells of blocks, each for itself, from the places of the blocks: pure functions."""

import numpy as np

from gaudi_jax.deploy.layout import Windows
from gaudi_jax.kernels.table import Table
from gaudi_jax.layers.cells import Cells


def cells_of(reads: Windows, writes: Windows, rank: int, grid: tuple[int, int]) -> Cells:
    """The cells of blocks whose windows lie on a grid.

    Args:
        reads: windows of the blocks' columns on the input axis, `rank` equal ones for each block.
        writes: the same on the output axis.
        rank: columns of a block.
        grid: features of a cell of both axes.

    Example:
        One block reads cells 1 and 0 of the inputs, around the end, and writes cell 1 of two:

        >>> import numpy as np
        >>> from gaudi_jax.deploy.cells import cells_of
        >>> from gaudi_jax.deploy.layout import Windows
        >>> reads = Windows(np.array([4]), np.array([8]), 8)
        >>> writes = Windows(np.array([2]), np.array([2]), 4)
        >>> first, second = cells_of(reads, writes, rank=1, grid=(4, 2)).tables
        >>> first, second
        (Table(cells=(0, 1), counts=(2,)), Table(cells=(0,), counts=(0, 1)))
    """
    read, written = (
        _touched(windows, rank, cell) for windows, cell in zip((reads, writes), grid, strict=True)
    )
    return Cells(grid, rank, (_table(read), _table(written.T)))


def cell_shapes(
    reads: Windows, writes: Windows, rank: int, grid: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """What `cells_of(...).shapes` would be, without the tables."""
    first, second = (
        int(windows.length[::rank].sum()) // cell
        for windows, cell in zip((reads, writes), grid, strict=True)
    )
    return [(first, grid[0], rank), (second, rank, grid[1])]


def cell_values(cells: Cells, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of both products in the order of the tables.

    Args:
        cells: the layout.
        left: the columns on the input axis, zero outside their windows, shape (K, n).
        right: the same on the output axis, shape (K, m).

    Returns:
        Arrays of `Cells.shapes`.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.deploy.cells import cell_values, cells_of
        >>> from gaudi_jax.deploy.layout import Windows
        >>> half = Windows(np.array([2]), np.array([2]), 4)
        >>> cells = cells_of(half, half, rank=1, grid=(2, 2))
        >>> v, u = cell_values(cells, np.array([[0, 0, 5, 6]]), np.array([[0, 0, 7, 8]]))
        >>> v.tolist(), u.tolist()
        ([[[5], [6]]], [[[7, 8]]])
    """
    (first, second), (n, m) = cells.tables, cells.grid
    by_cell = left.reshape(-1, cells.rank, left.shape[1] // n, n).transpose(0, 2, 3, 1)
    by_block = right.reshape(-1, cells.rank, right.shape[1] // m, m).transpose(2, 0, 1, 3)
    return tuple(  # type: ignore[return-value]
        parts[np.repeat(np.arange(len(table.counts)), table.counts), np.array(table.cells, int)]
        for parts, table in ((by_cell, first), (by_block, second))
    )


def _touched(windows: Windows, rank: int, cell: int) -> np.ndarray:
    """Which cells each block's window covers, shape (blocks, cells)."""
    start, length = windows.start[::rank, None], windows.length[::rank, None]
    first = np.arange(0, windows.size, cell)
    return (first - start) % windows.size < length


def _table(touched: np.ndarray) -> Table:
    return Table(
        tuple(np.nonzero(touched)[1].tolist()), tuple(np.count_nonzero(touched, axis=1).tolist())
    )
