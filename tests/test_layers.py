import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gaudi_jax import (
    BlastLinear,
    BlockSparseLinear,
    GaudiLinear,
    LowRankLinear,
    MonarchLinear,
    Structural,
)
from gaudi_jax.cost import cost
from gaudi_jax.layers import initializers
from gaudi_jax.layers.base import factored_product
from gaudi_jax.masks import hard_mask

GOLDEN = Path(__file__).parent / "data" / "golden"
GOLDEN_LAYERS = sorted(path.stem for path in GOLDEN.glob("layer_*.npz"))

pytestmark = pytest.mark.usefixtures("strict_shapes")


def random_gaudi(n_in, n_out, seed=0, **options):
    """A layer with random widths (some dead, some full) and locations."""
    layer = GaudiLinear(n_in, n_out, rngs=nnx.Rngs(seed), **options)
    rng = np.random.default_rng(seed)
    widths = rng.uniform(0, 1, layer.widths.shape)
    widths[0, ::5], widths[1, 1::7], widths[:, 2] = 0, 0, 1
    layer.widths[...] = jnp.asarray(widths, jnp.float32)
    layer.locations[...] = jnp.asarray(rng.uniform(0, 1, layer.widths.shape), jnp.float32)
    return layer


LAYERS = {
    "low_rank": lambda: LowRankLinear(12, 20, rank=3, rngs=nnx.Rngs(0)),
    "low_rank_no_bias": lambda: LowRankLinear(13, 7, rank=7, use_bias=False, rngs=nnx.Rngs(0)),
    "gaudi": lambda: random_gaudi(12, 20),
    "gaudi_soft": lambda: random_gaudi(15, 9, sigma=3.0, use_bias=False),
    "gaudi_unrounded": lambda: random_gaudi(12, 12, sigma=5.0, round_to_grid=False),
    "gaudi_smoothed": lambda: random_gaudi(16, 12, backward_smoothing=1.0, granularity=(4, 2)),
    "gaudi_rank": lambda: random_gaudi(17, 23, rank=3),
    "gaudi_evaluation": lambda: nnx.view(random_gaudi(12, 20, sigma=2.0), deterministic=True),
    "gaudi_fft": lambda: random_gaudi(12, 20, sigma=4.0, mask_method="fft"),
    "gaudi_more_blocks": lambda: random_gaudi(6, 10, num_blocks=9),
    "monarch": lambda: MonarchLinear(12, 20, blocks=4, rank=1, rngs=nnx.Rngs(0)),
    "monarch_above_dense": lambda: MonarchLinear(
        15, 9, blocks=3, rank=3, use_bias=False, rngs=nnx.Rngs(0)
    ),
    "blast": lambda: BlastLinear(12, 20, blocks=2, rank=3, rngs=nnx.Rngs(0)),
    "blast_above_dense": lambda: BlastLinear(
        15, 9, blocks=3, rank=9, use_bias=False, rngs=nnx.Rngs(0)
    ),
    "block_sparse": lambda: BlockSparseLinear(
        16, 24, blocks=8, diagonals=3, rank=2, rngs=nnx.Rngs(0)
    ),
    "block_sparse_above_dense": lambda: BlockSparseLinear(
        14, 6, blocks=2, diagonals=2, rank=5, use_bias=False, rngs=nnx.Rngs(0)
    ),
}


built = functools.cache(lambda name: LAYERS[name]())


@pytest.fixture(params=LAYERS)
def layer(request):
    return nnx.clone(built(request.param))


def test_call_equals_product_with_kernel(layer):
    kernel = np.asarray(layer.kernel())
    assert kernel.shape == (layer.in_features, layer.out_features)
    bias = np.arange(layer.out_features, dtype=np.float32)
    if layer.bias is not None:
        layer.bias[...] = jnp.asarray(bias)
    for batch in [(), (2, 1, 5), (400,)]:
        x = np.random.default_rng(1).normal(size=(*batch, layer.in_features)).astype(np.float32)
        expected = x @ kernel + (0 if layer.bias is None else bias)
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_through_the_kernel(layer):
    x = jax.random.normal(jax.random.key(1), (4, layer.in_features))
    cotangent = jax.random.normal(jax.random.key(2), (4, layer.out_features))

    def through_call(layer, x):
        return (layer(x) * cotangent).sum()

    def through_kernel(layer, x):
        y = x @ layer.kernel()
        return ((y if layer.bias is None else y + layer.bias[...].reshape(1, -1)) * cotangent).sum()

    gradients = [
        nnx.jit(nnx.grad(function, argnums=(0, 1)))(layer, x)
        for function in (through_call, through_kernel)
    ]
    for actual, expected in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_vmap_over_inputs_and_bfloat16(layer):
    x = jax.random.normal(jax.random.key(1), (3, 2, layer.in_features))
    np.testing.assert_allclose(jax.vmap(layer)(x), layer(x), rtol=1e-5, atol=1e-5)
    layer.dtype = jnp.bfloat16
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    layer.dtype = None
    error = np.linalg.norm(np.asarray(y, np.float32) - layer(x)) / np.linalg.norm(layer(x))
    assert error < 0.03


