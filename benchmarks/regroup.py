"""Trained blocks that are found anew on a coarse grid, against ones found there at once.

    python benchmarks/regroup.py --text shakespeare.txt [--tasks digits shakespeare]
        [--budgets 0.25 0.125] [--seeds 2]

Trains a dense model, compresses and fine-tunes it with blocks that lie anywhere, finds these anew
on a grid of eighths of the model's width, and fine-tunes for a quarter of the steps; beside that,
blocks that are found on the grid in the dense model, with all steps of fine-tuning. Times are those
of ``benchmarks/tradeoff.py``: the deployed form over a dense one. Two at a time, one core each;
finished rows are kept in ``benchmarks/results/regroup.csv`` and not repeated.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from runs import RESULTS, Row, Table, end_with, run_all, train
from tables import with_error
from tabulate import tabulate
from tasks import Task, checked
from tradeoff import latency

from gaudi_jax.training.workdir import read_config

#: Configs that fine-tune each task.
FINETUNE = {
    "digits": "digits_vit_gaudi_finetune.py:",
    "shakespeare": "shakespeare_gpt_finetune.py:size=cpu,text={text},",
}
#: Share of the steps for which blocks that were found anew are trained on.
SHORT = 1 / 4
FORMS = ("anywhere", "anew", "grid")
MEASURES = ("start_loss", "validation_loss", "test_loss", "time")
COLUMNS = (
    *("task", "budget", "seed", "dense_test_loss"),
    *(f"{form}_{measure}" for form in FORMS for measure in MEASURES),
    *("commit", "jax", "date"),
)
#: What is done with a workdir before it goes.
Then = Callable[[str], None]
FINISHED = Table(RESULTS / "regroup.csv", COLUMNS)


def run(name: str, task: Task, text: str, budget: float, seed: int) -> Row:
    row: Row = {"task": name, "budget": budget, "seed": seed}
    seeded = (*task.options, f"--config.seed={seed}")

    def finetune(form: str, start: str, *options: str, then: Then = lambda _: None) -> None:
        """Fills in what one form of the model has, fine-tuned from a workdir."""

        def measured(workdir: str) -> Row:
            times = latency(workdir, task.environment)
            then(workdir)
            return {"time": times["deployed_ms"] / times["dense_ms"]}

        grid = "" if form == "anywhere" else f",granularity={task.width // 8}"
        summary = train(
            f"{FINETUNE[name].format(text=text)}dense={start},budget={budget}{grid}",
            (*seeded, *options),
            environment=task.environment,
            measure=measured,
        )
        summary["start_loss"] = summary["compressed_test_loss"]
        summary["test_loss"] = summary["test_loss_hard"]
        row.update({f"{form}_{measure}": summary[measure] for measure in MEASURES})
        row.update({key: summary[key] for key in ("commit", "jax", "date")})

    def find_anew(workdir: str) -> None:
        steps = round(SHORT * read_config(workdir)["train"]["steps"])
        finetune("anew", workdir, f"--config.train.steps={steps}")

    def from_dense(workdir: str) -> Row:
        finetune("anywhere", workdir, then=find_anew)
        finetune("grid", workdir)
        return {}

    dense = train(
        task.config + "layer=dense", seeded, environment=task.environment, measure=from_dense
    )
    return row | {"dense_test_loss": dense["test_loss_hard"]}


def table(rows: Sequence[Row]) -> str:
    """Means of all seeds, with standard errors."""
    names = {
        "anywhere": "blocks anywhere",
        "anew": "found anew on the grid",
        "grid": "found on the grid at once",
    }
    lines = []
    for budget in sorted({row["budget"] for row in rows}, key=float, reverse=True):
        chosen = [row for row in rows if row["budget"] == budget]
        for form in FORMS:
            cells = [
                with_error([float(row[f"{form}_{measure}"]) for row in chosen], 4)
                for measure in MEASURES
            ]
            lines.append((names[form], budget, len(chosen), *cells))
    headers = ("blocks", "budget", "seeds", "test loss before fine-tuning", "validation loss")
    return tabulate(lines, (*headers, "test loss", "time over dense"), tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="shakespeare.txt", help="path of tinyshakespeare")
    parser.add_argument("--tasks", nargs="+", choices=list(FINETUNE), default=list(FINETUNE))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    args.images, args.methods = "", []
    known = checked(parser, args, ())
    done = {(row["task"], float(row["budget"]), int(row["seed"])) for row in FINISHED.rows()}
    jobs = [
        (name, known[name], str(Path(args.text).resolve()), budget, seed)
        for seed in range(args.seeds)
        for name in args.tasks
        for budget in args.budgets
        if (name, budget, seed) not in done
    ]
    failures = run_all(jobs, run, FINISHED)
    for name in args.tasks:
        rows = [row for row in FINISHED.rows() if row["task"] == name]
        if rows:
            print(f"\n{name}\n\n{table(rows)}")
    end_with(failures)


if __name__ == "__main__":
    main()
