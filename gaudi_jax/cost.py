"""Multiplications, parameters and bytes of any NNX model, layer by layer.

Only multiplications of inner products are counted, each together with its addition: biases and
elementwise work are not. Everything derives from shapes and widths.
"""

import dataclasses
import functools
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend import core
from tabulate import SEPARATING_LINE, tabulate

from gaudi_jax.errors import UserError
from gaudi_jax.layers.base import StructuredLinear

#: Counter key of the inner products outside the counted layers.
_OTHER = "other products"
#: Attribute that tells a marked layer its number.
_MARKER = "_cost_marker"


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Cost of one layer, or of one thing that is listed apart.

    Attributes:
        path: place in the model, such as "blocks/0/attention/query"; "" is the model itself.
        kind: class of the layer; "tied head" for `nnx.Embed.attend`, "other products" for inner
            products outside the layers (those of attention, for instance).
        shape: (in, out) of the layer as a matrix. For a Conv, in is the size of the window times
            the channels of a group; for a LinearGeneral, in is the product of the contracted axes.
            Empty for "other products".
        applications: input vectors (for a Conv: output positions) that the layer is applied to.
        multiplications: of all applications.
        dense_multiplications: of all applications of the dense form, which has in·out each.
        relative: multiplications over dense multiplications of one application.
        parameters: elements of the layer's `nnx.Param` variables.
        bytes: of these parameters.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    applications: int
    multiplications: int
    dense_multiplications: int
    relative: float
    parameters: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of a model, as `cost` counts it; ``str()`` of it is an aligned table.

    Attributes:
        layers: one entry for each linear layer.
        others: embeddings, tied heads and other inner products, which are listed apart.
        parameters: elements of all `nnx.Param` variables of the model, shared ones once.
        bytes: of these parameters.
    """

    layers: tuple[LayerCost, ...]
    others: tuple[LayerCost, ...]
    parameters: int
    bytes: int

    @property
    def multiplications(self) -> int:
        """Multiplications of the layers."""
        return sum(row.multiplications for row in self.layers)

    @property
    def dense_multiplications(self) -> int:
        """Multiplications of the layers' dense forms."""
        return sum(row.dense_multiplications for row in self.layers)

    @property
    def relative(self) -> float:
        """Multiplications of the layers over those of their dense forms; 1 without layers."""
        return _ratio(self.multiplications, self.dense_multiplications)

    @property
    def total_multiplications(self) -> int:
        """Multiplications of the layers and of what is listed apart."""
        return self.multiplications + sum(row.multiplications for row in self.others)

    @property
    def total_dense_multiplications(self) -> int:
        """`total_multiplications`, had every layer its dense form."""
        return self.dense_multiplications + sum(row.dense_multiplications for row in self.others)

    @property
    def total_relative(self) -> float:
        """All multiplications over those of the model with dense layers."""
        return _ratio(self.total_multiplications, self.total_dense_multiplications)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and dicts, ready for `json.dumps`."""
        totals = "multiplications", "dense_multiplications", "relative"
        names = (*totals, *(f"total_{name}" for name in totals), "parameters", "bytes")
        rows = {"layers": self.layers, "others": self.others}
        return {name: getattr(self, name) for name in names} | {
            name: [dataclasses.asdict(row) | {"shape": list(row.shape)} for row in group]
            for name, group in rows.items()
        }

    def __str__(self) -> str:
        body: list[Any] = [_cells(row) for row in self.layers]
        body += [SEPARATING_LINE, _total("layers", self.multiplications, self.relative)]
        if self.others:
            body += [SEPARATING_LINE, *(_cells(row) for row in self.others), SEPARATING_LINE]
            body += [_total("all", self.total_multiplications, self.total_relative)]
        table = tabulate(
            body,
            headers=["layer", "kind", "in→out", "applied", "multiplications", "relative"],
            colalign=("left", "left", "right", "right", "right", "right"),
            disable_numparse=True,
        )
        return f"{table}\n{self.parameters:,} parameters, {self.bytes:,} bytes"


def cost(model: nnx.Module, *example_inputs: Any) -> Cost:
    """Counts a model's multiplications, parameters and bytes.

    The layers are every `nnx.Linear`, `nnx.LinearGeneral`, `nnx.Conv` and structured layer, however
    nested; a shared one is listed once, under its first path. A layer with stacked parameters (made
    by `nnx.vmap` or `nnx.scan`) is one entry; a structured one costs the mean over the stack.

    Without example inputs each layer is applied once, to one vector (a stacked one, once for each
    of the stack). Products outside the layers are then unknown: `total_relative` is `relative`.

    With example inputs the model's evaluation mode is traced on them, without computing anything,
    and the totals are the multiplications of one forward pass. Of a `cond` the most expensive
    branch counts; the bodies of while loops, of kernels and of `shard_map` count once.

    Args:
        model: any NNX module; it is left as it was.
        *example_inputs: positional arguments of the model's call: arrays, or
            `jax.ShapeDtypeStruct`s in their place.

    Raises:
        UserError: the model is no NNX module, cannot be called with these inputs, or has a
            structured layer without values.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from gaudi_jax import LowRankLinear
        >>> from gaudi_jax.cost import cost
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(
        ...     LowRankLinear(64, 128, rank=8, rngs=rngs), nnx.Linear(128, 10, rngs=rngs))
        >>> result = cost(model, jax.ShapeDtypeStruct((5, 64), "float32"))
        >>> result.multiplications, result.dense_multiplications, round(result.relative, 3)
        (14080, 47360, 0.297)
        >>> print(result)
        layer     kind             in→out    applied    multiplications    relative
        --------  -------------  --------  ---------  -----------------  ----------
        layers/0  LowRankLinear    64→128          5              7,680       0.188
        layers/1  Linear           128→10          5              6,400       1.000
        --------  -------------  --------  ---------  -----------------  ----------
        layers                                                   14,080       0.297
        2,954 parameters, 11,816 bytes
    """
    if not isinstance(model, nnx.Module):
        raise UserError(f"cost needs an NNX module, not {type(model).__name__!r}; pass the model")
    model = nnx.clone(model)
    model.eval()
    units = {}
    for number, (path, module) in enumerate(_counted_modules(model)):
        marker = f"gaudi_jax.cost[{number}]"
        units.update(_units(marker, path, module))
        # Done on the clone: the layer keeps its attributes and stays an instance of its class.
        setattr(module, _MARKER, marker)
        object.__setattr__(module, "__class__", _marked_class(type(module)))
    if example_inputs:
        counts = _count(_trace(model, example_inputs), units)
    else:
        counts = Counter({marker: unit.stack for marker, unit in units.items()})
    rows = [(unit, unit.row(counts[marker])) for marker, unit in units.items()]
    others = [row for unit, row in rows if unit.apart and row.applications]
    if products := counts[_OTHER]:
        others.append(LayerCost("", _OTHER, (), 1, products, products, 1.0, 0, 0))
    return Cost(
        tuple(row for unit, row in rows if not unit.apart), tuple(others), *_parameters(model)
    )


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What one application of a layer costs; `price` is the mean where parameters are stacked."""

    path: str
    kind: str
    shape: tuple[int, int]
    price: float
    dense: int
    stack: int
    parameters: int
    bytes: int
    apart: bool = False
    structured: bool = False

    def row(self, applications: int) -> LayerCost:
        multiplications, dense = round(applications * self.price), applications * self.dense
        totals = (applications, multiplications, dense, _ratio(self.price, self.dense))
        return LayerCost(self.path, self.kind, self.shape, *totals, self.parameters, self.bytes)


