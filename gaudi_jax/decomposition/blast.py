"""BLAST factors of a kernel: blocks of a grid that share their factors (Lee et al., 2024)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gaudi_jax.decomposition.low_rank import preconditioned, regularise, svd_factors

#: Steps on each of the three factors, as many as the paper's.
STEPS = 300
#: Share of a Gram matrix's mean diagonal, times the relative error, that is added to its diagonal.
RIDGE = 0.1

#: The factors v, s and u.
Parts = tuple[Float[Array, "b rank m"], Float[Array, "b b rank"], Float[Array, "b rank o"]]


@partial(jax.jit, static_argnames=("blocks", "rank"))
def blast_factors(
    kernel: Float[Array, "in out"],
    blocks: int,
    rank: int,
    second_moment: Float[Array, "in in"] | None = None,
    *,
    steps: int | Array = STEPS,
) -> Parts:
    """Factors (v, s, u) by preconditioned gradient descent, from the truncated SVD.

    The method of the paper (its algorithm 2): gradient steps on one factor after the other, each
    multiplied by the inverse of the regularised Gram matrix of the other two. In place of a
    schedule the length of each step is the best along its direction, which is exact, since the
    error is quadratic in each factor. So the error never rises, and ends no higher than that of
    the truncated SVD (with a second moment: whitened SVD) of the same rank.

    Args:
        kernel: dense kernel W, shape (in, out).
        blocks: parts of each axis, b; divides both.
        rank: of the shared factors, at most min(in, out).
        second_moment: C = E[x xᵀ] of the inputs, shape (in, in), to make ``E|x (W - kernel)|²``
            small; None for ``|W - kernel|²``.
        steps: on each factor; 0 gives the SVD.

    Returns:
        v of shape (b, rank, in / b), s of shape (b, b, rank) and u of shape (b, rank, out / b):
        block (i, j) of the kernel is ``v[i].T @ diag(s[i, j]) @ u[j]``.

    Example:
        Blocks of one shape with different scales, which no matrix of rank 1 is:

        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.blast import blast_factors, blast_kernel
        >>> kernel = jnp.kron(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.ones((2, 3)))
        >>> parts = blast_factors(kernel, blocks=2, rank=1)
        >>> bool(jnp.allclose(blast_kernel(*parts), kernel, atol=1e-4))
        True
    """
    n, m = kernel.shape
    kernel = kernel.astype(jnp.float32)
    metric = Metric.of(second_moment, n, blocks)
    left, right = svd_factors(kernel, rank, second_moment=second_moment)
    v = left.reshape(rank, blocks, n // blocks).swapaxes(0, 1)
    u = right.reshape(rank, blocks, m // blocks).swapaxes(0, 1)
    norm = jnp.maximum(jnp.vdot(kernel, metric.times(kernel)), 1e-30)

    def moved(parts: Parts, residual: Array, which: int) -> tuple[Parts, Array]:
        """One step on one of the factors, and the residual after it."""
        gradient = metric.times(residual)
        ridge = RIDGE * jnp.sqrt(jnp.vdot(residual, gradient) / norm)
        grid = gradient.reshape(blocks, n // blocks, blocks, m // blocks)
        direction = _DIRECTIONS[which](*parts, grid, ridge, metric)
        change = blast_kernel(*_with(parts, which, direction))
        curvature = jnp.vdot(change, metric.times(change))
        length = jnp.vdot(change, gradient) / jnp.maximum(curvature, 1e-30)
        return _with(parts, which, parts[which] + length * direction), residual - length * change

    def step(_: int, parts: Parts) -> Parts:
        residual = kernel - blast_kernel(*parts)
        for which in range(3):
            parts, residual = moved(parts, residual, which)
        return parts

    return lax.fori_loop(0, steps, step, (v, jnp.ones((blocks, blocks, rank)), u))


def blast_kernel(
    v: Float[Array, "b rank m"], s: Float[Array, "b b rank"], u: Float[Array, "b rank o"]
) -> Float[Array, "in out"]:
    """The kernel whose block (i, j) is ``v[i].T @ diag(s[i, j]) @ u[j]``.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.decomposition.blast import blast_kernel
        >>> blast_kernel(jnp.ones((2, 1, 3)), jnp.ones((2, 2, 1)), jnp.ones((2, 1, 4))).shape
        (6, 8)
    """
    blocks, _, n = v.shape
    right = s[:, :, :, None] * u[None]
    return jnp.einsum("ikn,ijkm->injm", v, right).reshape(blocks * n, -1)


def _with(parts: Parts, which: int, value: Array) -> Parts:
    v, s, u = (value if index == which else part for index, part in enumerate(parts))
    return v, s, u


class Metric(NamedTuple):
    """What the error of a kernel is measured with: ``|E|² = tr(Eᵀ C E)``.

    Attributes:
        moment: C, or None for the identity.
        own: roots of the parts of C that belong to one group of inputs each, for preconditioning.
    """

    moment: Float[Array, "in in"] | None
    own: Float[Array, "b m m"] | None

    @classmethod
    def of(cls, second_moment: Array | None, n: int, blocks: int) -> "Metric":
        """From the second moment of n inputs in so many groups."""
        if second_moment is None:
            return cls(None, None)
        moment = regularise(second_moment.astype(jnp.float32))
        grid = moment.reshape(blocks, n // blocks, blocks, n // blocks)
        return cls(moment, jnp.linalg.cholesky(jnp.einsum("inim->inm", grid)))

    def times(self, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """C times a matrix."""
        return matrix if self.moment is None else self.moment @ matrix

    def gram(self, v: Float[Array, "b rank m"]) -> Float[Array, "b rank rank"]:
        """Inner products of each group's factors."""
        white = v if self.own is None else v @ self.own
        return jnp.einsum("ikn,iln->ikl", white, white)

    def undone(self, slope: Float[Array, "b rank m"]) -> Float[Array, "b rank m"]:
        """A gradient of v times the inverse of each group's own part of C."""
        if self.own is None:
            return slope
        solve = jax.vmap(lambda root, part: jax.scipy.linalg.cho_solve((root, True), part.T).T)
        return solve(self.own, slope)


def _towards_v(v, s, u, gradient, ridge, metric):
    gram = jnp.einsum("ijk,ijl,jkl->ikl", s, s, jnp.einsum("jkm,jlm->jkl", u, u))
    slope = jnp.einsum("injm,ijk,jkm->ikn", gradient, s, u)
    # One after the other: see `gaudi_jax.decomposition.sweeps.root`.
    return metric.undone(preconditioned(gram, slope, ridge))


def _towards_s(v, s, u, gradient, ridge, metric):
    gram = metric.gram(v)[:, None] * jnp.einsum("jkm,jlm->jkl", u, u)[None]
    slope = jnp.einsum("injm,ikn,jkm->ijk", gradient, v, u)
    return preconditioned(gram, slope[..., None], ridge)[..., 0]


def _towards_u(v, s, u, gradient, ridge, metric):
    gram = jnp.einsum("ijk,ijl,ikl->jkl", s, s, metric.gram(v))
    slope = jnp.einsum("injm,ijk,ikn->jkm", gradient, s, v)
    return preconditioned(gram, slope, ridge)


#: By the index of the factor.
_DIRECTIONS = (_towards_v, _towards_s, _towards_u)
