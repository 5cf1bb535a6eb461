"""Makes the report of a run again: ``python -m gaudi_jax.report WORKDIR``."""

import argparse
import sys

from gaudi_jax.errors import exit_status
from gaudi_jax.report import summary_table, write_report
from gaudi_jax.training.load import as_step


def main() -> int:
    """Writes the report and prints its table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gaudi_jax.report", description=__doc__)
    parser.add_argument("workdir", help="directory of a run")
    parser.add_argument(
        "--step",
        type=as_step,
        help="step of the checkpoint, best, packed or last; by default what the run's config says",
    )
    parser.add_argument(
        "--stride", type=int, help="tokens between evaluation windows of a text, for sliding ones"
    )
    arguments = parser.parse_args()

    def report() -> None:
        summary = write_report(arguments.workdir, arguments.step, stride=arguments.stride)
        print(summary_table(summary))

    return exit_status(report)


if __name__ == "__main__":
    sys.exit(main())
