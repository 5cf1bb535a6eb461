"""Block-sparse products on a Hopper GPU against dense ones.

A layer of blocks on random windows is two block-sparse products. For the shapes of a ViT-B's linear
layers and several ways to cut the products, this prints times and rates; each line is printed as
soon as it is measured, and a configuration that fails prints why.

    python -m benchmarks.gpu_kernel
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gaudi_jax.deploy.kernels.block_sparse import CELL, Product, Table, tiles_of
from gaudi_jax.deploy.kernels.hopper import Tiling, multiply
from gaudi_jax.deploy.layout import Windows

#: Images of 196 patches and a class token.
TOKENS = 128 * 197
#: Inputs, outputs, columns between them, and features to which windows are aligned.
LAYERS = ((768, 768, 384), (768, 3072, 512), (3072, 768, 512))
ALIGNED = 256
#: Columns of a block.
RANK = 32
#: Columns of a tile and how the products are cut, the most promising first.
CONFIGURATIONS = (
    (128, Tiling(256, 4)),
    (128, Tiling(256, 4, peers=2)),
    (128, Tiling(128, 5)),
    (256, Tiling(128, 4)),
    (256, Tiling(128, 4, peers=2)),
    (128, Tiling(128, 4)),
    (128, Tiling(256, 3)),
    (256, Tiling(128, 3)),
    (128, Tiling(128, 3)),
    (64, Tiling(256, 4)),
    (64, Tiling(128, 5)),
)
CALLS, ROUNDS = 20, 7


class Layer(NamedTuple):
    """A layer of blocks on random windows, as columns."""

    reads: Windows
    writes: Windows
    left: np.ndarray
    right: np.ndarray


def random_layer(n: int, m: int, columns: int, seed: int = 0) -> Layer:
    """Blocks whose windows cover a third of an axis or two thirds of it, drawn evenly."""
    rng = np.random.default_rng(seed)

    def windows(size: int) -> Windows:
        blocks = -(-columns // RANK)
        start = rng.integers(0, size // ALIGNED, blocks) * ALIGNED
        length = rng.integers(1, 3, blocks) * (size // 3)
        return Windows(*(np.repeat(a, RANK)[:columns] for a in (start, length)), size)

    def factor(windows: Windows) -> np.ndarray:
        features = np.arange(windows.size)
        inside = (features - windows.start[:, None]) % windows.size < windows.length[:, None]
        scale = windows.length.mean() ** -0.5
        return rng.normal(size=inside.shape, scale=scale) * inside

    reads, writes = windows(n), windows(m)
    return Layer(reads, writes, factor(reads), factor(writes))


def on_device(product: Product) -> Product:
    return Product(jnp.asarray(product.tiles, jnp.bfloat16), product.table)


def seconds_of(function, *arguments: Array) -> float:
    """Seconds of a call: the median of rounds, each of many calls that are queued at once."""
    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(CALLS)]
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - start) / CALLS)
    return statistics.median(rounds)


def error_of(result: Array, expected: Array) -> float:
    """The distance to what is expected, relative to its norm."""
    difference = result.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def two_products(tables: tuple[Table, Table], tiling: Tiling):
    @jax.jit
    def run(x, first, second):
        return multiply(
            multiply(x, first, tables[0], tiling=tiling), second, tables[1], tiling=tiling
        )

    return run


@jax.jit
def exact(x, left, right):
    """Both products of the same bfloat16 numbers in float32, with bfloat16 between them."""
    x, left, right = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, left, right))
    with jax.default_matmul_precision("highest"):
        return (x @ left.T).astype(jnp.bfloat16).astype(jnp.float32) @ right


def line(name: str, seconds: float, products: float, moved: float, note: str = "") -> str:
    """A row: multiplications and additions count as two operations."""
    rates = f"{2 * products / seconds / 1e12:8.0f} {moved / seconds / 1e12:8.2f}"
    return f"{name:44} {seconds * 1e6:9.1f} {rates}  {note}"


def inputs(tokens: int, features: int) -> Array:
    return jax.random.normal(jax.random.key(0), (tokens, features), jnp.bfloat16)


def check() -> None:
    """The kernel against a dense product, at a size with ends that do not fit, and with a bias."""
    for tokens, (n, m, columns) in ((1000, LAYERS[0]), (TOKENS, LAYERS[1])):
        layer = random_layer(n, m, columns)
        first, second = map(on_device, tiles_of(*layer))
        x, bias = inputs(tokens, n), jnp.arange(m) / m
        expected = exact(x, layer.left, layer.right) + bias
        for tiling in (Tiling(128, 4), Tiling(256, 4), Tiling(256, 4, peers=2)):
            between = multiply(x, *first, tiling=tiling)
            error = error_of(multiply(between, *second, bias, tiling=tiling), expected)
            verdict = "right" if error < 1e-2 else "WRONG"
            print(
                f"{tokens} x {n} -> {m}, {tiling}: relative error {error:.1e}, {verdict}",
                flush=True,
            )


def dense_times() -> None:
    for n, m, columns in LAYERS:
        x = inputs(TOKENS, n)
        kernel, left, right = (
            jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
            for shape in ((n, m), (n, columns), (columns, m))
        )
        moved = 2 * (TOKENS * (n + m) + n * m)
        seconds = seconds_of(jax.jit(jnp.matmul), x, kernel)
        print(line(f"{n} -> {m} dense", seconds, TOKENS * n * m, moved), flush=True)
        seconds = seconds_of(jax.jit(lambda x, left, right: x @ left @ right), x, left, right)
        products, moved = TOKENS * columns * (n + m), moved + 4 * TOKENS * columns
        print(line(f"{n} -> {m} dense, {columns} between", seconds, products, moved), flush=True)


def sparse_times(n: int, m: int, columns: int, width: int, tiling: Tiling) -> None:
    """The two products of a layer, and one with a table of all cells: the rate of the kernel."""
    layer = random_layer(n, m, columns)
    first, second = map(on_device, tiles_of(*layer, width))
    x = inputs(TOKENS, n)
    run = two_products((first.table, second.table), tiling)
    error = error_of(run(x, first.tiles, second.tiles), exact(x, layer.left, layer.right))
    seconds = seconds_of(run, x, first.tiles, second.tiles)
    inner = len(first.table.counts) * width
    cells = len(first.table.cells) + len(second.table.cells)
    moved = 2 * (TOKENS * (n + 2 * inner + m) + first.tiles.size + second.tiles.size)
    share = cells * CELL * width / (n * m)
    note = f"{share:.2f} of dense products, error {error:.1e}" + " WRONG" * (error > 1e-2)
    name = f"{n} -> {m} N={width} {tuple(tiling)}"
    print(line(name, seconds, TOKENS * cells * CELL * width, moved, note), flush=True)


def full_times(n: int, m: int, width: int, tiling: Tiling) -> None:
    count = n // CELL
    table = Table(np.tile(np.arange(count), m // width), np.full(m // width, count))
    tiles = jax.random.normal(jax.random.key(2), (len(table.cells), CELL, width), jnp.bfloat16)
    x = inputs(TOKENS, n)
    seconds = seconds_of(
        jax.jit(lambda x, tiles: multiply(x, tiles, table, tiling=tiling)), x, tiles
    )
    moved = 2 * (TOKENS * (n + m) + n * m)
    name = f"{n} -> {m} N={width} {tuple(tiling)}"
    print(line(name, seconds, TOKENS * n * m, moved, "all cells, one product"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=80, help="no configuration starts later")
    end = time.monotonic() + parser.parse_args().seconds
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)

    def attempt(function, *arguments) -> None:
        if time.monotonic() > end:
            return
        try:
            function(*arguments)
        except Exception as error:
            lines = str(error).splitlines() or [""]
            print(f"{arguments}: {type(error).__name__}: {lines[0][:300]}", flush=True)

    attempt(check)
    print(f"{'rows, slots, peers':44} {'us':>9} {'TFLOP/s':>8} {'TB/s':>8}")
    floor = seconds_of(jax.jit(lambda x: x + 1), jnp.zeros(8))
    print(line("a call that does nothing", floor, 0, 0), flush=True)
    attempt(dense_times)
    for width, tiling in CONFIGURATIONS:
        attempt(full_times, *LAYERS[0][:2], width, tiling)
        for layer in LAYERS:
            attempt(sparse_times, *layer, width, tiling)
    print("done" if time.monotonic() < end else "out of time")


if __name__ == "__main__":
    main()
