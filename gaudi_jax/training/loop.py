"""Training: one linear function from a config to a trained model in the workdir."""

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gaudi_jax.compression import densify
from gaudi_jax.cost import cost
from gaudi_jax.data.pipeline import sheltered
from gaudi_jax.errors import UserError
from gaudi_jax.training.checkpoint import Checkpointer, has_checkpoint
from gaudi_jax.training.evaluate import evaluate_batches
from gaudi_jax.training.load import abstract_model
from gaudi_jax.training.memory import estimate_memory, log_memory
from gaudi_jax.training.mesh import batch_shard, check_batch, make_mesh, place, put_batch
from gaudi_jax.training.metrics import MetricLog, Progress, read_metrics
from gaudi_jax.training.moments import read_moments, with_moments
from gaudi_jax.training.phases import Phase, phase_of, phases
from gaudi_jax.training.processes import (
    from_primary,
    is_primary,
    of_all,
    on_host,
    wait_for_all,
)
from gaudi_jax.training.profile import StepTrace
from gaudi_jax.training.restructure import Start, check_phases, restructure
from gaudi_jax.training.setup import (
    Schedules,
    build_model,
    build_optimizer,
    build_schedules,
    check_options,
)
from gaudi_jax.training.stall import StallWatch
from gaudi_jax.training.start import initialise, is_run, moments_of
from gaudi_jax.training.step import (
    CostWeights,
    Metrics,
    TrainState,
    laid_out,
    make_evaluation_step,
    make_train_step,
    split_model,
    state_layout,
)
from gaudi_jax.training.stop import Stop, Stopped, stop_on_sigterm
from gaudi_jax.training.tasks import Task, open_task
from gaudi_jax.training.workdir import check_workdir, claim_workdir

log = logging.getLogger(__name__)

#: A search takes longer than a step: so many times train.stall_seconds it is left in peace.
PATIENCE = 10


