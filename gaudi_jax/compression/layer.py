"""One dense layer on its way to a structured one."""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gaudi_jax.compression.allocation import Curve, gains
from gaudi_jax.compression.calibration import Moments
from gaudi_jax.compression.rules import Choice
from gaudi_jax.compression.surgery import features, fill, install, matrix_shape, structure
from gaudi_jax.decomposition import Factors, decompose, relative_error, spread, svd_factors
from gaudi_jax.layers.factory import GRID_LAYERS

#: An entry of the plan, and the values of the layer that it describes.
Solution = tuple[dict[str, Any], dict[str, Any]]
#: The same, and the kernel that the layer has.
Candidate = tuple[dict[str, Any], dict[str, Any], Array]


class Layer:
    """A dense layer that is to be replaced.

    Args:
        module: the layer, in the model that it will be replaced in.
        choice: what it becomes.
        moments: those of its inputs; None for the error of the kernel.
    """

    def __init__(self, module: Any, choice: Choice, moments: Moments | None):
        self.module, self.choice = module, choice
        self.shape = matrix_shape(module)
        self._moments = moments

    def problem(self) -> tuple[Float[Array, "in out"], Float[Array, "in in"] | None]:
        """Its kernel, and the second moment of its inputs where that is known."""
        return self._kernel(), self._second_moment()

    def _kernel(self) -> Float[Array, "in out"]:
        # On one device, whatever the sharding: the search is no distributed computation.
        kernel = jax.device_get(self.module.kernel.get_value())
        return jnp.asarray(kernel, jnp.float32).reshape(self.shape)

    def _second_moment(self) -> Float[Array, "in in"] | None:
        if self._moments is None:
            return None
        return self._moments.raw() if self.module.bias is None else self._moments.centred()

    def curve(self, uniform: int, floor: int) -> Curve:
        """How the error falls with the cost, and the costs that the layer may get.

        Args:
            uniform: multiplications that the layer would get if all got the same fraction.
            floor: those that it gets at least; at least what it can be made with.
        """
        n, m = self.shape
        shares, step = np.asarray(gains(self._kernel(), self._second_moment())), n + m
        if self.choice.method in GRID_LAYERS:
            step = GRID_LAYERS[self.choice.method].step(n, m, cast(int, self.choice.blocks))
            several = max(step // (n + m), 1)  # components of the SVD for which one step pays
            shares = np.add.reduceat(shares, np.arange(0, len(shares), several))
        whole = self.choice.method not in ("gaudi", "spread", "best")
        if whole:  # the floor buys whole components: they are one to `share_out`
            more, rest = divmod(floor - self.choice.least(self.shape), step)
            shares, floor = np.append(shares[: 1 + more].sum(), shares[1 + more :]), floor - rest
        return Curve(shares, step, floor, cap=max(n * m, uniform), whole=whole)

    @jax.default_matmul_precision("highest")
    def solve(self, cost: int, found: Factors | None) -> Solution:
        """Finds the values of a structured layer, and lets go of the moments.

        Args:
            cost: multiplications that it may cost.
            found: what `search_blocks` or `spread_blocks` has found for it.
        """
        kernel, moment = self.problem()
        candidates = []
        if self.choice.method in GRID_LAYERS:
            candidates.append(self._on_grid(kernel, moment, cost))
        if found is not None:
            candidates.append(self._gaudi(found))
        affordable = cost >= min(sum(self.shape), math.prod(self.shape))
        if self.choice.method in ("low_rank", "best") and affordable:
            candidates.append(self._low_rank(kernel, moment, cost))
        measured = []
        for entry, values, approximation in candidates:
            errors = [relative_error(kernel, approximation, c) for c in (None, moment)]
            entry["error"] = float(errors[0])
            entry["activation_error"] = None if moment is None else float(errors[1])
            measured.append((float(errors[1]), entry, values, approximation))
        _, entry, values, approximation = min(measured, key=lambda item: item[0])
        if self.module.bias is not None:
            bias = self.module.bias.get_value()
            values["bias"] = jnp.asarray(jax.device_get(bias)).reshape(-1)
            if self._moments is not None:
                missed = self._moments.mean @ (kernel - approximation)
                values["bias"] = values["bias"].astype(jnp.float32) + missed
        self._moments = None
        return entry, values

    def replace(self, solution: Solution) -> None:
        """Puts the structured layer in the place of the dense one."""
        entry, values = solution
        layer = structure(self.module, entry)
        fill(layer, values, self.module)
        install(layer, self.module)

    def _gaudi(self, found: Factors) -> Candidate:
        multiplications = int(found.multiplications())
        # On the host, where a new number of blocks compiles nothing.
        v, u, widths, locations = jax.device_get(found)
        blocks = max(1, int((widths > 0).all(axis=0).sum()))
        used = Factors(v[:blocks], u[:blocks], widths[:, :blocks], locations[:, :blocks])
        values = {name: self._rounded(name, value) for name, value in used._asdict().items()}
        rank, granularity = self.choice.rank, self.choice.granularity
        entry = self._entry("gaudi", rank, multiplications, blocks, list(granularity))
        values["sigma"] = np.array(math.inf, np.float32)
        return entry, values, _product(values["v"], values["u"])

    def _low_rank(self, kernel, moment, cost) -> Candidate:
        n, m = self.shape
        rank = min(n, m) if cost >= n * m else min(n, m, cost // (n + m))
        v, u = jax.device_get(svd_factors(kernel, rank, second_moment=moment))
        entry = self._entry("low_rank", rank, min(rank * (n + m), n * m), None, None)
        values = {"v": self._rounded("v", v), "u": self._rounded("u", u)}
        return entry, values, _product(values["v"], values["u"])

    def _on_grid(self, kernel, moment, cost) -> Candidate:
        method, blocks = self.choice.method, cast(int, self.choice.blocks)
        options = GRID_LAYERS[method].affordable(*self.shape, blocks, cost)
        entry = self._entry(method, options["rank"], 0, blocks, None)
        if "diagonals" in options:
            entry["diagonals"] = options["diagonals"]
        layer = structure(self.module, entry)
        entry["multiplications"] = int(layer.multiplications())
        layer.set_kernel(kernel, moment)  # rounds to the dtype that the parameters have
        parts = {
            name: variable
            for name, variable in vars(layer).items()
            if isinstance(variable, nnx.Param) and name != "bias"
        }
        values = {name: jax.device_get(part.get_value()) for name, part in parts.items()}
        for part in parts.values():
            part.set_value(part.get_value().astype(jnp.float32))
        return entry, values, layer.kernel()

    def _rounded(self, name: str, value: np.ndarray) -> np.ndarray:
        """Factors in the dtype that they will have: their rounding is part of the error."""
        return value.astype(self.module.kernel.dtype) if name in ("v", "u") else value

    def _entry(self, method, rank, multiplications, blocks, granularity) -> dict[str, Any]:
        several = isinstance(self.module, nnx.LinearGeneral)
        n_in, n_out = (list(size) if several else size[0] for size in features(self.module))
        return {
            "method": method,
            "in_features": n_in,
            "out_features": n_out,
            "rank": rank,
            "num_blocks": blocks,
            "granularity": granularity,
            "use_bias": self.module.bias is not None,
            "error": None,
            "activation_error": None,
            "multiplications": multiplications,
            "dense_multiplications": math.prod(self.shape),
        }


@jax.default_matmul_precision("highest")
def search_blocks(
    layers: Sequence[Layer], costs: Sequence[int], rounds: int, key: Array | None
) -> list[Factors]:
    """Searches the blocks of layers of one shape that become the same, in one program.

    Args:
        layers: the layers.
        costs: multiplications that each may cost.
        rounds: effort of the searches.
        key: their random key.
    """
    budgets = np.array([_fraction(*pair) for pair in zip(costs, layers, strict=True)])
    kernels, moments = zip(*(layer.problem() for layer in layers), strict=True)
    rank, granularity = layers[0].choice.rank, layers[0].choice.granularity
    search = functools.partial(
        decompose, rank=rank, granularity=granularity, rounds=rounds, key=key
    )
    if len(layers) == 1:
        return [search(kernels[0], budgets[0], second_moment=moments[0])]
    moment = None if moments[0] is None else jnp.stack(moments)
    found = search(jnp.stack(kernels), budgets, second_moment=moment)
    return [Factors(*parts) for parts in zip(*found, strict=True)]


def spread_blocks(layer: Layer, cost: int, rounds: int) -> Factors:
    """Blocks of one size, evenly spread, for a layer.

    Args:
        layer: the layer.
        cost: multiplications that it may cost.
        rounds: effort of the fit.
    """
    kernel, moment = layer.problem()
    choice = layer.choice
    return spread(
        kernel,
        _fraction(cost, layer),
        rank=choice.rank,
        granularity=choice.granularity,
        parts=choice.blocks,
        second_moment=moment,
        sweeps=3 * rounds,
    )


def _fraction(cost: int, layer: Layer) -> float:
    # Half a multiplication more, lest rounding loses a whole one.
    return (cost + 0.5) / math.prod(layer.shape)


def _product(v: np.ndarray, u: np.ndarray) -> Array:
    """The kernel of factors (..., in) and (..., out) in float32."""
    v, u = (x.astype(np.float32).reshape(-1, x.shape[-1]) for x in (v, u))
    return jnp.asarray(v.T @ u)
