"""Makes the report of a run again: ``python -m gaudi_jax.report WORKDIR``."""

import argparse
import sys

from gaudi_jax.errors import UserError
from gaudi_jax.report import summary_table, write_report


def main() -> int:
    """Writes the report and prints its table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gaudi_jax.report", description=__doc__)
    parser.add_argument("workdir", help="directory of a run")
    try:
        print(summary_table(write_report(parser.parse_args().workdir)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
