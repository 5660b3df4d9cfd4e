"""`fl-gradcode place`: each node's folder of shards with a manifest, and whether a folder is what its manifest says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .cutting import SPLITS, cut
from .errors import FlGradcodeError
from .manifest import MANIFEST, Manifest
from .node_folders import ASSIGNMENT, shards_in, unfinished, write_folders
from .placement_wish import CODES, Wish, numbers, words
from .privacy_commands import one_sentence
from .shards import Finding, verify_folder

__all__ = ["place"]

_SHOWN = 40  # lines of a table


def place(
    source: Annotated[
        Path | None,
        typer.Argument(help="A folder whose entries are the shards; or a .npz or .csv, which is cut into shards."),
    ] = None,
    out: Annotated[Path | None, typer.Argument(help="Where; node-0, node-1, ... in it go to the nodes.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Number of workers.")] = None,
    s: Annotated[int, typer.Option("--s", "-s", help="Straggler tolerance of the code.")] = 1,
    m: Annotated[int, typer.Option("--m", "-m", help="Upload reduction of the code.")] = 1,
    code: Annotated[
        str | None,
        typer.Option(
            help=f"Who holds what: {', '.join(CODES)} (fractional by default, assignment with the next three)."
        ),
    ] = None,
    capacities: Annotated[str | None, typer.Option(help="Shards that each worker can take: 6,6,3,3.")] = None,
    domains: Annotated[str | None, typer.Option(help="Site, rack or provider of each worker: a,a,b,b.")] = None,
    assignment: Annotated[Path | None, typer.Option(help="A JSON file with the list of shards of each worker.")] = None,
    shards: Annotated[int | None, typer.Option(help="Cut a file into so many; as many as workers by default.")] = None,
    split: Annotated[str, typer.Option(help=f"How a file is cut: {', '.join(SPLITS)}.")] = "iid",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier placement.")] = False,
    check: Annotated[Path | None, typer.Option(help="Instead: verify every byte of a node's folder.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="With --check: the manifest.json of all shards, to compare with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Bring data to nodes: the folder that each must receive, or (--check) whether one is as it should be."""
    with one_sentence():
        if check is not None:
            if source is not None:
                raise FlGradcodeError(f"--check verifies one folder: leave out {source}.")
            findings = verify_folder(check, against)
        else:
            if source is None or out is None or against is not None:
                raise FlGradcodeError(
                    "Say what to place, and where: fl-gradcode place SOURCE OUT --workers N; or --check FOLDER "
                    "[--against MANIFEST]."
                )
            wish = Wish(workers, s, m, code, numbers(capacities), words(domains), assignment)
            manifest = _write(source, out, wish, shards, split, seed, link=link, force=force)
    if check is not None:
        _tell_findings(check, findings, as_json=as_json)
        if any(one.kind in ("wrong", "missing") for one in findings):
            raise typer.Exit(1)
        return
    assert out is not None
    _tell_placed(manifest, out.resolve(), linked=link, as_json=as_json)


def _write(
    source: Path, out: Path, wish: Wish, shards: int | None, split: str, seed: int, *, link: bool, force: bool
) -> Manifest:
    if not source.exists():
        raise FlGradcodeError(f"There is no {source}.")
    if source.is_dir() and (shards is not None or split != "iid"):
        raise FlGradcodeError(f"--shards and --split cut a file; {source} is a folder, whose entries are the shards.")
    n = wish.n()
    with unfinished(out, source, force=force) as draft:
        if source.is_dir():
            found: dict[Path, int | None] = shards_in(source)
        else:
            pieces = draft / "shards"
            pieces.mkdir()
            found = {**cut(source, pieces, split, shards, n, seed)}
        held, line = wish.held(len(found))
        return write_folders(draft, found, held, code=line, link=link, like=source if source.is_dir() else None)


