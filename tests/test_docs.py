"""The commands of the pages in docs/ that can run anywhere, and the job scripts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_job_scripts_are_well_formed(script):
    subprocess.run(["bash", "-n", script], check=True)


def test_links_between_pages_lead_somewhere():
    pages = [*PAGES, ROOT / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
