"""RandAugment, random resized crops and random erasing as the published recipes define them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from gaudi_jax.data import augment, rand_augment
from gaudi_jax.data.rand_augment import FILL, OPERATIONS, Strength


def noise(height=24, width=32, channels=3, seed=0):
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def operate(name, share, sign=1, image=None):
    image = noise() if image is None else image
    picture = OPERATIONS[name](Image.fromarray(image), Strength(share, sign))
    return np.asarray(picture).astype(int)


# The definitions in plain NumPy, at a share of 0.9 (magnitude 9): the oracle.
def test_operations_on_values():
    image = noise().astype(int)
    np.testing.assert_array_equal(operate("invert", 0.9), 255 - image)
    np.testing.assert_array_equal(operate("posterize", 0.9), image & 0b10000000)
    np.testing.assert_array_equal(operate("posterize", 1.0), 0 * image)
    np.testing.assert_array_equal(operate("posterize", 0.0), image & 0b11110000)
    np.testing.assert_array_equal(
        operate("solarize", 0.9), np.where(image < 26, image, 255 - image)
    )
    np.testing.assert_array_equal(operate("solarize", 0.0), image)
    added = np.where(image < 128, np.minimum(image + 99, 255), image)
    np.testing.assert_array_equal(operate("solarize_add", 0.9), added)
    np.testing.assert_allclose(operate("brightness", 0.9), np.minimum(image * 1.81, 255), atol=1)
    np.testing.assert_allclose(operate("brightness", 0.9, -1), image * 0.19, atol=1)
    np.testing.assert_allclose(operate("brightness", 1.0, -1), image * 0.1, atol=1)
    narrow = (50 + image // 4).astype(np.uint8)
    stretched = operate("autocontrast", 0.9, image=narrow)
    assert stretched.min() == 0
    assert stretched.max() >= 254
    narrow = (50 + noise(240, 320) // 4).astype(np.uint8)
    counts = np.bincount(operate("equalize", 0.9, image=narrow)[..., 0].ravel(), minlength=256)
    assert np.abs(np.cumsum(counts) / counts.sum() - np.arange(256) / 255).max() < 0.06


def test_operations_that_mix_with_a_blurred_grey_or_mean_image():
    image = noise()
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(int)
    wanted = np.clip(grey[..., None] + 1.81 * (image.astype(int) - grey[..., None]), 0, 255)
    np.testing.assert_allclose(operate("color", 0.9), wanted, atol=1)
    mean = int(grey.mean() + 0.5)
    wanted = np.clip(mean + 0.19 * (image.astype(int) - mean), 0, 255)
    np.testing.assert_allclose(operate("contrast", 0.9, -1), wanted, atol=1)
    assert operate("sharpness", 0.9, -1).std() < image.std() < operate("sharpness", 0.9).std()


def test_operations_that_move_pixels():
    image = np.zeros((40, 40, 3), np.uint8)
    image[18:22, 18:22] = 255
    rows, columns = np.mgrid[:40, :40]

    def centre(name, sign):
        moved = operate(name, 1.0, sign, image).astype(float)[..., 0]
        moved = np.where(moved == FILL["RGB"][0], 0, moved)
        return (moved * rows).sum() / moved.sum(), (moved * columns).sum() / moved.sum()

    assert centre("translate_x", 1) == pytest.approx((19.5, 1.5), abs=0.6)
    assert centre("translate_y", -1) == pytest.approx((37.5, 19.5), abs=0.6)
    # x' = x + 0.3 y: the row at the middle moves by 0.3 times its height.
    assert centre("shear_x", 1) == pytest.approx((19.5, 19.5 - 6), abs=0.6)
    assert centre("shear_y", -1) == pytest.approx((19.5 + 6, 19.5), abs=0.6)
    corner = np.zeros((41, 41, 3), np.uint8)
    corner[19:22, 35:38] = 255
    turned = operate("rotate", 1.0, 1, corner)[..., 0]  # 30 degrees against the clock
    row, column = np.unravel_index(np.argmax(turned * (turned > 200)), turned.shape)
    assert (20 - row, column - 20) == pytest.approx((16 * 0.5, 16 * 0.866), abs=2)


def test_pixels_move_by_bicubic_resampling():
    """By half a pixel, the weights are those of the cubic kernel with a = -1."""
    line = noise(1, 40)[0].astype(float)
    image = np.broadcast_to(line, (40, 40, 3)).astype(np.uint8)
    share = 0.5 / (0.45 * 40)
    moved = operate("translate_x", share, 1, image)[20]
    neighbours = np.stack([line[i : i + 37] for i in range(4)])
    wanted = np.tensordot([-1 / 8, 5 / 8, 5 / 8, -1 / 8], neighbours, axes=1)
    np.testing.assert_allclose(moved[1:38], np.clip(wanted, 0, 255), atol=1)


def test_operations_are_drawn_evenly_and_made_half_of_the_time(monkeypatch):
    made, strengths = [], []

    def record(name):
        def operation(picture, strength):
            made.append(name)
            strengths.append(strength)
            return picture

        return operation

    monkeypatch.setattr(rand_augment, "OPERATIONS", {name: record(name) for name in OPERATIONS})
    rng, picture, calls = np.random.default_rng(0), Image.fromarray(noise(4, 4)), 3000
    for _ in range(calls):
        assert rand_augment.rand_augment(picture, 9.0, rng) is picture
    assert stats.binomtest(len(made), 2 * calls, 0.5).pvalue > 0.01
    counts = [made.count(name) for name in OPERATIONS]
    assert stats.chisquare(counts).pvalue > 0.01
    shares = np.array([strength.share for strength in strengths])
    assert shares.max() == 1.0
    below = shares[shares < 1]
    wanted = stats.truncnorm(-18, 2, loc=0.9, scale=0.05)
    assert stats.kstest(below, wanted.cdf).pvalue > 0.01
    signs = sum(strength.sign == 1 for strength in strengths)
    assert stats.binomtest(signs, len(strengths), 0.5).pvalue > 0.01


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_takes_grey_and_coloured_images(channels):
    picture = augment.as_picture(noise(9, 7, channels))
    rng = np.random.default_rng(1)
    changed = {
        rand_augment.rand_augment(picture, 9.0, rng).tobytes() != picture.tobytes()
        for _ in range(100)
    }
    assert changed == {True, False}
    for name, operation in OPERATIONS.items():
        result = operation(picture, Strength(0.9, -1))
        assert (result.size, result.mode) == (picture.size, picture.mode), name


def test_random_parts_have_the_published_areas_and_proportions():
    rng = np.random.default_rng(0)
    parts = np.array([augment._random_part(300, 400, 0.08, rng) for _ in range(2000)])
    top, left, height, width = parts.T
    assert ((top >= 0) & (top + height <= 300) & (left >= 0) & (left + width <= 400)).all()
    area, proportion = height * width / 120_000, width / height
    # Parts that do not fit are drawn again: only small ones are sure to follow the distributions.
    small = area < 0.5
    assert stats.kstest(area[small], stats.uniform(0.08, 0.42).cdf).pvalue > 0.01
    logs = np.log(proportion[small])
    span = np.log(4 / 3)
    assert stats.kstest(logs, stats.uniform(-span, 2 * span).cdf).pvalue > 0.01
    assert area.max() > 0.9
    assert augment._random_part(10, 100, 1.0, rng) == (0, 43, 10, 13)


def test_a_resized_crop_is_that_of_pillow():
    picture = Image.fromarray(noise(30, 40))
    top, left, height, width = augment._random_part(30, 40, 0.2, np.random.default_rng(3))
    resized = augment.random_resized_crop(picture, 12, 0.2, np.random.default_rng(3))
    cropped = np.asarray(resized).astype(int)
    part = picture.crop((left, top, left + width, top + height))
    wanted = np.asarray(part.resize((12, 12), Image.Resampling.BICUBIC)).astype(int)
    # Pillow reads beyond the edges of a box, not beyond those of a cropped image.
    np.testing.assert_allclose(cropped[2:-2, 2:-2], wanted[2:-2, 2:-2], atol=1)


def test_erased_boxes_have_the_published_chance_areas_and_noise():
    images = jnp.full((4000, 40, 60, 2), 100.0)
    erased = np.asarray(augment.erase(jax.random.key(0), images, 0.25))
    box = (erased != 100).all(axis=-1)
    hit = box.any(axis=(1, 2))
    assert stats.binomtest(int(hit.sum()), 4000, 0.25).pvalue > 0.01
    rows, columns = box[hit].any(axis=2).sum(1), box[hit].any(axis=1).sum(1)
    np.testing.assert_array_equal(box[hit].sum((1, 2)), rows * columns)  # rectangles
    area, proportion = rows * columns / 2400, rows / columns
    assert 0.015 < area.min() < 0.04
    assert 0.28 < area.max() < 0.35
    assert 0.25 < proportion.min() < 0.4
    assert 2.5 < proportion.max() < 4
    assert stats.kstest(erased[box].ravel()[:5000], stats.norm.cdf).pvalue > 0.01
    starts = box[hit].any(axis=2).argmax(1) / (40 - rows)
    assert abs(starts.mean() - 0.5) < 0.05
