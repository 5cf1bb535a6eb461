import jax
import pytest

from gaudi_jax.errors import UserError
from gaudi_jax.training import loop
from gaudi_jax.training.profile import StepTrace
from tests.runs import tiny_config, traced_steps


def test_a_trace_ends_with_its_program_and_is_not_begun_again(tmp_path):
    x = jax.numpy.ones(2)
    with StepTrace(tmp_path, steps=5) as trace:
        for step in range(1, 9):
            with trace.step(step, x, compiles=step in (1, 5)):
                pass
            trace.end_step(x, last=step in (4, 8))
    assert traced_steps(tmp_path) == [2, 3, 4]


def test_a_run_that_makes_no_such_step_says_so(tmp_path, caplog):
    with StepTrace(tmp_path, first=6, steps=1) as trace:
        with trace.step(6, (), compiles=False):
            pass
        trace.end_step(())
    assert "no step was traced: none came after step 6" in caplog.text
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_traces(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with StepTrace(tmp_path, steps=1) as trace:
        with trace.step(2, (), compiles=False):
            pass
        trace.end_step(())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first": -1, "steps": 1}, "profile.first=-1 must not be negative"),
        ({"first": 0, "steps": -2}, "profile.steps=-2 must not be negative"),
        ({"first": 0, "steps": 8}, "first=0 and profile.steps=8 ask for more than the 8 steps"),
        ({"first": 7, "steps": 2}, "first=7 and profile.steps=2 ask for more than the 8 steps"),
    ],
)
def test_steps_that_cannot_be_traced_are_named(options, message, tmp_path):
    config = tiny_config()
    config.profile.update(options)
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
