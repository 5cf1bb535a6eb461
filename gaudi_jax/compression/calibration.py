"""Second moments of the layers' inputs, accumulated over batches of real data."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from tqdm import tqdm

from gaudi_jax.compression.surgery import features, find_dense, matrix_shape
from gaudi_jax.errors import UserError


class Moments(NamedTuple):
    """Mean and centred second moment of vectors, in float32.

    Attributes:
        vectors: their number.
        mean: E[x], shape (n,).
        scatter: sum of (x - mean)(x - mean)ᵀ, shape (n, n).
    """

    vectors: Float[Array, ""]
    mean: Float[Array, " n"]
    scatter: Float[Array, "n n"]

    @classmethod
    def empty(cls, n: int) -> "Moments":
        """Of no vectors of n features."""
        return cls(jnp.zeros(()), jnp.zeros(n), jnp.zeros((n, n)))

    def add(self, x: Float[Array, "tokens n"]) -> "Moments":
        """With more vectors.

        Merging centred sums (Chan, Golub & LeVeque, 1983) keeps the digits that E[xxᵀ] − E[x]E[x]ᵀ
        would cancel where the mean is large.

        Example:
            >>> import jax.numpy as jnp
            >>> from gaudi_jax.compression.calibration import Moments
            >>> moments = Moments.empty(1).add(jnp.array([[1.0], [3.0]])).add(jnp.array([[2.0]]))
            >>> moments.mean, moments.scatter
            (Array([2.], dtype=float32), Array([[2.]], dtype=float32))
        """
        x = x.astype(jnp.float32)
        if not x.size:
            return self
        new = x.mean(axis=0)
        centred = x - new
        share = x.shape[0] / (self.vectors + x.shape[0])
        step = new - self.mean
        between = share * self.vectors * jnp.outer(step, step)
        # Accelerators would multiply in fewer bits.
        within = jnp.matmul(centred.T, centred, precision="highest")
        return Moments(
            self.vectors + x.shape[0], self.mean + share * step, self.scatter + within + between
        )

    def centred(self) -> Float[Array, "n n"]:
        """E[(x - E[x])(x - E[x])ᵀ], shape (n, n)."""
        return self.scatter / self.vectors

    def raw(self) -> Float[Array, "n n"]:
        """E[x xᵀ], shape (n, n)."""
        return self.centred() + jnp.outer(self.mean, self.mean)


def calibrate(
    model: nnx.Module, paths: Iterable[str], batches: Iterable[Any], *, progress: bool = False
) -> dict[str, Moments]:
    """Runs a model on batches and gathers the moments of what its dense layers are applied to.

    Args:
        model: the model; it is left as it was, and run in evaluation mode.
        paths: paths of dense layers, as `find_dense` gives them.
        batches: read once. An array is the model's argument, the items of a tuple or list are its
            arguments, those of a mapping its keyword arguments.
        progress: show a bar on stderr.

    Returns:
        The moments by path, on the host.

    Raises:
        UserError: there are no batches, the model cannot be run on one, its layers' inputs are not
            finite, or a layer is never called.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax.compression.calibration import calibrate
        >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> calibrate(model, ["layers/0"], [jnp.ones((5, 3))])["layers/0"].mean
        array([1., 1., 1.], dtype=float32)
    """
    model = nnx.clone(model)
    model.eval()
    dense, _ = find_dense(model)
    layers = {path: dense[path] for path in paths}
    for module in layers.values():
        # On the clone, as in `install`: the layer is the same to every holder of it.
        object.__setattr__(module, "__class__", _RECORDING[type(module)])
        module.moments = _Recorded(Moments.empty(matrix_shape(module)[0]))
    graphdef, moments, rest = cast(Any, nnx.split(model, _Recorded, ...))

    # Flags such as deterministic=True are the model's Python, and no arrays.
    @partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
    def step(moments, rest, arrays, treedef, flags):
        leaves = [
            array if flag is None else flag[0] for array, flag in zip(arrays, flags, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        model = nnx.merge(graphdef, moments, rest)
        model(*args, **kwargs)
        return nnx.state(model, _Recorded)

    empty = True
    for batch in tqdm(_iterable(batches), desc="calibrate", unit="batch", disable=not progress):
        empty = False
        leaves, treedef = jax.tree.flatten(_arguments(batch))
        flags = tuple(None if hasattr(leaf, "shape") else (leaf,) for leaf in leaves)
        arrays = [leaf if flag is None else 0 for leaf, flag in zip(leaves, flags, strict=True)]
        try:
            moments = step(moments, rest, arrays, treedef, flags)
        except Exception as error:  # A model's own code may raise anything.
            shapes = [getattr(leaf, "shape", leaf) for leaf in leaves]
            raise UserError(
                f"{type(model).__name__} cannot be run on a calibration batch of shapes "
                f"{', '.join(map(str, shapes))}: {str(error).strip().splitlines()[0]}"
            ) from error
    if empty:
        raise UserError("calibration has no batches; give at least one (a generator is read once)")
    nnx.update(model, moments)
    # On the host: all layers' moments together may be as large as the model.
    result = {path: jax.device_get(layer.moments.get_value()) for path, layer in layers.items()}
    _check(result)
    return result


class _Recorded(nnx.Variable):
    """Moments of a layer's inputs."""


class _Recording(nnx.Module):
    """What is mixed into a dense layer while its inputs are recorded."""

    moments: _Recorded

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:
        n_in, _ = features(self)
        axes = sorted(axis % inputs.ndim for axis in getattr(self, "axis", (-1,)))
        x = jnp.moveaxis(_gathered(inputs), axes, range(-len(n_in), 0))
        self.moments.set_value(self.moments.get_value().add(x.reshape(-1, matrix_shape(self)[0])))
        return super().__call__(inputs, *args, **kwargs)


class _RecordingLinear(_Recording, nnx.Linear):
    pass


class _RecordingGeneral(_Recording, nnx.LinearGeneral):
    pass


_RECORDING: dict[type, type] = {
    nnx.Linear: _RecordingLinear,
    nnx.LinearGeneral: _RecordingGeneral,
}


def _iterable(batches: Any) -> Iterable[Any]:
    if not isinstance(batches, Iterable):
        raise UserError(
            f"calibration={batches!r} must hold batches of the model's inputs; give a list"
        )
    return batches


def _gathered(x: Array) -> Array:
    """Whole on every device, where shardings are part of the types: x xᵀ would have none."""
    mesh = jax.typeof(x).sharding.mesh
    if not mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, tuple | list) else ((batch,), {})


def _check(moments: Mapping[str, Moments]) -> None:
    never = [path for path, moment in moments.items() if not moment.vectors]
    if never:
        raise UserError(
            f"calibration never called {len(never)} layers ({', '.join(never[:3])}); give them a "
            "rule with method='skip', or batches that reach them"
        )
    broken = [path for path, x in moments.items() if not jnp.isfinite(x.scatter).all()]
    if broken:
        raise UserError(
            f"calibration gave layer {broken[0]!r} inputs that are NaN or infinite; mend the "
            "batches or the model"
        )
