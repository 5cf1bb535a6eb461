import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gaudi_jax.data.images import load_images
from gaudi_jax.data.pipeline import train_batches
from gaudi_jax.errors import UserError
from gaudi_jax.training.checkpoint import Checkpointer


def make_state(value):
    """Parameters, an optimizer state with named tuples, and a counter."""
    params = {"layer": {0: {"kernel": jnp.full((64, 32), float(value)), "bias": jnp.arange(32.0)}}}
    opt_state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    return {"step": jnp.int32(value), "params": params, "opt_state": opt_state, "other": {}}


class Position:
    """A data iterator's state."""

    def __init__(self, index=0):
        self.state = {"next_index": index}

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def saved(tmp_path):
    """A directory with checkpoints 1, 2 and 3."""
    directory = tmp_path / "checkpoints"
    with Checkpointer(directory, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), Position(step))
    return directory


def restore(directory, **options):
    with Checkpointer(directory, read_only=True) as checkpoints:
        return checkpoints.restore(abstract(make_state(0)), **options)


def data_files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)


def test_restores_the_newest_or_the_one_asked_for(saved):
    restored = restore(saved)
    assert restored.step == 3
    assert_same(restored.state, make_state(3))
    assert_same(restore(saved, step=1).state, make_state(1))
    with pytest.raises(UserError, match="no checkpoint 7; it has 1, 2, 3"):
        restore(saved, step=7)


def test_parts_can_be_restored_alone(saved):
    with Checkpointer(saved, read_only=True) as checkpoints:
        state = checkpoints.restore({"params": abstract(make_state(0)["params"])}).state
    assert_same(state, {"params": make_state(3)["params"]})


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists()
    with Checkpointer(tmp_path / "empty") as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))) is None


def test_keeps_the_last_and_the_best(tmp_path):
    for steps in ((1, 2, 3), (4, 5)):  # the best one survives a restart
        with Checkpointer(tmp_path, keep=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, make_state(step), score={2: 0.9, 4: 0.5}.get(step, 0.1))
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
    assert restore(tmp_path, step="best").step == 2


def test_of_equal_scores_the_newest_is_best_and_kept(tmp_path):
    with Checkpointer(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make_state(step), score=None if step in (1, 4) else 0.9)
    assert restore(tmp_path, step="best").step == 3
    with Checkpointer(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 4]  # and 1, without a score, is not kept


def test_checkpoints_without_a_score_are_never_the_best(saved):
    with pytest.raises(UserError, match="has a score"):
        restore(saved, step="best")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(saved, caplog):
    (saved / "3" / "about" / "metadata").write_text("{")
    shutil.rmtree(saved / "2" / "params")
    with caplog.at_level(logging.WARNING):
        assert restore(saved).step == 1
    assert "checkpoint 3 is damaged" in caplog.text
    assert "checkpoint 2 is damaged" in caplog.text
    assert "using checkpoint 1" in caplog.text
    assert (saved / "3").exists()  # reading only moves nothing
    with Checkpointer(saved, keep=3) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))).step == 1
        for step in (2, 3):  # training goes on and comes by the same steps
            checkpoints.save(step, make_state(10 * step))
    assert (saved / "3.damaged").exists()
    assert_same(restore(saved).state, make_state(30))


def test_all_damaged_is_an_error_that_keeps_the_files(saved):
    for step in (1, 2, 3):
        (saved / str(step) / "about" / "metadata").write_text("{")
    with Checkpointer(saved) as checkpoints, pytest.raises(UserError, match="every checkpoint"):
        checkpoints.restore(abstract(make_state(0)))
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def test_an_error_that_is_not_damage_costs_no_checkpoint(saved):
    class BrokenIterator:
        def set_state(self, state):
            raise OSError("no space left")

    with Checkpointer(saved) as checkpoints, pytest.raises(OSError, match="no space"):
        checkpoints.restore(abstract(make_state(0)), BrokenIterator())
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]


def test_a_step_that_would_not_be_saved_is_an_error(saved):
    with Checkpointer(saved) as checkpoints, pytest.raises(RuntimeError, match="step 2"):
        checkpoints.save(2, make_state(2))


# Reads that fail leave coroutines of tensorstore behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_anywhere_never_gives_wrong_values(saved, tmp_path, damage):
    """Each file of the newest checkpoint in turn: correct values, or the checkpoint before."""
    fell_back = 0
    for file in data_files(saved / "3"):
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        damaged = copy / file.relative_to(saved)
        content = bytearray(file.read_bytes())
        if damage == "delete":
            damaged.unlink()
        elif damage == "truncate":
            damaged.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 0xFF
            damaged.write_bytes(content)
        position = Position()
        with Checkpointer(copy, read_only=True) as checkpoints:
            restored = checkpoints.restore(abstract(make_state(0)), position)
        assert_same(restored.state, make_state(restored.step))
        assert position.state == {"next_index": restored.step}
        fell_back += restored.step == 2
        shutil.rmtree(copy)
    assert fell_back > 0


def test_a_half_written_save_does_not_count(saved):
    shutil.copytree(saved / "3", saved / "4.orbax-checkpoint-tmp")
    with Checkpointer(saved, keep=3) as checkpoints:
        assert checkpoints.steps() == [1, 2, 3]
        checkpoints.save(4, make_state(4))
    assert restore(saved).step == 4


def test_another_structure_is_an_error_that_names_it(saved):
    other = abstract(make_state(0))
    other["params"] = {"layer": {0: {"kernel": jax.ShapeDtypeStruct((64, 16), jnp.float32)}}}
    with (
        Checkpointer(saved, read_only=True) as checkpoints,
        pytest.raises(UserError, match=r"2 arrays differ \(layer.0.bias, layer.0.kernel\)"),
    ):
        checkpoints.restore(other)


def test_the_data_iterator_goes_on_where_it_was(tmp_path):
    def make_iterator():
        source = load_images("generated:3x8x1").train
        return train_batches(source, batch_size=100, image_size=8, seed=1, crop_padding=2)

    iterator = make_iterator()
    with Checkpointer(tmp_path) as checkpoints:
        for _ in range(7):  # in the middle of the second epoch
            next(iterator)
        checkpoints.save(7, make_state(7), iterator)
        expected = [next(iterator) for _ in range(3)]
        resumed = make_iterator()
        checkpoints.wait()
        checkpoints.restore(abstract(make_state(0)), resumed)
    for batch in expected:
        assert_same(next(resumed), batch)


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(UserError, match="keep=0"):
        Checkpointer(tmp_path, keep=0)


@pytest.mark.slow
def test_restores_onto_other_devices(saved):
    script = f"""
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from gaudi_jax.training.checkpoint import Checkpointer
mesh = jax.make_mesh((8,), ("data",))
sharding = NamedSharding(mesh, PartitionSpec("data"))
kernel = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)
bias = jax.ShapeDtypeStruct((32,), jnp.float32, sharding=sharding)
with Checkpointer({str(saved)!r}, read_only=True) as checkpoints:
    layer = {{"kernel": kernel, "bias": bias}}
    restored = checkpoints.restore({{"params": {{"layer": {{0: layer}}}}}})
params = restored.state["params"]["layer"][0]
assert len(params["kernel"].sharding.device_set) == 8
assert (params["kernel"] == 3).all() and (params["bias"] == jnp.arange(32)).all()
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], check=True, cwd=root, env=os.environ | flags)
