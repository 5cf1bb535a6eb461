"""Labelled images as random-access sources: embedded, generated, in folders, or from TFDS."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from gaudi_jax.data.prepared import open_prepared
from gaudi_jax.errors import UserError

log = logging.getLogger(__name__)

Example = dict[str, Any]
FORMS = "digits, folder:PATH, tfds:NAME, generated:CLASSESxSIZExCHANNELS"


class ImageSource(Protocol):
    """A random-access sequence of ``{"image": uint8 (H, W, C), "label": int}``."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> Example:
        """One image with its label."""


@dataclasses.dataclass(frozen=True)
class ImageSplits:
    """A labelled image data set.

    Attributes:
        train: images to learn from.
        validation: images for every choice that is made.
        test: images for the final measurement.
        class_names: names of the labels, in their order.
    """

    train: ImageSource
    validation: ImageSource
    test: ImageSource
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)


def load_images(
    name: str,
    *,
    validation_fraction: float = 0.1,
    skip_unreadable: bool = False,
    verify: bool = False,
) -> ImageSplits:
    """Opens a data set by name.

    Args:
        name: one of

            * ``digits``: scikit-learn's 1797 handwritten digits of 8x8 pixels, values 0 ... 16
              scaled to 0 ... 255; the order ``numpy.random.default_rng(0).permutation(1797)``
              gives 1097 train, then 200 validation, then 500 test images;
            * ``folder:PATH``: ``PATH/train/<class>/*``, and ``PATH/validation`` (or ``PATH/val``)
              and ``PATH/test`` likewise where they exist; names that start with a dot are hidden;
            * ``tfds:NAME``: a prepared TensorFlow Datasets set (read without TensorFlow);
            * ``generated:CLASSESxSIZExCHANNELS``: noisy patterns, for trying things out.
        validation_fraction: share of the training images held out where the data set has no
            validation split of its own, in (0, 1).
        skip_unreadable: leave out images that cannot be read, with a message that counts them
            (folders only; reads every image first).
        verify: read every image first, and stop at one that cannot be read (folders only).

    Raises:
        UserError: the name is unknown, or the data are missing, empty or unreadable.

    Example:
        >>> from gaudi_jax.data.images import load_images
        >>> digits = load_images("digits")
        >>> len(digits.train), len(digits.validation), len(digits.test), digits.num_classes
        (1097, 200, 500, 10)
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"data.validation_fraction={validation_fraction} is outside (0, 1)")
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _digits()
    if kind == "folder" and rest:
        return _folder(Path(rest), validation_fraction, skip_unreadable, verify)
    if kind == "tfds" and rest:
        return _tfds(rest, validation_fraction)
    if kind == "generated":
        return _generated(rest)
    raise UserError(f"unknown data set {name!r}; use one of {FORMS}")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images and labels in memory: uint8 (N, H, W, C) and (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Image files, read as RGB when they are asked for: as arrays, or as Pillow's pictures.

    Paths are strings: every worker process receives a copy, and unpickling a million `Path`s takes
    it some seconds.
    """

    paths: Sequence[str]
    labels: Sequence[int]
    pictures: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        read = read_picture if self.pictures else read_image
        return {"image": read(self.paths[index]), "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class SubsetSource:
    """Some images of another source."""

    source: ImageSource
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        example = self.source[int(self.indices[index])]
        image = example["image"]
        if not isinstance(image, Image.Image):
            image = np.atleast_3d(image)
        return {"image": image, "label": int(example["label"])}


@dataclasses.dataclass(frozen=True)
class GeneratedSource:
    """Waves whose direction tells the class, in noise; a function of the index."""

    num_images: int
    num_classes: int
    size: int
    channels: int
    offset: int

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.num_images:
            raise IndexError(index)
        rng = np.random.default_rng(self.offset + index)
        label = index % self.num_classes
        angle = np.pi * label / self.num_classes
        y, x = np.mgrid[: self.size, : self.size] / self.size
        direction = np.cos(angle) * x + np.sin(angle) * y
        wave = np.sin(2 * np.pi * (2 * direction + rng.uniform()))
        noise = rng.normal(scale=0.5, size=(self.size, self.size, self.channels))
        pixels = 127.5 + 60 * (wave[:, :, None] + noise)
        return {"image": np.clip(pixels, 0, 255).astype(np.uint8), "label": label}


def as_pictures(source: ImageSource) -> ImageSource:
    """The same images; what comes from files stays as Pillow decodes it.

    Geometry is Pillow's work too, and an array between the two is copied twice: a tenth of the
    time that an ImageNet image takes from file to batch.

    Example:
        >>> from gaudi_jax.data.images import as_pictures, load_images
        >>> digits = load_images("digits").train
        >>> as_pictures(digits) is digits
        True
    """
    if isinstance(source, SubsetSource):
        return dataclasses.replace(source, source=as_pictures(source.source))
    if isinstance(source, FileSource):
        return dataclasses.replace(source, pictures=True)
    return source


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image file as RGB, uint8 (H, W, 3).

    Raises:
        UserError: the file cannot be read as an image; the message names it.
    """
    return np.asarray(read_picture(path))


def read_picture(path: str | Path) -> Image.Image:
    """Reads an image file as RGB.

    Raises:
        UserError: the file cannot be read as an image; the message names it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # convert would clip all but the darkest to white
                gray = (np.asarray(image) >> 8).astype(np.uint8)
                return Image.fromarray(gray).convert("RGB")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")  # convert always copies
    except FileNotFoundError as error:
        raise UserError(
            f"the image {path} is gone since its folder was listed; put it back and run the same "
            "command again, or begin anew without it, with another --workdir"
        ) from error
    # Pillow's decoders raise many kinds of errors for damaged files.
    except Exception as error:
        raise UserError(
            f"cannot read the image {path} ({error}); repair or remove it, or set "
            "data.skip_unreadable=True with another --workdir"
        ) from error


def _digits() -> ImageSplits:
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    # A pixel counts the dark ones of a cell of 4x4 in the scanned bitmap: 0 ... 16.
    images = np.round(digits.images[..., None] * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    parts = np.split(order, [1097, 1297])
    train, validation, test = (ArraySource(images[p], digits.target[p]) for p in parts)
    return ImageSplits(train, validation, test, tuple(map(str, digits.target_names)))


def _generated(shape: str) -> ImageSplits:
    parts = shape.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(
            f"generated images are described as CLASSESxSIZExCHANNELS, such as generated:10x32x3, "
            f"not {shape!r}"
        )
    num_classes, size, channels = map(int, parts)
    counts = {"train": 512, "validation": 64, "test": 64}
    sources = {
        split: GeneratedSource(count, num_classes, size, channels, offset=1_000_000 * place)
        for place, (split, count) in enumerate(counts.items())
    }
    return ImageSplits(**sources, class_names=tuple(map(str, range(num_classes))))


def _folder(root: Path, fraction: float, skip_unreadable: bool, verify: bool) -> ImageSplits:
    if not root.is_dir():
        raise UserError(f"data folder {root} is not there; give folder:PATH of a directory")
    if not (root / "train").is_dir():
        raise UserError(f"data folder {root} has no folder train; put images in train/<class>/")
    class_names = tuple(sorted(_class_folders(root / "train")))
    if len(class_names) < 2:
        raise UserError(
            f"{root / 'train'} holds {len(class_names)} class folders; at least 2 are needed"
        )

    def read_split(split: str) -> FileSource:
        source = _list_files(root / split, class_names)
        if verify or skip_unreadable:
            source = _verify(source, skip_unreadable)
        return source

    train: ImageSource = read_split("train")
    held_out = next((name for name in ("validation", "val") if (root / name).is_dir()), None)
    if held_out:
        validation: ImageSource = read_split(held_out)
    else:
        train, validation = _hold_out(train, fraction)
    if (root / "test").is_dir():
        test: ImageSource = read_split("test")
    else:
        log.warning("%s has no folder test: the validation images serve as test images", root)
        test = validation
    return ImageSplits(train, validation, test, class_names)


def _class_folders(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}


def _list_files(folder: Path, class_names: tuple[str, ...]) -> FileSource:
    present = _class_folders(folder)
    unknown = sorted(present - set(class_names))
    if unknown:
        raise UserError(f"{folder / unknown[0]} is a class that the training images do not have")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        directory = folder / name
        files = sorted(p for p in directory.glob("*") if p.is_file() and p.name[0] != ".")
        if not files and name in present:
            raise UserError(f"class folder {directory} is empty; add images or remove it")
        paths += map(str, files)
        labels += [label] * len(files)
    if not paths:
        raise UserError(f"{folder} holds no images; put them in {folder}/<class>/")
    return FileSource(paths, labels)


def _verify(source: FileSource, skip_unreadable: bool) -> FileSource:
    readable = []
    for index, path in enumerate(tqdm(source.paths, desc="reading images", unit="image")):
        try:
            read_image(path)
        except UserError:
            if not skip_unreadable:
                raise
        else:
            readable.append(index)
    skipped = len(source) - len(readable)
    if skipped:
        log.warning("%d of %d images cannot be read: skipped", skipped, len(source))
    if not readable:
        raise UserError(f"none of the {len(source)} images can be read")
    return FileSource([source.paths[i] for i in readable], [source.labels[i] for i in readable])


def _hold_out(source: ImageSource, fraction: float) -> tuple[SubsetSource, SubsetSource]:
    """A fixed random share of the training images becomes the validation split."""
    count = max(1, round(fraction * len(source)))
    if count >= len(source):
        raise UserError(f"{len(source)} images are too few to hold out a share of {fraction}")
    order = np.random.default_rng(0).permutation(len(source))
    return SubsetSource(source, np.sort(order[count:])), SubsetSource(source, order[:count])


def _tfds(name: str, fraction: float) -> ImageSplits:
    import tensorflow_datasets as tfds  # slow to import

    info, sources = open_prepared(name)
    labelled = {"image", "label"} <= set(info.features) and isinstance(
        info.features["label"], tfds.features.ClassLabel
    )
    if "train" not in sources or not labelled:
        raise UserError(f"tfds:{name} is not a labelled image set with a train split")

    def whole(split: str) -> SubsetSource:
        return SubsetSource(sources[split], np.arange(len(sources[split])))

    if "validation" in sources:
        train, validation = whole("train"), whole("validation")
    else:
        train, validation = _hold_out(sources["train"], fraction)
    if "test" in sources and "label" in sources["test"][0] and sources["test"][0]["label"] >= 0:
        test = whole("test")
    else:
        log.warning("tfds:%s has no labelled test split: the validation split serves", name)
        test = validation
    return ImageSplits(train, validation, test, tuple(info.features["label"].names))
