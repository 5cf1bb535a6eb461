import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from gaudi_jax.training.memory import estimate_memory
from gaudi_jax.training.mesh import AXES
from gaudi_jax.training.setup import build_model, build_optimizer, build_schedules
from gaudi_jax.training.step import TrainState, laid_out, split_model
from gaudi_jax.training.tasks import open_task
from tests.runs import tiny_config


def estimate(shape=(1, 1, 1), **changes):
    config = tiny_config("layer=dense")
    config.update_from_flattened_dict(changes)
    task = open_task(config)
    mesh = AbstractMesh(shape, AXES, (AxisType.Auto,) * 3)
    model = nnx.eval_shape(lambda: build_model(task.config))
    graphdef, params, other = split_model(model)
    optimizer = build_optimizer(task.config, model, build_schedules(task.config))
    step = jax.ShapeDtypeStruct((), np.int32)
    state = TrainState(step, params, other, jax.eval_shape(optimizer.init, params))
    state = laid_out(state, mesh)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    return estimate_memory(graphdef, state, task, mesh), 4 * sum(sizes)


def test_what_the_state_takes_is_exact():
    memory, size = estimate()
    assert memory.parameters == memory.gradients == size
    assert memory.optimizer == pytest.approx(2 * size, rel=0.01)  # and a few counters


def test_activations_grow_with_the_batch_on_a_device():
    memory, _ = estimate()
    assert estimate((2, 2, 1))[0].activations == memory.activations // 4
    assert estimate(**{"train.accumulate": 2})[0].activations == memory.activations // 2
    # What 16 tokens of 16 features leave at least: what goes into four layers, the MLP's twice as
    # wide, in 32 images.
    assert memory.activations > 32 * 16 * (16 * 3 + 32) * 4


def test_what_is_split_takes_less():
    memory, size = estimate((1, 4, 1))
    assert size / 4 < memory.parameters < size / 2  # biases and norms lie whole everywhere


@pytest.mark.slow
def test_remat_keeps_less_and_computes_the_same():
    assert estimate(**{"model.remat": True})[0].activations < estimate()[0].activations / 2
    gradients = []
    for remat in (False, True):
        config = tiny_config()
        config.model.update(remat=remat, dropout=0.1)
        task = open_task(config)
        graphdef, params, other = split_model(build_model(task.config))
        batch = next(task.train_batches())

        def loss(params, graphdef=graphdef, other=other, task=task, batch=batch):
            return task.loss(nnx.merge(graphdef, params, other), batch, jax.random.key(0))[0]

        gradients.append(jax.jit(jax.grad(loss))(params))
    for kept, computed in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(computed, kept, atol=1e-6)
