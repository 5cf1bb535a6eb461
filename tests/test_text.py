"""Tokenizers, token ids on disk, and windows of them."""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf_tokenizers
from flax import nnx

from gaudi_jax.data import tokenizers
from gaudi_jax.data.corpus import Corpus, load_corpus
from gaudi_jax.data.text import evaluation_windows, load_text, train_windows, unigram_loss
from gaudi_jax.data.tokenizers import (
    LARGEST,
    Tokenizer,
    cached,
    character_tokenizer,
    load_tokenizer,
    read_tokenizer,
)
from gaudi_jax.errors import UserError
from gaudi_jax.models import GPT2, GPT2Config

GOLDEN = Path(__file__).parent / "data" / "golden"
WORDS = "the cat sat on the mat and the dog ran after the cat\n"


def take(iterator, count):
    return list(itertools.islice(iterator, count))


# ---- tokenizers ----


def corpus_of(text):
    return Corpus(text, text[:10], text[:10])


def test_characters_are_those_of_all_splits(tmp_path):
    tokenizer = load_tokenizer("chars", Corpus("ba\n", "é", "🎉"), cache_dir=tmp_path)
    assert tokenizer.vocab_size == 5
    assert tokenizer.encode("\nabé🎉").tolist() == [0, 1, 2, 3, 4]
    assert tokenizer.decode([4, 3, 0, 1]) == "🎉é\na"
    assert tokenizer.encode("").tolist() == []
    with pytest.raises(UserError, match="no token for 'x'"):
        tokenizer.encode("abx")
    assert not list(tmp_path.iterdir())


def test_bpe_is_deterministic_and_encodes_every_text(tmp_path):
    corpus = corpus_of(WORDS * 20)
    first = load_tokenizer("bpe:280", corpus, cache_dir=tmp_path / "a")
    second = load_tokenizer("bpe:280", corpus, cache_dir=tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 280
    assert len(first.encode(WORDS)) < len(WORDS) / 2
    for text in ("the cat", "  two  spaces\n\n", "naïve 🎉\r\n\x00"):
        assert first.decode(first.encode(text)) == text
    # The second use reads the file: another tokenizer in its place comes back.
    other = load_tokenizer("bpe:280", corpus_of("zebra crossing " * 20), cache_dir=tmp_path / "c")
    next((tmp_path / "c").iterdir()).replace(next((tmp_path / "a").iterdir()))
    again = load_tokenizer("bpe:280", corpus, cache_dir=tmp_path / "a")
    assert again.fingerprint == other.fingerprint != first.fingerprint


def test_a_vocabulary_is_its_tokens_with_their_ids(tmp_path):
    digest = character_tokenizer("abc").vocabulary_digest
    assert character_tokenizer("cabbac").vocabulary_digest == digest
    assert character_tokenizer("abd").vocabulary_digest != digest
    first, second = (
        load_tokenizer("bpe:270", corpus_of(text * 20), cache_dir=tmp_path)
        for text in (WORDS, WORDS[::-1])
    )
    assert first.vocab_size == second.vocab_size
    assert first.vocabulary_digest != second.vocabulary_digest


def test_a_short_text_yields_fewer_tokens_than_asked_for(tmp_path, caplog):
    tokenizer = load_tokenizer("bpe:5000", corpus_of(WORDS), cache_dir=tmp_path)
    assert 256 < tokenizer.vocab_size < 300
    assert f"yields only {tokenizer.vocab_size} of 5000 tokens" in caplog.text


@pytest.mark.parametrize("name", ["chars", "bpe:270"])
def test_saved_tokenizers_come_back_from_their_folder(tmp_path, name):
    tokenizer = load_tokenizer(name, corpus_of(WORDS), cache_dir=tmp_path / "cache")
    config = GPT2Config(vocab_size=tokenizer.vocab_size, context=4, width=4, depth=1, heads=1)
    GPT2(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "saved")  # beside a model
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(f"hf:{tmp_path / 'saved'}", corpus_of("x"), cache_dir=tmp_path)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.vocabulary_digest == tokenizer.vocabulary_digest
    for text in (WORDS, "the , the . \n"[:4], "  sat\n"):
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
        assert again.decode(again.encode(text)) == text


@pytest.mark.parametrize("name", ["chars", "bpe:270"])
def test_saved_tokenizers_are_read_without_transformers(tmp_path, monkeypatch, name):
    tokenizer = load_tokenizer(name, corpus_of(WORDS), cache_dir=tmp_path / "cache")
    tokenizer.save(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = read_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    (tmp_path / "saved" / "tokenizer.json").write_text("{")
    for folder in ("saved", "nowhere"):
        with pytest.raises(UserError, match=f"cannot read the tokenizer .*{folder}"):
            read_tokenizer(tmp_path / folder)


def test_the_truncation_and_padding_of_a_tokenizer_are_turned_off(tmp_path):
    expected = load_tokenizer("bpe:270", corpus_of(WORDS), cache_dir=tmp_path / "cache")
    expected.save(tmp_path / "saved")
    backend = hf_tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "saved" / "tokenizer.json"))
    for tokenizer in (
        load_tokenizer(f"hf:{tmp_path / 'saved'}", corpus_of("x"), cache_dir=tmp_path),
        read_tokenizer(tmp_path / "saved"),
    ):
        np.testing.assert_array_equal(tokenizer.encode(WORDS), expected.encode(WORDS))


