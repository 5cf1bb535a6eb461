"""The forms in which structured layers are deployed, side by side."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gaudi_jax import LowRankLinear
from gaudi_jax.deploy.machine import MACHINES
from gaudi_jax.deploy.timing import Running, copies_out_of_cache, interleaved_medians
from gaudi_jax.layers import Sigma, Structural

FORMS = ("dense", "packed", "low_rank")


def low_rank_of(kernel: jax.Array, cost: int, tokens: int, **options: Any) -> LowRankLinear:
    """The truncated SVD of a kernel, of a rank that comes to a cost.

    Or the same with columns of zeros, as packed layers have them, where that is faster.
    """
    n, m = kernel.shape
    rank = max(cost // (n + m), 1)
    if jax.default_backend() != "cpu":  # matrix units are slow on other ranks
        rank = max(8 * round(rank / 8), 8)
    layer = LowRankLinear(n, m, rank=rank, rngs=nnx.Rngs(0), **options)
    layer.set_kernel(kernel)
    panel = MACHINES[jax.default_backend()].panel
    if rank % panel == 0:
        return layer
    filled = LowRankLinear(n, m, rank=rank + -rank % panel, rngs=nnx.Rngs(0), **options)
    for one, other in ((layer.v, filled.v), (layer.u, filled.u)):
        other.set_value(jnp.pad(one[...], ((0, -rank % panel), (0, 0))))
    x = jnp.zeros((tokens, n), layer.dtype or jnp.float32)
    copies = copies_out_of_cache(n * m * x.dtype.itemsize)
    forms = {False: Running(layer, x, copies=copies), True: Running(filled, x, copies=copies)}
    seconds = interleaved_medians(forms, 7)
    return filled if seconds[True] < seconds[False] else layer


def in_dtype(model: Any, name: str) -> Any:
    """The model with parameters of a dtype, which computes in it; blocks stay where they are."""
    dtype = jnp.dtype(name)
    graphdef, *states = nnx.split(model, nnx.Any(Structural, Sigma), ...)
    structure, rest = states
    cast = jax.tree.map(lambda x: x.astype(dtype) if _is_real(x) else x, rest)
    result = nnx.merge(graphdef, structure, cast)
    for _, module in nnx.iter_modules(result):
        if hasattr(module, "param_dtype"):
            vars(module).update(dtype=dtype, param_dtype=dtype)
    return result


def _is_real(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def at_once(makers: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """What each makes: compilation, which takes longest, leaves cores idle."""
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(make) for make in makers.values()]
        return dict(zip(makers, [future.result() for future in made], strict=True))
