"""Settings for all tests: exact products on every platform, errors for silent mistakes."""

import importlib
import os
import sys
import tempfile
from pathlib import Path

import jax
import pytest

#: Scripts that made golden files; they need packages that the tests do not.
collect_ignore_glob = ["data/golden/make_*.py"]

jax.config.update("jax_default_matmul_precision", "highest")
# Tests compile more than they compute. Programs are the same, their machine code is less polished.
jax.config.update("jax_disable_most_optimizations", True)

# Programs that many tests share are compiled once, also by the processes that run or start tests.
if "GAUDI_JAX_TEST_CACHE" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="gaudi_jax_compiled_")
    os.environ["GAUDI_JAX_TEST_CACHE"] = _compiled.name
for name, value in {
    "jax_compilation_cache_dir": os.environ["GAUDI_JAX_TEST_CACHE"],
    "jax_persistent_cache_min_compile_time_secs": 0.2,
}.items():
    os.environ[name.upper()] = str(value)
    jax.config.update(name, value)


@pytest.fixture
def strict_shapes():
    """Layer tests: no silent broadcasting between arrays of different rank."""
    previous = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", previous)


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
