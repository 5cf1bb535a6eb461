"""Text generation: prompts of token ids in, continuations out, by one compiled loop."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from gaudi_jax.errors import UserError
from gaudi_jax.models.gpt2 import GPT2


def generate(
    model: GPT2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_length: int | None = None,
    key: Array | None = None,
) -> Int[np.ndarray, "B new"]:
    """Continues every prompt by the same number of tokens.

    The model reads the prompts once and then token after token, the keys and values of earlier
    tokens being cached. All of it is compiled once for a model's graph, a number of prompts and a
    maximum length, whatever the prompts, the number of new tokens and the sampling options are
    (`top_k` and `top_p` compile one more variant, which sorts the logits).

    A row that does not fit into `max_length` forgets all but its last ``max_length // 2`` tokens
    and goes on from these.

    Args:
        model: the model; it runs in evaluation mode and is left as it is.
        prompts: token ids, at least one a prompt; prompts may differ in length.
        max_new_tokens: tokens to add to every prompt, at least 0.
        temperature: divides the logits before sampling, >= 0; 0 takes the likeliest token (greedy).
        top_k: sample among the k likeliest tokens only, k >= 1.
        top_p: sample among the fewest likeliest tokens whose probabilities reach top_p, in (0, 1]
            (nucleus sampling, arXiv:1904.09751); of the `top_k` likeliest if both are given.
        max_length: most tokens that the model reads of a row, in [1, context]; None is the
            context. Reading prompts takes the time of reading rows of this length.
        key: random key; needed unless the temperature is 0.

    Returns:
        The new tokens, int32, shape (number of prompts, max_new_tokens).

    Raises:
        UserError: a prompt is empty, longer than `max_length` or holds something else than ids that
            the model knows, or an option is out of range.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax.models import GPT2, GPT2Config
        >>> from gaudi_jax.models.generate import generate
        >>> config = GPT2Config(vocab_size=50, context=8, width=16, depth=1, heads=2)
        >>> model = GPT2(config, rngs=nnx.Rngs(0))
        >>> generate(model, [[1, 2, 3], [4]], max_new_tokens=5, temperature=0).shape
        (2, 5)
    """
    context, vocab_size = model.config.context, model.config.vocab_size
    max_length = context if max_length is None else max_length
    if not 1 <= max_length <= context:
        raise UserError(f"max_length={max_length} must lie in [1, {context}], the model's context")
    _check_sampling(max_new_tokens, temperature, top_k, top_p, key)
    rows = [_checked_prompt(prompt, vocab_size, max_length) for prompt in prompts]
    graphdef, state = nnx.split(nnx.view(model, deterministic=True))

    new = [np.zeros((len(rows), 0), np.int32)]
    missing = max_new_tokens if rows else 0
    while missing:
        # The last token of a row is never read, so one more fits than the model reads.
        room = max_length + 1 - max(map(len, rows))
        if room == 0:
            half = max(1, max_length // 2)
            rows = [row[-half:] if len(row) > max_length else row for row in rows]
            continue
        count = min(room, missing)
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = _continue(
            graphdef,
            state,
            np.stack([np.pad(row, (0, max_length + 1 - len(row))) for row in rows]),
            lengths,
            count,
            None if key is None else jax.random.fold_in(key, missing),
            float(temperature),
            min(top_k or vocab_size, vocab_size),
            1.0 if top_p is None else float(top_p),
            truncate=top_k is not None or top_p is not None,
        )
        rows = [row[: n + count] for row, n in zip(np.asarray(tokens), lengths, strict=True)]
        new.append(np.stack([row[-count:] for row in rows]))
        missing -= count
    return np.concatenate(new, axis=1)


@partial(jax.jit, static_argnames=("graphdef", "truncate"))
def _continue(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    count: int,
    key: Array | None,
    temperature: float,
    top_k: int,
    top_p: float,
    *,
    truncate: bool,
) -> Int[Array, "B S"]:
    """Writes `count` new tokens after the first `lengths` tokens of each row."""
    model = nnx.merge(graphdef, state)
    batch_size, places = tokens.shape
    rows = jnp.arange(batch_size)

    def write(index: Any, features: Float[Array, "B D"], tokens: Array) -> Array:
        """Chooses the new token of this index."""
        logits = model.logits(features)
        chosen = logits.argmax(-1)
        if key is not None:
            scaled = logits / jnp.where(temperature > 0, temperature, 1)
            if truncate:
                scaled = truncated(scaled, top_k, top_p)
            sampled = jax.random.categorical(jax.random.fold_in(key, index), scaled)
            chosen = jnp.where(temperature > 0, sampled, chosen)
        return tokens.at[rows, lengths + index].set(chosen.astype(tokens.dtype))

    def step(carry: tuple) -> tuple:
        index, tokens, cache = carry
        last = (lengths + index - 1)[:, None]
        features, cache = model.extend(tokens[rows[:, None], last], last, cache)
        return index + 1, write(index, features[:, 0], tokens), cache

    # Prompts are padded on the right: no token sees the padding, which lies behind it until the new
    # tokens overwrite it.
    positions = jnp.broadcast_to(jnp.arange(places - 1), (batch_size, places - 1))
    cache = model.empty_cache(batch_size, places - 1)
    features, cache = model.extend(tokens[:, :-1], positions, cache)
    tokens = write(0, features[rows, lengths - 1], tokens)
    return jax.lax.while_loop(lambda carry: carry[0] < count, step, (1, tokens, cache))[1]


def truncated(
    logits: Float[Array, "B vocab"], top_k: int | Array, top_p: float | Array
) -> Float[Array, "B vocab"]:
    """Logits with all but the likeliest tokens at minus infinity.

    Args:
        logits: shape (B, vocab).
        top_k: number of likeliest tokens that are kept, >= 1.
        top_p: of these, the fewest whose share of the probability reaches top_p are kept; the
            likeliest token always is. In (0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.models.generate import truncated
        >>> truncated(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), 3, 0.6)[0].tolist()
        [-0.69..., -inf, -1.20...]
    """
    ordered = jnp.sort(logits, descending=True)
    first = jnp.arange(logits.shape[-1]) < top_k
    probabilities = jax.nn.softmax(jnp.where(first, ordered, -jnp.inf))
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The sum is rounded: it may stay below 1 at the end, or reach 1 before it.
    kept = first & ((before < top_p) | (top_p >= 1))
    smallest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def _check_sampling(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    key: Array | None,
) -> None:
    if max_new_tokens < 0 or max_new_tokens % 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be a whole number, at least 0")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature} must be a number >= 0; 0 is greedy")
    if top_k is not None and (top_k < 1 or top_k % 1):
        raise UserError(f"top_k={top_k} must be a whole number, at least 1; use None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p} is outside (0, 1]; use None for all tokens")
    if key is None and temperature > 0:
        raise UserError(
            f"temperature={temperature} draws at random and needs key=jax.random.key(...); "
            "use temperature=0 for greedy"
        )


def _checked_prompt(prompt: Sequence[int], vocab_size: int, max_length: int) -> np.ndarray:
    row = np.asarray(prompt)
    if row.ndim != 1 or not len(row):
        raise UserError(
            f"a prompt of shape {row.shape} is not a list of at least one token id; give every "
            "prompt a list of its own"
        )
    if len(row) > max_length:
        raise UserError(
            f"a prompt of {len(row)} tokens is longer than max_length={max_length}, what the model "
            "reads at most; cut it"
        )
    if not np.issubdtype(row.dtype, np.integer):
        raise UserError(
            f"a prompt with {row.tolist()[0]!r} holds no token ids, which are integers; encode it "
            "with the model's tokenizer"
        )
    if row.min() < 0 or row.max() >= vocab_size:
        unknown = row.min() if row.min() < 0 else row.max()
        raise UserError(
            f"token id {unknown} of a prompt is outside [0, {vocab_size}); use the tokenizer that "
            "belongs to the model"
        )
    return row.astype(np.int32)
