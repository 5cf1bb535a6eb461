"""One step of training or evaluation, as pure functions that are jitted once."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from gaudi_jax.cost import Cost
from gaudi_jax.layers import GaudiLinear, Width
from gaudi_jax.training.controllers import mean_active_width
from gaudi_jax.training.mesh import replicated, state_shardings
from gaudi_jax.training.setup import Schedules
from gaudi_jax.training.tasks import Batch, Metrics, Task

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


class CostWeights(NamedTuple):
    """What turns the multiplications of each Gaudi layer into the model's relative cost.

    Attributes:
        applications: input vectors per example of each Gaudi layer, by path.
        others: multiplications per example of all other linear layers.
        dense: multiplications per example of all linear layers, were they dense.
    """

    applications: dict[str, int]
    others: int
    dense: int

    @classmethod
    def of(cls, cost: Cost) -> "CostWeights":
        """From the cost of one example."""
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


def hold_structure(model: nnx.Module, options: ConfigDict) -> None:
    """Cuts off the gradients of widths and locations that learn nothing.

    They would count in the norm by which all gradients are clipped, and take time.

    Args:
        model: changed in place, inside the function that is differentiated.
        options: ``config.optimizer``; kinds with a learning rate of 0 are held.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> from gaudi_jax.training.step import hold_structure
        >>> from ml_collections import ConfigDict
        >>> options = ConfigDict({"structural_learning_rate": 0.0, "location_learning_rate": 1e-4})
        >>> def loss(layer):
        ...     hold_structure(layer, options)
        ...     return (layer.kernel() ** 2).sum()
        >>> slopes = nnx.grad(loss)(GaudiLinear(8, 8, sigma=1.0, rngs=nnx.Rngs(0)))
        >>> bool((slopes["widths"][...] == 0).all()), bool((slopes["u"][...] == 0).all())
        (True, False)
    """
    rates = {
        "widths": options.structural_learning_rate,
        "locations": options.location_learning_rate,
    }
    for _, module in nnx.iter_modules(model):
        if isinstance(module, GaudiLinear):
            for name, rate in rates.items():
                if rate == 0:
                    held = getattr(module, name)
                    held.set_value(jax.lax.stop_gradient(held[...]))


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedules: Schedules,
    task: Task,
    cost_weights: CostWeights,
    seed: int,
    shardings: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted training step; the old state is donated.

    Randomness is a function of the seed and the step alone, so that a resumed run repeats it. With
    ``task.config.train.accumulate`` above 1 the batch is worked through in that many micro-batches,
    whose gradients are averaged: the memory of one micro-batch, the step of the whole batch.

    Args:
        graphdef: of the model in training mode.
        optimizer: over the model's parameters.
        schedules: of sigma, and for the metrics.
        task: how a batch becomes a loss.
        cost_weights: of the model's Gaudi layers.
        seed: of augmentation on the device and of dropout.
        shardings: of the state on one mesh (`state_layout`), which the new state keeps: were it
            left to the compiler, the second step could be compiled anew, or not use the donated
            memory.

    Returns:
        A function ``(state, batch) -> (state, metrics)``.
    """
    accumulate = task.config.train.accumulate
    mesh = shardings.step.mesh

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        sigma = schedules.sigma(state.step)

        def loss_fn(params: Arrays, batch: Batch, key: Array) -> tuple[Array, Metrics]:
            model = nnx.merge(graphdef, params, state.other)
            set_sigma(model, sigma)
            hold_structure(model, task.config.optimizer)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return task.loss(model, batch, key)

        gradients_of = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, results), gradients = mean_over_parts(
            lambda *part: gradients_of(state.params, *part), batch, key, accumulate
        )
        # The optimizer skips what is not finite; an infinite loss may have finite gradients.
        finite = jnp.isfinite(loss)
        gradients = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        model = nnx.merge(graphdef, params, state.other)
        set_sigma(model, sigma)
        metrics = {
            "train_loss": loss,
            **{f"train_{name}": value for name, value in results.items()},
            "learning_rate": schedules.learning_rate(state.step),
            **structure_metrics(model, cost_weights),
        }
        if cost_weights.applications:
            metrics |= {"sigma": sigma, "target": schedules.target(state.step)}
        _, _, other = split_model(model)
        return TrainState(state.step + 1, params, other, opt_state), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def laid_out(state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The shapes and dtypes of a training state, with where each array lies on a mesh.

    Args:
        state: shapes are enough.
        mesh: with the axes ``data``, ``fsdp`` and ``tensor``.
    """
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        state,
        state_layout(state, mesh),
    )


def state_layout(state: TrainState, mesh: Mesh | AbstractMesh) -> Any:
    """Where each array of a training state lies on a mesh (`gaudi_jax.training.mesh`).

    Args:
        state: shapes are enough.
        mesh: with the axes ``data``, ``fsdp`` and ``tensor``.
    """
    return TrainState(*(state_shardings(part, mesh) for part in state))


def mean_over_parts(
    function: Callable[[Batch, Array], Any], batch: Batch, key: Array, parts: int
) -> Any:
    """The mean of a function over equal parts of a batch, worked through one after the other.

    Args:
        function: of a part and a random key; gives a tree of arrays.
        batch: arrays whose first axis is a multiple of `parts`.
        key: random key; each part gets its own.
        parts: number of parts; 1 calls the function with the batch and the key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gaudi_jax.training.step import mean_over_parts
        >>> batch = {"x": jnp.arange(4.0)}
        >>> float(mean_over_parts(lambda b, key: b["x"].max(), batch, jax.random.key(0), 2))
        2.5
    """
    if parts == 1:
        return function(batch, key)
    # Part i takes every parts-th example from i on, so that each part is spread over all devices,
    # as the batch is.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda x: x[0], (split, keys))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, *first))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    total, _ = jax.lax.scan(add, zeros, (split, keys))
    return jax.tree.map(lambda x: x / parts, total)


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
    graphdef: nnx.GraphDef, task: Task, mesh: Mesh
) -> Callable[[Arrays, Arrays, Batch], Metrics]:
    """The jitted evaluation step of a model in evaluation mode, on a mesh.

    Returns:
        A function ``(params, other, batch) -> sums``, which add up over batches.
    """

    def step(params: Arrays, other: Arrays, batch: Batch) -> Metrics:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return task.sums(nnx.merge(graphdef, params, other), batch)

    return jax.jit(step, out_shardings=replicated(mesh))
