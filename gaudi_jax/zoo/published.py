"""Published models: folders of safetensors, with config, plans of the structure, and card."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from gaudi_jax.compression import densify, rebuild
from gaudi_jax.data.tokenizers import TOKENIZER
from gaudi_jax.errors import UserError
from gaudi_jax.layers import Sigma, Structural
from gaudi_jax.models.pretrained import WEIGHTS, fill, read_tensors
from gaudi_jax.models.pretrained import read_config as read_json
from gaudi_jax.training.setup import build_model
from gaudi_jax.training.workdir import CONFIG_FILE, read_config
from gaudi_jax.zoo import CARD_FILE

#: What gave the config's model its structure: a list, each plan on top of the one before.
PLANS_FILE = "plans.json"
FORMAT = 1


def write_published(
    folder: Path,
    model: nnx.Module,
    workdir: Path,
    plans: list[dict[str, Any]],
    *,
    dtype: Any = jnp.float32,
) -> None:
    """Writes the model of a run as a folder; with a card (`write_card`) it is published.

    Args:
        folder: a directory that does not exist.
        model: the model, with its values.
        workdir: of its run, for config and tokenizer.
        plans: what gave the config's model its structure, first to last.
        dtype: of the stored factors, kernels, biases and embeddings; widths, locations and sigma
            stay as they are.
    """
    folder.mkdir(parents=True)
    shutil.copy(workdir / CONFIG_FILE, folder)
    if (workdir / TOKENIZER).is_dir():
        shutil.copytree(workdir / TOKENIZER, folder / TOKENIZER)
    text = json.dumps(plans, allow_nan=False)
    (folder / PLANS_FILE).write_text(text + "\n", encoding="utf-8")
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        value = variable[...]
        if not isinstance(variable, Structural | Sigma) and jnp.isdtype(
            value.dtype, "real floating"
        ):
            value = value.astype(dtype)
        tensors[".".join(map(str, path))] = np.asarray(value)
    save_file(tensors, folder / WEIGHTS)


def write_card(folder: Path, card: dict[str, Any]) -> None:
    """Writes what a published model is and what it can, with the checksum of its weights.

    Args:
        folder: see `write_published`.
        card: plain values.
    """
    card = card | {"format": FORMAT, "sha256": _sha256(folder / WEIGHTS)}
    text = json.dumps(card, indent=2, allow_nan=False)
    (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a published model.

    Raises:
        UserError: it is damaged, or of a later format.
    """
    card = read_json(folder, CARD_FILE)
    if card.get("format") != FORMAT:
        raise UserError(
            f"{folder / CARD_FILE} has format {card.get('format')!r} instead of {FORMAT}; fetch "
            "the model again, or update gaudi_jax"
        )
    return card


def read_published(folder: Path) -> nnx.Module:
    """The model in a folder that was published, in evaluation mode.

    Values are cast to the dtypes of the config's model.

    Raises:
        UserError: a file is missing or damaged.
    """
    card = read_card(folder)
    tensors = read_tensors(folder)
    if _sha256(folder / WEIGHTS) != card.get("sha256"):
        raise UserError(f"{folder / WEIGHTS} is damaged (its checksum differs); fetch it again")
    model = _structure(folder)
    # They are not stored: a model in evaluation draws none.
    keys = nnx.state(model, nnx.RngState)
    nnx.update(model, jax.tree.map(_random_state, keys))
    model = fill(model, tensors, {"(.*)": (r"\1", None)})
    model.eval()
    return model


def _structure(folder: Path) -> nnx.Module:
    """The model as shapes without values."""
    config = ConfigDict(read_config(folder))
    plans = _read_plans(folder / PLANS_FILE)
    searched = bool(plans) and not _packs(plans[0])

    def begin() -> nnx.Module:
        model = build_model(config)
        return densify(model) if searched else model

    model = nnx.eval_shape(begin)
    for plan in plans:
        model = rebuild(model, plan)
    return model


def _read_plans(file: Path) -> list[dict[str, Any]]:
    try:
        plans = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); fetch the model again") from error
    if not isinstance(plans, list):
        raise UserError(f"{file} holds no list of plans; fetch the model again")
    return plans


def _packs(plan: dict[str, Any]) -> bool:
    return any(entry["method"] == "packed" for entry in plan["layers"].values())


def _random_state(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(jnp.empty((), leaf.dtype))
        return jnp.broadcast_to(jax.random.key(0, impl=impl), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
