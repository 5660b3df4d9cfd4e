"""`fl-gradcode place`: write each node's folder of shards, or check folders that exist."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from ..codes import as_pattern, cyclic_repetition, fractional_repetition
from ..errors import InvalidSetting
from ..placement import (
    ASSIGNMENT,
    MANIFEST,
    SPLITS,
    Assignment,
    Finding,
    Manifest,
    assign,
    cut,
    shards_in,
    unfinished,
    verify_folder,
    write_folders,
)
from ._assignment_file import read_assignment
from ._errors import one_sentence
from ._output import plain_table, print_lines

__all__ = ["place"]

_CODES = ("fractional", "cyclic", "assignment")


@dataclass(frozen=True)
class _Wish:
    """The options that say who holds which shards.

    Attributes:
        workers: Number of workers.
        s: Straggler tolerance.
        m: Upload reduction.
        code: One of `_CODES`; None: chosen by the other options.
        capacities: Number of shards that each worker can hold.
        domains: Site, rack or provider of each worker.
        assignment: JSON file with the shards of each worker.
    """

    workers: int | None
    s: int
    m: int
    code: str | None
    capacities: list[int] | None
    domains: list[str] | None
    assignment: Path | None

    def n(self) -> int:
        """Returns the number of workers, from any option that implies it.

        Raises:
            InvalidSetting: No option says it, or two options differ.
        """
        told = {
            "--workers": self.workers,
            "--capacities": None if self.capacities is None else len(self.capacities),
            "--domains": None if self.domains is None else len(self.domains),
            "--assignment": None if self.assignment is None else len(read_assignment(self.assignment)),
        }
        given = {name: value for name, value in told.items() if value is not None}
        if not given:
            raise InvalidSetting("The number of workers is missing: pass --workers N.")
        if len({*given.values()}) > 1:
            raise InvalidSetting(
                f"Options differ in the number of workers: {', '.join(f'{a} {b}' for a, b in given.items())}."
            )
        n = next(iter(given.values()))
        if n < 1:
            raise InvalidSetting(f"--workers {n} must be at least 1.")
        return n

    def held(self, k: int) -> tuple[list[tuple[int, ...]], str]:
        """Returns which of the k shards each worker holds, and the code as a line of Python.

        Raises:
            InvalidSetting: The options contradict each other.
        """
        n, s, m = self.n(), self.s, self.m
        if s < 0 or m < 1:
            raise InvalidSetting(f"--s {s} must be at least 0, and --m {m} at least 1.")
        free = (self.capacities, self.domains, self.assignment)
        code = self.code or ("fractional" if all(one is None for one in free) else "assignment")
        if code not in _CODES:
            raise InvalidSetting(f"--code {code!r} must be one of {', '.join(_CODES)}.")
        if code != "assignment" and any(one is not None for one in free):
            raise InvalidSetting(
                f"--code {code} already says who holds what: leave out --capacities, --domains and --assignment."
            )
        if code == "fractional":
            made = fractional_repetition(n, s, k=k, m=m)
            line = f"fractional_repetition({n}, {s}{f', k={k}' if k != n else ''}{f', m={m}' if m > 1 else ''})"
            return [made.shards_of(worker) for worker in range(n)], line
        if code == "cyclic":
            if k != n or m != 1:
                raise InvalidSetting(
                    f"--code cyclic needs as many shards as workers, and m=1; here k={k}, n={n}, m={m}."
                )
            made = cyclic_repetition(n, s, rng=np.random.default_rng(0))
            return [
                made.shards_of(worker) for worker in range(n)
            ], f"cyclic_repetition({n}, {s}, rng=np.random.default_rng(0))"
        if self.assignment is not None:
            if self.capacities or self.domains:
                raise InvalidSetting("--assignment already says who holds what: leave out --capacities and --domains.")
            plan = Assignment(as_pattern(read_assignment(self.assignment), k))
            if plan.largest_s(m) < s:
                few = min(range(k), key=lambda shard: len(plan.holders_of(shard)))
                raise InvalidSetting(
                    f"Shard {few} has {len(plan.holders_of(few))} holders in {self.assignment}; s={s} at m={m} needs "
                    f"{s + m}."
                )
        else:
            # Without capacities, every worker takes an equal part.
            capacities = self.capacities or [-(-k * (s + m) // n)] * n
            plan = assign(k, capacities, s=s, m=m, domains=self.domains)
        held = [plan.shards_of(worker) for worker in range(n)]
        return held, f"for_assignment(Manifest.read(path).held, s={s}{f', m={m}' if m > 1 else ''})"


def _numbers(text: str | None) -> list[int] | None:
    """Returns whole numbers from a text with commas between them."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidSetting(
            f"--capacities {text!r} must be whole numbers with commas between, such as 6,6,3,3."
        ) from None


