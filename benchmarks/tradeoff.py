"""Every structured layer on the same footing: quality against multiplications and against time.

    python benchmarks/tradeoff.py --text shakespeare.txt [--images cifar10]
        [--tasks digits shakespeare] [--methods PATTERN ...] [--budgets 0.5 0.34 0.125]
        [--seeds 3]
    python benchmarks/tradeoff.py --quick

All methods share one recipe: dense layers for three tenths of the steps; then these are compressed
under a budget, shared out over the layers where the method can; then their factors are trained on.
Trains every combination through ``main.py``, two runs at a time with one core each (on a GPU, the
tasks of its size, one at a time), and measures there what the deployed form takes beside a dense
one (``benchmarks/latency.py``), while the other run stands still. Finished runs are kept in
``benchmarks/results/tradeoff.csv`` and not repeated. Choices are made on the validation split; the
test split is read once, at the end of a run. Prints two tables for each task and draws
``benchmarks/results/tradeoff-TASK.png``. ``--quick`` trains one seed on digits for 300 steps, and
keeps nothing.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from runs import (
    RESULTS,
    ROOT,
    Row,
    Table,
    alone,
    block_cost,
    end_with,
    failed,
    run_all,
    train,
)
from tables import differences, standard_error, verdict, with_error
from tabulate import tabulate
from tasks import Task, at_once, checked, tasks

COLUMNS = (
    *("task", "method", "budget", "share", "seed", "seconds"),
    *("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"),
    *("cost", "dense_ms", "deployed_ms", "commit", "jax", "date"),
)
#: Of the steps, after which dense layers are compressed; rows of another are not of this study.
SHARE = 0.3
#: Processes that measure the time of one model: single ones are now and then twice as slow.
PROCESSES = 3
#: The C library keeps large outputs, instead of mapping them anew, page by page, at every call.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_ARENA_MAX": "1",
}
GRID = ("--config.compress.granularity={grid}",)
#: Arguments of the config, and options of the command line.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dense": ("layer=dense", ()),
    "low-rank": ("layer=low_rank,recipe=spread", ("--config.compress.allocation=uniform",)),
    "low-rank, shared out": ("layer=low_rank,recipe=spread", ()),
    "Monarch": ("layer=monarch,recipe=spread", ()),
    "BLAST": ("layer=blast,recipe=spread", ()),
    "block-sparse": ("layer=block_sparse,recipe=spread", ()),
    "Gaudi": ("layer=gaudi,recipe=spread", ()),
    "Gaudi, grid": ("layer=gaudi,recipe=spread", GRID),
    "Gaudi, search": ("layer=gaudi,recipe=search", ()),
    "Gaudi, search, grid": ("layer=gaudi,recipe=search", GRID),
}
#: With what all others are compared, seed by seed.
REFERENCES = ("Gaudi", "Gaudi, search")
FINISHED = Table(RESULTS / "tradeoff.csv", COLUMNS)


def run(name: str, task: Task, method: str, budget: float, seed: int, extra: Sequence[str]) -> Row:
    argument, options = METHODS[method]
    if method != "dense":
        argument = f"{argument},budget={budget}"
        options = (*options, f"--config.compress.stages=(({SHARE},{budget}),)")
    filled = [option.format(grid=task.width // 8) for option in options]
    summary = train(
        task.config + argument,
        (*task.options, f"--config.seed={seed}", *filled, *extra),
        environment=task.environment,
        measure=partial(latency, environment=task.environment),
    )
    return summary | {
        "task": name,
        "method": method,
        "budget": budget,
        "share": "" if method == "dense" else SHARE,
        "seed": seed,
        "test_loss": summary["test_loss_hard"],
        "test_accuracy": summary.get("test_accuracy_hard", ""),
        "cost": block_cost(summary),
    }


def latency(workdir: str, environment: Mapping[str, str]) -> Row:
    """What `benchmarks/latency.py` measures in the middle one of several processes."""
    command = [sys.executable, "benchmarks/latency.py", workdir]
    measured, variables = [], {**os.environ, **KEEP_MEMORY, **environment}
    with alone():
        for _ in range(PROCESSES):
            done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise failed(command, done.stderr)
            measured.append(json.loads(done.stdout.splitlines()[-1]))
    # Times of one process belong together: another may be twice as slow in all.
    middle = statistics.median_low(map(_ratio, measured))
    return next(times for times in measured if _ratio(times) == middle)


def _ratio(times: Row) -> float:
    return times["deployed_ms"] / times["dense_ms"]


def finished() -> list[Row]:
    """The rows of this study."""
    return [row for row in FINISHED.rows() if row["share"] in ("", str(SHARE))]


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each method and budget."""
    result: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        result.setdefault((row["method"], row["budget"]), []).append(row)
    return result


