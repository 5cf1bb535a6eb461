"""Compression of a trained network: from dense layers to structured ones under a budget."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from tqdm import tqdm

from gaudi_jax.compression.allocation import share_out
from gaudi_jax.compression.calibration import Moments, calibrate
from gaudi_jax.compression.layer import Layer, Solution, search_blocks, spread_blocks
from gaudi_jax.compression.plan import Plan, make_plan, plan_table
from gaudi_jax.compression.rules import Choice, Method, Rule, as_rules, choose
from gaudi_jax.compression.surgery import find_dense, matrix_shape
from gaudi_jax.decomposition.decompose import ROUNDS, Factors, affordable
from gaudi_jax.errors import UserError

Allocation = Literal["uniform", "global"]
#: Most layers whose blocks an accelerator searches at once, and entries of their second moments,
#: of which a search keeps some dozen times as many.
TOGETHER, TOGETHER_ENTRIES = 8, 2**25


class Compressed(NamedTuple):
    """A compressed model.

    Attributes:
        model: the model with structured layers.
        plan: what became of each layer (`gaudi_jax.compression.plan_table` prints it); with it
            `gaudi_jax.rebuild` makes the structure again.
    """

    model: nnx.Module
    plan: Plan


def compress(
    model: nnx.Module,
    budget: float | Sequence[Rule | Mapping[str, Any]],
    *,
    rules: Sequence[Rule | Mapping[str, Any]] | None = None,
    method: Method = "gaudi",
    rank: int = 1,
    granularity: int | tuple[int, int] = 1,
    blocks: int | None = None,
    allocation: Allocation = "uniform",
    floor: float = 0.0,
    calibration: Iterable[Any] | None = None,
    rounds: int = ROUNDS,
    key: Array | None = None,
    progress: bool = True,
) -> Compressed:
    """Replaces the dense layers of a trained model by structured ones under a budget.

    Every `nnx.Linear` and `nnx.LinearGeneral` is replaced that a rule matches (without rules: every
    one), those of `nnx.MultiHeadAttention` included. Layers whose kernel or bias another module
    holds too, with stacked parameters or with options of their own, subclasses of these layers, and
    layers of other kinds are left; the plan says why. A layer that is reached by several paths is
    decomposed once and stays shared; rules see its first path.

    With calibration each layer minimises the error of its outputs on these inputs instead of the
    error of its kernel. The inputs' mean goes into the bias, where there is one.

    Args:
        model: any NNX module; it is left as it was.
        budget: multiplications as a fraction of in·out, over the layers that the rules match; above
            1 is allowed. Or the rules, each with its own budget.
        rules: `Rule`s, or mappings with the same keys; the first that matches a layer holds.
        method: "gaudi" for `GaudiLinear`s found by search, "spread" for `GaudiLinear`s with
            blocks of one size, evenly spread, which are worse straight away and may be better once
            trained on (`gaudi_jax.decomposition.spread`), "low_rank" for `LowRankLinear`s of
            the truncated SVD (with calibration: whitened SVD), "best" for the better one of search
            and SVD, "monarch" for `MonarchLinear`s of block-wise SVD, "blast" for
            `BlastLinear`s of preconditioned gradient descent, "block_sparse" for
            `BlockSparseLinear`s of alternating fits, "skip" to leave layers whose rule names no
            method.
        rank: columns of each block.
        granularity: grid cell of the blocks' intervals in features: a number, or a pair (input,
            output). Each axis takes its largest divisor not above it.
        blocks: parts of each axis for "monarch", "blast" and "block_sparse": the largest number not
            above it that divides both axes of a layer is taken (for "block_sparse" a power of two);
            None for 4, 4 and 16. For "spread" the most parts, None for as many as there can be:
            fewer are faster once packed.
        allocation: "uniform" gives each layer the same fraction. "global" spends the same total
            where it takes most off the sum of the layers' squared relative errors, as their
            singular values foretell it; layers whose rule has a budget keep that.
        floor: share, in [0, 1], of its uniform budget that each layer keeps in global allocation.
        calibration: batches, read once: an array is the model's argument, the items of a tuple or
            list are its arguments, those of a mapping its keyword arguments; what is no array is
            given as it is. Layers that the model applies inside `jax.vmap`, `jax.checkpoint` or
            loops of `jax.lax`, or inside `nnx.scan` with state that is shared by the steps, cannot
            be observed: give them a rule with method="skip", or compress without calibration.
        rounds: effort of each search, to which its time is proportional. "spread" blocks are fitted
            in three times as many sweeps at most.
        key: random key of the searches; None for a fixed one.
        progress: show bars with the time left, and the plan as a table, on stderr.

    Returns:
        The compressed model, which shares nothing with the input, and the plan.

    Raises:
        UserError: before any work, a rule is wrong or holds for no layer, a budget or rank is
            impossible for a layer, or a kernel is not finite; before any decomposition, calibration
            cannot be run or does not reach a layer.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import gaudi_jax
        >>> model = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.relu)
        >>> small, plan = gaudi_jax.compress(model, 0.5, method="low_rank", progress=False)
        >>> small(jnp.ones((1, 16))).shape, plan["multiplications"], plan["dense_multiplications"]
        ((1, 16), 128, 256)
    """
    if not isinstance(model, nnx.Module):
        raise UserError(f"compress needs an NNX module, not {type(model).__name__!r}")
    if rounds < 1:
        raise UserError(f"rounds={rounds} must be at least 1")
    result = nnx.clone(model)
    dense, left, choices, network, total = choose_layers(
        result,
        budget,
        rules=rules,
        method=method,
        rank=rank,
        granularity=granularity,
        blocks=blocks,
        allocation=allocation,
        floor=floor,
    )
    for path in choices:
        _check_kernel(path, dense[path])

    moments: dict[str, Moments] = {}
    if calibration is not None:
        moments = calibrate(result, choices, calibration, progress=progress)
    layers = {
        path: Layer(dense[path], choice, moments.get(path)) for path, choice in choices.items()
    }
    costs = _costs(layers, network, total, floor)

    entries = {}
    solutions = _solve(layers, costs, rounds, key, progress)
    for path, layer in layers.items():
        layer.replace(solutions[path])
        entries[path], _ = solutions.pop(path)
    # The arrays that were not replaced are the input's still: training that donates its state would
    # delete them there.
    plan = make_plan(entries, left)
    if progress:
        print(plan_table(plan), file=sys.stderr)
    return Compressed(nnx.clone(result, arrays=True), plan)


def _solve(
    layers: Mapping[str, Layer],
    costs: Mapping[str, int],
    rounds: int,
    key: Array | None,
    progress: bool,
) -> dict[str, Solution]:
    """Decomposes all layers: on a CPU one after the other, elsewhere searches some at a time.

    A search is a long row of small operations. An accelerator starts one for many kernels in the
    time of one, and a CPU gains nothing: two searches at once are no faster on two cores. (They
    wait for each other for ever, too: XLA's linear algebra on CPUs runs in the threads of the pool
    whose threads it waits for.)
    """
    together = 1 if jax.default_backend() == "cpu" else TOGETHER
    weights = {path: math.prod(layer.shape) for path, layer in layers.items()}
    solutions: dict[str, Solution] = {}
    with tqdm(
        total=sum(weights.values()),
        disable=not progress,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
    ) as bar:
        for paths in _alike(layers, together):
            bar.set_description_str(f"compress {len(solutions) + 1}/{len(layers)} {paths[0]}")
            method = layers[paths[0]].choice.method
            found: list[Factors | None] = [None] * len(paths)
            if method in ("gaudi", "best"):
                chosen = [layers[path] for path in paths]
                found = [*search_blocks(chosen, [costs[path] for path in paths], rounds, key)]
            elif method == "spread":
                found = [spread_blocks(layers[path], costs[path], rounds) for path in paths]
            for path, factors in zip(paths, found, strict=True):
                solutions[path] = layers[path].solve(costs[path], factors)
                bar.update(weights[path])
    return {path: solutions[path] for path in layers}


def _alike(layers: Mapping[str, Layer], most: int) -> list[list[str]]:
    """Paths of layers that can be searched together, at most so many each."""
    groups: dict[Any, list[str]] = {}
    for path, layer in layers.items():
        choice = dataclasses.replace(layer.choice, budget=None)
        groups.setdefault((layer.shape, choice), []).append(path)
    parts = []
    for ((n, _), _), paths in groups.items():
        size = max(1, min(most, TOGETHER_ENTRIES // n**2))
        parts += [paths[i : i + size] for i in range(0, len(paths), size)]
    return parts


class Chosen(NamedTuple):
    """What is to be done to a model.

    Attributes:
        dense: its layers that can be replaced, by path.
        left: reasons why the others, and those without a choice, are left, by path.
        choices: what becomes of each layer that is replaced.
        network: budget of layers without one of their own.
        total: multiplications that such layers share, None where each has its own.
    """

    dense: dict[str, Any]
    left: dict[str, str]
    choices: dict[str, Choice]
    network: float | None
    total: int | None


def choose_layers(
    model: nnx.Module,
    budget: float | Sequence[Rule | Mapping[str, Any]],
    *,
    rules: Sequence[Rule | Mapping[str, Any]] | None,
    method: Method,
    rank: int,
    granularity: int | tuple[int, int],
    blocks: int | None,
    allocation: Allocation,
    floor: float,
) -> Chosen:
    """Finds what `compress` would do to each layer, and checks its options.

    Args:
        model: the model; shapes are enough.
        budget: as all others, see `compress`.
        rules: see there.
        method: see there.
        rank: see there.
        granularity: see there.
        blocks: see there.
        allocation: see there.
        floor: see there.

    Raises:
        UserError: a rule is wrong or holds for no layer, or a budget or rank is impossible.
    """
    if allocation not in get_args(Allocation):
        raise UserError(f"unknown allocation {allocation!r}; use 'uniform' or 'global'")
    if not 0 <= floor <= 1:
        raise UserError(f"floor={floor} is outside [0, 1]; give a share of a budget such as 0.3")
    if floor and allocation == "uniform":
        raise UserError(f"floor={floor} has no effect beside allocation='uniform'; leave it out")
    network, ordered = _budget_and_rules(budget, rules)
    default = Rule(".*", method, network, rank, granularity, blocks)
    dense, left = find_dense(model)
    shapes = {path: matrix_shape(module) for path, module in dense.items()}
    choices, passed_over = choose(ordered, default, shapes, left)
    total = _total(choices, shapes, network, allocation, floor)
    return Chosen(dense, {**left, **passed_over}, choices, network, total)


def _budget_and_rules(budget: Any, rules: Any) -> tuple[float | None, list[Rule]]:
    """The network's budget, if there is one, and the rules."""
    if isinstance(budget, int | float) or (hasattr(budget, "ndim") and budget.ndim == 0):
        if rules is None:
            return float(budget), [Rule(".*")]
        return float(budget), as_rules(rules)
    if rules is not None:
        raise UserError("give rules once: either in place of the budget or as rules=")
    if isinstance(budget, str | Mapping) or not isinstance(budget, Iterable):
        raise UserError(f"budget={budget!r} must be a fraction such as 0.3, or a list of rules")
    ordered = as_rules(list(budget))
    for rule in ordered:
        if rule.budget is None and rule.method != "skip":
            raise UserError(
                f"rule {rule.pattern!r} has no budget and the call has none; give one of them"
            )
    return None, ordered


