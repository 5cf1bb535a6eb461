"""Trains, continues or evaluates the run of a config.

    python main.py                                             # learn digits, in runs/
    python main.py --config=configs/digits_vit_gaudi.py:layer=dense --workdir=runs/dense
    python main.py --config=configs/vit_b_gaudi.py --workdir=gs://... --config.train.steps=1000

Run again with the same workdir, it continues where the run stopped.
"""

import logging
import sys
import time

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from gaudi_jax.errors import UserError
from gaudi_jax.report import summary_table, write_report
from gaudi_jax.training.loop import train

_CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/digits_vit_gaudi.py", "Config file, with arguments after a colon."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; a fresh one under runs/ if it is not given."
)


def run(argv: list[str]) -> int:
    """Runs the config; returns the exit status."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options begin with --")
    absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    absl.logging.set_verbosity(absl.logging.WARNING)  # other packages; this one says what it does
    logging.getLogger("gaudi_jax").setLevel(logging.INFO)
    config = _CONFIG.value
    workdir = _WORKDIR.value or time.strftime("runs/%Y%m%d-%H%M%S")
    if config.evaluate_only or train(config, workdir):
        print(summary_table(write_report(workdir)))
        print(f"\nsummary, masks and curves: {workdir}")
    return 0


def main(argv: list[str]) -> int:
    """Runs the config; a user's mistake is printed in one sentence, without a traceback."""
    try:
        return run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    app.run(main)
