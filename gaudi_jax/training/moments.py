"""Adam's moments, carried through a change of structure.

Where a kernel W becomes blocks ``sum_b v_bᵀ u_b``, the gradient of v_b is ``G u_bᵀ`` on its
interval, with G the gradient of W; so the moments of G give those of the factors: the first moment
exactly, the second as if the entries of G were independent. So it is for every kernel that is a sum
of products of factors. Training then goes on without a new warm-up.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.data.pipeline import first_batches
from gaudi_jax.layers import GeneralLinear, Structural, StructuredLinear
from gaudi_jax.training.controllers import names
from gaudi_jax.training.step import mean_over_parts, split_model
from gaudi_jax.training.tasks import Task

Path = tuple


class Moments(NamedTuple):
    """Adam's moments by the paths of parameters.

    Attributes:
        updates: made so far.
        first: running means of the gradients.
        second: running means of their squares.
    """

    updates: Array
    first: dict[Path, Array]
    second: dict[Path, Array]


def read_moments(opt_state: Any) -> Moments:
    """The moments that an optimizer's state holds, of whatever groups it has.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from gaudi_jax.training.moments import read_moments
        >>> params = {"kernel": jnp.ones(2)}
        >>> sorted(read_moments(optax.adam(1e-3).init(params)).first)
        [('kernel',)]
    """
    moments = Moments(jnp.zeros([], jnp.int32), {}, {})
    for state in jax.tree.leaves(opt_state, is_leaf=_is_adam):
        if _is_adam(state):
            moments.first.update(_by_path(state.mu))
            moments.second.update(_by_path(state.nu))
            moments = moments._replace(updates=jnp.maximum(moments.updates, state.count))
    return moments


def carry_moments(moments: Moments, model: nnx.Module) -> Moments:
    """The moments of a compressed model, from those of the dense one.

    Args:
        moments: of the dense model's parameters.
        model: the compressed model.

    Returns:
        Those of every content parameter whose past is known: of factors by the chain rule, of all
        others as they were.
    """
    first, second = dict(moments.first), dict(moments.second)
    for path, layer in nnx.iter_modules(model):
        # In a layer over several axes the structured one is a part.
        whole = path[:-1] if isinstance(_parent(model, path), GeneralLinear) else path
        kernel = (*whole, "kernel")
        if isinstance(layer, StructuredLinear) and kernel in first:
            shape = layer.in_features, layer.out_features
            both = first.pop(kernel).reshape(shape), second.pop(kernel).reshape(shape)
            for known, found in zip((first, second), _factor_moments(layer, *both), strict=True):
                known.update({(*path, name): moment for name, moment in found.items()})
                if whole != path and (*whole, "bias") in known:
                    known[*path, "bias"] = known.pop((*whole, "bias")).reshape(-1)
    return Moments(moments.updates, first, second)


def estimate_moments(model: nnx.Module, moments: Moments, task: Task, batches: int) -> Moments:
    """The moments of a model that was made dense: those of its kernels come from a few batches.

    What the optimizer does to gradients before Adam sees them, such as clipping, shows in the
    moments that are known: those that are estimated are scaled likewise.

    Args:
        model: the dense model.
        moments: of the structured model that it was made of; other parameters keep theirs.
        task: gives the loss.
        batches: training batches from which the kernels' moments are estimated, at least 1.
    """
    graphdef, params, other = split_model(model)

    @jax.jit
    def gradients(params: Any, batch: Any, key: Array) -> Any:
        def loss(params: Any, batch: Any, key: Array) -> tuple[Array, Any]:
            return task.loss(nnx.merge(graphdef, params, other), batch, key)

        parts = task.config.train.accumulate
        of_part = partial(jax.grad(loss, has_aux=True), params)
        return mean_over_parts(lambda *part: of_part(*part)[0], batch, key, parts)

    first, second = (dict.fromkeys(_by_path(params), jnp.float32(0)) for _ in range(2))
    for number, batch in enumerate(first_batches(task.train_batches(), batches)):
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        for path, slope in _by_path(gradients(params, arrays, jax.random.key(number))).items():
            first[path] += slope / batches
            second[path] += slope**2 / batches
    options = task.config.optimizer
    # Adam's running means begin at zero, and it knows how short their past is.
    weights = [1 - decay**moments.updates for decay in (options.b1, options.b2)]
    known = [path for path in moments.second if path in second]
    squares = weights[1] * sum((second[path].sum() for path in known), jnp.float32(0))
    past = sum((moments.second[path].sum() for path in known), jnp.float32(0))
    power = jnp.where(squares > 0, past / squares, 1.0)
    for found, before, scale in (
        (first, moments.first, weights[0] * jnp.sqrt(power)),
        (second, moments.second, weights[1] * power),
    ):
        for path, moment in found.items():
            found[path] = before[path] if path in known else moment * scale
    return Moments(moments.updates, first, second)


def with_moments(opt_state: Any, moments: Moments) -> Any:
    """A fresh optimizer state that starts from given moments instead of zeros.

    Groups none of whose parameters has a past stay as they are; in the others, parameters without
    one keep zeros.
    """

    def fill(state: Any) -> Any:
        if not _is_adam(state) or not _by_path(state.mu).keys() & moments.first.keys():
            return state

        def filled(fresh: Any, known: Mapping[Path, Array]) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, x: known.get(names(path), x).astype(x.dtype), fresh
            )

        return state._replace(
            count=jnp.copy(moments.updates),  # groups must not share a buffer that is donated
            mu=filled(state.mu, moments.first),
            nu=filled(state.nu, moments.second),
        )

    return jax.tree.map(fill, opt_state, is_leaf=_is_adam)


def _parent(model: nnx.Module, path: Path) -> Any:
    return dict(nnx.iter_modules(model)).get(path[:-1]) if path else None


def _factor_moments(
    layer: StructuredLinear, first: Float[Array, "in out"], second: Float[Array, "in out"]
) -> list[dict[str, Array]]:
    """Both moments of a layer's factors by name, from those of its kernel.

    Each entry of the kernel is a sum of products of factors, so that its derivative by one of them
    is a product of the others, whose power is that product of the others' powers.
    """
    content = tuple(
        name
        for name, variable in vars(layer).items()
        if isinstance(variable, nnx.Param)
        and not isinstance(variable, Structural)
        and name != "bias"
    )
    return _carried(content, *split_model(layer), first, second)


# Blocks differ in number from layer to layer: one program each, instead of one an operation.
@partial(jax.jit, static_argnums=(0, 1))
def _carried(
    content: tuple[str, ...], graphdef: Any, params: Any, other: Any, *moments: Array
) -> list[dict[str, Array]]:
    def kernel(factors: dict[str, Array]) -> Array:
        return nnx.merge(graphdef, params | factors, other).kernel()

    found = []
    for power, moment in enumerate(moments, 1):
        factors = {name: params[name].astype(jnp.float32) ** power for name in content}
        found.extend(jax.vjp(kernel, factors)[1](moment.astype(jnp.float32)))
    return found


def _is_adam(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)


def _by_path(tree: Any) -> dict[Path, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {names(path): leaf for path, leaf in leaves}
