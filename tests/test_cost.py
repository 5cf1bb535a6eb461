"""Costs of whole models against XLA's own count and hand counts; mistakes and forms."""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gaudi_jax.cost import cost
from gaudi_jax.errors import UserError
from gaudi_jax.layers import GaudiLinear, LowRankLinear
from tests.costs import Language, applications, by_path, gaudi, linear, products, shaped


class Attention(nnx.Module):
    """Separate projections, with the products written out."""

    query: nnx.Linear
    key: nnx.Linear
    value: nnx.Linear
    out: nnx.Linear

    def __init__(self, width, *, make=linear):
        for name in ("query", "key", "value", "out"):
            setattr(self, name, make(width, width))

    def __call__(self, x):
        scores = jnp.einsum("...qd,...kd->...qk", self.query(x), self.key(x))
        return self.out(jax.nn.softmax(scores) @ self.value(x))


class Block(nnx.Module):
    def __init__(self, width, *, make=linear):
        self.norm = nnx.LayerNorm(width, rngs=nnx.Rngs(0))
        self.attention = Attention(width, make=make)
        self.up = make(width, 4 * width)
        self.down = make(4 * width, width)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = x + self.dropout(self.attention(self.norm(x)))
        return x + self.down(jax.nn.gelu(self.up(x)))


class ToyViT(nnx.Module):
    def __init__(self, *, image, patch, width, depth, classes, make=linear):
        self.patches = nnx.Conv(
            3, width, (patch, patch), strides=patch, padding="VALID", rngs=nnx.Rngs(0)
        )
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.blocks = nnx.List([Block(width, make=make) for _ in range(depth)])
        self.head = linear(width, classes)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


# --- XLA as the oracle -------------------------------------------------------------------------

linear_models: dict[str, Any] = {
    "Linear": (partial(nnx.Linear, 12, 20, use_bias=False), (3, 5, 12)),
    "Linear, one vector": (partial(nnx.Linear, 12, 20, use_bias=False), (12,)),
    "LinearGeneral": (
        partial(nnx.LinearGeneral, (4, 6), (5, 3), axis=(-2, -1), use_bias=False),
        (7, 4, 6),
    ),
    "LinearGeneral, inner axis": (
        partial(nnx.LinearGeneral, 4, (5, 3), axis=1, use_bias=False),
        (7, 4, 6),
    ),
    "LinearGeneral, batch axis": (
        partial(nnx.LinearGeneral, 6, 5, batch_axis={0: 4}, use_bias=False),
        (4, 3, 6),
    ),
    "Conv": (
        partial(nnx.Conv, 6, 8, (3, 2), strides=2, padding="VALID", use_bias=False),
        (2, 9, 8, 6),
    ),
    "Conv, groups": (
        partial(nnx.Conv, 6, 8, (3,), padding="VALID", feature_group_count=2, use_bias=False),
        (2, 9, 6),
    ),
    "Conv, dilated, no batch": (
        partial(nnx.Conv, 4, 8, (3, 3), padding="VALID", kernel_dilation=2, use_bias=False),
        (9, 9, 4),
    ),
    "LowRankLinear": (partial(LowRankLinear, 12, 20, rank=2, use_bias=False), (3, 5, 12)),
}


def xla_multiplications(model, *inputs):
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    analysis: Any = call.lower(state, *inputs).compile().cost_analysis()
    return analysis["flops"] / 2


@pytest.mark.parametrize("name", linear_models)
def test_equals_what_xla_compiles(name):
    make, shape = linear_models[name]
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    result = cost(model, shaped(*shape))
    assert result.multiplications == xla_multiplications(model, shaped(*shape))
    assert result.others == ()
    assert [row.path for row in result.layers] == [""]


def test_products_outside_the_layers_equal_what_xla_compiles():
    # The softmax is the only other arithmetic: of the order of the scores' elements.
    model = Attention(64, make=partial(linear, use_bias=False))
    result = cost(model, shaped(2, 48, 64))
    elementwise = 10 * 2 * 48 * 48
    xla = xla_multiplications(model, shaped(2, 48, 64))
    assert xla - elementwise <= result.total_multiplications <= xla
    assert products(result) == 2 * (2 * 48 * 48 * 64)


@pytest.mark.parametrize("stride", [1, 2])
def test_zeros_of_a_transposed_convolution_are_not_multiplied(stride):
    strides = (stride, stride)
    model = nnx.eval_shape(
        lambda: nnx.ConvTranspose(4, 6, (2, 2), strides, padding="SAME", rngs=nnx.Rngs(0))
    )
    result = cost(model, shaped(1, 8, 8, 4))
    assert products(result) == 8 * 8 * (2 * 2 * 4 * 6)
    assert result.layers == ()


