"""Where arrays lie: the mesh of devices, and how parameters and batches are split over it.

The mesh has three axes. Batches are split over ``data`` and ``fsdp``. Parameters and the
optimizer's state are split over ``fsdp`` and ``tensor``, by rules on their names: over ``fsdp``
they are only stored in parts and gathered for use (fully sharded data parallelism), over
``tensor`` the work is split as well. The compiler puts in the communication (GSPMD): the numbers
are those of one device, but for rounding.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gaudi_jax.errors import UserError
from gaudi_jax.training.controllers import names

AXES = ("data", "fsdp", "tensor")
#: Sizes of a mesh on which every device has a whole model.
DATA_PARALLEL = {"data": -1, "fsdp": 1, "tensor": 1}
BATCH = PartitionSpec(("data", "fsdp"))

#: By the last names of a parameter, the mesh axes of its first and its last axis; the rest (biases,
#: norms, widths and locations) lies whole on every device. Blocks are to a structured layer what
#: hidden units are to an MLP: split over `tensor`, each device holds some of them, and their
#: results are added. Of two dense layers in a row the first gives parts that the second takes.
RULES: Mapping[tuple[str, ...], tuple[str, str]] = {
    ("v",): ("tensor", "fsdp"),
    ("u",): ("tensor", "fsdp"),
    ("sparse",): ("tensor", "fsdp"),
    ("out", "kernel"): ("tensor", "fsdp"),
    ("fc2", "kernel"): ("tensor", "fsdp"),
    ("kernel",): ("fsdp", "tensor"),
    ("embedding",): ("tensor", "fsdp"),
    ("position_embedding",): ("", "fsdp"),
}


def make_mesh(sizes: Mapping[str, int], *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config.

    Args:
        sizes: of the axes ``data``, ``fsdp`` and ``tensor``; -1 for one of them takes the devices
            that the others leave.
        devices: None for all, of all processes.

    Raises:
        UserError: an axis is unknown or not positive, or the sizes do not fit the devices.

    Example:
        >>> from gaudi_jax.training.mesh import DATA_PARALLEL, make_mesh
        >>> dict(make_mesh(DATA_PARALLEL).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    # In the order of processes, so that each holds neighbouring rows of a batch. jax.make_mesh
    # follows the wires between TPUs instead, which lead from host to host.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(ordered).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, int, int]:
    """The sizes of the mesh's axes, with -1 filled in.

    Raises:
        UserError: an axis is unknown or not positive, or the sizes do not fit the devices.

    Example:
        >>> from gaudi_jax.training.mesh import mesh_shape
        >>> mesh_shape({"data": -1, "fsdp": 2, "tensor": 1}, 8)
        (4, 2, 1)
    """
    if set(sizes) != set(AXES):
        raise UserError(f"mesh has the axes {', '.join(sizes)}; give {', '.join(AXES)}")
    shape = [sizes[axis] for axis in AXES]
    text = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh {text}: sizes must be at least 1, and at most one of them -1")
    if -1 in shape:
        rest = devices // -math.prod(shape)
        shape[shape.index(-1)] = rest
    if math.prod(shape) != devices or 0 in shape:
        raise UserError(
            f"mesh {text} does not fit {devices} devices; give sizes whose product is {devices}, "
            "or -1 for one of them"
        )
    return shape[0], shape[1], shape[2]


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Checks that a batch can be split over a mesh.

    Args:
        mesh: with the axes ``data`` and ``fsdp``.
        batch_size: of a training step.
        accumulate: micro-batches of a step, which follow one another.

    Raises:
        UserError: it cannot be split evenly.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulate
    if batch_size < 1 or batch_size % parts:
        into = f" and train.{accumulate=} micro-batches" if accumulate > 1 else ""
        raise UserError(
            f"data.batch_size={batch_size} cannot be split over {parts // accumulate} devices{into}"
            f" (mesh.data times mesh.fsdp); use a positive multiple of {parts}"
        )


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads: its number, and the number of parts.

    Processes that differ only in their places on the axis ``tensor`` read the same part.

    Raises:
        UserError: the devices of this process do not hold neighbouring rows of a batch.

    Example:
        >>> from gaudi_jax.training.mesh import DATA_PARALLEL, batch_shard, make_mesh
        >>> batch_shard(make_mesh(DATA_PARALLEL))
        (0, 1)
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((rows,)).values()
    own = sorted({place[0].indices(rows)[0] for place in places if place is not None})
    first, count = own[0], len(own)
    if own != list(range(first, first + count)) or rows % count or first % count:
        raise UserError(
            f"the devices of process {jax.process_index()} hold parts {own} of {rows} of a batch; "
            "choose mesh.tensor so that it divides, or is a multiple of, a process's devices"
        )
    return first // count, rows // count


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Where each array of a model's parameters, or of an optimizer's state for them, lies.

    Args:
        state: nested dicts of arrays (shapes are enough), as `split_model` gives them.
        mesh: with the axes ``fsdp`` and ``tensor``.

    Returns:
        The same tree of shardings. An axis that a mesh axis does not divide is not split.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, _spec(names(path), x.shape, mesh)), state
    )


def _spec(path: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    last = next((RULES[path[-n:]] for n in (2, 1) if path[-n:] in RULES), None)
    if last is None or len(shape) < 2:
        return PartitionSpec()
    spec: list[str | None] = [None] * len(shape)
    for axis, name in zip((0, -1), last, strict=True):
        if name and shape[axis] % mesh.shape[name] == 0:
            spec[axis] = name
    return PartitionSpec(*spec)


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays that every process has whole onto the devices of all."""

    def put(x: Any, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])

    return jax.tree.map(put, tree, shardings)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Splits a batch over the mesh's devices; each process gives its `batch_shard`."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
