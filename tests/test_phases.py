"""Runs in several phases: dense, compressed, compressed again."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gaudi_jax
from gaudi_jax import GaudiLinear, LowRankLinear
from gaudi_jax.compression import densify
from gaudi_jax.compression import layer as layer_module
from gaudi_jax.errors import UserError
from gaudi_jax.layers import GeneralLinear
from gaudi_jax.report import summary_table, write_report
from gaudi_jax.training import loop, restructure
from gaudi_jax.training.load import abstract_model
from gaudi_jax.training.metrics import read_metrics
from gaudi_jax.training.moments import Moments, estimate_moments
from gaudi_jax.training.phases import phases
from gaudi_jax.training.tasks import open_task
from tests.runs import assert_same, parameters, rows_without_time, steps_saved, stop_at, tiny_config

pytestmark = pytest.mark.slow  # every phase compiles its steps and its searches


def phased_config(stages=((0.25, 0.6), (0.5, 0.4)), **options):
    config = tiny_config("smoke,layer=dense", steps=8)
    config.model.mlp_ratio = 1.0  # one shape of kernels, so that one search is compiled
    config.compress.update(method="gaudi", stages=stages, rounds=4, calibration_batches=2)
    config.compress.update(options)
    config.optimizer.update(factor_scale=4.0, scale_by_width=True)
    config.checkpoint.every = 3
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("phased")
    assert loop.train(phased_config(), workdir)
    return workdir


def spread_config():
    config = phased_config(method="spread", blocks=4)
    config.optimizer.update(structural_learning_rate=0.0, location_learning_rate=0.0)
    return config


@pytest.fixture(scope="module")
def spread_blocks(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("spread")
    assert loop.train(spread_config(), workdir)
    return workdir


def test_each_phase_has_its_structure_and_budget(finished):
    plans = [json.loads((finished / f"plan-{step}.json").read_text()) for step in (2, 4)]
    relative = [plan["multiplications"] / plan["dense_multiplications"] for plan in plans]
    assert 0.3 < relative[1] <= 0.4 < relative[0] <= 0.6
    model = gaudi_jax.load(finished)
    assert isinstance(model.blocks[0].mlp.fc1, GaudiLinear)
    config = phased_config()
    first, *_ = phases(config)
    dense = abstract_model(config, first, finished)
    assert isinstance(dense.blocks[0].mlp.fc1, nnx.Linear)


def test_the_summary_tells_what_compression_cost(finished):
    summary = write_report(finished)
    begun = {row["phase"]: row for row in read_metrics(finished) if "phase" in row}
    assert sorted(begun) == [1, 2]
    assert [row["step"] for row in begun.values()] == [2, 4]
    assert summary["dense_validation_loss"] == begun[1]["dense_validation_loss"]
    assert summary["compressed_validation_loss"] == begun[2]["compressed_validation_loss"]
    assert "Compressed, before training, validation accuracy" in summary_table(summary)
    # The test images are looked at once.
    assert not any("test" in name for row in begun.values() for name in row)


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_resuming_in_any_phase_equals_never_stopping(finished, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert not loop.train(phased_config(), tmp_path)
    for begins in (2, 4):
        assert (tmp_path / f"plan-{begins}.json").exists() == (step > begins)
    assert loop.train(phased_config(), tmp_path)
    assert_same(parameters(tmp_path), parameters(finished))
    resumed = [row for row in rows_without_time(tmp_path) if "resumed_from" not in row]
    assert resumed == rows_without_time(finished)


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_with_spread_blocks_resumes_likewise(spread_blocks, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert not loop.train(spread_config(), tmp_path)
    assert loop.train(spread_config(), tmp_path)
    assert_same(parameters(tmp_path), parameters(spread_blocks))


def test_spread_blocks_stay_on_parts_of_the_axes(spread_blocks):
    layer = gaudi_jax.load(spread_blocks).blocks[0].mlp.fc1
    parts = 4 * np.ravel(layer.widths[...])
    np.testing.assert_allclose(parts, np.round(parts), atol=1e-6)
    assert set(np.round(parts).tolist()) <= {1, 2, 4}


def test_a_signal_while_it_is_compressed_leaves_that_to_the_next_start(
    finished, tmp_path, monkeypatch
):
    search = layer_module.decompose

    def killed(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return search(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(layer_module, "decompose", killed)
        assert not loop.train(phased_config(), tmp_path)
    assert steps_saved(tmp_path) == [2]
    assert not (tmp_path / "plan-2.json").exists()
    assert loop.train(phased_config(), tmp_path)
    assert_same(parameters(tmp_path), parameters(finished))


def test_the_optimizer_goes_on_with_the_moments_of_the_phase_before(
    finished, tmp_path, monkeypatch
):
    made = loop.restructure
    monkeypatch.setattr(loop, "restructure", lambda *args: made(*args)._replace(moments=None))
    assert loop.train(phased_config(), tmp_path)
    with pytest.raises(AssertionError):
        assert_same(parameters(tmp_path), parameters(finished))


def test_learned_blocks_are_found_anew(tmp_path):
    """The moments of factors that are gone do not become those of others, of other shapes."""
    config = phased_config(stages=((0.5, 0.4),))
    config.layer = tiny_config("smoke,recipe=budget").layer
    assert loop.train(config, tmp_path)
    (begun,) = [row for row in read_metrics(tmp_path) if "phase" in row]
    assert not any(name.startswith("dense_") for name in begun)
    plan = json.loads((tmp_path / "plan-4.json").read_text())
    assert plan["multiplications"] <= 0.4 * plan["dense_multiplications"]
    assert max(entry["num_blocks"] for entry in plan["layers"].values()) < config.model.width


def test_a_damaged_checkpoint_is_passed_over_for_one_of_the_phase_before(finished, tmp_path):
    config = phased_config(stages=((0.5, 0.4),), method="low_rank")
    config.checkpoint.update(every=100, keep=3)
    assert loop.train(config, tmp_path)
    for file in (tmp_path / "checkpoints" / "8" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert loop.train(config, tmp_path)  # from step 4, whose model is dense
    assert {"resumed_from": 4} in read_metrics(tmp_path)
    assert isinstance(gaudi_jax.load(tmp_path).blocks[0].mlp.fc1, LowRankLinear)


def test_schedules_go_on_across_phases(finished, tmp_path):
    config = phased_config()
    config.compress.method = "none"
    assert loop.train(config, tmp_path)
    rates = [
        [row["learning_rate"] for row in read_metrics(folder) if "learning_rate" in row]
        for folder in (finished, tmp_path)
    ]
    assert rates[0] == rates[1]


def test_the_optimizer_of_a_later_phase_uses_the_schedule_where_it_stands():
    config = open_task(phased_config()).config
    schedules = loop.build_schedules(config)
    model = loop.build_model(config)
    params = loop.split_model(model)[1]
    grads = jax.tree.map(jnp.ones_like, params)
    sizes = []
    for made in (0, 7):
        tx = loop.build_optimizer(config, model, schedules, made=made)
        updates, _ = tx.update(grads, tx.init(params), params)
        sizes.append(float(jnp.abs(updates["head"]["bias"]).max()))
        assert sizes[-1] == pytest.approx(float(schedules.learning_rate(made)), rel=1e-3)
    assert sizes[0] != sizes[1]


def test_a_mistake_in_a_late_stage_is_named_before_anything_is_written(tmp_path):
    config = phased_config(stages=((0.5, 0.5), (0.75, 1e-5)))
    with pytest.raises(UserError, match="budget=1e-05"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- dense again


class Mixed(nnx.Module):
    def __init__(self, rngs):
        self.split = GeneralLinear(LowRankLinear(6, 8, rank=2, rngs=rngs), (6,), (2, 4))
        self.blocks = GaudiLinear(8, 5, use_bias=False, rngs=rngs)
        self.again = self.blocks
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        y = self.split(x)
        return self.head(self.blocks(y.reshape(*y.shape[:-2], 8)))


def test_densify_keeps_the_function_and_the_model():
    model = Mixed(nnx.Rngs(0))
    model.eval()
    x = jax.random.normal(jax.random.key(1), (3, 6))
    before = model(x)
    dense = densify(model)
    assert type(dense.split) is nnx.LinearGeneral
    assert dense.again is dense.blocks
    assert type(dense.blocks) is nnx.Linear
    assert dense.blocks.bias is None
    np.testing.assert_allclose(dense(x), before, atol=1e-5)
    assert isinstance(model.blocks, GaudiLinear)
    np.testing.assert_array_equal(model(x), before)
    shapes = nnx.eval_shape(lambda: densify(Mixed(nnx.Rngs(0))))
    assert shapes.blocks.kernel.shape == (8, 5)


def test_moments_of_kernels_that_have_no_past_are_estimated():
    config = phased_config()
    task = open_task(config)
    model = loop.build_model(task.config)
    known = ("head", "kernel")
    past = jnp.full(model.head.kernel.shape, 2.0)
    pasts = {known: past, ("gone",): past}
    moments = Moments(jnp.int32(10**6), pasts, pasts)
    found = estimate_moments(model, moments, task, 3)
    np.testing.assert_array_equal(found.first[known], past)
    assert ("gone",) not in found.first
    kernel = ("blocks", 0, "mlp", "fc1", "kernel")
    first, second = found.first[kernel], found.second[kernel]
    assert first.shape == model.blocks[0].mlp.fc1.kernel.shape
    assert float(jnp.abs(first).max()) > 0
    assert (second >= first**2 - 1e-12).all()  # the mean square is at least the squared mean


def test_estimated_moments_are_of_the_gradients_that_the_optimizer_sees():
    task = open_task(phased_config())
    model = loop.build_model(task.config)
    unknown = ("blocks", 0, "mlp", "fc1", "kernel")
    plain = estimate_moments(model, Moments(jnp.int32(5), {}, {}), task, 2)
    # As if clipping had halved all gradients.
    halved = [
        {path: x * scale for path, x in known.items() if path != unknown}
        for known, scale in zip(plain[1:], (0.5, 0.25), strict=True)
    ]
    found = estimate_moments(model, Moments(jnp.int32(5), *halved), task, 2)
    for known, estimated, scale in zip(plain[1:], found[1:], (0.5, 0.25), strict=True):
        np.testing.assert_allclose(estimated[unknown], scale * known[unknown], rtol=1e-4)


def test_moments_and_calibration_take_the_batches_in_parts():
    config = phased_config()
    config.data.update(mixup=0.0, cutmix=0.0, random_erasing=0.0)
    task = open_task(config)
    model = loop.build_model(task.config)
    whole = estimate_moments(model, Moments(jnp.int32(5), {}, {}), task, 1)
    inputs, _ = restructure._calibration(task)
    config.train.accumulate = 2
    task = open_task(config)
    parts = estimate_moments(model, Moments(jnp.int32(5), {}, {}), task, 1)
    for one, other in zip(whole[1:], parts[1:], strict=True):
        for path, moment in one.items():
            np.testing.assert_allclose(other[path], moment, atol=1e-5)
    pieces = list(restructure._calibration(task))
    assert len(pieces) == 4
    np.testing.assert_array_equal(np.stack(pieces[:2], axis=1).reshape(inputs.shape), inputs)
