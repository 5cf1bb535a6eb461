"""The phases of a run: stretches of steps, each with one structure of the model.

``config.compress.stages`` holds pairs (share of the steps, budget): after that share of the steps
the model's layers are compressed to that budget.

* ``((0.0, 0.25),)`` compresses the model that a run starts from.
* ``((0.5, 0.25),)`` trains half of the steps densely.
* ``((0.3, 0.5), (0.5, 0.25))`` comes down in two stages.
* ``((0.5, 0.25), (0.75, 0.25))`` finds the structure anew in the middle of its training.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from gaudi_jax.errors import UserError


class Phase(NamedTuple):
    """Steps made with one structure.

    Attributes:
        number: 0 for the first.
        first: steps made before it.
        last: steps made at its end.
        budget: multiplications over dense to which the model is compressed when it begins; None
            for the model as the config builds it.
    """

    number: int
    first: int
    last: int
    budget: float | None

    def plan_file(self, workdir: Path) -> Path:
        """Where the plan of its structure lies."""
        return workdir / f"plan-{self.first}.json"


def phases(config: ConfigDict) -> list[Phase]:
    """The phases of a resolved config, in order.

    Raises:
        UserError: a stage is no pair, or the stages are not in order.

    Example:
        >>> from ml_collections import ConfigDict
        >>> from gaudi_jax.training.phases import phases
        >>> options = {"method": "gaudi", "stages": ((0.5, 0.25),)}
        >>> for phase in phases(ConfigDict({"compress": options, "train": {"steps": 100}})):
        ...     print(phase)
        Phase(number=0, first=0, last=50, budget=None)
        Phase(number=1, first=50, last=100, budget=0.25)
    """
    steps, stages = config.train.steps, config.compress.stages
    if config.compress.method == "none":
        return [Phase(0, 0, steps, None)]
    if not stages or not all(map(_is_stage, stages)):
        raise UserError(
            f"compress.stages={stages} must hold pairs (share of the steps, budget), such as "
            "((0.5, 0.25),)"
        )
    begins = [(round(share * steps), budget) for share, budget in stages]
    firsts = [first for first, _ in begins]
    if firsts != sorted(set(firsts)) or firsts[0] < 0 or firsts[-1] >= steps:
        raise UserError(
            f"compress.stages={stages} must begin at rising shares of the {steps} steps, in "
            "[0, 1), and leave each stage a step"
        )
    if firsts[0] > 0:
        begins.insert(0, (0, None))
    ends = [*(first for first, _ in begins[1:]), steps]
    return [
        Phase(number, first, last, budget)
        for number, ((first, budget), last) in enumerate(zip(begins, ends, strict=True))
    ]


def _is_stage(pair: Any) -> bool:
    return (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(number, int | float) and math.isfinite(number) for number in pair)
    )


def phase_of(config: ConfigDict, step: int) -> Phase:
    """The phase in which the checkpoint of a step was saved: one at a change was saved before it.

    Example:
        >>> from ml_collections import ConfigDict
        >>> from gaudi_jax.training.phases import phase_of
        >>> options = {"method": "gaudi", "stages": ((0.5, 0.25),)}
        >>> config = ConfigDict({"compress": options, "train": {"steps": 100}})
        >>> phase_of(config, 50).number, phase_of(config, 51).number
        (0, 1)
    """
    return next(phase for phase in phases(config) if step <= phase.last)