def _check_kernel(path: str, module: Any) -> None:
    kernel = module.kernel.get_value()
    if isinstance(kernel, jax.ShapeDtypeStruct):
        raise UserError(f"layer {path!r} holds shapes without values; give a model with values")
    if not np.isfinite(np.asarray(kernel)).all():
        raise UserError(f"the kernel of layer {path!r} holds NaN or infinity; mend the model first")


def _total(
    choices: Mapping[str, Choice],
    shapes: Mapping[str, tuple[int, int]],
    network: float | None,
    allocation: str,
    floor: float,
) -> int | None:
    """Checks the budgets; returns the multiplications to be shared out, None for uniform ones."""
    own = [path for path, choice in choices.items() if choice.budget is not None]
    shared = [path for path in choices if path not in own]
    spread = shared if allocation == "global" else []
    if allocation == "global" and not spread:
        raise UserError("allocation='global' has no layer without a budget of its own to share to")
    for path, choice in choices.items():
        n, m = shapes[path]
        budget = network if choice.budget is None else choice.budget
        least = choice.least((n, m))
        if path not in spread and affordable(cast(float, budget), n * m) < least:
            raise UserError(
                f"budget={budget} of layer {path!r} is less than {least / (n * m):.4g}, the least "
                f"that a {n}x{m} layer can be made with; give it a larger one, or a rule with "
                "method='skip'"
            )
    if not spread:
        return None
    total = sum(affordable(cast(float, network), math.prod(shapes[path])) for path in spread)
    least = sum(_floor(choices[path], shapes[path], cast(float, network), floor) for path in spread)
    if total < least:
        dense = sum(math.prod(shapes[path]) for path in spread)
        raise UserError(
            f"budget={network} is less than {least / dense:.4g}, the least that the {len(spread)} "
            "layers together can be made with; give a larger one"
        )
    return total


def _floor(choice: Choice, shape: tuple[int, int], network: float, share: float) -> int:
    """The fewest multiplications that a layer gets of a budget that is shared out."""
    return max(choice.least(shape), affordable(share * network, math.prod(shape)))


def _costs(
    layers: Mapping[str, Layer], network: float | None, total: int | None, floor: float
) -> dict[str, int]:
    """Multiplications that each layer may cost."""
    costs = {
        path: affordable(budget, math.prod(layer.shape))
        for path, layer in layers.items()
        if (budget := network if layer.choice.budget is None else layer.choice.budget) is not None
    }
    if total is not None:
        spread = [path for path, layer in layers.items() if layer.choice.budget is None]
        floors = [
            _floor(layers[path].choice, layers[path].shape, cast(float, network), floor)
            for path in spread
        ]
        curves = [
            layers[path].curve(costs[path], least)
            for path, least in zip(spread, floors, strict=True)
        ]
        costs |= dict(zip(spread, share_out(curves, total), strict=True))
    return costs
