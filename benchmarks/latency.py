"""How much faster than dense the model of a run is where it is deployed, on one line of JSON.

    python benchmarks/latency.py WORKDIR [--batch 64] [--repeats 15]

Gaudi layers are packed as what was fastest of some layouts, a plain product with the kernel among
them; likewise other structured layers are what they are, or their kernels, whichever is faster.
Both forms of the model run in turn in one process, warm; medians.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
from deployed import in_dtype
from flax import nnx
from ml_collections import ConfigDict

import gaudi_jax
from gaudi_jax import GaudiLinear
from gaudi_jax.compression import densify
from gaudi_jax.compression.surgery import become
from gaudi_jax.deploy.command import check_positive
from gaudi_jax.deploy.harden import tokens_of
from gaudi_jax.deploy.timing import Running, copies_out_of_cache, interleaved_medians
from gaudi_jax.errors import exit_status
from gaudi_jax.layers import PackedLinear, StructuredLinear
from gaudi_jax.training.tasks import open_task
from gaudi_jax.training.workdir import read_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    if status := exit_status(lambda: measure(args)):
        raise SystemExit(status)


def measure(args: argparse.Namespace) -> None:
    """Prints the times."""
    check_positive(args, "batch", "repeats")
    config = ConfigDict(read_config(args.workdir))
    # No form rounds its values at every call.
    model = in_dtype(gaudi_jax.load(args.workdir), config.model.dtype)
    example = open_task(config).example
    x = jnp.zeros((args.batch, *example.shape[1:]), example.dtype)
    deployed = fastest(model, tokens_of(model, example, args.batch), args.repeats)
    forms = {"dense_ms": Running(densify(model), x), "deployed_ms": Running(deployed, x)}
    seconds = interleaved_medians(forms, args.repeats)
    print(json.dumps({name: round(1e3 * value, 4) for name, value in seconds.items()}))


def fastest(model: nnx.Module, tokens: dict[str, int], repeats: int) -> nnx.Module:
    """A model whose structured layers have the forms that are fastest here."""
    result = nnx.clone(model)
    if any(isinstance(module, GaudiLinear) for _, module in nnx.iter_modules(model)):
        # What another process measured is not used: all kinds of layers choose anew.
        with tempfile.TemporaryDirectory() as folder:
            result = gaudi_jax.harden(model, tokens=tokens, autotune=True, cache_dir=folder).model
    for path, layer in list(nnx.iter_modules(result)):
        if isinstance(layer, StructuredLinear) and not isinstance(layer, PackedLinear):
            vectors = tokens["/".join(map(str, path))]
            dense, x = densify(layer), jnp.zeros((vectors, layer.in_features), layer.dtype)
            # As `harden` measures Gaudi layers.
            copies = copies_out_of_cache(layer.in_features * layer.out_features * x.dtype.itemsize)
            forms = {
                "dense": Running(dense, x, copies=copies),
                "own": Running(layer, x, copies=copies),
            }
            seconds = interleaved_medians(forms, repeats)
            if seconds["dense"] < seconds["own"]:
                become(layer, dense)
    return result


if __name__ == "__main__":
    main()
