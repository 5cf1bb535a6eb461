import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from scipy import stats

from gaudi_jax.data import augment

KEYS = jax.random.split(jax.random.key(7), 1000)


def pixel_noise(height, width, channels):
    shape = (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("height", "width", "expected"), [(30, 50, (12, 20)), (50, 31, (19, 12))])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_keeps_proportions(height, width, expected, channels):
    image = augment.resize(pixel_noise(height, width, channels), 12)
    assert (image.shape, image.dtype) == ((*expected, channels), np.uint8)
    assert augment.resize(image, 12) is image


def test_evaluation_crop_is_that_of_the_published_recipes():
    image = pixel_noise(300, 400, 3)
    cropped = augment.resize_and_crop(image, 224, crop_fraction=0.9)  # 224 / 0.9 = 248.9
    resized = Image.fromarray(image).resize((331, 248), Image.Resampling.BICUBIC)
    expected = np.asarray(resized)[12:236, 53:277]
    np.testing.assert_array_equal(cropped, expected)


@pytest.mark.parametrize("least_area", [0.0, 0.3])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_pictures_become_the_same_training_images(least_area, channels):
    image = pixel_noise(30, 40, channels)

    def make(image, **options):
        images = [
            augment.training_image(
                image, np.random.default_rng(seed), size=16, least_area=least_area, **options
            )
            for seed in range(12)
        ]
        return np.stack(images)

    options = {"flip": True, "magnitude": 9.0}
    images = make(image, **options)
    assert (images.shape, images.dtype) == ((12, 16, 16, channels), np.uint8)
    np.testing.assert_array_equal(images, make(augment.as_picture(image), **options))
    # The crop is drawn first: with mirroring alone, some are mirrored and all are otherwise equal.
    plain, mirrored = make(image), make(image, flip=True)
    same = (plain == mirrored).all(axis=(1, 2, 3))
    assert 0 < same.sum() < 12
    np.testing.assert_array_equal(plain[~same], mirrored[~same][:, :, ::-1])


def batch(count=5, height=24, width=10):
    images = jnp.arange(float(count))[:, None, None, None] * jnp.ones((count, height, width, 2))
    return images, jax.nn.one_hot(jnp.arange(count), count)


def test_mixup_shares_follow_the_beta_distribution():
    images, targets = batch()
    shares = jax.vmap(lambda key: augment.mixup(key, images, targets, 0.3)[1][0, 0])(KEYS)
    assert stats.kstest(np.asarray(shares), stats.beta(0.3, 0.3).cdf).pvalue > 0.01
    assert stats.kstest(np.asarray(shares), stats.beta(1, 1).cdf).pvalue < 1e-6


def test_cutmix_targets_are_exact_on_oblong_images():
    images, targets = batch()
    mixed, blended = jax.vmap(lambda key: augment.cutmix(key, images, targets, 1.0))(KEYS)
    kept = (mixed == images).all(axis=-1)
    np.testing.assert_allclose(blended[:, 0, 0], kept[:, 0].mean(axis=(-1, -2)), atol=1e-6)
    np.testing.assert_allclose(blended.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_array_equal(blended[:, 2], jnp.broadcast_to(targets[2], (1000, 5)))
    # What is pasted comes from the same place of one and the same partner.
    pasted = jnp.where(kept[..., None], images, images[::-1])
    np.testing.assert_array_equal(mixed, pasted)


def test_cutmix_boxes_are_distributed_as_published():
    # The box of arXiv:1905.04899: sides sqrt(1 - share) of the image's, centre uniform, cut off.
    rng = np.random.default_rng(0)
    height, width, alpha = 24, 10, 0.8
    areas = []
    for _ in range(4000):
        side = np.sqrt(1 - rng.beta(alpha, alpha))
        (top, bottom), (left, right) = (
            np.clip(rng.integers(n) + np.array([-1, 1]) * (int(n * side) // 2), 0, n)
            for n in (height, width)
        )
        areas.append((bottom - top) * (right - left))
    images, targets = batch(height=height, width=width)
    kept = jax.vmap(lambda key: augment.cutmix(key, images, targets, alpha)[1][0, 0])(KEYS)
    ours = np.round((1 - np.asarray(kept)) * height * width)
    assert stats.ks_2samp(ours, areas).pvalue > 0.01


def test_mix_is_off_or_one_of_the_two_with_the_same_shapes():
    images, targets = batch()

    def run(mixup_alpha, cutmix_alpha):
        mix = jax.jit(augment.mix, static_argnames=("mixup_alpha", "cutmix_alpha"))
        return mix(KEYS[0], images, targets, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)

    np.testing.assert_array_equal(run(0.0, 0.0)[0], images)
    for alphas in ((0.8, 0.0), (0.0, 1.0), (0.8, 1.0)):
        mixed, blended = run(*alphas)
        assert (mixed.shape, mixed.dtype) == (images.shape, images.dtype)
        np.testing.assert_allclose(blended.sum(axis=-1), 1, atol=1e-6)
    assert (run(0.8, 0.0)[0][0] % 1 != 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smooth_labels_agree_with_optax(smoothing):
    labels = jnp.array([0, 3, 2])
    expected = optax.smooth_labels(jax.nn.one_hot(labels, 4), smoothing)
    np.testing.assert_allclose(augment.smooth_labels(labels, 4, smoothing), expected, atol=1e-7)


def test_normalize_works_by_channel():
    images = jnp.array([[[[0, 51, 255]]]], jnp.uint8)
    actual = augment.normalize(images, (0.5, 0.2, 0.0), (0.5, 1.0, 2.0))
    np.testing.assert_allclose(actual[0, 0, 0], [-1, 0, 0.5], atol=1e-6)
