"""The notebook, run from top to bottom as a reader would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # as if opened in the repository
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()
    outputs = [cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"]
    assert outputs[0] == []  # nothing to install
    shown = [output for cell in outputs for output in cell if "data" in output]
    assert sum("image/png" in output["data"] for output in shown) == 2
    printed = "".join(output.get("text", "") for cell in outputs for output in cell)
    for text in ("Relative multiplications", "compressed: test accuracy", "packed: "):
        assert text in printed


@pytest.mark.slow
def test_the_notebook_installs_the_package_where_it_is_missing(tmp_path, monkeypatch):
    """As on Colab: an environment with IPython's kernel and nothing of ours."""
    import nbformat
    from nbclient import NotebookClient

    python = tmp_path / "environment" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "ipykernel"], check=True)
    kernel = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "clean",
        "language": "python",
    }
    (tmp_path / "kernels" / "clean").mkdir(parents=True)
    (tmp_path / "kernels" / "clean" / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    install, use = [cell for cell in notebook.cells if cell["cell_type"] == "code"][:2]
    address = re.search(r'REPOSITORY = "(.*)"', install["source"]).group(1)
    install["source"] = install["source"].replace(address, ROOT.as_uri())
    use["source"] = use["source"].replace("steps = 1000", "steps = 10")
    notebook.cells = [install, use]
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="clean", resources=resources).execute()
    assert (tmp_path / "gaudi-jax").is_dir()
    assert list(tmp_path.glob("runs/quickstart/gaudi/checkpoints/10"))
    where = "import gaudi_jax; print(gaudi_jax.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert found.stdout.startswith(str(python.parents[1]))
