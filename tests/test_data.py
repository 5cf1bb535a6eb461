import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from gaudi_jax.data import augment
from gaudi_jax.data.images import load_images
from gaudi_jax.data.pipeline import evaluation_batches, train_batches
from gaudi_jax.errors import UserError

# ---- sources ----


def write_image(path, color=(10, 20, 30), size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    for split, count in {"train": 10, "test": 3}.items():
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                write_image(tmp_path / split / name / f"{number}.png", (100 * label, number, 0))
    return tmp_path


def test_digits_are_split_once_and_for_all():
    digits = load_images("digits")
    parts = {name: getattr(digits, name) for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [1097, 200, 500]
    example = digits.train[0]
    assert example["image"].shape == (8, 8, 1)
    assert example["image"].dtype == np.uint8
    # Every digit stands in exactly one split.
    images = np.concatenate([part.images.reshape(len(part), -1) for part in parts.values()])
    assert images.max() == 255
    from sklearn.datasets import load_digits

    original = np.sort(load_digits().images.reshape(1797, -1).sum(axis=1))
    np.testing.assert_allclose(np.sort(images.sum(axis=1)) * (16 / 255), original, atol=2)
    assert digits.test.labels[:8].tolist() == load_images("digits").test.labels[:8].tolist()


def test_a_folder_is_read_in_the_order_of_names(folder):
    splits = load_images(f"folder:{folder}", validation_fraction=0.2)
    assert splits.class_names == ("cat", "dog")
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [16, 4, 6]
    np.testing.assert_array_equal(splits.test[4]["image"], np.full((5, 6, 3), (100, 1, 0)))
    assert splits.test[4]["label"] == 1
    seen = {
        (example["label"], int(example["image"][0, 0, 1]))
        for source in (splits.train, splits.validation)
        for example in (source[i] for i in range(len(source)))
    }
    assert len(seen) == 20  # nothing twice, nothing lost
    again = load_images(f"folder:{folder}", validation_fraction=0.2)
    np.testing.assert_array_equal(again.validation.indices, splits.validation.indices)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_colour_mode_becomes_rgb(folder, mode):
    path = folder / "test" / "cat" / "odd.tif"
    write_image(path, (255, 255, 255), mode=mode)
    image = load_images(f"folder:{folder}").test[3]["image"]
    np.testing.assert_array_equal(image, np.full((5, 6, 3), 255))


def test_own_validation_split_and_missing_test_split(folder, caplog):
    (folder / "test").rename(folder / "validation")
    splits = load_images(f"folder:{folder}")
    assert len(splits.train) == 20
    assert splits.test is splits.validation
    assert "has no folder test" in caplog.text


def test_unreadable_images_are_named_or_counted(folder, caplog):
    broken = folder / "train" / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    splits = load_images(f"folder:{folder}")
    everything = [(s, i) for s in (splits.train, splits.validation) for i in range(len(s))]
    with pytest.raises(UserError, match=r"cannot read the image .*dog/3.png"):
        _ = [source[i] for source, i in everything]
    with pytest.raises(UserError, match=r"dog/3.png"):
        load_images(f"folder:{folder}", verify=True)
    splits = load_images(f"folder:{folder}", skip_unreadable=True)
    assert len(splits.train) + len(splits.validation) == 19
    assert "1 of 20 images cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mnist", "unknown data set 'mnist'; use one of digits"),
        ("folder:", "unknown data set"),
        ("folder:/nowhere", "data folder /nowhere is not there"),
        ("generated:10x8", "generated:10x32x3"),
        ("tfds:no_such_set", "cannot open the data set tfds:no_such_set"),
    ],
)
def test_unknown_data_are_named(name, message):
    with pytest.raises(UserError, match=message):
        load_images(name)


def test_unusable_folders_are_named(folder):
    def fails(message):
        with pytest.raises(UserError, match=message):
            load_images(f"folder:{folder}")

    write_image(folder / "test" / "owl" / "0.png")
    fails("owl is a class that the training images do not have")
    (folder / "train" / "owl").mkdir()
    fails("class folder .*owl is empty")
    (folder / "train").rename(folder / "other")
    fails("has no folder train")
    (folder / "train" / "cat").mkdir(parents=True)
    fails("1 class folders")
    with pytest.raises(UserError, match=r"validation_fraction=1\.5"):
        load_images("digits", validation_fraction=1.5)


