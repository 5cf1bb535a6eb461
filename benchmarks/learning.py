"""What learned structure is worth: methods x budgets x seeds on several tasks.

    python benchmarks/learning.py --text shakespeare.txt --images cifar10
        [--tasks digits shakespeare docs cifar] [--methods PATTERN ...] [--budgets 0.25 0.125]
        [--seeds 5]
    python benchmarks/learning.py --quick

Trains every combination through ``main.py`` (controls through ``random_places.py`` and
``ranks_by_error.py``), two runs at a time with one core each; the tasks ``shakespeare-gpu`` and
``cifar-gpu`` one at a time, on a GPU. Finished runs are kept in
``benchmarks/results/learning.csv`` and not repeated. Choices are made on the validation split; the
test split is read once, at the end of a run. Prints a table for each task and draws
``benchmarks/results/learning-TASK.png``. ``--quick`` trains one seed on digits for 300 steps, and
keeps nothing.

*Matched* low-rank gets the costs of the Gaudi run of the same seed, layer by layer: as many columns
as cost at least as much.
"""

import argparse
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from runs import (
    RESULTS,
    Row,
    RunError,
    Table,
    block_cost,
    end_with,
    layer_costs,
    run_all,
    train,
)
from tables import differences, standard_error, with_error
from tabulate import tabulate
from tasks import Task, at_once, checked, tasks

COLUMNS = (
    *("task", "method", "budget", "seed", "seconds"),
    *("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"),
    *("compress_seconds", "cost", "layers", "commit", "jax", "date"),
)
#: Arguments of the config, and options of the command line.
Method = tuple[str, tuple[str, ...]]

#: How the names of methods begin and end.
SEARCH, MATCHED, GRID = "Gaudi, search at", "low-rank, matched to ", ", grid 1/8"
SPREAD = "Gaudi, spread at"
FROZEN = (
    "--config.optimizer.structural_learning_rate=0.0",
    "--config.optimizer.location_learning_rate=0.0",
)
#: Controls whose blocks are moved to random places, once they are found or spread.
MOVED, ONE_SIZE = "Gaudi, moved to random places at", "Gaudi, of one size at random places at"
#: A control whose blocks lie where the error is, on the parts of spread ones.
BY_ERROR = "Gaudi, spread by error at"
#: The programs of controls; all others are trained by main.py.
CONTROLS = {
    MOVED: "benchmarks/random_places.py",
    ONE_SIZE: "benchmarks/random_places.py",
    BY_ERROR: "benchmarks/ranks_by_error.py",
}
#: Methods that train from scratch whose rates are tuned.
GAUDI_FROM_SCRATCH = "Gaudi, budget", "Gaudi, frozen random"
#: Methods of which fewer seeds show enough: variants of the others.
VARIANT, VARIANT_SEEDS = "variant: ", 2
FACTOR_SCALES = 1.0, 2.0, 4.0
GRADIENTS = VARIANT + "gradients on the structure, "
#: What a quick study leaves out: other times than the default's, and other rates.
NOT_QUICK = f"{VARIANT}|two steps|at 0.5|rates by width"


