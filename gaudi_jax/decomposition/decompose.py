"""From a dense kernel to blocks: factors, widths and locations under a multiplication budget."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from gaudi_jax.decomposition.axes import Axis, PlainAxis, WeightedAxis
from gaudi_jax.decomposition.low_rank import regularise
from gaudi_jax.decomposition.search import CAREFUL, QUICK, ROUNDS, search, squared_error, svd_blocks
from gaudi_jax.decomposition.sweeps import Axes, Blocks
from gaudi_jax.errors import UserError
from gaudi_jax.masks import block_multiplications, num_cells

#: Kernels of more entries, and all in fewer rounds than the default, are searched at the quick
#: pace alone, in half of the time.
LARGE_KERNEL = 2**18
#: A weighted axis of more features is searched from the plain result, in a fraction of the rounds:
#: each step on it costs n² instead of n.
LARGE_AXIS = 1024
LARGE_AXIS_ROUNDS = 1 / 10

#: Share of a kernel's energy that an exact result may miss.
ROUNDING = 1e-11
#: What a search begins with: blocks, rounds, share of the slots that one round may fill.
Start = tuple[Blocks, Array, float]


class Factors(NamedTuple):
    """Blocks of a kernel, as `gaudi_jax.GaudiLinear.from_blocks` takes them.

    Attributes:
        v: input factors, shape (B, rank, in), zero outside the intervals.
        u: output factors, shape (B, rank, out), likewise.
        widths: fractions of the axes, shape (2, B), on the grid; 0 for blocks that are not used.
        locations: fractions of the axes, shape (2, B), on the grid.
    """

    v: Float[Array, "B rank in"]
    u: Float[Array, "B rank out"]
    widths: Float[Array, "2 B"]
    locations: Float[Array, "2 B"]

    def kernel(self) -> Float[Array, "in out"]:
        """The sum of the blocks, shape (in, out)."""
        return jnp.einsum("...brn,...brm->...nm", self.v, self.u)

    def multiplications(self) -> Array:
        """Multiplications per input vector, as `gaudi_jax.GaudiLinear` counts them."""
        *_, rank, n = self.v.shape
        count = functools.partial(
            block_multiplications, in_features=n, out_features=self.u.shape[-1], rank=rank
        )
        for _ in range(self.v.ndim - 3):
            count = jax.vmap(count)
        return count(self.widths).sum(axis=-1)


def decompose(
    kernel: Float[Array, "*batch in out"],
    budget: float | Float[np.ndarray, "*batch"],
    *,
    rank: int = 1,
    granularity: int | tuple[int, int] = 1,
    second_moment: Float[Array, "*batch in in"] | None = None,
    rounds: int = ROUNDS,
    key: Array | None = None,
) -> Factors:
    """Approximates a kernel by blocks of low rank whose places and sizes are found by search.

    Pursuit finds promising blocks in the residual, exact coordinate descent refits every block and
    its windows, and a price per multiplication steers their cost onto the budget, which is never
    exceeded. The result is never worse than the truncated SVD under the same budget (with a second
    moment: than `svd_factors` with it, up to the ridge that both add to the moment), which is taken
    where the search finds nothing better.

    Deterministic for a key. Works under `jax.jit`. Kernels of one shape may be stacked on leading
    axes, and are then searched together; on a CPU one after the other, where `jax.vmap` of this
    function could wait for itself for ever (`gaudi_jax.decomposition.sweeps.root`).

    Args:
        kernel: dense kernel, shape (..., in, out).
        budget: multiplications as a fraction of in·out; above 1 is allowed. Of stacked kernels one
            for all, or an array of shape (...) with each kernel's own.
        rank: columns of each block.
        granularity: grid cell of the intervals in features: a number, or a pair (input, output).
            Each divides its axis.
        second_moment: E[x xᵀ] of the layer's inputs, shape (..., in, in): the search then minimises
            ``E|x (W - Ŵ)|²`` instead of ``|W - Ŵ|²``. Remove the inputs' mean into the bias first.
        rounds: effort; time is proportional to it. Fewer than the default also search once where
            the default tries two paces, in half of the time a round.
        key: random key; None for a fixed one.

    Returns:
        ⌊min(in, out) / rank⌋ blocks, of which those in use come first, in float32.

    Raises:
        UserError: the budget is less than one block of one cell a side, the kernel or the second
            moment is not finite or has the wrong shape, or rank or granularity do not fit.

    Example:
        A matrix with one block of rank 1, which costs 16 of 256 multiplications:

        >>> import jax.numpy as jnp
        >>> import gaudi_jax
        >>> kernel = jnp.zeros((16, 16)).at[2:10, 8:].set(1.0)
        >>> factors = gaudi_jax.decompose(kernel, 0.1)
        >>> int(factors.multiplications())
        16
        >>> bool(jnp.allclose(factors.kernel(), kernel, atol=1e-4))
        True
    """
    kernel = kernel if hasattr(kernel, "shape") else jnp.asarray(kernel)
    *batch, n, m = check_matrices("kernel", kernel)
    budgets = np.broadcast_to(_check_budgets(budget, batch), batch)
    cell = check_structure(n, m, budgets.min(), rank, granularity, rounds)
    if second_moment is not None:
        wanted = (*batch, n, n)
        if check_matrices("second_moment", second_moment, symmetric=True) != wanted:
            raise UserError(
                f"second_moment of shape {second_moment.shape} does not fit a kernel of shape "
                f"{kernel.shape}; it must have shape {wanted}"
            )
    thorough = rounds >= ROUNDS and n * m <= LARGE_KERNEL
    paces = (QUICK, CAREFUL) if thorough else (QUICK,)
    key = jax.random.key(0) if key is None else key
    most = jnp.iinfo(jnp.int32).max
    goals = [min(affordable(budget, n * m), most) for budget in budgets.flat]
    each = jnp.array(goals, jnp.int32).reshape(batch)
    static = {"rank": rank, "cell": cell, "paces": paces}
    if not batch:
        return _decompose(kernel, second_moment, each, jnp.int32(rounds), key, **static)
    # The moment may be None.
    stacks = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[len(batch) :]), (kernel, second_moment, each)
    )
    # Together they are no faster on a CPU, where their linear algebra may wait for ever (`root`).
    together = jax.default_backend() != "cpu"
    found = _decompose_all(*stacks, jnp.int32(rounds), key, together=together, **static)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)


def affordable(budget: float, dense: int) -> int:
    """Whole multiplications under a fraction of the dense ones.

    Example:
        >>> from gaudi_jax.decomposition.decompose import affordable
        >>> 0.29 * 100 < 29, affordable(0.29, 100)
        (True, 29)
    """
    return math.floor(budget * dense * (1 + 1e-12))


@jax.jit
def relative_error(
    kernel: Float[Array, "in out"],
    approximation: Float[Array, "in out"],
    second_moment: Float[Array, "in in"] | None = None,
) -> Float[Array, ""]:
    """Root of the share of the kernel's energy that an approximation misses.

    Args:
        kernel: dense kernel W, shape (in, out).
        approximation: Ŵ, likewise.
        second_moment: C = E[x xᵀ] of the inputs, shape (in, in); None for the identity.

    Returns:
        ``sqrt(tr((W - Ŵ)ᵀ C (W - Ŵ)) / tr(Wᵀ C W))``; 0 where W is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition import relative_error
        >>> float(relative_error(jnp.eye(2), jnp.diag(jnp.array([1.0, 0.0])))).__round__(3)
        0.707
    """

    def energy(x):
        return (x * (x if second_moment is None else second_moment @ x)).sum()

    total = energy(kernel)
    return jnp.sqrt(jnp.maximum(energy(kernel - approximation), 0) / jnp.maximum(total, 1e-30))


@functools.partial(jax.jit, static_argnames=("together", "rank", "cell", "paces"))
def _decompose_all(
    kernels: Array,
    moments: Array | None,
    goals: Array,
    rounds: Array,
    key: Array,
    *,
    together: bool,
    **static: Any,
) -> Factors:
    def one(kernel: Array, moment: Array | None, goal: Array) -> Factors:
        return _decompose(kernel, moment, goal, rounds, key, **static)

    if together:
        return jax.vmap(one)(kernels, moments, goals)
    return lax.map(lambda each: one(*each), (kernels, moments, goals))


@functools.partial(jax.jit, static_argnames=("rank", "cell", "paces"))
def _decompose(
    kernel: Array,
    second_moment: Array | None,
    goal: Array,
    rounds: Array,
    key: Array,
    *,
    rank: int,
    cell: tuple[int, int],
    paces: tuple[float, ...],
) -> Factors:
    # Accelerators would multiply in fewer bits, and small differences of large numbers matter.
    with jax.default_matmul_precision("highest"):
        kernel, scale = scaled(kernel.astype(jnp.float32), jnp.abs(kernel).max())
        n, m = kernel.shape
        plain = PlainAxis(n // cell[0], cell[0]), PlainAxis(m // cell[1], cell[1])
        axes = Axes(*plain)
        begin = Blocks.empty(min(n, m) // rank, rank, (n, m))

        def searched(axes: Axes, starts: Sequence[Start]) -> Blocks:
            # One after the other, but compiled once.
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
            return lax.map(lambda start: search(kernel, goal, key, axes, *start), stacked)

        if second_moment is not None:
            moment, _ = scaled(second_moment.astype(jnp.float32), jnp.trace(second_moment) / n)
            moment = regularise(moment)
            weighted: Axis = WeightedAxis.of(moment, n // cell[0])
            if n > LARGE_AXIS:
                starts = [(begin, rounds, share) for share in paces]
                begin = _best(kernel, axes, searched(axes, starts))
                rounds = jnp.ceil(LARGE_AXIS_ROUNDS * rounds).astype(jnp.int32)
            axes = Axes(weighted, plain[1])
        svd = svd_blocks(kernel, goal, axes, rank)
        starts = [(begin, rounds, share) for share in paces]
        if rank > 1 or max(cell) > 1:
            # Where windows are coarse or tie columns together, blocks of full width are the better
            # start for kernels without local structure.
            starts.append((svd, (rounds + 1) // 2, QUICK))
        found = jax.tree.map(
            lambda one, more: jnp.concatenate([one[None], more]), svd, searched(axes, starts)
        )
        return as_factors(_best(kernel, axes, found), axes, scale)


def _best(kernel: Array, axes: Axes, found: Blocks) -> Blocks:
    """The one with the smallest error of several results, stacked on a first axis.

    Of those that are exact but for rounding, the one that costs least.
    """
    errors = lax.map(lambda blocks: squared_error(kernel, blocks, axes), found)
    errors = jnp.where(jnp.isnan(errors), jnp.inf, errors)
    nothing = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), found)
    exact = errors <= ROUNDING * squared_error(kernel, nothing, axes)
    rank = found.v.shape[2]
    costs = lax.map(lambda blocks: axes.multiplications(blocks.length, rank), found)
    best = jnp.lexsort((costs, jnp.where(exact, 0, errors)))[0]
    return jax.tree.map(lambda leaf: leaf[best], found)


def scaled(matrix: Array, size: Array) -> tuple[Array, Array]:
    """The matrix over the power of two next to its size, and the latter: squares stay finite."""
    scale = jnp.ldexp(jnp.float32(1), jnp.frexp(size.astype(jnp.float32))[1] - 1)
    scale = jnp.where(size > 0, scale, 1)
    return matrix / scale, scale


def as_factors(blocks: Blocks, axes: Axes, scale: Array) -> Factors:
    """The blocks times a scale, with factors of equal norms, and intervals as fractions."""
    blocks = blocks.live_first()
    norms = [jnp.sqrt(jnp.square(x).sum((1, 2), keepdims=True)) for x in (blocks.v, blocks.u)]
    ratio = jnp.sqrt(jnp.maximum(norms[1], 1e-30) / jnp.maximum(norms[0], 1e-30))
    cells = jnp.array([axis.cells for axis in axes], jnp.float32)[:, None]
    root = jnp.sqrt(scale)
    v, u = root * ratio * blocks.v, root / ratio * blocks.u
    return Factors(v, u, blocks.length / cells, blocks.start / cells)


def check_matrices(name: str, matrices: Array, *, symmetric: bool = False) -> tuple[int, ...]:
    """Checks a matrix, or several stacked, under a name for messages; returns the shape."""
    shape = jnp.shape(matrices)
    if len(shape) < 2 or 0 in shape:
        raise UserError(f"{name} of shape {shape} is no matrix; give one of shape (in, out)")
    if jnp.issubdtype(matrices.dtype, jnp.complexfloating):
        raise UserError(f"{name} of dtype {matrices.dtype} must be real; give its parts one by one")
    if isinstance(matrices, jax.core.Tracer):
        return shape
    values = np.asarray(matrices, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{name} of shape {shape} holds NaN or infinity; mend the model first")
    if symmetric and shape[-1] == shape[-2]:
        diagonal = np.diagonal(values, axis1=-2, axis2=-1)
        skew = np.abs(values - values.swapaxes(-1, -2)).max()
        if diagonal.min() < 0 or skew > 1e-3 * diagonal.max():
            raise UserError(
                f"{name} of shape {shape} is no E[x xᵀ]: it is not symmetric, or negative"
            )
    return shape


def _check_budgets(budget: Any, batch: list[int]) -> np.ndarray:
    """One for all kernels, or one for each."""
    budgets = np.asarray(budget, float)
    if budgets.shape not in ((), tuple(batch)):
        raise UserError(
            f"budget of shape {budgets.shape} does not fit kernels stacked as {tuple(batch)}; give "
            "one number, or one for each"
        )
    return budgets


def check_structure(
    n: int, m: int, budget: float, rank: int, granularity: int | tuple[int, int], rounds: int = 1
) -> tuple[int, int]:
    """Checks the options of blocks for a kernel; returns the grid cells of both axes."""
    if np.shape(granularity) not in ((), (2,)) or np.any(np.mod(granularity, 1)):
        raise UserError(f"granularity={granularity} must be a whole number, or a pair of them")
    cell_in, cell_out = (int(cell) for cell in np.broadcast_to(granularity, 2))
    num_cells(n, cell_in)
    num_cells(m, cell_out)
    if rank % 1 or not 1 <= rank <= min(n, m):
        raise UserError(f"rank={rank} of a {n}x{m} kernel must lie in [1, {min(n, m)}]")
    if rounds < 1:
        raise UserError(f"rounds={rounds} must be at least 1")
    least = min(rank * (cell_in + cell_out), cell_in * cell_out)
    if not 0 < budget < math.inf or affordable(budget, n * m) < least:
        raise UserError(
            f"budget={budget} of a {n}x{m} kernel is not at least {least / (n * m):.4g}, one block "
            f"of rank {rank} and of one cell a side; give a larger fraction of in·out"
        )
    return cell_in, cell_out
