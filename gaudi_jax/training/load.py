"""A run's trained model, back as an object."""

from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.errors import UserError
from gaudi_jax.training.checkpoint import Checkpointer
from gaudi_jax.training.setup import build_model
from gaudi_jax.training.step import split_model
from gaudi_jax.training.workdir import read_config


def load(workdir: str | Path, step: int | str | None = None) -> nnx.Module:
    """The model of a run, in evaluation mode, with the values of one of its checkpoints.

    Args:
        workdir: directory of the run.
        step: step of the checkpoint, "best" (by validation accuracy), or None for the newest.

    Raises:
        UserError: the workdir holds no run, or no such checkpoint.

    Example:
        >>> import gaudi_jax
        >>> model = gaudi_jax.load("runs/digits")  # doctest: +SKIP
    """
    return load_with_step(workdir, step)[0]


def load_with_step(workdir: str | Path, step: int | str | None = None) -> tuple[nnx.Module, int]:
    """As `load`, with the step of the checkpoint beside the model."""
    workdir = Path(workdir)
    config = ConfigDict(read_config(workdir))

    graphdef, params, other = split_model(nnx.eval_shape(lambda: build_model(config)))
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore({"params": params, "other": other}, step=step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint; train it first")
    model = nnx.merge(graphdef, restored.state["params"], restored.state["other"])
    model.eval()
    return model, restored.step
