"""How layers are made: options, factories, and what is told of wrong ones."""

import jax.numpy as jnp
import pytest
from flax import nnx

from gaudi_jax import BlastLinear, BlockSparseLinear, GaudiLinear, LowRankLinear, MonarchLinear
from gaudi_jax.errors import UserError
from gaudi_jax.layers import initializers
from gaudi_jax.layers.factory import affordable_rank, largest_divisor, linear_factory


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaudiLinear(8, 6, granularity=4, rngs=nnx.Rngs(0)), "4 does not divide.* 6"),
        (lambda: GaudiLinear(8, 8, rank=9, rngs=nnx.Rngs(0)), "rank=9"),
        (lambda: GaudiLinear(8, 8, rank=0, rngs=nnx.Rngs(0)), "rank=0"),
        (lambda: GaudiLinear(8, 8, granularity=(1, 2, 4), rngs=nnx.Rngs(0)), "must be a whole"),
        (lambda: GaudiLinear(8, 8, granularity=2.5, rngs=nnx.Rngs(0)), r"granularity=2\.5"),
        (lambda: GaudiLinear(8, 8, sigma=-1.0, rngs=nnx.Rngs(0)), "sigma=-1"),
        (lambda: GaudiLinear(8, 8, backward_smoothing=-1.0, rngs=nnx.Rngs(0)), "smoothing=-1"),
        (lambda: LowRankLinear(8, 6, rank=7, rngs=nnx.Rngs(0)), r"rank=7.*\[1, 6\]"),
        (lambda: GaudiLinear(8, 6, rngs=nnx.Rngs(0))(jnp.ones((2, 6))), "in_features=8"),
        (lambda: initializers.split_widths(0.0), "density=0"),
        (lambda: linear_factory({"name": "magic"}), "unknown layer 'magic'"),
        (lambda: linear_factory({"name": "blast"}), "'blast' needs rank or budget"),
        (lambda: linear_factory({"name": "monarch", "rank": 1, "budget": 0.5}), "not both"),
        (lambda: linear_factory({"name": "monarch", "budget": -1.0}), "budget=-1"),
        (lambda: linear_factory({"name": "block_sparse", "rank": 1}), "rank and diagonals"),
        (
            lambda: linear_factory({"name": "block_sparse", "budget": 0.5, "low_rank_share": 1.0}),
            "low_rank_share=1.0",
        ),
        (
            lambda: linear_factory({"name": "blast", "budget": 0.5, "blocks": 0})(
                8, 8, rngs=nnx.Rngs(0)
            ),
            "blocks=0 must be at least 1",
        ),
        *(
            (
                lambda name=name: linear_factory({"name": name, "budget": 0.1})(
                    16, 32, rngs=nnx.Rngs(0)
                ),
                "a budget of 0.09961 is less than .*give at least 0.",
            )
            for name in ("monarch", "blast", "block_sparse")
        ),
        (
            lambda: MonarchLinear(8, 6, blocks=4, rank=1, rngs=nnx.Rngs(0)),
            "blocks=4 does not divide both axes of a 8x6 layer; use 2",
        ),
        (
            lambda: MonarchLinear(8, 12, blocks=2, rank=5, rngs=nnx.Rngs(0)),
            r"rank=5 of a 8x12 layer must be a whole number in \[1, 4\]",
        ),
        (lambda: BlastLinear(8, 6, blocks=2, rank=7, rngs=nnx.Rngs(0)), r"rank=7.*\[1, 6\]"),
        (
            lambda: BlockSparseLinear(12, 12, blocks=6, diagonals=1, rank=1, rngs=nnx.Rngs(0)),
            "blocks=6 must be a power of two for a butterfly; use 4",
        ),
        (
            lambda: BlockSparseLinear(8, 8, blocks=4, diagonals=4, rank=1, rngs=nnx.Rngs(0)),
            r"diagonals=4 must be a whole number in \[1, 3\]",
        ),
        (
            lambda: BlockSparseLinear(8, 8, blocks=4, diagonals=1, rank=0, rngs=nnx.Rngs(0)),
            "rank=0",
        ),
        (lambda: linear_factory({"name": "gaudi", "ranks": 1}), "'ranks'"),
        (lambda: linear_factory({"name": "low_rank"}), "rank or budget"),
        (
            lambda: linear_factory({"name": "low_rank", "budget": 0.01})(8, 8, rngs=nnx.Rngs(0)),
            "less than rank 1",
        ),
        (lambda: linear_factory({"name": "gaudi", "widths": "magic"}), "'magic'"),
        (lambda: linear_factory({"name": "gaudi", "locations": "magic"}), "'magic'"),
        (
            lambda: GaudiLinear.from_blocks(
                jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)), jnp.ones((2, 3)), jnp.ones((2, 2))
            ),
            "widths has shape",
        ),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_factory_takes_the_largest_divisor_on_each_axis():
    layer = linear_factory({"name": "gaudi", "granularity": 16})(48, 40, rngs=nnx.Rngs(0))
    assert layer.granularity == (16, 10)
    assert largest_divisor(7, 5) == 1


def test_equal_options_make_equal_graphs():
    options = {"name": "gaudi", "granularity": 4}
    assert linear_factory(options) == linear_factory(dict(options))
    assert linear_factory(options) != linear_factory({"name": "gaudi", "granularity": 2})


def test_a_budget_of_whole_ranks_loses_none_to_binary_fractions():
    for n, m in ((96, 288), (128, 384), (768, 3072), (7, 5)):
        for rank in range(1, min(n, m) + 1):
            assert affordable_rank(n, m, rank * (n + m) / (n * m)) == rank