def methods(task: Task, budget: float) -> dict[str, Method]:
    """How each method is trained, by its name."""
    own = f"budget={budget}"
    scratch = f"recipe=budget,{own}"
    layers = {"Gaudi": "gaudi", "low-rank": "low_rank"}

    def search(
        kind: str, *shares: float, left: Sequence[float] = (), recipe: str = "search"
    ) -> Method:
        """Layers of a kind, found at these shares of the steps for what is left of the cost."""
        pairs = tuple(zip(shares, left or (budget,) * len(shares), strict=True))
        return f"layer={layers[kind]},recipe={recipe},{own}", (f"--config.compress.stages={pairs}",)

    def with_options(method: Method, *options: str) -> Method:
        return method[0], (*method[1], *options)

    on_grid = (f"--config.compress.granularity={task.width // 8}",)
    half_way = (1 + budget) / 2, budget
    random = [
        f"--config.layer.{part}.{option}"
        for part, full_width in task.full_width.items()
        for option in ("widths=random", "locations=random", f"density={full_width * budget}")
    ]
    known = {
        "dense": ("layer=dense", ()),
        "low-rank, uniform": (f"layer=low_rank,{scratch}", ()),
        "Gaudi, budget": (f"layer=gaudi,{scratch}", ()),
        "Gaudi, controller only": (f"layer=gaudi,{scratch}", FROZEN),
        "Gaudi, frozen random": (
            f"layer=gaudi,{scratch}",
            (*FROZEN, "--config.controller.name=none", *random),
        ),
        "Gaudi, learned from random": (
            f"layer=gaudi,{scratch}",
            ("--config.controller.begin=0.0", "--config.controller.end=0.0", *random),
        ),
        "Gaudi, paper": (
            "layer=gaudi,recipe=paper",
            (f"--config.controller.target={task.paper_targets.get(budget)}",),
        ),
        **{
            name: method
            for share in (0.3, 0.5)
            for name, method in {
                f"{SEARCH} {share}": search("Gaudi", share),
                f"{SEARCH} {share}{GRID}": with_options(search("Gaudi", share), *on_grid),
                f"{MATCHED}{SEARCH} {share}": search("low-rank", share),
                f"low-rank, search at {share}": search("low-rank", share),
            }.items()
        },
        f"{MATCHED}{SPREAD} 0.3": search("low-rank", 0.3),
        f"{MOVED} 0.3": search("Gaudi", 0.3),
        **{
            f"{name} 0.3{suffix}": with_options(search("Gaudi", 0.3, recipe="spread"), *options)
            for name in (SPREAD, ONE_SIZE, BY_ERROR)
            for suffix, options in {"": (), GRID: on_grid}.items()
        },
        **{
            f"{kind}, search in two steps, {first} and {last}": search(
                kind, first, last, left=half_way
            )
            for first, last in ((0.1, 0.3), (0.3, 0.5))
            for kind in layers
        },
        **{
            f"{VARIANT}{kind}, search at {share}": search(kind, share)
            for share in (0.03, 0.1, 0.2, 0.8)
            for kind in layers
        },
        **{
            f"{VARIANT}{SPREAD} {share}": search("Gaudi", share, recipe="spread")
            for share in (0.001, 0.1, 0.5, 0.7)
        },
        VARIANT + "found anew": search("Gaudi", 0.5, 0.7),
        **{
            f"{VARIANT}{rounds} rounds": with_options(
                search("Gaudi", 0.3), f"--config.compress.rounds={rounds}"
            )
            for rounds in (10, 40)
        },
        VARIANT + "uniform budgets": with_options(
            search("Gaudi", 0.3), "--config.compress.allocation=uniform"
        ),
        **{
            f"{GRADIENTS}{recipe} at {share}": with_options(
                search("Gaudi", share, recipe=recipe),
                f"--config.optimizer.structural_learning_rate={task.structural_rates[0]}",
                f"--config.optimizer.location_learning_rate={task.structural_rates[1]}",
                "--config.optimizer.layer_moment=True",
                "--config.controller.name=budget",
                f"--config.controller.target={budget}",
                f"--config.controller.floor={0.6 * budget}",
                "--config.controller.begin=0.0",
                "--config.controller.end=0.4",
            )
            for recipe, share in (("search", 0.3), ("search", 0.5), ("spread", 0.3))
        },
    }
    tuned = f"{SPREAD} 0.3", f"{SEARCH} 0.3", "low-rank, search at 0.3", "low-rank, uniform"
    known |= {
        f"{VARIANT}{name}, factors {scale:g} times as fast": with_options(
            known[name], f"--config.optimizer.factor_scale={scale}"
        )
        for scale in FACTOR_SCALES
        for name in (*tuned, *GAUDI_FROM_SCRATCH)
    }
    known |= {
        f"{name}, rates by width": with_options(
            known[name], "--config.optimizer.scale_by_width=True"
        )
        for name in GAUDI_FROM_SCRATCH
    }
    if budget not in task.paper_targets:  # nobody knows where it would end
        del known["Gaudi, paper"]
    return known


