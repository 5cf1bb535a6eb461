"""Linear layers by name and options: how models and configs choose their layers."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from flax import nnx

from gaudi_jax.decomposition.decompose import affordable
from gaudi_jax.errors import UserError
from gaudi_jax.layers import initializers
from gaudi_jax.layers.blast import BlastLinear
from gaudi_jax.layers.block_sparse import LOW_RANK_SHARE, BlockSparseLinear
from gaudi_jax.layers.gaudi import GaudiLinear
from gaudi_jax.layers.grid import GridLinear
from gaudi_jax.layers.low_rank import LowRankLinear
from gaudi_jax.layers.monarch import MonarchLinear

#: Layers on a grid of equal blocks, by name.
GRID_LAYERS: dict[str, type[GridLinear]] = {
    "monarch": MonarchLinear,
    "blast": BlastLinear,
    "block_sparse": BlockSparseLinear,
}

#: Called as ``factory(in_features, out_features, dtype=, param_dtype=, rngs=)``, by models
#: that choose their initialisation with ``kernel_init=`` too.
LinearFactory = Callable[..., nnx.Module]


def require_known(name: str) -> None:
    """Stops at a layer that does not exist.

    Raises:
        UserError: that is so; it names those that do.
    """
    if name not in _FACTORIES:
        raise UserError(f"unknown layer {name!r}; the layers are {', '.join(sorted(_FACTORIES))}")


def linear_factory(options: Mapping[str, Any]) -> LinearFactory:
    """Builds the factory of linear layers that a config section describes.

    Factories of equal options are equal, so that two models made from one config have the same
    graph and share their compiled functions.

    Args:
        options: ``name`` ("dense", "gaudi", "low_rank", "monarch", "blast" or "block_sparse") and
            the options of that layer: the fields of its factory in this module.

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
    require_known(name)
    factory = _FACTORIES[name]
    known = [field.name for field in dataclasses.fields(factory)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(
            f"layer {name!r} has no option {unknown[0]!r}; its options are "
            f"{', '.join(known) or 'none'}"
        )
    return factory(**options)


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


@dataclasses.dataclass(frozen=True)
class DenseFactory:
    """Makes dense layers."""

    def __call__(self, in_features: int, out_features: int, **kwargs: Any) -> nnx.Linear:
        """A dense layer."""
        return nnx.Linear(in_features, out_features, **kwargs)


@dataclasses.dataclass(frozen=True)
class LowRankFactory:
    """Makes low-rank layers.

    Attributes:
        rank: of every layer; or
        budget: multiplications of every layer as a fraction of in·out.

    Raises:
        UserError: not exactly one is given, or it is out of range.
    """

    rank: int | None = None
    budget: float | None = None

    def __post_init__(self):
        """Checks the fields."""
        _check_size("low_rank", self.rank, self.budget)

    def __call__(self, in_features: int, out_features: int, **kwargs: Any) -> LowRankLinear:
        """A low-rank layer."""
        rank = self.rank
        if rank is None:
            rank = affordable_rank(in_features, out_features, self.budget or 0.0)
        return LowRankLinear(in_features, out_features, rank=rank, **kwargs)


def affordable_rank(in_features: int, out_features: int, budget: float) -> int:
    """The rank of a low-rank layer under a budget, at most that of any matrix.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        budget: multiplications as a fraction of in·out.

    Raises:
        UserError: the budget is less than rank 1.

    Example:
        >>> from gaudi_jax.layers.factory import affordable_rank
        >>> affordable_rank(768, 768, 0.25)
        96
    """
    rank = affordable(budget, in_features * out_features) // (in_features + out_features)
    if rank < 1:
        raise UserError(
            f"budget={budget} of a {in_features}x{out_features} layer is less than rank 1; "
            f"give at least {(in_features + out_features) / (in_features * out_features):.4f}"
        )
    return min(rank, in_features, out_features)


def _check_size(name: str, rank: int | None, budget: float | None) -> None:
    if (rank is None) == (budget is None):
        raise UserError(
            f"layer {name!r} needs rank or budget, not both: rank={rank}, budget={budget}"
        )
    if rank is not None and not isinstance(rank, int):
        raise UserError(f"rank={rank!r} of layer {name!r} must be a whole number")
    if budget is not None and not (isinstance(budget, int | float) and budget > 0):
        raise UserError(f"budget={budget!r} must be a positive number; give a fraction of in·out")


@dataclasses.dataclass(frozen=True)
class GridFactory:
    """Makes layers on a grid of equal blocks.

    Attributes:
        blocks: parts of each axis: a layer takes the largest number not above it that divides both
            of its axes (for "block_sparse", a power of two); None for the layer's usual one.
        rank: of every layer; or
        budget: multiplications of every layer as a fraction of in·out.

    Raises:
        UserError: not exactly one of rank and budget is given, or a number is out of range.
    """

    name: ClassVar[str]

    blocks: int | None = None
    rank: int | None = None
    budget: float | None = None

    def __post_init__(self):
        """Checks the fields."""
        _check_size(self.name, self.rank, self.budget)
        if self.blocks is not None and not isinstance(self.blocks, int):
            raise UserError(f"blocks={self.blocks!r} of layer {self.name!r} must be a whole number")

    def __call__(self, in_features: int, out_features: int, **kwargs: Any) -> GridLinear:
        """A layer of this kind."""
        cls: Any = GRID_LAYERS[self.name]
        blocks = cls.fitting_blocks(in_features, out_features, self.blocks)
        if self.budget is None:
            options = self._given(blocks)
        else:
            cost = affordable(self.budget, in_features * out_features)
            options = cls.affordable(in_features, out_features, blocks, cost, **self._sharing())
        return cls(in_features, out_features, **options, **kwargs)

    def _given(self, blocks: int) -> dict[str, Any]:
        """Options of the layer where its rank is given."""
        return {"blocks": blocks, "rank": self.rank}

    def _sharing(self) -> dict[str, Any]:
        """How a budget is shared."""
        return {}


class MonarchFactory(GridFactory):
    """Makes Monarch layers; see `GridFactory`."""

    name = "monarch"


class BlastFactory(GridFactory):
    """Makes BLAST layers; see `GridFactory`."""

    name = "blast"


@dataclasses.dataclass(frozen=True)
class BlockSparseFactory(GridFactory):
    """Makes block-sparse plus low-rank layers; see `GridFactory`.

    Attributes:
        diagonals: of the blocks, beside a rank; at most as many as the blocks allow.
        low_rank_share: least share of a budget for the low-rank part.

    Raises:
        UserError: diagonals are given without a rank, or a share is out of range.
    """

    name = "block_sparse"

    diagonals: int | None = None
    low_rank_share: float = LOW_RANK_SHARE

    def __post_init__(self):
        """Checks the fields."""
        super().__post_init__()
        if (self.diagonals is None) != (self.rank is None):
            raise UserError(
                "layer 'block_sparse' needs rank and diagonals, or a budget: "
                f"rank={self.rank}, diagonals={self.diagonals}"
            )
        if self.diagonals is not None and not (
            isinstance(self.diagonals, int) and self.diagonals >= 1
        ):
            raise UserError(f"diagonals={self.diagonals} must be a whole number, at least 1")
        if not 0 <= self.low_rank_share < 1:
            raise UserError(
                f"low_rank_share={self.low_rank_share} is outside [0, 1); give one such as 0.25"
            )

    def _given(self, blocks: int) -> dict[str, Any]:
        """Options of the layer where its rank is given."""
        most = blocks.bit_length()
        return super()._given(blocks) | {"diagonals": min(self.diagonals or most, most)}

    def _sharing(self) -> dict[str, Any]:
        """How a budget is shared."""
        return {"low_rank_share": self.low_rank_share}


@dataclasses.dataclass(frozen=True)
class GaudiFactory:
    """Makes Gaudi layers.

    Attributes:
        rank: columns of each block.
        granularity: grid cell in features; each axis takes its largest divisor not above it.
        sigma: initial sigma of the masks; infinity for hard masks.
        round_to_grid: whether masks are rounded in training too.
        backward_smoothing: of the masks' derivative, in cells.
        widths: initial widths, "split", "leading" or "random".
        density: of each; None for the dense cost.
        locations: initial locations, "zero", "spaced" or "random".

    Raises:
        UserError: a choice is unknown, or the density is out of range.
    """

    rank: int = 1
    granularity: int = 1
    sigma: float = math.inf
    round_to_grid: bool = True
    backward_smoothing: float = 0.0
    widths: str = "split"
    density: float | None = None
    locations: str = "zero"

    def __post_init__(self):
        """Checks the choices."""
        self._width_init()
        self._location_init()

    def __call__(self, in_features: int, out_features: int, **kwargs: Any) -> GaudiLinear:
        """A Gaudi layer."""
        return GaudiLinear(
            in_features,
            out_features,
            rank=self.rank,
            granularity=(
                largest_divisor(in_features, self.granularity),
                largest_divisor(out_features, self.granularity),
            ),
            sigma=self.sigma,
            round_to_grid=self.round_to_grid,
            backward_smoothing=self.backward_smoothing,
            width_init=self._width_init(),
            location_init=self._location_init(),
            **kwargs,
        )

    def _width_init(self) -> initializers.StructureInit:
        if self.widths not in _WIDTHS:
            raise UserError(
                f"unknown initial widths {self.widths!r}; use {', '.join(sorted(_WIDTHS))}"
            )
        return _WIDTHS[self.widths](self.density)

    def _location_init(self) -> initializers.StructureInit:
        if self.locations not in _LOCATIONS:
            raise UserError(
                f"unknown initial locations {self.locations!r}; use {', '.join(sorted(_LOCATIONS))}"
            )
        return _LOCATIONS[self.locations]()


_WIDTHS = {
    "split": initializers.split_widths,
    "leading": initializers.leading_widths,
    "random": initializers.random_widths,
}
_LOCATIONS = {
    "zero": initializers.zero_locations,
    "spaced": initializers.spaced_locations,
    "random": initializers.random_locations,
}
_FACTORIES: dict[str, Any] = {
    "dense": DenseFactory,
    "low_rank": LowRankFactory,
    "monarch": MonarchFactory,
    "blast": BlastFactory,
    "block_sparse": BlockSparseFactory,
    "gaudi": GaudiFactory,
}
