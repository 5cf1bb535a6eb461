"""Packs the model of a run and measures it: ``python -m gaudi_jax.deploy WORKDIR``.

The packed model is saved in ``WORKDIR/packed``, where ``gaudi_jax.load(WORKDIR, "packed")`` and
``main.py --config.evaluate_checkpoint=packed`` find it.
"""

import argparse
import sys

import jax
from flax import nnx
from ml_collections import ConfigDict
from tabulate import tabulate

from gaudi_jax.compression import densify
from gaudi_jax.cost import cost
from gaudi_jax.deploy.command import check_positive, run_parser
from gaudi_jax.deploy.harden import harden, tokens_of
from gaudi_jax.deploy.timing import Running, interleaved_medians
from gaudi_jax.errors import UserError, exit_status
from gaudi_jax.training.load import PACKED, load_with_step, run_digest, save
from gaudi_jax.training.tasks import open_task
from gaudi_jax.training.workdir import read_config

MEBI = 2**20


def main() -> int:
    """Packs, saves and measures; returns the exit status."""
    parser = run_parser("python -m gaudi_jax.deploy", __doc__)
    parser.add_argument("--autotune", action="store_true", help="measure layouts, take the fastest")
    parser.add_argument("--repeats", type=int, default=9, help="times of which the median counts")
    arguments = parser.parse_args()
    return exit_status(lambda: deploy(arguments))


def deploy(arguments: argparse.Namespace) -> None:
    """Writes the packed model of a run, and prints what the forms of the model take."""
    workdir, batch = arguments.workdir, arguments.batch
    check_positive(arguments, "batch", "tokens", "repeats")
    model, step = load_with_step(workdir, arguments.step)
    if (workdir / PACKED).exists():
        raise UserError(f"{workdir / PACKED} exists; remove it to pack the run again")
    config = ConfigDict(read_config(workdir))
    example = open_task(config).example
    packed, plan = harden(
        model,
        tokens=arguments.tokens or tokens_of(model, example, batch),
        backend=arguments.backend,
        autotune=arguments.autotune,
    )
    save(workdir / PACKED, packed, plan | {"step": step, "run": run_digest(config)})
    # Dense layers hold their values in the dtype in which packed ones do.
    forms = {"dense": densify(packed), "masks": model, "packed": packed}
    print(f"packed the checkpoint of step {step} in {workdir / PACKED}\n")
    print(measured(forms, example, batch, arguments.repeats))


def measured(
    forms: dict[str, nnx.Module], example: jax.ShapeDtypeStruct, batch: int, repeats: int
) -> str:
    """A table of times, multiplications and memory of several forms of a model.

    Args:
        forms: models by name, the dense one first.
        example: one of their inputs.
        batch: inputs at once.
        repeats: times of which the median counts.
    """
    x = jax.numpy.zeros((batch, *example.shape[1:]), example.dtype)
    running = {name: Running(form, x) for name, form in forms.items()}
    seconds = interleaved_medians(running, repeats)
    first = next(iter(seconds.values()))
    rows = [
        (
            name,
            1e3 * seconds[name],
            first / seconds[name],
            cost(form, example).relative,
            running[name].parameter_bytes / MEBI,
            (peak := running[name].peak_bytes) and peak / MEBI,
        )
        for name, form in forms.items()
    ]
    device = jax.devices()[0].device_kind
    headers = (
        *(f"{batch} inputs, {device}", "ms", "faster than dense", "multiplications over dense"),
        *("parameters, MiB", "peak, MiB"),
    )
    return tabulate(rows, headers, floatfmt=("", ".3g", ".2f", ".3f", ".2f", ".2f"))


if __name__ == "__main__":
    sys.exit(main())
