"""TensorFlow Datasets that are prepared on this machine, read without TensorFlow."""

from collections.abc import Mapping
from typing import Any

from gaudi_jax.errors import UserError


def open_prepared(name: str) -> tuple[Any, Mapping[str, Any]]:
    """A prepared set: its `tfds.core.DatasetInfo`, and a random-access source for each split.

    Raises:
        UserError: the set is unknown or not prepared; it is never downloaded.

    Example:
        >>> from gaudi_jax.data.prepared import open_prepared
        >>> info, sources = open_prepared("mnist")  # doctest: +SKIP
    """
    import tensorflow_datasets as tfds  # slow to import

    remedy = (
        f"prepare it once with tfds.data_source({name!r}), which may need TensorFlow, or set "
        "TFDS_DATA_DIR to where it lies"
    )
    try:
        info = tfds.builder(name).info
        # No download by surprise: it may be of hundreds of gigabytes.
        sources = tfds.data_source(name, download=False)
    except Exception as error:
        # Many kinds of errors, from unknown names to missing files, and some with long texts.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"cannot open the data set tfds:{name} ({reason}); {remedy}") from error
    if not sources:
        raise UserError(f"the data set tfds:{name} is not prepared; {remedy}")
    return info, sources