def _counted_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """The layers to count, outermost only: what a structured layer holds is part of its cost."""
    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.Embed, StructuredLinear)
    found = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, kinds)]
    paths = {path for path, _ in found}
    for path, module in found:
        if not any(path[:length] in paths for length in range(len(path))):
            yield "/".join(map(str, path)), module


def _units(marker: str, path: str, module: Any) -> dict[str, _Unit]:
    """Prices of a layer's marked methods, by the names that they will have in the trace."""
    name = f"{marker}.__call__"
    kind = type(module).__name__
    parameters, size = _parameters(module)
    if isinstance(module, nnx.Embed):
        shape = (module.num_embeddings, module.features)
        products = math.prod(shape)
        return {
            name: _Unit(path, kind, shape, 0, 0, 1, parameters, size, apart=True),
            # The head has no parameters of its own, and is unknown before the model is traced.
            f"{marker}.attend": _Unit(
                path, "tied head", shape[::-1], products, products, 0, 0, 0, apart=True
            ),
        }
    shape = _matrix_shape(module)
    dense = math.prod(shape)
    structured = isinstance(module, StructuredLinear)
    if structured:
        price, stack = _structured_price(path, module)
    else:
        price, stack = dense, math.prod(module.kernel.shape) // dense
    unit = _Unit(path, kind, shape, price, dense, stack, parameters, size, structured=structured)
    return {name: unit}


def _matrix_shape(module: Any) -> tuple[int, int]:
    """(in, out) of a layer as a matrix, stacks and LinearGeneral's batch axes apart."""
    if isinstance(module, nnx.LinearGeneral):
        return math.prod(module.in_features), math.prod(module.out_features)
    if isinstance(module, nnx.Conv):
        window = math.prod(module.kernel_size) * module.in_features // module.feature_group_count
        return window, module.out_features
    return module.in_features, module.out_features


