"""The table of a block-sparse product: which cells of its input each tile of its result reads."""

from collections.abc import Sequence
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

    @classmethod
    def from_lists(cls, cells: Sequence[int], counts: Sequence[int]) -> "Table":
        """From plain values.

        Raises:
            ValueError: they are no table.

        Example:
            >>> from gaudi_jax.kernels.table import Table
            >>> Table.from_lists([0, 1], [2])
            Table(cells=(0, 1), counts=(2,))
        """
        table = cls(tuple(map(int, cells)), tuple(map(int, counts)))
        if sum(table.counts) != len(table.cells) or min(table.counts, default=0) < 0:
            raise ValueError("a table is not whole")
        return table
