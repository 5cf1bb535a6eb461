"""Blocks of one size, evenly spread."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gaudi_jax
from gaudi_jax import GaudiLinear
from gaudi_jax.decomposition import decompose, relative_error, spread
from gaudi_jax.errors import UserError

SHAPE = (32, 48)


def kernel(seed=0, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def moment_of(n):
    x = jax.random.normal(jax.random.key(1), (4 * n, n)) * jnp.linspace(0.1, 2, n)
    return x.T @ x / len(x)


def lengths_of(factors, shape=SHAPE):
    """Of the blocks in use, in features."""
    lengths = np.asarray(factors.widths) * np.array(shape)[:, None]
    assert np.abs(lengths - np.round(lengths)).max() < 1e-3
    return np.round(lengths[:, (lengths > 0.5).all(axis=0)]).astype(int)


def windows_of(factors, shape=SHAPE):
    """Starts and lengths of the blocks in use, in features."""
    start = np.round(np.asarray(factors.locations) * np.array(shape)[:, None]).astype(int)
    length = lengths_of(factors, shape)
    return start[:, : length.shape[1]], length


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(
    ("budget", "rank", "cell"),
    [(0.3, 1, (1, 1)), (0.15, 1, (1, 1)), (0.3, 2, (1, 1)), (0.3, 1, (4, 4)), (0.24, 2, (8, 4))],
)
def test_a_budget_buys_as_many_blocks_of_one_size_as_there_can_be(budget, rank, cell, aware):
    n, m = SHAPE
    moment = moment_of(n) if aware else None
    found = spread(kernel(), budget, rank=rank, granularity=cell, second_moment=moment)
    lengths = lengths_of(found)
    assert lengths.shape[1] >= 0.75 * min(n // rank, int(budget * n * m) // rank // sum(cell))
    assert (np.ptp(lengths, axis=1) <= np.array(cell)).all()
    assert not (lengths % np.array(cell)[:, None]).any()
    spent = int(found.multiplications())
    assert spent == rank * lengths.sum()
    assert 0.9 * budget * n * m < spent <= budget * n * m


@pytest.mark.parametrize("shape", [(96, 96), (96, 384), (384, 96)])
@pytest.mark.parametrize("budget", [0.06, 0.125, 0.25, 0.34, 0.5])
def test_most_of_a_budget_is_spent(shape, budget):
    spent = int(spread(kernel(0, shape), budget).multiplications()) / math.prod(shape)
    assert 0.96 * budget < spent <= budget


@pytest.mark.parametrize("aware", [False, True])
def test_no_small_change_of_a_factor_makes_the_error_smaller(aware):
    moment = moment_of(SHAPE[0]) if aware else None
    found = spread(kernel(), 0.3, second_moment=moment)

    def slopes(weights):
        def error(factors):
            missed = kernel() - jnp.einsum("brn,brm->nm", *factors)
            return jnp.einsum("nm,nk,km->", missed, weights, missed)

        each = jax.grad(error)((found.v, found.u))
        inside = [jnp.where(x != 0, g, 0) for x, g in zip(found[:2], each, strict=True)]
        return float(optax.tree.norm(inside))

    weights = jnp.eye(SHAPE[0]) if moment is None else moment
    assert slopes(weights) < 0.002 * float(jnp.trace(kernel().T @ weights @ kernel()))


@pytest.mark.parametrize(("parts", "columns"), [(1, 24), (2, 48), (4, 96), (8, 96)])
def test_fewer_parts_make_fewer_and_larger_blocks(parts, columns):
    start, length = windows_of(spread(kernel(0, (96, 96)), 0.5, parts=parts), (96, 96))
    assert length.shape[1] == columns
    assert (length == 96 // min(parts, 4)).all()  # smaller ones would not spend the budget
    if parts == 1:
        assert (start == 0).all()


@pytest.mark.parametrize("cell", [1, 4])
def test_blocks_lie_on_parts_of_the_axes_and_cover_them_evenly(cell):
    found = spread(kernel(0, (96, 384)), 0.15, granularity=cell)
    for start, length, size in zip(*windows_of(found, (96, 384)), (96, 384), strict=True):
        parts = sorted(set(zip(start.tolist(), length.tolist(), strict=True)))
        assert sum(length for _, length in parts) == size  # neither gaps nor overlaps
        readers = [(start == first).sum() for first, _ in parts]
        assert max(readers) - min(readers) <= 3
    # No two places on the input axis always meet the same places on the output axis.
    pairs = set(zip(*windows_of(found, (96, 384))[0].tolist(), strict=True))
    assert len(pairs) > 0.7 * min(
        96, np.prod([len(set(row)) for row in windows_of(found, (96, 384))[0]])
    )


@pytest.mark.parametrize("aware", [False, True])
def test_factors_are_fitted(aware):
    moment = moment_of(SHAPE[0]) if aware else None
    found = spread(kernel(), 0.5, second_moment=moment)
    error = float(relative_error(kernel(), found.kernel(), moment))
    drawn = found._replace(v=jnp.where(found.v == 0, 0, 1.0), u=jnp.where(found.u == 0, 0, 1.0))
    assert error < 0.75 < float(relative_error(kernel(), drawn.kernel(), moment))
    searched = decompose(kernel(), 0.5, second_moment=moment, rounds=10)
    assert float(relative_error(kernel(), searched.kernel(), moment)) < error
    if aware:  # the fit is for these inputs
        plain = spread(kernel(), 0.5)
        assert error < float(relative_error(kernel(), plain.kernel(), moment))


def test_small_budgets_buy_fewer_blocks_instead_of_smaller_ones():
    for budget, rank in ((0.01, 1), (0.03, 1), (0.125, 8)):
        found = spread(kernel(0, (64, 64)), budget, rank=rank)
        assert 0.85 * budget < int(found.multiplications()) / 64**2 <= budget


def test_large_budgets_are_full_blocks():
    found = spread(kernel(), 3.0)
    assert (np.asarray(found.widths) == 1).all()
    assert float(relative_error(kernel(), found.kernel())) < 0.5


@pytest.mark.parametrize("w", [jnp.zeros(SHAPE), jnp.ones(SHAPE)])
def test_extreme_kernels(w):
    found = spread(w, 0.5)
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    assert int(found.multiplications()) <= 0.5 * w.size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spread(kernel(), 0.0), "budget=0.0"),
        (lambda: spread(kernel(), 0.3, rank=33), "rank=33"),
        (lambda: spread(kernel(), 0.3, granularity=5), "5"),
        (lambda: spread(kernel(), 0.3, parts=0), "parts=0"),
        (lambda: spread(kernel() * jnp.nan, 0.3), "NaN"),
        (lambda: spread(kernel()[None], 0.3), "one at a time"),
        (lambda: spread(kernel(), 0.3, second_moment=jnp.eye(3)), "second_moment of shape"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_model_is_compressed_to_spread_blocks():
    model = nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(seed)) for seed in range(2)))
    x = jax.random.normal(jax.random.key(2), (64, 32))
    options = {"calibration": [x], "allocation": "global", "progress": False}
    small, plan = gaudi_jax.compress(model, 0.5, method="spread", **options)
    assert plan["multiplications"] <= 0.5 * plan["dense_multiplications"]
    assert all(type(layer) is GaudiLinear for layer in small.layers)
    empty = gaudi_jax.rebuild(model, plan)
    nnx.update(empty, nnx.state(small))
    np.testing.assert_array_equal(empty(x), small(x))
    again, _ = gaudi_jax.compress(model, 0.5, method="spread", **options)
    np.testing.assert_array_equal(again(x), small(x))


def test_rules_mix_methods():
    model = nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(seed)) for seed in range(2)))
    rules = [
        {"pattern": "layers/0", "method": "spread", "blocks": 2},
        {"pattern": "layers/1", "method": "gaudi", "granularity": 4},
    ]
    small, _ = gaudi_jax.compress(model, 0.5, rules=rules, rounds=2, progress=False)
    assert [layer.granularity for layer in small.layers] == [(1, 1), (4, 4)]
    np.testing.assert_allclose(small.layers[0].widths[...], 0.5)
