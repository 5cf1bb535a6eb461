"""Rules: which layers of a model become what."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal, cast, get_args

import numpy as np

from gaudi_jax.decomposition.parts import least_cost
from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import GRID_LAYERS, largest_divisor

Method = Literal["gaudi", "spread", "low_rank", "monarch", "blast", "block_sparse", "best", "skip"]
#: (in, out) of a kernel as a matrix.
Shape = tuple[int, int]
#: What each method makes use of, beside the budget.
USED_BY: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys(("gaudi", "best"), ("rank", "granularity")),
    "spread": ("rank", "granularity", "blocks"),
    **dict.fromkeys(GRID_LAYERS, ("blocks",)),
    **dict.fromkeys(("low_rank", "skip"), ()),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    r"""What becomes of the layers whose path matches a pattern.

    The fields that are None take the values given to `gaudi_jax.compress`.

    Attributes:
        pattern: regular expression for the whole path of a module, such as
            ``"blocks/0/attention/(query|key)"``. Of several rules the first that matches holds.
        method: "gaudi" for blocks found by search, "spread" for blocks of one size, evenly spread,
            "low_rank" for the truncated SVD, "best" for the better one of search and SVD,
            "monarch", "blast" or "block_sparse" for these layers, "skip" to leave the layer as it
            is.
        budget: multiplications as a fraction of in·out, > 0.
        rank: columns of each block, at least 1.
        granularity: grid cell of the blocks' intervals in features: a number, or a pair (input
            axis, output axis). Each axis takes its largest divisor not above it.
        blocks: parts of each axis for "monarch", "blast" and "block_sparse": the largest number not
            above it that divides both is taken. For "spread" the most parts.

    Raises:
        UserError: a field is out of range, or the pattern is no regular expression.

    Example:
        >>> from gaudi_jax import Rule
        >>> Rule(r"blocks/\d+/mlp/.*", budget=0.25).method is None
        True
    """

    pattern: str
    method: Method | None = None
    budget: float | None = None
    rank: int | None = None
    granularity: int | tuple[int, int] | None = None
    blocks: int | None = None

    def __post_init__(self):
        """Checks the fields."""
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise UserError(
                f"rule pattern {self.pattern!r} is no regular expression ({error}); mend it"
            ) from None
        for name in ("budget", "rank", "granularity", "blocks"):
            value = getattr(self, name)
            pair = name == "granularity" and isinstance(value, tuple | list)
            if any(
                isinstance(n, bool) or not isinstance(n, Real | None)
                for n in (value if pair else [value])
            ):
                raise UserError(f"{name}={value!r} of a rule must be a number")
        if self.method is not None and self.method not in get_args(Method):
            raise UserError(
                f"unknown method {self.method!r}; use {', '.join(get_args(Method)[:-1])} or skip"
            )
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise UserError(
                f"budget={self.budget} must be a positive fraction of in·out, such as 0.3"
            )
        for name in ("rank", "blocks"):
            number = getattr(self, name)
            if number is not None and (number < 1 or number % 1):
                raise UserError(f"{name}={number} must be a whole number, at least 1")
        if self.granularity is not None:
            cells = np.asarray(self.granularity)
            if cells.shape not in ((), (2,)) or np.any(cells % 1) or np.any(cells < 1):
                raise UserError(
                    f"granularity={self.granularity} must be a whole number, at least 1, or a pair "
                    "of them"
                )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of one layer: a rule with nothing left open.

    Attributes:
        method: any but "skip".
        budget: the layer's own fraction, or None where the network's number holds.
        rank: columns of each block.
        granularity: pair (input axis, output axis), each a divisor of its axis.
        blocks: parts of both axes for the layers on a grid, the most of them for "spread" (None for
            as many as there can be), None for the others.
    """

    method: Method
    budget: float | None
    rank: int
    granularity: tuple[int, int]
    blocks: int | None = None

    def least(self, shape: Shape) -> int:
        """The fewest multiplications with which the layer can be made."""
        n, m = shape
        if self.method == "low_rank":
            return min(n + m, n * m)
        if self.method in GRID_LAYERS:
            return GRID_LAYERS[self.method].least(n, m, cast(int, self.blocks))
        if self.method == "spread":
            return least_cost(shape, self.granularity, self.rank, self.blocks)
        cell_in, cell_out = self.granularity
        return min(self.rank * (cell_in + cell_out), cell_in * cell_out)


