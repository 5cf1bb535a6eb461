import io
import os
import pathlib
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from gaudi_jax.data.images import as_pictures, load_images, read_image
from gaudi_jax.errors import UserError


def write_image(path, color=(0, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("dog", "cat"):
        for number in (7, 2, 10, 5, 0):
            write_image(tmp_path / "train" / name / f"{number}.png", (number, 0, 0))
    return tmp_path


def colors(source):
    examples = [source[i] for i in range(len(source))]
    return [(example["label"], int(example["image"][0, 0, 0])) for example in examples]


def test_digits_follow_the_documented_rule():
    digits, original = load_images("digits"), load_digits()
    order = np.random.default_rng(0).permutation(1797)
    for source, indices in (
        (digits.train, order[:1097]),
        (digits.validation, order[1097:1297]),
        (digits.test, order[1297:]),
    ):
        examples = [source[i] for i in range(len(source))]
        assert [example["label"] for example in examples] == original.target[indices].tolist()
        back = np.stack([example["image"][..., 0] for example in examples]) / 255 * 16
        np.testing.assert_allclose(back, original.images[indices], atol=0.5 / 255 * 16 + 1e-6)


def test_splits_do_not_depend_on_the_order_of_the_file_system(folder, monkeypatch):
    before = load_images(f"folder:{folder}", validation_fraction=0.3)
    for name in ("glob", "iterdir"):
        listing = getattr(pathlib.Path, name)
        monkeypatch.setattr(
            pathlib.Path, name, lambda *a, _of=listing: iter(sorted(_of(*a), reverse=True))
        )
    after = load_images(f"folder:{folder}", validation_fraction=0.3)
    assert after.class_names == before.class_names == ("cat", "dog")
    assert colors(after.train) == colors(before.train)
    assert colors(after.validation) == colors(before.validation)


def test_a_validation_folder_may_be_called_val(folder):
    write_image(folder / "val" / "dog" / "0.png", (99, 0, 0))
    splits = load_images(f"folder:{folder}")
    assert len(splits.train) == 10
    assert colors(splits.validation) == [(1, 99)]


def test_hidden_names_are_no_classes_and_no_images(folder):
    for split in ("train", "test"):
        write_image(folder / split / "cat" / "1.png")
        (folder / split / ".ipynb_checkpoints").mkdir()
        (folder / split / "cat" / ".DS_Store").write_bytes(b"x")
    splits = load_images(f"folder:{folder}", verify=True)
    assert splits.class_names == ("cat", "dog")
    assert len(splits.test) == 1


def test_an_empty_class_folder_is_an_error_in_every_split(folder):
    write_image(folder / "test" / "cat" / "1.png")
    assert len(load_images(f"folder:{folder}").test) == 1  # a class may be absent from a test
    (folder / "test" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class folder .*test/dog is empty"):
        load_images(f"folder:{folder}")


def test_a_folder_without_any_readable_image_is_an_error(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_text("not an image")
    splits = load_images(f"folder:{folder}")  # lazily: nothing is read yet
    with pytest.raises(UserError, match=r"cannot read the image .*\.png"):
        splits.train[0]
    with pytest.raises(UserError, match="none of the 10 images can be read"):
        load_images(f"folder:{folder}", skip_unreadable=True)


def test_sixteen_bit_images_keep_their_shades(tmp_path):
    Image.fromarray(np.array([[0, 1000], [40000, 65535]], np.uint16)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert (image.shape, image.dtype) == ((2, 2, 3), np.uint8)
    assert image[..., 0].tolist() == image[..., 2].tolist() == [[0, 3], [156, 255]]


def test_generated_images_can_be_learned():
    splits = load_images("generated:6x16x3")

    def spectra(source):  # the phase of a wave is random: its spectrum tells the direction
        examples = [source[i] for i in range(len(source))]
        gray = np.stack([example["image"].mean(axis=-1) for example in examples])
        labels = np.array([example["label"] for example in examples])
        return np.abs(np.fft.fft2(gray - gray.mean())).reshape(len(gray), -1), labels

    features, labels = spectra(splits.train)
    centres = np.stack([features[labels == k].mean(axis=0) for k in range(6)])
    features, labels = spectra(splits.test)
    guesses = np.argmin(((features[:, None] - centres) ** 2).sum(axis=-1), axis=1)
    assert (guesses == labels).mean() > 0.9
    assert len(set(labels)) == 6


# ---- TFDS: a set written as ArrayRecord files, which needs no TensorFlow for encoded images ----


class TinyShades(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 1)),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(20), "test": self._generate_examples(6)}

    def _generate_examples(self, count):
        for shade in range(count):
            file = io.BytesIO()
            Image.new("L", (4, 4), shade).save(file, "png")
            file.seek(0)
            yield shade, {"image": file, "label": shade % 2}


class TinyNumbers(TinyShades):
    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 4, 1)), "label": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


@pytest.fixture
def tfds_directory(tmp_path, monkeypatch):
    # TFDS_DATA_DIR is read once, when the library is imported.
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", os.fspath(tmp_path))
    return tmp_path


def test_prepared_tfds_sets_are_read_without_tensorflow(tfds_directory):
    TinyShades(data_dir=tfds_directory, file_format="array_record").download_and_prepare()
    splits = load_images("tfds:tiny_shades", validation_fraction=0.2)
    assert splits.class_names == ("even", "odd")
    shades = {name: colors(getattr(splits, name)) for name in ("train", "validation", "test")}
    assert [len(shade) for shade in shades.values()] == [16, 4, 6]
    assert sorted(v for _, v in shades["train"] + shades["validation"]) == list(range(20))
    assert all(label == shade % 2 for part in shades.values() for label, shade in part)
    example = splits.train[0]
    assert (example["image"].shape, example["image"].dtype) == ((4, 4, 1), np.uint8)
    # Grain's worker processes receive a copy of the source.
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(splits.train))[0]["image"], example["image"]
    )