def train(config: ConfigDict, workdir: str | Path) -> bool:
    """Trains the model of a config in a workdir, or continues the run that the workdir holds.

    The workdir gets ``config.json``, ``metrics.jsonl``, ``tensorboard/``, ``checkpoints/``, a plan
    for each structure that compression gives the model (`gaudi_jax.training.phases`), and of a
    language model the ``tokenizer/`` (`gaudi_jax.data.tokenizers.read_tokenizer`). On SIGTERM the
    run saves a checkpoint and returns; called again, it continues, and ends bitwise as if it had
    never stopped (same machine, same number of devices).

    Args:
        config: as a config file gives it (see ``configs/``).
        workdir: directory of the run; made if it is not there.

    Returns:
        True when training is complete, False when it was stopped by SIGTERM.

    Raises:
        UserError: the config, the data or the workdir is not usable, or the loss stays infinite or
            undefined.
    """
    # ---- data, schedules, optimizer: what can be wrong is found before anything is written ------
    check_options(config)
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, config.train.accumulate)
    task = open_task(config)
    config = task.config
    iterator = task.train_batches(batch_shard(mesh))
    schedules = build_schedules(config)
    dense = nnx.eval_shape(lambda: densify(build_model(config)))
    build_optimizer(config, nnx.eval_shape(lambda: build_model(config)), schedules)
    check_phases(config, dense)
    # What process 0 sees counts: a network's disk may show others an older state.
    resumes = bool(of_all(has_checkpoint(Path(workdir) / "checkpoints"))[0])
    model: Any = build_model(config)
    source = config.init_from
    if source and not resumes:
        initialise(model, source, config)
    workdir = Path(workdir)
    if is_primary():
        claim_workdir(workdir, config.to_dict())
        task.save_extras(workdir)
    wait_for_all("the workdir is made")
    if not workdir.exists():
        raise UserError(
            f"process {jax.process_index()} does not see the workdir {workdir}; give all processes "
            "the same --workdir, on a disk that all of them see"
        )
    check_workdir(workdir, config.to_dict())
    if "pretrain" in config and not resumes:
        log.info("the dense model first")
        source = str(workdir / "dense")
        if not train(config.pretrain, source):
            return False
        initialise(model, source, config)
    with (
        closing(iterator),  # ends its processes, also when one of them raised an error
        Checkpointer(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
        stop_on_sigterm() as stop,
    ):
        # ---- resume from the newest checkpoint, with the structure that it was saved with --------
        restored = checkpoints.restore(
            lambda step: _abstract_state(
                config, schedules, workdir, phase_of(config, step), mesh
            )._asdict(),
            iterator,
        )
        made = 0 if restored is None else restored.step
        if restored is not None:
            log.info("resumed from step %d", made)
        with (
            MetricLog(workdir, resumed_from=restored and made) as rows,
            Progress(
                config.train.steps, made, unit=task.unit, units_per_step=task.units_per_step
            ) as progress,
            StallWatch(workdir, config.train.stall_seconds) as watch,
            StepTrace(workdir, **config.profile) as trace,
        ):
            run = _Run(
                task,
                workdir,
                mesh,
                iterator,
                schedules,
                checkpoints,
                rows,
                progress,
                watch,
                trace,
                stop,
                made,
                None if restored is None or _was_evaluated(workdir, made) else made,
            )
            # ---- phases: each with its own structure, optimizer state and compiled step ----------
            moments = moments_of(source) if source and is_run(source) and not resumes else None
            for phase in phases(config):
                if phase.last < made:
                    continue
                if restored is not None and phase.first < made:
                    graphdef = nnx.graphdef(abstract_model(config, phase, workdir))
                    state = TrainState(**restored.state)
                else:
                    start = Start(model)
                    if phase.budget is not None:
                        watch.note(phase.first, "compressing", patience=PATIENCE)
                        try:
                            with stop.at_once():
                                start = restructure(model, moments, task, phase, workdir)
                        except Stopped:  # it begins anew from the checkpoint before
                            break
                        rows.write({"step": phase.first, **start.results})
                    wait_for_all("the plan is written")
                    graphdef = nnx.graphdef(abstract_model(config, phase, workdir))
                    abstract = _abstract_state(config, schedules, workdir, phase, mesh)
                    state = _first_state(config, schedules, start, abstract, phase.first)
                    del start
                model = moments = None  # what the state does not hold is not needed any more
                state = run.make_steps(graphdef, state, phase)
                if stop.requested or phase.last == config.train.steps:
                    break
                state = on_host(state)
                model = nnx.merge(graphdef, *jax.tree.map(jnp.asarray, state[1:3]))
                moments = read_moments(state.opt_state)
        checkpoints.wait()
    steps = config.train.steps
    if stop.requested and (run.saved_step < steps or run.not_evaluated == steps):
        log.warning(
            "stopped at step %d of %d; run it again to continue",
            run.saved_step,
            steps,
        )
        return False
    return True


def _first_state(
    config: ConfigDict, schedules: Schedules, start: Start, abstract: TrainState, made: int
) -> TrainState:
    """The state before the first step of a phase, as process 0 has it, on the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    if is_primary():
        _, params, other = split_model(start.model)
        opt_state = build_optimizer(config, start.model, schedules, made=made).init(params)
        if start.moments is not None:
            opt_state = with_moments(opt_state, start.moments)
        state = TrainState(jnp.full([], made, jnp.int32), params, other, opt_state)
    else:
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    return place(from_primary(state), shardings)


def _abstract_state(
    config: ConfigDict, schedules: Schedules, workdir: Path, phase: Phase, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state in a phase."""
    model = abstract_model(config, phase, workdir)
    _, params, other = split_model(model)
    init = build_optimizer(config, model, schedules, made=phase.first).init
    step_count: Any = jax.ShapeDtypeStruct([], jnp.int32)
    state = TrainState(step_count, params, other, jax.eval_shape(init, params))
    return laid_out(state, mesh)


@dataclasses.dataclass
class _Run:
    """Makes the steps of a run, and writes down what comes of them."""

    task: Task
    workdir: Path
    mesh: Mesh
    iterator: grain.DatasetIterator
    schedules: Schedules
    checkpoints: Checkpointer
    rows: MetricLog
    progress: Progress
    watch: StallWatch
    trace: StepTrace
    stop: Stop
    saved_step: int
    not_evaluated: int | None
    save_due: bool = False
    abandoned: Iterator[Any] | None = None
    skipped: int = 0

    def make_steps(self, graphdef: nnx.GraphDef, state: TrainState, phase: Phase) -> TrainState:
        """Trains to the end of a phase, or until the run is asked to stop."""
        config, first = self.task.config, int(state.step)
        step_fn, evaluation_fn = self._prepared(graphdef, state, phase)
        if first == self.not_evaluated and self._due(first, phase):
            if (evaluated := self._evaluate(evaluation_fn, state, first)) is None:
                return state
            # The row comes last: it says that all of this is done.
            self.checkpoints.rate(first, self._score(first, evaluated))
            self._record(first, evaluated)
        batches = sheltered(self.iterator)
        started = time.perf_counter()
        for step in range(first + 1, phase.last + 1):
            ends = step == phase.last
            with self.trace.step(step, state, compiles=step == first + 1):
                self.watch.note(step, "reading data")
                batch = put_batch(next(batches), self.mesh)
                self.watch.note(step, "computing")
                state, metrics = step_fn(state, batch)
            self.trace.end_step(state, last=ends)
            if step % config.train.max_skipped == 0:
                self._check_streak(step, state, metrics)
            if step % config.train.log_every == 0 or ends:
                speed = (step - first) / (time.perf_counter() - started)
                self._log(step, state, metrics, speed)
            self.progress.advance(step)
            self.stop.look()
            evaluated = None
            if self._due(step, phase):
                evaluated = self._evaluate(evaluation_fn, state, step)
            if evaluated is not None:
                self._record(step, evaluated)
            self.save_due |= step % config.checkpoint.every == 0
            # Checkpoints of a run that has diverged would push out the good ones: while steps are
            # skipped, they wait.
            if ends or self.stop.requested or (self.save_due and not _skipped_in_a_row(state)):
                self._save(state, step, evaluated)
            if self.stop.requested:
                break
        return state

    def _prepared(self, graphdef: nnx.GraphDef, state: TrainState, phase: Phase) -> tuple[Any, Any]:
        """The steps of training and of evaluation, which compile when they are first made."""
        config, task = self.task.config, self.task
        model = nnx.merge(graphdef, state.params, state.other)
        model_cost = cost(model, task.example)
        log.info(
            "%s; %d parameters, %d multiplications an example if dense; workdir %s",
            task.describe(),
            model_cost.parameters,
            model_cost.total_dense_multiplications,
            self.workdir,
        )
        log_memory(estimate_memory(graphdef, state, task, self.mesh))
        step_fn = make_train_step(
            graphdef,
            build_optimizer(config, model, self.schedules, made=phase.first),
            self.schedules,
            task,
            CostWeights.of(model_cost),
            config.seed,
            state_layout(state, self.mesh),
        )
        model.eval()
        return step_fn, make_evaluation_step(nnx.graphdef(model), task, self.mesh)

    def _log(self, step: int, state: TrainState, metrics: Metrics, steps_per_second: float) -> None:
        self._check_streak(step, state, metrics)
        row = {name: float(value) for name, value in metrics.items()}
        row["skipped_steps"] = skipped = int(state.opt_state.total_notfinite)
        if skipped > self.skipped:
            log.warning("%d steps had no finite loss or gradients and were skipped", skipped)
        self.skipped = skipped
        speed = steps_per_second * self.task.units_per_step
        self.rows.write({"step": step, **row, f"{self.task.unit}s_per_second": speed})
        self.progress.show(row)

    def _check_streak(self, step: int, state: TrainState, metrics: Metrics) -> None:
        in_a_row = _skipped_in_a_row(state)
        if in_a_row >= self.task.config.train.max_skipped:
            raise UserError(
                f"the loss is {float(metrics['train_loss'])} at step {step}, and the last "
                f"{in_a_row} steps were skipped; lower optimizer.learning_rate or set "
                f"optimizer.clip_norm (checkpoints in {self.workdir} are kept)"
            )

    def _due(self, step: int, phase: Phase) -> bool:
        """Whether the model is evaluated after a step."""
        return step % self.task.config.train.eval_every == 0 or step == phase.last

    def _evaluate(
        self, evaluation_fn: Any, state: TrainState, step: int
    ) -> dict[str, float] | None:
        """Results on the validation split.

        None if the run is asked to stop meanwhile, since time is short then; it evaluates when it
        goes on.
        """
        self.not_evaluated = step
        batches = self.task.evaluation_batches("validation", batch_shard(self.mesh))
        batches = self.watch.through(batches, step, "evaluating")
        some = itertools.takewhile(lambda _: not self.stop.look(), batches)
        if not self.stop.requested:
            sums = evaluate_batches(evaluation_fn, state.params, state.other, some, self.mesh)
        if self.stop.requested:
            # To end its workers takes time that is needed to save.
            self.abandoned = batches
            return None
        self.not_evaluated = None
        return self.task.results(sums, "validation")

    def _record(self, step: int, evaluated: dict[str, float]) -> None:
        row = {f"validation_{name}": value for name, value in evaluated.items()}
        self.rows.write({"step": step, **row})
        self.progress.show(row)

    def _save(self, state: TrainState, step: int, evaluated: dict[str, float] | None) -> None:
        self.watch.note(step, "saving a checkpoint")
        score = self._score(step, evaluated)
        self.checkpoints.save(step, state._asdict(), self.iterator, score=score)
        self.saved_step, self.save_due = step, False

    def _score(self, step: int, evaluated: dict[str, float] | None) -> float | None:
        settled = _settled(self.task.config, step)
        return self.task.score(evaluated) if evaluated and settled else None


def _skipped_in_a_row(state: TrainState) -> int:
    """The last steps without a finite loss and gradients, whose updates were left out."""
    return int(state.opt_state.notfinite_count)


def _was_evaluated(workdir: Path, step: int) -> bool:
    """Whether the model was evaluated after a step, as process 0 has it."""
    rows = read_metrics(workdir)
    found = any(row.get("step") == step and "validation_loss" in row for row in rows)
    return bool(of_all(found)[0])


def _settled(config: ConfigDict, step: int) -> bool:
    """Whether the cost has reached its target, so that accuracies can be compared."""
    settles = config.controller.end if config.controller.name == "budget" else 0.0
    return step > phases(config)[-1].first and step >= settles * config.train.steps
