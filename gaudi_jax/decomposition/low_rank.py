"""Low-rank factors of a kernel: the rival of every block structure."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

#: Share of the mean second moment that is added to the diagonal, so that it has an inverse.
RIDGE = 1e-3
#: Share of a Gram matrix's mean diagonal below which rounding may leave it without an inverse.
LEAST_RIDGE = 1e-5


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


def preconditioned(
    gram: Float[Array, "*b rank rank"],
    gradient: Float[Array, "*b rank n"],
    ridge: float | Array = 0.0,
) -> Float[Array, "*b rank n"]:
    """A gradient by some factor times the inverse of the others' regularised Gram matrix.

    It is the step to the least error, but for the ridge, and a step that lowers the error with any.

    Args:
        gram: inner products of the other factors, shape (..., rank, rank).
        gradient: negative gradient, shape (..., rank, n).
        ridge: share of the mean diagonal that is added to it, at least `LEAST_RIDGE`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.low_rank import preconditioned
        >>> preconditioned(4 * jnp.eye(2), jnp.ones((2, 1)), 1.0).round(3)
        Array([[0.125],
               [0.125]], dtype=float32)
    """
    rank = gram.shape[-1]
    size = jnp.trace(gram, axis1=-2, axis2=-1) / rank
    added = jnp.maximum(ridge, LEAST_RIDGE) * size + 1e-30
    eye = jnp.eye(rank).reshape((1,) * (gram.ndim - 2) + (rank, rank))
    root = jnp.linalg.cholesky(gram + added[..., None, None] * eye)
    return jax.scipy.linalg.cho_solve((root, True), gradient)
