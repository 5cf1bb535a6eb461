"""Hardening: trained Gaudi layers become packed ones, which hold nothing but their blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from gaudi_jax.compression.compress import Compressed
from gaudi_jax.compression.plan import make_plan
from gaudi_jax.compression.surgery import become, find_gaudi
from gaudi_jax.deploy.layout import Windows, compile_layout
from gaudi_jax.deploy.machine import MACHINES, Machine
from gaudi_jax.errors import UserError
from gaudi_jax.layers import GaudiLinear, PackedLinear
from gaudi_jax.masks import hard_mask, intervals


def harden(model: nnx.Module, *, tokens: int = 1024, backend: str | None = None) -> Compressed:
    """Packs every Gaudi layer of a trained model: it computes the same, faster.

    The result computes what the model computes in evaluation with exact boxcars (sigma = inf).
    Masks and dead blocks are gone; which matrix products are made, and whether blocks are used at
    all, is decided for each layer by what they cost on the machine (`gaudi_jax.deploy.layout`).

    Args:
        model: any NNX module that holds `GaudiLinear`s, or one of them; it is left as it was.
        tokens: input vectors that the layers will get at once, such as batch times sequence.
        backend: "cpu", "gpu" or "tpu"; None for the one in use.

    Returns:
        The packed model in evaluation mode, and its plan, as `gaudi_jax.compress` returns them.

    Raises:
        UserError: the model holds no Gaudi layer, or only stacked ones.

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
    if tokens < 1:
        raise UserError(f"tokens={tokens} must be at least 1")
    result = nnx.clone(model)
    layers, left = find_gaudi(result)
    if not layers:
        raise UserError(
            f"the model ({type(model).__name__}) holds no GaudiLinear that can be packed; train "
            "one, or compress a dense model first"
        )
    entries = {}
    for path, layer in layers.items():
        packed = pack(layer, MACHINES[backend], tokens)
        entries[path] = _entry(packed)
        become(layer, packed)
    result.eval()
    return Compressed(nnx.clone(result, arrays=True), make_plan(entries, left))


def pack(layer: GaudiLinear, machine: Machine, tokens: int) -> PackedLinear:
    """The packed form of one layer on a machine, for a number of input vectors at once."""
    places = [_places(layer, axis) for axis in (0, 1)]
    live = np.flatnonzero((places[0][1] > 0) & (places[1][1] > 0))
    reads, writes = (
        Windows(np.repeat(start[live], layer.rank), np.repeat(length[live], layer.rank), size)
        for (start, length), size in zip(
            places, (layer.in_features, layer.out_features), strict=True
        )
    )
    itemsize = jnp.dtype(layer.dtype or layer.param_dtype).itemsize
    compiled = compile_layout(reads, writes, machine, tokens, itemsize)
    packed = PackedLinear(
        layer.in_features,
        layer.out_features,
        compiled.layout,
        use_bias=layer.use_bias,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
    )
    columns = (live[:, None] * layer.rank + np.arange(layer.rank)).ravel()[compiled.order]
    packed.fill(_columns(layer, 0)[columns], _columns(layer, 1)[columns])
    if packed.bias is not None and layer.bias is not None:
        packed.bias.set_value(layer.bias[...])
    return packed


def _places(layer: GaudiLinear, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the blocks' intervals in features."""
    size = (layer.in_features, layer.out_features)[axis]
    places = intervals(
        layer.widths[axis], layer.locations[axis], size, granularity=layer.granularity[axis]
    )
    return np.asarray(places[0]), np.asarray(places[1])


def _columns(layer: GaudiLinear, axis: int) -> Array:
    """The blocks' columns on an axis, zero outside the exact boxcars."""
    factor = (layer.v, layer.u)[axis][...]
    size = factor.shape[-1]
    mask = hard_mask(
        layer.widths[axis], layer.locations[axis], size, granularity=layer.granularity[axis]
    )
    return (factor * mask[:, None].astype(factor.dtype)).reshape(-1, size)


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
        "layout": None if packed.layout is None else packed.layout.to_lists(),
    }