def run(name: str, task: Task, method: str, budget: float, seed: int, extra: Sequence[str]) -> Row:
    arguments, options = methods(task, budget)[method]
    options = (*task.options, f"--config.seed={seed}", *options, *extra)
    if method.startswith(MATCHED):
        options = (*options, *_matched(name, method.removeprefix(MATCHED), budget, seed))
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{name} {method} {budget}".lower())
    picture = RESULTS / "structures" / f"{slug}.png"
    summary = train(
        task.config + arguments,
        options,
        script=next((file for name, file in CONTROLS.items() if name in method), "main.py"),
        environment=task.environment,
        keep=picture if seed == 0 and not extra else None,
    )
    return summary | {
        "task": name,
        "method": method,
        "budget": 1.0 if method == "dense" else budget,
        "seed": seed,
        "compress_seconds": round(summary.get("compress_seconds", 0.0), 1),
        "test_loss": summary["test_loss_hard"],
        "test_accuracy": summary.get("test_accuracy_hard", ""),
        "cost": block_cost(summary),
        "layers": json.dumps(layer_costs(summary)),
    }


def _matched(name: str, method: str, budget: float, seed: int) -> list[str]:
    """Each layer's budget from what it costs in the Gaudi run, in whole columns, rounded up."""
    wanted = name, method, f"{budget}", f"{seed}"
    row = next(
        (
            row
            for row in FINISHED.rows()
            if (row["task"], row["method"], row["budget"], row["seed"]) == wanted
        ),
        None,
    )
    if row is None:
        raise RunError(f"{MATCHED}{method} needs the run {', '.join(wanted)}; run it before")
    rules = []
    for path, (n, m, cost) in json.loads(row["layers"]).items():
        if path.startswith("blocks"):
            columns = math.ceil(cost / (n + m))
            rules.append((path, min(columns * (n + m), n * m) / (n * m)))
    return [f"--config.compress.rules={tuple(rules)}", "--config.compress.allocation=uniform"]


FINISHED = Table(RESULTS / "learning.csv", COLUMNS)


def table(rows: Sequence[Row], measure: str) -> str:
    lines = []
    for key in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        chosen = [row for row in rows if (row["method"], row["budget"]) == key]
        cells = [_mean(chosen, f"{split}_{measure}") for split in ("validation", "test")]
        lines.append((*key, len(chosen), *cells, _mean(chosen, "cost"), _mean(chosen, "seconds")))
    headers = ("layers", "budget", "seeds", f"validation {measure}", f"test {measure}")
    return tabulate(lines, (*headers, "cost", "seconds"), tablefmt="github")


def paired_table(rows: Sequence[Row]) -> str:
    """What matched low-rank layers lose against Gaudi layers of the same seed."""
    measures = [
        f"{split}_{measure}"
        for measure in ("loss", "accuracy")
        for split in ("validation", "test")
        if all(row[f"{split}_{measure}"] for row in rows)
    ]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        rival = MATCHED + method.removesuffix(GRID)
        for budget in dict.fromkeys(row["budget"] for row in rows if row["method"] == method):
            ours, theirs = (
                [row for row in rows if (row["method"], row["budget"]) == (m, budget)]
                for m in (method, rival)
            )
            pairs = [differences(theirs, ours, measure) for measure in measures]
            if pairs[0]:
                cells = [with_error(pair, 4) for pair in pairs]
                lines.append((method, budget, len(pairs[0]), *cells))
    names = [measure.replace("_", " ") for measure in measures]
    return tabulate(lines, ("low-rank, matched, less", "budget", "seeds", *names), "github")


def layers_table(rows: Sequence[Row]) -> str:
    """What kinds of layers cost on average over the dense ones, by the last part of their path."""
    lines = []
    for key in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        shares: dict[str, list[float]] = {}
        for row in rows:
            if (row["method"], row["budget"]) == key:
                for path, (n, m, cost) in json.loads(row["layers"]).items():
                    if path.startswith("blocks"):
                        shares.setdefault(path.rpartition("/")[2], []).append(cost / (n * m))
        means = {name: f"{np.mean(shares[name]):.2f}" for name in sorted(shares)}
        lines.append({"layers": key[0], "budget": key[1]} | means)
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def _mean(rows: Sequence[Row], column: str) -> str:
    """Mean and standard error."""
    values = [float(row[column]) for row in rows]
    return with_error(values, 0 if column == "seconds" else 4)


