"""What is learned: the data of a run, and how a batch becomes a loss and a result."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from gaudi_jax.data.shards import WHOLE, Shard
from gaudi_jax.errors import UserError
from gaudi_jax.training.image_task import ImageTask
from gaudi_jax.training.text_task import TextTask

Batch = dict[str, Array]
Metrics = dict[str, Array]


class Task(Protocol):
    """The data of a run, and how a batch becomes a loss and a result.

    Attributes:
        unit: what is counted for throughput, such as "image".
    """

    unit: str

    @property
    def config(self) -> ConfigDict:
        """The run's config, in which the sizes that the data decide are filled in."""

    @property
    def units_per_step(self) -> int:
        """How many units a training step takes."""

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """One of the model's inputs, for counting its cost."""

    def describe(self) -> str:
        """The data in a few words."""

    def save_extras(self, workdir: Path) -> None:
        """Writes into a run's workdir what use of its model takes beside its parameters."""

    def train_batches(self, shard: Shard = WHOLE) -> grain.DatasetIterator:
        """Endless training batches, or one part of each, resumable."""

    def evaluation_batches(
        self, split: str, shard: Shard = WHOLE, *, multiple: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """All of a split ("train", "validation" or "test"), once, in order, or parts of it.

        Batches are as large as those of training, rounded up to a multiple.
        """

    def abstract_batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a training batch of so many examples."""

    def inputs(self, batch: Batch) -> Array:
        """What the model reads of an evaluation batch; traceable."""

    def loss(self, model: nnx.Module, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        """Training loss, a scalar, and metrics of a batch; traceable."""

    def sums(self, model: nnx.Module, batch: Batch) -> Metrics:
        """Sums over an evaluation batch, which add up over batches; traceable."""

    def results(self, sums: Mapping[str, float], split: str) -> dict[str, float]:
        """From the sums over a whole split to its "loss" and other results."""

    def score(self, results: Mapping[str, float]) -> float:
        """What "best" compares: higher is better."""

    def remarks(self, model: nnx.Module) -> dict[str, Any]:
        """What else the summary of a trained model says; plain values."""


def open_task(config: ConfigDict) -> Task:
    """Opens the data of a config: images to classify, or text to continue.

    Raises:
        UserError: the task or its data are unknown, missing or unreadable, or an option is out of
            range.
    """
    if config.task == "images":
        return ImageTask.open(config)
    if config.task == "text":
        return TextTask.open(config)
    raise UserError(f"unknown task {config.task!r}; use images or text")
