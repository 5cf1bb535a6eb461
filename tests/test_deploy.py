"""A run from its checkpoint to a packed model and to one file."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gaudi_jax
from gaudi_jax.compression import densify
from gaudi_jax.deploy import __main__ as deploy_command
from gaudi_jax.deploy.pack import pack
from gaudi_jax.errors import UserError
from gaudi_jax.export import __main__ as export_command
from gaudi_jax.export import export_model, load_exported
from gaudi_jax.export.loader import read
from gaudi_jax.layers import PackedLinear
from gaudi_jax.models import GPT2, GPT2Config
from gaudi_jax.models.generate import generate
from gaudi_jax.report import write_report
from gaudi_jax.training.loop import train
from tests.runs import tiny_config
from tests.test_command import command
from tests.test_packed import assert_close, layer_of

ROOT = Path(__file__).parents[1]
LOADER = ROOT / "gaudi_jax" / "export" / "loader.py"
IMAGES = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


def call(command, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    return command.main()


def not_packed(workdir, copy):
    shutil.copytree(workdir, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("packed"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "digits"
    train(tiny_config(steps=4), workdir)
    return workdir


@pytest.fixture(scope="module")
def packed(workdir):
    with pytest.MonkeyPatch.context() as patch:
        assert call(deploy_command, patch, workdir, "--repeats=1", "--batch=2") == 0
    return workdir


def test_a_packed_run_is_loaded_and_evaluated(packed, monkeypatch, capsys):
    model, small = gaudi_jax.load(packed), gaudi_jax.load(packed, "packed")
    layers = [layer for _, layer in nnx.iter_modules(small) if isinstance(layer, PackedLinear)]
    assert len(layers) == 6
    x = jnp.ones((3, 8, 8, 1))
    np.testing.assert_allclose(small(x), model(x), atol=1e-5)
    report = write_report(packed)
    summary = write_report(packed, "packed")
    assert summary["steps"] == 4
    assert {layer["kind"] for layer in summary["layers"]} >= {"PackedLinear"}
    assert summary["test_loss_packed"] == pytest.approx(report["test_loss_hard"], abs=1e-5)
    assert "test_loss_soft" not in summary
    assert json.loads((packed / "summary.json").read_text()) == report
    assert call(deploy_command, monkeypatch, packed) == 1
    assert "packed exists; remove it" in capsys.readouterr().err


def test_the_report_states_soft_hard_and_packed_results(workdir):
    summary = write_report(workdir)
    assert summary["test_loss_packed"] == pytest.approx(summary["test_loss_hard"], abs=1e-5)
    assert "Test accuracy, packed" in (workdir / "summary.txt").read_text()


@pytest.mark.slow
def test_main_evaluates_what_was_packed(packed, tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(
        "from tests.runs import tiny_config\n\ndef get_config():\n    return tiny_config(steps=4)\n"
    )
    report = write_report(packed)
    options = "--config.evaluate_only=True", "--config.evaluate_checkpoint=packed"
    result = command(f"--config={config}", *options, f"--workdir={packed}")
    assert result.returncode == 0, result.stderr
    printed = re.search(r"^Test accuracy, packed +(.*) %$", result.stdout, re.MULTILINE)
    assert printed, result.stdout
    assert printed[1] == f"{100 * report['test_accuracy_packed']:.2f}"
    assert "PackedLinear" in result.stdout
    summary = json.loads((packed / "summary-packed.json").read_text())
    assert summary["test_loss_packed"] == pytest.approx(report["test_loss_packed"], rel=1e-5)
    assert json.loads((packed / "summary.json").read_text()) == report


def test_the_table_of_forms_compares_the_same_model(workdir):
    model = gaudi_jax.load(workdir)
    forms = {"dense": densify(model), "packed": gaudi_jax.harden(model).model}
    table = deploy_command.measured(forms, IMAGES, batch=2, repeats=1)
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["dense", "packed"]


def test_the_study_of_latency_measures_a_run(study, workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))  # what autotuning measures is kept there
    call(study("latency"), monkeypatch, workdir, "--batch=2", "--repeats=1")
    times = json.loads(capsys.readouterr().out)
    assert sorted(times) == ["dense_ms", "deployed_ms"]
    assert min(times.values()) > 0


@pytest.mark.parametrize(("fastest", "kind"), [("dense", "Linear"), ("own", "LowRankLinear")])
def test_the_study_of_latency_takes_the_fastest_form(study, fastest, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    latency = study("latency")
    monkeypatch.setattr(
        latency, "interleaved_medians", lambda forms, _: {name: name != fastest for name in forms}
    )
    low_rank = gaudi_jax.LowRankLinear(64, 32, rank=4, rngs=nnx.Rngs(0))
    model = nnx.Sequential(layer_of(0, (8, 8), (8, 8), 1, 4), low_rank)
    deployed = latency.fastest(model, {"layers/0": 2, "layers/1": 2}, repeats=1)
    assert [type(layer).__name__ for layer in deployed.layers] == ["PackedLinear", kind]
    x = jax.random.normal(jax.random.key(0), (2, 64))
    assert_close(deployed(x), model(x))


def assert_one_sentence(printed, message):
    lines = [line for line in printed.strip().splitlines() if "WARNING" not in line]
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch=0"], "--batch=0 must be at least 1"),
        (["--repeats=0"], "--repeats=0 must be at least 1"),
        (["--step=77"], "has no checkpoint 77; it has"),
        (["--tokens=0"], "--tokens=0 must be at least 1"),
        (["--backend=tpu", "--autotune"], "backend='tpu' cannot be measured on 'cpu'"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, workdir, tmp_path, monkeypatch, capsys):
    not_packed(workdir, tmp_path / "run")
    assert call(deploy_command, monkeypatch, tmp_path / "run", *arguments) == 1
    assert_one_sentence(capsys.readouterr().err, message)


def test_a_packed_model_that_is_not_there_or_damaged_is_named(workdir, tmp_path):
    not_packed(workdir, tmp_path)
    for content, message in {
        None: "holds no packed model; make it with",
        "": "is incomplete; remove it",
        "[]": "plan of format 'list' cannot be read, .*; remove .*packed and pack the run again",
    }.items():
        if content is not None:
            (tmp_path / "packed").mkdir(exist_ok=True)
        if content:
            (tmp_path / "packed" / "plan.json").write_text(content)
        with pytest.raises(UserError, match=message):
            gaudi_jax.load(tmp_path, "packed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"seed": 7}}, "was packed from a run of another model, layers or seed"),
        ({"plan": {"step": 10**9}}, "names no step of this run, but 1000000000"),
        ({"plan": {"step": True}}, "names no step of this run, but True"),
    ],
)
def test_what_was_packed_elsewhere_is_not_taken(change, message, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "run")
    files = {"config": tmp_path / "run" / "config.json", "plan": tmp_path / "run/packed/plan.json"}
    for name, changed in change.items():
        files[name].write_text(json.dumps(json.loads(files[name].read_text()) | changed))
    with pytest.raises(UserError, match=message):
        gaudi_jax.load(tmp_path / "run", "packed")


def test_a_damaged_packed_checkpoint_is_to_be_packed_again(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "packed" / "checkpoints")
    with pytest.raises(UserError, match=r"; remove .*packed and pack the run again"):
        gaudi_jax.load(tmp_path / "run", "packed")


def test_each_layer_is_planned_for_its_own_number_of_inputs():
    model = nnx.Sequential(layer_of(0, (8, 8), (8, 8), 1, 3), layer_of(1, (8, 8), (8, 8), 1, 3))
    shapes = []
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules["gaudi_jax.deploy.harden"]  # its name is the function's too
        patch.setattr(module, "pack", lambda *a: shapes.append(a[2]) or pack(*a))
        gaudi_jax.harden(model, tokens={"layers/0": np.int64(8), "layers/1": 512})
    assert shapes == [8, 512]
    with pytest.raises(UserError, match="tokens has no number for layer 'layers/1'"):
        gaudi_jax.harden(model, tokens={"layers/0": 8})


@pytest.mark.parametrize("rank", [8, 40])
def test_any_number_of_inputs_through_factors_that_may_be_composed(rank, tmp_path):
    model = nnx.Sequential(gaudi_jax.LowRankLinear(64, 64, rank=rank, rngs=nnx.Rngs(0)))
    example = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    export_model(model, example, tmp_path / "file", platforms=["cpu"])
    x = jax.random.normal(jax.random.key(0), (3, 64))
    np.testing.assert_allclose(load_exported(tmp_path / "file")(x), model(x), atol=1e-5)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    file = tmp_path_factory.mktemp("exported") / "digits.stablehlo"
    with pytest.MonkeyPatch.context() as patch:
        assert call(export_command, patch, workdir, f"--out={file}") == 0
    return file


#: Runs a file where only JAX and what it needs can be imported.
ONLY_JAX = """
import importlib.abc, runpy, sys
ALLOWED = {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "scipy", "flatbuffers"}
FINDERS = list(sys.meta_path)
class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        first = name.partition(".")[0]
        # The names of some of Python's own modules are those of the platform.
        if first not in ALLOWED | sys.stdlib_module_names and "_sysconfigdata" not in first:
            return None
        found = (finder.find_spec(name, path, target) for finder in FINDERS)
        return next((spec for spec in found if spec is not None), None)
