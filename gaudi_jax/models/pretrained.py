"""Hugging Face folders (config.json and safetensors) as values of NNX models, without PyTorch."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import EinopsError
from flax import nnx
from safetensors import SafetensorError, safe_open

from gaudi_jax.errors import UserError

#: Array of the file -> array of our parameter; raises ValueError, or einops its own, for a shape
#: that it cannot take.
Transform = Callable[[np.ndarray], np.ndarray]
#: Regex of a tensor's whole name -> (dotted path of our parameter, with groups as \1; transform).
Table = Mapping[str, tuple[str, Transform | None]]
Model = TypeVar("Model", bound=nnx.Module)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-*.safetensors"
#: Names of one kind that a message about mismatches spells out.
LISTED = 10


def resolve_folder(name: str | Path) -> Path:
    """The folder of a pretrained model: a directory, or the hub's model of that id.

    From the hub only json and safetensors files are fetched, into the cache of huggingface_hub;
    what the cache already holds works offline.

    Args:
        name: a directory, or an id such as "google/vit-base-patch16-224".

    Raises:
        UserError: there is neither such a directory nor such a model, or the hub cannot be reached.

    Example:
        >>> from gaudi_jax.models.pretrained import resolve_folder
        >>> resolve_folder(".").is_dir()
        True
    """
    if Path(name).is_dir():
        return Path(name)

    # Slow to import, and needed for ids only.
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                str(name),
                allow_patterns=["*.json", WEIGHTS, SHARDS],
            )
        )
    except errors.HFValidationError:
        reason = "that is no valid id of a model on the Hugging Face hub either"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "the Hugging Face hub cannot be reached and its cache holds no such model"
    except errors.RepositoryNotFoundError:
        reason = "the Hugging Face hub has no such model, or none that you may read"
    except errors.HfHubHTTPError as error:
        reason = f"the Hugging Face hub refuses it ({type(error).__name__})"
    raise UserError(
        f"there is no directory {str(name)!r}, and {reason}; give the path of a directory with "
        "config.json and model.safetensors, or an id such as google/vit-base-patch16-224"
    )


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The contents of one of the folder's json files.

    Raises:
        UserError: the file is missing or is not a JSON object.

    Example:
        >>> from gaudi_jax.models.pretrained import read_config
        >>> read_config(folder)["model_type"]  # doctest: +SKIP
        'vit'
    """
    return _read_json(folder / name)


def read_tensors(folder: Path) -> Mapping[str, np.ndarray]:
    """The folder's tensors by name, each read when it is asked for.

    Args:
        folder: holds model.safetensors, or several files and their model.safetensors.index.json.

    Returns:
        A mapping from name to array in the file's own dtype; bfloat16 is that of ml_dtypes.

    Raises:
        UserError: there is no safetensors file, the index names none or one that is missing, or a
            file is damaged.

    Example:
        >>> from gaudi_jax.models.pretrained import read_tensors
        >>> read_tensors(folder)["classifier.weight"].shape  # doctest: +SKIP
        (1000, 768)
    """
    # Where both are, transformers reads the single file too.
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} names no file of weights; fetch or save it again")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / WEIGHTS]
    for file in files:
        if not file.exists():
            pickled = sorted(path.name for path in folder.glob("*.bin"))
            found = f" but {pickled[0]}, which needs PyTorch to be read" if pickled else ""
            raise UserError(
                f"{folder} holds no {file.name}{found}; load the model with transformers and save "
                "it with save_pretrained, which writes safetensors"
            )
    return _Tensors(files)


def fill(
    model_abstract: Model,
    tensors: Mapping[str, np.ndarray],
    table: Table,
    *,
    optional: Sequence[str] = (),
) -> Model:
    r"""The model with its abstract parameters taken from the tensors.

    Args:
        model_abstract: a model made under `nnx.eval_shape`. Parameters that are arrays already (a
            new head put in afterwards, say) keep their values and take no tensor.
        tensors: arrays by name, such as those of `read_tensors`.
        table: regex of a tensor's whole name -> (dotted path of the parameter, which may use the
            regex's groups as ``\1``, and the function that turns the tensor into it, or None). A
            tensor that matches several rows fills several parameters.
        optional: regexes of whole names of tensors that are left out knowingly.

    Returns:
        A new model; values are cast to the dtypes of the abstract parameters.

    Raises:
        UserError: parameters lack a tensor or have several, tensors match nothing, or shapes
            differ: all of it in one message.

    Example:
        >>> import numpy as np
        >>> from flax import nnx
        >>> from gaudi_jax.models.pretrained import fill
        >>> abstract = nnx.eval_shape(lambda: nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
        >>> table = {r"proj\.weight": ("kernel", np.transpose)}
        >>> fill(abstract, {"proj.weight": np.ones((3, 2))}, table).kernel.shape
        (2, 3)
    """
    graphdef, state = nnx.split(model_abstract)
    leaves = {
        ".".join(map(str, path)): variable.get_value()
        for path, variable in nnx.to_flat_state(state)
    }
    wanted = {path for path, leaf in leaves.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
    filled: dict[str, jax.Array] = {}
    unexpected, misshapen, repeated = [], [], []
    for name in tensors:
        rows = [
            (match.expand(path), transform)
            for pattern, (path, transform) in table.items()
            if (match := re.fullmatch(pattern, name))
        ]
        rows = [row for row in rows if row[0] in wanted]
        if not rows and not any(re.fullmatch(pattern, name) for pattern in optional):
            unexpected.append(name)
        for path, transform in rows:
            if path in filled:
                repeated.append(f"{name} for {path}")
                continue
            leaf, tensor = leaves[path], tensors[name]
            try:
                value = tensor if transform is None else transform(tensor)
            except (ValueError, EinopsError):
                value = None
            if value is None or value.shape != leaf.shape:
                misshapen.append(f"{name} {tensor.shape} for {path} {leaf.shape}")
                wanted.discard(path)
                continue
            filled[path] = jnp.asarray(value, leaf.dtype)
    problems = {
        "parameters without a tensor": sorted(wanted - set(filled)),
        "tensors without a parameter": unexpected,
        "second tensors": repeated,
        "wrong shapes": misshapen,
    }
    if any(problems.values()):
        found = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise UserError(
            f"the weights do not fit the model ({found}); check that config.json belongs to them"
        )
    values = [
        (path, variable.replace(filled.get(".".join(map(str, path)), variable.get_value())))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(values))


class _Tensors(Mapping[str, np.ndarray]):
    """Tensors of several safetensors files, read on access."""

    def __init__(self, files: Sequence[Path]):
        self._files = {}
        for file in files:
            try:
                opened = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise UserError(
                    f"{file} is not a safetensors file ({error}); fetch or save it again"
                ) from error
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{file.parent} holds no {file.name}; give a directory saved by transformers"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object; fetch or save it again")
    return content


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
