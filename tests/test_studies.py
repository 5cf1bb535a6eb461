"""What the studies in benchmarks/ keep and count."""

import argparse
import importlib
import sys
import threading
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    """Imports a module of benchmarks/, whose scripts see one another under their plain names."""
    names = [path.stem for path in BENCHMARKS.glob("*.py")]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def test_rows_are_kept_as_they_end_and_a_failure_is_told_last(study, tmp_path):
    runs = study("runs")
    table = runs.Table(tmp_path / "rows.csv", ("name",))

    def job(name):
        if name == "slow":  # two of the others end before, one while it runs
            while len(table.rows()) < 2:
                time.sleep(0.01)
        if name == "failing":
            raise runs.failed(["main.py", name], "no such file")
        return {"name": name, "not a column": 1}

    with pytest.raises(SystemExit, match=r"RunError: main.py failing failed:\nno such file"):
        runs.run_all([(name,) for name in ("slow", "failing", "a", "b")], job, table)
    assert [row["name"] for row in table.rows()] == ["a", "b", "slow"]


def test_trainings_stand_still_while_something_is_measured(study, tmp_path):
    runs, ticks = study("runs"), tmp_path / "ticks"
    code = f"""import time
while True:
    with open({str(ticks)!r}, "a") as file:
        file.write(".")
    time.sleep(0.01)
    if len(open({str(ticks)!r}).read()) > 100:
        break
"""
    training = threading.Thread(
        target=runs._trainings.run, args=([sys.executable, "-c", code], {}), daemon=True
    )
    training.start()
    while not ticks.exists():
        time.sleep(0.01)
    with runs.alone():
        time.sleep(0.1)  # the signal has arrived
        before = ticks.read_text()
        time.sleep(0.5)
        assert ticks.read_text() == before
    assert 0.6 < runs._trainings.stopped < 5
    training.join(timeout=30)
    assert len(ticks.read_text()) > len(before)


def test_differences_are_those_of_the_same_seeds(study):
    tables = study("tables")
    ours = [{"seed": "1", "loss": "0.5"}, {"seed": "0", "loss": "0.25"}]
    theirs = [
        {"seed": "0", "loss": "0.5"},
        {"seed": "1", "loss": "1.5"},
        {"seed": "2", "loss": "9"},
    ]
    pairs = tables.differences(theirs, ours, "loss")
    assert pairs == [0.25, 1.0]
    assert tables.with_error(pairs, 3) == "0.625 ± 0.375"
    assert tables.with_error(pairs[:1], 3) == "0.250"
    assert tables.verdict(pairs, "ours", "theirs") == "ours"
    assert tables.verdict([-0.25, -1.0], "ours", "theirs") == "theirs"
    assert tables.verdict([-1.0, 1.5], "ours", "theirs") == "tied"
    assert tables.verdict([1.0], "ours", "theirs") == "one seed"


@pytest.mark.parametrize(
    ("tasks", "methods", "message"),
    [
        (["digits"], ["Monarchs"], "part of none of: dense"),
        (["shakespeare"], [""], "no text in"),
        (["cifar"], [""], "no images in"),
    ],
)
def test_mistakes_are_named_before_any_run(study, tasks, methods, message, capsys):
    args = argparse.Namespace(tasks=tasks, methods=methods, text="nowhere.txt", images="nowhere")
    with pytest.raises(SystemExit):
        study("learning").checked(argparse.ArgumentParser(), args, ["dense", "Monarch"])
    assert message in capsys.readouterr().err


def test_each_group_of_ablations_has_a_run_in_which_nothing_is_changed(study):
    ablation = study("ablation")
    variants = list(ablation.variants())
    for group in {group for group, _ in variants}:
        names = [name for its_group, name in variants if its_group == group]
        assert sum(name.startswith(ablation.USUAL) for name in names) == 1, group
