"""Augmentation: geometry on the host, one image at a time; mixing on the device, by batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image, ImageOps

from gaudi_jax.data.rand_augment import rand_augment

#: Width over height of random parts of an image, and how often a part is drawn that does not fit.
PROPORTIONS, ATTEMPTS = (3 / 4, 4 / 3), 10
#: Share of the image's area, and height over width, of the box that random erasing fills.
ERASED_AREA, ERASED_PROPORTIONS = (0.02, 1 / 3), (0.3, 1 / 0.3)

# ---- on the host: numpy arrays, uint8 (H, W, C), or Pillow's pictures ----


def training_image(
    image: UInt8[np.ndarray, "H W C"] | Image.Image,
    rng: np.random.Generator,
    *,
    size: int,
    padding: int = 0,
    least_area: float = 0.0,
    flip: bool = False,
    magnitude: float = 0.0,
) -> UInt8[np.ndarray, "size size C"]:
    """All random changes of one image; large ones stay Pillow's until the last is made.

    Args:
        image: the image.
        rng: source of all choices.
        size: side of the result in pixels.
        padding: of `random_crop`, which is made of the resized image where `least_area` is 0.
        least_area: of `random_resized_crop`.
        flip: mirror half of the images.
        magnitude: of `rand_augment`; 0 for none.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.data.augment import training_image
        >>> image = np.zeros((40, 60, 3), np.uint8)
        >>> training_image(image, np.random.default_rng(0), size=32, flip=True).shape
        (32, 32, 3)
    """
    if least_area:
        image = random_resized_crop(as_picture(image), size, least_area, rng)
    else:
        pixels = resize(image, size)
        crop = padding or pixels.shape[:2] != (size, size)
        image = random_crop(pixels, size, padding, rng) if crop else pixels
    if flip and rng.random() < 0.5:
        image = ImageOps.mirror(image) if isinstance(image, Image.Image) else image[:, ::-1]
    if magnitude:
        image = rand_augment(as_picture(image), magnitude, rng)
    return as_pixels(image)


def as_picture(image: UInt8[np.ndarray, "H W C"] | Image.Image) -> Image.Image:
    """An image as Pillow's; one channel is grey."""
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def as_pixels(image: UInt8[np.ndarray, "H W C"] | Image.Image) -> UInt8[np.ndarray, "H W C"]:
    """An image as an array with channels."""
    return np.atleast_3d(np.asarray(image))


