"""Runs that start from a compressed model, and Adam's moments across the change of structure."""

import json
import math
import shutil
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gaudi_jax
from configs import digits_vit_gaudi_finetune
from configs.common import Arguments
from configs.recipes import use_compression
from gaudi_jax import GaudiLinear, LowRankLinear
from gaudi_jax.errors import UserError
from gaudi_jax.report import summary_table, write_report
from gaudi_jax.training import loop
from gaudi_jax.training.metrics import read_metrics
from gaudi_jax.training.moments import Moments, carry_moments, read_moments, with_moments
from gaudi_jax.training.optim import gaudi_adamw
from gaudi_jax.training.setup import pretrained_model
from gaudi_jax.training.step import split_model
from gaudi_jax.training.tasks import open_task
from gaudi_jax.training.workdir import check_workdir
from tests.runs import assert_same, parameters, rows_without_time, stop_at, tiny_config


def finetune_config(dense="", method="gaudi", steps=6):
    config, pretraining = (tiny_config("smoke,layer=dense", steps=n) for n in (steps, 4))
    for part in (config, pretraining):
        part.model.mlp_ratio = 1.0  # one shape of kernels, so that one search is compiled
    args = Arguments(dense=dense, method=method, budget=0.5, granularity=1)
    use_compression(config, args, pretraining)
    config.compress.update(rounds=4, calibration_batches=2)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finetuned")
    assert loop.train(finetune_config(), workdir)
    return workdir


def test_the_summary_tells_all_three_accuracies(finished):
    summary = write_report(finished)
    plan = json.loads((finished / "plan-0.json").read_text())
    assert plan["multiplications"] <= 0.5 * plan["dense_multiplications"]
    assert summary["steps"] == 6
    dense = write_report(finished / "dense")
    assert summary["dense_test_accuracy"] == dense["test_accuracy_hard"]
    assert summary["dense_validation_loss"] == dense["validation_loss"]
    assert summary["compressed_test_loss"] != summary["dense_test_loss"]
    text = summary_table(summary)
    for words in ("Dense model, test accuracy", "Compressed, before training"):
        assert words in text
    kinds = {row["path"]: row["kind"] for row in summary["layers"]}
    assert kinds["blocks/0/mlp/fc1"] == "GaudiLinear"
    assert kinds["head"] == "Linear"


def test_its_command_finds_the_run_again(finished):
    check_workdir(finished, finetune_config().to_dict())


