"""Metrics of a run: rows on disk, TensorBoard curves, and a live line."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gaudi_jax.errors import UserError
from gaudi_jax.training.processes import is_primary
from gaudi_jax.training.workdir import write_atomically

METRICS_FILE = "metrics.jsonl"
#: Seconds between lines where the output is no terminal.
PLAIN_INTERVAL = 10.0
#: What the live line shows, by the names of metrics.
SHOWN = {
    "train_loss": "loss",
    "train_accuracy": "accuracy",
    "validation_loss": "validation loss",
    "validation_accuracy": "validation accuracy",
    "relative_multiplications": "cost",
}

Row = dict[str, Any]


class MetricLog:
    """Appends rows of numbers to ``metrics.jsonl`` and to TensorBoard event files.

    A context manager. Rows are strict JSON: infinite and undefined numbers become the strings
    "inf", "-inf" and "nan". Of several processes only the first one writes.

    Args:
        workdir: directory of the run.
        resumed_from: step of the checkpoint that the run goes on from. Later rows and a
            half-written last line are dropped, and a row ``{"resumed_from": step}`` is written.
            None starts afresh.

    Example:
        >>> import tempfile
        >>> from gaudi_jax.training.metrics import MetricLog, read_metrics
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with MetricLog(folder) as log:
        ...         log.write({"step": 1, "train_loss": 0.5})
        ...     read_metrics(folder)
        [{'step': 1, 'train_loss': 0.5}]
    """

    def __init__(self, workdir: str | Path, resumed_from: int | None = None):
        if not is_primary():
            return
        self._path = Path(workdir) / METRICS_FILE
        kept: list[Row] = []
        if resumed_from is not None:
            kept = [row for row in read_metrics(workdir) if _is_before(row, resumed_from)]
            kept.append({"resumed_from": resumed_from})
        write_atomically(self._path, "".join(map(_line, kept)))
        self._file = self._path.open("a", encoding="utf-8")
        # What a killed run wrote after its last checkpoint disappears from the curves.
        self._curves = _Curves(Path(workdir) / "tensorboard", hidden_from=(resumed_from or 0) + 1)

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if is_primary():
            # After an error, that the rest cannot be written either is no news.
            with suppress(OSError) if kind else self._naming_the_file():
                self._file.close()
                self._curves.close()

    def write(self, row: Row) -> None:
        """Writes a row; its numbers become TensorBoard scalars at its "step"."""
        if not is_primary():
            return
        with self._naming_the_file():
            self._file.write(_line(row))
            self._file.flush()
            self._curves.write(row)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        """Python does not tell which file cannot be written, once it is open."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


class _Curves:
    """TensorBoard events, written at once: a thread that finds a full disk could tell nobody."""

    def __init__(self, folder: Path, hidden_from: int):
        # Slow to import.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._event, self._scalar = event_pb2.Event, summary.scalar
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(self._event(step=hidden_from, session_log=start))

    def write(self, row: Row) -> None:
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                scalar = self._scalar(name, value)
                event = self._event(wall_time=time.time(), step=row["step"], summary=scalar)
                self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(workdir: str | Path) -> list[Row]:
    """The rows of a run; a half-written last line is passed over.

    Raises:
        UserError: another line is damaged.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    # What follows the last newline is empty, or was being written when the run was killed.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({name: _number(value) for name, value in row.items()})
        except (ValueError, AttributeError):
            raise UserError(
                f"{path}, line {number} is not a row of metrics; remove the line"
            ) from None
    return rows


class Progress:
    """The live line of a run: step, loss, accuracy, units a second, time left, relative cost.

    A context manager. Where stderr is no terminal, whole lines at intervals. Of several processes
    only the first one shows it.

    Args:
        steps: steps of the whole run.
        first_step: steps made already.
        unit: what is counted, such as "image".
        units_per_step: how many of them a step takes.
    """

    def __init__(self, steps: int, first_step: int, *, unit: str, units_per_step: int):
        self._unit, self._units = unit, units_per_step
        self._terminal = sys.stderr.isatty() and is_primary()
        self._prints_lines = is_primary() and not self._terminal
        self._shown: dict[str, float] = {}
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=steps * units_per_step,
            initial=first_step * units_per_step,
            unit=unit,
            unit_scale=True,
            disable=not self._terminal,
            dynamic_ncols=True,
        )
        self._steps, self._first_step = steps, first_step
        self._step = self._printed_step = first_step
        self._started = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        if self._prints_lines and self._step != self._printed_step:
            self._print_line(time.monotonic())

    def show(self, row: Mapping[str, float]) -> None:
        """Takes the newest numbers."""
        self._shown |= {SHOWN[name]: value for name, value in row.items() if name in SHOWN}

    def advance(self, step: int) -> None:
        """Says that a step has been made."""
        self._bar.set_description(f"step {step}/{self._steps}", refresh=False)
        self._bar.set_postfix({k: f"{v:.3f}" for k, v in self._shown.items()}, refresh=False)
        self._bar.update(self._units)
        now = time.monotonic()
        self._step = step
        if self._prints_lines and now - self._last_line >= PLAIN_INTERVAL:
            self._print_line(now)

    def _print_line(self, now: float) -> None:
        self._last_line, self._printed_step = now, self._step
        speed = (self._step - self._first_step) / (now - self._started)
        numbers = "".join(f", {name} {value:.3f}" for name, value in self._shown.items())
        left = time.strftime("%H:%M:%S", time.gmtime((self._steps - self._step) / speed))
        print(
            f"step {self._step}/{self._steps}{numbers}, {speed * self._units:.0f} {self._unit}s/s, "
            f"{left} left",
            file=sys.stderr,
            flush=True,
        )


def _place(row: Row) -> float:
    return row["step"] if "step" in row else row["resumed_from"]


def _is_before(row: Row, resumed_from: int) -> bool:
    """Whether a row was written before the checkpoint of a step was."""
    # A phase begins after the checkpoint of its first step.
    return _place(row) < resumed_from + ("phase" not in row)


def _line(row: Row) -> str:
    return json.dumps({name: _text(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _text(value: Any) -> Any:
    return value if math.isfinite(value) else str(value)


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value
