"""Settings of the documentation site: `make docs` builds it into out/docs."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from sphinx.domains.python import PyObject

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "fl_gradcode"
author = "The authors of fl_gradcode"
version = release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["results"]

# ---- Pages ----------------------------------------------------------------------------------------------------------
myst_heading_anchors = 4

# ---- The API reference ----------------------------------------------------------------------------------------------
# The reference is built without these: they take long to import, and not everybody who reads has installed them.
autodoc_mock_imports = ["dp_accounting", "opacus", "torch"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
add_module_names = False
python_use_unqualified_type_names = True
default_role = "code"  # docstrings are written with single backticks
# "Raises: NotDecodable" may mean the name in `fl_gradcode` or in `fl_gradcode.errors`: they are one object.
suppress_warnings = ["ref.python"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# ---- The look: Furo, as in Flower's own docs ------------------------------------------------------------------------
html_theme = "furo"
html_title = "fl_gradcode"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"


def examples_as_code(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turns each indented block after a paragraph of a docstring into a code block, as people read it in an editor."""
    result: list[str] = []
    tree = any("├" in line for line in lines)  # of errors
    for place, line in enumerate(lines):
        before = lines[place - 2] if place >= 2 else ""
        starts = line.startswith("    ") and place >= 2 and not lines[place - 1].strip()
        if starts and before and not before.startswith((" ", "\t")) and not line.lstrip().startswith(">>>"):
            result += [f".. code-block:: {'text' if tree else 'python'}", ""]
        result.append(line)
    lines[:] = result


def files_of_the_repository(app: Any, name: str, source: list[str]) -> None:
    """Names the files outside docs/ that a page links to: the repository has them, and the site does not."""
    if "/" not in name:  # "../" of a page in a folder of docs/ is docs/ itself
        source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(#[^)]*)?\)", r"\1 (`\2` in the repository)", source[0])


def setup(app: Any) -> None:
    """Registers the hooks, ahead of napoleon's, and calls attributes by their name instead of "Variables"."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("source-read", files_of_the_repository)
    app.connect("autodoc-process-docstring", examples_as_code, priority=400)
