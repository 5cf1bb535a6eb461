"""Monarch, BLAST and block-sparse layers, beside low-rank ones: fits, budgets and starts."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gaudi_jax import BlastLinear, BlockSparseLinear, LowRankLinear, MonarchLinear
from gaudi_jax.decomposition import relative_error, svd_factors
from gaudi_jax.decomposition.blast import blast_factors, blast_kernel
from gaudi_jax.decomposition.block_sparse import (
    block_sparse_factors,
    block_sparse_kernel,
    butterfly_pattern,
)
from gaudi_jax.decomposition.monarch import monarch_factors, monarch_kernel
from gaudi_jax.layers.factory import GRID_LAYERS, linear_factory

GOLDEN = Path(__file__).parent / "data" / "golden"
#: What of the error of truncated SVD a BLAST layer of 4 parts of each axis leaves at most.
BLAST_SHARES = {
    "olb_blocks_128x128": 0.3,
    "olb_blocks_256x384": 1.0,
    "olb_decay_192x96": 1.0,
    "olb_gauss_128x128": 0.8,
    "olb_tight_128": 0.7,
    "olb_tight_256x384": 0.75,
}
MEASURED = sorted(path.stem for path in GOLDEN.glob("olb_*.npz"))


def golden(name):
    """A measured kernel, a number of multiplications, and the error of truncated SVD at it."""
    file = np.load(GOLDEN / f"{name}.npz")
    kernel = jnp.asarray(file["M"].T, jnp.float32)
    return kernel, int(file["budget"]), float(file["nrmse_lowrank"])


def moment_of(n, samples=300):
    mixed = jax.random.normal(jax.random.key(1), (samples, n)) * jnp.linspace(0.1, 3, n)
    x = mixed @ jax.random.normal(jax.random.key(2), (n, n)) + mixed[:, :1]
    return x.T @ x / samples


# ---------------------------------------------------------------- fits


@pytest.mark.parametrize("name", MEASURED)
def test_low_rank_has_the_error_of_the_svd(name):
    kernel, budget, low_rank = golden(name)
    rank = budget // sum(kernel.shape)
    layer = LowRankLinear.from_kernel(kernel, rank=rank)
    assert int(layer.multiplications()) <= budget
    energies = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False) ** 2
    wanted = np.sqrt(energies[rank:].sum() / energies.sum())
    assert low_rank == pytest.approx(wanted, abs=1e-6)
    assert float(relative_error(kernel, layer.kernel())) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", MEASURED)
def test_monarch_is_the_block_wise_svd(name):
    kernel, budget, _ = golden(name)
    options = MonarchLinear.affordable(*kernel.shape, 2, budget)
    layer = MonarchLinear.from_kernel(kernel, **options)
    assert int(layer.multiplications()) <= budget
    wanted = np.zeros(kernel.shape)
    n, m = (size // 2 for size in kernel.shape)
    for i in range(2):
        for j in range(2):
            place = slice(i * n, (i + 1) * n), slice(j * m, (j + 1) * m)
            u, s, vt = np.linalg.svd(np.asarray(kernel[place], np.float64))
            r = options["rank"]
            wanted[place] = u[:, :r] * s[:r] @ vt[:r]
    np.testing.assert_allclose(layer.kernel(), wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "blocks", "share"),
    [
        *(
            pytest.param(name, 4, share, marks=[pytest.mark.slow] if "256" in name else [])
            for name, share in BLAST_SHARES.items()
        ),
        ("olb_blocks_128x128", 8, 0.3),
    ],
)
def test_blast_is_better_than_low_rank_at_its_cost(name, blocks, share):
    kernel, budget, low_rank = golden(name)
    layer = BlastLinear.from_kernel(kernel, **BlastLinear.affordable(*kernel.shape, blocks, budget))
    assert int(layer.multiplications()) <= budget
    assert float(relative_error(kernel, layer.kernel())) < share * low_rank


def test_blast_without_steps_is_the_svd_and_its_error_never_rises():
    kernel, *_ = golden("olb_tight_128")
    for moment in (None, moment_of(128)):
        left, right = svd_factors(kernel, 9, second_moment=moment)
        start = blast_kernel(*blast_factors(kernel, 4, 9, moment, steps=0))
        np.testing.assert_allclose(start, left.T @ right, atol=1e-5)
        errors = [
            float(relative_error(kernel, blast_kernel(*parts), moment))
            for steps in (0, 1, 2, 5, 20)
            for parts in [blast_factors(kernel, 4, 9, moment, steps=steps)]
        ]
        assert all(np.diff(errors) < 0)


def test_blast_finds_a_blast_matrix():
    rng = np.random.default_rng(0)
    shapes = (4, 3, 8), (4, 4, 3), (4, 3, 6)
    kernel = blast_kernel(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
    found = BlastLinear.from_kernel(kernel, blocks=4, rank=3)
    assert float(relative_error(kernel, found.kernel())) < 1e-3


@pytest.mark.parametrize("weighed", [False, True])
def test_errors_of_block_sparse_fits_fall(weighed):
    kernel, *_ = golden("olb_decay_192x96")
    moment = moment_of(96) if weighed else None
    errors = [
        float(relative_error(kernel, block_sparse_kernel(*parts), moment))
        for sweeps in (0, 1, 2, 5, 20, 100)
        for parts in [block_sparse_factors(kernel, 8, 3, 6, moment, sweeps=sweeps)]
    ]
    assert all(np.diff(errors) < 0)


def test_block_sparse_matrices_are_found():
    rng = np.random.default_rng(0)
    shapes = (1, 64), (1, 48), (8, 3, 8, 6)
    kernel = block_sparse_kernel(
        *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    )
    layer = BlockSparseLinear.from_kernel(kernel, blocks=8, diagonals=3, rank=1)
    assert float(relative_error(kernel, layer.kernel())) < 0.02


def test_the_pattern_is_the_flat_butterfly():
    pattern = butterfly_pattern(16, 5)
    for j in range(16):
        assert set(pattern[j]) == {i for i in range(16) if (i ^ j).bit_count() <= 1}
    # Every group is read as often as it reads.
    assert (np.bincount(pattern.ravel()) == 5).all()


FITS = {
    "monarch": lambda kernel, moment: monarch_kernel(*monarch_factors(kernel, 4, 2, moment)),
    "blast": lambda kernel, moment: blast_kernel(*blast_factors(kernel, 4, 6, moment, steps=20)),
    "block_sparse": lambda kernel, moment: block_sparse_kernel(
        *block_sparse_factors(kernel, 4, 1, 2, moment, sweeps=10)
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_second_moment_makes_the_error_of_the_outputs_small(name):
    kernel, moment = jax.random.normal(jax.random.key(0), (32, 24)), moment_of(32)
    plain, weighed = (FITS[name](kernel, each) for each in (None, moment))
    errors = [float(relative_error(kernel, each, moment)) for each in (plain, weighed)]
    assert errors[1] < 0.8 * errors[0]
    # Of white inputs it is the error of the kernel itself.
    white = FITS[name](kernel, jnp.eye(32))
    np.testing.assert_allclose(
        relative_error(kernel, white), relative_error(kernel, plain), rtol=1e-2
    )


@pytest.mark.parametrize("name", FITS)
def test_kernels_without_anything_are_fitted(name):
    moment = moment_of(32)
    for kernel in (jnp.zeros((32, 24)), jnp.zeros((32, 24)).at[3, 4].set(1.0), jnp.ones((32, 24))):
        for each in (None, moment, 0 * moment):
            assert jnp.isfinite(FITS[name](kernel, each)).all()


# ---------------------------------------------------------------- budgets and starts


@pytest.mark.parametrize("name", GRID_LAYERS)
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8, 1.0])
def test_budgets_are_used_and_never_exceeded(name, budget):
    for n, m in ((64, 64), (48, 96), (64, 256)):
        layer = nnx.eval_shape(
            lambda n=n, m=m: linear_factory({"name": name, "budget": budget})(
                n, m, rngs=nnx.Rngs(0)
            )
        )
        share = int(layer.multiplications()) / (n * m)
        # A rank more, or another diagonal, would exceed it.
        step = {"monarch": 4 * (n + m), "blast": n + m + 16, "block_sparse": n + m}[name]
        assert share <= budget
        assert budget == 1.0 or budget - step / (n * m) < share


def test_the_low_rank_part_gets_its_share():
    for share, diagonals in ((0.25, 3), (0.5, 2), (0.9, 1)):
        options = BlockSparseLinear.affordable(768, 768, 16, 768 * 768 // 4, share)
        assert options["diagonals"] == diagonals
        assert options["rank"] == (768 * 768 // 4 - diagonals * 768 * 48) // 1536


@pytest.mark.parametrize("name", GRID_LAYERS)
def test_factories_take_blocks_that_divide_both_axes(name):
    options = {"name": name, "blocks": 8, "rank": 1}
    options |= {"diagonals": 4} if name == "block_sparse" else {}
    layer = linear_factory(options)(24, 36, rngs=nnx.Rngs(0))
    assert layer.blocks == {"monarch": 6, "blast": 6, "block_sparse": 4}[name]
    assert linear_factory(options) == linear_factory(dict(options))
    others = [linear_factory({"name": other, "budget": 0.5}) for other in GRID_LAYERS]
    assert len(set(others)) == 3


@pytest.mark.parametrize("name", GRID_LAYERS)
def test_layers_from_scratch_have_the_scale_of_dense_ones(name):
    layer = linear_factory({"name": name, "budget": 0.5})(
        128, 64, kernel_init=nnx.initializers.normal(0.1), rngs=nnx.Rngs(0)
    )
    scale = float(jnp.sqrt(jnp.mean(layer.kernel() ** 2)))
    assert 0.07 < scale < 0.115
    assert not layer.bias[...].any()


@pytest.mark.parametrize("name", GRID_LAYERS)
def test_dtypes_of_parameters_are_kept(name):
    kernel = jax.random.normal(jax.random.key(0), (16, 16))
    layer = linear_factory({"name": name, "budget": 0.9, "blocks": 4})(
        16, 16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    layer.set_kernel(kernel)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype("bfloat16")}
    assert float(relative_error(kernel, layer.kernel().astype(jnp.float32))) < 0.7
