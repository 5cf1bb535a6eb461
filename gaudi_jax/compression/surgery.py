"""Finding the dense layers of a model, and putting structured ones in their places."""

import inspect
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from gaudi_jax.layers import GaudiLinear, GeneralLinear, LowRankLinear, StructuredLinear
from gaudi_jax.layers.factory import GRID_LAYERS

#: Only these very classes: a subclass may do anything with its kernel.
DENSE = (nnx.Linear, nnx.LinearGeneral)
#: What is looked at; other modules that hold parameters are no linear layers.
_LINEAR = (*DENSE, nnx.Einsum, nnx.Conv, nnx.ConvTranspose, StructuredLinear)
#: Options of a dense layer that structured layers do not have.
_OPTIONS = (
    "dot_general",
    "dot_general_cls",
    "promote_dtype",
    "preferred_element_type",
    "precision",
)
#: They overwrite the kernel of the layer that they hold.
_WRAPPERS = (nnx.WeightNorm, nnx.SpectralNorm)
#: Metadata that every Variable has by itself.
_OWN_METADATA = ("hijax", "ref", "eager_sharding")


def find_dense(model: nnx.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """The dense layers that a structured one can replace, and the linear layers that it cannot.

    Args:
        model: any NNX module, also one of shapes without values.

    Returns:
        Layers by path, and reasons by path. A layer that is reached by several paths is listed
        under the first.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax.compression.surgery import find_dense
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.Conv(4, 4, 3, rngs=rngs))
        >>> dense, left = find_dense(model)
        >>> list(dense), left
        (['layers/0'], {'layers/1': 'a Conv is not replaced'})
    """
    nodes = list(nnx.iter_graph(model))
    found = {_name(path): node for path, node in nodes if isinstance(node, _LINEAR)}
    shared = _shared_variables(model, found)
    wrapped = {
        id(inner)
        for _, node in nodes
        if isinstance(node, _WRAPPERS)
        for _, inner in nnx.iter_graph(node)
    }
    reasons = {
        path: "its kernel is overwritten by the module that holds it"
        if id(module) in wrapped
        else _reason_to_leave(module, shared)
        for path, module in found.items()
    }
    dense = {path: module for path, module in found.items() if reasons[path] is None}
    return dense, {path: reason for path, reason in reasons.items() if reason is not None}


def find_gaudi(model: nnx.Module) -> tuple[dict[str, GaudiLinear], dict[str, str]]:
    """The Gaudi layers that can be packed by path, and reasons why others cannot.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> from gaudi_jax.compression.surgery import find_gaudi
        >>> model = nnx.Sequential(GaudiLinear(4, 4, rngs=nnx.Rngs(0)))
        >>> list(find_gaudi(model)[0])
        ['layers/0']
    """
    found = {
        _name(path): node for path, node in nnx.iter_graph(model) if isinstance(node, GaudiLinear)
    }
    left = {
        path: "it is stacked" if type(layer) is GaudiLinear else "a subclass may do anything"
        for path, layer in found.items()
        if layer.v.ndim != 3 or type(layer) is not GaudiLinear
    }
    return {path: layer for path, layer in found.items() if path not in left}, left


def features(module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the input's and of the output's axes that a dense layer maps."""
    if isinstance(module, nnx.LinearGeneral):
        return tuple(module.in_features), tuple(module.out_features)
    return (module.in_features,), (module.out_features,)


def matrix_shape(module: Any) -> tuple[int, int]:
    """(in, out) of a dense layer as a matrix."""
    n_in, n_out = features(module)
    return math.prod(n_in), math.prod(n_out)


def structure(module: Any, entry: Mapping[str, Any]) -> StructuredLinear:
    """The layer without values that takes a dense layer's place.

    Args:
        module: the dense layer, whose dtypes and sharding metadata it gets.
        entry: its entry in a plan.
    """
    options: dict[str, Any] = {
        "rank": entry["rank"],
        "use_bias": module.bias is not None,
        "dtype": module.dtype,
        "param_dtype": module.kernel.dtype,
    }
    cls: Any = LowRankLinear
    if entry["method"] == "gaudi":
        cls = GaudiLinear
        options |= {
            "num_blocks": entry["num_blocks"],
            "granularity": tuple(entry["granularity"]),
            # Where places are trained on, their derivatives are smoothed as from scratch.
            "backward_smoothing": 2.0,
        }
    elif entry["method"] in GRID_LAYERS:
        cls = GRID_LAYERS[entry["method"]]
        options["blocks"] = entry["num_blocks"]
        if "diagonals" in entry:
            options["diagonals"] = entry["diagonals"]
    shape = matrix_shape(module)
    layer = nnx.eval_shape(lambda: cls(*shape, rngs=nnx.Rngs(0), **options))
    for name, source in _sources(module, layer).items():
        variable = getattr(layer, name)
        metadata = {k: v for k, v in source.get_metadata().items() if k not in _OWN_METADATA}
        if metadata.get("out_sharding"):
            metadata["out_sharding"] = _spec(name, variable, module, metadata["out_sharding"])
        variable.set_metadata(variable.get_metadata() | metadata)
    return layer


def fill(layer: StructuredLinear, values: Mapping[str, Array], module: Any) -> None:
    """Sets the values of a layer without any, on the devices of a dense one.

    Args:
        layer: what `structure` gave.
        values: by name of the attribute.
        module: the dense layer. If its values are shapes only, so are those of the new layer.
    """
    kernel = module.kernel.get_value()
    for name, value in values.items():
        variable = getattr(layer, name)
        sharding = getattr(kernel, "sharding", None)
        if isinstance(sharding, NamedSharding):
            spec: tuple[Any, ...] = ()
            if (source := _sources(module, layer).get(name)) is not None:
                there = getattr(source.get_value().sharding, "spec", ())
                spec = _spec(name, variable, module, there)
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
        if isinstance(kernel, jax.ShapeDtypeStruct):
            abstract = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=sharding)
            variable.set_value(abstract)
        else:
            variable.set_value(jax.device_put(jnp.asarray(value, variable.dtype), sharding))


def install(layer: StructuredLinear, module: Any) -> None:
    """Makes a dense layer the structured one, wherever in the model it is held."""
    new: nnx.Module = layer
    if isinstance(module, nnx.LinearGeneral):
        new = GeneralLinear(layer, *features(module), module.axis)
    become(module, new)


def become(module: nnx.Module, new: nnx.Module) -> None:
    """Turns a module into another one, wherever in the model it is held.

    The object keeps its identity, so that every holder of it sees the new layer: attributes, lists,
    tuples, cycles. Replacing it path by path would need all of its paths.
    """
    object.__setattr__(module, "__class__", type(new))
    vars(module).clear()
    vars(module).update(vars(new))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _shared_variables(model: nnx.Module, found: Mapping[str, Any]) -> set[int]:
    """Ids of the dense layers' Variables that some other module holds too."""
    own = [
        variable
        for module in found.values()
        if type(module) in DENSE
        for variable in (module.kernel, module.bias)
        if isinstance(variable, nnx.Variable)
    ]
    # What is still there once the layers have lost their Variables belongs to others.
    rest = nnx.clone(model, variables=False)
    for _, module in list(nnx.iter_graph(rest)):
        if type(module) in DENSE:
            module.kernel = module.bias = nnx.data(None)
    elsewhere = {id(node) for _, node in nnx.iter_graph(rest) if isinstance(node, nnx.Variable)}
    twice = {key for key, count in Counter(map(id, own)).items() if count > 1}
    return twice | {id(variable) for variable in own if id(variable) in elsewhere}


def _reason_to_leave(module: Any, shared: set[int]) -> str | None:
    cls = type(module)
    if isinstance(module, StructuredLinear):
        return f"a {cls.__name__} has a structure already"
    if cls not in DENSE:
        base = next((dense.__name__ for dense in DENSE if isinstance(module, dense)), None)
        return f"a {cls.__name__} is not replaced" + (f", only {base} itself" if base else "")
    if getattr(module, "batch_axis", None):
        return "it has batch axes"
    if type(module.kernel) is not nnx.Param:
        return f"its kernel is a {type(module.kernel).__name__}, not a Param"
    if id(module.kernel) in shared:
        return "its kernel belongs to another module as well"
    if module.bias is not None and id(module.bias) in shared:
        return "its bias belongs to another module as well"
    n_in, n_out = features(module)
    if module.kernel.shape != (*n_in, *n_out):
        return f"its kernel of shape {module.kernel.shape} is stacked"
    if not jnp.issubdtype(module.kernel.dtype, jnp.floating):
        return f"its kernel is of dtype {module.kernel.dtype}"
    defaults = inspect.signature(cls.__init__).parameters
    for name in _OPTIONS:
        if getattr(module, name, None) not in (None, getattr(defaults.get(name), "default", None)):
            return f"its {name} is not the default"
    return None


def _sources(module: Any, layer: StructuredLinear) -> dict[str, nnx.Variable]:
    """The dense layer's Variable that each parameter of the structured one stands for.

    Factors of parts of an axis stand for none of them.
    """
    whole = {"v": layer.in_features, "u": layer.out_features}
    sources = {
        name: module.kernel
        for name, features in whole.items()
        if getattr(layer, name).shape[-1] == features
    }
    return sources if module.bias is None else sources | {"bias": module.bias}


def _spec(name: str, variable: nnx.Variable, module: Any, spec: Any) -> tuple[Any, ...]:
    """What a dense layer's partitioning of its kernel or bias means for a parameter.

    Several feature axes become one, which is partitioned like the first if only that one is.
    """
    n_in, n_out = features(module)
    axes = n_out if name == "bias" else (*n_in, *n_out)
    padded = (*spec, *[None] * (len(axes) - len(spec)))
    group = padded[: len(n_in)] if name == "v" else padded[len(axes) - len(n_out) :]
    kept = group[0] if all(part is None for part in group[1:]) else None
    return (*[None] * (variable.ndim - 1), kept)
