"""Hardening: trained Gaudi layers become packed ones, which hold nothing but their blocks."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gaudi_jax.compression.compress import Compressed
from gaudi_jax.compression.plan import make_plan
from gaudi_jax.compression.surgery import become, find_gaudi
from gaudi_jax.cost import cost
from gaudi_jax.deploy.autotune import CACHE_DIR, fastest
from gaudi_jax.deploy.machine import MACHINES
from gaudi_jax.deploy.pack import pack
from gaudi_jax.errors import UserError
from gaudi_jax.layers import PackedLinear
from gaudi_jax.layers.base import is_whole
from gaudi_jax.training.step import set_sigma


def harden(
    model: nnx.Module,
    *,
    tokens: int | Mapping[str, int] = 1024,
    backend: str | None = None,
    autotune: bool = False,
    cache_dir: str | Path = CACHE_DIR,
) -> Compressed:
    """Packs the Gaudi layers of a trained model: it computes the same, faster.

    The result computes what the model computes in evaluation with exact boxcars (sigma = inf).
    Masks and dead blocks are gone; which matrix products are made, and whether blocks are used at
    all, is decided for each layer by what they cost on the machine (`gaudi_jax.deploy.layout`).

    Args:
        model: any NNX module that holds `GaudiLinear`s, or one of them; it is left as it was.
            Stacked layers and subclasses stay what they are; the plan names them.
        tokens: input vectors that the layers will get at once, such as batch times sequence; or
            those of each layer by its path (`tokens_of`), where they differ.
        backend: "cpu", "gpu" or "tpu"; None for the one in use.
        autotune: measure some layouts of each layer on this machine, and take the fastest. What was
            measured is kept in cache_dir.
        cache_dir: see there.

    Returns:
        The packed model in evaluation mode, and its plan, as `gaudi_jax.compress` returns them.

    Raises:
        UserError: the model holds no Gaudi layer that can be packed, or no values; an option is out
            of range; the backend is not the one in use, and cannot be measured.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import gaudi_jax
        >>> layer = gaudi_jax.GaudiLinear(16, 16, rngs=nnx.Rngs(0))
        >>> packed, plan = gaudi_jax.harden(layer)
        >>> x = jnp.ones((2, 16))
        >>> type(packed).__name__, bool(jnp.allclose(packed(x), layer(x), atol=1e-5))
        ('PackedLinear', True)
    """
    backend = backend or jax.default_backend()
    if backend not in MACHINES:
        raise UserError(f"unknown backend {backend!r}; use {', '.join(MACHINES)}")
    if autotune and backend != jax.default_backend():
        raise UserError(
            f"backend={backend!r} cannot be measured on {jax.default_backend()!r}; leave out "
            "autotune, or run there"
        )
    for number in tokens.values() if isinstance(tokens, Mapping) else [tokens]:
        if not is_whole(number) or number < 1:
            raise UserError(f"tokens={number!r} must be a whole number, at least 1")
    result = nnx.clone(model)
    layers, left = find_gaudi(result)
    if not layers:
        raise UserError(
            f"the model ({type(model).__name__}) holds no GaudiLinear that can be packed; train "
            "one, or compress a dense model first"
        )
    for path, layer in layers.items():
        value = layer.v.get_value()
        if isinstance(value, jax.core.Tracer) or not isinstance(value, jax.Array):
            raise UserError(f"layer {path!r} has no values; give a trained model, outside jax.jit")
    vectors = {path: _of_layer(tokens, path) for path in layers}
    set_sigma(result, math.inf)  # for layers that are left
    entries = {}
    for path, layer in layers.items():
        if autotune:
            packed = fastest(layer, MACHINES[backend], vectors[path], cache_dir)
        else:
            packed = pack(layer, MACHINES[backend], vectors[path])
        entries[path] = _entry(packed)
        become(layer, packed)
    result.eval()
    return Compressed(nnx.clone(result, arrays=True), make_plan(entries, left))


def tokens_of(model: nnx.Module, example: jax.ShapeDtypeStruct, batch: int) -> dict[str, int]:
    """Input vectors that each layer of a model gets from a batch, by its path.

    Args:
        model: the model.
        example: one of its inputs, with a batch axis of length 1.
        batch: inputs at once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax.deploy.harden import tokens_of
        >>> model = nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
        >>> tokens_of(model, jax.ShapeDtypeStruct((1, 10, 4), jnp.float32), 8)
        {'layers/0': 80}
    """
    rows = cost(model, example).layers
    # A layer that this input does not reach may be used some other way, one vector at a time.
    return {row.path: batch * max(row.applications, 1) for row in rows}


def _of_layer(tokens: int | Mapping[str, int], path: str) -> int:
    if not isinstance(tokens, Mapping):
        return int(tokens)
    if path not in tokens:
        raise UserError(f"tokens has no number for layer {path!r}; give one, or one number for all")
    return int(tokens[path])


def _entry(packed: PackedLinear) -> dict[str, Any]:
    n, m = packed.in_features, packed.out_features
    return {
        "method": "packed",
        "in_features": n,
        "out_features": m,
        "rank": None,
        "num_blocks": None,
        "granularity": None,
        "use_bias": packed.use_bias,
        "error": 0.0,
        "activation_error": None,
        "multiplications": int(packed.multiplications()),
        "dense_multiplications": n * m,
        "param_dtype": jnp.dtype(packed.param_dtype).name,
        "layout": None if packed.layout is None else packed.layout.to_lists(),
    }