def _tell_placed(manifest: Manifest, out: Path, *, linked: bool, as_json: bool) -> None:
    assert manifest.held is not None
    path = out / MANIFEST
    by_number = {shard.number: shard for shard in manifest.shards}
    rows: list[dict[str, Any]] = []
    for worker, held in enumerate(manifest.held):
        counts = [by_number[number].examples for number in held]
        known = [count for count in counts if count is not None]
        rows.append(
            {
                "worker": worker,
                "folder": str(out / f"node-{worker}"),
                "shards": list(held),
                "examples": sum(known) if len(known) == len(counts) else None,
                "bytes": sum(by_number[number].bytes for number in held),
            }
        )
    data, travels = sum(shard.bytes for shard in manifest.shards), sum(row["bytes"] for row in rows)
    server = f"GradientCoding(FedAvg(), {manifest.code.replace('(path)', f'({str(path)!r})')}, manifest={str(path)!r})"
    if as_json:
        answer = {"manifest": str(path), "assignment": str(out / ASSIGNMENT), "server": server, "k": manifest.k,
                "bytes": data, "bytes-that-travel": travels, "workers": rows}  # fmt: skip
        typer.echo(json.dumps(answer, indent=2))
        return
    table = Table(title=f"{manifest.k} shards for {len(rows)} workers", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("worker", justify="right")
    table.add_column("shards")
    for column in ("examples", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows[:_SHOWN]:
        listed = ", ".join(map(str, row["shards"][:12])) + (
            f", ... ({len(row['shards'])})" if len(row["shards"]) > 12 else ""
        )
        examples = "?" if row["examples"] is None else f"{row['examples']:,}"
        table.add_row(str(row["worker"]), listed, examples, _megabytes(row["bytes"]))
    if len(rows) > _SHOWN:
        table.add_row("...", f"and {len(rows) - _SHOWN} more: --json lists all", "", "")
    console = Console()
    console.print(table)
    times = f"{travels / data:.3g} times the data"
    lines = [
        f"To bring to the nodes: {_megabytes(travels)} MB, {times}{'; here they are links' if linked else ''}. Data "
        "move to nodes that did not have them: see to it that those whom they are of agree.",
        f"Each node gets its folder, such as {out / 'node-0'}, and is started with",
        f"    --node-config 'partition-id=0 num-partitions={manifest.k} shards-dir=\"/path/to/node-0\"'",
        "The server:",
        f"    {server}",
        f"Keys, for privacy: fl-gradcode keys make FOLDER --assignment {out / ASSIGNMENT}",
    ]  # fmt: skip
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _tell_findings(folder: Path, findings: tuple[Finding, ...], *, as_json: bool) -> None:
    bad = [one for one in findings if one.kind in ("wrong", "missing")]
    if as_json:
        answer = {"folder": str(folder), "right": not bad, "findings": [asdict(one) for one in findings]}
        typer.echo(json.dumps(answer, indent=2))
        return
    console = Console()
    right = sum(one.kind == "right" for one in findings)
    told_first = [one for kind in ("wrong", "missing", "extra") for one in findings if one.kind == kind]
    for one in told_first[:_SHOWN]:
        what = f"shard {one.number} ({one.name})" if one.number is not None else one.name
        told = one.told or ("" if one.kind == "missing" else "no shard of the manifest; nobody trains on it")
        style = "yellow" if one.kind == "extra" else "bold red"
        console.print(
            f"[{style}]{one.kind:8}[/] {escape(what)}{': ' if told else ''}{escape(told)}",
            highlight=False,
            soft_wrap=True,
        )
    if len(told_first) > _SHOWN:
        console.print(f"... and {len(told_first) - _SHOWN} more: --json lists all")
    lines = [f"{right} of {right + len(bad)} shards in {folder} are right."]
    if bad:
        worker = Manifest.read(folder).worker
        which = "its folder" if worker is None else f"the folder node-{worker}"
        lines.append(f"Fetch {which} anew, such as by rsync --checksum, and check it again.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _megabytes(size: int) -> str:
    if 0 < size < 1000:
        return "<0.001"
    return f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"
