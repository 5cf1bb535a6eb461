"""Packed layers cell by cell: the form for one vector at a time."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gaudi_jax.errors import UserError
from gaudi_jax.kernels.table import Table

#: More vectors at once than these, such as a prompt, are multiplied with whole matrices.
FEW_VECTORS = 8


class Cells(NamedTuple):
    """The two products of a packed layer, each over the grid cells of single blocks.

    With one input vector time goes into reading weights. Here exactly those inside the blocks are
    read; what each cell contributes is then added up. The first product makes the columns of the
    blocks from cells of the inputs, the second makes cells of the outputs from the columns.

    Each vector takes as long as the first, and memory for all of its cells. So with many, as when a
    prompt is read, each product is one with a matrix that holds the cells among zeros.

    Attributes:
        grid: features of a cell of the input axis, and of the output axis.
        rank: columns of a block.
        tables: the input cells of each block, and the blocks of each output cell.

    Example:
        One block of rank 1 that reads the second cell of two, and writes both cells of the output:

        >>> import jax.numpy as jnp
        >>> from gaudi_jax.kernels.table import Table
        >>> from gaudi_jax.layers.cells import Cells
        >>> cells = Cells((2, 1), 1, (Table((1,), (1,)), Table((0, 0), (1, 1))))
        >>> cells.shapes, cells.multiplications
        (((1, 2, 1), (2, 1, 1)), 4)
        >>> cells.product(0, jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.ones((1, 2, 1)))
        Array([7.], dtype=float32)
    """

    grid: tuple[int, int]
    rank: int
    tables: tuple[Table, Table]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of the weights of both products."""
        first, second = (len(table.cells) for table in self.tables)
        return (first, self.grid[0], self.rank), (second, self.rank, self.grid[1])

    @property
    def multiplications(self) -> int:
        """Of one input vector."""
        return sum(count * depth * width for count, depth, width in self.shapes)

    def product(
        self,
        number: int,
        x: Float[Array, "*batch n"],
        weights: Float[Array, "cells depth width"],
        bias: Float[Array, " m"] | None = None,
    ) -> Float[Array, "*batch m"]:
        """The first product (0) or the second (1), and the bias; sums are kept in float32."""
        table, (_, depth, width) = self.tables[number], weights.shape
        # A number of vectors that is not known before the call counts as many.
        if math.prod(x.shape[:-1]) not in range(FEW_VECTORS + 1):
            y = jnp.matmul(x, self._matrix(number, weights, x.shape[-1]).astype(x.dtype))
            return y if bias is None else y + bias.astype(y.dtype)
        parts = x.reshape(*x.shape[:-1], x.shape[-1] // depth, depth)
        each = jnp.einsum(
            "...tc,tcw->t...w",
            parts[..., np.array(table.cells, int), :],
            weights.astype(x.dtype),
            preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        )
        place, tiles = np.repeat(np.arange(len(table.counts)), table.counts), len(table.counts)
        sums = jax.ops.segment_sum(each, place, tiles, indices_are_sorted=True).astype(x.dtype)
        y = jnp.moveaxis(sums, 0, -2).reshape(*x.shape[:-1], tiles * width)
        return y if bias is None else y + bias.astype(y.dtype)

    def _matrix(
        self, number: int, weights: Float[Array, "cells depth width"], features: int
    ) -> Float[Array, "n m"]:
        """One of the factors of the kernel, its zeros included."""
        table, (_, depth, width) = self.tables[number], weights.shape
        tiles = len(table.counts)
        place = np.repeat(np.arange(tiles), table.counts)
        zeros = jnp.zeros((features // depth, depth, tiles, width), weights.dtype)
        cells = np.array(table.cells, int)
        return zeros.at[cells, :, place].add(weights).reshape(features, tiles * width)

    def check(self, in_features: int, out_features: int) -> None:
        """Whether the tables fit the axes of a layer.

        Raises:
            UserError: they do not.
        """
        first, second = self.tables
        if self.rank < 1 or min(self.grid) < 1 or in_features % self.grid[0]:
            raise UserError(
                f"cells of {self.grid} features and rank {self.rank} do not cut a layer of "
                f"{in_features} inputs"
            )
        blocks = len(first.counts)
        for table, count in ((first, in_features // self.grid[0]), (second, blocks)):
            if any(not 0 <= cell < count for cell in table.cells):
                raise UserError(f"the cells of a packed layer lie outside the {count} there are")
        if len(second.counts) * self.grid[1] != out_features:
            raise UserError(
                f"{len(second.counts)} cells of {self.grid[1]} are not the layer's "
                f"{out_features} output features"
            )

    def to_lists(self) -> dict[str, Any]:
        """As plain values that JSON holds."""
        return {
            "grid": list(self.grid),
            "rank": self.rank,
            "tables": [[list(table.cells), list(table.counts)] for table in self.tables],
        }

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> "Cells":
        """From what `to_lists` gives.

        Raises:
            UserError: it is something else.
        """
        try:
            first, second = (Table.from_lists(*table) for table in lists["tables"])
            cell_in, cell_out = map(int, lists["grid"])
            return cls((cell_in, cell_out), int(lists["rank"]), (first, second))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the cells of a packed layer are damaged ({error}); give the plan that "
                "gaudi_jax.harden returned"
            ) from error
