"""Tells when a run stands still, and which of its processes it waits for."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gaudi_jax.training.processes import is_primary
from gaudi_jax.training.workdir import write_atomically

log = logging.getLogger(__name__)

FOLDER = "processes"
#: Looks at all processes so many times in the time after which one counts as stalled.
LOOKS = 10


class Doing(NamedTuple):
    """What a process does.

    Attributes:
        step: that it makes.
        what: such as "reading data".
        since: seconds since the epoch, by the clock of its host.
        heard: when it last said so, likewise.
        host: its name.
        patience: how many limits it may do that before it counts as stalled.
    """

    step: int
    what: str
    since: float
    heard: float
    host: str
    patience: int = 1


class StallWatch:
    """Warns when a process does the same for too long, or is not heard from any more.

    Each process says what it does in a file in the workdir. The first one reads them all, since a
    process that stalls lets all others wait: its name is what is looked for. A context manager.

    Args:
        workdir: of the run, seen by all processes.
        limit: seconds without a change after which a process counts as stalled, positive.

    Example:
        >>> import tempfile
        >>> from gaudi_jax.training.stall import StallWatch
        >>> with tempfile.TemporaryDirectory() as folder, StallWatch(folder, 600) as watch:
        ...     watch.note(1, "reading data")
        ...     watch.stalled()
        []
    """

    def __init__(self, workdir: str | Path, limit: float):
        self._folder, self._limit = Path(workdir) / FOLDER, limit
        self._host = socket.gethostname()
        self._doing = self._now(0, "starting")
        self._never_heard = self._doing._replace(what="starting", host="an unknown host")
        self._told: dict[int, tuple[int, str]] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look_again_and_again, daemon=True)

    def __enter__(self) -> "StallWatch":
        self._folder.mkdir(exist_ok=True)
        for number in range(jax.process_count()) if is_primary() else ():
            # What is left of an earlier start is not news.
            self._file(number).unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        self._thread.join()

    def note(self, step: int, what: str, *, patience: int = 1) -> None:
        """Says what this process does from now on, and how many limits it may take."""
        self._doing = self._now(step, what)._replace(patience=patience)

    def through(self, items: Iterable[Any], step: int, what: str) -> Iterator[Any]:
        """Items of a long work, each of which shows that it goes on."""
        for item in items:
            self.note(step, what)
            yield item

    def stalled(self) -> list[str]:
        """What is to be said of processes that have done the same, or nothing, for too long."""
        now = time.time()
        lines = []
        for number in range(jax.process_count()):
            doing = self._read(number) or self._never_heard
            silent, same = now - doing.heard, now - doing.since
            stalled = silent >= self._limit or same >= doing.patience * self._limit
            if not stalled or self._told.get(number) == doing[:2]:
                continue
            self._told[number] = doing[:2]
            who = f"process {number} on {doing.host}" if jax.process_count() > 1 else "the run"
            if silent >= self._limit:
                lines.append(f"{who} has not been heard from for {silent:.0f} s ({doing.what})")
            else:
                lines.append(f"{who} has been {doing.what} at step {doing.step} for {same:.0f} s")
        return lines

    def _look_again_and_again(self) -> None:
        while not self._end.wait(self._limit / LOOKS):
            doing = self._doing._replace(heard=time.time())
            with suppress(OSError):  # a disk that is full: training itself will tell
                write_atomically(self._file(jax.process_index()), json.dumps(doing))
            for line in self.stalled() if is_primary() else ():
                log.warning("%s", line)

    def _read(self, number: int) -> Doing | None:
        if number == jax.process_index():
            return self._doing._replace(heard=time.time())
        try:
            return Doing(*json.loads(self._file(number).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # not there yet
            return None

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.json"

    def _now(self, step: int, what: str) -> Doing:
        now = time.time()
        return Doing(step, what, now, now, self._host)
