"""From a config to the objects of a run: model, schedules, optimizer."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from gaudi_jax.errors import UserError
from gaudi_jax.layers.factory import linear_factory
from gaudi_jax.models import GPT2, GPT2Config, ViT, ViTConfig, hf_vit
from gaudi_jax.models.pretrained import read_config, resolve_folder
from gaudi_jax.training import controllers
from gaudi_jax.training.optim import gaudi_adamw
from gaudi_jax.training.schedules import (
    annealed_sigma,
    falling_budget,
    warmup_cosine,
    warmup_linear,
)

log = logging.getLogger(__name__)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DECAYS = {"cosine": warmup_cosine, "linear": warmup_linear}
CONTROLLERS = ("none", "threshold", "mean", "budget")


class Schedules(NamedTuple):
    """Functions from the step to a value.

    Attributes:
        learning_rate: of the content.
        structural_learning_rate: of the widths.
        location_learning_rate: of the locations.
        sigma: of the masks; infinite for hard masks.
        target: of the width controller (mean width, or fraction of the dense multiplications).
    """

    learning_rate: optax.Schedule
    structural_learning_rate: optax.Schedule
    location_learning_rate: optax.Schedule
    sigma: optax.Schedule
    target: optax.Schedule


def check_options(config: ConfigDict) -> None:
    """Checks the seed, how often something is done, which steps are traced, what is evaluated.

    Raises:
        UserError: one of them is out of range or unknown, or any number of the config is NaN.
    """
    numbers = {
        "train.steps": config.train.steps,
        "train.accumulate": config.train.accumulate,
        "train.log_every": config.train.log_every,
        "train.eval_every": config.train.eval_every,
        "train.max_skipped": config.train.max_skipped,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{name}={value} must be at least 1")
    if not config.train.stall_seconds > 0:
        raise UserError(f"train.stall_seconds={config.train.stall_seconds} must be positive")
    _check_numbers(config)
    first, traced = config.profile.first, config.profile.steps
    for name, value in {"profile.first": first, "profile.steps": traced}.items():
        if value < 0:
            raise UserError(f"{name}={value} must not be negative")
    if traced and max(first, 1) + traced > config.train.steps:
        raise UserError(
            f"profile.first={first} and profile.steps={traced} ask for more than the "
            f"{config.train.steps} steps of train.steps, of which the first compiles; lower them"
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"seed={config.seed} is outside [0, 2^32)")
    if config.evaluate_checkpoint not in ("last", "best", "packed"):
        raise UserError(
            f"unknown evaluate_checkpoint {config.evaluate_checkpoint!r}; use last, best or packed"
        )
    if config.evaluate_checkpoint == "packed" and not config.evaluate_only:
        raise UserError(
            "evaluate_checkpoint='packed' is made of a finished run by python -m gaudi_jax.deploy; "
            "add evaluate_only=True, or use last or best"
        )


def _check_numbers(section: ConfigDict, prefix: str = "") -> None:
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            _check_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, float) and np.isnan(value):
            raise UserError(f"{prefix}{name}=nan is no number; give one")


class _Family(NamedTuple):
    """A kind of models.

    Attributes:
        model: its class.
        sizes: of the class's config.
        layers: fields of the config that make linear layers, and the sections of ``config.layer``
            that they follow.
        pretrained: reads a Hugging Face folder or id for a config.
        invisible: fields that change a model's function but no shape.
    """

    model: Callable[..., nnx.Module]
    sizes: Any
    layers: Mapping[str, str]
    pretrained: Callable[[ConfigDict, str], Any]
    invisible: tuple[str, ...]


def _pretrained_vit(config: ConfigDict, source: str) -> ViT:
    folder = resolve_folder(source)
    if (folder / "preprocessor_config.json").exists():
        theirs = hf_vit.normalization(read_config(folder, "preprocessor_config.json"))
        for name, value in theirs.items():
            if not np.allclose(config.data[name], value):
                log.warning(
                    "data.%s=%s, but the pixels of %s had %s",
                    name,
                    config.data[name],
                    source,
                    value,
                )
    # The head is drawn anew where the number of classes differs.
    return ViT.from_pretrained(
        folder,
        image_size=config.model.image_size,
        num_classes=config.model.num_classes,
        rngs=nnx.Rngs(config.seed),
    )


def _pretrained_gpt2(config: ConfigDict, source: str) -> GPT2:
    return GPT2.from_pretrained(source, fused_qkv=config.model.fused_qkv)


FAMILIES = {
    "vit": _Family(
        ViT,
        ViTConfig,
        {"attention_layer": "attention", "mlp_layer": "mlp"},
        _pretrained_vit,
        ("heads", "norm_epsilon", "pool"),
    ),
    "gpt2": _Family(
        GPT2,
        GPT2Config,
        {
            "attention_layer": "attention",
            "attention_out_layer": "attention_out",
            "mlp_layer": "mlp",
        },
        _pretrained_gpt2,
        ("heads", "norm_epsilon"),
    ),
}


def build_model(config: ConfigDict) -> Any:
    """The model of a resolved config, freshly initialised from ``config.seed``.

    Raises:
        UserError: the model, a layer or one of their options is unknown or out of range.
    """
    family = _family(config)
    options = config.model.to_dict()
    name = options.pop("name")
    dtype = options.pop("dtype")
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}; use {' or '.join(DTYPES)}")
    preset = options.pop("preset", None)
    known = {field.name for field in dataclasses.fields(family.sizes)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"model {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    options |= {
        field: linear_factory(config.layer[section].to_dict())
        for field, section in family.layers.items()
    }
    options["dtype"] = DTYPES[dtype]
    sizes = family.sizes.preset(preset, **options) if preset else family.sizes(**options)
    return family.model(sizes, rngs=nnx.Rngs(config.seed))


def pretrained_model(config: ConfigDict, source: str) -> Any:
    """The dense model of a Hugging Face folder or id, in the sizes that the data ask for.

    Args:
        config: resolved config.
        source: the folder or id.

    Raises:
        UserError: it is not there, cannot be read, or computes something else than the config's.
    """
    family = _family(config)
    model = family.pretrained(config, source)
    wanted = nnx.eval_shape(lambda: build_model(config)).config
    for name in family.invisible:
        own, there = getattr(wanted, name), getattr(model.config, name)
        if own != there:
            raise UserError(
                f"model.{name} is {there!r} in init_from={source} and {own!r} in this config; set "
                f"--config.model.{name}={there}"
            )
    return model


def _family(config: ConfigDict) -> _Family:
    if config.model.name not in FAMILIES:
        raise UserError(
            f"unknown model {config.model.name!r}; the models are {', '.join(FAMILIES)}"
        )
    return FAMILIES[config.model.name]


def build_schedules(config: ConfigDict) -> Schedules:
    """The schedules of a config; their boundaries are fractions of ``config.train.steps``.

    Raises:
        UserError: a number is out of range.
    """
    steps, optimizer = config.train.steps, config.optimizer

    if optimizer.schedule not in DECAYS:
        raise UserError(
            f"unknown optimizer.schedule {optimizer.schedule!r}; use {' or '.join(DECAYS)}"
        )

    def decaying(peak: float) -> optax.Schedule:
        return DECAYS[optimizer.schedule](
            peak,
            warmup_steps=_step(optimizer.warmup, steps, "optimizer.warmup"),
            total_steps=steps,
            start=peak * optimizer.start_factor,
            end=peak * optimizer.end_factor,
        )

    sigma, controller = config.sigma, config.controller
    if controller.name not in CONTROLLERS:
        raise UserError(
            f"unknown controller {controller.name!r}; the controllers are {', '.join(CONTROLLERS)}"
        )
    target: optax.Schedule = optax.constant_schedule(controller.target)
    if controller.name == "budget":
        target = falling_budget(
            controller.target,
            first_step=_step(controller.begin, steps, "controller.begin"),
            last_step=max(_step(controller.end, steps, "controller.end"), 1),
        )
    return Schedules(
        learning_rate=decaying(optimizer.learning_rate),
        structural_learning_rate=decaying(optimizer.structural_learning_rate),
        location_learning_rate=decaying(optimizer.location_learning_rate),
        sigma=annealed_sigma(
            sigma.start,
            sigma.end,
            first_step=_step(sigma.begin, steps, "sigma.begin"),
            last_step=_step(sigma.finish, steps, "sigma.finish"),
        ),
        target=target,
    )


def build_optimizer(
    config: ConfigDict, model: nnx.Module, schedules: Schedules, *, made: int = 0
) -> optax.GradientTransformation:
    """The optimizer of a config for this model, which skips gradients that are not finite.

    Args:
        config: resolved config.
        model: the model; shapes are enough.
        schedules: of the whole run.
        made: steps of the run that are made before the optimizer's first one.

    Raises:
        UserError: a number is out of range.
    """
    optimizer = config.optimizer
    schedules = Schedules(*(_shifted(schedule, made) for schedule in schedules))
    adamw = gaudi_adamw(
        model,
        learning_rate=schedules.learning_rate,
        structural_learning_rate=schedules.structural_learning_rate,
        location_learning_rate=schedules.location_learning_rate,
        factor_scale=optimizer.factor_scale,
        scale_by_width=bool(optimizer.get("scale_by_width")),  # older runs have no such key
        weight_decay=optimizer.weight_decay,
        b1=optimizer.b1,
        b2=optimizer.b2,
        clip_norm=optimizer.clip_norm or None,
        layer_moment=optimizer.layer_moment,
        controller=_build_controller(config, schedules, made),
    )
    # When to give up is the loop's to decide: the optimizer would go on with broken gradients.
    return optax.apply_if_finite(adamw, max_consecutive_errors=jnp.iinfo(jnp.int32).max)


def _shifted(schedule: optax.Schedule, made: int) -> optax.Schedule:
    return lambda step: schedule(step + made)


def _build_controller(
    config: ConfigDict, schedules: Schedules, made: int
) -> controllers.Controller | None:
    options: Any = config.controller
    if options.name == "threshold":
        return controllers.threshold_controller(
            options.strength,
            options.target,
            structural_learning_rate=schedules.structural_learning_rate,
            start_step=max(_step(options.begin, config.train.steps, "controller.begin") - made, 0),
        )
    if options.name == "mean":
        return controllers.mean_controller(options.target)
    if options.name == "budget":
        if options.floor >= options.target:
            raise UserError(
                f"controller.floor={options.floor} must be below controller.target={options.target}"
            )
        return controllers.budget_controller(
            schedules.target, price_by_axis=options.price_by_axis, floor=options.floor
        )
    return None


def _step(fraction: float, steps: int, name: str) -> int:
    if not 0 <= fraction <= 1:
        raise UserError(f"{name}={fraction} is outside [0, 1]; it is a fraction of train.steps")
    return int(fraction * steps)
