"""From structured layers back to dense ones."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.compression.surgery import become
from gaudi_jax.layers import GeneralLinear, StructuredLinear


def densify(model: nnx.Module) -> nnx.Module:
    """A model in which every structured layer is the dense one with the same kernel.

    Args:
        model: any NNX module; it is left as it is. Its other layers are shared with the result.

    Returns:
        A clone with `nnx.Linear` in place of structured layers, and `nnx.LinearGeneral` in place of
        `gaudi_jax.layers.GeneralLinear`.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax import LowRankLinear
        >>> from gaudi_jax.compression import densify
        >>> model = nnx.Sequential(LowRankLinear(4, 6, rank=2, rngs=nnx.Rngs(0)))
        >>> densify(model).layers[0].kernel.shape
        (4, 6)
    """
    model = nnx.clone(model)
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, StructuredLinear)]
    general = [node for _, node in nnx.iter_graph(model) if isinstance(node, GeneralLinear)]
    inner = {id(node.linear) for node in general}
    for node in general:
        become(node, _dense(node.linear, node))
    for layer in layers:
        if id(layer) not in inner:
            become(layer, _dense(layer))
    return model


def _dense(layer: StructuredLinear, general: GeneralLinear | None = None) -> nnx.Module:
    """A dense layer with the kernel and bias of a structured one; `general` holds that one."""
    cls: Any = nnx.Linear if general is None else nnx.LinearGeneral
    options = {} if general is None else {"axis": general.axis}
    like = layer if general is None else general
    dense = nnx.eval_shape(
        lambda: cls(
            like.in_features,
            like.out_features,
            use_bias=layer.bias is not None,
            dtype=layer.dtype,
            param_dtype=layer.param_dtype,
            rngs=nnx.Rngs(0),
            **options,
        )
    )
    kernel = _kernel(*nnx.split(layer))
    dense.kernel.set_value(kernel.reshape(dense.kernel.shape).astype(layer.param_dtype))
    if layer.bias is not None:
        dense.bias.set_value(layer.bias.get_value().reshape(dense.bias.shape))
    return dense


@partial(jax.jit, static_argnums=0)  # one program a layer, instead of one an operation
def _kernel(graphdef: nnx.GraphDef, state: nnx.State) -> Float[Array, "in out"]:
    return nnx.merge(graphdef, state).kernel()
