"""A trace of some steps of a run: what ran when, on the host and on the devices."""

import logging
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)


class StepTrace:
    """Traces steps of a run with `jax.profiler`, into its TensorBoard directory.

    A context manager, whose end also ends the trace. The first steps after `first` that this
    process makes are traced, but none that compiles, nor any of a later phase: a trace covers one
    program, and a run that is continued has one too. Of several processes the first one traces.

    Args:
        workdir: directory of the run; the trace lies in ``tensorboard/plugins/profile``.
        first: steps of the run before the trace, at least 0.
        steps: how many are traced; 0 for none.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.training.profile import StepTrace
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     double, x = jax.jit(lambda x: 2 * x), jnp.ones(4)
        ...     with StepTrace(folder, steps=1) as trace:
        ...         for step in (1, 2, 3):
        ...             with trace.step(step, x, compiles=step == 1):
        ...                 x = double(x)
        ...             trace.end_step(x)
        ...     len(list(Path(folder).rglob("*.xplane.pb")))
        1
    """

    def __init__(self, workdir: str | Path, *, first: int = 0, steps: int = 0):
        self._directory = Path(workdir) / "tensorboard"
        self._first = first
        self._waits = steps > 0 and jax.process_index() == 0
        self._steps = steps
        self._traced: list[int] = []
        self._runs = False

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._runs:
            self._stop()
        elif self._waits:
            log.warning(
                "no step was traced: none came after step %d that was compiled already", self._first
            )

    def step(self, step: int, state: Any, *, compiles: bool) -> jax.profiler.StepTraceAnnotation:
        """A context in which a step is made; the trace begins here if it is to.

        Args:
            step: number of the step, from 1.
            state: arrays that the step before made.
            compiles: whether the step will be compiled.
        """
        if self._waits and step > self._first and not compiles:
            jax.block_until_ready(state)  # what still runs belongs to earlier steps
            jax.profiler.start_trace(self._directory)
            self._waits, self._runs = False, True
        if self._runs:
            self._traced.append(step)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end_step(self, state: Any, *, last: bool = False) -> None:
        """Ends the trace after its last step, once that has been computed.

        Args:
            state: arrays that the step made.
            last: whether no other step of the same program follows.
        """
        if self._runs and (len(self._traced) == self._steps or last):
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._runs = False
        log.info(
            "trace of steps %d to %d in %s; look at it with: pip install xprof tensorboard && "
            "tensorboard --logdir=%s",
            self._traced[0],
            self._traced[-1],
            self._directory / "plugins" / "profile",
            self._directory,
        )
