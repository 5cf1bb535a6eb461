"""The training loop's step, for benchmarks of speed."""

from typing import Any

import jax.numpy as jnp

from gaudi_jax.cost import cost
from gaudi_jax.training.mesh import make_mesh, place, put_batch
from gaudi_jax.training.setup import build_optimizer, build_schedules
from gaudi_jax.training.step import (
    CostWeights,
    TrainState,
    make_train_step,
    split_model,
    state_layout,
)
from gaudi_jax.training.tasks import Task


def our_step(task: Task, model: Any, batch: dict) -> Any:
    """A function that makes one step of the training loop; the model is used up."""
    config = task.config
    mesh = make_mesh(config.mesh)
    batch = put_batch(batch, mesh)
    schedules = build_schedules(config)
    graphdef, params, other = split_model(model)
    optimizer = build_optimizer(config, model, schedules)
    state = TrainState(jnp.zeros([], jnp.int32), params, other, optimizer.init(params))
    shardings = state_layout(state, mesh)
    state = place(state, shardings)
    weights = CostWeights.of(cost(model, task.example))
    step = make_train_step(graphdef, optimizer, schedules, task, weights, 0, shardings)

    def make() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["train_loss"]

    return make
