"""The command `fl-gradcode leakage`: what do the server and some workers learn from the replies to a secure request?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import InvalidSetting, NotCertified
from ._errors import one_sentence
from ._output import plain_table, print_lines

__all__ = ["leakage"]


def leakage(
    manifest: Annotated[Path, typer.Argument(help="The public manifest (secagg-manifest.json) or its body.")],
    colluders: Annotated[str, typer.Option(help="Workers that give the server their keys and data, such as 0,3.")] = "",
    missing: Annotated[str, typer.Option(help="Workers whose replies the server does not have, such as 5.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print what the server learns from the replies to one request, together with some workers.

    It is computed from the code, the holders and the graph of masks that the manifest has, not from what it promises.

    Exit code: 0 if at most one sum over two or more classes is learnt, 1 if more is, 2 if it cannot be computed.
    """
    with one_sentence():
        from .. import secagg

        body = secagg.read_body(manifest.read_bytes())
        found = secagg.leakage(
            body.classes, body.graph, colluders=_workers(colluders, "colluders"), missing=_workers(missing, "missing")
        )
        try:
            certificate = body.certificate()
            certified = f"any {certificate.colluders} workers ({certificate.method})"
        except NotCertified as error:
            certified = f"NOT as it says: {error}"
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "colluders": found.colluders,
                    "replies": found.replies,
                    "components": [list(shards) for shards in found.shards],
                    "dimensions": found.dimensions,
                    "certified": certified,
                    "protects": found.protects,
                    "learnt": found.sentence,
                },
                indent=2,
            )
        )
    else:
        classes, graph = body.classes, body.graph
        streams = max(len(graph.edges_at(support)) for support in classes.supports)
        table = plain_table(header=False)
        table.add_column()
        table.add_column()
        table.add_row("code", f"{classes.n} workers, {classes.k} shards in {len(classes)} classes, {classes.sending}")
        table.add_row("ring", f"modulo {classes.ring.modulus}")
        table.add_row(
            "graph",
            f"{' '.join(map(str, (graph.family, *graph.parameters)))}: {len(graph.edges)} edges, at most {streams} "
            "mask streams a worker",
        )
        table.add_row("certified", certified)
        table.add_row("replies", f"{len(found.replies)} of {classes.n} workers")
        table.add_row("dimensions", f"{found.dimensions} that are free of masks")
        console = Console()
        console.print(table)
        print_lines(console, [found.sentence])
    raise typer.Exit(0 if found.protects or not found.dimensions else 1)


def _workers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise InvalidSetting(f"--{option} {text!r} must be workers' numbers, such as 0,3.") from None
