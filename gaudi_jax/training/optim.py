"""The optimizer: AdamW on what blocks hold, proximal Adam on where they lie."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gaudi_jax.errors import UserError
from gaudi_jax.layers import GaudiLinear, Location, Structural, StructuredLinear, Width
from gaudi_jax.training.controllers import (
    Controller,
    LayerSize,
    LayerSizes,
    clip_widths,
    names,
    wrap_locations,
)

#: Widths below this fraction of an axis count as this: steps of single features are bounded.
NARROWEST = 1 / 128

#: Modules whose matrices are weight-decayed; embeddings, norms, tokens and biases are not.
DECAYED_MODULES = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, StructuredLinear)


def gaudi_adamw(
    model: nnx.Module,
    *,
    learning_rate: optax.ScalarOrSchedule,
    structural_learning_rate: optax.ScalarOrSchedule,
    location_learning_rate: optax.ScalarOrSchedule | None = None,
    factor_scale: float = 1.0,
    scale_by_width: bool = False,
    weight_decay: float = 0.05,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float | None = None,
    layer_moment: bool = False,
    controller: Controller | None = None,
) -> optax.GradientTransformation:
    """AdamW on the content parameters, Adam with b1 = 0 and a width controller on the structure.

    One optax transformation over ``nnx.state(model, nnx.Param)``. Parameters are told apart by
    their types: kernels and factors (decayed), other content (not decayed), widths, locations.
    Widths end in [0, 1] where the controller wants them, locations wrap modulo 1.

    Args:
        model: the model whose parameters are optimized: it supplies the labels and the layer sizes
            that price a width.
        learning_rate: of the content, a number or a schedule.
        structural_learning_rate: of the widths, a number or a schedule.
        location_learning_rate: of the locations; None takes that of the widths.
        factor_scale: learning rate of the factors of structured layers, over that of other content.
            For those that come from a dense kernel 1 or 2 are best where the learning rate suits
            dense layers, up to 4 where it is lower.
        scale_by_width: let the factors of narrow Gaudi blocks learn faster (`scale_narrow_blocks`).
        weight_decay: decoupled decay of kernels and factors.
        b1: decay of the content's first moment.
        b2: decay of the content's second moment. The structure's are 0 and 0.999.
        eps: added to the root of the second moments.
        clip_norm: bound of the whole gradient's norm before anything else; None for no bound.
        layer_moment: average the widths' second moment over each layer instead of one per width.
        controller: what bounds the widths (`gaudi_jax.training.controllers`); None only keeps
            them in [0, 1].

    Returns:
        An optax transformation whose update needs `params`.

    Raises:
        UserError: a number is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear, gaudi_adamw
        >>> from gaudi_jax.training.controllers import budget_controller
        >>> model = GaudiLinear(16, 16, rngs=nnx.Rngs(0))
        >>> tx = gaudi_adamw(model, learning_rate=1e-3, structural_learning_rate=1e-3,
        ...                  controller=budget_controller(0.25))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> grads = nnx.grad(lambda m: (m(jnp.ones((2, 16))) ** 2).sum())(model)
        >>> _ = optimizer.update(model, grads)
        >>> bool(model.multiplications() <= 0.25 * 16 * 16)
        True
    """
    if clip_norm is not None and not clip_norm > 0:
        raise UserError(f"clip_norm={clip_norm} must be positive; use None for no clipping")
    for name, value in {"b1": b1, "b2": b2}.items():
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} is outside [0, 1)")
    not_negative = {
        "learning_rate": learning_rate,
        "structural_learning_rate": structural_learning_rate,
        "location_learning_rate": location_learning_rate,
        "weight_decay": weight_decay,
        "eps": eps,
        "factor_scale": factor_scale,
    }
    for name, number in not_negative.items():
        if isinstance(number, int | float) and number < 0:
            raise UserError(f"{name}={number} must not be negative")
    if location_learning_rate is None:
        location_learning_rate = structural_learning_rate
    second_moment = scale_by_layer_moment if layer_moment else _scale_by_second_moment
    content = {"b1": b1, "b2": b2, "eps": eps}
    groups = optax.partition(
        {
            "decayed": optax.adamw(learning_rate, weight_decay=weight_decay, **content),
            "factor": optax.adamw(
                _scaled(learning_rate, factor_scale), weight_decay=weight_decay, **content
            ),
            "content": optax.adam(learning_rate, **content),
            "width": optax.chain(
                second_moment(eps=eps),
                optax.scale_by_learning_rate(structural_learning_rate),
                (controller or clip_widths)(layer_sizes(model)),
            ),
            "location": optax.chain(
                _scale_by_second_moment(eps=eps),
                optax.scale_by_learning_rate(location_learning_rate),
                wrap_locations(),
            ),
        },
        _Labels(model),
    )
    steps = [groups]
    if clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    if scale_by_width:
        steps.append(scale_narrow_blocks(layer_sizes(model)))
    # A chain of one would have another state than the runs that are saved.
    return optax.chain(*steps) if len(steps) > 1 else groups


def layer_sizes(model: nnx.Module) -> LayerSizes:
    """Sizes of the model's Gaudi layers by their paths.

    Example:
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> from gaudi_jax.training.optim import layer_sizes
        >>> layer_sizes(GaudiLinear(8, 4, rngs=nnx.Rngs(0)))
        {(): LayerSize(rank=1, features=(8, 4), granularity=(1, 1))}

    Raises:
        UserError: a Gaudi layer's parameters are stacked (by `nnx.vmap` or `nnx.scan`).
    """
    sizes = {}
    for path, module in nnx.iter_modules(model):
        if not isinstance(module, GaudiLinear):
            continue
        if module.widths.ndim != 2:
            raise UserError(
                f"GaudiLinear {'/'.join(map(str, path))} has stacked widths of shape "
                f"{module.widths.shape}; the optimizer needs the layers one by one, in an nnx.List"
            )
        features = (module.in_features, module.out_features)
        sizes[path] = LayerSize(module.rank, features, module.granularity)
    return sizes


def _scaled(learning_rate: optax.ScalarOrSchedule, scale: float) -> optax.ScalarOrSchedule:
    if callable(learning_rate):
        return lambda step: scale * learning_rate(step)
    return scale * learning_rate


class LayerMomentState(NamedTuple):
    """Steps made, and the running mean of the squared gradient of each array."""

    step: jax.Array
    moment: Any


def scale_by_layer_moment(decay: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Divides by the root of the squared gradient averaged over the array and over time.

    Adam with b1 = 0, but with one second moment per array: the gradients of a layer's widths keep
    their proportions, so that widths that hardly matter do not move as fast as those that do.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.training.optim import scale_by_layer_moment
        >>> tx = scale_by_layer_moment()
        >>> g = jnp.array([3.0, 4.0])
        >>> [round(float(u), 2) for u in tx.update(g, tx.init(g))[0]]
        [0.85, 1.13]
    """

    def init(params):
        moment = jax.tree.map(lambda _: jnp.zeros([], jnp.float32), params)
        return LayerMomentState(jnp.zeros([], jnp.int32), moment)

    def update(updates, state, params=None):
        step = optax.safe_increment(state.step)
        moment = jax.tree.map(
            lambda g, m: decay * m + (1 - decay) * jnp.mean(jnp.square(g)), updates, state.moment
        )
        correction = 1 - decay**step
        updates = jax.tree.map(lambda g, m: g / (jnp.sqrt(m / correction) + eps), updates, moment)
        return updates, LayerMomentState(step, moment)

    return optax.GradientTransformation(init, update)


