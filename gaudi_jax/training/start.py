"""How a run begins: from scratch, from another model, or from a compressed one."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.compression import compress
from gaudi_jax.compression.compress import choose_layers
from gaudi_jax.compression.rules import Rule
from gaudi_jax.errors import UserError
from gaudi_jax.layers import StructuredLinear
from gaudi_jax.training.checkpoint import Checkpointer
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.load import PLAN_FILE, load
from gaudi_jax.training.moments import Moments, carry_moments, read_moments
from gaudi_jax.training.setup import (
    build_model,
    build_optimizer,
    build_schedules,
    pretrained_model,
)
from gaudi_jax.training.step import split_model
from gaudi_jax.training.tasks import Task
from gaudi_jax.training.workdir import read_config, write_atomically


class Start(NamedTuple):
    """What a run begins with.

    Attributes:
        model: the model, with its values.
        moments: Adam's moments that the optimizer starts from, None for zeros.
        results: what was measured before the first step, as one row of metrics.
    """

    model: nnx.Module
    moments: Moments | None = None
    results: dict[str, float] = {}  # noqa: RUF012  (a NamedTuple's default is never changed)


def check_compression(config: ConfigDict, model: nnx.Module) -> None:
    """Checks the options of compression before any long work.

    Args:
        config: resolved config.
        model: the model of the config; shapes are enough.

    Raises:
        UserError: there is no trained model to compress, or an option is out of range.
    """
    options = config.compress
    if options.method == "none":
        return
    if not config.init_from and "pretrain" not in config:
        raise UserError(
            f"compress.method={options.method!r} needs a trained model; name its workdir or "
            "Hugging Face folder in init_from"
        )
    for name, least in {"calibration_batches": 0, "rounds": 1}.items():
        if options[name] < least:
            raise UserError(f"compress.{name}={options[name]} must be at least {least}")
    chosen = _compress_options(config)
    choose_layers(model, chosen.pop("budget"), **chosen)


def compressed_start(model: nnx.Module, task: Task, workdir: Path) -> Start:
    """Compresses a trained model as the config says.

    The plan is written into the workdir, so that resuming and `gaudi_jax.load` can build the
    structure.

    Args:
        model: the trained dense model.
        task: the data on which it is calibrated, and evaluated before and after.
        workdir: of the run, with the dense model's run in ``dense`` if that was trained there.
    """
    config = task.config
    results: dict[str, float] = {}
    for split in ("validation", "test"):
        row = evaluate_model(model, task, split)
        results |= {f"dense_{split}_{name}": value for name, value in row.items()}
    model.eval()
    compressed, plan = compress(
        model,
        **_compress_options(config),
        rounds=config.compress.rounds,
        calibration=_calibration(task) if config.compress.calibration_batches else None,
        key=jax.random.key(config.seed),
    )
    for split in ("validation", "test"):
        row = evaluate_model(compressed, task, split)
        results |= {f"compressed_{split}_{name}": value for name, value in row.items()}
    write_atomically(workdir / PLAN_FILE, json.dumps(plan, indent=2, allow_nan=False) + "\n")
    compressed.train()
    source = config.init_from or str(workdir / "dense")
    moments = carry_moments(_moments_of(source), compressed) if is_run(source) else None
    return Start(compressed, moments, results)


def is_run(source: str) -> bool:
    """Whether a source of parameters is a run's workdir, and not a Hugging Face folder or id."""
    return (Path(source) / "checkpoints").is_dir()


def initialise(model: nnx.Module, source: str, config: ConfigDict) -> None:
    """Takes the parameters of another run's model, or of a Hugging Face one, of the same sizes.

    Structured layers that are dense there get the truncated SVD of the dense kernel; their widths
    and locations stay as the config starts them.

    Raises:
        UserError: it is not there, has other parameters, or reads other tokens.
    """
    if is_run(source):
        _check_vocabulary(source, config)
        other = load(source)
        remedy = "initialise from a run with the same model and layer sections, or a dense one"
    else:
        other = pretrained_model(config, source)
        remedy = "set the model's sizes to those of its config.json"
    own, theirs = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, other))
    there = {path: variable.shape for path, variable in theirs.items()}
    here = {path: variable.shape for path, variable in own.items()}
    dense_there = {
        path: layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, StructuredLinear) and (*path, "kernel") in there
    }
    for path, layer in dense_there.items():
        here = {p: shape for p, shape in here.items() if p[:-1] != path or p[-1] == "bias"}
        here[*path, "kernel"] = (layer.in_features, layer.out_features)
    if here != there:
        raise UserError(
            f"the model in init_from={source} has other parameters than this config's; {remedy}"
        )
    for path, layer in dense_there.items():
        layer.set_kernel(theirs.pop((*path, "kernel"))[...])
    nnx.update(model, nnx.from_flat_state(list(theirs.items())))


def _check_vocabulary(source: str, config: ConfigDict) -> None:
    """Of models of text: the same number of tokens does not make them the same tokens."""
    theirs = read_config(source)["data"]
    digests = {data.get("vocabulary_digest") for data in (theirs, config.data)}
    if len(digests - {None}) == 2:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} on data.name={config.data.name!r} has "
            f"another vocabulary than the run in init_from={source}; use its text "
            f"{theirs['name']!r}, or a tokenizer from files (hf:DIRECTORY) for both"
        )


def _compress_options(config: ConfigDict) -> dict[str, Any]:
    options = config.compress
    if not all(isinstance(rule, tuple) and len(rule) == 2 for rule in options.rules):
        raise UserError(
            f"compress.rules={options.rules} must hold pairs (pattern, budget), with None for the "
            "budget of the whole network"
        )
    return {
        "budget": options.budget,
        # A tuple in a config holds (pattern, budget) pairs; None is the network's budget.
        "rules": [Rule(pattern, budget=budget) for pattern, budget in options.rules],
        "method": options.method,
        "rank": options.rank,
        "granularity": options.granularity,
        "allocation": options.allocation,
    }


def _calibration(task: Task) -> Iterator[Any]:
    """The first training batches as the model reads them: shuffled, so that all classes occur."""
    for batch in islice(task.train_batches(), task.config.compress.calibration_batches):
        yield task.inputs({name: jnp.asarray(array) for name, array in batch.items()})


def _moments_of(source: str) -> Moments:
    """The optimizer's moments at the end of a run."""
    config = ConfigDict(read_config(source))
    model = nnx.eval_shape(lambda: build_model(config))
    optimizer = build_optimizer(config, model, build_schedules(config))
    _, params, _ = split_model(model)
    wanted = {"opt_state": jax.eval_shape(optimizer.init, params)}
    with Checkpointer(Path(source) / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(wanted)
    if restored is None:
        raise UserError(f"{source} holds no checkpoint; train it first")
    return read_moments(restored.state["opt_state"])
