"""TensorFlow Datasets that are prepared on this machine, read without TensorFlow."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gaudi_jax.errors import UserError, reason


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """A split of a prepared set, read when it is asked for.

    Attributes:
        name: of the set, for messages.
        examples: what TensorFlow Datasets reads.
    """

    name: str
    examples: Sequence[Any]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.examples[index]
        except IndexError:
            raise
        # Files that are gone or damaged, of any format, found in the middle of a run.
        except Exception as error:
            raise UserError(
                f"cannot read example {index} of tfds:{self.name} ({reason(error)}); restore its "
                "files and run the same command again"
            ) from error

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def open_prepared(name: str) -> tuple[Any, Mapping[str, PreparedSource]]:
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
        raise UserError(
            f"cannot open the data set tfds:{name} ({reason(error)}); {remedy}"
        ) from error
    if not sources:
        raise UserError(f"the data set tfds:{name} is not prepared; {remedy}")
    return info, {split: PreparedSource(name, source) for split, source in sources.items()}
