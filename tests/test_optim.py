"""The optimizer: what each kind of parameter follows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs.common import base_config
from gaudi_jax import GaudiLinear, gaudi_adamw
from gaudi_jax.errors import UserError
from gaudi_jax.layers import Location, Width
from gaudi_jax.training import controllers
from gaudi_jax.training.optim import NARROWEST, layer_sizes
from gaudi_jax.training.setup import build_optimizer, build_schedules
from gaudi_jax.training.step import split_model
from tests.structured_net import fresh_net, loss, set_random_widths, step_with_zero_gradients


@pytest.fixture
def net():
    return fresh_net()


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


def test_narrow_blocks_step_farther_by_the_root_of_one_over_their_width(net):
    set_random_widths(net)
    net.second.widths[1, 0] = 0.001
    steps = {}
    for by_width in (False, True):
        tx = gaudi_adamw(
            net, learning_rate=0.1, structural_learning_rate=0.1, scale_by_width=by_width
        )
        _, params, _ = split_model(net)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        steps[by_width] = flat(updates)
    narrow, usual = steps[True], steps[False]
    for layer in ("first", "second"):
        widths = np.maximum(getattr(net, layer).widths[...], NARROWEST)
        for axis, name in enumerate(("v", "u")):
            expected = usual.pop((layer, name)) / np.sqrt(widths[axis])[:, None, None]
            np.testing.assert_allclose(narrow[layer, name], expected, rtol=1e-5)
    assert len(usual) > 4
    for path, update in usual.items():
        np.testing.assert_array_equal(narrow[path], update)


def test_a_config_scales_by_width_where_it_says_so(net):
    set_random_widths(net)
    _, params, _ = split_model(net)
    config = base_config()
    steps = []
    for by_width in (None, True):
        config.optimizer.scale_by_width = by_width
        tx = build_optimizer(config, net, build_schedules(config), made=10)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        steps.append(flat(updates)["first", "u"])
    scale = 1 / np.sqrt(np.maximum(net.first.widths[1], NARROWEST))
    np.testing.assert_allclose(steps[1], steps[0] * scale[:, None, None], rtol=1e-5)
    # A run from before there was such a choice.
    with config.unlocked():
        del config.optimizer.scale_by_width
    build_optimizer(config, net, build_schedules(config))


def test_scaling_by_width_needs_the_widths(net):
    tx = gaudi_adamw(net, learning_rate=0.1, structural_learning_rate=0.1, scale_by_width=True)
    params = nnx.to_pure_dict(nnx.state(net, nnx.All(nnx.Param, nnx.Not(Width))))
    with pytest.raises(UserError, match=r"needs the widths of layer first"):
        tx.update(params, tx.init(params), params)


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
