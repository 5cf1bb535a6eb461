"""What the studies in benchmarks/ keep and count."""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from gaudi_jax.training.phases import phases

ROOT = Path(__file__).parents[1]


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

    failures = runs.run_all([(name,) for name in ("slow", "failing", "a", "b")], job, table)
    assert failures == ["RunError: main.py failing failed:\nno such file"]
    assert [row["name"] for row in table.rows()] == ["a", "b", "slow"]
    with pytest.raises(SystemExit, match=r"main\.py failing failed"):
        runs.end_with(failures)
    runs.end_with([])


def test_the_share_that_each_kind_of_layer_keeps(study):
    sizes = {"blocks/0/mlp/fc1": [4, 8, 8], "blocks/1/mlp/fc1": [4, 8, 24], "head": [4, 2, 8]}
    rows = [{"method": "Gaudi", "budget": "0.125", "layers": json.dumps(sizes)}]
    assert study("learning").layers_table(rows).splitlines()[2] == "| Gaudi    | 0.125    | 0.50  |"


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
    ("change", "message"),
    [
        ({"methods": ["Monarchs"]}, "'Monarchs' matches none of: dense; Monarch"),
        ({"methods": ["^arch"]}, "'^arch' matches none of"),
        ({"methods": ["("]}, "'(' is no regular expression: missing )"),
        ({"tasks": ["shakespeare"]}, "no text in"),
        ({"tasks": ["cifar"]}, "no images in"),
        ({"budgets": [0.5, 1.5]}, "--budgets 1.5 is outside (0, 1]"),
    ],
)
def test_mistakes_are_named_before_any_run(study, change, message, capsys):
    usual = {"tasks": ["digits"], "methods": [""], "budgets": [0.5]}
    args = argparse.Namespace(**usual | change, text="nowhere.txt", images="nowhere")
    with pytest.raises(SystemExit):
        study("tasks").checked(argparse.ArgumentParser(), args, ["dense", "Monarch"])
    assert message in capsys.readouterr().err


class AskedError(Exception):
    """What a study would train: the config with its arguments, and the options."""


def config_of(file: str, options) -> ConfigDict:
    values = flags.FlagValues()
    command = ["main.py", f"--config={ROOT / 'configs' / file}", *options]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command)
    values(command)
    return config.value


@pytest.mark.parametrize("name", ["learning", "tradeoff", "ablation"])
def test_all_that_studies_train_is_known_to_the_configs(study, name, monkeypatch):
    module, known = study(name), study("tasks").tasks("text.txt", "images")

    def train(config, options, **_):
        raise AskedError(config, options)

    monkeypatch.setattr(module, "train", train)
    if name == "ablation":
        jobs = [(*variant, 0) for variant in module.variants()]
    elif name == "tradeoff":
        jobs = [(n, task, m, 0.25, 0, ()) for n, task in known.items() for m in module.METHODS]
    else:
        jobs = [
            (n, task, method, 0.25, 0, ())
            for n, task in known.items()
            for method in module.methods(task, 0.25)
            if not method.startswith(module.MATCHED)  # these ask for a finished run
        ]
    for job in jobs:
        with pytest.raises(AskedError) as asked:
            module.run(*job)
        config = config_of(*asked.value.args)
        assert all(phase.first for phase in phases(config) if phase.budget is not None), job


def test_each_group_of_ablations_has_a_run_in_which_nothing_is_changed(study):
    ablation = study("ablation")
    variants = list(ablation.variants())
    for group in {group for group, _ in variants}:
        names = [name for its_group, name in variants if its_group == group]
        assert sum(name.startswith(ablation.USUAL) for name in names) == 1, group


def test_ablations_are_chosen_by_patterns_that_match(study, monkeypatch, capsys):
    for pattern, message in {"(": "no regular expression", "rank 5": "matches none of"}.items():
        monkeypatch.setattr(sys, "argv", ["ablation", "--methods", pattern])
        with pytest.raises(SystemExit):
            study("ablation").main()
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- benchmarks/tradeoff.py


def made_up(method, budget, seed, loss, cost=None, deployed_ms=2.0):
    """A row of a study, as its file gives it back."""
    values = {
        "task": "digits",
        "method": method,
        "budget": budget,
        "share": "" if method == "dense" else 0.3,
        "seed": seed,
        **{f"{split}_loss": loss for split in ("validation", "test")},
        **{f"{split}_accuracy": 1 - loss for split in ("validation", "test")},
        "cost": budget if cost is None else cost,
        "dense_ms": 4.0,
        "deployed_ms": deployed_ms,
    }
    return {name: str(value) for name, value in values.items()}


ROWS = [
    made_up("BLAST", 0.25, 0, 0.5, deployed_ms=3.0),
    made_up("dense", 1.0, 0, 0.125, deployed_ms=4.0),
    made_up("Gaudi", 0.25, 1, 0.5),
    made_up("Gaudi", 0.25, 0, 0.25, cost=0.2),
    made_up("BLAST", 0.25, 1, 1.0),
    made_up("BLAST", 0.25, 2, 9.0),
]


