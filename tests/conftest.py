"""Settings for all tests: exact products on every platform, errors for silent mistakes."""

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def strict_shapes():
    """Layer tests: no silent broadcasting between arrays of different rank."""
    previous = jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_rank_promotion", "raise")
    yield
    jax.config.update("jax_numpy_rank_promotion", previous)
