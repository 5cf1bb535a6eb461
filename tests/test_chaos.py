"""Runs that are killed again and again; benchmarks/chaos.py kills them more often."""

import pytest

from benchmarks.chaos import chaos


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 3)])
def test_a_run_that_is_killed_ends_bitwise_as_one_that_is_not(tmp_path, processes, kills):
    assert chaos(tmp_path, kills, processes, seed=0) == []
