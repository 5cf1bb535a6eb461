"""Writes the model of a run as one file: ``python -m gaudi_jax.export WORKDIR --out=FILE``.

Gaudi layers are packed first. The file needs neither gaudi_jax nor the workdir: see
``gaudi_jax/export/loader.py``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.compression.surgery import find_gaudi
from gaudi_jax.cost import cost
from gaudi_jax.deploy.command import check_positive, run_parser
from gaudi_jax.deploy.harden import harden, tokens_of
from gaudi_jax.deploy.timing import Running
from gaudi_jax.errors import UserError, exit_status
from gaudi_jax.export.artifact import PLATFORMS, export_model
from gaudi_jax.export.loader import load_exported, platform
from gaudi_jax.training.load import PACKED, load_with_step
from gaudi_jax.training.tasks import Task, open_task
from gaudi_jax.training.workdir import read_config

#: Largest difference to the model's own outputs, over their largest value.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
MEBI = 2**20
#: Of a config's data, for the card: images are resized, cropped and normalised, texts cut up.
DATA = (
    *("name", "image_size", "crop_fraction", "mean", "std"),
    *("tokenizer", "vocabulary_digest", "block"),
)


def main() -> int:
    """Exports; returns the exit status."""
    parser = run_parser("python -m gaudi_jax.export", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="file that is written")
    parser.add_argument(
        "--platforms", nargs="+", default=PLATFORMS, help=f"some of {', '.join(PLATFORMS)}"
    )
    arguments = parser.parse_args()
    return exit_status(lambda: export(arguments))


def export(arguments: argparse.Namespace) -> None:
    """Writes the file, checks it against the model, and prints what it takes."""
    check_positive(arguments, "batch", "tokens")
    if arguments.out.exists():
        raise UserError(f"{arguments.out} exists; remove it or give another file")
    config = ConfigDict(read_config(arguments.workdir))
    model, step = load_with_step(arguments.workdir, arguments.step)
    task = open_task(config)
    if arguments.step == PACKED and (arguments.tokens or arguments.backend):
        raise UserError(
            "--step=packed is exported as it was packed; leave out --tokens and --backend, or "
            "give them to python -m gaudi_jax.deploy"
        )
    if find_gaudi(model)[0]:
        tokens = arguments.tokens or tokens_of(model, task.example, arguments.batch)
        model = harden(model, tokens=tokens, backend=arguments.backend).model
    header = export_model(
        model,
        task.example,
        arguments.out,
        platforms=arguments.platforms,
        card=_card(model, task, step),
    )
    try:
        _check(model, task, arguments)
    except Exception:
        arguments.out.unlink()
        raise
    print(f"wrote {arguments.out}: {arguments.out.stat().st_size / MEBI:.2f} MiB")
    print(f"reads {header['input_shape']} of {header['input_dtype']}", end=", ")
    print(f"gives {header['output_shape']} of {header['output_dtype']}")


def _card(model: nnx.Module, task: Task, step: int) -> dict[str, Any]:
    """What the model is, and what is done to data before it reads them."""
    return {
        "task": task.describe(),
        "data": {name: task.config.data[name] for name in DATA if name in task.config.data},
        "step": step,
        "seed": task.config.seed,
        "relative_multiplications": cost(model, task.example).relative,
    }


def _check(model: nnx.Module, task: Task, arguments: argparse.Namespace) -> None:
    """Compares the file's outputs with the model's on a test batch, where it runs here."""
    batch = jax.tree.map(jnp.asarray, next(task.evaluation_batches("test")))
    x = task.inputs(batch)[: arguments.batch]
    running = Running(model, x)
    if running.peak_bytes:
        print(f"peak memory with {len(x)} inputs: {running.peak_bytes / MEBI:.2f} MiB")
    if platform() not in arguments.platforms:
        print(f"not checked: the file is not for {platform()}")
        return
    wanted = running().astype(jnp.float32)
    error = jnp.abs(load_exported(arguments.out)(x).astype(jnp.float32) - wanted).max()
    difference = float(error / jnp.maximum(jnp.abs(wanted).max(), 1e-30))
    if not difference <= TOLERANCE[task.config.model.dtype]:
        raise UserError(
            f"the exported outputs differ from the model's by {difference:.1e}, and the file was "
            "removed; export on another platform"
        )
    print(f"checked on {len(x)} test inputs: outputs differ by {difference:.1e} from the model's")


if __name__ == "__main__":
    sys.exit(main())
