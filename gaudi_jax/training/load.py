"""Models on disk: those of runs, and compressed ones of any class."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.compression.densify import densify
from gaudi_jax.compression.plan import check_format, rebuild
from gaudi_jax.errors import UserError
from gaudi_jax.layers import GeneralLinear, StructuredLinear
from gaudi_jax.training.checkpoint import Checkpointer
from gaudi_jax.training.phases import Phase, phase_of
from gaudi_jax.training.setup import build_model
from gaudi_jax.training.step import split_model
from gaudi_jax.training.workdir import read_config, write_atomically
from gaudi_jax.zoo import published_folder
from gaudi_jax.zoo.published import read_published

PLAN_FILE = "plan.json"
#: Directory in a run's workdir that holds its packed model, and its name as a checkpoint.
PACKED = "packed"


def load(
    workdir: str | Path, step: int | str | None = None, *, into: nnx.Module | None = None
) -> nnx.Module:
    """A trained model, in evaluation mode: that of a run, a published one, or one that was saved.

    Args:
        workdir: directory of a run, or one that `gaudi_jax.save` wrote; or a published model: its
            directory, ``zoo:NAME`` of one that comes with the package (`gaudi_jax.zoo.names`), or
            ``hf:OWNER/NAME`` of one on the Hugging Face hub.
        step: step of the run's checkpoint, "best" (by validation accuracy, or loss), "packed" (what
            ``python -m gaudi_jax.deploy`` made of one), or "last" or None for the newest.
        into: for a saved model, one like that which was compressed (dense) or packed (with Gaudi
            layers); shapes are enough (``nnx.eval_shape``). It is left as it was. None for the
            model of a run.

    Raises:
        UserError: the directory holds no run, no such checkpoint or no saved model, `into` is
            another model, or there is no published model of that name.

    Example:
        >>> import jax.numpy as jnp
        >>> import gaudi_jax
        >>> model = gaudi_jax.load("runs/digits")  # doctest: +SKIP
        >>> model = gaudi_jax.load("zoo:digits-vit-gaudi")
        >>> model(jnp.zeros((1, 8, 8, 1))).shape
        (1, 10)
    """
    folder = published_folder(workdir)
    if folder is None:
        return load_with_step(workdir, step, into=into)[0]
    if step is not None or into is not None:
        raise UserError(f"{workdir} is a published model, of one step; leave out step and into")
    return read_published(folder)


def as_step(text: str) -> int | str:
    """A checkpoint as commands take it: a number, or a word such as "best".

    Example:
        >>> from gaudi_jax.training.load import as_step
        >>> as_step("250"), as_step("best")
        (250, 'best')
    """
    return int(text) if text.isdigit() else text


def load_with_step(
    workdir: str | Path, step: int | str | None = None, *, into: nnx.Module | None = None
) -> tuple[nnx.Module, int]:
    """As `load`, with the step of the checkpoint beside the model."""
    workdir = Path(workdir)
    step = None if step == "last" else step
    if into is None and step == PACKED:
        return _load_packed(workdir)
    if into is None:
        config = ConfigDict(read_config(workdir))

        def structure(step: int) -> nnx.Module:
            return abstract_model(config, phase_of(config, step), workdir)
    else:
        saved = rebuild(into, read_plan(workdir / PLAN_FILE))

        def structure(step: int) -> nnx.Module:
            return saved

    def wanted(step: int) -> dict[str, Any]:
        _, params, other = split_model(structure(step))
        return {"params": params, "other": other}

    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(lambda s: jax.tree.map(_abstract, wanted(s)), step=step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint; train it first")
    state = jax.tree.map(_as_keys, wanted(restored.step), restored.state)
    graphdef = nnx.graphdef(structure(restored.step))
    model = nnx.merge(graphdef, state["params"], state["other"])
    model.eval()
    return model, restored.step


def _load_packed(workdir: Path) -> tuple[nnx.Module, int]:
    """The packed model of a run, and the step of the checkpoint that was packed."""
    config, directory = ConfigDict(read_config(workdir)), workdir / PACKED
    if not directory.exists():
        raise UserError(
            f"{workdir} holds no packed model; make it with python -m gaudi_jax.deploy {workdir}"
        )
    if not (directory / PLAN_FILE).exists():
        raise UserError(f"{directory} is incomplete; remove it and pack the run again")
    plan = read_plan(directory / PLAN_FILE)
    try:
        check_format(plan)
    except UserError as error:
        raise _broken(directory, error) from None
    step = plan.get("step")
    if type(step) is not int or not 0 <= step <= config.train.steps:
        raise UserError(
            f"the plan in {directory} names no step of this run, but {step!r}; remove it and pack "
            "the run again"
        )
    if plan.get("run", run_digest(config)) != run_digest(config):
        raise UserError(
            f"{directory} was packed from a run of another model, layers or seed; remove it and "
            "pack this run"
        )
    model = abstract_model(config, phase_of(config, step), workdir)
    try:
        return load(directory, into=model), step
    except UserError as error:
        raise _broken(directory, error) from None


def _broken(directory: Path, error: UserError) -> UserError:
    """Of a packed model; the remedy for runs does not help it."""
    found, *_ = str(error).split("; ")
    return UserError(f"{found}; remove {directory} and pack the run again")


def run_digest(config: ConfigDict) -> str:
    """Tells runs apart whose models differ, whatever was changed when one went on."""
    what = {name: config.get(name) for name in ("seed", "model", "layer", "compress", "init_from")}
    text = json.dumps(ConfigDict(what).to_dict(), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def abstract_model(config: ConfigDict, phase: Phase, workdir: Path) -> nnx.Module:
    """The model of a run in one of its phases, as shapes without values.

    Raises:
        UserError: the plan of its structure is missing or damaged.
    """
    if phase.budget is None:
        return nnx.eval_shape(lambda: build_model(config))
    dense = nnx.eval_shape(lambda: densify(build_model(config)))
    return rebuild(dense, read_plan(phase.plan_file(workdir)))


def save(directory: str | Path, model: nnx.Module, plan: Mapping[str, Any]) -> None:
    """Saves a compressed model of any class: its plan, and a checkpoint of all its values.

    Args:
        directory: a new or an empty one.
        model: the compressed model, fine-tuned or not.
        plan: its plan.

    Raises:
        UserError: the directory holds something already, or the plan is none of this model's.

    Example:
        >>> import tempfile
        >>> from flax import nnx
        >>> import gaudi_jax
        >>> dense = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
        >>> small, plan = gaudi_jax.compress(dense, 0.5, method="low_rank", progress=False)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     gaudi_jax.save(directory, small, plan)
        ...     type(gaudi_jax.load(directory, into=dense).layers[0]).__name__
        'LowRankLinear'
    """
    check_format(plan)
    structured = {
        "/".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, StructuredLinear | GeneralLinear)
    }
    dense = [path for path in plan["layers"] if path not in structured]
    if dense:
        raise UserError(
            f"{dense[0]} of the model has no structure, but one in the plan; give the model that "
            "gaudi_jax.compress returned with it"
        )
    text = json.dumps(plan, indent=2, allow_nan=False)
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty directory; give another one")
    _, params, other = split_model(model)
    with Checkpointer(directory / "checkpoints") as checkpoints:
        checkpoints.save(0, jax.tree.map(_as_array, {"params": params, "other": other}))
    write_atomically(directory / PLAN_FILE, text + "\n")


def read_plan(path: Path) -> dict[str, Any]:
    """The plan in a file.

    Raises:
        UserError: it is not there, or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path.parent} holds no saved model ({path.name} is missing); write it with "
            "gaudi_jax.save, or leave out into= for a run"
        ) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy") from error


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_array(leaf: Any) -> Any:
    """Random keys, such as dropout's, as plain numbers: checkpoints hold nothing else."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """What a checkpoint holds in place of an array: shape, dtype and sharding."""
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _as_keys(wanted: Any, leaf: Any) -> Any:
    if not _is_key(wanted):
        return leaf
    impl = jax.random.key_impl(jnp.empty((), wanted.dtype))
    return jax.random.wrap_key_data(leaf, impl=impl)
