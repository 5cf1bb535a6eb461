import math

import pytest

from gaudi_jax.errors import UserError
from gaudi_jax.training.metrics import MetricLog, Progress, read_metrics
from gaudi_jax.training.workdir import check_workdir, claim_workdir, read_config

CONFIG = {"seed": 0, "sigma": {"start": 1.0, "end": math.inf}, "data": {"mean": (0.5, 0.25)}}


def test_config_is_read_back_as_it_was(tmp_path):
    claim_workdir(tmp_path / "new" / "run", CONFIG)
    assert read_config(tmp_path / "new" / "run") == CONFIG


def test_a_workdir_belongs_to_one_config(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    claim_workdir(tmp_path, CONFIG | {"evaluate_only": True})
    with pytest.raises(UserError, match=r"seed is 0 there and 1 here.*another --workdir"):
        claim_workdir(tmp_path, CONFIG | {"seed": 1})
    with pytest.raises(UserError, match=r"sigma.end is inf there and 100.0 here"):
        claim_workdir(tmp_path, CONFIG | {"sigma": {"start": 1.0, "end": 100.0}})
    with pytest.raises(UserError, match=r"seed is 0 there and None here"):
        claim_workdir(tmp_path, {key: value for key, value in CONFIG.items() if key != "seed"})
    assert read_config(tmp_path) == CONFIG


def test_what_the_data_decide_is_compared_only_where_it_is_known(tmp_path):
    claim_workdir(tmp_path, CONFIG | {"model": {"width": 8, "num_classes": 10}})
    check_workdir(tmp_path, CONFIG | {"model": {"width": 8}})
    with pytest.raises(UserError, match=r"model.num_classes is 10 there and 9 here"):
        check_workdir(tmp_path, CONFIG | {"model": {"width": 8, "num_classes": 9}})


def test_what_may_differ_may_differ_in_the_config_of_a_dense_phase_too(tmp_path):
    config = {"data": {"cache_dir": "a"}, "model": {"width": 8}}
    saved = config | {"model": {"width": 8, "num_classes": 10}}
    claim_workdir(tmp_path, saved | {"pretrain": saved})
    moved = config | {"data": {"cache_dir": "b"}}
    check_workdir(tmp_path, moved | {"pretrain": moved})
    wider = config | {"model": {"width": 9}}
    with pytest.raises(UserError, match=r"pretrain.model.width is 8 there and 9 here"):
        check_workdir(tmp_path, config | {"pretrain": wider})


def test_an_unusable_workdir_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the workdir .*file"):
        claim_workdir(tmp_path / "file" / "run", CONFIG)
    with pytest.raises(UserError, match="holds no run"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        claim_workdir(tmp_path, CONFIG)


def test_metrics_come_back_with_their_infinities(tmp_path):
    rows = [{"step": 1, "loss": 0.5, "sigma": math.inf}, {"step": 2, "loss": -math.inf}]
    with MetricLog(tmp_path) as log:
        for row in rows:
            log.write(row)
        log.write({"step": 3, "loss": math.nan})
    assert '"inf"' in (tmp_path / "metrics.jsonl").read_text()
    *read, last = read_metrics(tmp_path)
    assert read == rows
    assert math.isnan(last["loss"])
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    with MetricLog(tmp_path) as log:
        for step in (1, 2, 3):
            log.write({"step": step, "loss": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    assert len(read_metrics(tmp_path)) == 3
    with MetricLog(tmp_path, resumed_from=2) as log:
        log.write({"step": 3, "loss": 0.25})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
        {"resumed_from": 2},
        {"step": 3, "loss": 0.25},
    ]


def test_starting_afresh_drops_the_rows_of_a_run_without_checkpoint(tmp_path):
    for _ in range(2):
        with MetricLog(tmp_path) as log:
            log.write({"step": 1, "loss": 0.5})
    assert len(read_metrics(tmp_path)) == 1


def test_a_damaged_row_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "nowhere") == []


def test_progress_prints_whole_lines_where_there_is_no_terminal(capsys):
    with Progress(10, 0, unit="image", units_per_step=4) as progress:
        for step in range(1, 11):
            progress.show({"train_loss": 1.5, "relative_multiplications": 0.25, "other": 1.0})
            progress.advance(step)
    error = capsys.readouterr().err
    assert error.startswith("step 10/10, loss 1.500, cost 0.250, ")
    assert "images/s" in error
    assert error.count("\n") == 1
