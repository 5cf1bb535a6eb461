"""Monarch linear layer: a grid of blocks, each of low rank."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.decomposition.monarch import monarch_factors, monarch_kernel
from gaudi_jax.layers.base import KernelInit, check_rank, default_bias_init, default_kernel_init
from gaudi_jax.layers.grid import GridLinear


class MonarchLinear(GridLinear):
    """A linear layer whose kernel is a grid of blocks of one low rank each.

    Block (i, j) of the kernel is ``v[i, j].T @ u[j, i]``, so that the layer is two batched products
    with a transposition between them. With rank 1 and as many blocks as the square root of the
    features it is a Monarch matrix (Dao et al., "Monarch: Expressive structured matrices for
    efficient and accurate training", ICML 2022); fewer blocks of higher rank are the form that
    BLAST's authors compare with. It starts from the truncated SVD of every block of a dense kernel,
    which is the best approximation of this kind.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        blocks: parts of each axis; divides both.
        rank: of every block, in [1, min(in_features, out_features) / blocks].
        use_bias: whether to add a bias.
        kernel_init: initializer of the dense kernel that is approximated.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None infers it from the input and the parameters.
        param_dtype: dtype of the parameters.
        rngs: random keys; the stream "params" is used.

    Attributes:
        v: input factors, shape (blocks, blocks, rank, in_features / blocks).
        u: output factors, shape (blocks, blocks, rank, out_features / blocks).
        bias: shape (out_features,), or None.

    Raises:
        UserError: the blocks do not divide an axis, or the rank is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import MonarchLinear
        >>> layer = MonarchLinear(8, 12, blocks=2, rank=1, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape, layer.kernel().shape, int(layer.multiplications())
        ((3, 12), (8, 12), 40)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        blocks: int = GridLinear.usual_blocks,
        rank: int,
        use_bias: bool = True,
        kernel_init: KernelInit = default_kernel_init,
        bias_init: KernelInit = default_bias_init,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            out_features,
            blocks,
            use_bias=use_bias,
            bias_init=bias_init,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        check_rank(rank, min(in_features, out_features) // blocks, in_features, out_features)
        self.rank = rank
        dense = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        v, u = monarch_factors(dense, blocks, rank)
        self.v = nnx.Param(v.astype(param_dtype))
        self.u = nnx.Param(u.astype(param_dtype))

    @classmethod
    def least(cls, in_features: int, out_features: int, blocks: int) -> int:
        """The fewest multiplications: blocks of rank 1."""
        return min(cls.step(in_features, out_features, blocks), in_features * out_features)

    @classmethod
    def step(cls, in_features: int, out_features: int, blocks: int) -> int:
        """Multiplications of one more rank in every block."""
        return blocks * (in_features + out_features)

    @classmethod
    def affordable(
        cls, in_features: int, out_features: int, blocks: int, cost: int
    ) -> dict[str, int]:
        """The highest rank that a number of multiplications buys.

        Example:
            >>> from gaudi_jax import MonarchLinear
            >>> MonarchLinear.affordable(64, 64, 4, 64 * 64 // 2)
            {'blocks': 4, 'rank': 4}
        """
        cls._check_cost(in_features, out_features, blocks, cost)
        full = min(in_features, out_features) // blocks
        if cost >= in_features * out_features:
            return {"blocks": blocks, "rank": full}
        return {
            "blocks": blocks,
            "rank": min(cost // cls.step(in_features, out_features, blocks), full),
        }

    def kernel(self) -> Float[Array, "in out"]:
        """The dense kernel, shape (in_features, out_features)."""
        return monarch_kernel(self.v[...], self.u[...])

    def approximation(
        self, kernel: Float[Array, "in out"], second_moment: Float[Array, "in in"] | None
    ) -> dict[str, Array]:
        """The truncated SVD of every block (`monarch_factors`)."""
        v, u = monarch_factors(kernel, self.blocks, self.rank, second_moment)
        return {"v": v, "u": u}

    def factored_multiplications(self) -> int:
        """Each of blocks² pairs of factors costs rank·(in + out) / blocks."""
        return self.blocks * self.rank * (self.in_features + self.out_features)

    def composing_multiplications(self) -> int:
        """Each entry of the kernel costs the rank."""
        return self.rank * self.in_features * self.out_features

    def factored(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The product through the factors."""
        v, u = self.v[...].astype(x.dtype), self.u[...].astype(x.dtype)
        hidden = jnp.einsum("...in,ijkn->...jik", self._grouped(x), v)
        y = jnp.einsum("...jik,jikm->...jm", hidden, u)
        return y.reshape(*x.shape[:-1], self.out_features)
