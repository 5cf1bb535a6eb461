"""Corpora: splits, invalid bytes, sets of the hub and of TFDS, and mistakes."""

import hashlib
import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gaudi_jax.data.corpus import Corpus, load_corpus
from gaudi_jax.errors import UserError

WORDS = "the cat sat on the mat\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_the_embedded_text_is_english_and_cut_90_5_5():
    corpus = load_corpus("docs")
    sizes = [len(part) for part in (corpus.train, corpus.validation, corpus.test)]
    np.testing.assert_allclose(np.array(sizes) / sum(sizes), [0.9, 0.05, 0.05], atol=1e-4)
    assert sum(sizes) > 300_000
    assert " the " in corpus.test


def test_a_file_is_cut_from_its_end(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(100))
    name = f"text:{write(tmp_path / 'a.txt', text)}"
    corpus = load_corpus(name, validation_fraction=0.2, test_fraction=0.1)
    assert (corpus.train, corpus.validation, corpus.test) == (text[:70], text[70:90], text[90:])
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_without_a_test_split_the_validation_split_serves(tmp_path, caplog):
    name = f"text:{write(tmp_path / 'a.txt', WORDS)}"
    corpus = load_corpus(name, validation_fraction=0.5, test_fraction=0)
    assert corpus.train + corpus.validation == WORDS
    assert corpus.test == corpus.validation
    assert "the validation text serves" in caplog.text
    assert corpus.sha256 == hashlib.sha256(WORDS.encode()).hexdigest()


def test_a_folder_of_texts_is_joined_in_order(tmp_path):
    write(tmp_path / "b.txt", "second")
    write(tmp_path / "a" / "z.txt", "first\n")
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / ".git" / "a.txt", "hidden")
    write(tmp_path / "c.md", "another kind")
    corpus = load_corpus(f"text:{tmp_path}", validation_fraction=0.2)
    assert corpus.train + corpus.validation + corpus.test == "first\nsecond\n"


@pytest.mark.parametrize("validation", ["validation.txt", "valid.txt", "val.txt"])
def test_a_folder_may_hold_its_own_splits(tmp_path, validation):
    for name in ("train.txt", validation, "test.txt"):
        write(tmp_path / name, name)
    assert load_corpus(f"text:{tmp_path}") == Corpus("train.txt", validation, "test.txt")
    (tmp_path / validation).unlink()
    corpus = load_corpus(f"text:{tmp_path}", validation_fraction=0.45)
    assert corpus == Corpus("train", ".txt", "test.txt")


def test_held_out_text_never_becomes_training_text(tmp_path):
    for name in ("a.txt", "validation.txt", "test.txt"):
        write(tmp_path / name, WORDS)
    with pytest.raises(UserError, match=r"holds validation\.txt and test\.txt but no train\.txt"):
        load_corpus(f"text:{tmp_path}")


@pytest.mark.parametrize("name", ["a.txt", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
    def read_bytes(path):
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path / "a.txt", WORDS)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match=r"cannot read .*Permission denied.*a\.txt.*make it read"):
        load_corpus(f"text:{tmp_path / name}")


@pytest.mark.parametrize(
    ("files", "messages"),
    [
        (["a.txt"], ["a.txt: 2 places"]),
        (["a.txt", "b/a.txt", "c/a.txt"], ["folder: 6 places"]),
        (["train.txt", "val.txt"], ["train.txt: 2 places", "val.txt: 2 places"]),
    ],
)
def test_invalid_utf8_is_replaced_and_counted(tmp_path, caplog, files, messages):
    content = "no mistake: \ufffd, ".encode() + b"two: \xff \xe4\n"
    for name in files:
        path = write(tmp_path / "folder" / name, content)
    with caplog.at_level(logging.WARNING):
        corpus = load_corpus(f"text:{path if len(files) == 1 else tmp_path / 'folder'}")
    assert corpus.train.startswith("no mistake: \ufffd, two: \ufffd")
    assert corpus.replaced == 2 * len(files)
    warned = [message for message in caplog.messages if "no UTF-8" in message]
    for text, message in zip(warned, messages, strict=True):
        assert f"{message} that are no UTF-8" in text


def fake_datasets(monkeypatch, sets):
    class Columns(dict):
        @property
        def column_names(self):
            return list(self)

    def load(path, config):
        if (path, config) not in sets:
            raise FileNotFoundError(f"{path} is not there\nand more")
        return {split: Columns(columns) for split, columns in sets[path, config].items()}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_sets_of_the_hub_keep_their_splits_and_lines(monkeypatch):
    rows = {split: {"text": ["", f" = {split} = \n"]} for split in ("train", "validation", "test")}
    fake_datasets(
        monkeypatch, {("owner/name", "raw"): rows, ("owner/name", None): {"train": {"a": []}}}
    )
    corpus = load_corpus("hf:owner/name:raw")
    assert corpus == Corpus("\n = train = \n", "\n = validation = \n", "\n = test = \n")
    with pytest.raises(UserError, match="no column 'text' but a"):
        load_corpus("hf:owner/name")
    with pytest.raises(UserError, match=r"hf:owner/none \(owner/none is not there\)"):
        load_corpus("hf:owner/none")


def test_without_the_package_datasets_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_corpus("hf:owner/name")


class TinyPoems(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "test": self._generate_examples(1)}

    def _generate_examples(self, count):
        for number in range(count):
            yield number, {"text": f"pöem {number}"}


def test_prepared_tfds_sets_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", os.fspath(tmp_path))
    TinyPoems(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    corpus = load_corpus("tfds:tiny_poems", validation_fraction=0.3)
    lines = (corpus.train + corpus.validation).splitlines()
    assert sorted(lines) == ["pöem 0", "pöem 1", "pöem 2"]
    assert corpus.test == "pöem 0"
    with pytest.raises(UserError, match="cannot open the data set tfds:no_such_set"):
        load_corpus("tfds:no_such_set")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("poems", {}, "unknown text 'poems'; use one of docs"),
        ("text:", {}, "unknown text 'text:'"),
        ("text:/no/such", {}, "no file or folder /no/such"),
        ("text:~nobody-of-this-name/a.txt", {}, "cannot read text:~nobody"),
        ("docs", {"validation_fraction": 0.0}, "validation_fraction=0.0"),
        ("docs", {"test_fraction": 0.95}, r"test_fraction=0.95 is outside \[0, 0.95\)"),
    ],
)
def test_mistakes_about_corpora_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        load_corpus(name, **options)


def test_empty_corpora_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*.txt file"):
        load_corpus(f"text:{tmp_path}")
    write(tmp_path / "a.txt", " \n")
    with pytest.raises(UserError, match=r"the train text of text:.* is empty"):
        load_corpus(f"text:{tmp_path}")
