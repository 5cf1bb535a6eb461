"""Evaluation of a model over a split of images."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gaudi_jax.data.images import ImageSplits
from gaudi_jax.data.pipeline import evaluation_batches
from gaudi_jax.errors import UserError
from gaudi_jax.training.step import (
    Arrays,
    Batch,
    ImageTask,
    Metrics,
    make_evaluation_step,
    set_sigma,
    split_model,
)


def data_mesh(batch_size: int) -> Mesh:
    """A mesh of all devices with the one axis "data", over which batches are split.

    Raises:
        UserError: the batch cannot be split evenly over the devices.
    """
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        raise UserError(
            f"data.batch_size={batch_size} cannot be split over {devices} devices; "
            f"use a positive multiple of {devices}"
        )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Splits a batch over the mesh's devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def image_task(config: ConfigDict) -> ImageTask:
    """The task that a resolved config describes.

    Raises:
        UserError: mean or std do not fit the images' channels, or a number is out of range.
    """
    data, channels = config.data, config.model.channels
    statistics = {}
    for name in ("mean", "std"):
        values = tuple(data[name])
        if not all(isinstance(value, int | float) for value in values):
            raise UserError(f"data.{name}={values} must hold numbers only, one for each channel")
        if len(values) not in (1, channels):
            raise UserError(
                f"data.{name}={values} has {len(values)} numbers for images of {channels} channels"
            )
        statistics[name] = values if len(values) == channels else values * channels
    if min(statistics["std"]) <= 0:
        raise UserError(f"data.std={statistics['std']} must be positive")
    if not 0 <= data.label_smoothing < 1:
        raise UserError(f"data.label_smoothing={data.label_smoothing} is outside [0, 1)")
    for name in ("mixup", "cutmix"):
        if data[name] < 0:
            raise UserError(f"data.{name}={data[name]} must not be negative; 0 turns it off")
    return ImageTask(
        num_classes=config.model.num_classes,
        mean=statistics["mean"],
        std=statistics["std"],
        label_smoothing=data.label_smoothing,
        mixup=data.mixup,
        cutmix=data.cutmix,
    )


def evaluate_batches(
    step: Callable[[Arrays, Arrays, Batch], Metrics],
    params: Arrays,
    other: Arrays,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, float]:
    """Mean loss and accuracy over all batches."""
    # Sums stay on the device until the end, so that batches follow one another without waiting.
    sums = [step(params, other, put_batch(batch, mesh)) for batch in batches]
    total = {name: float(np.sum([np.asarray(s[name]) for s in sums])) for name in sums[0]}
    return {
        "loss": total["loss"] / total["images"],
        "accuracy": total["correct"] / total["images"],
    }


def evaluate_model(
    model: nnx.Module, config: ConfigDict, splits: ImageSplits, split: str, sigma: Any = None
) -> dict[str, float]:
    """Loss and accuracy of a model on a split, in evaluation mode.

    Args:
        model: the model; it is left as it is.
        config: resolved config of its run.
        splits: the images.
        split: "train", "validation" or "test".
        sigma: masks' sigma, infinity for hard masks; None leaves the model's own.

    Returns:
        "loss" (nats) and "accuracy" (a fraction).
    """
    view = nnx.clone(model)
    view.eval()
    if sigma is not None:
        set_sigma(view, sigma)
    graphdef, params, other = split_model(view)
    mesh = data_mesh(config.data.batch_size)
    params, other = jax.device_put((params, other), NamedSharding(mesh, PartitionSpec()))
    step = make_evaluation_step(graphdef, image_task(config))
    batches = evaluation_batches(
        getattr(splits, split),
        batch_size=config.data.batch_size,
        image_size=config.data.image_size,
        crop_fraction=config.data.crop_fraction,
        workers=config.data.workers,
    )
    return evaluate_batches(step, params, other, batches, mesh)
