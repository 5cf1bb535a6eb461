"""Time of masks (FFT against table) and of a layer's training step (Gaudi against dense).

    python benchmarks/layer.py

Every pair is measured in one process, interleaved, warm; the ratio is of medians. A mask's time is
forward and backward of all blocks of one axis; a layer's is forward and the gradients of every
parameter and of the input, float32. Beside the layer's ratio stands the arithmetic one: composing
the kernel costs k·in·out multiplications beside tokens·in·out.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from tabulate import tabulate

from gaudi_jax import GaudiLinear, masks
from gaudi_jax.deploy.timing import interleaved_medians

MASK_SIZES = [(768, 768), (768, 3072)]
LAYER_SIZES = [(768, 768), (768, 3072)]


def mask_step(blocks: int, n: int, method: masks.Method, sigma: float) -> Callable[[], object]:
    keys = jax.random.split(jax.random.key(0), 3)
    widths, locations = jax.random.uniform(keys[0], (2, blocks))
    cotangent = jax.random.normal(keys[1], (blocks, n))

    @jax.jit
    def step(widths, locations, sigma):
        def forward(w, l):  # noqa: E741
            return masks.gaudi_mask(w, l, n, sigma=sigma, method=method)

        mask, pullback = jax.vjp(forward, widths, locations)
        return mask, pullback(cotangent)

    return lambda: step(widths, locations, jnp.float32(sigma))


def layer_step(layer: nnx.Module, x: jax.Array) -> Callable[[], object]:
    graphdef, state = nnx.split(layer)
    cotangent = jax.random.normal(jax.random.key(1), layer(x).shape)

    @jax.jit
    def step(state, x):
        y, pullback = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return y, pullback(cotangent)

    return lambda: step(state, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1040)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args()

    rows = []
    for blocks, n in MASK_SIZES:
        methods: tuple[masks.Method, ...] = ("fft", "table")
        times = interleaved_medians(
            {method: mask_step(blocks, n, method, sigma=37.0) for method in methods}, args.repeats
        )
        rows.append(
            (f"{blocks} x {n}", *(times[m] * 1e3 for m in methods), times["fft"] / times["table"])
        )
    print(f"Masks, forward + backward ({jax.devices()[0].device_kind}, {jax.__version__})")
    print(tabulate(rows, ("blocks x places", "fft ms", "table ms", "fft / table"), floatfmt=".2f"))

    rows = []
    for n_in, n_out in LAYER_SIZES:
        x = jax.random.normal(jax.random.key(2), (args.tokens, n_in))
        dense = nnx.Linear(n_in, n_out, rngs=nnx.Rngs(0))
        soft = GaudiLinear(n_in, n_out, sigma=37.0, rngs=nnx.Rngs(0))
        hard = GaudiLinear(n_in, n_out, backward_smoothing=2.0, rngs=nnx.Rngs(0))
        layers = {"dense": dense, "soft": soft, "hard": hard}
        times = interleaved_medians(
            {name: layer_step(layer, x) for name, layer in layers.items()}, args.repeats
        )
        k = soft.num_blocks * soft.rank
        rows.append(
            (
                f"{n_in} -> {n_out}",
                *(times[name] * 1e3 for name in layers),
                times["soft"] / times["dense"],
                times["hard"] / times["dense"],
                1 + k / args.tokens,
            )
        )
    print(f"\nTraining step of one layer, {args.tokens} tokens, float32")
    headers = (
        "layer",
        "dense ms",
        "Gaudi soft ms",
        "Gaudi hard ms",
        "soft / dense",
        "hard / dense",
        "arithmetic",
    )
    print(tabulate(rows, headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
