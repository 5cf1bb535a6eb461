"""Width controllers: the proximal steps that decide how much the structure may cost.

Each is an optax transformation that stands last in the chain of the widths: it needs `params`, and
edits the update so that parameters plus update land where the controller wants them, in [0, 1].
A controller is made in two steps, ``controller = budget_controller(...)`` and then
``controller(layers)`` with the facts of the model's layers, because the price of a width depends on
its layer. `gaudi_jax.gaudi_adamw` does the second step.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gaudi_jax.errors import UserError
from gaudi_jax.masks import interval_multiplications

#: Halvings of an interval of thresholds: leaves 2^-20 of it, finer than a cell of any grid.
BISECTIONS = 20


class LayerSize(NamedTuple):
    """What the price of a width depends on.

    Attributes:
        rank: columns of a block.
        features: features of the (input, output) axis.
        granularity: grid cell of each axis, in features.
    """

    rank: int
    features: tuple[int, int]
    granularity: tuple[int, int]


#: From the path of each layer in the model to its size.
LayerSizes = Mapping[tuple, LayerSize]
Controller = Callable[[LayerSizes], optax.GradientTransformation]
Shrink = Callable[[list[Array], list[LayerSize], Array], list[Array]]


class ControllerState(NamedTuple):
    """Steps made so far."""

    step: Array


def threshold_controller(
    strength: float,
    target: float,
    *,
    structural_learning_rate: optax.ScalarOrSchedule,
    start_step: int = 0,
) -> Controller:
    """The published controller for training from scratch: a constant soft threshold.

    Every width loses ``strength * structural_learning_rate(step)`` while the mean active width of
    the model exceeds the target.

    Args:
        strength: λ of the paper, not negative; 0.04 there.
        target: mean active width to reach, in (0, 1].
        structural_learning_rate: learning rate of the widths, a number or a schedule.
        start_step: first step at which widths shrink, usually the end of the warm-up.

    Raises:
        UserError: a number is out of range.

    Example:
        >>> from gaudi_jax.training.controllers import threshold_controller
        >>> controller = threshold_controller(0.04, 0.12, structural_learning_rate=1e-3)
    """
    _check_target(target)
    if strength < 0:
        raise UserError(f"controller strength {strength} must not be negative")

    def shrink(widths: list[Array], sizes: list[LayerSize], step: Array) -> list[Array]:
        lr = structural_learning_rate
        rate = lr(step) if callable(lr) else lr
        active = (step >= start_step) & (mean_active_width(widths) > target)
        threshold = jnp.where(active, strength * rate, 0.0)
        return [w - threshold for w in widths]

    return lambda layers: _constrain_widths(shrink, layers)


def mean_controller(target: float) -> Controller:
    """The published controller for fine-tuning: holds the mean active width at the target.

    When the mean active width exceeds the target, every width loses the excess.

    Args:
        target: mean active width, in (0, 1].

    Raises:
        UserError: the target is out of range.

    Example:
        >>> from gaudi_jax.training.controllers import mean_controller
        >>> controller = mean_controller(0.25)
    """
    _check_target(target)

    def shrink(widths: list[Array], sizes: list[LayerSize], step: Array) -> list[Array]:
        excess = jnp.maximum(mean_active_width(widths) - target, 0.0)
        return [w - excess for w in widths]

    return lambda layers: _constrain_widths(shrink, layers)


def budget_controller(
    target: optax.ScalarOrSchedule, *, price_by_axis: bool = True, floor: float = 0.0
) -> Controller:
    """Keeps the model's multiplications under a budget, by the smallest threshold that does.

    At each step the smallest τ is found (by bisection) with which soft-thresholding the widths
    brings the multiplications of all Gaudi layers together, counted on rounded widths, under
    ``target(step)`` times their dense multiplications. Widths that are equal fall together: where
    many are (at the start, on a coarse grid) the cost may land below the budget.

    Args:
        target: fraction of the dense multiplications, in (0, 1] if a number, or a schedule.
        price_by_axis: the threshold of a width is ``τ rank n_axis / mean(rank n_axis)``, the
            proximal step of τ times the multiplications; otherwise it is τ for all.
        floor: no layer is pushed below this fraction of its dense multiplications, in [0, 1),
            unless the budget cannot be kept otherwise (floors are kept in whole grid cells, which
            may add up to more than the budget on a coarse grid).

    Raises:
        UserError: target or floor is out of range, or the floor is not below the target.

    Example:
        >>> from gaudi_jax.training.controllers import budget_controller
        >>> controller = budget_controller(0.3, floor=0.05)
    """
    if not callable(target):
        _check_target(target)
        if floor >= target:
            raise UserError(f"floor {floor} of each layer must be below the budget {target}")
    if not 0 <= floor < 1:
        raise UserError(f"floor {floor} is outside [0, 1)")

    def shrink(widths: list[Array], sizes: list[LayerSize], step: Array) -> list[Array]:
        goal = target(step) if callable(target) else target
        widths = [jnp.clip(w, 0.0, 1.0) for w in widths]
        # Layers of different numbers of blocks are padded with dead blocks to one array, so that
        # a bisection step is a single fused pass.
        most = max(w.shape[1] for w in widths)
        stacked = jnp.stack([jnp.pad(w, ((0, 0), (0, most - w.shape[1]))) for w in widths])
        thresholds = _budget_thresholds(stacked, sizes, goal, price_by_axis, floor)
        return [w - t for w, t in zip(widths, thresholds, strict=True)]

    return lambda layers: _constrain_widths(shrink, layers)


def mean_active_width(widths: list[Float[Array, "2 B"]]) -> Float[Array, ""]:
    """Mean over all widths of the model, where a block with either width 0 counts 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.training.controllers import mean_active_width
        >>> mean_active_width([jnp.array([[0.5, 1.0], [0.5, 0.0]])])
        Array(0.25, dtype=float32)
    """
    totals = [jnp.where((w > 0).all(axis=0), w, 0.0).sum() for w in widths]
    return jnp.stack(totals).sum() / sum(w.size for w in widths)


def _size_arrays(sizes: list[LayerSize]) -> dict[str, Array]:
    """Sizes as arrays that broadcast against stacked widths of shape (L, 2, B)."""
    features = jnp.array([size.features for size in sizes], jnp.float32)[:, :, None]
    granularity = jnp.array([size.granularity for size in sizes], jnp.float32)[:, :, None]
    rank = jnp.array([size.rank for size in sizes], jnp.float32)[:, None]
    return {"features": features, "granularity": granularity, "rank": rank}


def _layer_multiplications(
    widths: Float[Array, "L 2 B"], sizes: dict[str, Array]
) -> Float[Array, " L"]:
    cells = jnp.round(widths * (sizes["features"] / sizes["granularity"]))
    lengths = cells * sizes["granularity"]
    return interval_multiplications(lengths[:, 0], lengths[:, 1], sizes["rank"]).sum(axis=1)


def _budget_thresholds(
    widths: Float[Array, "L 2 B"],
    layer_sizes: list[LayerSize],
    goal: float | Array,
    price_by_axis: bool,
    floor: float,
) -> Float[Array, "L 2 1"]:
    """The threshold of every layer's axes that brings the multiplications under the goal."""
    sizes = _size_arrays(layer_sizes)
    dense = sizes["features"].prod(axis=(1, 2))
    price = sizes["rank"][:, None] * sizes["features"]
    price = price / price.mean() if price_by_axis else jnp.ones_like(price)

    def multiplications(tau: Float[Array, " L"]) -> Float[Array, " L"]:
        return _layer_multiplications(jnp.maximum(widths - tau[:, None, None] * price, 0), sizes)

    def search() -> Float[Array, " L"]:
        everything = (widths / price).max(axis=(1, 2))  # with this threshold a layer is dead
        cap = everything
        if floor:
            # The largest threshold that leaves a layer its floor: the lower end of a bisection.
            def above_floor(tau):
                return multiplications(tau) >= floor * dense

            floors, _ = _bisect(above_floor, jnp.zeros_like(everything), everything)
            keeps_budget = multiplications(floors).sum() <= goal * dense.sum()
            cap = jnp.where(keeps_budget, floors, everything)

        def too_much(tau):
            return multiplications(jnp.minimum(tau, cap)).sum() > goal * dense.sum()

        _, tau = _bisect(too_much, jnp.float32(0), everything.max())
        return jnp.minimum(tau, cap)

    under = multiplications(jnp.zeros(len(layer_sizes))).sum() <= goal * dense.sum()
    tau = jax.lax.cond(under, lambda: jnp.zeros(len(layer_sizes)), search)
    return tau[:, None, None] * price


