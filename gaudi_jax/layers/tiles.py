"""Packed layers as two block-sparse products: the form for a kernel on Hopper GPUs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gaudi_jax.errors import UserError
from gaudi_jax.kernels import on_hopper
from gaudi_jax.kernels.table import CELL, Table

#: Rows of a tile, cells in flight, and multiprocessors that share weights.
TILINGS = {(256, 4, 1), (256, 4, 2), (128, 4, 1), (128, 5, 1)}
#: Numbers of a tile of the result that a multiprocessor's registers hold.
LARGEST_TILE = 256 * 128


class Tiles(NamedTuple):
    """The two products of a packed layer, each over a table of cells.

    The first makes the columns of the blocks from the inputs, the second the outputs from them.

    Attributes:
        width: columns of a tile of either result.
        tables: of both products.
        tilings: how the kernel cuts each (`gaudi_jax.kernels.hopper.Tiling`).
    """

    width: int
    tables: tuple[Table, Table]
    tilings: tuple[tuple[int, int, int], tuple[int, int, int]]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Of the weights of both products."""
        first, second = (len(table.cells) for table in self.tables)
        return (first, CELL, self.width), (second, CELL, self.width)

    @property
    def multiplications(self) -> int:
        """Of one input vector."""
        return sum(count * depth * width for count, depth, width in self.shapes)

    def product(
        self,
        number: int,
        x: Float[Array, "*batch n"],
        weights: Float[Array, "cells 64 width"],
        bias: Float[Array, " m"] | None = None,
    ) -> Float[Array, "*batch m"]:
        """The first product (0) or the second (1), and the bias.

        A kernel computes it where it can: in bfloat16, on GPUs of compute capability 9.0.
        """
        table, weights = self.tables[number], weights.astype(x.dtype)

        def plain(x: Array, weights: Array, *bias: Array) -> Array:
            y = _plain(x, weights, table)
            return y + bias[0].astype(y.dtype) if bias else y

        def kernel(x: Array, weights: Array, *bias: Array) -> Array:
            from gaudi_jax.kernels.hopper import Tiling, multiply  # slow to import

            rows = x.reshape(-1, x.shape[-1])
            y = multiply(rows, weights, table, *bias, tiling=Tiling(*self.tilings[number]))
            return y.reshape(*x.shape[:-1], -1)

        operands = (x, weights) if bias is None else (x, weights, bias)
        if x.dtype == jnp.bfloat16 and x.size and on_hopper():
            return jax.lax.platform_dependent(*operands, cuda=kernel, default=plain)
        return plain(*operands)

    def check(self, in_features: int, out_features: int) -> None:
        """Whether the tables fit the axes of a layer.

        Raises:
            UserError: they do not.
        """
        first, second = self.tables
        between = len(first.counts) * self.width
        for table, features in ((first, in_features), (second, between)):
            if features % CELL or any(not 0 <= cell < features // CELL for cell in table.cells):
                raise UserError(f"a cell of the tiles lies outside {features} features")
        if len(second.counts) * self.width != out_features:
            raise UserError(
                f"{len(second.counts)} tiles of {self.width} columns are not the layer's "
                f"{out_features} output features"
            )
        if any(tuple(tiling) not in TILINGS for tiling in self.tilings):
            raise UserError(f"unknown tilings {self.tilings}; use some of {sorted(TILINGS)}")
        rows = max(rows for rows, _, _ in self.tilings)
        if rows * self.width > LARGEST_TILE:
            raise UserError(
                f"tiles of {rows} rows and {self.width} columns are too large; use at most "
                f"{LARGEST_TILE // self.width} rows"
            )

    def to_lists(self) -> dict[str, Any]:
        """As plain values that JSON holds."""
        return {
            "width": self.width,
            "tables": [[list(table.cells), list(table.counts)] for table in self.tables],
            "tilings": [list(tiling) for tiling in self.tilings],
        }

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> "Tiles":
        """From what `to_lists` gives.

        Raises:
            UserError: it is something else.
        """
        try:
            tables = [Table.from_lists(*table) for table in lists["tables"]]
            tilings = [tuple(map(int, tiling)) for tiling in lists["tilings"]]
            whole = len(tables) == len(tilings) == 2 and all(len(t) == 3 for t in tilings)
            if not whole:
                raise ValueError("two products have two tables, and two tilings of three numbers")
            return cls(int(lists["width"]), tuple(tables), tuple(tilings))  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the tiles of a packed layer are damaged ({error}); give the plan that "
                "gaudi_jax.harden returned"
            ) from error


def _plain(x: Array, weights: Array, table: Table) -> Array:
    """A block-sparse product, one tile after another."""
    cells = x.reshape(*x.shape[:-1], -1, CELL)
    ends = np.cumsum(table.counts)
    tiles = [
        jnp.tensordot(
            cells[..., np.array(table.cells[end - count : end], int), :],
            weights[end - count : end],
            axes=2,
        )
        for count, end in zip(table.counts, ends, strict=True)
    ]
    return jnp.concatenate(tiles, axis=-1)
