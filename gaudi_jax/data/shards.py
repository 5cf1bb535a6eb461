"""Which rows of every batch a process reads, where several processes train together.

Parts are neighbouring rows: put together in order they are the batch that one process would read.
"""

import grain

from gaudi_jax.errors import UserError

#: (number of the part, number of parts)
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)


def part_size(batch_size: int, shard: Shard) -> int:
    """Rows of a part of a batch.

    Raises:
        UserError: the batch cannot be split evenly.

    Example:
        >>> from gaudi_jax.data.shards import part_size
        >>> part_size(8, (0, 2))
        4
    """
    _, parts = shard
    if batch_size % parts:
        raise UserError(
            f"data.batch_size={batch_size} cannot be split into {parts} parts; use a multiple of "
            f"{parts}"
        )
    return batch_size // parts


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below a size.

    Example:
        >>> from gaudi_jax.data.shards import round_up
        >>> round_up(12, 8)
        16
    """
    return -(-size // multiple) * multiple


def batched(
    dataset: grain.MapDataset,
    batch_size: int,
    shard: Shard,
    *,
    drop_remainder: bool,
    in_shared_memory: bool = False,
) -> grain.MapDataset:
    """The batches of a data set, or one part of each.

    Args:
        dataset: examples.
        batch_size: examples a batch, over all parts.
        shard: number of the part, and number of parts.
        drop_remainder: leave out a last batch that is not full.
        in_shared_memory: stack examples where another process can read them, which saves a worker a
            copy of every batch.

    Example:
        >>> import grain
        >>> from gaudi_jax.data.shards import batched
        >>> data = grain.MapDataset.range(8)
        >>> [part.tolist() for part in batched(data, 4, (1, 2), drop_remainder=True)]
        [[2, 3], [6, 7]]
    """
    part, parts = shard
    batches = dataset.batch(part_size(batch_size, shard), drop_remainder=drop_remainder)
    if in_shared_memory:
        batches.enable_shared_memory_output()
    return batches.slice(slice(part, None, parts)) if parts > 1 else batches
