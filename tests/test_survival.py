"""What befalls a run: signals, numbers that are not finite, disks and devices without room."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gaudi_jax.data.images import load_images
from gaudi_jax.data.pipeline import train_batches
from gaudi_jax.errors import UserError, exit_status
from gaudi_jax.training import loop
from gaudi_jax.training.checkpoint import Checkpointer
from gaudi_jax.training.image_task import ImageTask
from gaudi_jax.training.metrics import MetricLog, read_metrics
from gaudi_jax.training.stall import StallWatch
from tests.runs import assert_same, parameters, rows_without_time, steps_saved, stop_at, tiny_config
from tests.test_checkpoint import abstract, make_state, restore, saved  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
HUGE = 1e4


def infinite_at(monkeypatch, *steps):
    """The loss of these steps is infinite, and its gradients are finite."""
    put_batch, loss = loop.put_batch, ImageTask.loss
    reads = iter(range(1, 1000))

    def marked(batch, mesh):
        placed = put_batch(batch, mesh)
        if "weight" not in batch:  # a batch of training
            scale = HUGE if next(reads) in steps else 1.0
            placed["image"] = placed["image"].astype(jnp.float32) * scale
        return placed

    def infinite_where_marked(self, model, batch, key):
        value, metrics = loss(self, model, batch, key)
        return value + jnp.where(batch["image"].max() > HUGE, jnp.inf, 0.0), metrics

    monkeypatch.setattr(loop, "put_batch", marked)
    monkeypatch.setattr(ImageTask, "loss", infinite_where_marked)


def config_of_single_steps():
    config = tiny_config()
    config.train.log_every = 1
    config.checkpoint.update(every=1, keep=9)
    return config


def test_a_step_with_an_infinite_loss_is_skipped(tmp_path, monkeypatch):
    infinite_at(monkeypatch, 3)
    assert loop.train(config_of_single_steps(), tmp_path)
    rows = [row for row in read_metrics(tmp_path) if "train_loss" in row]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert [row["train_loss"] == np.inf for row in rows] == [False, False, True, *[False] * 5]
    assert steps_saved(tmp_path) == [1, 2, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_a_checkpoint_that_falls_on_a_skipped_step_is_made_up_for(tmp_path, monkeypatch):
    infinite_at(monkeypatch, 4)
    config = tiny_config()
    config.checkpoint.update(every=4, keep=9)
    assert loop.train(config, tmp_path)
    assert steps_saved(tmp_path) == [5, 8]


@pytest.mark.slow
def test_a_last_step_without_a_finite_loss_ends_the_run_well(tmp_path, monkeypatch):
    infinite_at(monkeypatch, 8)
    assert loop.train(config_of_single_steps(), tmp_path)
    assert steps_saved(tmp_path)[-1] == 8
    before, after = parameters(tmp_path, 7), parameters(tmp_path, 8)
    assert_same(after, before)


@pytest.mark.slow
def test_a_run_that_is_stopped_on_a_skipped_step_saves(tmp_path, monkeypatch):
    infinite_at(monkeypatch, 3)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert not loop.train(tiny_config(), tmp_path)
    assert steps_saved(tmp_path) == [2, 3]


@pytest.mark.slow
def test_a_signal_cuts_an_evaluation_short_and_it_is_made_up_for(tmp_path, monkeypatch):
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    config = tiny_config()
    config.controller.end = 0.25  # from step 2 on the cost has settled, and results are scores
    config.checkpoint.keep = 9
    assert loop.train(config, calm)
    through = StallWatch.through

    def killed_at_the_first(self, items, step, what):
        for item in through(self, items, step, what):
            yield item
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StallWatch, "through", killed_at_the_first)
        assert not loop.train(config, disturbed)
    assert steps_saved(disturbed)[-1] == 4
    assert not any("validation_loss" in row for row in read_metrics(disturbed))
    assert loop.train(config, disturbed)
    rows = [row for row in rows_without_time(disturbed) if "resumed_from" not in row]
    assert rows == rows_without_time(calm)
    assert_same(parameters(disturbed), parameters(calm))
    scores = []
    for workdir in (calm, disturbed):
        with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
            scores.append(checkpoints._scores)
    assert scores[0][4] == scores[1][4] > -np.inf


@pytest.mark.slow
def test_a_signal_before_the_last_evaluation_leaves_it_to_the_next_start(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert not loop.train(tiny_config(), tmp_path)
    assert steps_saved(tmp_path)[-1] == 8
    assert loop.train(tiny_config(), tmp_path)
    assert any(row.get("step") == 8 and "validation_loss" in row for row in read_metrics(tmp_path))


def test_a_score_that_is_given_later_counts(saved):  # noqa: F811
    with Checkpointer(saved, keep=3) as checkpoints:
        checkpoints.rate(2, 0.5)
        checkpoints.save(4, make_state(4), score=0.1)
    assert restore(saved, step="best").step == 2


def test_what_the_system_could_not_read_is_read_again(saved, monkeypatch, caplog):  # noqa: F811
    read, failures = Checkpointer._read, iter([OSError(errno.EMFILE, "Too many open files")])

    def failing_once(self, *arguments):
        if error := next(failures, None):
            raise error
        return read(self, *arguments)

    monkeypatch.setattr(Checkpointer, "_read", failing_once)
    with Checkpointer(saved) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0))).step == 3
    assert "Too many open files; reading it again" in caplog.text
    assert not list(saved.glob("*.damaged"))


def test_what_the_system_cannot_read_is_no_damage(saved, monkeypatch):  # noqa: F811
    def failing(self, *_):
        raise ValueError("RESOURCE_EXHAUSTED: Error opening 'd/1': Too many open files")

    monkeypatch.setattr(Checkpointer, "_read", failing)
    with (
        Checkpointer(saved) as checkpoints,
        pytest.raises(UserError, match=r"checkpoint 3 in .* cannot be read"),
    ):
        checkpoints.restore(abstract(make_state(0)))
    assert not list(saved.glob("*.damaged"))


def test_a_full_disk_is_told_when_curves_are_written(tmp_path):
    log = MetricLog(tmp_path)
    with open("/dev/full", "wb", buffering=0) as full:
        log._curves._writer._py_recordio_writer._writer = full
        with pytest.raises(OSError, match="No space left") as caught:
            log.write({"step": 1, "train_loss": 0.5})
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_device_without_room_is_one_sentence(capsys):
    def too_much():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    assert exit_status(too_much) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: a device has too little memory")
    assert printed.count("\n") == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        exit_status(lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL: else")))


def leave_shared_memory():
    train_batches(load_images("digits").train, batch_size=8, image_size=8, seed=0, workers=1)
    print(SharedMemory(create=True, size=8).name)


def test_shared_memory_that_is_left_is_freed_without_a_word():
    """As a batch on its way is when a run ends with an error."""
    script = "from tests.test_survival import leave_shared_memory as leave; leave()"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr == ""
    with pytest.raises(FileNotFoundError):
        SharedMemory(ended.stdout.strip())


def read_a_batch_and_die(pipe):
    iterator = train_batches(
        load_images("digits").train, batch_size=8, image_size=8, seed=0, workers=2
    )
    next(iterator)
    pipe.send([process.pid for process in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed():
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=read_a_batch_and_die, args=(theirs,))
    process.start()
    workers = ours.recv()
    process.join()
    assert len(workers) == 2
    end = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_every_worker_is_started_with_sigterm_blocked():
    """In a program of its own: there the first worker also starts Python's resource tracker."""
    program = """
import multiprocessing, pathlib, re
from gaudi_jax.data.images import load_images
from gaudi_jax.data.pipeline import sheltered, train_batches
source = load_images("digits").train
batches = train_batches(source, batch_size=8, image_size=8, seed=0, workers=2)
next(sheltered(batches))
for worker in multiprocessing.active_children():
    status = pathlib.Path(f"/proc/{worker.pid}/status").read_text()
    print(re.search(r"SigBlk:\\s*(\\w+)", status)[1])
"""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    blocked = [int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in run.stdout.split()]
    assert blocked == [1, 1], run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "eval_every"), [(1, 100000), (2, 100000), (1, 1)])
