import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gaudi_jax import GaudiLinear, LowRankLinear, cost
from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import linear_factory
from gaudi_jax.models import GPT2, GPT2Config

GOLDEN = Path(__file__).parent / "data/golden/hf_gpt2_tiny"
TINY = {"vocab_size": 31, "context": 12, "width": 16, "depth": 2, "heads": 2}
TOKENS = jax.random.randint(jax.random.key(0), (3, 10), 0, 31)


@functools.cache
def tiny(**changes):
    return GPT2(GPT2Config(**(TINY | changes)), rngs=nnx.Rngs(1))


@functools.cache
def computed():
    return dict(np.load(GOLDEN / "computed.npz"))


@nnx.jit
def logits(model, token_ids):
    return model(token_ids)


@nnx.jit
def loss_and_gradients(model, token_ids):
    def mean_loss(model):
        predicted, targets = model(token_ids[:, :-1]), token_ids[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(predicted, targets).mean()

    return nnx.value_and_grad(mean_loss)(model)


def relative_error(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def assert_same_parameters(model, other):
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))


# ---- the model ----


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters):
    def count(depth):  # without the time that tracing 48 blocks takes
        config = GPT2Config.preset(preset, depth=depth)
        model = nnx.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0)))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

    depth = GPT2Config.preset(preset).depth
    assert count(1) + (depth - 1) * (count(2) - count(1)) == parameters


def test_no_token_sees_a_later_one():
    model = tiny()
    changed = TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % 31)
    before, after = logits(model, TOKENS), logits(model, changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before[:, 6:] - after[:, 6:]).max(axis=-1) > 1e-4).all()


def test_initial_deviations():
    model = GPT2(
        GPT2Config(vocab_size=200, context=64, width=64, depth=8, heads=2), rngs=nnx.Rngs(0)
    )
    block = model.blocks[3]
    for kernel in (block.attention.qkv.kernel, block.mlp.fc1.kernel, model.position_embedding):
        assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
    for kernel in (block.attention.out.kernel, block.mlp.fc2.kernel):
        assert np.std(kernel) == pytest.approx(0.02 / 4, rel=0.05)
    assert np.std(model.token_embedding.embedding) == pytest.approx(0.02, rel=0.05)


def test_layers_are_chosen_for_each_place_and_start_from_the_models_initialisation():
    model = tiny(
        attention_layer=linear_factory({"name": "low_rank", "rank": 16}),
        mlp_layer=linear_factory({"name": "gaudi", "granularity": 4}),
    )
    block = model.blocks[0]
    assert isinstance(block.attention.qkv, LowRankLinear)
    assert isinstance(block.attention.out, nnx.Linear)
    assert isinstance(block.mlp.fc1, GaudiLinear)
    assert isinstance(block.mlp.fc2, GaudiLinear)
    # Full rank reproduces the dense kernel that the initialiser drew.
    assert np.std(block.attention.qkv.kernel()) == pytest.approx(0.02, rel=0.1)


def test_separate_layers_compute_what_the_fused_one_does():
    fused, separate = tiny(), tiny(fused_qkv=False)
    graphdef, state = nnx.split(separate)
    pure = nnx.to_pure_dict(nnx.state(fused))
    for block in pure["blocks"].values():
        qkv = block["attention"].pop("qkv")
        for place, part in enumerate(("query", "key", "value")):
            block["attention"][part] = {n: jnp.split(a, 3, axis=-1)[place] for n, a in qkv.items()}
    nnx.replace_by_pure_dict(state, pure)
    separate = nnx.merge(graphdef, state)
    np.testing.assert_allclose(logits(separate, TOKENS), logits(fused, TOKENS), atol=1e-6)


def test_bfloat16_computation_gives_float32_logits_near_the_exact_ones():
    fast = logits(tiny(dtype=jnp.bfloat16), TOKENS)
    assert fast.dtype == jnp.float32
    assert relative_error(fast, logits(tiny(), TOKENS)) < 0.03


def test_dropout_follows_the_keys_and_stops_in_evaluation():
    model = GPT2(GPT2Config(**TINY, dropout=0.5), rngs=nnx.Rngs(1))
    first = model(TOKENS, rngs=nnx.Rngs(dropout=3))
    np.testing.assert_array_equal(first, model(TOKENS, rngs=nnx.Rngs(dropout=3)))
    assert relative_error(model(TOKENS, rngs=nnx.Rngs(dropout=4)), first) > 0.1
    model.eval()
    np.testing.assert_array_equal(logits(model, TOKENS), logits(tiny(), TOKENS))


