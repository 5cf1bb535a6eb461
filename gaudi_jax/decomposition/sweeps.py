"""Exact coordinate descent on blocks of low rank under a price per multiplication.

The kernel W is approximated by ``Ŵ = Σ_b v_bᵀ u_b``, where each v_b and u_b is zero outside a
cyclic window. One step refits one block's factor on one axis, values and window, to everything that
the other blocks leave: it cannot raise the goal of `axes.py`.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gaudi_jax.decomposition.axes import Axis
from gaudi_jax.masks import interval_multiplications

#: Columns that share one matrix product; inside such a chunk blocks follow one another.
CHUNK = 32
#: Stands in for a norm of 0, in free slots.
TINY = 1e-30
#: Keeps a block whose columns are almost parallel from breaking its Cholesky factor.
JITTER = 1e-6


class Blocks(NamedTuple):
    """Blocks in fixed slots; in a free slot lengths and factors are 0.

    Attributes:
        v: input factors, shape (S, rank, in), zero outside the windows.
        u: output factors, shape (S, rank, out), likewise.
        start: first cells of the windows, shape (2, S); row 0 input, row 1 output.
        length: cells of the windows, shape (2, S).
    """

    v: Float[Array, "S rank in"]
    u: Float[Array, "S rank out"]
    start: Int[Array, "2 S"]
    length: Int[Array, "2 S"]

    @classmethod
    def empty(cls, slots: int, rank: int, shape: tuple[int, int]) -> "Blocks":
        """Free slots for a kernel of this shape."""
        none = jnp.zeros((2, slots), jnp.int32)
        factors = [jnp.zeros((slots, rank, size)) for size in shape]
        return cls(factors[0], factors[1], none, none)

    @property
    def live(self) -> Array:
        """Which slots are in use, shape (S,)."""
        return self.length[0] > 0

    def kernel(self) -> Float[Array, "in out"]:
        """The sum of the blocks."""
        return jnp.einsum("brn,brm->nm", self.v, self.u)

    def live_first(self) -> "Blocks":
        """The same blocks, those in use at the front, in order."""
        order = jnp.argsort(~self.live, stable=True)
        return Blocks(self.v[order], self.u[order], self.start[:, order], self.length[:, order])


class Axes(NamedTuple):
    """Both axes of the kernel; the output axis is plain."""

    input: Axis
    output: Axis

    def multiplications(self, length: Int[Array, "2 S"], rank: int) -> Int[Array, ""]:
        """What blocks of these lengths cost together."""
        a, b = length[0] * self.input.cell, length[1] * self.output.cell
        return interval_multiplications(a, b, rank).sum()


def sweep(
    error: Float[Array, "in out"],
    blocks: Blocks,
    count: Int[Array, ""],
    price: float | Array,
    axes: Axes,
    *,
    move_windows: bool = True,
    seek_anchors: bool | Array = True,
) -> tuple[Float[Array, "in out"], Blocks]:
    """Refits all input factors, then all output factors.

    Args:
        error: C (W - Ŵ), kept up to date.
        blocks: those in use first.
        count: blocks in use.
        price: of a multiplication, in units of the squared error.
        axes: both axes.
        move_windows: whether windows are chosen anew, or only the values fitted.
        seek_anchors: whether such a window on a weighted axis may begin at another anchor, the
            dearest part of a sweep, or only end elsewhere.

    Returns:
        The new error and blocks; blocks that are not worth their price are gone.
    """
    (s_in, s_out), (l_in, l_out) = blocks.start, blocks.length
    refit = partial(_sweep_axis, move_windows=move_windows, seek_anchors=seek_anchors)
    error_t, v, u, s_in, l_in = refit(
        error.T, blocks.v, blocks.u, s_in, l_in, l_out, count, price, axes[::-1]
    )
    l_out = jnp.where(l_in == 0, 0, l_out)
    error, u, v, s_out, l_out = refit(error_t.T, u, v, s_out, l_out, l_in, count, price, axes)
    l_in = jnp.where(l_out == 0, 0, l_in)
    return error, Blocks(v, u, jnp.stack([s_in, s_out]), jnp.stack([l_in, l_out]))


def _sweep_axis(
    error: Float[Array, "a c"],
    moving: Float[Array, "S rank c"],
    fixed: Float[Array, "S rank a"],
    start: Int[Array, " S"],
    length: Int[Array, " S"],
    fixed_length: Int[Array, " S"],
    count: Int[Array, ""],
    price: float | Array,
    axes: tuple[Axis, Axis],
    *,
    move_windows: bool,
    seek_anchors: bool | Array,
) -> tuple[Array, Array, Array, Array, Array]:
    """One pass over the blocks that refits the factor `moving` on the second of the axes."""
    fixed_axis, axis = axes
    slots, rank, _ = moving.shape
    per_chunk = max(1, CHUNK // rank)
    spare = -slots % per_chunk

    def take(x, chunk):
        return lax.dynamic_slice_in_dim(x, chunk * per_chunk, per_chunk)

    def put(x, values, chunk):
        return lax.dynamic_update_slice_in_dim(x, values, chunk * per_chunk, 0)

    def chunk_step(chunk, carry):
        error, moving, fixed, start, length = carry
        old, q, partner = take(moving, chunk), take(fixed, chunk), take(fixed_length, chunk)
        q, weighed, old = orthonormalise(q, fixed_axis.weigh(q), old)
        flat, flat_weighed = _columns(q), _columns(weighed)
        h = (flat @ error).reshape(old.shape) + axis.weigh(old)
        overlap = (flat @ flat_weighed.T).reshape(per_chunk, rank, per_chunk * rank)
        anchors = None
        if move_windows:
            anchors = lax.cond(
                seek_anchors,
                lambda: axis.anchors(h, price),
                lambda: axis.anchors_of(take(start, chunk)),
            )

        def block_step(b, inner):
            new, moved, start, length = inner
            # What the blocks before this one in the chunk have just taken or left.
            h_b = h[b] - overlap[b] @ moved
            if anchors is None:
                factor = axis.refit(h_b, start[b], length[b])
            else:
                fit = axis.fit(h_b, anchors[b], price)
                rent = price * rank * fixed_axis.cell * partner[b]
                lives = (fit.value > rent) & (partner[b] > 0)
                factor = jnp.where(lives, fit.factor, 0)
                start = start.at[b].set(jnp.where(lives, fit.start, 0))
                length = length.at[b].set(jnp.where(lives, fit.length, 0))
            change = axis.weigh(factor - old[b])
            moved = lax.dynamic_update_slice_in_dim(moved, change, b * rank, 0)
            return new.at[b].set(factor), moved, start, length

        begin = (old, jnp.zeros_like(_columns(old)), take(start, chunk), take(length, chunk))
        new, moved, new_start, new_length = lax.fori_loop(0, per_chunk, block_step, begin)
        q = jnp.where(new_length[:, None, None] > 0, q, 0)
        return (
            error - flat_weighed.T @ moved,
            put(moving, new, chunk),
            put(fixed, q, chunk),
            put(start, new_start, chunk),
            put(length, new_length, chunk),
        )

    moving, fixed, start, length, fixed_length = (
        jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1))
        for x in (moving, fixed, start, length, fixed_length)
    )
    error, *rest = lax.fori_loop(
        0, -(-count // per_chunk), chunk_step, (error, moving, fixed, start, length)
    )
    moving, fixed, start, length = (x[:slots] for x in rest)
    return error, moving, fixed, start, length


def orthonormalise(
    fixed: Float[Array, "b rank a"],
    weighed: Float[Array, "b rank a"],
    moving: Float[Array, "b rank c"],
) -> tuple[Array, Array, Array]:
    """Makes the rows of each `fixed` orthonormal under C, and moves the factor into `moving`.

    Args:
        fixed: a factor of every block.
        weighed: the same times C.
        moving: the other factor.

    Returns:
        The three, changed so that ``movingᵀ fixed`` of each block is as it was.
    """
    lower = root(gram(weighed, fixed))
    if fixed.shape[1] == 1:  # nothing to be put together
        return solved(lower, fixed), solved(lower, weighed), carried(lower, moving)
    # In one call: see `root`.
    both = solved(lower, jnp.concatenate([fixed, weighed], axis=2))
    fixed, weighed = jnp.split(both, [fixed.shape[2]], axis=2)
    return fixed, weighed, carried(lower, moving)


def gram(
    weighed: Float[Array, "b rank a"], fixed: Float[Array, "b rank a"]
) -> Float[Array, "b rank rank"]:
    """Inner products of each block's columns under C."""
    return jnp.einsum("bra,bsa->brs", weighed, fixed)


