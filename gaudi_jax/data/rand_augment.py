"""RandAugment: a few random operations of one strength on each image (arXiv:1909.13719).

Operations, ranges and chances are those with which ViTs are trained on ImageNet (DeiT,
arXiv:2012.12877, "rand-m9-mstd0.5-inc1"): every operation grows stronger with the magnitude, two
are drawn for an image, and each is made with a chance of one half, at a normally distributed
magnitude. Pixels are moved by bicubic resampling.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

#: Operations that are drawn for an image, the chance that one is made, and the standard deviation
#: of its magnitude.
DRAWN, CHANCE, SPREAD = 2, 0.5, 0.5
GREATEST = 10.0
#: ImageNet's mean colour takes the place of what is moved in from outside.
FILL: dict[str, int | tuple[int, ...]] = {"RGB": (124, 116, 104), "L": 118}


class Strength(NamedTuple):
    """How an operation is made.

    Attributes:
        share: of its range, from 0 to 1.
        sign: 1 or -1, of operations with a direction.
    """

    share: float
    sign: int


Operation = Callable[[Image.Image, Strength], Image.Image]


def rand_augment(picture: Image.Image, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """An image after random operations.

    Args:
        picture: of mode "RGB" or "L".
        magnitude: mean strength, from 0 to 10.
        rng: source of all choices.

    Example:
        >>> import numpy as np
        >>> from PIL import Image
        >>> from gaudi_jax.data.rand_augment import rand_augment
        >>> rand_augment(Image.new("RGB", (8, 8)), 9.0, np.random.default_rng(0)).size
        (8, 8)
    """
    names = list(OPERATIONS)
    for index in rng.integers(len(names), size=DRAWN):
        if rng.random() < CHANCE:
            share = np.clip(rng.normal(magnitude, SPREAD), 0, GREATEST) / GREATEST
            sign = 1 if rng.random() < 0.5 else -1
            picture = OPERATIONS[names[index]](picture, Strength(share, sign))
    return picture


def _affine(picture: Image.Image, strength: Strength, matrix: tuple[float, ...]) -> Image.Image:
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BICUBIC,
        fillcolor=FILL[picture.mode],
    )


def _shear_x(picture: Image.Image, strength: Strength) -> Image.Image:
    return _affine(picture, strength, (1, strength.sign * 0.3 * strength.share, 0, 0, 1, 0))


def _shear_y(picture: Image.Image, strength: Strength) -> Image.Image:
    return _affine(picture, strength, (1, 0, 0, strength.sign * 0.3 * strength.share, 1, 0))


def _translate_x(picture: Image.Image, strength: Strength) -> Image.Image:
    pixels = strength.sign * 0.45 * strength.share * picture.width
    return _affine(picture, strength, (1, 0, pixels, 0, 1, 0))


def _translate_y(picture: Image.Image, strength: Strength) -> Image.Image:
    pixels = strength.sign * 0.45 * strength.share * picture.height
    return _affine(picture, strength, (1, 0, 0, 0, 1, pixels))


def _rotate(picture: Image.Image, strength: Strength) -> Image.Image:
    degrees = strength.sign * 30 * strength.share
    return picture.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=FILL[picture.mode])


def _posterize(picture: Image.Image, strength: Strength) -> Image.Image:
    bits = 4 - int(4 * strength.share)
    # Pillow keeps one bit at least.
    return ImageOps.posterize(picture, bits) if bits else picture.point(lambda _: 0)


def _solarize(picture: Image.Image, strength: Strength) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(256 * strength.share))


def _solarize_add(picture: Image.Image, strength: Strength) -> Image.Image:
    """Brightens the dark half."""
    amount = int(110 * strength.share)
    table = [min(255, value + amount) if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhance(enhancer: type, picture: Image.Image, strength: Strength) -> Image.Image:
    """More, or less, of something; 1 is the image as it is."""
    return enhancer(picture).enhance(max(0.1, 1 + strength.sign * 0.9 * strength.share))


OPERATIONS: Mapping[str, Operation] = {
    "autocontrast": lambda picture, _: ImageOps.autocontrast(picture),
    "equalize": lambda picture, _: ImageOps.equalize(picture),
    "invert": lambda picture, _: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": partial(_enhance, ImageEnhance.Color),
    "contrast": partial(_enhance, ImageEnhance.Contrast),
    "brightness": partial(_enhance, ImageEnhance.Brightness),
    "sharpness": partial(_enhance, ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
