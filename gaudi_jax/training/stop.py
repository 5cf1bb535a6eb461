"""SIGTERM, which asks a run to save and end: from a scheduler, or before a preemption."""

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopped(BaseException):
    """A stop was asked for in the middle of work that is left at once: an interrupt, no error."""


class Stop:
    """Whether the run has been asked to stop."""

    requested = False
    _at_once = False
    #: How often any run of this process has looked: JAX tells all processes at the same number,
    #: which a dense phase before this one must not have used up.
    looks = itertools.count(1)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that is left when a stop is asked for: what is made of it is not saved half done.

        Raises:
            Stopped: that happened, in a run of one process. Several end the work together.
        """
        self._at_once = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def request(self, *_: Any) -> None:
        """Asks for it; the handler of a signal."""
        self.requested = True
        if self._at_once:
            self._at_once = False  # the work is left in peace
            raise Stopped

    def look(self) -> bool:
        """Asks whether any of several processes got the signal; all are told at the same step."""
        number = next(self.looks)
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(number):
            self.requested = True
        return self.requested


@contextmanager
def stop_on_sigterm() -> Iterator[Stop]:
    """Turns SIGTERM (a preemption) into a request that the loop sees after the current step."""
    stop = Stop()
    if jax.process_count() > 1:  # JAX itself listens for the signal, and tells the others
        yield stop
        return

    previous = signal.signal(signal.SIGTERM, stop.request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
