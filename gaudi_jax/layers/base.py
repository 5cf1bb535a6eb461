"""The contract of structured linear layers, and what they share."""

from abc import abstractmethod
from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gaudi_jax.errors import UserError

KernelInit = Callable[[Array, tuple[int, ...], Any], Array]

#: As in `flax.nnx.Linear`.
default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()


class Structural(nnx.Param):
    """A parameter that says where blocks lie, not what they hold; never weight-decayed."""


class Width(Structural):
    """Lengths of the blocks' intervals as fractions of the axes, shape (2, B): input, output."""


class Location(Structural):
    """Starts of the blocks' intervals as fractions of the axes, shape (2, B): input, output."""


class Sigma(nnx.Variable):
    """Standard deviation of the masks' Gaussian in the frequency domain; set by a schedule."""


class StructuredLinear(nnx.Module):
    """A linear layer whose kernel has a structure: the contract that every such layer keeps.

    A subclass holds `in_features`, `out_features`, `bias` (a Param or None), `dtype` and
    `param_dtype`, and gives `kernel`, `multiplications` and `product`. Calling the layer equals
    ``x @ kernel() + bias``.
    """

    in_features: int
    out_features: int
    bias: nnx.Param | None
    dtype: Any
    param_dtype: Any

    @abstractmethod
    def kernel(self) -> Float[Array, "in out"]:
        """The dense kernel that the layer stands for, in its parameters' dtype."""

    @abstractmethod
    def multiplications(self) -> Int[Array, ""]:
        """Multiplications per input vector, bias apart."""

    @abstractmethod
    def product(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """The product ``x @ kernel()`` in the cheaper order, in the dtype of x."""

    @abstractmethod
    def set_kernel(
        self,
        kernel: Float[Array, "in out"],
        second_moment: Float[Array, "in in"] | None = None,
    ) -> None:
        """Approximates a dense kernel by the layer's own way; widths, ranks and such stay.

        Args:
            kernel: dense kernel W, shape (in, out).
            second_moment: E[x xᵀ] of the inputs, shape (in, in): the error that is made small is
                then that of the outputs, ``E|x (W - kernel())|²``. None for that of the kernel.
        """

    @classmethod
    def from_kernel(
        cls,
        kernel: Float[Array, "in out"],
        *,
        bias: Float[Array, " out"] | None = None,
        **options: Any,
    ) -> "StructuredLinear":
        """Builds the layer from a dense kernel by the layer's own way of approximating one.

        Args:
            kernel: dense kernel, shape (in, out).
            bias: bias, shape (out,), or None for a layer without one.
            **options: keyword arguments of the layer's constructor.

        Raises:
            UserError: the kernel is no matrix.

        Example:
            >>> import jax.numpy as jnp
            >>> from gaudi_jax import LowRankLinear
            >>> layer = LowRankLinear.from_kernel(jnp.ones((4, 6)), rank=1)
            >>> bool(jnp.allclose(layer.kernel(), 1, atol=1e-6))
            True
        """
        if kernel.ndim != 2:
            raise UserError(
                f"a kernel of shape {kernel.shape} is no matrix; reshape it to (in, out)"
            )
        layer = cls(  # type: ignore[call-arg]
            *kernel.shape,
            use_bias=bias is not None,
            kernel_init=lambda key, shape, dtype: jnp.asarray(kernel, dtype),
            rngs=nnx.Rngs(0),
            **options,
        )
        if bias is not None and layer.bias is not None:
            layer.bias[...] = jnp.asarray(bias, layer.bias.dtype)
        return layer

    def __call__(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """Applies the layer to the last axis of x.

        Args:
            x: inputs of shape (..., in_features).
            out_sharding: sharding of the output, as in `flax.nnx.Linear`.

        Returns:
            Outputs of shape (..., out_features).

        Raises:
            UserError: the last axis of x is not in_features long.
        """
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise UserError(
                f"input of shape {x.shape} does not end in the layer's in_features="
                f"{self.in_features}"
            )
        dtype = self.dtype or jnp.result_type(x, self.param_dtype)
        return self.affine(x.astype(dtype), out_sharding)

    def affine(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """The product and the bias, in the dtype of x."""
        y = self.product(x, out_sharding)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def is_whole(number: Any) -> bool:
    """Whether it is a whole number, of Python or NumPy.

    Example:
        >>> from gaudi_jax.layers.base import is_whole
        >>> is_whole(2), is_whole(2.0)
        (True, False)
    """
    return isinstance(number, Integral)


def check_rank(rank: int, most: int, in_features: int, out_features: int) -> None:
    """Checks a rank.

    Raises:
        UserError: it is no whole number in [1, most].
    """
    if not is_whole(rank) or not 1 <= rank <= most:
        raise UserError(
            f"rank={rank!r} of a {in_features}x{out_features} layer must be a whole number in "
            f"[1, {most}]"
        )


def factored_product(
    x: Float[Array, "*batch in"],
    left: Float[Array, "k in"],
    right: Float[Array, "k out"],
    out_sharding: Any = None,
) -> Float[Array, "*batch out"]:
    """Computes ``x @ (left.T @ right)``, composing the kernel first when that costs less.

    With T input vectors, composing takes k·in·out + T·in·out multiplications, the two factors in
    sequence T·k·(in + out).

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.layers.base import factored_product
        >>> factored_product(jnp.ones((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 3)))
        Array([[2., 2., 2.]], dtype=float32)
    """
    k, n_in = left.shape
    n_out = right.shape[1]
    left, right = left.astype(x.dtype), right.astype(x.dtype)
    if composing_pays(x.size // n_in, k * (n_in + n_out), k * n_in * n_out, n_in * n_out):
        return dot(x, left.T @ right, 0, out_sharding)
    return dot(dot(x, left, 1, None), right, 0, out_sharding)


def composing_pays(tokens: int, factored: int, composing: int, dense: int) -> bool:
    """Whether it costs less to compose the kernel and to multiply by that.

    Args:
        tokens: input vectors.
        factored: multiplications of one of them through the factors.
        composing: multiplications that compose the kernel.
        dense: multiplications of one input vector with the composed kernel.

    Example:
        >>> from gaudi_jax.layers.base import composing_pays
        >>> composing_pays(10, 30, 100, 16), composing_pays(5, 30, 100, 16)
        (True, False)
    """
    if factored <= dense:
        return False
    try:
        return composing < tokens * (factored - dense)
    except jax.errors.InconclusiveDimensionOperation:  # any number of them, in an exported program
        return True


def placed(y: Array, out_sharding: Any) -> Array:
    """An output laid out as `out_sharding` says, in either way in which JAX shards; None: as is."""
    if out_sharding is None:
        return y
    if jax.typeof(y).sharding.mesh.explicit_axes:
        return jax.sharding.reshard(y, out_sharding)
    return jax.lax.with_sharding_constraint(y, out_sharding)


def dot(x: Array, matrix: Array, contract: int, out_sharding: Any) -> Array:
    """Contracts the last axis of x with axis `contract` of a matrix."""
    return jax.lax.dot_general(
        x, matrix, (((x.ndim - 1,), (contract,)), ((), ())), out_sharding=out_sharding
    )
