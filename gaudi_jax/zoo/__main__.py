"""Lists published models, and publishes those of runs.

    python -m gaudi_jax.zoo list
    python -m gaudi_jax.zoo publish WORKDIR --out FOLDER --command "python main.py ..."

What is published is measured: quality on the validation and test splits and the time of one batch,
beside the dense form's, are those of the model as it is read from the folder.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict
from tabulate import tabulate

from gaudi_jax.compression import densify
from gaudi_jax.compression.surgery import find_gaudi
from gaudi_jax.cost import cost
from gaudi_jax.deploy.command import check_positive
from gaudi_jax.deploy.harden import harden, tokens_of
from gaudi_jax.deploy.timing import Running, interleaved_medians
from gaudi_jax.errors import UserError, exit_status
from gaudi_jax.models.pretrained import WEIGHTS
from gaudi_jax.report.summary import versions
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.load import PACKED, PLAN_FILE, as_step, load_with_step, read_plan
from gaudi_jax.training.phases import phase_of
from gaudi_jax.training.tasks import Task, open_task
from gaudi_jax.training.workdir import read_config
from gaudi_jax.zoo import MODELS, names
from gaudi_jax.zoo.published import read_card, read_published, write_card, write_published

DTYPES = ("float32", "bfloat16")
REPEATS = 15


def main() -> int:
    """Lists or publishes; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gaudi_jax.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    listing = commands.add_parser("list", help="the models that come with the package")
    listing.set_defaults(run=lambda _: print(listed()))
    publishing = commands.add_parser("publish", help="write a run's model as a folder")
    publishing.add_argument("workdir", type=Path, help="directory of a run")
    publishing.add_argument("--out", type=Path, required=True, help="a new folder")
    publishing.add_argument("--command", required=True, help="what trained it, for the card")
    publishing.add_argument(
        "--step",
        type=as_step,
        help=f"step of the checkpoint, best or {PACKED}; by default the newest",
    )
    publishing.add_argument("--dtype", choices=DTYPES, default="float32", help="of what is stored")
    publishing.add_argument("--batch", type=int, default=64, help="inputs at once, for the time")
    publishing.set_defaults(run=publish)
    arguments = parser.parse_args()
    return exit_status(lambda: arguments.run(arguments))


def listed() -> str:
    """A table of the models that come with the package."""
    rows = []
    for name in names():
        card = read_card(MODELS / name)
        quality = {k: v for k, v in card["test"].items() if k in ("accuracy", "perplexity")}
        (measure, value), *_ = quality.items()
        rows.append(
            (
                name,
                card["task"],
                f"{measure} {value:.4g}",
                card["relative_multiplications"],
                card["time"]["faster_than_dense"],
                card["bytes"] / 2**20,
            )
        )
    headers = ("name", "task", "test", "cost over dense", "faster than dense", "MiB")
    return tabulate(rows, headers, floatfmt=("", "", "", ".3f", ".2f", ".2f"))


def publish(arguments: argparse.Namespace) -> None:
    """Writes a folder, reads it again and measures it; it has its name when it is complete."""
    workdir, folder = arguments.workdir, arguments.out
    check_positive(arguments, "batch")
    if folder.exists():
        raise UserError(f"{folder} exists; remove it or give another folder")
    config = ConfigDict(read_config(workdir))
    task = open_task(config)  # before anything is written
    model, step = load_with_step(workdir, arguments.step)
    plans = []
    phase = phase_of(config, step)
    if phase.budget is not None:
        plans.append(read_plan(phase.plan_file(workdir)))
    if arguments.step == PACKED:
        plans.append(read_plan(workdir / PACKED / PLAN_FILE))
    card = {
        "name": folder.name,
        "command": arguments.command,
        "seed": config.seed,
        "step": step,
        "packed": arguments.step == PACKED,
        "dtype": arguments.dtype,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = Path(temporary) / folder.name
        write_published(unfinished, model, workdir, plans, dtype=jnp.dtype(arguments.dtype))
        write_card(unfinished, card)
        card |= _measured(read_published(unfinished), task, arguments.batch)
        size = (unfinished / WEIGHTS).stat().st_size
        write_card(unfinished, card | {"bytes": size})
        unfinished.rename(folder)
    print(f"published in {folder}: {size / 2**20:.2f} MiB of weights")


def _measured(model: nnx.Module, task: Task, batch: int) -> dict[str, Any]:
    """What the card says of quality, cost and time."""
    costs = cost(model, task.example)
    return {
        "task": task.describe(),
        "validation": evaluate_model(model, task, "validation"),
        "test": evaluate_model(model, task, "test"),
        "relative_multiplications": costs.relative,
        "multiplications": costs.multiplications,
        "parameters": costs.parameters,
        "time": _time(model, task, batch),
    }


def _time(model: nnx.Module, task: Task, batch: int) -> dict[str, Any]:
    """Of the form that is deployed, beside the dense one in the same process."""
    if find_gaudi(model)[0]:
        model = harden(model, tokens=tokens_of(model, task.example, batch)).model
    dense = densify(model)
    x = jnp.zeros((batch, *task.example.shape[1:]), task.example.dtype)
    running = {"deployed": Running(model, x), "dense": Running(dense, x)}
    seconds = interleaved_medians(running, REPEATS)
    return {
        "batch": batch,
        "milliseconds": 1e3 * seconds["deployed"],
        "faster_than_dense": seconds["dense"] / seconds["deployed"],
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}",
    }


if __name__ == "__main__":
    sys.exit(main())
