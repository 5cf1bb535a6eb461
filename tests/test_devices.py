"""The same run on one device, on several, and in several processes."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from gaudi_jax.errors import UserError
from gaudi_jax.training.checkpoint import Checkpointer
from gaudi_jax.training.mesh import check_batch, make_mesh, mesh_shape, state_shardings
from gaudi_jax.training.metrics import read_metrics
from gaudi_jax.training.moments import read_moments
from gaudi_jax.training.phases import phases
from gaudi_jax.training.processes import start_processes
from gaudi_jax.training.setup import build_model, build_optimizer, build_schedules
from gaudi_jax.training.step import split_model
from gaudi_jax.training.workdir import read_config
from tests.runs import assert_same, parameters

ROOT = Path(__file__).parents[1]
DATA, FSDP, ALL = (8, 1, 1), (1, 8, 1), (2, 2, 2)

# Trains in each of several workdirs, on the mesh that is given for it; leaves in the middle of a
# step, if one is given.
SCRIPT = """
import json, sys
from ml_collections import ConfigDict
from gaudi_jax.report import write_report
from gaudi_jax.training import loop, processes
from tests.runs import tiny_config
runs, distributed = map(json.loads, sys.argv[1:])
processes.start_processes(ConfigDict(distributed))
for workdir, shape, stop in runs:
    config = tiny_config("recipe=search,budget=0.5" if "search" in workdir else "recipe=budget", 20)
    config.model.dropout = 0.1
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), shape)))
    config.compress.update(rounds=4, calibration_batches=2)
    config.train.log_every = 1
    config.checkpoint.update(every=1, keep=30)
    if stop:
        advance = loop.Progress.advance
        def advance_and_stop(self, step):
            if step == stop:
                raise SystemExit
            advance(self, step)
        loop.Progress.advance = advance_and_stop
    assert loop.train(config, workdir)
    write_report(workdir)
"""
ALONE = {
    "coordinator_address": "",
    "num_processes": -1,
    "process_id": -1,
    "heartbeat_timeout_seconds": 100,
}


def start(runs, *, devices, distributed=ALONE):
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    arguments = [json.dumps(part) for part in (runs, distributed)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=ROOT,
        env=os.environ | flags,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(runs, *, devices=8, processes=1):
    """Runs in one process, or in several that share the devices."""
    if processes == 1:
        started = [start(runs, devices=devices)]
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        started = [
            start(
                runs,
                devices=devices // processes,
                distributed=ALONE
                | {
                    "coordinator_address": address,
                    "num_processes": processes,
                    "process_id": number,
                },
            )
            for number in range(processes)
        ]
    for process in started:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]


def losses(workdir):
    return [row["train_loss"] for row in read_metrics(workdir) if "train_loss" in row]


def first_gradients(workdir):
    """Adam's first moments after the first step are the gradients times 1 - b1."""
    config = ConfigDict(read_config(workdir))
    model = build_model(config)
    _, params, _ = split_model(model)
    optimizer = build_optimizer(config, model, build_schedules(config))
    wanted = {"opt_state": jax.eval_shape(optimizer.init, params)}
    with Checkpointer(Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        return read_moments(checkpoints.restore(wanted, step=1).state["opt_state"]).first


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run on one device."""
    workdir = tmp_path_factory.mktemp("one")
    run([(str(workdir), (1, 1, 1), 0)], devices=1)
    return workdir


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The same on eight, split in several ways."""
    folder = tmp_path_factory.mktemp("eight")
    layouts = {"data": DATA, "fsdp": FSDP, "all": ALL, "again": ALL}
    run([(str(folder / name), shape, 0) for name, shape in layouts.items()])
    return {name: folder / name for name in layouts}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    layouts = {"data": DATA, "fsdp": FSDP, "all": ALL}
    run([(str(folder / name), shape, 0) for name, shape in layouts.items()], processes=2)
    return {name: folder / name for name in layouts}


def assert_trains_alike(workdir, expected):
    ours, theirs = first_gradients(workdir), first_gradients(expected)
    assert ours.keys() == theirs.keys()
    for path, gradient in theirs.items():
        np.testing.assert_allclose(ours[path], gradient, atol=1e-6, err_msg=str(path))
    assert len(losses(expected)) == 20
    np.testing.assert_allclose(losses(workdir), losses(expected), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "fsdp", "all"])
def test_eight_devices_train_as_one_does(one, eight, layout):
    assert_trains_alike(eight[layout], one)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "fsdp", "all"])
def test_two_processes_train_as_one_device_does(one, two_processes, layout):
    assert_trains_alike(two_processes[layout], one)
    summaries = [
        json.loads((path / "summary.json").read_text()) for path in (two_processes[layout], one)
    ]
    np.testing.assert_allclose(*(s["test_loss_hard"] for s in summaries), atol=1e-4)


