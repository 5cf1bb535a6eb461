"""Plans: what became of each layer, as plain values that JSON holds."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tabulate import SEPARATING_LINE, tabulate

from gaudi_jax.compression.surgery import (
    become,
    features,
    fill,
    find_dense,
    find_gaudi,
    install,
    structure,
)
from gaudi_jax.errors import UserError
from gaudi_jax.layers import PackedLinear, Sigma
from gaudi_jax.layers.cells import Cells
from gaudi_jax.layers.factory import GRID_LAYERS
from gaudi_jax.layers.packed import Layout
from gaudi_jax.layers.tiles import Tiles

#: Version of the format; raised when its meaning changes.
FORMAT = 1

Plan = dict[str, Any]

PLAN_KEYS = ("layers", "left", "multiplications", "dense_multiplications")
METHODS = ("gaudi", "low_rank", *GRID_LAYERS, "packed")
ENTRY_KEYS = (
    *("method", "in_features", "out_features", "rank", "num_blocks", "granularity", "use_bias"),
    *("error", "activation_error", "multiplications", "dense_multiplications"),
)


def make_plan(layers: Mapping[str, Mapping[str, Any]], left: Mapping[str, str]) -> Plan:
    """A plan of its layers' entries, with totals.

    Args:
        layers: by path: method (one of `METHODS`), in_features and out_features (a
            number, or the sizes of several axes), rank, num_blocks, granularity (a pair),
            use_bias, error and activation_error (relative; the latter None without calibration),
            multiplications and dense_multiplications of one input vector. num_blocks and
            granularity are None for "low_rank". For "monarch", "blast" and "block_sparse",
            num_blocks is the parts of each axis, and granularity None; the last has diagonals too.
            A "packed" layer has none of them, nor a rank, but a layout.
        left: reasons by path.
    """
    return {
        "format": FORMAT,
        "layers": {path: dict(entry) for path, entry in layers.items()},
        "left": dict(left),
        "multiplications": sum(entry["multiplications"] for entry in layers.values()),
        "dense_multiplications": sum(entry["dense_multiplications"] for entry in layers.values()),
    }


def rebuild(model: nnx.Module, plan: Mapping[str, Any]) -> nnx.Module:
    """The structure that `compress` or `harden` gave a model, without the values of its layers.

    Nothing is decomposed. Filled with the state of the compressed model, it is that model:
    ``nnx.update(rebuild(model, plan), nnx.state(compressed.model))``.

    Args:
        model: a model like the one that was given to `compress` (dense) or to `harden` (with Gaudi
            layers). It may hold shapes only (``nnx.eval_shape``); so does the result then. It is
            left as it was.
        plan: the plan, also one that went through JSON.

    Raises:
        UserError: the plan belongs to another model, or is none.

    Example:
        >>> from flax import nnx
        >>> import gaudi_jax
        >>> model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
        >>> small, plan = gaudi_jax.compress(model, 0.5, method="low_rank", progress=False)
        >>> empty = gaudi_jax.rebuild(model, plan)
        >>> type(empty.layers[0]).__name__
        'LowRankLinear'
        >>> nnx.update(empty, nnx.state(small))
    """
    check_format(plan)
    model = nnx.clone(model)
    if any(entry["method"] == "packed" for entry in plan["layers"].values()):
        _pack(model, plan)
        return model
    dense, left = find_dense(model)
    _check_model(plan, dense, left)
    for path, entry in plan["layers"].items():
        layer = structure(dense[path], entry)
        values = {
            # A layer with sigma = 0 would give NaN where all others give 0.
            name: jnp.full(value.shape, math.inf if isinstance(value, Sigma) else 0.0)
            for name, value in vars(layer).items()
            if isinstance(value, nnx.Variable)
        }
        fill(layer, values, dense[path])
        install(layer, dense[path])
    return model


def _pack(model: nnx.Module, plan: Mapping[str, Any]) -> None:
    """Puts empty packed layers in the places of the Gaudi layers."""
    found, left = find_gaudi(model)
    _check_model(plan, found, left)
    for path, entry in plan["layers"].items():
        layer = found[path]
        # Plans without this entry are older: the layer kept the dtype of its parameters.
        dtype = entry.get("param_dtype", layer.param_dtype)
        try:
            dtype = jnp.dtype(dtype)
        except TypeError:
            raise UserError(
                f"param_dtype={dtype!r} of layer {path!r} in the plan is no dtype; give the plan "
                "that gaudi_jax.harden returned"
            ) from None
        empty = functools.partial(PackedLinear.in_place_of, layer, _layout(path, entry), dtype)
        abstract = isinstance(layer.v.get_value(), jax.ShapeDtypeStruct)
        become(layer, nnx.eval_shape(empty) if abstract else empty())


def _layout(path: str, entry: Mapping[str, Any]) -> Layout | Tiles | Cells | None:
    if "layout" not in entry:
        raise UserError(
            f"layer {path!r} of the plan lacks its layout; give that of gaudi_jax.harden"
        )
    lists = entry["layout"]
    if lists is None:
        return None
    if isinstance(lists, Mapping) and "tables" in lists:
        return (Cells if "grid" in lists else Tiles).from_lists(lists)
    return Layout.from_lists(lists)


def plan_table(plan: Mapping[str, Any]) -> str:
    """A plan as an aligned table: layers with their errors and costs, totals, and what was left.

    Example:
        >>> from gaudi_jax.compression import plan_table
        >>> from gaudi_jax.compression.plan import make_plan
        >>> entry = {"method": "gaudi", "in_features": 8, "out_features": [2, 4], "rank": 1,
        ...          "num_blocks": 1, "granularity": [1, 1], "use_bias": True, "error": 0.1,
        ...          "activation_error": None, "multiplications": 16, "dense_multiplications": 64}
        >>> print(plan_table(make_plan({"query": entry}, {"conv": "a Conv is not replaced"})))
        layer    method    in→out      error    on activations    multiplications    relative
        -------  --------  --------  -------  ----------------  -----------------  ----------
        query    gaudi     8→2·4       0.100                 –                 16       0.250
        -------  --------  --------  -------  ----------------  -----------------  ----------
        total                                                                  16       0.250
        left as they are:
          conv: a Conv is not replaced
    """
    check_format(plan)
    body: list[Any] = [
        [
            path,
            entry["method"],
            f"{_sizes(entry['in_features'])}→{_sizes(entry['out_features'])}",
            _number(entry["error"]),
            _number(entry["activation_error"]),
            *_costs(entry),
        ]
        for path, entry in plan["layers"].items()
    ]
    body += [SEPARATING_LINE, ["total", "", "", "", "", *_costs(plan)]]
    headers = ["layer", "method", "in→out", "error", "on activations", "multiplications"]
    table = tabulate(
        body,
        headers=[*headers, "relative"],
        colalign=("left", "left", "left", *["right"] * 4),
        disable_numparse=True,
    )
    left = [f"  {path}: {reason}" for path, reason in plan["left"].items()]
    return "\n".join([table, *(["left as they are:", *left] if left else [])])


def check_format(plan: Any) -> None:
    """Checks that something is a plan of this version's format.

    Raises:
        UserError: it is not.
    """
    found = plan.get("format") if isinstance(plan, Mapping) else type(plan).__name__
    if found != FORMAT:
        raise UserError(
            f"plan of format {found!r} cannot be read, only format {FORMAT}; give the plan that "
            "gaudi_jax.compress returned"
        )
    parts: dict[str, tuple[Any, tuple[str, ...]]] = {"the plan": (plan, PLAN_KEYS)}
    for name in ("layers", "left"):
        if not isinstance(plan.get(name, {}), Mapping):
            raise UserError(
                f"{name} of the plan is a {type(plan[name]).__name__}, no mapping; give the plan "
                "that gaudi_jax.compress returned"
            )
    for path, entry in plan.get("layers", {}).items():
        parts[f"layer {path!r}"] = entry, ENTRY_KEYS
    for name, (part, keys) in parts.items():
        missing = [key for key in keys if not isinstance(part, Mapping) or key not in part]
        if missing:
            raise UserError(
                f"{name} lacks {', '.join(missing)}; give the plan that gaudi_jax.compress returned"
            )
        if "method" in keys and part["method"] not in METHODS:
            raise UserError(f"{name} has the unknown method {part['method']!r}; use another plan")
        if "method" in keys and part["method"] in GRID_LAYERS:
            sizes = ["rank", "num_blocks"]
            if part["method"] == "block_sparse":
                sizes.append("diagonals")
            wrong = [key for key in sizes if not isinstance(part.get(key), int)]
            if wrong:
                raise UserError(
                    f"{name} needs whole numbers of {', '.join(wrong)}; give the plan that "
                    "gaudi_jax.compress returned"
                )


def _check_model(plan: Mapping[str, Any], dense: Mapping[str, Any], left: Mapping[str, str]):
    """Raises a UserError unless the plan is for a model with these layers."""
    problems = []
    for path, entry in plan["layers"].items():
        wanted = _plain(entry["in_features"]), _plain(entry["out_features"]), entry["use_bias"]
        if path not in dense:
            problems.append(f"{path} {left.get(path, 'is not there')}")
            continue
        module = dense[path]
        n_in, n_out = features(module)
        there = n_in, n_out, module.bias is not None
        if there != wanted:
            problems.append(f"{path} is {_describe(*there)}, not {_describe(*wanted)}")
    known = {*plan["layers"], *plan["left"]}
    problems += [f"{path} is not in it" for path in (*dense, *left) if path not in known]
    if problems:
        raise UserError(
            f"the plan is for another model: {len(problems)} layers differ "
            f"({'; '.join(problems[:3])}); give a model like the one that was compressed, or, for "
            "packed layers, like the one with Gaudi layers that was packed"
        )


def _plain(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _describe(n_in: tuple[int, ...], n_out: tuple[int, ...], use_bias: bool) -> str:
    return f"{_sizes(n_in)}→{_sizes(n_out)}{' with bias' if use_bias else ''}"


def _sizes(size: Any) -> str:
    return "·".join(map(str, _plain(size)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _costs(entry: Mapping[str, Any]) -> list[str]:
    cost, dense = entry["multiplications"], entry["dense_multiplications"]
    return [f"{cost:,}", f"{cost / dense:.3f}"]