class Bare(nnx.Module):
    """A layer without what counts it: its products are those of no layer."""

    def __init__(self, layer):
        self.product = layer.product

    def __call__(self, x):
        return self.product(x)


# Masked factors are multiplied whole until they are packed.
@pytest.mark.parametrize("name", [name for name in LAYERS if "gaudi" not in name])
def test_cost_of_fixed_structures_is_what_is_multiplied(name):
    layer = built(name)
    products = [
        cost(Bare(layer), jax.ShapeDtypeStruct((tokens, layer.in_features), "float32"))
        for tokens in (1, 10_000)
    ]
    one, many = (result.total_multiplications for result in products)
    dense = layer.in_features * layer.out_features
    price = int(layer.multiplications())
    if price < dense:
        assert (one, many) == (price, 10_000 * price)
    else:
        # Composed once, and then multiplied like a dense kernel.
        assert 0 < many - 10_000 * dense < 10_000
    result = cost(layer, jax.ShapeDtypeStruct((7, layer.in_features), "float32"))
    assert result.multiplications == 7 * price


def test_both_orders_of_the_factors_agree():
    left, right = jnp.arange(6.0).reshape(2, 3), jnp.arange(8.0).reshape(2, 4)
    flops = {}
    for tokens in (1, 1000):
        x = jax.random.normal(jax.random.key(0), (tokens, 3))
        np.testing.assert_allclose(
            factored_product(x, left, right), x @ (left.T @ right), rtol=1e-4, atol=1e-4
        )
        compiled = jax.jit(factored_product).lower(x, left, right).compile()
        flops[tokens] = compiled.cost_analysis()["flops"]
    assert flops[1] == 2 * (2 * 3 + 2 * 4)  # two thin products
    assert flops[1000] == 2 * (2 * 12 + 1000 * 12)  # composed first


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, "fft") for name in GOLDEN_LAYERS]
    # The table form is for rounded masks.
    + [(name, "table") for name in GOLDEN_LAYERS if name != "layer_no_ste"],
)
def test_layer_agrees_with_the_published_implementation(name, method):
    golden = np.load(GOLDEN / f"{name}.npz")
    rounded = not bool(golden["no_ste"])
    layer = GaudiLinear.from_blocks(
        jnp.array(golden["V"]),
        jnp.array(golden["U"].transpose(0, 2, 1)),
        jnp.array(golden["widths"]),
        jnp.array(golden["locations"]),
        bias=jnp.array(golden["bias"]),
        sigma=float(golden["sigma"]),
        round_to_grid=rounded,
        mask_method=method,
    )
    x = jnp.array(golden["x"])

    def check(actual, key, tolerance):
        error = np.linalg.norm(np.asarray(actual) - golden[key])
        assert error <= tolerance * np.linalg.norm(golden[key]), key

    def check_forward(layer, mode):
        mask_in, mask_out = layer.masks()
        check(layer(x), f"y_{mode}", 1e-4)
        check(mask_in, f"mask_in_{mode}", 1e-4)
        check(mask_out, f"mask_out_{mode}", 1e-4)
        check(layer.kernel().T, f"W_{mode}", 1e-4)

    check_forward(layer, "train")
    ct = jnp.array(golden["ct"])
    gradient, dx = nnx.jit(nnx.grad(lambda layer, x: (layer(x) * ct).sum(), argnums=(0, 1)))(
        layer, x
    )
    check(gradient.v[...], "dV", 1e-3)
    check(gradient.u[...].transpose(0, 2, 1), "dU", 1e-3)
    for key in ("widths", "locations", "bias"):
        check(gradient[key][...], f"d{key}", 1e-3)
    check(dx, "dx", 1e-3)

    # The reference drops, in evaluation, a block whose width rounds to one single feature.
    sizes = np.array([[layer.in_features], [layer.out_features]])
    single = np.round(golden["widths"] * sizes) == 1
    layer.widths[...] = jnp.array(np.where(single, 0, golden["widths"]))
    layer.eval()
    if method == "fft":
        layer.mask_method = "auto"  # evaluation rounds, whichever form training uses
    check_forward(layer, "eval")
    a, b = (np.round(w * n) for w, n in zip(np.asarray(layer.widths[...]), sizes, strict=True))
    expected = np.minimum(layer.rank * (a + b), a * b).sum()
    assert float(layer.multiplications()) == expected
    if np.isinf(golden["sigma"]):
        assert float(layer.multiplications()) == float(golden["num_params_eval"])


