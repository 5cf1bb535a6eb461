"""Block-sparse plus low-rank linear layer: the flat butterfly."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.decomposition.block_sparse import (
    block_sparse_factors,
    block_sparse_kernel,
    butterfly_pattern,
)
from gaudi_jax.errors import UserError
from gaudi_jax.layers.base import (
    KernelInit,
    check_rank,
    default_bias_init,
    default_kernel_init,
    dot,
    is_whole,
)
from gaudi_jax.layers.grid import GridLinear

#: Least share of the multiplications that goes to the low-rank part.
LOW_RANK_SHARE = 0.25


class BlockSparseLinear(GridLinear):
    """A linear layer whose kernel has dense blocks on a fixed pattern, plus a low-rank part.

    The pattern is the flat block butterfly of Pixelated Butterfly (Chen et al., "Pixelated
    Butterfly: Simple and efficient sparse training for neural network models", ICLR 2022): the
    blocks on the diagonal, and those whose row and column differ by one power of two in the bits of
    their numbers, small powers first. For a kernel that is not square it is stretched: the grid
    stays square, and the blocks are as long and as wide as the axes ask for. Blocks of
    in / blocks × out / blocks features are what the paper calls the block size.

    A budget is shared as in the paper, which gives a quarter to a third to the low-rank part:
    `affordable` takes as many diagonals as fit into what a share of a quarter leaves, and then the
    highest rank that the rest buys. Since there are few diagonals, log2(blocks) + 1 at most, and
    each costs in·out / blocks, the low-rank part often gets more than that.

    A fit to a dense kernel alternates between the low-rank part of what the blocks leave, and the
    blocks of what the low-rank part leaves (`gaudi_jax.decomposition.block_sparse`). From scratch
    the first round must do, as a random kernel gains little by more.

    Args:
        in_features: features of the input.
        out_features: features of the output.
        blocks: parts of each axis, a power of two; divides both.
        diagonals: blocks in each row and column of the grid, in [1, log2(blocks) + 1].
        rank: of the low-rank part, in [1, min(in_features, out_features)].
        use_bias: whether to add a bias.
        kernel_init: initializer of the dense kernel that is approximated.
        bias_init: initializer of the bias.
        dtype: dtype of the computation; None infers it from the input and the parameters.
        param_dtype: dtype of the parameters.
        rngs: random keys; the stream "params" is used.

    Attributes:
        v: input factor, shape (rank, in_features).
        u: output factor, shape (rank, out_features).
        sparse: the blocks, shape (blocks, diagonals, in_features / blocks, out_features / blocks):
            those of one group of outputs after those of another.
        bias: shape (out_features,), or None.

    Raises:
        UserError: the blocks are no power of two or do not divide an axis, or the diagonals or the
            rank are out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import BlockSparseLinear
        >>> layer = BlockSparseLinear(8, 16, blocks=4, diagonals=2, rank=1, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((3, 8))).shape, layer.kernel().shape, int(layer.multiplications())
        ((3, 16), (8, 16), 88)
    """

    usual_blocks = 16

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        blocks: int = 16,
        diagonals: int,
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
        blocks = self.blocks
        if blocks.bit_count() != 1:
            raise UserError(
                f"blocks={blocks} must be a power of two for a butterfly; use "
                f"{self.fitting_blocks(in_features, out_features, blocks)}"
            )
        if not is_whole(diagonals) or not 1 <= diagonals <= blocks.bit_length():
            raise UserError(
                f"diagonals={diagonals!r} must be a whole number in [1, {blocks.bit_length()}] "
                f"with blocks={blocks}"
            )
        check_rank(rank, min(in_features, out_features), in_features, out_features)
        self.diagonals = diagonals
        self.rank = rank
        dense = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        v, u, sparse = block_sparse_factors(dense, blocks, diagonals, rank, sweeps=0)
        self.v = nnx.Param(v.astype(param_dtype))
        self.u = nnx.Param(u.astype(param_dtype))
        self.sparse = nnx.Param(sparse.astype(param_dtype))

    @classmethod
    def _cuts(cls, blocks: int, in_features: int, out_features: int) -> bool:
        return super()._cuts(blocks, in_features, out_features) and blocks.bit_count() == 1

    @classmethod
    def least(cls, in_features: int, out_features: int, blocks: int) -> int:
        """The fewest multiplications: one diagonal and rank 1."""
        dense = in_features * out_features
        return min(dense // blocks + in_features + out_features, dense)

    @classmethod
    def affordable(
        cls,
        in_features: int,
        out_features: int,
        blocks: int,
        cost: int,
        low_rank_share: float = LOW_RANK_SHARE,
    ) -> dict[str, int]:
        """How many diagonals, and then which rank, a number of multiplications buys.

        Args:
            in_features: features of the input.
            out_features: features of the output.
            blocks: parts of each axis.
            cost: multiplications.
            low_rank_share: least share of them for the low-rank part, unless one diagonal takes
                more than the rest.

        Example:
            >>> from gaudi_jax import BlockSparseLinear
            >>> BlockSparseLinear.affordable(64, 64, 16, 64 * 64 // 4)
            {'blocks': 16, 'diagonals': 3, 'rank': 2}
        """
        cls._check_cost(in_features, out_features, blocks, cost)
        diagonal, column = in_features * out_features // blocks, in_features + out_features
        spent = min(int((1 - low_rank_share) * cost), cost - column)
        diagonals = min(max(spent // diagonal, 1), blocks.bit_length())
        rank = max((cost - diagonals * diagonal) // column, 1)
        full = min(in_features, out_features)
        if cost >= in_features * out_features:  # as much as a dense kernel: any of them
            rank = full
        return {"blocks": blocks, "diagonals": diagonals, "rank": min(rank, full)}

    def kernel(self) -> Float[Array, "in out"]:
        """The dense kernel, shape (in_features, out_features)."""
        return block_sparse_kernel(self.v[...], self.u[...], self.sparse[...])

    def approximation(
        self, kernel: Float[Array, "in out"], second_moment: Float[Array, "in in"] | None
    ) -> dict[str, Array]:
        """Alternating fits of both parts (`block_sparse_factors`)."""
        v, u, sparse = block_sparse_factors(
            kernel, self.blocks, self.diagonals, self.rank, second_moment
        )
        return {"v": v, "u": u, "sparse": sparse}

    def factored_multiplications(self) -> int:
        """The blocks and the low-rank part."""
        dense = self.in_features * self.out_features
        return self.diagonals * dense // self.blocks + self.rank * (
            self.in_features + self.out_features
        )

    def composing_multiplications(self) -> int:
        """Those of the low-rank part; the blocks are only added."""
        return self.rank * self.in_features * self.out_features

    def factored(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """The product through the blocks and the low-rank part."""
        v, u, sparse = (part[...].astype(x.dtype) for part in (self.v, self.u, self.sparse))
        pattern = butterfly_pattern(self.blocks, self.diagonals)
        diagonals = np.arange(self.diagonals)
        # Outputs are permuted, not inputs: a compiler would fuse what made x with the reading of
        # each block, and make it as often. Each diagonal of the pattern is its own inverse.
        by_input = sparse[pattern, diagonals]
        parts = jnp.einsum("...in,idnm->...idm", self._grouped(x), by_input)
        y = parts[..., pattern, diagonals, :].sum(-2)
        return y.reshape(*x.shape[:-1], self.out_features) + dot(dot(x, v, 1, None), u, 0, None)
