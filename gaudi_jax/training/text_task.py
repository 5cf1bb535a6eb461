"""Language modelling: every token of a text is predicted from those before it."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from ml_collections import ConfigDict

from gaudi_jax.data.shards import WHOLE, Shard, round_up
from gaudi_jax.data.text import (
    TextSplits,
    evaluation_windows,
    load_text,
    train_windows,
    unigram_loss,
)
from gaudi_jax.data.tokenizers import TOKENIZER
from gaudi_jax.errors import UserError
from gaudi_jax.models.generate import generate

#: Samples of a summary: how many, and the most tokens that are given and added.
SAMPLES, PROMPT, CONTINUATION = 3, 32, 160
TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Windows of text (the contract is `gaudi_jax.training.tasks.Task`).

    A batch holds "tokens", int32 (B, block + 1): all but the last are the model's input, all but
    the first are predicted. In evaluation "weight", float32 (B, block), says which predictions
    count.

    Attributes:
        config: resolved config.
        splits: the text as token ids.
    """

    config: ConfigDict
    splits: TextSplits
    unit = "token"

    @classmethod
    def open(cls, config: ConfigDict) -> "TextTask":
        """Opens the text of a config.

        Raises:
            UserError: the text or the tokenizer is unknown, missing or unreadable, an option is out
                of range, the model is too small for the tokenizer or the windows, a split has no
                token to predict, or the text or the vocabulary is not the one that the config's run
                began with.
        """
        data = config.data
        splits = load_text(
            data.name,
            tokenizer=data.tokenizer,
            validation_fraction=data.validation_fraction,
            test_fraction=data.test_fraction,
            cache_dir=data.cache_dir,
        )
        if data.get("corpus_sha256") not in (None, splits.sha256):
            # The state of the run's iterator would stand for other windows.
            raise UserError(
                f"data.name={data.name!r} is another text than this run began with; use the text "
                "that it began with, or start another run from this one's model with init_from"
            )
        vocabulary = splits.tokenizer.vocabulary_digest
        if data.get("vocabulary_digest") not in (None, vocabulary):
            raise UserError(
                f"data.tokenizer={data.tokenizer!r} on data.name={data.name!r} has another "
                "vocabulary than this run began with; use the text that it began with, or a "
                "tokenizer from files (hf:DIRECTORY)"
            )
        resolved = config.copy_and_resolve_references()
        model = resolved.model
        with resolved.unlocked():
            # Part of the config, to be known wherever the run goes on or is started from.
            resolved.data.vocabulary_digest = vocabulary
            resolved.data.corpus_sha256 = splits.sha256
            if "pretrain" in resolved:  # its model must know the same tokens
                resolved.pretrain.data.vocabulary_digest = vocabulary
                if resolved.pretrain.data.name == data.name:  # it may have a text of its own
                    resolved.pretrain.data.corpus_sha256 = splits.sha256
            if model.vocab_size is None:
                model.vocab_size = splits.tokenizer.vocab_size
            if model.context is None:
                model.context = data.block
        if model.vocab_size < splits.tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size={model.vocab_size} is less than the "
                f"{splits.tokenizer.vocab_size} tokens of data.tokenizer={data.tokenizer!r}; use "
                "the tokenizer that belongs to the model, or a larger vocabulary"
            )
        if data.block > model.context:
            raise UserError(
                f"data.block={data.block} is longer than model.context={model.context}; choose a "
                "smaller block"
            )
        task = cls(resolved, splits)
        for split in ("validation", "test"):
            size = len(getattr(splits, split).tokens)
            if size < 2:
                raise UserError(
                    f"the {split} text of data.name={data.name!r} has {size} tokens and so none to "
                    "predict; give a longer text, or, where it is cut from the training text, a "
                    f"larger share of it than data.{split}_fraction={data[f'{split}_fraction']}"
                )
            task.evaluation_batches(split)  # which checks its options at once
        return task

    @property
    def units_per_step(self) -> int:
        """Tokens of a training step."""
        return self.config.data.batch_size * self.config.data.block

    @property
    def example(self) -> jax.ShapeDtypeStruct:
        """One window."""
        return jax.ShapeDtypeStruct((1, self.config.data.block), jnp.int32)

    def describe(self) -> str:
        """The data in a few words."""
        tokens, vocabulary = len(self.splits.train.tokens), self.splits.tokenizer.vocab_size
        return f"{self.config.data.name}: {tokens} training tokens, {vocabulary} different ones"

    def save_extras(self, workdir: Path) -> None:
        """The tokenizer, in the folder ``tokenizer``."""
        self.splits.tokenizer.save(workdir / TOKENIZER)

    def train_batches(self, shard: Shard = WHOLE) -> grain.DatasetIterator:
        """Endless batches of shuffled windows, resumable."""
        data = self.config.data
        return train_windows(
            self.splits.train.tokens,
            block=data.block,
            batch_size=data.batch_size,
            seed=self.config.seed,
            shard=shard,
        )

    def evaluation_batches(
        self, split: str, shard: Shard = WHOLE, *, multiple: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """All tokens of a split, each predicted once, in order; the last batch is padded."""
        data = self.config.data
        return evaluation_windows(
            getattr(self.splits, split).tokens,
            block=data.block,
            batch_size=round_up(data.batch_size // self.config.train.accumulate, multiple),
            stride=data.stride or None,
            shard=shard,
        )

    def abstract_batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Windows with their targets."""
        return {"tokens": jax.ShapeDtypeStruct((rows, self.config.data.block + 1), jnp.int32)}

    def inputs(self, batch: Mapping[str, Array]) -> Array:
        """Token ids, shape (B, block)."""
        return batch["tokens"][:, :-1]

    def loss(
        self, model: Any, batch: Mapping[str, Array], key: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Mean cross-entropy of the next tokens, in nats."""
        logits = model(self.inputs(batch), rngs=nnx.Rngs(dropout=key))
        return _losses(logits, batch).mean(), {}

    def sums(self, model: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Sums of losses and tokens, of the predictions that count."""
        losses = _losses(model(self.inputs(batch)), batch)
        weight = batch["weight"]
        return {"loss": (losses * weight).sum(), "tokens": weight.sum()}

    def results(self, sums: Mapping[str, float], split: str) -> dict[str, float]:
        """Mean loss (nats a token), perplexity, and bits a byte; of WikiText also word perplexity.

        The latter two spread the loss of all tokens over the bytes and words of the split's text,
        and so do not depend on the tokenizer.
        """
        total, text = sums["loss"], getattr(self.splits, split)
        loss = total / sums["tokens"]
        results = {
            "loss": loss,
            "perplexity": _exp(loss),
            "bits_per_byte": total / math.log(2) / text.num_bytes,
        }
        if "wikitext" in self.config.data.name.lower():
            results["word_perplexity"] = _exp(total / text.num_words)
        return results

    def score(self, results: Mapping[str, float]) -> float:
        """The loss, negative."""
        return -results["loss"]

    def remarks(self, model: Any) -> dict[str, Any]:
        """The text's hash, flaws and sizes, the perplexity of its tokens' frequencies, samples."""
        train, test = self.splits.train.tokens, self.splits.test.tokens
        vocab_size = self.splits.tokenizer.vocab_size
        return {
            "corpus_sha256": self.splits.sha256,
            "replaced_utf8": self.splits.replaced,
            "tokens": {
                split: len(getattr(self.splits, split).tokens)
                for split in ("train", "validation", "test")
            },
            "vocab_size": vocab_size,
            "stride": self.config.data.stride or self.config.data.block,
            "unigram_perplexity": _exp(unigram_loss(train, test, vocab_size)),
            "samples": self._samples(model),
        }

    def _samples(self, model: Any) -> list[dict[str, str]]:
        """Pieces of the validation text as the model goes on with them."""
        tokens, decode = self.splits.validation.tokens, self.splits.tokenizer.decode
        length = min(PROMPT, max(1, self.config.data.block // 2), len(tokens))
        starts = np.linspace(0, len(tokens) - length, SAMPLES, dtype=int)
        prompts = [tokens[start : start + length].tolist() for start in starts]
        new = generate(
            model,
            prompts,
            max_new_tokens=CONTINUATION,
            temperature=TEMPERATURE,
            key=jax.random.key(0),
        )
        return [
            {"prompt": decode(prompt), "continuation": decode(continuation)}
            for prompt, continuation in zip(prompts, new, strict=True)
        ]


def _losses(logits: Array, batch: Mapping[str, Array]) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])


def _exp(loss: float) -> float:
    """Perplexity; infinite where it is too large for a number."""
    return math.exp(loss) if loss < 700 else math.inf
