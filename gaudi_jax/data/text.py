"""Text as windows of token ids: corpus and tokenizer by name, ids cached on disk, batches."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Int

from gaudi_jax.data.corpus import load_corpus
from gaudi_jax.data.shards import WHOLE, Shard, batched, part_size
from gaudi_jax.data.tokenizers import Tokenizer, cached, load_tokenizer
from gaudi_jax.errors import UserError

CACHE_DIR = "~/.cache/gaudi_jax"
#: A window is cut faster than threads hand it over.
_READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """One split of a text.

    Attributes:
        tokens: token ids, uint16 or uint32, shape (tokens,), memory-mapped.
        num_bytes: length of the text in UTF-8.
        num_words: words between white space, and line ends, which WikiText counts as words.
    """

    tokens: Int[np.ndarray, " tokens"]
    num_bytes: int
    num_words: int


@dataclasses.dataclass(frozen=True)
class TextSplits:
    """A text as token ids.

    Attributes:
        train: text to learn from.
        validation: text for every choice that is made.
        test: text for the final measurement.
        tokenizer: what made the token ids.
        sha256: of the text, see `gaudi_jax.data.corpus.Corpus`.
        replaced: places in the text that were no UTF-8 and became U+FFFD.
    """

    train: TokenSplit
    validation: TokenSplit
    test: TokenSplit
    tokenizer: Tokenizer
    sha256: str
    replaced: int


def load_text(
    name: str,
    *,
    tokenizer: str = "chars",
    validation_fraction: float = 0.05,
    test_fraction: float = 0.05,
    cache_dir: str | Path = CACHE_DIR,
) -> TextSplits:
    """Opens a text by name.

    The token ids of each split are kept in `cache_dir`, in a file named by the hash of the split's
    text and the tokenizer, and memory-mapped.

    Args:
        name: see `gaudi_jax.data.corpus.load_corpus`.
        tokenizer: see `gaudi_jax.data.tokenizers.load_tokenizer`.
        validation_fraction: share held out where the text has no validation split, in (0, 1).
        test_fraction: share held out where it has no test split either, in [0, 1).
        cache_dir: folder of token ids and trained tokenizers.

    Raises:
        UserError: a name is unknown, the text is missing or empty, or the cache cannot be written.

    Example:
        >>> import tempfile
        >>> from gaudi_jax.data.text import load_text
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     splits = load_text("docs", cache_dir=folder)
        ...     splits.tokenizer.decode(splits.train.tokens[:22])
        'The "assert" statement'
    """
    corpus = load_corpus(name, validation_fraction=validation_fraction, test_fraction=test_fraction)
    folder = Path(cache_dir).expanduser()
    encoder = load_tokenizer(tokenizer, corpus, cache_dir=folder)
    splits = {
        split: _token_split(getattr(corpus, split), encoder, folder)
        for split in ("train", "validation", "test")
    }
    return TextSplits(**splits, tokenizer=encoder, sha256=corpus.sha256, replaced=corpus.replaced)


def train_windows(
    tokens: Int[np.ndarray, " tokens"],
    *,
    block: int,
    batch_size: int,
    seed: int,
    shard: Shard = WHOLE,
) -> grain.DatasetIterator:
    """An endless iterator over batches of windows of ``block + 1`` tokens.

    In every epoch the text is cut anew into windows, from a random place on, and the windows are
    shuffled. Two neighbours share one token, so that in an epoch every token is a target at most
    once, and almost all are. What is left of an epoch is carried into the next one.
    ``get_state()`` and ``set_state()`` resume the iterator exactly.

    Args:
        tokens: token ids of the training split.
        block: tokens that the model reads at once.
        batch_size: windows a batch.
        seed: of cuts and order.
        shard: (number, count) of the part of every batch that is read; the whole one by default.

    Returns:
        An iterator over ``{"tokens": int32 (rows, block + 1)}``, with as many rows as a part has:
        all but the last are inputs, all but the first are targets.

    Raises:
        UserError: the text is shorter than one window, or an option is not positive.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.data.text import train_windows
        >>> next(train_windows(np.arange(100), block=8, batch_size=4, seed=0))["tokens"].shape
        (4, 9)
    """
    _check_options(block, batch_size)
    if len(tokens) < block + 1:
        raise UserError(
            f"the training text has {len(tokens)} tokens, less than one window of "
            f"data.{block=} and its target; choose a smaller block or more text"
        )
    # As many as fit wherever the cut falls (or one); the slack is what the cut can vary by.
    count = max(1, (len(tokens) - block) // block)
    slack = len(tokens) - 1 - count * block

    @functools.lru_cache(maxsize=2)  # of the last epoch and this one, which may meet in a batch
    def cut(epoch: int) -> int:
        return int(np.random.default_rng((seed, epoch)).integers(slack + 1))

    def windows(starts: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": tokens[starts[:, None] + np.arange(block + 1)].astype(np.int32)}

    starts = (
        grain.MapDataset.range(count)
        .seed(seed)
        .shuffle()
        .repeat()  # the index counts on, so that it tells the epoch
        .map_with_index(lambda index, place: cut(index // count) + place * block)
    )
    batches = batched(starts, batch_size, shard, drop_remainder=True).map(windows)
    return iter(batches.to_iter_dataset(_READ_OPTIONS))


def evaluation_windows(
    tokens: Int[np.ndarray, " tokens"],
    *,
    block: int,
    batch_size: int,
    stride: int | None = None,
    shard: Shard = WHOLE,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of windows in which every token but the first is scored once, in order.

    Windows start every `stride` tokens. With a stride below `block` they overlap, and a window
    scores only the tokens that the one before it has not reached: every token (but those at the
    beginning) is predicted from at least ``block - stride`` others.

    Args:
        tokens: token ids of a split.
        block: tokens that the model reads at once.
        batch_size: windows a batch; the last one is padded with windows of weight 0.
        stride: in [1, block]; None is block: windows side by side.
        shard: (number, count) of the part of every batch that is read; the whole one by default.

    Returns:
        Batches of "tokens", int32 (rows, block + 1), zeros after the text's end, and "weight",
        float32 (rows, block): 1 for the targets ``tokens[:, 1:]`` that count, which are
        ``len(tokens) - 1`` in all. A part has as many rows as its share of the batch.

    Raises:
        UserError: there are fewer than two tokens, or an option is out of range.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.data.text import evaluation_windows
        >>> for batch in evaluation_windows(np.arange(8), block=4, batch_size=2, stride=2):
        ...     print(*batch["tokens"], batch["weight"].astype(int).tolist())
        [0 1 2 3 4] [2 3 4 5 6] [[1, 1, 1, 1], [0, 0, 1, 1]]
        [4 5 6 7 0] [0 0 0 0 0] [[0, 0, 1, 0], [0, 0, 0, 0]]
    """
    stride = block if stride is None else stride
    _check_options(block, batch_size)
    if not 1 <= stride <= block:
        raise UserError(f"data.{stride=} must lie in [1, {block}], the number of tokens read")
    if len(tokens) < 2:
        raise UserError(f"a text of {len(tokens)} tokens has none to predict; give a longer one")
    # The window at `start` reaches the targets up to start + block; the last one is len - 1.
    starts = range(0, max(1, len(tokens) - 1 - block + stride), stride)
    return _evaluation_batches(tokens, starts, block, batch_size, shard)


