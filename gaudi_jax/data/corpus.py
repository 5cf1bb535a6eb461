"""Text by name: embedded, in files, from the Hugging Face hub, or from TFDS; in three splits."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gaudi_jax.data.prepared import open_prepared
from gaudi_jax.errors import UserError, reason

log = logging.getLogger(__name__)

FORMS = "docs, text:PATH, hf:OWNER/NAME:CONFIG, tfds:NAME"
#: Stands for bytes that are no UTF-8.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Files of a folder that are a split of their own; the first name that is there is taken.
SPLIT_FILES = {
    "train": ("train.txt",),
    "validation": ("validation.txt", "valid.txt", "val.txt"),
    "test": ("test.txt",),
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text in three splits.

    Attributes:
        train: text to learn from.
        validation: text for every choice that is made.
        test: text for the final measurement.
        replaced: places in all splits that were no UTF-8 and became U+FFFD.
    """

    train: str
    validation: str
    test: str
    replaced: int = 0

    @property
    def sha256(self) -> str:
        """Hash of the splits' UTF-8, one after the other.

        A test split that is the validation split counts once, so that a file that is cut in two
        has the hash of its bytes.
        """
        parts = [self.train, self.validation]
        if self.test is not self.validation:
            parts.append(self.test)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.encode())
        return digest.hexdigest()


