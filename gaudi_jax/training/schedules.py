"""Schedules: pure functions from the step to a value, used in the step and for logging."""

import math

import optax

from gaudi_jax.errors import UserError


def warmup_cosine(
    peak: float, *, warmup_steps: int, total_steps: int, start: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from `start` to `peak`, then a cosine down to `end`.

    Raises:
        UserError: a learning rate is negative, or the warm-up does not end before the last step.

    Example:
        >>> from gaudi_jax.training.schedules import warmup_cosine
        >>> schedule = warmup_cosine(1.0, warmup_steps=10, total_steps=20)
        >>> float(schedule(5)), float(schedule(10)), float(schedule(20))
        (0.5, 1.0, 0.0)
    """
    _check_warmup(peak, warmup_steps, total_steps, start, end)
    return optax.warmup_cosine_decay_schedule(start, peak, warmup_steps, total_steps, end)


def warmup_linear(
    peak: float, *, warmup_steps: int, total_steps: int, start: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from `start` to `peak`, then a straight line down to `end`.

    Raises:
        UserError: a learning rate is negative, or the warm-up does not end before the last step.

    Example:
        >>> from gaudi_jax.training.schedules import warmup_linear
        >>> schedule = warmup_linear(1.0, warmup_steps=10, total_steps=20)
        >>> float(schedule(5)), float(schedule(10)), float(schedule(15)), float(schedule(20))
        (0.5, 1.0, 0.5, 0.0)
    """
    _check_warmup(peak, warmup_steps, total_steps, start, end)
    return optax.join_schedules(
        [
            optax.linear_schedule(start, peak, warmup_steps),
            optax.linear_schedule(peak, end, total_steps - warmup_steps),
        ],
        [warmup_steps],
    )


def annealed_sigma(start: float, end: float, *, first_step: int, last_step: int) -> optax.Schedule:
    """Sigma rises linearly from `start` to `end` between two steps, constant before and after.

    Raises:
        UserError: a sigma is not positive, only one is infinite, or the steps are out of order.

    Example:
        >>> from gaudi_jax.training.schedules import annealed_sigma
        >>> sigma = annealed_sigma(1.0, 100.0, first_step=5, last_step=104)
        >>> float(sigma(0)), float(sigma(6)), float(sigma(1000))
        (1.0, 2.0, 100.0)
    """
    if not (start > 0 and end > 0):
        raise UserError(f"sigma from {start} to {end} must be positive")
    if first_step > last_step:
        raise UserError(f"sigma must rise between two steps in order: {first_step}, {last_step}")
    if math.isinf(start) or math.isinf(end):
        if start != end:
            raise UserError(f"sigma cannot rise from {start} to {end}; make both infinite")
        return optax.constant_schedule(start)
    return optax.linear_schedule(start, end, last_step - first_step, first_step)


def falling_budget(
    budget: float, *, first_step: int, last_step: int, start: float = 1.0
) -> optax.Schedule:
    """The target cost falls from `start` to `budget` between two steps, along a cubic.

    ``budget + (start - budget) (1 - t)^3``, as in gradual pruning (Zhu & Gupta, 2017,
    arXiv:1710.01878): fast while the model has much to spare, slow at the end.

    Raises:
        UserError: the budget is out of range, or the steps are out of order.

    Example:
        >>> from gaudi_jax.training.schedules import falling_budget
        >>> target = falling_budget(0.2, first_step=0, last_step=10)
        >>> round(float(target(0)), 3), round(float(target(5)), 3), round(float(target(10)), 3)
        (1.0, 0.3, 0.2)
    """
    if not 0 < budget <= start:
        raise UserError(
            f"width target {budget} is outside (0, {start:g}]; give a fraction of dense"
        )
    if not 0 <= first_step < last_step:
        raise UserError(
            f"the budget must fall between two steps in order, not {first_step} and {last_step}"
        )
    return optax.polynomial_schedule(start, budget, 3, last_step - first_step, first_step)


def _check_warmup(
    peak: float, warmup_steps: int, total_steps: int, start: float, end: float
) -> None:
    if min(start, peak, end) < 0:
        raise UserError(
            f"the learning rate must never be negative: start {start}, peak {peak}, end {end}"
        )
    if not 0 <= warmup_steps < total_steps:
        raise UserError(
            f"warmup_steps={warmup_steps} must lie in [0, total_steps={total_steps}); shorten the "
            "warm-up or train longer"
        )
