"""Makes the report of a run again: ``python -m gaudi_jax.report WORKDIR``."""

import argparse
import sys

from gaudi_jax.errors import UserError
from gaudi_jax.report import summary_table, write_report


def main() -> int:
    """Writes the report and prints its table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gaudi_jax.report", description=__doc__)
    parser.add_argument("workdir", help="directory of a run")
    parser.add_argument(
        "--step",
        type=lambda text: int(text) if text.isdigit() else text,
        help="step of the checkpoint, best or last; by default what the run's config says",
    )
    parser.add_argument(
        "--stride", type=int, help="tokens between evaluation windows of a text, for sliding ones"
    )
    arguments = parser.parse_args()
    try:
        print(
            summary_table(write_report(arguments.workdir, arguments.step, stride=arguments.stride))
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