def test_load_gives_the_fine_tuned_model(finished):
    model = gaudi_jax.load(finished)
    assert isinstance(model.blocks[0].attention.query, GaudiLinear)
    assert model(jnp.ones((2, 8, 8, 1))).shape == (2, 4)
    # The structure stays as it was found; what it holds is trained.
    first, last = parameters(finished, 4), parameters(finished)
    before, after = (p["blocks"][0]["mlp"]["fc1"] for p in (first, last))
    assert_same(before["widths"], after["widths"])
    assert_same(before["locations"], after["locations"])
    assert np.abs(before["v"] - after["v"]).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_resuming_equals_never_stopping(finished, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert not loop.train(finetune_config(), tmp_path)  # stops in the dense phase
        assert not (tmp_path / "plan-0.json").exists()
        assert not loop.train(finetune_config(), tmp_path)  # and in the structured one
    assert (tmp_path / "plan-0.json").exists()
    assert loop.train(finetune_config(), tmp_path)
    assert_same(parameters(tmp_path), parameters(finished))
    resumed = [row for row in rows_without_time(tmp_path) if "resumed_from" not in row]
    assert resumed == rows_without_time(finished)


@pytest.mark.slow
def test_a_kill_between_compression_and_the_first_checkpoint(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "dense", tmp_path / "dense")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "with_moments", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.train(finetune_config(), tmp_path)
    assert (tmp_path / "plan-0.json").exists()
    assert loop.train(finetune_config(), tmp_path)
    assert_same(parameters(tmp_path), parameters(finished))


@pytest.mark.slow
def test_starting_from_another_run(finished, tmp_path):
    dense = str(finished / "dense")
    assert loop.train(finetune_config(dense), tmp_path / "gaudi")
    assert_same(parameters(tmp_path / "gaudi"), parameters(finished))
    assert loop.train(finetune_config(dense, "low_rank", steps=1), tmp_path / "low_rank")
    model = gaudi_jax.load(tmp_path / "low_rank")
    assert isinstance(model.blocks[0].mlp.fc2, LowRankLinear)


@pytest.mark.slow
def test_blocks_of_a_run_are_regrouped_on_a_coarser_grid(finished, tmp_path):
    config = finetune_config(dense=str(finished))
    config.compress.granularity = 4
    assert loop.train(config, tmp_path)
    layer = gaudi_jax.load(tmp_path).blocks[0].mlp.fc1
    assert layer.granularity == (4, 4)
    np.testing.assert_allclose(4 * layer.widths[...] % 1, 0, atol=1e-6)
    row = read_metrics(tmp_path)[0]
    assert row["dense_test_loss"] == pytest.approx(write_report(finished)["test_loss_hard"], 1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ((0.0, 1e-4),)}, "budget=0.0001"),
        ({"stages": ()}, r"stages=\(\) must hold pairs"),
        ({"stages": (0.5, 0.25)}, "must hold pairs"),
        ({"stages": ((0.5, "a"),)}, "must hold pairs"),
        ({"stages": ((math.inf, 0.5),)}, "must hold pairs"),
        ({"stages": ((0.5, 0.5), (0.2, 0.5))}, "must begin at rising shares"),
        ({"stages": ((1.0, 0.5),)}, "must begin at rising shares"),
        ({"stages": ((0.999, 0.5),)}, "and leave each stage a step"),
        ({"rounds": 0}, "compress.rounds=0"),
        ({"calibration_batches": -1}, "calibration_batches=-1"),
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"allocation": "fair"}, "unknown allocation 'fair'"),
        ({"rules": (("blocks/(", None),)}, "no regular expression"),
        ({"rules": (("attic/.*", None),)}, "holds for no layer"),
        ({"granularity": 0}, "granularity=0"),
        ({"rules": ("blocks/.*",)}, "must hold pairs"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(changes, message, tmp_path):
    config = finetune_config()
    config.compress.update(changes)
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_and_sizes_are_those_of_the_dense_model_too():
    config = finetune_config()
    config.data.crop_padding = 2
    config.model.width = 8
    for resolved in (config, config.copy_and_resolve_references()):
        assert resolved.pretrain.data.crop_padding == 2
        assert resolved.pretrain.model.width == 8


def test_pixels_unlike_those_of_the_pretrained_model_are_named(tmp_path, caplog):
    shutil.copytree(Path(__file__).parent / "data/golden/hf_vit_tiny", tmp_path / "hf")
    theirs = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(theirs))
    config = tiny_config("smoke,layer=dense")
    config.data.name = "generated:5x8x3"
    config.model.update(width=12, depth=2, heads=3, mlp_ratio=20 / 12, norm_epsilon=0.01)
    config.model.update(patch_size=2, pool="class")
    pretrained_model(open_task(config).config, str(tmp_path / "hf"))
    assert "data.mean=(0.5,), but the pixels of" in caplog.text
    assert "data.std" not in caplog.text


def test_an_unknown_method_of_the_config():
    with pytest.raises(UserError, match="unknown method 'magic'"):
        digits_vit_gaudi_finetune.get_config("method=magic")


# ---------------------------------------------------------------- moments