def test_initial_structure_agrees_with_the_published_implementation():
    golden = np.load(GOLDEN / "inits.npz")
    sizes = (None, 96, 384, 96, 1)
    for name, init in {
        "splr": initializers.split_widths(),
        "splr0.5": initializers.split_widths(0.5),
    }.items():
        np.testing.assert_allclose(init(*sizes), golden[f"{name}_widths"], atol=1e-5)
    for density in (0.25, 0.5):
        active = int(density * 96)
        np.testing.assert_allclose(
            initializers.leading_widths(density)(*sizes)[:, :active],
            golden[f"lr{density}_widths"][:, :active],
            atol=1e-5,
        )
        locations = initializers.spaced_locations()(*sizes)
        np.testing.assert_allclose(locations, golden[f"lr{density}_locations"], atol=1e-5)
    zeros = initializers.zero_locations()(*sizes)
    np.testing.assert_allclose(zeros, golden["splr_locations"], atol=1e-5)
    # proj_M is (out, in): our kernel transposed.
    layer = LowRankLinear.from_kernel(jnp.array(golden["proj_M"]).T, rank=24)
    error = np.linalg.norm(layer.kernel().T - golden["proj_W"])
    assert error <= 1e-5 * np.linalg.norm(golden["proj_W"])


def test_gaudi_from_kernel_with_leading_widths_is_the_truncated_svd():
    kernel = jax.random.normal(jax.random.key(0), (24, 16))
    bias = jnp.arange(16.0)
    gaudi = GaudiLinear.from_kernel(kernel, bias=bias, width_init=initializers.leading_widths(0.25))
    low_rank = LowRankLinear.from_kernel(kernel, bias=bias, rank=4)
    np.testing.assert_allclose(gaudi.kernel(), low_rank.kernel(), atol=1e-5)
    np.testing.assert_array_equal(gaudi.bias[...], bias)
    assert float(gaudi.multiplications()) == float(low_rank.multiplications()) == 4 * 40


