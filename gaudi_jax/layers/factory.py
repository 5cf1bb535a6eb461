"""Linear layers by name and options: how models and configs choose their layers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from gaudi_jax.errors import UserError
from gaudi_jax.layers import initializers
from gaudi_jax.layers.gaudi import GaudiLinear
from gaudi_jax.layers.low_rank import LowRankLinear

#: Called as ``factory(in_features, out_features, dtype=, param_dtype=, rngs=)``.
LinearFactory = Callable[..., nnx.Module]


def linear_factory(options: Mapping[str, Any]) -> LinearFactory:
    """Builds the factory of linear layers that a config section describes.

    Args:
        options: ``name`` ("dense", "gaudi" or "low_rank") and the layer's own options:

            * gaudi: rank, granularity (the largest divisor of each axis not above it is taken),
              sigma, round_to_grid, backward_smoothing, widths ("split" or "leading"), density
              (of either; None for the dense cost), locations ("zero" or "spaced").
            * low_rank: either `rank`, or `budget`, the multiplications as a fraction of in·out.

    Returns:
        A function ``(in_features, out_features, *, dtype, param_dtype, rngs) -> layer``.

    Raises:
        UserError: the layer or one of its options is unknown or out of range.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax.layers.factory import linear_factory
        >>> linear_factory({"name": "low_rank", "budget": 0.5})(8, 8, rngs=nnx.Rngs(0)).rank
        2
    """
    options = dict(options)
    name = options.pop("name", None)
    if name not in _FACTORIES:
        raise UserError(f"unknown layer {name!r}; the layers are {', '.join(sorted(_FACTORIES))}")
    build, known = _FACTORIES[name]
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(
            f"layer {name!r} has no option {unknown[0]!r}; its options are "
            f"{', '.join(sorted(known)) or 'none'}"
        )
    return build(**options)


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of n not above `at_most`.

    Example:
        >>> from gaudi_jax.layers.factory import largest_divisor
        >>> largest_divisor(48, 20)
        16
    """
    if at_most < 1:
        raise UserError(f"granularity {at_most} must be at least 1")
    return max(d for d in range(1, min(n, at_most) + 1) if n % d == 0)


def _dense() -> LinearFactory:
    return nnx.Linear


def _low_rank(rank: int | None = None, budget: float | None = None) -> LinearFactory:
    if (rank is None) == (budget is None):
        raise UserError(f"layer 'low_rank' needs rank or budget, not both: {rank=}, {budget=}")
    if budget is not None and not budget > 0:
        raise UserError(f"budget={budget} must be positive; give a fraction of in·out")

    def build(in_features: int, out_features: int, **kwargs: Any) -> LowRankLinear:
        if rank is not None:
            return LowRankLinear(in_features, out_features, rank=rank, **kwargs)
        assert budget is not None  # one of the two is given, see above
        affordable = int(budget * in_features * out_features / (in_features + out_features))
        if affordable < 1:
            raise UserError(
                f"budget={budget} of a {in_features}x{out_features} layer is less than rank 1; "
                f"give at least {(in_features + out_features) / (in_features * out_features):.4f}"
            )
        return LowRankLinear(
            in_features, out_features, rank=min(affordable, in_features, out_features), **kwargs
        )

    return build


def _gaudi(
    rank: int = 1,
    granularity: int = 1,
    sigma: float = math.inf,
    round_to_grid: bool = True,
    backward_smoothing: float = 0.0,
    widths: str = "split",
    density: float | None = None,
    locations: str = "zero",
) -> LinearFactory:
    width_init = _width_init(widths, density)
    location_inits = {
        "zero": initializers.zero_locations(),
        "spaced": initializers.spaced_locations(),
    }
    if locations not in location_inits:
        raise UserError(f"unknown initial locations {locations!r}; use 'zero' or 'spaced'")

    def build(in_features: int, out_features: int, **kwargs: Any) -> GaudiLinear:
        return GaudiLinear(
            in_features,
            out_features,
            rank=rank,
            granularity=(
                largest_divisor(in_features, granularity),
                largest_divisor(out_features, granularity),
            ),
            sigma=sigma,
            round_to_grid=round_to_grid,
            backward_smoothing=backward_smoothing,
            width_init=width_init,
            location_init=location_inits[locations],
            **kwargs,
        )

    return build


def _width_init(widths: str, density: float | None) -> initializers.StructureInit:
    if widths == "split":
        return initializers.split_widths(density)
    if widths == "leading":
        if density is None:
            raise UserError("initial widths 'leading' need a density; give a fraction in (0, 1]")
        return initializers.leading_widths(density)
    raise UserError(f"unknown initial widths {widths!r}; use 'split' or 'leading'")


_FACTORIES: dict[str, tuple[Callable[..., LinearFactory], set[str]]] = {
    "dense": (_dense, set()),
    "low_rank": (_low_rank, {"rank", "budget"}),
    "gaudi": (
        _gaudi,
        {
            "rank",
            "granularity",
            "sigma",
            "round_to_grid",
            "backward_smoothing",
            "widths",
            "density",
            "locations",
        },
    ),
}
