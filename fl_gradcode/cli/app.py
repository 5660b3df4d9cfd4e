"""The command line `fl-gradcode`: its commands, each from a module of its own."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from .._versions import TESTED_FLOWER, library_version
from .check import check
from .leakage import leakage
from .place import place
from .plan import plan
from .privacy import keys, privacy
from .secure import secure
from .status import status

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    suggest_commands=False,  # click does, and two suggestions would stand side by side
)


def _print_version(wanted: bool) -> None:
    if wanted:
        first, last = TESTED_FLOWER
        typer.echo(f"fl-gradcode {library_version()} (Flower {version('flwr')}; tested with {first} to {last})")
        raise typer.Exit


@app.callback(epilog="Example: fl-gradcode plan virtual-machines --workers 30")
def _commands(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Gradient coding for Flower: rounds that neither wait for slow clients nor lose their data."""


app.command()(check)
app.command()(leakage)
app.command()(plan)
app.command()(place)
app.command()(privacy)
app.command()(status)
app.add_typer(keys, name="keys")
app.add_typer(secure, name="secure")


def main() -> None:
    """Runs the command `fl-gradcode` with the arguments of the process."""
    app()
