"""New blocks, sought in what the present ones leave."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gaudi_jax.decomposition.axes import Axis
from gaudi_jax.decomposition.sweeps import Axes, Blocks, gram, root, solved

#: Columns of the blocks sought at once, and the fewest blocks.
COLUMNS, FEWEST = 32, 8
#: Power iterations inside random windows, and then with windows that move.
FIXED_STEPS, FREE_STEPS = 2, 2
#: A candidate whose cosine with a better one exceeds this is passed over.
OVERLAP = 0.3


def add_blocks(
    key: Array,
    error: Float[Array, "in out"],
    blocks: Blocks,
    count: Int[Array, ""],
    price: Array,
    axes: Axes,
    limit: int | Array,
) -> tuple[Blocks, Int[Array, ""]]:
    """Puts promising new blocks into free slots, with input factors of 0.

    The next sweep fits them one after another, so that of two that explain the same only one lives.

    Args:
        key: random key.
        error: C (W - Ŵ).
        blocks: those in use first.
        count: blocks in use.
        price: of a multiplication.
        axes: both axes.
        limit: most blocks that are added, at least 1.

    Returns:
        The blocks, and the number in use.
    """
    slots, rank, _ = blocks.v.shape
    found, score = _candidates(key, error, price, axes, rank)
    taken = _distinct(found, score, limit)
    slot = jnp.where(taken, count + jnp.cumsum(taken) - 1, slots)  # beyond the last: dropped
    added = Blocks(
        blocks.v.at[slot].set(0, mode="drop"),
        blocks.u.at[slot].set(found.u, mode="drop"),
        blocks.start.at[:, slot].set(found.start, mode="drop"),
        blocks.length.at[:, slot].set(found.length, mode="drop"),
    )
    return added, jnp.minimum(count + taken.sum(), slots)


def _candidates(
    key: Array, error: Float[Array, "in out"], price: Array, axes: Axes, rank: int
) -> tuple[Blocks, Float[Array, " K"]]:
    """Blocks from power iterations on the error, and what each would take off the goal."""
    count = max(COLUMNS // rank, FEWEST)
    # One draw: each takes some tenths of a second to compile.
    drawn = jax.random.uniform(key, (count, rank * error.shape[1] + 4))
    start_in, length_in = axes.input.windows(drawn[:, 0], drawn[:, 1])
    start_out, length_out = axes.output.windows(drawn[:, 2], drawn[:, 3])
    u = 2 * drawn[:, 4:].reshape(count, rank, -1) - 1

    def refit(axis: Axis, h, start, length):
        return _normalise(axis, _each(axis.refit, h, start, length))

    u = refit(axes.output, u, start_out, length_out)

    def fixed_step(_, u):
        v = refit(axes.input, _project(u, error.T), start_in, length_in)
        return refit(axes.output, _project(v, error), start_out, length_out)

    u = lax.fori_loop(0, FIXED_STEPS, fixed_step, u)

    def fit(axis: Axis, h):
        return _each(lambda h, anchor: axis.fit(h, anchor, price), h, axis.anchors(h, price))

    def free_step(_, carry):
        v_fit = fit(axes.input, _project(carry[1], error.T))
        v = _normalise(axes.input, v_fit.factor)
        u_fit = fit(axes.output, _project(v, error))
        start = jnp.stack([v_fit.start, u_fit.start])
        # At a high price the best window is empty; it stays one cell, and its score is negative.
        length = jnp.maximum(jnp.stack([v_fit.length, u_fit.length]), 1)
        energy = jnp.square(u_fit.factor).sum((1, 2))
        return v, _normalise(axes.output, u_fit.factor), start, length, energy

    none = jnp.zeros((2, count), jnp.int32)
    begin = (jnp.zeros((*u.shape[:2], error.shape[0])), u, none, none, jnp.zeros(count))
    v, u, start, length, energy = lax.fori_loop(0, FREE_STEPS, free_step, begin)
    cells = jnp.array([axes.input.cell, axes.output.cell])
    rent = price * rank * (length * cells[:, None]).sum(axis=0)
    return Blocks(v, u, start, length), energy - rent


def _distinct(found: Blocks, score: Float[Array, " K"], limit: int | Array) -> Bool[Array, " K"]:
    """The best candidates that are worth their price and differ from one another."""
    rank = found.v.shape[1]
    v = _unit(found.v)
    cosines = jnp.einsum("arn,bsn->abrs", v, v) * jnp.einsum("arm,bsm->abrs", found.u, found.u)
    overlap = jnp.abs(cosines.sum((2, 3))) / rank
    order = jnp.argsort(-score)

    def step(i, taken):
        b = order[i]
        distinct = jnp.where(taken, overlap[b], 0).max() <= OVERLAP
        return taken.at[b].set((score[b] > 0) & (taken.sum() < limit) & distinct)

    return lax.fori_loop(0, len(order), step, jnp.zeros(len(order), bool))


def _each(function, *args):
    """Applies a function to every candidate in turn: a weighted axis copies a matrix for each."""
    return lax.map(lambda one: function(*one), args)


def _project(x: Float[Array, "K rank a"], error: Float[Array, "a c"]) -> Float[Array, "K rank c"]:
    return (x.reshape(-1, x.shape[-1]) @ error).reshape(*x.shape[:2], -1)


def _normalise(axis: Axis, x: Array) -> Array:
    return solved(root(gram(axis.weigh(x), x)), x)


def _unit(x: Float[Array, "K rank n"]) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
