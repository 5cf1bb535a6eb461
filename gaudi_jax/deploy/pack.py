"""One Gaudi layer, packed."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from gaudi_jax.deploy.cells import cell_shapes, cell_values, cells_of
from gaudi_jax.deploy.layout import Compiled, Windows, compile_layout
from gaudi_jax.deploy.machine import Machine
from gaudi_jax.deploy.tiles import tiles_of
from gaudi_jax.kernels.table import CELL
from gaudi_jax.layers import GaudiLinear, PackedLinear
from gaudi_jax.layers.cells import Cells
from gaudi_jax.layers.packed import Layout
from gaudi_jax.layers.tiles import Tiles
from gaudi_jax.masks import intervals

Tiling = tuple[int, int, int]


class Packer:
    """Makes packed forms of a Gaudi layer with different layouts.

    Args:
        layer: the layer; it is left as it is.
    """

    def __init__(self, layer: GaudiLinear):
        self.layer = layer
        places = [_places(layer, axis) for axis in (0, 1)]
        self._live = np.flatnonzero((places[0][1] > 0) & (places[1][1] > 0))
        self._reads, self._writes = (
            Windows(
                np.repeat(start[self._live], layer.rank),
                np.repeat(length[self._live], layer.rank),
                size,
            )
            for (start, length), size in zip(
                places, (layer.in_features, layer.out_features), strict=True
            )
        )

    @property
    def dtype(self) -> jnp.dtype:
        """In which the layer computes."""
        return jnp.dtype(self.layer.dtype or self.layer.param_dtype)

    def compile(self, machine: Machine, tokens: int) -> Compiled:
        """The fastest slices by the model of a machine, for a number of input vectors at once."""
        return compile_layout(self._reads, self._writes, machine, tokens, self.dtype.itemsize)

    def cells(self) -> Cells:
        """The products cell by cell."""
        return cells_of(self._reads, self._writes, self.layer.rank, self.layer.granularity)

    def seconds_by_cell(self, machine: Machine, tokens: int) -> float:
        """What the products cell by cell take by the model of a machine."""
        shapes = cell_shapes(self._reads, self._writes, self.layer.rank, self.layer.granularity)
        return sum(machine.cells(shape, tokens, self.dtype.itemsize) for shape in shapes)

    def pack(self, compiled: Compiled) -> PackedLinear:
        """The packed form with a layout."""
        packed = self._empty(compiled.layout)
        left, right = (
            # The last row is the columns of zeros in a layout.
            np.pad(columns, ((0, 1), (0, 0)))[compiled.order]
            for columns in self._live_columns
        )
        packed.fill(left, right)
        return packed

    def pack_cells(self, cells: Cells) -> PackedLinear:
        """The packed form, cell by cell."""
        packed = self._empty(cells)
        for matrices, values in zip(
            (packed.v, packed.u), cell_values(cells, *self._live_columns), strict=True
        ):
            matrices[0].set_value(jnp.asarray(values, packed.param_dtype))
        return packed

    def places(self) -> list[list[int]]:
        """Where the columns read and write, as plain numbers."""
        windows = (self._reads, self._writes)
        return [values.tolist() for w in windows for values in (w.start, w.length)]

    def tileable(self, width: int) -> bool:
        """Whether tiles of so many columns cut the layer, and there is anything in it."""
        layer = self.layer
        return bool(len(self._live) and not layer.in_features % CELL | layer.out_features % width)

    def tile(self, width: int, tilings: tuple[Tiling, Tiling]) -> PackedLinear:
        """The packed form as two block-sparse products."""
        left, right = self._live_columns
        first, second = tiles_of(self._reads, self._writes, left, right, width)
        packed = self._empty(Tiles(width, (first.table, second.table), tilings))
        for matrices, product in ((packed.v, first), (packed.u, second)):
            matrices[0].set_value(jnp.asarray(product.tiles, packed.param_dtype))
        return packed

    def _empty(self, layout: Layout | Tiles | Cells | None) -> PackedLinear:
        """The packed form with its bias, and zeros."""
        # Values of a larger dtype than that of the computation would be rounded at every call.
        dtypes = jnp.dtype(self.layer.param_dtype), self.dtype
        smaller = min(dtypes, key=lambda dtype: dtype.itemsize)
        packed = PackedLinear.in_place_of(self.layer, layout, smaller)
        if packed.bias is not None and self.layer.bias is not None:
            packed.bias.set_value(self.layer.bias[...].astype(packed.param_dtype))
        return packed

    @cached_property
    def _live_columns(self) -> list[np.ndarray]:
        """The columns on both axes, zero outside their windows.

        On the host, as all that is made of them: hardly two layers have the same shapes, and each
        operation on a device would be compiled for every one.
        """
        factors = self.layer.v[...], self.layer.u[...]
        windows = self._reads, self._writes
        return [
            np.where(
                (np.arange(w.size) - w.start[:, None]) % w.size < w.length[:, None],
                np.asarray(factor)[self._live].reshape(-1, w.size),
                np.zeros((), factor.dtype),
            )
            for factor, w in zip(factors, windows, strict=True)
        ]


def pack(layer: GaudiLinear, machine: Machine, tokens: int) -> PackedLinear:
    """The packed form of a layer that is fastest by the model of a machine."""
    packer = Packer(layer)
    compiled = packer.compile(machine, tokens)
    if packer.seconds_by_cell(machine, tokens) < compiled.seconds:
        return packer.pack_cells(packer.cells())
    return packer.pack(compiled)


def _places(layer: GaudiLinear, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the blocks' intervals in features."""
    size = (layer.in_features, layer.out_features)[axis]
    places = _intervals(
        layer.widths[axis], layer.locations[axis], size, granularity=layer.granularity[axis]
    )
    start, length = (np.asarray(values, int) for values in places)
    # From another place on, all features would have to be copied into another order.
    return np.where(length == size, 0, start), length


_intervals = jax.jit(intervals, static_argnums=2, static_argnames="granularity")