sys.meta_path[:] = [Only()]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def load_elsewhere(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-c", ONLY_JAX, str(LOADER), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_exported_model_runs_with_nothing_but_jax(workdir, exported, tmp_path):
    model = gaudi_jax.load(workdir)
    x = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    np.save(tmp_path / "x.npy", x)
    done = load_elsewhere(tmp_path, exported, tmp_path / "x.npy", tmp_path / "y.npy")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(x), atol=1e-5)
    described = load_elsewhere(tmp_path, exported)
    header = json.loads(described.stdout)
    assert header["platforms"] == ["cpu", "cuda", "tpu"]
    assert header["input_shape"] == ["b", 8, 8, 1]
    assert header["card"]["step"] == 4


@pytest.mark.slow
def test_an_exported_model_runs_in_a_fresh_environment(packed, tmp_path, monkeypatch):
    """With JAX and flatbuffers from the registry, and nothing of this process."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    pinned = f"--constraint={ROOT / 'requirements.txt'}"
    install = [python, "-m", "pip", "install", "--quiet", pinned, "jax", "flatbuffers"]
    subprocess.run(install, check=True)
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    there.mkdir()
    elsewhere.mkdir()
    shutil.copy(LOADER, there)
    file = there / "packed.stablehlo"
    assert call(export_command, monkeypatch, packed, "--step=packed", f"--out={file}") == 0
    x = np.random.default_rng(0).random((5, 8, 8, 1), np.float32)
    np.save(elsewhere / "x.npy", x)
    done = subprocess.run(
        [python, there / "loader.py", file, "x.npy", "y.npy"],
        cwd=elsewhere,
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_close(np.load(elsewhere / "y.npy"), gaudi_jax.load(packed, "packed")(x))


def test_what_was_packed_is_exported(packed, tmp_path, monkeypatch):
    file = tmp_path / "packed.stablehlo"
    assert call(export_command, monkeypatch, packed, "--step=packed", f"--out={file}") == 0
    x = np.random.default_rng(0).random((3, 8, 8, 1), np.float32)
    model = gaudi_jax.load(packed, "packed")
    np.testing.assert_allclose(load_exported(file)(x), model(x), atol=1e-5)


def test_what_was_packed_is_not_packed_for_another_machine(packed, tmp_path, monkeypatch, capsys):
    for option in ("--backend=gpu", "--tokens=1"):
        options = "--step=packed", f"--out={tmp_path / 'file'}", option
        assert call(export_command, monkeypatch, packed, *options) == 1
        assert "exported as it was packed" in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


def test_any_number_of_inputs(workdir, exported):
    run, model = load_exported(exported), gaudi_jax.load(workdir)
    with pytest.raises(ValueError, match="b at least 1"):
        run(np.zeros((0, 8, 8, 1), np.float32))
    np.testing.assert_allclose(
        jax.jit(run)(jnp.ones((2, 8, 8, 1))), model(jnp.ones((2, 8, 8, 1))), atol=1e-5
    )
    for count in (1, 7):
        x = np.random.default_rng(count).random((count, 8, 8, 1), np.float32)
        np.testing.assert_allclose(run(x), model(x), atol=1e-5)


@pytest.mark.parametrize("part", [b"gaudi", b"1 ", b"float32", b'"b"', b"bytes", b"cuda", b""])
def test_a_damaged_file_is_one_sentence(exported, tmp_path, part):
    damaged = bytearray(exported.read_bytes())
    place = damaged.index(part) if part else len(damaged) - 1
    damaged[place] ^= 0x02
    (tmp_path / "damaged").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"is damaged|its beginning is damaged|has format"):
        load_exported(tmp_path / "damaged")


def test_what_does_not_fit_is_one_sentence(exported, tmp_path, workdir, monkeypatch):
    content = exported.read_bytes()
    (tmp_path / "short").write_bytes(content[:-100])
    (tmp_path / "newer").write_bytes(content.replace(b"export 1", b"export 9"))
    for name, message in {
        "short": "SHA-256 differs",
        "newer": "has format 9",
        "none": "cannot be read",
    }.items():
        done = load_elsewhere(tmp_path, tmp_path / name)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=r"shape \(2, 9, 8, 1\) and dtype float64 do not fit"):
        load_exported(exported)(np.zeros((2, 9, 8, 1)))
    with pytest.raises(ValueError, match="dtype uint8 do not fit"):  # pixels as they are
        load_exported(exported)(np.zeros((2, 8, 8, 1), np.uint8))
    data = read(exported)[0]["card"]["data"]
    assert {"mean", "std", "crop_fraction"} <= set(data)
    only_tpu = tmp_path / "tpu"
    model = gaudi_jax.load(workdir)
    with pytest.raises(UserError, match=r"pack them with gaudi_jax\.harden"):
        export_model(model, IMAGES, only_tpu)
    export_model(densify(model), IMAGES, only_tpu, platforms=["tpu"])
    with pytest.raises(ValueError, match="is for tpu, and JAX runs on cpu"):
        load_exported(only_tpu)
    assert read(only_tpu)[0]["platforms"] == ["tpu"]


def test_a_loader_without_a_device_says_so(packed, tmp_path):
    file = tmp_path / "model.stablehlo"
    export_model(gaudi_jax.load(packed, "packed"), IMAGES, file)
    np.save(tmp_path / "x.npy", np.zeros((1, 8, 8, 1), np.float32))
    done = subprocess.run(
        [sys.executable, LOADER, file, tmp_path / "x.npy", tmp_path / "y.npy"],
        env=os.environ | {"JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: JAX finds no device of cuda here")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "reason"), [("stacked", "it is stacked"), ("subclass", "a subclass may do anything")]
)
def test_layers_that_cannot_be_packed_are_named_in_exports(kind, reason, tmp_path):
    class Own(gaudi_jax.GaudiLinear):
        pass

    layer = (Own if kind == "subclass" else gaudi_jax.GaudiLinear)(8, 8, rngs=nnx.Rngs(0))
    if kind == "stacked":
        layer.v.set_value(layer.v[...][None])
    with pytest.raises(UserError, match=f"'layers/0' cannot be packed, .*: {reason}"):
        export_model(nnx.Sequential(layer), IMAGES, tmp_path / "file")


@pytest.mark.slow
def test_random_keys_and_a_language_model(tmp_path):
    layers = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    model = nnx.Sequential(*layers)
    export_model(model, jax.ShapeDtypeStruct((1, 4), jnp.float32), tmp_path / "dropout")
    x = jnp.ones((3, 4))
    np.testing.assert_allclose(load_exported(tmp_path / "dropout")(x), layers[0](x), atol=1e-6)
    gpt = GPT2(GPT2Config(vocab_size=11, context=8, width=16, depth=1, heads=2), rngs=nnx.Rngs(0))
    gpt.blocks[0].mlp.fc1 = layer_of(0, (4, 8), (4, 8), 1, 4)
    packed, _ = gaudi_jax.harden(gpt, tokens=4096)
    export_model(packed, jax.ShapeDtypeStruct((1, 8), jnp.int32), tmp_path / "gpt")
    tokens = jnp.arange(16).reshape(2, 8) % 11
    gpt.eval()
    np.testing.assert_allclose(load_exported(tmp_path / "gpt")(tokens), gpt(tokens), atol=1e-5)
    said = [
        generate(m, [[1, 2]], max_new_tokens=3, temperature=0, max_length=8) for m in (packed, gpt)
    ]
    np.testing.assert_array_equal(*said)


class BySize(nnx.Module):
    def __call__(self, x):
        return x if x.shape[0] < 4 else 2 * x


def test_models_that_cannot_be_exported_are_named(tmp_path):
    example = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    with pytest.raises(UserError, match="BySize does not take a batch of any size"):
        export_model(BySize(), example, tmp_path / "file")
    pair = nnx.Sequential(lambda x: (x, x))
    with pytest.raises(UserError, match="gives 2 arrays"):
        export_model(pair, example, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_exporting_mistakes_are_one_sentence(workdir, exported, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    for arguments, message in [
        ([workdir, f"--out={exported}"], "exists; remove it"),
        ([workdir, f"--out={tmp_path / 'x'}", "--platforms", "abacus"], "unknown platforms"),
        ([workdir, f"--out={tmp_path / 'file' / 'x'}"], "cannot write"),
        ([tmp_path / "none", f"--out={tmp_path / 'x'}"], "holds no run"),
        ([workdir, f"--out={tmp_path / 'x'}", "--batch=0"], "--batch=0"),
    ]:
        assert call(export_command, monkeypatch, *arguments) == 1
        assert_one_sentence(capsys.readouterr().err, message)
    assert not (tmp_path / "x").exists()
