"""Grain pipelines from a source of images to batches, resumable in the middle of an epoch."""

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import grain
import numpy as np
from absl import flags

from gaudi_jax.data.augment import resize_and_crop, training_image
from gaudi_jax.data.images import Example, ImageSource, as_pictures
from gaudi_jax.data.rand_augment import GREATEST
from gaudi_jax.data.shards import WHOLE, Shard, batched, part_size
from gaudi_jax.errors import UserError

Batch = TypeVar("Batch")

#: Small images are made faster than threads hand them over; workers are there for large ones.
_READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def train_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    crop_padding: int = 0,
    least_area: float = 0.0,
    flip: bool = False,
    magnitude: float = 0.0,
    workers: int = 0,
    shard: Shard = WHOLE,
) -> grain.DatasetIterator:
    """An endless iterator over batches, reshuffled and augmented anew in every epoch.

    Its ``get_state()`` and ``set_state()`` resume it exactly.

    Args:
        source: training images.
        batch_size: images a batch; the rest of an epoch is carried into the next one.
        image_size: height and width of the batches' images.
        seed: of order and augmentation.
        crop_padding: zeros around the image before the random crop, in pixels.
        least_area: smallest share of an image that `random_resized_crop` keeps; 0 for a random crop
            of the resized image instead.
        flip: mirror half of the images.
        magnitude: of `rand_augment`, from 0 to 10; 0 for none.
        workers: processes that read and augment; 0 does it in this one.
        shard: (number, count) of the part of every batch that is read; the whole one by default.

    Returns:
        An iterator over ``{"image": uint8 (B, size, size, C), "label": int32 (B,)}``, with B the
        rows of a part.

    Raises:
        UserError: there are fewer images than a batch needs, or an option is out of range.

    Example:
        >>> from gaudi_jax.data.images import load_images
        >>> from gaudi_jax.data.pipeline import train_batches
        >>> digits = load_images("digits").train
        >>> next(train_batches(digits, batch_size=4, image_size=8, seed=0))["image"].shape
        (4, 8, 8, 1)
    """
    if not 1 <= batch_size <= len(source):
        raise UserError(
            f"data.batch_size={batch_size} must lie in [1, {len(source)}], the number of training "
            "images"
        )
    if crop_padding < 0:
        raise UserError(f"data.{crop_padding=} is negative; give 0 or more pixels")
    if not 0 <= least_area <= 1:
        raise UserError(
            f"data.least_area={least_area} is outside [0, 1]; give a share such as 0.08"
        )
    if least_area and crop_padding:
        raise UserError(
            f"data.{crop_padding=} has no effect beside data.least_area={least_area}; set one to 0"
        )
    if not 0 <= magnitude <= GREATEST:
        raise UserError(f"data.rand_augment={magnitude} is outside [0, {GREATEST:g}]")
    _check_shared_options(batch_size, image_size, workers)
    augment = partial(
        _augment,
        size=image_size,
        padding=crop_padding,
        least_area=least_area,
        flip=flip,
        magnitude=magnitude,
    )
    images = grain.MapDataset.source(as_pictures(source)).seed(seed).shuffle().repeat()
    examples = images.random_map(augment)
    batches = batched(
        examples, batch_size, shard, drop_remainder=True, in_shared_memory=workers > 0
    )
    return iter(_with_workers(batches.to_iter_dataset(_READ_OPTIONS), workers))


