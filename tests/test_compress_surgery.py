"""What is left as it is and why; dtypes, sharding; the reshaping layer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from other_models import WIDTH

import gaudi_jax
from gaudi_jax import GaudiLinear, LowRankLinear
from gaudi_jax.compression.surgery import find_dense
from gaudi_jax.cost import cost
from gaudi_jax.errors import UserError
from gaudi_jax.layers import GeneralLinear


def linear(**options):
    return nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0), **options)


def general(*features, **options):
    return nnx.LinearGeneral(*features, rngs=nnx.Rngs(0), **options)


def low_rank(model, budget=0.5, **options):
    return gaudi_jax.compress(model, budget, method="low_rank", progress=False, **options)


def stacked(depth):
    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(4, 4, rngs=rngs)

    return make(nnx.Rngs(0))


class Special(nnx.Linear):
    pass


class Frozen(nnx.Variable):
    pass


def with_kernel(kernel):
    layer = linear()
    layer.kernel = kernel
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Special(4, 4, rngs=nnx.Rngs(0)), "a Special is not replaced, only Linear itself"),
        (lambda: nnx.LoRALinear(4, 4, lora_rank=1, rngs=nnx.Rngs(0)), "a LoRALinear is not"),
        (lambda: nnx.Conv(4, 4, 3, rngs=nnx.Rngs(0)), "a Conv is not replaced"),
        (lambda: nnx.Einsum("ab,bc->ac", (4, 4), rngs=nnx.Rngs(0)), "an? Einsum is not replaced"),
        (lambda: general(4, 4, batch_axis={0: 3}), "it has batch axes"),
        (lambda: stacked(3), r"its kernel of shape \(3, 4, 4\) is stacked"),
        (lambda: linear(dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)), "dot_general"),
        (lambda: general(4, 4, dot_general_cls=lambda: jax.lax.dot_general), "dot_general_cls"),
        (lambda: linear(promote_dtype=lambda x, dtype: x), "promote_dtype"),
        (lambda: linear(preferred_element_type=jnp.float32), "preferred_element_type"),
        (lambda: linear(precision="highest"), "its precision is not the default"),
        (lambda: with_kernel(Frozen(jnp.ones((WIDTH, WIDTH)))), "is a Frozen, not a Param"),
        (lambda: with_kernel(nnx.Param(jnp.ones((2, WIDTH, WIDTH)))), r"\(2, 16, 16\) is stacked"),
        (lambda: with_kernel(nnx.Param(jnp.ones((WIDTH,) * 2, "int8"))), "is of dtype int8"),
        (lambda: GaudiLinear(4, 4, rngs=nnx.Rngs(0)), "a GaudiLinear has a structure already"),
        (lambda: nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)), "overwritten by the module"),
    ],
)
def test_what_is_left_and_why(make, reason):
    model = nnx.Sequential(make(), linear())
    small, plan = low_rank(model)
    assert list(plan["layers"]) == ["layers/1"]
    ((path, why),) = plan["left"].items()
    assert path.startswith("layers/0")
    assert re.search(reason, why)
    assert nnx.graphdef(small.layers[0]) == nnx.graphdef(model.layers[0])
    with pytest.raises(UserError, match=f"no layer of the model.*{reason}"):
        low_rank(model.layers[0])


def test_parameters_held_elsewhere_too_are_left():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(WIDTH, WIDTH, rngs=nnx.Rngs(0))
            self.tied = with_kernel(self.embed.embedding)
            self.biased = linear()
            self.scales = nnx.data([self.biased.bias])
            self.listed = linear()
            self.free = linear()
            self.again = nnx.data({"free": self.free})
            self.kernels = nnx.data((self.listed.kernel,))

    dense, left = find_dense(Tied())
    assert [type(layer) for layer in dense.values()] == [nnx.Linear]
    assert left == {
        "biased": "its bias belongs to another module as well",
        "listed": "its kernel belongs to another module as well",
        "tied": "its kernel belongs to another module as well",
    }


@pytest.mark.parametrize(
    ("options", "x_shape", "out"),
    [
        ({"axis": -1}, (2, 3, 4), 5),
        ({"axis": (-2, -1)}, (5, 3, 4), 5),
        ({"axis": (1, -1)}, (2, 3, 7, 4), (2, 3)),
        ({"axis": (-1, 1)}, (2, 3, 7, 4), (2, 3)),
        ({"axis": (0, 1), "use_bias": False}, (3, 4, 6), (2, 1, 3)),
        ({"axis": (0, 1)}, (3, 4), (2, 3)),
    ],
)
def test_general_layers_equal_flax(options, x_shape, out):
    n_in = 4 if options["axis"] == -1 else (3, 4)
    dense = general(n_in, out, bias_init=nnx.initializers.normal(), **options)
    small, plan = low_rank(dense, 2.0)
    assert type(small) is GeneralLinear
    x = jax.random.normal(jax.random.key(1), x_shape)
    np.testing.assert_allclose(small(x), dense(x), atol=1e-5)
    counted = cost(small, x)
    assert counted.multiplications == cost(dense, x).multiplications
    assert counted.layers[0].kind == "LowRankLinear"
    assert plan["multiplications"] == counted.multiplications // counted.layers[0].applications


def test_general_layers_name_wrong_shapes():
    layer = low_rank(general((3, 4), (2, 3), axis=(-2, -1)), 1.0).model
    with pytest.raises(UserError, match=r"input of shape \(5, 4, 3\).*in_features=\(3, 4\)"):
        layer(jnp.ones((5, 4, 3)))
    inner = LowRankLinear(4, 6, rank=1, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="do not fit a layer of 4 -> 6"):
        GeneralLinear(inner, (4,), (2, 2))
    with pytest.raises(UserError, match="as many entries"):
        GeneralLinear(inner, (4,), (2, 3), (0, 1))


@pytest.mark.parametrize("method", ["gaudi", "low_rank"])
def test_dtypes_and_the_bias_are_kept(method):
    dense = linear(param_dtype=jnp.bfloat16, dtype=jnp.float16)
    small, plan = gaudi_jax.compress(dense, 2.0, method=method, rounds=2, progress=False)
    assert small.v.dtype == small.u.dtype == small.bias.dtype == small.param_dtype == jnp.bfloat16
    assert small.dtype == jnp.float16
    x = jnp.ones((2, WIDTH), jnp.bfloat16)
    assert small(x).dtype == dense(x).dtype == jnp.float16
    # Rounding the factors is all that is lost at the full budget, and the plan says so.
    error = jnp.linalg.norm(small.kernel().astype("float32") - dense.kernel.astype("float32"))
    assert 1e-3 < plan["layers"][""]["error"] < 1e-2
    assert error < 2e-2 * jnp.linalg.norm(dense.kernel.astype("float32"))


def test_parameters_cast_after_the_fact_keep_their_dtype():
    dense = linear()
    dense.kernel.set_value(dense.kernel[...].astype(jnp.bfloat16))
    dense.bias.set_value(dense.bias[...].astype(jnp.bfloat16))
    small = low_rank(dense).model
    assert small.v.dtype == small.bias.dtype == jnp.bfloat16
    assert small(jnp.ones((1, WIDTH), jnp.bfloat16)).dtype == jnp.bfloat16


def test_sharding_metadata_and_placement_are_carried():
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    specs = {
        "kernel_metadata": {"out_sharding": ("data", "model"), "note": "kept"},
        "bias_metadata": {"out_sharding": ("model",)},
    }
    with jax.set_mesh(mesh):
        dense = linear(**specs)
        heads = general(
            WIDTH, (4, 4), kernel_metadata={"out_sharding": ("data", "model", None)}, use_bias=False
        )
        depth = general(
            WIDTH, (4, 4), kernel_metadata={"out_sharding": (None, None, "model")}, use_bias=False
        )
    model = nnx.Sequential(dense, heads, depth)
    for small in (
        gaudi_jax.compress(model, 0.5, rounds=2, progress=False).model,
        gaudi_jax.rebuild(model, gaudi_jax.compress(model, 0.5, rounds=2, progress=False).plan),
    ):
        one, two, three = small.layers
        assert one.v.get_metadata()["out_sharding"] == (None, None, "data")
        assert one.u.get_metadata()["out_sharding"] == (None, None, "model")
        assert one.bias.get_metadata()["out_sharding"] == ("model",)
        assert one.v.get_metadata()["note"] == "kept"
        assert "out_sharding" not in one.widths.get_metadata()
        assert two.linear.v.get_metadata()["out_sharding"] == (None, None, "data")
        assert two.linear.u.get_metadata()["out_sharding"] == (None, None, "model")
        assert three.linear.u.get_metadata()["out_sharding"] == (None, None, None)
        sharding = one.u.get_value().sharding
        assert isinstance(sharding, NamedSharding)
        assert sharding.spec == PartitionSpec(None, None, "model")
        assert one.widths.get_value().sharding.is_fully_replicated


def test_output_shardings_are_passed_on():
    types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((1,), ("model",), axis_types=types)
    layer = low_rank(general(WIDTH, (4, 4))).model
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, WIDTH)), PartitionSpec())
        y = jax.jit(lambda x: layer(x, out_sharding=PartitionSpec(None, "model", None)))(x)
    assert y.shape == (2, 4, 4)
    assert y.sharding.spec == PartitionSpec(None, "model", None)


def test_places_of_compressed_blocks_have_smoothed_derivatives():
    layer = gaudi_jax.compress(linear(), 0.5, progress=False).model
    x = jax.random.normal(jax.random.key(1), (3, WIDTH))

    def slope(smoothing):
        values = (layer.v[...], layer.u[...], layer.widths[...], layer.locations[...])
        same = GaudiLinear.from_blocks(*values, bias=jnp.zeros(WIDTH), backward_smoothing=smoothing)
        return gradient(same)

    def gradient(model):
        return nnx.grad(lambda model: (model(x) ** 2).sum())(model).widths[...]

    np.testing.assert_allclose(gradient(layer), slope(2.0), rtol=1e-4, atol=1e-4)
    assert not np.allclose(slope(2.0), slope(0.0), rtol=1e-2, atol=1e-2)
