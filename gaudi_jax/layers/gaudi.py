"""Gaudi-GBLR linear layer: a sum of low-rank blocks whose places and sizes are learned."""

import math
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gaudi_jax.decomposition.low_rank import svd_factors
from gaudi_jax.errors import UserError
from gaudi_jax.layers.base import (
    KernelInit,
    Location,
    Sigma,
    StructuredLinear,
    Width,
    default_bias_init,
    default_kernel_init,
    factored_product,
)
from gaudi_jax.layers.initializers import (
    StructureInit,
    leading_widths,
    split_widths,
    zero_locations,
)
from gaudi_jax.masks import Method, block_multiplications, gaudi_mask, num_cells

#: Evaluation drops mask values below this, as the published method does.
MASK_THRESHOLD = 1e-3

default_width_init = split_widths()
default_location_init = zero_locations()


class GaudiLinear(StructuredLinear):
    """A linear layer whose kernel is a sum of blocks of low rank with learned places and sizes.

    The kernel is ``sum_b (v_b * m_in_b).T @ (u_b * m_out_b)``, where the masks m are cyclic
    intervals given by widths and locations (`gaudi_jax.masks.gaudi_mask`; Lee & Kim, ICLR 2024).
    In training the masks are differentiable in widths and locations. In evaluation
    (`model.eval()`, or `nnx.view(model, deterministic=True)`) widths and locations are always
    rounded to the grid, blocks of width 0 vanish, and mask values below 1e-3 are set to 0.

    Two forward forms are offered. *Soft*, as published: sigma is annealed from 1 to 100 by the
    training step. *Hard*: sigma stays infinite, so that the mask is the exact boxcar from the first
    step, and `backward_smoothing` lets gradients reach beyond its edges.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        rank: columns of each block.
        num_blocks: number of blocks B; None takes min(in, out) // rank, with which every matrix
            can be represented (if rank divides it).
        granularity: grid cell of widths and locations in features: a number, or a pair
            (input axis, output axis). Each divides its axis.
        use_bias: whether to add a bias.
        sigma: standard deviation of the masks' Gaussian, > 0; infinity is the boxcar.
        round_to_grid: round widths and locations in training too, with a straight-through gradient.
        backward_smoothing: standard deviation, in grid cells, of a Gaussian applied to the mask's
            derivative only.
        mask_method: "auto", "fft" or "table" (see `gaudi_mask`).
        width_init: initial widths (`gaudi_jax.layers.initializers`).
        location_init: initial locations.
        kernel_init: initializer of the dense kernel whose truncated SVD the factors are.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None infers it from the input and the parameters.
        param_dtype: dtype of the content parameters; widths, locations and sigma are float32,
            since bfloat16 cannot tell 768 places apart.
        rngs: random keys; the stream "params" is used.

    Attributes:
        v: input factors, shape (B, rank, in_features).
        u: output factors, shape (B, rank, out_features).
        widths: fractions of the axes in [0, 1], shape (2, B); row 0 input, row 1 output.
        locations: fractions of the axes, cyclic, shape (2, B).
        bias: shape (out_features,), or None.
        sigma: scalar; set it to change the masks without a recompilation.
        deterministic: evaluation mode.

    Raises:
        UserError: a size, rank, granularity, sigma or smoothing is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> layer = GaudiLinear(8, 6, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape, layer.widths.shape, int(layer.multiplications())
        ((3, 6), (2, 6), 39)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int = 1,
        num_blocks: int | None = None,
        granularity: int | tuple[int, int] = 1,
        use_bias: bool = True,
        sigma: float = math.inf,
        round_to_grid: bool = True,
        backward_smoothing: float = 0.0,
        mask_method: Method = "auto",
        width_init: StructureInit = default_width_init,
        location_init: StructureInit = default_location_init,
        kernel_init: KernelInit = default_kernel_init,
        bias_init: KernelInit = default_bias_init,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        blocks = num_blocks
        if blocks is None:
            blocks = min(in_features, out_features) // max(rank, 1)
        if rank < 1 or blocks < 1:
            raise UserError(
                f"rank={rank} and num_blocks={blocks} of a {in_features}x{out_features} layer must "
                "be at least 1"
            )
        if not sigma > 0:
            raise UserError(f"sigma={sigma} must be positive; use sigma=inf for exact boxcars")
        if backward_smoothing < 0:
            raise UserError(f"backward_smoothing={backward_smoothing} must not be negative; use 0")
        if np.shape(granularity) not in ((), (2,)) or np.any(np.mod(granularity, 1)):
            raise UserError(f"granularity={granularity} must be a whole number, or a pair of them")
        cell_in, cell_out = (int(cell) for cell in np.broadcast_to(granularity, 2))
        pair = (cell_in, cell_out)
        for size, cell in zip((in_features, out_features), pair, strict=True):
            num_cells(size, cell)
        if mask_method not in get_args(Method):
            raise UserError(f"unknown mask_method {mask_method!r}; use auto, fft or table")
        if mask_method == "table" and not round_to_grid:
            raise UserError("mask_method='table' needs round_to_grid=True; use 'fft' or 'auto'")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.num_blocks = blocks
        self.granularity = pair
        self.use_bias = use_bias
        self.round_to_grid = round_to_grid
        self.backward_smoothing = backward_smoothing
        self.mask_method = mask_method
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.deterministic = False

        dense = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        v, u = _block_factors(dense, blocks, rank)
        self.v = nnx.Param(v.astype(param_dtype))
        self.u = nnx.Param(u.astype(param_dtype))
        sizes = (in_features, out_features, blocks, rank)
        self.widths = Width(width_init(rngs.params(), *sizes))
        self.locations = Location(location_init(rngs.params(), *sizes))
        self.sigma = Sigma(jnp.float32(sigma))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
            if use_bias
            else nnx.data(None)
        )

    @classmethod
    def from_kernel(
        cls,
        kernel: Float[Array, "in out"],
        *,
        bias: Float[Array, " out"] | None = None,
        width_init: StructureInit = leading_widths(),  # noqa: B008
        **options: Any,
    ) -> StructuredLinear:
        """Builds the layer from a dense kernel: the truncated SVD in blocks of full width.

        Args:
            kernel: dense kernel, shape (in, out).
            bias: bias, shape (out,), or None for a layer without one.
            width_init: initial widths; by default as many full blocks as cost no more than the
                dense layer.
            **options: other keyword arguments of the constructor.

        Example:
            >>> import jax.numpy as jnp
            >>> from gaudi_jax import GaudiLinear
            >>> layer = GaudiLinear.from_kernel(jnp.ones((4, 6)))
            >>> bool(jnp.allclose(layer.kernel(), 1, atol=1e-5)), int(layer.multiplications())
            (True, 20)
        """
        return super().from_kernel(kernel, bias=bias, width_init=width_init, **options)

    @classmethod
    def from_blocks(
        cls,
        v: Float[Array, "B rank in"],
        u: Float[Array, "B rank out"],
        widths: Float[Array, "2 B"],
        locations: Float[Array, "2 B"],
        *,
        bias: Float[Array, " out"] | None = None,
        **options: Any,
    ) -> "GaudiLinear":
        """Builds the layer from explicit blocks.

        Args:
            v: input factors, shape (B, rank, in); values outside the intervals are masked away.
            u: output factors, shape (B, rank, out).
            widths: fractions in [0, 1], shape (2, B).
            locations: fractions, cyclic, shape (2, B).
            bias: shape (out,), or None.
            **options: other keyword arguments of the constructor, such as `granularity`.

        Raises:
            UserError: the shapes do not fit together.

        Example:
            A block-diagonal matrix of two 2x2 blocks of ones:

            >>> import jax.numpy as jnp
            >>> from gaudi_jax import GaudiLinear
            >>> layer = GaudiLinear.from_blocks(
            ...     jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)),
            ...     jnp.full((2, 2), 0.5), jnp.array([[0.0, 0.5], [0.0, 0.5]]))
            >>> layer.kernel().round(3)
            Array([[1., 1., 0., 0.],
                   [1., 1., 0., 0.],
                   [0., 0., 1., 1.],
                   [0., 0., 1., 1.]], dtype=float32)
        """
        blocks, rank, in_features = v.shape
        out_features = u.shape[-1]
        expected = {
            "u": (u.shape, (blocks, rank, out_features)),
            "widths": (widths.shape, (2, blocks)),
            "locations": (locations.shape, (2, blocks)),
            "bias": ((out_features,) if bias is None else bias.shape, (out_features,)),
        }
        for name, (shape, wanted) in expected.items():
            if shape != wanted:
                raise UserError(
                    f"{name} has shape {shape} where v of shape {v.shape} and u of "
                    f"shape {u.shape} need {wanted}"
                )
        # The abstract layer costs nothing to build: no kernel is drawn, no SVD computed.
        layer = nnx.eval_shape(
            lambda: cls(
                in_features,
                out_features,
                rank=rank,
                num_blocks=blocks,
                use_bias=bias is not None,
                rngs=nnx.Rngs(0),
                **options,
            )
        )
        values = {"v": v, "u": u, "widths": widths, "locations": locations, "bias": bias}
        for name, value in values.items():
            variable = getattr(layer, name)
            if value is not None:
                variable.set_value(jnp.asarray(value, variable.dtype))
        layer.sigma.set_value(jnp.float32(options.get("sigma", math.inf)))
        return layer

    def set_view(self, deterministic: bool | None = None) -> None:
        """Used by `nnx.view`.

        Args:
            deterministic: True for evaluation masks, False for training masks.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def masks(self) -> tuple[Float[Array, "B in"], Float[Array, "B out"]]:
        """The masks (input axis, output axis) of the current mode."""
        masks = [
            gaudi_mask(
                self.widths[axis],
                self.locations[axis],
                size,
                sigma=self.sigma[...],
                granularity=self.granularity[axis],
                round_to_grid=self.round_to_grid or self.deterministic,
                backward_smoothing=self.backward_smoothing,
                method=self.mask_method,
            )
            for axis, size in enumerate((self.in_features, self.out_features))
        ]
        if self.deterministic:
            masks = [jnp.where(jnp.abs(mask) < MASK_THRESHOLD, 0, mask) for mask in masks]
        return masks[0], masks[1]

    def factors(self) -> tuple[Float[Array, "k in"], Float[Array, "k out"]]:
        """Masked factors (left, right) with k = B rank: the kernel is ``left.T @ right``."""
        mask_in, mask_out = self.masks()
        left = (self.v[...] * mask_in[:, None].astype(self.v.dtype)).reshape(-1, self.in_features)
        right = self.u[...] * mask_out[:, None].astype(self.u.dtype)
        return left, right.reshape(-1, self.out_features)

    def kernel(self) -> Float[Array, "in out"]:
        """The dense kernel with the masks of the current mode, shape (in, out)."""
        left, right = self.factors()
        return left.T @ right

    def set_kernel(
        self,
        kernel: Float[Array, "in out"],
        second_moment: Float[Array, "in in"] | None = None,
    ) -> None:
        """Makes the factors those of the truncated (or whitened) SVD; the blocks stay in place."""
        v, u = _block_factors(kernel, self.num_blocks, self.rank, second_moment)
        self.v[...], self.u[...] = v.astype(self.v.dtype), u.astype(self.u.dtype)

    def multiplications(self) -> Int[Array, ""]:
        """Multiplications per input vector, counted on the exact boxcars whatever sigma is."""
        return block_multiplications(
            self.widths[...],
            self.in_features,
            self.out_features,
            rank=self.rank,
            granularity=self.granularity,
        ).sum()

    def product(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """The product ``x @ kernel()``."""
        left, right = self.factors()
        return factored_product(x, left, right, out_sharding)


def _block_factors(
    kernel: Float[Array, "in out"],
    blocks: int,
    rank: int,
    second_moment: Float[Array, "in in"] | None = None,
) -> tuple[Float[Array, "B rank in"], Float[Array, "B rank out"]]:
    """Spreads the singular components over the blocks, largest first; blocks beyond them are 0."""
    k = blocks * rank
    left, right = svd_factors(kernel, k, second_moment=second_moment)
    missing = k - left.shape[0]
    left, right = (jnp.pad(factor, ((0, missing), (0, 0))) for factor in (left, right))
    return left.reshape(blocks, rank, -1), right.reshape(blocks, rank, -1)
