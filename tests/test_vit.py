import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gaudi_jax import GaudiLinear, LowRankLinear
from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import linear_factory
from gaudi_jax.models import ViT, ViTConfig

TINY = {
    "image_size": 8,
    "patch_size": 4,
    "channels": 3,
    "num_classes": 5,
    "width": 16,
    "depth": 2,
    "heads": 2,
}
IMAGES = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))


@functools.cache
def tiny(**changes):
    return ViT(ViTConfig(**(TINY | changes)), rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("Ti/16", 5_717_416),
        ("S/16", 22_050_664),
        ("B/16", 86_567_656),
        ("L/16", 304_326_632),
        ("B/32", 88_224_232),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters):
    model = nnx.eval_shape(lambda: ViT(ViTConfig.preset(preset), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


def test_the_papers_small_model():
    config = ViTConfig.preset("S/4", num_classes=10)
    assert (config.image_size, config.width, config.depth, config.heads) == (32, 768, 8, 8)
    assert config.num_patches == 64


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_logits_equal_a_reference_written_out(pool):
    model = tiny(pool=pool)
    p = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def norm(x, q):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * q["scale"] + q["bias"]

    def linear(x, q):
        return np.asarray(x @ q["kernel"] + q["bias"])

    images = np.asarray(IMAGES, np.float64)
    patches = [
        images[:, r : r + 4, c : c + 4].reshape(3, -1) for r in range(0, 8, 4) for c in (0, 4)
    ]
    x = linear(np.stack(patches, axis=1), p["patch_embedding"])
    if pool == "class":
        x = np.concatenate([np.tile(p["class_token"], (3, 1, 1)), x], axis=1)
    x = x + p["position_embedding"]
    for block in (p["blocks"][0], p["blocks"][1]):
        y = norm(x, block["attention_norm"])
        heads = [
            linear(y, block["attention"][name]).reshape(3, -1, 2, 8)
            for name in ("query", "key", "value")
        ]
        scores = np.einsum("btnh,bsnh->bnts", heads[0], heads[1]) / np.sqrt(8)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        attended = np.einsum("bnts,bsnh->btnh", weights, heads[2]).reshape(3, -1, 16)
        x = x + linear(attended, block["attention"]["out"])
        hidden = linear(norm(x, block["mlp_norm"]), block["mlp"]["fc1"])
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2)))
        x = x + linear(hidden, block["mlp"]["fc2"])
    x = norm(x, p["norm"])
    expected = linear(x[:, 0] if pool == "class" else x.mean(1), p["head"])
    np.testing.assert_allclose(model(IMAGES), expected, atol=1e-5)


def test_layers_are_chosen_for_attention_and_mlp_separately():
    model = tiny(
        attention_layer=linear_factory({"name": "gaudi", "granularity": 4}),
        mlp_layer=linear_factory({"name": "low_rank", "rank": 2}),
    )
    block = model.blocks[0]
    for name in ("query", "key", "value", "out"):
        assert isinstance(getattr(block.attention, name), GaudiLinear)
    assert isinstance(block.mlp.fc1, LowRankLinear)
    assert isinstance(block.mlp.fc2, LowRankLinear)
    assert model(IMAGES).shape == (3, 5)


def test_bfloat16_computation_gives_float32_logits_near_the_exact_ones():
    exact = tiny()(IMAGES)
    fast = tiny(dtype=jnp.bfloat16)(IMAGES)
    assert fast.dtype == jnp.float32
    assert np.linalg.norm(fast - exact) < 0.03 * np.linalg.norm(exact)


def test_stochastic_depth_drops_whole_images():
    model = ViT(ViTConfig(**TINY, drop_path=0.6), rngs=nnx.Rngs(1))
    assert model.blocks[0].drop_path.rate == 0
    assert model.blocks[1].drop_path.rate == 0.6
    branch = model.blocks[1].drop_path(jnp.ones((400, 3, 4)), rngs=nnx.Rngs(dropout=0))
    per_image = np.asarray(branch).reshape(400, -1)
    assert (np.ptp(per_image, axis=1) == 0).all()
    np.testing.assert_allclose(np.unique(per_image), [0, 2.5], rtol=1e-6)
    assert abs(per_image.mean() - 1) < 0.2
    np.testing.assert_array_equal(
        model(IMAGES, rngs=nnx.Rngs(dropout=3)), model(IMAGES, rngs=nnx.Rngs(dropout=3))
    )
    model.eval()
    np.testing.assert_array_equal(model(IMAGES), tiny()(IMAGES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size=3 does not divide image_size=8"),
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"dropout": 1.0}, "dropout=1.0 is outside"),
        ({"num_classes": 0}, "num_classes=0"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        ViTConfig(**(TINY | changes))


def test_bad_presets_and_images_are_named():
    with pytest.raises(UserError, match="unknown ViT preset 'H/14'"):
        ViTConfig.preset("H/14")
    with pytest.raises(UserError, match=r"images of shape \(3, 8, 4, 3\)"):
        tiny()(IMAGES[:, :, :4])