@pytest.mark.slow
def test_the_same_layout_twice_is_bitwise_the_same(eight):
    assert_same(parameters(eight["again"]), parameters(eight["all"]))
    assert losses(eight["again"]) == losses(eight["all"])


@pytest.mark.slow
def test_a_checkpoint_resumes_on_another_layout(one, tmp_path):
    """From two processes to one, and on to one device."""
    workdir = tmp_path / "moved"
    run([(str(workdir), ALL, 8)], processes=2)
    run([(str(workdir), FSDP, 14)])
    run([(str(workdir), (1, 1, 1), 0)], devices=1)
    resumed = [row["resumed_from"] for row in read_metrics(workdir) if "resumed_from" in row]
    assert resumed == [7, 13]
    np.testing.assert_allclose(losses(workdir), losses(one), atol=1e-4)


@pytest.mark.slow
def test_two_processes_change_the_structure_together(tmp_path):
    """The search may differ in the last bit between processes; the plan is that of the first."""
    together, alone = tmp_path / "search-two", tmp_path / "search-one"
    run([(str(together), ALL, 0)], processes=2)
    run([(str(alone), (1, 1, 1), 0)], devices=1)
    change = phases(ConfigDict(read_config(alone)))[1].first
    np.testing.assert_allclose(losses(together)[:change], losses(alone)[:change], atol=1e-4)
    np.testing.assert_allclose(losses(together)[change:], losses(alone)[change:], atol=0.05)


def test_parameters_and_moments_are_split_by_the_rules():
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    shapes = {
        ("fc1", "kernel"): (8, 16),
        ("fc2", "kernel"): (16, 8),
        ("fc2", "bias"): (8,),
        ("key", "v"): (4, 1, 8),
        ("key", "u"): (3, 1, 8),  # 3 blocks cannot be halved
        ("key", "widths"): (2, 4),
    }
    state = {"mu": {}}
    for (layer, name), shape in shapes.items():
        state["mu"].setdefault(layer, {})[name] = jax.ShapeDtypeStruct(shape, np.float32)
    specs = jax.tree.map(lambda s: tuple(s.spec), state_shardings(state, mesh))["mu"]
    assert specs == {
        "fc1": {"kernel": ("fsdp", "tensor")},
        "fc2": {"kernel": ("tensor", "fsdp"), "bias": ()},
        "key": {"v": ("tensor", None, "fsdp"), "u": (None, None, "fsdp"), "widths": ()},
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 1, "tensor": 1}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": 3, "tensor": 1}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1, "tensor": 1}, "at most one of them -1"),
        ({"data": 0, "fsdp": 1, "tensor": 1}, "at least 1"),
        ({"data": 8, "model": 1}, "give data, fsdp, tensor"),
    ],
)
def test_impossible_meshes(sizes, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(sizes, 8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as a slice of 4x4 TPUs has it: hosts hold squares of four, which wires connect."""

    id: int
    process_index: int


def test_each_process_holds_neighbouring_devices():
    chips = [
        Chip(id=4 * y + x, process_index=2 * (y // 2) + x // 2) for y in range(4) for x in range(4)
    ]
    mesh = make_mesh({"data": 8, "fsdp": 1, "tensor": 2}, devices=chips)
    assert [chip.process_index for chip in mesh.devices.flat] == sorted([0, 1, 2, 3] * 4)


def test_a_batch_that_cannot_be_split():
    with pytest.raises(UserError, match="use a positive multiple of 3"):
        check_batch(make_mesh({"data": 1, "fsdp": 1, "tensor": 1}), 32, accumulate=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_processes": 2, "process_id": 0}, "need distributed.coordinator_address"),
        ({"coordinator_address": "here:1"}, "give both"),
        ({"coordinator_address": "here:1", "num_processes": 2, "process_id": 2}, r"in \[0"),
        ({"heartbeat_timeout_seconds": 0}, "must be at least 1"),
    ],
)
def test_processes_that_cannot_find_each_other(options, message):
    with pytest.raises(UserError, match=message):
        start_processes(ConfigDict(ALONE | options))


def test_what_a_launcher_says_is_used(monkeypatch):
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **known: found.append(known))
    start_processes(ConfigDict(ALONE))
    assert found == []  # nothing to join
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    start_processes(ConfigDict(ALONE))
    start_processes(ConfigDict(ALONE | {"coordinator_address": "node1:1234"}))
    addresses = [(known["coordinator_address"], known["process_id"]) for known in found]
    assert addresses == [(None, None), ("node1:1234", 1)]


def test_each_process_of_open_mpi_takes_its_own_device(monkeypatch):
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **known: found.append(known))
    for name, value in {"SIZE": 4, "RANK": 3, "LOCAL_SIZE": 2, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    start_processes(ConfigDict(ALONE | {"coordinator_address": "node1:1234"}))
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "1")  # all devices of the host are its own
    start_processes(ConfigDict(ALONE | {"coordinator_address": "node1:1234"}))
    assert [known["local_device_ids"] for known in found] == [[1], None]
