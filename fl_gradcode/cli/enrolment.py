"""The commands of an owner whose node exchanges its keys through the server: `secure identity` and `secure agree`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._files import MEGABYTE, make_folder, read_file, replace_file
from ..errors import InvalidSetting
from ._errors import one_sentence

if TYPE_CHECKING:
    from ..secagg import ManifestBody

__all__ = ["agree", "allowed_in", "identity", "tell_node", "write_body"]

_LARGEST = 64 * MEGABYTE


def identity(
    folder: Annotated[Path, typer.Argument(help="The node's folder; made if it is missing.")],
    worker: Annotated[int, typer.Option(help="Number of the worker, which is the node's partition-id.")],
) -> None:
    """Make a node's identity, and print its public line for the allow-list."""
    with one_sentence():
        from ..enrolment import make_identity

        made = make_identity(folder, worker)
    typer.echo(made.line)
    typer.echo(f"The private key stays in {folder}. Add the line to the allow-list that all owners compare.", err=True)


def agree(
    folder: Annotated[Path, typer.Argument(help="The node's folder, with its identity.")],
    body: Annotated[Path, typer.Argument(help="secagg-body.json, as `secure make --allow-list` wrote it.")],
    allow_list: Annotated[
        Path | None, typer.Option(help="The owner's own copy of the allow-list, with the lines of all workers.")
    ] = None,
    first_use: Annotated[
        bool,
        typer.Option("--first-use", help="There is no allow-list: trust the identities that come first."),
    ] = False,
) -> None:
    """Pin the body that all owners have agreed on in a node's folder; the node then takes part under no other one."""
    with one_sentence():
        from ..enrolment import agree as pin

        keys = allowed_in(allow_list, first_use=first_use)
        try:
            text = read_file(body, _LARGEST)
        except OSError as error:
            raise InvalidSetting(f"The body {body} cannot be read: {error.strerror or error}.") from None
        agreed = pin(folder, text, keys)
    typer.echo(f"Agreed, in {folder}. Compare with the other owners:")
    _tell_digests(agreed)


def allowed_in(path: Path | None, *, first_use: bool) -> tuple[str, ...] | None:
    """Returns the keys of an allow-list, or None for trust on first use.

    Raises:
        InvalidSetting: Neither or both were chosen, or the file cannot be read.
    """
    from ..enrolment import allow_list

    if (path is None) != first_use:
        raise InvalidSetting("Give an --allow-list, or pass --first-use to trust the identities that come first.")
    return None if path is None else allow_list(path)


def write_body(folder: Path, body: ManifestBody) -> None:
    """Write a body, and print what its owners do next."""
    from ..enrolment import BODY_FILE

    make_folder(folder)
    replace_file(folder / BODY_FILE, body.text)
    typer.echo(f"A body for {body.classes.n} workers in {folder / BODY_FILE}:")
    _tell_digests(body)
    typer.echo("Every owner pins it by fl-gradcode secure agree, and starts the node with")
    listed = ' secagg-allow-list="/path/to/allow-list"' if body.identities else ""
    typer.echo(
        f'    --node-config \'partition-id=0 num-partitions=... secagg-dir="/path/to/node-0"{listed} '
        f"secagg-colluders={body.colluders}'"
    )
    typer.echo(f"The server gets the body alone: secure=SecureAggregation({str(folder / BODY_FILE)!r}).")


def tell_node(folder: Path) -> ManifestBody:
    """Print which set-up a node with an identity is in; returns the body that its owner has agreed to."""
    from ..enrolment import EnrolledNode, read_identity

    node = EnrolledNode(folder, read_identity(folder).worker, None)
    _tell_digests(node.body)
    typer.echo(f"  worker      {node.worker}")
    typer.echo(f"  keys        {node.told}")
    return node.body


def _tell_digests(body: ManifestBody) -> None:
    from ..enrolment import allow_list_digest

    typer.echo(f"  body        {body.digest.hex()}")
    identities = allow_list_digest(body.identities) if body.identities else "none: the first identities are trusted"
    typer.echo(f"  allow-list  {identities}")
