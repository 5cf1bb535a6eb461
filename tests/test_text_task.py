"""Language models through the training loop: losses, accumulation, resuming, starts, mistakes."""

import itertools
import json
import math
import shutil
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

import gaudi_jax
from configs import docs_gpt_gaudi, gpt2_gaudi, shakespeare_gpt_finetune, shakespeare_gpt_gaudi
from gaudi_jax.cost import cost
from gaudi_jax.data.corpus import Corpus
from gaudi_jax.data.tokenizers import load_tokenizer, read_tokenizer
from gaudi_jax.decomposition import svd_factors
from gaudi_jax.errors import UserError
from gaudi_jax.report import plot_curves, summary_table, write_report
from gaudi_jax.training import loop
from gaudi_jax.training.mesh import DATA_PARALLEL, make_mesh
from gaudi_jax.training.metrics import read_metrics
from gaudi_jax.training.setup import build_model, build_schedules
from gaudi_jax.training.start import initialise
from gaudi_jax.training.step import (
    CostWeights,
    TrainState,
    make_train_step,
    split_model,
    state_layout,
)
from gaudi_jax.training.tasks import open_task
from gaudi_jax.training.text_task import TextTask
from gaudi_jax.training.workdir import read_config
from tests.runs import assert_same, parameters, rows_without_time, stop_at, tiny_config

TEXT = "to be, or not to be: that is the question.\n" * 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "hamlet.txt"
    path.write_text(TEXT)
    return path


def tiny_text_config(text, arguments="recipe=budget", steps=8):
    """About 5 steps an epoch: runs of 8 end in the middle of the second one."""
    config = shakespeare_gpt_gaudi.get_config(f"text={text},{arguments}")
    config.data.update(block=12, batch_size=4, cache_dir=str(text.parent / "cache"))
    config.model.update(width=8, depth=1, heads=2, dropout=0.1)
    config.optimizer.warmup = 0.1
    config.train.update(steps=steps, accumulate=2, log_every=2, eval_every=4)
    config.checkpoint.update(every=4, keep=2)
    return config


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    assert loop.train(tiny_text_config(text), workdir)
    return workdir


@pytest.fixture(scope="module")
def dense(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("dense")
    assert loop.train(tiny_text_config(text, "layer=dense", steps=2), workdir)
    return workdir


def test_losses_are_those_of_a_hand_computation(text):
    config = tiny_text_config(text)
    config.data.stride = 5
    task = open_task(config)
    table = np.random.default_rng(0).normal(size=(task.config.model.vocab_size,) * 2)
    shares = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)

    def model(token_ids, rngs=None):  # a table of what follows what
        return jnp.asarray(table)[token_ids]

    batch = next(task.train_batches())
    loss, _ = task.loss(model, batch, jax.random.key(0))
    pairs = [pair for row in batch["tokens"].tolist() for pair in itertools.pairwise(row)]
    np.testing.assert_allclose(loss, -np.mean([np.log(shares[p]) for p in pairs]), rtol=1e-5)

    sums = [task.sums(model, b) for b in task.evaluation_batches("validation")]
    sums = {name: float(sum(s[name] for s in sums)) for name in sums[0]}
    held_out = TEXT[len(TEXT) - round(0.1 * len(TEXT)) :]
    ids = task.splits.tokenizer.encode(held_out).tolist()
    total = -sum(np.log(shares[p]) for p in itertools.pairwise(ids))
    results = task.results(sums, "validation")
    assert "word_perplexity" not in results
    np.testing.assert_allclose(results["loss"], total / (len(ids) - 1), rtol=1e-5)
    np.testing.assert_allclose(results["perplexity"], np.exp(total / (len(ids) - 1)), rtol=1e-5)
    np.testing.assert_allclose(results["bits_per_byte"], total / len(held_out) / np.log(2), 1e-5)
    assert task.score(results) == -results["loss"]


