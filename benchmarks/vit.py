"""Training steps of a ViT with dense and with Gaudi layers, and what of a step the masks take.

    python benchmarks/vit.py                                # a small one, on a CPU
    python benchmarks/vit.py --preset B/16 --batch 128 256 512 --dtype bfloat16 --peak 989

The steps are those of the training loop, on one batch of random images that is there already, made
in turn and warm; medians are shown. *Masks* are all masks of the model and their gradients,
computed alone; *kernels* are masks and the products of factors that make the dense kernels, as a
step of many tokens makes them. *Share of peak* counts 6 operations for each multiplication of the
dense twin's linear layers, and attention's own, over ``--peak`` teraflops a second.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from steps import our_step
from tabulate import tabulate

from gaudi_jax import GaudiLinear
from gaudi_jax.cost import cost
from gaudi_jax.deploy.timing import interleaved_medians
from gaudi_jax.training.setup import build_model
from gaudi_jax.training.step import split_model
from gaudi_jax.training.tasks import Task, open_task

# Configs are files beside main.py, and no installed package.
sys.path.insert(0, str(Path(__file__).parents[1]))


def open_config(layer: str, batch_size: int, args: argparse.Namespace) -> Task:
    from configs import vit_b_gaudi

    # From scratch: masks are at work from the first step.
    recipe = "" if layer == "dense" else ",recipe=budget"
    config = vit_b_gaudi.get_config(f"layer={layer}{recipe}")
    config.data.update(
        name=f"generated:1000x{args.image_size}x3",
        image_size=args.image_size,
        batch_size=batch_size,
        workers=0,
    )
    config.model.update(preset=args.preset, dtype=args.dtype)
    return open_task(config)


def gradient_of(model: nnx.Module, part: Callable[[GaudiLinear], Any]) -> Callable[[], Any]:
    """The gradient of something that all Gaudi layers compute, without inputs."""
    graphdef, params, other = split_model(model)

    @jax.jit
    def gradient(params: Any) -> Any:
        def total(params: Any) -> jax.Array:
            merged = nnx.merge(graphdef, params, other)
            layers = [m for _, m in nnx.iter_modules(merged) if isinstance(m, GaudiLinear)]
            # Squares: the gradient of a plain sum would not need the forward pass.
            leaves = jax.tree.leaves([part(layer) for layer in layers])
            return jnp.stack([jnp.square(x.astype(jnp.float32)).sum() for x in leaves]).sum()

        return jax.grad(total)(params)

    return lambda: gradient(params)


def measure(
    models: dict[str, nnx.Module], batch_size: int, alone: dict[str, Any], args: argparse.Namespace
) -> None:
    """Prints the table of one batch size."""
    size = args.image_size
    keys = jax.random.split(jax.random.key(0))
    batch = {
        "image": jax.random.randint(keys[0], (batch_size, size, size, 3), 0, 256, jnp.uint8),
        "label": jax.random.randint(keys[1], (batch_size,), 0, 1000),
    }
    tasks = {layer: open_config(layer, batch_size, args) for layer in models}
    parts: dict[str, Any] = {
        # A copy: the steps give up the arrays of their model.
        layer: our_step(task, nnx.clone(models[layer], arrays=True), batch)
        for layer, task in tasks.items()
    }
    with ThreadPoolExecutor() as pool:  # compilation takes minutes
        list(pool.map(lambda part: jax.block_until_ready(part()), (parts | alone).values()))
    times = interleaved_medians(parts | alone, args.repeats)
    costs = cost(models["gaudi"], tasks["gaudi"].example)
    operations = 6 * batch_size * costs.total_dense_multiplications
    rows = [
        (
            name,
            seconds * 1e3,
            seconds / times["dense"],
            batch_size / seconds if name in tasks else None,
            operations / seconds / (args.peak * 1e12) if args.peak and name in tasks else None,
        )
        for name, seconds in times.items()
    ]
    headers = ("", "ms", "over the dense step", "images/s", "share of peak")
    device = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"\nViT-{args.preset}, {size}x{size}, batch {batch_size}, {args.dtype}, {device}\n")
    table = tabulate(rows, headers, tablefmt="github", floatfmt=("", ".1f", ".3f", ".1f", ".3f"))
    print(table, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="S/16", help="a published size")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peak", type=float, default=0.0, help="teraflops a second")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    models = {
        layer: build_model(open_config(layer, args.batch[0], args).config)
        for layer in ("dense", "gaudi")
    }
    alone = {
        "masks alone": gradient_of(models["gaudi"], lambda layer: layer.masks()),
        "masks and kernels alone": gradient_of(models["gaudi"], lambda layer: layer.kernel()),
    }
    for batch_size in args.batch:
        measure(models, batch_size, alone, args)


if __name__ == "__main__":
    main()