def test_setting_a_kernel_keeps_the_blocks_in_place():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(16, 12)), jnp.float32)
    for width_init in (initializers.leading_widths(0.25), initializers.split_widths()):
        wanted = GaudiLinear.from_kernel(kernel, width_init=width_init)
        layer = GaudiLinear(16, 12, width_init=width_init, use_bias=False, rngs=nnx.Rngs(1))
        layer.set_kernel(kernel)
        np.testing.assert_allclose(layer.kernel(), wanted.kernel(), atol=1e-6)
        np.testing.assert_array_equal(layer.widths[...], wanted.widths[...])
    low_rank = LowRankLinear(16, 12, rank=4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    low_rank.set_kernel(kernel)
    assert low_rank.v.dtype == jnp.bfloat16
    wanted = LowRankLinear.from_kernel(kernel, rank=4).kernel()
    np.testing.assert_allclose(np.asarray(low_rank.kernel(), np.float32), wanted, atol=0.1)


def test_gaudi_from_kernel_is_by_default_no_worse_than_low_rank_at_its_cost():
    kernel = jax.random.normal(jax.random.key(0), (64, 64))
    layer = GaudiLinear.from_kernel(kernel)
    low_rank = LowRankLinear.from_kernel(kernel, rank=32)
    assert float(layer.multiplications()) == float(low_rank.multiplications()) == 64 * 64
    np.testing.assert_allclose(layer.kernel(), low_rank.kernel(), atol=1e-4)


def test_leading_widths_round_to_at_least_one_block():
    active = [
        int(initializers.leading_widths(density)(None, n, n, n, 1)[0].sum())
        for density, n in ((0.01, 8), (0.29, 100))
    ]
    assert active == [1, 29]


def blocks_layer(kernel, parts, **options):
    """A GaudiLinear of one block per (rows, columns, rank) part of a dense kernel."""
    n_in, n_out = kernel.shape
    rank = parts[0][2]
    vs, us, widths, locations = [], [], [], []
    for rows, columns, _ in parts:
        block = np.zeros_like(kernel)
        block[rows, columns] = kernel[rows, columns]
        left, s, right = np.linalg.svd(block)
        vs.append((left[:, :rank] * s[:rank]).T)
        us.append(right[:rank])
        widths.append([(rows.stop - rows.start) / n_in, (columns.stop - columns.start) / n_out])
        locations.append([rows.start / n_in, columns.start / n_out])
    arrays = [np.array(vs), np.array(us), np.array(widths).T, np.array(locations).T]
    return GaudiLinear.from_blocks(*(jnp.asarray(a, jnp.float32) for a in arrays), **options)


def test_special_cases_are_exact_at_the_same_cost():
    """Low-rank, block-sparse and block-low-rank matrices are GBLRs (Lee & Kim, theorem 1)."""
    rng = np.random.default_rng(0)
    low_rank = (rng.normal(size=(12, 3)) @ rng.normal(size=(3, 18))).astype(np.float32)
    everything = (slice(0, 12), slice(0, 18), 3)
    tiles = [(slice(i, i + 4), slice(j, j + 6)) for i in range(0, 12, 4) for j in range(0, 18, 6)]
    sparse = np.zeros((12, 18), np.float32)
    block_low_rank = np.zeros((12, 18), np.float32)
    for rows, columns in tiles:
        block_low_rank[rows, columns] = rng.normal(size=(4, 1)) @ rng.normal(size=(1, 6))
    for rows, columns in tiles[::2]:
        sparse[rows, columns] = rng.normal(size=(4, 6))
    cases = [
        (low_rank, [everything], 3 * (12 + 18)),
        (sparse, [(*tile, 4) for tile in tiles[::2]], np.count_nonzero(sparse)),
        (block_low_rank, [(*tile, 1) for tile in tiles], 9 * (4 + 6)),
    ]
    for kernel, parts, multiplications in cases:
        layer = blocks_layer(kernel, parts)
        np.testing.assert_allclose(layer.kernel(), kernel, atol=1e-5)
        assert float(layer.multiplications()) == multiplications


def test_multiplications_count_the_nonzeros_of_hard_masks():
    layer = random_gaudi(12, 20, sigma=2.0)
    mask_in = hard_mask(layer.widths[0], layer.locations[0], 12)
    mask_out = hard_mask(layer.widths[1], layer.locations[1], 20)
    alive = (mask_in.sum(1) > 0) & (mask_out.sum(1) > 0)
    lengths = np.stack([mask_in.sum(1), mask_out.sum(1)])[:, alive]
    assert 0 < alive.sum() < layer.num_blocks
    assert float(layer.multiplications()) == np.minimum(lengths.sum(0), lengths.prod(0)).sum()


def test_mode_switches_like_dropout_and_dead_blocks_vanish():
    layer = random_gaudi(12, 20, sigma=1.0)
    assert not layer.deterministic
    view = nnx.view(layer, deterministic=True)
    assert view.deterministic
    assert not layer.deterministic
    layer.eval()
    assert layer.deterministic
    np.testing.assert_array_equal(layer.kernel(), view.kernel())
    layer.train()
    assert not layer.deterministic
    dead = GaudiLinear(8, 8, rngs=nnx.Rngs(0))
    dead.widths[...] = jnp.zeros((2, 8))
    dead.bias[...] = jnp.arange(8.0)
    np.testing.assert_array_equal(dead(jnp.ones((1, 8)))[0], jnp.arange(8.0))
    assert float(dead.multiplications()) == 0


def test_evaluation_always_rounds():
    layer = GaudiLinear(10, 10, round_to_grid=False, sigma=5.0, rngs=nnx.Rngs(0))
    layer.widths[...] = jnp.full((2, 10), 0.23)
    unrounded = layer.kernel()
    layer.eval()
    rounded = layer.kernel()
    layer.widths[...] = jnp.full((2, 10), 0.2)
    np.testing.assert_array_equal(layer.kernel(), rounded)
    assert np.abs(unrounded - rounded).max() > 1e-3


def test_parameter_kinds_are_types():
    layer = GaudiLinear(8, 8, rngs=nnx.Rngs(0))
    assert len(jax.tree.leaves(nnx.state(layer, Structural))) == 2
    assert len(jax.tree.leaves(nnx.state(layer, nnx.Param))) == 5
    assert len(jax.tree.leaves(nnx.state(layer))) == 6  # and sigma


def test_initialisers_are_traceable_and_param_dtype_is_kept():
    def build():
        return GaudiLinear(16, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    abstract, concrete = nnx.eval_shape(build), build()
    for variable in (abstract, concrete):
        assert variable.v.dtype == variable.bias.dtype == jnp.bfloat16
        assert variable.widths.dtype == jnp.float32


def test_multiplications_of_large_layers_are_exact():
    layer = nnx.eval_shape(lambda: GaudiLinear(4096, 8192, rngs=nnx.Rngs(0)))
    layer.widths.set_value(jnp.ones((2, 4096)).at[0, 0].set(1 / 4096))
    assert int(layer.multiplications()) == 4095 * (4096 + 8192) + 8192
