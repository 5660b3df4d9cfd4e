"""Errors of commands: one sentence for the user, and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import FlGradcodeError

__all__ = ["one_sentence"]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the command with exit code 2 and one sentence on stderr if the block raises an expected error."""
    try:
        yield
    except (FlGradcodeError, ImportError, OSError) as error:
        typer.echo(f"fl-gradcode: {error}", err=True)
        raise typer.Exit(2) from None
