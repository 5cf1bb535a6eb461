"""The one exception for mistakes that a user can mend, and how commands tell of it."""

import errno
import logging
import sys
from collections.abc import Callable

import jax

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


class UserError(ValueError):
    """Input that the user can correct: one sentence that names the value and the remedy.

    It is a ``ValueError``, so code that calls the library may catch it as such; ``main.py`` prints
    it without a traceback and exits with a non-zero status.

    Example:
        >>> from gaudi_jax.errors import UserError
        >>> raise UserError("width target 2.0 is outside (0, 1]; give a fraction such as 0.3")
        Traceback (most recent call last):
        ...
        gaudi_jax.errors.UserError: width target 2.0 is outside (0, 1]; give a fraction such as 0.3
    """


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command; a user's mistake is printed in one sentence on stderr, without a traceback.

    So is a disk that is full or may not be written to, and a device whose memory is.

    Returns:
        0, or 1 after a mistake.

    Example:
        >>> from gaudi_jax.errors import exit_status
        >>> exit_status(lambda: None)
        0
    """
    _silence_checkpoint_threads()
    try:
        command()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(
            f"error: a device has too little memory ({reason(error)[:200]}); set "
            "train.accumulate=4 or model.remat=True, split the model with mesh.fsdp, or take a "
            "smaller batch; what was saved before is kept",
            file=sys.stderr,
        )
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(
            f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); make room "
            "or choose another place; what was saved before is kept",
            file=sys.stderr,
        )
    else:
        return 0
    return 1


def _silence_checkpoint_threads() -> None:
    """Where a checkpoint cannot be written, one error is told, not that of every array.

    Orbax and tensorstore write arrays in threads and tasks of their own; each that fails prints a
    traceback, some only after the command has told of the error, which it gets as an exception.
    """
    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # exceptions of tasks nobody awaits
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _print_unraisable


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _print_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def reason(error: Exception) -> str:
    """What an error of another package says, in one line.

    Example:
        >>> from gaudi_jax.errors import reason
        >>> reason(OSError("no such file")), reason(EOFError())
        ('no such file', 'EOFError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
