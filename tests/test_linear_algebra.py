"""No two batches of linear algebra in a program are independent of each other.

On a CPU each may wait for a thread that the other holds (`gaudi_jax.decomposition.sweeps.root`).
"""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal, jaxprs_in_params

from gaudi_jax.compression.allocation import gains
from gaudi_jax.decomposition import decompose, svd_factors
from gaudi_jax.decomposition.blast import blast_factors
from gaudi_jax.decomposition.block_sparse import block_sparse_factors
from gaudi_jax.decomposition.monarch import monarch_factors

LAPACK = {"cholesky", "triangular_solve", "svd", "eigh", "qr", "geqrf", "lu"}
INLINE = {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"}


class Scope:
    """The calls of one program, or of one body of a loop, and what each depends on."""

    def __init__(self):
        self.calls, self.conflicts = {}, []

    def call(self, name, needs):
        index = len(self.calls)
        self.conflicts += [(other, name) for i, (other, _) in self.calls.items() if i not in needs]
        self.calls[index] = name, needs
        return needs | {index}

    def follow(self, jaxpr, inputs):
        """Reads a jaxpr; gives the calls that each of its outputs depends on."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))

        def needed(value):
            return set() if isinstance(value, Literal) else known.get(value, set())

        for eqn in jaxpr.eqns:
            needs = [needed(v) for v in eqn.invars]
            everything = set().union(*needs)
            inner = list(jaxprs_in_params(eqn.params))
            if eqn.primitive.name in INLINE:
                found = self.follow(inner[0], needs)
            else:
                bodies = [self.body(each) for each in inner]
                batched = eqn.primitive.name in LAPACK and eqn.invars[0].aval.ndim > 2
                if batched or any(bodies):
                    everything = self.call(eqn.primitive.name, everything)
                found = [everything] * len(eqn.outvars)
            known.update(zip(eqn.outvars, found, strict=True))
        return [needed(v) for v in jaxpr.outvars]

    def body(self, jaxpr):
        """Whether the body of a loop, or a branch, has such calls."""
        scope = Scope()
        scope.follow(jaxpr, [set()] * len(jaxpr.invars))
        self.conflicts += scope.conflicts
        return bool(scope.calls)


def conflicts_of(function, *args):
    scope = Scope()
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    scope.follow(jaxpr, [set()] * len(jaxpr.invars))
    return scope.conflicts, scope.calls


def stacked(kernel, moment):
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (kernel, moment))
    return decompose(both[0], 0.5, second_moment=both[1], rounds=2)


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(
    ("function", "calls"),
    [
        (lambda w, c: decompose(w, 0.5, second_moment=c, rounds=2), False),
        (lambda w, c: decompose(w, 0.5, rank=4, second_moment=c, rounds=2), True),
        (stacked, False),  # on a CPU
        (lambda w, c: svd_factors(w, 4, second_moment=c), False),
        (lambda w, c: blast_factors(w, 4, 4, c, steps=2), True),
        (lambda w, c: monarch_factors(w, 4, 2, c), True),
        (lambda w, c: block_sparse_factors(w, 4, 2, 4, c), None),
        (gains, False),
    ],
)
def test_batches_of_linear_algebra_follow_one_another(function, calls, aware):
    kernel, moment = jnp.ones((32, 48)), jnp.eye(32) if aware else None
    conflicts, found = conflicts_of(lambda w, c: function(w, c), kernel, moment)
    assert not conflicts
    if calls is not None:
        assert bool(found) == calls


def test_independent_batches_are_found():
    roots = jnp.linalg.cholesky
    matrices = jnp.stack([jnp.eye(4)] * 2)
    conflicts, _ = conflicts_of(lambda x: (roots(x), roots(2 * x)), matrices)
    assert conflicts == [("cholesky", "cholesky")]
    conflicts, calls = conflicts_of(lambda x: roots(roots(x)), matrices)
    assert not conflicts
    assert len(calls) == 2
    # In a loop, and beside one.
    conflicts, _ = conflicts_of(
        lambda x: jax.lax.map(lambda y: roots(x) + roots(y * x), x), matrices
    )
    assert conflicts
    conflicts, _ = conflicts_of(
        lambda x: (roots(x), jax.lax.fori_loop(0, 2, lambda _, y: roots(y), x)), matrices
    )
    assert conflicts == [("cholesky", "scan")]
