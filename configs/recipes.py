"""How structured layers come into a model: recipes from scratch, and compression of a dense one."""

from typing import NamedTuple

from ml_collections import ConfigDict, config_dict

from configs.common import Argument, Arguments
from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import GRID_LAYERS, require_known


class Recipe(NamedTuple):
    """How Gaudi layers learn their structure: changes of two sections, and the layers' options."""

    sigma: dict[str, Argument]
    controller: dict[str, Argument]
    layer: dict[str, Argument]


def paper_from_scratch(*, target: float, strength: float) -> Recipe:
    """The paper's recipe for training from scratch.

    Sigma rises from 1 to 100, and a constant threshold lowers widths while their mean exceeds its
    target.
    """
    return Recipe(
        sigma={"start": 1.0, "end": 100.0, "begin": 5 / 300},
        controller={
            "name": "threshold",
            "target": target,
            "strength": strength,
            "begin": 10 / 300,
        },
        layer={"sigma": 1.0},
    )


def use_layer(
    config: ConfigDict,
    args: Arguments,
    *,
    paper: Recipe,
    widths: str = "split",
    factor_scale: float = 1.0,
    scale_after_dense: float = 4.0,
    scale_of_spread: float = 4.0,
) -> None:
    """Chooses the linear layers of all blocks, and how they come to their structure.

    The spread and the search recipe: dense layers for three tenths of the steps, which are then
    compressed, in Gaudi layers to blocks of one size, evenly spread, or to blocks that are found by
    search. The budget recipe: hard masks from the first step with a smoothed derivative, and a
    budget of multiplications that falls along a cubic.

    Args:
        config: changed in place; each part of ``config.layer`` gets its layer.
        args: `LAYER_ARGUMENTS`, and one for each other part of ``config.layer``.
        paper: the paper's recipe.
        widths: initial ones of the budget recipe's layers (`GaudiFactory`).
        factor_scale: how much faster factors learn than the rest in the budget recipe.
        scale_after_dense: the same after a dense start. That of Gaudi blocks is for those as wide
            as the layer; narrower ones learn faster.
        scale_of_spread: the same for blocks that are evenly spread.

    Raises:
        UserError: the recipe or a layer is unknown, the budget is out of range, or an argument has
            no effect.
    """
    if args["recipe"] not in ("spread", "search", "budget", "paper"):
        raise UserError(f"unknown recipe {args['recipe']!r}; use spread, search, budget or paper")
    if not 0 < args["budget"] <= 1:
        raise UserError(f"budget={args['budget']} is outside (0, 1]; give a fraction such as 0.3")
    names = {part: args[part] or args["layer"] for part in config.layer}
    kinds = set(names.values()) - {"dense"}
    for kind in kinds:
        require_known(kind)
    if all(args[part] for part in names):
        args.reject("layer", because=f"beside {' and '.join(names)}")
    if not kinds:
        args.reject("budget", "recipe", because="on dense layers")
    elif args["recipe"] in ("spread", "search"):
        _use_dense_start(config, args, names, scale_after_dense, scale_of_spread)
        return
    elif args["recipe"] == "paper":
        if "gaudi" not in kinds:
            args.reject("recipe", because="without Gaudi layers")
        if kinds == {"gaudi"}:
            args.reject("budget", because="on recipe=paper")
    gaudi: dict = {"name": "gaudi", "rank": 1, "granularity": 1}
    if args["recipe"] == "budget":
        config.optimizer.factor_scale = factor_scale
    if args["recipe"] == "paper":
        config.sigma.update(paper.sigma)
        config.controller.update(paper.controller)
        gaudi.update(paper.layer)
    elif "gaudi" in kinds:
        # 2 cells of smoothing suit a grid of single features (docs/results.md).
        gaudi.update(backward_smoothing=2.0, widths=widths, locations="spaced")
        config.optimizer.layer_moment = True
        config.controller.update(name="budget", target=args["budget"], floor=0.6 * args["budget"])
    options = {"gaudi": gaudi, "low_rank": {"name": "low_rank", "budget": args["budget"]}} | {
        name: {"name": name, "budget": args["budget"], "blocks": layer.usual_blocks}
        for name, layer in GRID_LAYERS.items()
    }
    with config.unlocked():
        for part, name in names.items():
            config.layer[part] = ConfigDict(options.get(name, {"name": name}))
            if name == "gaudi" and "density" not in gaudi:
                # Of the initial widths; None: dense cost. Each layer's own: they must not be tied.
                config.layer[part].density = config_dict.placeholder(float)


def _use_dense_start(
    config: ConfigDict,
    args: Arguments,
    names: dict[str, str],
    factor_scale: float,
    scale_of_spread: float,
) -> None:
    """Trains dense layers for a while, compresses them, and goes on."""
    kinds = set(names.values()) - {"dense"}
    if len(kinds) > 1:
        raise UserError(
            f"recipe={args['recipe']} makes all layers of one kind, or dense; choose one, or "
            "recipe=budget"
        )
    own_out = "attention_out" in names
    paths = {
        "attention": "attention/(qkv|query|key|value)" if own_out else "attention/.*",
        "attention_out": "attention/out",
        "mlp": "mlp/.*",
    }
    kind = kinds.pop()
    if kind == "gaudi":
        config.optimizer.scale_by_width = True
        if args["recipe"] == "spread":
            kind, factor_scale = "spread", scale_of_spread
    config.compress.update(
        method=kind,
        stages=((0.3, args["budget"]),),  # early pays at small budgets (docs/learning_slow.md)
        rules=tuple((f"blocks/.*/{paths[p]}", None) for p in names if names[p] != "dense"),
        calibration_batches=16,
        rounds=20,  # what is trained on need not be found to the last digit
    )
    _keep_structure(config, factor_scale)


def _keep_structure(config: ConfigDict, factor_scale: float) -> None:
    """The structure stays as compression makes it; its factors learn faster (docs/results.md)."""
    config.optimizer.update(
        factor_scale=factor_scale, structural_learning_rate=0.0, location_learning_rate=0.0
    )


def use_compression(config: ConfigDict, args: Arguments, dense: ConfigDict) -> None:
    """Starts from a trained dense model whose layers are compressed, and then fine-tuned.

    The structure stays as compression makes it; the factors learn at four times the rate of the
    rest (docs/results.md).

    Args:
        config: changed in place.
        args: ``dense`` (workdir, or Hugging Face folder or id; empty to train it first),
            ``method``, ``budget`` and ``granularity``.
        dense: config of the dense model, with which it is trained if none is named.

    Raises:
        UserError: the method is unknown.
    """
    methods = ("gaudi", "spread", "low_rank", *GRID_LAYERS, "best")
    if args["method"] not in methods:
        raise UserError(f"unknown method {args['method']!r}; use {', '.join(methods)}")
    if args["method"] not in ("gaudi", "spread", "best"):
        args.reject("granularity", because=f"on method={args['method']}")
    config.init_from = args["dense"]
    if not args["dense"]:
        with config.unlocked():
            config.pretrain = dense.copy_and_resolve_references()
            # The sections themselves: what is set for this model holds for the dense one too.
            config.pretrain.update(seed=config.get_ref("seed"))
            config.pretrain.data, config.pretrain.model = config.data, config.model
            config.pretrain.mesh = config.mesh
    config.compress.update(
        method=args["method"],
        stages=((0.0, args["budget"]),),
        granularity=args["granularity"],
        calibration_batches=16,
    )
    _keep_structure(config, factor_scale=4.0)
