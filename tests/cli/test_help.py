"""`--help` of every command says what each of its arguments and options is."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest
import typer
from typer.testing import CliRunner

from fl_gradcode.cli.app import app


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, one in command.commands.items():
            yield from commands(one, (*path, name))
    else:
        yield path, command


COMMANDS = dict(commands(typer.main.get_command(app)))


def test_every_command_is_there() -> None:
    names = {" ".join(path) for path in COMMANDS}
    alone = {"check", "leakage", "plan", "place", "privacy", "status"}
    assert names == alone | {"keys make", "keys rotate", "keys check", "secure make", "secure check"} | {
        "secure agree",
        "secure identity",
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_tells_of_each_argument_and_option(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    shown = " ".join(result.stdout.replace("│", " ").split())
    for one in COMMANDS[path].params:
        told = getattr(one, "help", None)  # click 8.5 took that of typer's arguments away
        assert told, one.name
        assert " ".join(told.split())[:60] in shown, one.name