# --- Hand counts -------------------------------------------------------------------------------


def test_flax_attention():
    model = nnx.MultiHeadAttention(
        num_heads=4, in_features=32, qkv_features=16, decode=False, rngs=nnx.Rngs(0)
    )
    result = cost(model, shaped(2, 10, 32))
    assert {path: row.shape for path, row in by_path(result).items()} == {
        "query": (32, 16),
        "key": (32, 16),
        "value": (32, 16),
        "out": (16, 32),
    }
    assert {row.kind for row in result.layers} == {"LinearGeneral"}
    assert set(applications(result).values()) == {20}
    assert result.multiplications == 20 * 4 * 32 * 16
    assert products(result) == 2 * (2 * 10 * 10 * 16)
    assert result.parameters == 4 * 32 * 16 + 3 * 16 + 32


def test_vision_transformer():
    width, tokens, batch = 16, 17, 3
    make = lambda n_in, n_out: LowRankLinear(n_in, n_out, rank=4, rngs=nnx.Rngs(0))  # noqa: E731
    model = nnx.eval_shape(
        lambda: ToyViT(image=8, patch=2, width=width, depth=2, classes=10, make=make)
    )
    result = cost(model, shaped(batch, 8, 8, 3))
    ends = batch * (16 * (2 * 2 * 3 * width) + width * 10)
    low_rank = batch * tokens * 2 * 4 * (4 * 2 * width + 2 * 5 * width)
    dense = batch * tokens * 2 * 12 * width * width
    attention = batch * 2 * (2 * tokens * tokens * width)
    assert result.multiplications == ends + low_rank
    assert result.dense_multiplications == ends + dense
    assert result.relative == (ends + low_rank) / (ends + dense)
    assert result.total_multiplications == ends + low_rank + attention
    assert result.total_dense_multiplications == ends + dense + attention
    assert result.total_relative == (ends + low_rank + attention) / (ends + dense + attention)
    row = by_path(result)["blocks/1/attention/query"]
    assert (row.kind, row.shape, row.applications) == ("LowRankLinear", (16, 16), batch * tokens)
    assert row.multiplications == batch * tokens * 4 * 32
    assert row.relative == 0.5
    assert row.parameters == 4 * 32 + 16
    assert row.bytes == 4 * row.parameters
    patches = by_path(result)["patches"]
    assert (patches.shape, patches.applications) == ((12, 16), batch * 16)


def test_a_large_model_needs_no_memory():
    """ViT-B/16 on a batch of 1024: its activations alone would take a hundred gigabytes."""
    model = nnx.eval_shape(lambda: ToyViT(image=224, patch=16, width=768, depth=12, classes=1000))
    result = cost(model, shaped(1024, 224, 224, 3))
    layers = 12 * 12 * 768**2 * 197 + 196 * 768**2 + 768 * 1000
    assert result.multiplications == 1024 * layers
    assert products(result) == 1024 * 12 * 2 * 197**2 * 768


def test_without_inputs_each_layer_is_applied_once():
    model = nnx.eval_shape(lambda: ToyViT(image=8, patch=2, width=16, depth=2, classes=10))
    result = cost(model)
    assert set(applications(result).values()) == {1}
    assert len(result.layers) == 2 + 2 * 6
    assert result.multiplications == 12 * 16 + 2 * 12 * 16 * 16 + 160
    assert result.others == ()
    assert result.total_relative == result.relative == 1.0


def test_nested_containers_have_readable_paths():
    model: Any = nnx.Sequential(linear(2, 3), nnx.Sequential(linear(3, 4)))
    model.extra = nnx.Dict(heads=nnx.List([linear(4, 5)]))
    assert set(by_path(cost(model))) == {"layers/0", "layers/1/layers/0", "extra/heads/0"}


def test_a_model_without_layers_costs_nothing():
    result = cost(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), shaped(3, 4))
    assert (result.multiplications, result.layers, result.others) == (0, (), ())
    assert result.relative == result.total_relative == 1.0
    assert result.parameters == 8


def test_bytes_follow_the_parameters_dtype():
    model = nnx.Sequential(linear(4, 6, param_dtype=jnp.bfloat16), linear(6, 2))
    result = cost(model)
    assert [row.bytes for row in result.layers] == [2 * 30, 4 * 14]
    assert (result.parameters, result.bytes) == (44, 116)


