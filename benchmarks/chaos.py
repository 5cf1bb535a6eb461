"""Kills runs at the worst moments; each must end bitwise as one that was never disturbed.

    python benchmarks/chaos.py [--kills 20] [--processes 1 2] [--seed 0]

Signals are SIGKILL, one in three SIGTERM (a preemption, which must end with status 0); they come
at random moments and, every other time, in the middle of a save. Of two processes one gets the
signal: the other must end by itself. After so many kills a run goes on to its end, and is compared
with one that was left alone: parameters, metrics and summary.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import gaudi_jax
from gaudi_jax.training.metrics import METRICS_FILE, read_metrics
from gaudi_jax.training.step import split_model

ROOT = Path(__file__).parents[1]
RUN = (
    "--config=configs/digits_vit_gaudi.py:smoke",
    "--config.train.eval_every=40",
    "--config.checkpoint.every=5",
)
#: More than a run makes before it is killed, on a fast machine.
STEPS_A_KILL = 80
#: Seconds in which a run must come to the next step, and its other processes to an end.
PATIENCE = 300


def start(workdir: Path, steps: int, processes: int) -> list[subprocess.Popen]:
    """The processes of a run, or of its continuation."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", *RUN, f"--workdir={workdir}"]
    command.append(f"--config.train.steps={steps}")
    if processes > 1:
        command.append(f"--config.distributed.coordinator_address=localhost:{port}")
        command.append(f"--config.distributed.num_processes={processes}")
        command.append("--config.distributed.heartbeat_timeout_seconds=10")
    started = []
    for number in range(processes):
        own = [f"--config.distributed.process_id={number}"] if processes > 1 else []
        with (workdir.parent / f"{workdir.name}-{number}.log").open("a") as log:
            started.append(
                subprocess.Popen(
                    [*command, *own],
                    cwd=ROOT,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    stdout=log,
                    stderr=log,
                )
            )
    return started


def finish(workdir: Path, steps: int, processes: int) -> None:
    """Runs to the end."""
    codes = [process.wait() for process in start(workdir, steps, processes)]
    if any(codes):
        logs = sorted(workdir.parent.glob(f"{workdir.name}-*.log"))
        raise SystemExit("\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in logs))


def disturb(workdir: Path, steps: int, processes: int, kill: int, rng: random.Random) -> None:
    """Starts a run and sends it a signal when it has come on."""
    since, started = time.time(), start(workdir, steps, processes)
    sent = signal.SIGTERM if kill % 3 == 2 else signal.SIGKILL
    _wait_until(lambda: _has_come_on(workdir, since) or _ended(started), "another step")
    if kill % 2:
        _wait_until(lambda: _is_saving(workdir) or _ended(started), "a save", pause=0.001)
    else:
        time.sleep(rng.uniform(0, 1))
    chosen = started[rng.randrange(processes)]
    chosen.send_signal(sent)
    _wait_until(lambda: _ended(started), "the end of the others")
    codes = {process.returncode for process in started}
    if sent == signal.SIGTERM and codes != {0}:
        raise SystemExit(f"SIGTERM should end a run with status 0, not {codes}; see {workdir}*.log")
    if (workdir / "summary.json").exists() or sent not in (signal.SIGTERM, -chosen.returncode):
        raise SystemExit(f"the run ended before it was killed; see {workdir}*.log")


def compare(killed: Path, whole: Path) -> list[str]:
    """What differs between two runs that should be the same."""
    differing = []
    pairs = zip(*(jax.tree.leaves(_parameters(path)) for path in (killed, whole)), strict=True)
    if not all(np.array_equal(a, b) for a, b in pairs):
        differing.append("parameters")
    if _losses(killed) != _losses(whole):
        differing.append("metrics")
    summaries = [json.loads((path / "summary.json").read_text()) for path in (killed, whole)]
    if summaries[0] != summaries[1]:
        differing.append("summaries")
    return differing


def chaos(folder: Path, kills: int, processes: int, seed: int) -> list[str]:
    """Kills one run so many times; returns in what it ends otherwise than one left alone."""
    steps, rng = STEPS_A_KILL * (kills + 1), random.Random(seed)
    finish(folder / "whole", steps, processes)
    for kill in tqdm(range(kills), unit="kill"):
        disturb(folder / "killed", steps, processes, kill, rng)
    finish(folder / "killed", steps, processes)
    if not any("resumed_from" in row for row in read_metrics(folder / "killed")):
        return ["a run that was never resumed"]
    return compare(folder / "killed", folder / "whole")


def _has_come_on(workdir: Path, since: float) -> bool:
    """Whether a run has written metrics of a step since it was started."""
    file = workdir / METRICS_FILE
    if not file.exists() or file.stat().st_mtime < since:
        return False
    rows = read_metrics(workdir)
    return bool(rows) and "resumed_from" not in rows[-1]


def _is_saving(workdir: Path) -> bool:
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _ended(processes: list[subprocess.Popen]) -> bool:
    return all([process.poll() is not None for process in processes])


def _wait_until(condition, what: str, pause: float = 0.05) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"waited {PATIENCE} s for {what} in vain")
        time.sleep(pause)


def _parameters(workdir: Path):
    return split_model(gaudi_jax.load(workdir))[1]


def _losses(workdir: Path) -> list[float]:
    return [row["train_loss"] for row in read_metrics(workdir) if "train_loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for processes in args.processes:
        folder = Path(tempfile.mkdtemp())
        differing = chaos(folder, args.kills, processes, args.seed)
        if differing:
            raise SystemExit(f"{processes} processes: {', '.join(differing)} differ; see {folder}")
        shutil.rmtree(folder)
        print(f"{processes} processes: {args.kills} kills, and bitwise the same end", flush=True)


if __name__ == "__main__":
    main()
