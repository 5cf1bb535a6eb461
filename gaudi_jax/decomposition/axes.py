"""The two axes of a kernel as the search sees them: best windows, and the fit inside a window.

The search minimises ``tr((W - Ŵ)ᵀ C (W - Ŵ)) + price · multiplications``. The output axis is plain.
The input axis is plain where C is the identity, and weighted by C otherwise.

Let x be a block's factor on an axis while its other factor is orthonormal, and h the negative half
gradient of the squared error at x = 0: on a plain axis the least-squares x, on a weighted one C
times it. Inside a window S the best x is ``C_SS⁻¹ h_S``, and it takes ``h_Sᵀ C_SS⁻¹ h_S`` off the
error.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gaudi_jax.decomposition.windows import best_prefixes, best_windows, cell_energies, window_mask

#: Most anchors of a weighted axis, and of one of more features than WIDE, where each is dearer: 32
#: on 512 features make errors 1 % smaller, and the search as slow again by half.
MAX_ANCHORS, MAX_ANCHORS_WIDE, WIDE = 32, 16, 256
#: Bounds them too: each takes n² floats.
ANCHOR_FLOATS = 2**26
#: Random windows cover between these fractions of an axis.
SHORTEST, LONGEST = 0.03, 0.5


class Fit(NamedTuple):
    """A block's best factor on an axis.

    Attributes:
        factor: zero outside the window, shape (rank, n).
        value: what it takes off the error, less the price of its window.
        start: first cell of the window.
        length: cells of the window.
    """

    factor: Float[Array, "rank n"]
    value: Float[Array, ""]
    start: Int[Array, ""]
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class PlainAxis:
    """An axis on which every feature counts the same.

    Attributes:
        cells: number of grid cells.
        cell: features of a cell.
    """

    cells: int
    cell: int

    def weigh(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """The product x C, which is x."""
        return x

    def anchors(self, h: Float[Array, "b rank n"], price: float | Array) -> Int[Array, " b"]:
        """Windows may start anywhere: there is nothing to choose beforehand."""
        return jnp.zeros(h.shape[0], jnp.int32)

    def anchors_of(self, start: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """Likewise for windows that there are already."""
        return jnp.zeros_like(start)

    def fit(self, h: Float[Array, "rank n"], anchor: Array, price: float | Array) -> Fit:
        """The factor on the best window at a price per multiplication."""
        gains = cell_energies(h, self.cells) - price * h.shape[0] * self.cell
        value, start, length = best_windows(gains)
        return Fit(self.refit(h, start, length), value, start, length)

    def refit(self, h: Float[Array, "rank n"], start: Array, length: Array) -> Array:
        """The factor on a given window."""
        return jnp.where(window_mask(start, length, self.cells, self.cell), h, 0)

    def own_energies(self, x: Float[Array, "S rank n"], start: Array) -> Float[Array, "S cells"]:
        """What each cell of the factors takes off the error, given their orthonormal partners."""
        return cell_energies(x, self.cells)

    def best_inside(self, gains: Float[Array, "S cells"], start: Array) -> tuple:
        """Value, start and length of the best windows, for gains as `own_energies` orders them."""
        return best_windows(gains)

    def window_energies(
        self, energies: Float[Array, "S cells"], start: Array, length: Array
    ) -> Float[Array, " S"]:
        """What whole windows take off the error."""
        return jnp.where(window_mask(start, length, self.cells, 1), energies, 0).sum(axis=1)

    def edges(
        self, energies: Float[Array, "S cells"], start: Array, length: Array
    ) -> Float[Array, "2 S"]:
        """What the first and the last cell of each window take off the error."""
        places = jnp.stack([start, (start + length - 1) % self.cells])
        return energies[jnp.arange(len(start)), places]

    def windows(
        self, place: Float[Array, " b"], size: Float[Array, " b"]
    ) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
        """Starts and lengths from numbers in [0, 1); even in the logarithm of the length."""
        return (place * self.cells).astype(jnp.int32), _lengths(size, self.cells)


@dataclasses.dataclass(frozen=True)
class WeightedAxis:
    """An axis weighted by a full second moment C, whose windows start at anchors.

    With the Cholesky factor L of C in the order of features that begins at an anchor, the leading
    entries of ``z = L⁻¹ h`` serve every window that starts there: the window of k features takes
    ``z_1² + ... + z_k²`` off the error, and its factor is ``L⁻ᵀ`` times the first k entries of z.
    One product with L⁻¹ thus finds the best of all lengths exactly.

    Attributes:
        cells: number of grid cells.
        cell: features of a cell.
        second_moment: C, shape (n, n), positive definite.
        inverses: L⁻¹ of every anchor, its columns in the features' own order, shape (A, n, n).
        starts: first cells of the anchors, shape (A,).
    """

    cells: int
    cell: int
    second_moment: Float[Array, "n n"]
    inverses: Float[Array, "A n n"]
    starts: Int[Array, " A"]

    @classmethod
    def of(cls, second_moment: Float[Array, "n n"], cells: int) -> "WeightedAxis":
        """Factorises C (made positive definite by `regularise`) at evenly spaced anchors."""
        n = second_moment.shape[0]
        cell, count = n // cells, num_anchors(n, cells)
        starts = (jnp.arange(count) * cells) // count

        def inverse(start):
            order = (jnp.arange(n) + start * cell) % n
            lower = jnp.linalg.cholesky(second_moment[order][:, order])
            solved = lax.linalg.triangular_solve(lower, jnp.eye(n), left_side=True, lower=True)
            return jnp.zeros((n, n)).at[:, order].set(solved)

        return cls(cells, cell, second_moment, lax.map(inverse, starts), starts)

    def weigh(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """The product x C."""
        return x @ self.second_moment

    def anchors(self, h: Float[Array, "b rank n"], price: float | Array) -> Int[Array, " b"]:
        """The anchor of the best window of each block."""
        b, rank, n = h.shape
        # As one product of matrices: several times as fast as a batch of them.
        z = h.reshape(b * rank, n) @ self.inverses.reshape(-1, n).T
        z = jnp.moveaxis(z.reshape(b, rank, -1, n), 1, 2)
        gains = cell_energies(z, self.cells) - price * rank * self.cell
        return jnp.argmax(best_prefixes(gains)[0], axis=1).astype(jnp.int32)

    def anchors_of(self, start: Int[Array, "*b"]) -> Int[Array, "*b"]:
        """The anchors of windows that start at one."""
        return jnp.argmax(self.starts == start[..., None], axis=-1).astype(jnp.int32)

    def fit(self, h: Float[Array, "rank n"], anchor: Array, price: float | Array) -> Fit:
        """The factor on the best window from an anchor at a price per multiplication."""
        inverse = self.inverses[anchor]
        z = h @ inverse.T
        gains = cell_energies(z, self.cells) - price * h.shape[0] * self.cell
        value, length = best_prefixes(gains)
        return Fit(self._solve(z, inverse, length), value, self.starts[anchor], length)

    def refit(self, h: Float[Array, "rank n"], start: Array, length: Array) -> Array:
        """The factor on a given window, which starts at an anchor."""
        inverse = self.inverses[self.anchors_of(start)]
        return self._solve(h @ inverse.T, inverse, length)

    def _solve(self, z: Array, inverse: Array, length: Array) -> Array:
        inside = jnp.arange(z.shape[-1]) < length * self.cell
        return jnp.where(inside, z, 0) @ inverse

    def own_energies(self, x: Float[Array, "S rank n"], start: Array) -> Float[Array, "S cells"]:
        """What each cell takes off the error once those before it, from the anchor on, are in."""

        def energies(block):
            inverse = self.inverses[self.anchors_of(block[1])]
            return cell_energies(block[0] @ inverse.T, self.cells)

        return lax.map(energies, (self.weigh(x), start))

    def best_inside(self, gains: Float[Array, "S cells"], start: Array) -> tuple:
        """Value, start and length of the best windows, for gains as `own_energies` orders them."""
        value, length = best_prefixes(gains)
        return value, start, length

    def window_energies(
        self, energies: Float[Array, "S cells"], start: Array, length: Array
    ) -> Float[Array, " S"]:
        """What whole windows take off the error; energies begin at their anchors."""
        return jnp.where(window_mask(0 * start, length, self.cells, 1), energies, 0).sum(axis=1)

    def edges(
        self, energies: Float[Array, "S cells"], start: Array, length: Array
    ) -> Float[Array, "2 S"]:
        """What each window's last cell takes off the error; the first one is its anchor."""
        last = energies[jnp.arange(len(start)), length - 1]
        return jnp.stack([jnp.full_like(last, jnp.inf), last])

    def windows(
        self, place: Float[Array, " b"], size: Float[Array, " b"]
    ) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
        """Anchored starts, and lengths, from numbers in [0, 1)."""
        start = self.starts[(place * len(self.starts)).astype(jnp.int32)]
        return start, _lengths(size, self.cells)


Axis = PlainAxis | WeightedAxis


def num_anchors(n: int, cells: int) -> int:
    """How many places windows on a weighted axis may begin at, evenly spaced."""
    most = MAX_ANCHORS if n <= WIDE else MAX_ANCHORS_WIDE
    return max(1, min(cells, most, ANCHOR_FLOATS // n**2))


def _lengths(size: Float[Array, " b"], cells: int) -> Int[Array, " b"]:
    fraction = SHORTEST * (LONGEST / SHORTEST) ** size
    return jnp.maximum(1, jnp.round(fraction * cells)).astype(jnp.int32)