def evaluation_batches(
    source: ImageSource,
    *,
    batch_size: int,
    image_size: int,
    crop_fraction: float = 1.0,
    workers: int = 0,
    shard: Shard = WHOLE,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of every image once, in order; the last one is padded.

    Args:
        source: images.
        batch_size: images a batch.
        image_size: height and width of the batches' images.
        crop_fraction: share of the resized image that the central crop keeps, in (0, 1].
        workers: processes that read the images; 0 does it in this one.
        shard: (number, count) of the part of every batch that is read; the whole one by default.

    Returns:
        Batches as in training, with "weight", float32 (B,): 1 for images, 0 for padding.

    Raises:
        UserError: an option is out of range.

    Example:
        >>> from gaudi_jax.data.images import load_images
        >>> from gaudi_jax.data.pipeline import evaluation_batches
        >>> batches = list(evaluation_batches(
        ...     load_images("digits").test, batch_size=64, image_size=8))
        >>> len(batches), int(batches[-1]["weight"].sum())
        (8, 52)
    """
    if not 0 < crop_fraction <= 1:
        raise UserError(f"data.crop_fraction={crop_fraction} is outside (0, 1]")
    _check_shared_options(batch_size, image_size, workers)
    prepare = partial(_prepare, size=image_size, crop_fraction=crop_fraction)
    images = grain.MapDataset.source(as_pictures(source)).map(prepare)
    batches = batched(images, batch_size, shard, drop_remainder=False, in_shared_memory=workers > 0)
    rows = part_size(batch_size, shard)
    # Closed also where a worker raises an error: the others end, and free their batches in shared
    # memory, then and not when the run does.
    with closing(iter(_with_workers(batches.to_iter_dataset(_READ_OPTIONS), workers))) as iterator:
        for batch in sheltered(iterator):
            yield _padded(batch, rows)
    # Every process gives a part of every batch, also where the images have come to their end.
    if len(batches) < math.ceil(len(source) / batch_size):
        one = prepare(as_pictures(source)[0])
        none = {name: np.asarray(value)[None][:0] for name, value in one.items()}
        yield _padded(none, rows)


def _padded(batch: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    missing = rows - len(batch["label"])
    batch["weight"] = np.ones(len(batch["label"]), np.float32)
    return {
        name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
    }


def _check_shared_options(batch_size: int, image_size: int, workers: int) -> None:
    if batch_size < 1 or image_size < 1 or workers < 0:
        raise UserError(
            f"data.{batch_size=} and data.{image_size=} must be positive and data.{workers=} "
            "must not be negative"
        )


def _with_workers(dataset: grain.IterDataset, workers: int) -> grain.IterDataset:
    if not workers:
        return dataset
    if not flags.FLAGS.is_parsed():  # Grain's processes read flags that only absl programs parse
        flags.FLAGS.mark_as_parsed()
    _start_tracker()
    options = grain.MultiprocessingOptions(num_workers=workers)
    return dataset.mp_prefetch(options, worker_init_fn=_as_worker)


def _start_tracker() -> None:
    """Starts the process that frees what shared memory is left when the run ends, without a word.

    Something is left where batches are on their way when it ends. Where other code has started the
    process before, it keeps its warnings. Python starts it with the first worker otherwise, and
    lets signals through after it, which are blocked then (`sheltered`).
    """
    sys.warnoptions.append("ignore:resource_tracker")  # handed on to the process
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()


def sheltered(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of an iterator whose workers outlive a SIGTERM.

    SIGTERM often goes to all processes of a job at once, and the run still needs its batches to
    make its last step and to save. Grain starts workers when a batch is asked for; they inherit
    that the signal is blocked then. The run itself gets it a moment later.

    Args:
        batches: their iterator, which is not closed.
    """
    iterator = iter(batches)
    while True:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            batch = next(iterator)
        except StopIteration:
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield batch


def first_batches(iterator: grain.DatasetIterator, count: int) -> Iterator[Any]:
    """The first batches of an iterator that nothing else uses; it is closed after them."""
    with closing(iterator):
        yield from islice(sheltered(iterator), count)


def _as_worker(number: int, count: int) -> None:
    """A worker ends when its run is killed; it would wait forever."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _augment(example: Example, rng: np.random.Generator, **options: Any) -> Example:
    image = training_image(example["image"], rng, **options)
    return {"image": image, "label": np.int32(example["label"])}


def _prepare(example: Example, *, size: int, crop_fraction: float) -> Example:
    image = resize_and_crop(example["image"], size, crop_fraction)
    return {"image": image, "label": np.int32(example["label"])}
