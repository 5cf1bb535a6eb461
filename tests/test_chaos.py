"""Runs that are killed again and again; benchmarks/chaos.py kills them more often."""

import time

import pytest

from benchmarks.chaos import chaos


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_ends_bitwise_as_one_that_is_not(tmp_path, processes):
    assert chaos(tmp_path, kills=3, processes=processes, seed=int(time.time())) == []
