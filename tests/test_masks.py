import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_jax import masks
from gaudi_jax.errors import UserError

SIGMAS = (1.0, 37.0, float("inf"))


def random_intervals(n, blocks=24, seed=0):
    rng = np.random.default_rng(seed)
    widths = rng.uniform(0, 1, blocks).astype(np.float32)
    widths[:3] = 0.0, 1.0, 1 / n
    locations = rng.uniform(0, 1, blocks).astype(np.float32)
    return jnp.array(widths), jnp.array(locations)


def brute_force_boxcar(widths, locations, n, granularity=1):
    mask = np.zeros((len(widths), n))
    cells = n // granularity
    for row, (w, l) in enumerate(zip(np.asarray(widths), np.asarray(locations), strict=True)):  # noqa: E741
        start = int(np.round(np.float32(l * np.float32(cells)))) * granularity
        for j in range(int(np.round(np.float32(w * np.float32(cells)))) * granularity):
            mask[row, (start + j) % n] = 1
    return mask


@pytest.mark.parametrize("n", [64, 65, 768])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_table_equals_fft(n, sigma):
    widths, locations = random_intervals(n)
    cotangent = jax.random.normal(jax.random.key(0), (len(widths), n))

    def weighted_sum(w, l, method):  # noqa: E741
        mask = masks.gaudi_mask(w, l, n, sigma=sigma, method=method)
        return (mask * cotangent).sum(), mask

    results = {}
    for method in ("fft", "table"):
        results[method] = jax.value_and_grad(weighted_sum, (0, 1), has_aux=True)(
            widths, locations, method
        )
    (_, fft_mask), fft_gradients = results["fft"]
    (_, table_mask), table_gradients = results["table"]
    np.testing.assert_allclose(table_mask, fft_mask, atol=1e-5)
    for table, fft in zip(table_gradients, fft_gradients, strict=True):
        assert np.linalg.norm(table - fft) <= 1e-4 * np.linalg.norm(fft)


@pytest.mark.parametrize("method", ["fft", "table"])
@pytest.mark.parametrize("granularity", [1, 8])
def test_infinite_sigma_is_the_boxcar(method, granularity):
    widths, locations = random_intervals(48)
    expected = brute_force_boxcar(widths, locations, 48, granularity)
    soft = masks.gaudi_mask(widths, locations, 48, granularity=granularity, method=method)
    hard = masks.hard_mask(widths, locations, 48, granularity=granularity)
    np.testing.assert_allclose(soft, expected, atol=1e-5)
    np.testing.assert_array_equal(hard, expected)


def test_auto_takes_the_table_only_on_the_grid():
    widths, locations = random_intervals(32)

    def uses_fft(**options):
        # The table form transforms vectors, the FFT form one row a block.
        jaxpr = jax.make_jaxpr(lambda w, l: masks.gaudi_mask(w, l, 32, **options))  # noqa: E741
        return f"c64[{len(widths)},17]" in str(jaxpr(widths, locations))

    assert not uses_fft()
    assert uses_fft(method="fft")
    assert uses_fft(round_to_grid=False)


@pytest.mark.parametrize("sigma", [2.0, 10.0])
def test_gradient_of_unrounded_mask_equals_finite_differences(sigma):
    widths, locations = jnp.array([0.3, 0.71]), jnp.array([0.2, 0.9])
    cotangent = jax.random.normal(jax.random.key(1), (2, 64))

    def weighted_sum(w, l):  # noqa: E741
        return (masks.gaudi_mask(w, l, 64, sigma=sigma, round_to_grid=False) * cotangent).sum()

    gradients = jax.grad(weighted_sum, (0, 1))(widths, locations)
    step = 1e-3
    for axis, gradient in enumerate(gradients):
        for block in range(2):
            shift = jnp.zeros(2).at[block].set(step)
            ends = [
                weighted_sum(*(p + s * shift if i == axis else p for i, p in enumerate(point)))
                for s, point in ((1, (widths, locations)), (-1, (widths, locations)))
            ]
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(gradient[block], slope, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["fft", "table"])
def test_backward_smoothing_leaves_the_mask_and_smooths_its_derivative(method):
    n, granularity, smoothing = 64, 4, 1.5
    widths, locations = random_intervals(n)

    def mask(w, l, **options):  # noqa: E741
        return masks.gaudi_mask(w, l, n, granularity=granularity, method=method, **options)

    np.testing.assert_allclose(
        mask(widths, locations, backward_smoothing=smoothing), mask(widths, locations), atol=1e-5
    )
    # The derivative of every place j, smoothed over the axis by the Gaussian itself.
    sharp = jax.jacrev(mask)(widths, locations)
    smooth = jax.jacrev(lambda w, l: mask(w, l, backward_smoothing=smoothing))(widths, locations)  # noqa: E741
    distance = np.minimum(np.arange(n), n - np.arange(n))
    kernel = np.exp(-0.5 * (distance / (smoothing * granularity)) ** 2)
    spectrum = np.fft.rfft(kernel / kernel.sum())
    for block in range(len(widths)):
        expected = np.fft.irfft(np.fft.rfft(sharp[block, :, block]) * spectrum, n)
        np.testing.assert_allclose(smooth[block, :, block], expected, atol=2e-3)


