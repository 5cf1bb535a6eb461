"""Low-rank factors of a kernel: the rival of every block structure."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

#: Share of the mean second moment that is added to the diagonal, so that it has an inverse.
RIDGE = 1e-3


def svd_factors(
    kernel: Float[Array, "in out"],
    rank: int,
    *,
    second_moment: Float[Array, "in in"] | None = None,
) -> tuple[Float[Array, "rank in"], Float[Array, "rank out"]]:
    """Factors (left, right) of the truncated SVD: left.T @ right, singular values shared evenly.

    With the second moment C of the inputs it is the whitened SVD, which minimises
    ``E|x (W - left.T right)|²`` instead of ``|W - left.T right|²`` among all factors of that rank.

    Args:
        kernel: dense kernel, shape (in, out).
        rank: number of components kept, at most min(in, out).
        second_moment: E[x xᵀ] of the inputs, shape (in, in); None for the plain SVD.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.low_rank import svd_factors
        >>> left, right = svd_factors(jnp.diag(jnp.array([3.0, 1.0])), rank=1)
        >>> bool(jnp.allclose(left.T @ right, jnp.diag(jnp.array([3.0, 0.0])), atol=1e-5))
        True
    """
    kernel = kernel.astype(jnp.float32)
    lower = None
    if second_moment is not None:
        lower = jnp.linalg.cholesky(regularise(second_moment.astype(jnp.float32)))
        kernel = lower.T @ kernel
    u, s, vt = jnp.linalg.svd(kernel, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    left, right = root[:, None] * u[:, :rank].T, root[:, None] * vt[:rank]
    if lower is not None:
        left = lax.linalg.triangular_solve(lower, left, left_side=False, lower=True)
    return left, right


def regularise(second_moment: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Symmetric, and with a small multiple of the identity added, so that it has an inverse.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.low_rank import regularise
        >>> [round(float(x), 4) for x in jnp.diag(regularise(jnp.diag(jnp.array([2.0, 0.0]))))]
        [2.001, 0.001]
    """
    n = second_moment.shape[0]
    symmetric = (second_moment + second_moment.T) / 2
    # A layer whose inputs are all 0 has no second moment at all; any positive number serves.
    size = jnp.maximum(jnp.trace(symmetric) / n, 1e-30)
    return symmetric + RIDGE * size * jnp.eye(n)