def _structured_price(path: str, module: StructuredLinear) -> tuple[float, int]:
    """Mean multiplications of one application, and how many layers are stacked in the module."""
    graphdef, state = nnx.split(module)
    kernel: Callable = lambda state: nnx.merge(graphdef, state).kernel()  # noqa: E731
    price: Callable = lambda state: nnx.merge(graphdef, state).multiplications()  # noqa: E731
    # Nothing tells how deep the parameters are stacked but a kernel of the right shape.
    for depth in range(3):
        try:
            shape = jax.eval_shape(kernel, state).shape
        except Exception:  # Any error of shapes says: stacked more deeply.
            shape = ()
        if shape[depth:] == (module.in_features, module.out_features):
            try:
                return float(np.mean(price(state))), math.prod(shape[:depth])
            except TypeError as error:
                raise UserError(
                    f"layer {path!r} holds shapes without values, and its multiplications depend "
                    "on them; give it values first"
                ) from error
        kernel, price = jax.vmap(kernel), jax.vmap(price)
    raise UserError(
        f"layer {path!r} of kind {type(module).__name__} has parameters that give no kernel of "
        f"shape ({module.in_features}, {module.out_features}), nor a stack of them"
    )


@functools.cache
def _marked_class(cls: type) -> type:
    """A subclass whose calls run through jits that carry the layer's marker as their name."""

    def marked(method: str) -> Callable:
        original = getattr(cls, method)

        @functools.wraps(original)
        def call(self, *args, **kwargs):
            def region():
                return original(self, *args, **kwargs)

            region.__name__ = f"{getattr(self, _MARKER)}.{method}"
            return jax.jit(region)()

        return call

    methods = ("__call__", "attend") if issubclass(cls, nnx.Embed) else ("__call__",)
    body = {method: marked(method) for method in methods}
    # NNX makes a subclass a pytree unless told otherwise, whatever its base is.
    options = {} if getattr(cls, "_pytree__is_pytree", True) else {"pytree": False}
    return types.new_class(cls.__name__, (cls,), options, lambda namespace: namespace.update(body))


def _trace(model: nnx.Module, inputs: tuple[Any, ...]) -> core.Jaxpr:
    """The jaxpr of the model's call."""
    graphdef, state = nnx.split(model)

    def call(state, *inputs):
        nnx.merge(graphdef, state)(*inputs)

    try:
        return jax.make_jaxpr(call)(state, *inputs).jaxpr
    except Exception as error:  # A model's own code may raise anything.
        shapes = ", ".join(str(getattr(leaf, "shape", leaf)) for leaf in jax.tree.leaves(inputs))
        raise UserError(
            f"cost cannot trace {type(model).__name__} on inputs of shape {shapes}: {error}"
        ) from error


def _count(jaxpr: core.Jaxpr, units: dict[str, _Unit]) -> Counter[str]:
    """Applications of each unit, and multiplications of all products outside them."""
    counts: Counter[str] = Counter()
    equation: Any  # Typed by JAX with abstract values that may lack a shape.
    for equation in jaxpr.eqns:
        primitive, params = equation.primitive.name, equation.params
        inner = [_count(inner, units) for inner in core.jaxprs_in_params(params)]
        if primitive == "jit" and params["name"] in units:
            unit = units[name := params["name"]]
            applications = equation.outvars[0].aval.size // unit.shape[1]
            counts[name] += applications
            if not unit.structured:
                # A subclass of a dense layer, such as nnx.LoRALinear, may do more than its base.
                surplus = sum(count[_OTHER] for count in inner) - applications * unit.dense
                counts[_OTHER] += max(0, surplus)
        elif primitive in _PRODUCTS:
            counts[_OTHER] += _PRODUCTS[primitive](equation)
        elif primitive == "cond":
            counts.update(max(inner, key=lambda count: _multiplications(count, units)))
        else:
            repeats = params["length"] if primitive == "scan" else 1
            for count in inner:
                counts.update({key: repeats * number for key, number in count.items()})
    return counts


def _multiplications(counts: Mapping[str, int], units: dict[str, _Unit]) -> float:
    return sum(n * (1 if key == _OTHER else units[key].price) for key, n in counts.items())


def _dot_general(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return equation.outvars[0].aval.size * math.prod(lhs[axis] for axis in contracted)


def _conv_general_dilated(equation: Any) -> int:
    """Window times channels for each output; zeros that input dilation inserts are not counted."""
    rhs = equation.invars[1].aval.shape
    _, *window = equation.params["dimension_numbers"].rhs_spec
    products = equation.outvars[0].aval.size * math.prod(rhs[axis] for axis in window)
    return products // math.prod(equation.params["lhs_dilation"])


_PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _conv_general_dilated}


def _parameters(module: nnx.Module) -> tuple[int, int]:
    """Elements and bytes of a module's parameters, shared ones once."""
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    return sum(x.size for x in leaves), sum(x.size * x.dtype.itemsize for x in leaves)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 1.0


def _cells(row: LayerCost) -> list[str]:
    shape = "→".join(map(str, row.shape))
    relative = f"{row.relative:.3f}" if row.dense_multiplications else "–"
    applied = f"{row.applications:,}" if row.shape else ""
    path = row.path or ("(model)" if row.shape else "")
    return [path, row.kind, shape, applied, f"{row.multiplications:,}", relative]


def _total(name: str, multiplications: int, relative: float) -> list[str]:
    return [name, "", "", "", f"{multiplications:,}", f"{relative:.3f}"]
