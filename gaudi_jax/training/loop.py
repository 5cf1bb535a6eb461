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

from gaudi_jax.compression import rebuild
from gaudi_jax.cost import cost
from gaudi_jax.errors import UserError
from gaudi_jax.training.checkpoint import Checkpointer, has_checkpoint
from gaudi_jax.training.evaluate import data_mesh, evaluate_batches, put_batch
from gaudi_jax.training.load import read_plan
from gaudi_jax.training.metrics import MetricLog, Progress
from gaudi_jax.training.moments import with_moments
from gaudi_jax.training.setup import build_model, build_optimizer, build_schedules, check_options
from gaudi_jax.training.start import Start, check_compression, compressed_start, initialise
from gaudi_jax.training.step import (
    CostWeights,
    TrainState,
    make_evaluation_step,
    make_train_step,
    split_model,
)
from gaudi_jax.training.tasks import open_task
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
    # ---- data, schedules, optimizer: what can be wrong is found before anything is written ------
    check_options(config)
    task = open_task(config)
    config = task.config
    mesh = data_mesh(config.data.batch_size, config.train.accumulate)
    train_iterator = task.train_batches()
    schedules = build_schedules(config)
    abstract_model = nnx.eval_shape(lambda: build_model(config))
    build_optimizer(config, abstract_model, schedules)
    check_compression(config, abstract_model)
    resumes = has_checkpoint(Path(workdir) / "checkpoints")
    model = build_model(config)
    if config.init_from and not resumes:
        initialise(model, config.init_from, config)
    claim_workdir(workdir, config.to_dict())
    workdir = Path(workdir)
    if "pretrain" in config and not resumes:
        log.info("the dense model first")
        if not train(config.pretrain, workdir / "dense"):
            return False
        initialise(model, str(workdir / "dense"), config)
    with (
        Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        _stop_on_sigterm() as stop,
    ):
        # ---- model: compressed if the config says so ---------------------------------------------
        if config.compress.method == "none":
            start = Start(model)
        elif resumes:
            start = Start(rebuild(model, read_plan(workdir)))
        else:
            start = compressed_start(model, task, workdir)
        del model
        model_cost = cost(start.model, task.example)
        log.info(
            "%s; %d parameters, %d multiplications an example if dense; workdir %s",
            task.describe(),
            model_cost.parameters,
            model_cost.total_dense_multiplications,
            workdir,
        )
        optimizer = build_optimizer(config, start.model, schedules)

        # ---- state: replicated over the mesh; batches are split over it --------------------------
        graphdef, params, other = split_model(start.model)
        replicated = NamedSharding(mesh, PartitionSpec())
        opt_state = optimizer.init(params)
        if start.moments is not None:
            opt_state = with_moments(opt_state, start.moments)
        state = jax.device_put(
            TrainState(jnp.zeros([], jnp.int32), params, other, opt_state), replicated
        )
        weights = CostWeights.of(model_cost)
        step_fn = make_train_step(
            graphdef, optimizer, schedules, task, weights, config.seed, replicated
        )
        start.model.eval()
        evaluation_fn = make_evaluation_step(nnx.graphdef(start.model), task)
        results = start.results
        del start, params, other, opt_state

        # ---- resume from the newest checkpoint ---------------------------------------------------
        abstract_state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state
        )
        restored = checkpoints.restore(abstract_state._asdict(), train_iterator)
        if restored is not None:
            state = TrainState(**restored.state)
            log.info("resumed from step %d", restored.step)
        first_step, steps = int(state.step), config.train.steps
        saved_step, units = first_step, task.units_per_step
        started = time.perf_counter()

        # ---- steps -------------------------------------------------------------------------------
        with (
            MetricLog(workdir, resumed_from=restored and restored.step) as rows,
            Progress(steps, first_step, unit=task.unit, units_per_step=units) as progress,
        ):
            if results:
                rows.write({"step": 0, **results})
            for step in range(first_step + 1, steps + 1):
                batch = put_batch(next(train_iterator), mesh)
                state, metrics = step_fn(state, batch)
                last = step == steps
                if step % config.train.log_every == 0 or last:
                    row = {name: float(value) for name, value in metrics.items()}
                    _check_finite(row, step, workdir)
                    speed = (step - first_step) * units / (time.perf_counter() - started)
                    rows.write({"step": step, **row, f"{task.unit}s_per_second": speed})
                    progress.show(row)
                progress.advance(step)
                evaluated = None
                if step % config.train.eval_every == 0 or last:
                    sums = evaluate_batches(
                        evaluation_fn,
                        state.params,
                        state.other,
                        task.evaluation_batches("validation"),
                        mesh,
                    )
                    evaluated = task.results(sums, "validation")
                    row = {f"validation_{name}": value for name, value in evaluated.items()}
                    rows.write({"step": step, **row})
                    progress.show(row)
                if step % config.checkpoint.every == 0 or last or stop.requested:
                    # A checkpoint of a run that has diverged would push out the good ones.
                    _check_finite({"train_loss": float(metrics["train_loss"])}, step, workdir)
                    score = task.score(evaluated) if evaluated and _settled(config, step) else None
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
