"""A run of seconds, and what is compared between runs."""

import os
import signal

import jax
import numpy as np

import gaudi_jax
from configs import digits_vit_gaudi
from gaudi_jax.training.metrics import Progress, read_metrics
from gaudi_jax.training.step import split_model


def tiny_config(arguments="smoke,recipe=budget", steps=8):
    config = digits_vit_gaudi.get_config(arguments)
    config.model.update(width=16, depth=1, heads=2, mlp_ratio=2.0)
    config.data.update(name="generated:4x8x1", batch_size=32, mixup=0.5, cutmix=0.5)
    config.train.update(steps=steps, log_every=2, eval_every=4)
    config.checkpoint.update(every=2, keep=2)
    return config


def parameters(workdir, step=None):
    return split_model(gaudi_jax.load(workdir, step))[1]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def rows_without_time(workdir):
    return [
        {
            name: value
            for name, value in row.items()
            if not name.endswith(("_per_second", "_seconds"))
        }
        for row in read_metrics(workdir)
    ]


def stop_at(monkeypatch, step):
    """Lets SIGTERM arrive while the given step is being made."""
    advance = Progress.advance

    def advance_and_stop(self, current):
        if current == step:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(self, current)

    monkeypatch.setattr(Progress, "advance", advance_and_stop)


def traced_steps(workdir):
    """The steps of the only trace in a workdir, as it tells them."""
    (file,) = (workdir / "tensorboard" / "plugins" / "profile").rglob("*.xplane.pb")
    return sorted(
        int(dict(event.stats)["step_num"])
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    )


def steps_saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())
