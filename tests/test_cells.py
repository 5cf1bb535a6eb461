"""Packed layers cell by cell."""

import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

import gaudi_jax
from gaudi_jax.deploy import autotune
from gaudi_jax.deploy.machine import MACHINES
from gaudi_jax.deploy.pack import Packer, pack
from gaudi_jax.errors import UserError
from gaudi_jax.kernels.table import Table
from gaudi_jax.layers import GaudiLinear, PackedLinear, cells
from gaudi_jax.layers.cells import Cells
from tests.test_packed import assert_same_function, layer_of

CPU = MACHINES["cpu"]


def cell_by_cell(layer: GaudiLinear) -> PackedLinear:
    packer = Packer(layer)
    return packer.pack_cells(packer.cells())


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cells=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    cell=st.sampled_from([(1, 1), (8, 4), (3, 5)]),
    rank=st.sampled_from([1, 3]),
    bias=st.booleans(),
)
def test_cells_compute_what_the_masks_do(seed, cells, cell, rank, bias):
    layer = layer_of(seed, cells, cell, rank, 4, bias=bias)
    packed = cell_by_cell(layer)
    assert_same_function(packed, layer)
    np.testing.assert_allclose(packed.kernel(), layer.kernel(), atol=1e-5)


@pytest.mark.parametrize(
    ("widths", "locations"),
    [
        ([[0.5], [0.75]], [[0.75], [0.5]]),  # both wrap
        ([[1.0], [1.0]], [[0.25], [0.5]]),  # full
        ([[0.5], [0.0]], [[0.0], [0.0]]),  # dead
    ],
)
def test_special_places(widths, locations):
    layer = layer_of(0, (4, 4), (2, 3), 2, 1, widths=widths, locations=locations)
    packed = cell_by_cell(layer)
    assert_same_function(packed, layer)
    inside = int(np.prod(np.array(widths) > 0))
    cost = 2 * (round(widths[0][0] * 8) + round(widths[1][0] * 12)) * inside
    assert int(packed.multiplications()) == cost == packed.v[0].size + packed.u[0].size


@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_an_empty_batch(batch):
    packed = cell_by_cell(layer_of(0, (4, 4), (2, 3), 2, 3))
    assert packed(jnp.zeros((*batch, 8))).shape == (*batch, 12)


def test_a_layer_without_blocks_is_its_bias():
    layer = layer_of(0, (4, 4), (2, 3), 1, 2, widths=[[0.0, 0.5], [0.5, 0.0]])
    packed = cell_by_cell(layer)
    assert packed.v[0].size == packed.u[0].size == 0
    np.testing.assert_array_equal(packed(jnp.ones((1, 8)))[0], layer.bias[...])


@pytest.mark.parametrize("shape", [(cells.FEW_VECTORS,), (cells.FEW_VECTORS + 1,), (3, 5)])
def test_a_prompt_and_single_vectors_get_the_same(shape):
    layer = layer_of(0, (4, 4), (2, 3), 2, 6)
    packed = cell_by_cell(layer)
    x = jax.random.normal(jax.random.key(0), (*shape, 8))
    np.testing.assert_allclose(packed(x), layer(x), atol=1e-5)


def test_a_prompt_does_not_copy_its_cells_for_each_vector():
    packed = cell_by_cell(wide_layer(16))
    x = jax.ShapeDtypeStruct((1024, 768), jnp.float32)
    memory = jax.jit(packed).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * x.size * 4


def test_sums_of_many_blocks_are_kept_in_float32():
    layer = layer_of(0, (4, 4), (8, 8), 2, 200)
    layer.dtype = jnp.bfloat16
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32)), jnp.bfloat16)
    exact = x.astype(jnp.float32) @ layer.kernel()
    errors = [
        float(jnp.linalg.norm(form(x) - layer.bias[...] - exact) / jnp.linalg.norm(exact))
        for form in (cell_by_cell(layer), layer)
    ]
    assert errors[0] < 1.5 * errors[1]


def wide_layer(rank: int) -> GaudiLinear:
    """At a quarter of the multiplications of 768 x 768."""
    blocks = 768 * 768 // 4 // (rank * 2 * 192)
    quarter = np.full((2, blocks), 0.25)
    places = np.random.default_rng(0).integers(0, 12, (2, blocks)) / 12
    return layer_of(0, (12, 12), (64, 64), rank, blocks, widths=quarter, locations=places)


def test_cells_are_for_single_vectors_and_wide_blocks_on_a_cpu():
    assert isinstance(pack(wide_layer(16), CPU, 1).layout, Cells)
    assert not isinstance(pack(wide_layer(16), CPU, 64).layout, Cells)
    assert not isinstance(pack(wide_layer(1), CPU, 1).layout, Cells)
    for other in ("gpu", "tpu"):
        assert not isinstance(pack(wide_layer(16), MACHINES[other], 1).layout, Cells)


def test_cells_are_measured_where_they_may_be_fastest(monkeypatch, tmp_path):
    monkeypatch.setattr(autotune, "_measure", lambda _, choices, __: [*range(len(choices), 0, -1)])
    layer = wide_layer(16)
    packed = autotune.fastest(layer, CPU, 1, tmp_path)
    assert isinstance(packed.layout, Cells)  # the last of the choices
    x = jax.random.normal(jax.random.key(0), (1, 768))
    expected = layer(x)
    np.testing.assert_allclose(packed(x), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    assert not isinstance(autotune.fastest(layer, CPU, 1024, tmp_path).layout, Cells)


def test_a_plan_with_cells_is_rebuilt():
    model = nnx.Sequential(wide_layer(16), nnx.relu)
    packed, plan = gaudi_jax.harden(model, tokens=1, backend="cpu")
    assert plan["layers"]["layers/0"]["layout"]["grid"] == [64, 64]
    abstract = nnx.eval_shape(lambda: nnx.Sequential(nnx.clone(model.layers[0]), nnx.relu))
    again = gaudi_jax.rebuild(abstract, json.loads(json.dumps(plan)))
    nnx.update(again, nnx.state(packed))
    x = jax.random.normal(jax.random.key(0), (1, 768))
    np.testing.assert_array_equal(again(x), packed(x))


@pytest.mark.parametrize(
    "lists",
    [
        {"grid": [4]},
        {"grid": [4, 4], "rank": 1, "tables": [[[0], [2]]] * 2},
        {"grid": [4, 4], "rank": 1, "tables": [[[0], [1]]]},
        {"grid": "no", "rank": 1, "tables": [[[0], [1]]] * 2},
    ],
)
def test_damaged_cells_are_named(lists):
    with pytest.raises(UserError, match="cells of a packed layer are damaged"):
        Cells.from_lists(lists)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (Cells((4, 4), 1, (Table((2,), (1,)), Table((0, 0), (1, 1)))), "outside the 2 there are"),
        (Cells((4, 4), 1, (Table((0,), (1,)), Table((1, 0), (1, 1)))), "outside the 1 there are"),
        (Cells((4, 4), 1, (Table((0,), (1,)), Table((0,), (1,)))), "not the layer's 8 output"),
        (Cells((3, 4), 1, (Table((0,), (1,)), Table((0, 0), (1, 1)))), "do not cut a layer of 8"),
        (Cells((4, 4), 0, (Table((0,), (1,)), Table((0, 0), (1, 1)))), "rank 0 do not cut"),
    ],
)
def test_cells_that_do_not_fit_are_named(cells, message):
    with pytest.raises(UserError, match=message):
        PackedLinear(8, 8, cells)
