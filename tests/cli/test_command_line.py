"""What every command shares: the version, short help, and one suggestion for a misspelt name."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from typer.testing import CliRunner

from fl_gradcode._versions import library_version
from fl_gradcode.cli.app import app


def shown(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_the_version_names_flower_too() -> None:
    text = shown("--version")
    assert text.startswith(f"fl-gradcode {library_version()} (Flower {version('flwr')}; tested with ")


@pytest.mark.parametrize("path", [(), ("plan",), ("keys",), ("keys", "make"), ("secure", "check")], ids=" ".join)
def test_short_help_is_the_long_one(path: tuple[str, ...]) -> None:
    assert shown(*path, "-h") == shown(*path, "--help")


@pytest.mark.parametrize(("typed", "meant"), [(("stauts",), "status"), (("keys", "mkae"), "make")], ids=str)
def test_a_misspelt_command_gets_one_suggestion(typed: tuple[str, ...], meant: str) -> None:
    text = shown(*typed, code=2)
    suggests = tuple(map(int, version("click").split(".")[:2])) >= (8, 4)
    assert text.count("Did you mean") == suggests
    assert not suggests or f"Did you mean '{meant}'?" in text


def test_a_misspelt_law_gets_a_suggestion() -> None:
    assert shown("plan", "virtual-machine", code=2).endswith("Did you mean virtual-machines?")
