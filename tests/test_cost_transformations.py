"""Costs of layers under the transformations of JAX and NNX."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gaudi_jax.cost import cost
from gaudi_jax.layers import LowRankLinear
from tests.costs import applications, gaudi, linear, products, shaped

DEPTH = 3


class Stacked(nnx.Module):
    """Layers of one kind whose parameters are stacked, run by a given function."""

    def __init__(self, run, *, make=linear):
        self.layers = nnx.vmap(lambda rngs: make(6, 6), in_axes=0, out_axes=0)(
            nnx.Rngs(0).split(DEPTH)
        )
        self.run = run

    def __call__(self, x):
        return self.run(self.layers, x)


def scanned(layers, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    return forward(x, layers)


def rematerialised(layers, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def forward(x, layer):
        return jax.nn.relu(layer(x))

    return forward(x, layers)


def ensembled(layers, x):
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)


def looped(layers, x):
    graphdef, state = nnx.split(layers)
    for index in range(DEPTH):
        x = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], state))(x)
    return x


@pytest.mark.parametrize("run", [scanned, rematerialised, ensembled, looped])
def test_stacked_layers(run):
    model = Stacked(run)
    result = cost(model, shaped(5, 6))
    assert applications(result) == {"layers": DEPTH * 5}
    assert result.multiplications == DEPTH * 5 * 36
    assert result.others == ()
    assert result.parameters == DEPTH * 42
    assert cost(model).multiplications == DEPTH * 36


@pytest.mark.parametrize("run", [scanned, ensembled])
def test_stacked_structured_layers_cost_their_mean(run):
    model = Stacked(run, make=gaudi)
    each = []
    for depth in range(DEPTH):
        widths = jnp.zeros((2, 6)).at[:, : depth + 1].set(0.5)
        model.layers.widths[...] = model.layers.widths[...].at[depth].set(widths)
        each.append((depth + 1) * min(3 + 3, 3 * 3))
    result = cost(model, shaped(5, 6))
    (row,) = result.layers
    assert (row.applications, row.multiplications) == (DEPTH * 5, 5 * sum(each))
    assert row.relative == pytest.approx(sum(each) / DEPTH / 36)
    assert cost(model).multiplications == sum(each)


def through_vmap(layer, x):
    return jax.vmap(layer)(x)


def through_jit(layer, x):
    return nnx.jit(lambda layer, x: layer(x))(layer, x)


def through_remat(layer, x):
    return nnx.remat(lambda layer, x: layer(x))(layer, x)


def through_map(layer, x):
    return jax.lax.map(layer, x)


def through_custom_vjp(layer, x):
    @jax.custom_vjp
    def call(x):
        return layer(x)

    call.defvjp(lambda x: (layer(x), None), lambda _, ct: (ct,))
    return call(x)


def through_custom_jvp(layer, x):
    @jax.custom_jvp
    def call(x):
        return layer(x)

    call.defjvp(lambda primals, tangents: (layer(*primals), layer(*tangents)))
    return call(x)


def through_while(layer, x):
    return jax.lax.while_loop(lambda x: x.sum() < 10, layer, x)


class Once(nnx.Module):
    def __init__(self, run):
        self.layer = linear(6, 6)
        self.run = run

    def __call__(self, x):
        return self.run(self.layer, x)


@pytest.mark.parametrize(
    "run",
    [
        through_vmap,
        through_jit,
        through_remat,
        through_map,
        through_custom_vjp,
        through_custom_jvp,
        through_while,
    ],
)
def test_transformed_calls_count_once(run):
    result = cost(Once(run), shaped(4, 5, 6))
    assert applications(result) == {"layer": 20}
    assert result.multiplications == 20 * 36
    assert result.others == ()


def test_a_layer_shared_by_the_steps_of_a_scan():
    def run(layer, x):
        return jax.lax.scan(lambda x, _: (layer(x) @ jnp.eye(6), None), x, length=7)[0]

    result = cost(Once(run), shaped(5, 6))
    assert applications(result) == {"layer": 35}
    assert products(result) == 7 * 5 * 36


@pytest.mark.parametrize("flip", [False, True])
def test_the_most_expensive_branch_counts(flip):
    class Branches(nnx.Module):
        def __init__(self):
            self.cheap = LowRankLinear(6, 6, rank=1, rngs=nnx.Rngs(0))
            self.dear = linear(6, 6)

        def __call__(self, x):
            twice = lambda x: self.cheap(self.cheap(x))  # noqa: E731
            branches = (self.dear, twice) if flip else (twice, self.dear)
            return jax.lax.cond(x.sum() > 0, *branches, x)

    result = cost(Branches(), shaped(5, 6))
    assert applications(result) == {"cheap": 0, "dear": 5}
    assert result.multiplications == 5 * 36