def cells_of(table):
    """The words of a table's lines, but for the headers."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[2:]]


def test_tables_of_rivals(study):
    tradeoff = study("tradeoff")
    dense, blast, gaudi = cells_of(tradeoff.table(ROWS, "accuracy"))
    assert dense == ["dense", "1", "1", "0.8750", "0.8750", "1.0000", "1.0000"]
    assert blast[:3] == ["BLAST", "0.25", "3"]
    assert gaudi == [
        *("Gaudi", "0.25", "2", "0.6250 ± 0.1250", "0.6250 ± 0.1250"),
        *("0.2250 ± 0.0250", "0.5000 ± 0.0000"),
    ]
    # None but dense layers are compared at another budget, and no seed without its own Gaudi run.
    pair = "0.3750 ± 0.1250"
    assert cells_of(tradeoff.paired_table(ROWS)) == [
        ["dense", "Gaudi", "0.25", "-0.1250", "-0.1250", "one seed"],
        ["BLAST", "Gaudi", "0.25", pair, pair, "Gaudi"],
    ]
    assert cells_of(tradeoff.paired_table(ROWS[:2])) == []


def test_the_picture_shows_each_method_once(study, tmp_path, monkeypatch):
    tradeoff, figures = study("tradeoff"), []

    def figure(**options):
        figures.append(Figure(**options))
        return figures[-1]

    monkeypatch.setattr(tradeoff, "Figure", figure)
    tradeoff.plot(ROWS, "digits", "loss", tmp_path)
    assert (tmp_path / "tradeoff-digits.png").read_bytes().startswith(b"\x89PNG")
    for axes, x in zip(figures[0].axes, (0.225, 0.5), strict=True):
        lines = dict(zip(axes.get_legend_handles_labels()[1], axes.containers, strict=True))
        assert list(lines) == ["dense", "BLAST", "Gaudi"]
        np.testing.assert_allclose(lines["Gaudi"][0].get_xydata(), [(x, 0.375)])


def test_finished_runs_are_not_repeated(study, tmp_path, monkeypatch, capsys):
    tradeoff, done = study("tradeoff"), []

    def run(name, task, method, budget, seed, extra):
        done.append((name, method, budget, seed))
        return made_up(method, budget, seed, 0.5)

    monkeypatch.setattr(tradeoff, "run", run)
    monkeypatch.setattr(tradeoff, "RESULTS", tmp_path)
    monkeypatch.setattr(tradeoff.FINISHED, "path", tmp_path / "tradeoff.csv")
    for seeds, wanted in ((1, (0,)), (1, ()), (2, (1,))):
        command = (
            f"tradeoff --tasks digits --methods dense BLAST --budgets 0.5 0.25 --seeds {seeds}"
        )
        monkeypatch.setattr(sys, "argv", command.split())
        tradeoff.main()
        runs = [("dense", 1.0), ("BLAST", 0.5), ("BLAST", 0.25)]  # dense layers once
        assert sorted(done) == sorted(("digits", *each, seed) for seed in wanted for each in runs)
        done.clear()
        assert capsys.readouterr().out.count("| BLAST") == 2
    assert (tmp_path / "tradeoff-digits.png").exists()


# ---------------------------------------------------------------- benchmarks/regroup.py


def test_blocks_are_found_anew_in_the_fine_tuned_model(study, tmp_path, monkeypatch):
    regroup = study("regroup")
    trainings = []

    def train(config, options, *, environment, measure):
        number = len(trainings)
        trainings.append((config, options))
        workdir = tmp_path / f"{number}"
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps({"train": {"steps": 1500}}))
        losses = dict.fromkeys(("validation_loss", "test_loss_hard"), float(number))
        summary = losses | {"compressed_test_loss": 10.0 + number, "commit": "", "jax": ""}
        return summary | {"date": ""} | measure(str(workdir))

    monkeypatch.setattr(regroup, "train", train)
    times = {"dense_ms": 4.0, "deployed_ms": 2.0}
    monkeypatch.setattr(regroup, "latency", lambda workdir, environment: times)
    task = study("tasks").tasks("")["digits"]
    row = regroup.run("digits", task, "", 0.25, 1)
    fine = "digits_vit_gaudi_finetune.py:dense="
    assert [config for config, _ in trainings] == [
        "digits_vit_gaudi.py:layer=dense",
        f"{fine}{tmp_path}/0,budget=0.25",
        f"{fine}{tmp_path}/1,budget=0.25,granularity=12",  # for a quarter of the steps
        f"{fine}{tmp_path}/0,budget=0.25,granularity=12",
    ]
    short = "--config.train.steps=375"
    assert [short in options for _, options in trainings] == [False, False, True, False]
    assert all("--config.seed=1" in options for _, options in trainings)
    losses = {name: value for name, value in row.items() if name.endswith("loss")}
    assert losses == {"dense_test_loss": 0.0} | {
        f"{form}_{name}": number + more
        for number, form in enumerate(("anywhere", "anew", "grid"), 1)
        for name, more in {"start_loss": 10.0, "validation_loss": 0.0, "test_loss": 0.0}.items()
    }
    assert row["anew_time"] == 0.5
    rows = cells_of(regroup.table([{name: str(value) for name, value in row.items()}]))
    assert rows[1] == ["found anew on the grid", "0.25", "1", "12", "2", "2", "0.5"]


# ---------------------------------------------------------------- benchmarks/kernels.py


@pytest.fixture
def errors_of(study, tmp_path, monkeypatch, capsys):
    """What the study prints of a file with some arrays, by some of its methods."""
    kernels = study("kernels")

    def errors_of(names, *options, **arrays):
        np.savez(tmp_path / "matrix.npz", **arrays)
        # Each kind of fit takes seconds to compile.
        monkeypatch.setattr(kernels, "METHODS", {name: kernels.METHODS[name] for name in names})
        monkeypatch.setattr(sys, "argv", ["kernels", str(tmp_path / "matrix.npz"), *options])
        kernels.main()
        return cells_of(capsys.readouterr().out.strip())

    return errors_of


def test_errors_of_kernels_are_those_of_the_layers(errors_of):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(32, 2)) @ rng.normal(size=(2, 16))
    methods = "low-rank", "Monarch, 2", "block-sparse, 32", "Gaudi, grid"
    rows = errors_of(methods, M=matrix, budget=4 * 48 + 4)
    # 32 parts do not divide 16 inputs; two of Gaudi's blocks are enough.
    assert rows == [["matrix", "0.383", "0.000 (0.98)", "0.000 (0.98)", "–", "0.000 (0.49)"]]
    energies = np.linalg.svd(matrix, compute_uv=False) ** 2
    error = np.sqrt(energies[1] / energies.sum())
    # It buys one column, and less than one in every block.
    rows = errors_of(methods[:2], "--budget", "0.1", M=matrix)
    assert rows == [["matrix", "0.100", f"{error:.3f} (0.94)", "–"]]


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"kernel": np.ones((2, 2))}, (), "matrix.npz has no M; it has kernel"),
        ({"M": np.ones(5)}, ("--budget=0.5",), "shape (5,), is no matrix of finite numbers"),
        ({"M": np.full((2, 2), np.nan)}, ("--budget=0.5",), "is no matrix of finite numbers"),
        ({"M": np.ones((2, 2))}, ("--budget=0",), "--budget 0.0 is outside (0, 1]"),
    ],
)
def test_a_file_without_a_kernel_is_told_in_a_sentence(arrays, options, message, errors_of, capsys):
    with pytest.raises(SystemExit):
        errors_of(["low-rank"], *options, **arrays)
    assert message in capsys.readouterr().err


def test_packed_outputs_that_are_not_the_dense_ones_fail_the_benchmark(study):
    deploy = study("deploy")
    right = {"what": "fc1", "difference": 1e-6}
    deploy.check([right], "float32")
    for difference in (1e-3, float("nan")):
        with pytest.raises(SystemExit, match=r"\(fc2: "):
            deploy.check([right, {"what": "fc2", "difference": difference}], "float32")


def test_rows_of_the_deploy_benchmark_are_kept(study, tmp_path, monkeypatch):
    deploy = study("deploy")
    monkeypatch.setattr(deploy.KEPT, "path", tmp_path / "rows.csv")
    deploy.keep([{"what": "fc1", "dense_ms": 1.23456, "difference": 1e-6}])
    (row,) = deploy.KEPT.rows()
    assert (row["what"], row["dense_ms"], row["difference"]) == ("fc1", "1.235", "1e-06")
    assert row["commit"]


def test_tasks_for_a_gpu_need_one_and_run_alone(study, monkeypatch, capsys):
    tasks = study("tasks")
    known = tasks.tasks("")
    assert tasks.at_once(known, ["digits", "docs"]) == 2
    assert tasks.at_once(known, ["digits", "cifar-gpu"]) == 1
    monkeypatch.setattr(tasks, "has_gpu", lambda: False)
    args = argparse.Namespace(tasks=["cifar-gpu"], methods=[""], budgets=[0.5])
    with pytest.raises(SystemExit):
        tasks.checked(argparse.ArgumentParser(), args, ["dense"])
    assert "cifar-gpu needs a GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_trained_run_takes_deployed(tmp_path):
    run = tmp_path / "run"
    config = "--config=configs/docs_gpt_gaudi.py:smoke,recipe=budget"
    here = {
        "cwd": ROOT,
        "env": os.environ | {"JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)},
    }
    subprocess.run([sys.executable, "main.py", config, f"--workdir={run}"], check=True, **here)
    command = ["benchmarks/deploy_run.py", str(run), "--batch=1", "--repeats=1", "--decode"]
    told = subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, **here
    ).stdout
    assert told.count("blocks/") >= 4
    for form in ("dense", "packed", "low_rank"):
        assert told.count(f"| {form} ") == 2
