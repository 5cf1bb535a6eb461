"""Packed layers compute what Gaudi layers compute with exact boxcars, in whatever products."""

import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings

import gaudi_jax
from gaudi_jax.deploy import autotune
from gaudi_jax.deploy.layout import Windows, compile_layout
from gaudi_jax.deploy.machine import MACHINES, Machine
from gaudi_jax.deploy.pack import Packer, pack
from gaudi_jax.errors import UserError
from gaudi_jax.kernels.table import CELL
from gaudi_jax.layers import GaudiLinear, PackedLinear
from gaudi_jax.layers.packed import Layout, Read, Write

#: Every product counts for itself; products and copies cost about the same; only their number does.
FREE = Machine(0.0, 1.0, 1e12, 1e12, 1)
EVEN = Machine(1.0, 100.0, 1e3, 1e3, 1, panel=8)
FEW = Machine(1.0, 1e12, 1e12, 1e12, 1)
#: Products cell by cell are the fastest.
CELLS = FREE._replace(cell=1)

#: How many cells an axis has, and their features: even and odd sizes, none above 512.
AXES = st.sampled_from([1, 3, 8, 64]).flatmap(
    lambda cell: st.tuples(st.integers(1, min(40, 512 // cell)), st.just(cell))
)


def layer_of(seed, cells, cell, rank, blocks, *, bias=True, **places):
    rng = np.random.default_rng(seed)
    n, m = (count * size for count, size in zip(cells, cell, strict=True))
    widths = rng.random((2, blocks)) * (rng.random(blocks) < 0.8)
    places = {"widths": widths, "locations": rng.random((2, blocks))} | places
    layer = GaudiLinear.from_blocks(
        jnp.asarray(rng.normal(size=(blocks, rank, n)), jnp.float32),
        jnp.asarray(rng.normal(size=(blocks, rank, m)), jnp.float32),
        **{name: jnp.asarray(value, jnp.float32) for name, value in places.items()},
        granularity=cell,
        bias=jnp.asarray(rng.normal(size=m), jnp.float32) if bias else None,
    )
    layer.eval()
    return layer


def around_the_ends(seed, blocks):
    """Places of blocks that wrap on both axes, but where their grid is too coarse for it."""
    rng = np.random.default_rng(seed)
    locations = rng.uniform(0.5, 1, (2, blocks))
    return {"locations": locations, "widths": rng.uniform(1 - locations, 1)}


def gaudi_of(size):
    return GaudiLinear(size, size, rngs=nnx.Rngs(0))


class Doubled(GaudiLinear):
    def __call__(self, x):
        return 2 * super().__call__(x)


@nnx.jit  # one program is compiled much sooner than each operation for itself
def output_of(layer, x):
    return layer(x)


def assert_close(actual, expected):
    """Within 1e-5 of the largest number; nothing but zeros where zeros are expected."""
    limit = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def assert_same_function(packed, layer):
    x = np.random.default_rng(1).normal(size=(2, 3, layer.in_features)).astype(np.float32)
    assert_close(packed(x), output_of(layer, x))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    axes=st.tuples(AXES, AXES),
    rank=st.integers(1, 4),
    blocks=st.integers(1, 6),
    bias=st.booleans(),
    wrapped=st.booleans(),
    machine=st.sampled_from([FREE, EVEN, FEW, CELLS, MACHINES["cpu"], MACHINES["gpu"]]),
    tokens=st.sampled_from([1, 64]),
)
def test_any_blocks(seed, axes, rank, blocks, bias, wrapped, machine, tokens):
    places = around_the_ends(seed, blocks) if wrapped else {}
    layer = layer_of(seed, *zip(*axes, strict=True), rank, blocks, bias=bias, **places)
    assert_same_function(pack(layer, machine, tokens), layer)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cells=st.tuples(st.integers(8, 24), st.integers(8, 24)),
    rank=st.integers(1, 4),
    machine=st.sampled_from([MACHINES["cpu"], MACHINES["gpu"]]),
    tokens=st.sampled_from([1, 64, 2**16]),
)
def test_any_form_that_may_be_fastest(seed, cells, rank, machine, tokens):
    """Many blocks of a few kinds: real machines make several products of these, and not of few."""
    rng = np.random.default_rng(seed)
    widths, locations = rng.random((2, 2, 4))[..., rng.integers(0, 4, 96)]
    layer = layer_of(seed, cells, (64, 64), rank, 96, widths=widths**2, locations=locations)
    packer = Packer(layer)
    for choice in autotune._choices(packer, machine, tokens):
        assert_same_function(autotune._packed(packer, choice), layer)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tiles=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    cell=st.tuples(st.sampled_from([1, 8, 64]), st.sampled_from([1, 8, 64])),
    rank=st.integers(1, 4),
    blocks=st.integers(1, 40),
    wrapped=st.booleans(),
    cut=st.sampled_from(autotune.TILES),
)
def test_any_blocks_in_tiles(seed, tiles, cell, rank, blocks, wrapped, cut):
    """As plain products, which take the kernel's place on a CPU."""
    width, tilings = cut
    features = tiles[0] * CELL, tiles[1] * width
    cells = [n // size for n, size in zip(features, cell, strict=True)]
    places = around_the_ends(seed, blocks) if wrapped else {}
    layer = layer_of(seed, cells, cell, rank, blocks, **places)
    packer = Packer(layer)
    assume(packer.tileable(width))  # not if all blocks are dead
    assert_same_function(packer.tile(width, tilings), layer)


@pytest.mark.parametrize("machine", [FREE, EVEN])
@pytest.mark.parametrize(
    ("cells", "cell", "places"),
    [
        ((4, 4), (64, 64), {}),
        ((13, 7), (1, 1), {}),
        ((6, 6), (2, 2), {"widths": np.ones((2, 4))}),
        ((6, 6), (2, 2), {"widths": np.zeros((2, 4))}),
        # Windows that wrap on both axes.
        ((8, 8), (2, 2), {"widths": np.full((2, 4), 0.5), "locations": np.full((2, 4), 0.75)}),
    ],
)
def test_special_places(machine, cells, cell, places):
    layer = layer_of(0, cells, cell, 1, 4, **places)
    assert_same_function(pack(layer, machine, 64), layer)


def test_a_dead_layer_is_its_bias():
    layer = layer_of(0, (4, 4), (8, 8), 1, 3, widths=np.zeros((2, 3)))
    packed = pack(layer, MACHINES["cpu"], 1024)
    assert packed.multiplications() == 0
    np.testing.assert_array_equal(packed(jnp.ones((2, 32))), jnp.stack([layer.bias[...]] * 2))


def test_dense_where_blocks_do_not_pay():
    layer = layer_of(0, (4, 4), (1, 1), 1, 4, widths=np.ones((2, 4)))
    packed = pack(layer, MACHINES["cpu"], 8)
    assert packed.layout is None
    assert packed.multiplications() == 16
    assert_same_function(packed, layer)
    assert_close(packed.kernel(), layer.kernel())


def test_free_products_multiply_no_zeros():
    layer = layer_of(3, (4, 6), (2, 2), 1, 5)
    packed = pack(layer, FREE, 64)
    assert packed.layout is not None
    assert packed.multiplications() <= layer.multiplications()
    assert_close(packed.kernel(), layer.kernel())


def test_very_many_inputs_at_once():
    """What they move are more bytes than 32 bits count."""
    packer = Packer(layer_of(0, (32, 8), (64, 64), 4, 64))
    few, many = (packer.compile(MACHINES["cpu"], tokens) for tokens in (2**14, 2**20))
    assert many.layout == few.layout
    assert many.seconds == pytest.approx(2**6 * few.seconds, rel=1e-2)


@pytest.mark.parametrize(("columns", "made"), [(60, 64), (40, 40), (29, 32)])
def test_panels_are_filled_where_little_is_missing(columns, made):
    alike = Windows(np.zeros(columns, int), np.full(columns, 64), 256)
    machine = Machine(0.0, 1.0, 1e9, 1e9, 1, panel=32)
    layout, order, _ = compile_layout(alike, alike, machine, 512)
    assert layout is not None
    assert sum(read.columns for read in layout.reads) == len(order) == made
    assert sorted(order)[:columns] == list(range(columns))


def test_a_model_of_any_class():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            gaudi = GaudiLinear(16, 24, granularity=4, use_bias=False, rngs=rngs)
            self.layers = nnx.List([gaudi, nnx.Dropout(0.5, rngs=rngs)])
            self.again = gaudi
            self.out = GaudiLinear(24, 16, rngs=rngs)

        def __call__(self, x):
            return self.out(self.layers[1](self.again(x) + self.layers[0](x)))

    model = Net()
    packed, plan = gaudi_jax.harden(model)
    model.eval()
    x = jnp.ones((3, 16))
    assert_close(packed(x), model(x))
    assert isinstance(model.out, GaudiLinear)
    assert packed.again is packed.layers[0]
    assert sorted(plan["layers"]) == ["again", "out"]
    plan = json.loads(json.dumps(plan, allow_nan=False))
    empty = gaudi_jax.rebuild(nnx.eval_shape(Net), plan)
    nnx.update(empty, nnx.state(packed))
    empty.eval()
    np.testing.assert_array_equal(empty(x), packed(x))


ONE_HALF = {"widths": np.full((2, 3), 0.5), "locations": np.zeros((2, 3))}


@pytest.mark.parametrize("places", [{}, ONE_HALF, {"widths": np.zeros((2, 3))}])
def test_saved_and_loaded(places, tmp_path):
    """Also where nothing is written to a half of the outputs, or to none."""
    layer = nnx.Sequential(layer_of(0, (8, 8), (8, 8), 2, 3, **places))
    packed, plan = gaudi_jax.harden(layer, tokens=4096)
    gaudi_jax.save(tmp_path / "packed", packed, plan)
    again = gaudi_jax.load(tmp_path / "packed", into=layer)
    assert isinstance(again.layers[0], PackedLinear)
    x = jnp.ones((5, 64))
    np.testing.assert_array_equal(again(x), packed(x))


def test_soft_masks_become_exact_boxcars():
    layer = GaudiLinear(16, 16, sigma=2.0, rngs=nnx.Rngs(0))
    layer.widths[...] = jnp.full((2, 16), 0.4)
    packed, _ = gaudi_jax.harden(layer)
    layer.eval()
    x = jnp.ones((1, 16))
    soft = layer(x)
    layer.sigma[...] = jnp.inf
    assert_close(packed(x), layer(x))
    assert np.abs(soft - packed(x)).max() > 1e-3


def test_bfloat16_and_jit():
    layer = layer_of(0, (8, 8), (8, 8), 1, 4)
    half = GaudiLinear(64, 64, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    packed = pack(layer, EVEN, 64)
    x = jax.random.normal(jax.random.key(0), (4, 64))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(packed, x), packed(x), atol=1e-4)
    assert gaudi_jax.harden(half)[0](x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_older_packed_models_keep_the_dtype_of_the_parameters(tmp_path):
    layer = nnx.Sequential(layer_of(0, (8, 8), (8, 8), 1, 4))
    packed, plan = gaudi_jax.harden(layer)
    layer.layers[0].dtype = packed.layers[0].dtype = jnp.bfloat16  # and float32 parameters
    for entry in plan["layers"].values():
        del entry["param_dtype"]
    gaudi_jax.save(tmp_path / "packed", packed, plan)
    again = gaudi_jax.load(tmp_path / "packed", into=layer)
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (packed, again)), strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_array_equal(one, other)
    for entry in plan["layers"].values():
        entry["param_dtype"] = "float31"
    with pytest.raises(UserError, match="param_dtype='float31' of layer 'layers/0'"):
        gaudi_jax.rebuild(layer, plan)


@pytest.mark.parametrize("cells", [False, True])
def test_values_are_held_in_the_dtype_of_the_computation_where_it_is_smaller(cells):
    layer = layer_of(0, (8, 8), (8, 8), 1, 4)

    def packed(dtype):
        layer.dtype = dtype
        packer = Packer(layer)
        one = packer.pack_cells(packer.cells()) if cells else pack(layer, EVEN, 64)
        return nnx.Sequential(one)

    wide, narrow = packed(None), packed(jnp.bfloat16)
    wide.layers[0].dtype = jnp.bfloat16  # casts at every call
    states = [nnx.state(each, nnx.Param) for each in (wide, narrow)]
    assert {x.dtype for x in jax.tree.leaves(states[1])} == {jnp.dtype(jnp.bfloat16)}
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state)) for state in states]
    assert sizes[1] == sizes[0] / 2
    x = jax.random.normal(jax.random.key(0), (4, layer.in_features))
    np.testing.assert_array_equal(narrow(x), wide(x))


