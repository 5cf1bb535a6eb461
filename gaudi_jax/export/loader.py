"""Runs a model that ``python -m gaudi_jax.export`` wrote. This file needs only JAX and flatbuffers.

Copy it to where the model is used; gaudi_jax is not needed there:

    python loader.py FILE                       # what the model reads and gives
    python loader.py FILE INPUT.npy OUTPUT.npy  # runs it

or in Python: ``run = load_exported(FILE)``, then ``outputs = run(inputs)``.

The file begins with a line that names its format and the SHA-256 of all that follows: a line of
JSON that describes the model, the program in StableHLO (`jax.export`), and the arrays that it
takes, one after another.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

MAGIC, FORMAT = "gaudi_jax_export", 1


def load_exported(file: str | Path) -> Callable[[Any], jax.Array]:
    """The model in a file, as a function of a batch of inputs of any size.

    Args:
        file: written by ``python -m gaudi_jax.export``.

    Returns:
        A function; its attribute ``header`` describes the model.

    Raises:
        ValueError: the file is missing, damaged or of another format, or is not for this platform;
            or, when it is called, the inputs have another shape or dtype.
    """
    header, payload = read(file)
    if platform() not in header["platforms"]:
        raise ValueError(
            f"{file} is for {', '.join(header['platforms'])}, and JAX runs on {platform()} here; "
            "export it with --platforms for this one"
        )
    try:
        program = jax.export.deserialize(bytearray(payload[: header["program_bytes"]]))
    except ImportError as error:
        raise ValueError(f"{file} cannot be loaded: {error}") from None
    weights, place = [], header["program_bytes"]
    for shape, dtype in header["weights"]:
        count = int(np.prod(shape))
        array = np.frombuffer(payload, jax.numpy.dtype(dtype), count, place).reshape(shape)
        weights.append(jax.device_put(array))
        place += array.nbytes
    call = jax.jit(program.call)
    _, *sizes = header["input_shape"]

    def run(inputs: Any) -> jax.Array:
        inputs = inputs if isinstance(inputs, jax.Array) else np.asarray(inputs)
        wanted = jax.numpy.dtype(header["input_dtype"])
        # Whole numbers are no images that are ready: pixels are normalised before.
        fits = jax.numpy.issubdtype(inputs.dtype, jax.numpy.integer) == jax.numpy.issubdtype(
            wanted, jax.numpy.integer
        ) and np.can_cast(inputs.dtype, wanted, "same_kind")
        if list(inputs.shape[1:]) != sizes or not inputs.shape[0] or not fits:
            raise ValueError(
                f"inputs of shape {inputs.shape} and dtype {inputs.dtype} do not fit; the model "
                f"reads ({', '.join(map(str, header['input_shape']))}) of {header['input_dtype']}, "
                "b at least 1"
            )
        return call(weights, inputs.astype(wanted))

    run.header = header  # type: ignore[attr-defined]
    return run


def platform() -> str:
    """Where JAX runs here, as jax.export calls it.

    Raises:
        ValueError: nowhere.
    """
    try:
        backend = jax.default_backend()
    except (AssertionError, RuntimeError) as error:
        wanted = jax.config.jax_platforms or "the default platforms"  # type: ignore[attr-defined]
        raise ValueError(f"JAX finds no device of {wanted} here: {error or 'none'}") from None
    return "cuda" if backend == "gpu" else backend


def read(file: str | Path) -> tuple[dict[str, Any], memoryview]:
    """The description in a file, and the program and arrays that follow it, after their check.

    Raises:
        ValueError: the file is missing, damaged or of another format.
    """
    try:
        with Path(file).open("rb") as stream:
            first = stream.readline(200).decode("ascii", "replace").split()
            line, content = stream.readline(), stream.read()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    if len(first) != 3 or first[0] != MAGIC:
        raise ValueError(f"{file} is no exported model, or its beginning is damaged")
    _, version, digest = first
    if version != str(FORMAT):
        raise ValueError(f"{file} has format {version}; this loader reads format {FORMAT}")
    computed = hashlib.sha256(line)
    computed.update(content)
    if computed.hexdigest() != digest:
        raise ValueError(f"{file} is damaged: its SHA-256 differs; copy or export it again")
    return json.loads(line), memoryview(content)


def main() -> int:
    """Describes or runs a model; returns the exit status."""
    if len(sys.argv) not in (2, 4):
        print("usage: python loader.py FILE [INPUT.npy OUTPUT.npy]", file=sys.stderr)
        return 2
    try:
        if len(sys.argv) == 2:
            header, _ = read(sys.argv[1])
            shown = {key: value for key, value in header.items() if key != "weights"}
            print(json.dumps(shown, indent=2))
        else:
            _, file, inputs, outputs = sys.argv
            result = load_exported(file)(np.load(inputs))
            wide = result.dtype == jax.numpy.bfloat16  # which NumPy's files do not know
            np.save(outputs, np.asarray(result, np.float32 if wide else result.dtype))
    except (ValueError, OSError, EOFError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
