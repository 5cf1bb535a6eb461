"""What a run takes from another one, or from a Hugging Face model."""

from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.compression import densify
from gaudi_jax.errors import UserError
from gaudi_jax.layers import StructuredLinear
from gaudi_jax.training.checkpoint import Checkpointer
from gaudi_jax.training.load import abstract_model, load
from gaudi_jax.training.moments import Moments, read_moments
from gaudi_jax.training.phases import phase_of
from gaudi_jax.training.setup import (
    build_optimizer,
    build_schedules,
    pretrained_model,
)
from gaudi_jax.training.step import split_model
from gaudi_jax.training.workdir import read_config


def is_run(source: str) -> bool:
    """Whether a source of parameters is a run's workdir, and not a Hugging Face folder or id."""
    return (Path(source) / "checkpoints").is_dir()


def initialise(model: nnx.Module, source: str, config: ConfigDict) -> None:
    """Takes the parameters of another run's model, or of a Hugging Face one, of the same sizes.

    Structured layers that are dense there get the truncated SVD of the dense kernel; their widths
    and locations stay as the config starts them. A model of dense layers only gets the kernels of
    structured ones.

    Raises:
        UserError: it is not there, has other parameters, or reads other tokens.
    """
    if is_run(source):
        _check_vocabulary(source, config)
        other = load(source)
        other = other if _is_structured(model) else densify(other)
        remedy = "initialise from a run with the same model and layer sections, or a dense one"
    else:
        other = pretrained_model(config, source)
        remedy = "set the model's sizes to those of its config.json"
    own, theirs = (dict(nnx.to_flat_state(nnx.state(m, nnx.Param))) for m in (model, other))
    there = {path: variable.shape for path, variable in theirs.items()}
    here = {path: variable.shape for path, variable in own.items()}
    dense_there = {
        path: layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, StructuredLinear) and (*path, "kernel") in there
    }
    for path, layer in dense_there.items():
        here = {p: shape for p, shape in here.items() if p[:-1] != path or p[-1] == "bias"}
        here[*path, "kernel"] = (layer.in_features, layer.out_features)
    if here != there:
        raise UserError(
            f"the model in init_from={source} has other parameters than this config's; {remedy}"
        )
    for path, layer in dense_there.items():
        layer.set_kernel(theirs.pop((*path, "kernel"))[...])
    nnx.update(model, nnx.from_flat_state(list(theirs.items())))


def _check_vocabulary(source: str, config: ConfigDict) -> None:
    """Of models of text: the same number of tokens does not make them the same tokens."""
    theirs = read_config(source)["data"]
    digests = {data.get("vocabulary_digest") for data in (theirs, config.data)}
    if len(digests - {None}) == 2:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} on data.name={config.data.name!r} has "
            f"another vocabulary than the run in init_from={source}; use its text "
            f"{theirs['name']!r}, or a tokenizer from files (hf:DIRECTORY) for both"
        )


def moments_of(source: str) -> Moments | None:
    """The optimizer's moments at the end of a run; None where its layers were not dense.

    Raises:
        UserError: it holds no checkpoint.
    """
    config = ConfigDict(read_config(source))

    def wanted(step: int) -> dict[str, Any]:
        model = abstract_model(config, phase_of(config, step), Path(source))
        optimizer = build_optimizer(config, model, build_schedules(config))
        _, params, _ = split_model(model)
        return {"opt_state": jax.eval_shape(optimizer.init, params)}

    with Checkpointer(Path(source) / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(wanted)
    if restored is None:
        raise UserError(f"{source} holds no checkpoint; train it first")
    if _is_structured(abstract_model(config, phase_of(config, restored.step), Path(source))):
        return None  # their factors' moments say little about the kernels'
    return read_moments(restored.state["opt_state"])


def _is_structured(model: nnx.Module) -> bool:
    return any(isinstance(layer, StructuredLinear) for _, layer in nnx.iter_modules(model))