def test_narrow_values_are_saved_and_loaded(tmp_path):
    layer = nnx.Sequential(layer_of(0, (8, 8), (8, 8), 1, 4))
    layer.layers[0].dtype = jnp.bfloat16
    packed, plan = gaudi_jax.harden(layer)
    gaudi_jax.save(tmp_path / "packed", packed, plan)
    again = gaudi_jax.load(tmp_path / "packed", into=layer)
    assert json.loads(json.dumps(plan))["layers"]["layers/0"]["param_dtype"] == "bfloat16"
    for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in (packed, again)), strict=True):
        assert one.dtype == other.dtype == jnp.bfloat16
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gaudi_jax.harden(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), "holds no GaudiLinear"),
        (lambda: gaudi_jax.harden(layer_of(0, (4, 4), (1, 1), 1, 2), tokens=0), "tokens=0"),
        (lambda: gaudi_jax.harden(layer_of(0, (4, 4), (1, 1), 1, 2), backend="abacus"), "'abacus'"),
        (lambda: PackedLinear(4, 4, Layout((Read(4, 1, 1),), ())), "outside the 4 input"),
        (lambda: PackedLinear(4, 4, Layout((Read(0, 1, 0),), ())), "has no columns"),
        (lambda: gaudi_jax.harden(layer_of(0, (4, 4), (1, 1), 1, 2), tokens="8"), "tokens='8'"),
        (lambda: gaudi_jax.harden(nnx.eval_shape(lambda: gaudi_of(4))), "has no values"),
        (lambda: gaudi_jax.harden(Doubled(4, 4, rngs=nnx.Rngs(0))), "holds no GaudiLinear that"),
        (lambda: PackedLinear(4, 4, Layout((), (Write(1, 3, ()),))), "does not follow"),
        (lambda: PackedLinear(4, 4, Layout((), (Write(0, 4, ((0, 1),)),))), "none outside the 0"),
        (lambda: PackedLinear(4, 4, Layout((), (Write(0, 3, ()),))), "end at 3"),
        (lambda: Layout.from_lists({"reads": [[1]]}), "layout of a packed layer is damaged"),
        (lambda: pack(layer_of(0, (4, 4), (1, 1), 1, 2), FREE, 1).set_kernel(None), "keeps its"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_windows_over_a_whole_axis_begin_at_its_start():
    layer = GaudiLinear(12, 12, rank=1, num_blocks=2, rngs=nnx.Rngs(0))
    layer.widths.set_value(jnp.ones((2, 2)))
    layer.locations.set_value(jnp.full((2, 2), 0.25))
    layer.eval()
    assert Packer(layer).places() == [[0, 0], [12, 12], [0, 0], [12, 12]]
    x = jax.random.normal(jax.random.key(0), (3, 12))
    assert_close(gaudi_jax.harden(layer).model(x), layer(x))