def test_wikitext_has_a_word_perplexity(text, tmp_path):
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        (folder / f"{split}.txt").write_text("a b c a b\n" * 3)
    config = tiny_text_config(text)
    config.data.name = f"text:{folder}"
    results = open_task(config).results({"loss": 36.0, "tokens": 10.0}, "test")
    assert results["word_perplexity"] == math.exp(36 / 18)  # 5 words and a line end, three times


def test_invalid_utf8_is_counted_in_the_summary(text, tmp_path, monkeypatch):
    monkeypatch.setattr(TextTask, "_samples", lambda self, model: [])
    for name, content in {"b.txt": b"\xff\xe4 ", "a.txt": TEXT.encode()}.items():
        (tmp_path / name).write_bytes(content)
    config = tiny_text_config(text)
    config.data.name = f"text:{tmp_path}"
    remarks = open_task(config).remarks(None)
    assert remarks["replaced_utf8"] == 2
    assert "Places that are no UTF-8  2" in summary_table(remarks)


def gradients(config, accumulate):
    """What a step gives the optimizer: one whose state is the gradient."""
    config.train.accumulate = accumulate
    task = open_task(config)
    model = build_model(task.config)
    graphdef, params, other = split_model(model)
    keep = optax.GradientTransformation(
        lambda params: params, lambda g, s, p=None: (jax.tree.map(jnp.zeros_like, g), g)
    )
    weights = CostWeights.of(cost(model, task.example))
    state = TrainState(jnp.int32(0), *jax.tree.map(jnp.copy, (params, other, params)))
    shardings = state_layout(state, make_mesh(DATA_PARALLEL))
    step = make_train_step(graphdef, keep, build_schedules(config), task, weights, 0, shardings)
    state, metrics = step(state, next(task.train_batches()))
    return state.opt_state, {name: metrics[name] for name in metrics if name.startswith("train")}


@pytest.mark.parametrize("kind", ["text", pytest.param("images", marks=pytest.mark.slow)])
def test_accumulated_gradients_are_those_of_the_whole_batch(kind, text):
    config = tiny_text_config(text) if kind == "text" else tiny_config()
    if kind == "text":
        config.model.dropout = 0.0
    else:
        config.data.update(mixup=0.0, cutmix=0.0)
    whole, parts = gradients(config, 1), gradients(config, 4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole[0])) > 0.01
    for one, four in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(four, one, atol=1e-5)


@pytest.mark.parametrize(
    ("rates", "held"), [((0.0, 1e-3), {"widths"}), ((1e-3, 0.0), {"locations"})]
)
def test_structure_that_learns_nothing_has_no_gradient(text, rates, held):
    config = tiny_text_config(text)
    config.optimizer.structural_learning_rate, config.optimizer.location_learning_rate = rates
    leaves = jax.tree_util.tree_leaves_with_path(gradients(config, 1)[0])
    largest = dict.fromkeys(("u", "v", "widths", "locations"), 0.0)
    for path, leaf in leaves:
        if path[-1].key in largest:
            largest[path[-1].key] = max(largest[path[-1].key], float(jnp.abs(leaf).max()))
    assert {name for name, value in largest.items() if value == 0} == held


def test_a_run_leaves_a_readable_report(finished, monkeypatch):
    plots = Mock(side_effect=plot_curves)
    monkeypatch.setattr("gaudi_jax.report.summary.plot_curves", plots)
    summary = write_report(finished)
    assert summary == json.loads((finished / "summary.json").read_text())
    assert summary["perplexity"] == summary["test_perplexity_hard"]
    assert summary["replaced_utf8"] == 0
    np.testing.assert_allclose(np.log(summary["perplexity"]), summary["test_loss_hard"])
    assert 1 < summary["unigram_perplexity"] < len(set(TEXT)) == summary["vocab_size"]
    for sample in summary["samples"]:
        assert sample["prompt"] in TEXT
        assert len(sample["continuation"]) == 160
    written = (finished / "summary.txt").read_text()
    for words in ("Unigram perplexity", "bits a byte", "blocks/0/attention/qkv", "Sample 3"):
        assert words in written
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plots.call_args.kwargs["unigram_perplexity"] == summary["unigram_perplexity"]
    assert sum("validation_perplexity" in row for row in plots.call_args.args[0]) == 2
    assert summary["relative_multiplications"] <= 0.5
    last = [row for row in read_metrics(finished) if row["step"] == 8]
    np.testing.assert_allclose(last[1]["validation_loss"], summary["validation_loss"], rtol=1e-5)


