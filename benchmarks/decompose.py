"""Time of the decomposition of all kernels of a transformer's blocks, one shape after another.

    python benchmarks/decompose.py [--width 768] [--depth 12] [--budget 0.3] [--aware]

The kernels are like those of trained attention layers: heads that read and write some features
more than others, and a decaying spectrum. Each block has four kernels of width x width and two of
an MLP. With ``--aware`` the inputs' second moments are given too.
"""

import argparse
import time

import jax
import jax.numpy as jnp
from tabulate import tabulate

import gaudi_jax
from gaudi_jax.decomposition import relative_error, svd_factors


def kernel(key: jax.Array, n: int, m: int, head: int = 64) -> jax.Array:
    """A kernel of heads, each of low rank on a part of the input features, and noise."""
    keys = jax.random.split(key, 4)
    heads = max(1, m // head)
    centres = jax.random.uniform(keys[0], (heads, 1)) * n
    away = jnp.abs(jnp.arange(n) - centres)
    reads = jnp.exp(-0.5 * (jnp.minimum(away, n - away) / (0.15 * n)) ** 2)
    left = jax.random.normal(keys[1], (heads, n, 24)) * reads[..., None]
    right = jax.random.normal(keys[2], (heads, 24, m // heads)) / jnp.arange(1, 25)[:, None]
    blocks = jnp.concatenate(list(left @ right), axis=1)
    return (blocks + 0.02 * jnp.std(blocks) * jax.random.normal(keys[3], (n, m))).astype(
        jnp.float32
    )


def second_moment(key: jax.Array, n: int) -> jax.Array:
    x = jax.random.normal(key, (4 * n, n)) * jnp.geomspace(0.1, 3, n)
    x = x + 0.5 * jnp.roll(x, 1, axis=1)
    return x.T @ x / len(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--aware", action="store_true", help="with second moments")
    args = parser.parse_args()
    d = args.width
    rows = []
    begin = time.perf_counter()
    for (n, m), count in {(d, d): 4, (d, 4 * d): 1, (4 * d, d): 1}.items():
        seconds, errors, rivals = [], [], []
        for number in range(args.depth * count):
            key = jax.random.fold_in(jax.random.key(n + m), number)
            w = kernel(key, n, m)
            moment = second_moment(key, n) if args.aware else None
            start = time.perf_counter()
            factors = jax.block_until_ready(
                gaudi_jax.decompose(w, args.budget, second_moment=moment)
            )
            seconds.append(time.perf_counter() - start)
            errors.append(float(relative_error(w, factors.kernel(), moment)))
            left, right = svd_factors(w, int(args.budget * n * m / (n + m)), second_moment=moment)
            rivals.append(float(relative_error(w, left.T @ right, moment)))
            print(f"{n}x{m} {number + 1}: {seconds[-1]:.1f} s, {errors[-1]:.3f}", flush=True)
        warm = seconds[1:] or seconds
        rows.append(
            (
                f"{n}x{m}",
                len(seconds),
                seconds[0] - sorted(warm)[len(warm) // 2],
                sorted(warm)[len(warm) // 2],
                sum(seconds),
                sum(errors) / len(errors),
                sum(rivals) / len(rivals),
            )
        )
    headers = ("kernel", "number", "compilation s", "one, warm s", "all s", "error", "SVD")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))
    print(f"{time.perf_counter() - begin:.0f} s in all, on {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
