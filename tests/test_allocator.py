"""Memory of the C library between the steps of a run."""

import json
import subprocess
import sys

import pytest

STEPS = """
import json, resource
import jax, jax.numpy as jnp
from gaudi_jax.training.allocator import keep_freed_memory

step = jax.jit(lambda x: jnp.sort(jnp.sort(x, axis=0) @ x, axis=1))
x = jnp.ones((1000, 1000))

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
faults()
print(json.dumps([before, faults()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_steps_use_the_same_memory_again():
    done = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    before, after = json.loads(done.stdout)
    assert after < before / 10
