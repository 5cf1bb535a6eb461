"""Moments of the layers' inputs against NumPy, and what they are used for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from other_models import WIDTH, Encoder, Recurrent, tokens

import gaudi_jax
from gaudi_jax.compression.calibration import Moments, calibrate
from gaudi_jax.errors import UserError


def assert_moments(moments, inputs):
    inputs = np.asarray(inputs, np.float64).reshape(-1, moments.mean.shape[0])
    assert int(moments.vectors) == len(inputs)
    scale = np.abs(inputs).max()
    np.testing.assert_allclose(moments.mean, inputs.mean(0), atol=1e-6 * scale)
    raw = inputs.T @ inputs / len(inputs)
    np.testing.assert_allclose(moments.raw(), raw, rtol=1e-5, atol=1e-6 * scale)
    np.testing.assert_allclose(
        moments.centred(), np.cov(inputs.T, bias=True), atol=2e-5 * inputs.var()
    )


def test_moments_are_those_of_all_batches_whatever_their_size():
    model = nnx.Sequential(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)), nnx.relu)
    batches = [tokens(seed, size, mean=100.0) for seed, size in enumerate((5, 7, 1))]
    found = calibrate(model, ["layers/0"], (batch for batch in batches))
    assert_moments(found["layers/0"], np.concatenate(batches))


def test_every_layer_of_a_network_sees_its_own_inputs():
    model = Encoder(nnx.Rngs(0))
    model.eval()
    x = tokens()
    names = "self_attn/query", "self_attn/out", "mlp/layers/0", "mlp/layers/3"
    paths = [f"layers/0/{name}" for name in names]
    found = calibrate(model, paths, [x[:2], x[2:]])
    layer = model.layers[0]
    normed = layer.attn_norm(x)
    assert_moments(found[paths[0]], normed)
    attended = nnx.dot_product_attention(
        *[
            projection(normed)
            for projection in (layer.self_attn.query, layer.self_attn.key, layer.self_attn.value)
        ]
    )
    assert_moments(found[paths[1]], attended.reshape(4, 10, WIDTH))
    hidden = layer.mlp_norm(x + layer.self_attn.out(attended))
    assert_moments(found[paths[2]], hidden)
    assert_moments(found[paths[3]], jax.nn.gelu(layer.mlp.layers[0](hidden)))


def test_a_shared_layer_counts_every_application():
    model = Recurrent(nnx.Rngs(0))
    found = calibrate(model, ["body/layers/0/layers/0"], [tokens()])
    (moments,) = found.values()
    assert int(moments.vectors) == 3 * 40
    assert type(model.first.layers[0]) is nnx.Linear


def test_axes_of_general_layers():
    model = nnx.LinearGeneral((2, 8), 3, axis=(1, -1), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 2, 7, 8))
    assert_moments(calibrate(model, [""], [x])[""], x.transpose(0, 2, 1, 3))


class Two(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.unused = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x, shift, *, scale=1.0):
        return self.norm(self.layer(self.dropout(scale * x + shift)))


def test_batches_of_all_kinds():
    x = tokens()
    for batch in ((x, x), [x, x], {"x": x, "shift": x}, {"x": x, "shift": 0 * x, "scale": 2.0}):
        assert_moments(calibrate(Two(), ["layer"], [batch])["layer"], 2 * x)


class Flagged(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x, *, train, mode="plain"):
        return self.layer(2 * x if train or mode == "double" else x)


def test_flags_are_pythons_own():
    x = tokens()
    for batch, factor in (({"x": x, "train": False}, 1), ({"x": x, "train": True}, 2)):
        assert_moments(calibrate(Flagged(), ["layer"], [batch])["layer"], factor * x)
    batch = {"x": x, "train": False, "mode": "double"}
    assert_moments(calibrate(Flagged(), ["layer"], [batch])["layer"], 2 * x)


def test_what_is_no_batches_is_named():
    with pytest.raises(UserError, match="calibration=3 must hold batches"):
        calibrate(Two(), ["layer"], 3)


def test_calibration_changes_nothing_and_runs_in_evaluation_mode():
    model = Two()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    graph = nnx.graphdef(model)
    calibrate(model, ["layer"], [(tokens(), tokens())])
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert graph == nnx.graphdef(model)


def test_layers_that_are_never_called_and_broken_inputs_are_named():
    x = tokens()
    with pytest.raises(UserError, match=r"never called 1 layers \(unused\)"):
        gaudi_jax.compress(Two(), 0.5, calibration=[(x, x)], progress=False)
    with pytest.raises(UserError, match="layer 'layer' inputs that are NaN"):
        calibrate(Two(), ["layer"], [(x, x * jnp.nan)])
    with pytest.raises(UserError, match=r"Two cannot be run .* \(4, 10, 16\): .*missing"):
        calibrate(Two(), ["layer"], [x])


@pytest.mark.parametrize("use_bias", [True, False])
def test_errors_on_activations_and_the_mean_in_the_bias(use_bias):
    dense = nnx.Linear(WIDTH, WIDTH, use_bias=use_bias, rngs=nnx.Rngs(0))
    x = tokens(0, 500, mean=3.0)
    options = {"method": "low_rank", "progress": False}
    small, plan = gaudi_jax.compress(dense, 0.5, calibration=[x], **options)
    wanted, y = np.asarray(dense(x)), np.asarray(small(x))
    if use_bias:
        np.testing.assert_allclose(y.mean(0), wanted.mean(0), atol=1e-4)
        error = np.linalg.norm(y - wanted) / np.linalg.norm(wanted - wanted.mean(0))
    else:
        error = np.linalg.norm(y - wanted) / np.linalg.norm(wanted)
    assert plan["layers"][""]["activation_error"] == pytest.approx(error, rel=1e-3)
    plain, plan = gaudi_jax.compress(dense, 0.5, **options)
    assert plan["layers"][""]["activation_error"] is None
    assert np.linalg.norm(plain(x) - wanted) > 1.5 * np.linalg.norm(y - wanted)


def test_empty_inputs_count_nothing():
    moments = Moments.empty(2).add(jnp.zeros((0, 2)))
    assert not moments.vectors
    assert not jnp.isnan(moments.mean).any()
