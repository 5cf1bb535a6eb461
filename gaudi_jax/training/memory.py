"""How much memory of each device a training step will take, before it is made.

An estimate by arithmetic on shapes: what the state takes is exact, what the activations take is
what the backward pass keeps if nothing is fused. Compilers save some of that and need temporaries
besides (docs/results.md has both for ViT-B).
"""

import logging
import os
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from gaudi_jax.training.step import TrainState
from gaudi_jax.training.tasks import Task

log = logging.getLogger(__name__)


class Memory(NamedTuple):
    """Bytes on each device.

    Attributes:
        parameters: of the model.
        gradients: as much again.
        optimizer: its state.
        activations: kept for the backward pass of one micro-batch.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_readable(size)}" for name, size in self._asdict().items())
        return f"{parts}; {_readable(sum(self))} together"


def estimate_memory(graphdef: nnx.GraphDef, state: TrainState, task: Task, mesh: Mesh) -> Memory:
    """What a training step takes on each device of a mesh.

    Args:
        graphdef: of the model in training mode.
        state: arrays or their shapes, with shardings on the mesh.
        task: the data, and how large a batch is.
        mesh: with the axes ``data``, ``fsdp`` and ``tensor``.
    """
    parameters = _bytes_per_device(state.params) + _bytes_per_device(state.other)
    config = task.config
    splits = config.train.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]
    kept = [_kept_bytes(graphdef, state, task, rows) for rows in (1, 2)]
    return Memory(
        parameters=parameters,
        gradients=_bytes_per_device(state.params),
        optimizer=_bytes_per_device(state.opt_state),
        # The difference leaves out what does not grow with the batch, such as the parameters.
        activations=(kept[1] - kept[0]) * config.data.batch_size // splits,
    )


def device_memory() -> int | None:
    """Bytes of memory of one of this process's devices; None where it cannot be known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # they share the host's
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return pages * size // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def log_memory(memory: Memory) -> None:
    """Tells an estimate beside what a device has, with a warning where it is too much."""
    there = device_memory()
    of = "" if there is None else f" of {_readable(there)}"
    log.info("memory of each device, estimated: %s%s", memory, of)
    if there is not None and sum(memory) > there:
        log.warning(
            "this may be more than a device has; raise train.accumulate, set model.remat=True, or "
            "split the model with mesh.fsdp"
        )


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    shapes = [jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in leaves]
    return _bytes(shapes)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _kept_bytes(graphdef: nnx.GraphDef, state: TrainState, task: Task, rows: int) -> int:
    """Bytes of what the backward pass of so many examples keeps of the forward pass."""

    def backward(params: Any, other: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            model = nnx.merge(graphdef, params, other)
            return task.loss(model, batch, jax.random.key(0))[0]

        return jax.vjp(loss, params)[1]  # the function holds what it keeps as leaves

    batch = task.abstract_batch(rows)
    return _bytes(jax.eval_shape(backward, state.params, state.other, batch))


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
