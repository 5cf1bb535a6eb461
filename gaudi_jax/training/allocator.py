"""How the C library keeps memory between the steps of a run on CPUs."""

import ctypes
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

#: Parameters of glibc's mallopt(3), and what they are set to: nothing is handed back to the system.
_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: large pieces come from the heap
    -8: 1,  # M_ARENA_MAX: of which there is one; others are too small for them
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: its end is kept
    -2: 2**26,  # M_TOP_PAD: and it grows by much at once
}


def keep_freed_memory() -> None:
    """Has the C library keep what is freed, for the next step to use.

    On CPUs XLA allocates the buffers of a step anew. Pieces of some megabytes go back to the system
    when they are freed, which then hands out zeroed pages again, one fault for each: a third of the
    time of training a small model. From this call on the process keeps the most that it ever took.
    It must come before JAX starts its devices, whose threads would have heaps of their own. Does
    nothing where the C library is not glibc.

    Example:
        >>> from gaudi_jax.training.allocator import keep_freed_memory
        >>> keep_freed_memory()
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            for option, value in _OPTIONS.items():
                library.mallopt(option, value)


def has_only_cpus() -> bool:
    """Whether JAX can have no other devices than CPUs, told before it starts any.

    Example:
        >>> from gaudi_jax.training.allocator import has_only_cpus
        >>> isinstance(has_only_cpus(), bool)
        True
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = *entry_points(group="jax_plugins"), find_spec("jax_plugins"), find_spec("libtpu")
    return not any(plugins)
