"""Products that XLA does not have, as kernels for accelerators."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_portable = ContextVar("portable", default=False)


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """What is traced inside uses no kernels, for programs that run elsewhere too.

    Example:
        >>> from gaudi_jax import kernels
        >>> with kernels.portable():
        ...     kernels.on_hopper()
        False
    """
    token = _portable.set(True)
    try:
        yield
    finally:
        _portable.reset(token)


def on_hopper() -> bool:
    """Whether kernels for GPUs of compute capability 9.0 run on JAX's first device."""
    capable = getattr(jax.devices()[0], "compute_capability", None) == "9.0"
    # What the kernels are written with came with JAX 0.11.
    return capable and jax.__version_info__ >= (0, 11) and not _portable.get()
