"""SIGTERM, which asks a run to save and end: from a scheduler, or before a preemption."""

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils


class Stop:
    """Whether the run has been asked to stop."""

    requested = False
    #: How often any run of this process has looked: JAX tells all processes at the same number,
    #: which a dense phase before this one must not have used up.
    looks = itertools.count(1)

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

    def request(signum, frame):
        stop.requested = True

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