def root(products: Float[Array, "b rank rank"]) -> Float[Array, "b rank rank"]:
    """Cholesky factors of Gram matrices, which may be singular.

    On a CPU the threads that carry out batches of linear algebra wait for threads of the pool that
    they belong to (jaxlib 0.10): as many such calls as there are threads can wait for ever. So no
    two of them in a program may be independent of each other.
    """
    rank = products.shape[1]
    if rank == 1:
        return jnp.sqrt(jnp.maximum(products, TINY))
    size = jnp.trace(products, axis1=1, axis2=2)[:, None, None]
    return jnp.linalg.cholesky(products + (JITTER * size + TINY) * jnp.eye(rank))


def solved(
    lower: Float[Array, "b rank rank"], x: Float[Array, "b rank a"]
) -> Float[Array, "b rank a"]:
    """Rows x made orthonormal by the root of their Gram matrix."""
    if lower.shape[1] == 1:
        return x / lower
    return lax.linalg.triangular_solve(lower, x, left_side=True, lower=True)


def carried(
    lower: Float[Array, "b rank rank"], moving: Float[Array, "b rank c"]
) -> Float[Array, "b rank c"]:
    """What the other factor must be then."""
    return moving * lower if lower.shape[1] == 1 else jnp.einsum("bsr,bsc->brc", lower, moving)


def _columns(x: Float[Array, "b rank n"]) -> Float[Array, "k n"]:
    return x.reshape(-1, x.shape[-1])
