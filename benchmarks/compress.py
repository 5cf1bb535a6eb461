"""Straight after compression: Gaudi layers and their rivals, before any fine-tuning.

    python benchmarks/compress.py WORKDIR [--study methods] [--budgets 0.125 0.25 0.5]
    python benchmarks/compress.py WORKDIR --study rivals
    python benchmarks/compress.py WORKDIR --study alignment --budgets 0.25

WORKDIR holds a trained dense run of ``main.py``. Its transformer blocks are compressed to each
budget, without fine-tuning, and evaluated on the validation split. The study *methods* compares
truncated SVD, whitened SVD, Gaudi layers by search, the same aware of the activations, on single
features and on a grid of an eighth of the model's width, and with the budget shared out over the
layers. The study *rivals* compares all kinds of layers, each aware of the activations, with the
budget shared out. The study *alignment* asks what ranks and grids cost that suit matrix units.
"""

import argparse
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

import gaudi_jax
from gaudi_jax.layers.factory import GRID_LAYERS
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.tasks import Task, open_task
from gaudi_jax.training.workdir import read_config

#: Options of `gaudi_jax.compress`, and whether it is calibrated.
Variants = Mapping[str, tuple[dict[str, Any], bool]]
RANKS, GRIDS = (1, 8, 32), (1, 16, 64)


def variants(study: str, width: int) -> Variants:
    if study == "rivals":
        return {
            method: ({"method": method, "allocation": "global"}, True)
            for method in ("gaudi", "spread", "low_rank", *GRID_LAYERS)
        }
    if study == "alignment":
        return {
            f"rank {rank}, grid {grid}": ({"rank": rank, "granularity": grid}, True)
            for rank, grid in itertools.product(RANKS, GRIDS)
        }
    return {
        "SVD": ({"method": "low_rank"}, False),
        "whitened SVD": ({"method": "low_rank"}, True),
        "Gaudi": ({}, False),
        "Gaudi, aware": ({}, True),
        "Gaudi, aware, grid 1/8": ({"granularity": width // 8}, True),
        "whitened SVD, global": ({"method": "low_rank", "allocation": "global"}, True),
        "Gaudi, aware, global": ({"allocation": "global"}, True),
    }


def calibration(task: Task, batches: int) -> list[jax.Array]:
    chosen = itertools.islice(task.evaluation_batches("train"), batches)
    return [task.inputs({k: jnp.asarray(v) for k, v in batch.items()}) for batch in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--study", choices=["methods", "rivals", "alignment"], default="methods")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--batches", type=int, default=16, help="of training examples")
    args = parser.parse_args()
    model: Any = gaudi_jax.load(args.workdir)
    task = open_task(ConfigDict(read_config(args.workdir)))
    inputs = calibration(task, args.batches)
    dense = evaluate_model(model, task, "validation")
    print(f"{task.describe()}; dense: " + ", ".join(f"{k} {v:.4f}" for k, v in dense.items()))
    rows = []
    tried = variants(args.study, model.config.width)
    for budget, (name, (options, calibrated)) in itertools.product(args.budgets, tried.items()):
        start = time.perf_counter()
        compressed, plan = gaudi_jax.compress(
            model,
            budget,
            rules=[gaudi_jax.Rule("blocks/.*")],
            calibration=inputs if calibrated else None,
            progress=False,
            **options,
        )
        seconds = time.perf_counter() - start
        results = evaluate_model(compressed, task, "validation")
        means = [
            np.mean([entry[error] for entry in plan["layers"].values()]) if known else None
            for error, known in (("error", True), ("activation_error", calibrated))
        ]
        cost = plan["multiplications"] / plan["dense_multiplications"]
        rows.append((budget, name, *results.values(), *means, cost, seconds))
        print(
            *(f"{cell:.4f}" if isinstance(cell, float) else cell for cell in rows[-1]), flush=True
        )
    headers = ("budget", "layers", *dense, "error", "on activations", "cost", "seconds")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))


if __name__ == "__main__":
    main()
