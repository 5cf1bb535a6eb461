"""Parts of batches, put together, are the batches that one process reads."""

import numpy as np
import pytest

from gaudi_jax.data.images import load_images
from gaudi_jax.data.pipeline import evaluation_batches, train_batches
from gaudi_jax.data.text import evaluation_windows, train_windows
from gaudi_jax.errors import UserError

DIGITS = load_images("digits")
TOKENS = np.arange(500)


def assert_parts_make_the_whole(batches, count):
    whole = batches((0, 1))
    parts = [batches((number, 2)) for number in range(2)]
    for _ in range(count):
        expected, *halves = (next(iterator) for iterator in (whole, *parts))
        for name, array in expected.items():
            together = np.concatenate([half[name] for half in halves])
            if name == "image":  # what is padded has no weight, and may be anything
                real = expected.get("weight", np.ones(len(array))) > 0
                array, together = array[real], together[real]
            np.testing.assert_array_equal(together, array, err_msg=name)
    return whole, parts


def test_training_images():
    def batches(shard):
        return train_batches(
            DIGITS.train, batch_size=100, image_size=8, seed=1, crop_padding=2, shard=shard
        )

    assert_parts_make_the_whole(batches, 15)  # into the second epoch


@pytest.mark.parametrize("batch_size", [64, 100, 160])
def test_evaluation_images(batch_size):
    """The last batch leaves some processes with padding alone."""

    def batches(shard):
        return evaluation_batches(DIGITS.test, batch_size=batch_size, image_size=8, shard=shard)

    count = -(-len(DIGITS.test) // batch_size)
    whole, parts = assert_parts_make_the_whole(batches, count)
    for iterator in (whole, *parts):
        assert next(iterator, None) is None


def test_training_windows():
    def batches(shard):
        return train_windows(TOKENS, block=8, batch_size=4, seed=0, shard=shard)

    assert_parts_make_the_whole(batches, 40)


def test_evaluation_windows():
    def batches(shard):
        return evaluation_windows(TOKENS, block=8, batch_size=24, stride=4, shard=shard)

    whole, parts = assert_parts_make_the_whole(batches, -(-123 // 24))
    for iterator in (whole, *parts):
        assert next(iterator, None) is None


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match="batch_size=9 cannot be split into 2 parts"):
        train_windows(TOKENS, block=8, batch_size=9, seed=0, shard=(0, 2))