class TwoLayers(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(32, 24, rngs=rngs)
        self.second = nnx.Linear(24, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


@pytest.mark.parametrize("method", ["gaudi", "low_rank"])
def test_moments_follow_the_chain_rule(method):
    dense = TwoLayers(nnx.Rngs(0))
    rules = [{"pattern": "first", "budget": 0.9}]
    model, _ = gaudi_jax.compress(dense, rules, method=method, rounds=4, progress=False)
    # The gradient of a loss of the composed kernel, whose first moment is the gradient itself.
    target = jax.random.normal(jax.random.key(1), (32, 24))
    layer = model.first
    gradient = 2 * (layer.kernel() - target)
    expected = nnx.grad(lambda layer: ((layer.kernel() - target) ** 2).sum())(layer)
    known = {("first", "kernel"): gradient, ("second", "bias"): jnp.arange(3.0)}
    squares = {path: value**2 for path, value in known.items()}
    carried = carry_moments(Moments(jnp.int32(7), known, squares), model)
    assert ("first", "kernel") not in carried.first
    np.testing.assert_allclose(carried.first["second", "bias"], jnp.arange(3.0))
    for name, other in (("v", layer.u[...]), ("u", layer.v[...])):
        factor = getattr(layer, name)[...]
        np.testing.assert_allclose(
            carried.first["first", name],
            jnp.where(factor != 0, getattr(expected, name)[...], 0),
            rtol=1e-4,
            atol=1e-5,
        )
        path = "...ko,io->...ki" if name == "v" else "...ki,io->...ko"
        np.testing.assert_allclose(
            carried.second["first", name],
            jnp.where(factor != 0, jnp.einsum(path, other**2, gradient**2), 0),
            rtol=1e-4,
            atol=1e-5,
        )

    tx = gaudi_adamw(model, learning_rate=1e-3, structural_learning_rate=0.0)
    fresh = tx.init(split_model(model)[1])
    filled = read_moments(with_moments(fresh, carried))
    assert int(filled.updates) == 7
    for path in (("first", "v"), ("first", "u"), ("second", "bias")):
        np.testing.assert_array_equal(filled.first[path], carried.first[path])
        np.testing.assert_array_equal(filled.second[path], carried.second[path])
    assert not filled.first["second", "kernel"].any()  # it has no past
    assert jax.tree.structure(with_moments(fresh, carried)) == jax.tree.structure(fresh)


@pytest.mark.parametrize("method", ["monarch", "blast", "block_sparse"])
def test_moments_of_layers_on_a_grid_follow_the_chain_rule(method):
    dense = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    layer, _ = gaudi_jax.compress(dense, 0.75, method=method, blocks=2, progress=False)
    gradient, square = jax.random.uniform(jax.random.key(1), (2, 8, 12))
    known = {("kernel",): gradient}, {("kernel",): square}
    carried = carry_moments(Moments(jnp.int32(7), *known), layer)
    parts = [name for (name,) in carried.first]
    assert sorted(parts) == {"monarch": ["u", "v"], "blast": ["s", "u", "v"]}.get(
        method, ["sparse", "u", "v"]
    )
    for name in parts:
        variable = getattr(layer, name)
        value = np.array(variable[...])
        place = tuple(size // 2 for size in value.shape)
        variable[...] = variable[...].at[place].add(1.0)
        derivative = layer.kernel()
        variable[...] = jnp.asarray(value)
        derivative = derivative - layer.kernel()
        for moment, cotangent, power in (
            (carried.first, gradient, 1),
            (carried.second, square, 2),
        ):
            expected = (derivative**power * cotangent).sum()
            np.testing.assert_allclose(moment[(name,)][place], expected, rtol=1e-4, atol=1e-5)


def test_moments_of_a_layer_over_several_axes():
    dense = nnx.Sequential(nnx.LinearGeneral(6, (2, 4), rngs=nnx.Rngs(0)))
    model, _ = gaudi_jax.compress(dense, 0.9, method="low_rank", progress=False)
    gradient = jax.random.normal(jax.random.key(1), (6, 2, 4))
    known = {("layers", 0, "kernel"): gradient, ("layers", 0, "bias"): jnp.ones((2, 4))}
    carried = carry_moments(Moments(jnp.int32(1), known, known), model).first
    layer = model.layers[0].linear
    np.testing.assert_allclose(
        carried["layers", 0, "linear", "v"],
        layer.u[...] @ gradient.reshape(6, 8).T,
        rtol=1e-5,
        atol=1e-5,
    )
    assert carried["layers", 0, "linear", "bias"].shape == (8,)


def test_moments_of_a_run_are_those_of_adam():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    gradients = {"kernel": jnp.full((2, 2), 0.1), "bias": jnp.full(2, 0.2)}
    _, state = tx.update(gradients, tx.init(params), params)
    moments = read_moments(state)
    assert int(moments.updates) == 1
    np.testing.assert_allclose(moments.first["kernel",], 0.1 * 0.1, rtol=1e-6)
    np.testing.assert_allclose(moments.second["bias",], 0.001 * 0.04, rtol=1e-4)


def test_factors_learn_at_their_own_rate():
    model = LowRankLinear(4, 4, rank=2, rngs=nnx.Rngs(0))
    steps = {}
    for scale in (1.0, 4.0):
        tx = gaudi_adamw(
            model,
            learning_rate=1e-3,
            structural_learning_rate=0.0,
            factor_scale=scale,
            weight_decay=0.0,
        )
        _, params, _ = split_model(model)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        steps[scale] = updates
    np.testing.assert_allclose(steps[4.0]["v"], 4 * steps[1.0]["v"], rtol=1e-6)
    np.testing.assert_allclose(steps[4.0]["bias"], steps[1.0]["bias"], rtol=1e-6)
