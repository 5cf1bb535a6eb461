"""The search: pursuit and coordinate descent while a price steers the cost to the budget."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gaudi_jax.decomposition.axes import WeightedAxis
from gaudi_jax.decomposition.low_rank import svd_factors
from gaudi_jax.decomposition.pursuit import add_blocks
from gaudi_jax.decomposition.sweeps import Axes, Blocks, carried, gram, root, sweep
from gaudi_jax.decomposition.windows import window_mask

#: The first price over the energy per multiplication of the first component beyond the budget.
FIRST_PRICE = 16.0
#: The rounds for which the paces below are meant; fewer rounds go faster.
ROUNDS = 40
#: Shares of the slots that one round may fill: the quick pace fills the slots where there is no
#: clear structure, the careful one tells separate blocks apart.
QUICK, CAREFUL = 0.06, 0.03
SWEEPS = 2
#: Most rounds that are added while the blocks cost less than SPENT of the budget.
EXTRA_ROUNDS = 8
#: The search aims above the budget; landing takes the excess off.
AIM = 1.01
#: Before the first overshoot the price falls by the second factor a round, and by the first one
#: where the last round added less than PLATEAU of the budget.
FAST, SLOW, PLATEAU = 0.6, 0.85, 0.02
#: Shares of the excess that remain after each stage of landing, and the refits that follow it.
STAGES = ((0.66, 3), (0.33, 3), (0.0, 3), (0.0, 20))
BISECTIONS = 16
#: Share of the budget below which the search goes on, and landing shrinks single blocks instead.
SPENT = 0.9


def search(
    kernel: Float[Array, "in out"],
    budget: Int[Array, ""],
    key: Array,
    axes: Axes,
    begin: Blocks,
    rounds: Int[Array, ""],
    share: float | Array,
) -> Blocks:
    """Blocks for a kernel under a budget, from given ones, at one pace.

    Args:
        kernel: dense kernel.
        budget: multiplications that the blocks may cost together.
        key: random key.
        axes: both axes.
        begin: blocks to start from, those in use first; none of them for a search from nothing.
        rounds: of pursuit, sweeps and a new price.
        share: of the slots that one round may fill, `QUICK` or `CAREFUL`.

    Returns:
        Blocks that cost no more than the budget.
    """
    slots, rank, _ = begin.v.shape
    pace = jnp.maximum(1.0, ROUNDS / rounds)
    limit = jnp.maximum(1, share * slots * pace)

    def unfinished(carry):
        i, *_, used = carry
        # Landing takes off what is too much; it adds nothing.
        return (i < rounds) | ((used < SPENT) & (i < rounds + EXTRA_ROUNDS))

    def round_step(carry):
        i, blocks, price, overshot, used = carry
        error = weighed_error(kernel, blocks, axes)
        added, count = add_blocks(
            jax.random.fold_in(key, i), error, blocks, blocks.live.sum(), price, axes, limit
        )

        def refit(i, both):
            return sweep(both[0], both[1], count, price, axes, seek_anchors=i == 0)

        # A loop of the compiler's: a sweep takes seconds to compile.
        error, blocks = lax.fori_loop(0, SWEEPS, refit, (error, added))
        blocks = blocks.live_first()
        now = axes.multiplications(blocks.length, rank) / (AIM * budget)
        overshot = overshot | (now > 1)
        steer = jnp.where(now > 1, jnp.minimum(1.5, now**2), jnp.maximum(0.7, now**2))
        fall = jnp.where(now - used < PLATEAU, FAST, SLOW) ** pace
        return i + 1, blocks, price * jnp.where(overshot, steer, fall), overshot, now

    started = begin.live.any()
    first = jnp.where(started, _warm_price(begin, axes), _cold_price(kernel, budget, axes))
    state = (jnp.int32(0), begin, first, started, jnp.float32(0))
    _, blocks, *_ = lax.while_loop(unfinished, round_step, state)
    return _land(kernel, budget, blocks, axes)


def svd_blocks(
    kernel: Float[Array, "in out"], budget: Int[Array, ""], axes: Axes, rank: int
) -> Blocks:
    """The truncated (with a weighted axis, whitened) SVD under the budget, in full-width blocks."""
    n, m = kernel.shape
    slots = min(n, m) // rank
    left, right = svd_factors(kernel, slots * rank, second_moment=_second_moment(axes))
    affordable = budget // (n + m)
    kept = (jnp.arange(slots * rank) < affordable // rank * rank).reshape(slots, rank, 1)
    cells = jnp.array([axes.input.cells, axes.output.cells])[:, None]
    return Blocks(
        jnp.where(kept, left.reshape(slots, rank, n), 0),
        jnp.where(kept, right.reshape(slots, rank, m), 0),
        jnp.zeros((2, slots), jnp.int32),
        jnp.where(kept[:, 0, 0], cells, 0),
    )


def weighed_error(kernel: Float[Array, "in out"], blocks: Blocks, axes: Axes) -> Array:
    """The product C (W - Ŵ)."""
    return axes.input.weigh((kernel - blocks.kernel()).T).T


def squared_error(kernel: Float[Array, "in out"], blocks: Blocks, axes: Axes) -> Array:
    """The squared error ``tr((W - Ŵ)ᵀ C (W - Ŵ))``."""
    error = kernel - blocks.kernel()
    return (error * axes.input.weigh(error.T).T).sum()


def _second_moment(axes: Axes) -> Array | None:
    return axes.input.second_moment if isinstance(axes.input, WeightedAxis) else None


def _cold_price(kernel: Array, budget: Array, axes: Axes) -> Array:
    """High enough that the first rounds buy only what is worth it."""
    n, m = kernel.shape
    _, right = svd_factors(kernel, min(n, m), second_moment=_second_moment(axes))
    # Both factors hold the root of the singular value; the right one is never weighed.
    energies = jnp.square(right).sum(axis=1) ** 2
    index = jnp.clip(budget // (n + m), 0, min(n, m) - 1)
    # A kernel of lower rank than the budget affords has no such component.
    return FIRST_PRICE * jnp.maximum(energies[index], 1e-12 * energies[0]) / (n + m)


def _warm_price(blocks: Blocks, axes: Axes) -> Array:
    """Below what the blocks at hand bring per multiplication."""
    energy, _ = _energies(blocks, axes)
    cells = jnp.array([axes.input.cell, axes.output.cell])[:, None]
    cost = blocks.v.shape[1] * (blocks.length * cells).sum(axis=0)
    return 0.3 * jnp.nanmedian(jnp.where(cost > 0, energy.sum(axis=1) / cost, jnp.nan))


def _energies(blocks: Blocks, axes: Axes) -> tuple[Array, Array]:
    """Energies of the cells of both axes, in the order in which each axis keeps them."""
    v, u, _, _ = blocks
    # In one call: see `root`.
    both = root(jnp.concatenate([gram(u, u), gram(axes.input.weigh(v), v)]))
    of_u, of_v = jnp.split(both, 2)
    v, u = carried(of_u, v), carried(of_v, u)
    return axes.input.own_energies(v, blocks.start[0]), axes.output.own_energies(u, blocks.start[1])


def _land(kernel: Float[Array, "in out"], budget: Array, blocks: Blocks, axes: Axes) -> Blocks:
    """Takes off what exceeds the budget, in stages with refits between them."""
    rank = blocks.v.shape[1]
    excess = jnp.maximum(axes.multiplications(blocks.length, rank) - budget, 0)
    shares = jnp.array([share for share, _ in STAGES])
    refits = jnp.array([refits for _, refits in STAGES])

    def stage(i, blocks):
        goal = budget + (shares[i] * excess).astype(jnp.int32)
        blocks = _trim(blocks, goal, axes).live_first()
        count = blocks.live.sum()

        def refit(_, carry):
            error, blocks = carry
            return sweep(error, blocks, count, 0.0, axes, move_windows=False)

        begin = (weighed_error(kernel, blocks, axes), blocks)
        return lax.fori_loop(0, refits[i], refit, begin)[1]

    return lax.fori_loop(0, len(STAGES), stage, blocks)


def _trim(blocks: Blocks, goal: Array, axes: Axes) -> Blocks:
    """Shrinks windows, and drops blocks, by one price, and what is still too much by cells."""
    rank = blocks.v.shape[1]
    e_in, e_out = _energies(blocks, axes)
    (start_in, start_out), (cell_in, cell_out) = blocks.start, (axes.input.cell, axes.output.cell)

    def windows(price):
        value_in, s_in, l_in = axes.input.best_inside(e_in - price * rank * cell_in, start_in)
        value_out, s_out, l_out = axes.output.best_inside(
            e_out - price * rank * cell_out, start_out
        )
        lives = (value_in > price * rank * cell_out * l_out) & (
            value_out > price * rank * cell_in * l_in
        )
        length = jnp.where(lives, jnp.stack([l_in, l_out]), 0)
        return jnp.where(lives, jnp.stack([s_in, s_out]), 0), length

    def halve(_, carry):
        low, high, over, under = carry
        middle = jnp.sqrt(low * high)
        found = windows(middle)
        above = axes.multiplications(found[1], rank) > goal
        over = jax.tree.map(partial(jnp.where, above), found, over)
        under = jax.tree.map(partial(jnp.where, ~above), found, under)
        return jnp.where(above, middle, low), jnp.where(above, high, middle), over, under

    everything = e_in.sum() + 1e-30  # at this price nothing lives
    nothing = 1e-12 * everything
    none = jnp.zeros_like(blocks.start), jnp.zeros_like(blocks.length)
    begin = nothing, everything, (blocks.start, blocks.length), none
    # The windows are kept, not their price: just below the one at which a block dies, found again
    # it may be dead.
    _, _, over, under = lax.fori_loop(0, BISECTIONS, halve, begin)
    # Blocks that are worth the same die together. Then they shrink instead.
    spent = axes.multiplications(under[1], rank) >= SPENT * goal
    start, length = jax.tree.map(partial(jnp.where, spent), under, over)
    found = _shave(start, length, (e_in, e_out), goal, axes, rank)
    fits = axes.multiplications(blocks.length, rank) <= goal
    start, length = jax.tree.map(partial(jnp.where, fits), (blocks.start, blocks.length), found)
    inside = [
        window_mask(start[i], length[i], axis.cells, axis.cell)[:, None]
        for i, axis in enumerate(axes)
    ]
    return Blocks(
        jnp.where(inside[0], blocks.v, 0), jnp.where(inside[1], blocks.u, 0), start, length
    )


def _shave(
    start: Array, length: Array, energies: tuple[Array, Array], goal: Array, axes: Axes, rank: int
) -> tuple[Array, Array]:
    """Drops the edge cells that are worth least, until the windows cost no more than the goal."""
    counts = jnp.array([axis.cells for axis in axes])
    cells = jnp.array([axis.cell for axis in axes])
    inside = jnp.stack(
        [axis.window_energies(energies[i], start[i], length[i]) for i, axis in enumerate(axes)]
    )

    def too_much(state):
        return axes.multiplications(state[1], rank) > goal

    def drop(state):
        start, length, left = state
        edges = jnp.stack(
            [axis.edges(energies[i], start[i], length[i]) for i, axis in enumerate(axes)]
        )
        # What one axis has lost is missing from the cells of the other one.
        share = (left / jnp.maximum(inside, 1e-30))[::-1]
        price = share[:, None] * edges / cells[:, None, None]
        # With the last cell of an axis a whole block goes: only when it is a single cell.
        droppable = (length > 1) | (length == 1).all(axis=0)
        price = jnp.where(droppable[:, None], price, jnp.inf)
        axis, side, block = jnp.unravel_index(jnp.argmin(price), price.shape)
        left = left.at[axis, block].add(-edges[axis, side, block])
        start = start.at[axis, block].add(jnp.where(side == 0, 1, 0)) % counts[:, None]
        length = length.at[axis, block].add(-1)
        return start, jnp.where((length > 0).all(axis=0), length, 0), left

    return lax.while_loop(too_much, drop, (start, length, inside))[:2]