def test_a_tfds_file_that_vanishes_is_named(tfds_directory):
    TinyShades(data_dir=tfds_directory, file_format="array_record").download_and_prepare()
    source = load_images("tfds:tiny_shades").train
    (file,) = tfds_directory.rglob("*train.array_record*")
    file.unlink()
    with pytest.raises(
        UserError, match=rf"cannot read example .*tiny_shades.*{file.name}.*restore"
    ):
        source[0]


def test_an_image_file_that_vanishes_is_named(folder):
    source = load_images(f"folder:{folder}").train
    for path in folder.rglob("*.png"):
        path.unlink()
    for images in (source, as_pictures(source)):
        with pytest.raises(UserError, match=r"the image .*\.png is gone .* put it back"):
            images[0]


def test_pictures_are_the_same_images_as_arrays(folder):
    rng = np.random.default_rng(0)
    gray = rng.integers(0, 65536, (5, 9), dtype=np.uint16)
    Image.fromarray(gray).save(folder / "train" / "cat" / "0.png")
    Image.fromarray((gray >> 8).astype(np.uint8)).save(folder / "train" / "dog" / "0.jpg")
    source = load_images(f"folder:{folder}", validation_fraction=0.1).train
    pictures = as_pictures(source)
    assert len(pictures) == len(source)
    for index in range(len(source)):
        assert isinstance(pictures[index]["image"], Image.Image)
        np.testing.assert_array_equal(np.asarray(pictures[index]["image"]), source[index]["image"])
        assert pictures[index]["label"] == source[index]["label"]


def test_an_unprepared_tfds_set_is_an_error_and_is_not_downloaded(tfds_directory):
    with pytest.raises(UserError, match=r"tfds:tiny_shades is not prepared; .*TFDS_DATA_DIR"):
        load_images("tfds:tiny_shades")
    assert not list(tfds_directory.rglob("*.array_record*"))


def test_tfds_sets_without_classes_are_an_error(tfds_directory):
    TinyNumbers(data_dir=tfds_directory, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match="tfds:tiny_numbers is not a labelled image set"):
        load_images("tfds:tiny_numbers")
