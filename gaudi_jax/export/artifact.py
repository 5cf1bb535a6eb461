"""Writing a model as one file."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gaudi_jax import kernels
from gaudi_jax.compression.surgery import find_gaudi
from gaudi_jax.errors import UserError, reason
from gaudi_jax.export.loader import FORMAT, MAGIC
from gaudi_jax.layers.tiles import Tiles

log = logging.getLogger(__name__)

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    model: nnx.Module,
    example: jax.ShapeDtypeStruct,
    file: str | Path,
    *,
    platforms: Sequence[str] = PLATFORMS,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a model as a file that `gaudi_jax.export.loader` runs with only JAX and flatbuffers.

    The file holds a StableHLO program (`jax.export`) with a batch of any size, and the model's
    arrays.

    Args:
        model: the model, its Gaudi layers packed (`gaudi_jax.harden`); it is exported in evaluation
            mode.
        example: its input, with a batch axis of any length first.
        file: a new file.
        platforms: of "cpu", "cuda" and "tpu", those that it will run on.
        card: plain values that the file names beside the model, such as its quality.

    Returns:
        The description in the file: platforms, shapes, sizes and the card.

    Raises:
        UserError: the file exists or cannot be written, a platform is unknown, the model holds
            Gaudi layers, does not take a batch of any size, or does not give one array.

    Example:
        >>> import pathlib, tempfile
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax.export import export_model, load_exported
        >>> model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "linear.stablehlo"
        >>> header = export_model(model, jax.ShapeDtypeStruct((1, 4), jnp.float32), file)
        >>> header["input_shape"], header["output_shape"]
        (['b', 4], ['b', 2])
        >>> load_exported(file)(jnp.ones((3, 4))).shape
        (3, 2)
    """
    file = Path(file)
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise UserError(f"unknown platforms {unknown}; use some of {', '.join(PLATFORMS)}")
    masked, left = find_gaudi(model)
    if masked:
        raise UserError("the model holds GaudiLinears with masks; pack them with gaudi_jax.harden")
    if left:
        path, why = next(iter(left.items()))
        raise UserError(f"the Gaudi layer {path!r} cannot be packed, and so not exported: {why}")
    tiled = [m for _, m in nnx.iter_modules(model) if isinstance(getattr(m, "layout", None), Tiles)]
    if tiled:
        log.warning(
            "%d layers are packed for a kernel that no file can hold: there they are plain "
            "products, which nobody measured; pack for files without autotuning",
            len(tiled),
        )
    if file.exists():
        raise UserError(f"{file} exists; remove it or give another file")
    view = nnx.clone(model)
    view.eval()
    graphdef, state = nnx.split(view)
    leaves, treedef = jax.tree.flatten(state)

    arrays = [np.ascontiguousarray(jax.device_get(_plain(leaf))) for leaf in leaves]

    def apply(weights: list[Any], inputs: Any) -> Any:
        state = jax.tree.unflatten(treedef, map(_like, weights, leaves))
        return nnx.merge(graphdef, state)(inputs)

    batch = jax.export.symbolic_shape("b")
    inputs = jax.ShapeDtypeStruct((*batch, *example.shape[1:]), example.dtype)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    try:
        with kernels.portable():
            exported = jax.export.export(jax.jit(apply), platforms=tuple(platforms))(shapes, inputs)
    except jax.errors.InconclusiveDimensionOperation as error:
        raise UserError(
            f"{type(model).__name__} does not take a batch of any size ({reason(error)}); it must "
            "not choose by the number of inputs"
        ) from error
    if len(exported.out_avals) != 1:
        count = len(exported.out_avals)
        raise UserError(f"{type(model).__name__} gives {count} arrays; export one that gives one")
    (output,) = exported.out_avals
    program = exported.serialize()
    header = {
        "jax": jax.__version__,
        "platforms": list(exported.platforms),
        **_described("input", inputs),
        **_described("output", output),
        "card": dict(card or {}),
        "program_bytes": len(program),
        "weights": [[list(array.shape), array.dtype.name] for array in arrays],
    }
    parts = [json.dumps(header).encode() + b"\n", bytes(program), *(a.tobytes() for a in arrays)]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    _write(file, [f"{MAGIC} {FORMAT} {digest.hexdigest()}\n".encode(), *parts])
    return header


def _plain(leaf: Any) -> Any:
    """Random keys, such as dropout's, as numbers."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _like(array: Any, leaf: Any) -> Any:
    """From numbers back to a key, where a leaf of the model is one."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf))


def _described(name: str, value: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
    return {f"{name}_shape": sizes, f"{name}_dtype": value.dtype.name}


def _write(file: Path, parts: Sequence[bytes]) -> None:
    """All or nothing: a name that exists is never half a file."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.writelines(parts)
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror}); choose another file") from error
