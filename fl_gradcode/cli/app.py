"""The command line `fl-gradcode`: its commands, each from a module of its own."""

from __future__ import annotations

import typer

from .check import check
from .leakage import leakage
from .place import place
from .plan import plan
from .privacy import keys, privacy
from .secure import secure
from .status import status

__all__ = ["app", "main"]

app = typer.Typer(
    help="Gradient coding for Flower: rounds that neither wait for slow clients nor lose their data.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
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
