"""Masks of cyclic intervals: the Gaussian-Dirichlet mask, its table form, and the hard boxcar.

A mask is 1 on the cyclic interval that starts at place ``location * n`` and runs for ``width * n``
places, and 0 elsewhere. Widths and locations are fractions of the axis length ``n``. The
Gaussian-Dirichlet ("Gaudi") mask is built in the frequency domain, where both appear smoothly
(Lee & Kim, "Differentiable Learning of Generalized Structured Matrices for Efficient Deep Neural
Networks", ICLR 2024): for k = 0 ... n/2,

    M_k = w sinc(kw) / sinc(k/n) exp(i pi k (1/n - w) - 2 pi i k l) exp(-k^2 / (2 sigma^2))
    m   = irfft(M, n, norm="forward")

On the grid, where ``w n`` and ``l n`` are integers, the same values and the same gradients are
differences of two tables of length n (see `_table_mask`), which every block shares.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from gaudi_jax.errors import UserError

Method = Literal["auto", "fft", "table"]


def gaudi_mask(
    widths: Float[Array, " B"],
    locations: Float[Array, " B"],
    n: int,
    *,
    sigma: float | Float[Array, ""] = jnp.inf,
    granularity: int = 1,
    round_to_grid: bool = True,
    backward_smoothing: float = 0.0,
    method: Method = "auto",
) -> Float[Array, "B n"]:
    """Differentiable masks of B cyclic intervals on an axis of n places.

    Args:
        widths: lengths of the intervals as fractions of the axis, in [0, 1], shape (B,).
        locations: starts of the intervals as fractions of the axis, shape (B,); cyclic, so 0.25 and
            1.25 are the same place.
        n: number of places of the axis.
        sigma: standard deviation of the Gaussian in the frequency domain, > 0, in cycles per axis;
            may be traced. Small values smooth the mask; infinity gives the exact boxcar on the
            grid.
        granularity: places in a cell of the grid on which widths and locations are rounded; a
            divisor of n.
        round_to_grid: round to the grid with a straight-through gradient. Without it the mask
            follows the unrounded widths and locations (FFT form only).
        backward_smoothing: standard deviation, in grid cells, of a Gaussian applied to the
            derivative of the mask only; the mask itself stays as it is.
        method: "fft" (the definition), "table" (rounded masks only, faster), or "auto": the table
            whenever `round_to_grid` holds.

    Returns:
        Masks in the dtype of `widths`, shape (B, n). The spectrum is computed in float32.

    Raises:
        UserError: shapes differ, `granularity` does not divide `n`, `sigma` or
            `backward_smoothing` is out of range, or the method is unknown or does not apply.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.masks import gaudi_mask
        >>> gaudi_mask(jnp.array([0.5]), jnp.array([0.75]), 4).round(3)
        Array([[1., 0., 0., 1.]], dtype=float32)
    """
    _check_intervals(widths, locations)
    cells = num_cells(n, granularity)
    if isinstance(sigma, int | float) and not sigma > 0:
        raise UserError(f"sigma={sigma} must be positive; use sigma=inf for exact boxcars")
    if backward_smoothing < 0:
        raise UserError(f"backward_smoothing={backward_smoothing} must not be negative; use 0")
    if method not in ("auto", "fft", "table"):
        raise UserError(f"unknown mask method {method!r}; use 'auto', 'fft' or 'table'")
    if method == "table" and not round_to_grid:
        raise UserError("method='table' needs round_to_grid=True; use method='fft' without it")
    smoothing = float(backward_smoothing) * granularity
    dtype = widths.dtype
    widths, locations = widths.astype(jnp.float32), locations.astype(jnp.float32)
    sigma = jnp.asarray(sigma, jnp.float32)
    if method == "fft" or not round_to_grid:
        if round_to_grid:
            widths, locations = _round(widths, cells), _round(locations, cells)
        mask = _fft_mask(widths, locations, n, sigma)
        if smoothing:
            smoothed = _fft_mask(widths, locations, n, sigma, smoothing)
            mask = jax.lax.stop_gradient(mask) + (smoothed - jax.lax.stop_gradient(smoothed))
    else:
        mask = _table_mask(widths, locations, sigma, n, granularity, smoothing)
    return mask.astype(dtype)


@partial(jax.jit, static_argnames=("n", "granularity"))
def hard_mask(
    widths: Float[Array, " B"],
    locations: Float[Array, " B"],
    n: int,
    *,
    granularity: int = 1,
) -> Float[Array, "B n"]:
    """Exact 0/1 masks of B cyclic intervals, rounded to the grid; no gradient.

    Args:
        widths: fractions of the axis, in [0, 1], shape (B,).
        locations: fractions of the axis, cyclic, shape (B,).
        n: number of places of the axis.
        granularity: places in a cell of the grid; a divisor of n.

    Returns:
        Masks in the dtype of `widths`, shape (B, n).

    Raises:
        UserError: shapes differ, or `granularity` does not divide `n`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.masks import hard_mask
        >>> hard_mask(jnp.array([0.5, 0.0]), jnp.array([0.75, 0.5]), 4)
        Array([[1., 0., 0., 1.],
               [0., 0., 0., 0.]], dtype=float32)
    """
    _check_intervals(widths, locations)
    starts, lengths = intervals(widths, locations, n, granularity=granularity)
    return _boxcar(starts, lengths, n).astype(widths.dtype)


def intervals(
    widths: Float[Array, "*B"],
    locations: Float[Array, "*B"],
    n: int,
    *,
    granularity: int = 1,
) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
    """Starts (in [0, n)) and lengths (in [0, n]) in places, rounded to the grid.

    Raises:
        UserError: `granularity` does not divide `n`.

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.masks import intervals
        >>> starts, lengths = intervals(jnp.array([0.3]), jnp.array([0.9]), 8, granularity=2)
        >>> starts, lengths
        (Array([0], dtype=int32), Array([2], dtype=int32))
    """
    cells = num_cells(n, granularity)
    places = [
        jnp.round(fraction.astype(jnp.float32) * cells).astype(jnp.int32) * granularity
        for fraction in (locations, widths)
    ]
    return places[0] % n, places[1]


@partial(jax.jit, static_argnames=("in_features", "out_features", "rank", "granularity"))
def block_multiplications(
    widths: Float[Array, "2 B"],
    in_features: int,
    out_features: int,
    *,
    rank: int = 1,
    granularity: tuple[int, int] = (1, 1),
) -> Int[Array, " B"]:
    """Multiplications per input vector of each block, counted on the exact boxcars.

    A block whose intervals are a and b features long costs min(rank (a + b), a b): its factors are
    applied in sequence, or composed when that is cheaper. A block with either length 0 is dead and
    costs nothing.

    Args:
        widths: fractions of the input axis (row 0) and of the output axis (row 1), shape (2, B).
        in_features: length of the input axis.
        out_features: length of the output axis.
        rank: columns of each block.
        granularity: grid cell of each axis, in features; a tuple.

    Returns:
        Multiplications, shape (B,), int32 (exact up to 2^31).

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.masks import block_multiplications
        >>> block_multiplications(jnp.array([[1.0, 0.5, 0.0], [1.0, 0.25, 1.0]]), 8, 8)
        Array([16,  6,  0], dtype=int32)
    """
    zeros = jnp.zeros_like(widths[0])
    _, a = intervals(widths[0], zeros, in_features, granularity=granularity[0])
    _, b = intervals(widths[1], zeros, out_features, granularity=granularity[1])
    return interval_multiplications(a, b, rank)


def interval_multiplications(
    a: Num[Array, "*B"], b: Num[Array, "*B"], rank: int | Array
) -> Num[Array, "*B"]:
    """Multiplications of blocks whose intervals are a and b features long: min(r (a + b), a b).

    Example:
        >>> import jax.numpy as jnp
        >>> from gaudi_jax.masks import interval_multiplications
        >>> interval_multiplications(jnp.array([8.0, 0.0]), jnp.array([4.0, 4.0]), 2)
        Array([24.,  0.], dtype=float32)
    """
    return jnp.minimum(rank * (a + b), a * b)


def num_cells(n: int, granularity: int) -> int:
    """Cells of `granularity` places on an axis of n places.

    Raises:
        UserError: `granularity` is not a positive divisor of `n`.

    Example:
        >>> from gaudi_jax.masks import num_cells
        >>> num_cells(768, 64)
        12
    """
    if granularity < 1 or n % granularity:
        raise UserError(
            f"granularity {granularity} does not divide the axis length {n}; use a divisor of {n}"
        )
    return n // granularity


def _check_intervals(widths: Array, locations: Array) -> None:
    if widths.ndim != 1 or widths.shape != locations.shape:
        raise UserError(
            f"widths of shape {widths.shape} and locations of shape {locations.shape} "
            "must both have the shape (blocks,)"
        )


def _round(fraction: Float[Array, " B"], cells: int) -> Float[Array, " B"]:
    """Rounds to the grid; the gradient passes straight through."""
    rounded = jax.lax.stop_gradient(jnp.round(fraction * cells) / cells)
    return rounded + (fraction - jax.lax.stop_gradient(fraction))


def _gaussian(n: int, sigma: Array, smoothing: float = 0.0) -> Float[Array, " k"]:
    """Gaussian in the frequency domain; `smoothing` is a standard deviation in places."""
    k = jnp.arange(n // 2 + 1, dtype=jnp.float32)
    return jnp.exp(-0.5 * (k / sigma) ** 2 - 2 * (jnp.pi * smoothing * k / n) ** 2)


def _fft_mask(
    widths: Float[Array, " B"],
    locations: Float[Array, " B"],
    n: int,
    sigma: Array,
    smoothing: float = 0.0,
) -> Float[Array, "B n"]:
    k = jnp.arange(n // 2 + 1, dtype=jnp.float32)[None]
    w, l = widths[:, None], locations[:, None]  # noqa: E741
    # w sinc(kw) / sinc(k/n) = sin(pi k w) / (n sin(pi k / n)), which is w at k = 0.
    half_turns = _half_turns(k, w, n)
    denominator = n * jnp.sin(jnp.pi * jnp.maximum(k, 1) / n)
    amplitude = jnp.where(k == 0, w, jnp.sin(jnp.pi * half_turns) / denominator)
    amplitude = amplitude * _gaussian(n, sigma, smoothing)[None]
    phase = jnp.pi * (k / n - half_turns - 2 * _half_turns(k, l, n))
    return jnp.fft.irfft(amplitude * jnp.exp(1j * phase), n, norm="forward")


def _half_turns(k: Float[Array, "1 k"], x: Float[Array, "B 1"], n: int) -> Float[Array, "B k"]:
    """The product k x up to a multiple of 2: a phase in half turns.

    Float32 cannot hold k x to the 1e-7 that masks need. The part of x on the grid of n places is
    multiplied in integers, which is exact; the small rest follows in float32.
    """
    place = jax.lax.stop_gradient(jnp.round(x * n))
    exact = jnp.mod(k.astype(jnp.int32) * place.astype(jnp.int32), 2 * n) / n
    return exact + k * (x - place / n)


def _boxcar(starts: Int[Array, " B"], lengths: Int[Array, " B"], n: int) -> Array:
    distance = jnp.arange(n)[None] - starts[:, None]
    return jnp.where(distance < 0, distance + n, distance) < lengths[:, None]


def _cyclic_rows(table: Float[Array, " n"], starts: Int[Array, " B"]) -> Float[Array, "B n"]:
    """Row b is ``table[(j - starts[b]) mod n]`` for j = 0 ... n-1.

    A contiguous slice of the doubled table: on CPU seven times faster than gathering by index.
    """
    n = table.size
    doubled = jnp.concatenate([table, table])
    return jax.vmap(lambda start: jax.lax.dynamic_slice(doubled, (start,), (n,)))(-starts % n)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _table_mask(
    widths: Float[Array, " B"],
    locations: Float[Array, " B"],
    sigma: Float[Array, ""],
    n: int,
    granularity: int,
    smoothing: float,
) -> Float[Array, "B n"]:
    """The rounded mask from the running sum P of the smoothing kernel.

    The mask is the boxcar convolved with the kernel G = irfft(Gaussian): with d = (j - s) mod n,
    m[j] = P[d] - P[(d - m) mod n] + [d < m], for an interval of m places from s on.
    """
    starts, lengths = intervals(widths, locations, n, granularity=granularity)
    running_sum = jnp.cumsum(jnp.fft.irfft(_gaussian(n, sigma).astype(jnp.complex64), n))
    edges = _cyclic_rows(running_sum, starts) - _cyclic_rows(running_sum, starts + lengths)
    return edges + _boxcar(starts, lengths, n)


def _table_mask_forward(widths, locations, sigma, n, granularity, smoothing):
    mask = _table_mask(widths, locations, sigma, n, granularity, smoothing)
    return mask, (widths, locations, sigma)


def _table_mask_backward(n, granularity, smoothing, residuals, cotangent):
    """Derivatives from one table D: the end of the interval moves with w and l, the start with l.

    dm[j]/dw = D[(j - s - m) mod n],  dm[j]/dl = D[(j - s - m) mod n] - D[(j - s) mod n].
    """
    widths, locations, sigma = residuals
    starts, lengths = intervals(widths, locations, n, granularity=granularity)
    k = jnp.arange(n // 2 + 1, dtype=jnp.float32)
    spectrum = _gaussian(n, sigma, smoothing) * jnp.exp(1j * jnp.pi * k / n) / jnp.sinc(k / n)
    derivative = jnp.fft.irfft(spectrum, n, norm="forward")
    at_end = jnp.sum(cotangent * _cyclic_rows(derivative, starts + lengths), axis=1)
    at_start = jnp.sum(cotangent * _cyclic_rows(derivative, starts), axis=1)
    return at_end, at_end - at_start, jnp.zeros_like(sigma)


_table_mask.defvjp(_table_mask_forward, _table_mask_backward)