def test_long_texts_are_encoded_in_pieces(monkeypatch):
    text = WORDS * 30
    expected = character_tokenizer(text).encode(text)
    monkeypatch.setattr(tokenizers, "PIECE", 100)
    monkeypatch.setattr(tokenizers, "PIECES", 3)
    parts = list(tokenizers.pieces(text))
    assert "".join(parts) == text
    assert {len(part) for part in parts} == {2 * len(WORDS)}
    np.testing.assert_array_equal(character_tokenizer(text).encode(text), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("words", "unknown tokenizer 'words'; use one of chars"),
        ("bpe:many", "at least 256"),
        ("bpe:255", "at least 256"),
        (f"bpe:{LARGEST + 1}", f"at most {LARGEST}"),
        ("bpe:" + "9" * 5000, f"at most {LARGEST}"),
        ("hf:", "unknown tokenizer 'hf:'"),
    ],
)
def test_mistakes_about_tokenizers_are_named(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(name, corpus_of(WORDS), cache_dir=tmp_path)


def test_folders_without_a_tokenizer_are_named(tmp_path):
    with pytest.raises(UserError, match=f"cannot load the tokenizer hf:{tmp_path}"):
        load_tokenizer(f"hf:{tmp_path}", corpus_of(WORDS), cache_dir=tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_folders_of_weights_are_no_tokenizers(tmp_path, kind):
    folder = GOLDEN / "hf_gpt2_tiny"
    if kind != "gpt2":
        folder = tmp_path
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"hf:{folder} holds a model without tokenizer files"):
        load_tokenizer(f"hf:{folder}", corpus_of(WORDS), cache_dir=tmp_path)


# ---- token ids on disk ----


def test_token_ids_are_cached_by_text_and_tokenizer(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(WORDS * 10)
    options = {"cache_dir": tmp_path / "cache", "validation_fraction": 0.2, "test_fraction": 0.1}
    splits = load_text(f"text:{file}", **options)
    assert isinstance(splits.train.tokens, np.memmap)
    assert splits.train.tokens.dtype == np.uint16
    assert splits.tokenizer.decode(splits.train.tokens) == (WORDS * 10)[:371]
    assert len(list((tmp_path / "cache").iterdir())) == 3

    load_text(f"text:{file}", tokenizer="bpe:256", **options)
    assert len(list((tmp_path / "cache").iterdir())) == 7  # three splits and a tokenizer

    def fail(self, text):
        raise AssertionError("encoded again")

    monkeypatch.setattr(Tokenizer, "encode", fail)
    again = load_text(f"text:{file}", **options)
    np.testing.assert_array_equal(again.train.tokens, splits.train.tokens)
    file.write_text("x" + WORDS * 10)
    with pytest.raises(AssertionError, match="encoded again"):
        load_text(f"text:{file}", **options)


def test_facts_for_bits_per_byte_and_word_perplexity(tmp_path):
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "valid.txt").write_text(" = Ä b = \n \n c , d\n", encoding="utf-8")
    splits = load_text(f"text:{tmp_path}", tokenizer="bpe:256", cache_dir=tmp_path / "cache")
    assert splits.validation.num_bytes == len(splits.validation.tokens) == 20
    assert splits.validation.num_words == 4 + 3 + 3  # words, signs between spaces, and line ends
    assert splits.sha256 == load_corpus(f"text:{tmp_path}").sha256


def test_interrupted_writing_leaves_nothing_behind(tmp_path):
    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "folder" / "file", interrupted, Path.read_bytes)
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("size", [0, 5, 60, 128, 200])
def test_damaged_token_ids_are_made_anew(tmp_path, caplog, size):
    (tmp_path / "a.txt").write_text(WORDS * 10)
    options = {"tokenizer": "bpe:270", "cache_dir": tmp_path / "cache"}
    expected = load_text(f"text:{tmp_path / 'a.txt'}", **options)
    files = sorted((tmp_path / "cache").iterdir())
    whole = [file.read_bytes() for file in files]
    for file, content in zip(files, whole, strict=True):
        file.unlink()  # memory-mapped: its content is in use
        file.write_bytes(content[: min(size, len(content) - 1)])
    again = load_text(f"text:{tmp_path / 'a.txt'}", **options)
    assert caplog.text.count("cannot be read") == len(files) == 4
    assert [file.read_bytes() for file in files] == whole
    for split in ("train", "validation", "test"):
        tokens = getattr(again, split).tokens
        np.testing.assert_array_equal(tokens, getattr(expected, split).tokens)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot write .*; set data\.cache_dir"):
        load_text("docs", cache_dir=tmp_path / "file")


