"""Runs of ``main.py`` for the studies: two at a time, one core each; finished rows are kept."""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

Row = dict[str, Any]


def train(config: str, options: Iterable[str] = (), *, keep: Path | None = None) -> Row:
    """The summary of a run, and the seconds that it took.

    Args:
        config: file in ``configs/``, with its arguments.
        options: others of the command line.
        keep: where the pictures of the masks are copied.
    """
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        command = [
            sys.executable,
            "main.py",
            f"--config=configs/{config}",
            f"--workdir={workdir}",
            *options,
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | ONE_CORE, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        summary = json.loads((Path(workdir) / "summary.json").read_text(encoding="utf-8"))
        if keep is not None and (Path(workdir) / "masks.png").exists():
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_bytes((Path(workdir) / "masks.png").read_bytes())
    return summary | {"seconds": round(time.perf_counter() - start)}


class Table:
    """Rows in a CSV file."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, columns

    def rows(self) -> list[Row]:
        """The rows, as text."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def append(self, row: Row) -> None:
        """Keeps a row; what no column is for is left out."""
        rows = [*self.rows(), row]
        self.path.parent.mkdir(exist_ok=True)
        # Another thread may be reading the rows.
        temporary = self.path.with_suffix(".part")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)


def run_all(jobs: Sequence[Any], function: Callable[..., Row], table: Table) -> None:
    """Runs jobs two at a time, and keeps each row as soon as it is there."""
    with ThreadPoolExecutor(2) as pool, tqdm(total=len(jobs), unit="run") as bar:
        for row in pool.map(lambda job: function(*job), jobs):
            table.append(row)
            bar.update()
