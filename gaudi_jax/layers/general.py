"""A structured layer over several axes: what takes the place of `flax.nnx.LinearGeneral`."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from gaudi_jax.errors import UserError
from gaudi_jax.layers.base import StructuredLinear


class GeneralLinear(nnx.Module):
    """Reshapes around a structured layer, as `flax.nnx.LinearGeneral` does around its kernel.

    The axes of the input that are contracted become one, the layer maps it, and its output is given
    the shape of the output features. Unlike `LinearGeneral` it has no batch axes.

    Args:
        linear: layer from prod(in_features) to prod(out_features).
        in_features: sizes of the axes that are contracted.
        out_features: sizes of the last axes of the output.
        axis: the axes of the input that are contracted, in any order: as in `LinearGeneral` the
            sizes belong to them in ascending order.

    Raises:
        UserError: the layer has other sizes, or there is not one axis for each of in_features.

    Example:
        Projects to 2 heads of 3 features each:

        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax import LowRankLinear
        >>> from gaudi_jax.layers import GeneralLinear
        >>> linear = LowRankLinear(4, 6, rank=2, rngs=nnx.Rngs(0))
        >>> GeneralLinear(linear, in_features=(4,), out_features=(2, 3))(jnp.ones((5, 7, 4))).shape
        (5, 7, 2, 3)
    """

    def __init__(
        self,
        linear: StructuredLinear,
        in_features: Sequence[int],
        out_features: Sequence[int],
        axis: Sequence[int] = (-1,),
    ):
        self.linear = linear
        self.in_features = tuple(in_features)
        self.out_features = tuple(out_features)
        self.axis = tuple(axis)
        sizes = [math.prod(self.in_features), math.prod(self.out_features)]
        if sizes != [linear.in_features, linear.out_features]:
            raise UserError(
                f"features {self.in_features} -> {self.out_features} do not fit a layer of "
                f"{linear.in_features} -> {linear.out_features} features"
            )
        if len(self.axis) != len(self.in_features):
            raise UserError(f"axis={self.axis} must have as many entries as {self.in_features}")

    def __call__(self, inputs: Shaped[Array, "..."], out_sharding: Any = None) -> Array:
        """Applies the layer.

        Args:
            inputs: array whose axes `axis` have the sizes in_features.
            out_sharding: sharding of the output, as in `flax.nnx.LinearGeneral`.

        Returns:
            The other axes of the input in their order, then out_features.

        Raises:
            UserError: the axes have other sizes.
        """
        axes = sorted(axis % inputs.ndim for axis in self.axis)
        if tuple(inputs.shape[axis] for axis in axes) != self.in_features:
            raise UserError(
                f"axes {tuple(axes)} of an input of shape {inputs.shape} do not have the layer's "
                f"in_features={self.in_features}"
            )
        x = jnp.moveaxis(inputs, axes, range(-len(axes), 0))
        batch = x.shape[: x.ndim - len(axes)]
        y = self.linear(x.reshape(*batch, -1), self._flat_sharding(out_sharding))
        return jnp.reshape(y, (*batch, *self.out_features), out_sharding=out_sharding)

    def _flat_sharding(self, sharding: Any) -> Any:
        """The sharding of the output before its last axis is split: that of the first part."""
        if sharding is None:
            return None
        spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
        flat = PartitionSpec(*spec[: len(spec) - len(self.out_features) + 1])
        return NamedSharding(sharding.mesh, flat) if isinstance(sharding, NamedSharding) else flat