def plot(rows: Sequence[Row], task: str, measure: str) -> None:
    """Test results against cost, with standard errors: of all methods, and of the search's."""
    figure = Figure(figsize=(12, 4.5), dpi=100, layout="constrained")
    everything, near = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["method"] for row in rows))
    colors = [colormaps[name](number) for name in ("tab20", "tab20b") for number in range(20)]
    for number, method in enumerate(name for name in names if not name.startswith(VARIANT)):
        points = []
        for budget in sorted({row["budget"] for row in rows if row["method"] == method}):
            chosen = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
            values = [float(row[f"test_{measure}"]) for row in chosen]
            cost = np.mean([float(row["cost"]) for row in chosen])
            points.append((cost, np.mean(values), standard_error(values)))
        x, y, error = zip(*points, strict=True)
        for axes in (everything, near) if _starts_dense(method) else [everything]:
            color = colors[number % len(colors)]
            axes.errorbar(x, y, yerr=error, marker="o", capsize=3, label=method, color=color)
    for axes in (everything, near):
        axes.set(xlabel="multiplications of the blocks over dense", ylabel=f"test {measure}")
        axes.legend(fontsize=7)
    everything.set_title(task)
    near.set_title("dense layers first")
    figure.savefig(RESULTS / f"learning-{task}.png")


def _starts_dense(method: str) -> bool:
    return method == "dense" or bool(re.search("search|spread|random places", method))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="shakespeare.txt", help="path of tinyshakespeare")
    parser.add_argument("--images", default="cifar10", help="folder with train/CLASS/* and test")
    names = tasks("")
    on_cpu = [name for name, task in names.items() if not task.gpu]
    parser.add_argument("--tasks", nargs="+", choices=list(names), default=on_cpu)
    parser.add_argument(
        "--methods", nargs="+", default=[""], help="those that match a regular expression"
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few minutes, nothing is kept")
    args = parser.parse_args()
    extra = []
    if args.quick:
        parser.set_defaults(tasks=["digits"], budgets=[0.25], seeds=1)
        args = parser.parse_args()
        extra = ["--config.train.steps=300", "--config.compress.rounds=10"]
        FINISHED.path = Path(tempfile.mkdtemp()) / "learning.csv"
    known = checked(parser, args, methods(tasks("")["digits"], 0.25))
    done = {
        (row["task"], row["method"], float(row["budget"]), int(row["seed"]))
        for row in FINISHED.rows()
    }
    jobs = [
        (name, known[name], method, budget, seed, extra)
        for seed in range(args.seeds)
        for name in args.tasks
        for number, budget in enumerate(args.budgets)
        for method in methods(known[name], budget)
        if any(re.search(pattern, method) for pattern in args.methods)
        and not (method.startswith(VARIANT) and seed >= VARIANT_SEEDS)
        and not (args.quick and re.search(NOT_QUICK, method))
        and (name, method, 1.0 if method == "dense" else budget, seed) not in done
        and not (method == "dense" and number)
    ]
    # The Gaudi runs come first: the matched ones need their costs.
    failures = []
    for matched in (False, True):
        chosen = [job for job in jobs if job[2].startswith(MATCHED) == matched]
        failures += run_all(chosen, run, FINISHED, at_once=at_once(known, args.tasks))
    for name in args.tasks:
        rows = [row for row in FINISHED.rows() if row["task"] == name]
        if rows:
            print(f"\n{name}\n\n{table(rows, known[name].measure)}\n\n{paired_table(rows)}")
            print(f"\n{layers_table(rows)}")
            if not args.quick:
                plot(rows, name, known[name].measure)
    end_with(failures)


if __name__ == "__main__":
    main()
