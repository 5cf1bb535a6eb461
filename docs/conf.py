"""Builds the pages and the API reference: ``sphinx-build -W docs build/docs``."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import gaudi_jax

project = "gaudi_jax"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "gaudi_jax"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# Names in single backquotes are links where there is such a thing, and code elsewhere.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 88
napoleon_use_ivar = True  # attributes as a list: autodoc names them too
napoleon_use_rtype = False
exclude_patterns = ["jobs"]


def skip_exported(
    app: Any, what: str, name: str, found: Any, skip: bool, options: Any
) -> bool | None:
    """Leaves what `gaudi_jax` itself exports to its own page, under the name that people import."""
    module = app.env.current_document.autodoc_module
    exported = any(found is getattr(gaudi_jax, public) for public in gaudi_jax.__all__)
    return True if exported and module != "gaudi_jax" else None


def escape_plurals(
    app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]
) -> None:
    """Lets a letter follow a name in backquotes, as in `GaudiLinear`s."""
    lines[:] = [re.sub(r"(?<!`)(`[^`\s]+`)(?=\w)", r"\1\\ ", line) for line in lines]


def setup(app: Any) -> None:
    """Connects the functions above."""
    app.connect("autodoc-skip-member", skip_exported)
    app.connect("autodoc-process-docstring", escape_plurals)
