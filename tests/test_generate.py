import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import linear_factory
from gaudi_jax.models import GPT2, GPT2Config
from gaudi_jax.models.generate import generate, truncated

GOLDEN = Path(__file__).parent / "data/golden/hf_gpt2_tiny"
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 30]]


@functools.cache
def model(context=20, **changes):
    config = {"vocab_size": 31, "width": 16, "depth": 2, "heads": 2, "context": context} | changes
    made = GPT2(GPT2Config(**config), rngs=nnx.Rngs(1))
    # Initial values are so small that the likeliest token would hardly depend on the others.
    return nnx.merge(nnx.graphdef(made), jax.tree.map(lambda x: 8 * x, nnx.state(made)))


@nnx.jit
def logits(model, token_ids):
    return model(token_ids)


def greedy_without_cache(model, prompt, count, context=20):
    """Reads the whole row anew for every token."""
    row = list(prompt)
    for _ in range(count):
        seen = row + [0] * (context - len(row))
        row.append(int(logits(model, jnp.array([seen]))[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [{}, {"fused_qkv": False, "mlp_layer": linear_factory({"name": "gaudi", "granularity": 4})}],
)
def test_greedy_tokens_are_those_without_a_cache(changes):
    tokens = generate(model(**changes), PROMPTS, max_new_tokens=12, temperature=0)
    for prompt, row in zip(PROMPTS, tokens, strict=True):
        assert list(row) == greedy_without_cache(model(**changes), prompt, 12)
    assert len({tuple(row) for row in tokens}) == 3


def test_greedy_tokens_are_those_of_transformers():
    computed = np.load(GOLDEN / "computed.npz")
    golden = GPT2.from_pretrained(GOLDEN)
    tokens = generate(golden, computed["token_ids"][:, :9], max_new_tokens=15, temperature=0)
    np.testing.assert_array_equal(tokens, computed["greedy"])


def test_one_compilation_serves_all_prompts_lengths_and_options(monkeypatch):
    traced = []
    empty_cache = GPT2.empty_cache

    def counting(self, batch_size, length):  # runs whenever the loop is traced
        traced.append((batch_size, length))
        return empty_cache(self, batch_size, length)

    monkeypatch.setattr(GPT2, "empty_cache", counting)

    def run(prompts, **options):
        traced.clear()
        generate(model(), prompts, max_length=19, key=jax.random.key(0), **options)
        return traced

    assert run(PROMPTS, max_new_tokens=3, temperature=1.0) == [(3, 19)]
    assert run([[1], [2], [3] * 19], max_new_tokens=1, temperature=0.5) == []
    assert run(PROMPTS, max_new_tokens=30, temperature=0) == []
    assert run(PROMPTS, max_new_tokens=3, top_k=3) == [(3, 19)]
    assert run(PROMPTS, max_new_tokens=4, top_k=5, top_p=0.5) == []
    assert run(PROMPTS, max_new_tokens=4, top_p=0.8) == []


def test_a_full_row_goes_on_from_its_second_half():
    """Eight tokens are read at most: a row of nine is full, and four of them are kept."""
    prompt = PROMPTS[0]
    tokens = generate(model(), [prompt], max_new_tokens=8, temperature=0, max_length=8)[0]
    first = greedy_without_cache(model(), prompt, 4)
    rest = greedy_without_cache(model(), [*prompt, *first][-4:], 4)
    assert list(tokens) == first + rest


def test_a_prompt_as_long_as_the_context_is_continued():
    prompt = list(range(20))
    tokens = generate(model(), [prompt], max_new_tokens=1, temperature=0)
    assert tokens.tolist() == [greedy_without_cache(model(), prompt, 1)]


def test_dropout_is_off_and_the_model_stays_as_it_was():
    dropping = GPT2(dataclasses.replace(model().config, dropout=0.5), rngs=nnx.Rngs(0))
    nnx.update(dropping, nnx.state(model()))
    tokens = generate(dropping, PROMPTS, max_new_tokens=5, temperature=0)
    np.testing.assert_array_equal(
        tokens, generate(model(), PROMPTS, max_new_tokens=5, temperature=0)
    )
    assert dropping.blocks[0].dropout.deterministic is False


def test_samples_follow_the_models_distribution():
    prompts = [PROMPTS[0]] * 2000
    tokens = generate(
        model(), prompts, max_new_tokens=1, temperature=1.5, key=jax.random.key(1), max_length=5
    )
    expected = jax.nn.softmax(logits(model(), jnp.array([PROMPTS[0]]))[0, -1] / 1.5)
    counted = np.bincount(tokens[:, 0], minlength=31) / 2000
    deviation = np.sqrt(expected * (1 - expected) / 2000)
    assert (np.abs(counted - expected) < 4.5 * deviation + 1e-3).all()


def test_samples_follow_the_key():
    def sample(seed):
        return generate(model(), PROMPTS, max_new_tokens=20, key=jax.random.key(seed))

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any(axis=1).all()
    # Rows do not share their draws.
    again = generate(model(), [[1]] * 3, max_new_tokens=20, key=jax.random.key(0))
    assert (again[0] != again[1]).any()


def test_only_the_likeliest_token_is_left_at_the_extremes():
    greedy = generate(model(), PROMPTS, max_new_tokens=9, temperature=0)
    for option in ({"top_k": 1}, {"top_p": 1e-6}):
        tokens = generate(model(), PROMPTS, max_new_tokens=9, key=jax.random.key(0), **option)
        np.testing.assert_array_equal(tokens, greedy)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (5, 1.0, [0, 1, 2, 3, 4]),
        (2, 1.0, [1, 3]),
        (5, 0.39, [3]),  # 0.4 alone reaches it
        (5, 0.41, [1, 3]),
        (5, 0.8, [0, 1, 3]),
        (2, 0.55, [3]),  # among two tokens, 0.4 is 0.4 / 0.7
        (2, 0.6, [1, 3]),
    ],
)
def test_truncation(top_k, top_p, kept):
    probabilities = jnp.array([[0.15, 0.3, 0.1, 0.4, 0.05]])
    left = truncated(jnp.log(probabilities) + 3, top_k, top_p)
    assert np.flatnonzero(np.isfinite(left[0])).tolist() == kept
    np.testing.assert_array_equal(
        left[0][np.array(kept)], (jnp.log(probabilities) + 3)[0][np.array(kept)]
    )


