"""Packed linear layer: what a trained structured layer becomes when its blocks no longer move."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gaudi_jax.errors import UserError
from gaudi_jax.layers.base import StructuredLinear, placed
from gaudi_jax.layers.cells import Cells
from gaudi_jax.layers.tiles import Tiles

#: More ranges than these are gathered feature by feature: joining many slices is slower.
FEW = 16

#: Ranges (first, last + 1) of an axis.
Ranges = tuple[tuple[int, int], ...]


class Read(NamedTuple):
    """A first product: some columns of the blocks, on the inputs of one cyclic window.

    Attributes:
        start: first feature of the window.
        length: features of the window.
        columns: how many columns read it.
    """

    start: int
    length: int
    columns: int


class Write(NamedTuple):
    """A second product: what some columns give to one run of output features.

    Attributes:
        start: first feature of the run.
        length: features of the run.
        columns: ranges (first, last + 1) of the columns, in the order of the reads.
    """

    start: int
    length: int
    columns: Ranges

    @property
    def depth(self) -> int:
        """Number of columns."""
        return sum(last - first for first, last in self.columns)


class Layout(NamedTuple):
    """The matrix products of a packed layer.

    Attributes:
        reads: the first products, in order.
        writes: the second ones; their runs follow one another over the whole output axis.
    """

    reads: tuple[Read, ...]
    writes: tuple[Write, ...]

    @property
    def multiplications(self) -> int:
        """Of one input vector."""
        return sum(read.length * read.columns for read in self.reads) + sum(
            write.length * write.depth for write in self.writes
        )

    def to_lists(self) -> dict[str, Any]:
        """As plain values that JSON holds."""
        return {
            "reads": [list(read) for read in self.reads],
            "writes": [
                [write.start, write.length, [list(pair) for pair in write.columns]]
                for write in self.writes
            ],
        }

    @classmethod
    def from_lists(cls, lists: Mapping[str, Any]) -> "Layout":
        """From what `to_lists` gives.

        Raises:
            UserError: it is something else.
        """
        try:
            return cls(
                tuple(Read(*map(int, read)) for read in lists["reads"]),
                tuple(
                    Write(int(start), int(length), tuple((int(a), int(b)) for a, b in columns))
                    for start, length, columns in lists["writes"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the layout of a packed layer is damaged ({error}); give the plan that "
                "gaudi_jax.harden returned"
            ) from error


NOTHING = Layout((), ())


class PackedLinear(StructuredLinear):
    """A linear layer that holds only what lies inside the blocks, and a fixed layout of products.

    Made by `gaudi_jax.harden`. There are no masks and no dead blocks; places and sizes are part of
    the module's structure. Without a layout the layer holds its composed kernel.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        layout: the products, as slices, as tiles or cell by cell; None for a dense kernel.
        use_bias: whether to add a bias.
        dtype: dtype of the computation; None infers it from the input and the parameters.
        param_dtype: dtype of the parameters.

    Attributes:
        v: one matrix (length, columns) for each read; or all cells of the first product.
        u: one matrix (columns, length) for each write that reads columns; or all cells of the
            second product.
        dense: kernel of shape (in, out), or None.
        bias: shape (out_features,), or None.

    Raises:
        UserError: the layout does not fit the axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.layers.packed import Layout, PackedLinear, Read, Write
        >>> layout = Layout((Read(0, 2, 1),), (Write(0, 3, ((0, 1),)), Write(3, 1, ())))
        >>> layer = PackedLinear(4, 4, layout, use_bias=False)
        >>> layer.v[0][...], layer.u[0][...] = jnp.ones((2, 1)), jnp.ones((1, 3))
        >>> layer(jnp.ones((1, 4))), int(layer.multiplications())
        (Array([[2., 2., 2., 0.]], dtype=float32), 5)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        layout: Layout | Tiles | Cells | None,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        if isinstance(layout, Tiles | Cells):
            layout.check(in_features, out_features)
        elif layout is not None:
            _check(layout, in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype

        def zeros(*shape: int) -> nnx.Param:
            # From the host: nothing is compiled for each of the many shapes.
            return nnx.Param(jnp.asarray(np.zeros(shape, param_dtype)))

        if isinstance(layout, Tiles | Cells):
            first, second = ([zeros(*shape)] for shape in layout.shapes)
        else:
            reads, writes = layout or NOTHING
            first = [zeros(read.length, read.columns) for read in reads]
            second = [zeros(write.depth, write.length) for write in writes if write.columns]
        self.v, self.u = nnx.List(first), nnx.List(second)
        self.dense = nnx.data(zeros(in_features, out_features) if layout is None else None)
        self.bias = nnx.data(zeros(out_features) if use_bias else None)

    @classmethod
    def in_place_of(
        cls, layer: StructuredLinear, layout: Layout | Tiles | Cells | None, param_dtype: Any
    ) -> "PackedLinear":
        """The packed layer, all zeros, that computes as another layer does."""
        return cls(
            layer.in_features,
            layer.out_features,
            layout,
            use_bias=layer.bias is not None,
            dtype=layer.dtype,
            param_dtype=param_dtype,
        )

    def fill(self, left: Float[np.ndarray, "k in"], right: Float[np.ndarray, "k out"]) -> None:
        """Sets the values from columns in the order of the reads, zero outside their windows.

        Tiles and cells are set as they are made (`gaudi_jax.deploy.tiles`,
        `gaudi_jax.deploy.cells`).
        """
        assert not isinstance(self.layout, Tiles | Cells)
        if self.dense is not None:
            kernel = jnp.matmul(left.T, right, precision="highest")
            self.dense.set_value(kernel.astype(self.param_dtype))
        reads, writes = self.layout or NOTHING
        first = 0
        for read, v in zip(reads, self.v, strict=True):
            rows = left[first : first + read.columns]
            window = np.roll(rows, -read.start, axis=1)[:, : read.length]
            v.set_value(jnp.asarray(window.T, v.dtype))
            first += read.columns
        written = (write for write in writes if write.columns)
        for write, u in zip(written, self.u, strict=True):
            used = np.concatenate([np.arange(*pair) for pair in write.columns])
            run = right[used, write.start : write.start + write.length]
            u.set_value(jnp.asarray(run, u.dtype))

    def kernel(self) -> Float[Array, "in out"]:
        """The dense kernel, shape (in_features, out_features)."""
        return self.product(jnp.eye(self.in_features, dtype=self.param_dtype))

    def set_kernel(
        self,
        kernel: Float[Array, "in out"],
        second_moment: Float[Array, "in in"] | None = None,
    ) -> None:
        """A packed layer is not trained anew."""
        raise UserError("a packed layer keeps its kernel; make another one with gaudi_jax.harden")

    def multiplications(self) -> Int[Array, ""]:
        """Multiplications per input vector that are carried out, those with zeros included."""
        if self.layout is None:
            return jnp.int32(self.in_features * self.out_features)
        return jnp.int32(self.layout.multiplications)

    def affine(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """The product and the bias; a kernel adds it as it goes."""
        if isinstance(self.layout, Tiles | Cells):
            return placed(
                self._tabled(x, None if self.bias is None else self.bias[...]), out_sharding
            )
        return super().affine(x, out_sharding)

    def _tabled(self, x: Array, bias: Array | None) -> Array:
        assert isinstance(self.layout, Tiles | Cells)
        between = self.layout.product(0, x, self.v[0][...])
        return self.layout.product(1, between, self.u[0][...], bias)

    def product(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """The product ``x @ kernel()``."""
        if self.dense is not None:
            return jnp.matmul(x, self.dense[...].astype(x.dtype), out_sharding=out_sharding)
        if isinstance(self.layout, Tiles | Cells):
            return placed(self._tabled(x, None), out_sharding)
        reads, writes = self.layout or NOTHING
        hidden = [
            x[..., :0],
            *(
                jnp.matmul(_parts(x, _window(read, self.in_features)), v[...].astype(x.dtype))
                for read, v in zip(reads, self.v, strict=True)
            ),
        ]
        z = jnp.concatenate(hidden, axis=-1)
        matrices = iter(self.u)
        outputs = [
            jnp.matmul(
                _parts(z, write.columns),
                next(matrices)[...].astype(x.dtype)
                if write.columns
                else jnp.zeros((0, write.length), x.dtype),
            )
            for write in writes
        ]
        return placed(jnp.concatenate(outputs, axis=-1), out_sharding)


def _window(read: Read, size: int) -> Ranges:
    """A cyclic window as ranges."""
    around = read.start + read.length - size
    whole = (read.start, min(read.start + read.length, size))
    return (whole, (0, around)) if around > 0 else (whole,)


def _parts(x: Float[Array, "*batch n"], ranges: Ranges) -> Float[Array, "*batch k"]:
    """Ranges of the last axis, one after another."""
    if len(ranges) > FEW:
        indices = np.concatenate([np.arange(first, last) for first, last in ranges])
        return jnp.take(x, indices, -1, mode="clip", unique_indices=True, indices_are_sorted=True)
    parts = [x[..., first:last] for first, last in ranges or ((0, 0),)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _check(layout: Layout, in_features: int, out_features: int) -> None:
    for read in layout.reads:
        if read.columns < 1:
            raise UserError(f"{read} has no columns")
        if not (0 <= read.start < in_features and 1 <= read.length <= in_features):
            raise UserError(f"{read} lies outside the {in_features} input features")
    columns = sum(read.columns for read in layout.reads)
    place = 0
    for write in layout.writes:
        if write.start != place or write.length < 1:
            raise UserError(f"{write} does not follow on the run that ends at {place}")
        edges = [edge for columns_ in write.columns for edge in columns_]
        rising = all(first < last for first, last in write.columns) and edges == sorted(edges)
        if not rising or (edges and not 0 <= edges[0] < edges[-1] <= columns):
            raise UserError(
                f"{write} must read rising ranges of columns, none outside the {columns} there are"
            )
        place += write.length
    if place != out_features:
        raise UserError(f"the runs end at {place}, not at the {out_features} output features")
