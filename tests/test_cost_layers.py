"""Costs of structured layers, from the nonzeros of hard masks, and of shared and tied ones."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gaudi_jax.cost import cost
from gaudi_jax.layers import GaudiLinear
from gaudi_jax.layers.base import StructuredLinear
from gaudi_jax.masks import hard_mask
from tests.costs import Language, applications, linear, products, shaped

# --- Structured layers -------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    rank=st.integers(1, 3),
    cells=st.sampled_from([(1, 1), (4, 2), (8, 4)]),
)
def test_gaudi_layer_costs_its_live_blocks(seed, rank, cells):
    n_in, n_out, blocks = 24, 16, 5
    random = np.random.default_rng(seed)
    widths = jnp.asarray(random.choice([0.0, 1.0, *random.random(6)], (2, blocks)), jnp.float32)
    locations = jnp.asarray(random.random((2, blocks)), jnp.float32)
    layer = GaudiLinear.from_blocks(
        jnp.ones((blocks, rank, n_in)),
        jnp.ones((blocks, rank, n_out)),
        widths,
        locations,
        granularity=cells,
        sigma=2.0,
    )
    masks_in, masks_out = (
        np.asarray(hard_mask(widths[axis], locations[axis], n, granularity=cells[axis]))
        for axis, n in enumerate((n_in, n_out))
    )
    expected = 0
    for mask_in, mask_out in zip(masks_in, masks_out, strict=True):
        rectangle = np.count_nonzero(np.outer(mask_in, mask_out))
        factors = rank * (np.count_nonzero(mask_in) + np.count_nonzero(mask_out))
        expected += min(rectangle, factors)
    (row,) = cost(layer, shaped(2, 7, n_in)).layers
    assert row.multiplications == 14 * expected
    assert row.dense_multiplications == 14 * n_in * n_out
    assert row.relative == expected / (n_in * n_out)
    assert cost(layer).multiplications == expected


def test_dead_blocks_cost_nothing():
    widths = jnp.array([[0.0, 0.5, 0.01], [1.0, 0.25, 1.0]])
    layer = GaudiLinear.from_blocks(
        jnp.ones((3, 1, 8)), jnp.ones((3, 1, 8)), widths, jnp.zeros((2, 3))
    )
    assert cost(layer).multiplications == 4 + 2


class Wrapped(StructuredLinear):
    """A structured layer that is made of other layers."""

    def __init__(self):
        self.in_features, self.out_features = 6, 6
        self.bias, self.dtype, self.param_dtype = nnx.data(None), None, jnp.float32
        self.inner = linear(6, 6)

    def kernel(self):
        return self.inner.kernel[...]

    def set_kernel(self, kernel):
        self.inner.kernel[...] = kernel

    def multiplications(self):
        return jnp.float32(7)

    def product(self, x, out_sharding=None):
        return self.inner(x)


def test_what_a_structured_layer_holds_is_part_of_it():
    result = cost(nnx.Sequential(Wrapped(), linear(6, 2)), shaped(5, 6))
    assert [(row.path, row.kind) for row in result.layers] == [
        ("layers/0", "Wrapped"),
        ("layers/1", "Linear"),
    ]
    assert result.multiplications == 5 * (7 + 12)
    assert result.others == ()


def test_a_subclass_may_multiply_more_than_its_base():
    model = nnx.LoRALinear(6, 8, lora_rank=2, rngs=nnx.Rngs(0))
    result = cost(model, shaped(5, 6))
    assert result.multiplications == 5 * 6 * 8
    assert products(result) == 5 * 2 * (6 + 8)
    assert result.parameters == 6 * 8 + 8 + 2 * (6 + 8)


# --- Sharing, embeddings, tied heads -----------------------------------------------------------


def test_a_shared_layer_is_listed_once_and_applied_twice():
    shared = linear(6, 6)
    result = cost(nnx.Sequential(shared, jax.nn.relu, shared), shaped(5, 6))
    assert applications(result) == {"layers/0": 10}
    assert result.multiplications == 10 * 36
    assert result.parameters == 42


def test_a_parameter_shared_by_two_layers_counts_once():
    first, second = linear(6, 6), linear(6, 6)
    second.kernel = first.kernel
    result = cost(nnx.Sequential(first, second), shaped(5, 6))
    assert applications(result) == {"layers/0": 5, "layers/1": 5}
    assert result.parameters == 36 + 6 + 6


def test_embedding_and_tied_head_are_listed_apart():
    result = cost(Language(), shaped(2, 7, dtype=jnp.int32))
    embed, head = result.others
    assert (embed.path, embed.kind, embed.shape) == ("embed", "Embed", (50, 8))
    assert (embed.applications, embed.multiplications, embed.parameters) == (14, 0, 400)
    assert (head.path, head.kind, head.shape) == ("embed", "tied head", (8, 50))
    assert (head.applications, head.multiplications, head.parameters) == (14, 14 * 400, 0)
    assert result.relative == 0.5
    assert result.total_relative == (32 + 400) / (64 + 400)
    assert result.parameters == 400 + 2 * 16 + 8


def test_an_embedding_without_inputs_has_no_head():
    result = cost(Language())
    assert [row.kind for row in result.others] == ["Embed"]
    assert result.total_relative == result.relative == 0.5


def test_a_kernel_used_past_its_layer_is_another_product():
    class Past(nnx.Module):
        def __init__(self):
            self.layer = linear(4, 3)

        def __call__(self, x):
            return x @ self.layer.kernel[...]

    result = cost(Past(), shaped(5, 4))
    assert applications(result) == {"layer": 0}
    assert products(result) == 60
    assert result.relative == 1.0
