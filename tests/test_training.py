import json
import logging
import math
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

import gaudi_jax
from gaudi_jax.errors import UserError
from gaudi_jax.report import write_report
from gaudi_jax.training import loop
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.metrics import read_metrics
from gaudi_jax.training.step import CostWeights, structure_metrics
from gaudi_jax.training.tasks import open_task
from tests.runs import (
    assert_same,
    parameters,
    rows_without_time,
    stop_at,
    tiny_config,
    traced_steps,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert loop.train(tiny_config(), workdir)
    return workdir


def test_a_run_leaves_a_readable_report(finished):
    summary = write_report(finished)
    assert summary == json.loads((finished / "summary.json").read_text())
    for name in ("masks.png", "curves.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert "blocks/0/mlp/fc1" in (finished / "summary.txt").read_text()
    assert summary["steps"] == 8
    assert summary["test_accuracy_soft"] == summary["test_accuracy_hard"]  # hard from the start
    gaudi = [layer for layer in summary["layers"] if layer["kind"] == "GaudiLinear"]
    assert len(gaudi) == 6
    share = sum(x["multiplications"] for x in gaudi) / sum(
        x["dense_multiplications"] for x in gaudi
    )
    assert share <= 0.33
    assert summary["relative_multiplications"] >= share
    rows = read_metrics(finished)
    last = [row for row in rows if row["step"] == 8]
    np.testing.assert_allclose(
        last[0]["relative_multiplications"], summary["relative_multiplications"], rtol=1e-5
    )
    np.testing.assert_allclose(
        last[1]["validation_accuracy"], summary["validation_accuracy"], atol=1e-6
    )
    assert {row["step"] for row in rows} == {2, 4, 6, 8}
    for name in ("train_loss", "learning_rate", "sigma", "target", "mean_width"):
        assert name in last[0]


@pytest.mark.slow
def test_the_report_is_about_the_checkpoint_that_is_asked_for(tmp_path, monkeypatch):
    # The best is that of step 6: at step 2 the budget has not reached its target.
    accuracies = iter([0.9, 0.25, 0.75, 0.5])
    config = tiny_config()
    config.train.eval_every = 2
    config.evaluate_checkpoint = "best"
    with monkeypatch.context() as patch:
        patch.setattr(
            loop,
            "evaluate_batches",
            lambda *_: {"loss": 1.0, "correct": next(accuracies), "images": 1.0},
        )
        assert loop.train(config, tmp_path)
    assert write_report(tmp_path)["steps"] == 6
    assert write_report(tmp_path, "last")["steps"] == 8
    summary = write_report(tmp_path, 6)
    assert summary["steps"] == 6
    with pytest.raises(UserError, match="has no checkpoint 5"):
        write_report(tmp_path, 5)


def test_load_gives_the_trained_model_in_evaluation_mode(finished):
    model = gaudi_jax.load(finished)
    result = evaluate_model(model, open_task(tiny_config()), "test", sigma=math.inf)
    assert result["accuracy"] == write_report(finished)["test_accuracy_hard"]
    assert all(layer.deterministic for layer in [model.blocks[0].mlp.fc1])
    assert gaudi_jax.load(finished, 6).blocks[0].mlp.fc1.widths.shape == (2, 16)
    with pytest.raises(UserError, match="has no checkpoint 5"):
        gaudi_jax.load(finished, 5)


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_sigterm_saves_and_resuming_equals_never_stopping(finished, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert not loop.train(tiny_config(), tmp_path)
    assert loop.train(tiny_config(), tmp_path)
    assert_same(parameters(tmp_path), parameters(finished))
    assert {"resumed_from": step} in rows_without_time(tmp_path)
    resumed = [row for row in rows_without_time(tmp_path) if "resumed_from" not in row]
    assert resumed == rows_without_time(finished)
    assert loop.train(tiny_config(), tmp_path)  # nothing is left to do
    assert_same(parameters(tmp_path), parameters(finished))


@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_passed_over(finished, tmp_path, caplog):
    loop.train(tiny_config(), tmp_path)
    for file in (tmp_path / "checkpoints" / "8" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert loop.train(tiny_config(), tmp_path)
    assert "checkpoint 8 is damaged" in caplog.text
    assert "using checkpoint 6" in caplog.text
    assert_same(parameters(tmp_path), parameters(finished))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_another(finished, tmp_path):
    config = tiny_config()
    loop.train(config, tmp_path / "same")
    assert_same(parameters(tmp_path / "same"), parameters(finished))
    config.seed = 1
    loop.train(config, tmp_path / "other")
    kernel = parameters(tmp_path / "other")["head"]["kernel"]
    assert np.abs(kernel - parameters(finished)["head"]["kernel"]).max() > 0.01


@pytest.mark.slow
def test_initialising_from_another_run(finished, tmp_path):
    config = tiny_config(steps=1)
    config.optimizer.update(
        learning_rate=0.0, structural_learning_rate=0.0, location_learning_rate=0.0
    )
    config.init_from = str(finished)
    loop.train(config, tmp_path / "new")
    assert_same(parameters(tmp_path / "new"), parameters(finished))
    config.model.width = 32
    with pytest.raises(UserError, match="has other parameters"):
        loop.train(config, tmp_path / "wider")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "smoke,layer=dense",
        "smoke,recipe=budget,layer=low_rank",
        "smoke,recipe=paper",
        "smoke,recipe=spread",
    ],
)
def test_every_layer_and_recipe_trains(arguments, tmp_path):
    config = tiny_config(arguments, steps=4)
    config.model.dtype = "bfloat16"
    config.model.drop_path = 0.2
    loop.train(config, tmp_path)
    summary = write_report(tmp_path)
    dense = "dense" in arguments
    assert (summary["relative_multiplications"] == 1) == dense
    assert (tmp_path / "masks.png").exists() == ("paper" in arguments or "spread" in arguments)
    assert np.isfinite(summary["test_loss_hard"])
    if "paper" in arguments:
        sigmas = [row["sigma"] for row in read_metrics(tmp_path) if "sigma" in row]
        assert sigmas == sorted(sigmas)
        assert sigmas[-1] > sigmas[0] >= 1


def test_metrics_of_models_with_billions_of_multiplications():
    layer = gaudi_jax.GaudiLinear(8, 8, rngs=nnx.Rngs(0))
    weights = CostWeights({"": 10**9}, others=10**10, dense=74 * 10**9)
    relative = jax.jit(lambda: structure_metrics(layer, weights)["relative_multiplications"])()
    expected = (float(layer.multiplications()) * 1e9 + 1e10) / 74e9
    np.testing.assert_allclose(relative, expected, rtol=1e-5)


def wrong(**changes):
    config = tiny_config()
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "cnn"}, "unknown model 'cnn'"),
        ({"model__dtype": "float64"}, "unknown dtype 'float64'"),
        ({"model__patch_size": 3}, "patch_size=3 does not divide"),
        ({"layer__mlp__name": "abacus"}, "unknown layer 'abacus'"),
        ({"data__name": "mnist"}, "unknown data set 'mnist'"),
        ({"data__batch_size": 0}, "batch_size=0"),
        ({"data__batch_size": 1000}, "batch_size=1000 must lie in"),
        ({"data__std": (0.0,)}, "must be positive"),
        ({"data__std": ("much",)}, "must hold numbers only"),
        ({"data__mean": (0.1, 0.2)}, "2 numbers for images of 1 channels"),
        ({"data__mixup": -1.0}, "mixup=-1.0"),
        ({"data__label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"controller__target": 0.0}, "target 0.0 is outside"),
        ({"controller__target": 1.5}, "target 1.5 is outside"),
        ({"controller__name": "pid"}, "unknown controller 'pid'"),
        ({"controller__floor": 0.9}, "floor=0.9 must be below"),
        ({"optimizer__warmup": 2.0}, "warmup=2.0 is outside"),
        ({"train__steps": 0}, "train.steps=0"),
        ({"seed": -1}, "seed=-1 is outside"),
        ({"model__mlp_ratio": 0.0}, "mlp_ratio=0.0 leaves no hidden features"),
        ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"optimizer__b1": 1.5}, "b1=1.5 is outside"),
        ({"optimizer__learning_rate": -1.0}, "must never be negative: .*peak -1.0"),
        ({"optimizer__end_factor": -1.0}, "must never be negative: .*end -0.004"),
        ({"optimizer__weight_decay": -1.0}, "weight_decay=-1.0 must not be negative"),
        ({"sigma__begin": 1.0, "sigma__finish": 0.5}, "sigma must rise between two steps"),
        ({"train__log_every": 0}, "train.log_every=0"),
        ({"checkpoint__keep": 0}, "keep=0"),
        ({"evaluate_checkpoint": "first"}, "unknown evaluate_checkpoint 'first'"),
        ({"init_from": "/nowhere"}, "there is no directory '/nowhere'"),
        ({"compress__method": "gaudi"}, "compress.method='gaudi' needs a trained model"),
    ],
)
def test_bad_configs_are_named_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        loop.train(wrong(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_config_is_left_alone(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"train.steps is 8 there and 9 here"):
        loop.train(tiny_config(steps=9), finished)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_what_does_not_define_a_run_may_change_when_it_goes_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = tiny_config()
    config.train.update(log_every=5, eval_every=3)
    config.checkpoint.update(every=3, keep=9)
    config.evaluate_checkpoint = "best"
    config.profile.update(first=1, steps=2)
    assert loop.train(config, tmp_path / "run")


def test_chosen_steps_are_traced_and_the_run_stays_the_same(finished, tmp_path, caplog):
    assert not (finished / "tensorboard" / "plugins").exists()
    caplog.set_level(logging.INFO, "gaudi_jax")
    config = tiny_config()
    config.profile.steps = 2
    assert loop.train(config, tmp_path)
    assert traced_steps(tmp_path) == [2, 3]  # the first one compiles
    assert "trace of steps 2 to 3 in" in caplog.text
    assert f"--logdir={tmp_path / 'tensorboard'}" in caplog.text
    assert_same(parameters(tmp_path), parameters(finished))


def test_layers_of_attention_and_mlp_are_chosen_apart():
    config = tiny_config("smoke,recipe=budget,attention=low_rank,mlp=gaudi,budget=0.5")
    config.update_from_flattened_dict({"layer.mlp.rank": 2, "layer.mlp.granularity": 4})
    block = loop.build_model(open_task(config).config).blocks[0]
    assert isinstance(block.attention.query, gaudi_jax.LowRankLinear)
    assert (block.mlp.fc1.rank, block.mlp.fc1.granularity) == (2, (4, 4))


@pytest.mark.parametrize("log_every", [pytest.param(2, marks=pytest.mark.slow), 100])
def test_a_loss_that_stays_undefined_stops_the_run(tmp_path, log_every):
    config = tiny_config()
    config.train.update(log_every=log_every, max_skipped=2)
    config.checkpoint.every = 2  # a checkpoint may come before the next row of metrics
    config.optimizer.learning_rate = 1e30
    with pytest.raises(UserError, match=r"the loss is nan at step \d, and the last \d steps were"):
        loop.train(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_step_without_finite_gradients_is_skipped(tmp_path, monkeypatch):
    put_batch, calls = loop.put_batch, []

    def broken_at_the_third(batch, mesh):
        calls.append(batch)
        placed = put_batch(batch, mesh)
        if len(calls) == 3:
            placed["image"] = placed["image"].astype(float) * np.nan
        return placed

    monkeypatch.setattr(loop, "put_batch", broken_at_the_third)
    config = tiny_config()
    config.train.log_every = 1
    config.checkpoint.update(every=1, keep=9)
    assert loop.train(config, tmp_path)
    rows = [row for row in read_metrics(tmp_path) if "train_loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert np.isnan(rows[2]["train_loss"])
    assert np.isfinite([row["train_loss"] for row in rows if row["step"] != 3]).all()
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert saved == [1, 2, 4, 5, 6, 7, 8]
    write_report(tmp_path)
