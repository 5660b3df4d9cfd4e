"""The command `fl-gradcode check`: does an app keep the contract of coding?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from ._errors import one_sentence
from ._output import plain_table, print_lines

__all__ = ["check"]

_SHOWN = {"ok": "ok", "note": "note", "fails": "FAILS"}


def check(
    app: Annotated[Path, typer.Argument(help="Folder of a Flower app, which holds its pyproject.toml.")],
    run_config: Annotated[str, typer.Option(help='Values for the run config, such as "local-epochs=1 lr=0.1".')] = "",
    node_config: Annotated[str, typer.Option(help="Further values for the node config.")] = "",
    partitions: Annotated[
        int | None, typer.Option(help="Number of partitions, by default that of the app's simulation or 10.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether an app trains the same model with coding as without.

    The ServerApp is run until its first round. train() is then called with what it would send: for two partitions, in
    two orders and processes, after other partitions and after a missed round. No engine is started, and nothing leaves
    this machine. What train() writes to disk is written.

    Exit code: 0 if the app passes, 1 if it does not, 2 if it cannot be checked.
    """
    with one_sentence():
        from ..appcheck import check_app, settings_of

        report = check_app(
            app, run_config=settings_of(run_config), node_config=settings_of(node_config), partitions=partitions
        )
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        console = Console()
        table = plain_table()
        for heading in ("Checked", "", "Result"):
            table.add_column(heading)
        for one in report.findings:
            table.add_row(one.title, _SHOWN[one.verdict], escape(one.text))
        console.print(table)
        console.print("A coded run trains the same model as a plain one." if report.passed else "A coded run would "
                      "train another model. Fix what fails, and check again.")  # fmt: skip
        if report.passed:
            console.print()
            print_lines(console, [report.imports, *report.lines])
            console.print("n: how many nodes you have; s: how many may be slow, at most n - 1.")
    raise typer.Exit(0 if report.passed else 1)
