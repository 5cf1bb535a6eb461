"""Compressed models of any class on disk."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from other_models import Encoder, tokens

import gaudi_jax
from gaudi_jax.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    compressed = gaudi_jax.compress(
        Encoder(nnx.Rngs(0)), 0.5, method="low_rank", calibration=[tokens()], progress=False
    )
    gaudi_jax.save(directory, *compressed)
    return directory, compressed


def test_a_saved_model_is_restored_bitwise(saved):
    directory, (model, plan) = saved
    assert json.loads((directory / "plan.json").read_text()) == plan
    for into in (Encoder(nnx.Rngs(7)), nnx.eval_shape(lambda: Encoder(nnx.Rngs(7)))):
        loaded = gaudi_jax.load(directory, into=into)
        wanted = nnx.clone(model)
        wanted.eval()
        assert nnx.graphdef(loaded) == nnx.graphdef(wanted)
        for left, right in zip(
            jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(wanted)), strict=True
        ):
            if jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
                left, right = jax.random.key_data(left), jax.random.key_data(right)
            np.testing.assert_array_equal(left, right)
            assert left.dtype == right.dtype


def test_mistakes_are_named(saved, tmp_path):
    directory, (model, plan) = saved
    with pytest.raises(UserError, match="is not an empty directory"):
        gaudi_jax.save(directory, model, plan)
    with pytest.raises(UserError, match="plan of format 'list'"):
        gaudi_jax.save(tmp_path / "other", model, [])
    with pytest.raises(UserError, match="of the model has no structure, but one in the plan"):
        gaudi_jax.save(tmp_path / "other", Encoder(nnx.Rngs(0)), plan)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="holds no saved model"):
        gaudi_jax.load(tmp_path, into=model)
    with pytest.raises(UserError, match="holds no run"):
        gaudi_jax.load(directory)
    with pytest.raises(UserError, match="another model"):
        gaudi_jax.load(directory, into=Encoder(nnx.Rngs(0), depth=2))
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        gaudi_jax.load(tmp_path, into=model)
