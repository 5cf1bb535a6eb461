"""main.py as a command, in its own processes: mistakes, kills, and many devices."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from PIL import Image

import main
from gaudi_jax.errors import UserError
from gaudi_jax.training.metrics import read_metrics
from gaudi_jax.training.workdir import claim_workdir
from tests.runs import tiny_config

ROOT = Path(__file__).parents[1]


def command(*arguments, devices=1, **options):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def assert_one_sentence(result, message):
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path):
    result = command("--config.train.stepz=3", f"--workdir={tmp_path / 'run'}")
    assert_one_sentence(result, 'Did you mean "steps"')
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.steps=many"], "invalid literal for int() with base 10: 'many'"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config=configs/digits_vit_gaudi.py:budget=x"], "'budget=x' needs a value like 0.33"),
        (["--config=configs/digits_vit_gaudi.py:layr=x"], "unknown config argument 'layr'"),
        (["--config=configs/digits_vit_gaudi.py:layer=abacus"], "unknown layer 'abacus'"),
        (["--config.data.name=folder:/nowhere"], "data folder /nowhere is not there"),
        (["--speed=9"], "Unknown command line flag 'speed'"),
        (["train"], "unexpected argument 'train'"),
        (["--config.evaluate_only=True"], "holds no run"),
    ],
)
def test_every_mistake_is_one_sentence(arguments, message, tmp_path):
    assert_one_sentence(command(*arguments, f"--workdir={tmp_path / 'run'}"), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_evaluating_with_another_config_is_an_error(tmp_path):
    claim_workdir(tmp_path, tiny_config().to_dict())
    result = command(f"--workdir={tmp_path}", "--config.evaluate_only=True")
    assert_one_sentence(result, "holds the run of another config")


@pytest.fixture
def clean_flags():
    """Removes the flags of main.py, which belong to the process, so that it can run again."""
    yield
    for name in list(flags.FLAGS):
        if name.partition(".")[0] in ("config", "workdir"):
            delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    sys.modules.pop("config_config", None)  # the config file, as ml_collections names it


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(:\n", "broken.py has a syntax error"),
        (
            "def get_config():\n    return 1 / 0\n",
            "broken.py, line 2: ZeroDivisionError('division by zero')",
        ),
        ("def get_config():\n    return {}['k']\n", "broken.py, line 2: KeyError('k')"),
        ("import nowhere\n", "broken.py, line 1: ModuleNotFoundError"),
        ("import math\nmath.foo\n", "broken.py, line 2: AttributeError"),
        ("seed = 1\n", "has no function get_config"),
    ],
)
def test_a_config_file_that_fails_is_named(code, message, tmp_path, clean_flags):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(UserError, match=re.escape(message)):
        main.parse_command_line(["main.py", f"--config={tmp_path / 'broken.py'}"])


def test_compiled_programs_are_kept_where_the_config_says(tmp_path, monkeypatch):
    kept = {}
    jax_config = SimpleNamespace(update=kept.__setitem__)
    monkeypatch.setattr(main, "jax", SimpleNamespace(config=jax_config))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    main.use_compilation_cache(str(tmp_path))
    assert not kept
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    main.use_compilation_cache("")
    assert not kept
    main.use_compilation_cache(str(tmp_path))
    assert kept == {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }


@pytest.mark.slow
def test_a_batch_that_the_devices_cannot_share_is_named(tmp_path):
    result = command("--config.data.batch_size=60", f"--workdir={tmp_path / 'run'}", devices=8)
    assert_one_sentence(result, "batch_size=60 cannot be split over 8 devices")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "split"), [(0, "train"), (1, "train"), (2, "train"), (2, "validation")]
)
def test_an_image_that_vanishes_in_mid_run_is_one_sentence(workers, split, tmp_path):
    for name in ("train", "validation"):
        for number in range(80):
            path = tmp_path / "images" / name / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), number).save(path)
    path = tmp_path / "images" / split / "b" / "79.png"
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "main.py",
            "--config=configs/digits_vit_gaudi.py:smoke",
            f"--config.data.name=folder:{tmp_path / 'images'}",
            f"--config.data.workers={workers}",
            "--config.data.batch_size=16",
            "--config.train.steps=100000",
            "--config.train.log_every=1",
            "--config.train.eval_every=20",
            f"--workdir={workdir}",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not read_metrics(workdir):
        time.sleep(0.05)
    path.unlink()
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 1
    told = printed.partition("error: ")[2]
    assert told.startswith(f"the image {path} is gone"), printed
    assert told.count("\n") == 1
    assert "Traceback" not in printed


KILLED = (
    "--config=configs/digits_vit_gaudi.py:smoke",
    "--config.train.steps=200",
    "--config.train.eval_every=40",
    "--config.checkpoint.every=10",
)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(tmp_path):
    """A limit on the size of files stands for the disk."""
    arguments = (*KILLED, "--config.train.steps=40", f"--workdir={tmp_path / 'run'}")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    result = command(*arguments, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr  # of the threads that write
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "make room or choose another" in last
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "summary.json").exists()
