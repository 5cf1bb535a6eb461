import errno
import json
import time

import pytest

from gaudi_jax.training import stall
from gaudi_jax.training.stall import StallWatch


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(stall.jax, "process_count", lambda: 2)


def write(folder, number, **changes):
    """What a process is supposed to have said of itself."""
    now = time.time()
    doing = {"step": 7, "what": "computing", "since": now, "heard": now, "host": f"host{number}"}
    text = json.dumps(list((doing | changes).values()))
    (folder / stall.FOLDER / f"{number}.json").write_text(text)


def test_the_process_that_all_wait_for_is_named_once(tmp_path, two_processes):
    with StallWatch(tmp_path, 60) as watch:
        write(tmp_path, 0)
        write(tmp_path, 1, what="reading data", since=time.time() - 100)
        (line,) = watch.stalled()
        assert line == "process 1 on host1 has been reading data at step 7 for 100 s"
        assert watch.stalled() == []
        write(tmp_path, 1, step=8, what="reading data", since=time.time() - 100)
        assert len(watch.stalled()) == 1  # it went on, and stalled again


def test_a_process_that_is_not_heard_from_is_named(tmp_path, two_processes):
    with StallWatch(tmp_path, 60) as watch:
        write(tmp_path, 1, heard=time.time() - 100)
        (line,) = watch.stalled()
        assert line == "process 1 on host1 has not been heard from for 100 s (computing)"


def test_long_work_has_longer(tmp_path, two_processes):
    with StallWatch(tmp_path, 60) as watch:
        watch.note(5, "compressing", patience=10)
        for seconds, stalls in ((100, 0), (700, 1)):
            since = time.time() - seconds
            write(tmp_path, 1, what="compressing", since=since, host="host1")
            text = (tmp_path / stall.FOLDER / "1.json").read_text()
            doing = [*json.loads(text), watch._doing.patience]
            (tmp_path / stall.FOLDER / "1.json").write_text(json.dumps(doing))
            assert len(watch.stalled()) == stalls


def test_what_an_earlier_start_left_is_no_news(tmp_path, two_processes):
    (tmp_path / stall.FOLDER).mkdir()
    write(tmp_path, 1, heard=time.time() - 100)
    with StallWatch(tmp_path, 60) as watch:
        assert watch.stalled() == []


@pytest.mark.parametrize("room", [True, False])
def test_the_watch_warns_by_itself(tmp_path, caplog, monkeypatch, room):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if not room:
        monkeypatch.setattr(stall, "write_atomically", fail)
    with StallWatch(tmp_path, 0.2) as watch:
        watch.note(3, "reading data")
        end = time.monotonic() + 20
        while "reading data at step 3" not in caplog.text and time.monotonic() < end:
            time.sleep(0.05)
    assert "the run has been reading data at step 3" in caplog.text
