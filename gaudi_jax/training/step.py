"""One step of training or evaluation, as pure functions that are jitted once."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.cost import Cost
from gaudi_jax.data.augment import mix, normalize, smooth_labels
from gaudi_jax.layers import GaudiLinear, Width
from gaudi_jax.training.controllers import mean_active_width
from gaudi_jax.training.setup import Schedules

Batch = dict[str, Array]
Metrics = dict[str, Array]
Arrays = dict[str, Any]


class TrainState(NamedTuple):
    """All that changes in training.

    Attributes:
        step: steps made so far.
        params: every `nnx.Param` of the model, as a nested dict of arrays.
        other: every other Variable of the model (the masks' sigma), likewise.
        opt_state: state of the optimizer.
    """

    step: Array
    params: Arrays
    other: Arrays
    opt_state: Any


class ImageTask(NamedTuple):
    """How a batch of images becomes inputs and targets.

    Attributes:
        num_classes: number of logits.
        mean: of the pixels (in [0, 1]), one a channel.
        std: of the pixels (in [0, 1]), one a channel.
        label_smoothing: share of the target spread over all classes.
        mixup: alpha of mixup, 0 for none.
        cutmix: alpha of cutmix, 0 for none.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0


class CostWeights(NamedTuple):
    """What turns the multiplications of each Gaudi layer into the model's relative cost.

    Attributes:
        applications: input vectors per image of each Gaudi layer, by path.
        others: multiplications per image of all other linear layers.
        dense: multiplications per image of all linear layers, were they dense.
    """

    applications: dict[str, int]
    others: int
    dense: int

    @classmethod
    def of(cls, cost: Cost) -> "CostWeights":
        """From the cost of one image."""
        gaudi = [layer for layer in cost.layers if layer.kind == GaudiLinear.__name__]
        return cls(
            {layer.path: layer.applications for layer in gaudi},
            cost.multiplications - sum(layer.multiplications for layer in gaudi),
            cost.dense_multiplications,
        )


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Arrays, Arrays]:
    """Splits a model into its graph, its parameters and its other Variables, as nested dicts.

    ``nnx.merge(graphdef, params, other)`` is the model again.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> from gaudi_jax.training.step import split_model
        >>> _, params, other = split_model(GaudiLinear(4, 4, rngs=nnx.Rngs(0)))
        >>> sorted(params), sorted(other)
        (['bias', 'locations', 'u', 'v', 'widths'], ['sigma'])
    """
    graphdef, params, other = cast(Any, nnx.split(model, nnx.Param, ...))
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(other)


def set_sigma(model: nnx.Module, sigma: float | Array) -> None:
    """Sets the masks' sigma of every Gaudi layer.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> from gaudi_jax.training.step import set_sigma
        >>> layer = GaudiLinear(4, 4, rngs=nnx.Rngs(0))
        >>> set_sigma(layer, 2.0)
        >>> float(layer.sigma[...])
        2.0
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, GaudiLinear):
            module.sigma[...] = jnp.asarray(sigma, jnp.float32)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedules: Schedules,
    task: ImageTask,
    cost_weights: CostWeights,
    seed: int,
    sharding: jax.sharding.Sharding,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted training step; the old state is donated.

    Randomness is a function of the seed and the step alone, so that a resumed run repeats it.

    Args:
        graphdef: of the model in training mode.
        optimizer: over the model's parameters.
        schedules: of sigma, and for the metrics.
        task: how a batch becomes inputs and targets.
        cost_weights: of the model's Gaudi layers.
        seed: of mixing and dropout.
        sharding: of the state, which the new state keeps: were it left to the compiler, the second
            step could be compiled anew, or not use the donated memory.

    Returns:
        A function ``(state, batch) -> (state, metrics)``; the batch holds uint8 images
        (B, H, W, C) and labels (B,).
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        mix_key, dropout_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.step)
        )
        sigma = schedules.sigma(state.step)
        images = normalize(batch["image"], task.mean, task.std)
        targets = smooth_labels(batch["label"], task.num_classes, task.label_smoothing)
        images, targets = mix(
            mix_key, images, targets, mixup_alpha=task.mixup, cutmix_alpha=task.cutmix
        )

        def loss_fn(params: Arrays) -> tuple[Array, Array]:
            model = nnx.merge(graphdef, params, state.other)
            set_sigma(model, sigma)
            logits = model(images, rngs=nnx.Rngs(dropout=dropout_key))
            return optax.softmax_cross_entropy(logits, targets).mean(), logits

        (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        model = nnx.merge(graphdef, params, state.other)
        set_sigma(model, sigma)
        metrics = {
            "train_loss": loss,
            "train_accuracy": (logits.argmax(-1) == targets.argmax(-1)).mean(),
            "learning_rate": schedules.learning_rate(state.step),
            **structure_metrics(model, cost_weights),
        }
        if cost_weights.applications:
            metrics |= {"sigma": sigma, "target": schedules.target(state.step)}
        _, _, other = split_model(model)
        return TrainState(state.step + 1, params, other, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=sharding)


def structure_metrics(model: nnx.Module, weights: CostWeights) -> Metrics:
    """Mean active width and relative multiplications; empty without Gaudi layers."""
    if not weights.applications:
        return {}
    layers = {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, GaudiLinear)
    }
    # As floats: the multiplications of a large model do not fit in 32-bit integers.
    shares = [
        layers[path].multiplications() * (count / weights.dense)
        for path, count in weights.applications.items()
    ]
    widths = [variable[...] for _, variable in nnx.to_flat_state(nnx.state(model, Width))]
    return {
        "mean_width": mean_active_width(widths),
        "relative_multiplications": jnp.stack(shares).sum() + weights.others / weights.dense,
    }


def make_evaluation_step(
    graphdef: nnx.GraphDef, task: ImageTask
) -> Callable[[Arrays, Arrays, Batch], Metrics]:
    """The jitted evaluation step of a model in evaluation mode.

    Returns:
        A function ``(params, other, batch) -> sums`` of loss, correct answers and images, weighted
        by the batch's "weight" (0 for the padding of the last batch).
    """

    @jax.jit
    def step(params: Arrays, other: Arrays, batch: Batch) -> Metrics:
        model = nnx.merge(graphdef, params, other)
        logits: Float[Array, "B classes"] = model(normalize(batch["image"], task.mean, task.std))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        weight = batch["weight"]
        return {
            "loss": (losses * weight).sum(),
            "correct": ((logits.argmax(-1) == batch["label"]) * weight).sum(),
            "images": weight.sum(),
        }

    return step