def test_cost_counts_every_layer_once_a_token():
    counted = cost(tiny(), TOKENS)
    assert counted.multiplications == 30 * 2 * (4 * 16 * 16 + 8 * 16 * 16)
    attention, head = 2 * 3 * 2 * (10 * 10 * 16), 30 * 16 * 31
    assert counted.total_multiplications == counted.multiplications + attention + head


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "heads=3 does not divide width=16"),
        ({"context": 0}, "context=0"),
        ({"dropout": 1.0}, "dropout=1.0 is outside"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0.0 leaves no hidden features"),
        ({"depth": -1}, "depth=-1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        GPT2Config(**(TINY | changes))


def test_bad_presets_and_token_ids_are_named():
    with pytest.raises(UserError, match="unknown GPT-2 preset 'gpt3'"):
        GPT2Config.preset("gpt3")
    with pytest.raises(UserError, match=r"shape \(1, 13\) are not \(batch, at most 12\)"):
        tiny()(jnp.zeros((1, 13), int))
    with pytest.raises(UserError, match=r"shape \(3,\)"):
        tiny()(jnp.zeros(3, int))


# ---- beside transformers ----


@pytest.mark.parametrize("fused_qkv", [True, False])
def test_logits_are_those_of_transformers(fused_qkv):
    model = GPT2.from_pretrained(GOLDEN, fused_qkv=fused_qkv)
    token_ids = computed()["token_ids"]
    np.testing.assert_allclose(logits(model, token_ids), computed()["logits"], atol=1e-4)


def test_loss_and_gradients_are_those_of_transformers(tmp_path):
    model = GPT2.from_pretrained(GOLDEN)
    loss, gradients = loss_and_gradients(model, computed()["token_ids"])
    np.testing.assert_allclose(loss, computed()["loss"], atol=1e-4)
    nnx.update(model, gradients)  # so that the export names them as transformers does
    model.save_pretrained(tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = {
        name.removeprefix("gradient/"): array
        for name, array in computed().items()
        if name.startswith("gradient/")
    }
    assert sorted(ours) == sorted(theirs)
    difference = sum(np.sum((ours[name] - theirs[name]) ** 2) for name in ours)
    assert difference < 1e-8 * sum(np.sum(array**2) for array in theirs.values())


@pytest.mark.parametrize("fused_qkv", [True, False])
def test_a_saved_model_comes_back_exactly(tmp_path, fused_qkv):
    model = GPT2(
        GPT2Config(**TINY, mlp_ratio=2.5, norm_epsilon=1e-4, fused_qkv=fused_qkv),
        rngs=nnx.Rngs(2),
    )
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path, fused_qkv=fused_qkv)
    assert again.config == model.config
    assert_same_parameters(again, model)


def test_the_golden_file_comes_back_bit_by_bit(tmp_path):
    GPT2.from_pretrained(GOLDEN, fused_qkv=False).save_pretrained(tmp_path)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, GOLDEN))
    assert sorted(ours) == sorted(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


def structured():
    """A model whose masks differ between training and evaluation, with layers without bias."""
    gaudi = linear_factory({"name": "gaudi", "granularity": 4, "round_to_grid": False})
    low_rank = linear_factory({"name": "low_rank", "rank": 3})
    return GPT2(
        GPT2Config(
            **TINY,
            attention_layer=functools.partial(low_rank, use_bias=False),
            mlp_layer=gaudi,
        ),
        rngs=nnx.Rngs(3),
    )


def test_structured_kernels_are_saved_dense_as_they_are_in_evaluation(tmp_path):
    model = structured()
    model.save_pretrained(tmp_path)
    again = GPT2.from_pretrained(tmp_path)
    assert model.blocks[0].mlp.fc1.deterministic is False  # it is left as it was
    in_training = logits(model, TOKENS)
    model.eval()
    np.testing.assert_allclose(logits(again, TOKENS), logits(model, TOKENS), atol=1e-5)
    assert np.abs(in_training - logits(model, TOKENS)).max() > 1e-4  # so the mode does matter


def test_a_model_in_several_files_is_replaced(tmp_path):
    shards = {"model-00001-of-00002.safetensors": b"old", "model-00002-of-00002.safetensors": b""}
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    index = {"weight_map": dict.fromkeys("ab", next(iter(shards)))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = GPT2(GPT2Config(**TINY), rngs=nnx.Rngs(4))
    model.save_pretrained(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(tmp_path), model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(UserError, match="is a file"):
        model.save_pretrained(tmp_path / "config.json")


def test_logits_in_bfloat16_keep_float32s_digits():
    model = GPT2(GPT2Config(**TINY, dtype=jnp.bfloat16), rngs=nnx.Rngs(4))
    features = 30 + jax.random.normal(jax.random.key(0), (1, TINY["width"]), jnp.bfloat16)
    exact = (
        features.astype(jnp.float32)
        @ model.token_embedding.embedding[...].astype(jnp.bfloat16).astype(jnp.float32).T
    )
    np.testing.assert_allclose(model.logits(features), exact, rtol=1e-5, atol=1e-5)


def test_old_files_name_no_transformer_and_hold_masks(tmp_path):
    tensors = load_file(GOLDEN / "model.safetensors")
    old = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    old["h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / "config.json").read_text())
    assert_same_parameters(GPT2.from_pretrained(tmp_path), GPT2.from_pretrained(GOLDEN))


def test_parameters_may_have_another_dtype(tmp_path):
    model = GPT2.from_pretrained(GOLDEN, param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    model.save_pretrained(tmp_path)
    assert_same_parameters(GPT2.from_pretrained(tmp_path, param_dtype=jnp.bfloat16), model)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"n_embd": 24}, "wrong shapes"),
        ({"n_layer": 3}, r"without a tensor: blocks\.2"),
    ],
)
def test_folders_that_do_not_fit_are_named(tmp_path, changes, message):
    config = json.loads((GOLDEN / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: GPT2.from_pretrained(GOLDEN), structured])
def test_transformers_loads_what_is_saved(tmp_path, make):
    torch = pytest.importorskip("torch")
    from transformers import GPT2LMHeadModel

    model = make()
    model.eval()
    model.save_pretrained(tmp_path)
    theirs, report = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        expected = theirs(torch.asarray(np.asarray(TOKENS), dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
