"""Tokenizers by name: single characters, BPE trained on the corpus, or one of Hugging Face."""

import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from gaudi_jax.data.corpus import Corpus
from gaudi_jax.errors import UserError, reason
from gaudi_jax.zoo import published_folder

log = logging.getLogger(__name__)

Content = TypeVar("Content")

FORMS = "chars, bpe:VOCAB_SIZE, hf:DIRECTORY_OR_ID"
BYTES = 256
#: The largest vocabulary that is trained. The trainer reserves memory for all of it at once, and
#: ends the process where there is none.
LARGEST = 2**20
#: The file of a saved tokenizer.
FILE = "tokenizer.json"
#: Folder of a run or of a published model.
TOKENIZER = "tokenizer"
#: Characters of a piece, and pieces that are encoded at once: enough for all cores, while what the
#: tokenizer keeps of every token beside its id stays under a gigabyte.
PIECE, PIECES = 2**18, 32


class Tokenizer:
    """Turns text into token ids and back.

    Args:
        backend: a tokenizer of the package tokenizers. Its truncation and padding are turned off:
            every token of a text counts, and no others.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        vocabulary_digest: 16 hex digits that the tokens and their ids decide: where they are the
            same, a model trained with one tokenizer can read the ids of another.
        fingerprint: sha256 of all that the tokenizer does.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        self.vocabulary_digest = _sha256(json.dumps(vocabulary, sort_keys=True))[:16]
        self.fingerprint = _sha256(backend.to_str())

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Token ids of a text, without special tokens around it.

        Long texts are cut at line ends into pieces of about 262 thousand characters; at a cut, a
        token or two may differ from those of the uncut text.

        Returns:
            uint16 or uint32, see `dtype`.

        Raises:
            UserError: a character has no token (single characters only).

        Example:
            >>> from gaudi_jax.data.tokenizers import character_tokenizer
            >>> tokenizer = character_tokenizer("abc")
            >>> tokenizer.encode("cab").tolist(), tokenizer.decode([1, 1, 0])
            ([2, 0, 1], 'bba')
        """
        parts = [np.zeros(0, self.dtype)]
        remaining = pieces(text)
        try:
            while group := list(itertools.islice(remaining, PIECES)):
                encodings = self._backend.encode_batch_fast(group, add_special_tokens=False)
                parts += [np.array(encoding.ids, self.dtype) for encoding in encodings]
        # The package raises nothing more special for a word that has neither an id nor a stand-in.
        except Exception as error:
            unknown = next((c for c in text if self._backend.token_to_id(c) is None), None)
            if unknown is None:
                raise
            raise UserError(
                f"the tokenizer has no token for {unknown!r}; leave it out, or use a tokenizer "
                "bpe:VOCAB_SIZE"
            ) from error
        return np.concatenate(parts)

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in token_ids], skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Writes a folder for `read_tokenizer`, ``hf:DIRECTORY`` and transformers."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(self._backend.to_str(pretty=True), "utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            # Text comes back as it was; the clean-up would join punctuation with what precedes it.
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a run, or of a published model of text.

    Args:
        source: a directory that `Tokenizer.save` wrote, such as ``WORKDIR/tokenizer``, or the name
            of a published model, as in `gaudi_jax.load`: ``zoo:NAME``, ``hf:OWNER/NAME``, or its
            directory.

    Raises:
        UserError: it is not there, or is damaged.

    Example:
        >>> import tempfile
        >>> from gaudi_jax.data.tokenizers import character_tokenizer, read_tokenizer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     character_tokenizer("abc").save(folder)
        ...     read_tokenizer(folder).encode("cab").tolist()
        [2, 0, 1]
        >>> tokenizer = read_tokenizer("zoo:docs-gpt-gaudi")
        >>> tokenizer.decode(tokenizer.encode("The for statement"))
        'The for statement'
    """
    published = published_folder(source)
    file = (Path(source) if published is None else published / TOKENIZER) / FILE
    try:
        return _read(file)
    except Exception as error:  # the package raises nothing more special
        raise UserError(
            f"cannot read the tokenizer {file} ({reason(error)}); give a folder that a run or "
            "Tokenizer.save wrote"
        ) from error


def load_tokenizer(name: str, corpus: Corpus, *, cache_dir: str | Path) -> Tokenizer:
    """Makes a tokenizer by name.

    Args:
        name: one of

            * ``chars``: the characters of the corpus (of all its splits), in their order;
            * ``bpe:VOCAB_SIZE``: byte-level byte pair encoding, as GPT-2 has it, trained on the
              training split; a short text may give fewer tokens than asked for;
            * ``hf:DIRECTORY_OR_ID``: a Hugging Face tokenizer.
        corpus: the text.
        cache_dir: folder that keeps trained tokenizers.

    Raises:
        UserError: the name is unknown, the size out of range, or the tokenizer cannot be loaded.

    Example:
        >>> from gaudi_jax.data.corpus import load_corpus
        >>> from gaudi_jax.data.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer("chars", load_corpus("docs"), cache_dir="unused")
        >>> tokenizer.decode(tokenizer.encode("for"))
        'for'
    """
    kind, _, rest = name.partition(":")
    if name == "chars":
        return character_tokenizer(corpus.train + corpus.validation + corpus.test)
    if kind == "bpe":
        # Python reads no number of thousands of digits.
        size = int(rest) if rest.isdecimal() and len(rest) < 20 else 0
        if not BYTES <= size <= LARGEST:
            raise UserError(
                f"tokenizer {name!r} needs a vocabulary of at least {BYTES} and at most {LARGEST} "
                "tokens: bpe:512"
            )
        tokenizer = cached(
            Path(cache_dir) / f"{_sha256(corpus.train)}-bpe-{size}.json",
            lambda file: file.write(_trained(corpus.train, size).to_str().encode()),
            _read,
        )
        if tokenizer.vocab_size < size:
            log.warning("the text yields only %d of %d tokens", tokenizer.vocab_size, size)
        return tokenizer
    if kind == "hf" and rest:
        return _hugging_face(rest)
    raise UserError(f"unknown tokenizer {name!r}; use one of {FORMS}")


def character_tokenizer(text: str) -> Tokenizer:
    """A tokenizer whose tokens are the characters of a text.

    Example:
        >>> from gaudi_jax.data.tokenizers import character_tokenizer
        >>> character_tokenizer("hello").vocab_size
        4
    """
    vocabulary = {character: index for index, character in enumerate(sorted(set(text)))}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend)


def pieces(text: str) -> Iterator[str]:
    """Cuts a text after the first line end that follows every `PIECE` characters.

    Example:
        >>> from gaudi_jax.data.tokenizers import pieces
        >>> list(pieces("short"))
        ['short']
    """
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def cached(file: Path, write: Callable[[Any], object], read: Callable[[Path], Content]) -> Content:
    """The content of a file, which is written first if it is not there or is damaged.

    It appears complete or not at all, whatever is interrupted or runs at the same time.

    Args:
        file: its path; folders are made.
        write: writes the contents to a binary file.
        read: reads them; what it raises means that the file is damaged.

    Raises:
        UserError: the folder cannot be written.

    Example:
        >>> import pathlib, tempfile
        >>> from gaudi_jax.data.tokenizers import cached
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "a"
        ...     cached(file, lambda file: file.write(b"text"), pathlib.Path.read_text)
        'text'
    """
    if file.exists():
        try:
            return read(file)
        except Exception as error:  # of any kind: it depends on where a file was cut
            log.warning("%s cannot be read (%s) and is written anew", file, reason(error))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as unfinished:
            try:
                write(unfinished)
            except BaseException:
                os.unlink(unfinished.name)
                raise
        os.replace(unfinished.name, file)
    except OSError as error:
        raise UserError(
            f"cannot write {file} ({error.strerror}); set data.cache_dir to a folder with room"
        ) from error
    return read(file)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(file: Path) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_file(str(file)))


def _trained(text: str, vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(pieces(text), trainer)
    return backend


def _hugging_face(name: str) -> Tokenizer:
    from transformers import AutoTokenizer  # slow to import

    try:
        loaded = AutoTokenizer.from_pretrained(name)
        tokenizer = Tokenizer(loaded.backend_tokenizer)
    except Exception as error:  # many kinds, from missing files to a missing network
        raise UserError(
            f"cannot load the tokenizer hf:{name} ({reason(error)}); give a folder that holds "
            f"{FILE}, or an id on the Hugging Face hub"
        ) from error
    # Where a model lies without a tokenizer, transformers makes one up of its kind's special tokens
    # (T5's has a mark for spaces too), which loses every text.
    if set(loaded.get_vocab()) <= {*loaded.all_special_tokens, "\u2581"}:
        raise UserError(
            f"hf:{name} holds a model without tokenizer files; add its {FILE}, or name the "
            "tokenizer that it was trained with"
        )
    return tokenizer
