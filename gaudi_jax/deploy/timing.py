"""Times of things that are compared: measured in turn, warm, as medians."""

import statistics
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

#: Bytes of copies in turn of which a call finds little in the caches of a CPU, and the most copies.
OUT_OF_CACHE, MOST_COPIES = 1 << 26, 16


def copies_out_of_cache(size: int) -> int:
    """How many copies of a layer are to be called in turn for its weights to come from memory.

    One vector at a time takes as long as its weights take to come, which is from memory in a large
    model. The layers of a model that a cache may hold are small, and so are these copies of them.

    Args:
        size: bytes of the dense kernel.

    Returns:
        At least 2 on CPUs, as each form is called twice in a row; 1 on other devices.

    Example:
        >>> from gaudi_jax.deploy.timing import copies_out_of_cache
        >>> copies_out_of_cache(768 * 3072 * 4)  # on a CPU
        7
    """
    if jax.default_backend() != "cpu":
        return 1
    return min(MOST_COPIES, max(2, OUT_OF_CACHE // size))


class Running:
    """A model compiled for one input; called, it computes its output.

    Args:
        model: the model.
        inputs: its arguments.
        times: how often it is applied, one application after the other, so that what it takes to
            start a program weighs nothing.
        copies: of its arrays, taken in turn by one call after the other: with more than caches
            hold, each call reads its arrays from memory, as a layer of a large model does.

    Attributes:
        parameter_bytes: of all its arrays.
        peak_bytes: of its arrays, inputs, outputs and what is between them; None where the compiler
            does not tell.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from gaudi_jax.deploy.timing import Running
        >>> running = Running(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.ones((3, 4)))
        >>> running().shape, running.parameter_bytes
        ((3, 2), 40)
    """

    def __init__(self, model: nnx.Module, *inputs: Array, times: int = 1, copies: int = 1):
        graphdef, state = nnx.split(model)
        self._inputs = inputs
        self._states = cycle([state, *(jax.tree.map(jnp.copy, state) for _ in range(copies - 1))])

        def apply(state, *inputs):
            model, token = nnx.merge(graphdef, state), jnp.float32(0)
            if times == 1:
                return model(*inputs), token

            def again(_, token):
                return ordered(model, inputs, token)[1]

            return ordered(model, inputs, jax.lax.fori_loop(0, times - 1, again, token))

        self._run = jax.jit(apply).lower(state, *inputs).compile()
        self.parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self.peak_bytes = None
        if memory := self._run.memory_analysis():
            kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
            self.peak_bytes = kept + memory.temp_size_in_bytes - memory.alias_size_in_bytes

    def __call__(self) -> Array:
        """The model's output."""
        return self._run(next(self._states), *self._inputs)[0]


def ordered(
    function: Callable[..., Array], inputs: tuple[Array, ...], token: Array
) -> tuple[Array, Array]:
    """The output of a function that runs after what made the token, and the next token.

    To a compiler the inputs are new ones, and all of the output is needed: it can neither leave out
    one of several runs nor put two together.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.deploy.timing import ordered
        >>> ordered(jnp.sin, (jnp.zeros(1),), jnp.float32(0))
        (Array([0.], dtype=float32), Array(0., dtype=float32))
    """
    inputs, token = jax.lax.optimization_barrier((inputs, token))
    output = jax.lax.optimization_barrier(function(*inputs))
    return output, token + 0 * output[(0,) * output.ndim].astype(jnp.float32)


def interleaved_medians(
    functions: Mapping[Any, Callable[[], object]], repeats: int
) -> dict[Any, float]:
    """Median seconds of each function, called in turn; the first two rounds warm up.

    Each is called twice in a row, and the second time counts: the first finds caches, and threads
    on the cores, as another function has left them.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.deploy.timing import interleaved_medians
        >>> seconds = interleaved_medians({"sum": lambda: jnp.ones(8).sum()}, repeats=3)
        >>> seconds["sum"] > 0
        True
    """
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for round_ in range(repeats + 2):
        for name, function in functions.items():
            jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