# ---- windows ----


@pytest.mark.parametrize(("length", "block"), [(40, 8), (41, 8), (47, 8), (16, 8), (15, 8), (9, 8)])
def test_an_epoch_has_every_target_at_most_once_and_the_cut_moves(length, block):
    epochs = [[] for _ in range(30)]
    count = max(1, (length - block) // block)
    iterator = train_windows(np.arange(length), block=block, batch_size=1, seed=0)
    for place, batch in enumerate(take(iterator, 30 * count)):
        window = batch["tokens"][0]
        np.testing.assert_array_equal(np.diff(window), 1)
        epochs[place // count].append(window)
    targets = [np.sort(np.concatenate([w[1:] for w in epoch])) for epoch in epochs]
    for epoch in targets:
        np.testing.assert_array_equal(np.diff(epoch), 1)
        assert len(epoch) == count * block
    slack = length - 1 - count * block
    assert {epoch[0] - 1 for epoch in targets} <= set(range(slack + 1))
    assert len({epoch[0] for epoch in targets}) > slack / 2
    assert set(np.concatenate(targets)) >= set(range(1 + slack // 2, length - slack // 2))
    if count > 2:
        orders = {tuple(np.argsort([w[0] for w in epoch])) for epoch in epochs}
        assert len(orders) > 5


@pytest.mark.parametrize("before", [0, 1, 3, 8])
def test_the_state_resumes_in_the_middle_of_an_epoch(before):
    def make():
        return train_windows(np.arange(83), block=8, batch_size=4, seed=5)

    iterator = make()
    take(iterator, before)
    state = json.dumps(iterator.get_state())
    expected = take(iterator, 7)
    resumed = make()
    take(resumed, 2)
    resumed.set_state(json.loads(state))
    for batch, other in zip(take(resumed, 7), expected, strict=True):
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])


def test_windows_follow_the_seed_and_have_one_dtype():
    batches = [
        next(train_windows(np.arange(83, dtype=np.uint16), block=8, batch_size=4, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert batches[0]["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batches[0]["tokens"], batches[1]["tokens"])
    assert (batches[0]["tokens"] != batches[2]["tokens"]).any()


@pytest.mark.parametrize("length", [2, 5, 8, 9, 10, 16, 17, 18, 50])
@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
def test_evaluation_scores_every_token_once(length, stride):
    tokens = np.arange(100, 100 + length, dtype=np.uint16)
    batches = list(evaluation_windows(tokens, block=8, batch_size=3, stride=stride))
    windows = np.concatenate([batch["tokens"] for batch in batches])
    weight = np.concatenate([batch["weight"] for batch in batches])
    assert windows.shape == (len(batches) * 3, 9)
    assert windows.dtype == np.int32
    scored = windows[:, 1:][weight == 1]
    np.testing.assert_array_equal(scored, tokens[1:])  # in order, each once
    rows, places = np.nonzero(weight)
    if stride:  # all but the first window give enough context
        assert (places[rows > 0] >= 8 - stride).all()
    np.testing.assert_array_equal(np.diff(windows)[weight == 1], 1)


def test_a_text_shorter_than_a_window_is_an_error():
    with pytest.raises(UserError, match=r"has 8 tokens, less than one window of data\.block=8"):
        train_windows(np.arange(8), block=8, batch_size=1, seed=0)
    with pytest.raises(UserError, match="a text of 1 tokens"):
        evaluation_windows(np.arange(1), block=8, batch_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0, "batch_size": 1}, r"data\.block=0"),
        ({"block": 4, "batch_size": 0}, r"data\.batch_size=0"),
        ({"block": 4, "batch_size": 1, "stride": 5}, r"data\.stride=5 must lie in \[1, 4\]"),
    ],
)
def test_mistakes_about_windows_are_named(options, message):
    with pytest.raises(UserError, match=message):
        evaluation_windows(np.arange(100), **options)


def test_the_unigram_baseline():
    train = np.array([0] * 5 + [1] * 2 + [2], np.uint16)
    probabilities = np.array([6, 3, 2, 1]) / 12  # a fourth token never occurs
    expected = -np.log(probabilities[[3, 0, 1]]).mean()
    assert unigram_loss(train, np.array([3, 0, 1], np.uint16), 4) == pytest.approx(expected)
