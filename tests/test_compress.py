"""Compression of models in other people's styles, from end to end."""

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from other_models import WIDTH, Encoder, Recurrent, tokens

import gaudi_jax
from gaudi_jax import GaudiLinear, LowRankLinear
from gaudi_jax.compression import plan_table
from gaudi_jax.cost import cost
from gaudi_jax.errors import UserError
from gaudi_jax.layers import GeneralLinear

#: Little effort, and one shape of kernel: the searches are compiled once for the file.
OPTIONS = {"rounds": 2, "progress": False}
SKIP_HEAD = {"pattern": "head", "method": "skip"}
ALL_OTHERS = {"pattern": ".*"}


def plain(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@nnx.jit
def evaluate(model, *inputs):
    return nnx.view(model, deterministic=True)(*inputs)


def equal(left, right):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), left, right))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(nnx.Rngs(0))


@pytest.fixture(scope="module")
def compressed(encoder):
    return gaudi_jax.compress(
        encoder,
        0.5,
        rules=[SKIP_HEAD, ALL_OTHERS],
        calibration=(tokens(seed) for seed in range(2)),
        **OPTIONS,
    )


def test_the_input_is_left_as_it_was(encoder):
    before, graph = plain(encoder), nnx.graphdef(encoder)
    small, _ = gaudi_jax.compress(encoder, 0.5, method="low_rank", progress=False)
    assert equal(before, plain(encoder))
    assert graph == nnx.graphdef(encoder)

    def variables(model):
        return {id(node) for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable)}

    assert not variables(encoder) & variables(small)
    # Donating the result's arrays, as training does, must not delete the input's.
    state = nnx.state(small, nnx.Param)
    jax.jit(lambda state: jax.tree.map(lambda x: 2 * x, state), donate_argnums=0)(state)
    assert small.head.bias.get_value().is_deleted()
    assert equal(before, plain(encoder))


