"""Means, standard errors and paired differences of a study's rows."""

import math
from collections.abc import Sequence

import numpy as np
from runs import Row


def with_error(numbers: Sequence[float], digits: int) -> str:
    """Mean and standard error; of one number there is no error."""
    if len(numbers) == 1:
        return f"{numbers[0]:.{digits}f}"
    return f"{np.mean(numbers):.{digits}f} ± {standard_error(numbers):.{digits}f}"


def standard_error(numbers: Sequence[float]) -> float:
    """That of the mean, from two numbers on."""
    return float(np.std(numbers, ddof=1)) / math.sqrt(len(numbers)) if len(numbers) > 1 else 0.0


def differences(rows: Sequence[Row], others: Sequence[Row], column: str) -> list[float]:
    """What the first rows have more of than those of the same seeds among the others."""
    by_seed = {row["seed"]: float(row[column]) for row in others}
    return [float(row[column]) - by_seed[row["seed"]] for row in rows if row["seed"] in by_seed]


def verdict(numbers: Sequence[float], ahead: str, behind: str) -> str:
    """Who has less, by differences: tied within one standard error; one seed says nothing."""
    if len(numbers) < 2:
        return "one seed"
    mean, error = float(np.mean(numbers)), standard_error(numbers)
    if abs(mean) <= error:
        return "tied"
    return ahead if mean > 0 else behind
