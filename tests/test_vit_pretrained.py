import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gaudi_jax.errors import UserError
from gaudi_jax.models import ViT
from gaudi_jax.models.pretrained import resolve_folder

GOLDEN = Path(__file__).parent / "data" / "golden" / "hf_vit_tiny"
COMPUTED = np.load(GOLDEN / "logits.npz")
IMAGES, LOGITS = COMPUTED["images_8"], COMPUTED["logits_8"]
QUERY = "vit.encoder.layer.0.attention.attention.query.weight"


def tensors():
    return load_file(GOLDEN / "model.safetensors")


def folder(path, weights, **config):
    """A folder like the golden one with other weights, and config keys changed (None: removed)."""
    path.mkdir(exist_ok=True)
    merged = json.loads((GOLDEN / "config.json").read_text()) | config
    merged = {key: value for key, value in merged.items() if value is not None}
    (path / "config.json").write_text(json.dumps(merged))
    save_file(weights, path / "model.safetensors")
    return path


def bare(weights):
    """The names and tensors of a ViTModel, with parts that have no counterpart in our model."""
    kept = {
        name.removeprefix("vit."): value
        for name, value in weights.items()
        if not name.startswith("classifier")
    }
    unused = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token", "decoder.0.bias")
    return kept | {name: np.ones(12) for name in unused}


def new_names(weights):
    """The names that transformers 5 has in memory."""
    changes = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    renamed = {}
    for name, value in weights.items():
        for old, new in changes.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def test_logits_are_those_of_transformers():
    model = ViT.from_pretrained(GOLDEN)
    np.testing.assert_allclose(model(IMAGES), LOGITS, atol=1e-5)
    assert model.config.norm_epsilon == 1e-2
    assert model.config.hidden == 20
    assert all(
        isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32
        for leaf in jax.tree.leaves(nnx.state(model))
    )


@pytest.mark.parametrize("size", [6, 10, 14])
def test_resized_positions_give_the_logits_of_transformers(size):
    model = ViT.from_pretrained(str(GOLDEN), image_size=size)
    np.testing.assert_allclose(
        model(COMPUTED[f"images_{size}"]), COMPUTED[f"logits_{size}"], atol=1e-5
    )


def test_names_of_transformers_5(tmp_path):
    renamed = new_names(tensors())
    assert sorted(renamed) == list(COMPUTED["names_in_memory"])
    model = ViT.from_pretrained(folder(tmp_path, renamed))
    np.testing.assert_allclose(model(IMAGES), LOGITS, atol=1e-5)


