"""How activations go through the blocks of a transformer: where they lie, and what is kept."""

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

#: Mesh axes over which the examples of a batch are split.
BATCH_AXES = ("data", "fsdp")


def through_blocks(
    blocks: Iterable[Any], x: Float[Array, "B T D"], *, rngs: nnx.Rngs | None, remat: bool
) -> Float[Array, "B T D"]:
    """Maps tokens to tokens through one block after the other.

    Args:
        blocks: called as ``block(x, rngs=rngs)``.
        x: tokens.
        rngs: random keys for dropout, or None.
        remat: keep only what goes into each block, and compute the rest of its activations again
            in the backward pass: about a third more work, for the memory of one block.
    """

    def apply(block: Any, x: Array, rngs: nnx.Rngs | None) -> Array:
        return block(x, rngs=rngs)

    step = nnx.remat(apply) if remat else apply
    for block in blocks:
        x = split_by_example(step(block, x, rngs))
    return x


def split_by_example(x: Array) -> Array:
    """Keeps activations split by examples, where the mesh in use has axes ``data`` or ``fsdp``.

    Without this the compiler may gather a batch to save moving parameters. On other meshes, and
    without one (`jax.set_mesh`), the activations are left as they are.

    Args:
        x: shape (B, ...).

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.models.blocks import split_by_example
        >>> split_by_example(jnp.ones((2, 3))).shape
        (2, 3)
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(axis for axis in BATCH_AXES if types.get(axis) == AxisType.Auto)
    if not axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
