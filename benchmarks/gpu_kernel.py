"""Block-sparse products on a Hopper GPU against dense ones.

A layer of blocks on random windows is two block-sparse products. For the shapes of a ViT-B's linear
layers and several ways to cut the products, this prints times and rates; each line is printed as
soon as it is measured, and a configuration that fails prints why.

    python -m benchmarks.gpu_kernel
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gaudi_jax.deploy.layout import Windows
from gaudi_jax.deploy.tiles import Product, tiles_of
from gaudi_jax.deploy.timing import ordered
from gaudi_jax.kernels.hopper import Tiling, multiply
from gaudi_jax.kernels.table import CELL, Table

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
CALLS, ROUNDS = 100, 7
#: Of relative errors; rounding to bfloat16 makes 2e-3.
TOLERANCE = 1e-2


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
        return Windows(np.repeat(start, RANK)[:columns], np.repeat(length, RANK)[:columns], size)

    def factor(windows: Windows) -> np.ndarray:
        features = np.arange(windows.size)
        inside = (features - windows.start[:, None]) % windows.size < windows.length[:, None]
        scale = windows.length.mean() ** -0.5
        return rng.normal(size=inside.shape, scale=scale) * inside

    reads, writes = windows(n), windows(m)
    return Layer(reads, writes, factor(reads), factor(writes))


def on_device(
    product: Product, tiling: Tiling, bias: Array | None = None
) -> tuple[Callable[[Array, Array], Array], Array]:
    """The product as a function of its input and weights, and its weights."""

    @jax.jit
    def run(x: Array, tiles: Array) -> Array:
        return multiply(x, tiles, product.table, bias, tiling=tiling)

    return run, jnp.asarray(product.tiles, jnp.bfloat16)


def seconds_of(function: Callable, x: Array, *weights: Array) -> float:
    """Seconds of a call: the median of rounds, each of many calls in one program."""

    @jax.jit
    def repeated(x: Array, *weights: Array) -> tuple[Array, Array]:
        def again(_, token: Array) -> Array:
            return ordered(function, (x, *weights), token)[1]

        return ordered(
            function, (x, *weights), jax.lax.fori_loop(0, CALLS - 1, again, jnp.float32(0))
        )

    jax.block_until_ready(repeated(x, *weights))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(repeated(x, *weights))
        rounds.append((time.perf_counter() - start) / CALLS)
    return statistics.median(rounds)


def error_of(result: Array, expected: Array) -> float:
    """The distance to what is expected, relative to its norm."""
    difference = result.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def verdict(error: float) -> str:
    return f"error {error:.1e}, {'right' if error < TOLERANCE else 'WRONG'}"


@jax.jit
def exact(x, left, right):
    """Both products of the same bfloat16 numbers in float32, with bfloat16 between them."""
    x, left, right = (a.astype(jnp.bfloat16).astype(jnp.float32) for a in (x, left, right))
    with jax.default_matmul_precision("highest"):
        return (x @ left.T).astype(jnp.bfloat16).astype(jnp.float32) @ right


def inputs(tokens: int, features: int) -> Array:
    return jax.random.normal(jax.random.key(0), (tokens, features), jnp.bfloat16)


def report(name: str, seconds: float, weights: int, features: int, note: str = "") -> None:
    """Prints a row.

    Args:
        name: of what was measured.
        seconds: that it took.
        weights: numbers that each token is multiplied with once.
        features: numbers of a token that are read or written.
        note: what else to say.
    """
    operations, moved = 2 * TOKENS * weights, 2 * (TOKENS * features + weights)
    rates = f"{operations / seconds / 1e12:8.0f} {moved / seconds / 1e12:8.2f}"
    print(f"{name:36} {seconds * 1e6:9.1f} {rates}  {note}", flush=True)


def check() -> None:
    """The kernel against a dense product, at a size with ends that do not fit, and with a bias."""
    for tokens, (n, m, columns) in ((1000, LAYERS[0]), (TOKENS, LAYERS[1])):
        layer = random_layer(n, m, columns)
        products = tiles_of(*layer)
        x, bias = inputs(tokens, n), jnp.arange(m) / m
        expected = exact(x, layer.left, layer.right) + bias
        for tiling in (Tiling(128, 4), Tiling(256, 4), Tiling(256, 4, peers=2)):
            first, left = on_device(products[0], tiling)
            second, right = on_device(products[1], tiling, bias)
            error = error_of(second(first(x, left), right), expected)
            print(f"{tokens} x {n} -> {m}, {tiling}: {verdict(error)}", flush=True)


def dense_times() -> None:
    for n, m, columns in LAYERS:
        x = inputs(TOKENS, n)
        kernel, left, right = (
            jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
            for shape in ((n, m), (n, columns), (columns, m))
        )
        seconds = seconds_of(jnp.matmul, x, kernel)
        report(f"{n} -> {m} dense", seconds, n * m, n + m)
        seconds = seconds_of(lambda x, left, right: x @ left @ right, x, left, right)
        report(f"{n} -> {columns} -> {m} dense", seconds, columns * (n + m), n + 2 * columns + m)


def full_times(n: int, m: int, width: int, tiling: Tiling) -> None:
    """One product with a table of all cells: the rate of the kernel."""
    count = n // CELL
    table = Table(tuple(range(count)) * (m // width), (count,) * (m // width))
    tiles = np.random.default_rng(2).normal(size=(len(table.cells), CELL, width))
    function, weights = on_device(Product(tiles, table), tiling)
    seconds = seconds_of(function, inputs(TOKENS, n), weights)
    name = f"{n} -> {m} N={width} {tuple(tiling)}"
    report(name, seconds, n * m, n + m, "all cells, one product")


def sparse_times(n: int, m: int, columns: int, width: int, tiling: Tiling) -> None:
    """The two products of a layer together, and each alone."""
    layer = random_layer(n, m, columns)
    products = tiles_of(*layer, width)
    (first, left), (second, right) = (on_device(product, tiling) for product in products)
    x = inputs(TOKENS, n)
    between = first(x, left)
    error = error_of(second(between, right), exact(x, layer.left, layer.right))
    seconds = seconds_of(lambda x, left, right: second(first(x, left), right), x, left, right)
    weights = sum(product.tiles.size for product in products)
    alone = (
        f"{seconds_of(first, x, left) * 1e6:.1f} + "
        f"{seconds_of(second, between, right) * 1e6:.1f} us"
    )
    note = f"{alone}, {weights / (n * m):.2f} of dense operations, {verdict(error)}"
    name = f"{n} -> {m} N={width} {tuple(tiling)}"
    report(name, seconds, weights, n + 2 * between.shape[1] + m, note)


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
    print(f"{'N, (rows, slots, peers)':36} {'us':>9} {'TFLOP/s':>8} {'TB/s':>8}")
    report("a call that does nothing", seconds_of(lambda x: x + 1, jnp.zeros(8)), 0, 0)
    attempt(dense_times)
    for width, tiling in CONFIGURATIONS:
        attempt(full_times, *LAYERS[0][:2], width, tiling)
        for layer in LAYERS:
            attempt(sparse_times, *layer, width, tiling)
    print("done" if time.monotonic() < end else "out of time")


if __name__ == "__main__":
    main()
