"""Low-rank linear layer: the rival beside which every result is shown."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gaudi_jax.decomposition.low_rank import svd_factors
from gaudi_jax.layers.base import (
    KernelInit,
    StructuredLinear,
    check_rank,
    default_bias_init,
    default_kernel_init,
    factored_product,
)


class LowRankLinear(StructuredLinear):
    """A linear layer whose kernel is a product of two thin factors: ``kernel = v.T @ u``.

    The factors start from the truncated SVD of a dense kernel, the best approximation of that rank
    (Eckart & Young, 1936).

    Args:
        in_features: features of the input.
        out_features: features of the output.
        rank: columns of the factors, in [1, min(in_features, out_features)].
        use_bias: whether to add a bias.
        kernel_init: initializer of the dense kernel whose truncated SVD the factors are.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None infers it from the input and the parameters.
        param_dtype: dtype of the parameters.
        rngs: random keys; the stream "params" is used.

    Attributes:
        v: input factor, shape (rank, in_features).
        u: output factor, shape (rank, out_features).
        bias: shape (out_features,), or None.

    Raises:
        UserError: the rank is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import LowRankLinear
        >>> layer = LowRankLinear(8, 6, rank=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape, layer.kernel().shape, int(layer.multiplications())
        ((3, 6), (8, 6), 28)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        use_bias: bool = True,
        kernel_init: KernelInit = default_kernel_init,
        bias_init: KernelInit = default_bias_init,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rank(rank, min(in_features, out_features), in_features, out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        dense = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        v, u = svd_factors(dense, rank)
        self.v = nnx.Param(v.astype(param_dtype))
        self.u = nnx.Param(u.astype(param_dtype))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
            if use_bias
            else nnx.data(None)
        )

    def kernel(self) -> Float[Array, "in out"]:
        """The dense kernel, shape (in_features, out_features)."""
        return self.v[...].T @ self.u[...]

    def set_kernel(
        self,
        kernel: Float[Array, "in out"],
        second_moment: Float[Array, "in in"] | None = None,
    ) -> None:
        """Makes the factors those of the dense kernel's truncated (or whitened) SVD."""
        v, u = svd_factors(kernel, self.rank, second_moment=second_moment)
        self.v[...], self.u[...] = v.astype(self.v.dtype), u.astype(self.u.dtype)

    def multiplications(self) -> Int[Array, ""]:
        """Multiplications per input vector: factors in sequence, or composed if that is less."""
        n_in, n_out = self.in_features, self.out_features
        return jnp.int32(min(self.rank * (n_in + n_out), n_in * n_out))

    def product(self, x: Float[Array, "*batch in"], out_sharding: Any = None) -> Array:
        """The product ``x @ kernel()``."""
        return factored_product(x, self.v[...], self.u[...], out_sharding)
