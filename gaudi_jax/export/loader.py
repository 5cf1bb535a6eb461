"""Runs a model that ``python -m gaudi_jax.export`` wrote. This file needs only JAX and flatbuffers.

Copy it to where the model is used; gaudi_jax is not needed there:

    python loader.py FILE                       # what the model reads and gives
    python loader.py FILE INPUT.npy OUTPUT.npy  # runs it

or in Python: ``run = load_exported(FILE)``, then ``outputs = run(inputs)``.

The file holds a line of JSON, the program in StableHLO (`jax.export`), and the arrays that it
takes, one after another. The line names the format, the sizes and the SHA-256 of all that follows.
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

FORMAT = 1
#: What jax.export calls the backends.
PLATFORMS = {"gpu": "cuda"}


def load_exported(file: str | Path) -> Callable[[Any], jax.Array]:
    """The model in a file, as a function of a batch of inputs of any size.

    Args:
        file: written by ``python -m gaudi_jax.export``.

    Returns:
        A function; its attribute ``header`` says what it reads and gives.

    Raises:
        ValueError: the file is missing, damaged or of another format, or is not for this platform;
            or, when it is called, the inputs have another shape or dtype.
    """
    header, payload = read(file)
    backend = jax.default_backend()
    if PLATFORMS.get(backend, backend) not in header["platforms"]:
        raise ValueError(
            f"{file} is for {', '.join(header['platforms'])}, and JAX runs on {backend} here; "
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
        inputs = np.asarray(inputs)
        same_kind = np.can_cast(inputs.dtype, header["input_dtype"], "same_kind")
        if list(inputs.shape[1:]) != sizes or not same_kind:
            raise ValueError(
                f"inputs of shape {inputs.shape} and dtype {inputs.dtype} do not fit; the model "
                f"reads ({', '.join(map(str, header['input_shape']))}) of {header['input_dtype']}"
            )
        return call(weights, inputs.astype(header["input_dtype"]))

    run.header = header  # type: ignore[attr-defined]
    return run


def read(file: str | Path) -> tuple[dict[str, Any], memoryview]:
    """The line of JSON in a file, and what follows it, after their check.

    Raises:
        ValueError: the file is missing, damaged or of another format.
    """
    try:
        line, _, payload = Path(file).read_bytes().partition(b"\n")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    try:
        header = json.loads(line)
        found = header["gaudi_jax_export"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is no exported model, or its beginning is damaged") from None
    if found != FORMAT:
        raise ValueError(f"{file} has format {found}; this loader reads format {FORMAT}")
    if hashlib.sha256(payload).hexdigest() != header.get("sha256"):
        raise ValueError(f"{file} is damaged: its SHA-256 differs; copy or export it again")
    return header, memoryview(payload)


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
            np.save(outputs, np.asarray(load_exported(file)(np.load(inputs)), np.float32))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