def test_generated_images_are_a_function_of_the_index():
    splits = load_images("generated:4x16x3")
    image = splits.train[7]["image"]
    assert image.shape == (16, 16, 3)
    np.testing.assert_array_equal(image, load_images("generated:4x16x3").train[7]["image"])
    assert np.abs(image.astype(float) - splits.test[7]["image"]).mean() > 5
    assert {splits.train[i]["label"] for i in range(8)} == {0, 1, 2, 3}
    with pytest.raises(IndexError):
        splits.train[len(splits.train)]


def test_tfds_sets_are_read_through_data_source(monkeypatch):
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
    )
    examples = [{"image": np.full((4, 4, 1), i, np.uint8), "label": i % 2} for i in range(20)]

    class Builder:
        class info:  # noqa: N801
            pass

    Builder.info.features = features
    monkeypatch.setattr(tfds, "builder", lambda name: Builder)
    monkeypatch.setattr(tfds, "data_source", lambda name, download: {"train": examples})
    splits = load_images("tfds:mine", validation_fraction=0.1)
    assert splits.class_names == ("a", "b")
    assert [len(splits.train), len(splits.validation)] == [18, 2]
    assert splits.train[0]["image"].shape == (4, 4, 1)


# ---- pipelines ----


def test_an_epoch_holds_every_image_once_in_a_new_order():
    source = load_images("digits").validation
    iterator = train_batches(source, batch_size=50, image_size=8, seed=3)
    epochs = [np.concatenate([next(iterator)["image"] for _ in range(4)]) for _ in range(2)]
    keys = [[image.tobytes() for image in epoch] for epoch in epochs]
    assert keys[0] != keys[1]
    assert sorted(keys[0]) == sorted(keys[1]) == sorted(i.tobytes() for i in source.images)


def make_iterator(seed=0, workers=0):
    return train_batches(
        load_images("digits").train,
        batch_size=64,
        image_size=8,
        seed=seed,
        crop_padding=1,
        flip=True,
        workers=workers,
    )


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_a_function_of_the_seed_and_resume_in_an_epoch(workers):
    iterator, other = make_iterator(workers=workers), make_iterator(seed=1)
    batches = [next(iterator) for _ in range(20)]
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(3)]
    assert (next(other)["image"] != batches[0]["image"]).any()
    resumed = make_iterator(workers=workers)
    np.testing.assert_array_equal(next(resumed)["image"], batches[0]["image"])
    resumed.set_state(state)
    for batch in expected:
        actual = next(resumed)
        np.testing.assert_array_equal(actual["image"], batch["image"])
        np.testing.assert_array_equal(actual["label"], batch["label"])
    assert batches[0]["image"].dtype == np.uint8
    assert batches[0]["label"].dtype == np.int32


def test_augmentation_differs_between_epochs():
    source = load_images("generated:2x8x1").validation
    iterator = train_batches(source, batch_size=64, image_size=8, seed=0, crop_padding=2)
    epochs = [sorted(image.tobytes() for image in next(iterator)["image"]) for _ in range(2)]
    assert epochs[0] != epochs[1]


def test_strong_augmentation_is_resumable_and_keeps_labels(folder):
    source = load_images(f"folder:{folder}", validation_fraction=0.5).train
    options = {"batch_size": 4, "image_size": 16, "seed": 0, "least_area": 0.08, "magnitude": 9.0}
    first, again = (train_batches(source, flip=True, **options) for _ in range(2))
    next(first)
    state = first.get_state()
    wanted = [next(first) for _ in range(3)]
    again.set_state(state)
    for one, two in zip(wanted, (next(again) for _ in range(3)), strict=True):
        np.testing.assert_array_equal(one["image"], two["image"])
        np.testing.assert_array_equal(one["label"], two["label"])
    assert wanted[0]["image"].shape == (4, 16, 16, 3)


