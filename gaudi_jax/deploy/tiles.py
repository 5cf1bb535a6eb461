"""Tables of the cells of a block-sparse product, from the places of blocks: pure functions.

A layer of blocks is two products, y = (x left^T) right. Each is cut into tiles of the result, and a
tile only reads the cells, of 64 features each, where some of its columns are not zero. Which
columns stand side by side decides how many cells that are.
"""

from typing import NamedTuple

import numpy as np

from gaudi_jax.deploy.layout import Windows
from gaudi_jax.kernels.table import CELL, Table


class Product(NamedTuple):
    """A block-sparse matrix.

    Attributes:
        tiles: weights of the cells in the order of the table, shape (cells, 64, N).
        table: where they are.
    """

    tiles: np.ndarray
    table: Table


def tiles_of(
    reads: Windows, writes: Windows, left: np.ndarray, right: np.ndarray, width: int = 128
) -> tuple[Product, Product]:
    """The two products of a layer of blocks.

    The columns between them, at least one, are in an order of few cells; zeros fill the last tile.

    Args:
        reads: windows of the columns on the input axis, of a multiple of 64 features.
        writes: the same on the output axis, of a multiple of `width` features.
        left: the columns on the input axis, zero outside their windows, shape (K, n).
        right: the same on the output axis, shape (K, m).
        width: columns N of a tile.

    Example:
        Two columns on different cells; each tile of the output reads one cell of the columns:

        >>> import numpy as np
        >>> from gaudi_jax.deploy.tiles import tiles_of
        >>> from gaudi_jax.deploy.layout import Windows
        >>> reads = Windows(np.array([0, 64]), np.array([64, 64]), 256)
        >>> writes = Windows(np.array([0, 64]), np.array([64, 64]), 128)
        >>> first, second = tiles_of(reads, writes, np.ones((2, 256)), np.ones((2, 128)), width=64)
        >>> first.table
        Table(cells=(0, 1), counts=(2,))
        >>> second.table
        Table(cells=(0, 0), counts=(1, 1))
    """
    read, written = _touched(reads, CELL), _touched(writes, width)
    order = _order(read, written, width)
    padding = (0, -len(order) % width), (0, 0)
    read, written, left, right = (
        np.pad(matrix[order], padding) for matrix in (read, written, left, right)
    )
    tile_reads = np.any(read.reshape(-1, width, read.shape[1]), axis=1)
    cell_written = np.any(written.reshape(-1, CELL, written.shape[1]), axis=1)
    return _product(left.T, tile_reads, width), _product(right, cell_written.T, width)


def _touched(windows: Windows, span: int) -> np.ndarray:
    """Which spans of features each column's window meets, shape (K, spans)."""
    features = np.arange(windows.size)
    inside = (features - windows.start[:, None]) % windows.size < windows.length[:, None]
    return np.any(inside.reshape(len(inside), -1, span), axis=2)


def _order(read: np.ndarray, written: np.ndarray, width: int) -> np.ndarray:
    """An order of the columns in which tiles and cells of them touch little.

    Tiles are filled from the left, with the column next that adds the fewest cells to both
    products: to the first one for each tile of columns, to the second for each cell of them.
    """
    rest = np.lexsort((*written.T[::-1], *read.T[::-1]))[::-1]
    order: list[int] = []
    while len(rest):
        if len(order) % width == 0:
            reads = np.zeros(read.shape[1], bool)
        if len(order) % CELL == 0:
            writes = np.zeros(written.shape[1], bool)
        added = (read[rest] & ~reads).sum(1) + (written[rest] & ~writes).sum(1)
        # A new tile begins with the column that touches most, and narrow ones fit in after it.
        chosen = np.argmax(added) if len(order) % width == 0 else np.argmin(added)
        order.append(rest[chosen])
        reads, writes = reads | read[rest[chosen]], writes | written[rest[chosen]]
        rest = np.delete(rest, chosen)
    return np.array(order, int)


def _product(matrix: np.ndarray, touched: np.ndarray, width: int) -> Product:
    """Packs a matrix of shape (n, J * N), given which cells each tile reads, shape (J, n / 64)."""
    blocks = matrix.reshape(-1, CELL, touched.shape[0], width)
    tile, cell = np.nonzero(touched)
    counts = touched.sum(axis=1)
    return Product(blocks[cell, :, tile], Table(tuple(cell.tolist()), tuple(counts.tolist())))
