"""Straight after compression: low-rank and Gaudi layers, plain and aware of the activations.

    python benchmarks/compress.py WORKDIR [--budgets 0.125 0.25 0.5]

WORKDIR holds a trained dense run of ``main.py``. Its transformer blocks are compressed to each
budget, without fine-tuning, and evaluated on the validation split: truncated SVD, whitened SVD,
Gaudi layers by search, the same aware of the activations, on single features and on a grid of an
eighth of each layer's shorter axis, and with the budget shared out over the layers.
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

import gaudi_jax
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.tasks import Task, open_task
from gaudi_jax.training.workdir import read_config

#: Options of `gaudi_jax.compress`, whether it is calibrated, and cells of the shorter axis.
METHODS: dict[str, tuple[dict[str, Any], bool, int | None]] = {
    "SVD": ({"method": "low_rank"}, False, None),
    "whitened SVD": ({"method": "low_rank"}, True, None),
    "Gaudi": ({}, False, None),
    "Gaudi, aware": ({}, True, None),
    "Gaudi, aware, grid 1/8": ({}, True, 8),
    "whitened SVD, global": ({"method": "low_rank", "allocation": "global"}, True, None),
    "Gaudi, aware, global": ({"allocation": "global"}, True, None),
}


def calibration(task: Task, batches: int) -> list[jax.Array]:
    chosen = itertools.islice(task.evaluation_batches("train"), batches)
    return [task.inputs({k: jnp.asarray(v) for k, v in batch.items()}) for batch in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--batches", type=int, default=16, help="of training examples")
    args = parser.parse_args()
    model: Any = gaudi_jax.load(args.workdir)
    task = open_task(ConfigDict(read_config(args.workdir)))
    inputs = calibration(task, args.batches)
    dense = evaluate_model(model, task, "validation")
    print(f"{task.describe()}; dense: " + ", ".join(f"{k} {v:.4f}" for k, v in dense.items()))
    rows = []
    for budget, (name, choice) in itertools.product(args.budgets, METHODS.items()):
        options, calibrated, cells = choice
        start = time.perf_counter()
        compressed, plan = gaudi_jax.compress(
            model,
            budget,
            rules=[gaudi_jax.Rule("blocks/.*")],
            granularity=1 if cells is None else model.config.width // cells,
            calibration=inputs if calibrated else None,
            progress=False,
            **options,
        )
        seconds = time.perf_counter() - start
        results = evaluate_model(compressed, task, "validation")
        error = "activation_error" if calibrated else "error"
        mean = np.mean([entry[error] for entry in plan["layers"].values()])
        cost = plan["multiplications"] / plan["dense_multiplications"]
        rows.append((budget, name, *results.values(), mean, cost, seconds))
        print(
            *(f"{cell:.4f}" if isinstance(cell, float) else cell for cell in rows[-1]), flush=True
        )
    headers = ("budget", "layers", *dense, "mean error", "cost", "seconds")
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))


if __name__ == "__main__":
    main()