def test_sigma_may_be_traced_without_recompiling():
    widths, locations = random_intervals(32)
    traces = []

    @jax.jit
    def mask(sigma):
        traces.append(sigma)
        return masks.gaudi_mask(widths, locations, 32, sigma=sigma)

    for sigma in SIGMAS:
        expected = masks.gaudi_mask(widths, locations, 32, sigma=sigma)
        np.testing.assert_allclose(mask(jnp.float32(sigma)), expected, atol=1e-6)
    assert len(traces) == 1


def test_bfloat16_keeps_its_dtype_and_is_computed_in_float32():
    widths = jnp.array([0.25, 0.5], jnp.bfloat16)
    locations = jnp.array([0.5, 0.75], jnp.bfloat16)
    mask = masks.gaudi_mask(widths, locations, 64, sigma=5.0)
    exact = masks.gaudi_mask(
        widths.astype(jnp.float32), locations.astype(jnp.float32), 64, sigma=5.0
    )
    assert mask.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mask, exact.astype(jnp.bfloat16))
    gradient = jax.grad(lambda w: masks.gaudi_mask(w, locations, 64).sum())(widths)
    assert gradient.dtype == jnp.bfloat16


@settings(max_examples=60, deadline=None)
@given(
    cells=st.sampled_from([1, 2, 9, 12]),  # few sizes: each is compiled
    granularity=st.sampled_from([1, 4]),
    width=st.floats(0, 1, width=32),
    location=st.floats(-1, 2, width=32),
)
def test_any_interval_has_its_rounded_length(cells, granularity, width, location):
    n = cells * granularity
    widths, locations = jnp.array([width]), jnp.array([location])
    mask = masks.gaudi_mask(widths, locations, n, granularity=granularity)
    starts, lengths = masks.intervals(widths, locations, n, granularity=granularity)
    assert round(float(mask.sum())) == int(lengths[0])
    assert int(lengths[0]) % granularity == 0
    assert 0 <= int(starts[0]) < n
    np.testing.assert_allclose(
        mask, masks.hard_mask(widths, locations, n, granularity=granularity), atol=1e-5
    )


def test_block_multiplications_counts_the_nonzeros_of_hard_masks():
    widths = jnp.stack([random_intervals(24, seed=1)[0], random_intervals(36, seed=2)[0]])
    zeros = jnp.zeros(widths.shape[1])
    a = masks.hard_mask(widths[0], zeros, 24, granularity=2).sum(axis=1)
    b = masks.hard_mask(widths[1], zeros, 36, granularity=3).sum(axis=1)
    expected = [min(3 * (x + y), x * y) for x, y in zip(a, b, strict=True)]
    counted = masks.block_multiplications(widths, 24, 36, rank=3, granularity=(2, 3))
    np.testing.assert_array_equal(counted, expected)
    assert 0 in expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": 5}, "5 does not divide the axis length 32"),
        ({"granularity": 0}, "0 does not divide"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"backward_smoothing": -1.0}, "backward_smoothing=-1.0"),
        ({"method": "direct"}, "'direct'"),
        ({"method": "table", "round_to_grid": False}, "method='fft'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        masks.gaudi_mask(jnp.ones(2), jnp.ones(2), 32, **options)


def test_mismatched_shapes_are_named():
    with pytest.raises(UserError, match=r"\(2,\).*\(3,\)"):
        masks.hard_mask(jnp.ones(2), jnp.ones(3), 8)