def scale_narrow_blocks(layers: LayerSizes) -> optax.GradientTransformation:
    """Multiplies the updates of Gaudi blocks' factors by the root of one over their widths.

    Adam changes all entries of a factor by about as much. What that adds to the kernel has a
    largest singular value that grows with the root of the number of entries, so that narrow blocks
    bear, and want, a higher learning rate. Input factors go by the width on the input axis, output
    factors by that on the output axis; widths below 1/128 count as that.

    Args:
        layers: sizes of the Gaudi layers by their paths (`layer_sizes`).

    Returns:
        An optax transformation whose update needs `params`. It stands last, so that decoupled
        weight decay is scaled as well.

    Raises:
        UserError: the widths of a layer are not among the parameters.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import GaudiLinear
        >>> from gaudi_jax.training.optim import layer_sizes, scale_narrow_blocks
        >>> model = GaudiLinear(16, 16, rngs=nnx.Rngs(0))
        >>> model.widths[...] = jnp.full((2, 16), 0.25)
        >>> params = nnx.state(model, nnx.Param)
        >>> tx = scale_narrow_blocks(layer_sizes(model))
        >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        >>> float(updates["u"][0, 0, 0]), float(updates["bias"][0])
        (2.0, 1.0)
    """
    axes = {"v": 0, "u": 1}

    def update(updates, state, params=None):
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        widths = {names(path)[:-1]: w for path, w in leaves if names(path)[-1] == "widths"}
        if missing := layers.keys() - widths.keys():
            layer = "/".join(map(str, min(missing, key=str)))
            raise UserError(
                f"scale_by_width needs the widths of layer {layer} among the optimized parameters; "
                "optimize all of them, with a structural learning rate of 0 where they should stay"
            )

        def scaled(path, leaf):
            *layer, name = names(path)
            if tuple(layer) not in layers or name not in axes:
                return leaf
            width = jnp.clip(widths[tuple(layer)][axes[name]], NARROWEST, 1.0)
            return leaf * jax.lax.rsqrt(width)[:, None, None].astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _scale_by_second_moment(eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.0, b2=0.999, eps=eps)


class _Labels:
    """Labels parameters by the types of their Variables, whatever container they come in."""

    def __init__(self, model: nnx.Module):
        self._labels: dict[tuple, str] = {}
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            self._labels[path] = _label(_at(model, path[:-1]), path[-1], variable)

    def __call__(self, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(self._label_of, params)

    def _label_of(self, path: tuple, _: Any) -> str:
        if names(path) not in self._labels:
            known = ", ".join("/".join(map(str, p)) for p in list(self._labels)[:3])
            raise UserError(
                f"parameter {'/'.join(map(str, names(path)))} is not one of the model's that the "
                f"optimizer was made for ({known}, ...); make the optimizer for this model"
            )
        return self._labels[names(path)]


def _at(node: Any, path: tuple) -> Any:
    """What lies at a path of attributes and of items of lists and dicts."""
    for key in path:
        node = getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]
    return node


def _label(module: Any, name: Any, variable: nnx.Param) -> str:
    if isinstance(variable, Width):
        return "width"
    if isinstance(variable, Location):
        return "location"
    if isinstance(variable, Structural):
        raise UserError(f"no rule optimizes structural parameters of {type(variable).__name__}")
    if not isinstance(module, DECAYED_MODULES) or name == "bias":
        return "content"
    # Blocks that are no product of factors are kernels.
    return "factor" if isinstance(module, StructuredLinear) and name != "sparse" else "decayed"