@pytest.mark.parametrize("vocab_size", [65, 20_000])
def test_truncation_of_many_rows(vocab_size):
    """Sums of probabilities are rounded: they may miss 1, or reach it early."""
    rows = 3 * jax.random.normal(jax.random.key(0), (100, vocab_size))
    for top_k in (2, 10, 40):
        for top_p in (1.0, 0.9999999):
            left = np.isfinite(truncated(rows, top_k, top_p)).sum(axis=1)
            ties = (rows == jnp.sort(rows, descending=True)[:, top_k - 1, None]).sum(axis=1)
            assert (left <= top_k - 1 + ties).all()
            assert (top_p < 1) or (left >= top_k).all()
    assert np.isfinite(truncated(rows, vocab_size, 1.0)).all()


def test_a_row_does_not_depend_on_a_longer_one_beside_it():
    short, long = PROMPTS[0], list(range(19))
    together = generate(model(), [short, long], max_new_tokens=6, temperature=0)
    alone = generate(model(), [short], max_new_tokens=6, temperature=0)
    np.testing.assert_array_equal(together[0], alone[0])


def test_nothing_to_do():
    assert generate(model(), [], max_new_tokens=3, temperature=0).shape == (0, 0)
    assert generate(model(), PROMPTS, max_new_tokens=0, temperature=0).shape == (3, 0)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 21], {}, "a prompt of 21 tokens is longer than max_length=20"),
        ([[1], []], {}, "at least one token id"),
        ([[1, 31]], {}, r"token id 31 of a prompt is outside \[0, 31\)"),
        ([[-1]], {}, "token id -1"),
        ([[2**32 + 1]], {}, f"token id {2**32 + 1}"),  # 1 in 32 bits
        ([np.array([2**32 - 1], np.uint32)], {}, f"token id {2**32 - 1}"),
        ([[1.5, 2]], {}, r"a prompt with 1\.5 holds no token ids"),
        (["to be"], {}, r"a prompt of shape \(\)"),
        ([1, 2], {}, r"a prompt of shape \(\) is not a list"),
        ([["to", "be"]], {}, "a prompt with 'to' holds no token ids"),
        ([[1]], {"max_length": 21}, r"max_length=21 must lie in \[1, 20\]"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": 1.0}, "needs key"),
        ([[1]], {"top_k": 0}, "top_k=0"),
        ([[1]], {"top_p": 1.5}, "top_p=1.5"),
        ([[1]], {"top_k": 2.5}, "top_k=2.5"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
    ],
)
def test_mistakes_are_named(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model(), prompts, **({"max_new_tokens": 1, "temperature": 0} | options))
