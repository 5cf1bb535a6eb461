"""What each choice of the method is worth, one at a time, on digits at an eighth of the cost.

    python benchmarks/ablation.py [--seeds 3] [--methods PATTERN ...]

Trains every variant through ``main.py``, two runs at a time with one core each. Finished runs are
kept in ``benchmarks/results/ablation.csv`` and not repeated. Prints a table: cost, validation and
test results with hard masks, what the test loss has more than that of the same seed where nothing
is changed, and what soft masks give. At a quarter of the cost nothing could be told apart. What
``benchmarks/learning.py`` compares (structures frozen at random, controller only, the time of the
search) is not repeated here, but for two variants of the search recipe: uniform budgets, and
gradients on the structure that the search has found.
"""

import argparse
import re
from collections.abc import Sequence

from learning import GRADIENTS, VARIANT, methods
from runs import RESULTS, Row, Table, block_cost, end_with, run_all, train
from tables import differences, with_error
from tabulate import tabulate
from tasks import check_patterns, tasks

BUDGET = 0.125
PARTS = ("attention", "mlp")
COLUMNS = (
    *("group", "variant", "seed", "seconds", "cost"),
    *("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"),
    *("test_loss_soft", "test_accuracy_soft", "commit", "jax", "date"),
)
#: How the variant of each group begins in which nothing is changed.
USUAL = "as it is"
FINISHED = Table(RESULTS / "ablation.csv", COLUMNS)


def of_layers(**options: object) -> tuple[str, ...]:
    return tuple(
        f"--config.layer.{part}.{name}={value}" for part in PARTS for name, value in options.items()
    )


def variants() -> dict[tuple[str, str], tuple[str, tuple[str, ...]]]:
    """Arguments of the config and options, by what is changed and to what."""
    target, strength = tasks("")["digits"].paper_targets[BUDGET], 1.0
    paper = (f"--config.controller.target={target}",)
    scratch, search = f"recipe=budget,budget={BUDGET}", f"recipe=search,budget={BUDGET}"
    found: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
        ("published recipe", f"{USUAL}: sigma 1 to 100"): ("recipe=paper", paper),
        ("published recipe", "sigma 100"): (
            "recipe=paper",
            (*paper, "--config.sigma.start=100.0", *of_layers(sigma=100.0)),
        ),
        ("published recipe", "sigma infinite"): (
            "recipe=paper",
            (
                *paper,
                *("--config.sigma.start=inf", "--config.sigma.end=inf"),
                *of_layers(sigma="inf"),
            ),
        ),
    }
    for factor in (0.25, 4.0):
        found["published recipe", f"lambda {strength * factor:g} instead of {strength:g}"] = (
            "recipe=paper",
            (*paper, f"--config.controller.strength={strength * factor}"),
        )
    for factor in (0.5, 2.0):
        found["published recipe", f"target {target * factor:g} instead of {target:g}"] = (
            "recipe=paper",
            (f"--config.controller.target={target * factor}",),
        )
    group = "budget recipe"
    found |= {
        (group, f"{USUAL}: rank 1, grid 1, split, spaced"): (scratch, ()),
        (group, "rank 4"): (scratch, of_layers(rank=4)),
        (group, "grid of 12 features"): (scratch, of_layers(granularity=12)),
        (group, "starts as the truncated SVD"): (scratch, of_layers(widths="leading")),
        (group, "starts at random intervals"): (
            scratch,
            of_layers(widths="random", locations="random"),
        ),
        (group, "all blocks start at 0"): (scratch, of_layers(locations="zero")),
        (group, "derivatives not smoothed"): (scratch, of_layers(backward_smoothing=0.0)),
        (group, "no floors of layers"): (scratch, ("--config.controller.floor=0.0",)),
    }
    group = "search recipe"
    of_study = methods(tasks("")["digits"], BUDGET)
    found |= {
        (group, f"{USUAL}: rank 1, grid 1, dense for 0.3"): (search, ()),
        (group, "rank 4"): (search, ("--config.compress.rank=4",)),
        (group, "dense for 0.1"): (search, (f"--config.compress.stages=((0.1,{BUDGET}),)",)),
        (group, "dense for 0.5"): (search, (f"--config.compress.stages=((0.5,{BUDGET}),)",)),
        (group, "not aware of activations"): (
            search,
            ("--config.compress.calibration_batches=0",),
        ),
        (group, "uniform budgets"): of_study[VARIANT + "uniform budgets"],
        (group, "gradients on the structure after the search"): of_study[
            f"{GRADIENTS}search at 0.3"
        ],
    }
    return found


def run(group: str, variant: str, seed: int) -> Row:
    task = tasks("")["digits"]
    arguments, options = variants()[group, variant]
    summary = train(f"{task.config}{arguments}", (*task.options, f"--config.seed={seed}", *options))
    return summary | {
        "group": group,
        "variant": variant,
        "seed": seed,
        "cost": block_cost(summary),
        **{f"validation_{name}": summary[f"validation_{name}"] for name in ("loss", "accuracy")},
        **{f"test_{name}": summary[f"test_{name}_hard"] for name in ("loss", "accuracy")},
        **{f"test_{name}_soft": summary[f"test_{name}_soft"] for name in ("loss", "accuracy")},
    }


def table(rows: Sequence[Row]) -> str:
    lines = []
    for group, variant in variants():
        chosen = [row for row in rows if (row["group"], row["variant"]) == (group, variant)]
        if not chosen:
            continue
        cells = [
            with_error([float(row[column]) for row in chosen], digits)
            for column, digits in {
                "cost": 3,
                "validation_loss": 4,
                "test_accuracy": 4,
                "test_loss": 4,
                "test_loss_soft": 4,
            }.items()
        ]
        usual = [row for row in rows if row["group"] == group and row["variant"].startswith(USUAL)]
        pair = differences(chosen, usual, "test_loss")
        more = with_error(pair, 4) if pair and chosen != usual else ""
        lines.append((group, variant, len(chosen), *cells[:-1], more, cells[-1]))
    headers = (
        *("", "", "seeds", "cost", "validation loss", "test accuracy", "test loss"),
        *("more than as it is", "test loss with soft masks"),
    )
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", nargs="+", default=[""], help="those that match a regular expression"
    )
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    names = {key: ": ".join(key) for key in variants()}
    check_patterns(parser, args.methods, names.values())
    done = {(row["group"], row["variant"], int(row["seed"])) for row in FINISHED.rows()}
    jobs = [
        (group, variant, seed)
        for seed in range(args.seeds)
        for (group, variant), name in names.items()
        if any(re.search(pattern, name) for pattern in args.methods)
        and (group, variant, seed) not in done
    ]
    failures = run_all(jobs, run, FINISHED)
    print(table(FINISHED.rows()))
    end_with(failures)


if __name__ == "__main__":
    main()
