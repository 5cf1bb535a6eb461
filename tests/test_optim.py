import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from gaudi_jax import GaudiLinear, gaudi_adamw
from gaudi_jax.errors import UserError
from gaudi_jax.layers import Location, Width
from gaudi_jax.masks import block_multiplications
from gaudi_jax.training import controllers
from gaudi_jax.training.optim import layer_sizes
from gaudi_jax.training.schedules import annealed_sigma, falling_budget, warmup_cosine
from gaudi_jax.training.step import split_model

GOLDEN = np.load(Path(__file__).parent / "data" / "golden" / "proximal.npz")


class Net(nnx.Module):
    """Structured layers of different sizes, ranks and grids, beside ordinary ones."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 24, rngs=rngs)
        self.first = GaudiLinear(24, 16, backward_smoothing=1.0, rngs=rngs)
        self.second = GaudiLinear(16, 48, rank=2, granularity=(4, 8), rngs=rngs)
        self.norm = nnx.LayerNorm(48, rngs=rngs)
        self.head = nnx.Linear(48, 4, rngs=rngs)

    def __call__(self, tokens):
        x = nnx.gelu(self.first(self.embed(tokens)))
        return self.head(self.norm(self.second(x)))


built = functools.cache(lambda: Net(nnx.Rngs(0)))
TOKENS = jnp.arange(5)


@pytest.fixture
def net():
    return nnx.clone(built())


def loss(model):
    return (model(TOKENS) ** 2).sum()


def set_random_widths(model, seed=0):
    rng = np.random.default_rng(seed)
    for layer in (model.first, model.second):
        widths = rng.uniform(0, 1, layer.widths.shape).astype(np.float32)
        widths[0, ::4] = 0
        layer.widths[...] = jnp.asarray(widths)


def step_with_zero_gradients(model, tx):
    """Applies one step and returns the new parameters; the model is left as it is."""
    _, params, _ = split_model(model)
    zeros = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params):
        updates, _ = tx.update(zeros, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step(params)


def apply_to_widths(controller, widths):
    tx = controller({("layer",): controllers.LayerSize(1, (64, 64), (1, 1))})
    params = {"layer": {"widths": jnp.asarray(widths)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    return optax.apply_updates(params, updates)["layer"]["widths"]


# ---- controllers ----


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


# ---- the optimizer ----


def flat(tree):
    return {
        controllers.names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_only_kernels_and_factors_decay(net):
    set_random_widths(net)
    net.first.bias[...] = jnp.ones(16)
    tx = gaudi_adamw(net, learning_rate=0.1, structural_learning_rate=0.1, weight_decay=0.5)
    before, after = flat(split_model(net)[1]), flat(step_with_zero_gradients(net, tx))
    decayed = {path for path, value in before.items() if not np.array_equal(after[path], value)}
    assert decayed == {
        ("first", "u"), ("first", "v"), ("second", "u"), ("second", "v"), ("head", "kernel")
    }  # fmt: skip
    for path in decayed:
        np.testing.assert_allclose(after[path], (1 - 0.1 * 0.5) * before[path], rtol=1e-5)


def test_nnx_optimizer_and_nested_dicts_give_the_same(net):
    def make(model):
        return gaudi_adamw(
            model,
            learning_rate=1e-2,
            structural_learning_rate=1e-2,
            clip_norm=1.0,
            controller=controllers.budget_controller(0.3),
        )

    graphdef, params, other = split_model(net)
    tx = make(net)

    @jax.jit
    def step(params):
        gradients = jax.grad(lambda p: loss(nnx.merge(graphdef, p, other)))(params)
        return optax.apply_updates(params, tx.update(gradients, tx.init(params), params)[0])

    expected = flat(step(params))
    optimizer = nnx.Optimizer(net, make(net), wrt=nnx.Param)
    nnx.jit(lambda optimizer, net: optimizer.update(net, nnx.grad(loss)(net)))(optimizer, net)
    for path, value in flat(split_model(net)[1]).items():
        np.testing.assert_allclose(value, expected[path], atol=1e-6)


@pytest.mark.parametrize("layer_moment", [False, True])
def test_each_group_follows_its_own_formula(layer_moment):
    """Three steps with given gradients against Adam written out."""
    model = GaudiLinear(8, 8, rngs=nnx.Rngs(0))
    model.widths[...] = jnp.full((2, 8), 0.5)
    model.locations[...] = jnp.full((2, 8), 0.5)
    tx = gaudi_adamw(
        model,
        learning_rate=1e-2,
        structural_learning_rate=2e-3,
        location_learning_rate=1e-3,
        weight_decay=0.1,
        layer_moment=layer_moment,
    )
    _, params, _ = split_model(model)
    rng = np.random.default_rng(0)
    gradients = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        for _ in range(3)
    ]
    update = jax.jit(tx.update)
    state, current = tx.init(params), params
    for gradient in gradients:
        updates, state = update(gradient, state, current)
        current = optax.apply_updates(current, updates)

    def adam(name, lr, b1, decay, shared=False):
        value, m, v = np.asarray(params[name], np.float64), 0.0, 0.0
        for t, gradient in enumerate(gradients, start=1):
            g = np.asarray(gradient[name], np.float64)
            m = b1 * m + (1 - b1) * g
            v = 0.999 * v + 0.001 * (np.mean(g**2) if shared else g**2)
            direction = m / (1 - b1**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            value = value - lr * (direction + decay * value)
        return value

    expected = {
        "v": adam("v", 1e-2, 0.9, 0.1),
        "u": adam("u", 1e-2, 0.9, 0.1),
        "bias": adam("bias", 1e-2, 0.9, 0.0),
        "widths": adam("widths", 2e-3, 0.0, 0.0, shared=layer_moment),
        "locations": adam("locations", 1e-3, 0.0, 0.0),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(current[name], value, atol=2e-6, err_msg=name)


def test_widths_stay_in_range_and_locations_wrap():
    model = GaudiLinear(8, 8, rngs=nnx.Rngs(0))
    model.locations[...] = jnp.full((2, 8), 0.95)
    tx = gaudi_adamw(model, learning_rate=0.0, structural_learning_rate=0.1)
    _, params, _ = split_model(model)
    gradients = jax.tree.map(lambda p: -jnp.ones_like(p), params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert float(new["widths"].max()) <= 1
    np.testing.assert_allclose(new["locations"], 0.05, atol=1e-5)


def test_clipping_sees_the_whole_gradient(net):
    _, params, _ = split_model(net)
    gradients = jax.tree.map(lambda p: jnp.full_like(p, 1e3), params)
    norm = float(jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients))))
    options = {"learning_rate": 1e-3, "structural_learning_rate": 1e-3, "eps": 1.0}
    clipped = gaudi_adamw(net, clip_norm=2.0, **options)
    plain = gaudi_adamw(net, **options)
    scaled = jax.tree.map(lambda g: g * 2.0 / norm, gradients)
    actual, _ = jax.jit(lambda g: clipped.update(g, clipped.init(params), params))(gradients)
    expected, _ = jax.jit(lambda g: plain.update(g, plain.init(params), params))(scaled)
    for path, value in flat(actual).items():
        np.testing.assert_allclose(value, flat(expected)[path], rtol=1e-4, atol=1e-9)


def test_structural_learning_rate_zero_freezes_the_structure(net):
    tx = gaudi_adamw(net, learning_rate=1e-3, structural_learning_rate=0.0)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    before = jax.tree.leaves(nnx.state(net, (Width, Location)))
    nnx.jit(lambda optimizer, net: optimizer.update(net, nnx.grad(loss)(net)))(optimizer, net)
    for old, new in zip(before, jax.tree.leaves(nnx.state(net, (Width, Location))), strict=True):
        np.testing.assert_array_equal(old, new)


def test_parameters_of_another_model_are_an_error(net):
    tx = gaudi_adamw(net, learning_rate=1e-3, structural_learning_rate=1e-3)
    with pytest.raises(UserError, match="parameter tail/kernel is not one of the model's"):
        tx.init({"tail": {"kernel": jnp.ones(3)}})


def test_models_without_structure_are_optimized_too():
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    controller = controllers.budget_controller(0.3)
    tx = gaudi_adamw(model, learning_rate=1e-2, structural_learning_rate=0.0, controller=controller)
    params = split_model(model)[1]
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    mask = {"kernel": True, "bias": False}
    plain = optax.adamw(1e-2, weight_decay=0.05, mask=mask)
    expected, _ = plain.update(gradients, plain.init(params), params)
    for name in mask:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)


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


def test_parameters_inside_lists_and_dicts_are_labelled_by_their_owner():
    class Model(nnx.Module):
        def __init__(self):
            self.scales = nnx.List([nnx.Param(jnp.ones(3))])
            self.layers = nnx.Dict(first=GaudiLinear(4, 4, rngs=nnx.Rngs(0)))

    model = Model()
    tx = gaudi_adamw(model, learning_rate=0.0, structural_learning_rate=0.0, weight_decay=0.5)
    params = nnx.state(model, nnx.Param)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert all(float(jnp.abs(update).max()) == 0 for update in jax.tree.leaves(updates))


def test_stacked_gaudi_layers_are_refused_by_name():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return GaudiLinear(4, 4, rngs=rngs)

    with pytest.raises(UserError, match="stacked widths of shape"):
        layer_sizes(stack(nnx.Rngs(0)))


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
