"""The table of folders in docs/design.md, generated from the folders' own docstrings: python -m experiments.house."""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["PLACES", "house_table", "with_house"]

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "design.md"
LIBRARY = ROOT / "fl_gradcode"
_BEGIN, _END = "<!-- house: python -m experiments.house -->", "<!-- end of house -->"


#: Folders and single files of the library, from the ground up. A module may import what stands before its own place,
#: and its own folder.
PLACES = (
    "errors",
    "_lazy",
    "_text",
    "_files",
    "_npy",
    "_logging",
    "_versions",
    "_flower_internals",
    "_seeding",
    "codes",
    "latency",
    "placement",
    "staleness",
    "planning",
    "protocol",
    "runlog",
    "grid",
    "privacy",
    "masking",
    "secagg",
    "enrolment",
    "client",
    "roster",
    "copies",
    "averaging",
    "checkpoints",
    "strategy",
    "matmul",
    "appcheck",
    "testing",
    "cli",
)


def house_table() -> str:
    """A Markdown table of the library's folders and files, from the top down."""
    rows = ["| place | what it is for | files |", "|---|---|---|"]
    for place in reversed(PLACES):
        folder = LIBRARY / place
        path = folder / "__init__.py" if folder.is_dir() else LIBRARY / f"{place}.py"
        summary = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        files = sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__") if folder.is_dir() else []
        rows.append(f"| `{place}` | {summary} | {', '.join(f'`{name}`' for name in files)} |")
    return "\n".join(rows)


def with_house(page: str) -> str:
    """The page with the table of today's folders between its two marks."""
    before, rest = page.split(_BEGIN)
    after = rest.split(_END)[1]
    return f"{before}{_BEGIN}\n{house_table()}\n{_END}{after}"


def main() -> None:
    PAGE.write_text(with_house(PAGE.read_text()))
    print(f"Written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