def numbers(rows: Sequence[Row], measure: str) -> dict[str, list[float]]:
    """What the tables and pictures show of some rows, a number for each."""
    return {
        "validation": [float(row[f"validation_{measure}"]) for row in rows],
        "test": [float(row[f"test_{measure}"]) for row in rows],
        "cost": [float(row["cost"]) for row in rows],
        "time": [float(row["deployed_ms"]) / float(row["dense_ms"]) for row in rows],
    }


def table(rows: Sequence[Row], measure: str) -> str:
    """All measures, with standard errors."""
    lines = []
    for (method, budget), chosen in by_budget(rows):
        cells = [with_error(values, 4) for values in numbers(chosen, measure).values()]
        lines.append((method, budget, len(chosen), *cells))
    headers = ("layers", "budget", "seeds", f"validation {measure}", f"test {measure}")
    return tabulate(lines, (*headers, "cost", "time over dense"), tablefmt="github")


def paired_table(rows: Sequence[Row]) -> str:
    """What each kind of layer loses against Gaudi layers of its seed, and of its budget."""
    by_group, lines = groups(rows), []
    for (kind, budget), ours in by_budget(rows):
        for method in METHODS if kind in REFERENCES else ():
            chosen = by_group.get((method, "1.0" if method == "dense" else budget), [])
            pairs = [differences(chosen, ours, f"{split}_loss") for split in ("validation", "test")]
            if method != kind and pairs[0]:
                cells = [with_error(pair, 4) for pair in pairs]
                lines.append((method, kind, budget, *cells, verdict(pairs[1], kind, method)))
    headers = ("layers", "less", "budget", "validation loss", "test loss", "less test loss")
    return tabulate(lines, headers, tablefmt="github")


def by_budget(rows: Sequence[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    return sorted(groups(rows).items(), key=lambda item: -float(item[0][1]))


def plot(rows: Sequence[Row], task: str, measure: str, folder: Path) -> None:
    """Test results against cost and against time, with standard errors."""
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for method in METHODS:
        points = [
            numbers(chosen, measure) for (name, _), chosen in by_budget(rows) if name == method
        ]
        for axes, x in zip(panels, ("cost", "time"), strict=True):
            if points:
                axes.errorbar(
                    [np.mean(point[x]) for point in points],
                    [np.mean(point["test"]) for point in points],
                    xerr=[standard_error(point[x]) for point in points],
                    yerr=[standard_error(point["test"]) for point in points],
                    marker="o",
                    capsize=3,
                    label=method,
                )
    panels[0].set(
        xlabel="multiplications of the blocks over dense", ylabel=f"test {measure}", title=task
    )
    panels[1].set(xlabel="time of the deployed model over dense")
    panels[0].legend(fontsize=7)
    figure.savefig(folder / f"tradeoff-{task}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="shakespeare.txt", help="path of tinyshakespeare")
    parser.add_argument("--images", default="cifar10", help="folder with train/CLASS/* and test")
    parser.add_argument(
        "--tasks", nargs="+", choices=list(tasks("")), default=["digits", "shakespeare"]
    )
    parser.add_argument(
        "--methods", nargs="+", default=[""], help="those that match a regular expression"
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.34, 0.125])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="minutes; nothing is kept")
    args = parser.parse_args()
    extra, folder = [], RESULTS
    if args.quick:
        parser.set_defaults(tasks=["digits"], budgets=[0.25], seeds=1)
        args = parser.parse_args()
        extra = ["--config.train.steps=300", "--config.compress.rounds=10"]
        folder = Path(tempfile.mkdtemp())
        FINISHED.path = folder / "tradeoff.csv"
    known = checked(parser, args, METHODS)
    done = {
        (row["task"], row["method"], float(row["budget"]), int(row["seed"])) for row in finished()
    }
    jobs = [
        (name, known[name], method, 1.0 if method == "dense" else budget, seed, extra)
        for seed in range(args.seeds)
        for name in args.tasks
        for method in METHODS
        for budget in (args.budgets[:1] if method == "dense" else args.budgets)
        if any(re.search(pattern, method) for pattern in args.methods)
        and (name, method, 1.0 if method == "dense" else budget, seed) not in done
    ]
    failures = run_all(jobs, run, FINISHED, at_once=at_once(known, args.tasks))
    for name in args.tasks:
        rows = [row for row in finished() if row["task"] == name]
        if rows:
            print(f"\n{name}\n\n{table(rows, known[name].measure)}\n\n{paired_table(rows)}")
            plot(rows, name, known[name].measure, folder)
    print(f"\npictures: {folder}")
    end_with(failures)


if __name__ == "__main__":
    main()
