"""Memory of the C library between the steps of a run."""

import subprocess
import sys

import pytest

from gaudi_jax.training import allocator
from gaudi_jax.training.allocator import has_only_cpus

STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from gaudi_jax.training.allocator import keep_freed_memory

if sys.argv[1:] == ["kept"]:
    keep_freed_memory()
# Temporaries of more than the 64 MiB that a thread's own heap may have.
step = jax.jit(lambda x: jax.lax.optimization_barrier(x + 1) * 2)
x = jnp.ones(2**25)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(6)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_steps_use_the_same_memory_again():
    def faults(*arguments):
        command = [sys.executable, "-c", STEPS, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < faults() / 10


@pytest.mark.parametrize(
    ("platforms", "only"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)]
)
def test_where_jax_is_told_its_platforms_these_count(platforms, only, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert has_only_cpus() == only


def test_an_installed_plugin_may_bring_other_devices(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert has_only_cpus()
    monkeypatch.setattr(allocator, "entry_points", lambda group: [group])
    assert not has_only_cpus()
