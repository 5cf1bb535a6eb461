"""BLAST linear layer: a grid of blocks that share their factors."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.decomposition.blast import blast_factors, blast_kernel
from gaudi_jax.layers.base import KernelInit, check_rank, default_bias_init, default_kernel_init
from gaudi_jax.layers.grid import GridLinear


class BlastLinear(GridLinear):
    """A linear layer whose blocks share factors and differ in a diagonal between them.

    Block (i, j) of the kernel is ``v[i].T @ diag(s[i, j]) @ u[j]`` (Lee, Kwon, Qu & Kim, "BLAST:
    Block-level adaptive structured matrices for efficient deep neural network inference", NeurIPS
    2024). With diagonals of ones it is a low-rank layer; one of rank r costs blocks² r
    multiplications more than that.

    From scratch the factors are drawn directly, since a fit to a random kernel takes long and finds
    little: v and u from normal distributions, s uniformly from (0, 2), so that the kernel has the
    mean square that `kernel_init` gives. `from_kernel` and `set_kernel` fit the factors to a kernel
    by preconditioned gradient descent (`gaudi_jax.decomposition.blast.blast_factors`).

    Args:
        in_features: features of the input.
        out_features: features of the output.
        blocks: parts of each axis; divides both.
        rank: of the shared factors, in [1, min(in_features, out_features)].
        use_bias: whether to add a bias.
        kernel_init: initializer of a dense kernel, whose mean square the kernel gets.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None infers it from the input and the parameters.
        param_dtype: dtype of the parameters.
        rngs: random keys; the stream "params" is used.

    Attributes:
        v: input factors, shape (blocks, rank, in_features / blocks).
        s: diagonals, shape (blocks, blocks, rank).
        u: output factors, shape (blocks, rank, out_features / blocks).
        bias: shape (out_features,), or None.

    Raises:
        UserError: the blocks do not divide an axis, or the rank is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import BlastLinear
        >>> layer = BlastLinear(8, 12, blocks=2, rank=3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape, layer.kernel().shape, int(layer.multiplications())
        ((3, 12), (8, 12), 72)
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
        check_rank(rank, min(in_features, out_features), in_features, out_features)
        self.rank = rank
        dense = kernel_init(rngs.params(), (in_features, out_features), jnp.float32)
        # s, uniform in (0, 2), has the mean square 4/3.
        scale = (jnp.mean(jnp.square(dense)) / (rank * 4 / 3)) ** 0.25

        def normal(features: int) -> nnx.Param:
            shape = (blocks, rank, features // blocks)
            return nnx.Param((scale * jax.random.normal(rngs.params(), shape)).astype(param_dtype))

        self.v = normal(in_features)
        self.u = normal(out_features)
        self.s = nnx.Param(
            jax.random.uniform(rngs.params(), (blocks, blocks, rank), param_dtype, 0, 2)
        )

    @classmethod
    def least(cls, in_features: int, out_features: int, blocks: int) -> int:
        """The fewest multiplications: rank 1."""
        return min(cls.step(in_features, out_features, blocks), in_features * out_features)

    @classmethod
    def step(cls, in_features: int, out_features: int, blocks: int) -> int:
        """Multiplications of one more rank: a column of each factor, and blocks² diagonals."""
        return in_features + out_features + blocks**2

    @classmethod
    def affordable(
        cls, in_features: int, out_features: int, blocks: int, cost: int
    ) -> dict[str, int]:
        """The highest rank that a number of multiplications buys.

        Example:
            >>> from gaudi_jax import BlastLinear
            >>> BlastLinear.affordable(64, 64, 4, 64 * 64 // 2)
            {'blocks': 4, 'rank': 14}
        """
        cls._check_cost(in_features, out_features, blocks, cost)
        full = min(in_features, out_features)
        if cost >= in_features * out_features:
            return {"blocks": blocks, "rank": full}
        return {
            "blocks": blocks,
            "rank": min(cost // cls.step(in_features, out_features, blocks), full),
        }

    def kernel(self) -> Float[Array, "in out"]:
        """The dense kernel, shape (in_features, out_features)."""
        return blast_kernel(self.v[...], self.s[...], self.u[...])

    def approximation(
        self, kernel: Float[Array, "in out"], second_moment: Float[Array, "in in"] | None
    ) -> dict[str, Array]:
        """Preconditioned gradient descent (`blast_factors`)."""
        v, s, u = blast_factors(kernel, self.blocks, self.rank, second_moment)
        return {"v": v, "s": s, "u": u}

    def factored_multiplications(self) -> int:
        """The factors, and blocks² diagonals between them."""
        return self.rank * (self.in_features + self.out_features + self.blocks**2)

    def composing_multiplications(self) -> int:
        """Diagonals times the output factors, once for each group of inputs, and the product."""
        return self.rank * self.out_features * (self.blocks + self.in_features)

    def factored(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The product through the factors."""
        v, s, u = (part[...].astype(x.dtype) for part in (self.v, self.s, self.u))
        hidden = jnp.einsum("...in,ikn->...ik", self._grouped(x), v)
        mixed = jnp.einsum("...ik,ijk->...jk", hidden, s)
        y = jnp.einsum("...jk,jkm->...jm", mixed, u)
        return y.reshape(*x.shape[:-1], self.out_features)
