"""Blocks of one size at random places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gaudi_jax
from gaudi_jax import GaudiLinear
from gaudi_jax.decomposition import decompose, relative_error, scatter
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


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize(
    ("budget", "rank", "cell"),
    [(0.3, 1, (1, 1)), (0.15, 1, (1, 1)), (0.3, 2, (1, 1)), (0.3, 1, (4, 4)), (0.24, 2, (8, 4))],
)
def test_a_budget_buys_as_many_blocks_of_one_size_as_there_can_be(budget, rank, cell, aware):
    n, m = SHAPE
    moment = moment_of(n) if aware else None
    found = scatter(kernel(), budget, rank=rank, granularity=cell, second_moment=moment)
    lengths = lengths_of(found)
    columns = int(budget * n * m) // rank
    assert lengths.shape[1] == min(n // rank, columns // sum(cell))
    assert (np.ptp(lengths, axis=1) <= np.array(cell) * 2).all()
    assert not (lengths % np.array(cell)[:, None]).any()
    spent = int(found.multiplications())
    assert spent == rank * lengths.sum()
    assert budget * n * m - rank * max(cell) < spent <= budget * n * m
    starts = np.asarray(found.locations)[:, : lengths.shape[1]] * np.array([[n], [m]])
    assert len(set(zip(*np.round(starts).astype(int).tolist(), strict=True))) > 0.7 * len(starts[0])


@pytest.mark.parametrize("aware", [False, True])
def test_factors_are_fitted(aware):
    moment = moment_of(SHAPE[0]) if aware else None
    found = scatter(kernel(), 0.5, second_moment=moment)
    error = float(relative_error(kernel(), found.kernel(), moment))
    drawn = found._replace(v=jnp.where(found.v == 0, 0, 1.0), u=jnp.where(found.u == 0, 0, 1.0))
    assert error < 0.75 < float(relative_error(kernel(), drawn.kernel(), moment))
    searched = decompose(kernel(), 0.5, second_moment=moment, rounds=10)
    assert float(relative_error(kernel(), searched.kernel(), moment)) < error
    if aware:  # the fit is for these inputs
        plain = scatter(kernel(), 0.5)
        assert error < float(relative_error(kernel(), plain.kernel(), moment))


def test_short_windows_begin_anywhere():
    # On 300 features weighted windows begin at 16 places; those of 10 features would leave half of
    # the inputs unread.
    for budget, places in ((0.15, 16), (0.04, 48)):
        found = scatter(kernel(0, (300, 48)), budget, second_moment=moment_of(300))
        starts = np.round(np.asarray(found.locations[0]) * 300).astype(int)
        assert 0.5 * places < len(set(starts.tolist())) <= places
        if budget == 0.04:
            assert (np.abs(found.v).sum(axis=(0, 1)) > 0).mean() > 0.65


def test_small_budgets_buy_fewer_blocks_instead_of_smaller_ones():
    for budget, rank in ((0.01, 1), (0.03, 1), (0.125, 8)):
        found = scatter(kernel(0, (64, 64)), budget, rank=rank)
        assert 0.85 * budget < int(found.multiplications()) / 64**2 <= budget


def test_places_follow_the_key():
    same, again, other = (scatter(kernel(), 0.3, key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(same.v, again.v)
    assert not np.array_equal(same.locations, other.locations)
    np.testing.assert_array_equal(same.widths, other.widths)


def test_large_budgets_are_full_blocks():
    found = scatter(kernel(), 3.0)
    assert (np.asarray(found.widths) == 1).all()
    assert float(relative_error(kernel(), found.kernel())) < 0.5


@pytest.mark.parametrize("w", [jnp.zeros(SHAPE), jnp.ones(SHAPE)])
def test_extreme_kernels(w):
    found = scatter(w, 0.5)
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    assert int(found.multiplications()) <= 0.5 * w.size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scatter(kernel(), 0.0), "budget=0.0"),
        (lambda: scatter(kernel(), 0.3, rank=33), "rank=33"),
        (lambda: scatter(kernel(), 0.3, granularity=5), "5"),
        (lambda: scatter(kernel() * jnp.nan, 0.3), "NaN"),
        (lambda: scatter(kernel()[None], 0.3), "scatter one at a time"),
        (lambda: scatter(kernel(), 0.3, second_moment=jnp.eye(3)), "second_moment of shape"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_model_is_compressed_to_scattered_blocks():
    model = nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(seed)) for seed in range(2)))
    x = jax.random.normal(jax.random.key(2), (64, 32))
    options = {"calibration": [x], "allocation": "global", "progress": False}
    small, plan = gaudi_jax.compress(model, 0.5, method="scattered", **options)
    assert plan["multiplications"] <= 0.5 * plan["dense_multiplications"]
    assert all(type(layer) is GaudiLinear for layer in small.layers)
    places = [np.asarray(layer.locations[...])[:, :8] for layer in small.layers]
    assert not np.array_equal(*places)
    empty = gaudi_jax.rebuild(model, plan)
    nnx.update(empty, nnx.state(small))
    np.testing.assert_array_equal(empty(x), small(x))
    again, _ = gaudi_jax.compress(model, 0.5, method="scattered", **options)
    np.testing.assert_array_equal(again(x), small(x))


def test_rules_mix_methods():
    model = nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(seed)) for seed in range(2)))
    rules = [
        {"pattern": "layers/0", "method": "scattered"},
        {"pattern": "layers/1", "method": "gaudi", "granularity": 4},
    ]
    small, _ = gaudi_jax.compress(model, 0.5, rules=rules, rounds=2, progress=False)
    assert [layer.granularity for layer in small.layers] == [(1, 1), (4, 4)]
    assert np.ptp(np.asarray(small.layers[0].widths[...])) * 32 <= 1.01
