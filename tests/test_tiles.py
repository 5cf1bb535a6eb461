"""Packed layers as two block-sparse products."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

import gaudi_jax
from gaudi_jax import GaudiLinear, kernels
from gaudi_jax.deploy import autotune
from gaudi_jax.deploy.machine import MACHINES, Machine
from gaudi_jax.deploy.pack import Packer
from gaudi_jax.deploy.timing import Running
from gaudi_jax.errors import UserError
from gaudi_jax.export import export_model, load_exported
from gaudi_jax.kernels.table import Table
from gaudi_jax.layers import PackedLinear, tiles
from gaudi_jax.layers.tiles import Tiles
from tests.test_gpu_kernel import needs_interpreter

TILINGS = ((128, 4, 1), (128, 4, 1))


def layer_of(seed: int, n: int = 128, m: int = 192, rank: int = 1, granularity: int = 1):
    """A layer on random intervals of all lengths; some wrap, some are dead."""
    layer = GaudiLinear(n, m, rank=rank, granularity=granularity, rngs=nnx.Rngs(seed))
    keys = jax.random.split(jax.random.key(seed), 3)
    layer.widths[...] = jax.random.uniform(keys[0], layer.widths.shape)
    layer.locations[...] = jax.random.uniform(keys[1], layer.locations.shape)
    assert layer.bias is not None
    layer.bias[...] = jax.random.normal(keys[2], (m,))
    layer.eval()
    return layer


def difference(a, b) -> float:
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize(("rank", "granularity", "width"), [(1, 1, 64), (1, 64, 64), (3, 8, 192)])
def test_tiles_compute_what_the_masks_do(rank, granularity, width):
    layer = layer_of(rank, rank=rank, granularity=granularity)
    packed = Packer(layer).tile(width, TILINGS)
    x = jax.random.normal(jax.random.key(9), (2, 5, 128))
    assert difference(packed(x), layer(x)) < 1e-5
    assert difference(packed.kernel(), layer.kernel()) < 1e-5
    assert int(packed.multiplications()) == sum(p.size for p in (packed.v[0], packed.u[0]))


def test_no_more_cells_are_multiplied_than_the_windows_touch():
    layer = layer_of(0, 256, 256, granularity=64)
    layer.widths[...] = jnp.full_like(layer.widths, 0.25)
    layer.locations[...] = jnp.zeros_like(layer.locations)
    layout = Packer(layer).tile(64, TILINGS).layout
    assert isinstance(layout, Tiles)
    first, second = layout.tables
    assert first.counts == (1,) * 4  # 256 columns on one cell
    assert set(first.cells) == {0}
    assert second.counts == (4, 0, 0, 0)


def test_only_layers_that_tiles_cut_are_tiled():
    assert Packer(layer_of(0)).tileable(64)
    assert not Packer(layer_of(0)).tileable(128)
    assert not Packer(layer_of(0, 96, 128)).tileable(64)
    dead = layer_of(0)
    dead.widths[...] = jnp.zeros_like(dead.widths)
    assert not Packer(dead).tileable(64)


def test_a_plan_with_tiles_is_rebuilt(monkeypatch):
    model = nnx.Sequential(layer_of(1), nnx.relu)
    hardening = sys.modules["gaudi_jax.deploy.harden"]  # the function has the same name
    monkeypatch.setattr(hardening, "pack", lambda layer, *_: Packer(layer).tile(64, TILINGS))
    packed, plan = gaudi_jax.harden(model)
    again = gaudi_jax.rebuild(model, json.loads(json.dumps(plan)))
    nnx.update(again, nnx.state(packed))
    x = jax.random.normal(jax.random.key(0), (3, 128))
    np.testing.assert_array_equal(again(x), packed(x))
    assert difference(packed(x), model(x)) < 1e-5


def test_an_export_says_that_it_cannot_hold_the_kernel(tmp_path, caplog):
    packed = Packer(layer_of(1)).tile(64, TILINGS)
    file = tmp_path / "model.stablehlo"
    export_model(packed, jax.ShapeDtypeStruct((1, 128), jnp.float32), file)
    assert "1 layers are packed for a kernel that no file can hold" in caplog.text
    x = jax.random.normal(jax.random.key(0), (3, 128))
    assert difference(load_exported(file)(x), packed(x)) < 1e-5


@pytest.mark.parametrize(
    "lists",
    [{}, {"width": 64, "tables": [[[0], [2]]] * 2, "tilings": [[1, 1, 1]] * 2}, {"width": 1}],
)
def test_damaged_tiles_are_named(lists):
    with pytest.raises(UserError, match="tiles of a packed layer are damaged"):
        Tiles.from_lists(lists)


@pytest.fixture
def hopper(monkeypatch):
    """Tiles are offered; computed on a CPU, they are plain products."""
    monkeypatch.setattr(autotune, "on_hopper", lambda: True)


def half_layer(seed: int) -> GaudiLinear:
    layer = layer_of(seed, 128, 256)
    layer.dtype = jnp.bfloat16
    return layer


def test_tiles_are_chosen_where_they_are_fastest(hopper, monkeypatch, tmp_path):
    monkeypatch.setattr(autotune, "_measure", lambda _, choices, __: [*range(len(choices), 0, -1)])
    layer = half_layer(2)
    packed = autotune.fastest(layer, MACHINES["gpu"], 64, tmp_path)
    assert isinstance(packed.layout, Tiles)
    x = jax.random.normal(jax.random.key(0), (64, 128))
    assert difference(packed(x), layer(x)) < 2e-2
    # What was measured holds for these blocks, and no others of the same shape.
    autotune.fastest(half_layer(2), MACHINES["gpu"], 64, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    autotune.fastest(half_layer(4), MACHINES["gpu"], 64, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_tiles_that_fail_are_left_out(hopper, monkeypatch, tmp_path, caplog):
    def fail(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(Packer, "tile", fail)
    packed = autotune.fastest(half_layer(2), MACHINES["gpu"], 64, tmp_path)
    assert not isinstance(packed.layout, Tiles)
    assert "no such instruction" in caplog.text


def test_no_tiles_are_offered_elsewhere():
    choices = autotune._choices(Packer(half_layer(2)), MACHINES["gpu"], 64)
    assert all(hasattr(choice, "layout") for choice in choices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64, "cells": (9,)}, "lies outside 128 features"),
        ({"width": 128}, "tiles of 128 columns"),
        ({"tilings": ((100, 4, 1), (128, 4, 1))}, "unknown tilings"),
        ({"width": 192, "tilings": ((256, 4, 1), (256, 4, 1))}, "at most 170 rows"),
    ],
)
def test_tiles_that_do_not_fit_are_named(change, message):
    table = Table(change.get("cells", (0,)), (1,))
    tiles_out = 192 // change.get("width", 64)
    second = Table((0,) * tiles_out, (1,) * tiles_out)
    layout = Tiles(change.get("width", 64), (table, second), change.get("tilings", TILINGS))
    with pytest.raises(UserError, match=message):
        PackedLinear(128, 192, layout)


def test_a_tiled_model_is_exported_without_its_kernel(monkeypatch, tmp_path):
    packed = in_bfloat16(Packer(layer_of(1)).tile(64, TILINGS))
    # As on a GPU: a kernel takes no batch of any size, and no second platform.
    monkeypatch.setattr(tiles, "on_hopper", lambda: not kernels._portable.get())
    example = jax.ShapeDtypeStruct((1, 128), jnp.bfloat16)
    file = tmp_path / "model"
    export_model(packed, example, file, platforms=("cpu", "cuda"))
    x = jax.random.normal(jax.random.key(0), (3, 128), jnp.bfloat16)
    assert difference(load_exported(file)(x), layer_of(1)(x)) < 2e-2


def in_bfloat16(packed: PackedLinear) -> PackedLinear:
    packed.dtype = jnp.bfloat16
    return packed


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="kernels need JAX 0.11")
def test_the_kernel_is_part_of_a_program_for_gpus_alone(monkeypatch):
    monkeypatch.setattr(tiles, "on_hopper", lambda: True)
    packed = in_bfloat16(Packer(layer_of(1)).tile(64, TILINGS))
    graphdef, state = nnx.split(packed)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    traced = run.trace(state, jnp.ones((128, 128), jnp.bfloat16))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@needs_interpreter
def test_a_tiled_layer_computes_the_same_with_its_kernel(monkeypatch):
    """Interpreted on a CPU, with the batch axes and the bias of a layer."""
    from gaudi_jax.kernels import hopper

    params = plgpu.InterpretGPUParams()
    interpreted = functools.partial(hopper.multiply, programs=2, interpret=params)
    monkeypatch.setattr(hopper, "multiply", interpreted)
    monkeypatch.setattr(tiles, "on_hopper", lambda: True)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x))
    layer = layer_of(1, 128, 128, granularity=8)
    packed = in_bfloat16(Packer(layer).tile(64, TILINGS))
    x = jax.random.normal(jax.random.key(0), (2, 36, 128), jnp.bfloat16)
    assert difference(packed(x), layer(x)) < 1e-2


def test_columns_are_filled_up_with_zeros():
    layer = layer_of(3, 64, 64)
    layer.widths[...] = 0.3 * layer.widths[...]
    machine = Machine(0.0, 1.0, 1e9, 1e9, 1, multiple=8)
    packed = Packer(layer).pack(Packer(layer).compile(machine, 64))
    assert packed.layout is not None
    assert all(read.columns % 8 == 0 for read in packed.layout.reads)
    x = jax.random.normal(jax.random.key(0), (4, 64))
    assert difference(packed(x), layer(x)) < 1e-5


def test_a_model_that_is_applied_several_times_gives_the_same():
    model, x = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), jnp.ones((2, 8))
    np.testing.assert_allclose(Running(model, x, times=3)(), Running(model, x)(), rtol=1e-6)
