"""Runs of several processes, on one host or many, through JAX's own distributed runtime.

All processes run the same program on the same config. Process 0 alone writes logs, plans and
reports; all of them write checkpoints, and so all must see the same workdir.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from gaudi_jax.errors import UserError, reason

#: Variables by which launchers tell the number of processes and the place of this one.
LAUNCHERS = (
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)


def start_processes(options: ConfigDict) -> None:
    """Joins the other processes of a run; does nothing where there are none.

    They are found through the metadata of Cloud TPUs, the variables of SLURM (``srun``) or Open MPI
    (``mpirun``), or what the config says. Must be called before anything else of JAX's is.

    Args:
        options: ``config.distributed``: ``coordinator_address`` ("HOST:PORT" of process 0, empty to
            find it), ``num_processes`` and ``process_id`` (-1 for what the launcher says), and
            ``heartbeat_timeout_seconds``, after which a process that is not heard from counts as
            dead, and the others end.

    Raises:
        UserError: a number is out of range or not known, or the processes do not find each other.
    """
    address = options.coordinator_address
    count, own = options.num_processes, options.process_id
    found = next((names for names in LAUNCHERS if all(n in os.environ for n in names)), None)
    if found is not None:
        launched, rank = (int(os.environ[name]) for name in found[:2])
        count, own = (launched if count < 0 else count), (rank if own < 0 else own)
    if options.heartbeat_timeout_seconds < 1:
        raise UserError(
            f"distributed.heartbeat_timeout_seconds={options.heartbeat_timeout_seconds} must be at "
            "least 1"
        )
    if not address and (options.num_processes >= 0 or options.process_id >= 0):
        raise UserError(
            f"distributed.num_processes={count} and process_id={own} need "
            "distributed.coordinator_address=HOST:PORT of process 0"
        )
    if address and not (count >= 1 and 0 <= own < count):
        raise UserError(
            f"distributed.num_processes={count} must be at least 1 and distributed.process_id={own}"
            " in [0, num_processes); give both, or start the processes with srun or mpirun"
        )
    if not address and not (count > 1 if found else _on_tpu()):
        return
    try:
        jax.distributed.initialize(
            coordinator_address=address or None,
            num_processes=count if address else None,
            process_id=own if address else None,
            local_device_ids=_own_devices() if address else None,
            heartbeat_timeout_seconds=options.heartbeat_timeout_seconds,
        )
    # JAX raises many kinds of errors, from gRPC's to those of metadata servers.
    except Exception as error:
        raise UserError(
            f"the processes of this run do not find each other ({reason(error)}); check "
            "distributed.coordinator_address and that all of them are started"
        ) from error


def _own_devices() -> list[int] | None:
    """The device of one of several processes on a host; JAX knows it where it knows the launcher.

    It does not know Open MPI 5. JAX_LOCAL_DEVICE_IDS says something else where that is wanted.
    """
    if (
        "JAX_LOCAL_DEVICE_IDS" not in os.environ
        and int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")) > 1
    ):
        return [int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])]
    return None


def _on_tpu() -> bool:
    """Whether JAX will use a TPU; asking JAX itself would start it."""
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    devices = (Path("/dev/accel0"), Path("/dev/vfio/0"))
    return (
        "tpu" in platforms
        and importlib.util.find_spec("libtpu") is not None
        and any(device.exists() for device in devices)
    )


def leave_at_once(status: int) -> None:
    """Ends this process if it is one of several; a clean end would wait for the others.

    They wait for this one. When it is gone, JAX ends them too.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def is_primary() -> bool:
    """Whether this is process 0, which writes what only one may write.

    Example:
        >>> from gaudi_jax.training.processes import is_primary
        >>> is_primary()
        True
    """
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_primary(tree: Any) -> Any:
    """The arrays of process 0, on all processes; they have the same shapes everywhere.

    Processes that computed the same on different hosts may differ in the last bit, and would part.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(multihost_utils.broadcast_one_to_all, tree)


def of_all(value: int) -> list[int]:
    """The whole number that each process has, in their order.

    Example:
        >>> from gaudi_jax.training.processes import of_all
        >>> of_all(3)
        [3]
    """
    return np.ravel(multihost_utils.process_allgather(np.int32(value))).tolist()


def sum_of_all(values: np.ndarray) -> np.ndarray:
    """The sum over processes of an array that each has; whole numbers overflow silently.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.training.processes import sum_of_all
        >>> sum_of_all(np.array([1, 2], np.uint32))
        array([1, 2], dtype=uint32)
    """
    if jax.process_count() == 1 or not values.size:
        return values
    return np.sum(multihost_utils.process_allgather(values), axis=0, dtype=values.dtype)


def on_host(tree: Any) -> Any:
    """NumPy copies of arrays that may be spread over the devices of several processes."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
