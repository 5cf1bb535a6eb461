"""What happens between two phases of a run: the model's layers are compressed."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.compression import compress, densify
from gaudi_jax.compression.compress import choose_layers
from gaudi_jax.compression.plan import rebuild
from gaudi_jax.compression.rules import Rule
from gaudi_jax.data.pipeline import first_batches
from gaudi_jax.errors import UserError
from gaudi_jax.layers import StructuredLinear
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.load import read_plan
from gaudi_jax.training.moments import Moments, carry_moments, estimate_moments
from gaudi_jax.training.phases import Phase, phases
from gaudi_jax.training.processes import from_primary, is_primary, wait_for_all
from gaudi_jax.training.tasks import Task
from gaudi_jax.training.workdir import write_atomically


class Start(NamedTuple):
    """What a phase begins with.

    Attributes:
        model: the model, with its values.
        moments: Adam's moments that the optimizer starts from, None for zeros.
        results: what was measured before its first step, as a row of metrics.
    """

    model: nnx.Module
    moments: Moments | None = None
    results: dict[str, float] = {}  # noqa: RUF012  (a NamedTuple's default is never changed)


def check_phases(config: ConfigDict, model: nnx.Module) -> None:
    """Checks the phases and the options of compression before any long work.

    Args:
        config: resolved config.
        model: the config's model with dense layers (`densify`); shapes are enough.

    Raises:
        UserError: there is no trained model to compress, or an option is out of range.
    """
    options = config.compress
    planned = [phase for phase in phases(config) if phase.budget is not None]
    if not planned:
        return
    if planned[0].first == 0 and not config.init_from and "pretrain" not in config:
        raise UserError(
            f"compress.method={options.method!r} needs a trained model; name its workdir or "
            "Hugging Face folder in init_from, or begin compress.stages later than at 0"
        )
    for name, least in {"calibration_batches": 0, "rounds": 1}.items():
        if options[name] < least:
            raise UserError(f"compress.{name}={options[name]} must be at least {least}")
    for phase in planned:
        choose_layers(model, cast(float, phase.budget), **_compress_options(config))


def restructure(
    model: nnx.Module, moments: Moments | None, task: Task, phase: Phase, workdir: Path
) -> Start:
    """Compresses a trained model for a phase, as the config says.

    The plan is written into the workdir, so that resuming and `gaudi_jax.load` can build the
    structure. A model that has a structure already is made dense first, and its kernels' moments
    are estimated on the calibration batches.

    Args:
        model: the model as trained so far.
        moments: Adam's, of its parameters; None if they are not known.
        task: the data on which it is calibrated, and evaluated before and after.
        phase: what begins.
        workdir: of the run.
    """
    config, options = task.config, task.config.compress
    # The test split is for what a run starts from and ends with.
    splits = ("validation", "test") if phase.first == 0 else ("validation",)
    results: dict[str, float] = {"phase": phase.number}
    structured = any(isinstance(m, StructuredLinear) for _, m in nnx.iter_modules(model))
    if not structured:
        results |= _evaluated("dense", model, task, splits)
    start = time.perf_counter()
    dense = densify(model)
    if structured and moments is not None:
        moments = estimate_moments(dense, moments, task, max(options.calibration_batches, 1))
    dense.eval()
    compressed, plan = compress(
        dense,
        cast(float, phase.budget),
        **_compress_options(config),
        rounds=options.rounds,
        calibration=_calibration(task) if options.calibration_batches else None,
        key=jax.random.key(config.seed),
    )
    if is_primary():
        text = json.dumps(plan, indent=2, allow_nan=False)
        write_atomically(phase.plan_file(workdir), text + "\n")
    compressed = _of_primary(compressed, dense, phase.plan_file(workdir))
    if moments is not None:
        moments = jax.block_until_ready(carry_moments(moments, compressed))
    results["compress_seconds"] = time.perf_counter() - start
    results |= _evaluated("compressed", compressed, task, splits)
    compressed.train()
    return Start(compressed, moments, results)


def _of_primary(compressed: nnx.Module, dense: nnx.Module, plan_file: Path) -> nnx.Module:
    """The model that process 0 has found: another host may have found another structure."""
    if jax.process_count() == 1:
        return compressed
    wait_for_all("the plan is written")
    model = compressed if is_primary() else rebuild(dense, read_plan(plan_file))
    graphdef, state = nnx.split(model)
    if not is_primary():
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, from_primary(state)))


def _evaluated(name: str, model: nnx.Module, task: Task, splits: tuple[str, ...]) -> dict:
    return {
        f"{name}_{split}_{key}": value
        for split in splits
        for key, value in evaluate_model(model, task, split).items()
    }


def _compress_options(config: ConfigDict) -> dict[str, Any]:
    options = config.compress
    if not all(isinstance(rule, tuple) and len(rule) == 2 for rule in options.rules):
        raise UserError(
            f"compress.rules={options.rules} must hold pairs (pattern, budget), with None for the "
            "budget of the whole network"
        )
    return {
        # A tuple in a config holds (pattern, budget) pairs; None is the network's budget.
        "rules": [Rule(pattern, budget=budget) for pattern, budget in options.rules],
        "method": options.method,
        "rank": options.rank,
        "granularity": options.granularity,
        "blocks": options.blocks,
        "allocation": options.allocation,
        "floor": options.floor,
    }


def _calibration(task: Task) -> Iterator[Any]:
    """The first training batches as the model reads them: shuffled, so that all classes occur."""
    count, parts = task.config.compress.calibration_batches, task.config.train.accumulate
    for batch in first_batches(task.train_batches(), count):
        inputs = task.inputs({name: jnp.asarray(array) for name, array in batch.items()})
        for part in range(parts):  # a device may have no room for a whole batch
            yield inputs[part::parts]
