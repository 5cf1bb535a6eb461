"""The directory of a run and its config."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gaudi_jax.errors import UserError

CONFIG_FILE = "config.json"
#: Keys that say what to do with a run, and not what it is: they may change when it goes on.
NOT_PART_OF_A_RUN = (
    "evaluate_only",
    "evaluate_checkpoint",
    "compilation_cache",
    "train.log_every",
    "train.eval_every",
    "train.max_skipped",
    "train.stall_seconds",
    # How a step is computed: the remedies for too little memory.
    "train.accumulate",
    "model.remat",
    "checkpoint.every",
    "checkpoint.keep",
    "profile.first",
    "profile.steps",
    "data.verify",
    "data.cache_dir",
)
#: Likewise whole sections: on which devices it runs.
SECTIONS_NOT_PART_OF_A_RUN = ("mesh.", "distributed.")
#: Keys that the data decide; only the config of a run that has opened its data has them all.
DECIDED_BY_DATA = (
    "model.image_size",
    "model.channels",
    "model.num_classes",
    "model.vocab_size",
    "model.context",
    "data.vocabulary_digest",
    "data.corpus_sha256",
)


def claim_workdir(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Makes a directory the workdir of a config, or checks that it is so already.

    Args:
        workdir: the directory; made if it is not there.
        config: resolved config, nested dicts of plain values.

    Raises:
        UserError: the directory cannot be written, or holds the run of another config.

    Example:
        >>> import tempfile
        >>> from gaudi_jax.training.workdir import claim_workdir, read_config
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     claim_workdir(folder, {"seed": 1, "sigma": {"end": float("inf")}})
        ...     read_config(folder)
        {'seed': 1, 'sigma': {'end': inf}}
    """
    workdir = Path(workdir)
    if (workdir / CONFIG_FILE).exists():
        check_workdir(workdir, config)
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_encode(config), indent=2, sort_keys=True, allow_nan=False)
        write_atomically(workdir / CONFIG_FILE, text + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to the workdir {workdir} ({error.strerror}); choose another --workdir"
        ) from error


def check_workdir(workdir: str | Path, config: Mapping[str, Any]) -> None:
    """Checks that a workdir holds the run of a config.

    Args:
        workdir: directory of a run.
        config: the config; what the data decide is compared where both have it.

    Raises:
        UserError: it holds no run, or that of another config.
    """
    saved, own = _flatten(read_config(workdir)), _flatten(_decode(_encode(config)))

    def differs(key: str) -> bool:
        name = key.removeprefix("pretrain.")  # the config of a dense phase is one too
        if name in NOT_PART_OF_A_RUN or name.startswith(SECTIONS_NOT_PART_OF_A_RUN):
            return False
        if name in DECIDED_BY_DATA and None in (saved.get(key), own.get(key)):
            return False
        return saved.get(key) != own.get(key)  # a key without a value may as well be missing

    if differing := sorted(filter(differs, saved.keys() | own.keys())):
        details = ", ".join(
            f"{key} is {saved.get(key)!r} there and {own.get(key)!r} here" for key in differing[:3]
        )
        raise UserError(
            f"workdir {workdir} holds the run of another config ({details}); use another --workdir "
            "or that run's config and data"
        )


def read_config(workdir: str | Path) -> dict[str, Any]:
    """The config of the run in a workdir.

    Raises:
        UserError: the workdir holds no run, or its config file is damaged.
    """
    path = Path(workdir) / CONFIG_FILE
    try:
        return _decode(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} holds no run ({CONFIG_FILE} is missing); train first") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it from a copy") from error


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a part of it
        raise


def _encode(value: Any) -> Any:
    """JSON has no infinity: it becomes a string, as do the keys."""
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    return float(value) if value in ("inf", "-inf") else value


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
