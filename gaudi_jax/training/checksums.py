"""Checksums of arrays that may be split over devices and processes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def described(
    leaves: Mapping[str, Any], total: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of arrays by name.

    Args:
        leaves: arrays; of those that are spread over processes each has its parts.
        total: from the checksums of this process's parts to those of the whole arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.training.checksums import described
        >>> described({"zeros": jnp.zeros(3)})
        {'zeros': {'shape': [3], 'dtype': 'float32', 'checksum': 0}}
    """
    # All are begun before the first is waited for.
    sums = [_part_sums(leaf) for leaf in leaves.values()]
    own = np.array([sum(map(int, parts)) % 2**32 for parts in sums], np.uint32)
    return {
        name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": int(checksum)}
        for (name, leaf), checksum in zip(leaves.items(), total(own), strict=True)
    }


def _part_sums(leaf: Any) -> list[Array]:
    """Checksums of the parts of an array that this process has, each once."""
    # One device at a time: a sum over all would make them wait for one another.
    return [
        _checksum(part.data, [place.start or 0 for place in part.index], leaf.shape)
        for part in jnp.asarray(leaf).addressable_shards
        if part.replica_id == 0
    ]


@partial(jax.jit, static_argnames="shape")
def _checksum(part: Array, starts: list[int], shape: tuple[int, ...]) -> Array:
    """Sum modulo 2^32 of an array's bits, each number of which has an odd weight by its place.

    Unlike a CRC it is the sum of those of the array's parts; and a single changed number always
    changes it, since odd weights have inverses.

    Args:
        part: of the array.
        starts: the place of its first entry in the array, on each axis.
        shape: of the array.
    """
    if part.dtype == jnp.bool_:
        part = part.astype(jnp.uint8)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(part.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(part, narrow).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):  # one more than of the array, for numbers of 64 bits
        start = jnp.uint32(starts[axis]) if axis < len(shape) else 0
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) + start
        index = index * jnp.uint32(shape[axis] if axis < len(shape) else size) + place
    # The mixing of MurmurHash3, so that neighbours have unrelated weights.
    weight = index * jnp.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 16)) * jnp.uint32(0x85EBCA6B)
    weight = (weight ^ (weight >> 13)) | jnp.uint32(1)
    return (bits * weight).sum(dtype=jnp.uint32)