def _words(text: str | None) -> list[str] | None:
    """Returns words from a text with commas between them."""
    return None if text is None else [part.strip() for part in text.split(",")]


_SHOWN = 40  # lines of a table


def place(
    source: Annotated[
        Path | None,
        typer.Argument(help="A folder whose entries are the shards; or a .npz or .csv, which is cut into shards."),
    ] = None,
    out: Annotated[
        Path | None, typer.Argument(help="Folder to write, with a folder node-0, node-1, ... for each node.")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-n", help="Number of workers.")] = None,
    s: Annotated[int, typer.Option("--s", "-s", help="Straggler tolerance of the code.")] = 1,
    m: Annotated[int, typer.Option("--m", "-m", help="Upload reduction of the code.")] = 1,
    code: Annotated[
        str | None,
        typer.Option(
            help=f"Who holds what: {', '.join(_CODES)} (default: fractional; assignment with any of the next three)."
        ),
    ] = None,
    capacities: Annotated[str | None, typer.Option(help="Number of shards that each worker can hold: 6,6,3,3.")] = None,
    domains: Annotated[str | None, typer.Option(help="Site, rack or provider of each worker: a,a,b,b.")] = None,
    assignment: Annotated[Path | None, typer.Option(help="JSON file with the list of shards of each worker.")] = None,
    shards: Annotated[
        int | None, typer.Option(help="Number of shards to cut a file into (default: one for each worker).")
    ] = None,
    split: Annotated[str, typer.Option(help=f"How a file is cut: {', '.join(SPLITS)}.")] = "iid",
    seed: Annotated[int, typer.Option(help="Seed of the split.")] = 0,
    link: Annotated[bool, typer.Option("--link", help="Hard links instead of copies.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier placement.")] = False,
    check: Annotated[
        Path | None, typer.Option(help="Instead of placing: verify every byte of this folder of a node.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With --check: the manifest.json of all shards to compare with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Write the folder of shards that each node must receive, or verify such a folder (--check)."""
    with one_sentence():
        if check is not None:
            if source is not None:
                raise InvalidSetting(f"--check verifies one folder: leave out {source}.")
            findings = verify_folder(check, against)
        else:
            if source is None or out is None or against is not None:
                raise InvalidSetting(
                    "Give the source and the output folder: fl-gradcode place SOURCE OUT --workers N; or --check "
                    "FOLDER [--against MANIFEST]."
                )
            wish = _Wish(workers, s, m, code, _numbers(capacities), _words(domains), assignment)
            manifest = _write(source, out, wish, shards, split, seed, link=link, force=force)
    if check is not None:
        _tell_findings(check, findings, as_json=as_json)
        if any(one.kind in ("wrong", "missing") for one in findings):
            raise typer.Exit(1)
        return
    assert out is not None
    _tell_placed(manifest, out.resolve(), linked=link, as_json=as_json)


def _write(
    source: Path, out: Path, wish: _Wish, shards: int | None, split: str, seed: int, *, link: bool, force: bool
) -> Manifest:
    if not source.exists():
        raise InvalidSetting(f"There is no {source}.")
    if source.is_dir() and (shards is not None or split != "iid"):
        raise InvalidSetting(f"--shards and --split cut a file; {source} is a folder, whose entries are the shards.")
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
    table = plain_table(title=f"{manifest.k} shards for {len(rows)} workers")
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
        f"To bring to the nodes: {_megabytes(travels)} MB, {times}{'; here they are links' if linked else ''}. Nodes "
        "receive other owners' data, so every owner must agree.",
        f"Each node gets its folder, such as {out / 'node-0'}, and is started with",
        f"    --node-config 'partition-id=0 num-partitions={manifest.k} shards-dir=\"/path/to/node-0\"'",
        "The server:",
        f"    {server}",
        f"Keys, for privacy: fl-gradcode keys make FOLDER --assignment {out / ASSIGNMENT}",
    ]  # fmt: skip
    print_lines(console, lines)


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
        lines.append(f"Fetch {which} again, for example with rsync --checksum, and repeat the check.")
    print_lines(console, lines)


def _megabytes(size: int) -> str:
    if 0 < size < 1000:
        return "<0.001"
    return f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}"
