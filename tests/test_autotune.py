"""Layouts that are measured, and how."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gaudi_jax
from gaudi_jax.deploy import autotune
from gaudi_jax.deploy.pack import Packer
from gaudi_jax.deploy.timing import MOST_COPIES, Running, copies_out_of_cache
from tests.test_packed import EVEN, assert_same_function, layer_of


def test_autotune_takes_what_was_fastest_and_keeps_it(tmp_path, monkeypatch):
    layer = layer_of(3, (8, 8), (8, 8), 1, 12)
    choices = autotune._choices(Packer(layer), EVEN, 64)
    assert len(choices) > 2
    assert choices[-1].layout is None
    for index, choice in enumerate(choices):
        # The clock of the first one measured runs fastest.
        seconds = [1.0 + (i != index) for i in range(len(choices))]
        monkeypatch.setattr(autotune, "_measure", lambda *_, seconds=seconds: seconds)
        kept = tmp_path / str(index)
        tuned = autotune.fastest(layer, EVEN, 64, kept)
        assert tuned.layout == choice.layout
        assert_same_function(tuned, layer)
        monkeypatch.setattr(autotune, "_measure", None)
        assert autotune.fastest(layer, EVEN, 64, kept).layout == choice.layout
    (file,) = (tmp_path / "0").iterdir()
    seconds = [1.0 + i for i in range(len(choices))]
    monkeypatch.setattr(autotune, "_measure", lambda *_: seconds)
    for damage in ("damaged", json.dumps({"seconds": [0.0] * len(choices)})):
        file.write_text(damage)
        assert autotune.fastest(layer, EVEN, 64, tmp_path / "0").layout == choices[0].layout
        assert json.loads(file.read_text())["seconds"] == seconds


def test_what_one_core_measured_is_not_taken_by_two(tmp_path, monkeypatch):
    layer = layer_of(3, (8, 8), (8, 8), 1, 12)
    count = len(autotune._choices(Packer(layer), EVEN, 64))
    monkeypatch.setattr(autotune, "_measure", lambda *_: [1.0] * count)
    for cores in (1, 2, 2):
        monkeypatch.setattr(autotune, "_cores", lambda cores=cores: cores)
        autotune.fastest(layer, EVEN, 64, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_found_no_room_is_measured_again(tmp_path, monkeypatch):
    layer = layer_of(3, (8, 8), (8, 8), 1, 12)
    count = len(autotune._choices(Packer(layer), EVEN, 64))
    seconds = [1.0, *[autotune.NO_ROOM] * (count - 1)]
    monkeypatch.setattr(autotune, "_measure", lambda *_: seconds)
    autotune.fastest(layer, EVEN, 64, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nobodys_home_keeps_nothing(tmp_path, monkeypatch):
    def nobody(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "expanduser", nobody)
    layer = layer_of(0, (4, 4), (8, 8), 1, 3)
    count = len(autotune._choices(Packer(layer), EVEN, 64))
    monkeypatch.setattr(autotune, "_measure", lambda *_: [1.0] * count)
    autotune.fastest(layer, EVEN, 64)
    assert not list(tmp_path.iterdir())


def test_tiles_that_fail_as_they_run_are_refused(monkeypatch):
    layer = layer_of(0, (4, 4), (8, 8), 1, 3)
    packer, (dense, *_) = Packer(layer), autotune._choices(Packer(layer), EVEN, 64)
    tiles = autotune.TILES[0]
    monkeypatch.setattr(autotune, "_packed", lambda _, choice: choice)

    class Fails:
        def __init__(self, choice, x, **options):
            self.choice = choice

        def __call__(self):
            if self.choice is tiles:
                raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")
            return jnp.zeros(1)

    monkeypatch.setattr(autotune, "Running", Fails)
    seconds = autotune._measure(packer, [dense, tiles], 64)
    assert seconds[0] < 1
    assert seconds[1] == autotune.REFUSED


def test_autotune_measures(tmp_path):
    layer = layer_of(3, (8, 8), (32, 32), 1, 12)
    model, _ = gaudi_jax.harden(layer, tokens=2048, autotune=True, cache_dir=tmp_path)
    assert_same_function(model, layer)
    (file,) = tmp_path.iterdir()
    assert min(json.loads(file.read_text())["seconds"]) > 0


def test_calls_take_copies_of_the_arrays_in_turn():
    running = Running(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.ones((3, 4)), copies=2)
    first, second = running(), running()
    np.testing.assert_array_equal(first, second)
    places = [jax.tree.leaves(next(running._states))[0].unsafe_buffer_pointer() for _ in range(4)]
    assert len(set(places)) == 2
    assert places[:2] == places[2:]


def test_layouts_are_measured_with_weights_out_of_the_cache(tmp_path, monkeypatch):
    assert copies_out_of_cache(1 << 25) == 2
    assert copies_out_of_cache(1 << 30) == 2  # each form is called twice in a row
    assert copies_out_of_cache(64) == MOST_COPIES
    copies = []

    class Recorded(Running):
        def __init__(self, *args, **options):
            copies.append(options["copies"])
            super().__init__(*args, **options)

    monkeypatch.setattr(autotune, "Running", Recorded)
    autotune.fastest(layer_of(0, (4, 4), (8, 8), 1, 3), EVEN, 4, tmp_path)
    assert set(copies) == {MOST_COPIES}