def test_a_report_with_sliding_windows(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(TextTask, "_samples", lambda self, model: [])
    workdir = tmp_path / "run"
    shutil.copytree(dense, workdir)
    beside = write_report(workdir)
    sliding = write_report(workdir, stride=3)
    assert (beside["stride"], sliding["stride"]) == (12, 3)
    assert sliding["validation_loss"] != beside["validation_loss"]
    assert write_report(workdir)["validation_loss"] == beside["validation_loss"]
    with pytest.raises(UserError, match=r"data.stride=13 must lie in \[1, 12\]"):
        write_report(workdir, stride=13)


def test_loading_needs_no_text(text, tmp_path, finished, monkeypatch):
    monkeypatch.delattr("gaudi_jax.training.text_task.load_text")
    model = gaudi_jax.load(finished)
    assert model(jnp.zeros((1, 12), jnp.int32)).shape == (1, 12, len(set(TEXT)))


@pytest.mark.parametrize("step", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_resuming_within_an_epoch_equals_never_stopping(
    text, finished, tmp_path, monkeypatch, step
):
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        assert not loop.train(tiny_text_config(text), tmp_path)
    assert loop.train(tiny_text_config(text), tmp_path)
    assert_same(parameters(tmp_path), parameters(finished))
    rows = rows_without_time(tmp_path)
    assert {"resumed_from": step} in rows
    assert [row for row in rows if "step" in row] == rows_without_time(finished)


def test_structured_layers_start_from_the_svd_of_a_dense_run(text, dense):
    source = gaudi_jax.load(dense)
    config = tiny_text_config(text, "recipe=budget,attention=low_rank,mlp=gaudi,budget=0.5")
    # Blocks enough for every singular value: the kernels are kept whole.
    with config.unlocked():
        config.layer.mlp.update(widths="leading", density=1.0)
    config = open_task(config).config
    model = build_model(config)
    widths = model.blocks[0].mlp.fc1.widths[...]
    initialise(model, str(dense), config)
    block, there = model.blocks[0], source.blocks[0]
    np.testing.assert_allclose(block.mlp.fc1.kernel(), there.mlp.fc1.kernel[...], atol=1e-6)
    np.testing.assert_array_equal(block.mlp.fc1.widths[...], widths)
    np.testing.assert_array_equal(block.mlp.fc1.bias[...], there.mlp.fc1.bias[...])
    left, right = svd_factors(there.attention.qkv.kernel[...], block.attention.qkv.rank)
    np.testing.assert_allclose(block.attention.qkv.kernel(), left.T @ right, atol=1e-6)
    np.testing.assert_array_equal(model.norm.scale[...], source.norm.scale[...])
    config.model.width = 16
    wider = build_model(config)
    with pytest.raises(UserError, match="has other parameters"):
        initialise(wider, str(dense), config)


def test_a_run_starts_from_a_hugging_face_folder(text, dense, tmp_path):
    source = gaudi_jax.load(dense)
    source.save_pretrained(tmp_path / "hf")
    config = tiny_text_config(text, "layer=dense")
    config.init_from = str(tmp_path / "hf")
    resolved = open_task(config).config
    model = build_model(resolved)
    initialise(model, config.init_from, resolved)
    assert_same(split_model(model)[1], split_model(source)[1])
    # A tokenizer beside the weights that has more tokens than they know.
    larger = load_tokenizer("bpe:256", Corpus(TEXT, TEXT, TEXT), cache_dir=tmp_path / "cache")
    larger.save(tmp_path / "hf")
    tokenizer = {"data.tokenizer": f"hf:{tmp_path / 'hf'}"}
    vocab_size = source.config.vocab_size
    for changes, message in (
        ({"model.vocab_size": 40}, "has other parameters"),
        (tokenizer, "has other parameters"),
        (tokenizer | {"model.vocab_size": vocab_size}, f"={vocab_size} is less than the 256 to"),
        ({"model.heads": 4}, "model.heads is 2 in init_from"),
    ):
        wrong = tiny_text_config(text, "layer=dense")
        wrong.init_from = config.init_from
        wrong.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=message):
            loop.train(wrong, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def other_text(tmp_path):
    """As many characters, one of them another."""
    path = tmp_path / "other.txt"
    path.write_text(TEXT.replace("q", "z"))
    return path


def test_a_run_starts_from_a_model_of_the_same_characters_only(text, other_text, dense, tmp_path):
    config = tiny_text_config(other_text, "layer=dense")
    config.init_from = str(dense)
    with pytest.raises(UserError, match=r"another vocabulary than the run in .*hamlet\.txt"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    other_text.write_text(TEXT[::-1])  # another text of the same characters
    assert loop.train(config, tmp_path / "run")


def test_the_dense_phase_has_the_characters_of_its_run(text, other_text, tmp_path):
    config = shakespeare_gpt_finetune.get_config("smoke")
    config.data.update(name=f"text:{text}", block=12, cache_dir=str(tmp_path / "cache"))
    config.pretrain.data = config.data.copy_and_resolve_references()
    config.pretrain.data.name = f"text:{other_text}"
    with pytest.raises(UserError, match=r"other\.txt' has another vocabulary than this run"):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "dense").exists()


def test_the_dense_phase_has_the_text_of_its_run(text, other_text, tmp_path):
    other_text.write_text(TEXT[::-1])
    config = shakespeare_gpt_finetune.get_config("smoke")
    config.data.update(name=f"text:{text}", block=12, cache_dir=str(tmp_path / "cache"))
    config = open_task(config).config
    assert config.pretrain.data.corpus_sha256 == config.data.corpus_sha256
    pretrain = open_task(config.pretrain).config
    assert pretrain.data.corpus_sha256 == config.data.corpus_sha256
    # One that is told to have another text of the same characters may have it.
    config.pretrain.data = config.data.copy_and_resolve_references()
    config.pretrain.data.update(name=f"text:{other_text}", corpus_sha256=None)
    config = open_task(config).config
    assert open_task(config.pretrain).config.data.corpus_sha256 != config.data.corpus_sha256


def test_a_run_goes_on_with_its_own_vocabulary_only(dense):
    config = ConfigDict(read_config(dense))
    open_task(config)
    config.data.tokenizer = "bpe:256"
    with pytest.raises(UserError, match=r"data\.tokenizer='bpe:256' .* has another vocabulary"):
        open_task(config)


@pytest.mark.parametrize("change", [lambda text: text[::-1], lambda text: text.replace("q", "z")])
def test_a_run_goes_on_with_its_own_text_only(tmp_path, monkeypatch, change):
    file = tmp_path / "hamlet.txt"
    file.write_text(TEXT)
    config = tiny_text_config(file, "layer=dense")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert not loop.train(config, tmp_path / "run")
    file.write_text(change(TEXT))
    with pytest.raises(UserError, match=r"another config \(data\.corpus_sha256 is .*config and"):
        loop.train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"hamlet\.txt' is another text than this run began with"):
        write_report(tmp_path / "run")
    file.write_text(TEXT)
    assert loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("name", ["chars", "bpe:270"])
def test_a_run_keeps_its_tokenizer(text, tmp_path, name):
    config = tiny_text_config(text, "layer=dense", steps=1)
    config.data.update(block=4, tokenizer=name)
    tokenizer = open_task(config).splits.tokenizer
    assert loop.train(config, tmp_path / "run")
    again = read_tokenizer(tmp_path / "run" / "tokenizer")
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    assert again.decode(again.encode(TEXT)) == TEXT
    # Another run on another text starts from this one, with its tokenizer.
    (tmp_path / "other.txt").write_text("the quest is not to be\n" * 20)
    other = tiny_text_config(tmp_path / "other.txt", "layer=dense", steps=1)
    other.data.update(block=4, tokenizer=f"hf:{tmp_path / 'run' / 'tokenizer'}")
    other.init_from = str(tmp_path / "run")
    assert loop.train(other, tmp_path / "other")


def test_a_split_with_nothing_to_predict_is_named(text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("hello")
    config = tiny_text_config(text)
    config.data.name = f"text:{short}"
    config.data.validation_fraction = 0.05
    message = (
        r"the validation text of .*short\.txt' has 0 tokens .* data\.validation_fraction=0\.05"
    )
    with pytest.raises(UserError, match=message):
        open_task(config)
    for name, content in {"train.txt": TEXT, "valid.txt": TEXT, "test.txt": "t"}.items():
        (tmp_path / name).write_text(content)
    config.data.name = f"text:{tmp_path}"
    with pytest.raises(UserError, match=r"the test text of .* has 1 tokens"):
        open_task(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "speech"}, "unknown task 'speech'; use images or text"),
        ({"data.name": "shakespeare"}, "unknown text 'shakespeare'"),
        ({"data.name": "text:/nowhere"}, "there is no file or folder /nowhere"),
        ({"data.tokenizer": "words"}, "unknown tokenizer 'words'"),
        ({"data.block": 1000}, "less than one window of data.block=1000"),
        ({"data.stride": 13}, r"data.stride=13 must lie in \[1, 12\]"),
        ({"data.batch_size": 5}, "batch_size=5 cannot be split over 1 devices and train.accum"),
        ({"train.accumulate": 0}, "train.accumulate=0 must be at least 1"),
        ({"model.vocab_size": 3}, "model.vocab_size=3 is less than the"),
        ({"model.context": 4}, "data.block=12 is longer than model.context=4"),
        ({"optimizer.schedule": "step"}, "unknown optimizer.schedule 'step'; use cosine or linear"),
        ({"init_from": "/nowhere"}, "there is no directory '/nowhere'"),
    ],
)
def test_bad_configs_are_named_before_anything_is_written(text, changes, message, tmp_path):
    config = tiny_text_config(text)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (shakespeare_gpt_gaudi, "text=x.txt"),
        (shakespeare_gpt_gaudi, "text=x.txt,size=gpu,layer=dense"),
        (shakespeare_gpt_gaudi, "text=x.txt,recipe=paper"),
        (shakespeare_gpt_finetune, "text=x.txt,size=gpu"),
        (docs_gpt_gaudi, "layer=low_rank"),
        (gpt2_gaudi, ""),
        (gpt2_gaudi, "layer=dense"),
        (gpt2_gaudi, "recipe=budget,epochs=2"),
    ],
)
def test_configs_build(module, arguments):
    config = module.get_config(arguments)
    config.model.update(vocab_size=100, context=config.data.block)
    loop.check_options(config)
    loop.build_schedules(config)
    model = nnx.eval_shape(lambda: build_model(config))
    assert model.config.context == config.data.block
    if module is gpt2_gaudi and not arguments:
        assert config.controller.name == "mean"
        assert type(model.blocks[0].attention.qkv) is gaudi_jax.GaudiLinear
        assert type(model.blocks[0].attention.out) is nnx.Linear


def test_a_config_that_needs_a_text_says_so():
    for module in (shakespeare_gpt_gaudi, shakespeare_gpt_finetune):
        with pytest.raises(UserError, match="add text=PATH"):
            module.get_config("")


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", [shakespeare_gpt_gaudi, shakespeare_gpt_finetune, docs_gpt_gaudi, gpt2_gaudi]
)
def test_every_config_runs_small(module, tmp_path):
    config = module.get_config("smoke")
    assert loop.train(config, tmp_path)
    summary = write_report(tmp_path)
    assert summary["perplexity"] < 2 * summary["unigram_perplexity"]
