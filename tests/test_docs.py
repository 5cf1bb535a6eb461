"""The commands of the pages in docs/ that can run anywhere, and the job scripts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gaudi_jax
from gaudi_jax import compression, decomposition, export, layers, report

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
PYTHON_PAGES = [page for page in PAGES if "```python\n" in page.read_text()]
SCRIPTS = sorted((ROOT / "docs" / "jobs").glob("*.sh"))
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```bash run\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_commands_run(block, tmp_path):
    environment = os.environ | {
        "WORKDIR": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_there_are_such_commands():
    assert len(BLOCKS) >= 2
    assert PYTHON_PAGES


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_runs(page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_pages_build_without_warnings_and_hold_all_public_names(tmp_path):
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    inventory = InventoryFile.loads((tmp_path / "objects.inv").read_bytes(), uri="")
    found = {name.rpartition(".")[2] for names in inventory.data.values() for name in names}
    packages = (gaudi_jax, compression, decomposition, export, layers, report)
    missing = {name for package in packages for name in package.__all__} - found
    assert not missing


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_job_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True)


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere():
    for page in (*PAGES, ROOT / "README.md"):
        for target in re.findall(r"\]\((?!https?://)([^)]+)", page.read_text()):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), f"{page.name} -> {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} -> {target}"
