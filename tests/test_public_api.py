"""What a user may rely on: the names in `__all__`, and what the wheel installs."""

import importlib
import re
import zipfile
from pathlib import Path
from typing import Literal, get_origin

import hatchling.build
import pytest

import fl_gradcode
import fl_gradcode.matmul

ROOT = Path(__file__).resolve().parents[1]

# The documented names. To add one is a decision, and belongs in docs and CHANGELOG.
PUBLIC = (
    "GradientCoding",
    "gradient_coding_mod",
    "GradientCode",
    "uncoded",
    "fractional_repetition",
    "cyclic_repetition",
    "Adaptive",
    "Approximation",
    "Coded",
    "Shards",
    "Discovered",
    "EarlyStopGrid",
    "VirtualGrid",
    "Ledger",
    "NotDecodable",
    "FlGradcodeError",
)


def test_all_is_the_documented_names() -> None:
    assert sorted(fl_gradcode.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name: str) -> None:
    docstring = getattr(fl_gradcode, name).__doc__ or ""
    assert docstring.strip()
    assert not docstring.startswith(f"{name}("), "a dataclass without a docstring is given its signature"


def test_the_public_names_of_products_are_documented() -> None:
    api = (ROOT / "docs" / "api.md").read_text()
    for name in fl_gradcode.matmul.__all__:
        docstring = getattr(fl_gradcode.matmul, name).__doc__ or ""
        assert docstring.strip() and not docstring.startswith(f"{name}(")
        assert re.search(rf"`{name}[`(]", api), f"{name} is not in docs/api.md"


def documented() -> list[tuple[str, str]]:
    """(module, name) of each name in the first tables of docs/api.md's sections."""
    found = []
    for section in (ROOT / "docs" / "api.md").read_text().split("\n## `")[1:]:
        module = section.split("`")[0]
        table = section.split("\n|")[1:]
        first = section[section.index("|") :].split("\n\n")[0] if table else ""
        for row in first.splitlines()[2:]:
            cell = re.split(r"(?<!\\)\|", row)[1]
            found += [(module, token.split("(")[0].split(".")[0]) for token in re.findall(r"`([^`]+)`", cell)]
    return found


def test_every_public_path_has_a_section() -> None:
    parts = ["appcheck", "checkpoints", "cli", "client", "copies", "masking", "protocol", "roster", "strategy", "_"]
    folders = {path.parent.name for path in (ROOT / "fl_gradcode").glob("*/__init__.py")} - {*parts}
    paths = {f"fl_gradcode.{name}" for name in (*folders, "averaging", "errors", "testing")}
    assert {module for module, _ in documented()} == {"fl_gradcode", *paths}


@pytest.mark.parametrize(("module", "name"), documented())
def test_a_documented_name_is_there_and_says_what_it_is(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    if isinstance(value, type) or callable(value):  # not a constant, nor a Literal of words
        assert (value.__doc__ or "").strip() or get_origin(value) is Literal


def test_wheel_holds_the_library_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # a build backend builds the current folder
    wheel = tmp_path / hatchling.build.build_wheel(str(tmp_path))
    files = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    metadata = wheel.name.split("-py3")[0] + ".dist-info"
    assert {file.parts[0] for file in files} == {"fl_gradcode", metadata}
    packed = {file.as_posix() for file in files if file.parts[0] == "fl_gradcode" and file.suffix == ".py"}
    assert packed == {path.relative_to(ROOT).as_posix() for path in (ROOT / "fl_gradcode").rglob("*.py")}
