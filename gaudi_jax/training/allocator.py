"""How the C library keeps memory between the steps of a run on CPUs."""

import ctypes
import sys

#: Parameters of glibc's mallopt(3), and what they are set to: nothing is handed back to the system.
_OPTIONS = {
    -4: 0,  # M_MMAP_MAX: large pieces come from the heap
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: whose end is kept
    -2: 2**26,  # M_TOP_PAD: and grows by much at once
}


def keep_freed_memory() -> None:
    """Has the C library keep what is freed, for the next step to use.

    XLA allocates the buffers of a step anew on CPUs. Pieces of some megabytes go back to the system
    when they are freed, which then hands out zeroed pages again, one fault for each: a third of the
    time of training a small model. So the process keeps the most that it ever took. Does nothing
    where the C library is not glibc.

    Example:
        >>> from gaudi_jax.training.allocator import keep_freed_memory
        >>> keep_freed_memory()
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            for option, value in _OPTIONS.items():
                library.mallopt(option, value)
