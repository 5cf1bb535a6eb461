"""Monarch factors of a kernel: every block of a grid by one of low rank."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gaudi_jax.decomposition.low_rank import regularise, svd_factors


@partial(jax.jit, static_argnames=("blocks", "rank"))
def monarch_factors(
    kernel: Float[Array, "in out"],
    blocks: int,
    rank: int,
    second_moment: Float[Array, "in in"] | None = None,
) -> tuple[Float[Array, "b b rank m"], Float[Array, "b b rank o"]]:
    """Factors (v, u) of the truncated SVD of every block: the best approximation of this kind.

    With the second moment C of the inputs, the first factors are those of each block's SVD whitened
    by its own inputs' part of C, and the second ones are then the regression of the outputs
    ``x W`` on what the first ones give, with all of C: the best for these first factors.

    Args:
        kernel: dense kernel W, shape (in, out).
        blocks: parts of each axis, b; divides both.
        rank: of every block, at most min(in, out) / b.
        second_moment: E[x xᵀ] of the inputs, shape (in, in); None for the error of the kernel.

    Returns:
        v of shape (b, b, rank, in / b) and u of shape (b, b, rank, out / b): block (i, j) of the
        kernel is ``v[i, j].T @ u[j, i]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.monarch import monarch_factors, monarch_kernel
        >>> kernel = jnp.kron(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 3)))
        >>> v, u = monarch_factors(kernel, blocks=2, rank=1)
        >>> v.shape, u.shape, bool(jnp.allclose(monarch_kernel(v, u), kernel, atol=1e-5))
        ((2, 2, 1, 2), (2, 2, 1, 3), True)
    """
    n, m = kernel.shape
    grid = kernel.astype(jnp.float32).reshape(blocks, n // blocks, blocks, m // blocks)
    grid = grid.swapaxes(1, 2)
    if second_moment is None:
        v, u = jax.vmap(jax.vmap(lambda block: svd_factors(block, rank)))(grid)
        return v, u.swapaxes(0, 1)
    moment = second_moment.astype(jnp.float32)

    def whitened(block: Array, own: Array) -> Array:
        return svd_factors(block, rank, second_moment=own)[0]

    own = jnp.einsum("inim->inm", moment.reshape(blocks, n // blocks, blocks, n // blocks))
    v = jax.vmap(jax.vmap(whitened, (0, None)))(grid, own)
    return v, _regression(kernel, v, moment)


def monarch_kernel(
    v: Float[Array, "b b rank m"], u: Float[Array, "b b rank o"]
) -> Float[Array, "in out"]:
    """The kernel whose block (i, j) is ``v[i, j].T @ u[j, i]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.monarch import monarch_kernel
        >>> monarch_kernel(jnp.ones((2, 2, 1, 3)), jnp.ones((2, 2, 1, 4))).shape
        (6, 8)
    """
    blocks, _, _, n = v.shape
    kernel = jnp.einsum("ijkn,jikm->injm", v, u)
    return kernel.reshape(blocks * n, blocks * u.shape[-1])


def _regression(
    kernel: Float[Array, "in out"], v: Float[Array, "b b rank m"], moment: Float[Array, "in in"]
) -> Float[Array, "b b rank o"]:
    """The second factors that are best for the first ones."""
    blocks, _, rank, _ = v.shape
    n, m = kernel.shape
    white = jnp.linalg.cholesky(regularise(moment)).T
    # For outputs of group j, column (i, k) of the map from the inputs is v[i, j, k] in group i.
    maps = jnp.einsum("ijkn,ic->jinck", v, jnp.eye(blocks)).reshape(blocks, n, blocks * rank)
    targets = (white @ kernel).reshape(n, blocks, m // blocks).swapaxes(0, 1)
    # By SVD, since blocks of less than full rank leave columns of zeros.
    u = jax.vmap(lambda features, target: jnp.linalg.lstsq(features, target)[0])(
        white @ maps, targets
    )
    return u.reshape(blocks, blocks, rank, m // blocks)