def resize(
    image: UInt8[np.ndarray, "H W C"] | Image.Image, shorter: int
) -> UInt8[np.ndarray, "new_height new_width C"]:
    """Resizes the shorter side to ``shorter`` pixels (bicubic) and keeps the proportions.

    An array that fits already is returned as it is.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.data.augment import resize
        >>> resize(np.zeros((40, 60, 3), np.uint8), 20).shape
        (20, 30, 3)
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[1::-1]
    if min(height, width) == shorter:
        return as_pixels(image)
    scale = shorter / min(height, width)
    new_size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    return as_pixels(as_picture(image).resize(new_size, Image.Resampling.BICUBIC))


def resize_and_crop(
    image: UInt8[np.ndarray, "H W C"] | Image.Image, size: int, crop_fraction: float = 1.0
) -> UInt8[np.ndarray, "size size C"]:
    """Resizes the shorter side to ``size / crop_fraction`` and crops the centre.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.data.augment import resize_and_crop
        >>> resize_and_crop(np.zeros((40, 60, 3), np.uint8), 32).shape
        (32, 32, 3)
    """
    image = resize(image, int(size / crop_fraction))  # rounded down, as in the published recipes
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def random_crop(
    image: UInt8[np.ndarray, "H W C"], size: int, padding: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size C"]:
    """Pads with zeros on every side and crops at a random place.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.data.augment import random_crop
        >>> random_crop(np.ones((8, 8, 1), np.uint8), 8, 1, np.random.default_rng(0)).shape
        (8, 8, 1)
    """
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), np.uint8)
    padded[padding : padding + height, padding : padding + width] = image
    top = rng.integers(padded.shape[0] - size + 1)
    left = rng.integers(padded.shape[1] - size + 1)
    return padded[top : top + size, left : left + size]


def random_resized_crop(
    picture: Image.Image, size: int, least_area: float, rng: np.random.Generator
) -> Image.Image:
    """A random part of an image, of random area and proportions, resized to a square (bicubic).

    The area is uniform between a share of the image's and all of it, the proportions log-uniform
    between 3:4 and 4:3 (arXiv:1409.4842). Where ten draws do not fit, the largest central part
    within these proportions is taken.

    Args:
        picture: the image.
        size: side of the result in pixels.
        least_area: the smallest share, in (0, 1].
        rng: source of all choices.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from gaudi_jax.data.augment import random_resized_crop
        >>> picture = Image.new("RGB", (60, 40))
        >>> random_resized_crop(picture, 32, 0.08, np.random.default_rng(0)).size
        (32, 32)
    """
    top, left, height, width = _random_part(picture.height, picture.width, least_area, rng)
    part = (left, top, left + width, top + height)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=part)


def _random_part(
    height: int, width: int, least_area: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of an image."""
    least, greatest = PROPORTIONS
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(least_area, 1)
        proportion = np.exp(rng.uniform(np.log(least), np.log(greatest)))
        h, w = round(np.sqrt(area / proportion)), round(np.sqrt(area * proportion))
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h = min(height, round(width / least))
    w = min(width, round(height * greatest))
    return (height - h) // 2, (width - w) // 2, h, w


# ---- on the device: batches, traceable ----