def _bisect(holds: Callable[[Array], Array], low: Array, high: Array) -> tuple[Array, Array]:
    """Narrows [low, high] around the point where `holds` turns from true to false."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        keep = holds(middle)
        return jnp.where(keep, middle, low), jnp.where(keep, high, middle)

    return jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))


def clip_widths(layers: LayerSizes) -> optax.GradientTransformation:
    """The controller that only keeps widths in [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.training.controllers import LayerSize, clip_widths
        >>> tx = clip_widths({(): LayerSize(1, (8, 8), (1, 1))})
        >>> params = {"widths": jnp.full((2, 1), 0.75)}
        >>> updates, _ = tx.update({"widths": jnp.ones((2, 1))}, tx.init(params), params)
        >>> updates["widths"][0]
        Array([0.25], dtype=float32)
    """
    return _constrain_widths(lambda widths, sizes, step: widths, layers)


def wrap_locations() -> optax.GradientTransformation:
    """Keeps locations in [0, 1): they are cyclic.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.training.controllers import wrap_locations
        >>> tx = wrap_locations()
        >>> tx.update({"l": jnp.float32(0.5)}, tx.init({}), {"l": jnp.float32(0.75)})[0]
        {'l': Array(-0.5, dtype=float32)}
    """

    def update(updates, state, params=None):
        _require(params)
        return jax.tree.map(lambda u, p: jnp.mod(p + u, 1.0) - p, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def names(path: tuple) -> tuple:
    """The names in a key path of a state, without the `value` of a Variable.

    Example:
        >>> from jax.tree_util import DictKey, GetAttrKey
        >>> from gaudi_jax.training.controllers import names
        >>> names((DictKey("blocks"), DictKey(0), DictKey("widths"), GetAttrKey("value")))
        ('blocks', 0, 'widths')
    """
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _constrain_widths(shrink: Shrink, layers: LayerSizes) -> optax.GradientTransformation:
    def init(params: Any) -> ControllerState:
        return ControllerState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        _require(params)
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        old = [leaf for _, leaf in paths]
        if not old:
            return updates, ControllerState(optax.safe_increment(state.step))
        sizes = [layers[names(path)[:-1]] for path, _ in paths]
        moved = [p + u for p, u in zip(old, jax.tree.leaves(updates), strict=True)]
        new = [jnp.clip(w, 0.0, 1.0) for w in shrink(moved, sizes, state.step)]
        updates = jax.tree.unflatten(treedef, [w - p for w, p in zip(new, old, strict=True)])
        return updates, ControllerState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)


def _require(params: Any) -> None:
    if params is None:
        raise ValueError(optax.NO_PARAMS_MSG)


def _check_target(target: float) -> None:
    if not 0 < target <= 1:
        raise UserError(f"width target {target} is outside (0, 1]; give a fraction such as 0.3")