# --- The model is left alone -------------------------------------------------------------------


class Stateful(nnx.Module):
    """Dropout, batch statistics, a mode, a plain-object layer and a check of its layers' kind."""

    def __init__(self):
        self.first = gaudi(6, 6)
        self.norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=1))
        self.embed = nnx.Embed(6, 6, rngs=nnx.Rngs(0))
        self.last = Plain(6, 6, rngs=nnx.Rngs(0))

    def __call__(self, x):
        assert isinstance(self.first, GaudiLinear)
        assert self.first.deterministic
        assert isinstance(self.last, nnx.Linear)
        assert self.last.in_features == 6
        return self.embed.attend(self.last(self.dropout(self.norm(self.first(x)))))


class Plain(nnx.Linear, pytree=False):
    """A layer that is a graph node only."""


def test_the_model_is_left_as_it_was():
    model = Stateful()
    graphdef, state = nnx.split(model)
    attributes = {
        path: (type(node), dict(vars(node)))
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
    }
    result = cost(model, shaped(5, 6))
    assert applications(result) == {"first": 5, "last": 5}
    assert by_path(result)["last"].parameters == 42
    assert result.parameters == sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    after_graphdef, after_state = nnx.split(model)
    assert after_graphdef == graphdef
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after_state), strict=True)
    assert all(before is after for before, after in pairs)
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            kind, values = attributes[path]
            assert type(node) is kind
            assert vars(node).keys() == values.keys()
    assert not model.first.deterministic
    assert not model.norm.use_running_average
    assert cost(model, shaped(5, 6)) == result


def test_arrays_serve_as_inputs():
    model = linear(4, 3)
    assert cost(model, np.zeros((5, 4), np.float32)) == cost(model, shaped(5, 4))
    assert cost(model, jnp.zeros((5, 4))) == cost(model, shaped(5, 4))


# --- Errors ------------------------------------------------------------------------------------


def test_a_wrong_input_is_the_users_error():
    with pytest.raises(UserError, match=r"cannot trace Linear on inputs of shape \(5, 3\): .*dot"):
        cost(linear(4, 3), shaped(5, 3))


def test_too_many_inputs_are_the_users_error():
    with pytest.raises(UserError, match="cannot trace Sequential"):
        cost(nnx.Sequential(linear(4, 3)), shaped(5, 4), 1, 2)


def test_not_a_model():
    with pytest.raises(UserError, match="needs an NNX module, not 'function'"):
        cost(linear)  # type: ignore[arg-type]


def test_a_structured_layer_needs_its_values():
    model = nnx.eval_shape(lambda: nnx.Sequential(gaudi(4, 4)))
    with pytest.raises(UserError, match="'layers/0' holds shapes without values"):
        cost(model)


def test_parameters_of_a_wrong_shape_are_named():
    layer = gaudi(4, 4)
    layer.v = nnx.Param(jnp.ones((4, 1, 5)))
    with pytest.raises(UserError, match=r"GaudiLinear has parameters that give no kernel"):
        cost(nnx.Sequential(layer))


# --- Forms -------------------------------------------------------------------------------------


def test_dict_survives_json():
    result = cost(Language(), shaped(2, 7, dtype=jnp.int32))
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored == result.to_dict()
    assert stored["relative"] == result.relative
    assert stored["total_relative"] == result.total_relative
    assert stored["multiplications"] == result.multiplications == 14 * 32
    assert [row["kind"] for row in stored["others"]] == ["Embed", "tied head"]
    assert stored["layers"] == [
        {
            "path": "layer",
            "kind": "LowRankLinear",
            "shape": [8, 8],
            "applications": 14,
            "multiplications": 14 * 32,
            "dense_multiplications": 14 * 64,
            "relative": 0.5,
            "parameters": 40,
            "bytes": 160,
        }
    ]


def test_table_is_aligned():
    lines = str(cost(Language(), shaped(20, 70, dtype=jnp.int32))).splitlines()
    *table, footer = lines
    assert len({len(line) for line in table}) == 1
    assert table[0].split() == ["layer", "kind", "in→out", "applied", "multiplications", "relative"]
    cells = [line.split() for line in table]
    assert ["layer", "LowRankLinear", "8→8", "1,400", "44,800", "0.500"] in cells
    assert ["layers", "44,800", "0.500"] in cells
    assert ["embed", "tied", "head", "8→50", "1,400", "560,000", "1.000"] in cells
    assert ["all", "604,800", "0.931"] in cells
    assert footer == "440 parameters, 1,760 bytes"