def test_sigterm_to_all_processes_of_a_job_saves(processes, eval_every, tmp_path):
    """Images are large, so that the run waits for its workers when the signal comes."""
    for number in range(64):
        path = tmp_path / "images" / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (300, 400, 3), np.uint8)
        Image.fromarray(noise).save(path)
    workdir = tmp_path / "run"
    options = [
        "--config=configs/digits_vit_gaudi.py:smoke",
        f"--config.data.name=folder:{tmp_path / 'images'}",
        "--config.data.workers=2",
        "--config.data.batch_size=32",
        "--config.data.rand_augment=9.0",
        "--config.train.steps=100000",
        "--config.train.log_every=1",
        f"--config.train.eval_every={eval_every}",
        "--config.checkpoint.every=100000",
        f"--workdir={workdir}",
    ]
    if processes > 1:
        options += [
            "--config.distributed.coordinator_address=localhost:12391",
            f"--config.distributed.num_processes={processes}",
        ]
    runs = [
        subprocess.Popen(
            [sys.executable, "main.py", *options]
            + [f"--config.distributed.process_id={number}"] * (processes > 1),
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number in range(processes)
    ]
    while all(run.poll() is None for run in runs) and len(read_metrics(workdir)) < 3:
        time.sleep(0.05)
    for run in runs:
        os.killpg(run.pid, signal.SIGTERM)
    printed = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * processes, printed
    assert "run it again to continue" in printed[0]
    assert not any("Traceback" in text for text in printed)
    assert len(steps_saved(workdir)) == 1
