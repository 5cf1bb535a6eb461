"""The table of a block-sparse product: which cells of its input each tile of its result reads."""

from typing import NamedTuple

# Features of a cell: of bfloat16, the widest swizzle of shared memory.
CELL = 64


class Table(NamedTuple):
    """The cells that each of J tiles reads.

    Attributes:
        cells: of all tiles, one tile after another.
        counts: of each tile; J numbers whose sum is that of the cells.
    """

    cells: tuple[int, ...]
    counts: tuple[int, ...]