def load_corpus(
    name: str, *, validation_fraction: float = 0.05, test_fraction: float = 0.05
) -> Corpus:
    """Reads text by name.

    Splits that the data have are kept. Where there is no validation split, the end of the text is
    held out: from its end backwards, the test split (if the data have none) and then the validation
    split, each one piece of the given share of the characters. Where there is no test split even
    then, the validation split serves.

    Args:
        name: one of

            * ``docs``: the topics of Python's documentation that Python carries
              (`pydoc_data.topics`), about half a megabyte that differs from version to version;
            * ``text:PATH``: a file, or a folder: either with train.txt and perhaps validation.txt
              (or valid.txt, val.txt) and test.txt, or with none of these but any other ``*.txt``
              in it and below, in the order of their paths, hidden ones left out;
            * ``hf:OWNER/NAME`` or ``hf:OWNER/NAME:CONFIG``: the column "text" of a data set on the
              Hugging Face hub, each row ending in a line end (needs the package datasets);
            * ``tfds:NAME``: the feature "text" of a prepared TensorFlow Datasets set, likewise.

            Bytes that are no UTF-8 are replaced by U+FFFD, and counted.
        validation_fraction: share of the text, in (0, 1).
        test_fraction: share of the text, in [0, 1); both together leave some for training.

    Raises:
        UserError: the name is unknown, or the data are missing, empty or unreadable.

    Example:
        >>> from gaudi_jax.data.corpus import load_corpus
        >>> load_corpus("docs").train[:22]
        'The "assert" statement'
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"data.validation_fraction={validation_fraction} is outside (0, 1)")
    if not 0 <= test_fraction < 1 - validation_fraction:
        raise UserError(
            f"data.test_fraction={test_fraction} is outside [0, {1 - validation_fraction:g}), "
            "what data.validation_fraction leaves"
        )
    kind, _, rest = name.partition(":")
    if name == "docs":
        parts = {"train": _Part(_docs())}
    elif kind == "text" and rest:
        try:
            parts = _files(Path(rest).expanduser())
        except (OSError, RuntimeError) as error:  # the latter of a home that is not there
            raise UserError(
                f"cannot read {name} ({reason(error)}); make it readable, or choose another text"
            ) from error
    elif kind == "hf" and rest:
        parts = _hub(rest)
    elif kind == "tfds" and rest:
        parts = _tfds(rest)
    else:
        raise UserError(f"unknown text {name!r}; use one of {FORMS}")
    for split, part in parts.items():
        if not part.text.strip():
            raise UserError(f"the {split} text of {name} is empty; give a corpus with text in it")
    texts = {split: part.text for split, part in parts.items()}
    corpus = _completed(name, texts, validation_fraction, test_fraction)
    return dataclasses.replace(corpus, replaced=sum(part.replaced for part in parts.values()))


class _Part(NamedTuple):
    """Text of a source, and the places in it that were no UTF-8."""

    text: str
    replaced: int = 0


def _completed(
    name: str, texts: Mapping[str, str], validation_fraction: float, test_fraction: float
) -> Corpus:
    train, validation, test = (texts.get(split) for split in ("train", "validation", "test"))
    if train is None:
        raise UserError(f"{name} has no train split, only {', '.join(texts)}; choose another text")
    if validation is None:
        size = len(train)
        if test is None and test_fraction:
            train, test = _cut(train, round(test_fraction * size))
        train, validation = _cut(train, round(validation_fraction * size))
    if test is None:
        log.warning("%s has no test split: the validation text serves as test text", name)
        test = validation
    return Corpus(train, validation, test)


def _cut(text: str, end: int) -> tuple[str, str]:
    """The text without its end, and the end."""
    return text[: len(text) - end], text[len(text) - end :]


def _docs() -> str:
    from pydoc_data.topics import topics  # type: ignore[import-untyped]

    return "\n".join(topics[name] for name in sorted(topics))


def _files(path: Path) -> dict[str, _Part]:
    if path.is_file():
        return {"train": _decoded([path.read_bytes()], path)}
    if not path.is_dir():
        raise UserError(f"there is no file or folder {path}; give text:PATH of one")
    own = {
        split: next((path / name for name in names if (path / name).is_file()), None)
        for split, names in SPLIT_FILES.items()
    }
    found = {split: file for split, file in own.items() if file}
    if found and "train" not in found:  # what is held out must not become training text
        held_out = " and ".join(file.name for file in found.values())
        raise UserError(
            f"folder {path} holds {held_out} but no train.txt; give the text to train on that name"
        )
    if found:
        return {split: _decoded([file.read_bytes()], file) for split, file in found.items()}
    paths = [
        file
        for file in sorted(path.rglob("*.txt"))
        if file.is_file() and not any(p[0] == "." for p in file.relative_to(path).parts)
    ]
    if not paths:
        raise UserError(f"folder {path} holds no *.txt file; put text in it, or name a file")
    return {"train": _decoded([p.read_bytes() for p in paths], path)}


def _hub(name: str) -> dict[str, _Part]:
    path, _, config = name.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"hf:{name} needs the package datasets; run pip install datasets"
        ) from error
    try:
        sets = datasets.load_dataset(path, config or None)
    except Exception as error:  # many kinds, from unknown names to a missing network
        raise UserError(
            f"cannot load the data set hf:{name} ({reason(error)}); check the name, and the "
            "network or the cache of datasets"
        ) from error
    for split in sets:
        if "text" not in sets[split].column_names:
            raise UserError(
                f"hf:{name} has no column 'text' but {', '.join(sets[split].column_names)}; "
                "choose a data set of text"
            )
    return {split: _Part(_lines(sets[split]["text"])) for split in SPLIT_FILES if split in sets}


def _tfds(name: str) -> dict[str, _Part]:
    info, sources = open_prepared(name)
    if "text" not in info.features:
        raise UserError(
            f"tfds:{name} has no feature 'text' but {', '.join(info.features)}; choose a set of "
            "text"
        )
    return {
        split: _decoded([example["text"] for example in sources[split]], f"tfds:{name}")
        for split in SPLIT_FILES
        if split in sources
    }


def _decoded(pieces: Iterable[bytes], origin: Any) -> _Part:
    """Joins pieces of UTF-8 into text in which each ends a line, and says what had to be replaced.

    A single piece stays as it is.
    """
    pieces = list(pieces)
    texts = [piece.decode(errors="replace") for piece in pieces]
    meant = sum(piece.count(REPLACEMENT.encode()) for piece in pieces)
    replaced = sum(text.count(REPLACEMENT) for text in texts) - meant
    if replaced:
        log.warning("%s: %d places that are no UTF-8 were replaced by U+FFFD", origin, replaced)
    return _Part(texts[0] if len(texts) == 1 else _lines(texts), replaced)


def _lines(texts: Iterable[str]) -> str:
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts)
