"""Evaluation of a model over a split of its data."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gaudi_jax.errors import UserError
from gaudi_jax.training.step import Arrays, make_evaluation_step, set_sigma, split_model
from gaudi_jax.training.tasks import Batch, Metrics, Task


def data_mesh(batch_size: int, accumulate: int = 1) -> Mesh:
    """A mesh of all devices with the one axis "data", over which batches are split.

    Args:
        batch_size: of a training step.
        accumulate: micro-batches of a step, which follow one another.

    Raises:
        UserError: the batch cannot be split evenly.
    """
    devices = jax.device_count()
    parts = devices * accumulate
    if batch_size < 1 or batch_size % parts:
        into = f" and train.{accumulate=} micro-batches" if accumulate > 1 else ""
        raise UserError(
            f"data.batch_size={batch_size} cannot be split over {devices} devices{into}; "
            f"use a positive multiple of {parts}"
        )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Splits a batch over the mesh's devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def evaluate_batches(
    step: Callable[[Arrays, Arrays, Batch], Metrics],
    params: Arrays,
    other: Arrays,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, float]:
    """Sums over all batches."""
    # Sums stay on the device until the end, so that batches follow one another without waiting.
    sums = [step(params, other, put_batch(batch, mesh)) for batch in batches]
    return {name: float(np.sum([np.asarray(s[name]) for s in sums])) for name in sums[0]}


def evaluate_model(
    model: nnx.Module, task: Task, split: str, sigma: Any = None
) -> dict[str, float]:
    """Loss and other results of a model on a split, in evaluation mode.

    Args:
        model: the model; it is left as it is.
        task: its data.
        split: "train", "validation" or "test".
        sigma: masks' sigma, infinity for hard masks; None leaves the model's own.

    Returns:
        The task's results, such as "loss" (nats) and "accuracy" (a fraction).
    """
    view = nnx.clone(model)
    view.eval()
    if sigma is not None:
        set_sigma(view, sigma)
    graphdef, params, other = split_model(view)
    mesh = data_mesh(task.config.data.batch_size, task.config.train.accumulate)
    params, other = jax.device_put((params, other), NamedSharding(mesh, PartitionSpec()))
    step = make_evaluation_step(graphdef, task)
    sums = evaluate_batches(step, params, other, task.evaluation_batches(split), mesh)
    return task.results(sums, split)