def normalize(
    images: UInt8[Array, "B H W C"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W C"]:
    """Scales pixels to [0, 1] and standardises them by channel.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.data.augment import normalize
        >>> normalize(jnp.full((1, 1, 1, 1), 255, jnp.uint8), (0.5,), (0.5,)).item()
        1.0
    """
    return (images.astype(jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)


def smooth_labels(
    labels: Int[Array, " B"], num_classes: int, smoothing: float
) -> Float[Array, "B classes"]:
    """One-hot targets, with a share spread evenly over all classes (arXiv:1512.00567).

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.data.augment import smooth_labels
        >>> smooth_labels(jnp.array([1]), 2, 0.5).tolist()
        [[0.25, 0.75]]
    """
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mixup(
    key: Array, images: Float[Array, "B H W C"], targets: Float[Array, "B classes"], alpha: float
) -> tuple[Float[Array, "B H W C"], Float[Array, "B classes"]]:
    """Blends every image with another one, the share drawn from Beta(alpha, alpha).

    The partner of image b is image B - 1 - b, the share is one for the batch (arXiv:1710.09412).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gaudi_jax.data.augment import mixup
        >>> images, targets = mixup(jax.random.key(0), jnp.ones((2, 4, 4, 1)), jnp.eye(2), 0.8)
        >>> bool(jnp.allclose(targets.sum(axis=1), 1))
        True
    """
    share = jax.random.beta(key, alpha, alpha)
    blend = [share * array + (1 - share) * array[::-1] for array in (images, targets)]
    return blend[0], blend[1]


def cutmix(
    key: Array, images: Float[Array, "B H W C"], targets: Float[Array, "B classes"], alpha: float
) -> tuple[Float[Array, "B H W C"], Float[Array, "B classes"]]:
    """Pastes a box of another image; targets are mixed by the pixels (arXiv:1905.04899).

    The box has the area ``(1 - share) H W`` with the share drawn from Beta(alpha, alpha), and a
    uniform centre; what lies outside the image is cut off.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gaudi_jax.data.augment import cutmix
        >>> images, targets = cutmix(jax.random.key(0), jnp.ones((2, 4, 4, 1)), jnp.eye(2), 1.0)
        >>> images.shape
        (2, 4, 4, 1)
    """
    share_key, row_key, column_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share_key, alpha, alpha))

    def inside(key: Array, size: int) -> Array:
        centre = jax.random.randint(key, (), 0, size)
        half = jnp.floor(side * size).astype(jnp.int32) // 2
        places = jnp.arange(size)
        return (places >= centre - half) & (places < centre + half)

    _, height, width, _ = images.shape
    box = inside(row_key, height)[:, None] & inside(column_key, width)
    kept = 1 - box.mean()
    images = jnp.where(box[None, :, :, None], images[::-1], images)
    return images, kept * targets + (1 - kept) * targets[::-1]


def erase(
    key: Array, images: Float[Array, "B H W C"], probability: float
) -> Float[Array, "B H W C"]:
    """Fills a random box of some images with noise (random erasing, arXiv:1708.04896).

    The box covers 2 % to 33 % of the image, its proportions are log-uniform; every pixel of it is
    drawn from the standard normal distribution, so images must be normalised.

    Args:
        key: random key.
        images: normalised images.
        probability: chance that an image gets a box.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gaudi_jax.data.augment import erase
        >>> erased = erase(jax.random.key(0), jnp.ones((2, 8, 8, 1)), probability=1.0)
        >>> bool((erased != 1).any(axis=(1, 2, 3)).all())
        True
    """
    count, height, width, _ = images.shape
    keys = jax.random.split(key, 5)

    def draw(key: Array, bounds: tuple[float, float]) -> Array:
        return jax.random.uniform(key, (count, ATTEMPTS), minval=bounds[0], maxval=bounds[1])

    area = height * width * draw(keys[0], ERASED_AREA)
    least, greatest = ERASED_PROPORTIONS
    proportion = jnp.exp(draw(keys[1], (math.log(least), math.log(greatest))))
    sides = jnp.round(jnp.sqrt(jnp.stack([area * proportion, area / proportion])))
    limits = jnp.array([height, width])[:, None]
    fits = ((sides < limits[..., None]) & (sides >= 1)).all(axis=0)
    first = jnp.argmax(fits, axis=1)
    side = jnp.take_along_axis(sides, first[None, :, None], axis=2)[..., 0]
    start = jnp.floor(jax.random.uniform(keys[2], (2, count)) * (limits - side + 1))
    chosen = fits.any(axis=1) & (jax.random.uniform(keys[3], (count,)) < probability)

    def inside(axis: int, size: int) -> Array:
        places = jnp.arange(size)
        low = start[axis, :, None]
        return (places >= low) & (places < low + side[axis, :, None])

    box = inside(0, height)[:, :, None] & inside(1, width)[:, None, :]
    noise = jax.random.normal(keys[4], images.shape, images.dtype)
    return jnp.where((box & chosen[:, None, None])[..., None], noise, images)


def mix(
    key: Array,
    images: Float[Array, "B H W C"],
    targets: Float[Array, "B classes"],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B classes"]]:
    """Mixup or cutmix, one of the two by a fair coin for each batch; alpha 0 turns one off.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gaudi_jax.data.augment import mix
        >>> images = jnp.ones((2, 4, 4, 1))
        >>> mixed, _ = mix(
        ...     jax.random.key(0), images, jnp.eye(2), mixup_alpha=0.0, cutmix_alpha=0.0)
        >>> mixed is images
        True
    """
    choice_key, key = jax.random.split(key)
    if mixup_alpha and cutmix_alpha:
        return jax.lax.cond(
            jax.random.bernoulli(choice_key),
            lambda: mixup(key, images, targets, mixup_alpha),
            lambda: cutmix(key, images, targets, cutmix_alpha),
        )
    if mixup_alpha:
        return mixup(key, images, targets, mixup_alpha)
    if cutmix_alpha:
        return cutmix(key, images, targets, cutmix_alpha)
    return images, targets
