"""The report of a run: summary, table and pictures in its workdir."""

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.compression.surgery import find_gaudi
from gaudi_jax.cost import cost
from gaudi_jax.deploy.harden import harden, tokens_of
from gaudi_jax.deploy.machine import MACHINES
from gaudi_jax.errors import UserError
from gaudi_jax.layers import Sigma
from gaudi_jax.report.curves import plot_curves
from gaudi_jax.report.masks import plot_masks
from gaudi_jax.report.tables import summary_table
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.load import PACKED, load_with_step
from gaudi_jax.training.metrics import read_metrics
from gaudi_jax.training.processes import is_primary
from gaudi_jax.training.tasks import Task, open_task
from gaudi_jax.training.workdir import read_config, write_atomically

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_report(
    workdir: str | Path, step: int | str | None = None, *, stride: int | None = None
) -> dict[str, Any]:
    """Evaluates the model of a run on the test split and writes its report.

    All processes of a run evaluate it together, the first one writes ``summary.json``, the same as
    a table in ``summary.txt``, ``masks.png`` (for models with Gaudi layers) and ``curves.png``; of
    a packed model only ``summary-packed.json`` and ``.txt``.

    Args:
        workdir: directory of the run.
        step: which checkpoint: its step, "best" (by validation accuracy, or loss), "packed" (see
            `gaudi_jax.deploy`) or "last"; None for what the run's config says
            (``evaluate_checkpoint``).
        stride: tokens between the windows of a text in evaluation; None for what the run's config
            says (``data.stride``).

    Returns:
        The content of the JSON file.

    Raises:
        UserError: the workdir holds no run or no such checkpoint, its data are gone or have
            become others, or the stride is out of range or the data are no text.

    Example:
        >>> from gaudi_jax.report import write_report
        >>> summary = write_report("runs/digits")  # doctest: +SKIP
    """
    workdir = Path(workdir)
    config = ConfigDict(read_config(workdir))
    if stride is not None:
        if "stride" not in config.data:
            raise UserError(f"stride={stride} is for texts; leave it out for {config.data.name!r}")
        config.data.stride = stride
    rows = read_metrics(workdir)
    choice = config.evaluate_checkpoint if step is None else step
    model, steps = load_with_step(workdir, choice)
    task = open_task(config)
    packed = choice == PACKED
    results = _test_results(model, task, "packed") if packed else _all_test_results(model, task)
    validation = evaluate_model(model, task, "validation")
    costs = cost(model, task.example)
    summary = {
        "data": config.data.name,
        "seed": config.seed,
        "steps": steps,
        **results,
        **{f"validation_{name}": value for name, value in validation.items()},
        **_before_and_after_compression(rows),
        **task.remarks(model),
        f"{'packed_' * packed}relative_multiplications": costs.relative,
        "total_relative_multiplications": costs.total_relative,
        "multiplications": costs.multiplications,
        "dense_multiplications": costs.dense_multiplications,
        "parameters": costs.parameters,
        "bytes": costs.bytes,
        "layers": [_layer(layer) for layer in costs.to_dict()["layers"]],
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}",
        "versions": versions(),
    }
    text = json.dumps(summary, indent=2, allow_nan=False)
    if not is_primary():
        return summary
    stem = workdir / ("summary-packed" if packed else "summary")
    write_atomically(stem.with_suffix(".txt"), summary_table(summary) + "\n")
    if packed:  # the curves are those of the run, and there are no masks
        write_atomically(stem.with_suffix(".json"), text + "\n")
        return summary
    plot_curves(
        rows,
        workdir / "curves.png",
        target_of=(
            "relative_multiplications" if config.controller.name == "budget" else "mean_width"
        ),
        unigram_perplexity=summary.get("unigram_perplexity"),
    )
    plot_masks(model, workdir / "masks.png")
    # Last: where it is, the report is whole.
    write_atomically(stem.with_suffix(".json"), text + "\n")
    return summary


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a run's numbers.

    Example:
        >>> from gaudi_jax.report.summary import versions
        >>> sorted(versions())[:2]
        ['flax', 'grain']
    """
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def _all_test_results(model: nnx.Module, task: Task) -> dict[str, float]:
    """Test results with soft, with hard and, of Gaudi layers, with packed blocks."""
    soft = _test_results(model, task, "soft")
    if _soft(model):
        hard = _test_results(model, task, "hard", sigma=math.inf)
    else:  # the same masks
        hard = {f"{name.removesuffix('_soft')}_hard": value for name, value in soft.items()}
    results = soft | hard
    # What a language model is judged by, under its short name too.
    if "test_perplexity_hard" in results:
        results["perplexity"] = results["test_perplexity_hard"]
    if find_gaudi(model)[0] and jax.default_backend() in MACHINES:
        tokens = tokens_of(model, task.example, task.config.data.batch_size)
        packed = harden(model, tokens=tokens).model
        results |= _test_results(packed, task, "packed")
        results["packed_relative_multiplications"] = cost(packed, task.example).relative
    return results


def _test_results(
    model: nnx.Module, task: Task, form: str, sigma: float | None = None
) -> dict[str, float]:
    results = evaluate_model(model, task, "test", sigma=sigma)
    return {f"test_{name}_{form}": value for name, value in results.items()}


def _before_and_after_compression(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What was measured where phases meet: of the dense model, and of the last compressed one."""
    changes = [row for row in rows if "phase" in row]
    measured = {
        name: value
        for row in changes
        for name, value in row.items()
        if name.startswith(("dense_", "compressed_"))
    }
    if changes:
        measured["compress_seconds"] = sum(row["compress_seconds"] for row in changes)
    return measured


def _soft(model: nnx.Module) -> bool:
    sigmas = nnx.to_flat_state(nnx.state(model, Sigma))
    return any(math.isfinite(variable[...]) for _, variable in sigmas)


def _layer(layer: dict[str, Any]) -> dict[str, Any]:
    shape = layer.pop("shape")
    return layer | {"in_features": shape[0], "out_features": shape[1]}
