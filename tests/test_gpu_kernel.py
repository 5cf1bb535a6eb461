"""The block-sparse product for GPUs, interpreted and lowered on a CPU, and the tables for it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from gaudi_jax.deploy.layout import Windows
from gaudi_jax.deploy.tiles import Product, tiles_of
from gaudi_jax.kernels.hopper import Tiling, _schedule, multiply
from gaudi_jax.kernels.table import CELL, Table

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="this version of JAX does not interpret kernels for GPUs",
)


def dense(product, features):
    """The matrix of shape (features, J * N) that a block-sparse one stands for."""
    tiles, (cells, counts) = product
    matrix = np.zeros((features // CELL, CELL, len(counts), tiles.shape[-1]), np.float32)
    for tile, cell, j in zip(tiles, cells, np.repeat(np.arange(len(counts)), counts), strict=True):
        matrix[cell, :, j] += np.asarray(tile, np.float32)
    return matrix.reshape(features, -1)


def problem(tokens, cells, width, counts, seed=0):
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(cells)[:count] for count in counts])
    x, tiles, bias = (
        rng.normal(size=shape)
        for shape in ((tokens, cells * CELL), (len(chosen), CELL, width), len(counts) * width)
    )
    x, tiles = (jnp.asarray(array, jnp.bfloat16) for array in (x, tiles))
    return (
        x,
        Product(tiles, Table(tuple(chosen.tolist()), tuple(counts))),
        jnp.asarray(bias, jnp.float32),
    )


CASES = {
    "counts 0, 1, many": (128, 128, (0, 1, 4), Tiling(128, 3)),
    "one piece a tile": (128, 64, (3, 0, 2, 1), Tiling(128, 2)),
    "wide tiles": (128, 256, (2, 5), Tiling(128, 2)),
    "rows over the end": (197, 128, (2, 3), Tiling(256, 2)),
    "a tile over the end": (72, 128, (1, 3), Tiling(128, 2, peers=2)),
    "nothing to sum": (64, 128, (0, 0), Tiling(128, 2)),
}


@needs_interpreter
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("tokens", "width", "counts", "tiling"), CASES.values(), ids=CASES)
def test_the_kernel_multiplies_without_races(tokens, width, counts, tiling, biased):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    x, product, bias = problem(tokens, 6, width, counts)
    params = plgpu.InterpretGPUParams(detect_races=True)
    y = multiply(x, *product, bias if biased else None, tiling=tiling, programs=4, interpret=params)
    assert not interpret_pallas_call.get_races().races_found
    expected = np.asarray(x, np.float32) @ dense(product, x.shape[1])
    expected = expected + np.asarray(bias) if biased else expected
    assert (y.shape, y.dtype) == (expected.shape, jnp.bfloat16)
    # Sums are exact to float32: what is left is the rounding of each to 8 bits.
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, rtol=2**-8, atol=1e-3)


@needs_interpreter
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("tiling", [Tiling(128, 4), Tiling(256, 3), Tiling(128, 4, peers=2)])
def test_the_kernel_lowers_for_cuda(width, tiling):
    x, product, bias = problem(197, 6, width, (0, 1, 4))
    product_of = jax.jit(lambda x, tiles: multiply(x, tiles, product.table, bias, tiling=tiling))
    lowered = product_of.trace(x, product.tiles).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert tiling.shared_memory(width) < 227 * 1024


def test_the_schedule_takes_every_tile_once_and_is_even():
    counts = np.array([0, 12, 3, 1, 7, 2])
    work, bounds = _schedule(197, counts, 132)
    assert np.array_equal(np.sort(work), np.arange(197 * 6))
    loads = [np.sum(counts[work[a:b] % 6] + 2) for a, b in itertools.pairwise(bounds)]
    assert max(loads) - min(loads) <= max(counts) + 2


def masked(rng, windows):
    features = np.arange(windows.size)
    inside = (features - windows.start[:, None]) % windows.size < windows.length[:, None]
    return rng.normal(size=inside.shape) * inside


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [64, 128])
def test_packed_tiles_are_the_product_of_the_columns(seed, width):
    rng = np.random.default_rng(seed)
    columns = rng.integers(1, 300)
    reads, writes = (
        Windows(rng.integers(0, size, columns), rng.integers(1, size + 1, columns), size)
        for size in (256, 512)
    )
    left, right = masked(rng, reads), masked(rng, writes)
    first, second = tiles_of(reads, writes, left, right, width)
    inner = len(first.table.counts) * width
    assert inner - width < columns <= inner
    np.testing.assert_allclose(
        dense(first, 256) @ dense(second, inner), left.T @ right, rtol=1e-3, atol=1e-3
    )


def test_columns_alike_share_tiles():
    # Four kinds of columns, shuffled: sorted by kind, a tile reads and writes what one column does.
    kind = np.random.default_rng(0).permutation(np.repeat(np.arange(4), 64))
    reads = Windows(kind * 128, np.full(256, 128), 512)
    writes = Windows((3 - kind) * 64, np.full(256, 64), 256)
    first, second = tiles_of(reads, writes, np.ones((256, 512)), np.ones((256, 256)), width=64)
    assert first.table.counts == (2, 2, 2, 2)
    assert second.table.counts == (1, 1, 1, 1)