def test_evaluation_sees_every_image_once_in_order():
    source = load_images("digits").test
    batches = list(evaluation_batches(source, batch_size=64, image_size=8))
    assert {len(batch["label"]) for batch in batches} == {64}
    weight = np.concatenate([batch["weight"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    assert weight.sum() == 500
    np.testing.assert_array_equal(labels[weight == 1], source.labels)


def test_images_of_any_size_become_square(folder):
    source = load_images(f"folder:{folder}", validation_fraction=0.5).train
    batch = next(train_batches(source, batch_size=4, image_size=16, seed=0, crop_padding=2))
    assert batch["image"].shape == (4, 16, 16, 3)
    batch = next(evaluation_batches(source, batch_size=4, image_size=16, crop_fraction=0.8))
    assert batch["image"].shape == (4, 16, 16, 3)


def test_bad_pipeline_options_are_named():
    source = load_images("digits").validation
    with pytest.raises(UserError, match=r"batch_size=201 must lie in \[1, 200\]"):
        train_batches(source, batch_size=201, image_size=8, seed=0)
    with pytest.raises(UserError, match="crop_padding=-1"):
        train_batches(source, batch_size=2, image_size=8, seed=0, crop_padding=-1)
    for options, message in (
        ({"least_area": 1.5}, r"least_area=1.5 is outside \[0, 1\]"),
        ({"least_area": 0.5, "crop_padding": 1}, "crop_padding=1 has no effect beside"),
        ({"magnitude": 11}, r"rand_augment=11 is outside \[0, 10\]"),
    ):
        with pytest.raises(UserError, match=message):
            train_batches(source, batch_size=2, image_size=8, seed=0, **options)
    with pytest.raises(UserError, match="crop_fraction=0"):
        next(evaluation_batches(source, batch_size=2, image_size=8, crop_fraction=0))


# ---- augmentation ----


def test_centre_crop_of_the_resized_image():
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, 8:32] = 200  # 4 ... 16 of 20 columns after resizing
    cropped = augment.resize_and_crop(image, 8, crop_fraction=0.8)  # shorter side to 10
    assert cropped.shape == (8, 8, 3)
    np.testing.assert_array_equal(cropped, cropped[:, ::-1])
    assert cropped[0, 3, 0] == 200
    assert augment.resize_and_crop(image, 20)[0, :, 0].tolist() == [200] * 20
    square = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    assert augment.resize_and_crop(square, 8).tobytes() == square.tobytes()


def test_random_crop_reaches_every_offset_and_pads_with_zeros():
    image = np.ones((4, 4, 1), np.uint8)
    rng = np.random.default_rng(0)
    crops = {augment.random_crop(image, 4, 1, rng).tobytes() for _ in range(200)}
    assert len(crops) == 9
    assert all(set(crop) <= {0, 1} for crop in crops)


def batch_of_images():
    images = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 8, 8, 1))
    return images, jax.nn.one_hot(jnp.arange(4), 4)


def test_mixup_blends_images_and_targets_alike():
    images, targets = batch_of_images()
    mixed, blended = augment.mixup(jax.random.key(3), images, targets, 0.8)
    share = float(blended[0, 0])
    assert 0 < share < 1
    np.testing.assert_allclose(blended, share * targets + (1 - share) * targets[::-1], atol=1e-6)
    np.testing.assert_allclose(mixed, share * images + (1 - share) * images[::-1], atol=1e-5)


def test_mixup_share_is_beta_distributed():
    images, targets = batch_of_images()
    share = jax.vmap(lambda key: augment.mixup(key, images, targets, 0.8)[1][0, 0])
    shares = share(jax.random.split(jax.random.key(0), 4000))
    assert abs(float(shares.mean()) - 0.5) < 0.02
    assert abs(float(shares.var()) - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # variance of Beta(a, a)


def test_cutmix_targets_are_the_shares_of_pixels():
    images, targets = batch_of_images()
    boxes = set()
    for seed in range(20):
        mixed, blended = jax.jit(augment.cutmix, static_argnums=3)(
            jax.random.key(seed), images, targets, 1.0
        )
        kept = np.asarray(mixed[0, :, :, 0] == 0)
        np.testing.assert_allclose(blended[0], [kept.mean(), 0, 0, 1 - kept.mean()], atol=1e-6)
        rows, columns = np.nonzero(~kept)
        if rows.size:  # what is pasted is a box
            assert rows.size == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        boxes.add(kept.tobytes())
    assert len(boxes) > 10


def test_mix_chooses_by_a_coin():
    images, targets = batch_of_images()

    @jax.jit
    @jax.vmap
    def is_blend(key):
        mixed, _ = augment.mix(key, images, targets, mixup_alpha=1.0, cutmix_alpha=1.0)
        return (mixed[0] % 1 != 0).any()

    assert 0.4 < is_blend(jax.random.split(jax.random.key(0), 400)).mean() < 0.6
    only = augment.mix(jax.random.key(0), images, targets, mixup_alpha=0.0, cutmix_alpha=1.0)
    assert (only[0] % 1 == 0).all()


def test_labels_and_pixels():
    smooth = augment.smooth_labels(jnp.array([2]), 4, 0.1)
    np.testing.assert_allclose(smooth[0], [0.025, 0.025, 0.925, 0.025], atol=1e-6)
    pixels = jnp.array([0, 255], jnp.uint8).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(
        augment.normalize(pixels, (0.5,), (0.25,)).ravel(), [-2, 2], atol=1e-6
    )
