"""What the layers share whose kernel is cut into a grid of equal blocks."""

from abc import abstractmethod
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gaudi_jax.errors import UserError
from gaudi_jax.layers.base import (
    KernelInit,
    StructuredLinear,
    composing_pays,
    dot,
    is_whole,
    placed,
)


class GridLinear(StructuredLinear):
    """A structured layer whose kernel is cut into blocks × blocks blocks of one size.

    A subclass gives `kernel`, `factored`, `factored_multiplications`, `composing_multiplications`
    and `approximation`, and says with `least`, `step` and `affordable` what a budget buys.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        blocks: parts of each axis; divides both.
        use_bias: whether to add a bias.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None infers it from the input and the parameters.
        param_dtype: dtype of the parameters.
        rngs: random keys; the stream "params" is used.

    Raises:
        UserError: the blocks do not divide an axis.
    """

    #: Parts of each axis unless told otherwise, where they divide it.
    usual_blocks: ClassVar[int] = 4

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int,
        *,
        use_bias: bool,
        bias_init: KernelInit,
        dtype: Any,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        if not is_whole(blocks) or blocks < 1:
            raise UserError(f"blocks={blocks!r} must be a whole number, at least 1")
        if in_features % blocks or out_features % blocks:
            raise UserError(
                f"blocks={blocks} does not divide both axes of a {in_features}x{out_features} "
                f"layer; use {self.fitting_blocks(in_features, out_features, blocks)}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.blocks = int(blocks)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
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
        **options: Any,
    ) -> StructuredLinear:
        """Builds the layer by its whole fit to a dense kernel; a random start makes do with less.

        Args:
            kernel: dense kernel, shape (in, out).
            bias: bias, shape (out,), or None for a layer without one.
            **options: keyword arguments of the layer's constructor.

        Example:
            >>> import jax.numpy as jnp
            >>> from gaudi_jax import BlastLinear
            >>> layer = BlastLinear.from_kernel(jnp.ones((4, 6)), blocks=2, rank=1)
            >>> bool(jnp.allclose(layer.kernel(), 1, atol=1e-4))
            True
        """
        layer = super().from_kernel(kernel, bias=bias, **options)
        layer.set_kernel(kernel)
        return layer

    @classmethod
    def fitting_blocks(cls, in_features: int, out_features: int, at_most: int | None = None) -> int:
        """The largest number of parts of both axes.

        Args:
            in_features: features of the input.
            out_features: features of the output.
            at_most: bound of the number; None for the usual one.

        Raises:
            UserError: the bound is less than 1.

        Example:
            >>> from gaudi_jax.layers import MonarchLinear
            >>> MonarchLinear.fitting_blocks(48, 64, 20)
            16
        """
        at_most = cls.usual_blocks if at_most is None else at_most
        if at_most < 1:
            raise UserError(f"blocks={at_most} must be at least 1")
        return max(b for b in range(1, at_most + 1) if cls._cuts(b, in_features, out_features))

    @classmethod
    def _cuts(cls, blocks: int, in_features: int, out_features: int) -> bool:
        return in_features % blocks == 0 and out_features % blocks == 0

    @classmethod
    @abstractmethod
    def least(cls, in_features: int, out_features: int, blocks: int) -> int:
        """The fewest multiplications that a layer with so many blocks has."""

    @classmethod
    def step(cls, in_features: int, out_features: int, blocks: int) -> int:
        """Multiplications of one more rank."""
        return in_features + out_features

    @classmethod
    @abstractmethod
    def affordable(
        cls, in_features: int, out_features: int, blocks: int, cost: int
    ) -> dict[str, int]:
        """Options of the largest layer that a number of multiplications buys.

        Raises:
            UserError: it is less than `least`.
        """

    @classmethod
    def _check_cost(cls, in_features: int, out_features: int, blocks: int, cost: int) -> None:
        least, dense = cls.least(in_features, out_features, blocks), in_features * out_features
        if cost < least:
            raise UserError(
                f"a budget of {cost / dense:.4g} is less than the smallest {cls.__name__} of "
                f"{in_features}x{out_features} with blocks={blocks}; give at least "
                f"{least / dense:.4g}, or other blocks"
            )

    @abstractmethod
    def factored_multiplications(self) -> int:
        """Multiplications of one input vector through the factors."""

    @abstractmethod
    def composing_multiplications(self) -> int:
        """Multiplications that compose the kernel."""

    @abstractmethod
    def factored(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The product ``x @ kernel()`` through the factors, in the dtype of x."""

    @abstractmethod
    def approximation(
        self, kernel: Float[Array, "in out"], second_moment: Float[Array, "in in"] | None
    ) -> dict[str, Array]:
        """Values of the parameters, by name, that approximate a dense kernel (`set_kernel`)."""

    def set_kernel(
        self,
        kernel: Float[Array, "in out"],
        second_moment: Float[Array, "in in"] | None = None,
    ) -> None:
        """Approximates a dense kernel; see `StructuredLinear.set_kernel`."""
        for name, value in self.approximation(kernel, second_moment).items():
            variable = getattr(self, name)
            variable.set_value(value.astype(variable.dtype))

    def multiplications(self) -> Int[Array, ""]:
        """Multiplications per input vector: through the factors, or composed if that is less."""
        return jnp.int32(min(self.factored_multiplications(), self.in_features * self.out_features))

    def product(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """The product ``x @ kernel()``."""
        if composing_pays(
            x.size // self.in_features,
            self.factored_multiplications(),
            self.composing_multiplications(),
            self.in_features * self.out_features,
        ):
            return dot(x, self.kernel().astype(x.dtype), 0, out_sharding)
        return placed(self.factored(x), out_sharding)

    def _grouped(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch b m"]:
        """Inputs by the groups that the blocks cut them into."""
        return x.reshape(*x.shape[:-1], self.blocks, self.in_features // self.blocks)
