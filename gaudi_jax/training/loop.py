"""Training: one linear function from a config to a trained model in the workdir."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gaudi_jax.cost import cost
from gaudi_jax.data.images import load_images
from gaudi_jax.data.pipeline import evaluation_batches, train_batches
from gaudi_jax.errors import UserError
from gaudi_jax.training.checkpoint import Checkpointer
from gaudi_jax.training.evaluate import data_mesh, evaluate_batches, image_task, put_batch
from gaudi_jax.training.load import load
from gaudi_jax.training.metrics import MetricLog, Progress
from gaudi_jax.training.setup import (
    build_model,
    build_optimizer,
    build_schedules,
    check_options,
    resolve_config,
)
from gaudi_jax.training.step import (
    CostWeights,
    TrainState,
    make_evaluation_step,
    make_train_step,
    split_model,
)
from gaudi_jax.training.workdir import claim_workdir

log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | Path) -> bool:
    """Trains the model of a config in a workdir, or continues the run that the workdir holds.

    The workdir gets ``config.json``, ``metrics.jsonl``, ``tensorboard/`` and ``checkpoints/``. On
    SIGTERM the run saves a checkpoint and returns; called again, it continues, and ends bitwise as
    if it had never stopped (same machine, same number of devices).

    Args:
        config: as a config file gives it (see ``configs/``).
        workdir: directory of the run; made if it is not there.

    Returns:
        True when training is complete, False when it was stopped by SIGTERM.

    Raises:
        UserError: the config, the data or the workdir is not usable, or the loss is not finite.
    """
    # ---- data -----------------------------------------------------------------------------------
    check_options(config)
    data = config.data
    splits = load_images(
        data.name,
        validation_fraction=data.validation_fraction,
        skip_unreadable=data.skip_unreadable,
        verify=data.verify,
    )
    config = resolve_config(config, splits)
    task = image_task(config)
    mesh = data_mesh(data.batch_size)
    train_iterator = train_batches(
        splits.train,
        batch_size=data.batch_size,
        image_size=data.image_size,
        seed=config.seed,
        crop_padding=data.crop_padding,
        flip=data.flip,
        workers=data.workers,
    )

    # ---- model, schedules, optimizer ------------------------------------------------------------
    schedules = build_schedules(config)
    model = build_model(config)
    optimizer = build_optimizer(config, model, schedules)
    if config.init_from:
        _initialise_from(model, config.init_from)
    image_shape = (1, data.image_size, data.image_size, config.model.channels)
    model_cost = cost(model, jax.ShapeDtypeStruct(image_shape, jnp.float32))

    # ---- state: replicated over the mesh; batches are split over it ------------------------------
    graphdef, params, other = split_model(model)
    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(
        TrainState(jnp.zeros([], jnp.int32), params, other, optimizer.init(params)), replicated
    )
    step_fn = make_train_step(
        graphdef, optimizer, schedules, task, CostWeights.of(model_cost), config.seed, replicated
    )
    model.eval()
    evaluation_fn = make_evaluation_step(nnx.graphdef(model), task)
    del model, params, other

    # ---- the workdir is claimed only now that nothing is wrong with the config -------------------
    claim_workdir(workdir, config.to_dict())
    workdir = Path(workdir)
    log.info(
        "%s: %d training images, %d classes; %d parameters, %d multiplications an image if dense; "
        "workdir %s",
        data.name,
        len(splits.train),
        splits.num_classes,
        model_cost.parameters,
        model_cost.total_dense_multiplications,
        workdir,
    )
    with (
        Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        _stop_on_sigterm() as stop,
    ):
        # ---- start: resume from the newest checkpoint, or from scratch ---------------------------
        abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
        )
        restored = checkpoints.restore(abstract_state._asdict(), train_iterator)
        if restored is not None:
            state = TrainState(**restored.state)
            log.info("resumed from step %d", restored.step)
        first_step, steps = int(state.step), config.train.steps
        saved_step = first_step
        started = time.perf_counter()

        # ---- steps -------------------------------------------------------------------------------
        with (
            MetricLog(workdir, resumed_from=restored and restored.step) as rows,
            Progress(steps, first_step, items_per_step=data.batch_size) as progress,
        ):
            for step in range(first_step + 1, steps + 1):
                batch = put_batch(next(train_iterator), mesh)
                state, metrics = step_fn(state, batch)
                last = step == steps
                if step % config.train.log_every == 0 or last:
                    row = {name: float(value) for name, value in metrics.items()}
                    _check_finite(row, step, workdir)
                    speed = (step - first_step) * data.batch_size / (time.perf_counter() - started)
                    rows.write({"step": step, **row, "examples_per_second": speed})
                    progress.show(row)
                progress.advance(step)
                evaluated = None
                if step % config.train.eval_every == 0 or last:
                    evaluated = evaluate_batches(
                        evaluation_fn,
                        state.params,
                        state.other,
                        evaluation_batches(
                            splits.validation,
                            batch_size=data.batch_size,
                            image_size=data.image_size,
                            crop_fraction=data.crop_fraction,
                            workers=data.workers,
                        ),
                        mesh,
                    )
                    row = {f"validation_{name}": value for name, value in evaluated.items()}
                    rows.write({"step": step, **row})
                    progress.show(row)
                if step % config.checkpoint.every == 0 or last or stop.requested:
                    # A checkpoint of a run that has diverged would push out the good ones.
                    _check_finite({"train_loss": float(metrics["train_loss"])}, step, workdir)
                    score = evaluated["accuracy"] if evaluated and _settled(config, step) else None
                    checkpoints.save(step, state._asdict(), train_iterator, score=score)
                    saved_step = step
                if stop.requested:
                    break
        checkpoints.wait()
    if stop.requested and saved_step < steps:
        log.warning("stopped at step %d of %d; run it again to continue", saved_step, steps)
        return False
    return True


class _Stop:
    requested = False


@contextmanager
def _stop_on_sigterm() -> Iterator[_Stop]:
    """Turns SIGTERM (a preemption) into a request that the loop sees after the current step."""
    stop = _Stop()

    def request(signum, frame):
        stop.requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def _initialise_from(model: nnx.Module, workdir: str) -> None:
    """Copies the parameters of another run's model of the same structure."""
    _, params, _ = split_model(load(workdir))
    shapes = jax.tree.map(jnp.shape, params)
    own = jax.tree.map(jnp.shape, split_model(model)[1])
    if shapes != own:
        raise UserError(
            f"the model in init_from={workdir} has other parameters than this config's; "
            "initialise from a run with the same model and layer sections"
        )
    nnx.update(model, params)


def _settled(config: ConfigDict, step: int) -> bool:
    """Whether the cost has reached its target, so that accuracies can be compared."""
    settles = config.controller.end if config.controller.name == "budget" else 0.0
    return step >= settles * config.train.steps


def _check_finite(row: dict[str, float], step: int, workdir: Path) -> None:
    if not math.isfinite(row["train_loss"]):
        raise UserError(
            f"the loss is {row['train_loss']} at step {step}; lower optimizer.learning_rate or set "
            f"optimizer.clip_norm (checkpoints in {workdir} are kept)"
        )