def test_sharded_weights(tmp_path):
    weights = tensors()
    folder(tmp_path, weights)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for index, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, tmp_path / file)
        weight_map |= dict.fromkeys(names, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    np.testing.assert_allclose(ViT.from_pretrained(tmp_path)(IMAGES), LOGITS, atol=1e-5)

    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model-00002-of-00002\.safetensors"):
        ViT.from_pretrained(tmp_path)
    for content in ("{}", '{"weight_map": []}'):
        index.write_text(content)
        with pytest.raises(UserError, match="names no file of weights"):
            ViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_fill_parameters_of_the_wanted_dtype(tmp_path, dtype):
    halves = {name: value.astype(dtype) for name, value in tensors().items()}
    folder(tmp_path, halves)
    model = ViT.from_pretrained(tmp_path, image_size=10)
    kernel = model.blocks[0].attention.query.kernel[...]
    assert kernel.dtype == model.position_embedding[...].dtype == jnp.float32
    np.testing.assert_array_equal(kernel, halves[QUERY].T.astype(np.float32))

    model = ViT.from_pretrained(tmp_path, param_dtype=jnp.bfloat16, num_classes=3)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    logits = ViT.from_pretrained(tmp_path)(IMAGES)
    assert 0 < np.abs(logits - LOGITS).max() < 0.02


def test_a_bare_model_gets_a_new_head_and_the_log_says_so(tmp_path, caplog):
    folder(tmp_path, bare(tensors()), architectures=["ViTModel"], id2label=None)
    assert ViT.from_pretrained(tmp_path)(IMAGES).shape == (3, 2)  # the default of transformers
    assert "no head of 2 classes; the model gets a new, untrained one" in caplog.text
    model = ViT.from_pretrained(tmp_path, num_classes=2, rngs=nnx.Rngs(3))
    assert model(IMAGES).shape == (3, 2)
    assert np.ptp(model.head.kernel[...]) > 0
    # With the lost head put back, everything below it must be the file's.
    weights = tensors()
    model = ViT.from_pretrained(tmp_path, num_classes=5)
    model.head.kernel[...] = jnp.asarray(weights["classifier.weight"].T)
    model.head.bias[...] = jnp.asarray(weights["classifier.bias"])
    np.testing.assert_allclose(model(IMAGES), LOGITS, atol=1e-5)


def test_another_number_of_classes_gives_a_new_head_from_rngs():
    kernels = [
        ViT.from_pretrained(GOLDEN, num_classes=7, rngs=rngs).head.kernel[...]
        for rngs in (nnx.Rngs(1), nnx.Rngs(1), nnx.Rngs(2), None)
    ]
    assert kernels[0].shape == (12, 7)
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert (kernels[0] != kernels[2]).all()
    assert np.ptp(kernels[3]) > 0
    same = ViT.from_pretrained(GOLDEN, num_classes=5, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(same.head.kernel[...], tensors()["classifier.weight"].T)


def test_absent_biases_of_queries_keys_and_values_are_zero_and_can_be_donated(tmp_path):
    gone = re.compile(r".*attention\.(query|key|value)\.bias")
    without = {name: value for name, value in tensors().items() if not gone.fullmatch(name)}
    model = ViT.from_pretrained(folder(tmp_path, without, qkv_bias=False))
    zeroed = {
        name: np.zeros_like(value) if gone.fullmatch(name) else value
        for name, value in tensors().items()
    }
    expected = ViT.from_pretrained(folder(tmp_path / "zeroed", zeroed))(IMAGES)
    np.testing.assert_allclose(model(IMAGES), expected, atol=1e-6)
    state = nnx.state(model)
    jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(state)
    with pytest.raises(UserError, match=r"without a tensor: blocks\.0\.attention\.key\.bias"):
        ViT.from_pretrained(folder(tmp_path, without))


def test_two_labels_are_not_written_by_transformers(tmp_path):
    weights = tensors()
    weights["classifier.weight"] = weights["classifier.weight"][:2]
    weights["classifier.bias"] = weights["classifier.bias"][:2]
    model = ViT.from_pretrained(folder(tmp_path, weights, id2label=None))
    np.testing.assert_allclose(model(IMAGES), LOGITS[:, :2], atol=1e-5)


def test_options_reach_the_config():
    model = ViT.from_pretrained(GOLDEN, dtype=jnp.bfloat16, dropout=0.1, drop_path=0.2)
    assert (model.config.dropout, model.config.drop_path) == (0.1, 0.2)
    assert model.blocks[1].drop_path.rate == 0.2
    model.eval()
    logits = model(IMAGES)
    assert 0 < np.abs(logits - LOGITS).max() < 0.05


def test_all_mismatches_are_in_one_error(tmp_path):
    weights = tensors()
    del weights["vit.layernorm.bias"]
    weights["vit.surplus"] = np.ones(3)
    weights[QUERY] = np.ones((12, 13))
    weights["vit.embeddings.patch_embeddings.projection.weight"] = np.ones((12, 12))
    weights["vit.embeddings.position_embeddings"] = np.ones((1, 10, 12))
    weights["vit.layers.1.mlp.fc1.bias"] = np.ones(20)
    with pytest.raises(UserError) as caught:
        ViT.from_pretrained(folder(tmp_path, weights))
    message = str(caught.value)
    for part in (
        "parameters without a tensor: norm.bias;",
        "tensors without a parameter: vit.surplus;",
        "layers.1.mlp.fc1.bias for blocks.1.mlp.fc1.bias",
        f"{QUERY} (12, 13) for blocks.0.attention.query.kernel (12, 12)",
        "projection.weight (12, 12) for patch_embedding.kernel (12, 12)",
        "position_embeddings (1, 10, 12) for position_embedding (17, 12)",
    ):
        assert part in message
    assert "\n" not in message


def test_patches_of_another_shape_with_as_many_numbers_are_a_mismatch(tmp_path):
    weights = tensors()
    name = "vit.embeddings.patch_embeddings.projection.weight"
    weights[name] = weights[name].reshape(12, 12, 1, 1)
    with pytest.raises(UserError, match=re.escape("projection.weight (12, 12, 1, 1) for patch")):
        ViT.from_pretrained(folder(tmp_path, weights))


def test_long_lists_are_cut(tmp_path):
    weights = tensors() | {f"extra.{i:02}": np.ones(1) for i in range(25)}
    with pytest.raises(UserError, match=r"extra\.09 and 15 more\); check"):
        ViT.from_pretrained(folder(tmp_path, weights))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2', which is not a ViT"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new', but our ViT computes only the exact"),
        ({"image_size": [8, 12]}, r"image_size=\[8, 12\], but our ViT takes squares"),
        ({"patch_size": [2, 4]}, r"patch_size=\[2, 4\], but our ViT takes squares"),
        ({"num_attention_heads": 5}, "heads=5 does not divide width=12"),
    ],
)
def test_models_that_ours_cannot_represent_are_named(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        ViT.from_pretrained(folder(tmp_path, tensors(), **config))


def test_square_sizes_may_be_written_as_pairs(tmp_path):
    model = ViT.from_pretrained(folder(tmp_path, tensors(), image_size=[8, 8]))
    np.testing.assert_allclose(model(IMAGES), LOGITS, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9}, "patch_size=2 does not divide image_size=9"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"num_classes": 0}, "num_classes=0 must be at least 1"),
        ({"drop_path": 1.0}, "drop_path=1.0 is outside"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        ViT.from_pretrained(GOLDEN, **options)


def test_damaged_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        ViT.from_pretrained(tmp_path)
    shutil.copy(GOLDEN / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"holds no model\.safetensors; load the model with tran"):
        ViT.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"but pytorch_model\.bin, which needs PyTorch .*save_pre"):
        ViT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"model\.safetensors is not a safetensors file"):
        ViT.from_pretrained(tmp_path)
    for content, message in (("{", "is not JSON"), ("[]", "is not a JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            ViT.from_pretrained(tmp_path)


def test_hub_ids_are_fetched_without_other_formats(monkeypatch):
    asked = {}

    def snapshot_download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(GOLDEN)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = ViT.from_pretrained("somebody/tiny-vit")
    np.testing.assert_allclose(model(IMAGES), LOGITS, atol=1e-5)
    assert list(asked) == ["somebody/tiny-vit"]
    assert all(pattern.endswith(("json", "safetensors")) for pattern in asked["somebody/tiny-vit"])


def hub_error(name):
    from huggingface_hub import errors

    kind = getattr(errors, name)
    # An HTTP error wants its response; what the hub answered does not matter here.
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("LocalEntryNotFoundError", "the Hugging Face hub cannot be reached"),
        ("OfflineModeIsEnabled", "the Hugging Face hub cannot be reached"),
        ("RepositoryNotFoundError", "the Hugging Face hub has no such model, or none that you may"),
        ("GatedRepoError", "the Hugging Face hub has no such model, or none that you may"),
        ("HfHubHTTPError", r"the Hugging Face hub refuses it \(HfHubHTTPError\)"),
    ],
)
def test_models_that_the_hub_does_not_give_are_named(monkeypatch, error, message):
    def snapshot_download(name, **kwargs):
        raise hub_error(error)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=f"no directory 'runs/none', and {message}.*; give"):
        resolve_folder("runs/none")


@pytest.mark.parametrize("name", ["not an id", "a/b/c", "/nowhere/at/all"])
def test_names_that_are_neither_directory_nor_id_are_named(name):
    with pytest.raises(UserError, match=f"no directory '{name}', and that is no valid id"):
        resolve_folder(name)
