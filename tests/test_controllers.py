"""Width controllers and schedules."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gaudi_jax import gaudi_adamw
from gaudi_jax.errors import UserError
from gaudi_jax.masks import block_multiplications
from gaudi_jax.training import controllers
from gaudi_jax.training.optim import layer_sizes
from gaudi_jax.training.schedules import annealed_sigma, falling_budget, warmup_cosine
from gaudi_jax.training.step import split_model
from tests.structured_net import fresh_net, loss, set_random_widths, step_with_zero_gradients

GOLDEN = np.load(Path(__file__).parent / "data" / "golden" / "proximal.npz")


@pytest.fixture
def net():
    return fresh_net()


def apply_to_widths(controller, widths):
    tx = controller({("layer",): controllers.LayerSize(1, (64, 64), (1, 1))})
    params = {"layer": {"widths": jnp.asarray(widths)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    return optax.apply_updates(params, updates)["layer"]["widths"]


def test_one_step_of_each_controller_agrees_with_the_published_implementation():
    widths, target = GOLDEN["widths"], float(GOLDEN["mean_target"])
    mean = controllers.mean_active_width([jnp.asarray(widths)])
    np.testing.assert_allclose(mean, GOLDEN["active_mean"], atol=1e-6)

    def threshold(target, **options):
        strength = float(GOLDEN["lam"]) * 100  # times the learning rate: lam
        return controllers.threshold_controller(
            strength, target, structural_learning_rate=lambda step: 0.01, **options
        )

    np.testing.assert_allclose(
        apply_to_widths(threshold(target), widths), GOLDEN["soft"], atol=1e-5
    )
    # Not while the mean is below the target, nor before the start.
    np.testing.assert_array_equal(apply_to_widths(threshold(0.9), widths), widths)
    np.testing.assert_array_equal(apply_to_widths(threshold(target, start_step=1), widths), widths)
    shrunk = apply_to_widths(controllers.mean_controller(target), widths)
    np.testing.assert_allclose(shrunk, GOLDEN["mean_shrunk"], atol=1e-5)
    np.testing.assert_array_equal(apply_to_widths(controllers.mean_controller(0.9), widths), widths)
    tx = controllers.wrap_locations()
    locations = jnp.asarray(GOLDEN["locations"])
    updates, _ = tx.update(jnp.zeros_like(locations), tx.init(locations), locations)
    np.testing.assert_allclose(locations + updates, GOLDEN["loc"], atol=1e-5)


def multiplications(layer, threshold):
    """Counted anew in numpy, after soft-thresholding the widths by (2, 1) thresholds."""
    widths = np.clip(np.asarray(layer.widths[...]) - threshold, 0, 1)
    sizes = zip(widths, (layer.in_features, layer.out_features), layer.granularity, strict=True)
    a, b = (np.round(w * np.float32(n / g)) * g for w, n, g in sizes)
    return np.minimum(layer.rank * (a + b), a * b).sum()


@pytest.mark.parametrize("price_by_axis", [True, False])
@pytest.mark.parametrize("target", [0.1, 0.4])
def test_budget_is_met_by_the_smallest_threshold(net, price_by_axis, target):
    set_random_widths(net)
    layers = (net.first, net.second)
    prices = [
        layer.rank * np.array([[layer.in_features], [layer.out_features]], float)
        if price_by_axis
        else np.ones((2, 1))
        for layer in layers
    ]
    mean_price = np.mean([price.mean() for price in prices])
    dense = sum(layer.in_features * layer.out_features for layer in layers)

    def cost(tau):
        pairs = zip(layers, prices, strict=True)
        return sum(multiplications(layer, tau * price / mean_price) for layer, price in pairs)

    assert cost(0.0) > target * dense
    scan = np.linspace(0, 2, 4001)
    smallest = next(tau for tau in scan if cost(tau) <= target * dense)
    controller = controllers.budget_controller(target, price_by_axis=price_by_axis)
    tx = gaudi_adamw(net, learning_rate=0.0, structural_learning_rate=0.0, controller=controller)
    before = [np.asarray(layer.widths[...]) for layer in layers]
    nnx.update(net, step_with_zero_gradients(net, tx))
    assert sum(float(layer.multiplications()) for layer in layers) <= target * dense
    for layer, old, price in zip(layers, before, prices, strict=True):
        expected = np.clip(old - smallest * price / mean_price, 0, 1)
        slack = 5e-4 * price.max() / mean_price + 1e-5  # a step of the scan
        np.testing.assert_allclose(layer.widths[...], expected, atol=slack)


def test_layers_keep_their_floor_and_a_model_under_budget_is_left_alone(net):
    set_random_widths(net)
    layers = (net.first, net.second)
    dense = [layer.in_features * layer.out_features for layer in layers]
    start = [float(layer.multiplications()) for layer in layers]

    def after(target, floor=0.0):
        model = nnx.clone(net)
        controller = controllers.budget_controller(target, floor=floor)
        tx = gaudi_adamw(
            net, learning_rate=0.0, structural_learning_rate=0.0, controller=controller
        )
        nnx.update(model, step_with_zero_gradients(net, tx))
        return [float(layer.multiplications()) for layer in (model.first, model.second)]

    for cost, own, full in zip(after(0.3, floor=0.25), start, dense, strict=True):
        assert cost >= min(0.25 * full, own)
    free = after(0.3)
    assert min(c / d for c, d in zip(free, dense, strict=True)) < 0.25  # the floor did something
    assert after(1.0) == start


def test_the_budget_follows_its_schedule(net):
    target = falling_budget(0.2, first_step=0, last_step=4)
    tx = gaudi_adamw(
        net,
        learning_rate=1e-3,
        structural_learning_rate=1e-2,
        controller=controllers.budget_controller(target),
    )
    graphdef, params, other = split_model(net)
    dense = sum(n.features[0] * n.features[1] for n in layer_sizes(net).values())
    traces = []

    @jax.jit
    def step(params, opt_state):
        traces.append(1)
        gradients = jax.grad(lambda p: loss(nnx.merge(graphdef, p, other)))(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        model = nnx.merge(graphdef, params, other)
        return params, opt_state, model.first.multiplications() + model.second.multiplications()

    opt_state = tx.init(params)
    for count in range(6):
        params, opt_state, cost = step(params, opt_state)
        assert float(cost) <= float(target(count)) * dense + 1e-3
    assert len(traces) == 1


def test_the_budget_is_kept_even_where_floors_in_whole_cells_cost_more():
    # One block of one cell a side is the least that a floor can leave: a quarter of the layer.
    sizes = {
        ("a",): controllers.LayerSize(1, (8, 8), (8, 8)),
        ("b",): controllers.LayerSize(1, (8, 8), (1, 1)),
    }
    controller = controllers.budget_controller(0.2, floor=0.15)(sizes)
    params = {name: {"widths": jnp.ones((2, 8))} for name in "ab"}
    updates, _ = controller.update(
        jax.tree.map(jnp.zeros_like, params), controller.init(params), params
    )
    widths = jax.tree.map(jnp.add, params, updates)
    cost = sum(
        float(block_multiplications(widths[n]["widths"], 8, 8, granularity=s.granularity).sum())
        for n, s in zip("ab", sizes.values(), strict=True)
    )
    assert cost <= 0.2 * 128


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: controllers.mean_controller(0.0), r"target 0.0 is outside \(0, 1\]"),
        (lambda: controllers.budget_controller(1.5), r"target 1.5 is outside \(0, 1\]"),
        (lambda: controllers.budget_controller(0.2, floor=0.3), "floor 0.3"),
        (
            lambda: controllers.threshold_controller(-1, 0.5, structural_learning_rate=1.0),
            "strength -1",
        ),
        (lambda: falling_budget(0.0, first_step=0, last_step=1), "target 0.0"),
        (lambda: falling_budget(0.5, first_step=3, last_step=3), "not 3 and 3"),
        (lambda: warmup_cosine(1.0, warmup_steps=5, total_steps=5), "warmup_steps=5"),
        (lambda: annealed_sigma(0.0, 1.0, first_step=0, last_step=1), "must be positive"),
        (lambda: annealed_sigma(1.0, np.inf, first_step=0, last_step=1), "make both infinite"),
    ],
)
def test_bad_numbers_are_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_infinite_sigma_is_constant():
    sigma = annealed_sigma(np.inf, np.inf, first_step=0, last_step=10)
    assert np.isinf(sigma(0))
    assert np.isinf(sigma(20))
