"""Runs of ``main.py`` for the studies: two at a time, one core each; finished rows are kept."""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ONE_CORE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OPENBLAS_NUM_THREADS": "1",
    # XLA allocates the buffers of each step anew, and small pages would take a third of the time.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
GPU = {"JAX_PLATFORMS": "cuda,cpu"}  # where there is none, jax goes on with the CPU (`has_gpu`)

Row = dict[str, Any]


class RunError(Exception):
    """A run of a study failed, or cannot begin."""


def failed(command: Sequence[str], printed: str) -> RunError:
    return RunError(f"{' '.join(command)} failed:\n{printed[-2000:]}")


def train(
    config: str,
    options: Iterable[str] = (),
    *,
    script: str = "main.py",
    environment: Mapping[str, str] = ONE_CORE,
    keep: Path | None = None,
    measure: Callable[[str], Row] | None = None,
) -> Row:
    """The summary of a run, and the seconds that it took.

    Args:
        config: file in ``configs/``, with its arguments.
        options: others of the command line.
        script: what is run, as ``main.py`` is.
        environment: variables that say where it runs.
        keep: where the pictures of the masks are copied.
        measure: what else is read off the workdir, which is gone afterwards.
    """
    with tempfile.TemporaryDirectory() as workdir:
        start, waited, code = time.perf_counter(), _trainings.stopped, commit()
        command = [
            sys.executable,
            script,
            f"--config=configs/{config}",
            f"--workdir={workdir}",
            *options,
        ]
        _trainings.run(command, environment)
        summary = json.loads((Path(workdir) / "summary.json").read_text(encoding="utf-8"))
        if keep is not None and (Path(workdir) / "masks.png").exists():
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_bytes((Path(workdir) / "masks.png").read_bytes())
        taken = time.perf_counter() - start - (_trainings.stopped - waited)
        summary["seconds"] = round(taken)
        summary |= {
            "commit": code,
            "jax": summary["versions"]["jax"],
            "date": date.today().isoformat(),
        }
        return summary | (measure(workdir) if measure else {})


def has_gpu() -> bool:
    """Whether JAX can use one, asked in a process that lets go of it."""
    command = [sys.executable, "-c", "import jax; jax.devices('gpu')"]
    return not subprocess.run(command, env=os.environ | GPU, capture_output=True).returncode


class _Runs:
    """The trainings that are going on, which stand still while one of them is measured."""

    def __init__(self) -> None:
        self.stopped = 0.0  # seconds for which they stood still
        self._lock = threading.Lock()
        self._going: set[subprocess.Popen] = set()

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with self._lock:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            self._going.add(process)
        _, printed = process.communicate()
        self._going.remove(process)
        if process.returncode:
            raise failed(command, printed)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        with self._lock:
            start, going = time.perf_counter(), list(self._going)
            for process in going:
                process.send_signal(signal.SIGSTOP)
            try:
                yield
            finally:
                for process in going:
                    process.send_signal(signal.SIGCONT)
                self.stopped += time.perf_counter() - start


_trainings = _Runs()


def alone() -> AbstractContextManager[None]:
    """A context in which no training of the study runs: for measuring times."""
    return _trainings.standing_still()


def commit() -> str:
    """The code's, with a mark where it has been changed since; rows of results are no code."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changes = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + "+" * bool(changes)


def layer_costs(summary: Row) -> dict[str, tuple[int, int, int]]:
    """Inputs, outputs and multiplications of an input vector of each layer of a run."""
    return {
        layer["path"]: (
            layer["in_features"],
            layer["out_features"],
            layer["multiplications"] // (layer.get("applications") or 1),
        )
        for layer in summary["layers"]
    }


def block_cost(summary: Row) -> float:
    """Multiplications of the layers in a run's blocks over those of dense ones."""
    blocks = [sizes for path, sizes in layer_costs(summary).items() if path.startswith("blocks")]
    return sum(cost for *_, cost in blocks) / sum(n * m for n, m, _ in blocks)


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


def run_all(
    jobs: Sequence[Any], function: Callable[..., Row], table: Table, *, at_once: int = 2
) -> list[str]:
    """Runs some jobs at a time, and keeps each row as soon as it is there.

    Returns:
        What failed; the other jobs go on after one that does.
    """
    failures: list[str] = []
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), unit="run") as bar:
        try:
            for done in as_completed([pool.submit(function, *job) for job in jobs]):
                try:
                    table.append(done.result())
                except Exception as failure:
                    failures.append(f"{type(failure).__name__}: {failure}")
                bar.update()
        except BaseException:  # such as an interrupt
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def end_with(failures: Sequence[str]) -> None:
    """Ends a study: where jobs failed, with their messages and status 1."""
    if failures:
        raise SystemExit("\n".join(failures))
