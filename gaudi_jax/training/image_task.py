"""Classification of images."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from gaudi_jax.data.augment import erase, mix, normalize, smooth_labels
from gaudi_jax.data.images import ImageSplits, load_images
from gaudi_jax.data.pipeline import evaluation_batches, train_batches
from gaudi_jax.data.shards import WHOLE, Shard, round_up
from gaudi_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageTask:
    """Images and their classes (the contract is `gaudi_jax.training.tasks.Task`).

    Attributes:
        config: resolved config.
        splits: the images.
        mean: of the pixels (in [0, 1]), one a channel.
        std: of the pixels (in [0, 1]), one a channel.
    """

    config: ConfigDict
    splits: ImageSplits
    mean: tuple[float, ...]
    std: tuple[float, ...]
    unit = "image"

    @classmethod
    def open(cls, config: ConfigDict) -> "ImageTask":
        """Opens the images of a config.

        Raises:
            UserError: they are unknown, missing or unreadable, or an option is out of range.
        """
        data = config.data
        splits = load_images(
            data.name,
            validation_fraction=data.validation_fraction,
            skip_unreadable=data.skip_unreadable,
            verify=data.verify,
        )
        if not 0 <= data.label_smoothing < 1:
            raise UserError(f"data.label_smoothing={data.label_smoothing} is outside [0, 1)")
        for name in ("mixup", "cutmix"):
            if data[name] < 0:
                raise UserError(f"data.{name}={data[name]} must not be negative; 0 turns it off")
        if not 0 <= data.random_erasing <= 1:
            raise UserError(f"data.random_erasing={data.random_erasing} is no chance in [0, 1]")
        channels = splits.train[0]["image"].shape[-1]
        if data.rand_augment and channels not in (1, 3):
            raise UserError(
                f"data.rand_augment={data.rand_augment} needs images of 1 or 3 channels, not of "
                f"{channels}; set it to 0"
            )
        resolved = config.copy_and_resolve_references()
        with resolved.unlocked():
            resolved.model.image_size = data.image_size
            resolved.model.channels = channels
            resolved.model.num_classes = splits.num_classes
        mean, std = (_by_channel(name, data[name], channels) for name in ("mean", "std"))
        if min(std) <= 0:
            raise UserError(f"data.std={std} must be positive")
        return cls(resolved, splits, mean, std)

    @property
    def units_per_step(self) -> int:
        """Images of a training step."""
        return self.config.data.batch_size

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """One image."""
        size = self.config.data.image_size
        return jax.ShapeDtypeStruct((1, size, size, self.config.model.channels), jnp.float32)

    def describe(self) -> str:
        """The data in a few words."""
        images, classes = len(self.splits.train), self.splits.num_classes
        return f"{self.config.data.name}: {images} training images, {classes} classes"

    def save_extras(self, workdir: Path) -> None:
        """Nothing."""

    def train_batches(self, shard: Shard = WHOLE) -> grain.DatasetIterator:
        """Endless batches of augmented images, resumable."""
        data = self.config.data
        return train_batches(
            self.splits.train,
            batch_size=data.batch_size,
            image_size=data.image_size,
            seed=self.config.seed,
            crop_padding=data.crop_padding,
            least_area=data.least_area,
            flip=data.flip,
            magnitude=data.rand_augment,
            workers=data.workers,
            shard=shard,
        )

    def evaluation_batches(
        self, split: str, shard: Shard = WHOLE, *, multiple: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """All images of a split, once, in order; the last batch is padded."""
        data = self.config.data
        return evaluation_batches(
            getattr(self.splits, split),
            batch_size=round_up(data.batch_size // self.config.train.accumulate, multiple),
            image_size=data.image_size,
            crop_fraction=data.crop_fraction,
            workers=data.workers,
            shard=shard,
        )

    def abstract_batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Images and labels."""
        return {
            "image": jax.ShapeDtypeStruct((rows, *self.example.shape[1:]), jnp.uint8),
            "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
        }

    def inputs(self, batch: Mapping[str, Array]) -> Array:
        """Normalised images."""
        return normalize(batch["image"], self.mean, self.std)

    def loss(
        self, model: Any, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Cross-entropy, with erasing, label smoothing, mixup and cutmix as the config says."""
        data = self.config.data
        mix_key, dropout_key = jax.random.split(key)
        inputs = self.inputs(batch)
        if data.random_erasing:
            mix_key, erase_key = jax.random.split(mix_key)
            inputs = erase(erase_key, inputs, data.random_erasing)
        targets = smooth_labels(batch["label"], self.splits.num_classes, data.label_smoothing)
        images, targets = mix(
            mix_key,
            inputs,
            targets,
            mixup_alpha=data.mixup,
            cutmix_alpha=data.cutmix,
        )
        logits = model(images, rngs=nnx.Rngs(dropout=dropout_key))
        accuracy = (logits.argmax(-1) == targets.argmax(-1)).mean()
        return optax.softmax_cross_entropy(logits, targets).mean(), {"accuracy": accuracy}

    def sums(self, model: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Sums of loss, correct answers and images, without padding."""
        logits = model(self.inputs(batch))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        weight = batch["weight"]
        return {
            "loss": (losses * weight).sum(),
            "correct": ((logits.argmax(-1) == batch["label"]) * weight).sum(),
            "images": weight.sum(),
        }

    def results(self, sums: Mapping[str, float], split: str) -> dict[str, float]:
        """Mean loss (nats) and accuracy (a fraction)."""
        return {
            "loss": sums["loss"] / sums["images"],
            "accuracy": sums["correct"] / sums["images"],
        }

    def score(self, results: Mapping[str, float]) -> float:
        """The accuracy."""
        return results["accuracy"]

    def remarks(self, model: nnx.Module) -> dict[str, Any]:
        """Nothing."""
        return {}


def _by_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
    values = tuple(values)
    if not all(isinstance(value, int | float) for value in values):
        raise UserError(f"data.{name}={values} must hold numbers only, one for each channel")
    if len(values) not in (1, channels):
        raise UserError(
            f"data.{name}={values} has {len(values)} numbers for images of {channels} channels"
        )
    return values if len(values) == channels else values * channels
