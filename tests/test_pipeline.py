import itertools
import json
from typing import Any

import numpy as np
import pytest

from gaudi_jax.data.images import ArraySource, load_images
from gaudi_jax.data.pipeline import evaluation_batches, train_batches
from gaudi_jax.errors import UserError


def numbered(count=10, height=4, width=4):
    """Images filled with their own number, which is their label too."""
    labels = np.arange(count)
    images = np.broadcast_to(labels[:, None, None, None], (count, height, width, 1))
    return ArraySource(images.astype(np.uint8), labels)


def ramps(height, width):
    """Images whose pixels grow along the longer axis."""
    row = np.linspace(0, 255, max(height, width)).astype(np.uint8)
    image = np.broadcast_to(row if width > height else row[:, None], (height, width))
    return ArraySource(np.stack([image[..., None]] * 4), np.zeros(4, int))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["label"], other["label"])


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def test_what_is_left_of_an_epoch_goes_into_the_next():
    iterator = train_batches(numbered(10), batch_size=4, image_size=4, seed=0)
    batches = take(iterator, 5)  # 20 images: two epochs
    labels = np.concatenate([batch["label"] for batch in batches])
    assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
    assert list(labels[:10]) != list(labels[10:])
    for batch in batches:  # an image keeps its label
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


@pytest.mark.parametrize("before", [0, 1, 2, 7])
def test_the_state_resumes_at_any_place(before):
    def make():
        return train_batches(
            numbered(10), batch_size=4, image_size=4, seed=5, crop_padding=2, flip=True
        )

    iterator = make()
    take(iterator, before)
    state = json.dumps(iterator.get_state()).encode()
    expected = take(iterator, 6)
    resumed = make()
    take(resumed, 3)  # a restored state replaces whatever the iterator has done
    resumed.set_state(json.loads(state.decode()))
    assert_same(take(resumed, 6), expected)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (16, 24), (4, 6)])
def test_training_crops_move_along_the_longer_side(shape):
    iterator = train_batches(ramps(*shape), batch_size=4, image_size=8, seed=0)
    batches = take(iterator, 20)
    assert all(batch["image"].shape == (4, 8, 8, 1) for batch in batches)
    assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 5


def test_half_of_the_images_are_mirrored():
    source = ramps(8, 9)
    iterator = train_batches(source, batch_size=4, image_size=8, seed=0, flip=True)
    rising = [image[0, 0, 0] < image[0, -1, 0] for b in take(iterator, 100) for image in b["image"]]
    assert 0.4 < np.mean(rising) < 0.6


def test_evaluation_pads_the_last_batch_with_weight_zero():
    batches = list(evaluation_batches(numbered(10), batch_size=4, image_size=4))
    assert [batch["weight"].tolist() for batch in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert [batch["label"].tolist() for batch in batches][2] == [8, 9, 0, 0]
    assert batches[2]["image"].shape == (4, 4, 4, 1)
    kinds = {(b["image"].dtype, b["label"].dtype, b["weight"].dtype) for b in batches}
    assert kinds == {(np.dtype("uint8"), np.dtype("int32"), np.dtype("float32"))}


def test_evaluation_takes_a_batch_larger_than_the_split():
    (batch,) = evaluation_batches(numbered(3), batch_size=8, image_size=4)
    assert batch["weight"].sum() == 3


def test_nothing_is_printed(capfd, caplog, recwarn):
    take(train_batches(numbered(), batch_size=4, image_size=4, seed=0, crop_padding=1), 4)
    list(evaluation_batches(numbered(), batch_size=4, image_size=4))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"image_size": 0}, {"workers": -1}])
def test_options_out_of_range_are_named(wrong):
    options: dict[str, Any] = {"batch_size": 4, "image_size": 4} | wrong
    name, value = next(iter(wrong.items()))
    with pytest.raises(UserError, match=f"{name}={value}"):
        train_batches(numbered(), seed=0, **options)
    with pytest.raises(UserError, match=f"{name}={value}"):
        next(evaluation_batches(numbered(), **options))


@pytest.mark.slow
def test_workers_change_nothing():
    def make(workers):
        source = load_images("digits").train
        return train_batches(
            source, batch_size=64, image_size=8, seed=1, crop_padding=1, workers=workers
        )

    expected = take(make(0), 25)  # into the second epoch
    iterator = make(2)
    assert_same(take(iterator, 19), expected[:19])
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = make(2)
    resumed.set_state(state)
    assert_same(take(resumed, 6), expected[19:])


@pytest.mark.slow
def test_evaluation_with_workers_sees_every_image_once_in_order():
    source = load_images("digits").test
    alone = list(evaluation_batches(source, batch_size=64, image_size=8))
    shared = list(evaluation_batches(source, batch_size=64, image_size=8, workers=2))
    assert_same(shared, alone)
    labels = np.concatenate([batch["label"][batch["weight"] == 1] for batch in shared])
    assert labels.tolist() == [source[i]["label"] for i in range(len(source))]
