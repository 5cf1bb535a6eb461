"""Monarch, BLAST and block-sparse layers in compression, configs, optimizer and whole runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from other_models import WIDTH, Encoder, tokens

import gaudi_jax
from configs import digits_vit_gaudi, digits_vit_gaudi_finetune, vit_b_gaudi
from gaudi_jax.compression import plan_table
from gaudi_jax.errors import UserError
from gaudi_jax.layers import GeneralLinear
from gaudi_jax.layers.factory import GRID_LAYERS
from gaudi_jax.training import loop
from gaudi_jax.training.mesh import state_shardings
from gaudi_jax.training.optim import gaudi_adamw
from gaudi_jax.training.step import split_model
from tests.runs import tiny_config

OPTIONS = {"budget": 0.5, "rules": [{"pattern": "head", "method": "skip"}, {"pattern": ".*"}]}


@pytest.mark.parametrize("method", GRID_LAYERS)
def test_compressed_models_and_their_rebuilt_structure(method):
    encoder, x = Encoder(nnx.Rngs(0)), tokens()
    parts = 8 if method == "block_sparse" else 2
    errors = {}
    for calibration in (None, [x]):
        small, plan = gaudi_jax.compress(
            encoder,
            **OPTIONS,
            method=method,
            blocks=parts,
            calibration=calibration,
            progress=False,
        )
        entries = plan["layers"].values()
        assert all(0.4 < e["multiplications"] / e["dense_multiplications"] <= 0.5 for e in entries)
        name = "error" if calibration is None else "activation_error"
        errors[name] = np.array([entry[name] for entry in entries])
        assert (errors[name] < 1).all()
    assert method in plan_table(plan)
    projection = small.layers[0].self_attn.query
    assert type(projection) is GeneralLinear
    assert type(projection.linear) is type(small.layers[0].mlp.layers[0]) is GRID_LAYERS[method]
    entry, dense = plan["layers"]["layers/0/mlp/layers/3"], encoder.layers[0].mlp.layers[3]
    layer = small.layers[0].mlp.layers[3]
    assert entry["multiplications"] == int(layer.multiplications())
    assert (entry["rank"], entry["num_blocks"]) == (layer.rank, layer.blocks) == (layer.rank, parts)
    error = jnp.linalg.norm(layer.kernel() - dense.kernel[...]) / jnp.linalg.norm(dense.kernel[...])
    assert entry["error"] == pytest.approx(float(error), rel=1e-4)
    # What the outputs miss on average goes into the bias.
    bias = encoder.layers[0].self_attn.query.bias[...].reshape(-1)
    assert not np.allclose(projection.linear.bias[...], bias, atol=1e-4)

    plan = json.loads(json.dumps(plan, allow_nan=False))
    for into in (encoder, nnx.eval_shape(lambda: Encoder(nnx.Rngs(0)))):
        empty = gaudi_jax.rebuild(into, plan)
        assert nnx.graphdef(empty) == nnx.graphdef(small)
        nnx.update(empty, nnx.state(small))
        np.testing.assert_array_equal(empty(x), small(x))


@pytest.mark.parametrize("method", GRID_LAYERS)
def test_factors_of_bfloat16_models_are_rounded(method):
    dense = nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    small, plan = gaudi_jax.compress(dense, 0.75, method=method, blocks=2, progress=False)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(small))} == {jnp.dtype("bfloat16")}
    for _, variable in nnx.to_flat_state(nnx.state(small)):
        variable.set_value(variable[...].astype(jnp.float32))
    kernel = dense.kernel[...].astype(jnp.float32)
    full = GRID_LAYERS[method].kernel
    layer = nnx.clone(small)
    nnx.update(layer, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(small)))
    error = jnp.linalg.norm(full(layer) - kernel) / jnp.linalg.norm(kernel)
    assert plan["layers"][""]["error"] == pytest.approx(float(error), rel=1e-3)


def test_a_budget_too_small_for_a_grid_is_named_before_any_work():
    dense = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"budget=0.3 of layer '' is less than 0.5, the least"):
        gaudi_jax.compress(dense, 0.3, method="monarch", progress=False)
    with pytest.raises(UserError, match="blocks=0 must be a whole number"):
        gaudi_jax.compress(dense, 0.3, method="blast", blocks=0, progress=False)


@pytest.mark.parametrize("name", GRID_LAYERS)
def test_a_dense_global_budget_is_shared_by_singular_values(name):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(16, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs))
    simple = model.layers[1].kernel
    simple[...] = jnp.outer(simple[:, 0], simple[0])
    blocks = 4 if name == "block_sparse" else 2
    _, plan = gaudi_jax.compress(
        model, 0.6, method=name, blocks=blocks, allocation="global", progress=False
    )
    costs = [entry["multiplications"] for entry in plan["layers"].values()]
    assert costs[0] > costs[1]
    assert sum(costs) <= 0.6 * 512


# ---------------------------------------------------------------- configs and runs


@pytest.mark.parametrize(
    ("layer", "recipe"),
    [
        ("monarch", "budget"),
        *(
            pytest.param(layer, recipe, marks=pytest.mark.slow)
            for layer in GRID_LAYERS
            for recipe in ("budget", "search")
            if (layer, recipe) != ("monarch", "budget")
        ),
    ],
)
def test_a_run_ends_with_such_layers(layer, recipe, tmp_path):
    config = tiny_config(f"layer={layer},recipe={recipe},budget=0.75", steps=4)
    config.compress.update(calibration_batches=2)
    assert loop.train(config, tmp_path)
    model = gaudi_jax.load(tmp_path)
    assert isinstance(model.blocks[0].attention.query, GRID_LAYERS[layer])
    assert isinstance(model.blocks[0].mlp.fc1, GRID_LAYERS[layer])
    assert jnp.isfinite(model(jnp.ones((2, 8, 8, 1)))).all()


def test_configs_give_the_options_of_each_layer():
    config = vit_b_gaudi.get_config("recipe=budget,attention=monarch,mlp=block_sparse,budget=0.4")
    assert config.layer.attention.to_dict() == {"name": "monarch", "budget": 0.4, "blocks": 4}
    assert config.layer.mlp.blocks == 16
    assert config.controller.name == "none"
    model = nnx.eval_shape(lambda: loop.build_model(_sized(config)))
    assert model.blocks[0].mlp.fc1.diagonals == 4
    config = vit_b_gaudi.get_config("recipe=paper,attention=blast,budget=0.2")
    assert config.layer.attention.budget == 0.2
    with pytest.raises(UserError, match="'granularity' has no effect on method=blast"):
        digits_vit_gaudi_finetune.get_config("method=blast,granularity=2")
    assert digits_vit_gaudi_finetune.get_config("method=blast").compress.method == "blast"
    with pytest.raises(UserError, match="unknown layer 'monarchs'"):
        loop.build_model(_sized(digits_vit_gaudi.get_config("layer=monarchs")))


def _sized(config):
    with config.unlocked():
        config.model.update(image_size=config.data.image_size, channels=3, num_classes=10)
    return config


# ---------------------------------------------------------------- optimizer and mesh


def test_factors_learn_at_the_factors_rate_and_blocks_at_that_of_kernels():
    model = nnx.Dict(
        blast=GRID_LAYERS["blast"](8, 8, blocks=2, rank=2, rngs=nnx.Rngs(0)),
        sparse=GRID_LAYERS["block_sparse"](8, 8, blocks=4, diagonals=2, rank=2, rngs=nnx.Rngs(0)),
    )
    tx = gaudi_adamw(
        model, learning_rate=1.0, structural_learning_rate=0.0, factor_scale=4.0, weight_decay=0.0
    )
    _, params, _ = split_model(model)
    steps, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    rates = jax.tree.map(lambda step: round(-float(step.mean()), 3), steps)
    assert rates["blast"] == {"v": 4.0, "s": 4.0, "u": 4.0, "bias": 1.0}
    assert rates["sparse"] == {"v": 4.0, "u": 4.0, "sparse": 1.0, "bias": 1.0}


def test_blocks_are_split_over_devices():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = {"v": (4, 3, 8), "s": (4, 4, 3), "sparse": (8, 2, 4, 6)}
    state = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    specs = jax.tree.map(lambda s: tuple(s.spec), state_shardings(state, mesh))
    assert specs == {
        "v": ("tensor", None, "fsdp"),
        "s": (),
        "sparse": ("tensor", None, None, "fsdp"),
    }


@pytest.mark.parametrize("lost", ["diagonals", "num_blocks", "rank"])
def test_damaged_plans_are_named(lost):
    model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    _, plan = gaudi_jax.compress(model, 0.5, method="block_sparse", blocks=4, progress=False)
    plan["layers"]["layers/0"][lost] = None
    with pytest.raises(UserError, match=f"needs whole numbers of {lost}"):
        gaudi_jax.rebuild(model, plan)


@pytest.mark.parametrize("method", GRID_LAYERS)
def test_a_whole_budget_is_exact(method):
    model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    _, plan = gaudi_jax.compress(model, 1.0, method=method, blocks=4, progress=False)
    assert plan["layers"]["layers/0"]["error"] < 1e-4
    assert plan["multiplications"] == 256
