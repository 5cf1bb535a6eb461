"""The layout of a packed layer that is fastest where it is measured."""

import hashlib
import json
import logging
import math
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import jaxlib

from gaudi_jax.deploy.layout import Compiled
from gaudi_jax.deploy.machine import Machine
from gaudi_jax.deploy.pack import Packer, Tiling
from gaudi_jax.deploy.timing import Running, copies_out_of_cache, interleaved_medians
from gaudi_jax.errors import reason
from gaudi_jax.kernels import on_hopper
from gaudi_jax.layers import GaudiLinear, PackedLinear
from gaudi_jax.layers.cells import Cells
from gaudi_jax.training.workdir import write_atomically

log = logging.getLogger(__name__)

CACHE_DIR = "~/.cache/gaudi_jax/layouts"
#: The layouts that are measured: those of machines whose operations begin more, or less, slowly,
#: and so from many small products to few large ones.
OVERHEADS = (0.0625, 0.25, 1.0, 4.0, 16.0)
REPEATS = 7
#: Of what is kept; another one where times mean something else.
FORMAT = 6
#: Variables that change times begin so.
TIMING = "XLA_", "MALLOC_", "GLIBC_TUNABLES"
#: Seconds of what this device or version does not take, and of what found too little memory.
REFUSED, NO_ROOM = 1e9, 2e9
#: How the kernel for Hopper GPUs may cut both products: columns of a tile, and its tilings.
TILES = (
    (128, ((256, 4, 1), (256, 4, 1))),
    (128, ((256, 4, 2), (256, 4, 2))),
    (128, ((128, 5, 1), (256, 4, 2))),
    (64, ((256, 4, 1), (256, 4, 1))),
    (256, ((128, 4, 1), (128, 4, 1))),
)
#: Products cell by cell are measured where by the model they take at most so much longer.
LONGER = 2.0
#: Slices, cells, or columns of a tile and the tilings of both products.
Choice = Compiled | Cells | tuple[int, tuple[Tiling, Tiling]]


def fastest(
    layer: GaudiLinear, machine: Machine, tokens: int, cache_dir: str | Path = CACHE_DIR
) -> PackedLinear:
    """The packed form of a layer whose layout is the fastest of several, and of a dense kernel.

    Args:
        layer: the layer.
        machine: model of the device, from which the layouts come.
        tokens: input vectors at once.
        cache_dir: what was measured is kept here, by layouts, device, dtype, versions of JAX and
            options that change times; remove it to measure again. A directory that cannot be
            written, or a home that nobody knows, is left alone.
    """
    packer = Packer(layer)
    choices = _choices(packer, machine, tokens)
    if len(choices) == 1:
        return _packed(packer, choices[0])
    file = Path(cache_dir) / f"{_digest(packer, choices, tokens)}.json"
    with suppress(RuntimeError):  # who runs it has no home directory
        file = file.expanduser()
    seconds = _read(file, len(choices))
    if seconds is None:
        seconds = _measure(packer, choices, tokens)
        if NO_ROOM not in seconds and file.parts[0] != "~":  # there may be room the next time
            with suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, json.dumps({"seconds": seconds}) + "\n")
    return _packed(packer, choices[min(range(len(choices)), key=seconds.__getitem__)])


def _packed(packer: Packer, choice: Choice) -> PackedLinear:
    if isinstance(choice, Cells):
        return packer.pack_cells(choice)
    return packer.pack(choice) if isinstance(choice, Compiled) else packer.tile(*choice)


def _choices(packer: Packer, machine: Machine, tokens: int) -> list[Choice]:
    """Different layouts, of which one is none, a dense kernel.

    Cells are among them where the model finds them near the fastest, tiles where a kernel runs.
    """
    by_overhead = {
        factor: packer.compile(machine._replace(overhead=factor * machine.overhead), tokens)
        for factor in OVERHEADS
    }
    found = {compiled.layout: compiled for compiled in by_overhead.values()}
    dense = next(iter(found.values()))._replace(layout=None)
    found.pop(None, None)
    longest = LONGER * by_overhead[1.0].seconds
    few = [packer.cells()] if packer.seconds_by_cell(machine, tokens) <= longest else []
    tiles = [
        (width, tilings)
        for width, tilings in TILES
        if packer.dtype == jnp.bfloat16 and on_hopper() and packer.tileable(width)
    ]
    return [*found.values(), dense, *few, *tiles]


def _digest(packer: Packer, choices: list[Choice], tokens: int) -> str:
    layer, config = packer.layer, cast(Any, jax.config)
    what = [
        [layer.in_features, layer.out_features, tokens],
        [packer.dtype.name, jnp.dtype(layer.param_dtype).name],
        # All CPUs are of one kind to JAX, and a process may have some of their cores and threads.
        [jax.devices()[0].device_kind, platform.node(), _cores()],
        [jax.__version__, jaxlib.__version__, config.jax_default_matmul_precision],
        sorted(item for item in os.environ.items() if item[0].startswith(TIMING)),
        [
            choice.layout and choice.layout.to_lists() if isinstance(choice, Compiled) else choice
            for choice in choices
        ],
        # Tiles follow from the blocks' places.
        packer.places(),
        FORMAT,
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _read(file: Path, count: int) -> list[float] | None:
    """What was measured before; None if it was not, or the file is damaged."""
    try:
        seconds = [float(value) for value in json.loads(file.read_text())["seconds"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    complete = len(seconds) == count and all(0 < value < math.inf for value in seconds)
    return seconds if complete else None


def _measure(packer: Packer, choices: list[Choice], tokens: int) -> list[float]:
    x = jax.random.normal(jax.random.key(0), (tokens, packer.layer.in_features), packer.dtype)

    layer = packer.layer
    copies = copies_out_of_cache(layer.in_features * layer.out_features * packer.dtype.itemsize)
    times = 1 if jax.default_backend() == "cpu" else 50

    def make(choice: Choice) -> Running | float:
        try:
            running = Running(_packed(packer, choice), x, times=times, copies=copies)
            if not isinstance(choice, Compiled | Cells):
                jax.block_until_ready(running())  # some kernels fail no earlier
            return running
        except Exception as error:  # a kernel that this GPU or version does not take
            if isinstance(choice, Compiled | Cells):
                raise
            log.warning("tiles %s cannot be measured: %s", choice, reason(error))
            return NO_ROOM if "RESOURCE_EXHAUSTED" in str(error) else REFUSED

    with ThreadPoolExecutor() as pool:  # compilation takes longer than the measurement
        made = dict(enumerate(pool.map(make, choices)))
    running = {index: layer for index, layer in made.items() if isinstance(layer, Running)}
    medians = interleaved_medians(running, REPEATS)
    return [
        medians[index] if isinstance(layer, Running) else layer for index, layer in made.items()
    ]