def _evaluation_batches(
    tokens: np.ndarray, starts: range, block: int, batch_size: int, shard: Shard
) -> Iterator[dict[str, np.ndarray]]:
    rows = part_size(batch_size, shard)
    for first in range(0, len(starts), batch_size):
        windows = np.zeros((rows, block + 1), np.int32)
        weight = np.zeros((rows, block), np.float32)
        own = first + shard[0] * rows
        for row, start in enumerate(starts[own : own + rows]):
            window = tokens[start : start + block + 1]
            windows[row, : len(window)] = window
            scored = block - starts.step if start else 0  # by the window before
            weight[row, scored : len(window) - 1] = 1
        yield {"tokens": windows, "weight": weight}


def unigram_loss(
    train: Int[np.ndarray, " tokens"], evaluated: Int[np.ndarray, " tokens"], vocab_size: int
) -> float:
    """Mean loss, in nats a token, of predicting every token by its frequency alone.

    Every token is counted once more than it occurs in training, so that none is impossible.

    Args:
        train: token ids that are counted.
        evaluated: token ids that are predicted.
        vocab_size: number of different tokens.

    Example:
        >>> import numpy as np
        >>> from gaudi_jax.data.text import unigram_loss
        >>> round(float(np.exp(unigram_loss(np.array([0, 1]), np.array([1, 0, 0]), 2))), 6)
        2.0
    """
    counts = np.bincount(train, minlength=vocab_size) + 1
    return float(-np.log(counts / counts.sum())[evaluated].mean())


def _token_split(text: str, tokenizer: Tokenizer, folder: Path) -> TokenSplit:
    content = text.encode()
    key = hashlib.sha256(content + tokenizer.fingerprint.encode()).hexdigest()
    tokens = cached(
        folder / f"{key}.npy",
        lambda file: np.save(file, tokenizer.encode(text)),
        functools.partial(np.load, mmap_mode="r"),
    )
    words = sum(len(line.split()) for line in text.split("\n"))
    return TokenSplit(tokens, len(content), words + text.count("\n"))


def _check_options(block: int, batch_size: int) -> None:
    if block < 1 or batch_size < 1:
        raise UserError(f"data.{block=} and data.{batch_size=} must be positive")
