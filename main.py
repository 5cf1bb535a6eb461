"""Trains, continues or evaluates the run of a config.

    python main.py                                             # learn digits, in runs/
    python main.py --config=configs/digits_vit_gaudi.py:layer=dense --workdir=runs/dense
    python main.py --config=configs/vit_b_gaudi.py --workdir=runs/vit_b --config.train.steps=1000

Run again with the same workdir, it continues where the run stopped.
"""

import logging
import os
import re
import sys
import traceback
from datetime import datetime
from pathlib import Path

import absl.logging
import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from gaudi_jax.errors import UserError, exit_status
from gaudi_jax.report import summary_table, write_report
from gaudi_jax.training.loop import train
from gaudi_jax.training.processes import is_primary, leave_at_once, start_processes
from gaudi_jax.training.workdir import check_workdir

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits_vit_gaudi.py"


def main(argv: list[str]) -> int:
    """Runs the config of a command line; returns the exit status."""
    try:
        status = exit_status(lambda: run(argv))
    except Exception:
        traceback.print_exc()
        leave_at_once(1)
        return 1
    if status:
        leave_at_once(status)
    return status


def run(argv: list[str]) -> None:
    """Trains, continues or evaluates, and prints the report of a finished run."""
    config, workdir = parse_command_line(argv)
    absl.logging.use_absl_handler()
    absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    absl.logging.set_verbosity(absl.logging.WARNING)  # other packages; this one speaks up
    use_compilation_cache(config.compilation_cache)
    start_processes(config.distributed)
    if jax.process_count() > 1 and not flags.FLAGS["workdir"].present:
        raise UserError("several processes need the same --workdir; give one that all of them see")
    level = logging.INFO if is_primary() else logging.ERROR  # one tells it for all
    logging.getLogger("gaudi_jax").setLevel(level)
    if config.evaluate_only:
        check_workdir(workdir, config.to_dict())
    if config.evaluate_only or train(config, workdir):
        summary = write_report(workdir, config.evaluate_checkpoint)
        if is_primary():
            print(f"{summary_table(summary)}\n\nsummary, masks and curves: {workdir}")


def parse_command_line(argv: list[str]) -> tuple[ConfigDict, str]:
    """The config and the workdir that the command line asks for.

    Raises:
        UserError: an option, a config file, an argument or a key of it is not usable.
    """
    app.define_help_flags()
    config = config_flags.DEFINE_config_file("config", None, "FILE, or FILE:arguments.")
    workdir = flags.DEFINE_string(
        "workdir", None, "Directory of the run; a fresh one under runs/ if it is not given."
    )
    if not any(re.match(r"--?config(=|$)", word) for word in argv):
        # Not the flag's own default: that would be read, with all overrides, beside another file.
        argv = [argv[0], f"--config={DEFAULT_CONFIG}", *argv[1:]]
    try:
        rest = flags.FLAGS(argv)
        _ = config.value.seed  # a config file that cannot be loaded fails when it is used
    except Exception as error:  # the code of a config file may raise anything
        raise UserError(_explain(error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; options begin with --")
    # To the millisecond: runs of a sweep may start in the same second.
    fresh = datetime.now().strftime("runs/%Y%m%d-%H%M%S-%f")[:-3]
    return config.value, workdir.value or fresh


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs in a directory, unless JAX_COMPILATION_CACHE_DIR names another."""
    if directory and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        path = str(Path(directory).expanduser())
        jax.config.update("jax_compilation_cache_dir", path)
        # JAX leaves out what compiles in less than a second, such as all of the search's parts.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _explain(error: Exception) -> str:
    """One sentence for what absl and ml_collections say in many."""
    text = " ".join(str(error).replace("\\n", " ").split())
    place = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, flags.Error):
        # Errors of a config file may arrive as the text of a traceback, whose last line says it.
        last_line = str(error).strip().splitlines()[-1].strip()
        return last_line.removeprefix(f"{UserError.__module__}.{UserError.__name__}: ")
    if isinstance(error, OSError | UserError):
        return text
    if isinstance(error, SyntaxError):
        return f"the config file {error.filename} has a syntax error: {text}"
    if isinstance(error, AttributeError) and "ml_collections" in place.filename:
        if "'get_config'" in text:
            return "the config file has no function get_config; see configs/ for examples"
        return f"the config has no key: {text}"
    return f"the config file fails in {place.filename}, line {place.lineno}: {error!r}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