def as_rules(rules: Rule | Mapping[str, Any] | Sequence[Rule | Mapping[str, Any]]) -> list[Rule]:
    """Rules of rules or of mappings with the same keys, as configs hold them; one may be alone.

    Raises:
        UserError: a mapping has an unknown key or no pattern, or a value is out of range.

    Example:
        >>> from gaudi_jax.compression.rules import as_rules
        >>> as_rules([{"pattern": "head", "method": "skip"}])[0].method
        'skip'
    """
    several = [rules] if isinstance(rules, Rule | Mapping) else rules
    return [rule if isinstance(rule, Rule) else _as_rule(rule) for rule in several]


def choose(
    rules: Sequence[Rule],
    default: Rule,
    shapes: Mapping[str, Shape],
    left: Mapping[str, str],
) -> tuple[dict[str, Choice], dict[str, str]]:
    """Finds what becomes of each layer.

    Args:
        rules: in order; the first that matches a path holds.
        default: values of the fields that a rule leaves open.
        shapes: (in, out) of the layers that can be replaced, by path.
        left: the layers that cannot be replaced, by path. A rule may match them, without effect.

    Returns:
        The choices, and the reason why each other layer of `shapes` is left, by path.

    Raises:
        UserError: a rule holds for no layer, or gives its method what that has no use for; no layer
            is chosen, or a rank is too large for one.
    """
    matches = {
        path: next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)
        for path in (*shapes, *left)
    }
    for rule in rules:
        if matches and not any(match is rule for match in matches.values()):
            raise UserError(
                f"rule {rule.pattern!r} holds for no layer: it matches none of the "
                f"{len(matches)} ({_some(list(matches))}), or rules before it match them first"
            )
    _check_effects(rules, default)
    choices, passed_over = {}, {}
    for path, shape in shapes.items():
        match = matches[path]
        if match is None:
            passed_over[path] = "no rule matches it"
        elif (match.method or default.method) == "skip":
            passed_over[path] = "a rule skips it"
        else:
            choices[path] = _choice(path, shape, match, default)
    if not choices:
        reasons = [f"{path}: {reason}" for path, reason in {**left, **passed_over}.items()]
        raise UserError(
            f"no layer of the model is to be compressed ({_some(reasons) or 'it has none'}); give "
            "a model with nnx.Linear or nnx.LinearGeneral layers, and rules that match them"
        )
    return choices, passed_over


def _check_effects(rules: Sequence[Rule], default: Rule) -> None:
    """Checks that what is asked for has an effect: in a rule on its method, else on any rule's."""
    methods = [rule.method or default.method for rule in rules]
    asked = [*zip(rules, ([method] for method in methods), strict=True), (default, methods)]
    for rule, its_methods in asked:
        for name in ("rank", "granularity", "blocks"):
            value = getattr(rule, name)
            usual = value is None or (name != "blocks" and np.all(np.asarray(value) == 1))
            if its_methods and not usual and not any(name in USED_BY[m] for m in its_methods):
                useful = [repr(method) for method, names in USED_BY.items() if name in names]
                raise UserError(
                    f"{name}={value} has no effect on method={its_methods[0]!r}; leave it out, or "
                    f"take {' or '.join(useful)}"
                )


def _as_rule(mapping: Any) -> Rule:
    try:
        values = dict(mapping)
    except (TypeError, ValueError):
        raise UserError(f"{mapping!r} is no rule; give a gaudi_jax.Rule or a mapping") from None
    known = [field.name for field in dataclasses.fields(Rule)]
    for key in values:
        if key not in known:
            raise UserError(f"a rule has no field {key!r}; its fields are {', '.join(known)}")
    if "pattern" not in values:
        raise UserError(f"rule {values} has no pattern; give the layers' paths as one")
    if isinstance(values.get("granularity"), list):
        values["granularity"] = tuple(values["granularity"])
    return Rule(**values)


def _choice(path: str, shape: Shape, rule: Rule, default: Rule) -> Choice:
    method, rank, granularity, blocks = (
        getattr(default, name) if getattr(rule, name) is None else getattr(rule, name)
        for name in ("method", "rank", "granularity", "blocks")
    )
    if method in GRID_LAYERS:
        wanted = None if blocks is None else int(blocks)
        blocks = GRID_LAYERS[method].fitting_blocks(*shape, wanted)
        return Choice(method, rule.budget, 1, (1, 1), blocks)
    if method != "low_rank" and rank > min(shape):
        raise UserError(
            f"rank={rank} is too large for layer {path!r} of {shape[0]}x{shape[1]}; give it a rule "
            f"with a rank of at most {min(shape)}, or method='skip'"
        )
    cells = (int(cell) for cell in np.broadcast_to(granularity, 2))
    pair = tuple(largest_divisor(n, cell) for n, cell in zip(shape, cells, strict=True))
    parts = int(blocks) if method == "spread" and blocks is not None else None
    return Choice(method, rule.budget, int(rank), (pair[0], pair[1]), parts)


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
