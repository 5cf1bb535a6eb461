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
from gaudi_jax.decomposition import decompose, relative_error, spread, svd_factors
from gaudi_jax.decomposition.parts import least_cost, spread_windows
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


SHAPES = [(96, 96), (96, 384), (384, 96), (128, 512), (512, 128), (64, 10)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cells", [None, 8])
@pytest.mark.parametrize(("rank", "parts"), [(1, None), (4, None), (16, None), (1, 4)])
def test_blocks_of_one_size_cover_both_axes_evenly(shape, cells, rank, parts):
    cell = tuple(1 if cells is None or size % cells else size // cells for size in shape)
    if rank > min(shape):
        pytest.skip("no such blocks")
    least = least_cost(shape, cell, rank, parts)
    assert least <= rank * sum(shape)
    for cost in [least, *range(least, math.prod(shape), math.prod(shape) // 40)]:
        found = spread_windows(shape, cell, cost, rank, parts)
        assert found.blocks
        assert not found.length[:, found.blocks :].any()
        sizes = found.length[:, : found.blocks] * np.array(cell)[:, None]
        assert (np.ptp(sizes, axis=1) <= np.array(cell)).all()
        spent = np.minimum(rank * sizes.sum(axis=0), sizes.prod(axis=0)).sum()
        assert spent == found.cost <= cost
        if rank == 1 and parts is None and cost > 2 * sum(shape) and min(shape) > 32:
            assert spent > 0.965 * cost
        for axis, (start, length) in enumerate(zip(found.start, found.length, strict=True)):
            _, first, held = np.unique(start[: found.blocks], return_index=True, return_counts=True)
            assert np.ptp(held) <= 1
            assert length[first].sum() * cell[axis] == shape[axis]  # no gaps and no overlaps
            if parts:
                assert len(first) <= parts
        shares = sizes.mean(axis=1) / np.array(shape)
        if cells is None and cost > rank * sum(shape) ** 2 / 32:  # in proportion to the axes
            assert 1 / 2.3 < shares[0] / shares[1] < 2.3


@pytest.mark.parametrize("shape", [(96, 384), (128, 512)])
def test_transposed_kernels_have_transposed_sizes(shape):
    for budget in np.arange(0.05, 1, 0.05):
        cost = int(budget * math.prod(shape))
        one, other = (
            np.sort(spread_windows(size, (1, 1), cost, 1, None).length, axis=1)
            for size in (shape, shape[::-1])
        )
        np.testing.assert_array_equal(one, other[::-1])


@pytest.mark.parametrize(("rank", "parts"), [(1, 2), (2, 2), (1, 1)])
def test_columns_on_the_same_parts_are_orthogonal_and_of_equal_norms(rank, parts):
    x = kernel(0, (32, 64))
    found = spread(x, 0.5, rank=rank, parts=parts, second_moment=moment_of(32))
    start, _ = windows_of(found, (32, 64))
    for pair in set(zip(*start.tolist(), strict=True)):
        blocks = np.flatnonzero((pair == start.T).all(axis=1))
        v, u = (np.asarray(f)[blocks].reshape(-1, f.shape[-1]) for f in (found.v, found.u))
        grams = v @ v.T, u @ u.T
        np.testing.assert_allclose(grams[0], grams[1], atol=1e-4)
        np.testing.assert_allclose(grams[0], np.diag(np.diag(grams[0])), atol=1e-4)
        assert np.diag(grams[0]).min() > 1e-3


@pytest.mark.parametrize("aware", [False, True])
def test_on_one_part_they_are_the_truncated_svd(aware):
    moment = moment_of(SHAPE[0]) if aware else None
    found = spread(kernel(), 0.5, parts=1, second_moment=moment)
    left, right = svd_factors(kernel(), int(0.5 * 32 * 48 / (32 + 48)), second_moment=moment)
    np.testing.assert_allclose(found.kernel(), left.T @ right, atol=2e-3 if aware else 1e-4)


def test_a_kernel_that_few_columns_make_is_kept():
    low = kernel(0, (32, 2)) @ kernel(1, (2, 64))
    found = spread(low, 0.5, parts=2)
    assert float(relative_error(low, found.kernel())) < 1e-5
    assert bool(jnp.isfinite(found.v).all())


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(("budget", "cell"), [(0.1, (1, 1)), (0.25, (1, 1)), (0.1, (4, 16))])
def test_fewer_parts_make_fewer_and_larger_blocks(parts, budget, cell):
    found = spread(kernel(0, (32, 128)), budget, granularity=cell, parts=parts)
    start, length = windows_of(found, (32, 128))
    assert {*length[0], *length[1]} == {32 // parts, 128 // parts}
    assert len(set(zip(*start.tolist(), strict=True))) > 0.6 * min(parts**2, start.shape[1])
    assert int(found.multiplications()) > budget * 32 * 128 - 160 // parts


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


@pytest.mark.parametrize(("budget", "rank"), [(0.03, 1), (0.125, 8), (0.26, 16), (0.1, 4)])
def test_small_budgets_buy_fewer_or_smaller_blocks(budget, rank):
    found = spread(kernel(0, (64, 64)), budget, rank=rank)
    assert 0.7 * budget < int(found.multiplications()) / 64**2 <= budget
    assert (np.abs(found.kernel()).sum(axis=0) > 0).all()
    assert (np.abs(found.kernel()).sum(axis=1) > 0).all()


def correlated(n):
    """The second moment of inputs of which each is nearly the one before."""
    return 0.98 ** jnp.abs(jnp.subtract.outer(jnp.arange(n), jnp.arange(n)))


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1], (24, 24)])
def test_the_whole_budget_buys_the_kernel_itself(shape, aware):
    moment = correlated(shape[0]) if aware else None
    found = spread(kernel(0, shape), 1.5, second_moment=moment)
    assert int(found.multiplications()) == math.prod(shape)
    assert float(relative_error(kernel(0, shape), found.kernel())) < 1e-5


@pytest.mark.parametrize("cell", [(1, 1), (4, 4)])
@pytest.mark.parametrize("moment_of_inputs", [correlated, jnp.eye, moment_of])
def test_more_cost_makes_less_error(moment_of_inputs, cell):
    moment = moment_of_inputs(32)
    errors = [
        float(relative_error(kernel(), found.kernel(), moment))
        for budget in (0.125, 0.25, 0.5, 1.0)
        for found in [spread(kernel(), budget, granularity=cell, second_moment=moment)]
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.97


def test_sweeps_stop_where_they_change_little():
    moment = correlated(32)
    errors = [
        float(relative_error(kernel(), found.kernel(), moment)) ** 2
        for sweeps in (1, 200, 400)
        for found in [spread(kernel(), 0.5, second_moment=moment, sweeps=sweeps)]
    ]
    assert errors[1] == errors[2] < 0.95 * errors[0]


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
        (lambda: spread(kernel(), 0.03, parts=1), r"budget=0\.03 is less than 0\.05208, the least"),
        (lambda: spread(kernel(), 0.3, parts=2.5), "parts=2.5"),
        (lambda: spread(kernel(), 0.3, sweeps=0), "sweeps=0"),
        (lambda: spread(kernel() * jnp.nan, 0.3), "NaN"),
        (lambda: spread(kernel()[None], 0.3), "one at a time"),
        (
            lambda: spread(kernel(), 0.3, second_moment=2 * jnp.ones((32, 32)) - jnp.eye(32)),
            "negative eigenvalues",
        ),
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


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_budgets_that_buy_no_block_are_named(allocation):
    model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"budget=0\.05 .*is less than 0\.0625"):
        gaudi_jax.compress(model, 0.05, method="spread", blocks=1, allocation=allocation)


def test_rules_mix_methods():
    model = nnx.Sequential(*(nnx.Linear(32, 32, rngs=nnx.Rngs(seed)) for seed in range(2)))
    rules = [
        {"pattern": "layers/0", "method": "spread", "blocks": 2},
        {"pattern": "layers/1", "method": "gaudi", "granularity": 4},
    ]
    small, _ = gaudi_jax.compress(model, 0.5, rules=rules, rounds=2, progress=False)
    assert [layer.granularity for layer in small.layers] == [(1, 1), (4, 4)]
    np.testing.assert_allclose(small.layers[0].widths[...], 0.5)
