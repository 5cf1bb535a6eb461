"""Decomposition of kernels under a budget: measured matrices, exact budgets, structure, errors."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gaudi_jax import GaudiLinear, decompose
from gaudi_jax.decomposition import relative_error, svd_factors
from gaudi_jax.decomposition.axes import PlainAxis, WeightedAxis
from gaudi_jax.decomposition.decompose import affordable
from gaudi_jax.decomposition.pursuit import add_blocks
from gaudi_jax.decomposition.search import weighed_error
from gaudi_jax.decomposition.sweeps import Axes, Blocks, sweep
from gaudi_jax.decomposition.windows import best_windows
from gaudi_jax.errors import UserError

GOLDEN = Path(__file__).parent / "data" / "golden"
#: One shape for most tests, so that they share compiled functions.
SHAPE, ROUNDS = (32, 24), 12


def kernel(seed: int = 0, shape: tuple[int, int] = SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def second_moment(seed: int = 1, n: int = SHAPE[0], samples: int = 100) -> jax.Array:
    x = jax.random.normal(jax.random.key(seed), (samples, n)) * jnp.linspace(0.1, 3, n)
    x = x + 2 * x[:, :1]
    return x.T @ x / samples


def svd_error(w: jax.Array, budget: float, moment: jax.Array | None = None) -> float:
    n, m = w.shape
    left, right = svd_factors(w, int(budget * n * m / (n + m)), second_moment=moment)
    return float(relative_error(w, left.T @ right, moment))


def assert_on_intervals(factors, granularity: int) -> None:
    """Factors vanish outside the intervals, and the intervals lie on the grid."""
    for axis, x in enumerate((factors.v, factors.u)):
        n = x.shape[-1]
        cells = n // granularity
        for scaled in (factors.widths[axis] * cells, factors.locations[axis] * cells):
            np.testing.assert_allclose(scaled, np.round(scaled), atol=1e-4)
        start = np.round(factors.locations[axis] * cells).astype(int) * granularity
        length = np.round(factors.widths[axis] * cells).astype(int) * granularity
        outside = (np.arange(n) - start[:, None]) % n >= length[:, None]
        assert not np.asarray(x)[np.broadcast_to(outside[:, None], x.shape)].any()


# ---------------------------------------------------------------- measured matrices


@pytest.mark.parametrize(
    "name",
    [
        *("olb_blocks_128x128", "olb_decay_192x96", "olb_gauss_128x128", "olb_tight_128"),
        pytest.param("olb_blocks_256x384", marks=pytest.mark.slow),
        pytest.param("olb_tight_256x384", marks=pytest.mark.slow),
    ],
)
def test_measured_matrices(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    w, budget = jnp.asarray(golden["M"].T, jnp.float32), float(golden["budget"])
    factors = decompose(w, (budget + 0.5) / w.size)
    error = float(relative_error(w, factors.kernel()))
    assert int(factors.multiplications()) <= budget
    references = [float(golden[key]) for key in golden.files if key.startswith("nrmse_")]
    assert len(references) >= 2  # truncated SVD and the published method
    assert error <= min(references)
    if "tight" in name:
        assert error <= 0.035


# ---------------------------------------------------------------- budget, structure, determinism


@pytest.mark.parametrize("budget", [0.01, 0.137, 0.5, 1.2, 3.0])
def test_budget_holds_and_svd_is_never_better(budget):
    w = kernel()
    factors = decompose(w, budget, rounds=ROUNDS)
    assert int(factors.multiplications()) <= budget * w.size
    assert float(relative_error(w, factors.kernel())) <= svd_error(w, budget) + 1e-6
    assert_on_intervals(factors, 1)


def test_layer_of_the_factors_is_the_same_matrix_at_the_same_cost():
    w = kernel()
    factors = decompose(w, 0.5, rounds=ROUNDS)
    layer = GaudiLinear.from_blocks(*factors)
    layer.eval()
    np.testing.assert_allclose(layer.kernel(), factors.kernel(), atol=1e-5)
    assert int(layer.multiplications()) == int(factors.multiplications())
    used = np.asarray(factors.widths[0] > 0)
    assert used[: used.sum()].all()  # those in use come first


@pytest.mark.parametrize(("rank", "granularity"), [(1, 4), (3, 4)])
def test_rank_and_grid(rank, granularity):
    w = kernel()
    factors = decompose(w, 0.5, rank=rank, granularity=granularity, rounds=ROUNDS)
    assert factors.v.shape == (24 // rank, rank, 32)
    assert int(factors.multiplications()) <= 0.5 * w.size
    # Blocks come in whole multiples of the rank, so the SVD of that many columns is the rival.
    columns = int(0.5 * w.size / sum(w.shape)) // rank * rank
    left, right = svd_factors(w, columns)
    assert float(relative_error(w, factors.kernel())) <= relative_error(w, left.T @ right) + 1e-6
    assert_on_intervals(factors, granularity)


@pytest.mark.parametrize(
    ("rank", "granularity", "moment"),
    [
        (1, 1, None),
        pytest.param(8, 8, None, marks=pytest.mark.slow),
        pytest.param(8, 1, second_moment(), marks=pytest.mark.slow),
    ],
)
def test_small_budgets_are_used(rank, granularity, moment):
    smooth = jnp.outer(jnp.linspace(1, 2, 32), jnp.linspace(2, 1, 24))
    for w in (kernel(), jnp.ones(SHAPE), smooth):
        errors = []
        # From a single block of a few cells to several of full width; such a block costs 56 rank.
        for cost in (130, 300, 440, 700):
            factors = decompose(
                w,
                (cost + 0.5) / w.size,
                rank=rank,
                granularity=granularity,
                second_moment=moment,
                rounds=ROUNDS,
            )
            assert int(factors.multiplications()) <= cost
            errors.append(float(relative_error(w, factors.kernel(), moment)))
        assert errors[0] < 0.995
        assert all(np.diff(errors) < 0.02)


def test_many_parallel_columns():
    w = kernel()[:, :2] @ kernel(1)[:2]
    factors = decompose(w + 1e-7 * kernel(2), 1.5, rank=8, granularity=8, rounds=ROUNDS)
    assert float(relative_error(w, factors.kernel())) < 1e-3


def test_planted_aligned_blocks_are_found():
    r = np.random.default_rng(0)
    w = np.zeros(SHAPE)
    w[4:12, 8:20] = np.outer(r.normal(size=8), r.normal(size=12))
    w[28:, :4] = np.outer(r.normal(size=4), r.normal(size=4))
    w[:4, :4] = np.outer(r.normal(size=4), w[28, :4])  # goes on round the end of the input axis
    budget = 34 / w.size  # 8 + 12 and 8 + 4 multiplications are needed
    factors = decompose(jnp.asarray(w), budget, granularity=4)
    assert float(relative_error(w, factors.kernel())) < 1e-5


def test_deterministic_and_batched():
    stack = jnp.stack([kernel(0), kernel(1)])
    budgets = np.array([0.5, 0.3])
    together = decompose(stack, budgets, rounds=ROUNDS)
    for i in range(2):
        alone, again = (decompose(stack[i], budgets[i], rounds=ROUNDS) for _ in range(2))
        for x, y in zip(alone, again, strict=True):
            np.testing.assert_array_equal(x, y)
        # Another program may round otherwise, so that the search may end elsewhere.
        errors = [
            float(relative_error(stack[i], k)) for k in (alone.kernel(), together.kernel()[i])
        ]
        assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert (together.multiplications() <= budgets * kernel().size).all()
    assert (together.multiplications() > 0.95 * budgets * kernel().size).all()


def test_batches_of_batches_and_accelerators(monkeypatch):
    stack = jnp.stack([kernel(0), kernel(1)])[None]
    moments = jnp.broadcast_to(jnp.eye(SHAPE[0]), (1, 2, SHAPE[0], SHAPE[0]))

    def shapes():
        return jax.eval_shape(lambda: decompose(stack, 0.5, second_moment=moments, rounds=ROUNDS))

    one_by_one = shapes()
    # As a program alone: batches of linear algebra can wait for ever on a CPU.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert shapes() == one_by_one
    assert one_by_one.v.shape == (1, 2, min(SHAPE), 1, SHAPE[0])


@pytest.mark.parametrize("w", [jnp.zeros(SHAPE), jnp.ones(SHAPE)])
def test_extreme_kernels(w):
    factors = decompose(w, 0.5, rounds=ROUNDS)
    assert all(bool(jnp.isfinite(x).all()) for x in factors)
    assert int(factors.multiplications()) <= 0.5 * w.size
    assert float(jnp.abs(w - factors.kernel()).max()) < 1e-4


@pytest.mark.parametrize("exponent", [-70, 60])
def test_the_unit_of_a_kernel_does_not_matter(exponent):
    plain = decompose(kernel(), 0.5, rounds=ROUNDS)
    scale = 2.0**exponent
    scaled = jax.jit(lambda w: decompose(w, 0.5, rounds=ROUNDS))(scale * kernel())
    np.testing.assert_allclose(scaled.kernel() / scale, plain.kernel(), atol=1e-4)
    assert (scaled.widths == plain.widths).all()


def test_budgets_are_not_lost_to_binary_fractions():
    assert 0.29 * 100 < 29  # and yet that budget affords 29 multiplications
    assert affordable(0.29, 100) == 29


@pytest.mark.parametrize("shape", [(1, 7), (5, 1)])
def test_vectors(shape):
    w = kernel(0, shape)
    factors = decompose(w, 2.0, rounds=2)
    np.testing.assert_allclose(factors.kernel(), w, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- second moments


@pytest.mark.parametrize("granularity", [1, 4])
def test_weighted_search_beats_whitened_svd_and_the_plain_search(granularity):
    w, moment = kernel(), second_moment()
    options = {"granularity": granularity, "rounds": ROUNDS}
    factors = decompose(w, 0.4, second_moment=moment, **options)
    assert int(factors.multiplications()) <= 0.4 * w.size
    assert_on_intervals(factors, granularity)
    error = float(relative_error(w, factors.kernel(), moment))
    plain = decompose(w, 0.4, **options)
    assert error <= svd_error(w, 0.4, moment) + 1e-5
    assert error < 0.9 * float(relative_error(w, plain.kernel(), moment))


@pytest.mark.parametrize("samples", [0, 3])
def test_second_moment_without_an_inverse(samples):
    moment = second_moment(samples=3) if samples else jnp.zeros((32, 32))
    factors = decompose(kernel(), 0.4, second_moment=moment, rounds=ROUNDS)
    assert all(bool(jnp.isfinite(x).all()) for x in factors)
    if samples:  # three directions of the inputs: three columns reproduce the outputs
        assert float(relative_error(kernel(), factors.kernel(), moment)) < 0.01


def test_whitened_svd_is_the_best_of_its_rank():
    w, moment = kernel(), second_moment()
    left, right = svd_factors(w, 5, second_moment=moment)
    values, vectors = np.linalg.eigh(moment)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    singular = np.linalg.svd(root @ w, compute_uv=False)
    expected = np.sqrt((singular[5:] ** 2).sum() / (singular**2).sum())
    # The ridge that makes the moment invertible costs a little.
    assert float(relative_error(w, left.T @ right, moment)) == pytest.approx(expected, rel=1e-2)


# ---------------------------------------------------------------- parts of the search


@settings(max_examples=100, deadline=None)
@given(arrays(np.int32, st.sampled_from([1, 2, 5, 8]), elements=st.integers(-9, 9)))
def test_best_window_by_brute_force(gains):
    n = len(gains)
    sums = {
        (start, length): sum(gains[(start + i) % n] for i in range(length))
        for start in range(n)
        for length in range(n + 1)
    }
    value, start, length = best_windows(jnp.asarray(gains, jnp.float32))
    assert float(value) == max(sums.values())
    assert sums[int(start), int(length)] == float(value)


def test_weighted_fit_is_least_squares_on_the_best_of_all_lengths():
    n, cells, price = 12, 4, 0.05
    moment = second_moment(n=n)
    axis = WeightedAxis.of(moment, cells)
    h = jax.random.normal(jax.random.key(3), (1, n))
    fit = axis.fit(h, jnp.array(1), price)
    values, factors = [], []
    for length in range(1, cells + 1):
        inside = (np.arange(length * 3) + 3 * int(axis.starts[1])) % n
        x = np.zeros(n)
        x[inside] = np.linalg.solve(np.asarray(moment)[np.ix_(inside, inside)], h[0, inside])
        values.append(h[0] @ x - price * 3 * length)
        factors.append(x)
    best = int(np.argmax(values))
    assert int(fit.length) == best + 1
    assert float(fit.value) == pytest.approx(float(values[best]), rel=1e-3)
    np.testing.assert_allclose(fit.factor[0], factors[best], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sweep_never_raises_the_goal(weighted):
    (n, m), price = SHAPE, 0.3
    w = kernel()
    moment = second_moment() if weighted else jnp.eye(n)
    first = WeightedAxis.of(moment, n) if weighted else PlainAxis(n, 1)
    axes = Axes(first, PlainAxis(m, 1))
    empty = Blocks.empty(8, 1, SHAPE)
    error = weighed_error(w, empty, axes)
    blocks, count = add_blocks(
        jax.random.key(0), error, empty, jnp.int32(0), jnp.float32(price), axes, 8
    )
    assert int(count) > 1

    def goal(blocks):
        rest = w - blocks.kernel()
        cost = price * axes.multiplications(blocks.length, 1)
        return float((rest * (moment @ rest)).sum() + cost)

    goals = [goal(empty)]
    for seek in (True, True, False, True):
        before = blocks.start[0]
        error, blocks = sweep(error, blocks, count, price, axes, seek_anchors=seek)
        if weighted and not seek:
            kept = blocks.live
            np.testing.assert_array_equal(blocks.start[0][kept], before[kept])
        goals.append(goal(blocks))
        np.testing.assert_allclose(error, weighed_error(w, blocks, axes), atol=1e-3)
    assert goals[1] < goals[0]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(goals))


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.0}, "budget=0.0 .* at least"),
        ({"budget": -1.0}, "budget=-1.0"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"budget": 0.02, "granularity": 8}, "one block"),
        ({"granularity": 5}, "granularity 5 does not divide"),
        ({"granularity": 2.5}, "granularity=2.5"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 25}, "rank=25"),
        ({"rounds": 0}, "rounds=0"),
        ({"kernel": jnp.ones(3)}, "no matrix"),
        ({"budget": [0.5, 0.3]}, r"budget of shape \(2,\)"),
        ({"second_moment": -jnp.eye(32)}, "no E"),
        ({"second_moment": jnp.eye(32).at[0, 1].set(1.0)}, "not symmetric"),
        ({"kernel": kernel() * 1j}, "must be real"),
        ({"kernel": kernel().at[1, 2].set(jnp.nan)}, "NaN"),
        ({"second_moment": jnp.eye(3)}, "second_moment of shape"),
        ({"second_moment": jnp.full((32, 32), jnp.inf)}, "infinity"),
    ],
)
def test_mistakes(change, message):
    options = {"kernel": kernel(), "budget": 0.5} | change
    with pytest.raises(UserError, match=message):
        decompose(options.pop("kernel"), options.pop("budget"), **options)
