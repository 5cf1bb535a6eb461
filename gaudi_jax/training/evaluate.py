"""Evaluation of a model over a split of its data."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gaudi_jax.training.mesh import (
    DATA_PARALLEL,
    batch_shard,
    make_mesh,
    place,
    put_batch,
    state_shardings,
)
from gaudi_jax.training.step import Arrays, make_evaluation_step, set_sigma, split_model
from gaudi_jax.training.tasks import Batch, Metrics, Task


def evaluate_batches(
    step: Callable[[Arrays, Arrays, Batch], Metrics],
    params: Arrays,
    other: Arrays,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, float]:
    """Sums over all batches; nothing where there are none."""
    # Sums stay on the device until the end, so that batches follow one another without waiting.
    sums = [step(params, other, put_batch(batch, mesh)) for batch in batches]
    names = sums[0] if sums else ()
    return {name: float(np.sum([np.asarray(s[name]) for s in sums])) for name in names}


def evaluate_model(
    model: nnx.Module, task: Task, split: str, sigma: Any = None
) -> dict[str, float]:
    """Loss and other results of a model on a split, in evaluation mode, on all devices.

    Args:
        model: the model, whole in every process; it is left as it is.
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
    mesh = make_mesh(DATA_PARALLEL)
    params, other = (place(part, state_shardings(part, mesh)) for part in (params, other))
    step = make_evaluation_step(graphdef, task, mesh)
    batches = task.evaluation_batches(split, batch_shard(mesh), multiple=mesh.size)
    sums = evaluate_batches(step, params, other, batches, mesh)
    return task.results(sums, split)
