"""Published models: those that come with the package, and those of runs."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import gaudi_jax
from gaudi_jax.data.corpus import load_corpus
from gaudi_jax.deploy import __main__ as deploy_command
from gaudi_jax.errors import UserError
from gaudi_jax.layers import Structural
from gaudi_jax.models.pretrained import read_tensors
from gaudi_jax.training.evaluate import evaluate_model
from gaudi_jax.training.loop import train
from gaudi_jax.training.tasks import open_task
from gaudi_jax.training.workdir import read_config
from gaudi_jax.zoo import MODELS, names
from gaudi_jax.zoo import __main__ as zoo_command
from gaudi_jax.zoo.published import read_card
from tests.runs import assert_same, parameters, tiny_config

WEIGHTS = "model.safetensors"
MOST_BYTES = 2e6


def call(command, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return command.main()


def publish(monkeypatch, workdir, folder, *options):
    arguments = ("--out", folder, "--command", "python main.py", "--batch=2", *options)
    return call(zoo_command, monkeypatch, "publish", workdir, *arguments)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "digits"
    train(tiny_config(steps=4), workdir)
    return workdir


@pytest.fixture
def published(workdir, tmp_path, monkeypatch):
    assert publish(monkeypatch, workdir, tmp_path / "model") == 0
    return tmp_path / "model"


def test_the_zoo_holds_what_its_page_promises():
    assert {"digits-vit-dense", "digits-vit-low-rank", "digits-vit-gaudi"} <= set(names())
    assert {"digits-vit-gaudi-packed", "docs-gpt-dense"} <= set(names())
    assert {"docs-gpt-gaudi", "docs-gpt-gaudi-packed"} <= set(names())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("docs")) for name in names()],
)
def test_models_of_the_zoo_are_as_good_as_their_cards_say(name):
    card = read_card(MODELS / name)
    assert (MODELS / name / WEIGHTS).stat().st_size == card["bytes"] <= MOST_BYTES
    model = gaudi_jax.load(f"zoo:{name}")
    config, tolerance = ConfigDict(read_config(MODELS / name)), 1e-3
    if config.data.name == "docs":
        # Python's documentation differs a little from one version to the next.
        config.data.tokenizer = f"hf:{MODELS / name / 'tokenizer'}"
        if load_corpus("docs").sha256 != config.data.corpus_sha256:
            config.data.corpus_sha256, tolerance = None, 0.05
    task = open_task(config)
    assert gaudi_jax.cost(model, task.example).relative == card["relative_multiplications"]
    for split in ("validation", "test"):
        found = evaluate_model(model, task, split)
        wanted = {key: card[split][key] for key in ("loss", "accuracy") if key in card[split]}
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=tolerance), split


def test_a_packed_model_computes_what_its_masks_do():
    images = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    masks, packed = (gaudi_jax.load(f"zoo:digits-vit-gaudi{form}") for form in ("", "-packed"))
    np.testing.assert_allclose(packed(images), masks(images), atol=1e-4)


def test_a_run_is_published_and_read_again(workdir, published):
    card = json.loads((published / "card.json").read_text())
    assert card["step"] == 4
    assert card["time"]["milliseconds"] > 0
    assert {"loss", "accuracy"} <= set(card["test"])
    assert_same(parameters(published), parameters(workdir))


@pytest.mark.slow
def test_a_packed_run_is_published(workdir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    assert call(deploy_command, monkeypatch, run, "--repeats=1", "--batch=2") == 0
    assert publish(monkeypatch, run, tmp_path / "packed", "--step=packed") == 0
    images = jax.random.uniform(jax.random.key(0), (3, 8, 8, 1))
    again, saved = gaudi_jax.load(tmp_path / "packed"), gaudi_jax.load(run, "packed")
    np.testing.assert_array_equal(again(images), saved(images))


@pytest.mark.slow
def test_a_run_whose_structure_was_found_by_search_is_published(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(tiny_config("smoke,recipe=search", steps=4), run)
    assert publish(monkeypatch, run, tmp_path / "model") == 0
    assert_same(parameters(tmp_path / "model"), parameters(run))


@pytest.mark.slow
def test_half_precision_is_for_the_content_alone(workdir, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    assert publish(monkeypatch, workdir, folder, "--dtype=bfloat16") == 0
    stored = read_tensors(folder)
    kinds = {stored[name].dtype.name for name in stored if name.endswith(("widths", "locations"))}
    assert kinds == {"float32"}
    assert stored["blocks.0.mlp.fc1.v"].dtype.name == "bfloat16"
    model = gaudi_jax.load(folder)
    assert model.blocks[0].mlp.fc1.v[...].dtype == jnp.float32
    assert issubclass(type(model.blocks[0].mlp.fc1.widths), Structural)


def test_publishing_that_fails_leaves_nothing(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("gaudi_jax.zoo.__main__.evaluate_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(monkeypatch, workdir, tmp_path / "models" / "mine")
    assert not list((tmp_path / "models").iterdir())


def test_what_is_wrong_with_a_published_model_is_named(published, monkeypatch, workdir, capsys):
    with pytest.raises(UserError, match="no model 'vit'; use one of digits-vit-dense"):
        gaudi_jax.load("zoo:vit")
    with pytest.raises(UserError, match="of one step; leave out step"):
        gaudi_jax.load(published, 4)
    assert publish(monkeypatch, workdir, published) == 1
    assert "exists; remove it" in capsys.readouterr().err
    damaged = bytearray((published / WEIGHTS).read_bytes())
    damaged[-1] ^= 1
    (published / WEIGHTS).write_bytes(damaged)
    with pytest.raises(UserError, match="is damaged"):
        gaudi_jax.load(published)
    (published / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        gaudi_jax.load(published)
    (published / "card.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="has format 2 instead of 1"):
        gaudi_jax.load(published)


def test_the_list_names_every_model(monkeypatch, capsys):
    assert call(zoo_command, monkeypatch, "list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names())
