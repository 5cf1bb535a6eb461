"""What the commands that deploy a run ask for."""

import argparse
from pathlib import Path

from gaudi_jax.deploy.machine import MACHINES
from gaudi_jax.errors import UserError
from gaudi_jax.training.load import as_step


def run_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of the run, its checkpoint, and how its packed model will be used.

    Example:
        >>> from gaudi_jax.deploy.command import run_parser
        >>> arguments = run_parser("deploy", None).parse_args(["runs/digits", "--step=best"])
        >>> str(arguments.workdir), arguments.step, arguments.batch
        ('runs/digits', 'best', 8)
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("workdir", type=Path, help="directory of a run")
    parser.add_argument(
        "--step",
        type=as_step,
        help="step of the checkpoint, best or last, or to export packed; by default the newest",
    )
    parser.add_argument("--batch", type=int, default=8, help="inputs at once (default 8)")
    parser.add_argument(
        "--tokens",
        type=int,
        help="input vectors that a layer gets at once, by default those of a whole batch; for "
        "decoding, the number of rows",
    )
    parser.add_argument("--backend", choices=MACHINES, help="where it will run; by default here")
    return parser


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Checks options that are at least 1 where they are given.

    Raises:
        UserError: one is less.

    Example:
        >>> from argparse import Namespace
        >>> from gaudi_jax.deploy.command import check_positive
        >>> check_positive(Namespace(batch=8, tokens=None), "batch", "tokens")
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
