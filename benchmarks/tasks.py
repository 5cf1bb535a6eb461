"""What the studies train on, and whether it is there."""

import argparse
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from runs import GPU, ONE_CORE, has_gpu


class Task(NamedTuple):
    """What is trained.

    Attributes:
        config: file, with the arguments that are the same for all methods.
        options: of the command line, likewise.
        width: of the model.
        measure: what its table and its picture show.
        paper_targets: mean widths at which the published recipe ends near each budget.
        full_width: for each part of a block, the share of its blocks that costs as much at full
            width as the dense layer.
        structural_rates: learning rates of widths and locations of the budget recipe.
        gpu: it is for a GPU, which one run has to itself.
    """

    config: str
    options: tuple[str, ...]
    width: int
    measure: str
    paper_targets: dict[float, float]
    full_width: dict[str, float]
    structural_rates: tuple[float, float]
    gpu: bool = False

    @property
    def environment(self) -> dict[str, str]:
        return GPU if self.gpu else ONE_CORE


def tasks(text: str, images: str = "") -> dict[str, Task]:
    image_parts = {"attention": 1 / 2, "mlp": 4 / 5}
    text_parts = {"attention": 3 / 4, "attention_out": 1 / 2, "mlp": 4 / 5}
    return {
        "digits": Task(
            "digits_vit_gaudi.py:",
            ("--config.model.width=96",),
            96,
            "accuracy",
            {0.25: 0.15, 0.125: 0.08},
            image_parts,
            (3e-3, 3e-4),
        ),
        "shakespeare": Task(
            f"shakespeare_gpt_gaudi.py:size=cpu,text={text},",
            ("--config.data.validation_fraction=0.05", "--config.data.test_fraction=0.05"),
            128,
            "loss",
            {0.25: 0.18, 0.125: 0.09},
            text_parts,
            (1e-3, 1e-4),
        ),
        "docs": Task(
            "docs_gpt_gaudi.py:",
            (),
            128,
            "loss",
            {0.25: 0.18, 0.125: 0.09},
            text_parts,
            (1e-3, 1e-4),
        ),
        "cifar": Task(
            f"cifar10_vit_s_gaudi.py:size=cpu,data=folder:{images},",
            (),
            96,
            "accuracy",
            {},
            image_parts,
            (5e-3, 5e-3),
        ),
        "shakespeare-gpu": Task(
            f"shakespeare_gpt_gaudi.py:size=gpu,text={text},",
            ("--config.data.validation_fraction=0.05", "--config.data.test_fraction=0.05"),
            384,
            "loss",
            {},
            text_parts,
            (1e-3, 1e-4),
            gpu=True,
        ),
        "cifar-gpu": Task(
            f"cifar10_vit_s_gaudi.py:size=gpu,data=folder:{images},",
            (),
            768,
            "accuracy",
            {},
            image_parts,
            (5e-3, 5e-3),
            gpu=True,
        ),
    }


def checked(
    parser: argparse.ArgumentParser, args: argparse.Namespace, methods: Collection[str]
) -> dict[str, Task]:
    """The tasks, once the command line is seen to be usable."""
    if any(tasks("")[name].gpu for name in args.tasks) and not has_gpu():
        parser.error(f"--tasks {' '.join(args.tasks)} needs a GPU, and JAX finds none")
    for budget in args.budgets:
        if not 0 < budget <= 1:
            parser.error(f"--budgets {budget} is outside (0, 1]; give a fraction such as 0.25")
    text = Path(args.text).resolve()
    if any("shakespeare" in name for name in args.tasks) and not text.is_file():
        parser.error(f"no text in {text}; give the path of tinyshakespeare with --text, or --tasks")
    images = Path(args.images).resolve()
    if any("cifar" in name for name in args.tasks) and not all(
        (images / split).is_dir() for split in ("train", "test")
    ):
        parser.error(f"no images in {images}/train and test; give --images PATH, or --tasks")
    check_patterns(parser, args.methods, methods)
    return tasks(str(text), str(images))


def check_patterns(
    parser: argparse.ArgumentParser, patterns: Sequence[str], methods: Collection[str]
) -> None:
    """Ends with one sentence where a regular expression is none, or matches nothing."""
    for pattern in patterns:
        try:
            found = any(re.search(pattern, method) for method in methods)
        except re.error as error:
            parser.error(f"--methods {pattern!r} is no regular expression: {error}")
        if not found:
            parser.error(f"--methods {pattern!r} matches none of: {'; '.join(methods)}")


def at_once(known: Mapping[str, Task], names: Sequence[str]) -> int:
    """How many trainings run at a time."""
    return 1 if any(known[name].gpu for name in names) else 2