def test_attention_of_flax_is_compressed(encoder, compressed):
    model, plan = compressed
    layer = model.layers[0]
    for projection in (layer.self_attn.query, layer.self_attn.out):
        assert type(projection) is GeneralLinear
        assert type(projection.linear) is GaudiLinear
    assert type(layer.mlp.layers[0]) is GaudiLinear
    assert type(model.head) is nnx.Linear
    assert plan["left"] == {"head": "a rule skips it"}
    assert len(plan["layers"]) == 6
    entry = plan["layers"]["layers/0/self_attn/query"]
    assert (entry["in_features"], entry["out_features"]) == ([WIDTH], [2, WIDTH // 2])


def test_errors_and_costs_of_the_plan_are_those_of_the_model(encoder, compressed):
    model, plan = compressed
    for path, entry in plan["layers"].items():
        assert 0.45 < entry["multiplications"] / entry["dense_multiplications"] <= 0.5, path
        assert 0 < entry["activation_error"] < min(1, entry["error"]), path
    layer, dense = model.layers[0].mlp.layers[3], encoder.layers[0].mlp.layers[3]
    entry = plan["layers"]["layers/0/mlp/layers/3"]
    kernel = np.asarray(dense.kernel)
    error = np.linalg.norm(layer.kernel() - kernel) / np.linalg.norm(kernel)
    assert entry["error"] == pytest.approx(error, rel=1e-4)
    assert entry["multiplications"] == int(layer.multiplications())
    live = (layer.widths[...] > 0).all(axis=0)
    assert live.all()
    assert entry["num_blocks"] == layer.num_blocks == live.size


def test_cost_counts_the_compressed_model(encoder, compressed):
    model, plan = compressed
    example = jax.ShapeDtypeStruct((10, WIDTH), "float32")
    before, after = cost(encoder, example), cost(model, example)
    assert before.dense_multiplications == after.dense_multiplications
    head = 3 * WIDTH
    assert after.multiplications == 10 * plan["multiplications"] + head
    assert before.total_multiplications - before.multiplications == (
        after.total_multiplications - after.multiplications
    )


def test_at_full_cost_attention_is_the_dense_one(encoder):
    model, plan = gaudi_jax.compress(encoder, 2.0, rules=[SKIP_HEAD, ALL_OTHERS], **OPTIONS)
    assert max(entry["error"] for entry in plan["layers"].values()) < 1e-5
    mask = nnx.make_causal_mask(jnp.ones((4, 10)))
    outputs = [evaluate(each, tokens(), mask) for each in (model, encoder)]
    np.testing.assert_allclose(*outputs, atol=2e-5)


def test_shared_modules_are_decomposed_once_and_stay_shared():
    model = Recurrent(nnx.Rngs(0))
    small, plan = gaudi_jax.compress(model, 2.0, **OPTIONS)
    block = small.first
    assert small.body.layers[0] is small.body.layers[1] is block
    assert type(block.layers[0]) is GaudiLinear
    assert small.pair[0] is block.layers[0]
    assert small.pair[1][0] is block.layers[2]
    assert small.itself is small
    assert small.head.kernel is small.embed.kernel
    assert set(plan["left"]) == {"head", "embed"}
    assert "another module" in plan["left"]["head"]
    assert len(plan["layers"]) == 2
    outputs = [nnx.jit(lambda model, x: model(x))(each, tokens()) for each in (small, model)]
    np.testing.assert_allclose(*outputs, atol=2e-5)


def test_a_bare_layer_is_a_model():
    dense = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    small, plan = gaudi_jax.compress(dense, 2.0, **OPTIONS)
    assert type(small) is GaudiLinear
    assert list(plan["layers"]) == [""]
    assert type(dense) is nnx.Linear


def test_an_accelerator_searches_layers_of_one_shape_together(encoder, monkeypatch):
    module = sys.modules["gaudi_jax.compression.compress"]  # its name is the function's too
    search, sizes = module.search_blocks, []

    def recorded(layers, *options):
        sizes.append(len(layers))
        return search(layers, *options)

    monkeypatch.setattr(module, "search_blocks", recorded)

    def plan(backend):
        # Only compress() is told so: batches of linear algebra can wait for ever on a CPU.
        here = SimpleNamespace(**vars(jax) | {"default_backend": lambda: backend})
        monkeypatch.setattr(module, "jax", here)
        batches = (tokens(seed) for seed in range(2))
        options = {"calibration": batches, "rounds": 20, "progress": False}
        return gaudi_jax.compress(encoder, 0.5, rules=[SKIP_HEAD, ALL_OTHERS], **options).plan

    alone = plan("cpu")["layers"]
    assert set(sizes) == {1}
    searched = len(sizes)
    sizes.clear()
    together = plan("gpu")["layers"]
    assert sum(sizes) == searched
    assert max(sizes) > 1
    assert list(together) == list(alone)
    # Another program rounds otherwise, and a rounding (a millionth of each entry, too) can turn a
    # choice of the search: one layer's error then moves by up to a tenth, either way.
    # A kernel or budget of another layer shows as an error of about one or a wrong count.
    errors = [[e["activation_error"] for e in each.values()] for each in (together, alone)]
    assert {e["method"] for e in together.values()} == {"gaudi"}
    assert np.mean(errors[0]) == pytest.approx(np.mean(errors[1]), rel=0.05)
    assert max(errors[0]) <= 1.25 * max(errors[1])
    for entry in together.values():
        assert entry["multiplications"] <= 0.5 * entry["dense_multiplications"]


def test_a_compressed_model_trains(compressed):
    model = nnx.clone(compressed.model)
    model.eval()
    x = tokens()
    loss = lambda model: jnp.square(model(x)).mean()  # noqa: E731
    before, gradients = nnx.jit(nnx.value_and_grad(loss))(model)
    state = jax.tree.map(lambda p, g: p - 1e-3 * g, nnx.state(model, nnx.Param), gradients)
    nnx.update(model, state)
    assert loss(model) < before


def test_methods(encoder):
    calibration = [tokens()]
    rules = [SKIP_HEAD, ALL_OTHERS]
    errors = {}
    for method in ("gaudi", "low_rank", "best"):
        _, plan = gaudi_jax.compress(
            encoder, 0.4, rules=rules, method=method, calibration=calibration, **OPTIONS
        )
        errors[method] = {k: v["activation_error"] for k, v in plan["layers"].items()}
        assert plan["multiplications"] <= 0.4 * plan["dense_multiplications"]
    for path, best in errors["best"].items():
        assert best == min(errors["gaudi"][path], errors["low_rank"][path])


def test_low_rank_is_the_truncated_svd():
    dense = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    small, plan = gaudi_jax.compress(dense, 0.5, method="low_rank", progress=False)
    u, s, vt = np.linalg.svd(dense.kernel)
    assert type(small) is LowRankLinear
    assert plan["layers"][""]["rank"] == small.rank == 4
    np.testing.assert_allclose(small.kernel(), u[:, :4] * s[:4] @ vt[:4], atol=1e-5)
    _, plan = gaudi_jax.compress(dense, 1.0, method="low_rank", progress=False)
    assert plan["layers"][""]["error"] < 1e-5


@pytest.mark.parametrize("abstract", [False, True])
def test_rebuild_and_the_values_give_the_model_again(encoder, compressed, abstract):
    model, plan = compressed
    plan = json.loads(json.dumps(plan, allow_nan=False))
    assert plan == compressed.plan
    into = nnx.eval_shape(lambda: Encoder(nnx.Rngs(0))) if abstract else encoder
    empty = gaudi_jax.rebuild(into, plan)
    assert nnx.graphdef(empty) == nnx.graphdef(model)
    leaf = empty.layers[0].mlp.layers[0].v.get_value()
    assert isinstance(leaf, jax.ShapeDtypeStruct if abstract else jax.Array)
    assert type(into.layers[0].mlp.layers[0]) is nnx.Linear
    nnx.update(empty, nnx.state(model))
    assert equal(plain(empty), plain(model))
    assert (evaluate(empty, tokens()) == evaluate(model, tokens())).all()


def test_a_plan_of_another_model_is_one_sentence(encoder, compressed):
    plan = compressed.plan
    with pytest.raises(UserError, match=r"another model: 6 layers differ \(layers/0/.*not there"):
        gaudi_jax.rebuild(Encoder(nnx.Rngs(0), depth=0), plan)
    with pytest.raises(UserError, match=r"another model: .*is not in it"):
        gaudi_jax.rebuild(Encoder(nnx.Rngs(0), depth=2), plan)
    with pytest.raises(UserError, match="is 16→2·8, not 16→2·8 with bias"):
        gaudi_jax.rebuild(Encoder(nnx.Rngs(0), use_bias=False), plan)
    with pytest.raises(UserError, match="plan of format None"):
        gaudi_jax.rebuild(encoder, {})
    with pytest.raises(UserError, match="plan of format 7"):
        plan_table(plan | {"format": 7})
    with pytest.raises(UserError, match="the plan lacks left"):
        plan_table({key: value for key, value in plan.items() if key != "left"})
    with pytest.raises(UserError, match="layers of the plan is a list"):
        gaudi_jax.rebuild(encoder, plan | {"layers": []})
    odd = {path: entry | {"method": "magic"} for path, entry in plan["layers"].items()}
    with pytest.raises(UserError, match="unknown method 'magic'"):
        gaudi_jax.rebuild(encoder, plan | {"layers": odd})
    with pytest.raises(UserError, match="layer 'a' lacks method, "):
        gaudi_jax.rebuild(encoder, plan | {"layers": {"a": {"in_features": 3}}})


def test_the_table_names_layers_totals_and_what_is_left(compressed):
    table = plan_table(compressed.plan)
    assert "layers/0/self_attn/query" in table
    assert f"{compressed.plan['multiplications']:,}" in table
    assert "head: a rule skips it" in table


def test_progress_goes_to_stderr(capsys):
    model = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))
    gaudi_jax.compress(model, 0.5, method="low_rank", calibration=[tokens()])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "compress 1/1" in captured.err
    assert "calibrate" in captured.err


def test_equal_calls_give_equal_models(encoder, compressed):
    again = gaudi_jax.compress(
        encoder,
        0.5,
        rules=[SKIP_HEAD, ALL_OTHERS],
        calibration=[tokens(0), tokens(1)],
        **OPTIONS,
    )
    assert again.plan == compressed.plan
    assert equal(plain(again.model), plain(compressed.model))
